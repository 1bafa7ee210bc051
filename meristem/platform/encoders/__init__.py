"""Encoders behind one contract."""

from meristem.platform.encoders.base import Encoder, EncoderSettings

ENCODERS: dict[str, type[EncoderSettings]] = {}

__all__ = ["ENCODERS", "Encoder", "EncoderSettings"]
