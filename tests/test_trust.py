"""The page of promises says what the harnesses counted, and of those that did not run that they did not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trust

MADE = {"chaos": {"chaos": 1234, "trials": 1000, "lost": 3, "faults": {"kill": 700, "disk": 534}, "seconds": 9},
        "canaries": {"canaries": 321, "found": 0, "artefacts": 500, "pieces": 12000, "commands": 90, "printed_bytes": 77777,
                     "modalities": {"image": 200, "graph": 121}, "seconds": 9},
        "golden": {"golden": 6, "moved": 1, "tolerance": 2e-4, "steps": 8, "modalities": [], "seconds": 9},
        "fuzz": {"fuzz": 10_000, "findings": 2, "targets": {"nifti": 5000, "png": 5000}, "seconds": 9}}


def test_counts_are_stamped_once_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "COUNTS", tmp_path)
    monkeypatch.setattr(trust, "PAGE", tmp_path / "trust.md")
    for name, line in MADE.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(line))
    old = {**MADE["golden"], "when": "2001-02-03", "versions": {"torch": "0.1"}}
    (tmp_path / "golden.json").write_text(json.dumps(old))
    trust.main()
    text = " ".join((tmp_path / "trust.md").read_text().split())
    assert "1,234 disturbances of 1,000 trainings, 3 lost (kill 700, disk 534)" in text
    assert "321 words planted in 2 data sets, 90 commands, 500 artefacts in 12,000 pieces and 77,777 printed bytes" in text
    assert "10,000 inputs to 2 readers, 2 findings" in text
    assert "Last run, 2001-02-03 (torch 0.1): 6 modalities, 8 steps each, 1 moved by more than 0.0002" in text
    assert text.count("Not run yet.") == sum(h.there for h in trust.HARNESSES) - len(MADE)
    before = {f.name: f.read_text() for f in tmp_path.iterdir()}
    assert json.loads(before["chaos.json"])["versions"].keys() == {"python", *trust.LIBRARIES}
    trust.main()
    assert {f.name: f.read_text() for f in tmp_path.iterdir()} == before


def test_the_page_in_the_repository_is_that_of_its_counts() -> None:
    lines = {file.stem: json.loads(file.read_text()) for file in trust.COUNTS.glob("*.json")}
    assert trust.PAGE.read_text() == trust.page(lines) and all("when" in line for line in lines.values())
