"""A kind of data that another package brings, through its entry point alone."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import meristem
from meristem.errors import RecipeError
from meristem.modalities.base import modalities, modality_class
from meristem.platform import recipe as recipes
from meristem.platform.training import checkpoint

CODE = '''
import numpy as np
from meristem.modalities.base import Axis, Header, Sample
from meristem.modalities.lattice.lattice import Lattice, LatticeOptions
from meristem.modalities.lattice.options import LatticeViewOptions

class Options(LatticeOptions):
    patch: tuple[int, int] = (4, 4)

class Radar(Lattice):
    """Range-Doppler maps (range, speed) in .npy files."""
    name, suffixes, Options, ViewOptions = "radar", (".npy",), Options, LatticeViewOptions
    axes = (Axis("range", "m", 0.1, 100.0), Axis("speed", "m/s", 0.1, 100.0))

    def read(self, paths, fields={}):
        array = np.load(paths[0])[None].astype(np.int16)
        (scale,), (offset,) = self.statistics(array)
        return Sample(array, Header(array.shape, tuple(map(tuple, np.eye(3).tolist())), (1.0, 1.0), (scale,), (offset,)))

    def statistics(self, array):
        return (1 / array.std().item(),), (-array.mean().item() / array.std().item(),)
'''


@pytest.fixture
def radar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of data; the package that reads it is on the path, and so is one that is broken."""
    site = tmp_path / "site"
    for package, code in (("radar_maps", CODE), ("broken_maps", "import nothing_of_this_name")):
        about = site / f"{package}-1.0.dist-info"
        about.mkdir(parents=True)
        (site / f"{package}.py").write_text(code)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        name = package.split("_")[0]
        (about / "entry_points.txt").write_text(f"[meristem.modalities]\n{name} = {package}:Radar\n")
    monkeypatch.syspath_prepend(site)
    importlib.invalidate_caches()
    modalities.cache_clear()
    (tmp_path / "data").mkdir()
    for i in range(6):
        np.save(tmp_path / "data" / f"{i}.npy", np.random.default_rng(i).normal(0, 100, (20, 24)).astype(np.int16))
    yield tmp_path
    sys.modules.pop("radar_maps", None)
    modalities.cache_clear()


def test_a_recipe_of_an_outside_modality_trains(radar: Path) -> None:
    mine = radar / "mine.yaml"
    mine.write_text("extends: method/mae\nmodality: radar\nviews: {x: {size: [16, 16]}}\n"
                    "encoder: {transformer: {width: 32, depth: 2, heads: 2}}\n"
                    "objectives: {pixels: {masked: {predictor: {decoder: {depth: 1, width: 32, heads: 2}}}}}\n"
                    "train: {steps: 2, batch: 2, workers: 0}\n")
    meristem.pretrain(str(mine), radar / "data", radar / "run", cache=radar / "cache", quiet=True)
    card = checkpoint.read_card(radar / "run")
    assert card["modality"] == "radar" and [a["unit"] for a in card["axes"]] == ["m", "m/s"]
    assert len(card["seen"]["contents"]) == 6  # nothing is labelled, so nothing is held out
    with pytest.raises(RecipeError, match="patchs"):
        recipes.load(mine, ["modality.radar.patchs=[2,2]"])


def test_a_modality_that_cannot_be_imported_is_named(radar: Path) -> None:
    with pytest.raises(RecipeError, match=r"'broken'.*cannot be loaded.*nothing_of_this_name"):
        modality_class("broken")
