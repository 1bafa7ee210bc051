"""Energy is what counters tell: their differences, once around, and nothing where they are missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from meristem.platform.evaluation.results import Budget, Spent, added
from meristem.platform.training.energy import Meter


def package(root: Path, name: str, microjoules: int, turn: int = 1_000_000) -> Path:
    (root / name).mkdir()
    (root / name / "max_energy_range_uj").write_text(f"{turn}\n")
    (root / name / "energy_uj").write_text(f"{microjoules}\n")
    return root / name / "energy_uj"


def test_packages_add_up_and_their_parts_do_not_count_twice(tmp_path: Path) -> None:
    one, two = package(tmp_path, "intel-rapl:0", 100_000), package(tmp_path, "intel-rapl:1", 900_000)
    core = package(tmp_path, "intel-rapl:0:0", 0)
    meter = Meter(None, powercap=tmp_path)
    assert meter.read() == 0 and meter.of == "processors"
    one.write_text("350000")
    core.write_text("200000")
    assert meter.read() == pytest.approx(0.25)
    two.write_text("50000")  # it went once around
    assert meter.read() == pytest.approx(0.25 + 0.15)
    assert meter.read() == pytest.approx(0.4)


def test_without_counters_nothing_is_told(tmp_path: Path) -> None:
    package(tmp_path, "intel-rapl:0", 5)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    for meter in (Meter(None, powercap=tmp_path), Meter(None, powercap=tmp_path / "none"), Meter(None, processors=False)):
        assert meter.read() is None and meter.of == ""


def test_what_one_part_does_not_know_the_sum_does_not() -> None:
    known = Spent(steps=3, samples=6, seconds=1.5, joules=20.0, metered="GPU")
    both = added([known, known])
    assert (both.seconds, both.joules, both.steps) == (3.0, 40.0, 3)
    unknown = Budget(steps=1, batch=1, trainable=1, seconds=1.0)
    assert added([unknown, unknown.model_copy(update={"joules": 2.0})]).joules is None
