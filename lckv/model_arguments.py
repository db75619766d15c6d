"""Which model a configuration asks for: its sharing pattern and its sizes, checked before anything is built."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from lckv.config import ModelConfig, TrainConfig
from lckv.costs import ModelSizes
from lckv.errors import UserError, check_choice, check_positive, check_whole_number, near_miss
from lckv.iso import check_iso, match_llama
from lckv.patterns import SharingPlan, build_layer_types, parse_layer_types

CONVERGE = "converge"
DEFAULT_SLIDING_WINDOW = 4096
ITERATION = ("forward_passes", "backward_passes", "converge_tolerance", "use_sequential", "force_nodiag")
"""Names of the settings that say how layers which read upward are run."""
KEPT_WITH_SOURCE = (
    *("name", "layer_types", "sliding_window"),
    *ITERATION,
    *("attention_dropout", "attn_implementation", "dtype"),
)
"""The keys of the `model` group that a pretrained model leaves to the user."""
DTYPES = ("float32", "bfloat16", "float16")
ATTENTIONS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")


def resolve_layer_types(cfg: TrainConfig) -> str:
    """The `layer_types` string that the configuration asks for, checked: its own, or the sharing pattern's.

    Raises:
        UserError: if the string or the pattern's parameters are wrong, or the layer counts disagree.
    """
    model = cfg.model
    if model.layer_types is not None:
        try:
            return parse_layer_types(model.layer_types, model.num_hidden_layers).layer_types
        except UserError as error:
            raise UserError(f"model.{error}") from None
    num_hidden_layers = model.num_hidden_layers
    if num_hidden_layers is None:
        num_hidden_layers = model.default_num_hidden_layers
    parameters = {item.name: getattr(cfg.sharing, item.name) for item in fields(cfg.sharing) if item.name != "name"}
    given = {name: value for name, value in parameters.items() if value is not None}
    try:
        return build_layer_types(cfg.sharing.name, num_hidden_layers, **given)
    except UserError as error:  # names a parameter without its group
        name = str(error).partition("=")[0]
        group = "sharing." if name in parameters else "model." if name == "num_hidden_layers" else ""
        raise UserError(f"{group}{error}") from None


def model_arguments(cfg: TrainConfig, vocab_size: int) -> dict[str, Any]:
    """The keyword arguments of `LCKVLlamaConfig` for this configuration.

    Args:
        cfg: the configuration.
        vocab_size: size of the tokenizer's vocabulary; the model's own may be larger.

    Raises:
        UserError: if the sizes do not fit together; the message names the key.
    """
    check_iso(cfg.iso, cfg.iso_multiple)
    layer_types = resolve_layer_types(cfg)
    plan = parse_layer_types(layer_types)
    check_model(cfg.model, plan)
    if cfg.model.vocab_size is not None and cfg.model.vocab_size < vocab_size:
        raise UserError(
            f"model.vocab_size={cfg.model.vocab_size}: is smaller than the tokenizer's {vocab_size}; "
            "leave it out to take the tokenizer's, or make it larger"
        )
    left_out = ("name", "default_num_hidden_layers")
    arguments = {item.name: getattr(cfg.model, item.name) for item in fields(cfg.model) if item.name not in left_out}
    arguments.update(
        layer_types=layer_types,
        num_hidden_layers=plan.num_hidden_layers,
        vocab_size=cfg.model.vocab_size or vocab_size,
        num_key_value_heads=cfg.model.num_key_value_heads or cfg.model.num_attention_heads,
        rope_parameters=cfg.model.rope_parameters or None,
        sliding_window=cfg.model.sliding_window or DEFAULT_SLIDING_WINDOW,
    )
    if cfg.iso is not None:
        sizes = match_llama(cfg.iso, plan, ModelSizes.from_config(arguments), cfg.iso_multiple)
        arguments.update(intermediate_size=sizes.intermediate_size, num_key_value_heads=sizes.num_key_value_heads)
    return {name: value for name, value in arguments.items() if value is not None}


def iteration_settings(cfg: Any) -> dict[str, Any]:
    """Those of [`ITERATION`] that a group of a configuration has: arguments of `LCKVLlamaConfig`."""
    return {name: getattr(cfg, name) for name in ITERATION if hasattr(cfg, name)}


def check_model(model: ModelConfig, plan: SharingPlan) -> None:
    """Checks what can be checked of a model before it is built.

    Raises:
        UserError: with the first mistake found; the message names the key, what was given and what is allowed.
    """
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings"):
        check_whole_number(f"model.{name}", getattr(model, name))
    for name in ("num_key_value_heads", "head_dim", "vocab_size", "sliding_window"):
        if getattr(model, name) is not None:
            check_whole_number(f"model.{name}", getattr(model, name))
    _check_heads(model)
    _check_passes(model, plan)
    for name, allowed in ("dtype", DTYPES), ("attn_implementation", ATTENTIONS):
        check_choice(f"model.{name}", getattr(model, name), allowed)
    if not 0 <= model.attention_dropout < 1:
        raise UserError(f"model.attention_dropout={model.attention_dropout}: allowed is 0 up to, but without, 1")


def check_passes_value(key: str, value: object) -> None:
    """Refuses what is no number of passes over a cycle.

    Raises:
        UserError: naming the key, as the user writes it.
    """
    if value == CONVERGE or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return
    hint = near_miss(value, [CONVERGE]) if isinstance(value, str) else ""
    raise UserError(f"{key}={value!r}: allowed is a whole number, 0 or more, or {CONVERGE!r}{hint}")


def _check_heads(model: ModelConfig) -> None:
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    if model.hidden_size % heads:
        raise UserError(
            f"model.hidden_size={model.hidden_size}: is not divisible by model.num_attention_heads={heads}; "
            f"nearest allowed is {max(1, round(model.hidden_size / heads)) * heads}"
        )
    if (model.head_dim or model.hidden_size // heads) % 2:
        key = "model.head_dim" if model.head_dim else "model.hidden_size / model.num_attention_heads"
        raise UserError(f"{key}={model.head_dim or model.hidden_size // heads}: rotary positions need an even size")
    if kv_heads is not None and heads % kv_heads:
        raise UserError(
            f"model.num_attention_heads={heads}: is not divisible by model.num_key_value_heads={kv_heads}; "
            f"allowed are {', '.join(str(n) for n in range(1, heads + 1) if heads % n == 0)}"
        )


def _check_passes(model: ModelConfig, plan: SharingPlan) -> None:
    check_passes_value("model.forward_passes", model.forward_passes)
    check_whole_number("model.backward_passes", model.backward_passes)
    if plan.has_cycles and model.backward_passes < 2:
        raise UserError(
            f"model.backward_passes={model.backward_passes}: with layers that read upward, 2 or more is needed; "
            "at 1 the owners' K/V projections would get no gradient through the iteration"
        )
    check_positive("model.converge_tolerance", model.converge_tolerance)
