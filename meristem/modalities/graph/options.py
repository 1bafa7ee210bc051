"""What a recipe says of graphs and of one view of them."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field

from meristem.modalities.base import Settings, ViewSettings

Probability = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=0)]


class GraphOptions(Settings):
    """How graphs are read.

    channels: numbers per node; null: as the data has, settled when it is first opened. edge_kinds: types of edges; null: as
    the data has. walk: steps of the random-walk encoding, laplacian: eigenvectors of the Laplacian encoding; 0: none; both are
    structure, not content.
    """

    channels: Annotated[int, Field(ge=1)] | None = None
    edge_kinds: Annotated[int, Field(ge=1)] | None = None
    walk: Count = 0
    laplacian: Count = 0


class GraphViewOptions(ViewSettings):
    """One view of a graph.

    size: most nodes of a view. window: `whole`: all nodes, and a graph of more is refused; `walk`: of a larger graph the nodes
    that random walks with restart meet first, from a random node. drop_edges: share of edges left out (both directions
    together); drop_nodes: share of nodes left out; drop_features: share of feature channels set to 0 for all nodes (Zhu et al.
    2020, GRACE); mask_nodes: share of nodes whose features are set to 0 (You et al. 2020, GraphCL).
    """

    size: tuple[Annotated[int, Field(ge=1)]]
    window: Literal["whole", "walk"] = "whole"
    drop_edges: Probability = 0.0
    drop_nodes: Probability = 0.0
    drop_features: Probability = 0.0
    mask_nodes: Probability = 0.0

    def plain(self) -> Self:
        return type(self)(size=self.size, window=self.window)
