"""Weights from elsewhere as runs: timm's, MONAI's, and what is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import meristem
from meristem import cli
from meristem.errors import CheckpointError, MeristemError, RecipeError
from meristem.platform.evaluation.results import Results, summarise
from meristem.platform.training import checkpoint
from meristem.platform.training.restore import restored
from meristem.tasks.parallel import in_parallel
from meristem.tasks.transfer import Share

MODEL = "vit_tiny_patch16_224"
VIT = [f"encoder={{timm: {{model: {MODEL}, size: [32, 32]}}}}", "modality.image={patch: 16, normalise: unit}",
       "views.x.size=[32,32]"]
SWIN = ["encoder={swin: {width: 12, heads: [1, 2, 4, 8], window: 2}}", "views.x.size=[32,32,32]"]


def seeded(model: torch.nn.Module) -> torch.nn.Module:
    """Weights that no other start has."""
    torch.manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.05)
    return model.eval()


@pytest.mark.parametrize("wrap", [False, True])
def test_timm_weights_embed_as_timm_does(tmp_path: Path, wrap: bool) -> None:
    net = seeded(timm.create_model(MODEL, img_size=32, num_classes=5))
    state = net.state_dict()
    torch.save({"epoch": 3, "state_dict": state} if wrap else state, tmp_path / "w.pth")
    report = meristem.adopt(tmp_path / "w.pth", "image", tmp_path / "run", VIT)
    assert report.coverage == 1 and not report.missing
    assembly = restored(tmp_path / "run")
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        found = assembly.encoder.net.forward_features(x)  # type: ignore[operator, union-attr]
        torch.testing.assert_close(found, net.forward_features(x))  # type: ignore[operator]


def test_positions_of_another_image_size_and_colour_for_grey_are_fitted_as_timm_fits_them(tmp_path: Path) -> None:
    net = seeded(timm.create_model(MODEL, img_size=64, num_classes=0))
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    meristem.adopt(tmp_path / "w.safetensors", "image", tmp_path / "run", [*VIT, "modality.image.channels=1"])
    found, kernel = checkpoint.read_weights(tmp_path / "run"), net.state_dict()["patch_embed.proj.weight"]
    torch.testing.assert_close(found["encoder.net.patch_embed.proj.weight"], kernel.sum(1, keepdim=True))
    assert found["encoder.net.pos_embed"].shape[1] == 2 * 2 + 1


@pytest.mark.parametrize("prefix", ["", "module.", "module.swinViT."])
def test_monai_weights_embed_as_monai_does_whatever_stands_before_their_names(tmp_path: Path, prefix: str) -> None:
    from monai.networks.nets.swin_unetr import SwinTransformer

    net = seeded(SwinTransformer(1, 12, (2,) * 3, (2,) * 3, (2, 2, 2, 2), (1, 2, 4, 8), spatial_dims=3))
    state = {f"{prefix}{name}": x for name, x in net.state_dict().items()} | {"decoder.out.weight": torch.zeros(3)}
    torch.save({"state_dict": state}, tmp_path / "w.pt")
    report = meristem.adopt(tmp_path / "w.pt", "volume", tmp_path / "run", SWIN)
    assert report.coverage == 1
    x = torch.randn(1, 1, 32, 32, 32)
    with torch.no_grad():
        for ours, theirs in zip(restored(tmp_path / "run").encoder.maps(x, False)[0], net(x), strict=True):  # type: ignore[operator]
            torch.testing.assert_close(ours, theirs)


def test_weights_of_two_channels_serve_one(tmp_path: Path) -> None:
    from monai.networks.nets.segresnet import SegResNet

    net = seeded(SegResNet(3, 8, 2, blocks_down=(1, 1), blocks_up=(1,)))
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    report = meristem.adopt(tmp_path / "w.safetensors", "volume", tmp_path / "run",
                            ["encoder={segresnet: {width: 8, down: [1, 1], up: [1]}}", "views.x.size=[16,16,16]"])
    assert [name.split(".", 1)[0] for name in report.adapted] == ["net"] and report.coverage > 0.99
    kernel = checkpoint.read_weights(tmp_path / "run")["encoder.net.convInit.conv.weight"]
    torch.testing.assert_close(kernel, net.state_dict()["convInit.conv.weight"].sum(1, keepdim=True))


def test_an_adopted_run_is_evaluated_and_tuned_and_nobody_calls_it_clean(image_folder: Path, tmp_path: Path) -> None:
    save_file(seeded(timm.create_model(MODEL, img_size=32, num_classes=0)).state_dict(), tmp_path / "w.safetensors")
    run, tuned, size = tmp_path / "run", tmp_path / "tuned", ["views.x.size=[32,32]", "train.workers=0"]
    meristem.adopt(tmp_path / "w.safetensors", "image", run, [*VIT, "name=vit-elsewhere"])
    page = meristem.evaluate("classification", image_folder, tmp_path / "report", size, inits=[str(run)], seeds=1,
                             protocols=["knn"], split="0.5,0,0.5", quiet=True)
    results = Results.load(tmp_path / "report" / "results.json")
    assert results.leakage["vit-elsewhere"].verdict == "unknown" and "steps" not in results.pretraining["vit-elsewhere"]
    assert str(tmp_path) not in page.read_text()
    for resume in (False, True):
        meristem.finetune("classification", image_folder, tuned, [*size, "train.steps=1", "train.batch=2"], init=str(run),
                          split="0.5,0,0.5", resume=resume, quiet=True)
    assert checkpoint.read_card(tuned)["seen"]["contents"] is None
    with np.load(meristem.embed(run, image_folder, tmp_path / "vectors", quiet=True)) as stored:
        assert np.isfinite(stored["embedding"]).all()


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("touched"),))


def test_what_does_not_fit_or_could_run_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"state_dict": {"fc.weight": torch.zeros(2, 2)}}, tmp_path / "other.pt")
    torch.save({"epoch": 1}, tmp_path / "empty.pt")
    (tmp_path / "short.safetensors").write_bytes(b"\x10")
    for file, said in (("evil.pt", "could run code"), ("other.pt", "covers only 0.0%"), ("empty.pt", "no state dict"),
                       ("short.safetensors", "cannot be read"), ("missing.pt", "no weights file")):
        with pytest.raises(CheckpointError, match=said):
            meristem.adopt(tmp_path / file, "volume", tmp_path / "run", SWIN)
    assert not (tmp_path / "touched").exists() and not (tmp_path / "run").exists()
    with pytest.raises(MeristemError):
        meristem.adopt(tmp_path / "other.pt", "image", tmp_path / "run", VIT)
    asked = ["--weights", "other.pt", "--modality", "volume", "--out", "run", *SWIN]
    monkeypatch.setattr("sys.argv", ["meristem", "adopt", *asked])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and "covers only" in capsys.readouterr().err


def test_each_network_meets_random_weights_of_its_own_and_processes_share_the_grid(image_folder: Path, tmp_path: Path) -> None:
    save_file(seeded(timm.create_model(MODEL, img_size=32, num_classes=0)).state_dict(), tmp_path / "w.safetensors")
    runs = [tmp_path / "elsewhere", tmp_path / "ours"]
    meristem.adopt(tmp_path / "w.safetensors", "image", runs[0], [*VIT, "name=elsewhere"])
    meristem.pretrain("image/mae", image_folder, runs[1], ["encoder.transformer={width: 24, depth: 1, heads: 2}",
                                                           "views.x.size=[32,32]", "train.steps=1", "train.batch=2",
                                                           "train.workers=0"], split="0.5,0,0.5", quiet=True)

    def scores(out: str, jobs: int) -> dict[tuple[str, str, int], list[tuple[float, ...]]]:
        meristem.evaluate("classification", image_folder, tmp_path / out,
                          ["views.x.size=[32,32]", "train.workers=0", "train.steps=1", "train.batch=2"], jobs=jobs, seeds=2,
                          inits=list(map(str, runs)), protocols=["knn", "finetune"], split="0.5,0,0.5", quiet=True)
        return {(c.arm, c.protocol, c.seed): [case.probabilities for case in c.cases]
                for c in Results.load(tmp_path / out / "results.json").cells}

    alone, shared = scores("alone", 1), scores("shared", 2)
    assert {arm for arm, _, _ in alone} == {"elsewhere", "mae", "scratch", "scratch mae"} and alone.keys() == shared.keys()
    for key, values in alone.items():
        assert np.allclose(values, shared[key], atol=1e-5), key
    told = json.loads((tmp_path / "alone" / "report.json").read_text())["reports"][0]
    assert "--init elsewhere --init mae --labels" in told["evaluation"]  # random weights enter by themselves
    assert [bool(origin["command"]) for origin in told["origins"] if origin["weights"]] == [False, True]
    with pytest.raises(RecipeError, match="no protocol 'few'"):  # told once, before any process is started
        meristem.evaluate("classification", image_folder, tmp_path / "wrong", jobs=2, inits=["scratch"], protocols=["few"],
                          split="0.5,0,0.5", quiet=True)
    pairs = {(c.arm, c.baseline) for c in summarise(Results.load(tmp_path / "alone" / "results.json")).comparisons}
    assert pairs == {("elsewhere", "scratch"), ("mae", "scratch mae")}


def test_a_part_of_a_grid_that_fails_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(MeristemError, match="2 of 2 processes"):
        in_parallel(_broken, 2, (), True)
    assert capfd.readouterr().err.count("what is wrong") == 2


def _broken(share: Share, quiet: bool) -> None:
    raise MeristemError(f"what is wrong with part {share.number}")
