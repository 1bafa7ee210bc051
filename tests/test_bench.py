"""`bench` on made data: what bounds a training is told rightly, work is counted, growth is recovered, advice can be pasted."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import optimizer

from meristem import api
from meristem.cli import main
from meristem.errors import RecipeError
from meristem.modalities.base import Draw
from meristem.modalities.image import Image
from meristem.platform import recipe as recipes
from meristem.platform.assembly import Assembly
from meristem.platform.benching import advice, bench, flops, sweep
from meristem.platform.benching.clock import clocked, held
from meristem.platform.benching.growth import exponent
from meristem.platform.benching.memory import Tensors
from meristem.platform.benching.results import Feed, Size, Training, Variant
from meristem.platform.data.source import Data, open_data
from meristem.platform.made import noise
from meristem.platform.step import Batch

TINY = ["encoder.transformer={size: tiny, width: 24, depth: 1, heads: 2}",
        "objectives.pixels.masked.predictor.decoder={depth: 1, width: 12, heads: 1}", "train.batch=4", "train.steps=50"]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements of tests are short; what they tell must hold all the same."""
    monkeypatch.setattr(bench, "SECONDS", 1.0)
    monkeypatch.setattr(bench, "LARGER", 1)
    monkeypatch.setattr(bench, "SMALLER", 1)
    monkeypatch.setattr(flops, "SIDES", (128,))
    monkeypatch.setattr(sweep, "MOST", 4)


class Slow(Image):
    """Images that take a while to load, as from a distant disk, without work for a processor."""

    def load(self, window: np.ndarray, draw: Draw, interpolate: bool) -> torch.Tensor:
        time.sleep(0.04)
        return super().load(window, draw, interpolate)


def _measured(folder: Path, cache: Path, kind: type[Image], overrides: list[str]) -> Training:
    recipe = recipes.load("image/mae", overrides)
    found = open_data(folder, recipe.modality, "1,0,0", cache, quiet=True)
    slow = kind(found.modality.options)
    return bench.bench(recipe.of(slow), Data(found.manifest, found.cache, slow), 3, lambda text: None)


def test_a_slow_loader_bounds_a_small_model_and_more_workers_are_advised(image_folder: Path, tmp_path: Path,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_cores", lambda: 4)
    told = _measured(image_folder, tmp_path / "c", Slow, [*TINY, "train.workers=0"])
    assert told.bound and told.verdict.startswith("data-bound: the device waits")
    assert told.feed.workers == 0 and told.feed.waiting > 0.3
    assert [f.workers for f in told.feeds][:3] == [0, 1, 2]
    workers = [o for o in told.advice.overrides if o.startswith("train.workers=")]
    assert workers and int(workers[0].partition("=")[2]) > 1 and told.advice.after < told.advice.before


def test_a_heavy_model_on_tiny_data_is_bound_by_its_own_work(image_folder: Path, tmp_path: Path) -> None:
    told = _measured(image_folder, tmp_path / "c", Image, [
        "encoder.transformer={size: tiny}", "train.batch=1", "train.workers=0"])
    assert not told.bound and told.verdict.startswith("compute-bound")
    assert told.feed.alone < told.feed.step
    assert sum(told.phases[name] for name in ("forward", "backward", "optimiser")) > 0.5 * told.alone
    assert told.mfu > 0 and told.peak > 0 and told.cpu > 0 and told.host > 2**20
    assert {s.samples for s in told.sizes} == {1, 2}


def _blocks(tokens: int, width: int, depth: int) -> int:
    """FLOPs, forward and backward, of blocks with perceptrons four times as wide: 12 D² weights, N² D twice for attention."""
    return depth * 3 * (24 * width**2 * tokens + 4 * tokens**2 * width)


def test_the_flops_of_a_step_are_those_of_its_visible_tokens_in_closed_form() -> None:
    recipe = recipes.load("image/mae", ["encoder.transformer={size: tiny, width: 32, depth: 2, heads: 2}", "train.batch=3",
                                        "objectives.pixels.masked.predictor.decoder={depth: 1, width: 16, heads: 2}"])
    work = flops.work(recipe, Assembly(recipe), held([noise(recipe, 3)]), prepared=True)
    content, tokens, seen = 3 * 8 * 8, 64, 16
    embed = 2 * 2 * seen * content * 32  # its input needs no gradient
    encoder = _blocks(seen + 1, 32, 2)   # with the class token
    hidden = tokens - seen  # all that is read of the only block, whose queries are made of all
    block = 3 * (2 * tokens * 16 * 3 * 16 + 2 * 2 * hidden * tokens * 16 + 2 * hidden * 16 * 16 + 2 * 2 * hidden * 16 * 64)
    decoder = 3 * 2 * seen * 32 * 16 + block + 3 * 2 * hidden * 16 * content
    assert work.flops == pytest.approx(3 * (embed + encoder + decoder), rel=1e-3)  # and some 3 × 3 matrices of positions


def test_accumulation_computes_the_same_and_holds_less() -> None:
    whole = recipes.load("image/mae", TINY)
    parts = recipes.load("image/mae", [*TINY, "train.accumulate=4"])
    a, b = (flops.work(r, Assembly(r), held([noise(r, 4)]), prepared=True) for r in (whole, parts))
    assert a.flops == b.flops and b.bytes < 0.7 * a.bytes


def test_what_checkpointing_computes_again_is_no_work_of_the_model_but_spares_memory() -> None:
    deep = [*TINY, "encoder.transformer.depth=6"]
    plain = recipes.load("image/mae", deep)
    again = recipes.load("image/mae", [*deep, "train.checkpointing=true"])
    a, b = (flops.work(r, Assembly(r), held([noise(r, 4)]), prepared=True) for r in (plain, again))
    assert a.flops == b.flops and b.bytes < 0.8 * a.bytes


def test_sparse_products_count_only_what_they_hold() -> None:
    x = torch.zeros(50, 40)
    x[:, :3] = 1.0
    assert flops._product(x.to_sparse_csr(), torch.ones(40, 8)) == 2 * 150 * 8
    assert flops._product(x, torch.ones(40, 8)) == 2 * 50 * 40 * 8


def test_tensors_are_counted_once_and_forgotten_when_they_go() -> None:
    w, x = torch.randn(100, 100, requires_grad=True), torch.randn(50, 100)
    with Tensors() as tensors:
        y = (x @ w).view(-1)
        assert tensors.now == 50 * 100 * 4
        z = y + 1
        assert tensors.now == tensors.most == 2 * 50 * 100 * 4
        del y, z
    assert tensors.now == 0


def test_a_timed_run_trains_as_the_loop_does_and_leaves_the_assembly_as_it_was() -> None:
    recipe = recipes.load("image/mae", [*TINY, "train.accumulate=2", "train.ema=0.9"])
    assembly = Assembly(recipe)
    before = assembly.encoder.mask_token.detach().clone(), {k: v.clone() for k, v in assembly.state_dict().items()}
    timing = clocked(recipe, assembly, held([noise(recipe, 4)]), 4, 60, prepared=True)
    assert len(timing.seconds) == 4 and len(timing.losses) == 2 * 7 and timing.samples == 4
    assert 0 < sum(timing.phases.values()) <= timing.mean * (1 + 1e-9) and timing.least == min(timing.seconds)
    assert all(timing.phases[name] > 0 for name in ("forward", "backward", "optimiser", "teacher"))
    assert any(not torch.equal(v, before[1][k]) for k, v in assembly.state_dict().items())  # it has learnt
    assert "prepare" not in vars(assembly) and not assembly._forward_hooks and not assembly._forward_pre_hooks
    assert not optimizer._global_optimizer_post_hooks


def test_a_request_to_stop_ends_the_measurement() -> None:
    recipe = recipes.load("image/mae", TINY)

    def stopping() -> Iterator[Batch]:
        yield noise(recipe, 4)
        signal.raise_signal(signal.SIGINT)
        yield noise(recipe, 4)

    with pytest.raises(KeyboardInterrupt):
        clocked(recipe, Assembly(recipe), stopping, 4, 60, prepared=True)


# ---- growth

SIZES = [64, 128, 256, 512, 1024, 2048]


@given(st.floats(0.5, 3.0), st.floats(1e-9, 1e3))
@settings(deadline=None, max_examples=30)
def test_a_power_law_gives_its_exponent_without_error(power: float, factor: float) -> None:
    fit = exponent(SIZES, [factor * n**power for n in SIZES])
    assert fit is not None and fit.value == pytest.approx(power, abs=1e-6) and fit.error < 1e-6
    assert fit.factor == pytest.approx(factor, rel=1e-4)


def test_overhead_of_small_sizes_is_left_out_of_the_fit() -> None:
    cost = [1.0 + 1e-3 * (n / 64) ** 2 * 40 for n in SIZES]
    fit = exponent(SIZES, cost)
    assert fit is not None and fit.points == 3 and 1.7 < fit.value < 2.0
    assert np.polyfit(np.log(SIZES), np.log(cost), 1)[0] < 1.4


def test_only_what_exceeds_attention_by_more_than_its_error_is_worse() -> None:
    rng = np.random.default_rng(0)
    noisy = exponent(SIZES, [n**2 * rng.uniform(0.8, 1.25) for n in SIZES])
    cubic = exponent(SIZES, [n**3 for n in SIZES])
    assert noisy is not None and noisy.error > 0.01 and abs(noisy.value - 2) < 3 * noisy.error
    assert cubic is not None and cubic.worse
    assert exponent(SIZES[:2], [1, 2]) is None


@pytest.mark.parametrize(("name", "axis", "grown"), [
    ("points/mae", "points", (128,)), ("graph/graphmae", "nodes", (16,)), ("volume/mae", "size", (16, 16, 16)),
    ("video/videomae", "frames", (2, 64, 64)), ("image/mae", "size", (16, 16)), ("image/mae", "batch", (16, 16))])
def test_every_kind_of_data_grows_and_gives_a_figure_of_time_and_one_of_memory(name: str, axis: str, grown: tuple[int, ...],
                                                                               tmp_path: Path) -> None:
    small = ["encoder={message_passing: {conv: gin, width: 8, depth: 1}}"] if name.startswith("graph") else TINY[:1]
    sizes = [f"views.x.size={list(grown)}", "modality.points.count=8"][:2 if name.startswith("points") else 1]
    made = api.bench(name, None, [*small, *sizes, "train.batch=2"], steps=3, sweep=[axis], out=tmp_path / "out", quiet=True)
    found, = made.sweeps
    tokens = [p.tokens for p in found.points]
    assert len(found.points) >= 3 and tokens == sorted(set(tokens)) and found.time is not None and found.memory is not None
    ratios = np.array(tokens[1:]) / np.array(tokens[:-1])
    assert ((ratios > 1.2) & (ratios < 4.1)).all()
    assert all(p.size[0] > q.size[0] for q, p in zip(found.points, found.points[1:], strict=False)) == (axis != "batch")
    assert [p.bytes for p in found.points] == sorted(p.bytes for p in found.points)
    for what in ("time", "memory"):
        drawn = (tmp_path / "out" / f"sweep-{axis}-{what}.svg").read_text()
        assert drawn.lstrip().startswith("<?xml") and "<svg" in drawn
    page = (tmp_path / "out" / "bench.html").read_text()
    assert page.count("<img") == 2 and "data:image/svg+xml" in page and f"Growth with {axis}" in page
    assert json.loads((tmp_path / "out" / "bench.json").read_text())["training"] is None


def test_attention_bias_of_a_graph_makes_memory_grow_with_the_square_of_its_nodes() -> None:
    made = api.bench("graph/mae", None, [
        "encoder.transformer={size: tiny, width: 8, depth: 2, heads: 2}", "views.x.size=[256]", "train.batch=1",
        "objectives.pixels.masked.predictor.decoder={depth: 1, width: 8, heads: 2}"], steps=3, sweep=["nodes"], quiet=True)
    fit = made.sweeps[0].memory
    assert fit is not None and 1.6 < fit.value < 2.1 and not fit.worse


# ---- advice

def test_the_fewest_workers_are_advised_that_leave_no_wait_or_gain_nothing_more() -> None:
    none, one, two = Feed(0, 0.1, 0.1, 0.1), Feed(1, 0.1, 0.1, 0.004), Feed(2, 0.05, 0.1, 0.0)
    assert advice.fewest([none, one, two]).workers == 1
    assert advice.fewest([Feed(0, 0.001, 0.1, 0.001), one, two]).workers == 0
    starved = [Feed(0, 0.4, 0.1, 0.4), Feed(1, 0.4, 0.1, 0.3), Feed(2, 0.2, 0.1, 0.1), Feed(4, 0.195, 0.1, 0.095)]
    assert advice.fewest(starved).workers == 2  # four gain nothing
    ahead = Feed(1, 0.3, 0.1, 0.0)  # batches loaded ahead hid the wait
    assert ahead.seconds == 0.3 and ahead.waiting == pytest.approx(2 / 3)


def test_batches_are_worked_in_the_largest_part_that_fits_and_is_fast() -> None:
    sizes = [Size(8, 0.1), Size(16, 0.18), Size(32, note="out of memory")]
    assert advice.part(sizes, 32) == sizes[1]
    assert advice.part([Size(8, 0.1), Size(16, 0.4)], 16) == Size(8, 0.1)  # twice as fast in parts
    assert advice.part([Size(3, 0.1)], 16) is None
    assert advice.plateau([Size(8, 0.1), Size(16, 0.15), Size(32, 0.3), Size(64, 0.595)]) == Size(16, 0.15)


def test_a_faster_precision_is_advised_only_where_it_learns_alike() -> None:
    now, fast = Variant("fp32", 1.0, loss=2.0), Variant("bf16", 0.5, loss=2.01)
    assert advice.fastest([now, fast], "fp32") is fast
    assert advice.fastest([now, Variant("bf16", 0.5, loss=2.2)], "fp32") is now
    assert advice.fastest([now, Variant("bf16", 0.5, loss=float("nan"))], "fp32") is now
    assert advice.fastest([now, Variant("bf16", 0.99, loss=2.0)], "fp32") is now
    assert advice.fastest([now, Variant("fp16", note="needs a GPU")], "fp32") is now


def test_a_batch_that_is_out_of_memory_says_so(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = bench._Bench.timed

    def timed(self: Any, recipe: Any, *given: Any, **named: Any) -> Any:
        if recipe.train.batch > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(self, recipe, *given, **named)

    monkeypatch.setattr(bench._Bench, "timed", timed)
    told = _measured(image_folder, tmp_path / "c", Image, [*TINY, "train.workers=0"])
    assert told.sizes[-1] == Size(8, note="out of memory") and not told.advice.larger


# ---- command line

def _call(*arguments: object, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["meristem", *map(str, arguments)])
    try:
        main()
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    return status, *capsys.readouterr()


def test_the_command_prints_overrides_that_a_recipe_takes_and_leaves_no_run(
        image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    common = ["bench", "mae", "--data", image_folder, "--cache", tmp_path / "c", "--steps", 3, *TINY]
    status, out, _ = _call(*common, "--json", "--out", tmp_path / "out", capsys=capsys, monkeypatch=monkeypatch)
    found = json.loads(out)
    assert status == 0 and found == json.loads((tmp_path / "out" / "bench.json").read_text())
    training = found["training"]
    given = [*training["advice"]["overrides"], *training["advice"]["larger"]]
    changed = recipes.load("image/mae", [*TINY, *given]).train
    assert all(f"train.{key}={str(getattr(changed, key)).lower()}" in given for key in (g[6:].split("=")[0] for g in given))
    assert training["verdict"].startswith(("data-bound", "compute-bound")) and 0 <= training["data_wait"] <= 1
    assert set(training["phases"]) == {"load", "augment", "forward", "backward", "optimiser", "teacher"}
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "batch.svg", "bench.html", "bench.json", "step.svg", "workers.svg"]
    assert str(image_folder) not in out + (tmp_path / "out" / "bench.html").read_text()
    status, out, err = _call(*common, capsys=capsys, monkeypatch=monkeypatch)
    assert status == 0 and "bound: the device waits" in out and "MFU" in out and "measuring: the step alone" in err


@pytest.mark.parametrize(("arguments", "words"), [
    (["volume/mae", "--sweep", "nodes"], ["no 'nodes' to sweep", "size, batch"]),
    (["volume/mae"], ["nothing to measure", "--data"]),
    (["mae", "--sweep"], ["volume/mae"]),
    (["joint/mae", "--sweep"], ["joint recipe"]),
    (["volume/segmentation", "--sweep"], ["no objective"]),
    (["volume/mae", "--data", "nowhere"], ["nowhere"])])
def test_what_cannot_be_measured_is_refused_with_a_remedy(
        arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    status, _, err = _call("bench", *arguments, capsys=capsys, monkeypatch=monkeypatch)
    assert status == 2 and err.startswith("meristem: ") and "Traceback" not in err
    assert all(word in err for word in words)


def test_sweep_alone_takes_all_and_overrides_may_follow_it() -> None:
    recipe = recipes.load("video/videomae")
    assert sweep.chosen(recipe, ["all"]) == ["frames", "size", "batch"]
    assert sweep.chosen(recipe, ["batch", "frames", "batch"]) == ["batch", "frames"]
    with pytest.raises(RecipeError, match="frames, size, batch"):
        sweep.chosen(recipe, ["points"])


def test_a_bare_sweep_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    status, out, _ = _call("bench", "image/mae", "--sweep", *TINY[:2], "views.x.size=[16,16]", "train.batch=2", "--json",
                           "--steps", 3, capsys=capsys, monkeypatch=monkeypatch)
    assert status == 0 and [s["axis"] for s in json.loads(out)["sweeps"]] == ["size", "batch"]
