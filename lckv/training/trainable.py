"""Which of a model's parameters are trained."""

from __future__ import annotations

from torch import nn

TRAINABLE = {"all": (), "kv": ("stream_modules",), "qkv": ("stream_modules", "query_modules")}
"""For each value of `trainer.trainable`, which submodules of attention are trained, as it names them; () for all."""


def freeze_all_but(model: nn.Module, trainable: str) -> None:
    """Takes the gradients away from the parameters that are not trained.

    Args:
        model: a Llama-shaped model, changed in place.
        trainable: a key of [`TRAINABLE`].
    """
    parts = TRAINABLE[trainable]
    if not parts:
        return
    model.requires_grad_(False)
    for attention in model.modules():
        for part in parts:
            for name in getattr(attention, part, ()):  # only an attention has any
                if hasattr(attention, name):
                    getattr(attention, name).requires_grad_(True)
