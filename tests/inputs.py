"""Small valid files of every kind that Meristem loads, and how it loads them: what `fuzz.py` breaks."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import made_files
import nibabel as nib
import numpy as np
import tifffile
import torch
import yaml
from made_detections import study
from made_skeletons import kinect, mocap, moves, openpose
from PIL import Image
from pydicom.uid import ExplicitVRLittleEndian, RLELossless
from street import line, write_frame
from test_annotated import coco, picture, voc
from test_graph_files import connectome, planetoid, tudataset
from test_point_detection import make_room
from test_points_files import classes, lists, pcd
from test_points_files import ply as write_ply
from test_video_readers import GREY, cine, film

from meristem.modalities.base import Draw, modality_class
from meristem.platform import recipe as recipes
from meristem.platform.data.check import check
from meristem.platform.data.guess import guess_modality
from meristem.platform.data.source import open_data
from meristem.platform.evaluation.results import Results
from meristem.platform.report import difference
from meristem.platform.training import checkpoint

CANARY = "ferrars"  # is in the names of all files that may have any: no message may repeat it
TINY = ["encoder.transformer.width=16", "encoder.transformer.depth=1", "encoder.transformer.heads=2",
        "modality.volume.patch=[4,4,4]", "views.x.size=[8,8,8]",
        "objectives.pixels.masked.predictor.decoder={depth: 1, width: 16, heads: 2}"]
Refusals = list[tuple[str, str, str]]  # reason, what, remedy


@dataclass(frozen=True)
class Target:
    """write: files, into an empty folder. load: reads them as Meristem does, with a folder for what it may write; returns what
    it refused. broken: pattern of the files to break.
    """

    write: Callable[[Path], Any]
    load: Callable[[Path, Path, random.Random], Refusals]
    broken: str = "**/*"


def loads(modality: str, at: str = "", options: Mapping[str, Any] = {}) -> Callable[[Path, Path, random.Random], Refusals]:
    """A data set: looked at by `data check`, or opened as for training. at: the place that is named, in the folder."""
    def load(folder: Path, scratch: Path, rng: random.Random) -> Refusals:
        kind = modality_class(modality)
        made, place = kind(kind.Options.model_validate(options)), folder / at
        if rng.random() < 0.3:
            guess_modality(place)
        if rng.random() < 0.5:
            found = check(place, made)
            refused = found.of("refused")
            return [(f.reason, " ".join([f.what, *(c.what for c in f.cases)]), f.remedy) for f in refused]
        data = open_data(place, made, cache=scratch / "cache", quiet=True)
        rows = data.rows()
        for row in rows[:2]:
            header = data.cache.header(row.index)
            size = tuple(min(n, 8) for n in header.shape[1:])
            data.cache.windows(row.index, [Draw((0,) * len(size), size, size)])
            data.cache.tables(row.index)
        return [(p.reason, p.message, p.remedy) for p in data.cache.quarantine]
    return load


# ---- volumes and pictures


def nifti(folder: Path, suffix: str = ".nii.gz") -> None:
    rng = np.random.default_rng(0)
    for part in ("images", "labels"):
        (folder / part).mkdir()
    for i in range(3):
        array, affine = (100 + 20 * rng.standard_normal((7, 8, 6))).astype(np.int16), np.diag([1.0, 0.8, 1.5, 1.0])
        image = nib.Nifti1Image(array, affine)
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"made of noise"))
        nib.save(image, folder / "images" / f"{CANARY}_{i}{suffix}")
        nib.save(nib.Nifti1Image((array > 100).astype(np.uint8), affine), folder / "labels" / f"{CANARY}_{i}{suffix}")


def nnunet(folder: Path) -> None:
    nifti(folder, ".nii")
    (folder / "images").rename(folder / "imagesTr")
    (folder / "labels").rename(folder / "labelsTr")
    for f in (folder / "imagesTr").iterdir():
        f.rename(f.with_name(f"{f.name[:-4]}_0000.nii"))
    (folder / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT"}, "labels": {"background": 0, "organ": 1},
                                                     "numTraining": 3, "file_ending": ".nii"}))


def msd(folder: Path) -> None:
    nifti(folder, ".nii")
    names = [f"./images/{CANARY}_{i}.nii" for i in range(3)]
    (folder / "dataset.json").write_text(json.dumps(
        {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "organ"}, "test": names[2:],
         "training": [{"image": n, "label": n.replace("images", "labels")} for n in names[:2]]}))


def monai_boxes(folder: Path) -> None:
    nifti(folder, ".nii")
    (folder / "boxes.json").write_text(json.dumps({"labels": {"0": "nodule"}, "training": [
        {"image": f"images/{CANARY}_{i}.nii", "box": [[-3.0, -3.0, 3.0, 2.0, 2.0, 2.0]], "label": [0]} for i in range(3)]}))


def bids(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(3):
        (folder / f"sub-{i}" / "anat").mkdir(parents=True)
        array = rng.integers(0, 255, (6, 5, 7)).astype(np.uint8)
        nib.save(nib.Nifti1Image(array, np.eye(4)), folder / f"sub-{i}" / "anat" / f"sub-{i}_T1w.nii")
    lines = ["participant_id\tage\tsex", *(f"sub-{i}\t{30 + i}\tF" for i in range(3))]
    (folder / "participants.tsv").write_text("\n".join(lines) + "\n")


def grey(seed: int, shape: tuple[int, ...] = (14, 17)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, shape, np.uint8)


def pictures(folder: Path) -> None:
    """PNG, JPEG, BMP, of grey, colour, palette and 16 bits, and masks."""
    for part in ("images", "masks"):
        (folder / part).mkdir()
    made = {"a.png": Image.fromarray(grey(0)), "b.png": Image.fromarray(grey(1, (14, 17, 3))).convert("P"),
            "c.jpg": Image.fromarray(grey(2, (14, 17, 3))), "d.bmp": Image.fromarray(grey(3)),
            "e.png": Image.fromarray(grey(4).astype(np.uint16) * 200),
            "h.jpg": Image.fromarray(grey(7)), "i.png": Image.fromarray(grey(8, (14, 17, 4)))}
    for name, image in made.items():
        image.save(folder / "images" / f"{CANARY}-{name}")
        Image.fromarray((grey(6) > 100).astype(np.uint8)).save(folder / "masks" / f"{CANARY}-{name.split('.')[0]}.png")
    from torchvision.io import encode_png

    raw = bytes(encode_png(torch.from_numpy(grey(9, (3, 14, 17)))).tolist())
    (folder / "images" / f"{CANARY}-k.png").write_bytes(_deep(raw))
    Image.fromarray((grey(6) > 100).astype(np.uint8)).save(folder / "masks" / f"{CANARY}-k.png")


def _deep(png: bytes) -> bytes:
    """A PNG of 16 bits and three channels, which Pillow cannot write."""
    import struct
    import zlib

    rows = np.random.default_rng(9).integers(0, 65535, (14, 17 * 3)).astype(">u2")
    plain = b"".join(b"\0" + row.tobytes() for row in rows)
    out = png[:8]
    head = struct.pack(">IIBBBBB", 17, 14, 16, 2, 0, 0, 0)
    for kind, body in ((b"IHDR", head), (b"IDAT", zlib.compress(plain)), (b"IEND", b"")):
        out += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return out


def tiffs(folder: Path) -> None:
    tifffile.imwrite(folder / f"{CANARY}-a.tif", grey(0), compression="zlib")
    tifffile.imwrite(folder / f"{CANARY}-b.tif", grey(1, (14, 17, 3)), photometric="rgb")
    tifffile.imwrite(folder / f"{CANARY}-c.tif", grey(2).astype(np.uint16), ome=True,
                     metadata={"axes": "YX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5})
    tifffile.imwrite(folder / f"{CANARY}-d.tif", grey(3), imagej=True, resolution=(2, 2), metadata={"unit": "um"})
    tifffile.imwrite(folder / f"{CANARY}-e.tif", grey(4).astype(np.float32), tile=(16, 16), bigtiff=True)
    Image.fromarray(grey(5)).save(folder / f"{CANARY}-f.tif", compression="tiff_lzw")
    Image.fromarray(grey(6, (16, 16, 3))).save(folder / f"{CANARY}-g.tif", compression="jpeg")


def dicom(folder: Path) -> None:
    frame = GREY[:1]
    cine(folder / f"{CANARY}-a.dcm", frame, RescaleSlope=2, RescaleIntercept=-5, PixelSpacing=[0.5, 0.5], stored=12)
    cine(folder / f"{CANARY}-b.dcm", frame.astype(np.int16) - 2000, RLELossless, stored=16)
    cine(folder / f"{CANARY}-c.dcm", grey(0, (1, 14, 17, 3)))


def cines(folder: Path) -> None:
    cine(folder / f"{CANARY}-a.dcm", GREY, stored=12, FrameTime=40.0, WindowCenter=2000, WindowWidth=900)
    cine(folder / f"{CANARY}-b.dcm", grey(0, (5, 14, 17, 3)), RLELossless, CineRate=25)
    cine(folder / f"{CANARY}-c.dcm", grey(1, (4, 14, 17)), ExplicitVRLittleEndian, FrameTimeVector=[0.0, 40.0, 30.0, 50.0])


def medmnist(folder: Path) -> None:
    sizes = {"train": 4, "val": 2, "test": 3}
    made = {f"{split}_images": grey(n, (n, 8, 8)) for split, n in sizes.items()}
    made |= {f"{split}_labels": np.arange(n)[:, None] % 2 for split, n in sizes.items()}
    np.savez_compressed(folder / f"{CANARY}.npz", **made)


def tables(folder: Path) -> None:
    """A CSV of pictures with subjects, splits, classes, masks and pairs."""
    (folder / "pictures").mkdir()
    rows = ["path,subject,split,class,mask,pair,age"]
    for i in range(4):
        Image.fromarray(grey(i)).save(folder / "pictures" / f"{CANARY}{i}.png")
        Image.fromarray((grey(i) > 99).astype(np.uint8)).save(folder / "pictures" / f"mask{i}.png")
        rows.append(f"pictures/{CANARY}{i}.png,s{i},{('train', 'val', 'test', '')[i]},c{i % 2},pictures/mask{i}.png,"
                    f"pictures/{CANARY}{(i + 1) % 4}.png,{20 + i}")
    (folder / "list.csv").write_text("\n".join(rows) + "\n")


def text_lists(folder: Path) -> None:
    for name, numbers in (("train", (0, 1, 2)), ("test", (3, 4))):
        for i in numbers:
            Image.fromarray(grey(i)).save(folder / f"{CANARY} {i}.png")
        (folder / f"{name}.txt").write_text("".join(f"{CANARY} {i}.png {i % 2}\n" for i in numbers))


def coco_set(folder: Path) -> None:
    for i, name in enumerate((f"{CANARY}a", f"{CANARY}b")):
        picture(folder / f"{name}.png", i)
    outline = {"bbox": [2.5, 4, 10, 3], "segmentation": [[2.5, 4, 12.5, 4, 12.5, 7]], "area": 30}
    runs = {"bbox": [0, 0, 4, 4], "iscrowd": 1, "segmentation": {"counts": [0, 100, 1100], "size": [30, 40]}}
    (folder / "instances_train.json").write_text(json.dumps(coco(
        {f"{CANARY}a": [{"category_id": 14, **outline}, {"category_id": 7, **runs}],
         f"{CANARY}b": [{"category_id": 7, "bbox": [1, 2, 3, 4]}]})))


def voc_set(folder: Path) -> None:
    for i in range(3):
        picture(folder / "JPEGImages" / f"{CANARY}{i}.png", i)
        voc(folder / "Annotations" / f"{CANARY}{i}.xml", [("red", 1, 1, 40, 30), ("white", 5, 7, 20, 9, 1)])
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    (folder / "ImageSets" / "Main" / "train.txt").write_text(f"{CANARY}0\n{CANARY}1\n")


# ---- films


def container(folder: Path, suffix: str = ".mp4", codec: str = "libx264", **options: Any) -> None:
    for i in range(2):
        film(folder / f"{CANARY}-{i}{suffix}", codec, frames=6 + i, **options)


def frames(folder: Path) -> None:
    for i in range(2):
        (folder / f"{CANARY}{i}").mkdir()
        for t in range(8):
            Image.fromarray(grey(t + 10 * i, (14, 17, 3))).save(folder / f"{CANARY}{i}" / f"{t:03d}.{('png', 'jpg')[i]}")


def activitynet(folder: Path) -> None:
    container(folder, ".mp4")
    (folder / "annotations.json").write_text(json.dumps({"version": "1.3", "database": {f"{CANARY}-{i}": {
        "subset": "training", "duration": 0.24, "annotations": [{"label": "run", "segment": [0.04, 0.2]}]} for i in range(2)}}))


# ---- clouds

CLOUD = np.random.default_rng(0).standard_normal((60, 9))
N = 40  # of the tables that the makers of test_points_files take


def columns() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    normal = rng.standard_normal((N, 3))
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    made = {c: rng.standard_normal(N) for c in "xyz"} | dict(zip(("nx", "ny", "nz"), normal.T, strict=True))
    made |= {c: rng.integers(0, 255, N).astype(float) for c in ("red", "green", "blue", "intensity")}
    return made | {"time": rng.uniform(0, 1, N), "label": rng.integers(0, 3, N)}


def plys(folder: Path) -> None:
    import trimesh

    for i, (text, order) in enumerate(((True, "<"), (False, "<"), (False, ">"))):
        write_ply(folder / f"{CANARY}-{i}.ply", columns(), text, order)
    (folder / f"{CANARY}-mesh.ply").write_bytes(trimesh.creation.box().export(file_type="ply"))


def meshes(folder: Path) -> None:
    import trimesh

    for i, kind in enumerate(("off", "obj", "stl", "stl_ascii")):
        made = trimesh.creation.icosphere(subdivisions=1, radius=1 + i).export(file_type=kind)
        file = folder / f"{CANARY}{i}.{kind.split('_')[0]}"
        file.write_bytes(made if isinstance(made, bytes) else made.encode())


def pcds(folder: Path) -> None:
    for how in ("ascii", "binary", "binary_compressed"):
        (folder / f"{CANARY}-{how}.pcd").write_bytes(pcd(columns(), how))


def las(folder: Path) -> None:
    import laspy

    for suffix in ("las", "laz"):
        header = laspy.LasHeader(point_format=3, version="1.2")
        header.scales = np.full(3, 0.001)
        made = laspy.LasData(header)
        made.x, made.y, made.z = CLOUD.T[:3]
        made.classification = (np.arange(len(CLOUD)) % 3).astype(np.uint8)
        made.write(folder / f"{CANARY}.{suffix}")


def arrays(folder: Path) -> None:
    np.save(folder / f"{CANARY}-a.npy", CLOUD[:, :3].astype(np.float32))
    np.savez_compressed(folder / f"{CANARY}-b.npz", points=CLOUD[:, :3], colours=np.abs(CLOUD[:, 3:6]) / 9,
                        part=np.arange(60) % 3)
    np.savez(folder / f"{CANARY}-c.npz", xyz=CLOUD[:, :3].astype(np.float16))
    np.savetxt(folder / f"{CANARY}-d.txt", CLOUD[:, :3])
    rows = "\n".join(",".join(map(str, p)) for p in np.abs(CLOUD[:, :4]))
    (folder / f"{CANARY}-e.csv").write_text(f"x,y,z,intensity\n{rows}")
    (folder / f"{CANARY}-f.pts").write_text("60\n" + "\n".join(" ".join(map(str, p)) for p in CLOUD[:, :3]))


def scans(folder: Path) -> None:
    """KITTI's and nuScenes' binaries, and SemanticKITTI's labels."""
    for part in ("velodyne", "labels"):
        (folder / part).mkdir()
    for i in range(2):
        np.abs(CLOUD[i:, :4]).astype("<f4").tofile(folder / "velodyne" / f"{CANARY}{i}.bin")
        (np.arange(60 - i) % 4).astype("<u4").tofile(folder / "labels" / f"{CANARY}{i}.label")
    np.abs(CLOUD[:, :5]).astype("<f4").tofile(folder / "velodyne" / f"{CANARY}.pcd.bin")


def hdf5(folder: Path) -> None:
    lists(folder, np.random.default_rng(0))


def kitti(folder: Path) -> None:
    label = line("Car", (1.5, 1.6, 3.9, 1.0, 1.7, 12.0, 0.3))
    for i in range(2):
        write_frame(folder / "training", f"00000{i}", np.abs(CLOUD[i:, :4]), [label])


# ---- graphs


def tu(folder: Path) -> None:
    tudataset(folder, A="1, 2\n2, 1\n4, 3\n3, 4\n3, 5\n5, 3\n", graph_indicator="1\n1\n2\n2\n2\n", graph_labels="-1\n1\n",
              node_labels="4\n0\n0\n4\n4\n", node_attributes="1, 2\n3, 4\n5, 6\n7, 8\n9, 10\n",
              edge_labels="3\n3\n3\n3\n8\n8\n", edge_attributes="0.5\n0.5\n1\n1\n2\n2\n")


def collection(folder: Path) -> None:
    (folder / f"{CANARY}.txt").write_text("2\n3 0\n0 1 1\n1 2 0 2\n0 1 1\n2 1\n1 1 1\n0 1 0\n")
    (folder / "10fold_idx").mkdir()
    for i in (1, 2):
        (folder / "10fold_idx" / f"test_idx-{i}.txt").write_text(f"{i - 1}\n")


def citations(folder: Path) -> None:
    planetoid(folder)
    (folder / "truth.npz").unlink()


def molecules(folder: Path) -> None:
    (folder / f"{CANARY}.csv").write_text(
        "smiles,label\nCCO,0\nc1ccccc1O,1\nCC(=O)Oc1ccccc1C(=O)O,1\nN[C@@H](C)C(=O)O,0\n[Na+].[Cl-],0\n")


def networks(folder: Path) -> None:
    import networkx

    made = networks_graph = networkx.path_graph(5)
    for i in made:
        made.nodes[i].update(size=i / 2, tag="ab"[i % 2])
    networkx.set_edge_attributes(networks_graph, 1.5, "weight")
    networkx.write_graphml(made, folder / f"{CANARY}.graphml", named_key_ids=True)
    (folder / f"{CANARY}.json").write_text(json.dumps(networkx.node_link_data(made, edges="links")))


def edges(folder: Path) -> None:
    links = [f"n{i},n{(i * 3 + 1) % 8},{i}.5,k{i % 2}" for i in range(8)]
    nodes = [f"n{i},{i % 2},{('train', 'test')[i % 2]},{i}" for i in range(8)]
    (folder / "edges.csv").write_text("\n".join(["source,target,weight,type", *links]) + "\n")
    (folder / "nodes.csv").write_text("\n".join(["id,class,split,size", *nodes]) + "\n")


def connectomes(folder: Path) -> None:
    np.save(folder / f"{CANARY}-1.npy", connectome(6))
    np.savetxt(folder / f"{CANARY}-2.csv", connectome(6, 1), delimiter=",")


# ---- skeletons


def ntu(folder: Path) -> None:
    for i in range(2):
        kinect(folder / f"S001C002P00{i + 1}R002A013.skeleton", [{"7": p} for p in moves(5, 25, 3, i)])


def kinetics(folder: Path) -> None:
    for i in range(2):
        openpose(folder / f"{CANARY}{i}.json", moves(4, 36, 2, i).reshape(4, 2, 18, 2))


def cmu(folder: Path) -> None:
    mocap(folder / f"{CANARY}_1.txt", 12)
    mocap(folder / f"{CANARY}_2.txt.xz", 12, 1)


# ---- what is no data


def recipe(folder: Path) -> None:
    plain = recipes.override(recipes.read("volume/mae"), TINY)
    (folder / f"{CANARY}.yaml").write_text(yaml.safe_dump({"extends": "volume/base", **plain}))
    (folder / "overrides.txt").write_text("\n".join([*TINY, "train.steps=3", "masking.x={random: {ratio: 0.5}}"]))


def load_recipe(folder: Path, scratch: Path, rng: random.Random) -> Refusals:
    given = folder / "overrides.txt"  # words of a command line, kept here to be broken too
    over = given.read_text(errors="replace").splitlines() if given.is_file() else []
    recipes.load(folder / f"{CANARY}.yaml", over[:20])
    return []


_run: dict[str, bytes] = {}


def run(folder: Path) -> None:
    """A checkpoint of a pretraining as `pretrain` writes it."""
    from test_checkpoint import written

    (volumes := folder / "volumes").mkdir()
    made_files.volumes(volumes)
    written(volumes, folder / "run", settings=TINY)
    shutil.rmtree(volumes)
    shutil.rmtree(folder / "cache")


def load_run(folder: Path, scratch: Path, rng: random.Random) -> Refusals:
    from meristem.platform.assembly import Assembly

    place = folder / "run"
    checkpoint.identity(place)
    checkpoint.read_state(place)
    made = recipes.load("volume/mae", TINY)
    checkpoint.load_encoder(place, Assembly(made).encoder, made.modality, made.encoder.sees)
    return []


def results(folder: Path) -> None:
    study("coco", cases=4, seeds=1, budgets=(5,), most=2, alarms=1).save(folder / "results.json")


def load_results(folder: Path, scratch: Path, rng: random.Random) -> Refusals:
    found = Results.load(folder / "results.json")
    difference.differ(*difference.read(folder), found, replicates=20)
    return []


POINTS = loads("points", options={"normalise": "centre", "sampled": 256})
IMAGE = {"channels": 1, "max_pixels": 1 << 20}
TARGETS: dict[str, Target] = {
    "nifti": Target(nifti, loads("volume", options={"max_voxels": 1 << 24})),
    "nifti-plain": Target(partial(nifti, suffix=".nii"),
                          loads("volume", options={"max_voxels": 1 << 24, "spacing": [1, 1, 1]})),
    "nnunet": Target(nnunet, loads("volume"), "dataset.json"),
    "msd": Target(msd, loads("volume"), "dataset.json"),
    "monai": Target(monai_boxes, loads("volume"), "boxes.json"),
    "participants": Target(bids, loads("volume"), "participants.tsv"),
    "pictures": Target(pictures, loads("image", options=IMAGE)),
    "tiff": Target(tiffs, loads("image", options=IMAGE)),
    "dicom": Target(dicom, loads("image", options=IMAGE)),
    "medmnist": Target(medmnist, loads("image", f"{CANARY}.npz", IMAGE)),
    "csv": Target(tables, loads("image", "list.csv", IMAGE), "list.csv"),
    "lists": Target(text_lists, loads("image", options=IMAGE), "*.txt"),
    "coco": Target(coco_set, loads("image", options={**IMAGE, "channels": 3}), "*.json"),
    "voc": Target(voc_set, loads("image", options={**IMAGE, "channels": 3}), "**/*.[xt]*"),
    "cine": Target(cines, loads("video", options={"max_pixels": 1 << 20})),
    "mp4": Target(container, loads("video", options={"max_pixels": 1 << 20})),
    "avi": Target(partial(container, suffix=".avi", codec="mpeg4"), loads("video", options={"max_pixels": 1 << 20})),
    "mkv": Target(partial(container, suffix=".mkv", codec="libx264"), loads("video", options={"max_pixels": 1 << 20})),
    "mpegts": Target(partial(container, suffix=".ts"), loads("video", options={"max_pixels": 1 << 20})),
    "frames": Target(frames, loads("video", options={"max_pixels": 1 << 20})),
    "activitynet": Target(activitynet, loads("video"), "*.json"),
    "ply": Target(plys, POINTS),
    "meshes": Target(meshes, POINTS),
    "pcd": Target(pcds, POINTS),
    "las": Target(las, POINTS),
    "arrays": Target(arrays, POINTS),
    "scans": Target(scans, POINTS),
    "hdf5": Target(hdf5, POINTS),
    "parts": Target(classes, POINTS),
    "kitti": Target(kitti, loads("points", options={"normalise": "none"})),
    "scenes": Target(make_room, loads("points", options={"normalise": "none"}), "*.json"),
    "tu": Target(tu, loads("graph")),
    "collection": Target(collection, loads("graph")),
    "planetoid": Target(citations, loads("graph")),
    "molecules": Target(molecules, loads("graph")),
    "networks": Target(networks, loads("graph")),
    "edges": Target(edges, loads("graph", "edges.csv")),
    "connectomes": Target(connectomes, loads("graph")),
    "ntu": Target(ntu, loads("skeleton")),
    "openpose": Target(kinetics, loads("skeleton")),
    "cmu": Target(cmu, loads("skeleton", options={"windows": {"frames": 8, "step": 4}})),
    "recipe": Target(recipe, load_recipe),
    "checkpoint": Target(run, load_run),
    "results": Target(results, load_results),
}
