"""A user's data made ready: found, decoded, divided, with the unusable set aside and counted."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from meristem.errors import DataError
from meristem.modalities.base import EXCLUDED, Calling, Header, Modality, Placing
from meristem.modalities.likeness import Likeness
from meristem.modalities.objects import Objects
from meristem.platform.data.bar import counting
from meristem.platform.data.cache import Cache, user_cache
from meristem.platform.data.manifest import Manifest, Problem, Row
from meristem.platform.data.samples import Samples
from meristem.platform.data.shards import index
from meristem.platform.data.shards.remote import Remote, is_url
from meristem.platform.data.shards.shards import Shards
from meristem.platform.data.splits import divide

ROOM = 20.0  # GB of fetched shards that are kept


@dataclass(frozen=True)
class Data:
    """A divided manifest and its samples."""

    manifest: Manifest
    cache: Samples
    modality: Modality

    def rows(self, split: str | Sequence[str] | None = None, labelled: bool | None = None) -> list[Row]:
        """The usable rows of a split."""
        return [row for row in self.manifest.select(split, labelled) if row.index in self.cache]

    def samples(self, rows: Sequence[Row]) -> list[Row]:
        """The usable samples that some rows are, or are parts of, each once."""
        wanted = {row.index for row in rows}
        return [row for row in self.rows() if row.index in wanted]

    def identities(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Keyed pseudonyms, content hashes and fingerprints, for the leakage audit; of a part with its number behind a `#`.

        fingerprints: of whole samples, in no relation to the others; None where the modality makes none.
        """
        likeness: Likeness | None = getattr(self.modality, "likeness", None)
        return {"subjects": sorted({row.subject for row in rows}), "key_id": self.manifest.key_id,
                "contents": sorted({self.cache.content(row.index) + row.suffix for row in rows}),
                "fingerprints": likeness and {"method": likeness.method, "codes": sorted({*self.fingerprints(rows).values()})}}

    def called(self, row: Row) -> Sequence[str]:
        """The names that a sample's file gives its elements, read now; nothing where it gives none, or in shards."""
        return self.modality.called(row.paths) if row.paths and isinstance(self.modality, Calling) else ()

    def fingerprints(self, rows: Sequence[Row]) -> dict[str, str]:
        """Content hash -> fingerprint in base64, of the whole samples that have one."""
        return {self.cache.content(row.index): code for row in rows if (code := self.cache.fingerprint(row.index))}


def open_data(place: str | Path, modality: Modality, split: str = "auto", cache: Path | None = None, quiet: bool = False,
              labels: bool = True, room: float = ROOM) -> Data:
    """Find, decode and divide. The split has its own fixed seed: pretraining and every task agree on the test subjects.

    place: files, or a URL of shards, which were decoded when they were written; fetched ones are kept in the cache while all
    there take at most `room` GB.
    split: as `divide` takes it; with auto, data without any label or split of its own is all for training, since there is
    nothing to hold out for. labels: whether they are read; without, a broken label loses no image, and nothing is divided.
    `Data.modality` has what the modality left open settled by these samples. Raises DataError when nothing can be used.
    """
    store: Samples
    if is_url(place):
        found = index.load(str(place))
        modality = found.settled(modality)
        manifest = found.manifest if labels else _unlabelled(found.manifest)
        store = Shards(found, Remote(str(place)), (cache or user_cache()) / "shards", round(room * 1e9))
    else:
        manifest = Manifest.discover(place, modality)
        modality = modality.fitted([p for row in manifest.rows for p in row.paths])
        manifest = manifest if labels else _unlabelled(manifest)
        with counting("reading files", quiet) as progress:
            store = Cache.build(manifest, modality, cache, progress)
    inside = {r.index: dict.fromkeys((n for n in store.fields(r.index) if n != EXCLUDED), r.paths[0] if r.paths else Path())
              for r in manifest.rows if labels and r.index in store}
    manifest = replace(manifest, rows=tuple(replace(r, fields={**inside.get(r.index, {}), **r.fields}) for r in manifest.rows))
    manifest = _placed(manifest, store, modality)
    usable = {i: store.volume(i) for i in store.rows if "mask" in store.fields(i)}
    if labels:
        bare = split == "auto" and not any(row.labelled or row.split for row in manifest.rows)
        manifest = divide(manifest, "1,0,0" if bare else split, 0, usable)
    if store.quarantine and not quiet:
        reasons = sorted({problem.reason for problem in store.quarantine})
        print(f"{len(store)} of {len(manifest)} samples used; {len(store.quarantine)} files quarantined "
              f"({', '.join(reasons)}): quarantine.csv in the run directory. `meristem data check --names` names them.",
              file=sys.stderr)
    return Data(manifest, store, modality)


def _unlabelled(manifest: Manifest) -> Manifest:
    return replace(manifest, rows=tuple(replace(row, fields={}, labels={}, objects=None) for row in manifest.rows))


def _placed(manifest: Manifest, store: Samples, modality: Modality) -> Manifest:
    """The rows with their objects in source coordinates; those that cannot be there are counted among the quarantined."""
    rows = []
    for row in manifest.rows:
        if row.objects is not None and row.index in store:
            header = store.header(row.index)
            try:
                if not isinstance(modality, Placing):
                    raise DataError("box", f"boxes mean nothing to the modality {modality.name}",
                                    "Leave the boxes out, or choose another modality.")
                row = replace(row, objects=modality.placed(row.objects, header))
                store.aim(row.index, _middles(row.objects, header))
            except DataError as error:
                store.quarantine += (Problem(row.case, error.reason, error.what, error.remedy, row.local),)
                row = replace(row, objects=None)
        rows.append(row)
    return replace(manifest, rows=tuple(rows))


def _middles(objects: Objects | None, header: Header) -> tuple[tuple[int, ...], ...]:
    """The stored elements in the middle of objects that lie on a lattice, for crops that must hold some."""
    dims = len(header.shape) - 1
    if objects is None or objects.box.shape[1] != 2 * dims or len(header.affine) != dims + 1:
        return ()
    low, high = np.split(objects.box[~objects.ignore], 2, axis=1)
    middle = np.concatenate([(low + high) / 2, np.ones((len(low), 1))], 1)
    index = np.rint(middle @ np.linalg.inv(np.array(header.affine)).T)[:, :-1]
    return tuple(map(tuple, np.clip(index, 0, np.array(header.shape[1:]) - 1).astype(int).tolist()))
