"""Skeleton sequences: joints of people through time."""

from meristem.modalities.skeleton.skeleton import Skeleton

__all__ = ["Skeleton"]
