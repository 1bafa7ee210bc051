"""The comparison harness: what a line says, what the page makes of it, and whether whole programs are measured."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_a_ratio_is_the_median_of_pairs_and_not_the_ratio_of_medians() -> None:
    from compare import compare

    line = compare("mae", "peer 1.0", "s", [1, 10, 3], [2, 10, 30], target="<= 0.6")
    assert (line["ours"], line["theirs"], line["ratio"], line["spread"], line["met"]) == (3, 10, 0.5, [0.1, 1], True)


@pytest.mark.parametrize(("ratio", "target", "met"), [(0.87, "<= 0.87", True), (0.88, "<= 0.87", False), (2.1, ">= 2", True),
                                                      (1.9, ">= 2", False)])
def test_targets_bound_ratios(ratio: float, target: str, met: bool) -> None:
    from compare import within

    assert within(ratio, target) is met


def test_the_page_shows_every_line_with_machine_and_command() -> None:
    from compare import cannot, compare
    from performance import page

    lines: list[dict[str, Any]] = [compare("mae, memory", "lightly 1.6.0", "MiB", [600], [1200], target="<= 0.6"),
                                   compare("mae, cpu", "lightly 1.6.0", "s", [9], [10], target="<= 0.87", note="own decoder"),
                                   cannot("mae", "solo-learn 1.0.2", "has no | MAE")]
    about = {"machine": "a box", "versions": {"torch": "2.15.0"}, "date": "2026-01-01", "load": 0.1, "command": "make bench"}
    text = page({"peers": {"about": about, "lines": lines}})
    assert "| mae, memory | lightly 1.6.0 | MiB | 600 | 1200 | 0.5 (0.5 to 0.5) | <= 0.6 met |" in text
    assert "| <= 0.87 **missed** |" in text
    assert "cannot: has no / MAE" in text
    assert "- lightly 1.6.0: own decoder" in text
    assert "a box" in text
    assert "    make bench" in text


def test_a_profile_is_a_table_whose_sums_come_last() -> None:
    from performance import page

    ours, theirs = {"loading": 1.0, "products": 2.0, "all": 3.0, "products alone": 1.5}, {"products": 4.0, "all": 4.0}
    lines = [{"name": "mae", "who": "ours", "parts": ours}, {"name": "mae", "who": "peer 1.0", "parts": theirs}]
    about = {"machine": "a box", "versions": {}, "date": "2026-01-01", "load": 0.1, "command": "make bench"}
    rows = [line for line in page({"profiles": {"about": about, "lines": lines}}).splitlines() if line.startswith("|")]
    assert rows == ["| mae | ours | peer 1.0 |", "|---|---|---|", "| products | 2.00 | 4.00 |", "| loading | 1.00 | 0.00 |",
                    "| all | 3.00 | 4.00 |", "| products alone | 1.50 | 0.00 |"]


def test_operators_belong_to_families_and_products_are_timed_alone() -> None:
    from profiles import alone, family

    known = {"aten::addmm": "matrix products", "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
             "aten::native_layer_norm": "normalisation", "aten::gelu_backward": "activations",
             "Optimizer.step#AdamW.step": "optimiser", "aten::copy_": "indexing and copies", "aten::mul": "other operators"}
    assert {name: family(name) for name in known} == known
    one = {"operator": "aten::mm", "shapes": [[256, 256], [256, 256]], "count": 1}
    assert 0 < alone([one]) < alone([{**one, "count": 1000}])
    assert alone([{"operator": "aten::mul", "shapes": [[256, 256], [256, 256]], "count": 9}]) == 0


PROGRAM = """
import os, sys, time
sys.path.insert(0, {benchmarks!r})
import marks
marks.watch()
import torch
weight = torch.nn.Parameter(torch.zeros(1))
optimiser = torch.optim.SGD([weight], lr=0.1)
held = bytearray(os.urandom(1) * (64 << 20))
if os.fork() == 0:  # a worker: its time counts as well
    until = time.process_time() + 60
    while time.process_time() < until and os.getppid() != 1: pass
    os._exit(0)
for step in range({steps}):
    weight.grad = torch.ones(1)
    until = time.process_time() + 0.1
    while time.process_time() < until: pass
    optimiser.step()
os._exit({code})
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_program_is_measured_with_all_its_processes() -> None:
    import programs

    def command(steps: int, code: int = 0) -> list[str]:
        return [sys.executable, "-c", PROGRAM.format(benchmarks=str(BENCHMARKS), steps=steps, code=code)]

    figures = programs.run(command(8), batch=10, settled=2, last=7)
    assert figures.cpu > 0.1 / 0.010 * 1.2  # 0.1 s a step of 10 samples by the program alone; the rest is its worker's
    assert figures.wall >= 0.1 / 0.010 * 0.9
    assert figures.first > 0.1
    assert figures.peak > 64
    with pytest.raises(programs.Failed, match="exit 3"):
        programs.run(command(8, code=3), batch=10, settled=2, last=7)
    with pytest.raises(programs.Failed):  # it stopped before the last step
        programs.run(command(3), batch=10, settled=2, last=7)


def test_exponents_stand_with_their_errors_and_figures() -> None:
    from performance import page

    figures = {"time": "a-time.svg", "memory": "a-memory.svg"}
    line = {"name": "volume/mae: size", "grows": "size", "tokens": [128, 4096], "time": [2.5, 0.1], "memory": None,
            "worse": ["time"], "figures": figures}
    about = {"machine": "a box", "versions": {}, "date": "2026-01-01", "load": 0.1, "command": "make bench"}
    assert ("| volume/mae: size | 128 to 4,096 | [2.50 ± 0.10](performance/a-time.svg) **worse** | "
            "[too few sizes](performance/a-memory.svg) |") in page({"growth": {"about": about, "lines": [line]}})


def test_the_worth_of_features_stands_beside_the_images_seen() -> None:
    from compare import compare
    from performance import page

    curve = {"ours": {"64": 0.5, "2048": 0.75}, "theirs": {"64": 0.625, "2048": 0.7}}
    lines = [compare("mae: images", peer, "images", [1000], [2000], curve=curve) for peer in ("peer 1.0", "peer 2.0")]
    about = {"machine": "a box", "versions": {}, "date": "2026-01-01", "load": 0.1, "command": "make bench"}
    text = page({"accuracy": {"about": about, "lines": lines}})
    assert text.count("- ours: worth 0.500 after 64, 0.750 after 2,048\n") == 1
    assert "- peer 2.0: worth 0.625 after 64, 0.700 after 2,048\n" in text


@pytest.mark.parametrize(("level", "images"), [(0.5, 100), (0.6, 100), (0.7, 200), (0.8, 400), (0.85, 800)])
def test_images_needed_lie_between_measured_points_by_their_logarithm(level: float, images: float) -> None:
    from accuracy import needed

    curve = {100: 0.6, 400: 0.8, 1600: 0.9}  # 200 is halfway from 100 to 400, as 800 is to 1600
    assert needed(curve, level) == pytest.approx(images)
    assert needed({100: 0.6, 400: 0.5, 1600: 0.7}, 0.65) == pytest.approx(1600 ** 0.75 * 400 ** 0.25)  # first come to
