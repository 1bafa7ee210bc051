"""Medical cine, from DICOM files to predictions; and what happens when a file is lost while a run draws from it."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from test_video_readers import cine, region

import meristem
from meristem.errors import DataError

TINY = ["encoder.transformer.width=24", "encoder.transformer.depth=1", "encoder.transformer.heads=2", "train.batch=4",
        "train.steps=2", "modality.video.unit=mm", "views.x.size=[4, 32, 32]", "modality.video.patch=[2, 8, 8]"]
PRETRAIN = [*TINY, "masking.x.random.ratio=0.75"]


def scans(root: Path, patients: Sequence[str]) -> Path:
    """Ultrasound of a disc that beats fast or slow, two loops of each patient, with mm and frame times."""
    with (root / "scans.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "class", "subject"])
        y, x = np.mgrid[:40, :48]
        for i, patient in enumerate(patients):
            for loop in range(2):
                rate = (0.2, 0.8)[i % 2]
                radius = 8 + 4 * np.sin(rate * np.arange(12) + i + loop)
                disc = (np.hypot(y - 20, x - 24) < radius[:, None, None]) * np.uint8(180)
                frames = np.repeat(disc[..., None], 3, -1) + np.uint8(i)
                cine(root / f"{patient}-{loop}.dcm", frames, FrameTime=50.0,
                     SequenceOfUltrasoundRegions=[region(0.05, 0.05, 48, RegionLocationMaxY1=39)])
                table.writerow([f"{patient}-{loop}.dcm", ("slow", "fast")[i % 2], patient])
    return root / "scans.csv"


def test_ultrasound_goes_from_files_to_predictions(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    patients = [f"canary{i}" for i in range(10)]
    data = scans(tmp_path, patients)
    lost = tmp_path / "canary0-0.dcm"
    lost.write_bytes(lost.read_bytes()[:-9000])
    meristem.pretrain("video/videomae", data, tmp_path / "pre", PRETRAIN, cache=tmp_path / "cache")
    assert json.loads((tmp_path / "pre" / "metrics.json").read_text())["quarantined"] == 1
    assert "truncated" in (tmp_path / "pre" / "quarantine.csv").read_text()
    meristem.finetune("video/classification", data, tmp_path / "fine", [*TINY, "views.x.clips=2", "views.x.crops=1"],
                      init=tmp_path / "pre", cache=tmp_path / "cache", quiet=True)
    card = json.loads(next((tmp_path / "fine" / "checkpoints").glob("*/card.json")).read_text())
    assert [(a["name"], a["unit"]) for a in card["axes"]] == [("t", "s"), ("y", "mm"), ("x", "mm")]
    assert card["load"]["coverage"] == 1.0 and card["load"]["similarity"] > 0.999
    lost.unlink()
    meristem.predict(tmp_path / "fine", data, tmp_path / "out", quiet=True)
    rows = list(csv.DictReader((tmp_path / "out" / "predictions.csv").open()))
    assert len(rows) == 19 and all({"slow", "fast"} <= row.keys() for row in rows)
    written = [f for run in ("pre", "fine") for f in (tmp_path / run).rglob("*") if f.is_file() and f.stat().st_size < 1 << 20]
    assert not any(b"canary" in f.read_bytes().lower() for f in written)
    assert "canary" not in capfd.readouterr().err.lower()


def test_a_file_that_is_lost_during_a_run_ends_it_with_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from meristem.platform.data.cache import Cache

    data = scans(tmp_path, [f"p{i}" for i in range(4)])
    build = Cache.build.__func__  # type: ignore[attr-defined]

    def and_lose(cls: type[Cache], *args: object, **more: object) -> Cache:
        cache: Cache = build(cls, *args, **more)
        for file in tmp_path.glob("*.dcm"):
            file.unlink()
        return cache

    monkeypatch.setattr(Cache, "build", classmethod(and_lose))
    with pytest.raises(DataError, match=r"sample \d+, read before, cannot be read now") as caught:
        meristem.pretrain("video/videomae", data, tmp_path / "pre", [*PRETRAIN, "train.workers=1"], cache=tmp_path / "cache",
                          quiet=True)
    assert caught.value.reason == "missing" and "p0" not in str(caught.value)
