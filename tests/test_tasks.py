"""Task heads, fine-tuning and transfer evaluation, on made data."""

from __future__ import annotations

import csv
import json
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import meristem
from meristem.errors import CheckpointError, DataError, MeristemError, RecipeError
from meristem.platform.assembly import Assembly
from meristem.platform.data.loader import whole
from meristem.platform.data.manifest import Row
from meristem.platform.data.source import Data, open_data
from meristem.platform.evaluation.results import QUERIES, Results, summarise
from meristem.tasks import embedding, pages, probing, transfer
from meristem.tasks.base import TaskRecipe, normalised, objective
from meristem.tasks.classification import ClassificationObjective
from meristem.tasks.embedding import embed, encode, facts, features
from meristem.tasks.finetune import choose, resolve
from meristem.tasks.inspection import inspect, noise

UNET = ["encoder={unet: {widths: [8, 16], blocks: [1, 1]}}", "views.x.size=[16,16,16]"]
VIT = ["encoder={transformer: {width: 24, depth: 3, heads: 2}}", "views.x.size=[16,16,16]", "modality.volume.patch=[4,4,4]"]
QUICK = ["train.workers=0", "train.batch=2", "train.log_every=5", "train.precision=fp32"]


@pytest.mark.parametrize("changes", [UNET, VIT, [*VIT, "task.segmentation.decoder=light"],
                                     [*VIT, "modality.volume.patch=[8,4,2]"],
                                     ["encoder={segresnet: {width: 8}}", "views.x.size=[16,16,16]"],
                                     ["encoder={swin: {width: 12}}", "views.x.size=[32,32,32]"],
                                     [*UNET, "task.segmentation.decoder=linear"], [*VIT, "task.segmentation.decoder=linear"]],
                         ids=["dense", "unetr", "light", "unetr anisotropic", "segresnet", "swin", "linear of levels",
                              "linear of tokens"])
def test_a_decoder_gives_a_logit_for_every_voxel_and_trains_the_encoder(changes: list[str]) -> None:
    recipe = resolve("segmentation", "volume", changes)
    assembly = recipe.assemble(3)
    batch = noise(recipe)
    (loss,) = assembly(batch, 0.0).values()
    (loss.total / loss.count).backward()
    step = assembly.last_step
    assert step is not None
    task = objective(assembly)
    logits = task.decoder(step.encode("x", want=task.decoder.want), step.stream("x"))  # type: ignore[union-attr,operator]
    assert logits.shape == (2, 3, *recipe.views["x"].size)  # type: ignore[attr-defined]
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in assembly.encoder.parameters())


def test_dice_ce_by_hand() -> None:
    """1 − soft Dice of the foreground, mean over classes and samples, plus mean cross-entropy."""
    recipe = resolve("segmentation", "volume", UNET)
    assembly = recipe.assemble(3)
    task = objective(assembly)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 4, 4, generator=generator)
    mask = torch.randint(0, 3, (2, 4, 4, 4), generator=generator)
    p = logits.softmax(1)
    dice = []
    for b in range(2):
        for c in (1, 2):
            t = (mask[b] == c).float()
            dice.append(1 - (2 * (p[b, c] * t).sum() + 1e-5) / (p[b, c].sum() + t.sum() + 1e-5))
    expected = torch.stack(dice).mean() + F.cross_entropy(logits, mask)
    assert task.loss(logits, mask[:, None]).item() == pytest.approx(expected.item(), abs=1e-5)  # type: ignore[union-attr,operator]


def test_sliding_windows_equal_one_pass_where_one_window_fits(volume_folder: Path) -> None:
    recipe = resolve("segmentation", "volume", [*UNET, "views.x.size=[24,24,24]"])
    data = open_data(volume_folder, recipe.modality, cache=volume_folder.parent / "c", quiet=True)
    assembly = recipe.assemble(3).eval()
    row = data.rows()[0]
    header = data.cache.header(row.index)
    array = normalised(data.cache.array(row.index), header, torch.device("cpu"))
    probabilities = objective(assembly).predict(assembly, array, header)  # type: ignore[union-attr,operator]
    assert probabilities.shape == (3, *array.shape[1:])
    assert torch.allclose(probabilities.sum(0), torch.ones(array.shape[1:]), atol=1e-5)


def test_a_net_overfits_one_made_set_and_its_predictions_lie_on_the_source_grid(volume_folder: Path, tmp_path: Path) -> None:
    out, cache = tmp_path / "run", tmp_path / "cache"
    tuned = meristem.finetune("segmentation", volume_folder, out,
                              [*UNET, *QUICK, "train.steps=60", "train.lr=5e-3", "train.ema=0.9"], cache=cache, quiet=True)
    scores = json.loads((out / "metrics.json").read_text())
    assert scores["test"]["dice"] > 0.8 and scores["test_cases"] == len(json.loads((out / "cases.json").read_text()))
    assert tuned.scope.scored == ("shell", "core")
    written = meristem.predict(out, volume_folder / "imagesTr", tmp_path / "pred", quiet=True)
    assert len(written) == 8
    for path in written:
        truth, found = nib.load(volume_folder / "labelsTr" / path.name), nib.load(path)
        assert found.shape == truth.shape and np.allclose(found.affine, truth.affine)
        a, b = np.asarray(truth.dataobj) > 0, np.asarray(found.dataobj) > 0
        assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.8


def test_classification_from_folders(image_folder: Path, tmp_path: Path) -> None:
    quick = [*QUICK, "encoder={transformer: {width: 32, depth: 2, heads: 2}}", "views.x.size=[32,32]", "train.steps=40",
             "modality.image.normalise=unit",  # z-scores would take away what tells the classes apart
             "train.batch=6"]
    meristem.finetune("classification", image_folder, tmp_path / "run", quick, split="0.4,0.2,0.4", cache=tmp_path / "c",
                      quiet=True)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]["auroc"] > 0.9
    path, = meristem.predict(tmp_path / "run", image_folder, tmp_path / "pred", quiet=True)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 and set(rows[0]) == {"file", "class", "dark", "light"}
    assert sum(row["class"] == Path(row["file"]).parts[0] for row in rows) >= 10
    with np.load(meristem.embed(tmp_path / "run", image_folder, tmp_path / "vectors", quiet=True)) as stored:
        assert stored["embedding"].shape == (12, 32) and np.isfinite(stored["embedding"]).all()


@pytest.fixture
def grey_masks(tmp_path: Path) -> Path:
    """12 colour images of 40x36 whose masks are grey: 0 around, 128 a ball, 255 its core."""
    root = tmp_path / "cells"
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    y, x = np.mgrid[:40, :36]
    for i in range(12):
        distance = np.hypot(y - 18 - i % 3, x - 17 + i % 4)
        mask = np.where(distance < 5, 255, np.where(distance < 11, 128, 0)).astype(np.uint8)
        pixels = np.random.default_rng(i).normal(mask[..., None] * [0.3, 0.5, 0.7] + 40, 8).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{i:02d}.png")
        Image.fromarray(mask).save(root / "labels" / f"{i:02d}.png")
    return root


NET2D = ["encoder={unet: {widths: [8, 16], blocks: [1, 1]}}", "views.x.size=[32,32]", "train.workers=0", "train.batch=2"]
GREYS = "modality.image.mask_values={0: 0, 128: 1, 255: 2}"


def test_grey_masks_are_refused_with_the_mapping_they_need(grey_masks: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="0, 128, 255") as caught:
        meristem.finetune("segmentation", grey_masks, tmp_path / "out", NET2D, cache=tmp_path / "c", quiet=True)
    assert caught.value.remedy is not None and f"'{GREYS}'" in caught.value.remedy


def test_predicted_masks_have_the_files_own_values_and_size(grey_masks: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    meristem.finetune("segmentation", grey_masks, run, [*NET2D, GREYS, "train.steps=30", "task.segmentation.flips=[]"],
                      cache=tmp_path / "c", quiet=True)
    written = meristem.predict(run, grey_masks / "images", tmp_path / "masks", quiet=True)
    assert [path.name for path in written] == [f"{i:02d}.png" for i in range(12)]
    for path in written:
        drawn = np.asarray(Image.open(path))
        truth = np.asarray(Image.open(grey_masks / "labels" / path.name))
        assert drawn.shape == truth.shape and set(np.unique(drawn)) <= {0, 128, 255}
        assert np.mean(drawn == truth) > 0.9


def test_budgets_are_nested_counts_fractions_or_all(volume_folder: Path) -> None:
    recipe = resolve("segmentation", "volume", UNET)
    data = open_data(volume_folder, recipe.modality, "1,0,0", volume_folder.parent / "c", quiet=True)
    rows = recipe.task.labelled(data.rows("train"))
    two, half, every = (choose(rows, labels, 0, data) for labels in ("2", "0.5", "all"))
    assert len(two) == 2 and len(half) == 4 and len(every) == 8
    assert {r.index for r in two} <= {r.index for r in half}
    with pytest.raises(RecipeError, match="count, a fraction or all"):
        choose(rows, "many", 0, data)


def test_validation_subjects_may_join_and_a_tested_split_may_not(volume_folder: Path, tmp_path: Path) -> None:
    changes = [*UNET, *QUICK, "train.steps=1"]
    expected = {("train",): (4, 2), ("train", "val"): (6, 2), ("train", "val", "test"): (8, 0)}
    for train_on, counts in expected.items():
        name = "-".join(train_on)
        meristem.finetune("segmentation", volume_folder, tmp_path / name, changes, train_on=train_on, split="0.5,0.25,0.25",
                          cache=tmp_path / "cache", quiet=True)
        figures = json.loads((tmp_path / name / "metrics.json").read_text())
        assert (figures["labelled_subjects"], figures["test_cases"]) == counts
    with pytest.raises(RecipeError, match="no split 'validation'"):
        meristem.finetune("segmentation", volume_folder, tmp_path / "d", changes, train_on=("validation",), quiet=True)


def test_a_probe_leaves_the_encoder_alone(volume_folder: Path, tmp_path: Path) -> None:
    changes = [*UNET, *QUICK, "train.steps=3", "probe=true"]
    recipe = resolve("segmentation", "volume", changes)
    torch.manual_seed(recipe.train.seed)
    before = dict(recipe.assemble(3).named_parameters())
    tuned = meristem.finetune("segmentation", volume_folder, tmp_path / "run", changes, cache=tmp_path / "c", quiet=True)
    after = dict(tuned.outcome.assembly.named_parameters())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith("objectives.task") for name in moved)
    assert tuned.trainable == sum(p.numel() for name, p in after.items() if name.startswith("objectives.task"))


@pytest.mark.parametrize("changes", [
    VIT, ["encoder={slicewise: {encoder: {timm: {model: resnet10t}}}}", "views.x.size=[4,32,32]",
          "modality.volume.patch=[1,4,4]"],
], ids=["tokens", "levels with batch norm"])
def test_a_linear_decoder_on_a_frozen_encoder_is_a_probe(volume_folder: Path, tmp_path: Path, changes: list[str]) -> None:
    """Neither weights nor statistics of the encoder move, and the array is not shown to the decoder."""
    changes = [*changes, *QUICK, "train.steps=3", "train.freeze={encoder: 1.0}", "task.segmentation.decoder=linear"]
    recipe = resolve("segmentation", "volume", changes)
    torch.manual_seed(recipe.train.seed)
    before = recipe.assemble(3).state_dict()
    tuned = meristem.finetune("segmentation", volume_folder, tmp_path / "run", changes, cache=tmp_path / "c", quiet=True)
    after = tuned.outcome.assembly.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith("objectives.task")}
    assert tuned.trainable == sum(p.numel() for n, p in tuned.outcome.assembly.named_parameters() if n in moved)
    batch = noise(recipe)
    assembly = tuned.outcome.assembly.eval()
    assembly(batch, 0.0)
    step, decoder = assembly.last_step, objective(assembly).decoder  # type: ignore[union-attr]
    encoded, stream = step.encode("x", want=decoder.want), step.stream("x")  # type: ignore[union-attr,operator]
    other = stream.with_array(torch.randn_like(stream.array))  # type: ignore[union-attr]
    assert torch.equal(decoder(encoded, stream), decoder(encoded, other))  # type: ignore[operator]


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.images = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.images += tag in ("img", "svg")
        self.links += [v for k, v in attrs if k in ("src", "href") and v and not v.startswith(("data:", "#"))]


def test_the_whole_job_pretrain_evaluate_report_and_resume(volume_folder: Path, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    meristem.pretrain("volume/mae-unet", volume_folder, tmp_path / "pre",
                      [*UNET, *QUICK, "train.steps=4", "modality.volume.patch=[4,4,4]"], cache=cache, quiet=True)
    evaluation = dict(inits=[str(tmp_path / "pre")], labels=["2", "all"], seeds=2, cache=cache, quiet=True)
    changes = [*QUICK, "views.x.size=[16,16,16]", "train.steps=3"]
    page = meristem.evaluate("segmentation", volume_folder, tmp_path / "eval", changes, **evaluation)  # type: ignore[arg-type]
    text = page.read_text()
    assert not Page(text).links and Page(text).images > 4
    results = Results.load(tmp_path / "eval" / "results.json")
    assert {(c.arm, c.labels, c.seed) for c in results.cells} == {
        (arm, labels, seed) for arm in ("mae-unet", "scratch") for labels in (2, "all") for seed in (0, 1)}
    assert results.leakage["mae-unet"].verdict == "clean"
    assert {c.budget.steps for c in results.cells} == {3}
    assert len(json.loads((tmp_path / "eval" / "metrics.json").read_text())) == 8
    assert meristem.show_recipe(str(tmp_path / "eval" / "recipe.yaml"))["recipe"]["train"]["steps"] == 3
    assert "case_0" not in text and str(tmp_path) not in text

    monkeypatch.setattr(transfer, "tune", lambda *a, **k: pytest.fail("a finished cell was run again"))
    assert meristem.evaluate("segmentation", volume_folder, tmp_path / "eval", changes, **evaluation) == page  # type: ignore[arg-type]
    assert meristem.report([tmp_path / "eval"], tmp_path / "again").read_text().count("<img") == text.count("<img")


def test_probes_compare_with_a_random_encoder(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedded: list[tuple[int, int]] = []

    def counted(assembly: Assembly, data: Data, rows: list[Row], summaries: tuple[str, ...]) -> np.ndarray:
        weights = hash(assembly.encoder.state_dict()["cls"].numpy().tobytes())
        embedded.extend((weights, row.index) for row in rows)
        return embed(assembly, data, rows, summaries=summaries)

    monkeypatch.setattr(probing, "embed", counted)
    quick = [*QUICK, "encoder={transformer: {width: 32, depth: 2, heads: 2}}", "train.steps=3"]
    size = "views.x={size: [32, 32]}"
    shallow = "objectives.pixels.masked.predictor.decoder.depth=1"
    meristem.pretrain("image/mae", image_folder, tmp_path / "pre", [*quick, size, shallow], split="0.4,0.2,0.4",
                      cache=tmp_path / "c", quiet=True)
    meristem.evaluate("classification", image_folder, tmp_path / "eval", [*QUICK, size], inits=[str(tmp_path / "pre")], seeds=2,
                      protocols=["knn", "linear"], labels=["4", "all"], split="0.4,0.2,0.4", cache=tmp_path / "c", quiet=True)
    assert len({weights for weights, _ in embedded}) == 3  # the pretrained encoder, and random weights of each seed
    assert Counter(embedded).most_common()[0][1] <= 2  # one seed embeds a row once, whatever budgets and protocols ask for it
    results = Results.load(tmp_path / "eval" / "results.json")
    assert (results.spent["mae"].steps, results.spent["mae"].samples) == (3, 6) and results.spent["mae"].seconds > 0
    assert {(c.arm, c.protocol) for c in results.cells} == {(a, p) for a in ("mae", "scratch") for p in ("knn", "linear")}
    with pytest.raises(RecipeError, match="protocol"):
        meristem.evaluate("classification", image_folder, tmp_path / "x", [size], inits=["scratch"], protocols=["magic"],
                          cache=tmp_path / "c", quiet=True)


def test_two_runs_of_one_recipe_keep_their_own_curves(image_folder: Path, tmp_path: Path) -> None:
    quick = [*QUICK, "encoder={transformer: {width: 32, depth: 2, heads: 2}}", "views.x={size: [32, 32]}", "train.log_every=1"]
    shallow, common = "objectives.pixels.masked.predictor.decoder.depth=1", {"cache": tmp_path / "c", "quiet": True}
    runs = [tmp_path / "a", tmp_path / "b"]
    for run, steps in zip(runs, (2, 3), strict=True):
        meristem.pretrain("image/mae", image_folder, run, [*quick, shallow, f"train.steps={steps}"], **common)  # type: ignore[arg-type]
    meristem.evaluate("classification", image_folder, tmp_path / "eval", [*quick[:-1], "train.log_every=1", "train.steps=2"],
                      inits=[str(run) for run in runs], labels=["4", "all"], seeds=1, **common)  # type: ignore[arg-type]
    arms = Results.load(tmp_path / "eval" / "results.json").arms
    (tmp_path / "eval" / "logs" / "pretraining of-before.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    curves = pages._curves(tmp_path / "eval", arms)
    assert sorted(len(c.records) for c in curves if c.stage == "pretraining") == [2, 3]
    tuned = {(c.arm, c.labels) for c in curves if c.stage == "fine-tuning"}
    assert tuned == {(arm, labels) for arm in arms for labels in ("4", "all")}


def test_a_sample_is_embedded_by_the_vector_that_pretraining_trained(image_folder: Path, tmp_path: Path) -> None:
    """MAE's class token meets no loss; DINO's does. A recipe that names a vector its encoder lacks is refused."""
    changes = ["encoder={transformer: {width: 16, depth: 1, heads: 2}}", "views.x.size=[32,32]"]
    for summary in ("mean", "cls"):
        recipe = resolve("classification", "image", [*changes, f"summary={summary}"])
        data = open_data(image_folder, recipe.modality, cache=tmp_path / "c", quiet=True)
        assembly = recipe.assemble(2)
        (encoded,) = encode(assembly, data, data.rows())
        assert np.array_equal(embed(assembly, data, data.rows()), encoded.summary[summary].numpy())
    assert inspect("volume/dino")["recipe"]["summary"] == "cls" and inspect("volume/mae")["recipe"]["summary"] == "mean"
    with pytest.raises(RecipeError, match="no cls vector"):
        resolve("segmentation", "volume", [*UNET, "summary=cls"])


def test_predicting_with_a_pretraining_run_says_what_is_missing(volume_folder: Path, tmp_path: Path) -> None:
    meristem.pretrain("volume/mae-unet", volume_folder, tmp_path / "pre",
                      [*UNET, *QUICK, "train.steps=1", "modality.volume.patch=[4,4,4]"], cache=tmp_path / "c", quiet=True)
    with pytest.raises(MeristemError, match="no task head"):
        meristem.predict(tmp_path / "pre", volume_folder, tmp_path / "out", quiet=True)


def test_a_view_that_the_patch_does_not_divide_is_refused() -> None:
    with pytest.raises(RecipeError, match="not a multiple of the patch"):
        resolve("segmentation", "volume", ["views.x.size=[20,16,16]"])


def test_inspection_prints_the_passes_of_a_task() -> None:
    shown = inspect("volume/segmentation", UNET)
    assert shown["passes"] == ["encoder(x)"]
    assert TaskRecipe.model_validate(shown["recipe"]).hash == shown["hash"]


SMALL = ["encoder={transformer: {width: 32, depth: 2, heads: 2}}", "views.x.size=[32,32]"]


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """6 folders of 10 frames, 40x64, in two classes: a bar that runs, and one that falls; two are shorter and wider."""
    for name in ("run", "fall"):
        for i in range(3):
            folder, rng = tmp_path / "clips" / name / f"c{i}", np.random.default_rng(i)
            folder.mkdir(parents=True)
            for t in range(7 if i == 2 else 10):
                pixels = rng.integers(0, 60, (40, 80 if i == 2 else 64, 3)).astype(np.uint8)
                bar = slice(4 * t, 4 * t + 4)
                pixels[(slice(None), bar) if name == "run" else (bar, slice(None))] = 255
                Image.fromarray(pixels).save(folder / f"{t:03d}.png")
    return tmp_path / "clips"


VIDEO = ["encoder={transformer: {width: 32, depth: 2, heads: 2}}", "views.x.size=[4,32,32]", "views.x.sample={stride: 2}",
         "views.x.clips=2", "views.x.crops=3", "modality.video.patch=[2,8,8]"]


def test_a_sample_is_judged_by_the_mean_over_its_looks_some_at_a_time(clips: Path, tmp_path: Path,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = resolve("classification", "video", VIDEO)
    data = open_data(clips, recipe.modality, "1,0,0", tmp_path / "c", quiet=True)
    assembly, rows = recipe.assemble(2).eval(), data.rows()
    task, sizes = objective(assembly), []
    assert isinstance(task, ClassificationObjective)
    torch.nn.init.normal_(task.out.weight)
    assembly.encoder.register_forward_hook(lambda _, inputs, __: sizes.append(inputs[0].batch))
    each, vectors = [], []
    for row in rows:
        view = whole(data.cache, [row], recipe.modality, recipe.views["x"].plain())
        stream = assembly.tokenizer.stream(recipe.modality.augment(view, recipe.views["x"].plain()))
        encoded = assembly.encoder(stream.seen(recipe.encoder.sees))
        assert len(encoded.tokens) == 6
        each.append(task.logits(encoded).softmax(1).mean(0))
        vectors.append(encoded.summary["mean"].mean(0))
    sizes.clear()
    for batch, expected in ((64, [36]), (13, [12, 12, 12]), (4, [6] * 6)):  # at least all looks at one sample
        monkeypatch.setattr(embedding, "BATCH", batch)
        assert torch.allclose(task.probabilities(assembly, data, rows), torch.stack(each).detach(), atol=1e-5)
        assert sizes == expected
        assert np.allclose(embed(assembly, data, rows), torch.stack(vectors).detach().numpy(), atol=1e-4)
        sizes.clear()
    logits = torch.stack([task.logits(e).unflatten(0, (-1, 6)).mean(1) for e in encode(assembly, data, rows[:1])])
    assert not torch.allclose(logits.softmax(-1)[0, 0], each[0], atol=1e-5)  # of probabilities, not of logits


def test_features_of_all_tokens_are_the_same_in_memory_and_on_disk(clips: Path, tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = resolve("classification", "video", VIDEO)
    data = open_data(clips, recipe.modality, "1,0,0", tmp_path / "c", quiet=True)
    assembly, rows = recipe.assemble(2), data.rows()
    here, there = (features(assembly, data, rows, memory, tmp_path) for memory in (1.0, 1e-6))
    assert here.tokens.shape == (36, 32, 32) and here.looks == 6 and here.tokens.dtype == torch.float16
    assert torch.equal(here.tokens, there.tokens) and torch.equal(here.valid, there.valid)
    one = features(assembly, data, rows[4:5], 1.0, tmp_path)
    assert torch.allclose(one.tokens.float(), here.tokens[24:30].float(), atol=1e-2)
    assert not [path for path in tmp_path.iterdir() if path.is_file()]  # nothing is left behind
    monkeypatch.setattr(embedding.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(MeristemError, match="disk"):
        features(assembly, data, rows, 1e-6, tmp_path)


def test_headers_are_an_arm_that_says_what_can_be_read_off_them(tmp_path: Path) -> None:
    """Two classes of equal noise, one of them wider: no pixel tells them apart."""
    rng, root = np.random.default_rng(1), tmp_path / "images"
    for name, width in (("dark", 40), ("light", 44)):
        (root / name).mkdir(parents=True)
        for i in range(8):
            pixels = rng.normal(100, 20, (32 + 4 * (i % 2), width)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:02d}.png")
    quick, common = [*QUICK, *SMALL, "train.steps=2"], {"split": "0.4,0.2,0.4", "cache": tmp_path / "c", "quiet": True}
    meristem.pretrain("image/mae", root, tmp_path / "pre", [*quick, "objectives.pixels.masked.predictor.decoder.depth=1"],
                      **common)  # type: ignore[arg-type]
    meristem.evaluate("classification", root, tmp_path / "eval", [*QUICK, SMALL[1], "train.steps=2"], seeds=1,
                      inits=["metadata", str(tmp_path / "pre")], protocols=["knn", "linear", "finetune"], **common)  # type: ignore[arg-type]
    results = Results.load(tmp_path / "eval" / "results.json")
    made = {(c.arm, c.protocol): c for c in results.cells}
    assert set(made) == {(arm, p) for arm in ("mae", "scratch", "metadata") for p in ("knn", "linear", "finetune")
                         } - {("metadata", "finetune")}
    for protocol in ("knn", "linear"):
        assert all(np.argmax(case.probabilities) == case.target for case in made["metadata", protocol].cases)
    assert results.baselines == {"scratch", "metadata"} and "metadata" not in {*results.pretraining, *results.leakage}
    summary = summarise(results, replicates=50)
    assert {c.baseline for c in summary.comparisons if c.protocol == "knn"} == {"scratch", "metadata"}
    assert not any(c.equal_budget for c in summary.comparisons if c.baseline == "metadata")
    assert not any("metadata" in sentence for sentence in summary.verdict)
    assert any("without a pixel, reaches AUROC 1.000" in warning for warning in summary.warnings)
    assert not any("unequal budgets" in warning for warning in summary.warnings)
    with pytest.raises(RecipeError, match="no weights to fine-tune"):
        meristem.finetune("classification", root, tmp_path / "x", SMALL, init="metadata", **common)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="no encoder"):
        meristem.evaluate("classification", root, tmp_path / "x", SMALL, inits=["metadata"], **common)  # type: ignore[arg-type]


def test_facts_near_in_angle_are_near_in_distance(clips: Path, tmp_path: Path) -> None:
    recipe = resolve("classification", "video", VIDEO)
    data = open_data(clips, recipe.modality, "1,0,0", tmp_path / "c", quiet=True)
    found = facts(data, data.rows())
    wide = np.array([data.cache.header(row.index).shape[-1] == 80 for row in data.rows()])
    varies = found[:, found.std(0) > 0]
    assert varies.shape == (6, 4)  # stored and source length and width; nothing else differs
    assert (varies[wide] * varies[~wide][0] < 0).all()  # short and wide: all on the other side of the mean
    unit = found / np.linalg.norm(found, axis=1, keepdims=True)
    near = np.argsort(-(unit @ unit.T), axis=1)[:, :6]
    for i in range(6):
        distance = np.linalg.norm(varies - varies[i], axis=1)
        assert (np.diff(distance[near[i]]) >= -1e-9).all()


def test_attentive_probe_and_retrieval_from_the_command_to_the_page(image_folder: Path, tmp_path: Path) -> None:
    changes = [*QUICK, *SMALL, "modality.image.normalise=unit", "task.classification.metric=accuracy",
               "task.classification.attentive={lr: [1e-3, 1e-2], weight_decay: [0.1], steps: 15, batch: 6}"]
    common = {"inits": ["scratch"], "seeds": 2, "split": "0.4,0.2,0.4", "cache": tmp_path / "c", "quiet": True}
    page = meristem.evaluate("classification", image_folder, tmp_path / "a", changes, protocols=["attentive"],
                             labels=["4", "all"], **common)  # type: ignore[arg-type]
    results = Results.load(tmp_path / "a" / "results.json")
    assert results.metric == "accuracy" and "attentive probe" in page.read_text()
    for cell in results.cells:
        assert cell.chosen["lr"] in (1e-3, 1e-2) and cell.chosen["weight_decay"] == 0.1
        assert (cell.budget.steps, cell.budget.batch) == (15, 6) and cell.budget.trainable > 0
    assert np.mean([np.argmax(c.probabilities) == c.target for cell in results.cells for c in cell.cases]) > 0.8

    page = meristem.evaluate("classification", image_folder, tmp_path / "b", changes, protocols=["retrieval"], **common)  # type: ignore[arg-type]
    results = Results.load(tmp_path / "b" / "results.json")
    assert (results.kind, results.metric, results.classes) == ("retrieval", "R@1", (QUERIES,))
    assert set(results.cells[0].cases[0].metrics) == {"R@1", "R@5", "R@10", "R@20", "mAP"}
    row = summarise(results, replicates=50).row("scratch", "retrieval", "all")
    assert row is not None and row.mean.value > 0.8 and "R@1" in page.read_text()
    assert json.loads((tmp_path / "b" / "metrics.json").read_text())[0]["R@1"] == pytest.approx(row.seeds[0])
    with pytest.raises(RecipeError, match="retrieval is scored by R@1"):
        meristem.evaluate("classification", image_folder, tmp_path / "c", changes, protocols=["retrieval", "knn"], **common)  # type: ignore[arg-type]


def test_top_five_of_two_classes_is_no_headline(image_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="2 classes"):
        meristem.finetune("classification", image_folder, tmp_path / "x", [*SMALL, "task.classification.metric=top5"],
                          cache=tmp_path / "c", quiet=True)


def test_of_a_checkpoint_of_another_modality_the_encoder_alone_is_taken(image_folder: Path, tmp_path: Path,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether its weights can serve is the checkpoint's business, asked before a file is read."""
    meristem.pretrain("image/mae", image_folder, tmp_path / "pre", [*QUICK, *SMALL, "train.steps=1",
                      "objectives.pixels.masked.predictor.decoder.depth=1"], cache=tmp_path / "c", quiet=True)
    with pytest.raises(CheckpointError, match="covers only"):
        resolve("classification", "volume", ["encoder={transformer: {width: 48}}"], tmp_path / "pre")
    asked: list[Path] = []
    monkeypatch.setattr("meristem.platform.training.checkpoint.load_encoder", lambda path, *_: asked.append(path))
    taken, own = (resolve("classification", kind, [], tmp_path / "pre") for kind in ("volume", "image"))
    assert asked == [tmp_path / "pre"]
    assert taken.modality.name == "volume" and taken.views == resolve("classification", "volume", []).views
    assert taken.encoder == own.encoder and own.modality.name == "image"
