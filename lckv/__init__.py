"""Train, compare and serve decoders that share keys and values across layers."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

__all__ = ["LCKVLlamaConfig", "LCKVLlamaForCausalLM", "LCKVLlamaModel", "__version__"]


def __getattr__(name: str) -> Any:
    """Imports the models, and torch with them, only when one of their names is asked for."""
    if name.startswith("LCKV") and name in __all__:
        return getattr(importlib.import_module("lckv.models"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
