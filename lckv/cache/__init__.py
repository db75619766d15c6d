"""Caches of keys and values (KV) that keep what the sharing pattern says must be kept, and no more."""

from lckv.cache.base import CACHES, KVCache, KVLayer, build_cache
from lckv.cache.dynamic import DynamicKVCache
from lckv.cache.saving import load_cache, save_cache
from lckv.cache.sink import SinkKVCache
from lckv.cache.static import StaticKVCache

__all__ = [
    "CACHES",
    "DynamicKVCache",
    "KVCache",
    "KVLayer",
    "SinkKVCache",
    "StaticKVCache",
    "build_cache",
    "load_cache",
    "save_cache",
]
