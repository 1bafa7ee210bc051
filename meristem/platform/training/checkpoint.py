"""Checkpoints that explain themselves, are written whole or not at all, and say how well they fit what loads them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from meristem.errors import CheckpointError, DataError
from meristem.modalities.base import Modality
from meristem.modalities.documents import MISSHAPEN, read_json, regular
from meristem.modalities.rng import Rng
from meristem.platform.encoders.base import Encoder
from meristem.platform.encoders.lora import merged
from meristem.platform.training.card import wrong

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
    """Write `run`/checkpoints/step-N with weights.safetensors, card.json and state.pt; keep the last `keep`, and the best.

    The best, to which a link `best` points, is that whose card tells the lowest `loss`: the mean over the steps since the one
    before it. Where an objective becomes harder as a run goes on, early checkpoints look better by it than they are.


    The folder is made under a temporary name, fsynced and renamed, so a kill at any moment leaves only whole checkpoints.
    state: tensors and plain values only, so that it loads with weights_only.
    """
    root = run / "checkpoints"
    final, temporary = root / f"step-{step:08d}", root / f".step-{step:08d}.tmp"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        temporary.mkdir()
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in weights.items()}, temporary / "weights.safetensors")
        (temporary / "card.json").write_text(json.dumps({"format": FORMAT, "step": step, **card}, indent=1))
        torch.save(dict(state), temporary / "state.pt")
        for file in temporary.iterdir():
            _sync(file)
        _remove(final)
        temporary.rename(final)
        _sync(root)
    except (OSError, SafetensorError, RuntimeError) as error:  # each library has its own word for a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"the checkpoint of step {step} cannot be written: {_reason(error)}",
                              "Make room on the disk, then go on with --resume: earlier checkpoints are intact.") from None
    found = sorted(root.glob("step-*"))
    best = min(reversed(found), key=_loss)
    with suppress(OSError):  # on file systems without links, the cards tell
        link = root / ".best.tmp"
        link.unlink(missing_ok=True)
        link.symlink_to(best.name)
        link.replace(root / "best")
    for old in found[:-keep]:
        if old != best:
            _remove(old)
    return final


def _loss(folder: Path) -> float:
    """The loss on a checkpoint's card; infinite where it tells none."""
    try:
        loss = float(read_json(folder / "card.json", "card.json")["loss"])
    except (DataError, *MISSHAPEN):  # one that was damaged later is not in the way of new ones
        return math.inf
    return loss if math.isfinite(loss) else math.inf


def _remove(folder: Path) -> None:
    """Remove a folder that may be there, so that none is ever seen in part."""
    going = folder.with_name(f".{folder.name.strip('.')}.old")
    shutil.rmtree(going, ignore_errors=True)
    if folder.exists():
        folder.rename(going)
        shutil.rmtree(going, ignore_errors=True)


def _reason(error: Exception) -> str:
    """Why a file cannot be written, without its place."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    told = re.search(r"[Ee]rror: ([^:]+?)( \(os error \d+\))?$", str(error))
    return told[1] if told else "the disk takes no more, or is gone"


def locate(path: Path) -> Path:
    """The newest checkpoint folder of a run, or the folder itself if it is one. Raises CheckpointError."""
    if (path / "weights.safetensors").is_file():
        return path
    found = sorted((path / "checkpoints").glob("step-*"))
    if not found:
        raise CheckpointError(f"no checkpoint in {path}", "Give a run directory that `meristem pretrain` or `finetune` wrote.")
    return found[-1]


def read_card(path: Path, joint: bool = False) -> dict[str, Any]:
    """card.json of a run or checkpoint folder. Raises CheckpointError; for that of a joint run too unless `joint`."""
    folder = locate(path)
    try:
        card: dict[str, Any] = read_json(folder / "card.json", f"{folder.name}/card.json")
        form, bad = card["format"], wrong(card)
    except DataError as error:
        raise CheckpointError(error.what, "It is damaged; use another.") from None
    except MISSHAPEN as error:
        raise CheckpointError(f"{folder.name}/card.json is no card ({type(error).__name__})",
                              "It is damaged; use another.") from None
    if form != FORMAT:
        raise CheckpointError(f"the checkpoint's format is not {FORMAT}", "Use the version that wrote it.")
    if bad:
        raise CheckpointError(f"{folder.name}/card.json is damaged: '{bad}' is missing or not what it should be",
                              "Use another checkpoint of the run.")
    if card["kind"] == "joint" and not joint:
        members = " or ".join(f"{path.name}/{name}" for name in card["members"])
        raise CheckpointError(f"{path.name} is a joint run of {len(card['members'])} kinds of data",
                              f"Name a member's own: {members}.")
    return card


def identity(path: Path) -> str:
    """What tells a checkpoint from every other, without a name: recipe's hash, step, and a digest of the whole card."""
    found = read_card(path)
    return f"{found['recipe_hash']}-{found['step']}-{digest(found)}"


def read_weights(path: Path) -> dict[str, Tensor]:
    folder = locate(path)
    try:
        weights: dict[str, Tensor] = load_file(regular(folder / "weights.safetensors"))
        return weights
    except (OSError, SafetensorError, RuntimeError, *MISSHAPEN) as error:
        raise CheckpointError(f"{folder.name}/weights.safetensors cannot be read ({type(error).__name__})",
                              "Use another checkpoint of the run.") from None


def read_state(path: Path) -> dict[str, Any]:
    """Optimiser, counters and generators for resuming. Only tensors and plain values are ever unpickled."""
    folder = locate(path)
    try:
        state: dict[str, Any] = torch.load(regular(folder / "state.pt"), map_location="cpu", weights_only=True)
        return state
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle runs its machine into whatever its next word means
        raise CheckpointError(f"{folder.name}/state.pt cannot be read ({type(error).__name__})",
                              "Use an older checkpoint.") from None


# ---------------------------------------------------------------------------------------------- fitting weights to an encoder

@dataclass
class LoadReport:
    """What happened to each tensor. coverage: share of the encoder's weights that came from the checkpoint.

    inflated, deflated: those of `adapted` that got or lost a lattice axis. positions: how coordinates differ from those of the
    checkpoint; empty where they are the same. similarity: cosine of the reference embedding now with the one on the card; None
    where adaptation changes it.
    """

    loaded: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    inflated: list[str] = field(default_factory=list)
    deflated: list[str] = field(default_factory=list)
    positions: str = ""
    coverage: float = 0.0
    similarity: float | None = None

    def line(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        parts += [f"{len(x)} {name}" for name, x in (("adapted", self.adapted), ("missing", self.missing),
                  ("of them inflated (repeated along a new axis)", self.inflated),
                  ("of them deflated (summed over an axis)", self.deflated), ("unexpected", self.unexpected),
                  ("of other shape", self.mismatched)) if x]
        parts += [f"positions: {self.positions}"] if self.positions else []
        check = f", reference embedding {self.similarity:.4f}" if self.similarity is not None else ""
        return f"{', '.join(parts)}; {self.coverage:.1%} of the encoder's weights{check}"

    def dump(self) -> dict[str, Any]:
        return asdict(self)


def reference_embedding(encoder: Encoder, modality: Modality, sees: frozenset[str], size: tuple[int, ...]) -> list[float]:
    """The encoder's mean embedding of a built-in input: the modality's seeded example of the recipe's first view size."""
    device = next(encoder.parameters()).device
    view = modality.example(size, Rng.of(0, 0, "reference")).to(device)
    training = encoder.training
    encoder.eval()
    with torch.no_grad():
        mean = encoder(modality.tokenizer().stream(view).seen(sees)).summary["mean"][0]
    encoder.train(training)
    return [round(float(x), 6) for x in mean.cpu()]


Patch = tuple[int, ...]


def _adapt(value: Tensor, want: torch.Size, channels: tuple[int, int], patch: tuple[Patch, Patch],
           transposed: bool) -> Tensor | None:
    """Fit an input kernel to other channels, another patch size or another number of lattice axes; None if that is not what
    differs.

    A kernel is (D, channels·prod(patch)) of a token embedding, or (D, channels, *kernel) of a convolution. More or fewer
    channels: the mean kernel repeated, scaled to keep the response of equal channels. Patch: linear resampling, scaled
    to keep the response to a constant. A new first axis of length t: repeated along it and divided by t, so that what does not
    change along it is embedded as before (Carreira & Zisserman 2017, I3D); one axis less: summed over the first. A transposed
    convolution spreads instead of summing: repeated as it is, and averaged back.
    """
    (have_c, want_c), (have_p, want_p) = channels, patch
    flat = value.ndim == 2 and value.shape[1] == have_c * math.prod(have_p) and want[1:].numel() == want_c * math.prod(want_p)
    kernel = value.reshape(value.shape[0], have_c, *have_p) if flat else value
    inner = (want_c, *want_p) if flat else tuple(want[1:])
    more = len(inner) + 1 - kernel.ndim
    if value.shape[0] != want[0] or min(kernel.ndim, len(inner) + 1) < 3 or abs(more) > 1:
        return None
    if kernel.shape[1] != inner[0]:
        if transposed or (kernel.shape[1], inner[0]) != channels:
            return None
        kernel = kernel.mean(1, keepdim=True).expand(-1, want_c, *kernel.shape[2:]) * (have_c / want_c)
    if more < 0:
        kernel = kernel.mean(2) if transposed else kernel.sum(2)
    size = inner[1 + max(more, 0):]
    if flat and kernel.shape[2:] != size:
        mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(size)]
        scale = kernel.shape[2:].numel() / math.prod(size)
        kernel = F.interpolate(kernel, size=size, mode=mode, align_corners=False) * scale
    if more > 0:
        length = inner[1]
        kernel = kernel.unsqueeze(2).expand(-1, -1, length, *kernel.shape[2:]) / (1 if transposed else length)
    return kernel.reshape(want).contiguous() if kernel.shape[1:] == inner else None


def fit(encoder: nn.Module, weights: Mapping[str, Tensor], channels: tuple[int, int] = (1, 1),
        patch: tuple[Patch, Patch] = ((), ())) -> LoadReport:
    """Load what fits into an encoder and report the fate of every tensor. channels, patch: (of the checkpoint, wanted)."""
    report, own = LoadReport(), encoder.state_dict()
    weights = _wrapped(weights, own)
    spreading = {f"{name}.weight" for name, module in encoder.named_modules()
                 if isinstance(module, nn.ConvTranspose2d | nn.ConvTranspose3d)}
    elements = channels[1] * math.prod(patch[1])
    # of equal size, patches of other proportions still mean something else
    stem = next((n for n, v in own.items() if v.ndim == 2 and v.shape[1] == elements), None) if patch[0] != patch[1] else None
    chosen: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name not in own:
            report.unexpected.append(name)
        elif value.shape == own[name].shape and name != stem:
            chosen[name] = value
            report.loaded.append(name)
        elif (adapted := _adapt(value, own[name].shape, channels, patch, name in spreading)) is not None:
            chosen[name] = adapted
            report.adapted.append(name)
            more = len(patch[1]) - len(patch[0]) if value.ndim == 2 else adapted.ndim - value.ndim
            if more:
                (report.inflated if more > 0 else report.deflated).append(name)
        else:
            report.mismatched.append(name)
    report.missing = [name for name in own if name not in chosen]
    encoder.load_state_dict(chosen, strict=False)
    total = sum(v.numel() for v in own.values())
    report.coverage = sum(own[name].numel() for name in chosen) / max(total, 1)
    return report


def _wrapped(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The weights under the names of an encoder that holds theirs, or that theirs holds (one of slices); else as they are."""
    def outermost(names: Iterable[str]) -> str:
        first = {name.partition(".")[0] for name in names}
        return f"{first.pop()}." if len(first) == 1 else ""

    for mine, theirs in (("", ""), (outermost(own), ""), ("", outermost(weights))):
        renamed = {mine + name.removeprefix(theirs): value for name, value in weights.items()}
        if renamed.keys() & own.keys():
            return renamed
    return weights


def load_encoder(path: Path, encoder: Encoder, modality: Modality, sees: frozenset[str], minimum: float = 0.9) -> LoadReport:
    """Put a checkpoint's transferable encoder into `encoder`, of its own modality or of another whose shapes can be made fit.

    Refused (CheckpointError) when less than `minimum` of the encoder's weights are covered, or when the modality is the same,
    nothing had to be adapted and yet the reference embedding comes out different: swapped axes, another normalisation layer.
    """
    card, weights = read_card(path), read_weights(path)
    (kind, options), = card["recipe"]["modality"].items()
    prefix = card["transfer"]
    own = merged({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    wanted_patch = tuple(getattr(modality.options, "patch", ()))
    report = fit(encoder, own, (card["channels"], modality.channels), (tuple(options.get("patch", ())), wanted_patch))
    if report.coverage < minimum:
        where = "" if kind == modality.name else f" is of modality '{kind}', the recipe of '{modality.name}': it"
        raise CheckpointError(
            f"the checkpoint{where} covers only {report.coverage:.1%} of the encoder's weights ({report.line()})",
            f"Missing: {', '.join((report.missing + report.mismatched)[:4])} …. Use the checkpoint's own encoder settings"
            f"{'' if kind == modality.name else ', or a checkpoint pretrained on the same kind of data'}.")
    if kind != modality.name and "position" in sees:
        report.positions = _moved([(a["name"], a["unit"]) for a in card["axes"]], [(a.name, a.unit) for a in modality.axes])
    same = kind == modality.name and not report.adapted and not report.missing
    if same and card["reference"]["sees"] == sorted(sees):
        then = card["reference"]["embedding"]
        now = reference_embedding(encoder, modality, sees, tuple(card["reference"]["size"]))
        report.similarity = float(F.cosine_similarity(torch.tensor(now), torch.tensor(then), dim=0)) if len(now) == len(then) \
            else math.nan
        if not report.similarity >= 0.99:
            raise CheckpointError("the weights load, but the reference input is embedded differently "
                                  f"(cosine {report.similarity:.3f})",
                                  "Patch, axes or encoder settings differ from those of the checkpoint.")
    return report


def _moved(have: Sequence[tuple[str, str]], want: Sequence[tuple[str, str]]) -> str:
    """How axes (name, unit) differ; empty where they do not."""
    if len(have) != len(want):
        return f"{len(have)} -> {len(want)} axes"
    old, new = (", ".join(f"{name} in {unit}" for name, unit in axes) for axes in (have, want))
    return "" if old == new else f"{old} -> {new}"
