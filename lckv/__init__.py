"""Train, compare and serve decoders that share keys and values across layers."""

__version__ = "0.1.0"
