"""A 2D encoder on each slice of a 3D lattice: frames of a sequence, slices of a volume."""

from __future__ import annotations

import math
from typing import Annotated, Self

from torch import Tensor, nn

from meristem.errors import RecipeError
from meristem.modalities.base import Axis, Tokenizer
from meristem.modalities.frame import Frame
from meristem.modalities.stream import LatticeStream, TokenStream
from meristem.platform.encoders.base import ENCODERS, Encoder, EncoderSettings
from meristem.platform.encoders.transformer import TransformerSettings
from meristem.platform.objectives import Encoded, Plan
from meristem.platform.slots import Slot


class SlicewiseSettings(EncoderSettings):
    """encoder: of one slice. It sees of a slice what both its `sees` and this one's name; never where the slice lies."""

    encoder: Annotated[EncoderSettings, Slot("encoder", ENCODERS)] = TransformerSettings()

    @property
    def takes(self) -> frozenset[str]:
        return self.encoder.takes & {"replace"}  # slices may keep different numbers of tokens, which make no batch

    @property
    def provides(self) -> frozenset[str]:
        return self.encoder.provides - {"attention", "max", "sum"}  # no slice attends to another; summaries are means of them

    def detached(self) -> Self:
        return self.model_copy(update={"encoder": self.encoder.detached()})

    def build(self, tokenizer: Tokenizer, axes: tuple[Axis, ...], channels: int) -> Slicewise:
        patch: tuple[int, ...] = getattr(tokenizer, "patch", ())
        if len(axes) != 3 or len(patch) != 3:
            raise RecipeError(f"encoder: slicewise cuts 3D arrays into slices; the modality has {len(axes)} axes",
                              "Choose its encoder itself.")
        if patch[0] != 1:
            raise RecipeError(f"encoder: slicewise needs tokens that lie in one slice; the modality's patch is {list(patch)}",
                              f"Set the modality's patch to {[1, *patch[1:]]}.")
        return Slicewise(self, self.encoder.build(_Plane(tokenizer, patch[1:]), axes[1:], channels))


class _Plane(Tokenizer):
    """What a tokenizer of flat patches (1, *patch) is to one slice."""

    def __init__(self, tokenizer: Tokenizer, patch: tuple[int, ...]) -> None:
        super().__init__()
        self._whole, self.patch = tokenizer, patch
        self.mask_unit, self.token_size = tokenizer.mask_unit[1:], tokenizer.token_size

    def embedding(self, width: int) -> nn.Module:
        return self._whole.embedding(width)


class Slicewise(Encoder):
    """Encodes the slices (B·T, C, H, W) of arrays (B, C, T, H, W) as if they were samples, and joins what comes out.

    Tokens, layers and lattice: slices outermost, (T', h, w) in raster order. Summaries are means over slices. Pyramid and
    dense maps get their first axis back, at stride 1. inner: the encoder of one slice.
    """

    def __init__(self, settings: SlicewiseSettings, inner: Encoder) -> None:
        super().__init__()
        self.takes, self.provides = settings.takes, settings.provides
        self.inner, self.sees = inner, settings.encoder.sees
        self.width, self.depth, self.dense_width = inner.width, inner.depth, inner.dense_width
        self.mask_unit = (1, *inner.mask_unit) if inner.mask_unit else ()
        self.pyramid_widths = inner.pyramid_widths
        self.pyramid_strides = tuple((1, *strides) for strides in inner.pyramid_strides)

    def forward(self, stream: TokenStream, plan: Plan | None = None, *, want: frozenset[str] = frozenset()) -> Encoded:
        if not isinstance(stream, LatticeStream):
            raise RecipeError("encoder: slicewise needs arrays, and this modality's tokens are not cut from one",
                              "Choose encoder: transformer.")
        assert stream.lattice is not None
        b, t = len(stream.array), stream.lattice[0]

        def each(x: Tensor) -> Tensor:
            """(B, T·n, …) to (B·T, n, …)."""
            return x.reshape(b * t, -1, *x.shape[2:])

        slices = slices_of(stream).seen(self.sees)
        flat = None if plan is None else Plan(each(plan.hidden), each(plan.predict))
        encoded: Encoded = self.inner(slices, flat, want=want - {"attention"})
        assert encoded.lattice is not None

        def tokens(x: Tensor) -> Tensor:
            """(B·T, n, …) to (B, T·n, …)."""
            return x.reshape(b, -1, *x.shape[2:])

        def stack(x: Tensor) -> Tensor:
            """Maps (B·T, D, *S) to (B, D, T, *S)."""
            return x.unflatten(0, (b, t)).transpose(1, 2)

        means = {name: x.reshape(b, t, -1).mean(1) for name, x in encoded.summary.items() if name in self.provides}
        return Encoded(tokens(encoded.tokens), means,
                       tokens(encoded.valid), lattice=(t, *encoded.lattice),
                       pyramid=None if encoded.pyramid is None else [stack(x) for x in encoded.pyramid],
                       dense=None if encoded.dense is None else stack(encoded.dense),
                       layers=None if encoded.layers is None else [tokens(x) for x in encoded.layers])

    def grid(self, size: tuple[int, ...], patch: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        lattice, cell = self.inner.grid(size[1:], patch[1:])
        return (size[0], *lattice), (1, *cell)

    def layer_groups(self) -> list[list[nn.Parameter]]:
        return self.inner.layer_groups()


def slices_of(stream: LatticeStream) -> LatticeStream:
    """The slices along the first axis as samples of their own: (B·T, C, H, W), and nothing of where they lie in the source."""
    t = stream.array.shape[2]

    def rows(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(0, 1)

    frame = stream.frame
    if frame is not None:
        spacing = frame.spacing[:, 1:].repeat_interleave(t, 0)
        affine = nn.functional.pad(spacing, (0, 1), value=1).diag_embed()
        frame = Frame(affine, frame.shape[1:], spacing, frame.unit[1:])
    assert stream.lattice is not None
    n = math.prod(stream.lattice[1:])
    return LatticeStream(rows(stream.array), stream.patch[1:], frame,
                         None if stream.item is None else stream.item.repeat_interleave(t),
                         None if stream.weight_array is None else rows(stream.weight_array),
                         {name: x.reshape(-1, n, *x.shape[2:]) for name, x in stream.aux.items()})
