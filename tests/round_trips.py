"""Labels sent through the pipeline and back: read, stored, predicted by windows, written on the source's grid.

    python tests/round_trips.py --count 1000 [--seed 0]

Each trip has an orientation of 48, turned or not, any spacing, leaning or not (gantry tilt), as NIfTI whose two forms agree or
not, as a DICOM series or as one multi-frame file; and is read in another orientation, cropped, or resampled more finely. The
label must come back the same in every voxel, by places in the world and not by our own indices; or be refused for a reason that
its file gives. Closes with one JSON line of counts; exit status 1 if one was lost.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import highdicom as hd
import nibabel as nib
import numpy as np
import pydicom
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from made_dicom import ALONG, write_enhanced, write_series

from meristem.errors import DataError
from meristem.modalities.stream import LatticeStream
from meristem.modalities.volume import Volume, VolumeOptions
from meristem.modalities.volume.volume import LEAN, lean
from meristem.platform.data.cache import Cache
from meristem.platform.data.manifest import Manifest
from meristem.tasks.base import TaskObjective, normalised
from meristem.tasks.segmentation import Segmentation, SegmentationObjective

ORIENTATIONS = ["".join(flip[i] for i in order) for order in itertools.permutations(range(3))
                for flip in itertools.product("RL", "AP", "SI")]
NAMES = {0: "background", 1: "liver", 2: "edema", 3: "zone"}
FORMS = ("sform", "qform", "both", "apart", "none")
APART = 3.0  # mm between an sform and a qform that disagree


@dataclass(frozen=True)
class Trip:
    """kind: of files. affine: voxel -> RAS millimetres. forms: which of NIfTI's the image has, and its label. wanted: the
    orientation it is read in. way: how else it is changed on the way in. order: of slices in files.
    """

    kind: str
    code: str
    affine: np.ndarray
    shape: tuple[int, int, int]
    forms: tuple[str, str]
    wanted: str
    way: str
    order: tuple[int, ...]
    seed: int


@st.composite
def trips(draw: Any) -> Trip:
    code, kind = draw(st.sampled_from(ORIENTATIONS)), draw(st.sampled_from(("NIfTI", "NIfTI", "series", "multi-frame")))
    way = draw(st.sampled_from(("as it is", "as it is", "cropped", "finer")))
    shape = tuple(draw(st.integers(4, 9 if way == "finer" else 16)) for _ in range(3))
    spacing = np.array([draw(st.floats(0.6, 1.5) if way == "finer" else st.floats(0.2, 6)) for _ in range(3)])
    angle = draw(st.sampled_from((0.0, 0.0, 0.02, 0.3, 0.7)))
    axis = np.array([draw(st.floats(-1, 1)) for _ in range(3)]) + np.array([0, 0, 1e-3])
    tilt = draw(st.sampled_from((0.0,) * 6 + (-12.0, 5.0, 20.0)))
    affine = np.eye(4)
    turn = np.array(nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(code), (1, 1, 1)))[:3, :3].T
    affine[:3, :3] = rotation(axis, angle) @ turn * spacing
    affine[:3, 2] += affine[:3, 1] / spacing[1] * spacing[2] * np.tan(np.radians(tilt))
    affine[:3, 3] = [draw(st.floats(-200, 200)) for _ in range(3)]
    forms = draw(st.sampled_from(FORMS)), draw(st.sampled_from(("sform", "both", "apart")))
    order = draw(st.permutations(range(shape[2])))
    wanted = draw(st.sampled_from(ORIENTATIONS))
    return Trip(kind, code, affine, shape, forms, wanted, way, tuple(order), draw(st.integers(0, 99)))


def rotation(axis: np.ndarray, angle: float) -> np.ndarray:
    """Rodrigues' formula."""
    x, y, z = axis / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def save(path: Path, array: np.ndarray, affine: np.ndarray, form: str) -> None:
    """A NIfTI with these forms; `apart`: its qform lies elsewhere."""
    image = nib.Nifti1Image(array, None)
    moved = affine.copy()
    moved[:3, 3] += APART
    image.set_sform(affine, 1 if form in ("sform", "both", "apart") else 0)
    image.set_qform(moved if form == "apart" else affine, 1 if form in ("qform", "both", "apart") else 0)
    path.parent.mkdir(parents=True)
    nib.save(image, path)


class Echo(SegmentationObjective):
    """Predicts what it is shown: every part of the way but the network."""

    def __init__(self, room: Volume) -> None:
        TaskObjective.__init__(self)
        self.settings, self.tokenizer = Segmentation(), room.tokenizer()
        self.decoder = Told(self.tokenizer)  # type: ignore[assignment]


class Told(torch.nn.Module):
    want: frozenset[str] = frozenset()

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, encoded: LatticeStream, stream: LatticeStream) -> torch.Tensor:
        """Logits by the nearness of an element to each label."""
        shown = self.tokenizer.fold(encoded.content, encoded.lattice)
        return -(shown - torch.arange(len(NAMES)).reshape(1, -1, 1, 1, 1)) ** 2


def assembly(room: Volume, echo: Echo) -> Any:
    return SimpleNamespace(
        tokenizer=echo.tokenizer, encoder=lambda stream, want: stream, recipe=SimpleNamespace(
            views={"x": SimpleNamespace(size=(16, 16, 16))}, modality=room, train=SimpleNamespace(precision="fp32"),
            encoder=SimpleNamespace(sees=frozenset())))


def go(trip: Trip, folder: Path) -> str:
    """`same`, `lost: …`, or `refused: reason` where the file gives that reason."""
    rng = np.random.default_rng(trip.seed)
    label = rng.integers(0, len(NAMES), trip.shape).astype(np.uint8)
    label[rng.random(trip.shape) < 0.5] = 0
    label[tuple(n // 2 for n in trip.shape)] = 1
    image = (1000 * (label > 0) + rng.integers(1, 90, trip.shape)).astype(np.int16)
    dicom = trip.kind != "NIfTI"
    if trip.kind == "series":
        write_series(folder / "images" / "a", image, trip.affine, order=trip.order)
    elif trip.kind == "multi-frame":
        write_enhanced(folder / "images" / "a.dcm", image, trip.affine, order=trip.order)
    else:
        save(folder / "images" / "a.nii.gz", image, trip.affine, trip.forms[0])
    save(folder / "labels" / "a.nii.gz", label, trip.affine, trip.forms[1])
    affine = nib.load(folder / ("labels" if dicom else "images") / "a.nii.gz").affine
    fine = 0.45 * float(np.linalg.norm(affine[:3, :3], axis=0).min())
    cropped, spacing = trip.way == "cropped", (fine,) * 3 if trip.way == "finer" else None
    room = Volume(VolumeOptions(orientation=trip.wanted, patch=(4, 4, 4), crop_foreground=cropped, crop_margin=0,
                                foreground=500 if cropped else None, spacing=spacing))
    allowed = {"leaning": trip.way != "finer" and lean(trip.affine, trip.shape) > 0.9 * LEAN,
               "no-affine": not dicom and trip.forms[0] == "none",
               "shape": not dicom and trip.forms[0] == "qform" and lean(trip.affine, trip.shape) > 0.001}
    try:
        manifest = Manifest.discover(folder, room)
        store = Cache.build(manifest, room, folder / "cache")
    except DataError as error:
        reasons = str(error).split("(")[-1].split(")")[0]
        return f"refused: {reasons}" if allowed.get(reasons) else f"lost: refused for {reasons}"
    row, = manifest.rows
    header, echo = store.header(0), Echo(room)
    shown = torch.from_numpy(store.field(0, "mask").astype(np.float32))[None]
    assert normalised(store.array(0), header, torch.device("cpu")).shape[1:] == shown.shape[1:]
    found = echo.predict(assembly(room, echo), shown, header).argmax(0).to(torch.uint8).numpy()
    (folder / "out").mkdir()
    back = nib.load(room.write(found, header, folder / "out" / "a.nii.gz"))
    if not np.array_equal(at(label, affine, back.affine, back.shape), np.asarray(back.dataobj)):
        return f"lost: {trip.way}"
    if not dicom:
        source = nib.load(folder / "images" / "a.nii.gz").header
        kept = all(np.array_equal(source[k], back.header[k]) for k in ("sform_code", "qform_code")) and all(
            np.allclose(a, b, atol=1e-4) for a, b in ((source.get_sform(), back.header.get_sform()),
                                                      (source.get_qform(), back.header.get_qform())))
        return "same" if kept else "lost: forms"
    archived = room.archive(found, header, row.paths, NAMES, "recipe", folder / "out" / "a.nii.gz")
    return "same" if archived and archive_agrees(archived, row.paths, label, affine) else "lost: DICOM SEG"


def at(label: np.ndarray, affine: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """The label at the places in the world of another grid's voxels; None where one is not the place of a voxel."""
    index = np.stack([*np.indices(shape), np.ones(shape)])
    there = np.einsum("ij,jxyz->ixyz", np.linalg.inv(affine) @ other, index)[:3]
    near = np.rint(there).astype(int)
    if np.abs(there - near).max() > 0.05 or near.min() < 0 or (near.reshape(3, -1).max(1) >= label.shape).any():
        return None
    return label[tuple(near)]


def archive_agrees(file: Path, paths: tuple[Path, ...], label: np.ndarray, affine: np.ndarray) -> bool:
    """Frame by frame, by the positions in each source's own header."""
    made = hd.seg.segread(file)
    sources = [pydicom.dcmread(p) for p in paths]
    if len(sources) == 1:
        ds = sources[0]
        frames = made.get_pixels_by_source_frame(ds.SOPInstanceUID, range(1, int(ds.NumberOfFrames) + 1), combine_segments=True,
                                                 assert_missing_frames_are_empty=True)
        shared = ds.SharedFunctionalGroupsSequence[0]
        cosines = shared.PlaneOrientationSequence[0].ImageOrientationPatient
        spacing = shared.PixelMeasuresSequence[0].PixelSpacing
        places = [g.PlanePositionSequence[0].ImagePositionPatient for g in ds.PerFrameFunctionalGroupsSequence]
    else:
        frames = made.get_pixels_by_source_instance([s.SOPInstanceUID for s in sources], combine_segments=True,
                                                    assert_missing_frames_are_empty=True)
        cosines, spacing = sources[0].ImageOrientationPatient, sources[0].PixelSpacing
        places = [s.ImagePositionPatient for s in sources]
    for frame, place in zip(frames, places, strict=True):
        grid = np.eye(4)
        along, down = np.array(cosines, float).reshape(2, 3)
        grid[:3, 0], grid[:3, 1], grid[:3, 3] = along * float(spacing[1]), down * float(spacing[0]), np.array(place, float)
        grid[:3, 2] = np.cross(along, down)  # of one slice, this is not used
        if not np.array_equal(at(label, affine, ALONG @ grid, (*frame.T.shape, 1))[..., 0], frame.T):
            return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a file for the counts too")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    ends: Counter[str] = Counter()
    codes, kinds = set(), Counter[str]()

    @seed(asked.seed)
    @settings(max_examples=asked.count, deadline=None, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))
    @given(trips())
    def each(trip: Trip) -> None:
        with tempfile.TemporaryDirectory() as folder:
            ended = go(trip, Path(folder))
        ends[ended] += 1
        kinds[trip.kind] += 1
        codes.add(trip.code)
        if ended.startswith("lost"):
            print(ended, trip, file=sys.stderr)

    each()
    lost = sum(n for end, n in ends.items() if end.startswith("lost"))
    reasons = {end.removeprefix("refused: "): n for end, n in sorted(ends.items()) if end.startswith("refused")}
    line = {"round_trips": ends.total(), "same": ends["same"], "refused": sum(reasons.values()), "lost": lost,
            "orientations": len(codes), "reasons": reasons, "kinds": dict(kinds)}
    print(json.dumps(line))
    if asked.out is not None:
        asked.out.write_text(json.dumps(line, indent=1) + "\n")
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
