"""The Slurm scripts, with a Slurm that is a few lines of shell."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "examples" / "slurm"
FAKES = {
    "srun": 'shift; for i in 0 1 2 3; do SLURM_PROCID=$i SLURM_LOCALID=$((i % 2)) "$@" || exit 1; done',
    "scontrol": 'case $1 in show) printf "one\\ntwo\\n";; *) echo "$@" >> "$LOG/asked";; esac',
    "meristem": 'out=; for a; do [ "$b" = --out ] && out=$a; b=$a; done; mkdir -p "$out"; touch "$out/recipe.yaml"; '
                'echo "{\\"stopped_early\\": $STOPS}" > "$out/metrics.json"; '
                'echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR|$*" >> "$LOG/ran"',
}


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job of two nodes with two GPUs each."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in FAKES.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    return {"PATH": f"{programs}:{os.environ['PATH']}", "LOG": str(tmp_path), "SLURM_JOB_ID": "71", "SLURM_NTASKS": "4",
            "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "[one-two]", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "5",
            "SLURM_GPUS": "2"}


def submit(script: str, environment: dict[str, str], *arguments: str) -> list[str]:
    """Run it as Slurm would; the lines that the fake program left."""
    subprocess.run(["bash", SCRIPTS / script, *arguments], env=environment, check=True)
    return (Path(environment["LOG"]) / "ran").read_text().splitlines()


def test_a_pretraining_starts_everywhere_and_queues_again_until_it_is_done(slurm: dict[str, str], tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    given = ("volume/mae", "my scans", out, "train.steps=9", "views.x.size=[8, 8, 8]")
    lines = submit("pretrain.sbatch", {**slurm, "STOPS": "true"}, *given)
    command = f"pretrain volume/mae --data my scans --out {out} {{}}train.steps=9 views.x.size=[8, 8, 8]"
    assert lines == [f"{rank} {rank % 2} 4 2 one|{command.format('')}" for rank in range(4)]
    assert (tmp_path / "asked").read_text() == "requeue 71\n"
    lines = submit("pretrain.sbatch", {**slurm, "STOPS": "false"}, *given)[4:]
    assert lines == [f"{rank} {rank % 2} 4 2 one|{command.format('--resume ')}" for rank in range(4)]
    assert (tmp_path / "asked").read_text() == "requeue 71\n"  # not again


def test_each_job_of_an_array_evaluates_its_fold(slurm: dict[str, str], tmp_path: Path) -> None:
    out = str(tmp_path / "folds")
    line, = submit("evaluate.sbatch", {**slurm, "STOPS": "false"}, "segmentation", "scans", out, "--init", "runs/a")
    assert line.endswith(f"|evaluate segmentation --data scans --split every:5:3 --jobs 2 --out {out}/3 --init runs/a")


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sbatch")), ids=lambda path: path.name)
def test_scripts_parse_and_ask_to_be_signalled_in_words_that_slurm_knows(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    asked = [line.split()[1] for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    assert "--requeue" in asked and all(word.startswith("--") for word in asked)
