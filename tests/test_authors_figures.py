"""Losses of points and graphs on seeded input, as the authors' own code gives them. Figures only; how the input is made is said
with each. `g` is torch's generator seeded with 0, drawn from in the order that is named."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from meristem.modalities.points import Points
from meristem.modalities.points.options import PointsOptions
from meristem.modalities.stream import TokenStream
from meristem.platform.contrastive.infomax import InfomaxObjective
from meristem.platform.contrastive.relations import Relation
from meristem.platform.masked.targets import Cosine, Surface
from meristem.platform.objectives import Encoded, Loss, Units
from meristem.platform.recipe import load
from meristem.platform.relational.objective import PairDecoder


@pytest.fixture
def g() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def value(loss: Loss | tuple[Tensor, Tensor]) -> float:
    return float((loss[0] / loss[1]).detach())


def contrast(recipe: str, name: str, queries: list[Tensor], keys: list[Tensor]) -> float:
    """A contrastive line of a recipe on vectors of two looks: row i of each is of the same thing."""
    settings: Any = load(recipe).objectives[name]

    def units(looks: list[Tensor], first: int) -> Units:
        names = [torch.arange(len(x)) for x in looks], [torch.full((len(x),), first + i) for i, x in enumerate(looks)]
        place, view = (torch.cat(x) for x in names)
        item = torch.zeros_like(place) if name == "nodes" else place  # of one graph
        keys = {"item": item, "place": place, "token": place, "view": view}
        return Units(torch.cat(looks), keys, torch.ones(len(place)), place[:, None] * 1.0)

    step: Any = SimpleNamespace(value=lambda x: x)
    loss = settings.loss.build(queries[0].shape[1])
    q, k = units(queries, 0), units(keys, 2 - len(keys))
    return value(loss(q, k, Relation(settings.relation, settings.negatives), step))


def test_graphcl(g: torch.Generator) -> None:
    """Shen-Lab/GraphCL at b4d7501: `loss_cal` of unsupervised_TU/gsimclr.py on x, x_aug = randn(16, 8), randn(16, 8)."""
    a, b = torch.randn(16, 8, generator=g), torch.randn(16, 8, generator=g)
    assert contrast("graph/graphcl", "graphs", [a], [b]) == pytest.approx(3.6707890034, rel=1e-5)


def test_pointcontrast(g: torch.Generator) -> None:
    """facebookresearch/PointContrast at 47e8682: `NCESoftmaxLoss` of pretrain/pointcontrast/lib/criterion.py on q kᵀ / 0.07, as
    its trainer gives it; q, k = randn(32, 6), randn(32, 6), normalised."""
    q, k = (F.normalize(torch.randn(32, 6, generator=g), dim=1) for _ in range(2))
    assert contrast("points/pointcontrast", "places", [q], [k]) == pytest.approx(11.4575109482, rel=1e-5)


def test_graphmae2(g: torch.Generator) -> None:
    """THUDM/GraphMAE2 at bc473e8: `sce_loss` of models/loss_func.py as models/edcoder.py adds it up: x = randn(20, 12), three
    decodings randn(20, 12), latent prediction and target randn(40, 8); exponents 3 and 1, lam 0.15."""
    recipe: Any = load("graph/graphmae2")
    x, decoded = torch.randn(20, 12, generator=g), [torch.randn(20, 12, generator=g) for _ in range(3)]
    predicted, target = torch.randn(40, 8, generator=g), torch.randn(40, 8, generator=g)
    masking, masked, latent = recipe.masking["x"], recipe.objectives["features"], recipe.objectives["latent"]
    stream = TokenStream(x[None], None, torch.ones(1, 20, dtype=torch.bool), None)
    step: Any = SimpleNamespace(stream=lambda view: stream, value=lambda y: y)
    cosine: Cosine = masked.readouts["content"].target
    index = torch.arange(20).repeat(masking.remask.passes)[None]
    features = value(cosine.compare(step, "x", index, torch.cat(decoded)[None], torch.ones(1, 60)))
    keys = {"item": torch.zeros(40).long(), "view": torch.zeros(40).long(), "token": torch.arange(40)}
    q, k = (Units(z, keys, torch.ones(40)) for z in (predicted, target))
    follows = value(latent.loss.build(8)(q, k, Relation(latent.relation, latent.negatives), step))
    assert features * masked.weight == pytest.approx(3.5077652931, rel=1e-5)
    assert features * masked.weight + follows * latent.weight == pytest.approx(3.6588418484, rel=1e-5)


def test_paretognn(g: torch.Generator) -> None:
    """jumxglhf/ParetoGNN at e6092b0: `p_minsg` (without its head, temperature 0.4), `sce_loss` and `p_ming` of src/model.py on
    h1, h2, prediction and target, each randn(24, 8), then the discriminator's matrix randn(8, 8)."""
    h1, h2, made, true = (torch.randn(24, 8, generator=g) for _ in range(4))
    matrix = torch.randn(8, 8, generator=g)
    assert contrast("graph/paretognn", "nodes", [h1, h2], [h1, h2]) == pytest.approx(4.2119317055, rel=1e-5)
    recipe: Any = load("graph/paretognn")
    stream = TokenStream(true[None], None, torch.ones(1, 24, dtype=torch.bool), None)
    step: Any = SimpleNamespace(stream=lambda view: stream)
    found = recipe.objectives["features"].readouts["content"].target.compare(step, "x", None, made[None], torch.ones(1, 24))
    assert value(found) == pytest.approx(1.2174321413, rel=1e-5)
    whole = InfomaxObjective(recipe.objectives["whole"], 8)
    with torch.no_grad():
        whole.matrix.copy_(matrix)
    valid = torch.ones(1, 24, dtype=torch.bool)
    step.encode = lambda view, masked=False: Encoded((h2 if masked else h1)[None], {"mean": h1.mean(0)[None]}, valid)
    assert 2 * value(whole(step)[""]) == pytest.approx(3.7313628197, rel=1e-5)  # theirs adds the means of both halves


def test_selftask(g: torch.Generator) -> None:
    """ChandlerBang/SelfTask-GNN at 5e59840: `make_loss` of EdgeMask and PairwiseDistance of src/selfsl.py on h = randn(30, 8)
    and their linear layers' weights and biases randn(2, 8) · 0.5, randn(2), randn(4, 8) · 0.5, randn(4): pairs i, i + 10 are
    links and i, i + 20 are not, i < 5; pair i, i + 12 is of class i mod 4, i < 12."""
    recipe: Any = load("graph/selftask-gnn")
    h = torch.randn(30, 8, generator=g)
    two, two_bias = torch.randn(2, 8, generator=g) * 0.5, torch.randn(2, generator=g)
    four, four_bias = torch.randn(4, 8, generator=g) * 0.5, torch.randn(4, generator=g)
    settings = recipe.objectives["links"], recipe.objectives["distance"]
    links, distance = (PairDecoder(s.join, 8, s.hidden, n) for s, n in zip(settings, (1, 4), strict=True))
    with torch.no_grad():
        links.leave.weight.copy_(two[1:] - two[:1])  # one logit tells what the difference of two does
        links.leave.bias.copy_(two_bias[1:] - two_bias[:1])
        distance.leave.weight.copy_(four)
        distance.leave.bias.copy_(four_bias)
        i = torch.arange(5)
        logits = links(h[i.repeat(2)], h[torch.cat([i + 10, i + 20])])[:, 0]
        truth = torch.tensor([1.0] * 5 + [0.0] * 5)
        assert float(F.binary_cross_entropy_with_logits(logits, truth)) == pytest.approx(1.7045816183, rel=1e-5)
        j = torch.arange(12)
        assert float(F.cross_entropy(distance(h[j], h[j + 12]), j % 4)) == pytest.approx(2.8940241337, rel=1e-5)


def test_maskfeat3d(g: torch.Generator) -> None:
    """SimingYan/MaskFeat3D at 64e4852: the loss of models/MaskFeat.py with `abs_cos` normals on eigenvectors of numpy's
    covariance: points randn(2, 5, 16, 3) · (0.3, 0.2, 0.02), told normals randn(2, 5, 3), told variations rand(2, 5, 1) · 0.3.
    """
    points = torch.randn(2, 5, 16, 3, generator=g) * torch.tensor([0.3, 0.2, 0.02])
    normal, variation = torch.randn(2, 5, 3, generator=g), torch.rand(2, 5, 1, generator=g) * 0.3
    stream = TokenStream(points.transpose(-1, -2).flatten(2), torch.zeros(2, 5, 3), torch.ones(2, 5, dtype=torch.bool), None)
    step: Any = SimpleNamespace(stream=lambda view: stream,
                                assembly=SimpleNamespace(tokenizer=Points(PointsOptions(size=16)).tokenizer()))
    target: Surface = load("points/maskfeat3d").objectives["surface"].readouts["content"].target  # type: ignore[attr-defined]
    found = target.compare(step, "x", None, torch.cat([normal, variation], -1), torch.ones(2, 5))
    assert value(found) == pytest.approx(0.7546024323, rel=1e-4)
