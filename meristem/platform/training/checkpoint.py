"""Checkpoints that explain themselves, are written whole or not at all, and say how well they fit what loads them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from meristem.errors import CheckpointError
from meristem.modalities.base import Modality, View
from meristem.modalities.frame import Frame
from meristem.modalities.rng import Rng
from meristem.platform.encoders.base import Encoder

FORMAT = 1
LIBRARIES = ("meristem", "torch", "timm", "monai", "numpy", "nibabel", "lightning-fabric")


def versions() -> dict[str, str]:
    """Installed versions of the libraries a result depends on."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(value: Any) -> str:
    """12 hex digits of a plain value's SHA-256."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def write_text(path: Path, text: str) -> None:
    """Write a whole file or none of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    _sync(temporary)
    temporary.replace(path)


def save(run: Path, step: int, weights: Mapping[str, Tensor], card: Mapping[str, Any], state: Mapping[str, Any],
         keep: int) -> Path:
    """Write `run`/checkpoints/step-N with weights.safetensors, card.json and state.pt; keep the last `keep`.

    The folder is made under a temporary name, fsynced and renamed, so a kill at any moment leaves only whole checkpoints.
    state: tensors and plain values only, so that it loads with weights_only.
    """
    root = run / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    final, temporary = root / f"step-{step:08d}", root / f".step-{step:08d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    save_file({k: v.detach().cpu().contiguous().clone() for k, v in weights.items()}, temporary / "weights.safetensors")
    (temporary / "card.json").write_text(json.dumps({"format": FORMAT, "step": step, **card}, indent=1))
    torch.save(dict(state), temporary / "state.pt")
    for file in temporary.iterdir():
        _sync(file)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    _sync(root)
    for old in sorted(root.glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    return final


def locate(path: Path) -> Path:
    """The newest checkpoint folder of a run, or the folder itself if it is one. Raises CheckpointError."""
    if (path / "weights.safetensors").is_file():
        return path
    found = sorted((path / "checkpoints").glob("step-*"))
    if not found:
        raise CheckpointError(f"no checkpoint in {path}", "Give a run directory that `meristem pretrain` or `finetune` wrote.")
    return found[-1]


def read_card(path: Path) -> dict[str, Any]:
    """card.json of a run or checkpoint folder."""
    folder = locate(path)
    try:
        card: dict[str, Any] = json.loads((folder / "card.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{folder.name} has no readable card.json: {error}", "It is damaged; use another.") from None
    if card.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint format {card.get('format')!r} is not {FORMAT}", "Use the version that wrote it.")
    return card


def identity(path: Path) -> str:
    """What tells a checkpoint from every other, without a name: recipe's hash, step, and a digest of the whole card."""
    found = read_card(path)
    return f"{found['recipe_hash']}-{found['step']}-{digest(found)}"


def read_weights(path: Path) -> dict[str, Tensor]:
    folder = locate(path)
    try:
        weights: dict[str, Tensor] = load_file(folder / "weights.safetensors")
        return weights
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder.name}/weights.safetensors cannot be read: {error}") from None


def read_state(path: Path) -> dict[str, Any]:
    """Optimiser, counters and generators for resuming. Only tensors and plain values are ever unpickled."""
    folder = locate(path)
    try:
        state: dict[str, Any] = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        return state
    except (OSError, RuntimeError, zipfile.BadZipFile, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{folder.name}/state.pt cannot be read: {error}", "Use an older checkpoint.") from None


# ---------------------------------------------------------------------------------------------- fitting weights to an encoder

@dataclass
class LoadReport:
    """What happened to each tensor. coverage: share of the encoder's weights that came from the checkpoint.

    similarity: cosine of the reference embedding now with the one on the card; None where adaptation changes it.
    """

    loaded: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    coverage: float = 0.0
    similarity: float | None = None

    def line(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        parts += [f"{len(x)} {name}" for name, x in (("adapted", self.adapted), ("missing", self.missing),
                  ("unexpected", self.unexpected), ("of other shape", self.mismatched)) if x]
        check = f", reference embedding {self.similarity:.4f}" if self.similarity is not None else ""
        return f"{', '.join(parts)}; {self.coverage:.1%} of the encoder's weights{check}"

    def dump(self) -> dict[str, Any]:
        return asdict(self)


def reference_embedding(encoder: Encoder, modality: Modality, sees: frozenset[str], size: tuple[int, ...]) -> list[float]:
    """The encoder's mean embedding of a built-in input: seeded smooth noise of the recipe's first view size, 1 unit spacing."""
    device = next(encoder.parameters()).device
    coarse = Rng.of(0, 0, "reference").normal("field", modality.channels, *(max(n // 4, 2) for n in size))
    mode = "bilinear" if len(size) == 2 else "trilinear"
    array = F.interpolate(coarse, size=size, mode=mode, align_corners=False).to(device)
    dims = len(size)
    frame = Frame(torch.eye(dims + 1)[None], size, torch.ones(1, dims), tuple(a.unit for a in modality.axes)).to(device)
    view = View("reference", array, frame, torch.zeros(1, dtype=torch.long, device=device),
                torch.zeros(1, dtype=torch.long, device=device))
    training = encoder.training
    encoder.eval()
    with torch.no_grad():
        mean = encoder(modality.tokenizer().stream(view).seen(sees)).summary["mean"][0]
    encoder.train(training)
    return [round(float(x), 6) for x in mean.cpu()]


def _adapt(value: Tensor, want: torch.Size, channels: tuple[int, int],
           patch: tuple[tuple[int, ...], tuple[int, ...]]) -> Tensor | None:
    """Fit an input kernel to other channels or another patch size; None if that is not what differs.

    A kernel is (D, channels·prod(patch)) of a token embedding, or (D, channels, *kernel) of a convolution. More or fewer
    channels: the mean kernel repeated, scaled to keep the response of equal channels. Patch: linear resampling, scaled
    to keep the response to a constant.
    """
    (have_c, want_c), (have_p, want_p) = channels, patch
    flat = value.ndim == 2 and value.shape[1] == have_c * math.prod(have_p) and want[1:].numel() == want_c * math.prod(want_p)
    conv = value.ndim > 2 and value.shape[1] == have_c and len(want) == value.ndim and want[1] == want_c
    if value.shape[0] != want[0] or not (flat or conv):
        return None
    kernel = value.reshape(value.shape[0], have_c, *have_p) if flat else value
    if have_c != want_c:
        kernel = kernel.mean(1, keepdim=True).expand(-1, want_c, *kernel.shape[2:]) * (have_c / want_c)
    if flat and have_p != want_p:
        mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(want_p)]
        kernel = F.interpolate(kernel, size=want_p, mode=mode, align_corners=False) * (math.prod(have_p) / math.prod(want_p))
    kernel = kernel.reshape(want) if flat else kernel
    return kernel.contiguous() if kernel.shape == want else None


def fit(encoder: nn.Module, weights: Mapping[str, Tensor], channels: tuple[int, int] = (1, 1),
        patch: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())) -> LoadReport:
    """Load what fits into an encoder and report the fate of every tensor. channels, patch: (of the checkpoint, wanted)."""
    report, own = LoadReport(), encoder.state_dict()
    chosen: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name not in own:
            report.unexpected.append(name)
        elif value.shape == own[name].shape:
            chosen[name] = value
            report.loaded.append(name)
        elif (adapted := _adapt(value, own[name].shape, channels, patch)) is not None:
            chosen[name] = adapted
            report.adapted.append(name)
        else:
            report.mismatched.append(name)
    report.missing = [name for name in own if name not in chosen]
    encoder.load_state_dict(chosen, strict=False)
    total = sum(v.numel() for v in own.values())
    report.coverage = sum(own[name].numel() for name in chosen) / max(total, 1)
    return report


def load_encoder(path: Path, encoder: Encoder, modality: Modality, sees: frozenset[str], minimum: float = 0.9) -> LoadReport:
    """Put a checkpoint's transferable encoder into `encoder`.

    Refused (CheckpointError) when less than `minimum` of the encoder's weights are covered, when the modality differs, or when
    nothing had to be adapted and yet the reference embedding comes out different: swapped axes, another normalisation layer.
    """
    card, weights = read_card(path), read_weights(path)
    (kind, options), = card["recipe"]["modality"].items()
    if kind != modality.name:
        raise CheckpointError(f"the checkpoint is of modality '{kind}', the recipe of '{modality.name}'",
                              "Choose a checkpoint pretrained on the same kind of data.")
    prefix = card["transfer"]
    own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    wanted_patch = tuple(getattr(modality.options, "patch", ()))
    report = fit(encoder, own, (card["channels"], modality.channels), (tuple(options.get("patch", ())), wanted_patch))
    if report.coverage < minimum:
        raise CheckpointError(
            f"the checkpoint covers only {report.coverage:.1%} of the encoder's weights ({report.line()})",
            f"Missing: {', '.join((report.missing + report.mismatched)[:4])} …. Use the checkpoint's own encoder settings.")
    if not report.adapted and not report.missing and card["reference"]["sees"] == sorted(sees):
        now = reference_embedding(encoder, modality, sees, tuple(card["reference"]["size"]))
        report.similarity = float(F.cosine_similarity(torch.tensor(now), torch.tensor(card["reference"]["embedding"]), dim=0))
        if report.similarity < 0.99:
            raise CheckpointError("the weights load, but the reference input is embedded differently "
                                  f"(cosine {report.similarity:.3f})",
                                  "Patch, axes or encoder settings differ from those of the checkpoint.")
    return report
