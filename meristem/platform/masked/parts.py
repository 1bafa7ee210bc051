"""The parts of the masked engine that a recipe may name."""

from __future__ import annotations

from meristem.platform.masked.autoregressive import Autoregressive, Order
from meristem.platform.masked.complement import Complement
from meristem.platform.masked.cross import Cross
from meristem.platform.masked.gradient import Gradient
from meristem.platform.masked.groups import Groups
from meristem.platform.masked.guides import Guided
from meristem.platform.masked.masking import Block, HiddenEdges, Masking, Nothing, Random, Region, Shuffle
from meristem.platform.masked.mixing import Mixture
from meristem.platform.masked.places import Place, Placeless
from meristem.platform.masked.predictors import Decoder, Dense, Graph, Linear, PredictorSettings
from meristem.platform.masked.projected import Projected
from meristem.platform.masked.regressor import Regressor
from meristem.platform.masked.slices import Slices
from meristem.platform.masked.spectrum import Spectrum
from meristem.platform.masked.stochastic import Stochastic
from meristem.platform.masked.targets import Chamfer, Content, Cosine, Extent, Features, Surface, TargetSettings

MASKINGS: dict[str, type[Masking]] = {
    "random": Random,
    "block": Block,
    "region": Region,
    "nothing": Nothing,
    "edges": HiddenEdges,
    "shuffle": Shuffle,
    "guided": Guided,
    "groups": Groups,
    "complement": Complement,
    "order": Order,
    "mixture": Mixture,
}

PREDICTORS: dict[str, type[PredictorSettings]] = {
    "linear": Linear,
    "decoder": Decoder,
    "cross": Cross,
    "dense": Dense,
    "graph": Graph,
    "regressor": Regressor,
    "placeless": Placeless,
    "stochastic": Stochastic,
    "autoregressive": Autoregressive,
}

TARGETS: dict[str, type[TargetSettings]] = {
    "content": Content,
    "features": Features,
    "chamfer": Chamfer,
    "surface": Surface,
    "cosine": Cosine,
    "extent": Extent,
    "spectrum": Spectrum,
    "projected": Projected,
    "gradient": Gradient,
    "slices": Slices,
    "place": Place,
}
