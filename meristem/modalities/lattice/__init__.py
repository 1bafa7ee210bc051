"""Dense arrays on a lattice: what images and volumes share."""

from meristem.modalities.lattice.lattice import Lattice, LatticeOptions, anchors
from meristem.modalities.lattice.options import Affine, Chance, Elastic, LatticeViewOptions
from meristem.modalities.lattice.tokenizer import LatticeTokenizer, PatchEmbedding

__all__ = ["Affine", "Chance", "Elastic", "Lattice", "LatticeOptions", "LatticeTokenizer", "LatticeViewOptions",
           "PatchEmbedding", "anchors"]
