"""Text to blocks of tokens: sources, tokenizers, packing and the cache on disk.

Names are imported when they are first used, so that sources and packing can be used without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lckv.data.dataset import BlockDataset, TokenizedData, build_dataset, collate
    from lckv.data.sources import SOURCES, build_source
    from lckv.data.tokenizer import build_tokenizer

_MODULES = {
    "BlockDataset": "dataset",
    "TokenizedData": "dataset",
    "build_dataset": "dataset",
    "collate": "dataset",
    "SOURCES": "sources",
    "build_source": "sources",
    "build_tokenizer": "tokenizer",
}

__all__ = [
    "SOURCES",
    "BlockDataset",
    "TokenizedData",
    "build_dataset",
    "build_source",
    "build_tokenizer",
    "collate",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
