"""MONAI's backbones behind the encoder contract: SegResNet (Myronenko 2018) and the Swin transformer of Swin UNETR."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from meristem.modalities.base import Axis, Tokenizer
from meristem.platform.encoders.base import EncoderSettings
from meristem.platform.encoders.maps import MapEncoder
from meristem.platform.encoders.unet import dimensions


class SegResNetSettings(EncoderSettings):
    """width: channels of the first stage, a multiple of 8 (its group norm has 8 groups); each further stage doubles them.

    down, up: residual blocks of each stage on the way down and up; one fewer up.
    """

    width: int = 16
    down: tuple[int, ...] = (1, 2, 2, 4)
    up: tuple[int, ...] = (1, 1, 1)

    @property
    def takes(self) -> frozenset[str]:
        return frozenset({"replace"})

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"mean", "pyramid", "dense"})

    def build(self, tokenizer: Tokenizer, axes: tuple[Axis, ...], channels: int) -> SegResNetEncoder:
        return SegResNetEncoder(self, dimensions(axes), channels)


class SegResNetEncoder(MapEncoder):
    """`dense` is the output of SegResNet's decoder before its final convolution. The pyramid is the encoder's."""

    def __init__(self, settings: SegResNetSettings, dims: int, channels: int) -> None:
        from monai.networks.nets.segresnet import SegResNet  # importing monai takes seconds

        super().__init__()
        self.takes, self.provides = settings.takes, settings.provides
        self.net = SegResNet(dims, settings.width, channels, blocks_down=settings.down, blocks_up=settings.up,
                             use_conv_final=False)
        self.net.conv_final = nn.Identity()  # built even when unused
        levels = range(len(settings.down))
        self.pyramid_widths = tuple(settings.width << level for level in levels)
        self.pyramid_strides = tuple((1 << level,) * dims for level in levels)
        self.multiple = self.pyramid_strides[-1]
        self.width, self.dense_width = self.pyramid_widths[-1], settings.width

    def maps(self, x: Tensor, dense: bool) -> tuple[Sequence[Tensor], Tensor | None]:
        x, pyramid = self.net.encode(x)
        return pyramid, self.net.decode(x, pyramid[::-1]) if dense else None

    def units(self) -> list[nn.Module]:
        return [*self.net.down_layers, *self.net.up_layers]

    def layer_groups(self) -> list[list[nn.Parameter]]:
        down = [list(stage.parameters()) for stage in self.net.down_layers]
        up = [[*a.parameters(), *b.parameters()] for a, b in zip(self.net.up_samples, self.net.up_layers, strict=True)]
        return [[*self.net.convInit.parameters(), *down[0]], *down[1:], *up]


class SwinSettings(EncoderSettings):
    """width: channels after patch embedding, doubled by each of the four stages. patch, window: edges, of the net itself."""

    width: int = 24
    depths: tuple[int, int, int, int] = (2, 2, 2, 2)
    heads: tuple[int, int, int, int] = (3, 6, 12, 24)
    patch: int = 2
    window: int = 7
    drop_path: float = 0.0

    @property
    def takes(self) -> frozenset[str]:
        return frozenset({"replace"})

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"mean", "pyramid"})

    def build(self, tokenizer: Tokenizer, axes: tuple[Axis, ...], channels: int) -> SwinEncoder:
        return SwinEncoder(self, dimensions(axes), channels)


class SwinEncoder(MapEncoder):
    """Swin transformer (Liu et al. 2021; Hatamizadeh et al. 2022). Hidden elements are zeroed before its patch embedding.

    The pyramid has five levels: the embedded patches and the merged output of each stage, layer-normed.
    """

    def __init__(self, settings: SwinSettings, dims: int, channels: int) -> None:
        from monai.networks.nets.swin_unetr import SwinTransformer  # importing monai takes seconds

        super().__init__()
        self.takes, self.provides = settings.takes, settings.provides
        self.net = SwinTransformer(channels, settings.width, (settings.window,) * dims, (settings.patch,) * dims,
                                   settings.depths, settings.heads, drop_path_rate=settings.drop_path, spatial_dims=dims)
        self.pyramid_widths = tuple(settings.width << level for level in range(5))
        self.pyramid_strides = tuple((settings.patch << level,) * dims for level in range(5))
        self.multiple = (1,) * dims  # it pads each stage by itself
        self.width = self.pyramid_widths[-1]

    def maps(self, x: Tensor, dense: bool) -> tuple[Sequence[Tensor], Tensor | None]:
        return self.net(x), None

    def units(self) -> list[nn.Module]:
        return [layers[0] for layers in (self.net.layers1, self.net.layers2, self.net.layers3, self.net.layers4)]

    def layer_groups(self) -> list[list[nn.Parameter]]:
        parts = (self.net.patch_embed, self.net.layers1, self.net.layers2, self.net.layers3, self.net.layers4)
        return [list(part.parameters()) for part in parts]
