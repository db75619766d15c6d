"""What a sharing plan costs, by arithmetic alone: KV bytes, parameters and FLOPs. No torch, no model.

Matrix products count two FLOPs per multiply-add; norms, softmax, rotary positions and activations count nothing, and
neither does the embedding look-up. A backward pass costs twice its forward pass (no recomputation). Sharing saves
capacity but not reads, so what is written, what is kept and what is read are three figures, never one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from lckv.errors import check_choice, check_whole_number
from lckv.sharing.iteration import Iteration
from lckv.sharing.layout import PLANES, KVLayout, Latents, kv_layout, latents_read
from lckv.sharing.patterns import LayerPlan, Segment, SharingPlan, build_layer_types, parse_layer_types

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "int8": 1}


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a Llama-shaped model, under its configuration's names; see [`LCKVLlamaConfig`]."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    sliding_window: int
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_output_bias: bool | None = None
    use_qk_norm: bool = False
    mlp_bias: bool = False
    gated_mlp: bool = True
    norm_type: str = "rms_norm"
    use_output_norms: bool = False
    learned_positions: bool = False
    max_position_embeddings: int = 0
    force_nodiag: bool = False
    kv_latents: Sequence[Latents | None] | None = None

    @classmethod
    def from_config(cls, config: Any) -> ModelSizes:
        """Reads the sizes from an `LCKVLlamaConfig`, a `LlamaConfig`, or a mapping of its arguments."""
        given = config if isinstance(config, Mapping) else vars(config)
        values = {item.name: given[item.name] for item in fields(cls) if given.get(item.name) is not None}
        values.setdefault("num_key_value_heads", values["num_attention_heads"])
        values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
        values.setdefault("sliding_window", given["max_position_embeddings"])
        return cls(**values)

    @property
    def of_llama(self) -> ModelSizes:
        """Those of a model to compare with: with keys and values in every layer."""
        return replace(self, kv_latents=None)

    @property
    def has_output_bias(self) -> bool:
        """Whether the attention's output projection has a bias."""
        return self.attention_bias if self.attention_output_bias is None else self.attention_output_bias

    @property
    def norm_size(self) -> int:
        """Parameters of a norm of hidden states."""
        return self.hidden_size * (2 if self.norm_type == "layer_norm" else 1)

    @property
    def mlp_width(self) -> int:
        """Numbers that an MLP's first projections give in all, before the gate is applied."""
        return self.intermediate_size * (2 if self.gated_mlp else 1)

    @property
    def query_size(self) -> int:
        """Width of the queries, and of the attention output before its projection."""
        return self.num_attention_heads * self.head_dim

    def layout(self, plan: SharingPlan) -> KVLayout:
        """What the layers of such a model keep for their readers."""
        return kv_layout(plan, self.num_key_value_heads, self.head_dim, self.sliding_window, self.kv_latents)

    def latents_of(self, layer: LayerPlan) -> Latents | None:
        """The latents that a layer reads; `None` if it reads keys and values."""
        return latents_read(self.kv_latents, layer)

    @property
    def kv_size(self) -> int:
        """Width of the keys, and of the values."""
        return self.num_key_value_heads * self.head_dim

    def latent_sizes(self, layer: LayerPlan) -> tuple[int, int, int] | None:
        """What a layer makes keys of, and values, and the rotated numbers that keys have beside; `None` without."""
        latents = self.latents_of(layer)
        if latents is None:
            return None
        sizes = [size for name, size in latents.items() if name != PLANES]
        return sizes[0], sizes[-1], 2 * len(latents.get(PLANES, ()))

    def latent_parameters(self, layer: LayerPlan) -> int:
        """Weights with which a layer makes keys and values of the latents that it reads."""
        latents = self.latent_sizes(layer)
        if latents is None:
            return 0
        key_size, value_size, num_rotated = latents
        made_of_pairs = self.num_key_value_heads * num_rotated
        return self.num_unrotated(layer) * key_size + made_of_pairs + self.kv_size * value_size

    def num_unrotated(self, layer: LayerPlan) -> int:
        """How many numbers of a token's keys are made of what was not rotated when it was written, or are kept."""
        return self.kv_size - 2 * self.num_key_value_heads * len(set(self.planes_of(layer.key_source)))

    def planes_of(self, owner: int) -> Sequence[int]:
        """The rotary planes of what an owner rotates beside a latent."""
        latents = self.kv_latents[owner] if self.kv_latents else None
        return tuple((latents or {}).get(PLANES, ()))


@dataclass(frozen=True)
class KVBytes:
    """Bytes of keys and values per token, over all layers.

    Attributes:
        written: stored for each new token.
        resident: held in the cache per token of the context; below `written` where windows let a cache forget.
        resident_total: held for the whole context.
        read: loaded to decode one token at the end of the context, in all: every layer reads, sharing or not.
    """

    written: int
    resident: float
    resident_total: int
    read: int


@dataclass(frozen=True)
class FlopsPerToken:
    """FLOPs per token; None where the number of passes depends on the data.

    Attributes:
        decode: decoding one token at the end of the context, every layer once.
        prefill: taking in the whole context to predict the one token behind it, on the average of its tokens. Nothing
            but the last token leaves the layers above the highest one that computes KV, nor that one itself.
        forward: a parallel pass over the whole context, iterations included, on the average of its tokens.
        train: the same with its backward pass.
    """

    decode: float
    prefill: float | None
    forward: float | None
    train: float | None


@dataclass(frozen=True)
class Costs:
    """All costs of one sharing plan at one context length."""

    kv_bytes: KVBytes
    num_parameters: int
    flops_per_token: FlopsPerToken


def count_costs(
    plan: SharingPlan,
    sizes: ModelSizes,
    context_length: int,
    *,
    iteration: Iteration | None = None,
    dtype: str = "bfloat16",
) -> Costs:
    """Counts everything for a context of `context_length` tokens and a KV cache of type `dtype`.

    Raises:
        UserError: if the context is empty or the type unknown.
    """
    return Costs(
        count_kv_bytes(plan, sizes, context_length, dtype),
        count_parameters(plan, sizes),
        count_flops(plan, sizes, context_length, iteration or Iteration()),
    )


def llama_plan(plan: SharingPlan) -> SharingPlan:
    """The plan that costs are compared with: as many layers, each with KV of its own and without windows."""
    return parse_layer_types(build_layer_types("llama", plan.num_hidden_layers))


def count_kv_bytes(plan: SharingPlan, sizes: ModelSizes, context_length: int, dtype: str = "bfloat16") -> KVBytes:
    """Counts the bytes of keys and values that one sequence of `context_length` tokens needs.

    An owner all of whose readers have a window keeps no more than the window; any other keeps the whole context.

    Raises:
        UserError: if the context is empty or the type unknown.
    """
    check_whole_number("context_length", context_length)
    check_choice("dtype", dtype, DTYPE_BYTES)
    layout, itemsize = sizes.layout(plan), DTYPE_BYTES[dtype]
    read = sum(
        _num_keys(layer, sizes, context_length) * sum(stream.size for stream in layout.reads(layer.layer_idx))
        for layer in plan.layers
    )
    resident_total = layout.num_bytes(context_length, itemsize)
    return KVBytes(
        written=itemsize * sum(store.size for store in layout.stores),
        resident=resident_total / context_length,
        resident_total=resident_total,
        read=itemsize * read,
    )


def count_parameters(plan: SharingPlan, sizes: ModelSizes) -> int:
    """Counts the parameters; a layer has no projections to keys or values that no layer reads."""
    num_embeddings = 1 if sizes.tie_word_embeddings else 2
    num_rows = num_embeddings * sizes.vocab_size + sizes.learned_positions * sizes.max_position_embeddings
    total = num_rows * sizes.hidden_size + sizes.norm_size
    written = {store.owner: store.size for store in sizes.layout(plan).stores}
    for layer in plan.layers:
        total += sizes.hidden_size * (2 * sizes.query_size + sizes.mlp_width + sizes.intermediate_size)
        total += sizes.norm_size * (4 if sizes.use_output_norms else 2)
        total += sizes.attention_bias * sizes.query_size + sizes.has_output_bias * sizes.hidden_size
        total += sizes.mlp_bias * (sizes.mlp_width + sizes.hidden_size)
        total += written.get(layer.layer_idx, 0) * sizes.hidden_size + sizes.latent_parameters(layer)
        # Norms and biases of keys and values are where these are made: by readers, if owners keep latents.
        makes_both = sizes.latents_of(layer) is not None
        makes_keys, makes_values = makes_both or layer.computes_keys, makes_both or layer.computes_values
        total += sizes.use_qk_norm * (1 + makes_keys) * sizes.head_dim
        total += sizes.attention_bias * (makes_keys * sizes.num_unrotated(layer) + makes_values * sizes.kv_size)
        total += sizes.attention_bias * bool(sizes.planes_of(layer.layer_idx)) * written.get(layer.layer_idx, 0)
    return total


def count_flops(
    plan: SharingPlan, sizes: ModelSizes, context_length: int, iteration: Iteration | None = None
) -> FlopsPerToken:
    """Counts the FLOPs per token, as the iteration of cycles schedules them.

    A pass without gradient costs its forward FLOPs, one with gradient three times that. In every pass over a cycle but
    the last, the top layer only computes its keys and values. In the first pass, layers that read upward find no keys
    yet, but for those of groups that had their turn: where there are none, they need no query, no attention and no
    output projection.

    Raises:
        UserError: if the context is empty.
    """
    check_whole_number("context_length", context_length)
    return _FlopCount(plan, sizes, context_length).per_token(iteration or Iteration())


@dataclass(frozen=True)
class _FlopCount:
    """The FLOPs of the parts of each layer, and their sums over passes."""

    plan: SharingPlan
    sizes: ModelSizes
    context_length: int

    def per_token(self, iteration: Iteration) -> FlopsPerToken:
        lm_head = 2 * self.sizes.vocab_size * self.sizes.hidden_size
        decode = lm_head + sum(
            self._layer(layer, _num_keys(layer, self.sizes, self.context_length), is_alone=True)
            for layer in self.plan.layers
        )
        segments = [self._segment(segment, iteration) for segment in self.plan.segments]
        prefill, forward, train = (_sum_of_known(parts) for parts in zip(*segments, strict=True))
        return FlopsPerToken(
            decode=decode,
            prefill=None if prefill is None else prefill + lm_head / self.context_length,
            forward=None if forward is None else forward + lm_head,
            train=None if train is None else train + 3 * lm_head,
        )

    def _segment(self, segment: Segment, iteration: Iteration) -> tuple[float | None, float | None, float | None]:
        """Prefill, forward and train FLOPs of consecutive layers."""
        layers = self.plan.layers[segment.start : segment.stop]
        once = sum(self._layer(layer, self._mean_keys[layer.layer_idx]) for layer in layers)
        # Token by token, every token goes through all layers.
        finished = once if iteration.use_sequential else sum(self._prefilled_layer(layer) for layer in layers)
        if not segment.is_cycle or iteration.use_sequential:
            return finished, once, 3 * once
        if iteration.converges:
            return None, None, None
        passes = iteration.passes(self.context_length)
        if passes.is_single:
            return finished, once, 3 * once
        num_passes = passes.num_ungraded + passes.num_graded
        drafts = [self._draft(layers, passes.num_groups, index == 0) for index in range(num_passes)]
        # What nobody reads again is written in the last pass alone, in which the top layer reads, too.
        rest = once - self._draft(layers, 1, is_first=False)
        forward = sum(drafts) + rest
        return forward - once + finished, forward, forward + 2 * (sum(drafts[passes.num_ungraded :]) + rest)

    def _draft(self, layers: tuple[LayerPlan, ...], num_groups: int, is_first: bool) -> float:
        """A pass over a cycle that another one follows: it ends at the keys and values of the top layer."""
        total = float(self._written(layers[-1]))
        read_again = {source for layer in layers[:-1] for source in layer.sources}
        for layer in layers[:-1]:
            total += self._mlp + (layer.layer_idx in read_again) * self._written(layer)
            num_keys = self._mean_keys[layer.layer_idx]
            if is_first and layer.is_upward:  # all groups but the first find keys, half as many on the average
                total += (1 - 1 / num_groups) * self._attention(layer, num_keys / 2)
            else:
                total += self._attention(layer, num_keys)
        return total

    def _layer(self, layer: LayerPlan, num_keys: float, is_alone: bool = False) -> float:
        return self._attention(layer, num_keys, is_alone) + self._mlp + self._written(layer)

    def _prefilled_layer(self, layer: LayerPlan) -> float:
        """A layer in the last pass of a prefill; from the highest owner on, only the last token leaves it."""
        if layer.layer_idx < self.plan.kv_owners[-1]:
            return self._layer(layer, self._mean_keys[layer.layer_idx])
        num_keys = _num_keys(layer, self.sizes, self.context_length)
        last_token = self._attention(layer, num_keys, is_alone=True) + self._mlp
        return self._written(layer) + last_token / self.context_length

    @cached_property
    def _layout(self) -> KVLayout:
        return self.sizes.layout(self.plan)

    def _written(self, layer: LayerPlan) -> int:
        """Projecting what the layer keeps for its readers."""
        if layer.layer_idx not in self._layout.owners:
            return 0
        return 2 * self.sizes.hidden_size * self._layout.store(layer.layer_idx).size

    @property
    def _mlp(self) -> int:
        return 2 * self.sizes.hidden_size * (self.sizes.mlp_width + self.sizes.intermediate_size)

    def _attention(self, layer: LayerPlan, num_keys: float, is_alone: bool = False) -> float:
        """Query and output projections, and each query head with what it reads: scores, and the sum of the values.

        Where these are made of latents: once a token as many queries pass. One that `is_alone` sums up latents, and
        makes values of their sum, but keys of all that it sees, unless they are rotated already.
        """
        sizes, latents = self.sizes, self.sizes.latent_sizes(layer)
        projections = 4 * sizes.query_size * sizes.hidden_size
        if latents is None:
            width = sum(stream.head_dim for stream in self._layout.reads(layer.layer_idx))
            return projections + 2 * sizes.num_attention_heads * width * num_keys
        key_size, value_size, num_rotated = latents
        keys, values = 2.0 * key_size * sizes.num_unrotated(layer), 2 * value_size * sizes.kv_size
        hides_own_token = layer.is_upward or sizes.force_nodiag
        if not is_alone or (hides_own_token and sizes.attention_bias):  # where even one query needs values
            num_made = num_keys if is_alone else 1
            return projections + (keys + values) * num_made + 4 * sizes.query_size * num_keys
        groups, width = sizes.num_attention_heads // sizes.num_key_value_heads, sizes.head_dim
        from_sum = groups * values
        if num_rotated:  # the query goes to the latent, as keys would to each query head of theirs
            keys, width = groups * keys, key_size + num_rotated
        else:
            keys *= num_keys
        return projections + keys + from_sum + 2 * sizes.num_attention_heads * (width + value_size) * num_keys

    @cached_property
    def _mean_keys(self) -> list[float]:
        """For every layer, the keys that a query sees, on the average of all positions."""
        return [_mean_num_keys(layer, self.sizes, self.context_length) for layer in self.plan.layers]


def _sum_of_known(parts: Sequence[float | None]) -> float | None:
    """The sum, or `None` if a part is unknown."""
    known = [part for part in parts if part is not None]
    return sum(known, 0.0) if len(known) == len(parts) else None


def _num_keys(layer: LayerPlan, sizes: ModelSizes, context_length: int) -> int:
    """Keys that the last of `context_length` tokens sees in this layer; upward ones do not see their own."""
    window = min(sizes.sliding_window, context_length) if layer.is_sliding else context_length
    return window - (layer.is_upward or sizes.force_nodiag)


def _mean_num_keys(layer: LayerPlan, sizes: ModelSizes, context_length: int) -> float:
    """The mean of `_num_keys` over the contexts of 1 to `context_length` tokens."""
    window = min(sizes.sliding_window, context_length) if layer.is_sliding else context_length
    growing = window * (window + 1) // 2  # while the window fills, each token sees one key more
    all_keys = growing + (context_length - window) * window
    return all_keys / context_length - (layer.is_upward or sizes.force_nodiag)
