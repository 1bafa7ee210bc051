"""Bags of visual words: a student tells from a crop which local features a teacher meets in the whole picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from meristem.errors import RecipeError
from meristem.modalities.rng import Rng
from meristem.platform.contrastive.queue import Queue
from meristem.platform.objectives import Loss, Objective, ObjectiveSettings, Units
from meristem.platform.step import all_ranks

if TYPE_CHECKING:
    from meristem.platform.assembly import Assembly
    from meristem.platform.step import Step

MEMORY = 0.99  # of the mean distance to the nearest word


class BagOfWords(ObjectiveSettings):
    """OBoW (Gidaris et al. 2021): predict from queries the bag of words that the teacher makes of `target`, a view of one look.

    levels: so many of the coarsest maps of the encoder's pyramid have a vocabulary each, of `words` features of past steps.
    sharpness: δ⁻¹, of the assignment to words, for a mean distance of 1 to the nearest word. scale: κ, of the logits.
    """

    queries: Annotated[tuple[str, ...], Field(min_length=1)]
    target: str
    levels: Annotated[int, Field(ge=1)] = 2
    words: Annotated[int, Field(ge=2)] = 2048
    sharpness: Annotated[float, Field(gt=0)] = 15.0
    scale: Annotated[float, Field(gt=0)] = 8.0

    def check(self, recipe: Any) -> list[str]:
        problems = [f"there is no view '{name}' (views: {', '.join(recipe.looks)})" for name in (*self.queries, self.target)
                    if name not in recipe.looks]
        if not problems and recipe.looks[self.target].count != 1:
            problems.append(f"the words of '{self.target}' are those of one look; set views.{self.target}.count=1")
        if recipe.teacher is None or "encoder" not in recipe.teacher.of:
            problems.append("the words are the teacher's: add 'encoder' to teacher.of")
        if "pyramid" not in recipe.encoder.provides:
            problems.append("words are local features of several levels, and this encoder has no pyramid of maps; choose unet, "
                            "or timm's resnet*")
        return problems

    def build(self, assembly: Assembly) -> BagOfWordsObjective:
        widths, strides = assembly.encoder.pyramid_widths[-self.levels:], assembly.encoder.pyramid_strides[-1]
        if len(widths) < self.levels:
            raise RecipeError(f"{self.levels} levels of words were asked for, and the encoder has {len(widths)} maps",
                              f"Set levels to at most {len(widths)}.")
        target: Any = assembly.recipe.looks[self.target]
        size = target.size
        if any(-(-n // s) < 3 for n, s in zip(size, strides, strict=True)):
            raise RecipeError(f"view '{self.target}' of {tuple(size)} has a last map of stride {strides} that is all border, "
                              "which makes no words", f"Enlarge it to more than {tuple(2 * s for s in strides)}.")
        return BagOfWordsObjective(self, widths, assembly.encoder.width)


@torch.no_grad()
def distances(features: Tensor, words: Tensor) -> Tensor:
    """(B, L, K) squared distances of features (B, L, C) to words (K, C)."""
    square = features.square().sum(-1, keepdim=True) + words.square().sum(-1) - 2 * features @ words.T
    return square.clamp_min(0)


@torch.no_grad()
def bags(distance: Tensor, sharpness: Tensor | float) -> Tensor:
    """(B, K), rows of sum 1: each word as strongly as it is met anywhere (Gidaris et al. 2021, equations 2 and 3).

    q_l = softmax_k(− sharpness · distance_lk), y_k ∝ max_l q_lk. distance: (B, L, K).
    """
    strongest = (-sharpness * distance).softmax(-1).amax(1)
    return strongest / strongest.sum(1, keepdim=True)


class Vocabulary(nn.Module):
    """Words of one level: one feature of each picture, a mean over 3 places along each axis, first in, first out.

    near: moving average of the mean distance to the nearest word, over all ranks. Both are as of the end of the last optimiser
    step, the average with the step's own distances in it.
    """

    near: Tensor

    def __init__(self, words: int, width: int, sharpness: float) -> None:
        super().__init__()
        self.sharpness = sharpness
        self.queue = Queue(words, width, ("item",))
        self.queue.z.normal_().clamp_(min=0)  # what features after a ReLU may look like, until there are some
        self.register_buffer("near", torch.tensor(0.5))
        self._seen: list[Tensor] = []
        self._progress = -1.0

    @torch.no_grad()
    def forward(self, maps: Tensor, item: Tensor, rng: Rng, step: Step) -> Tensor:
        """Bags (B, words) of maps (B, C, *S) without their border; item, rng: of each row."""
        inner: tuple[Any, ...] = (..., *[slice(1, -1)] * (maps.ndim - 2))
        maps = maps[inner].float()
        distance = distances(maps.flatten(2).transpose(1, 2), self.queue.z)
        near = self.near
        if self.training:
            mean = all_ranks(distance.amin(-1).mean()[None]).mean()
            near = near.lerp(mean, 1 - MEMORY)
            if self._progress != step.progress:  # what a skipped step saw is forgotten
                self._seen, self._progress = [], step.progress
            self._seen.append(mean)
            pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[maps.ndim - 3]
            local = pool(maps, [min(3, n) for n in maps.shape[2:]], stride=1).flatten(2)
            chosen = local[torch.arange(len(maps), device=maps.device), :, rng.integers("place", local.shape[2])]
            fresh = step.gather(Units(chosen, {"item": item}, torch.ones(len(item), device=item.device)))
            self.queue.note(fresh, step.progress)
        return bags(distance, self.sharpness / near)

    @torch.no_grad()
    def after(self) -> None:
        self.queue.after()
        if self._seen:
            self.near.lerp_(torch.stack(self._seen).mean(), 1 - MEMORY)
            self._seen = []


class WordWeights(nn.Module):
    """Words (K, C) to the weights (K, width) of their logits, of unit length: two layers, so that words may come and go."""

    def __init__(self, words_width: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(words_width, 2 * width, bias=False), nn.BatchNorm1d(2 * width), nn.ReLU(),
                                    nn.Linear(2 * width, width))

    def forward(self, words: Tensor) -> Tensor:
        return F.normalize(self.layers(F.normalize(words, dim=-1)), dim=-1)


class BagOfWordsObjective(Objective):
    """A line for each query view: its mean over looks and levels of KL(bag | softmax(κ z Wᵀ)), z the student's mean vector."""

    def __init__(self, settings: BagOfWords, widths: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.settings = settings
        self.vocabularies = nn.ModuleList(Vocabulary(settings.words, w, settings.sharpness) for w in widths)
        self.weights = nn.ModuleList(WordWeights(w, width) for w in widths)

    def forward(self, step: Step) -> dict[str, Loss]:
        s = self.settings
        item = step.view(s.target).item
        maps = step.encode(s.target, by="teacher", want=frozenset({"pyramid"})).pyramid
        assert maps is not None
        kernels, targets = [], []
        for i, (vocabulary, weights, level) in enumerate(zip(self.vocabularies, self.weights, maps[-s.levels:], strict=True)):
            assert isinstance(vocabulary, Vocabulary)
            kernels.append(weights(vocabulary.queue.z))
            bag = vocabulary(level, step.batch.items.cursor[item], step.rng(f"words {i}", s.target), step)
            targets.append(bag[item.argsort()])
        losses = {}
        for view in s.queries:
            z, of = step.units(view, level="mean").z, step.view(view).item
            with torch.autocast(z.device.type, enabled=False):
                each = [F.kl_div((s.scale * z.float() @ kernel.float().T).log_softmax(-1), target[of], reduction="sum")
                        for kernel, target in zip(kernels, targets, strict=True)]
            losses[view] = Loss(torch.stack(each).mean(), float(len(z)), s.weight)
        return losses

    def after(self, step: Step) -> None:
        for vocabulary in self.vocabularies:
            assert isinstance(vocabulary, Vocabulary)
            vocabulary.after()
