"""The short form of `make canaries`, and whether its search would find what is hidden."""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import torch
from canaries import files, hits, parts
from made_canaries import Canaries, dicom
from PIL import Image as Pillow
from PIL import PngImagePlugin
from safetensors.torch import save_file

from meristem import cli
from meristem.errors import TRACEBACK, unforeseen
from meristem.modalities.image.dicom import TAGS
from meristem.modalities.image.image import Image, ImageOptions
from meristem.modalities.video.cine import MORE, TIMES, Cine
from meristem.modalities.volume import Volume
from meristem.modalities.volume.volume import VolumeOptions
from meristem.platform.data.manifest import Manifest, user_key

WORD = "Zebraquagga042x"


@pytest.mark.slow
def test_nobody_is_named_from_files_to_reports() -> None:
    ended = subprocess.run([sys.executable, Path(__file__).with_name("canaries.py"), "--modality", "image"], timeout=1200,
                           capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr
    counts = json.loads(ended.stdout.splitlines()[-1])
    assert counts["found"] == 0 and counts["canaries"] > 100 and counts["artefacts"] > 50


def hidden(folder: Path, how: str) -> None:
    """A file that holds the word, in a way in which a plain search of bytes mostly misses it."""
    file = folder / "file"
    if how == "npz":
        np.savez_compressed(folder / "x.npz", case=[WORD])
    elif how == "name of an array":
        np.savez_compressed(folder / "x.npz", **{WORD: np.zeros(3)})
    elif how == "gzip":
        file.write_bytes(gzip.compress(WORD.encode() * 3))
    elif how == "comment of an archive":
        with zipfile.ZipFile(file, "w") as archive:
            archive.comment = WORD.encode()
            archive.writestr("x", "y")
    elif how == "picture in a page":
        text = PngImagePlugin.PngInfo()
        text.add_text("Comment", WORD * 3, zip=True)
        Pillow.new("L", (4, 4)).save(held := io.BytesIO(), "png", pnginfo=text)
        file.write_text(f'<img src="data:image/png;base64,{base64.b64encode(held.getvalue()).decode()}">')
    elif how == "utf-16":
        file.write_text(WORD, encoding="utf-16")
    elif how == "lower case":
        file.write_text(WORD.lower())
    elif how == "safetensors":
        save_file({"x": torch.zeros(2)}, folder / "x.safetensors", {"note": WORD})
    elif how == "state":
        torch.save({"x": [torch.zeros(2), WORD]}, folder / "x.pt")
    else:
        (folder / WORD).mkdir()


@pytest.mark.parametrize("how", ["npz", "name of an array", "gzip", "comment of an archive", "picture in a page", "utf-16",
                                 "lower case", "safetensors", "state", "empty folder"])
def test_the_search_finds_what_is_hidden(how: str, tmp_path: Path) -> None:
    hidden(tmp_path, how)
    assert {word for _, word in hits(files(tmp_path), [WORD, "Zebraquagga043x"])} == {WORD}


def test_a_cut_archive_is_searched_as_it_is() -> None:
    packed = gzip.compress(WORD.encode() * 3)
    assert dict(parts(packed[:-8], "x")) == {"x": packed[:-8]}


# ---- pseudonyms

def cases(folder: Path) -> tuple[set[str], str]:
    found = Manifest.discover(folder, Volume(VolumeOptions()))
    return {name for row in found.rows for name in (row.case, row.subject)}, found.key_id


def test_two_keys_give_names_that_have_nothing_in_common(volume_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERISTEM_KEY", "one")
    mine, my_key = cases(volume_folder)
    again, _ = cases(volume_folder)
    monkeypatch.setenv("MERISTEM_KEY", "two")
    other, other_key = cases(volume_folder)
    assert mine == again and len(mine) == len(other) == 16 and not mine & other and my_key != other_key
    assert not {name.split("-")[1] for name in mine} & {name.split("-")[1] for name in other}


def test_the_key_is_secret_and_lies_in_no_run(volume_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import meristem

    monkeypatch.delenv("MERISTEM_KEY", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    key = user_key()
    file = tmp_path / "config" / "meristem" / "key"
    assert len(key) == 64 and file.stat().st_mode & 0o077 == 0 and user_key() == key
    meristem.pretrain("volume/mae", volume_folder, tmp_path / "run", [
        "encoder={transformer: {width: 24, depth: 1, heads: 2}}", "views.x.size=[8,8,8]", "modality.volume.patch=[4,4,4]",
        "train.steps=1", "train.batch=2", "train.workers=0"], cache=tmp_path / "cache", quiet=True)
    pieces = [*files(tmp_path / "run"), *files(tmp_path / "cache")]
    assert not hits(pieces, [key.decode(), bytes.fromhex(key.decode()).hex()]) and len(pieces) > 10


# ---- tags

def asked(monkeypatch: pytest.MonkeyPatch, path: Path, read: Any) -> set[str]:
    """The elements that a reader had pydicom parse; it must have named them."""
    real, tags = pydicom.dcmread, set()

    def dcmread(file: Any, *more: Any, specific_tags: Sequence[str], **named: Any) -> Any:
        ds = real(file, *more, specific_tags=specific_tags, **named)
        tags.update(element.keyword or str(element.tag) for element in ds)
        return ds

    monkeypatch.setattr(pydicom, "dcmread", dcmread)
    read(path)
    return tags


def test_readers_ask_for_listed_elements_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, identity = np.random.default_rng(0), Canaries()
    dicom(tmp_path / "one.dcm", rng.integers(0, 255, (16, 16), np.uint8), identity)
    dicom(tmp_path / "film.dcm", rng.integers(0, 255, (4, 16, 16), np.uint8), identity)
    reader = Image(ImageOptions(patch=4))
    coded = {"SpecificCharacterSet"}  # pydicom's own, to decode texts by
    found = asked(monkeypatch, tmp_path / "one.dcm", lambda path: reader.read([path]))
    assert {"PixelData", "Rows"} <= found <= {*TAGS, *coded}
    film = asked(monkeypatch, tmp_path / "film.dcm", lambda path: Cine(path, 25.0, 10**6))
    assert {"FrameTime", "Rows"} <= film <= {*TAGS, *TIMES, *MORE, *coded}
    assert not {t for t in (*TAGS, *TIMES, *MORE) if t.startswith(("Patient", "Study", "Series", "Institution")) or "UID" in t}


# ---- messages

def failing(message: str) -> None:
    raise ValueError(message)


def test_an_unforeseen_error_is_told_without_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TRACEBACK, raising=False)
    with pytest.raises(ValueError) as caught:
        failing(f"/home/{WORD}/scan.nii")
    told = unforeseen(caught.value)
    assert "ValueError" in told and "test_canaries.py" in told and "failing" in told
    assert WORD not in told and str(Path(__file__).parent) not in told
    torn = RuntimeError(f'Caught\nTraceback\n  File "/home/{WORD}/lib/python3/site-packages/x/y.py", line 3, in read\n{WORD}')
    assert "  x/y.py:3 read" in unforeseen(torn) and WORD not in unforeseen(torn)
    monkeypatch.setenv(TRACEBACK, "1")
    assert WORD in unforeseen(caught.value)


def test_a_place_is_named_as_the_user_typed_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("")
    for error, told in ((f"{tmp_path}/out/{WORD}.nii", "a file in out: "), (f"{tmp_path}/out", "meristem: out: "),
                        (f"/elsewhere/{WORD}", "meristem: a file: ")):
        monkeypatch.setattr(sys, "argv", ["meristem", "pretrain", "--out=out", "--data", "taken"])
        monkeypatch.setattr(cli, "app", lambda error=error: Path(error).read_bytes())
        with pytest.raises(SystemExit, match="2"):
            cli.main()
        said = capsys.readouterr().err
        assert WORD not in said and told.replace("out", "--out=out") in said
