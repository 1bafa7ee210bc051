"""Networks fail, storages refuse, users mistype: tried again where that helps, told plainly where not, and no secret shown."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

import meristem
from meristem.cli import main
from meristem.errors import DataError
from meristem.platform.data.shards import remote
from meristem.platform.data.shards.remote import TRIES, Remote, is_url, masked
from meristem.platform.training import checkpoint


class Faulty(LocalFileSystem):
    """A local folder at flaky:// that fails as often as it is told to, in one of several ways."""

    protocol = "flaky"
    fails: ClassVar[list[str]] = []
    calls: ClassVar[list[str]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(LocalFileSystem._strip_protocol(path.rpartition("@")[2].removeprefix("flaky://")))

    def _fail(self, path: str) -> str:
        self.calls.append(Path(path).name)
        how = self.fails.pop() if self.fails else ""
        if how == "network":
            raise ConnectionResetError(f"connection to flaky://user:hunter22@{path} was reset, key=hunter22")
        if how == "permission":
            raise PermissionError("Access Denied")
        if how == "credentials":
            raise type("NoCredentialsError", (Exception,), {})("Unable to locate credentials")
        if how.isdigit():
            error = OSError(f"answer {how}")
            error.status = int(how)  # type: ignore[attr-defined]
            raise error
        return how

    def get_file(self, path: str, into: str, *arguments: Any, **more: Any) -> None:
        how, data = self._fail(path), Path(path).read_bytes()
        Path(into).write_bytes({"cut": data[:-1], "changed": bytes([data[0] ^ 1]) + data[1:]}.get(how, data))

    def cat_file(self, path: str, *arguments: Any, **more: Any) -> bytes:
        how, data = self._fail(path), Path(path).read_bytes()
        return data[:-9] if how == "cut" else data

    def put_file(self, path: str, into: str, *arguments: Any, **more: Any) -> None:
        how, data = self._fail(into), Path(path).read_bytes()
        Path(into).write_bytes(data[:-1] if how == "cut" else data)

    def pipe_file(self, path: str, value: bytes, *arguments: Any, **more: Any) -> None:
        self._fail(path)
        Path(path).write_bytes(value)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSE", 0.0)
    monkeypatch.setenv("MERISTEM_KEY", "of the tests")
    fsspec.register_implementation("flaky", Faulty, clobber=True)
    Faulty.fails.clear()
    Faulty.calls.clear()


@pytest.fixture
def there(tmp_path: Path) -> Remote:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "x").write_bytes(b"0123456789")
    return Remote(f"flaky://user:hunter22@{tmp_path}/s")


SHA = "84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882"


@pytest.mark.parametrize("how", ["network", "cut", "changed", "503", "429"])
def test_what_may_pass_is_tried_again(there: Remote, tmp_path: Path, how: str) -> None:
    Faulty.fails += [how] * (TRIES - 1)
    there.fetch("x", 10, SHA, tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == b"0123456789" and len(Faulty.calls) == TRIES
    Faulty.fails += ["network", how] if how != "changed" else ["network"]
    assert there.put(tmp_path / "got", "y") == SHA and (tmp_path / "s" / "y").read_bytes() == b"0123456789"


@pytest.mark.parametrize(("how", "reason", "tries"), [
    ("network", "network", TRIES), ("503", "network", TRIES), ("cut", "truncated", TRIES), ("changed", "checksum", TRIES),
    ("permission", "permission", 1), ("credentials", "permission", 1), ("403", "permission", 1), ("404", "missing", 1)])
def test_what_stays_wrong_is_told_without_secrets(there: Remote, tmp_path: Path, how: str, reason: str, tries: int) -> None:
    Faulty.fails += [how] * TRIES
    with pytest.raises(DataError) as told:
        there.fetch("x", 10, SHA, tmp_path / "got")
    assert told.value.reason == reason and len(Faulty.calls) == tries
    text = str(told.value) + repr(pickle.loads(pickle.dumps(told.value)))
    assert "hunter22" not in text and "user" not in text and " x" in f" {text}"
    assert told.value.__cause__ is None and told.value.__suppress_context__


def test_pauses_grow(there: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(remote, "PAUSE", 0.5)
    monkeypatch.setattr(remote.time, "sleep", slept.append)
    Faulty.fails += ["network"] * (TRIES - 1)
    assert there.read("x") == b"0123456789"
    assert len(slept) == TRIES - 1 and all(2**k / 4 <= pause <= 2**k / 2 for k, pause in enumerate(slept))


def test_a_file_that_is_not_there(there: Remote) -> None:
    assert there.size("none") is None and there.size("x") == 10
    with pytest.raises(DataError, match="no none at"):
        there.read("none")


def test_addresses() -> None:
    assert all(map(is_url, ("s3://b/x", "file:///x", "gs://b", "simplecache::s3://b")))
    assert not any(map(is_url, ("/data/x", "x.csv", "C:/x", Path("a/b"))))
    assert masked("https://user:pass@host/x?sig=abc&e=1") == "https://***@host/x?***" and masked("s3://b/x") == "s3://b/x"
    fs, path = Remote("https://host/folder?sig=abc")._at("index")
    assert path == "https://host/folder/index?sig=abc" and type(fs).__name__ == "HTTPFileSystem"


@pytest.mark.parametrize(("url", "reason", "said"), [
    ("s3://bucket/x", "package", r"pip install meristem\[s3\]"), ("gs://bucket/x", "package", "pip install gcsfs"),
    ("nonsense://x", "url", "nonsense://x is no address")])
def test_what_an_address_wants_is_told(url: str, reason: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(import_module("fsspec.registry")._registry, {"s3fs": "s3", "gcsfs": "gs"}[name], raising=False)
    with pytest.raises(DataError, match=said) as told:
        Remote(url).read("x")
    assert told.value.reason == reason


def test_connections_do_not_travel(there: Remote) -> None:
    there.read("x")
    assert "_folder" in vars(there) and "_folder" not in vars(pickle.loads(pickle.dumps(there)))


# ---- whole commands

TINY = ["views.x.size=[16,16]", "modality.image.patch=8", "encoder.transformer={width: 24, depth: 1, heads: 2}",
        "train.batch=4", "train.log_every=1", "train.window=2"]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """24 grey pictures in two class folders."""
    rng, root = np.random.default_rng(1), tmp_path / "pictures"
    for name, level in (("dark", 60), ("light", 160)):
        (root / name).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(rng.normal(level, 20, (32, 40)).clip(0, 255).astype(np.uint8)).save(root / name / f"{i}.png")
    return root


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["meristem", *map(str, arguments)])
    with pytest.raises(SystemExit) as leave:
        main()
    return int(leave.value.code or 0)


def test_a_flaky_network_changes_no_run(pictures: Path, tmp_path: Path) -> None:
    url = f"flaky://{tmp_path}/s"
    Faulty.fails += ["network"] * 4
    meristem.shard_data(pictures, url, size=0.01, cache=tmp_path / "w", quiet=True)
    assert "network" not in Faulty.fails
    losses = []
    for name, faults in (("calm", []), ("storm", ["", "network", "cut", "", "503"] * 3)):
        Faulty.fails[:] = faults
        done = meristem.pretrain("mae", url, tmp_path / name, [*TINY, "train.steps=6", "train.workers=0"],
                                 cache=tmp_path / f"c-{name}", quiet=True)
        losses.append(done.last["loss"])
    assert losses[0] == losses[1] and not Faulty.fails


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a bucket on a server of this machine."""
    pytest.importorskip("s3fs", reason="needs the extra s3")
    server = pytest.importorskip("moto.server", reason="needs moto").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in (("AWS_ENDPOINT_URL", f"http://{host}:{port}"), ("AWS_ACCESS_KEY_ID", "testing"),
                        ("AWS_SECRET_ACCESS_KEY", "hunter22"), ("AWS_DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(name, value)
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    fs.mkdir("scans")
    yield "s3://scans/set"
    server.stop()


def test_a_run_from_s3_is_the_run_from_disk(pictures: Path, tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch,
                                            capfd: pytest.CaptureFixture[str]) -> None:
    """Written, read by two loader workers, tuned and refused, by the commands a user types."""
    on_disk = f"file://{tmp_path}/disk"
    for url in (s3, on_disk):
        assert call(monkeypatch, "data", "shard", pictures, "--out", url, "--size", 0.01, "--cache", tmp_path / "w") == 0
    assert capfd.readouterr().out.count("24 samples in") == 2
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    assert {Path(f).name: fs.cat_file(f) for f in fs.ls("scans/set", detail=False)} == {
        f.name: f.read_bytes() for f in (tmp_path / "disk").iterdir()}
    for name, url, workers in (("s3", s3, 2), ("disk", on_disk, 0)):
        assert call(monkeypatch, "pretrain", "mae", "--data", url, "--out", tmp_path / name, "--cache", tmp_path / f"c-{name}",
                    *TINY, "train.steps=6", f"train.workers={workers}", "--quiet") == 0
    one, two = (checkpoint.read_weights(tmp_path / name) for name in ("s3", "disk"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert call(monkeypatch, "finetune", "classification", "--data", s3, "--init", tmp_path / "s3", "--out", tmp_path / "tuned",
                "--cache", tmp_path / "c-s3", "train.steps=2", "train.batch=4", "train.workers=2", "--quiet") == 0
    capfd.readouterr()
    for url, said in (("s3://elsewhere/set", "there is no index.jsonl.gz at s3://elsewhere/set"),
                      ("s3://scans/typo", "there is no index.jsonl.gz at s3://scans/typo")):
        assert call(monkeypatch, "pretrain", "mae", "--data", url, "--out", tmp_path / "none") == 2
        told = capfd.readouterr().err
        assert said in told and "Traceback" not in told and "hunter22" not in told
    fs.rm_file(next(f for f in fs.ls("scans/set", detail=False) if f.endswith("00001.tar")))
    assert call(monkeypatch, "pretrain", "mae", "--data", s3, "--out", tmp_path / "lost", "--cache", tmp_path / "c-lost", *TINY,
                "train.steps=8", "--quiet") == 2
    told = capfd.readouterr().err
    assert "there is no shard-00001.tar" in told and "Traceback" not in told
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in told
