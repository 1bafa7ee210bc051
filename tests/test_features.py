"""What encoders make of test samples: components against an eigensolver, colours where they belong, the figures of them."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_skeletons import mocap
from scipy.spatial import cKDTree

from meristem.platform.data.source import Data, open_data
from meristem.platform.origin import METADATA
from meristem.platform.report import figures
from meristem.platform.report.pictures import Embedding, FeatureMap, Pictures
from meristem.tasks import features
from meristem.tasks.base import TaskRecipe
from meristem.tasks.finetune import resolve
from meristem.tasks.transfer import Arm

SMALL = "encoder={transformer: {width: 24, depth: 2, heads: 2}}"


@given(st.integers(2, 30), st.integers(1, 12), st.integers(0, 10))
def test_components_are_the_eigenvectors_scores_whatever_the_sign(m: int, d: int, seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(m, d)) * np.arange(1, d + 1)
    scores, share = features.components(x, 2)
    values = np.linalg.eigvalsh(np.cov(x.T, ddof=0).reshape(d, d))[::-1]
    expected = np.pad(values, (0, 2))[:2]
    np.testing.assert_allclose((scores**2).mean(0), np.maximum(expected, 0), atol=1e-8)
    np.testing.assert_allclose(share, expected / values.sum(), atol=1e-8)
    assert (scores.max(0) >= -scores.min(0) - 1e-12).all()
    assert np.array_equal(features.components(np.ones((m, d)), 2)[1], [0, 0])


def gathered(recipe: TaskRecipe, data: Data, *names: str) -> tuple[list[FeatureMap], list[Embedding]]:
    return features.gather([Arm(name, None, recipe, data) for name in names])


def test_images_give_maps_and_vectors_of_every_arm_with_an_encoder(image_folder: Path, tmp_path: Path) -> None:
    recipe = resolve("image/classification", "image", [SMALL, "views.x.size=[32,32]", "modality.image.patch=[8,8]"])
    data = open_data(image_folder, recipe.modality, "0.5,0,0.5", tmp_path / "cache", quiet=True)
    maps, vectors = gathered(recipe, data, "scratch", METADATA)
    test = data.rows("test")
    assert {f.arm for f in maps} == {e.arm for e in vectors} == {"scratch"}
    assert {f.case for f in maps} <= {r.case for r in test} and len(maps) == 3
    for f in maps:
        assert f.picture.shape[:2] == (32, 32) and f.colours.shape == (4, 4, 3)
        assert f.colours.min() >= 0 and f.colours.max() <= 1
    assert max(float(f.colours.std()) for f in maps) > 0.1
    (e,) = vectors
    assert e.place.shape == (len(test), 2) and e.names == {0: "dark", 1: "light"} and 0 < sum(e.share) <= 1
    assert e.label.tolist() == [r.labels["class"] for r in test]
    again = gathered(recipe, data, "scratch")
    assert np.array_equal(again[1][0].place, e.place)  # seeded


def test_volumes_are_shown_in_one_plane(volume_folder: Path, tmp_path: Path) -> None:
    recipe = resolve("volume/segmentation", "volume", [SMALL, "views.x.size=[16,16,16]", "modality.volume.patch=[4,4,8]"])
    data = open_data(volume_folder, recipe.modality, "0.5,0,0.5", tmp_path / "cache", quiet=True)
    maps, (e,) = gathered(recipe, data, "scratch")
    assert all(f.picture.shape == (16, 16) and f.colours.shape == (4, 4, 3) for f in maps) and len(maps) == 3
    assert e.names == {} and set(e.label.tolist()) == {-1}


def test_points_take_the_colour_of_the_nearest_token(tmp_path: Path) -> None:
    rng, root = np.random.default_rng(0), tmp_path / "clouds"
    for kind, axis in (("bell", 2), ("rod", 0)):
        (root / kind).mkdir(parents=True)
        for i in range(4):
            np.save(root / kind / f"{i}.npy", (rng.normal(size=(128, 3)) * (1 + 2 * np.eye(3)[axis])).astype(np.float32))
    recipe = resolve("points/classification", "points", [SMALL, "modality.points.count=16", "modality.points.size=8",
                                                         "views.x.size=[96]"])
    data = open_data(root, recipe.modality, "0.5,0,0.5", tmp_path / "cache", quiet=True)
    maps, _ = gathered(recipe, data, "scratch")
    for f in maps:
        assert f.picture.shape == f.colours.shape == (96, 3)
        assert 1 < len(np.unique(f.colours, axis=0)) <= 16
        _, near = cKDTree(f.picture).query(f.picture, k=2)
        same = (f.colours[near[:, 1]] == f.colours).all(1).mean()
        assert same > 0.4  # neighbours share tokens; by chance one in 16


def test_sets_without_places_have_vectors_only(tmp_path: Path) -> None:
    root = tmp_path / "motion"
    for i, kind in enumerate(("wave", "jump") * 4):
        (root / kind).mkdir(parents=True, exist_ok=True)
        mocap(root / kind / f"{kind}_{i}.txt", 50, i)
    recipe = resolve("skeleton/classification", "skeleton", [SMALL])
    data = open_data(root, recipe.modality, "0.5,0,0.5", tmp_path / "cache", quiet=True)
    maps, vectors = gathered(recipe, data, "scratch")
    assert maps == [] and len(vectors) == 1 and len(vectors[0].place) == len(data.rows("test"))


def test_figures_say_in_words_what_they_show(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    colours = np.zeros((2, 2, 3), np.float32)
    colours[0, 1] = 1
    several = [FeatureMap("case-1", arm, rng.random((8, 8)), colours, 1.0) for arm in ("scratch", "mae")]
    label = np.repeat([0, 1], 10)
    placed = Embedding("mae", (label[:, None] * 5 + rng.normal(size=(20, 2))).astype(np.float32), (0.6, 0.2), label,
                       {0: "dark", 1: "light"})
    made = Pictures(features=several, embeddings=[placed])
    kept = Pictures.load(made.save(tmp_path / "pictures.npz"))
    assert np.array_equal(kept.features[1].colours, colours) and kept.embeddings[0].names == placed.names
    assert len((kept + made).features) == 2 and len((kept + made).embeddings) == 1
    ((heading, (sample, scratch, mae)),) = figures.features(kept.features)
    assert heading == "Sample 1" and sample.caption == "sample" and (scratch.caption, mae.caption) == ("scratch", "mae")
    assert "principal components as red, green and blue" in mae.alt and "0.43" in mae.alt
    (plot,) = figures.embeddings(kept.embeddings, {"mae": "#0072b2"})
    assert "20 test samples" in plot.alt and "80% of the variance" in plot.alt and "dark 10; light 10" in plot.alt
    assert "same class: 100% (by chance 47%)" in plot.caption
    grown = figures._stretched(colours, (5, 4))
    assert grown.shape == (5, 4, 3) and grown[0, 3, 0] == 1 and grown[4, 3, 0] == 0


@pytest.mark.parametrize("count", [3, 20])
def test_of_many_classes_none_is_coloured(count: int) -> None:
    label = np.arange(40) % count
    e = Embedding("a", np.random.default_rng(0).normal(size=(40, 2)), (0.5, 0.1), label, {i: f"act {i}" for i in range(count)})
    (plot,) = figures.embeddings([e], {"a": "#0072b2"})
    drawing = base64.b64decode(plot.source.split(",")[1]).decode()
    assert drawing.count("<use") > 30 and ("legend" in drawing) == (count == 3)
