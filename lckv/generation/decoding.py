"""Decoding steps that are compiled once and then run without Python in between."""

from __future__ import annotations

import torch
from transformers import CompileConfig


def compile_config(device: torch.device) -> CompileConfig:
    """What makes transformers' `generate()` compile its decoding steps, given a static cache.

    On a GPU the compiled step is replayed as a CUDA graph. On a CPU, where transformers compiles only if told to, the
    gain lies in loops that are fused and calls that are saved. The first steps take a minute or so.
    """
    if device.type == "cuda":
        return CompileConfig(fullgraph=True, dynamic=False, mode="reduce-overhead")
    config = CompileConfig(fullgraph=True, dynamic=False, mode="default")
    config._compile_all_devices = True  # type: ignore[assignment]  # declared without a type
    return config
