"""Message-passing networks on the nodes of graphs: each layer gathers from neighbours, no node-by-node table is ever made."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from meristem.errors import RecipeError
from meristem.modalities.base import Axis, Settings, Tokenizer
from meristem.modalities.stream import Edges, TokenStream, mostly_zero
from meristem.platform.encoders.base import Encoder, EncoderSettings, replaced
from meristem.platform.objectives import Encoded, Plan

Convolution = Literal["gin", "gat", "gcn"]
Norm = Literal["none", "batch", "layer"]
Activation = Literal["relu", "prelu", "gelu", "elu"]
Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]
CHUNK = 1 << 15  # edges whose vectors are in memory at once
NORMS: dict[str, type[nn.Module]] = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "prelu": nn.PReLU, "gelu": nn.GELU, "elu": nn.ELU}


def _norm(kind: str, width: int) -> list[nn.Module]:
    return [NORMS[kind](width)] if kind != "none" else []


class Nodes:
    """The valid tokens of a stream in one table, and the edges between them in its numbers.

    index: (2, E) source, target. attributes: (E, kinds + values) of the edges, or None.
    """

    def __init__(self, stream: TokenStream, edge_kinds: int, edge_values: int) -> None:
        self.valid = stream.valid
        place = self.valid.flatten().cumsum(0) - 1
        edges = stream.edges
        if edges is None:
            edges = Edges(place.new_zeros(2, 0), place.new_zeros(0), None, *self.valid.shape)
        self.index = place[edges.index]
        kinds = F.one_hot(edges.kind, edge_kinds).to(stream.content) if edge_kinds > 1 else None
        values = None
        if edge_values:
            values = edges.value if edges.value is not None else stream.content.new_zeros(len(edges), edge_values)
        parts = [part for part in (kinds, values) if part is not None]
        self.attributes = torch.cat(parts, 1) if parts else None

    def flat(self, x: Tensor) -> Tensor:
        """(B, N, …) to (M, …)."""
        return x[self.valid]

    def back(self, x: Tensor) -> Tensor:
        """(M, D) to (B, N, D), 0 for padding."""
        return x.new_zeros(*self.valid.shape, x.shape[-1]).index_put((self.valid,), x)


class WeightedSum(torch.autograd.Function):
    """y_t = Σ_e w_e x_s(e) over the edges e into t, by sparse products: no array of all edges × channels is ever made.

    index: (2, E) source, target; weight: (E,); x: (M, D). Returns (M, D).
    """

    @staticmethod
    def forward(ctx: Any, index: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(index, weight, x)
        return _sparse(index.flip(0), weight, len(x)) @ x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, Tensor]:
        index, weight, x = ctx.saved_tensors
        grad = grad.contiguous()
        by_weight = None
        if ctx.needs_input_grad[1]:
            by_weight = torch.zeros_like(weight)
            live = (x.any(1)[index[0]] & grad.any(1)[index[1]]).nonzero()[:, 0]  # of a decoder's edges a quarter
            for some in live.split(CHUNK):  # torch's sampled product takes no two edges between the same nodes
                source, target = index[:, some]
                by_weight[some] = (x[source] * grad[target]).sum(1)
        return None, by_weight, _sparse(index, weight, len(x)) @ grad


def _sparse(index: Tensor, weight: Tensor, size: int) -> Tensor:
    """A (size, size) matrix in compressed rows; index: (2, E) row, column."""
    order = (index[0] * size + index[1]).argsort(stable=True)
    rows = F.pad(index[0].bincount(minlength=size).cumsum(0), (1, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that compressed rows are new in torch
        return torch.sparse_csr_tensor(rows, index[1, order], weight[order], (size, size), check_invariants=False)


def _gather(conv: nn.Module, index: Tensor, size: Any = None, *, x: Tensor | tuple[Tensor, Tensor], alpha: Tensor | None = None,
            edge_weight: Tensor | None = None) -> Tensor:
    """In the place of torch-geometric's `propagate`, whose messages of every edge are the most of a layer's time and memory."""
    x = x[0] if isinstance(x, tuple) else x
    with torch.autocast(x.device.type, enabled=False):
        if alpha is not None:  # (E, heads), x (M, heads, channels)
            return torch.stack([WeightedSum.apply(index, a, y.contiguous())
                                for a, y in zip(alpha.float().unbind(1), x.float().unbind(1), strict=True)], 1)
        weight = torch.ones(index.shape[1], device=x.device) if edge_weight is None else edge_weight.float()
        summed: Tensor = WeightedSum.apply(index, weight, x.float())
        return summed


def _begin(conv: Convolution, *weights: Tensor) -> None:
    """Start values of the maps that a convolution begins with. gat: Glorot's with the gain of ReLU, maps and scores alike, as
    in the code of GraphMAE (and DGL), without which its features of Cora were worse."""
    for weight in weights:
        if conv == "gat":
            nn.init.xavier_normal_(weight, nn.init.calculate_gain("relu"))
        else:
            nn.init.xavier_uniform_(weight)


def _convolution(conv: Convolution, width: int, out: int, edge_width: int, heads: int, attention_dropout: float,
                 perceptron: nn.Module | None, mapped: bool) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch.jit, at its import
        from torch_geometric import nn as geometric
    if conv == "gin" and edge_width:
        return geometric.GINEConv(perceptron, edge_dim=edge_width)
    kind = {"gin": geometric.GINConv, "gat": geometric.GATConv, "gcn": geometric.GCNConv}[conv]
    summing = type(kind.__name__, (kind,), {"propagate": _gather})
    made: nn.Module
    if conv == "gin":
        made = summing(perceptron)
    elif conv == "gat":
        made = summing(width, out // heads, heads, dropout=attention_dropout, edge_dim=edge_width or None)
        _begin(conv, *(made.get_parameter(name) for name in ("lin.weight", "att_src", "att_dst")))
    else:
        made = summing(width, out)
    if mapped and conv != "gin":
        made.lin = nn.Identity()
    return made


class Layer(nn.Module):
    """Dropout, convolution, residual, norm, activation, on nodes (M, width).

    gin: sum over neighbours and a two-layer perceptron (Xu et al. 2019, equation 4.1); edges with attributes enter as in Hu et
    al. 2020 (torch-geometric's GINEConv). gat: attention over neighbours and itself (Veličković et al. 2018), attributes in the
    scores. gcn: symmetrically normalised sum over neighbours and itself (Kipf and Welling 2017), attributes unused.
    first: its nodes are embedded content, so that dropout and the linear map that these convolutions begin with are done: a sum
    over neighbours of a map is the map of their sum. out: channels that it gives, `width` if None. last: without norm and
    activation behind it, as a layer that is read out.
    """

    def __init__(self, conv: Convolution, width: int, edge_width: int, *, heads: int = 1, dropout: float = 0.0,
                 attention_dropout: float = 0.0, norm: Norm = "none", activation: Activation = "relu", residual: bool = False,
                 first: bool = False, last: bool = False, out: int | None = None) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.0 if first else dropout)
        self.attributes = edge_width > 0 and conv != "gcn"
        out = out or width
        self.residual = residual and out == width
        mapped = first and not (conv == "gin" and self.attributes)  # GINE bends each neighbour's message before the sum
        perceptron = None
        if conv == "gin":
            perceptron = nn.Sequential(*([] if mapped else [nn.Linear(width, width)]), *_norm(norm, width),
                                       ACTIVATIONS[activation](), nn.Linear(width, out))
        self.conv = _convolution(conv, width, out, edge_width, heads, attention_dropout, perceptron, mapped)
        self.after = nn.Sequential(*([] if last else [*_norm(norm, width), ACTIVATIONS[activation]()]))

    def forward(self, x: Tensor, nodes: Nodes) -> Tensor:
        x = self.drop(x)
        y = self.conv(x, nodes.index, nodes.attributes) if self.attributes else self.conv(x, nodes.index)
        passed: Tensor = self.after(x + y if self.residual else y)
        return passed


class LayerSettings(Settings):
    """conv: of each of `depth` layers; heads: of attention (gat). dropout: of what enters a layer; attention_dropout: of
    attention (gat). norm: `batch` has the statistics of the valid nodes of the whole batch on one rank. residual: what enters a
    layer is added to what its convolution gives.
    """

    conv: Convolution = "gin"
    depth: Count = 5
    heads: Count = 1
    dropout: Rate = 0.0
    attention_dropout: Rate = 0.0
    norm: Norm = "batch"
    activation: Activation = "relu"
    residual: bool = False

    @model_validator(mode="after")
    def _attends(self) -> Self:
        if self.conv != "gat" and (self.heads > 1 or self.attention_dropout):
            raise ValueError(f"{self.conv} has no attention; leave heads and attention_dropout out, or set conv: gat")
        return self

    def layers(self, width: int, tokenizer: Tokenizer, *, embedded: bool = False, out: int | None = None) -> nn.ModuleList:
        """`depth` layers of `width` channels. embedded: the first has content for input. out: channels of the last, which then
        is read out, without norm and activation.
        """
        for channels in (width, out or width):
            if channels % self.heads:
                raise RecipeError(f"{channels} channels cannot be shared out among {self.heads} heads",
                                  "Choose another number of heads.")
        edges = (tokenizer.edge_kinds if tokenizer.edge_kinds > 1 else 0) + tokenizer.edge_values
        last = self.depth - 1 if out else -1
        return nn.ModuleList(
            Layer(self.conv, width, edges, heads=self.heads, dropout=self.dropout, attention_dropout=self.attention_dropout,
                  norm=self.norm, activation=self.activation, residual=self.residual, first=embedded and i == 0,
                  last=i == last, out=out if i == last else None)
            for i in range(self.depth))


class MessagePassingSettings(LayerSettings, EncoderSettings):
    """width: channels of all layers. dropout: of the nodes' content too."""

    sees: frozenset[str] = frozenset({"edges"})
    width: Count = 256

    @property
    def takes(self) -> frozenset[str]:
        return frozenset({"drop", "replace", "swap"})

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"mean", "sum", "max", "layers"})

    def build(self, tokenizer: Tokenizer, axes: tuple[Axis, ...], channels: int) -> MessagePassing:
        if not tokenizer.edge_kinds:
            raise RecipeError("this encoder passes messages along edges, and this kind of data has none",
                              "Choose encoder: transformer.")
        return MessagePassing(self, tokenizer)


class MessagePassing(Encoder):
    """Layers over embedded content, to which what `structure` says is added where it is seen.

    `drop` encodes the graph of the kept nodes; `replace` puts a learned token, zero at first, where content is hidden (Hou et
    al. 2022, GraphMAE, section 3). Rows of a batch share no edge, so that none depends on another, but for the statistics of
    batch norm while training. `sum` and `max` are those over a row's nodes, as `mean`.
    """

    def __init__(self, settings: MessagePassingSettings, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.takes, self.provides = settings.takes, settings.provides
        self.width, self.depth = settings.width, settings.depth
        self.edges = tokenizer.edge_kinds, tokenizer.edge_values
        self.dropout = settings.dropout
        self.embed = tokenizer.embedding(self.width)
        for module in self.embed.modules():
            if isinstance(module, nn.Linear):  # the first layer's map, which has no bias before its sum over neighbours
                _begin(settings.conv, module.weight)
                module.register_parameter("bias", None)
        self.mask_token = nn.Parameter(torch.zeros(self.width))
        self.places = tokenizer.places(self.width) if "structure" in settings.sees else None
        self.layers = settings.layers(self.width, tokenizer, embedded=True)

    def forward(self, stream: TokenStream, plan: Plan | None = None, *, want: frozenset[str] = frozenset()) -> Encoded:
        keep = None if plan is None else plan.keep
        tokens = stream if keep is None else stream.take(keep)
        live = tokens.valid[..., None]
        content = tokens.content if bool(live.all()) else tokens.content.masked_fill(~live, 0)  # 0 · NaN is NaN
        x = self.embed(replace(tokens, content=self._dropped(content)))
        if plan is not None and keep is None:
            x = replaced(x, plan, self.mask_token)
        if self.places is not None and tokens.structure is not None:
            x = x + self.places(tokens.structure.masked_fill(~live, 0))
        nodes, layers = Nodes(tokens, *self.edges), []
        x = nodes.flat(x)
        for layer in self.layers:
            x = layer(x, nodes)
            if "layers" in want:
                layers.append(nodes.back(x))
        x = nodes.back(x)
        total = x.sum(1)
        summary = {"sum": total, "mean": total / live.sum(1).clamp_min(1),
                   "max": x.masked_fill(~live, -torch.inf).amax(1).masked_fill(~live.any(1), 0)}
        return Encoded(x, summary, tokens.valid, index=keep, layers=layers if "layers" in want else None)

    def _dropped(self, content: Tensor) -> Tensor:
        if not self.training or not self.dropout or not mostly_zero(content):
            return F.dropout(content, self.dropout, self.training)
        places = content.nonzero(as_tuple=True)
        return torch.zeros_like(content).index_put(places, F.dropout(content[places], self.dropout))

    def layer_groups(self) -> list[list[nn.Parameter]]:
        stem = [*self.embed.parameters(), self.mask_token, *([] if self.places is None else self.places.parameters())]
        return [stem, *(list(layer.parameters()) for layer in self.layers)]
