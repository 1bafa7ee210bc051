"""Encoders behind one contract."""

from meristem.platform.encoders.base import ENCODERS, Encoder, EncoderSettings
from meristem.platform.encoders.message_passing import MessagePassingSettings
from meristem.platform.encoders.monai import SegResNetSettings, SwinSettings
from meristem.platform.encoders.reader import ReaderSettings
from meristem.platform.encoders.sequence import SequenceSettings
from meristem.platform.encoders.slicewise import SlicewiseSettings
from meristem.platform.encoders.timm import TimmSettings
from meristem.platform.encoders.transformer import TransformerSettings
from meristem.platform.encoders.unet import UNetSettings

ENCODERS.update({
    "transformer": TransformerSettings,
    "unet": UNetSettings,
    "segresnet": SegResNetSettings,
    "swin": SwinSettings,
    "timm": TimmSettings,
    "slicewise": SlicewiseSettings,
    "sequence": SequenceSettings,
    "reader": ReaderSettings,
    "message_passing": MessagePassingSettings,
})

__all__ = ["ENCODERS", "Encoder", "EncoderSettings"]
