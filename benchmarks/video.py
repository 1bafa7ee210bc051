"""Clips: reading them, embedding them, and waiting for them. Lines of `compare`, and of what is no comparison.

    python benchmarks/video.py [--data FOLDER] [--repeats 5] [--steps 20]

clips: clips/s from files to normalised floats on one core: a view as `video/videomae` draws it (its recipe's size), and the 15
views of a 5 × 3 test. `plain` opens the file with PyAV once for each view, decodes from the start to its last frame, and cuts
and resizes each frame with Pillow; `file` and `decoded` are the loader's ways (modality.video.store). All show the same frames.
embedding, step: forward and backward of VideoMAE with 0.9 of the tubelets hidden, against the straightforward way, which
embeds all of them by a Conv3d and then drops; same weights, same loss.
wait: the share of a short run of `video/videomae` that is spent waiting for data, with one worker.

--data: a folder of films; without it, made ones of two seconds.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import av
import numpy as np
import torch
from compare import compare
from PIL import Image
from timing import turns
from torch import Tensor

import meristem
from meristem.modalities.base import Draw, Look, View, ViewSettings
from meristem.modalities.frame import Frame
from meristem.modalities.rng import Rng
from meristem.modalities.stream import LatticeStream, TokenStream, gather
from meristem.platform import recipe as recipes
from meristem.platform.assembly import Assembly
from meristem.platform.data.cache import Cache
from meristem.platform.data.loader import whole
from meristem.platform.data.manifest import Manifest, Row
from meristem.platform.encoders.transformer import Transformer
from meristem.platform.objectives import Encoded, Items, Plan
from meristem.platform.recipe import Recipe
from meristem.platform.step import Batch

FILMS, SHAPE = 16, (50, 240, 320)  # made
RESIZE = 144  # short side of the decoded store, as configs/video/base.yaml proposes
SIZE, BATCH = (16, 224, 224), 2  # of the embedding


def made(folder: Path) -> Path:
    """Films of a smooth picture that drifts."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    frames, rows, columns = SHAPE
    for i in range(FILMS):
        coarse = Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
        picture = np.asarray(coarse.resize((columns + 2 * frames, rows + frames), Image.Resampling.BICUBIC))
        with av.open(str(folder / f"{i:02d}.mp4"), "w") as container:
            stream = container.add_stream("libx264", 25)
            stream.width, stream.height, stream.pix_fmt = columns, rows, "yuv420p"
            for t in range(frames):
                frame = np.ascontiguousarray(picture[t:t + rows, 2 * t:2 * t + columns])
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
            container.mux(stream.encode())
    return folder


# ---- reading

def plain(row: Row, draw: Draw) -> Tensor:
    """(3, *shape): one view by PyAV and Pillow."""
    wanted, (top, left), (height, width) = set(draw.index), draw.start[1:], draw.size[1:]
    pictures = {}
    with av.open(str(row.paths[0])) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        for i, frame in enumerate(container.decode(stream)):
            if i in wanted:
                cut = frame.to_image().crop((left, top, left + width, top + height))
                pictures[i] = np.asarray(cut.resize(draw.shape[:0:-1], Image.Resampling.BILINEAR))
            if i == max(wanted):
                break
    return torch.from_numpy(np.stack([pictures[i] for i in draw.index])).permute(3, 0, 1, 2)


def plain_views(cache: Cache, rows: Sequence[Row], recipe: Recipe, test: bool) -> Tensor:
    settings, modality = view_settings(recipe, test), recipe.modality
    views, draws = [], []
    for i, row in enumerate(rows):
        for n in range(settings.count):
            draws.append(modality.draw(settings, cache.header(row.index), Look(0, i, n, "x")))
            views.append(plain(row, draws[-1]))
    x = torch.stack(views).float()
    for name in ("scale", "offset"):
        values = torch.tensor([getattr(cache.header(row.index), name) for row in rows]).repeat_interleave(settings.count, 0)
        x = x * values[..., None, None, None] if name == "scale" else x + values[..., None, None, None]
    for i, draw in enumerate(draws):
        if "flip" in draw.params and draw.params["flip"][2]:
            x[i] = x[i].flip(-1)
    return x


def view_settings(recipe: Recipe, test: bool) -> ViewSettings:
    view = recipe.views["x"]
    return view.model_copy(update={"clips": 5, "crops": 3}).plain() if test else view


def our_views(cache: Cache, rows: Sequence[Row], recipe: Recipe, test: bool) -> Tensor:
    settings = view_settings(recipe, test)
    return recipe.modality.augment(whole(cache, rows, recipe.modality, settings), settings).array


def clips(data: Path, home: Path, repeats: int, films: int) -> None:
    stores = {"file": [], "decoded": ["modality.video.store=decoded", f"modality.video.resize={RESIZE}"]}
    ours = {name: recipes.load("video/videomae", changes) for name, changes in stores.items()}
    manifest = Manifest.discover(data, ours["file"].modality)
    caches = {name: Cache.build(manifest, recipe.modality, home) for name, recipe in ours.items()}
    common = [row for row in manifest.rows if all(row.index in cache for cache in caches.values())]
    rows = common[::max(len(common) // films, 1)][:films]
    for test in (False, True):
        jobs: list[Callable[[], Tensor]] = [lambda t=test: plain_views(caches["file"], rows, ours["file"], t)]
        jobs += [lambda n=name, t=test: our_views(caches[n], rows, ours[n], t) for name in ours]
        expected, got = jobs[0](), jobs[1]()
        taken = dict(zip(("plain", *ours), turns(jobs, repeats), strict=True))
        header = caches["file"].header(rows[0].index)
        difference = round(float((expected - got).abs().mean() / np.mean(header.scale)), 3)
        for name in ours:
            views = "5 × 3 test views" if test else "one view"
            compare(f"reading {views}, store: {name}", "PyAV and Pillow, whole file", "s / 1,000 clips",
                    *([1e3 * t / len(expected) for t in taken[who]] for who in (name, "plain")), films=len(rows),
                    frames=list(header.shape[1:]), size=list(ours["file"].views["x"].size),
                    **({"mean_difference_of_255": difference} if name == "file" else {}))


# ---- embedding

class EmbedsAll(Transformer):
    """Every tubelet by a Conv3d, then those that are kept (as MCG-NJU/VideoMAE does)."""

    def embedded(self, stream: LatticeStream, plan: Plan) -> Tensor:
        weight = self.embed.linear.weight.unflatten(1, (stream.array.shape[1], *stream.patch))
        tokens = torch.nn.functional.conv3d(stream.array, weight, self.embed.linear.bias, stride=stream.patch)
        return gather(tokens.flatten(2).transpose(1, 2), plan.keep)

    def forward(self, stream: TokenStream, plan: Plan | None = None, *, want: frozenset[str] = frozenset()) -> Encoded:
        assert isinstance(stream, LatticeStream)
        assert plan is not None
        x = torch.cat([self.cls.expand(len(stream.array), -1, -1), self.embedded(stream, plan)], 1)
        position = gather(stream.position, plan.keep)
        x, *_ = self.blocks(x, position, 1, None, want)
        return Encoded(x[:, 1:], {"cls": x[:, 0], "mean": x[:, 1:].mean(1)}, gather(stream.valid, plan.keep), index=plan.keep,
                       lattice=stream.lattice)


def embedding(size: str, repeats: int) -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe = recipes.load("video/videomae", [f"encoder.transformer.size={size}", f"views.x.size={list(SIZE)}"])
    ours = Assembly(recipe).to(device)
    straight = copy.deepcopy(ours)
    straight.encoder = EmbedsAll(recipe.encoder, straight.tokenizer, recipe.modality.axes).to(device)
    straight.encoder.load_state_dict(ours.encoder.state_dict())
    frame = Frame(torch.eye(4).repeat(BATCH, 1, 1), SIZE, torch.tensor([[0.125, 1.0, 1.0]]).repeat(BATCH, 1), ("s", "px", "px"))
    items = torch.arange(BATCH)
    view = View("x", torch.randn(BATCH, 3, *SIZE), frame, items, torch.zeros_like(items))
    batch = Batch(Items(items, items), {"x": view}).to(device)
    losses = {}

    def step(assembly: Assembly, name: str) -> None:
        assembly.zero_grad()
        loss, = assembly(batch, 0.5).values()
        (loss.total / loss.count).backward()
        losses[name] = (loss.total.detach() / loss.count).item()

    stream = ours.tokenizer.stream(batch.views["x"])
    plan = recipe.masking["x"].plan(stream, Rng.of(0, items.to(device)), ours.encoder.mask_unit)

    def embed_ours() -> None:
        ours.encoder.embed(stream.with_array(stream.array).take(plan.keep)).sum().backward()

    def embed_all() -> None:
        straight.encoder.embedded(stream, plan).sum().backward()

    about = {"encoder": size, "size": list(SIZE), "batch": BATCH, "tubelets": len(stream), "visible": plan.keep.shape[1],
             "device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "threads": torch.get_num_threads()}
    for what, jobs in (("embedding", (embed_all, embed_ours)),
                       ("step", (lambda: step(straight, "all"), lambda: step(ours, "visible")))):
        every, visible = ([1e3 * t for t in taken] for taken in turns(jobs, repeats))
        same = {"losses": {name: round(loss, 6) for name, loss in losses.items()}} if what == "step" else {}
        compare(f"VideoMAE's {what}", "all tubelets embedded", "ms", visible, every, **about, **same)


# ---- waiting

def wait(data: Path, home: Path, steps: int) -> None:
    for name, changes in (("file", []), ("decoded", ["modality.video.store=decoded", f"modality.video.resize={RESIZE}"])):
        out = home / f"run-{name}"
        meristem.pretrain("video/videomae", data, out, [f"train.steps={5 + steps}", "train.log_every=5", "train.batch=8",
                                                        "train.workers=1", *changes], cache=home, quiet=True)
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][1:]  # the first warms up
        mean = {key: float(np.mean([record[key] for record in records])) for key in ("samples_per_s", "data_wait")}
        print(json.dumps({"benchmark": "video wait", "store": name, "steps": steps, "batch": 8, "workers": 1,
                          "threads": torch.get_num_threads(), "clips_per_s": round(mean["samples_per_s"], 1),
                          "data_wait": round(mean["data_wait"], 4)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder of films (default: made ones)")
    parser.add_argument("--films", type=int, default=FILMS, help="how many of them are read in one pass")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", default="small", help="of the encoder that is embedded for")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        data = options.data or made(home / "films")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # a loader's worker has one
        clips(data, home / "cache", options.repeats, options.films)
        torch.set_num_threads(threads)
        embedding(options.size, options.repeats)
        wait(data, home / "cache", options.steps)


if __name__ == "__main__":
    main()
