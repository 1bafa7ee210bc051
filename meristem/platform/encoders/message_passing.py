"""Message-passing networks on the nodes of graphs: each layer gathers from neighbours, no node-by-node table is ever made."""

from __future__ import annotations

import warnings
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from meristem.modalities.base import Axis, Tokenizer
from meristem.modalities.stream import Edges, TokenStream
from meristem.platform.encoders.base import Encoder, EncoderSettings, replaced
from meristem.platform.objectives import Encoded, Plan

Convolution = Literal["gin", "gat", "gcn"]
Norm = Literal["none", "batch", "layer"]
Activation = Literal["relu", "prelu", "gelu", "elu"]
Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]
NORMS: dict[str, type[nn.Module]] = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "prelu": nn.PReLU, "gelu": nn.GELU, "elu": nn.ELU}


def _norm(kind: str, width: int) -> list[nn.Module]:
    return [NORMS[kind](width)] if kind != "none" else []


class Nodes:
    """The valid tokens of a stream in one table, and the edges between them in its numbers.

    x: (M, …) of (B, N, …). index: (2, E) source, target. attributes: (E, kinds + values) of the edges, or None.
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


class Layer(nn.Module):
    """Dropout, convolution, residual, norm, activation.

    gin: sum over neighbours and a two-layer perceptron (Xu et al. 2019, equation 4.1); edges with attributes enter as in Hu et
    al. 2020 (torch-geometric's GINEConv). gat: attention over neighbours and itself (Veličković et al. 2018), attributes in the
    scores. gcn: symmetrically normalised mean over neighbours and itself (Kipf and Welling 2017), attributes unused.
    last: a layer that is read out, without norm and activation behind it.
    """

    def __init__(self, conv: Convolution, width_in: int, width: int, edge_width: int, *, heads: int = 1, dropout: float = 0.0,
                 attention_dropout: float = 0.0, norm: Norm = "none", activation: Activation = "relu", residual: bool = False,
                 last: bool = False, hidden: int | None = None) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch.jit, at its import
            from torch_geometric import nn as geometric

        super().__init__()
        self.drop = nn.Dropout(dropout)
        self.attributes = edge_width > 0 and conv != "gcn"
        self.conv: nn.Module
        if conv == "gin":
            hidden = hidden or width
            perceptron = nn.Sequential(nn.Linear(width_in, hidden), *_norm(norm, hidden), ACTIVATIONS[activation](),
                                       nn.Linear(hidden, width))
            self.conv = (geometric.GINEConv(perceptron, edge_dim=edge_width) if self.attributes
                         else geometric.GINConv(perceptron))
        elif conv == "gat":
            self.conv = geometric.GATConv(width_in, width // heads, heads, dropout=attention_dropout,
                                          edge_dim=edge_width or None)
        else:
            self.conv = geometric.GCNConv(width_in, width)
        self.shortcut: nn.Module | None = None
        if residual:
            self.shortcut = nn.Identity() if width_in == width else nn.Linear(width_in, width, bias=False)
        self.after = nn.Sequential(*([] if last else [*_norm(norm, width), ACTIVATIONS[activation]()]))

    def forward(self, x: Tensor, nodes: Nodes) -> Tensor:
        x = self.drop(x)
        y = self.conv(x, nodes.index, nodes.attributes) if self.attributes else self.conv(x, nodes.index)
        if self.shortcut is not None:
            y = y + self.shortcut(x)
        passed: Tensor = self.after(y)
        return passed


class MessagePassingSettings(EncoderSettings):
    """conv: of each of the `depth` layers of `width` channels; heads: of attention (gat). dropout: of what enters a layer, the
    nodes' content among it; attention_dropout: of attention (gat). norm: `batch` has the statistics of the valid nodes of the
    whole batch on one rank. residual: what enters a layer is added to what its convolution gives.
    """

    sees: frozenset[str] = frozenset({"edges"})
    conv: Convolution = "gin"
    width: Count = 256
    depth: Count = 5
    heads: Count = 1
    dropout: Rate = 0.0
    attention_dropout: Rate = 0.0
    norm: Norm = "batch"
    activation: Activation = "relu"
    residual: bool = False

    @property
    def takes(self) -> frozenset[str]:
        return frozenset({"drop", "replace", "swap"})

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"mean", "sum", "max", "layers"})

    @model_validator(mode="after")
    def _attends(self) -> Self:
        if self.conv != "gat" and (self.heads > 1 or self.attention_dropout):
            raise ValueError(f"{self.conv} has no attention; leave heads and attention_dropout out, or set conv: gat")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} cannot be shared out among {self.heads} heads")
        return self

    def layer(self) -> dict[str, Any]:
        """Keywords of every `Layer`."""
        return self.model_dump(include={"heads", "dropout", "attention_dropout", "norm", "activation", "residual"})

    def build(self, tokenizer: Tokenizer, axes: tuple[Axis, ...], channels: int) -> MessagePassing:
        return MessagePassing(self, tokenizer)


def edge_width(tokenizer: Tokenizer) -> int:
    """Numbers per edge that a layer is given: its type where there are several, and its values."""
    return (tokenizer.edge_kinds if tokenizer.edge_kinds > 1 else 0) + tokenizer.edge_values


class MessagePassing(Encoder):
    """Layers over raw content; what `structure` says, where it is seen, is embedded and stands beside the content.

    `drop` encodes the graph of the kept nodes; `replace` puts a learned token, zero at first, where content is hidden (Hou et
    al. 2022, GraphMAE, section 3). Rows of a batch share no edge, so that none depends on another, but for the statistics of
    batch norm while training. `sum` and `max` are those over a row's nodes, as `mean`.
    """

    def __init__(self, settings: MessagePassingSettings, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.takes, self.provides = settings.takes, settings.provides
        self.width, self.depth, self.mask_unit = settings.width, settings.depth, ()
        self.edges = tokenizer.edge_kinds, tokenizer.edge_values
        self.mask_token = nn.Parameter(torch.zeros(tokenizer.token_size))
        self.places = tokenizer.places(self.width) if "structure" in settings.sees else None
        width_in = tokenizer.token_size + (0 if self.places is None else self.width)
        self.layers = nn.ModuleList(
            Layer(settings.conv, self.width if i else width_in, self.width, edge_width(tokenizer), **settings.layer())
            for i in range(self.depth))

    def forward(self, stream: TokenStream, plan: Plan | None = None, *, want: frozenset[str] = frozenset()) -> Encoded:
        keep = None if plan is None else plan.keep
        tokens = stream if keep is None else stream.take(keep)
        nodes = Nodes(tokens, *self.edges)
        content = tokens.content if plan is None or keep is not None else replaced(tokens.content, plan, self.mask_token)
        if self.places is not None and tokens.structure is not None:
            content = torch.cat([content, self.places(tokens.structure)], -1)
        x = nodes.flat(content)
        layers = []
        for layer in self.layers:
            x = layer(x, nodes)
            if "layers" in want:
                layers.append(nodes.back(x))
        x = nodes.back(x)
        live = tokens.valid[..., None]
        total = x.sum(1)
        summary = {"sum": total, "mean": total / live.sum(1).clamp_min(1),
                   "max": x.masked_fill(~live, -torch.inf).amax(1).masked_fill(~live.any(1), 0)}
        return Encoded(x, summary, tokens.valid, index=keep, layers=layers if "layers" in want else None)

    def layer_groups(self) -> list[list[nn.Parameter]]:
        stem = [self.mask_token, *([] if self.places is None else self.places.parameters())]
        return [stem, *(list(layer.parameters()) for layer in self.layers)]
