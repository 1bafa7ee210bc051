"""The command line as a user meets it: output, exit status, no traceback for their own mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml
from PIL import Image
from test_folds import fold
from test_training import TINY

from meristem import api
from meristem.cli import main
from meristem.modalities.volume import Volume, VolumeOptions
from meristem.platform.data.manifest import Manifest
from meristem.platform.evaluation.results import Results
from meristem.platform.report.pictures import Pictures, Strip
from meristem.platform.training import checkpoint

Called = tuple[int, str, str]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    def run(*arguments: object) -> Called:
        monkeypatch.setattr(sys, "argv", ["meristem", *map(str, arguments)])
        status = 0
        try:
            main()
        except SystemExit as leave:
            status = int(leave.code or 0)
        found = capsys.readouterr()
        return status, found.out, found.err

    return run


def test_help_imports_no_torch() -> None:
    code = ("import sys; sys.argv = ['meristem', '--help']\nfrom meristem.cli import main\n"
            "try: main()\nexcept SystemExit: pass\n"
            "heavy = {'torch', 'monai', 'timm', 'numpy', 'scipy'} & set(sys.modules); assert not heavy, heavy")
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_recipes_list_without_torch_and_as_json(call) -> None:  # type: ignore[no-untyped-def]
    status, out, _ = call("recipes", "list", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert status == 0
    methods = ("mae", "simmim", "simclr", "moco-v3", "dino", "ibot", "swav", "mae+simclr")
    assert {f"{m}/{r}" for m in ("volume", "image") for r in methods} <= rows.keys()
    assert all(row["status"] in ("verified", "tested", "expressible") and row["follows"] for row in rows.values())
    code = ("import sys; sys.argv = ['meristem', 'recipes', 'list']\nfrom meristem.cli import main\n"
            "try: main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_recipes_show_prints_a_recipe_that_loads_and_its_passes(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    status, out, _ = call("recipes", "show", "volume/mae", *TINY)
    assert status == 0 and "#   encoder(x, plan)" in out
    (tmp_path / "mine.yaml").write_text(out)
    status, again, _ = call("recipes", "show", tmp_path / "mine.yaml", "--json")
    assert status == 0
    assert json.loads(again)["hash"] == out.split("# hash ")[1][:12]
    assert yaml.safe_load(out) == json.loads(again)["recipe"]


@pytest.mark.parametrize(("arguments", "words"), [
    (["pretrain", "volume/mea", "--data", "DATA", "--out", "OUT"], ["volume/mae"]),
    (["pretrain", "volume/mae", "--data", "DATA", "--out", "OUT", "train.stepz=3"], ["stepz", "steps"]),
    (["pretrain", "volume/mae", "--data", "DATA", "--out", "OUT", "steps"], ["key.sub=value"]),
    (["pretrain", "volume/mae", "--data", "nowhere", "--out", "OUT"], ["nowhere"]),
    (["pretrain", "volume/mae", "--data", "DATA", "--out", "OUT", "encoder=unet"], ["drop"]),
    (["finetune", "segmentation", "--data", "DATA", "--out", "OUT", "--init", "nothing"], ["no checkpoint"]),
    (["finetune", "segmentation", "--data", "DATA", "--out", "OUT", "--labels", "99"], ["99"]),
    (["evaluate", "segmentation", "--data", "DATA", "--out", "OUT", "--protocol", "knn"], ["no protocol 'knn'", "finetune"]),
    (["report", "OUT"], ["no results"]),
    (["predict", "--checkpoint", "OUT", "--data", "DATA", "--out", "OUT"], ["no checkpoint"]),
    (["recipes", "show", "volume/nothing"], ["no recipe"]),
    (["recipes", "show", "volume/mae", "encoder=unet"], ["would drop tokens", "replace"]),
    (["recipes", "show", "volume/dino", "teacher=null"], ["teacher"]),
    (["recipes", "show", "volume/segmentation", "task.segmentation.decoder=unetr"], ["plain transformer", "auto"]),
    (["recipes", "show", "volume/segmentation", "encoder=transformer", "modality.volume.patch=[6,6,6]",
      "views.x.size=[24,24,24]"], ["power of two", "light"]),
    (["recipes", "show", "volume/segmentation", "task.segmentation.flips=[3]"], ["axes 0 to 2"]),
    (["recipes", "show", "image/classification", "encoder=unet", "task.classification.pool=cls"], ["class token"]),
    (["recipes", "show", "volume/mae", "train.log_every=0"], ["train.log_every", "greater than"]),
    (["recipes", "show", "volume/mae", "train.freeze={encodr: 0.5}", "modality={volume: {}, image: {}}"], ["modality"]),
    (["recipes", "show", "BINARY"], ["binary.yaml", "UTF-8"]),
    (["recipes", "show", "CIRCLE"], ["extends itself"]),
    (["recipes", "show", "LIST"], ["extends"]),
    (["pretrain", "segmentation", "--data", "DATA", "--out", "OUT"], ["no objective", "meristem finetune"]),
    (["pretrain", "mae", "--data", "DATA", "--out", "UNDERFILE", *TINY], ["Not a directory"]),
    (["pretrain", "mae", "--data", "DATA", "--out", "OUT", "--split", "0,0,1", *TINY], ["training split is empty"]),
    (["pretrain", "mae", "--data", "DATA", "--out", "OUT", *TINY, "train.freeze={encodr: 0.5}"], ["encodr", "Modules"]),
    (["finetune", "segmentation", "--data", "DATA", "--out", "OUT", "--split", "0,0,1"], ["no labelled training sample"]),
    (["finetune", "segmentation", "--data", "BARE", "--out", "OUT"], ["no sample has a label mask"]),
    (["finetune", "classification", "--data", "DATA", "--out", "OUT"], ["0 classes"]),
    (["finetune", "segmentation", "--data", "DATA", "--out", "OUT", "--labels", "nan"], ["count, a fraction or all"]),
    (["finetune", "segmentation", "--data", "DATA", "--out", "DATA", "--resume"], ["no checkpoint"]),
])
def test_a_users_mistake_is_a_message_and_status_2(arguments: list[str], words: list[str], call, volume_folder: Path,  # type: ignore[no-untyped-def]
                                                   tmp_path: Path) -> None:
    for name, text in (("binary", b"\xff\xfe\x00\x80"), ("circle", b"extends: CIRCLE"), ("list", b"extends: 3")):
        (tmp_path / f"{name}.yaml").write_bytes(text.replace(b"CIRCLE", str(tmp_path / "circle.yaml").encode()))
    places = {"DATA": str(volume_folder), "OUT": str(tmp_path / "out"), "BARE": str(volume_folder / "imagesTr"),
              "UNDERFILE": str(tmp_path / "list.yaml" / "out"),
              **{name.upper(): str(tmp_path / f"{name}.yaml") for name in ("binary", "circle", "list")}}
    status, _, err = call(*(places.get(a, a) for a in arguments))
    assert status == 2
    assert err.startswith("meristem: ") and "Traceback" not in err
    assert all(word in err for word in words)


def broken(folder: Path) -> set[str]:
    """Spoil a folder of volumes in the five ways; the names of the spoilt."""
    images, labels = folder / "imagesTr", folder / "labelsTr"
    good = nib.load(images / "case_00.nii.gz")
    whole = (images / "case_01.nii.gz").read_bytes()
    (images / "case_01.nii.gz").write_bytes(whole[:len(whole) // 2])
    nib.save(nib.Nifti1Image(np.full(good.shape, np.nan, np.float32), good.affine), images / "case_02.nii.gz")
    lost = nib.Nifti1Image(np.asarray(nib.load(images / "case_03.nii.gz").dataobj), None)
    lost.header["sform_code"] = lost.header["qform_code"] = 0
    nib.save(lost, images / "case_03.nii.gz")
    (images / "case_04.nii.gz").write_bytes((images / "case_00.nii.gz").read_bytes())
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), good.affine), labels / "case_05.nii.gz")
    return {f"case_0{i}" for i in range(1, 6)}


def test_data_check_names_each_broken_file_and_pretraining_goes_on_without_them(call, volume_folder: Path,  # type: ignore[no-untyped-def]
                                                                                tmp_path: Path) -> None:
    assert call("data", "check", volume_folder)[0] == 0
    broken(volume_folder)
    status, out, _ = call("data", "check", volume_folder, "--json")
    found = json.loads(out)
    names = {r.case: Path(r.local).name[:7] for r in Manifest.discover(volume_folder, Volume(VolumeOptions())).rows}
    reasons = {names[c["case"]]: f["reason"] for f in found["findings"] if f["level"] == "refused" for c in f["cases"]}
    assert status == 1 and not found["ok"]
    assert reasons["case_01"] in ("truncated", "unreadable")
    assert reasons["case_02"] == "nan" and reasons["case_03"] == "no-affine"
    assert reasons["case_05"] == "shape" and "duplicate" in {reasons.get("case_00"), reasons.get("case_04")}
    status, out, _ = call("data", "check", volume_folder, "--names")
    assert status == 1 and all(f"case_0{i}" in out for i in (1, 2, 3, 5)) and "3 of 8" in out
    assert "case_0" not in call("data", "check", volume_folder)[1]

    status, _, err = call("pretrain", "volume/mae", "--data", volume_folder, "--out", tmp_path / "run",
                          "--cache", tmp_path / "c", *TINY, "train.steps=2", "train.batch=2")
    assert status == 0 and "quarantined" in err
    lines = (tmp_path / "run" / "quarantine.csv").read_text().splitlines()
    assert len(lines) == 6 and not any("case_0" in line for line in lines)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["quarantined"] == 5


def test_progress_lines_for_a_log_file_and_silence_on_request(call, volume_folder: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    arguments = ["pretrain", "mae", "--data", volume_folder, "--cache", tmp_path / "c", *TINY, "train.steps=4"]
    _, _, err = call(*arguments, "--out", tmp_path / "a")
    line = next(line for line in err.splitlines() if "step 2/4" in line)
    assert all(word in line for word in ("loss", "samples/s", "data wait", "rank", "ETA"))
    _, out, err = call(*arguments, "--out", tmp_path / "b", "--quiet")
    assert out == err == ""


def test_a_checkpoint_of_another_modality_that_does_not_fit_is_a_message(call, volume_folder: Path,  # type: ignore[no-untyped-def]
                                                                     image_folder: Path, tmp_path: Path) -> None:
    common = ["--cache", tmp_path / "c", "--quiet"]
    assert call("pretrain", "mae", "--data", volume_folder, "--out", tmp_path / "pre", *common, *TINY, "train.steps=1")[0] == 0
    status, _, err = call("finetune", "classification", "--data", image_folder, "--out", tmp_path / "x", "--init",
                          tmp_path / "pre", *common, "encoder.transformer.depth=6")
    assert status == 2 and "of modality 'volume', the recipe of 'image'" in err and not (tmp_path / "x").exists()
    status, _, err = call("embed", "--checkpoint", tmp_path / "pre", "--data", image_folder, "--out", tmp_path / "y", "--quiet")
    assert status == 2 and "no volume data" in err


CLIPS = ["encoder.transformer={size: tiny, width: 24, depth: 1, heads: 2}", "views.x.size=[4,64,64]", "train.batch=2",
         "train.steps=1", "train.workers=0"]


@pytest.fixture
def short_clips(tmp_path: Path) -> Path:
    """6 clips of 5 frames in two class folders, too short to be told from classes of images: `clips/dark/0/000.png`, …"""
    rng, root = np.random.default_rng(4), tmp_path / "clips"
    for name, level in (("dark", 60), ("light", 160)):
        for clip in range(3):
            (root / name / str(clip)).mkdir(parents=True)
            for i, frame in enumerate(rng.normal(level, 20, (5, 32, 32, 3)).clip(0, 255).astype(np.uint8)):
                Image.fromarray(frame).save(root / name / str(clip) / f"{i:03d}.png")
    return root


def test_frames_guessed_to_be_images_are_clips_where_recipe_or_run_says_so(call, short_clips: Path,  # type: ignore[no-untyped-def]
                                                                           tmp_path: Path) -> None:
    assert api.guess_modality(short_clips) == "image"
    common = ["--data", short_clips, "--cache", tmp_path / "c", "--split", "every:3:1", "--quiet"]
    assert call("pretrain", "video/videomae", *common, "--out", tmp_path / "pre", *CLIPS)[0] == 0
    for out, how in (("named", ["video/classification"]), ("started", ["classification", "--init", tmp_path / "pre"]),
                     ("set", ["classification", "modality.video.fps=10"])):
        assert call("finetune", *how, *common, "--out", tmp_path / out, *CLIPS)[0] == 0
        assert checkpoint.read_card(tmp_path / out)["modality"] == "video"
        assert json.loads((tmp_path / out / "metrics.json").read_text())["labelled_subjects"] == 2
    assert call("evaluate", "video/classification", *common, "--out", tmp_path / "grid", *CLIPS, "--protocol", "knn",
                "--seeds", "1")[0] == 0
    test = Results.load(tmp_path / "grid" / "results.json").dataset.splits["test"]
    assert (test.subjects, test.cases) == (2, 2)
    status, out, _ = call("data", "check", short_clips, "--modality", "video", "--json")
    assert status == 0 and json.loads(out)["usable"] == 6


def test_a_named_recipe_spares_the_guess(call, short_clips: Path, tmp_path: Path,  # type: ignore[no-untyped-def]
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "guess_modality", lambda path: pytest.fail("nothing to guess"))
    (tmp_path / "mine.yaml").write_text("extends: video/classification")
    for task in ("video/classification", tmp_path / "mine.yaml"):
        status, _, err = call("finetune", task, "--data", short_clips, "--out", tmp_path / "x", "--labels", "99", *CLIPS,
                              "--cache", tmp_path / "c")
        assert status == 2 and "99" in err


def test_a_recipe_that_trains_nothing_says_so(call) -> None:  # type: ignore[no-untyped-def]
    status, out, _ = call("recipes", "show", "video/propagation", "encoder.transformer={size: tiny, depth: 1}")
    assert status == 0 and out.endswith("# trains nothing\n")


def test_folds_are_pooled_into_one_page_that_can_be_drawn_again(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folds = [tmp_path / f"fold {i}" for i in range(2)]
    for i, directory in enumerate(folds):
        (directory / "logs").mkdir(parents=True)
        made = fold(i, subjects=2 + i)
        made.save(directory / "results.json")
        losses = "".join(f'{{"step": {step}, "loss": {i}.{9 - step}}}\n' for step in (1, 2))
        (directory / "logs" / "pretraining mae.jsonl").write_text(losses)
        strips = [Strip(case.case, np.full((2, 4, 4), 9, np.uint8), (0.0, 1.0), 1.0) for case in made.cells[0].cases]
        Pictures(strips=strips).save(directory / "pictures.npz")
    status, out, _ = call("report", *folds, "--folds", "--out", tmp_path / "pool")
    assert status == 0 and out.strip() == str(tmp_path / "pool" / "report.html")
    page = (tmp_path / "pool" / "report.html").read_text()
    assert "d, 2 folds" in page and "5 test subjects" in page
    assert all(name in page for name in ("sub-0-0-0", "sub-1-2-0"))  # most confident of the one fold, worst of the other
    found = json.loads((tmp_path / "pool" / "report.json").read_text())
    assert call("report", tmp_path / "pool")[0] == 0
    assert json.loads((tmp_path / "pool" / "report.json").read_text()) == found
    assert (tmp_path / "pool" / "report.html").read_text() == page
    assert (tmp_path / "pool" / "logs" / "pretraining mae.jsonl").read_text().startswith('{"step": 1, "loss": 0.8}')
    for arguments, words in (([*folds, "--folds"], "into another one"), ([folds[0], "--folds", "--out", tmp_path / "x"], "two"),
                             ([folds[0], folds[0], "--folds", "--out", tmp_path / "x"], "more than one fold")):
        status, _, err = call("report", *arguments)
        assert status == 2 and words in err and not (tmp_path / "x").exists()
    assert Results.load(folds[0] / "results.json") == fold(0, subjects=2)
