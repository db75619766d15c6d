"""Text from a model: prefill, decoding, streaming and continuous batching."""
