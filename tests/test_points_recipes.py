"""Every pretraining recipe of point clouds runs on made clouds and makes the passes that it should."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import meristem
from meristem.catalogue import names, rows
from meristem.errors import RecipeError
from meristem.platform import recipe as recipes
from meristem.platform.assembly import Assembly
from meristem.platform.contrastive.relations import Relation
from meristem.platform.objectives import Units
from meristem.platform.training import checkpoint
from meristem.tasks.inspection import inspect, noise

RECIPES = [name for name in names() if name.startswith("points/") and recipes.read(name).get("objectives")]


@pytest.fixture(scope="module")
def clouds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six scenes of a ground and three boxes of points on it, in metres."""
    root, rng = tmp_path_factory.mktemp("data") / "clouds", np.random.default_rng(0)
    root.mkdir()
    for i in range(6):
        ground = np.concatenate([rng.uniform(-6, 6, (150, 2)), rng.normal(0, 0.02, (150, 1))], 1)
        things = [rng.uniform(-0.5, 0.5, (100, 3)) + np.array([x, rng.uniform(-4, 4), 1.2]) for x in (-4, 0, 4)]
        np.savez(root / f"{i}.npz", points=np.concatenate([ground, *things]).astype(np.float32))
    return root


def tiny(name: str) -> list[str]:
    plain = recipes.read(name)
    (kind, _), = plain["encoder"].items()
    inner = "encoder.transformer" if kind == "transformer" else f"encoder.{kind}.encoder.transformer"
    changes = [f"{inner}.{key}" for key in ("width=24", "depth=1", "heads=2")]
    changes += ["modality.points.count=16", "modality.points.size=8", "train.workers=0", "train.batch=4", "train.steps=2",
                "train.log_every=1"]
    changes += [f"views.{view}.size=[256]" for view in plain["views"]]
    changes += [f"objectives.{key}.masked.predictor={{decoder: {{depth: 1, width: 24, heads: 2}}}}"
                for key, o in plain["objectives"].items() if "masked" in o and "decoder" in o["masked"]["predictor"]]
    return changes


def test_the_recipes_of_the_issue_are_there() -> None:
    wanted = {"mae", "maskfeat3d", "pointcontrast", "fac", "psa-ssl", "3d-jepa", "recon", "recon-alone", "i2p-mae", "simclr",
              "dino"}
    assert {f"points/{name}" for name in wanted} <= set(RECIPES)


@pytest.mark.parametrize("name", [name for name in RECIPES if not recipes.read(name).get("foreign")])  # else: test_foreign
def test_a_recipe_trains_on_clouds(name: str, clouds: Path, tmp_path: Path) -> None:
    meristem.pretrain(name, clouds, tmp_path / "run", tiny(name), cache=clouds.parent / "cache", quiet=True)
    weights = checkpoint.read_weights(tmp_path / "run")
    assert all(torch.isfinite(w).all() for w in weights.values())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {key: [line[key] for line in lines] for key in lines[0] if "loss" in key}
    assert len(lines) == 2
    for key, values in losses.items():
        assert all(math.isfinite(v) for v in values), key
        assert any(v > 0 for v in values), f"{key} has nothing to say of clouds with ground, things and overlap"
    figures = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (figures["samples"], figures["quarantined"]) == (8, 0)


@pytest.mark.parametrize("name,passes", [
    ("points/mae", ["encoder(x, plan)"]), ("points/maskfeat3d", ["encoder(x, plan)"]),
    ("points/3d-jepa", ["teacher(x)", "encoder(x, plan)"]), ("points/pointcontrast", ["encoder(v)"]),
    ("points/psa-ssl", ["encoder(v, plan)"]), ("points/recon-alone", ["encoder(x, plan)"])])
def test_lines_of_a_recipe_share_their_passes(name: str, passes: list[str]) -> None:
    assert inspect(name, tiny(name))["passes"] == passes


@pytest.mark.parametrize("apart", [True, False])
def test_what_recon_contrasts_does_not_reach_its_tokens(apart: bool) -> None:
    """Reconstruction trains the tokens, contrast the query; whether contrast trains the tokens too, `apart` decides."""
    recipe = recipes.load("points/recon-alone", [*tiny("points/recon-alone"), f"encoder.reader.apart={str(apart).lower()}"])
    torch.manual_seed(0)
    assembly = Assembly(recipe)
    losses = {name: loss.total for name, loss in assembly(noise(recipe), 0.0).items()}
    tokens, query = assembly.encoder.get_submodule("inner.embed"), assembly.encoder.get_parameter("query")

    def reaches(line: str) -> tuple[bool, bool]:
        wanted = [*tokens.parameters(), query]
        found = torch.autograd.grad(losses[line], wanted, retain_graph=True, allow_unused=True)
        there = [g is not None and bool(g.abs().sum() > 0) for g in found]
        return any(there[:-1]), there[-1]

    assert reaches("points") == (True, False)
    assert reaches("contrast") == (not apart, True)


def test_fac_draws_segments_together_and_its_background_only_repels() -> None:
    """Tokens of two looks at two scenes; of each that lies in a segment, by a double loop."""
    settings: Any = recipes.load("points/fac").objectives["segments"]
    z, n = F.normalize(torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), dim=1), range(40)
    item, view, segment = [i % 2 for i in n], [i // 20 for i in n], [i // 3 % 4 - 1 for i in n]
    keys = {"item": item, "view": view, "segment": segment, "token": [i % 20 for i in n]}
    units = Units(z, {name: torch.tensor(key) for name, key in keys.items()}, torch.ones(40))
    step: Any = SimpleNamespace(value=lambda x: x)
    loss = settings.loss.build(6)(units, units, Relation(settings.relation, settings.negatives), step)
    each = []
    for i in n:
        mine = [j for j in n if segment[i] >= 0 and segment[j] == segment[i] and item[j] == item[i] and view[j] != view[i]]
        s = [math.exp(float(z[i] @ z[j]) / 0.07) for j in n]
        others = [j for j in n if j != i and (segment[j] != segment[i] or segment[i] < 0 or item[j] != item[i])]
        rest = sum(s[j] for j in (*mine, *others))
        each += [sum(-math.log(s[j] / rest) for j in mine) / len(mine)] if mine else []
    assert 0 < len(each) < 40
    assert float(loss.total / loss.count) == pytest.approx(sum(each) / len(each), rel=1e-4)


def test_headers_name_their_sources() -> None:
    for row in rows():
        if row["name"] in RECIPES:
            assert row["follows"], row["name"]
            assert row["departs"], row["name"]


@pytest.mark.parametrize("change,what", [
    ("masking.x={random: {ratio: 0.6, corruption: replace}}", "decoder"), ("reads=[]", "segments")])
def test_impossible_changes_are_refused(change: str, what: str) -> None:
    with pytest.raises(RecipeError, match=what):
        recipes.load("points/psa-ssl" if "reads" in change else "points/mae", [change])
