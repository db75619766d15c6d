"""What can be configured of a model: its sizes, and how its layers share keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lckv.config.keys import Group, above_zero, at_least, each, fraction, key, not_negative, one_of, passes, such_that
from lckv.config.names import ATTENTIONS, AUTO_LATENT, DTYPES, LATENTS, NO_LATENT, RANDOM, XKV
from lckv.config.rotation import rotations
from lckv.errors import UserError, check_choice
from lckv.sharing.model_values import NORM_TYPES, check_heads
from lckv.sharing.patterns import PATTERNS

KEPT_WITH_SOURCE = (
    "name",
    "layer_types",
    "sliding_window",
    "forward_passes",
    "backward_passes",
    "cyclic_groups",
    "converge_tolerance",
    "use_sequential",
    "force_nodiag",
    "attention_dropout",
    "attn_implementation",
    "dtype",
)
"""The keys of the `model` group that a pretrained model leaves to the user."""


def _latents_by_layer(name: str, value: Any) -> None:
    """One entry per layer, as the configuration of a model has it; null for none."""
    if value is None or (isinstance(value, list) and all(each is None or isinstance(each, dict) for each in value)):
        return
    raise UserError(
        f"{name}={value!r}: allowed are null, or a list with null or sizes such as {{latent: 96}} for every layer; "
        "latent=joint fills it in"
    )


@dataclass
class ModelConfig(Group):
    """The decoder: Llama's own names, then how layers share keys and values and how cycles are iterated.

    Attributes:
        name: what run folders call this size; every preset sets it.
        layer_types: whose keys and values each layer reads, such as `0_0_2_2`, or `0_1_1:0` for keys of one layer with
            values of another; wins over the `sharing` group.
        num_hidden_layers: number of layers; follows `layer_types` unless it is given too, and then both must agree.
        default_num_hidden_layers: the preset's depth, used where neither of the two is given.
        vocab_size: None takes the tokenizer's.
        rope_parameters: such as `{rope_type: linear, factor: 2.0, rope_theta: 10000.0}`; empty: transformers' default.
        attention_output_bias: whether the output projection has a bias; None: as `attention_bias` says.
        use_qk_norm: whether each head's queries and keys are normalised, as in Qwen3.
        learned_positions: whether positions are embeddings, as in GPT-2, and nothing is rotated.
        norm_type: `rms_norm`, or `layer_norm`, which centres and has a bias.
        use_output_norms: whether what attention and MLP give is normalised, too, as in Gemma 3.
        gated_mlp: whether the MLP has a gate, as Llama's does.
        attention_multiplier: of the scores; None: one over the root of `head_dim`.
        embedding_multiplier: of what enters the first layer.
        residual_multiplier: of what attention and MLP give.
        logits_scaling: what divides the logits.
        final_logit_softcapping: a bound of the logits; None: none.
        sliding_window: tokens that an entry with the suffix `s` sees, the query's own among them; None: 4096, or what
            the pretrained model has.
        forward_passes: passes over a cycle without gradient, or `converge`.
        backward_passes: passes over a cycle with gradient.
        cyclic_groups: groups of tokens that take turns in such a pass, each reading what those before it have just
            written, by which one pass does for several; 1: all tokens at once.
        converge_tolerance: with `converge`, the relative change of the KV at which the iteration stops.
        use_sequential: whether cycles run token by token, which is exact and slow.
        force_nodiag: whether every layer hides a token's own key from it, not only those that read upward.
        kv_latents: for every layer the latents that it keeps in the place of keys and values, by name; the `latent`
            group fills it in.
    """

    name: str = "custom"
    # Not `str | None`: OmegaConf would silently turn YAML's number 222 into the text "222"; see `overrides`.
    layer_types: Any = None
    num_hidden_layers: int | None = None
    default_num_hidden_layers: int = 8
    vocab_size: int | None = key(None, at_least())
    hidden_size: int = key(256, at_least())
    intermediate_size: int = key(704, at_least())
    num_attention_heads: int = key(4, at_least())
    num_key_value_heads: int | None = key(None, at_least())
    head_dim: int | None = key(None, at_least())
    hidden_act: str = "silu"
    max_position_embeddings: int = key(2048, at_least())
    rms_norm_eps: float = key(1e-6, not_negative)
    rope_parameters: dict[str, Any] = key({}, rotations, only_with={"learned_positions": (False,)})
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_output_bias: bool | None = None
    use_qk_norm: bool = False
    learned_positions: bool = False
    norm_type: str = key("rms_norm", one_of(NORM_TYPES))
    use_output_norms: bool = False
    gated_mlp: bool = True
    attention_multiplier: float | None = key(None, above_zero)
    embedding_multiplier: float = key(1.0, above_zero)
    residual_multiplier: float = key(1.0, above_zero)
    logits_scaling: float = key(1.0, above_zero)
    final_logit_softcapping: float | None = key(None, above_zero)
    mlp_bias: bool = False
    attention_dropout: float = key(0.0, fraction)
    initializer_range: float = key(0.02, not_negative)
    sliding_window: int | None = key(None, at_least())
    forward_passes: Any = key(1, passes)
    backward_passes: int = key(1, at_least())
    cyclic_groups: int = key(4, at_least(), only_with={"use_sequential": (False,)})
    converge_tolerance: float = key(1e-3, above_zero)
    use_sequential: bool = False
    force_nodiag: bool = False
    kv_latents: Any = key(None, _latents_by_layer)
    attn_implementation: str = key("sdpa", one_of(ATTENTIONS))
    dtype: str = key("float32", one_of(DTYPES))

    def check(self, prefix: str) -> None:
        """Refuses sizes that do not fit together."""
        check_heads(vars(self), prefix)


@dataclass
class SharingConfig(Group):
    """A named sharing pattern and its parameters; None leaves a parameter at the pattern's own default.

    Attributes:
        name: the pattern; or "random": all layers keep keys and values, and at every training step it is drawn which
            of them read the lowest of a group instead of their own.
        probability: with random, of a layer to read what the layer below it reads.
        reach: with random, how many layers below itself a layer may read; None: down to the lowest.
    """

    name: str = key("llama", lambda name, value: check_choice(name, value, (*PATTERNS, RANDOM)))
    num_kv_layers: int | None = None
    group_size: int | None = None
    warmup_layers: int | None = None
    num_self_layers: int | None = None
    probability: float | None = key(
        None,
        such_that(lambda value: 0 < value <= 1, "allowed is a number above 0, up to 1; sharing=llama draws nothing"),
        only_with={"name": (RANDOM,)},
    )
    reach: int | None = key(None, at_least(), only_with={"name": (RANDOM,)})

    @property
    def is_random(self) -> bool:
        """Whether whom layers read is drawn."""
        return self.name == RANDOM

    def check(self, prefix: str) -> None:
        """Refuses parameters of patterns where none is built."""
        for name in self.options() if self.is_random else ():
            if name not in ("probability", "reach"):
                raise UserError(
                    f"{prefix}{name}: sharing={RANDOM} has no such parameter; allowed are probability, reach"
                )


def _sizes(name: str, value: Any) -> None:
    """A size, or one for each of several; null for none."""
    if isinstance(value, list):
        each(at_least())(name, value)
    elif value is not None:
        at_least()(name, value)


@dataclass
class LatentConfig(Group):
    """Latents in the place of keys and values (Multi-head Latent Attention), on top of whatever is shared.

    Attributes:
        name: "joint": one latent for keys and values of an owner; "separate": one for each; "decoupled_rope": a latent
            for values and for what of the keys is hardly rotated, and the rest of these in rotated pairs, which is
            read as it is kept; "xkv": one for the keys and values of a group of layers, kept by the lowest of them;
            "auto": what suits the source; "none": keys and values.
        ratio: how many times fewer numbers the owners keep of a token, all together; with xkv, than all layers did,
            though no latent is wider than what enters a layer.
        dim: instead, how many numbers each latent has, such as 96; of separate ones also `[32,64]`, keys first; with
            decoupled_rope `[64,32]`, the latent first.
        skip_layers: so many of the lowest layers keep keys and values.
        group_size: layers in a group.
        warmup_layers: so many layers above those have latents of their own.
    """

    name: str = key(NO_LATENT, one_of((*LATENTS, AUTO_LATENT, NO_LATENT)))
    ratio: float = key(
        4.0,
        such_that(lambda value: value >= 1, "allowed is a number, 1 or more"),
        only_with={"name": (*LATENTS, AUTO_LATENT), "dim": (None,)},
    )
    dim: Any = key(None, _sizes, only_with={"name": LATENTS})
    skip_layers: int = key(0, at_least(0), only_with={"name": (*LATENTS, AUTO_LATENT)})
    group_size: int = key(2, at_least(), only_with={"name": (XKV,)})
    warmup_layers: int = key(0, at_least(0), only_with={"name": (XKV,)})

    @property
    def is_used(self) -> bool:
        """Whether owners are to keep latents, not keys and values."""
        return self.name != NO_LATENT
