"""Configuration of Llama-shaped decoders that share keys and values across layers."""

from __future__ import annotations

import copy
from typing import Any, Self

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, cache_utils

from lckv.errors import UserError, check_choice
from lckv.sharing.iteration import Iteration, check_iteration
from lckv.sharing.layout import PLANES, KVLayout, check_latents, kv_layout, latents_read
from lckv.sharing.model_values import NORM_TYPES
from lckv.sharing.patterns import LayerPlan, SharingPlan, build_layer_types, parse_layer_types

# Older transformers have no cache layer for decoder layers without KV of their own. There, "moe" is the one name that
# makes its caches keep nothing for a layer; newer ones ask `kv_sharing_modes`.
_NO_KV_LAYER_TYPE = None if hasattr(cache_utils, "DummyLayer") else "moe"

_KINDS = ("full_attention", "sliding_attention")  # transformers' names, without and with a window


@strict
class LCKVLlamaConfig(LlamaConfig):
    """A [`LlamaConfig`] with the sharing pattern and the iteration of layers that read upward.

    transformers gives `config.layer_types` a meaning of its own: a list with one of its kinds of cache per layer. So
    the string moves to `kv_sharing` when the configuration is made, and `layer_types` becomes the list that fits it.
    Both are saved. A file that has the string under `layer_types`, as the LCKV authors' checkpoints do, loads too.

    Args:
        layer_types: whose keys and values each layer reads, e.g. `"0_6_6_6_6_6_6_7"`, or `"0_1_1:0"` for keys of one
            layer with values of another; `None` for Llama.
            `num_hidden_layers` follows it.
        kv_sharing: the same string, where a saved configuration has it; a string in `layer_types` comes first.
        forward_passes: ungraded passes over each cycle of layers before the graded ones, or `"converge"`: pass until
            the cycle's keys and values stop changing.
        backward_passes: graded passes over each cycle; where layers read upward at least 2, or 1 with groups.
        cyclic_groups: groups of tokens that take turns in a pass over a cycle, each reading what those before it have
            just written; 1 for all tokens at once.
        converge_tolerance: with `"converge"`, the relative change of keys and values (Frobenius norm) that ends it.
        sliding_window: tokens, the query's own among them, that layers with an `s` see.
        use_sequential: run the layers token by token, which is exact for every pattern and slow.
        force_nodiag: no layer sees the token's own key.
        attention_output_bias: whether `o_proj` has a bias, where that differs from `attention_bias`, as in Qwen2.
        use_qk_norm: whether each head's queries and keys are normalised before they are rotated, as in Qwen3.
        rope_layer_types: for every layer, which entry of `rope_parameters` rotates the keys that it makes, where
            that has one for each kind of layer, as in Gemma 3; by default `"sliding_attention"` for layers with an `s`
            and `"full_attention"` for others. With a `partial_rotary_factor`, that part of a head's planes turns.
        learned_positions: whether positions are embeddings beside the tokens', as in GPT-2; then nothing is rotated.
        norm_type: `"rms_norm"`, or `"layer_norm"`, which centres and has a bias; `rms_norm_eps` is for both.
        use_output_norms: whether what attention and MLP give is normalised, too, as in Gemma 2 and 3.
        gated_mlp: whether the MLP has a gate, as Llama's does.
        attention_multiplier: of the scores; `None` for one over the root of `head_dim`.
        embedding_multiplier: of the tokens' embeddings, when they enter the first layer.
        residual_multiplier: of what attention and MLP give, when it is added.
        logits_scaling: what divides the logits.
        final_logit_softcapping: a bound of the logits, to which a hyperbolic tangent takes them; `None` for none.
        kv_latents: for every decoder layer, the latents that it keeps in the place of keys and values (MLA), such as
            `{"latent": 96}` or `{"key_latent": 32, "value_latent": 64}`; `None` for keys and values, in a layer or in
            all, and for layers that compute neither. A layer that is read for its keys alone has a `key_latent`
            alone, and so for values. `{"latent": 64, "rotated_planes": [0, 3, 3]}` has a rotated key
            beside the latent, of a pair of numbers for each of these rotary planes; other planes are not rotated.

    Raises:
        UserError: for a bad `layer_types` string and values out of range.
    """

    model_type = "lckv-llama"

    num_hidden_layers: int | None = None  # type: ignore[assignment]  # filled in from the pattern
    layer_types: list[str] | str | None = None
    kv_sharing: str | None = None
    forward_passes: int | str = 7
    backward_passes: int = 2
    cyclic_groups: int = 1
    converge_tolerance: float = 1e-3
    sliding_window: int = 4096
    use_sequential: bool = False
    force_nodiag: bool = False
    attention_output_bias: bool | None = None
    use_qk_norm: bool = False
    rope_layer_types: list[str] | None = None
    learned_positions: bool = False
    norm_type: str = "rms_norm"
    use_output_norms: bool = False
    gated_mlp: bool = True
    attention_multiplier: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    final_logit_softcapping: float | None = None
    kv_latents: list[dict[str, Any] | None] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.layer_types, str):
            self.kv_sharing = self.layer_types
        elif self.layer_types is not None and self.kv_sharing is None:
            raise UserError(f"layer_types={self.layer_types!r}: must be a string such as '0_0_2_2'")
        if self.kv_sharing is None:
            self.kv_sharing = build_layer_types("llama", self.num_hidden_layers or 32)
        plan = parse_layer_types(self.kv_sharing, self.num_hidden_layers)
        self.num_hidden_layers = plan.num_hidden_layers
        self.layer_types = _transformers_layer_types(plan, self.sliding_window)
        _check_passes(self.forward_passes)
        if self.cyclic_groups < 1:
            raise UserError(f"cyclic_groups={self.cyclic_groups}: allowed is 1 or more")
        check_iteration(Iteration.from_config(self), plan.has_cycles)
        if not self.converge_tolerance > 0:
            raise UserError(f"converge_tolerance={self.converge_tolerance}: allowed is a number above 0")
        if self.sliding_window < 1:
            raise UserError(f"sliding_window={self.sliding_window}: allowed is 1 or more")
        if self.kv_latents is not None:
            check_latents(self.kv_latents, plan)
            if self.use_qk_norm and any(PLANES in (latents or {}) for latents in self.kv_latents):
                raise UserError(f"use_qk_norm=True: normalised keys are no sum; allowed are latents without {PLANES}")
        check_choice("norm_type", self.norm_type, NORM_TYPES)
        self._choose_rotations(plan)
        super().__post_init__(**kwargs)

    def _choose_rotations(self, plan: SharingPlan) -> None:
        """Fills in which rotary embedding each layer has."""
        if self.learned_positions:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.0}
        parameters: Any = self.rope_parameters or {}
        if self.rope_layer_types is None:
            if not any(isinstance(value, dict) for value in parameters.values()):
                return
            self.rope_layer_types = [_KINDS[layer.is_sliding] for layer in plan.layers]
        if len(self.rope_layer_types) != plan.num_hidden_layers:
            raise UserError(
                f"rope_layer_types: has {len(self.rope_layer_types)} entries for {plan.num_hidden_layers} layers; "
                "give one each"
            )
        for label in self.rope_layer_types:
            check_choice("rope_layer_types", label, parameters)
        self.rope_parameters = {label: parameters[label] for label in self._rope_type_labels}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Makes a configuration from a saved one; keywords replace what is saved, and are checked with it."""
        given = {name: kwargs.pop(name) for name in list(kwargs) if name in cls.__dataclass_fields__}
        if "kv_sharing" in given:
            given.setdefault("layer_types", given["kv_sharing"])
        return super().from_dict(config_dict | given, **kwargs)

    def under(self, layer_types: str) -> Self:
        """A copy with another sharing pattern, and all else as it is: each layer's keys are rotated as before.

        Raises:
            UserError: for a bad string, one whose owners would keep something else than here, and where layers keep
                latents, of which no other layer could make its keys.
        """
        config, plan = copy.copy(self), parse_layer_types(layer_types, self.num_hidden_layers)
        fault = "layers keep latents" if self.kv_latents is not None else None
        for asked, own in zip(plan.layers, self.sharing_plan.layers, strict=True):
            if fault is None and asked.computes_kv and asked.computes != own.computes:
                fault = f"layer {own.layer_idx} computes {own.computes}, not {asked.computes},"
        if fault is not None:
            raise UserError(f"layer_types={layer_types!r}: {fault} in this model, whose own are {self.kv_sharing!r}")
        config.kv_sharing, config.layer_types = plan.layer_types, _transformers_layer_types(plan, self.sliding_window)
        return config

    @property
    def sharing_plan(self) -> SharingPlan:
        """The parsed sharing pattern."""
        assert self.kv_sharing is not None
        return parse_layer_types(self.kv_sharing)

    @property
    def kv_layout(self) -> KVLayout:
        """What every layer keeps for its readers."""
        assert self.num_key_value_heads is not None and self.head_dim is not None  # filled in above
        heads, head_dim = self.num_key_value_heads, self.head_dim
        return kv_layout(self.sharing_plan, heads, head_dim, self.sliding_window, self.kv_latents)

    def latents_of(self, layer_idx: int) -> dict[str, Any] | None:
        """The latents that layer `layer_idx` reads; `None` if it reads keys and values."""
        latents = latents_read(self.kv_latents, self.sharing_plan.layers[layer_idx])
        return None if latents is None else dict(latents)

    @property
    def _rope_type_labels(self) -> list[str]:
        """For transformers: the entries of `rope_parameters`, which are not always called as kinds of layers are."""
        return sorted(set(self.rope_layer_types or ()))

    @property
    def rotations(self) -> dict[str | None, dict[str, Any]]:
        """The parameters of all rotary embeddings, by name; the only one has none."""
        parameters: Any = self.rope_parameters
        return dict(parameters) if self.rope_layer_types else {None: parameters}

    def rope_label(self, layer_idx: int) -> str | None:
        """Which entry of `rope_parameters` rotates the keys of layer `layer_idx`; `None` where they are for all."""
        return self.rope_layer_types[layer_idx] if self.rope_layer_types else None

    def query_label(self, layer_idx: int) -> str | None:
        """Which one rotates the queries of layer `layer_idx`: that of its keys, or its own if it makes the keys."""
        latents = self.latents_of(layer_idx)
        makes_keys = latents is not None and PLANES not in latents
        return self.rope_label(layer_idx if makes_keys else self.sharing_plan.layers[layer_idx].key_source)

    @property
    def has_output_bias(self) -> bool:
        """Whether `o_proj` has a bias."""
        return self.attention_bias if self.attention_output_bias is None else self.attention_output_bias

    @property
    def kv_sharing_modes(self) -> list[str | None]:
        """For transformers' caches: `"reuse"` for layers that compute no KV and so need no storage."""
        return [None if layer.computes_kv else "reuse" for layer in self.sharing_plan.layers]


def _transformers_layer_types(plan: SharingPlan, sliding_window: int) -> list[str]:
    return [_transformers_layer_type(plan, layer, sliding_window) for layer in plan.layers]


def _transformers_layer_type(plan: SharingPlan, layer: LayerPlan, sliding_window: int) -> str:
    """What transformers should keep for a layer: an owner keeps what its widest reader needs."""
    if not layer.computes_kv and _NO_KV_LAYER_TYPE is not None:
        return _NO_KV_LAYER_TYPE
    is_sliding = plan.owner_is_sliding(layer.layer_idx) if layer.computes_kv else layer.is_sliding
    # For a window of one token, transformers' sliding cache layer keeps every key but announces none.
    return "sliding_attention" if is_sliding and sliding_window > 1 else "full_attention"


def _check_passes(forward_passes: int | str) -> None:
    if forward_passes != "converge" and (not isinstance(forward_passes, int) or forward_passes < 0):
        raise UserError(f"forward_passes={forward_passes!r}: allowed is a whole number, 0 or more, or 'converge'")
