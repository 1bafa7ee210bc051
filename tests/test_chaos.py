"""The short form of `make chaos`: a few trainings disturbed and resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_disturbed_trainings_end_as_undisturbed_ones() -> None:
    ended = subprocess.run([sys.executable, Path(__file__).with_name("chaos.py"), "--kills", "6", "--seed", "1", "--modality",
                            "image", "--modality", "graph"], capture_output=True, text=True, timeout=600,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr
    counts = json.loads(ended.stdout.splitlines()[-1])
    assert counts["chaos"] >= 6 and counts["lost"] == 0 and set(counts["modalities"]) == {"image", "graph"}
