"""The contrastive engine's objective: level × head × relation × transform × loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, field_validator

from meristem.errors import RecipeError
from meristem.modalities.base import Settings
from meristem.platform.contrastive.levels import LevelSettings
from meristem.platform.contrastive.losses import LossSettings
from meristem.platform.contrastive.overlap import boxes
from meristem.platform.contrastive.parts import LEVELS, LOSSES, TRANSFORMS
from meristem.platform.contrastive.queue import Queue
from meristem.platform.contrastive.relations import Relation, parse
from meristem.platform.contrastive.transforms import TransformSettings
from meristem.platform.derived.base import needs_lattice
from meristem.platform.derived.montage import needs_montage
from meristem.platform.heads import Prototypes
from meristem.platform.objectives import Loss, Objective, ObjectiveSettings, Units
from meristem.platform.slots import Slot

if TYPE_CHECKING:
    from meristem.platform.assembly import Assembly
    from meristem.platform.step import Step


class Source(Settings):
    """One encoded view. masked: with the view's masking. Short for `{view: g}` is `g`."""

    view: str
    masked: bool = False


Sources = tuple[Annotated[Source, BeforeValidator(lambda value: {"view": value} if isinstance(value, str) else value)], ...]


Plain = Literal["global", "cls", "mean", "sum", "max", "dense", "slices", "tiles"]


class Contrastive(ObjectiveSettings):
    """Relate units of views to each other.

    queries: encoded by the student. keys: encoded by `by`; stop_gradient: as if constant (SimSiam). level: of the units: cls,
    mean, sum, max, global (cls where there is one), dense (tokens), slices (each alone), tiles (of a montage), or one of
    `levels`. head: of both sides; predictor: a head on it, for queries only.
    relation: what attracts; negatives: what may repel (null: everything else); see `relations`. queue: how many keys of past
    steps stand beside the batch's (MoCo). They are keys like any other: `item` is a sample's place in the run, so that under
    same(item) they only repel. sample: of more queries than this, so many are drawn in each step: the table of all pairs has
    queries × keys entries (dense levels: nodes squared). transform: a change of the units in feature space before the loss.
    """

    queries: Sources
    keys: Sources
    by: Literal["encoder", "teacher"] = "encoder"
    stop_gradient: bool = False
    level: Plain | Annotated[LevelSettings, Slot("level", LEVELS)] = "global"
    head: str | None = None
    predictor: str | None = None
    relation: str = "same(item) - same(view)"
    negatives: str | None = None
    queue: Annotated[int, Field(ge=1)] | None = None
    sample: Annotated[int, Field(ge=1)] | None = None
    transform: Annotated[TransformSettings, Slot("transform", TRANSFORMS)] | None = None
    loss: Annotated[LossSettings, Slot("contrastive loss", LOSSES)]

    @field_validator("relation", "negatives")
    @classmethod
    def _parses(cls, text: str | None) -> str | None:
        if text is not None:
            parse(text)
        return text

    def check(self, recipe: Any) -> list[str]:
        problems = []
        for source in (*self.queries, *self.keys):
            if source.view not in recipe.looks:
                problems.append(f"there is no view '{source.view}' (views: {', '.join(recipe.looks)})")
            elif source.masked and source.view not in recipe.masking:
                problems.append(f"view '{source.view}' is to be masked, but masking.{source.view} is not set")
        for name in (self.head, self.predictor):
            if name is not None and name not in recipe.heads:
                problems.append(f"there is no head '{name}' (heads: {', '.join(recipe.heads) or 'none'})")
        if problems:
            return problems
        if self.predictor is not None and recipe.heads[self.predictor].input != self.head:
            problems.append(f"predictor '{self.predictor}' must stand on the head: set its input to '{self.head}'")
        level = self.level if isinstance(self.level, LevelSettings) else None
        if level is not None:
            sources = (*self.queries, *self.keys)
            problems += level.check(recipe, {x.view for x in sources}, self.head)
            if level.whole and any(x.masked and recipe.masking[x.view].corruption == "drop" for x in sources):
                problems.append(f"level {level.what} needs whole maps, and masking drops tokens; set its corruption to replace")
        elif self.level in ("cls", "sum", "max", "slices") and self.level not in recipe.encoder.provides:
            problems.append("level cls needs an encoder with a class token; use level: global or mean" if self.level == "cls"
                            else "level slices needs an encoder that works slice by slice; choose encoder: sequence"
                            if self.level == "slices" else f"this encoder has no {self.level} vector; use level: mean")
        if self.level == "tiles":
            problems += [p for source in (*self.queries, *self.keys) for p in needs_montage(recipe, source.view, source.masked)]
            if problems:
                return [*dict.fromkeys(problems)]
        if self.by == "teacher":
            copied = recipe.teacher.of if recipe.teacher is not None else ()
            needs = ["encoder"]
            for head in (self.head, *(level.heads if level is not None else ())):
                while head is not None and head in recipe.heads and head not in needs:  # the recipe checks input
                    needs.append(head)
                    head = recipe.heads[head].input
            problems += [f"keys come from the teacher: add '{name}' to teacher.of" for name in needs if name not in copied]
        if self.loss.needs_prototypes and not (self.head and isinstance(recipe.heads[self.head], Prototypes)):
            problems.append("this loss compares assignments to prototypes; its head must be `prototypes`")
        constant = self.by == "teacher" or self.stop_gradient
        if self.loss.collapses and not constant:
            problems.append("this loss only attracts, and would make all units alike; set by: teacher, or stop_gradient: true")
        if self.queue is not None and not constant:
            problems.append("queued keys have no gradient, and the batch's own would; set by: teacher, or stop_gradient: true")
        if self.queue is not None and not self.loss.repels and self.transform is None:
            problems.append("this loss does not repel, so that it would not use the queue; leave it out")
        if self.transform is not None:
            problems += self.transform.check(self)
        return problems or self._check_relation(recipe)

    @property
    def extra(self) -> tuple[str, ...]:
        """Keys of its units beside item and view that tell them apart."""
        if isinstance(self.level, LevelSettings):
            return self.level.keys
        return ("token",) if self.level in ("dense", "slices") else ()

    def _check_relation(self, recipe: Any) -> list[str]:
        """Try the relation on two samples with two tokens each."""
        relation = Relation(self.relation, self.negatives)
        reads = relation.reads
        if "token" in reads and "token" not in self.extra:
            return [f"relation '{self.relation}' compares tokens; set level: dense"]
        if "slot" in reads and "slot" not in self.extra:
            return [f"relation '{self.relation}' compares slots; set level: slots"]
        if "point" in reads and self.extra != ("token",):
            return [f"relation '{self.relation}' compares places; set level: dense"]
        if "point" in reads and any(recipe.looks[source.view].partner for source in (*self.queries, *self.keys)):
            return [f"relation '{self.relation}' compares places in one sample, and a partner is another"]
        if "cell" in reads and needs_lattice(recipe, ""):
            return [f"relation '{self.relation}' asks for cells of a map, and {recipe.modality.name} data are sets, which have "
                    "none; give near(…) a distance alone"]
        if "point" in reads and self.queue is not None:
            return [f"relation '{self.relation}' compares places, which queued keys do not have; leave the queue out"]
        if "cube" in reads:
            if self.level == "dense" or self.queue is not None:
                return [f"relation '{self.relation}' compares boxes of whole looks; set level: global or mean, without a queue"]
            if problems := [p for x in (*self.queries, *self.keys) for p in boxes(recipe, x.view)]:
                return [*dict.fromkeys(problems)]
        if "hidden" in reads:
            if self.level != "dense":
                return [f"relation '{self.relation}' asks what was hidden; set level: dense"]
            if not all(source.masked and recipe.masking[source.view].corruption == "replace" for source in self.queries):
                return [f"relation '{self.relation}' asks what was hidden; every query must be masked, by a masking with "
                        "corruption: replace"]
        offset, total = {}, 0
        for name, view in recipe.looks.items():
            offset[name], total = total, total + view.count
        if not reads <= {"item", "view", "hidden", *self.extra}:
            return []  # labels are known to the data only

        def units(sources: Sources) -> Units:
            shown = [recipe.derived[s.view].of if self.level == "tiles" else s.view for s in sources]
            looks = sorted({offset[view] + i for view in shown for i in range(recipe.looks[view].count)})
            names = ("item", "view", *self.extra)
            values = torch.cartesian_prod(*(torch.tensor(v) for v in ([0, 1], looks, [0, 1])[:len(names)]))
            keys = dict(zip(names, values.T, strict=True))
            keys["hidden"] = torch.ones(len(values), dtype=torch.int64)
            return Units(torch.zeros(len(values), 1), keys, torch.ones(len(values)))

        if len(relation.matches(units(self.queries), units(self.keys)).q) == 0:
            return [f"relation '{self.relation}' finds no pair between queries and keys; with `- same(view)` there must be two "
                    "looks: set views.….count=2"]
        return []

    def build(self, assembly: Assembly) -> ContrastiveObjective:
        width, other = assembly.head_width(self.head), assembly.head_width(self.predictor or self.head)
        if width != other:
            raise RecipeError(f"keys have {width} numbers and queries {other}, as predictor '{self.predictor}' makes them",
                              f"Set heads.{self.predictor}.….out={width}.")
        return ContrastiveObjective(self, width)


class ContrastiveObjective(Objective):
    """One relation between queries and keys, and one loss over it."""

    def __init__(self, settings: Contrastive, width: int) -> None:
        super().__init__()
        self.settings = settings
        self.relation = Relation(settings.relation, settings.negatives)
        self.only_cls = settings.level in ("global", "cls")
        self.loss = settings.loss.build(width)
        self.transform = None if settings.transform is None else settings.transform.build(width)
        self.queue: Queue | None = None
        if settings.queue is not None:
            identity = {"item", "view", *settings.extra}
            self.queue = Queue(settings.queue, width, tuple(sorted({*identity, *self.relation.reads} - {"hidden"})))

    def forward(self, step: Step) -> dict[str, Loss]:
        s = self.settings
        q = Units.cat(self._units(step, x, "encoder", s.predictor) for x in s.queries)
        each = [self._units(step, x, s.by, None) for x in s.keys]
        if s.sample is not None:
            q = self._sample(step, q, s.sample)
        if s.stop_gradient:
            each = [k.with_z(k.z.detach()) for k in each]
        if s.loss.repels or self.queue is not None:  # source by source, in the order in which one process has them
            each = [step.gather(k, even=not s.extra) for k in each]
        k = Units.cat(each)
        keys = k if self.queue is None else Units.cat([k, self.queue.units()])
        if self.transform is not None:
            q, keys = self.transform(q, keys, self.relation, step)
        loss = self.loss(q, keys, self.relation, step)
        if self.queue is not None and self.training:
            self.queue.note(k, step.progress)
        # looks may have nothing in common: no loss then, not 0/0
        return {"": Loss(loss.total, torch.as_tensor(loss.count).clamp_min(1e-12), s.weight)}

    def _sample(self, step: Step, q: Units, count: int) -> Units:
        """This rank's of the `count` units with the lowest lots, of those of all ranks. A lot is a unit's own."""
        lot = step.rng("sample", q).bits("queries", 1)
        every = step.gather(Units(lot, {}, q.weight)).z[:, 0]
        if len(every) <= count:
            return q
        return q.select(torch.nonzero(lot[:, 0] <= every.kthvalue(count).values).squeeze(1))

    def _units(self, step: Step, source: Source, by: str, predictor: str | None) -> Units:
        s, view, masked = self.settings, source.view, source.masked
        if not isinstance(s.level, LevelSettings):
            return step.units(view, by, s.level, predictor or s.head, masked)
        units = s.level.units(step, view, by, s.head, masked)
        if predictor is None:
            return units
        units = units.select(units.weight > 0)  # a batch norm's statistics are those of units that count
        return units.with_z(step.assembly.module(by, predictor)(units.z, units.key["view"], units.key["item"]))

    def after(self, step: Step) -> None:
        self.loss.after()
        if self.transform is not None:
            self.transform.after()
        if self.queue is not None:
            self.queue.after()
