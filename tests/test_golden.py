"""The same seed gives the same weights whoever runs it, and the same numbers as when they were last looked at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import golden
import pytest
from made_files import MADE


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each modality's training without loading processes."""
    folder = tmp_path_factory.mktemp("alone")
    return {name: golden.trained(name, folder) for name in MADE}


@pytest.mark.parametrize("name", sorted(MADE))
def test_numbers_are_those_of_the_golden_run(name: str, alone: dict[str, Path]) -> None:
    then = json.loads((golden.FOLDER / f"{name}.json").read_text())
    assert len(then["losses"]) == golden.STEPS and then["losses"][0] != then["losses"][-1]
    assert golden.moved(golden.summary(alone[name]), then) == []


@pytest.mark.parametrize("name", sorted(MADE))
@pytest.mark.parametrize("workers", [1, 2])
def test_loading_processes_change_no_bit(name: str, workers: int, alone: dict[str, Path], tmp_path: Path) -> None:
    assert golden.digest(golden.trained(name, tmp_path, workers)) == golden.digest(alone[name])


def test_another_process_changes_no_bit(alone: dict[str, Path]) -> None:
    """Also one in which sets of texts are in another order."""
    said = subprocess.run([sys.executable, Path(golden.__file__), "--digests"], capture_output=True, text=True, check=True,
                          timeout=600, env={**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}).stdout
    assert json.loads(said.splitlines()[-1]) == {name: golden.digest(run) for name, run in alone.items()}


@pytest.mark.parametrize("change", ["train.lr=1.1e-3", "train.seed=1", "train.weight_decay=0.2", "train.clip=0.01"])
def test_a_changed_setting_is_noticed(change: str, tmp_path: Path) -> None:
    plain = golden.trained("volume", tmp_path / "plain", over=("train.lr=1e-3", "train.weight_decay=0.05", "train.clip=1.0"))
    other = golden.trained("volume", tmp_path / "other", over=("train.lr=1e-3", "train.weight_decay=0.05", "train.clip=1.0",
                                                              change))
    assert golden.moved(golden.summary(other), golden.summary(plain))


def test_tolerance_and_missing_numbers() -> None:
    then = {"losses": [2.0, 1.0], "norms": {"encoder": 10.0}, "embedding": [0.5, -1e-9]}
    assert golden.moved({**then, "losses": [2.0002, 1.0]}, then) == []
    assert golden.moved({**then, "losses": [2.0, 1.001]}, then) == ["losses 1: 1.001, was 1"]
    assert golden.moved({**then, "norms": {"encoder": float("nan")}}, then)
    assert golden.moved({**then, "norms": {"encoder": 10.0, "head": 1.0}}, then) == ["norms head"]
