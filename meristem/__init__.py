"""Meristem: self-supervised pretraining where labels are scarce. The verbs of the command line are functions here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meristem.api import (
        adopt,
        bench,
        check_data,
        embed,
        evaluate,
        export,
        finetune,
        predict,
        pretrain,
        recipe_names,
        report,
        shard_data,
        show_recipe,
    )

__all__ = ["adopt", "bench", "check_data", "embed", "evaluate", "export", "finetune", "predict", "pretrain", "recipe_names",
           "report", "shard_data", "show_recipe"]


def __getattr__(name: str) -> Any:
    """The verbs import torch, so they load on first use."""
    if name in __all__:
        from meristem import api
        return getattr(api, name)
    raise AttributeError(f"module 'meristem' has no attribute '{name}'")
