"""timm's 2D backbones behind the encoder contract: vision transformers with masking, and convolutional nets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import field_validator
from torch import Tensor, nn

from meristem.errors import CheckpointError, RecipeError
from meristem.modalities.base import Axis, Tokenizer
from meristem.modalities.stream import LatticeStream, TokenStream
from meristem.platform.encoders.base import Encoder, EncoderSettings
from meristem.platform.encoders.maps import MapEncoder
from meristem.platform.objectives import Encoded, Plan


@cache
def _skeleton(model: str) -> Any:
    """The model without memory for its weights: enough to tell what it is."""
    import timm

    with torch.device("meta"):
        return timm.create_model(model, num_classes=0)


def _is_vit(model: str) -> bool:
    from timm.models.vision_transformer import VisionTransformer

    return isinstance(_skeleton(model), VisionTransformer)


def patch_of(model: str) -> tuple[int, ...]:
    """The patch of a vision transformer. Raises RecipeError for any other model."""
    if not _is_vit(model):
        raise RecipeError(f"timm's '{model}' is no vision transformer", "Choose a vit_*.")
    return tuple(_skeleton(model).patch_embed.feat_ratio(as_scalar=False))


class TimmSettings(EncoderSettings):
    """model: timm's name. pretrained: a local file of timm weights, or false.

    size: image size (height, width) that learned positions are stored for, null for the model's own; other view sizes are
    interpolated. drop_path: stochastic depth.
    """

    model: str = "vit_small_patch16_224"
    pretrained: Path | Literal[False] = False
    size: tuple[int, int] | None = None
    drop_path: float = 0.0

    @field_validator("model")
    @classmethod
    def _known(cls, name: str) -> str:
        import timm

        if not timm.is_model(name):
            near = get_close_matches(name, timm.list_models())
            raise ValueError(f"timm has no model '{name}'" + (f"; did you mean {' or '.join(near)}?" if near else ""))
        return name

    @property
    def takes(self) -> frozenset[str]:
        return frozenset({"drop", "replace"}) if _is_vit(self.model) else frozenset({"replace"})

    @property
    def provides(self) -> frozenset[str]:
        if not _is_vit(self.model):
            return frozenset({"mean", "pyramid"})
        net = _skeleton(self.model)
        return frozenset({"mean", "layers"} | ({"cls"} if net.has_class_token else set())
                         | ({"attention"} if hasattr(getattr(net.blocks[-1], "attn", None), "qkv") else set()))

    def detached(self) -> Self:
        return self.model_copy(update={"pretrained": False})

    def build(self, tokenizer: Tokenizer, axes: tuple[Axis, ...], channels: int) -> Encoder:
        if len(axes) != 2:
            raise RecipeError(f"timm's '{self.model}' works on 2D images; the modality has {len(axes)} axes",
                              "Choose encoder: transformer, unet, segresnet or swin.")
        return TimmViT(self, tokenizer, channels) if _is_vit(self.model) else TimmPyramid(self, channels)

    def create(self, channels: int, **options: Any) -> Any:
        """timm's model with its weights, adapted by timm to the channels and size. Raises CheckpointError."""
        import timm

        options |= {"in_chans": channels, "drop_path_rate": self.drop_path, "num_classes": 0}
        if not self.pretrained:
            return timm.create_model(self.model, **options)
        if not self.pretrained.is_file():
            raise CheckpointError(f"no weights file {self.pretrained}", "Give a local file, or encoder.pretrained=false.")
        try:
            weights = timm.models.load_state_dict(str(self.pretrained), weights_only=True)
            classifier = timm.get_pretrained_cfg(self.model).classifier or ()
            heads = tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier))
            # timm leaves strict loading, and with it every warning that nothing fitted, as soon as it drops a classifier itself
            overlay = {"state_dict": {k: v for k, v in weights.items() if not k.startswith(heads)}, "classifier": None}
            net = timm.create_model(self.model, pretrained=True, pretrained_cfg_overlay=overlay, **options)
        except (RuntimeError, KeyError) as error:
            raise CheckpointError(f"{self.pretrained} does not fit '{self.model}': {error}",
                                  "Give weights saved from this model, as safetensors or a plain state dict.") from None
        net.pretrained_cfg.pop("state_dict")
        return net


class TimmViT(Encoder):
    """A timm vision transformer: learned positions are added to all embedded patches, then `drop` keeps the visible ones.

    `replace` puts a learned token before positions are added. `layers` leave class and register tokens out; `attention` holds
    them first.
    """

    def __init__(self, settings: TimmSettings, tokenizer: Tokenizer, channels: int) -> None:
        super().__init__()
        self.takes, self.provides = settings.takes, settings.provides
        options = {} if settings.size is None else {"img_size": settings.size}
        self.net = settings.create(channels, dynamic_img_size=True, **options)
        self.net.attn_pool = None  # pooling belongs to the tasks
        self.patch: tuple[int, ...] = tuple(self.net.patch_embed.feat_ratio(as_scalar=False))
        if tokenizer.token_size != channels * math.prod(self.patch):
            self._refuse(settings.model, f"{tokenizer.token_size} values")
        self.width, self.depth = self.net.embed_dim, len(self.net.blocks)
        self.mask_token = nn.Parameter(torch.randn(self.width) * 0.02)
        self.name = settings.model

    def _refuse(self, model: str, given: str) -> None:
        raise RecipeError(f"timm's '{model}' has patches of {self.patch} pixels, the modality's tokens hold {given}",
                          f"Set the modality's patch to {list(self.patch)}, or choose a model with its patch.")

    def forward(self, stream: TokenStream, plan: Plan | None = None, *, want: frozenset[str] = frozenset()) -> Encoded:
        assert isinstance(stream, LatticeStream) and stream.lattice is not None
        if stream.patch != self.patch:
            self._refuse(self.name, f"patches of {stream.patch}")
        net, (h, w) = self.net, stream.lattice
        keep = None if plan is None else plan.keep
        x = net.patch_embed(stream.array[..., :h * self.patch[0], :w * self.patch[1]])
        if plan is not None and keep is None:
            x = torch.where(plan.hidden.reshape(-1, h, w, 1), self.mask_token.to(x.dtype), x)
        x, prefix = net._pos_embed(x), net.num_prefix_tokens
        if keep is not None:
            rows = torch.arange(len(x), device=x.device)[:, None]
            x = torch.cat([x[:, :prefix], x[rows, keep + prefix]], 1)
        x = net.norm_pre(x)
        layers, attention = [], None
        for i, block in enumerate(net.blocks):
            if "attention" in want and i == len(net.blocks) - 1:
                attention = _attention(block, x)
            x = block(x)
            if "layers" in want:
                layers.append(x[:, prefix:])
        x = net.norm(x)
        tokens = x[:, prefix:]
        summary = {"cls": x[:, 0]} if net.has_class_token else {}
        summary["mean"] = net.fc_norm(tokens.mean(1))  # the norm that mean-pooled models have after the pooling
        return Encoded(tokens, summary, torch.ones(tokens.shape[:2], dtype=torch.bool, device=x.device), index=keep,
                       lattice=stream.lattice, layers=layers if "layers" in want else None, attention=attention)

    def units(self) -> list[nn.Module]:
        return list(self.net.blocks[:-1])  # the last one's weights are also read for its attention

    def layer_groups(self) -> list[list[nn.Parameter]]:
        blocks = [list(block.parameters()) for block in self.net.blocks]
        blocks[-1] += [*self.net.norm.parameters(), *self.net.fc_norm.parameters()]
        later = {id(p) for block in blocks for p in block}
        return [[p for p in self.parameters() if id(p) not in later], *blocks]


def _attention(block: Any, x: Tensor) -> Tensor:
    """Attention weights (B, H, N, N) of a block given its input; its fused attention does not return them."""
    attn = block.attn
    q, k, _ = attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    weights: Tensor = ((attn.q_norm(q) * attn.scale) @ attn.k_norm(k).transpose(-2, -1)).softmax(-1)
    return weights


class TimmPyramid(MapEncoder):
    """A timm net with a pyramid of maps of falling resolution (ResNet, ConvNeXt, …). Raises RecipeError for others."""

    def __init__(self, settings: TimmSettings, channels: int) -> None:
        super().__init__()
        self.takes, self.provides = settings.takes, settings.provides
        self.net = settings.create(channels, features_only=True)
        info = self.net.feature_info
        reductions = info.reduction()
        if sorted(set(reductions)) != reductions or str(getattr(self.net, "output_fmt", "NCHW")).endswith("NHWC"):
            raise RecipeError(f"timm's '{settings.model}' has no pyramid of maps", "Choose a vit_*, resnet* or convnext*.")
        self.pyramid_widths = tuple(info.channels())
        self.pyramid_strides = tuple((r, r) for r in reductions)
        self.width, self.multiple = self.pyramid_widths[-1], self.pyramid_strides[-1]
        self._ends = {name.replace(".", "_") for name in info.module_name()}  # as its own flat modules are called

    def maps(self, x: Tensor, dense: bool) -> tuple[Sequence[Tensor], Tensor | None]:
        return self.net(x), None

    def layer_groups(self) -> list[list[nn.Parameter]]:
        groups: list[list[nn.Parameter]] = [[]]
        for name, child in self.net.named_children():
            groups[-1] += child.parameters()
            if name in self._ends:
                groups.append([])
        return [group for group in groups if group]
