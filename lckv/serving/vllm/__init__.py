"""A plugin of vLLM that serves models whose layers share keys and values, and keeps them once.

vLLM finds [`register`] by the entry point `vllm.general_plugins`. Nothing here needs vLLM until it is called, and the
modules with layers are imported by vLLM itself, when it loads a model.
"""

from __future__ import annotations

ARCHITECTURE = "LCKVLlamaForCausalLM"
"""The class that `config.json` names, and `--hf-overrides` for other models."""


HINT = "sharing_hint"
"""The key of `--hf-overrides` for a sharing hint, or the file with it."""

PATTERN_KEYS = ("layer_types", "kv_sharing", HINT)
"""The keys under which a pattern may be given. Some families have a list of their own under the first."""


def register() -> None:
    """Tells vLLM of the models, and transformers of their configuration. Each of its processes calls this once."""
    from vllm import ModelRegistry

    import lckv.models  # noqa: F401  # the configuration becomes known to `AutoConfig`

    ModelRegistry.register_model(ARCHITECTURE, f"lckv.serving.vllm.model:{ARCHITECTURE}")
