"""What a recipe says of graphs and of one view of them."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from meristem.modalities.base import Settings, ViewSettings

Probability = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=0)]


class GraphOptions(Settings):
    """How graphs are read.

    features: what a node's content is: `given`: its numbers in the file (a row of a connectome); `tags`: its tag, one-hot;
    `all`: both; `degree`: its degree, one-hot; `strength`: the sum of its edges' weights; `identity`: its number, one-hot
    (graphs on the same nodes); `constant`: 1; `auto`: all that the files give, else the degree. max_degree: this degree and
    all higher ones share a channel. channels: numbers per node; edge_kinds: of edges; tags, kinds: their names, in the order of
    their channels and numbers; weights: whether edges have one, which encoders then see as a share of the graph's heaviest;
    these five, null: as the data has, settled on opening it, over all samples. normalise: `node` brings each node's features to
    a root mean square of 1, as a transformer wants bags of words, whose numbers are small beside encodings of structure; a
    single feature stays as it is.
    walk: steps of the random-walk encoding; laplacian: eigenvectors of the Laplacian encoding; 0: none; both are structure, not
    content. encode_up_to: nodes of the largest graph that is encoded.
    threshold: only edges of at least this weight, without its sign; density: only this share of all pairs, the heaviest.
    label: column of a table of molecules that names the class; null: `class`, `label`, `y`, or the only other one.
    hold_out: shares of the edges that are taken out of every graph, before anything is made of its edges, to predict links: to
    validate and to test; null: none.
    """

    features: Literal["auto", "given", "tags", "all", "degree", "strength", "identity", "constant"] = "auto"
    max_degree: Annotated[int, Field(ge=1)] = 400
    channels: Annotated[int, Field(ge=1)] | None = None
    edge_kinds: Annotated[int, Field(ge=1)] | None = None
    tags: tuple[str, ...] | None = None
    kinds: tuple[str, ...] | None = None
    weights: bool | None = None
    normalise: Literal["none", "node"] = "none"
    walk: Count = 0
    laplacian: Count = 0
    encode_up_to: Annotated[int, Field(ge=1)] = 10_000
    threshold: Annotated[float, Field(ge=0)] | None = None
    density: Annotated[float, Field(gt=0, le=1)] | None = None
    label: str | None = None
    hold_out: tuple[Probability, Probability] | None = None

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if self.threshold is not None and self.density is not None:
            raise ValueError("threshold and density both say which edges stay; set one of them")
        return self


class GraphViewOptions(ViewSettings):
    """One view of a graph.

    size: most nodes of a view. window: `whole`: all nodes, and a graph of more is refused; `walk`: of a larger graph the nodes
    that random walks with restart meet first, from a random node (Qiu et al. 2020, GCC). restart: probability per step.
    drop_edges: share of edges left out (both directions together); drop_nodes: share of nodes left out; drop_features: share of
    feature channels set to 0 for all nodes (Zhu et al. 2020, GRACE); mask_nodes: share of nodes whose features are set to 0
    (You et al. 2020, GraphCL).
    """

    size: tuple[Annotated[int, Field(ge=1)]]
    window: Literal["whole", "walk"] = "whole"
    restart: Probability = 0.2
    drop_edges: Probability = 0.0
    drop_nodes: Probability = 0.0
    drop_features: Probability = 0.0
    mask_nodes: Probability = 0.0

    def plain(self) -> Self:
        return type(self)(size=self.size)
