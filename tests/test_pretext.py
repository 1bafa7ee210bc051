"""Pretexts: classifying what was drawn, and nothing but the view to tell it from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from meristem.errors import RecipeError
from meristem.modalities.base import View
from meristem.modalities.frame import Frame
from meristem.platform.assembly import Assembly, total
from meristem.platform.objectives import Items
from meristem.platform.recipe import load
from meristem.platform.step import Batch

TINY = ("encoder.transformer.width=32", "encoder.transformer.depth=1", "encoder.transformer.heads=2", "masking=null",
        "modality.image.patch=[4, 4]", "modality.image.channels=1", "views.x.size=[8, 8]", "objectives.pixels=null",
        "objectives={turn: {pretext: {view: x, label: turn, classes: 4, level: mean}}}")


def assemble(*more: str) -> Assembly:
    torch.manual_seed(0)
    return Assembly(load("image/mae", [*TINY, *more]))


def shaded(n: int, seed: int) -> torch.Tensor:
    """Arrays (n, 1, 8, 8) of noise, brighter at the top: whoever turns them can be found out."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 8, 8, generator=g) + 3 * torch.linspace(1, -1, 8)[:, None]


def noise(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def batch(array: torch.Tensor, seed: int, leak: bool = True) -> Batch:
    """Arrays turned by a drawn number of right angles; where each element came from is told by the frame, and only there."""
    n, g = len(array), torch.Generator().manual_seed(seed)
    turn = torch.randint(0, 4, (n,), generator=g)
    turned = torch.stack([x.rot90(int(k), (1, 2)) for x, k in zip(array, turn, strict=True)])
    angle = turn * torch.pi / 2
    affine = torch.eye(3).repeat(n, 1, 1)
    if leak:
        affine[:, :2, :2] = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).unflatten(1, (2, 2))
    view = View("x", turned, Frame(affine, (8, 8), torch.ones(n, 2), ("px", "px")), torch.arange(n), torch.zeros(n).long(),
                {"turn": turn, "angle": angle})
    return Batch(Items(torch.arange(n), torch.arange(n)), {"x": view})


def accuracy_after_training(draw) -> float:  # type: ignore[no-untyped-def]
    """On samples that training did not meet."""
    assembly = assemble()
    optimiser = torch.optim.AdamW(assembly.parameters(), lr=3e-3)
    for step in range(60):
        optimiser.zero_grad()
        total(assembly(batch(draw(64, 10 + step), step), 0.0)).backward()
        optimiser.step()
        assembly.after(0.0)
    with torch.no_grad():
        losses = assembly.eval()(batch(draw(400, 1), 1), 0.0)
    return 1 - float(losses["turn.error"].total / losses["turn.error"].count)


def test_a_turn_is_told_from_shaded_arrays_and_by_chance_from_noise() -> None:
    """Though every stream knows the turn from its source positions, no encoder sees them."""
    assert accuracy_after_training(shaded) > 0.9
    assert abs(accuracy_after_training(noise) - 0.25) < 4 * (0.25 * 0.75 / 400) ** 0.5


def test_source_positions_and_drawn_numbers_do_not_reach_the_encoder() -> None:
    assembly = assemble().eval()
    plain, other = batch(shaded(6, 0), 3), batch(shaded(6, 0), 3, leak=False)
    view = other.views["x"]
    other.views["x"] = replace(view, params={"turn": view.params["turn"], "angle": torch.randn(6)}, item=view.item.clone())
    stream = assembly.tokenizer.stream(plain.views["x"])
    assert not torch.equal(stream.source, assembly.tokenizer.stream(view).source)  # the test can fail
    for name, loss in assembly(plain, 0.0).items():
        assert torch.equal(torch.as_tensor(loss.total), torch.as_tensor(assembly(other, 0.0)[name].total))


@pytest.mark.parametrize("level", ["mean", "cls", "global"])
def test_the_loss_is_cross_entropy_and_the_error_does_not_train(level: str) -> None:
    line = "objectives.turn.pretext"
    assembly = assemble(f"{line}.level={level}", f"{line}.weight=0.5", f"{line}.head=hidden",
                        "heads={hidden: {mlp: {layers: 1, out: 7, norm: none}}}")
    made = batch(shaded(6, 0), 3)
    losses = assembly(made, 0.0)
    assert list(losses) == ["turn", "turn.error"]
    step = assembly.last_step
    assert step is not None and step.passes == ["encoder(x)"]
    z = step.encode("x").summary["mean" if level == "mean" else "cls"]
    logits = assembly.objectives["turn"].classifier(assembly.heads["hidden"].layers(z))
    target = made.views["x"].params["turn"]
    assert losses["turn"].weight == 0.5 and losses["turn"].count == 6
    torch.testing.assert_close(losses["turn"].total, 6 * F.cross_entropy(logits, target))
    assert float(losses["turn.error"].total) == int((logits.argmax(1) != target).sum())
    torch.testing.assert_close(total(losses), 0.5 * F.cross_entropy(logits, target))
    total(losses).backward()
    assert assembly.objectives["turn"].classifier.weight.grad is not None


@pytest.mark.parametrize(("change", "says"), [
    ("objectives.turn.pretext.view=y", "there is no view 'y' (views: x)"),
    ("objectives.turn.pretext.head=h", "there is no head 'h' (heads: none)"),
    ("objectives.turn.pretext.classes=1", "greater than or equal to 2"),
    ("objectives.turn.pretext.lable=turn", "did you mean label"),
])
def test_what_cannot_be_is_refused_with_the_reason(change: str, says: str) -> None:
    with pytest.raises(RecipeError) as error:
        load("image/mae", [*TINY, change])
    assert says in str(error.value)


def test_a_class_token_is_needed_to_classify_it() -> None:
    with pytest.raises(RecipeError, match="needs an encoder with a class token"):
        load("image/mae", [*TINY, "objectives.turn.pretext.level=cls", "encoder.transformer.cls=false"])


@pytest.mark.parametrize(("changes", "labels", "says"), [
    (("label=speed",), None, "draws no 'speed' for a pretext\n  It draws turn."),
    (("label=angle",), None, "draws no 'angle'"),
    (("classes=3",), [0, 1, 3, 2], "drew turn 3, and the pretext has 3 classes\n  Classes are numbered from 0: "
                                   "set classes to at least 4."),
    ((), [0, -1, 2, 1], "drew turn -1, and the pretext has 4 classes"),
])
def test_a_label_that_is_missing_or_out_of_range_is_said(changes: tuple[str, ...], labels: list[int] | None, says: str) -> None:
    assembly = assemble(*(f"objectives.turn.pretext.{change}" for change in changes))
    made = batch(noise(4, 0), 0)
    if labels is not None:
        made.views["x"].params["turn"] = torch.tensor(labels)
    with pytest.raises(RecipeError) as error:
        assembly(made, 0.0)
    assert says in str(error.value)


def test_a_view_that_draws_nothing_is_named() -> None:
    made = batch(noise(4, 0), 0)
    del made.views["x"].params["turn"]
    with pytest.raises(RecipeError, match=r"draws no 'turn'(.|\n)*Set an option of views\.x"):
        assemble()(made, 0.0)
