"""Text to blocks of tokens: sources, tokenizers, packing and the cache on disk; sources and packing without torch."""
