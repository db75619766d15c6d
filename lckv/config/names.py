"""Names that keys may have as values, and what has to be known about them before torch is loaded.

What is behind a name is registered under it where it is built; a test sees to it that there is one for each.
"""

from __future__ import annotations

RANDOM = "random"
"""In place of a sharing pattern: whom layers read is drawn anew at every training step."""

DTYPES = ("float32", "bfloat16", "float16")
ATTENTIONS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")
TRAINABLE = ("all", "kv", "qkv")
RIEMANNIAN = "riemannian_adam"
OPTIMIZERS = ("adamw", "muon", RIEMANNIAN)
SCHEDULES = ("cosine", "wsd", "linear", "constant")
PREFERENCES = ("eval_preference_loss", "eval_preference_accuracy", "eval_preference_margin")
"""What an evaluation on pairs of answers says of them, beside the perplexity of the better ones."""
LOSS_PARTS = ("logits", "attention", "reconstruction", "labels")
"""What a loss against a teacher is the weighted sum of."""

TRACKERS = ("tensorboard", "wandb", "trackio")
SOURCES = ("bible", "files", "hub")
"""Of text, and of conversations as well."""

CACHES = ("dynamic", "static", "sink", "paged", "quantized")
NO_CACHE = "none"
"""In place of a cache's name: each forward pass has its own keys and values."""

LATENTS = ("joint", "separate", "decoupled_rope", "xkv")
"""What owners may keep instead of keys and values: a latent for both, one for each, rotated keys beside one, or one
for the keys and values of several layers."""

XKV = "xkv"
"""The one that has a sharing pattern of its own."""

AUTO_LATENT = "auto"
"""In place of a kind: the one that suits the source."""

NO_LATENT = "none"
"""In their place: keys and values."""

CONTINUOUS, STATIC = BATCHINGS = ("continuous", "static")
"""How many prompts share the model: joining and leaving at any step, or batch after batch."""

TOKENS, OFF, ENDLESS = STREAMS = ("tokens", "off", "endless")
"""How text may be printed: as it comes, at its end, or without one."""

GGUF, HUB = FORMATS = ("gguf", "hub")
"""What a model may be exported as: a file for llama.cpp, or a folder that transformers loads by itself."""

METHODS = ["inherit", "average", "aligned", "activation", "subspace", "distill"]
"""How keys and values that layers are to share come from those that each computes in the source."""

CALIBRATED = frozenset({"activation", "subspace", "distill"})
"""Those that look at calibration text."""

TRAINED = frozenset({"distill"})
"""Those whose result is only where a training begins, with the source as the teacher."""
