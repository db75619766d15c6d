"""Which of a model's parameters are trained."""

from __future__ import annotations

from torch import nn

_KV = frozenset({"k_proj", "v_proj", "k_norm"})

TRAINABLE = {"all": None, "kv": _KV, "qkv": _KV | {"q_proj", "q_norm"}}
"""For each value of `trainer.trainable`, the modules whose parameters are trained; `None` for all."""


def freeze_all_but(model: nn.Module, trainable: str) -> None:
    """Takes the gradients away from the parameters that are not trained.

    Args:
        model: a Llama-shaped model, changed in place.
        trainable: a key of [`TRAINABLE`].
    """
    modules = TRAINABLE[trainable]
    if modules is None:
        return
    for name, parameter in model.named_parameters():
        module = name.split(".")[-2]  # such as `k_proj` of `model.layers.0.self_attn.k_proj.weight`
        parameter.requires_grad_(module in modules)
