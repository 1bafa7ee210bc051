"""The difference of two reports: paired where cases are shared, said so where they are not, and what changed beside figures."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import browser
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_report import Page, classification, edited, segmentation

import meristem
from meristem.cli import main
from meristem.errors import MeristemError
from meristem.platform.evaluation.results import Cell, Results
from meristem.platform.evaluation.statistics import Estimate, bootstrap, mean_of
from meristem.platform.report import difference
from meristem.platform.report.difference import Differences, differ, independent, write_difference
from meristem.platform.report.page import write_report
from meristem.platform.report.pictures import Pictures


def small(gain: float = 0.03, subjects: int = 20) -> Results:
    return edited(segmentation(subjects=subjects, gain=gain), lambda c: c if c.labels == 5 and c.arm != "simclr" else None)


def better(cell: Cell, by: float) -> Cell:
    """All metrics of the pretrained arm raised."""
    if cell.arm != "mae":
        return cell
    return cell.model_copy(update={"cases": tuple(
        case.model_copy(update={"metrics": {m: {c: v + by for c, v in values.items()} for m, values in case.metrics.items()}})
        for case in cell.cases)})


def test_shared_cases_are_paired_and_what_did_not_change_is_zero() -> None:
    before = small()
    d = differ(before, edited(before, lambda c: better(c, 0.004)), replicates=400)
    by = {(c.arm, c.metric): c for c in d.changes}
    assert all(c.paired and c.subjects == 20 for c in d.changes)
    assert by["mae", "dice"].difference == pytest.approx((0.004,) * 3) and by["mae", "dice"].clear
    assert by["scratch", "dice"].difference == pytest.approx((0, 0, 0)) and not by["scratch", "dice"].clear
    assert by["mae", "dice"].after.value - by["mae", "dice"].before.value == pytest.approx(0.004)
    assert d.verdict.startswith("Of 2 figures in Dice 1 is better (most mae, fine-tuned, 5 labels, +0.004 [+0.004, +0.004])")
    assert "1 did not change" in d.verdict and not d.doubts and not d.recipes and not d.versions
    worse = differ(edited(before, lambda c: better(c, 0.004)), before, replicates=400)
    assert "1 is worse (most mae" in worse.verdict
    hd = differ(before.model_copy(update={"metric": "hd95"}), edited(before, lambda c: better(c, 0.4)).model_copy(
        update={"metric": "hd95"}), replicates=400)
    assert "1 is worse" in hd.verdict  # of a distance more is worse


def test_a_paired_interval_is_the_bootstrap_of_differences() -> None:
    before, after = small(), small(gain=0.05)
    c = next(c for c in differ(before, after, replicates=400).changes if (c.arm, c.metric) == ("mae", "dice"))
    values = [r.group([x for x in r.cells if x.arm == "mae"]).subject_values("dice") for r in (after, before)]
    assert c.difference == pytest.approx(bootstrap(mean_of(values[0] - values[1]), 20, replicates=400))


def test_other_data_are_not_paired_and_the_page_says_so() -> None:
    before = small()
    other = before.model_copy(update={"dataset": before.dataset.model_copy(update={"manifest": "ffff"})})
    d = differ(before, other, replicates=200)
    assert not any(c.paired for c in d.changes) and "manifest b31f90ac22d4 before, ffff after" in d.doubts[0]
    mae = next(c for c in d.changes if (c.arm, c.metric) == ("mae", "dice"))
    assert mae.difference.value == 0 and mae.difference.high - mae.difference.low > 0.005
    assert ("manifest", "b31f90ac22d4", "ffff") in {(t.what, t.before, t.after) for t in d.data}
    assert "none changed beyond its interval" in d.verdict


def test_fewer_cases_and_seeds_are_paired_over_what_is_shared() -> None:
    before = small()
    after = edited(before, lambda c: c.model_copy(update={"cases": c.cases[6:]}) if c.seed < 2 else None)
    d = differ(before, after, replicates=200)
    assert all(c.paired and c.subjects < 20 for c in d.changes)
    for said in ("not all that one of them did", "seeds differ (3 before, 2 after)"):
        assert any(said in doubt for doubt in d.doubts)


def test_sets_are_paired_by_their_own_statistic() -> None:
    before = edited(classification(n=60), lambda c: c if c.labels == 20 else None)
    d = differ(before, before, replicates=200)
    assert {c.metric for c in d.changes} >= {"auroc", "brier"}
    assert all(c.paired and c.difference.value == 0 for c in d.changes)


@given(st.floats(-5, 5), st.floats(-5, 5), st.tuples(*[st.floats(0, 3)] * 4))
def test_independent_intervals_hold_the_difference_and_are_wider_than_either(a: float, b: float, r: tuple[float, ...]) -> None:
    one, two = Estimate(a, a - r[0], a + r[1]), Estimate(b, b - r[2], b + r[3])
    d = independent(one, two)
    assert d.low <= d.value + 1e-9 and d.value <= d.high + 1e-9
    assert d.high - d.low >= max(r[0] + r[1], r[2] + r[3]) * 0.7 - 1e-9
    assert independent(two, one).value == -d.value and independent(two, one).low == pytest.approx(-d.high)


def test_independent_intervals_cover() -> None:
    """Of two means with normal intervals it is the normal interval of their difference: 95 % of draws hold 0."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        x, y = rng.normal(0, 1, 2)
        one, two = Estimate(x, x - 1.96, x + 1.96), Estimate(2 * y, 2 * y - 3.92, 2 * y + 3.92)
        d = independent(one, two)
        held += d.low <= 0 <= d.high
    assert 0.935 < held / 2000 < 0.965


def changed(before: Results) -> Results:
    after = edited(before, lambda c: better(c, 0.01))
    return after.model_copy(update={
        "settings": {"volume/mae": {"masking": {"x": {"random": 0.9}}, "train": {"steps": 5000, "lr": 1e-3, "ema": 0.99}}},
        "versions": {**before.versions, "torch": "2.16.0"}})


def test_the_page_tells_what_changed_beside_the_figures(tmp_path: Path) -> None:
    before = small()
    after = changed(before)
    path = write_difference([before], [after], tmp_path)
    page = Page(path)
    rows = {tuple(row) for name, table in page.tables if name == "turns" for row in table}
    assert ("volume/mae", "masking.x.random", "0.75", "0.9") in rows and ("volume/mae", "train.ema", "–", "0.99") in rows
    assert ("torch", "2.15.0", "2.16.0") in rows and not any("train.lr" in row for row in rows)
    assert "Differences" in page.text and "The same in both." in page.text
    kept = Differences.model_validate_json((tmp_path / "difference.json").read_text())
    (d,) = kept.differences
    assert d.verdict in page.text
    table = page.table("changes")
    c = next(c for c in d.changes if (c.arm, c.metric) == ("mae", "dice"))
    row = next(r for r in table if r[0] == "mae, fine-tuned, 5 labels")
    assert row[1].startswith(f"{c.before.value:.3f} [") and row[3].startswith("+0.010 [") and row[4] == "20, paired"
    levels = [int(tag[1]) for tag, _ in page.tags if tag in ("h1", "h2", "h3")]
    assert levels[0] == 1 and all(b - a <= 1 for a, b in pairwise(levels))


@pytest.mark.skipif(browser.found() is None, reason="no Chromium on this machine")
def test_the_difference_page_in_a_browser(tmp_path: Path) -> None:
    before = small()
    path = write_difference([before], [changed(before)], tmp_path)
    with browser.Browser(tmp_path / "profile") as window:
        for width in (1200, 360):
            shown = window.show(path, width)
            assert shown["wide"] == 0 and [image["drawn"] for image in shown["images"]] == [True]
        assert window.said == [] and {url for url in window.asked if not url.startswith("data:")} == {path.as_uri()}


def test_reports_and_evaluations_are_compared_by_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    write_report([small()], [Pictures()], [[]], one)  # a report alone
    two.mkdir()
    changed(small()).save(two / "results.json")
    monkeypatch.setattr("sys.argv", ["meristem", "report", str(two), "--against", str(one), "--out", str(tmp_path / "d")])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "d" / "difference.html")
    assert json.loads((tmp_path / "d" / "difference.json").read_text())["differences"][0]["verdict"].startswith("Of 2")
    with pytest.raises(MeristemError, match="one later"):
        meristem.report([one, two], against=one)
    (one / "report.json").write_text("{}")
    with pytest.raises(MeristemError, match="no report that can be compared"):
        difference.read(one)
    with pytest.raises(MeristemError, match="no study"):
        write_difference([small()], [classification(n=20), small().model_copy(update={"task": "other"})], tmp_path)
