"""Surfaces made into points: OFF, OBJ, STL, and PLY with faces."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np

from meristem.errors import DataError
from meristem.modalities.points.cloud import Cloud


def read_mesh(path: Path, sampled: int) -> Cloud:
    """OFF, OBJ or STL. sampled: points on the surface; 0: the vertices. Raises DataError."""
    import trimesh

    try:
        mesh = trimesh.load(path, force="mesh", process=False, skip_materials=True, maintain_order=True)
        vertices, faces = np.asarray(mesh.vertices, np.float64), np.asarray(mesh.faces, np.int64)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, NotImplementedError, OSError, EOFError) as error:
        raise DataError("unreadable", f"is no mesh that can be read ({type(error).__name__})", "Export it again.") from None
    if vertices.ndim != 2 or vertices.shape[1] != 3 or (len(faces) and faces.shape[1:] != (3,)):
        raise DataError("unreadable", f"its vertices have {vertices.shape[-1]} coordinates, not 3", "Export it again.")
    return from_faces(vertices, faces, sampled)


def from_faces(vertices: np.ndarray, faces: np.ndarray, sampled: int) -> Cloud:
    """vertices (V, 3), triangles (F, 3) to points spread uniformly over the area, with the triangles' normals.

    The random numbers come from the mesh itself: the same mesh is always the same cloud. Raises DataError.
    """
    if not sampled or not len(faces):
        return Cloud(vertices)
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise DataError("faces", f"faces name vertex {faces.max()} of {len(vertices)}", "Export the mesh again.")
    if not np.isfinite(vertices).all():
        bad = int((~np.isfinite(vertices)).any(1).sum())
        raise DataError("nan", f"{bad} of {len(vertices)} vertices are NaN or infinite", "Export the mesh again.")
    import trimesh

    mesh = trimesh.Trimesh(vertices, faces, process=False)
    if not mesh.area > 0:
        raise DataError("degenerate", "all faces have no area", "Export the mesh again, or set modality.points.mesh=vertices.")
    seed = zlib.crc32(np.ascontiguousarray(vertices[faces]).tobytes())
    points, at = trimesh.sample.sample_surface(mesh, sampled, seed=seed)
    return Cloud(np.asarray(points), {"normal": np.asarray(mesh.face_normals)[at]}, sampled=True)
