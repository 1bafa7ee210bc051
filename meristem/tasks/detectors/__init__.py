"""Heads that find boxes in feature maps."""
