"""What is installed: locked by hashes, built whole, usable without a network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def plain(name: str) -> str:
    """A distribution's name as indexes compare them."""
    return re.sub(r"[-_.]+", "-", name).lower()


def locked() -> dict[str, tuple[str, int]]:
    """Name -> version and number of hashes."""
    text = (ROOT / "requirements" / "locked.txt").read_text()
    blocks = re.findall(r"^([\w.-]+)==([^\s;\\]+)((?:.*\\\n)+.*)$", text, re.MULTILINE)
    return {plain(name): (version, rest.count("--hash=sha256:")) for name, version, rest in blocks}


def test_the_lock_has_the_pinned_versions_of_all_dependencies() -> None:
    """Run `make lock` where this fails."""
    lock = locked()
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    assert not {plain(re.split(r"[\[<>=~;! ]", line)[0]) for line in wanted} - lock.keys()
    assert {name: version for name, version in pinned.items() if plain(name) in lock} == \
        {name: lock[plain(name)][0] for name in pinned if plain(name) in lock}
    assert {plain(name) for name in pinned} - lock.keys() <= {"pip"}
    assert all(hashes for _, hashes in lock.values()) and "setuptools" in lock
    assert "://" not in (ROOT / "requirements" / "locked.txt").read_text()


def tree(folder: Path) -> Path:
    """A copy of what the package is built from."""
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "meristem", folder / "meristem", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def run(*command: object, cwd: Path) -> str:
    ended = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, timeout=600,
                           env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PIP_NO_INDEX": "1"})
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that is built from the sdist alone, by the hooks that every builder calls."""
    folder = tmp_path_factory.mktemp("built")
    source, out = tree(folder), folder / "out"
    hook = "import sys; from setuptools import build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"
    sdist = out / run(sys.executable, "-c", hook, "build_sdist", out, cwd=source).splitlines()[-1]
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    run(sys.executable, "-c", hook, "build_wheel", out, cwd=unpacked)
    return out


def test_the_wheel_holds_every_file_of_the_package(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    there = {path.relative_to(ROOT).as_posix() for path in (ROOT / "meristem").rglob("*")
             if path.is_file() and "__pycache__" not in path.parts}
    assert held == there and {Path(name).suffix for name in held} >= {".py", ".yaml", ".html", ".css"}


def test_it_installs_and_runs_from_a_folder_of_wheels_without_a_network(built: Path, tmp_path: Path) -> None:
    """The libraries are those of this environment, put on the path of a clean one."""
    run(sys.executable, "-m", "venv", "clean", cwd=tmp_path)
    bin_ = tmp_path / "clean" / "bin"
    site = Path(run(bin_ / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    run(bin_ / "python", "-m", "pip", "install", "--no-deps", "--no-index", "--find-links", built, "meristem", cwd=tmp_path)
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")  # after: pip would find an installed one
    where = run(bin_ / "python", "-c", "import meristem; print(meristem.__file__)", cwd=tmp_path).strip()
    assert Path(where).is_relative_to(site)
    assert "volume/mae-unet" in run(bin_ / "meristem", "recipes", "list", "--json", cwd=tmp_path)
    assert "pixels" in run(bin_ / "meristem", "recipes", "show", "volume/mae", cwd=tmp_path)
