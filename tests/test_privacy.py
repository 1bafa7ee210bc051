"""No artefact and no output says whose data it was: names planted wherever a name can hide are searched for in all of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from test_tasks import QUICK, UNET

import meristem
from meristem.cli import main

CANARY = "Zebraquagga"


def plant(folder: Path) -> Path:
    """A set of ten volumes with the canary in every name and in every text that a NIfTI can hold; four files are unusable."""
    root = folder / f"{CANARY}_clinic"
    for name in ("imagesTr", "labelsTr"):
        (root / name).mkdir(parents=True)
    listed = []
    for i in range(10):
        rng = np.random.default_rng(i)
        mask = np.zeros((20, 20, 20), np.uint8)
        mask[5 + i % 3:14, 6:13, 7:12] = 1
        name = f"{CANARY}_{i:02d}.nii.gz"
        for part, array in (("imagesTr", (100 * mask + rng.normal(0, 9, mask.shape)).astype(np.int16)), ("labelsTr", mask)):
            if part == "imagesTr" and i == 7:
                array = np.full(mask.shape, np.nan, np.float32)
            if part == "labelsTr" and i == 8:
                array = array[:9]
            image = nib.Nifti1Image(array, np.eye(4))
            header = image.header
            header["descrip"], header["aux_file"] = f"{CANARY} 1950-01-01", f"{CANARY}.mat"
            header["db_name"], header["intent_name"] = CANARY, CANARY
            header.extensions.append(nib.nifti1.Nifti1Extension("comment", f"patient {CANARY}".encode()))
            nib.save(image, root / part / name)
        listed.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    broken = root / "imagesTr" / f"{CANARY}_09.nii.gz"
    broken.write_bytes(broken.read_bytes()[:300])
    (root / "imagesTr" / f"{CANARY}_06.nii.gz").write_bytes((root / "imagesTr" / f"{CANARY}_05.nii.gz").read_bytes())
    about = {"name": CANARY, "description": CANARY, "reference": CANARY, "modality": {"0": "MRI"},
             "labels": {"0": "background", "1": "organ"}, "training": listed, "test": []}
    (root / "dataset.json").write_text(json.dumps(about))
    return root


def found_in(folder: Path, *secrets: str) -> list[str]:
    """Files below a folder that hold one of the secrets, in their bytes or in their names; npz members are unpacked."""
    hits = []
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        held = file.read_bytes() + file.relative_to(folder).as_posix().encode()
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as stored:
                held += b"".join(name.encode() + "".join(map(str, stored[name].flat)).encode()
                                 for name in stored.files if stored[name].dtype.kind == "U") + " ".join(stored.files).encode()
        hits += [f"{file.relative_to(folder)}: {s}" for s in secrets if s.lower().encode() in held.lower()]
    return hits


@pytest.mark.parametrize("quiet", [True, False])
def test_no_artefact_and_no_output_names_anybody(quiet: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    data, runs = plant(tmp_path), tmp_path / "runs"

    def call(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["meristem", *map(str, arguments), *(["--quiet"] if quiet else [])])
        try:
            main()
        except SystemExit as leave:
            assert not leave.code

    common = ["--data", data, "--cache", tmp_path / "cache"]
    pre = tmp_path / f"{CANARY}_pretraining"  # a run's folder is the user's to name, and is not to be repeated elsewhere
    call("pretrain", "volume/mae-unet", *common, "--out", pre, *UNET, *QUICK, "train.steps=4", "modality.volume.patch=[4,4,4]")
    call("finetune", "segmentation", *common, "--out", runs / "fine", "--init", pre, *QUICK, "views.x.size=[16,16,16]",
         "train.steps=3")
    call("evaluate", "segmentation", *common, "--out", runs / "eval", "--init", pre,
         "--init", pre / "checkpoints" / "step-00000004", "--seeds", "1", *QUICK, "views.x.size=[16,16,16]", "train.steps=2")
    call("embed", "--checkpoint", pre, "--data", data, "--out", runs / "vectors")
    said = capfd.readouterr()
    assert bool(said.err) != quiet
    pre.rename(runs / "pre")
    secrets = (CANARY, data.parent.name, "1950-01-01")
    assert not found_in(runs, *secrets)
    assert not any(s.lower() in (said.out + said.err).replace(str(runs), "").lower() for s in secrets)
    assert (runs / "pre" / "quarantine.csv").read_text().count("\n") == 5 and list(runs.rglob("events*"))
    assert not found_in(tmp_path / "cache", CANARY)

    written = meristem.predict(runs / "fine", data / "imagesTr", tmp_path / "predicted", quiet=True)
    assert all(CANARY in path.name for path in written)  # a prediction goes by its file's name; nothing else is carried over
    for path in written:
        assert CANARY.encode() not in bytes(nib.load(path).header.binaryblock) and not nib.load(path).header.extensions
