"""Contrastive objectives on graphs: the authors' formulas by double loops, and every recipe on made graphs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import meristem
from meristem.errors import RecipeError
from meristem.modalities.base import View
from meristem.modalities.frame import Frame
from meristem.modalities.stream import Edges
from meristem.platform.assembly import Assembly, total
from meristem.platform.contrastive.losses import decorrelation
from meristem.platform.contrastive.relations import Matches
from meristem.platform.objectives import Items, Loss, Units
from meristem.platform.recipe import load
from meristem.platform.step import Batch

RECIPES = {
    "grace": ["encoder(a)", "encoder(b)"],
    "graphcl": ["encoder(a)", "encoder(b)"],
    "bgrl": ["encoder(a)", "encoder(b)", "teacher(a)", "teacher(b)"],
    "selftask-gnn": ["encoder(x, plan)", "encoder(e, plan)", "encoder(x)"],
    "paretognn": ["encoder(x, plan)", "encoder(e, plan)", "encoder(s)", "encoder(s, plan)", "encoder(a)", "encoder(b)"],
}
SMALL = ["modality.graph.channels=4", "encoder.message_passing.width=16"]
NODES = 9


def look(name: str, places: Sequence[Sequence[int]], seed: int) -> View:
    """A look at each of several graphs that shows the nodes `places`, in rings."""
    g, size, n = torch.Generator().manual_seed(seed), max(map(len, places)), len(places)
    index = torch.tensor([[*p, *[-1] * (size - len(p))] for p in places])
    pairs = [(r * size + i, r * size + j) for r, p in enumerate(places) for a in range(len(p))
             for i, j in ((a, (a + 1) % len(p)), ((a + 1) % len(p), a))]
    edges = Edges(torch.tensor(pairs).T, torch.zeros(len(pairs), dtype=torch.int64), None, n, size)
    return View(name, torch.randn(n, 4, size, generator=g), Frame(torch.ones(n, 1, 1), (size,), torch.ones(n, 0), ()),
                torch.arange(n), torch.zeros(n, dtype=torch.int64), weight=(index >= 0)[:, None].float(), index=index,
                edges=edges)


def batch(assembly: Assembly, seed: int = 0) -> Batch:
    """Three graphs; every view shows other nodes of them, in the order of their numbers."""
    rng = np.random.default_rng(seed)
    views = {}
    for i, name in enumerate(assembly.recipe.views):
        shown = [sorted(rng.permutation(NODES)[:int(rng.integers(5, NODES))].tolist()) for _ in range(3)]
        views[name] = look(name, shown, seed + i)
    return Batch(Items(torch.arange(3), torch.arange(3)), views)


def assemble(name: str, *more: str) -> Assembly:
    torch.manual_seed(0)
    narrow = ["heads.predictor.mlp.out=16"] if name == "bgrl" else []
    return Assembly(load(f"graph/{name}", [*SMALL, *narrow, *more]))


def value(loss: Loss) -> float:
    return float((loss.total / loss.count).detach())


def nodes(assembly: Assembly, view: str, by: str, *heads: str) -> dict[tuple[int, int], Tensor]:
    """(graph, number of the node in it) -> its unit vector through the heads, of the last step."""
    step = assembly.last_step
    assert step is not None
    index, tokens = step.batch.views[view].index, step.encode(view, by=by).tokens
    assert index is not None
    for head in heads:
        tokens = assembly.module(by, head)(tokens.flatten(0, 1), torch.zeros(tokens[..., 0].numel())).unflatten(0, index.shape)
    return {(r, int(place)): F.normalize(tokens[r, i], dim=0).detach() for r, row in enumerate(index)
            for i, place in enumerate(row) if place >= 0}


@pytest.mark.parametrize("name", RECIPES)
def test_passes_are_made_once_and_every_part_learns(name: str) -> None:
    assembly = assemble(name)
    losses = assembly(batch(assembly), 0.0)
    assert assembly.last_step is not None and assembly.last_step.passes == RECIPES[name]
    total(losses).backward()
    for at, p in assembly.named_parameters():
        if at.startswith("teacher."):
            assert p.grad is None
        elif at != "encoder.mask_token" or name in ("selftask-gnn", "paretognn"):
            assert p.grad is not None and p.grad.isfinite().all(), at


def grace(u: dict[tuple[int, int], Tensor], v: dict[tuple[int, int], Tensor], t: float) -> list[float]:
    """Zhu et al. 2020, equation 1, of every node u that v shows too."""
    each = []
    for (graph, node), x in u.items():
        if (graph, node) in v:
            between = sum(torch.exp(x @ y / t) for (g, _), y in v.items() if g == graph)
            within = sum(torch.exp(x @ y / t) for (g, n), y in u.items() if g == graph and n != node)
            each.append(-float(torch.log(torch.exp(x @ v[graph, node] / t) / (between + within))))
    return each


def test_grace_is_the_authors_formula() -> None:
    assembly = assemble("grace").eval()
    loss = assembly(batch(assembly), 0.0)["nodes"]
    u, v = (nodes(assembly, view, "encoder", "projector") for view in "ab")
    each = grace(u, v, 0.4) + grace(v, u, 0.4)
    assert loss.count == len(each) and value(loss) == pytest.approx(np.mean(each), rel=1e-5)


def test_a_sample_of_queries_meets_all_keys() -> None:
    whole, part = (assemble("grace", f"objectives.nodes.contrastive.sample={n}").eval() for n in (1000, 5))
    made = batch(whole)
    whole(made, 0.0)
    u, v = (nodes(whole, view, "encoder", "projector") for view in "ab")
    each = np.array(grace(u, v, 0.4) + grace(v, u, 0.4))
    loss = part(made, 0.0)["nodes"]
    assert 0 < int(loss.count) <= 5
    chosen = [np.mean(c) for c in combinations(each, int(loss.count))]
    assert np.abs(np.array(chosen) - value(loss)).min() < 1e-4
    assert value(part(made, 0.0)["nodes"]) == value(loss)  # of the step's counter, not of when it is asked


def test_graphcl_pools_by_sum_and_repels_the_other_graphs() -> None:
    assembly = assemble("graphcl").eval()
    loss = assembly(batch(assembly), 0.0)["graphs"]
    step = assembly.last_step
    assert step is not None
    z = []
    for view in "ab":
        encoded = step.encode(view)
        pooled = torch.stack([row[live].sum(0) for row, live in zip(encoded.tokens, encoded.valid, strict=True)])
        z.append(F.normalize(assembly.heads["projector"](pooled, torch.zeros(3)), dim=1))
    (a, b), each = (x.detach() for x in z), []
    for i in range(3):
        s = [float(torch.exp(a[i] @ b[j] / 0.2)) for j in range(3)]
        each.append(-np.log(s[i] / sum(s[j] for j in range(3) if j != i)))
    assert value(loss) == pytest.approx(np.mean(each), rel=1e-5)


def test_bgrl_predicts_the_teachers_node_in_the_other_look() -> None:
    assembly = assemble("bgrl").eval()
    loss = assembly(batch(assembly), 0.0)["nodes"]
    a, b = (nodes(assembly, view, "encoder", "predictor") for view in "ab")
    c, d = (nodes(assembly, view, "teacher") for view in "ab")
    each = [2 - 2 * float(q[n] @ k[n]) for q, k in ((a, d), (b, c)) for n in q if n in k]
    assert loss.count == len(each) and value(loss) == pytest.approx(np.mean(each), rel=1e-5)


def test_decorrelation_is_cca_ssgs_loss() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(11, 4, generator=g), torch.randn(9, 4, generator=g) * 3 + 1
    i, j = torch.tensor([0, 2, 3, 5, 8, 9, 10]), torch.tensor([1, 0, 2, 4, 5, 7, 8])

    def units(z: Tensor) -> Units:
        return Units(z, {}, torch.ones(len(z)))

    loss = decorrelation(units(x), units(y), Matches(i, j, torch.ones(7)), 0.3)
    a, b = (((z - z.mean(0)) / z.std(0) / np.sqrt(len(z))) for z in (x[i].double().numpy(), y[j].double().numpy()))
    expected = np.sum((a - b) ** 2) + 0.3 * sum(np.sum((z.T @ z - np.eye(4)) ** 2) for z in (a, b))
    assert loss.count == 7 and value(loss) == pytest.approx(expected, rel=1e-5)
    alike = decorrelation(units(x), units(x[:, :1].expand(-1, 4)), Matches(i, i, torch.ones(7)), 1.0)
    assert value(alike) > 12  # four equal dimensions: 16 − 4 off the diagonal


@pytest.fixture(scope="module")
def matrices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six connectomes of twelve nodes."""
    root, rng = tmp_path_factory.mktemp("graphs"), np.random.default_rng(0)
    for i in range(6):
        weight = np.triu(rng.random((12, 12)) * (rng.random((12, 12)) < 0.4), 1)
        np.save(root / f"sub-{i}.npy", weight + weight.T)
    return root


@pytest.mark.parametrize("name", RECIPES)
def test_two_steps_from_files(name: str, matrices: Path, tmp_path: Path) -> None:
    small = ["train.steps=2", "train.batch=3", "train.workers=0"]
    outcome = meristem.pretrain(f"graph/{name}", matrices, tmp_path / "run", small, cache=tmp_path / "cache", quiet=True)
    assert outcome.steps == 2 and outcome.skipped == 0 and np.isfinite(outcome.last["loss"])


def test_a_predictor_that_does_not_meet_its_keys_is_refused() -> None:
    with pytest.raises(RecipeError, match="16 numbers and queries 256"):
        Assembly(load("graph/bgrl", SMALL))


@pytest.mark.parametrize(("name", "more", "message"), [
    ("image/simclr", ["objectives.contrast.contrastive.level=sum"], "no sum vector"),
    ("graph/bgrl", ["teacher=null"], "teacher"),
    ("graph/grace", ["objectives.nodes.contrastive.sample=0"], "greater than or equal to 1"),
])
def test_what_does_not_fit_is_refused(name: str, more: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(name, more)
