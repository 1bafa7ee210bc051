"""Images and volumes in one run over one trunk, each predicting its pixels and its gradient map."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import torch
from resuming import goes_on_to_the_same_bits

import meristem
from meristem.errors import RecipeError
from meristem.modalities.base import View
from meristem.modalities.frame import Frame
from meristem.modalities.stream import LatticeStream
from meristem.platform import joint
from meristem.platform.assembly import Assembly, total
from meristem.platform.joint import JointAssembly
from meristem.platform.masked.gradient import Gradient, edges, sobel
from meristem.platform.objectives import Items
from meristem.platform.recipe import load, override, read
from meristem.platform.step import Batch, Step

TINY = ["encoder.transformer={width: 24, depth: 2, heads: 2}", "views.x={size: [16, 16]}"]
DECODER = "masked.predictor.decoder={depth: 1, width: 24, heads: 2}"
BOTH = [f"objectives.{line}.{DECODER}" for line in ("pixels", "gradient")]


def step(weight: torch.Tensor | None = None, *more: str) -> Step:
    assembly = Assembly(load("image/uni4eye", ["modality.image={channels: 2, patch: 4}", *TINY, *BOTH, *more]))
    rows = torch.arange(3)
    frame = Frame(torch.eye(3).repeat(3, 1, 1), (16, 16), torch.ones(3, 2), ("px", "px"))
    array = torch.randn(3, 2, 16, 16, generator=torch.Generator().manual_seed(4))
    return Step(assembly, Batch(Items(rows, rows), {"x": View("x", array, frame, rows, 0 * rows, weight=weight)}), 0.0, 0)


@pytest.mark.parametrize("shape", [(9,), (7, 8), (5, 6, 7)])
def test_the_gradient_map_is_scipys_sobel(shape: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    gain = 2 * 4 ** (len(shape) - 1)  # scipy's kernels are whole numbers
    expected = [[np.sqrt(sum((scipy.ndimage.sobel(c, axis, mode="nearest") / gain) ** 2 for axis in range(len(shape))))
                 for c in b] for b in x.numpy()]
    np.testing.assert_allclose(sobel(x).numpy(), expected, atol=1e-6)


def test_a_slope_has_its_own_steepness_in_any_direction() -> None:
    slope = torch.tensor([0.5, -2.0, 1.0])
    axes = torch.meshgrid(*(torch.arange(6.0) for _ in range(3)), indexing="ij")
    plane = sum(s * a for s, a in zip(slope, axes, strict=True))
    inside = sobel(plane[None, None])[0, 0, 1:-1, 1:-1, 1:-1]
    torch.testing.assert_close(inside, slope.norm().expand_as(inside))


@pytest.mark.parametrize("normalise", ["none", "token"])
def test_the_loss_is_a_loop_over_patches_of_the_map(normalise: str) -> None:
    at = step()
    index, weight = torch.tensor([[0, 5], [3, 4], [9, 15]]), torch.tensor([[1.0, 0.5], [0.0, 1.0], [1.0, 1.0]])
    prediction = torch.randn(3, 2, 32, generator=torch.Generator().manual_seed(1))
    found = Gradient(normalise=normalise).compare(at, "x", index, prediction, weight)
    image, loss, count = at.view("x").array.double().numpy(), 0.0, 0.0
    for b in range(3):
        edge = np.stack([np.hypot(*(scipy.ndimage.sobel(c, axis, mode="nearest") / 8 for axis in (0, 1))) for c in image[b]])
        for i in range(2):
            row, column = divmod(int(index[b, i]), 4)
            patch = edge[:, 4 * row:4 * row + 4, 4 * column:4 * column + 4].ravel()
            if normalise == "token":
                patch = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 1e-6)
            loss += float(weight[b, i]) * ((prediction[b, i].double().numpy() - patch) ** 2).sum()
            count += float(weight[b, i]) * 32
    assert float(found[0]) == pytest.approx(loss, rel=1e-5) and float(found[1]) == count


def test_the_rim_of_what_lies_outside_the_sample_is_no_edge() -> None:
    weight = torch.ones(3, 1, 16, 16)
    weight[:, :, :5] = 0
    stream = step(weight).stream("x")
    assert isinstance(stream, LatticeStream)
    counted = edges(stream).weight_array
    assert counted is not None and (counted[:, :, :6] == 0).all() and (counted[:, :, 6:] == 1).all()


def test_two_decoders_read_one_pass_and_only_the_hidden_places_count() -> None:
    at = step()
    losses = at.assembly(at.batch, 0.0)
    last = at.assembly.last_step
    assert last is not None and last.passes == ["encoder(x, plan)"] and set(losses) == {"pixels", "gradient"}
    assert losses["gradient"].count == losses["pixels"].count == 3 * 12 * 32
    total(losses).backward()
    decoders = [at.assembly.objectives[line].predictor for line in losses]
    assert all(p.grad is not None for decoder in decoders for p in decoder.parameters())
    assert not {id(p) for p in decoders[0].parameters()} & {id(p) for p in decoders[1].parameters()}


def test_points_have_no_gradient_map() -> None:
    with pytest.raises(RecipeError, match="takes the gradient of arrays, and points data are sets"):
        load("points/mae", ["objectives.points.masked.target={gradient: {}}"])


SMALL = ["encoder.transformer={width: 24, depth: 2, heads: 2}", "train.workers=0", "members.image.views.x.size=[16,16]",
         "members.volume.views.x.size=[16,16,16]",
         *(f"members.{m}.{line}" for m in ("image", "volume") for line in (*BOTH, "train.batch=2"))]


def test_images_and_volumes_share_all_but_their_patches_and_decoders() -> None:
    assembly = JointAssembly(joint.build(override(read("joint/uni4eye"), SMALL)))
    image, volume = (set(map(id, assembly.of(m).parameters())) for m in ("image", "volume"))
    own = {n.split(".")[0] + "." + n.split(".")[1] for n, p in assembly.of("volume").named_parameters() if id(p) not in image}
    assert own == {"encoder.embed", "objectives.pixels", "objectives.gradient"} and len(image & volume) > 20


def test_a_joint_run_resumes_to_the_same_bits(image_folder: Path, volume_folder: Path, tmp_path: Path) -> None:
    def run(out: Path, resume: bool) -> None:
        meristem.pretrain("joint/uni4eye", {"image": image_folder, "volume": volume_folder}, out,
                          [*SMALL, "train.steps=6", "train.checkpoint_every=3", "train.keep=3"], cache=tmp_path / "cache",
                          quiet=True, resume=resume)

    goes_on_to_the_same_bits(run, tmp_path, 3, 6)
