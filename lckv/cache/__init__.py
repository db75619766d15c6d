"""Caches of keys and values (KV) that keep what the sharing pattern says must be kept, and no more."""

from lckv.cache.base import CACHES, KVCache, build_cache
from lckv.cache.dynamic import DynamicKVCache
from lckv.cache.layers import KVLayer
from lckv.cache.paged import PagedKVCache, QuantizedPagedKVCache
from lckv.cache.quantized import QuantizedKVCache
from lckv.cache.saving import load_cache, save_cache
from lckv.cache.sink import SinkKVCache
from lckv.cache.static import StaticKVCache

__all__ = [
    "CACHES",
    "DynamicKVCache",
    "KVCache",
    "KVLayer",
    "PagedKVCache",
    "QuantizedKVCache",
    "QuantizedPagedKVCache",
    "SinkKVCache",
    "StaticKVCache",
    "build_cache",
    "load_cache",
    "save_cache",
]
