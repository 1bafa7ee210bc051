"""A made street in KITTI's layout, and the real frames whose annotations lie in pickles."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

UPRIGHT = np.array([[0.0, -1.0, 0.0], [0.0, 0.0, -1.0], [1.0, 0.0, 0.0]])  # a camera that looks along the LiDAR's x
FRAME = "detection3d-frames/kitti"


class _Opaque:
    def __init__(self, *given: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


class _Plain(pickle.Unpickler):
    """Makes plain data, and numbers of numpy's; whatever else a file asks for becomes nothing."""

    def find_class(self, module: str, name: str) -> Any:
        known = {"scalar": lambda kind, raw: int.from_bytes(raw, "little", signed=True), "encode": lambda s, by: s.encode(by)}
        return known.get(name, _Opaque)


def unpickled(path: Path) -> dict[str, Any]:
    """The only sample of an annotation file."""
    with path.open("rb") as file:
        sample: dict[str, Any] = _Plain(file).load()["data_list"][0]
    return sample


def turned(tilt: float, yaw: float = 0.0) -> np.ndarray:
    """(3, 4) LiDAR to a camera that is tilted down and turned aside by so many radians, a little before and below it."""
    c, s = np.cos(yaw), np.sin(yaw)
    aside = np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])
    c, s = np.cos(tilt), np.sin(tilt)
    down = np.array([[1.0, 0.0, 0.0], [0.0, c, -s], [0.0, s, c]])
    return np.column_stack([down @ UPRIGHT @ aside, [0.0, -0.08, -0.27]])


def line(name: str, camera: Sequence[float], image: Sequence[float] = (0, 0, 50, 50), truncated: float = 0, occluded: int = 0
         ) -> str:
    """A label: height, width, length, x, y, z, turn in the camera."""
    return " ".join(map(str, [name, truncated, occluded, 0.0, *image, *camera]))


def write_frame(root: Path, name: str, points: np.ndarray, lines: Sequence[str] | None, sensor: np.ndarray | None = None,
                rectified: np.ndarray | None = None, image: np.ndarray | None = None) -> None:
    """points: (N, 4). lines: of the label, None for none. sensor: (3, 4) LiDAR to camera, rectified: (3, 3), image: (3, 4)."""
    for folder in ("velodyne", "calib", *(("label_2",) if lines is not None else ())):
        (root / folder).mkdir(parents=True, exist_ok=True)
    points.astype("<f4").tofile(root / "velodyne" / f"{name}.bin")
    image = np.array([[700.0, 0, 600, 45], [0, 700, 170, 0.2], [0, 0, 1, 0]]) if image is None else image
    matrices = {"P2": image, "R0_rect": np.eye(3) if rectified is None else rectified,
                "Tr_velo_to_cam": turned(0.01) if sensor is None else sensor}
    (root / "calib" / f"{name}.txt").write_text(
        "".join(f"{key}: {' '.join(f'{x:.12e}' for x in m.ravel())}\n" for key, m in matrices.items()))
    if lines is not None:
        (root / "label_2" / f"{name}.txt").write_text("".join(f"{x}\n" for x in lines))


def surfaces(box: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """(K·count, 3) points on the faces of boxes (K, 7)."""
    clouds = []
    for x, y, z, *side, turn in box:
        u = rng.uniform(-0.5, 0.5, (count, 3))
        face = rng.integers(0, 3, count)
        u[np.arange(count), face] = np.sign(u[np.arange(count), face]) / 2
        local, c, s = u * side * 0.98, np.cos(turn), np.sin(turn)
        clouds.append(np.column_stack([local[:, 0] * c - local[:, 1] * s + x, local[:, 0] * s + local[:, 1] * c + y,
                                       local[:, 2] + z]))
    return np.concatenate(clouds)


def street(seed: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """A LiDAR-like cloud (N, 4) of three cars and two pedestrians on a road 1.7 m below the sensor, their boxes and names."""
    rng = np.random.default_rng(seed)
    place = np.array([[6.0, -4.0], [12.0, 4.0], [20.0, -2.0], [8.0, 1.0], [16.0, -7.0]]) + rng.uniform(-0.5, 0.5, (5, 2))
    names = ["Car"] * 3 + ["Pedestrian"] * 2
    side = np.array([[3.9, 1.6, 1.5]] * 3 + [[0.8, 0.6, 1.75]] * 2) * rng.uniform(0.95, 1.05, (5, 3))
    box = np.column_stack([place, side[:, 2] / 2 - 1.7, side, rng.uniform(-1.2, 1.2, 5)])
    ground = np.column_stack([rng.uniform(1, 24, 1200), rng.uniform(-10, 10, 1200), rng.normal(-1.7, 0.02, 1200)])
    xyz = np.concatenate([ground, surfaces(box, 150, rng)])
    return np.column_stack([xyz, rng.uniform(0, 1, len(xyz))]), box, names


def kitti_frame(root: Path, data_root: Path) -> dict[str, Any]:
    """KITTI's frame 000008 in its own layout, from the cloud and the annotations of another tool; returns these."""
    about = unpickled(data_root / FRAME / "000008.pkl")
    names = {0: "Pedestrian", 1: "Cyclist", 2: "Car", -1: "DontCare"}
    lines = []
    for one in about["instances"]:
        x, y, z, length, height, width, turn = one["bbox_3d"]
        lines.append(line(names[one["bbox_label"]], (height, width, length, x, y, z, turn), one["bbox"], one["truncated"],
                          one["occluded"]))
    points = np.fromfile(data_root / FRAME / "000008.bin", "<f4").reshape(-1, 4)
    write_frame(root, "000008", points, lines, np.array(about["lidar_points"]["Tr_velo_to_cam"])[:3],
                np.array(about["images"]["R0_rect"])[:3, :3], np.array(about["images"]["CAM2"]["cam2img"])[:3])
    return about
