"""Citation graphs of Yang et al. 2016, Planetoid: pickles, of which nothing but arrays is let in."""

from __future__ import annotations

import pickle
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, vstack

from meristem.errors import DataError
from meristem.modalities.documents import MISSHAPEN
from meristem.modalities.graph.raw import Contents, Raw

PARTS = ("x", "y", "tx", "ty", "allx", "ally", "test.index")
NONE = -1  # no label, no split
VALIDATION = 500  # nodes after the training ones


class _Sparse:
    """Where the state of a scipy matrix is put until it is checked."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.state = state

    def matrix(self) -> csr_matrix:
        s = self.state
        made = csr_matrix((s["data"], s["indices"], s["indptr"]), shape=s.get("_shape", s.get("shape")), dtype=np.float32)
        made.check_format(full_check=True)
        return made


def _allowed() -> dict[tuple[str, str], Any]:
    from numpy._core.multiarray import _reconstruct  # what numpy's own pickles name

    table: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype, ("collections", "defaultdict"): defaultdict,
        ("__builtin__", "list"): list, ("builtins", "list"): list, ("_codecs", "encode"): _latin}
    table |= {(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")}
    return table | {(f"scipy.sparse.{module}", "csr_matrix"): _Sparse for module in ("csr", "_csr")}


def _latin(text: str, codec: str) -> bytes:
    """How Python 3 stores bytes in the protocols of Python 2."""
    if codec != "latin1":
        raise ValueError("bytes in another code")
    return text.encode(codec)


class _Arrays(pickle.Unpickler):
    """Lets in arrays, sparse matrices and lists of numbers; anything else a pickle may name is refused."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _allowed()[module, name]
        except KeyError:
            raise DataError("unsafe", f"the pickle asks for {module}.{name}, which is no part of a graph",
                            "It may run any program when opened: do not use it; get the file from its publisher.") from None


def _load(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return _Arrays(file, encoding="latin1").load()
    except DataError:
        raise
    except Exception as error:  # a broken pickle may raise anything
        raise DataError("unreadable", f"the part {path.name.split('.', 2)[-1]} is no readable pickle ({type(error).__name__})",
                        "Copy it again.") from None


def parts(path: Path) -> list[Path]:
    """The files that belong to `ind.NAME.graph`."""
    return [path.with_name(f"{path.name.removesuffix('graph')}{part}") for part in PARTS]


def read_planetoid(path: Path) -> Contents:
    """`ind.NAME.graph` and the seven files beside it.

    given: bag of words, each row divided by its sum. mask: classes, −1 where there is none. split: 0 the labelled training
    nodes, 1 the 500 after them, 2 those of test.index, −1 the rest. Numbers that test.index leaves out are nodes without edges,
    words and class (CiteSeer has 15). Raises DataError.
    """
    missing = [part for part, file in zip(PARTS, parts(path), strict=True) if not file.is_file()]
    if missing:
        raise DataError("missing", f"the parts {', '.join(missing)} are not beside the graph", "Copy all eight files.")
    *_, index_file = parts(path)
    try:
        test = np.array(index_file.read_text().split(), np.int64)
    except (ValueError, OSError, OverflowError):
        raise DataError("unreadable", "test.index is not a list of numbers", "Copy it again.") from None
    loaded = {part: _load(file) for part, file in zip(PARTS[:-1], parts(path), strict=False)}
    links = _load(path)
    try:
        words, tested = (loaded[part].matrix() for part in ("allx", "tx"))
        classes, of_test = np.asarray(loaded["ally"], float), np.asarray(loaded["ty"], float)
        known, labelled = words.shape[0], len(loaded["y"])
        n = max(known, int(test.max()) + 1) if len(test) else known
        if n > max(len(links), known + len(test)):
            raise ValueError("test.index numbers nodes that the graph does not have")
        if len(test) != tested.shape[0] or (len(test) and test.min() < known) or len(classes) != known:
            raise ValueError("counts differ")
        given = vstack([words, csr_matrix((n - known, words.shape[1]), dtype=np.float32)]).tolil()
        given[test] = tested
        one_hot = np.zeros((n, classes.shape[1]))
        one_hot[:known], one_hot[test] = classes, of_test
        pairs = np.array([(int(a), int(b)) for a, near in links.items() for b in near], np.int64).reshape(-1, 2).T
    except MISSHAPEN as error:
        raise DataError("unreadable", f"the parts do not fit each other ({type(error).__name__})",
                        "Copy all eight files again.") from None
    given = given.tocsr()
    total = np.asarray(given.sum(1)).ravel()
    given = given.multiply(1 / np.where(total == 0, 1, total)[:, None]).tocsr().astype(np.float32)
    mask = np.where(one_hot.any(1), one_hot.argmax(1), NONE).astype(np.int16)
    split = np.full(n, NONE, np.int16)
    split[:labelled], split[labelled:min(labelled + VALIDATION, known)], split[test] = 0, 1, 2
    return Contents([Raw(n, pairs, given=given, fields={"mask": mask, "split": split})])
