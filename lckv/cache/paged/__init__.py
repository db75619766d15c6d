"""A cache in pages (PagedAttention, Kwon et al., SOSP 2023): the reference for a serving engine, not an engine.

It shows, exactly and on any device, what block tables, shared beginnings, copies on writing, pools of fixed size and
quantised pages mean for each sharing pattern, so that an engine's results can be compared with it. It reads pages by a
gather, which a kernel of an engine does not need. Its features are complete: speed and serving are the engine's.

- `pages`: who holds which page, without tensors.
- `layer`: the pools of one owner.
- `cache`: the cache, with sequences that come and go, and the forward call that runs.
- `quantized`: the same with old pages in few bits.
"""

from lckv.cache.paged.cache import PagedKVCache
from lckv.cache.paged.pages import OutOfPagesError, extend_hashes
from lckv.cache.paged.quantized import QuantizedPagedKVCache

__all__ = ["OutOfPagesError", "PagedKVCache", "QuantizedPagedKVCache", "extend_hashes"]
