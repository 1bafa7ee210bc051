"""Objectives over edges: hidden links, distances in hops, properties of nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from meristem.modalities.stream import Edges
from meristem.platform.objectives import Loss, Objective, ObjectiveSettings, answered
from meristem.platform.relational import graphs

if TYPE_CHECKING:
    from meristem.platform.assembly import Assembly
    from meristem.platform.step import Step

Count = Annotated[int, Field(ge=1)]


class PairDecoder(nn.Module):
    """Two tokens (M, D), (M, D) to `outputs` numbers (M, outputs), the same in either order.

    inner: the inner product of a linear map of both (Kipf and Welling 2016, GAE). product, difference: a ∘ b or |a − b| through
    one linear layer, or two with `hidden` between them.
    """

    def __init__(self, join: str, width: int, hidden: int | None, outputs: int) -> None:
        super().__init__()
        self.join = join
        inside = hidden or width
        self.enter = nn.Linear(width, inside) if join == "inner" or hidden else nn.Identity()
        self.leave = nn.Linear(1 if join == "inner" else inside, outputs)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if self.join == "inner":
            a, b = self.enter(a), self.enter(b)
            x = (a * b).sum(-1, keepdim=True) * a.shape[-1] ** -0.5
        else:
            x = self.enter(a * b if self.join == "product" else (a - b).abs())
            x = x if isinstance(self.enter, nn.Identity) else x.relu()
        decoded: Tensor = self.leave(x).float()
        return decoded


class Relational(ObjectiveSettings):
    """encode: the view whose graph is asked about."""

    encode: str

    def check(self, recipe: Any) -> list[str]:
        if self.encode not in recipe.looks:
            return [f"encode names '{self.encode}': there is no such view (views: {', '.join(recipe.looks)})"]
        if not recipe.modality.tokenizer().edge_kinds:
            return [f"it asks for the edges of a sample, and {recipe.modality.name} data has none; use it with graphs"]
        return []


class Links(Relational):
    """Tell edges that were hidden from the encoder from as many pairs of nodes without an edge, drawn anew in every step.

    EdgeMask of Jin et al. 2020 (section 3.2.1, equation 4); binary cross-entropy. join, hidden: of the pair decoder.
    """

    join: Literal["inner", "product", "difference"] = "product"
    hidden: Count | None = None

    def check(self, recipe: Any) -> list[str]:
        problems = super().check(recipe)
        if not problems and (self.encode not in recipe.masking or recipe.masking[self.encode].hides != "edges"):
            problems.append(f"no edge of view '{self.encode}' is hidden, so that the encoder would see the answer; set "
                            f"masking.{self.encode}: {{edges: {{ratio: 0.1}}}}")
        return problems

    def build(self, assembly: Assembly) -> Objective:
        return LinksObjective(self, assembly.encoder.width)


class LinksObjective(Objective):
    """`error`, of weight 0, is the share of wrong answers, for the log."""

    def __init__(self, settings: Links, width: int) -> None:
        super().__init__()
        self.settings = settings
        self.decoder = PairDecoder(settings.join, width, settings.hidden, 1)

    def forward(self, step: Step) -> dict[str, Loss]:
        view = self.settings.encode
        stream, plan = step.stream(view), step.plan(view)
        assert stream.edges is not None and plan.edges is not None
        positive = graphs.linked(stream.edges.where(plan.edges))
        count = torch.bincount(positive[0] // len(stream), minlength=stream.batch)
        negative = graphs.unlinked(stream.edges, stream.valid, count, step.rng("links", view))
        tokens = step.encode(view, masked=True).tokens.flatten(0, 1)
        a, b = torch.cat([positive, negative], 1)
        logits = self.decoder(tokens[a], tokens[b])[:, 0]
        truth = (torch.arange(len(logits), device=logits.device) < positive.shape[1]).float()
        loss = F.binary_cross_entropy_with_logits(logits, truth, reduction="sum")
        return answered(loss, ((logits > 0) != truth.bool()).float().sum(), len(logits), self.settings.weight)


class Hops(Relational):
    """Classify how many edges lie on the shortest path between two nodes: 1 … limit, or more (or none).

    PairwiseDistance of Jin et al. 2020 (section 3.2.2, equation 6). sources: nodes drawn of each graph; of each, one node at
    each distance that there is, so that classes are balanced. join, hidden: of the pair decoder.
    """

    limit: Count = 3
    sources: Count = 64
    join: Literal["product", "difference"] = "difference"
    hidden: Count | None = None

    def build(self, assembly: Assembly) -> Objective:
        return HopsObjective(self, assembly.encoder.width)


class HopsObjective(Objective):
    """`error`, of weight 0, is the share of wrong answers, for the log."""

    def __init__(self, settings: Hops, width: int) -> None:
        super().__init__()
        self.settings = settings
        self.decoder = PairDecoder(settings.join, width, settings.hidden, settings.limit + 1)

    def forward(self, step: Step) -> dict[str, Loss]:
        s = self.settings
        stream, rng = step.stream(s.encode), step.rng("hops", s.encode)
        assert stream.edges is not None
        b, n = stream.valid.shape
        row = torch.arange(b, device=stream.valid.device)[:, None]
        # drawn node by node: neither padding nor batch mates change what a graph is asked
        order = (rng.uniform("sources", n) + (~stream.valid).float()).argsort(dim=1, stable=True)[:, :s.sources]
        asked = stream.valid.gather(1, order)
        distance = graphs.hops(stream.edges, order, s.limit)
        drawn = rng.uniform("targets", n, s.sources)[..., :order.shape[1]]
        sources, targets, classes = [], [], []
        for hop in range(1, s.limit + 2):
            there = (distance == hop) & stream.valid[..., None] & asked[:, None]
            best, target = drawn.masked_fill(~there, -1).max(1)  # (B, S)
            has = best >= 0
            sources.append((order + row * n)[has])
            targets.append((target + row * n)[has])
            classes.append(torch.full_like(targets[-1], hop - 1))
        tokens = step.encode(s.encode).tokens.flatten(0, 1)
        logits, truth = self.decoder(tokens[torch.cat(sources)], tokens[torch.cat(targets)]), torch.cat(classes)
        loss = F.cross_entropy(logits, truth, reduction="sum")
        return answered(loss, (logits.argmax(1) != truth).float().sum(), len(truth), s.weight)


class Property(Relational):
    """Regress a property of every node from its token: mean squared error of one linear layer.

    NodeProperty of Jin et al. 2020 (section 3.2.1, equation 3). degree: log(1 + number of neighbours); clustering: the share of
    pairs of neighbours that are linked.
    """

    property: Literal["degree", "clustering"] = "degree"

    def build(self, assembly: Assembly) -> Objective:
        return PropertyObjective(self, assembly.encoder.width)


class PropertyObjective(Objective):
    def __init__(self, settings: Property, width: int) -> None:
        super().__init__()
        self.settings = settings
        self.head = nn.Linear(width, 1)

    def forward(self, step: Step) -> dict[str, Loss]:
        stream = step.stream(self.settings.encode)
        assert stream.edges is not None
        truth = _property(self.settings.property, stream.edges)[stream.valid]
        made = self.head(step.encode(self.settings.encode).tokens[stream.valid]).float()[:, 0]
        return {"": Loss(F.mse_loss(made, truth, reduction="sum"), float(len(truth)), self.settings.weight)}


def _property(name: str, edges: Edges) -> Tensor:
    return graphs.degree(edges).log1p() if name == "degree" else graphs.clustering(edges)
