"""torch.compile, one decoder layer at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

# Layers of one shape share their graphs, but a cycle calls them in some ten ways: with and without gradient, with
# nothing to read yet, only to write. torch gives up at eight.
_NUM_VARIANTS = 24


def compile_layers(model: nn.Module, backend: str, mode: str | None) -> None:
    """Compiles every decoder layer of the model for itself.

    As one graph, a cycle would be compiled as many times over as it has passes: minutes for a model of five layers.

    Args:
        model: a transformers model; changed in place, its parameters and their names stay.
        backend: torch.compile's backend.
        mode: torch.compile's mode.
    """
    limit: Any = torch._dynamo.config
    limit.recompile_limit = max(limit.recompile_limit, _NUM_VARIANTS)
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.compile(backend=backend, mode=mode)
