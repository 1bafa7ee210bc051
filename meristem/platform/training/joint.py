"""Pretraining one encoder on several kinds of data in one run."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import yaml

from meristem.errors import MeristemError
from meristem.platform.assembly import Assembly
from meristem.platform.data.loader import loader
from meristem.platform.data.source import Data
from meristem.platform.joint import Joint, JointAssembly
from meristem.platform.step import Batch
from meristem.platform.training import checkpoint
from meristem.platform.training.loop import Outcome, launch, train
from meristem.platform.training.pretrain import card, close_run, open_run, reference
from meristem.platform.training.progress import Reporter


class _Turns:
    """The batches of a joint run: at each step the next one of the member whose turn it is. seconds: spent on each."""

    def __init__(self, recipe: Joint, data: Mapping[str, Data]) -> None:
        self.recipe, self.data, self.turns = recipe, data, recipe.turns()
        self.seconds = dict.fromkeys(recipe.members, 0.0)

    def __call__(self, first: int, rank: int, world: int) -> Generator[Batch, None, None]:
        done, whole = Counter(self.turns[:first]), Counter(self.turns)
        streams = {}
        for name, member in self.recipe.members.items():
            mine, rows = member.recipe, self.data[name].rows("train")
            streams[name] = iter(loader(self.data[name].cache, rows, mine, fields=mine.reads, start=done[name],
                                        steps=whole[name], rank=rank, world=world, workers=self.recipe.train.workers))
        for name in self.turns[first:]:
            batch = next(streams[name])
            batch.member = name
            began = time.perf_counter()
            yield batch
            self.seconds[name] += time.perf_counter() - began


def pretrain(recipe: Joint, data: Mapping[str, Data], directory: Path, *, resume: bool = False, quiet: bool = False) -> Outcome:
    """Train a joint recipe on the training rows of each member's data.

    Writes what a run writes, and for each member `directory`/<member>: a run of its own, to be fine-tuned, evaluated and
    embedded with as any other. Raises MeristemError.
    """
    began = time.perf_counter()
    for name in recipe.members:
        if not data[name].rows("train"):
            raise MeristemError(f"the training split of '{name}' is empty", "Give more data, or another --split.")
    fabric = launch(recipe.train)
    cards = {name: card(m.recipe, data[name], data[name].identities(data[name].rows("train")), "pretraining")
             for name, m in recipe.members.items()}
    seen = {"contents": {name: c["seen"]["contents"] for name, c in cards.items()}}
    about = {"kind": "joint", "recipe": recipe.dump(), "recipe_hash": recipe.hash, "members": cards, "seen": seen,
             "versions": checkpoint.versions()}
    anyone = next(iter(data.values()))
    start = open_run(fabric, directory, about, anyone, resume)
    fabric.seed_everything(recipe.train.seed, verbose=False)
    assembly, batches = JointAssembly(recipe), _Turns(recipe, data)
    first = fabric.global_rank == 0
    with Reporter(f"{recipe.name} {' + '.join(recipe.members)}", recipe.train.steps, directory if first else None,
                  quiet) as reporter:
        outcome = train(recipe.train, assembly, batches, fabric, reporter, directory=directory, card=lambda usable: about,
                        resume=start)
        if outcome.stopped:
            reporter.say(f"stopped after {outcome.steps} of {recipe.train.steps} steps; --resume goes on")
    if first:
        close_run(directory, outcome, {"samples_seen": {name: len(d.rows("train")) for name, d in data.items()},
                                       "wall_seconds": round(time.perf_counter() - began, 2)})
        assert isinstance(outcome.assembly, JointAssembly)
        for name in recipe.members:
            _release(outcome, outcome.assembly.of(name), directory / name, cards[name], data[name], batches, name)
    return outcome


def _release(outcome: Outcome, member: Assembly, directory: Path, about: Mapping[str, Any], data: Data, batches: _Turns,
             name: str) -> None:
    """A member as a run of its own."""
    directory.mkdir(exist_ok=True)
    checkpoint.write_text(directory / "recipe.yaml", yaml.safe_dump(about["recipe"], sort_keys=False, allow_unicode=True))
    data.cache.write_quarantine(directory / "quarantine.csv")
    turns = Counter(batches.turns[:outcome.steps])[name]
    checkpoint.save(directory, turns, member.state_dict(), {**about, **reference(member)}, {}, 1)
    share = batches.seconds[name] / max(sum(batches.seconds.values()), 1e-9)
    close_run(directory, Outcome(member, turns, outcome.seconds * share, turns * member.recipe.train.batch,
                                 stopped=outcome.stopped, devices=outcome.devices), {"samples_seen": len(data.rows("train"))})
