"""Decoding steps that are compiled once and then run without Python in between."""

from __future__ import annotations

import torch
from transformers import CompileConfig


def compile_config(device: torch.device) -> CompileConfig:
    """What makes transformers' `generate()` compile its decoding steps, given a static cache.

    On a GPU the compiled step is replayed as a CUDA graph. On a CPU, where transformers compiles only if told to, the
    gain lies in loops that are fused and calls that are saved. The first steps take a minute or so. Afterwards the
    model must stay as it is (its settings and types, not the values of its weights): to look at all of its modules
    before every token, as torch otherwise does, takes a CPU as long as a layer.
    """
    if device.type == "cuda":
        return CompileConfig(fullgraph=True, dynamic=False, mode="reduce-overhead")
    options = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    config = CompileConfig(fullgraph=True, dynamic=False, mode=None, options=options)  # type: ignore[arg-type]
    config._compile_all_devices = True  # type: ignore[assignment]  # declared without a type
    return config
