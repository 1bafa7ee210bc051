"""Runs that are stopped, resumed, repeated or shared by two processes end as one that was left alone."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from test_tasks import QUICK, UNET
from test_training import TINY, run, same

import meristem
from meristem.errors import CheckpointError, MeristemError, RecipeError
from meristem.platform.assembly import Assembly
from meristem.platform.data.manifest import Row
from meristem.platform.evaluation.results import Results
from meristem.platform.masked.objective import MaskedObjective
from meristem.platform.objectives import Loss
from meristem.platform.step import Step
from meristem.platform.training import checkpoint, optim
from meristem.platform.training.progress import Reporter
from meristem.tasks.segmentation import places
from meristem.tasks.transfer import named

PRE = [*UNET, *QUICK, "modality.volume.patch=[4,4,4]"]
FINE = [*QUICK, "views.x.size=[16,16,16]"]


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Ask this process to stop, once, when a run has done so many steps."""
    def arm(steps: int) -> None:
        def advance(self: Reporter, step: int) -> None:
            if step == steps:
                monkeypatch.undo()
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(Reporter, "advance", advance)

    return arm


def figures(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "metrics.json").read_text())
    return found


def test_a_stopped_fine_tuning_is_not_scored_and_resumes_to_the_same_end(volume_folder: Path, tmp_path: Path,
                                                                         stop_after: Any) -> None:
    changes = [*UNET, *QUICK, "train.steps=6", "train.ema=0.9"]

    def tune(out: str, **more: Any) -> dict[str, Any]:
        meristem.finetune("segmentation", volume_folder, tmp_path / out, changes, cache=tmp_path / "c", quiet=True, **more)
        return figures(tmp_path / out)

    whole = tune("whole")
    stop_after(3)
    cut = tune("cut")
    assert cut["stopped_early"] and cut["test"] == {} and not (tmp_path / "cut" / "cases.json").exists()
    with pytest.raises(CheckpointError, match="samples differ"):
        tune("cut", labels="2", resume=True)
    resumed = tune("cut", resume=True)
    assert not resumed["stopped_early"] and resumed["test"] == whole["test"] and resumed["samples"] == whole["samples"]
    assert same(checkpoint.read_weights(tmp_path / "whole"), checkpoint.read_weights(tmp_path / "cut"))


def test_a_fine_tuning_resumes_from_its_own_initial_weights_only(volume_folder: Path, tmp_path: Path, stop_after: Any) -> None:
    for name in ("a", "b"):
        meristem.pretrain("volume/mae-unet", volume_folder, tmp_path / name, [*PRE, "train.steps=1"], cache=tmp_path / "c",
                          quiet=True, split="1,0,0" if name == "b" else "auto")
    more: dict[str, Any] = {"cache": tmp_path / "c", "quiet": True}
    stop_after(1)
    changes = [*FINE, "train.steps=2"]
    meristem.finetune("segmentation", volume_folder, tmp_path / "run", changes, init=str(tmp_path / "a"), **more)
    with pytest.raises(CheckpointError, match="initial weights differ"):
        meristem.finetune("segmentation", volume_folder, tmp_path / "run", changes, init=str(tmp_path / "b"),
                          resume=True, **more)
    one, two = named([str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "a")]).values()
    assert one != two and checkpoint.identity(tmp_path / "a") != checkpoint.identity(tmp_path / "b")  # one recipe, other data
    seen = checkpoint.read_card(tmp_path / "run")["seen"]
    assert set(checkpoint.read_card(tmp_path / "a")["seen"]["contents"]) <= set(seen["contents"])


def test_whom_the_initial_weights_met_is_seen(volume_folder: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"cache": tmp_path / "c", "quiet": True}
    pre, fine, changes = str(tmp_path / "pre"), str(tmp_path / "fine"), [*FINE, "train.steps=1"]
    meristem.pretrain("volume/mae-unet", volume_folder, pre, [*PRE, "train.steps=1"], split="1,0,0", **more)
    meristem.finetune("segmentation", volume_folder, fine, changes, init=pre, **more)
    meristem.evaluate("segmentation", volume_folder, tmp_path / "eval", changes, inits=[fine], seeds=1, **more)
    leak, = Results.load(tmp_path / "eval" / "results.json").leakage.values()
    assert leak.verdict != "clean"  # the test subjects were pretrained on, though not fine-tuned on


def test_a_stopped_grid_stops_and_then_goes_on(volume_folder: Path, tmp_path: Path, stop_after: Any) -> None:
    def evaluate(**more: Any) -> None:
        meristem.evaluate("segmentation", volume_folder, tmp_path / "eval", [*UNET, *QUICK, "train.steps=4"],
                          **{"inits": ["scratch"], "seeds": 2, "labels": ["2"], "cache": tmp_path / "c", "quiet": True, **more})

    stop_after(2)
    with pytest.raises(MeristemError, match="stopped"):
        evaluate()
    assert not list((tmp_path / "eval" / "cells").iterdir())
    evaluate()
    assert {c.budget.steps for c in Results.load(tmp_path / "eval" / "results.json").cells} == {4}
    for wrong, words in (({"labels": ["2", "3", "99"]}, "99"), ({"labels": ["2", "0.25"]}, "two label budgets"),
                         ({"seeds": 0}, "seeds")):
        with pytest.raises(RecipeError, match=words):
            evaluate(**wrong)


def test_resuming_a_finished_run_changes_nothing(volume_folder: Path, tmp_path: Path) -> None:
    weights = run(volume_folder, tmp_path / "a", steps=2)
    before, log = figures(tmp_path / "a"), (tmp_path / "a" / "metrics.jsonl").read_text()
    assert same(weights, run(volume_folder, tmp_path / "a", steps=2, resume=True))
    after = figures(tmp_path / "a")
    assert {k: v for k, v in after.items() if "seconds" not in k} == {k: v for k, v in before.items() if "seconds" not in k}
    assert (tmp_path / "a" / "metrics.jsonl").read_text() == log


def test_a_run_killed_before_its_first_checkpoint_starts_again(volume_folder: Path, tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(volume_folder, tmp_path / "whole", steps=2)
    with monkeypatch.context() as broken:
        broken.setattr(Assembly, "prepare", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run(volume_folder, tmp_path / "cut", steps=2)
    assert same(whole, run(volume_folder, tmp_path / "cut", steps=2, resume=True))


def test_what_was_logged_beyond_the_checkpoint_is_logged_once(tmp_path: Path) -> None:
    with Reporter("r", 6, tmp_path, quiet=True) as reporter:
        reporter.start(0)
        for step in (2, 4, 6):
            reporter.record(step, {"loss": float("nan") if step == 2 else 1.0, "samples_per_s": 1.0, "data_wait": 0.0})
    with Reporter("r", 6, tmp_path, quiet=True) as reporter:
        reporter.start(4)
        reporter.record(6, {"loss": 2.0, "samples_per_s": 1.0, "data_wait": 0.0})
    records = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["loss"]) for r in records] == [(2, None), (4, 1.0), (6, 2.0)]


def test_a_gradient_that_is_not_finite_skips_its_step(volume_folder: Path, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(assembly: torch.nn.Module, settings: object, step: int) -> None:
        if step == 1:
            next(p.grad for p in assembly.parameters() if p.grad is not None).fill_(torch.nan)

    monkeypatch.setattr(optim, "thaw", spoil)
    weights = run(volume_folder, tmp_path / "a", steps=4)
    assert all(w.isfinite().all() for w in weights.values() if w.is_floating_point())
    assert figures(tmp_path / "a")["skipped_steps"] == 1


@pytest.mark.parametrize(("every", "precision", "told"), [(2, "bf16", "train.precision=fp32"), (2, "fp32", "lower train.lr"),
                                                          (30, "bf16", None)])
def test_a_run_that_skips_many_steps_says_so_once(volume_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                  capsys: pytest.CaptureFixture[str], every: int, precision: str,
                                                  told: str | None) -> None:
    """every: the objective is infinite at each such step."""
    steps, whole = itertools.count(1), MaskedObjective.forward

    def sometimes(self: MaskedObjective, step: Step) -> dict[str, Loss]:
        factor = math.inf if next(steps) % every == 0 else 1.0
        return {name: loss._replace(total=loss.total * factor) for name, loss in whole(self, step).items()}

    monkeypatch.setattr(MaskedObjective, "forward", sometimes)
    meristem.pretrain("volume/mae", volume_folder, tmp_path / "a", [*TINY, "train.steps=30", "train.log_every=10",
                      "train.batch=1", f"train.precision={precision}"], cache=tmp_path / "c")
    warnings = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert figures(tmp_path / "a")["skipped_steps"] == 30 // every
    assert len(warnings) == (told is not None) and (told is None or told in warnings[0].lower())
    assert told is None or "5 of 10 steps" in warnings[0]
    assert told is None or ("precision" in warnings[0]) == (precision != "fp32")


def test_data_without_labels_all_trains(volume_folder: Path, tmp_path: Path) -> None:
    run(volume_folder / "imagesTr", tmp_path / "a", steps=1)
    assert figures(tmp_path / "a")["samples_seen"] == 8
    meristem.pretrain("volume/mae", volume_folder / "imagesTr", tmp_path / "b", [*TINY, "train.steps=1"], split="0.5,0,0.5",
                      cache=tmp_path / "c", quiet=True)
    assert figures(tmp_path / "b")["samples_seen"] == 4


def test_two_processes_fine_tune_evaluate_resume_and_write_once(volume_folder: Path, tmp_path: Path) -> None:
    """torchrun: both score, one writes; the figures are those of one process. Each takes up its own generator again."""
    changes = [*UNET, *QUICK, "train.steps=3"]
    more = dict(cache=tmp_path / "c", quiet=True)
    meristem.finetune("segmentation", volume_folder, tmp_path / "one", changes, **more)  # type: ignore[arg-type]
    script = tmp_path / "two.py"
    script.write_text("import meristem, pathlib\n"
                      f"root, changes = pathlib.Path({str(tmp_path)!r}), {changes!r}\n"
                      f"data, more = {str(volume_folder)!r}, dict(cache=root / 'c')\n"
                      "meristem.finetune('segmentation', data, root / 'two', changes, **more)\n"
                      "meristem.evaluate('segmentation', data, root / 'eval', changes, inits=['scratch'], seeds=2, **more)\n"
                      "meristem.finetune('segmentation', data, root / 'two', changes, resume=True, **more)\n")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)],
                          check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, timeout=300, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = figures(tmp_path / "one")["test"], figures(tmp_path / "two")["test"]
    assert two["dice"] == pytest.approx(one["dice"], abs=1e-3)
    assert done.stderr.count("[1/2]") == done.stderr.count("[2/2]") == 2  # the line of its log and its figure, of one rank
    assert len(Results.load(tmp_path / "eval" / "results.json").cells) == 2


def test_predictions_never_fall_on_each_other() -> None:
    def put(*names: str, layout: str = "folder", suffixes: tuple[str, ...] = (".nii", ".nii.gz", ".png", ".jpg")) -> list[str]:
        rows = [Row(i, "", "", (), name) for i, name in enumerate(names)]
        data: Any = SimpleNamespace(modality=SimpleNamespace(suffixes=suffixes), manifest=SimpleNamespace(layout=layout))
        return [path.as_posix() for path in places(rows, data)]

    assert put("imagesTs/a.nii.gz", "imagesTs/b.nii.gz") == ["a.nii.gz", "b.nii.gz"]
    assert put("s1/t1.nii.gz", "s2/t1.nii.gz") == ["s1/t1.nii.gz", "s2/t1.nii.gz"]
    assert put("/far/s1/t1.png", "../s2/t1.png") == ["far/s1/t1.png", "s2/t1.png"]
    assert put("a.png", "a.jpg", "b.jpg") == ["a_png.png", "a_jpg.jpg", "b_jpg.jpg"]
    assert put("x.npz#train_images/7", "x.npz#test_images/7") == ["x.npz#train_images/7", "x.npz#test_images/7"]
    assert put("imagesTs/c_0000.nii.gz", layout="nnU-Net") == ["c.nii.gz"]
    assert put("c_0000.nii.gz") == ["c_0000.nii.gz"]


def test_predictions_of_equal_names_in_sub_folders_are_all_written(volume_folder: Path, tmp_path: Path) -> None:
    meristem.finetune("segmentation", volume_folder, tmp_path / "run", [*UNET, *QUICK, "train.steps=1"], cache=tmp_path / "c",
                      quiet=True)
    for i in range(2):
        image = nib.load(volume_folder / "imagesTr" / f"case_{i:02d}.nii.gz")
        (tmp_path / "new" / "train" / f"sub-{i}").mkdir(parents=True)  # a split in a path means nothing to a prediction
        nib.save(image, tmp_path / "new" / "train" / f"sub-{i}" / "t1.nii.gz")
    written = meristem.predict(tmp_path / "run", tmp_path / "new", tmp_path / "out", quiet=True)
    assert {p.relative_to(tmp_path / "out").as_posix() for p in written} == {f"train/sub-{i}/t1.nii.gz" for i in range(2)}
    assert all(np.asarray(nib.load(p).dataobj).shape == (20, 24, 16) for p in written)


def test_a_teachers_encoder_is_what_embeds(volume_folder: Path, tmp_path: Path) -> None:
    size = [t for t in TINY if "pixels" not in t and "size" not in t]
    shown = meristem.show_recipe("volume/dino", size)["recipe"]
    small = [f"views.{name}.size=[16,16,16]" for name in shown["views"]]
    meristem.pretrain("volume/dino", volume_folder, tmp_path / "pre", [*size, *small, "train.steps=2", "train.lr=1e-2"],
                      cache=tmp_path / "c", quiet=True)
    card, weights = checkpoint.read_card(tmp_path / "pre"), checkpoint.read_weights(tmp_path / "pre")
    assert card["transfer"] == "teacher.copies.encoder."
    with np.load(meristem.embed(tmp_path / "pre", volume_folder, tmp_path / "a", quiet=True)) as stored:
        of_teacher = stored["embedding"]
    file = checkpoint.locate(tmp_path / "pre") / "weights.safetensors"
    from safetensors.torch import save_file
    save_file({k: torch.zeros_like(v) if k.startswith("encoder.") else v for k, v in weights.items()}, file)
    with np.load(meristem.embed(tmp_path / "pre", volume_folder, tmp_path / "b", quiet=True)) as stored:
        assert np.array_equal(stored["embedding"], of_teacher)
