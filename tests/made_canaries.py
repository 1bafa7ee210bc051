"""Data sets of each modality whose files say, wherever their formats leave room, whose they are: in invented words."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import av
import laspy
import nibabel as nib
import numpy as np
from made_dicom import write_series
from made_skeletons import kinect, mocap, moves, openpose
from PIL import Image, PngImagePlugin
from plyfile import PlyData, PlyElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, UltrasoundMultiFrameImageStorage

EACH = 8  # samples of a class
BURNT = "Zebraquagga"


@dataclass
class Canaries:
    """place -> the word planted there. files: of them, those in names of files and of folders below the data set."""

    words: dict[str, str] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)

    def word(self, place: str) -> str:
        """A word of 15 letters that is nowhere else; the same for the same place."""
        return self.words.setdefault(place, f"{BURNT}{len(self.words):03d}x")

    def name(self, place: str) -> str:
        """A word in the name of a file or folder."""
        self.files.add(place)
        return self.word(place)

    def date(self, place: str) -> str:
        return self.words.setdefault(place, f"18{len(self.words) % 100:02d}0923")

    def uid(self, place: str) -> str:
        return self.words.setdefault(place, f"1.2.826.0.1.7946501.{len(self.words)}.19")


def identify(ds: Dataset, c: Canaries, kind: str, number: int = 0) -> None:
    """Fill whatever elements of a DICOM file can say whose it is. number: of the file, among those of its kind."""
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = c.uid(f"{kind} SOPInstanceUID {number}")
    ds.file_meta.SourceApplicationEntityTitle = c.word(f"{kind} SourceApplicationEntityTitle")
    for uid in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "DeviceUID"):
        setattr(ds, uid, c.uid(f"{kind} {uid}"))
    for date in ("PatientBirthDate", "StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate"):
        setattr(ds, date, c.date(f"{kind} {date}"))
    for text in ("PatientName", "PatientID", "OtherPatientIDs", "ReferringPhysicianName", "OperatorsName", "InstitutionName",
                 "InstitutionAddress", "StationName", "StudyID", "AccessionNumber", "StudyDescription", "SeriesDescription",
                 "PatientComments", "ImageComments", "DeviceSerialNumber", "ProtocolName", "PatientAddress"):
        setattr(ds, text, c.word(f"{kind} {text}"))
    block = ds.private_block(0x0011, c.word(f"{kind} private creator"), create=True)
    block.add_new(0x01, "LO", c.word(f"{kind} private element"))
    block.add_new(0x02, "UN", c.word(f"{kind} private bytes").encode())
    inside = Dataset()
    inside.ReferencedSOPInstanceUID, inside.PersonName = c.uid(f"{kind} in a sequence"), c.word(f"{kind} name in a sequence")
    ds.RequestAttributesSequence = [inside]


def dicom(path: Path, frames: np.ndarray, c: Canaries) -> None:
    """A picture (H, W), or a film (n, H, W) of ultrasound, of uint8."""
    film = frames.ndim == 3
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = UltrasoundMultiFrameImageStorage if film else \
        SecondaryCaptureImageStorage
    identify(ds, c, "cine" if film else "DICOM")
    ds.Modality, ds.SamplesPerPixel, ds.PhotometricInterpretation = "US", 1, "MONOCHROME2"
    ds.Rows, ds.Columns = frames.shape[-2:]
    ds.BitsAllocated = ds.BitsStored = 8
    ds.HighBit, ds.PixelRepresentation = 7, 0
    if film:
        ds.NumberOfFrames, ds.FrameTime = len(frames), 40.0
    ds.PixelData = frames.tobytes()
    ds["PixelData"].VR = "OB"
    ds.save_as(path, enforce_file_format=True)


def picture(path: Path, pixels: np.ndarray, c: Canaries) -> None:
    """pixels: (H, W) uint8, as the suffix says."""
    image, kind, exif = Image.fromarray(pixels), path.suffix[1:], Image.Exif()
    if kind == "dcm":
        dicom(path, pixels, c)
        return
    for tag, name in ((0x010e, "ImageDescription"), (0x013b, "Artist"), (0x8298, "Copyright"), (0x0131, "Software")):
        exif[tag] = c.word(f"{kind} EXIF {name}")
    if kind == "png":
        text = PngImagePlugin.PngInfo()
        text.add_text("Author", c.word("png text"))
        text.add_text("Comment", c.word("png compressed text"), zip=True)
        text.add_itxt("Description", c.word("png international text"), zip=True)
        image.save(path, pnginfo=text, exif=exif)
    elif kind == "jpg":
        image.save(path, exif=exif, comment=c.word("jpg comment").encode())
    else:
        image.save(path, exif=exif, compression="tiff_lzw")


def images(root: Path, c: Canaries) -> str:
    """A table of pictures in four formats, and what such tables hold; a file is cut, one is a copy, one is text."""
    rng = np.random.default_rng(0)
    head = ["path", "class", "subject", "site", "patient name", "date of birth", c.word("column of a table"), "age", "sex"]
    lines = []
    for i in range(2 * EACH):
        name = f"{c.name('folder of a picture')}/{c.name(f'picture {i}')}.{('png', 'jpg', 'tif', 'dcm')[i % 4]}"
        (root / name).parent.mkdir(exist_ok=True)
        picture(root / name, (rng.normal(90 + 60 * (i % 2), 25, (24, 32))).clip(0, 255).astype(np.uint8), c)
        lines.append([name, ("dark", "light")[i % 2], c.word(f"subject {i}"), c.word(f"site {i % 2}"), c.word(f"patient {i}"),
                      c.date("birth in a table"), c.word(f"value {i}"), 30 + i, "FM"[i % 2]])
    for i, (name, what) in enumerate(((lines[0][0], "cut"), (lines[5][0], "copy"))):
        file = root / str(name)
        again = file.with_name(f"{c.name(f'broken picture {i}')}{file.suffix}")
        again.write_bytes(file.read_bytes()[:400] if what == "cut" else file.read_bytes())
        lines.append([again.relative_to(root).as_posix(), *lines[0][1:]])
    text = root / f"{c.name('text called a picture')}.dcm"
    text.write_text(f"{c.word('text in a broken picture')}\n" * 40)
    lines += [[text.name, *lines[0][1:]], [f"{c.name('lost picture')}.png", *lines[0][1:]]]
    table = root / f"{c.name('table')}.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([head, *lines])
    return table.name


def volumes(root: Path, c: Canaries) -> str:
    """An MSD set whose NIfTI texts are full; a broken file, a copy, one of NaN, and a label on another grid."""
    rng, listed = np.random.default_rng(0), []
    for part in ("imagesTr", "labelsTr"):
        (root / part).mkdir()
    for i in range(10):
        mask = np.zeros((16, 18, 14), np.uint8)
        mask[4 + i % 3:11, 5:12, 4:10] = 1
        pixels = (100 * mask + rng.normal(0, 9, mask.shape)).astype(np.int16)
        name = f"{c.name(f'volume {i}')}.nii.gz"
        for part, array in (("imagesTr", np.full(mask.shape, np.nan, np.float32) if i == 7 else pixels),
                            ("labelsTr", mask[:9] if i == 8 else mask)):
            image = nib.Nifti1Image(array, np.eye(4))
            for text in ("descrip", "aux_file", "intent_name", "db_name"):
                image.header[text] = c.word(f"NIfTI {text}")
            image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", c.word("NIfTI extension").encode()))
            nib.save(image, root / part / name)
        listed.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    files = [root / entry["image"] for entry in listed]
    files[9].write_bytes(files[9].read_bytes()[:300])
    files[6].write_bytes(files[5].read_bytes())
    about = {"name": c.word("name of a data set"), "description": c.word("description of a data set"),
             "reference": c.word("reference of a data set"), "modality": {"0": "MRI"},
             "labels": {"0": "background", "1": "organ"}, "training": listed, "test": []}
    (root / "dataset.json").write_text(json.dumps(about))
    return ""


def series(root: Path, c: Canaries) -> str:
    """Slices of MR in a folder for each patient, in a folder for each class; one patient's lack a slice."""
    rng = np.random.default_rng(0)
    for i in range(2 * EACH):
        pixels = (rng.normal(100 + 60 * (i % 2), 20, (16, 18, 14))).clip(0, 999).astype(np.int16)

        def named(ds: Dataset, k: int, i: int = i) -> None:
            identify(ds, c, f"series {i}", k)

        folder = root / ("dark", "light")[i % 2] / c.name(f"patient {i}")
        write_series(folder, pixels, np.diag([1.0, 1, 2, 1]), "MR", names=c.name("slice") + "_{:03d}.dcm", each=named,
                     order=[k for k in range(14) if (i, k) != (5, 6)])
    return ""


def films(root: Path, c: Canaries) -> str:
    """Films in containers, in folders of frames and as cine, in a folder for each class."""
    rng = np.random.default_rng(0)
    for i in range(2 * EACH):
        folder = root / ("still", "moving")[i % 2]
        folder.mkdir(exist_ok=True)
        frames = (rng.normal(100, 30, (8, 24, 32)) + 40 * (i % 2)).clip(0, 255).astype(np.uint8)
        name = c.name(f"film {i}")
        if i // 2 % 3 == 0:
            dicom(folder / f"{name}.dcm", frames, c)
        elif i // 2 % 3 == 1:
            (folder / name).mkdir()
            for t, frame in enumerate(frames):
                picture(folder / name / f"{c.name('frame')}_{t}.png", frame, c)
        else:
            path = folder / f"{name}.{('mp4', 'mkv')[i // 6 % 2]}"
            with av.open(str(path), "w") as out:
                for key in ("title", "artist", "comment"):
                    out.metadata[key] = c.word(f"{path.suffix[1:]} {key}")
                stream = out.add_stream("mpeg4", rate=25)
                stream.height, stream.width, stream.pix_fmt = 24, 32, "yuv420p"
                for frame in frames:
                    out.mux(stream.encode(av.VideoFrame.from_ndarray(np.repeat(frame[..., None], 3, -1), "rgb24")))
                out.mux(stream.encode())
    cut = next((root / "still").glob("*.mkv"), None) or next((root / "still").glob("*.mp4"))
    (root / "still" / f"{c.name('broken film')}{cut.suffix}").write_bytes(cut.read_bytes()[:500])
    return ""


def clouds(root: Path, c: Canaries) -> str:
    """PLY, OFF, PCD, LAS and text, in a folder for each class; broken ones whose bad line names somebody."""
    rng = np.random.default_rng(0)
    for i in range(2 * EACH):
        folder, kind = root / ("ball", "rod")[i % 2], ("ply", "off", "pcd", "las", "xyz")[i // 2 % 5]
        folder.mkdir(exist_ok=True)
        xyz = (rng.standard_normal((80, 3)) * ((1, 1, 1), (3, 0.3, 0.3))[i % 2]).astype(np.float32)
        path = folder / f"{c.name(f'cloud {i}')}.{kind}"
        if kind == "ply":
            vertex = np.array([(*p, 1) for p in xyz.tolist()], [(n, "f4") for n in ("x", "y", "z", c.word("PLY property"))])
            PlyData([PlyElement.describe(vertex, "vertex", comments=[c.word("PLY element comment")])],
                    comments=[c.word("PLY comment")], obj_info=[c.word("PLY obj_info")]).write(str(path))
        elif kind == "off":
            path.write_text(f"OFF # {c.word('OFF comment')}\n{len(xyz)} 0 0\n" + "\n".join(" ".join(map(str, p)) for p in xyz))
        elif kind == "pcd":
            path.write_text(f"# {c.word('PCD comment')}\nVERSION 0.7\nFIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\n"
                            f"WIDTH {len(xyz)}\nHEIGHT 1\nVIEWPOINT 0 0 0 1 0 0 0\nPOINTS {len(xyz)}\nDATA ascii\n"
                            + "\n".join(" ".join(map(str, p)) for p in xyz))
        elif kind == "las":
            las = laspy.create(point_format=0)
            las.header.system_identifier, las.header.generating_software = c.word("LAS system"), c.word("LAS software")
            las.vlrs.append(laspy.VLR(c.word("LAS record user"), 7, c.word("LAS record"), c.word("LAS record data").encode()))
            las.header.scales = [1e-4] * 3
            las.x, las.y, las.z = xyz.T.astype(np.float64)
            las.write(path)
        else:
            np.savetxt(path, xyz, header=c.word("header of a text"))
    bad = c.word("bad line of a PLY")
    (root / "ball" / f"{c.name('broken PLY')}.ply").write_text(f"ply\nformat ascii 1.0\n{bad} {bad}\nend_header\n1 2 3\n")
    (root / "rod" / f"{c.name('broken text')}.xyz").write_text("1 2 3\n" * 20 + f"1 {c.word('bad line of a text')} 3\n")
    (root / "rod" / f"{c.name('broken OFF')}.off").write_text(f"OFF\n{c.word('bad line of an OFF')} 0 0\n")
    return ""


def graphs(root: Path, c: Canaries) -> str:
    """Edge lists with tables of nodes, GraphML and node-link JSON, in a folder for each class: people who know each other."""
    rng = np.random.default_rng(0)
    for i in range(2 * EACH):
        folder, kind = root / ("ring", "star")[i % 2], ("csv", "graphml", "json")[i // 2 % 3]
        folder.mkdir(exist_ok=True)
        people = [c.word(f"person {k}") for k in range(5 + i // 2)]
        around = [(a, people[(k + 1) % len(people)]) for k, a in enumerate(people)]
        pairs = [(a, people[0]) for a in people[1:]] if i % 2 else around
        path, age = folder / f"{c.name(f'graph {i}')}.{kind}", c.word("column of nodes")
        if kind == "csv":
            path.write_text("source,target\n" + "\n".join(",".join(p) for p in pairs) + "\n")
            path.with_name(f"{path.stem}_nodes.csv").write_text(
                f"name,{age},tag\n" + "\n".join(f"{p},{rng.integers(90)},{c.word('tag of a node')}" for p in people) + "\n")
        elif kind == "graphml":
            nodes = "".join(f'<node id="{p}"><data key="a">{rng.integers(90)}</data></node>' for p in people)
            edges = "".join(f'<edge source="{a}" target="{b}"/>' for a, b in pairs)
            path.write_text(f'<?xml version="1.0"?><!-- {c.word("GraphML comment")} -->'
                            '<graphml xmlns="http://graphml.graphdrawing.org/xmlns">'
                            f'<key id="a" for="node" attr.name="{age}" attr.type="double"/>'
                            f'<graph id="{c.word("id of a graph")}" edgedefault="undirected">{nodes}{edges}</graph></graphml>')
        else:
            path.write_text(json.dumps({"graph": {"name": c.word("name of a graph")}, "links":
                                        [{"source": a, "target": b} for a, b in pairs],
                                        "nodes": [{"id": p, age: int(rng.integers(90))} for p in people]}))
    lost = root / "ring" / f"{c.name('broken graph')}.csv"
    lost.write_text(f"source,target\n{c.word('person of no table')},{c.word('person 0')}\n")
    lost.with_name(f"{lost.stem}_nodes.csv").write_text(f"name,{c.word('column of nodes')}\n{c.word('person 0')},7\n")
    words = root / "star" / f"{c.name('graph of words')}.csv"
    words.write_text(f"source,target\n{c.word('person 0')},{c.word('person 1')}\n")
    words.with_name(f"{words.stem}_nodes.csv").write_text(
        f"name,{c.word('bad column')}\n{c.word('person 0')},{c.word('bad cell')}\n{c.word('person 1')},7\n")
    (root / "star" / f"{c.name('broken GraphML')}.graphml").write_text(f"<graphml><{c.word('bad element')}></graphml>")
    return ""


def skeletons(root: Path, c: Canaries) -> str:
    """Kinect's files, OpenPose's and mocap, in a folder for each class."""
    for i in range(2 * EACH):
        folder, name = root / ("walk", "wave")[i % 2], c.name(f"sequence {i}")
        folder.mkdir(exist_ok=True)
        mocap(folder / f"{name}.txt", 60, seed=i)
    (root / "walk" / f"{c.name('broken sequence')}.txt").write_text(
        ",".join(["0.1"] * 117) + "\n" + ",".join([c.word("bad cell of a sequence"), *["0.1"] * 116]) + "\n")
    return ""


def bodies(root: Path, c: Canaries) -> str:
    """Kinect's recordings, whose names tell performer and action and whose bodies have numbers; kept apart from mocap, whose
    joints are others."""
    for i in range(2 * EACH):
        number = c.date("number of a body")
        kinect(root / f"S001C001P{i + 1:03d}R001A{i % 2 + 1:03d}{c.name(f'recording {i}')}.skeleton",
               [{number: frame} for frame in moves(40, 25, 3, seed=i)])
    return ""


def poses(root: Path, c: Canaries) -> str:
    """OpenPose's recordings, whose JSON may hold anything."""
    for i in range(2 * EACH):
        path = openpose(root / f"{c.name(f'pose {i}')}.json", moves(40, 18, 2, seed=i)[:, None] + 0.5, ("run", "sit")[i % 2])
        path.write_text(json.dumps({"patient": c.word("key of a JSON"), **json.loads(path.read_text())}))
    return ""


@dataclass(frozen=True)
class Planted:
    """write: fills a folder and returns what in it --data names. of: the modality. task, over: what is learnt, and how. broken:
    whether some files cannot be used.
    """

    write: Callable[[Path, Canaries], str]
    of: str
    task: str = "classification"
    over: tuple[str, ...] = ()
    broken: bool = True


PLANTED = {
    "image": Planted(images, "image"),
    "volume": Planted(volumes, "volume", "segmentation", ("task.segmentation.decoder=linear",)),
    "series": Planted(series, "volume"),
    "video": Planted(films, "video", over=("views.x={clips: 1, crops: 1}",)),
    "points": Planted(clouds, "points"),
    "graph": Planted(graphs, "graph"),
    "skeleton": Planted(skeletons, "skeleton"),
    "kinect": Planted(bodies, "skeleton", broken=False),
    "openpose": Planted(poses, "skeleton", broken=False),
}
