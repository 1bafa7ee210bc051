"""Parts of nets: compiled in one graph each and once for all steps, recomputed to the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import processes
import pytest
import torch
from torch._dynamo.utils import counters

import meristem
from meristem.errors import RecipeError
from meristem.platform import recipe as recipes
from meristem.platform.assembly import Assembly, total
from meristem.platform.training import checkpoint, parts

SMALL = "encoder.transformer={width: 32, depth: 3, heads: 2, drop_path: 0.3}"
UNET = "encoder={unet: {widths: [4, 8], blocks: [1, 2]}}"
COMPILED = {"volume/mae": [SMALL, "views.x.size=[16,16,16]"], "volume/mae-unet": [UNET, "views.x.size=[16,16,16]"],
            "image/dino": [SMALL, "views.g.size=[32,32]", "views.l.size=[16,16]"],
            "video/videomae": [SMALL, "views.x.size=[4,48,48]"], "points/mae": [SMALL]}
RECOMPUTED = {"transformer": ["volume/mae", SMALL], "unet": ["volume/mae-unet", UNET],
              "segresnet": ["volume/mae-unet", "encoder={segresnet: {width: 8, down: [1, 1], up: [1]}}"],
              "swin": ["volume/simmim", "encoder={swin: {width: 12, depths: [1, 1, 1, 1], heads: [1, 1, 2, 2], window: 2}}"],
              "vit": ["image/mae", "encoder={timm: {model: vit_tiny_patch16_224, drop_path: 0.2}}", "modality.image.patch=16"],
              "told": ["image/umd", "encoder.transformer={width: 48, depth: 2, heads: 4}"]}


@pytest.fixture(autouse=True)
def _traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs are captured, and a break in one is an error; no machine code is made of them, which takes minutes."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    yield
    torch._dynamo.reset()


def assembled(name: str, *over: str) -> Assembly:
    torch.manual_seed(0)
    return Assembly(recipes.load(name, over))


def steps(assembly: Assembly, first: int, last: int) -> list[float]:
    """Losses of steps of gradient descent."""
    torch.manual_seed(first)
    losses = []
    for step in range(first, last):
        loss = total(assembly(processes.batch(assembly.recipe, step), 0.5))
        loss.backward()
        with torch.no_grad():
            for p in assembly.parameters():
                if p.grad is not None:
                    p.sub_(p.grad, alpha=0.01)
                    p.grad = None
        assembly.after(0.5)
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("name", COMPILED)
def test_parts_are_one_graph_each_and_no_step_compiles_again(name: str) -> None:
    plain, assembly = assembled(name, *COMPILED[name]), assembled(name, *COMPILED[name])
    names = list(assembly.state_dict())
    parts.compiled(assembly)
    found = steps(assembly, 0, 2)
    graphs = counters["stats"]["unique_graphs"]
    found += steps(assembly, 2, 5)
    assert 0 < counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]
    assert graphs <= len(parts.units(assembly)) and list(assembly.state_dict()) == names
    assert found == pytest.approx(steps(plain, 0, 2) + steps(plain, 2, 5), rel=1e-4)
    parts.plain(assembly)
    steps(assembly, 5, 6)
    assert counters["stats"]["unique_graphs"] == graphs


def test_rows_of_several_lengths_compile_twice_at_most() -> None:
    """Once for the first length, once for any."""
    net = assembled("points/mae", SMALL)
    parts.compiled(net)
    blocks, graphs = net.encoder.blocks, []
    for length in (5, 7, 4, 9, 6):
        valid = torch.arange(length) < torch.tensor([length, 3])[:, None]
        blocks(torch.randn(2, length, 32), torch.randn(2, length, 3), valid=valid)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1:] == graphs[1:2] * 4 and not counters["graph_break"]


@pytest.mark.parametrize("kind", RECOMPUTED)
def test_recomputed_gradients_are_the_same_bits(kind: str) -> None:
    name, *over = RECOMPUTED[kind]
    found = []
    for recompute in (False, True):
        assembly = assembled(name, *over)
        if recompute:
            parts.recomputed(assembly)
        kept: list[int] = []

        def keep(x: torch.Tensor, kept: list[int] = kept) -> torch.Tensor:
            kept.append(x.numel())
            return x

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = total(assembly(processes.batch(assembly.recipe, 0), 0.5))
        loss.backward()
        found.append(({n: p.grad for n, p in assembly.named_parameters() if p.grad is not None}, sum(kept)))
    (plain, all_), (again, some) = found
    assert plain.keys() == again.keys() and all(torch.equal(plain[n], again[n]) for n in plain)
    assert some < 0.8 * all_


def test_nets_in_one_piece_are_refused() -> None:
    assembly = assembled("graph/grace", processes.GRAPH)
    for do in (parts.compiled, parts.recomputed):
        with pytest.raises(RecipeError, match="one piece"):
            do(assembly)


def test_a_compiled_and_recomputed_run_gives_the_weights_of_a_plain_one(volume_folder: Path, tmp_path: Path) -> None:
    """Its checkpoint holds plain names, and goes on uncompiled."""
    tiny = [SMALL, "views.x.size=[16,16,16]", "train.batch=4", "train.workers=0", "train.ema=0.5", "train.steps=2"]
    for out, more in (("plain", []), ("parts", ["train.compile=true", "train.checkpointing=true"])):
        meristem.pretrain("volume/mae", volume_folder, tmp_path / out, [*tiny, *more], cache=tmp_path / "cache", quiet=True)
    assert counters["stats"]["unique_graphs"]
    plain, compiled = (checkpoint.read_weights(tmp_path / out) for out in ("plain", "parts"))
    assert plain.keys() == compiled.keys() and all(torch.allclose(plain[k], compiled[k], atol=1e-4) for k in plain)
    assert meristem.embed(tmp_path / "parts", volume_folder / "imagesTr", tmp_path / "embedded", quiet=True).is_file()
