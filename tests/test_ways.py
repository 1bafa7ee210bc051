"""Ways to train on labels: what stays, what moves, and that what is kept can be used again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_tasks import QUICK, UNET
from torch import Tensor

import meristem
from meristem.errors import RecipeError
from meristem.platform.assembly import Assembly
from meristem.platform.encoders.lora import Lora, adapt, merged
from meristem.platform.evaluation.results import PROTOCOLS, TRAINED, Results
from meristem.platform.recipe import load
from meristem.platform.report.figures import sentence
from meristem.platform.training import checkpoint, optim
from meristem.tasks import pages
from meristem.tasks.finetune import resolve
from meristem.tasks.transfer import reload
from meristem.tasks.ways import WAYS

VIT = [*QUICK, "encoder={transformer: {width: 32, depth: 2, heads: 2}}", "views.x={size: [32, 32]}"]


@pytest.fixture
def pretrained(image_folder: Path, tmp_path: Path) -> Path:
    shallow = "objectives.pixels.masked.predictor.decoder.depth=1"
    meristem.pretrain("image/mae", image_folder, tmp_path / "pre", [*VIT, shallow, "train.steps=2"], cache=tmp_path / "c",
                      quiet=True)
    return tmp_path / "pre"


def _encoder(run: Path) -> dict[str, Tensor]:
    return {k.removeprefix("encoder."): v for k, v in checkpoint.read_weights(run).items() if k.startswith("encoder.")}


def test_lora_adds_alpha_over_rank_times_up_down_and_nothing_at_first() -> None:
    linear = torch.nn.Linear(5, 3)
    x, before = torch.randn(4, 5), linear.weight.detach().clone()
    was = linear(x)
    adapt(linear, Lora(rank=2, alpha=6))
    assert torch.equal(linear(x), was)
    low = linear.parametrizations.weight[0]  # type: ignore[union-attr, index]
    low.up.data.normal_()
    torch.testing.assert_close(linear(x), was + 6 / 2 * x @ low.down.T @ low.up.T)
    torch.testing.assert_close(merged({f"a.{k}": v for k, v in linear.state_dict().items()})["a.weight"], linear.weight)
    assert torch.equal(linear.parametrizations.weight.original, before)  # type: ignore[union-attr]
    assert [name for name, p in linear.named_parameters() if p.requires_grad] == [
        "parametrizations.weight.0.down", "parametrizations.weight.0.up"]


def test_a_run_adapted_by_lora_keeps_the_pretrained_weights_predicts_and_can_be_started_from(
        pretrained: Path, image_folder: Path, tmp_path: Path) -> None:
    adapted = [*VIT, "lora={rank: 2}", "train.steps=3", "train.lr=0.1"]
    meristem.finetune("classification", image_folder, tmp_path / "tuned", adapted,
                      init=str(pretrained), cache=tmp_path / "c", quiet=True)
    before, after = _encoder(pretrained), _encoder(tmp_path / "tuned")
    kept = {name: after[name.replace("weight", "parametrizations.weight.original")] for name in before
            if name.endswith("weight") and name not in after}
    assert len(kept) >= 8 and all(torch.equal(before[name], value) for name, value in kept.items())
    assert all(torch.equal(before[name], after[name]) for name in before if name in after)
    assembly, recipe, _ = reload(tmp_path / "tuned")
    plain = recipe.encoder.build(assembly.tokenizer, recipe.modality.axes, recipe.modality.channels).eval()
    checkpoint.load_encoder(tmp_path / "tuned", plain, recipe.modality, recipe.encoder.sees)  # of low-rank parts, merged
    size = tuple(recipe.views["x"].size)  # type: ignore[attr-defined]
    made = [checkpoint.reference_embedding(e, recipe.modality, recipe.encoder.sees, size) for e in (plain, assembly.encoder)]
    assert made[0] == pytest.approx(made[1], abs=1e-5)
    assert made[0] != pytest.approx(checkpoint.read_card(pretrained)["reference"]["embedding"], abs=1e-3)
    assert len(meristem.predict(tmp_path / "tuned", image_folder, tmp_path / "predicted", quiet=True)) == 1


def test_every_way_is_a_protocol_with_a_budget_of_its_own(pretrained: Path, image_folder: Path, tmp_path: Path) -> None:
    assert tuple(WAYS) == TRAINED and set(TRAINED) <= set(PROTOCOLS)
    meristem.evaluate("classification", image_folder, tmp_path / "eval", [*VIT, "train.steps=2"], inits=[str(pretrained)],
                      seeds=1, protocols=list(WAYS), split="0.4,0.2,0.4", cache=tmp_path / "c", quiet=True)
    results = Results.load(tmp_path / "eval" / "results.json")
    trainable = {c.protocol: c.budget.trainable for c in results.cells if c.arm != "scratch"}
    assert trainable["finetune"] == trainable["warmup"] == trainable["sawtooth"]
    assert trainable["frozen"] < trainable["lora"] < trainable["finetune"]
    scratch = {c.protocol: c.budget.trainable for c in results.cells if c.arm == "scratch"}
    assert scratch == trainable
    stages = {curve.stage for curve in pages._curves(tmp_path / "eval", results.arms)}
    assert stages == {"pretraining", "fine-tuning", "frozen", "warmup", "sawtooth", "lora"}


def test_ways_change_the_schedule_and_nothing_else() -> None:
    recipe = resolve("classification", "image", ["train.head_first=0.25", "train.steps=100"])
    made = {name: way(recipe) for name, way in WAYS.items()}
    assert made["finetune"] == recipe
    assert made["frozen"].train.freeze["encoder"] == 1.0
    rates = {name: [optim.factor(made[name].train, step, "encoder") for step in range(100)] for name in made}
    assert max(rates["sawtooth"][:25]) == 0 and rates["warmup"][24] == max(rates["warmup"]) == 1
    assert all(x.model_copy(update={"train": recipe.train, "lora": None}) == recipe for x in made.values())


def test_lora_is_refused_where_there_is_nothing_to_adapt() -> None:
    with pytest.raises(RecipeError, match="this encoder has none"):
        adapt(Assembly(load("volume/mae-unet", UNET)).encoder, Lora())
    with pytest.raises(RecipeError, match="leave one out"):
        resolve("classification", "image", ["probe=true", "lora={}"])


def test_a_way_is_a_noun_that_keeps_its_capitals() -> None:
    assert sentence(PROTOCOLS["lora"]) == "LoRA fine-tuning" and sentence(PROTOCOLS["warmup"]) == "Fine-tuning after a warm-up"
    assert sentence("") == ""
