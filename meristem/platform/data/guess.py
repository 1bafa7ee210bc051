"""Of which modality a data set is, where nobody says."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image as Pillow

from meristem.errors import DataError
from meristem.modalities.base import Gathering, Modality, member_files, modalities, modality_class
from meristem.modalities.documents import regular
from meristem.platform.data import lists
from meristem.platform.data.annotated import format_of
from meristem.platform.data.layouts import Search, nested, sequences

LOOKED_INTO = 8  # folders, or files of one suffix: enough to tell frames from a class of pictures, points from a matrix
ALIKE = 0.7  # mean difference of neighbours over that of pictures far apart: about 1 where their order says nothing


def guess_modality(path: str | Path) -> str:
    """The installed modality that reads most files of a data set, or the only one whose objects its annotations are of.

    Folders of numbered files go to a modality of which each is one sample only where that is clear: see `layouts.sequences`,
    and where they might as well be classes, neighbours in number must look alike. A modality that has
    `recognised(path) -> bool` is asked whether files of its suffixes, which others have too, are its own.
    Raises DataError when none reads any.
    """
    root = Path(path).expanduser()
    if not root.is_file() and not root.is_dir():
        raise DataError("missing", f"no data at {root}", "Give an existing folder, CSV, list, dataset.json, npz or data file.")
    kinds = {name: modality_class(name) for name in modalities()}
    annotated = [name for name, kind in kinds.items() if format_of(Search(kind), root)]
    if len(annotated) == 1:
        return annotated[0]
    folder = root.parent if root.suffix == ".json" else root
    names, counts = _listed(root, kinds)
    if not counts.total():
        below = list(folder.rglob("*")) if folder.is_dir() else [root]
        whole = {name: sequences(folder, kind.members) if folder.is_dir() else {} for name, kind in kinds.items()}
        whole = {name: found if len(found) > 1 and (nested(found) or _alike(found)) else {} for name, found in whole.items()}
        taken = {place for found in whole.values() for place in found}
        files = [f for f in below if f.parent not in taken and f.is_file()]  # whoever opens a pipe waits
        names = [f.name.lower() for f in files]
        counts = Counter({name: _own(files, kind) + sum(map(len, whole[name].values())) for name, kind in kinds.items()})
    if not counts.total():
        if any(f.endswith(".npz") for f in names):
            return "image"
        known = ", ".join(sorted({s for kind in kinds.values() for s in kind.suffixes}))
        raise DataError("empty", f"no file of a known kind in {root}", f"Known: {known}.")
    return max(counts, key=lambda name: (counts[name], hasattr(kinds[name], "recognised")))


def _count(names: Sequence[str], kind: type[Modality]) -> int:
    return sum(name.endswith(kind.suffixes) for name in names)


def _own(files: Sequence[Path], kind: type[Modality]) -> int:
    """How many files a modality would read: by their suffixes, and by the share of some that it recognises.

    Files that are told by what is in them (`Gathering`) need no suffix, or have a number for one.
    """
    recognised = getattr(kind, "recognised", None)
    if recognised is None:
        return _count([f.name.lower() for f in files], kind)
    by_suffix: dict[str, list[Path]] = defaultdict(list)
    for f in files:
        bare = isinstance(kind, Gathering) and not f.suffix.strip(".0123456789") and f.is_file()
        if bare or f.name.lower().endswith(kind.suffixes):
            by_suffix["" if bare else f.suffix.lower()].append(f)
    some = {suffix: [recognised(f) for f in found[::-(-len(found) // LOOKED_INTO)]] for suffix, found in by_suffix.items()}
    return sum(round(len(by_suffix[suffix]) * sum(seen) / len(seen)) for suffix, seen in some.items())


def _listed(root: Path, kinds: Mapping[str, type[Modality]]) -> tuple[list[str], Counter[str]]:
    """The words of the lists that describe a data set, and how many files or folders each modality would read of them."""
    searches = [Search(kind) for kind in kinds.values()]
    found = [lists.of_splits(s, root) if root.is_dir() else [root] if lists.is_list(s, root) else [] for s in searches]
    text = {f: f.read_text(encoding="utf-8-sig", errors="replace") for some in found for f in some}
    names = [word.strip('"') for t in text.values() for word in re.split(r"[\s,]+", t.lower())]
    counts = Counter({name: _count(names, kind) for name, kind in kinds.items()})
    if not counts.total():
        places = [place for f, t in text.items() for place in lists.folders(t, f.parent)]
        counts = Counter({name: sum(_own(list(p.iterdir()), kind) > 0 if isinstance(kind, Gathering) else
                                    bool(member_files(p, kind.members)) for p in places) for name, kind in kinds.items()})
    return names, counts


def _alike(found: Mapping[Path, Sequence[str]]) -> bool:
    """Whether neighbours in number look alike, compared with pictures far apart: frames do, the pictures of a class do not."""
    def look(path: Path) -> np.ndarray:
        with Pillow.open(regular(path)) as picture:
            return np.asarray(picture.convert("L").resize((32, 32), Pillow.Resampling.BOX), float)

    ratios = []
    for folder, names in list(found.items())[:LOOKED_INTO]:
        spots = np.linspace(0, len(names) - 2, 4).astype(int).tolist()
        try:
            a, b = (np.stack([look(folder / names[i + step]) for i in spots]) for step in (0, 1))
        except (OSError, ValueError, SyntaxError, Pillow.DecompressionBombError):
            continue
        ratios.append(np.abs(a - b).mean() / max(np.abs(a - np.roll(b, 2, axis=0)).mean(), 1e-9))
    return bool(ratios) and float(np.median(ratios)) < ALIKE
