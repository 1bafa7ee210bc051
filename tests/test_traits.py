"""Site, scanner, sex and age of a table become coarse groups; nothing finer, and nothing else of the table, leaves memory."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from npy_modality import Npy
from test_privacy import CANARY, found_in

import meristem
from meristem.platform.data.manifest import Manifest, Row
from meristem.platform.data.traits import traits
from meristem.platform.evaluation.results import Results


def row(index: int, **meta: float | str) -> Row:
    return Row(index, f"case-{index}", f"sub-{index}", (Path("x"),), "x", meta=meta)


def values(trait: str, *given: float | str, column: str = "") -> list[str]:
    rows = [row(i, **{column or trait: value}) for i, value in enumerate(given)]
    found = traits(rows, rows).get(trait, {})
    return [found.get(r.case, "") for r in rows]


def test_ages_are_bands_of_ten_years_and_the_old_are_one() -> None:
    assert values("age", 9.0, 63.4, "063Y", "006M", "030M", 79.0, "89+", 104.0, "n/a", "anna", -1.0, column=" Age ") == [
        "0–9", "60–69", "60–69", "0–9", "0–9", "70–79", "80 and over", "80 and over", "", "", ""]


def test_sexes_are_words_of_a_list_and_codes_are_not_guessed() -> None:
    assert values("sex", "F", "male", "Woman", 1.0, "Zoe Miller", column="Gender") == ["female", "male", "female", "", ""]


def test_sites_are_numbered_by_their_names_in_all_rows() -> None:
    rows = [row(i, centre=f"St {name}") for i, name in enumerate(("Zeno 10", "Anne", "Zeno 9", "Anne"))]
    assert traits(rows, rows[:1] + rows[3:]) == {"site": {"case-0": "3", "case-3": "1"}}
    assert traits([row(0)], [row(0)]) == {}


@given(st.dictionaries(st.sampled_from(["site", "scanner", "sex", "age", "name", "birth", "comment"]), st.text(max_size=12)))
def test_nothing_that_was_written_comes_out(meta: dict[str, str]) -> None:
    told = {value for of in traits([row(0, **meta)], [row(0, **meta)]).values() for value in of.values()}
    assert told <= {"1", "female", "male", "other", "80 and over", *(f"{a}–{a + 9}" for a in range(0, 80, 10))}


def test_participants_of_bids_say_whose_sample_it_is(tmp_path: Path) -> None:
    for name in ("sub-01/anat/sub-01_T1w.npy", "sub-02/anat/sub-02_T1w.npy", "sub-03/anat/sub-03_T1w.npy"):
        (tmp_path / name).parent.mkdir(parents=True)
        np.save(tmp_path / name, np.zeros((4, 4, 4), np.int16))
    (tmp_path / "participants.tsv").write_text("participant_id\tage\tsex\tsite\nsub-02\t34\tF\tn/a\nsub-01\t71.5\tM\tnorth\n")
    m = Manifest.discover(tmp_path, Npy())
    assert [r.meta for r in m.rows] == [{"age": 71.5, "sex": "M", "site": "north"}, {"age": 34.0, "sex": "F"}, {}]
    assert traits(m.rows, m.rows)["age"] == {m.rows[0].case: "70–79", m.rows[1].case: "30–39"}


@pytest.fixture
def table(image_folder: Path) -> Path:
    """A CSV of the images with what a clinic writes beside them."""
    lines = ["path,class,split,site,age,sex,name,birthday"]
    lines += [f"{kind}/{i:02d}.png,{kind},{'test' if i > 1 else 'train'},{CANARY} {i % 2},{40 + i}.{i}25,"
              f"{'fm'[i % 2]},{CANARY},1950-01-0{i + 1}" for kind in ("dark", "light") for i in range(6)]
    (image_folder / "list.csv").write_text("\n".join(lines))
    return image_folder / "list.csv"


def test_an_evaluation_keeps_groups_and_its_report_no_case_of_them(table: Path, tmp_path: Path) -> None:
    page = meristem.evaluate("classification", table, tmp_path / "eval", ["modality=image"], inits=["metadata"], seeds=1,
                             protocols=["knn"], cache=tmp_path / "c", quiet=True)
    results = Results.load(tmp_path / "eval" / "results.json")
    assert {trait: set(of.values()) for trait, of in results.traits.items()} == {
        "site": {"1", "2"}, "sex": {"female", "male"}, "age": {"40–49"}}
    assert not found_in(tmp_path / "eval", CANARY, "1950-01", "42.225")
    (report,) = json.loads((page.parent / "report.json").read_text())["reports"]
    assert results.traits and report["results"]["traits"] == {}
    assert report["summary"]["subgroups"] == [], "of four subjects in each nothing may be told"
