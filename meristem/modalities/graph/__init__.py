"""Graphs: molecules, networks and connectomes."""

from meristem.modalities.graph.graph import Graph

__all__ = ["Graph"]
