"""Molecules from SMILES, by RDKit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from meristem.errors import DataError
from meristem.modalities.base import Element
from meristem.modalities.graph.raw import Contents, Raw

COLUMNS = ("smiles", "mol", "canonical_smiles")  # likeliest first
LABELS = ("class", "label", "y")
BONDS = ("single", "double", "triple", "aromatic", "other")
CHIRAL = ("CHI_UNSPECIFIED", "CHI_TETRAHEDRAL_CW", "CHI_TETRAHEDRAL_CCW")
HYBRID = ("SP", "SP2", "SP3", "SP3D", "SP3D2")
ACYCLIC = "acyclic"


def is_table(head: Sequence[str]) -> bool:
    return any(c.lower() in COLUMNS for c in head)


def read_smiles(rows: list[list[str]], label: str | None) -> Contents:
    """A table with a column of SMILES: a graph per line, its atoms the nodes, its bonds the edges, of five types.

    Atoms have the nine features of OGB (Hu et al. 2020, Open Graph Benchmark), one-hot, the last of each for what is not
    listed: atomic number, chirality, degree, charge, hydrogens, radical electrons, hybridisation, aromatic, in a ring. A
    molecule's subject is its Bemis-Murcko scaffold, its split that of Hu et al. 2020 (Strategies for Pre-training
    Graph Neural Networks): the largest scaffolds train, 80 : 10 : 10. What cannot be parsed is an error in its
    place. Raises DataError.
    """
    try:
        from rdkit import Chem, rdBase
        from rdkit.Chem.Scaffolds.MurckoScaffold import MurckoScaffoldSmiles
    except ImportError:
        raise DataError("molecules", "graphs from SMILES need RDKit", "pip install 'meristem[molecules]'") from None
    head = [c.lower() for c in rows[0]]
    column = next(head.index(c) for c in COLUMNS if c in head)
    named = _label_column(rows, head, column, label)
    graphs: list[Raw | DataError] = []
    scaffolds: list[str | None] = []
    with rdBase.BlockLogs():
        for row in rows[1:]:
            molecule = Chem.MolFromSmiles(row[column]) if column < len(row) and row[column] else None
            if molecule is None:
                graphs.append(DataError("smiles", "the SMILES cannot be parsed", "Correct it, or remove the line."))
                scaffolds.append(None)
            else:
                graphs.append(_graph(molecule))
                scaffolds.append(MurckoScaffoldSmiles(mol=molecule, includeChirality=True) or ACYCLIC)
    split = scaffold_split(scaffolds)
    labels = [(row[named] or None) if named is not None and named < len(row) else None for row in rows[1:]]
    elements = tuple(Element(f"molecule/{i}", labels[i], f"scaffold {scaffold}" if scaffold else "", split[i])
                     for i, scaffold in enumerate(scaffolds))
    return Contents(graphs, elements, kinds=BONDS)


def scaffold_split(scaffolds: Sequence[str | None]) -> list[str]:
    """train | val | test of each molecule, whole scaffolds together; '' where there is none.

    Scaffolds by falling size, then by falling number of their first molecule; each goes where it still fits: 0.8, then 0.1.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for i, scaffold in enumerate(scaffolds):
        if scaffold is not None:
            groups[scaffold].append(i)
    total = sum(map(len, groups.values()))
    counts, out = {"train": 0, "val": 0}, [""] * len(scaffolds)
    for group in sorted(groups.values(), key=lambda g: (len(g), g[0]), reverse=True):
        if counts["train"] + len(group) <= 0.8 * total:
            where = "train"
        elif sum(counts.values()) + len(group) <= 0.9 * total:
            where = "val"
        else:
            where = "test"
        if where in counts:
            counts[where] += len(group)
        for i in group:
            out[i] = where
    return out


def _label_column(rows: list[list[str]], head: list[str], smiles: int, label: str | None) -> int | None:
    if label is not None:
        if label.lower() not in head:
            raise DataError("label", f"the table has no column '{label}'", f"Its columns: {', '.join(rows[0][:8])}.")
        return head.index(label.lower())
    found = next((head.index(name) for name in LABELS if name in head), None)
    others = [i for i in range(len(head)) if i != smiles]
    return others[0] if found is None and len(others) == 1 else found


def _graph(molecule: Any) -> Raw:
    bonds = [(b.GetBeginAtomIdx(), b.GetEndAtomIdx(), str(b.GetBondType()).lower()) for b in molecule.GetBonds()]
    kind = [BONDS.index(name) if name in BONDS else len(BONDS) - 1 for *_, name in bonds]
    given = np.array([_atom(a) for a in molecule.GetAtoms()], np.float32)
    return Raw(molecule.GetNumAtoms(), np.array([b[:2] for b in bonds], np.int64).reshape(-1, 2).T, np.array(kind, np.int64),
               given=given)


def _atom(atom: Any) -> list[float]:
    """171 numbers."""
    return [*_one_of(atom.GetAtomicNum(), range(1, 119)), *_one_of(str(atom.GetChiralTag()), CHIRAL),
            *_one_of(atom.GetTotalDegree(), range(11)), *_one_of(atom.GetFormalCharge(), range(-5, 6)),
            *_one_of(atom.GetTotalNumHs(), range(9)), *_one_of(atom.GetNumRadicalElectrons(), range(5)),
            *_one_of(str(atom.GetHybridization()), HYBRID), float(atom.GetIsAromatic()), float(atom.IsInRing())]


def _one_of(value: Any, listed: Sequence[Any]) -> list[float]:
    """One-hot; the last place is for what is not listed."""
    out = [0.0] * (len(listed) + 1)
    out[listed.index(value) if value in listed else len(listed)] = 1.0
    return out
