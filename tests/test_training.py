"""The loop: exact resume, accumulation, averaging, schedules, stopping, and two processes against one."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import meristem
from meristem.errors import MeristemError, RecipeError
from meristem.platform import recipe as recipes
from meristem.platform.assembly import Assembly
from meristem.platform.step import Batch
from meristem.platform.training import checkpoint, loop, optim
from meristem.platform.training.loop import launch
from meristem.platform.training.precision import sound
from meristem.tasks.finetune import resolve

TINY = ["encoder.transformer.width=32", "encoder.transformer.depth=2", "encoder.transformer.heads=2", "views.x.size=[16,16,16]",
        "objectives.pixels.masked.predictor.decoder={depth: 1, width: 32, heads: 2}", "train.batch=4", "train.workers=0",
        "train.log_every=2", "train.checkpoint_every=3"]


def run(folder: Path, out: Path, *more: str, steps: int = 6, recipe: str = "volume/mae", tiny: list[str] = TINY,
        resume: bool = False) -> dict[str, torch.Tensor]:
    """Pretrain a few steps; the weights."""
    meristem.pretrain(recipe, folder, out, [*tiny, f"train.steps={steps}", *more], cache=folder.parent / "cache", quiet=True,
                      resume=resume)
    return checkpoint.read_weights(out)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("optimiser", ["adam", "adamw"])
def test_adams_penalty_is_in_the_gradient_and_adamws_is_not(optimiser: str) -> None:
    """One step without a gradient of the loss: Adam's first is lr along the penalty, AdamW's lr · decay · weight."""
    settings = recipes.load("volume/mae", [*TINY, f"train.optimiser={optimiser}", "train.weight_decay=0.1", "train.lr=0.01"])
    assembly = Assembly(settings)
    before = {name: p.detach().clone() for name, p in assembly.named_parameters()}
    made = optim.optimiser(assembly, settings.train)
    for p in assembly.parameters():
        p.grad = torch.zeros_like(p)
    made.step()
    for name, p in assembly.named_parameters():
        moved = before[name] - p.detach()
        if p.ndim < 2 or name.endswith("token") or name.endswith("cls"):
            assert not moved.any()
        elif optimiser == "adam":
            penalty = 0.1 * before[name]
            torch.testing.assert_close(moved, 0.01 * penalty / (penalty.abs() + 1e-8), rtol=1e-4, atol=1e-7)
        else:
            torch.testing.assert_close(moved, 0.001 * before[name])


def test_a_killed_run_resumes_to_the_same_bits(volume_folder: Path, tmp_path: Path) -> None:
    """2k steps = k, SIGTERM, k more: weights and averages alike, dropout included."""
    more = ("train.ema=0.9", "encoder.transformer.drop_path=0.2")
    whole = run(volume_folder, tmp_path / "whole", *more)
    script = ("import os, pathlib, signal, sys, meristem\n"
              "from meristem.platform.training import loop\n"
              "step = loop.Reporter.advance\n"
              "def advance(self, n):\n"
              "    step(self, n)\n"
              "    if n == 4: os.kill(os.getpid(), signal.SIGTERM)\n"
              "loop.Reporter.advance = advance\n"
              f"meristem.pretrain('volume/mae', {str(volume_folder)!r}, {str(tmp_path / 'cut')!r}, "
              f"{[*TINY, 'train.steps=6', *more]!r}, quiet=True, "
              f"cache=pathlib.Path({str(volume_folder.parent / 'cache')!r}))\n")
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums over threads round in their own way
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, **threads})
    assert json.loads((tmp_path / "cut" / "metrics.json").read_text())["stopped_early"]
    assert checkpoint.read_card(tmp_path / "cut")["step"] == 4
    assert same(whole, run(volume_folder, tmp_path / "cut", *more, resume=True))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_request_to_the_whole_process_group_stops_a_run_cleanly(volume_folder: Path, tmp_path: Path, name: str) -> None:
    """Ctrl-C and a scheduler reach the workers too; they must not die of it before the loop has saved."""
    kill = f"'kill', '-{name.removeprefix('SIG')}', '--', f'-{{os.getpgrp()}}'"  # another process: a parent's ends a worker
    script = ("import os, pathlib, subprocess, time, meristem\n"
              "from meristem.platform.training import loop\n"
              "step = loop.Reporter.advance\n"
              "def advance(self, n):\n"
              "    step(self, n)\n"
              f"    if n == 4: subprocess.Popen([{kill}]); time.sleep(1)\n"
              "loop.Reporter.advance = advance\n"
              f"meristem.pretrain('volume/mae', {str(volume_folder)!r}, {str(tmp_path / 'cut')!r}, "
              f"{[*TINY, 'train.steps=50', 'train.workers=1']!r}, quiet=True, "
              f"cache=pathlib.Path({str(volume_folder.parent / 'cache')!r}))\n")
    ended = subprocess.run([sys.executable, "-c", script], start_new_session=True, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert checkpoint.read_card(tmp_path / "cut")["step"] == 4


def test_an_error_in_a_step_ends_the_process_and_its_workers(volume_folder: Path, tmp_path: Path) -> None:
    script = ("import pathlib, meristem\n"
              "from meristem.platform.training import loop\n"
              "def advance(self, n):\n"
              "    raise RuntimeError('a step went wrong')\n"
              "loop.Reporter.advance = advance\n"
              f"meristem.pretrain('volume/mae', {str(volume_folder)!r}, {str(tmp_path / 'run')!r}, "
              f"{[*TINY, 'train.steps=50', 'train.workers=1']!r}, quiet=True, "
              f"cache=pathlib.Path({str(volume_folder.parent / 'cache')!r}))\n")
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and ended.stderr.rstrip().endswith("a step went wrong")


def test_a_batch_that_cannot_be_handed_over_is_not_waited_for(volume_folder: Path, tmp_path: Path) -> None:
    """As where shared memory is full: no file, of which it is made, may grow beyond 20 kB."""
    script = ("import pathlib, resource, meristem\n"
              "from meristem.platform.data import loader\n"
              "stream = loader.Loader._stream\n"
              "def limited(self, *a):\n"
              "    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))\n"
              "    return stream(self, *a)\n"
              "loader.Loader._stream = limited\n"
              f"meristem.pretrain('volume/mae', {str(volume_folder)!r}, {str(tmp_path / 'run')!r}, "
              f"{[*TINY, 'train.steps=50', 'train.workers=1']!r}, quiet=True, "
              f"cache=pathlib.Path({str(volume_folder.parent / 'cache')!r}))\n")
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1 and "the processes that load data were killed" in ended.stderr, ended.stderr
    assert "shared memory (/dev/shm) may be full" in ended.stderr


def test_another_seed_gives_other_weights(volume_folder: Path, tmp_path: Path) -> None:
    assert not same(run(volume_folder, tmp_path / "a", steps=2), run(volume_folder, tmp_path / "b", "train.seed=1", steps=2))


def test_resuming_with_another_recipe_is_refused(volume_folder: Path, tmp_path: Path) -> None:
    run(volume_folder, tmp_path / "a", steps=2)
    with pytest.raises(MeristemError, match="recipe differs"):
        run(volume_folder, tmp_path / "a", "train.lr=1e-4", steps=2, resume=True)
    with pytest.raises(MeristemError, match="already holds a run"):
        run(volume_folder, tmp_path / "a", steps=2)


def test_accumulation_gives_the_gradient_of_the_whole_batch(volume_folder: Path, tmp_path: Path) -> None:
    """Each row hides as many tokens, so the mean of the parts' means is the mean."""
    plain = ("views.x={size: [16,16,16], window: whole, flip: []}",)
    whole = run(volume_folder, tmp_path / "a", *plain, steps=2)
    parts = run(volume_folder, tmp_path / "b", *plain, "train.accumulate=2", steps=2)
    assert all(torch.allclose(whole[k], parts[k], atol=2e-5) for k in whole)


def test_a_loss_that_is_not_finite_is_skipped_and_then_given_up(volume_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MeristemError, match="not finite"):
        run(volume_folder, tmp_path / "a", "train.lr=1e30", "train.clip=0", "train.warmup=0", steps=40)
    card = checkpoint.read_card(tmp_path / "a") if list((tmp_path / "a").glob("checkpoints/step-*")) else None
    if card is not None:  # whatever was written before is whole
        checkpoint.read_weights(tmp_path / "a")


def poison(patch: pytest.MonkeyPatch, steps: range) -> None:
    """Makes the batches of these steps (from 0) give a loss that is not a number."""
    prepare, schedule, now = Assembly.prepare, optim.schedule, [0]

    def noted(optimiser: torch.optim.Optimizer, settings: recipes.TrainSettings, step: int) -> float:
        now[0] = step
        return schedule(optimiser, settings, step)

    def spoilt(self: Assembly, batch: Batch) -> Batch:
        ready = prepare(self, batch)
        if now[0] in steps:
            for view in ready.views.values():
                view.array.fill_(math.nan)
        return ready

    patch.setattr(optim, "schedule", noted)
    patch.setattr(Assembly, "prepare", spoilt)


def test_a_loss_that_stays_away_takes_the_run_back_to_its_last_checkpoint(
        volume_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, range(5, 16))  # of eleven, the last falls on the weights of step 3
    restored: list[str] = []
    said: list[str] = []
    load = checkpoint.read_weights
    monkeypatch.setattr(loop.Reporter, "say", lambda self, text: said.append(text))
    monkeypatch.setattr(checkpoint, "read_weights", lambda path: restored.append(path.name) or load(path))
    weights = run(volume_folder, tmp_path / "a", steps=20)
    assert restored[0] == "step-00000003" and all(bool(x.isfinite().all()) for x in weights.values())
    assert any("not finite for 10 steps in a row, at step 15. The model is that of step 3 again" in text for text in said)
    last = json.loads((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["skipped"] == 11 and last["rolled_back"] == 1 and math.isfinite(last["loss"])


def test_a_run_that_went_back_too_often_gives_up(volume_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, range(5, 100))
    with pytest.raises(MeristemError, match="at step 45, although the run went back to its last checkpoint 3 times"):
        run(volume_folder, tmp_path / "a", steps=100)
    weights = checkpoint.read_weights(tmp_path / "a")
    assert checkpoint.read_card(tmp_path / "a")["step"] == 15 and all(bool(x.isfinite().all()) for x in weights.values())


def test_a_broken_batch_leaves_running_statistics_alone(volume_folder: Path, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, range(1, 2))
    weights = run(volume_folder, tmp_path / "a", steps=2, recipe="volume/simclr",
                  tiny=[*TINY[:3], "views.v.size=[16,16,16]", "train.batch=4", "train.workers=0"])
    moved = [name for name in weights if name.endswith("num_batches_tracked")]
    assert moved and all(int(weights[name]) == 1 for name in moved)
    assert all(bool(x.isfinite().all()) for x in weights.values())


def test_the_best_checkpoint_outlives_those_after_it(volume_folder: Path, tmp_path: Path) -> None:
    """Each card tells the mean loss since the one before; the lowest stays, whatever `keep` lets go."""
    run(volume_folder, tmp_path / "a", "train.keep=30", "train.lr=0.03", "train.clip=0", steps=12)
    kept = sorted((tmp_path / "a" / "checkpoints").glob("step-*"))
    losses = [json.loads((folder / "card.json").read_text())["loss"] for folder in kept]
    logged = [json.loads(line)["loss"] for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 4 and min(logged) < max(losses) and max(logged) > min(losses)
    assert (tmp_path / "a" / "checkpoints" / "best").resolve() == kept[losses.index(min(losses))]
    for step, loss in ((3, 1.0), (6, 0.5), (9, 0.7), (12, 0.8), (15, math.nan)):
        checkpoint.save(tmp_path / "b", step, {}, {"loss": loss}, {}, keep=1)
    there = sorted(folder.name for folder in (tmp_path / "b" / "checkpoints").iterdir())
    assert there == ["best", "step-00000006", "step-00000015"]
    assert (tmp_path / "b" / "checkpoints" / "best").resolve().name == "step-00000006"


def test_log_lines_carry_pace_wait_and_lights(volume_folder: Path, tmp_path: Path) -> None:
    run(volume_folder, tmp_path / "a")
    records = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [2, 4, 6]
    assert all(r["samples_per_s"] > 0 and 0 <= r["data_wait"] <= 1 and 0 < r["rank"] <= r["dims"] for r in records)
    assert list((tmp_path / "a" / "tensorboard").glob("events*"))


@pytest.mark.parametrize("end", ["", '{"step": 5, "lo', '{"step": 5, "loss": 1}\n{"st', "\0\0\0\0"])
def test_records_of_a_killed_run_are_kept_up_to_its_checkpoint_and_never_rewritten(tmp_path: Path, end: str) -> None:
    file = tmp_path / "metrics.jsonl"
    whole = "".join(f'{{"step": {n}, "loss": 1}}\n' for n in (1, 2, 3, 4))
    file.write_text(whole + end)
    with loop.Reporter("x", 9, tmp_path, quiet=True) as reporter:
        reporter.start(4)
        assert file.read_text() == whole  # on disk already: a kill from here on loses nothing
        reporter.record(5, {"loss": 2.0})
    assert file.read_text() == whole + '{"step": 5, "loss": 2.0}\n'


def settings(**more: object) -> recipes.TrainSettings:
    return recipes.TrainSettings.model_validate({"steps": 100, "warmup": 0.1, "floor": 0.0, **more})


def test_cosine_schedule_by_its_formula() -> None:
    s = settings()
    assert optim.factor(s, 4, "head") == pytest.approx(0.5)  # half of the warm-up
    assert optim.factor(s, 9, "head") == pytest.approx(1.0)
    assert optim.factor(s, 54, "encoder") == pytest.approx((1 + math.cos(math.pi * 0.5)) / 2)
    assert optim.factor(s, 99, "encoder") == pytest.approx(0.0, abs=1e-9)


def test_sawtooth_trains_the_head_first_then_everything() -> None:
    s = settings(schedule="sawtooth", head_first=0.2)
    assert [optim.factor(s, step, "encoder") for step in range(20)] == [0.0] * 20
    assert optim.factor(s, 1, "head") == pytest.approx(1.0)
    assert optim.factor(s, 27, "encoder") == optim.factor(s, 27, "head") == pytest.approx(1.0)
    assert optim.factor(s, 99, "head") == pytest.approx(0.0, abs=1e-9)


def test_layer_decay_and_weight_decay_by_parameter() -> None:
    assembly = Assembly(recipes.load("volume/mae", [*TINY, "train.layer_decay=0.5"]))
    found = {id(p): g for g in optim.groups(assembly, assembly.recipe.train) for p in g["params"]}  # type: ignore[attr-defined]
    assert len(found) == sum(p.requires_grad for p in assembly.parameters())
    layers = assembly.encoder.layer_groups()
    for depth, layer in enumerate(layers):
        assert {found[id(p)]["scale"] for p in layer if p.requires_grad} == {0.5 ** (len(layers) - depth)}
    for name, p in assembly.named_parameters():
        group = found[id(p)]
        assert group["part"] == ("encoder" if name.startswith("encoder.") else "head")
        if p.ndim <= 1:
            assert group["weight_decay"] == 0.0


def test_frozen_modules_do_not_move_until_they_thaw() -> None:
    assembly = Assembly(recipes.load("volume/mae", TINY))
    for p in assembly.parameters():
        p.grad = torch.ones_like(p)
    optim.thaw(assembly, settings(freeze={"encoder.embed": 0.5}), 10)
    assert all((p.grad is None) == name.startswith("encoder.embed") for name, p in assembly.named_parameters())
    for p in assembly.parameters():
        p.grad = torch.ones_like(p)
    optim.thaw(assembly, settings(freeze={"encoder.embed": 0.5}), 60)
    assert all(p.grad is not None for p in assembly.parameters())


def test_freezing_names_whole_modules_that_exist() -> None:
    assembly = Assembly(recipes.load("volume/mae", [*TINY, "encoder.transformer.depth=11"]))
    for p in assembly.parameters():
        p.grad = torch.ones_like(p)
    optim.thaw(assembly, settings(freeze={"encoder.blocks.blocks.1": 0.5}), 0)
    still = {name.split(".")[3] for name, p in assembly.named_parameters() if p.grad is None}
    assert {n for n, p in assembly.named_parameters() if p.grad is None} and still == {"1"}  # and not block 10
    with pytest.raises(RecipeError, match="encodr"):
        optim.groups(assembly, settings(freeze={"encodr": 0.5}))


def test_learned_positions_and_tokens_do_not_decay() -> None:
    vit = ["encoder={timm: {model: vit_tiny_patch16_224}}", "modality.image.patch=16"]
    probe = resolve("classification", "image", ["encoder={transformer: {size: tiny}}", "task.classification.pool=attention"])
    for assembly in (Assembly(recipes.load("image/simmim", vit)), probe.assemble(2)):
        decay = {id(p): g["weight_decay"] for g in optim.groups(assembly, assembly.recipe.train)
                 for p in g["params"]}  # type: ignore[attr-defined]
        free = {name.rpartition(".")[2] for name, p in assembly.named_parameters() if p.ndim > 1 and decay[id(p)] == 0.0}
        assert free == ({"pos_embed", "cls_token"} if "timm" in assembly.recipe.dump()["encoder"] else {"cls", "query"})
        assert decay[id(next(p for n, p in assembly.named_parameters() if n.endswith("qkv.weight")))] > 0


def test_a_sawtooth_run_moves_the_head_alone_first(volume_folder: Path, tmp_path: Path) -> None:
    more = ["train.schedule=sawtooth", "train.head_first=0.5", "train.checkpoint_every=1", "train.keep=9"]
    run(volume_folder, tmp_path / "a", *more, steps=6)
    at = [checkpoint.read_weights(tmp_path / "a" / "checkpoints" / f"step-{n:08d}") for n in (1, 3, 4)]
    moved = [{k.split(".")[0] for k in at[0] if not torch.equal(a[k], b[k])} for a, b in itertools.pairwise(at)]
    assert moved == [{"objectives"}, {"objectives", "encoder"}]


def test_a_checkpoint_stands_without_the_file_its_weights_began_from(tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    vit = ["encoder={timm: {model: vit_tiny_patch16_224}}", "modality.image.patch=16"]
    save_file(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "w.safetensors")
    recipe = recipes.load("image/simmim", [*vit, f"encoder.timm.pretrained={tmp_path / 'w.safetensors'}"])
    assert str(tmp_path) in json.dumps(recipe.dump()) and str(tmp_path) not in json.dumps(recipe.record())
    assert recipes.build(recipe.record(), recipes.Recipe).hash == recipes.load("image/simmim", vit).hash != recipe.hash


def test_fp16_on_a_cpu_is_refused_with_the_remedy() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(MeristemError, match="bf16"):
        launch(settings(precision="fp16"))


@pytest.mark.parametrize("size", [(2, 2, 2), (2, 3, 1), (1, 1)])
def test_a_kernel_on_a_thin_map_learns_in_bf16_as_in_fp32(size: tuple[int, ...]) -> None:
    """oneDNN's gradient there is made of memory that nobody wrote, which this fills with NaN."""
    conv = (nn.Conv3d if len(size) == 3 else nn.Conv2d)(32, 16, 3, padding=1)
    x = torch.randn(2, 32, *size)
    plain, = torch.autograd.grad(conv(x).square().sum(), conv.weight)
    sound(conv)
    for _ in range(50):
        spoilt = [torch.full((k,), torch.nan, dtype=torch.bfloat16) for k in (64, 512, 4096, 3**len(size) * 512)]
        del spoilt
        with torch.autocast("cpu", torch.bfloat16):
            loss = conv(x).square().sum()
        low, = torch.autograd.grad(loss, conv.weight)
        assert (low - plain).norm() < 0.02 * plain.norm()
    assert "weight" in conv.state_dict() and conv(torch.randn(1, 32, *[5] * len(size))).isfinite().all()


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGUSR1])
def test_a_request_to_stop_saves_first(name: signal.Signals, volume_folder: Path, tmp_path: Path) -> None:
    code = (f"import meristem, pathlib; meristem.pretrain('volume/mae', {str(volume_folder)!r}, {str(tmp_path / 'run')!r}, "
            f"{[*TINY, 'train.steps=100000', 'train.checkpoint_every=100000']!r}, quiet=True, "
            f"cache=pathlib.Path({str(volume_folder.parent / 'cache')!r}))")
    process = subprocess.Popen([sys.executable, "-c", code])
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(name)
    assert process.wait(timeout=60) == 0
    assert checkpoint.read_card(tmp_path / "run")["step"] >= 2


def _full_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("ask", [lambda: torch.empty(1 << 55), _full_gpu])
def test_running_out_of_memory_says_what_to_change(ask: Callable[[], object], volume_folder: Path, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Assembly, "prepare", lambda self, part: ask())
    with pytest.raises(MeristemError, match="memory ran out with 4 samples") as told:
        run(volume_folder, tmp_path / "run", "train.batch=8", "train.accumulate=2", steps=2)
    assert "train.accumulate" in told.value.remedy and "checkpointing" in told.value.remedy
