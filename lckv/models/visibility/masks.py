"""Which keys each query sees: one rule, and the forms of it that the attention backends of transformers take.

A query at position *q* sees keys at `k <= q`; in a layer that reads upward only `k < q`, since its own key does not
exist yet; with a window also `q - k < window`; never padding, another document, or what a 4D mask forbids. Layers with
the same answer share one mask, of one of four forms:

- none at all, where plain causal attention says the same (hiding the own token then means shifting keys by one);
- dense, `(batch, 1, q_len, kv_len)`, for eager and sdpa;
- a block mask, for flex attention;
- the sequences of a padded or packed batch, for flash attention, which is causal and windowed by itself.

A query that sees nothing, such as the first token's in a layer that reads upward, must give exactly zero. Softmax over
nothing divides by zero, so the mask shows it its own token, and the attention output is replaced by zero afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import pad
from transformers import Cache
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    add_offsets_to_mask_function,
    find_packed_sequence_indices,
    prepare_padding_mask,
)

from lckv.models.configuration_lckv import LCKVLlamaConfig
from lckv.models.parts.rotary import PositionEmbeddings, Positions
from lckv.models.parts.sharing_cache import SharingCache
from lckv.models.visibility.varlen import VarlenBatch, cut_packed, cut_padded
from lckv.sharing.layout import KVLayout
from lckv.sharing.patterns import LayerPlan

FLASH_ATTENTION = ("flash_attention_2", "flash_attention_3", "flash_attention_4")

MaskFunction = Callable[..., Any]
"""Transformers' kind: `(batch_idx, head_idx, q_idx, kv_idx)`, with positions as indices, to whether the query sees."""


class MaskKind(NamedTuple):
    """Layers with equal kinds share one mask. A tuple, as each layer's is made and looked up for every token.

    Attributes:
        hides_own_token: queries see `k < q` instead of `k <= q`.
        window: number of tokens that queries see, counting their own, or `None` for all.
        geometry_layer: the layer whose cache says how many keys there are and where they start.
        num_queries: how many of the last new tokens have queries.
    """

    hides_own_token: bool
    window: int | None
    geometry_layer: int
    num_queries: int


@dataclass(frozen=True)
class Geometry:
    """Where the keys and queries of layers of one kind lie. Positions count padding.

    Attributes:
        num_queries: how many of the last new tokens have queries.
        q_offset: position of the first of them.
        kv_length: number of keys.
        kv_offset: position of the first.
        key_positions: the position of each key, `(batch, kv_len)`, negative for empty slots; `None` where they are
            consecutive.
    """

    num_queries: int
    q_offset: int | torch.Tensor
    kv_length: int
    kv_offset: int = 0
    key_positions: torch.Tensor | None = None


@dataclass
class VisibleKeys:
    """What an attention backend needs to know about the keys that the queries of one layer see.

    Attributes:
        num_queries: how many of the last new tokens have queries.
        mask: what transformers' mask function for the backend returned; `None` means plain causal attention.
        drop_own_token: the backend shall hide each query's own token by shifting keys against queries.
        sees_nothing: `(batch or 1, q_len)`, true for queries without any visible key. Their row in `mask` shows their
            own token, so that no backend divides by zero, and their attention output has to be replaced by zero.
        varlen: for flash attention, how padded or packed batches are cut into sequences.
        window: as in [`MaskKind`]; flash attention applies it itself.
        reach: how many keys up to its own each query looks back at most, where `mask` is long enough to be cut into
            blocks; the last key is the last query's own.
        key_rotation: cosines and sines for the positions of the keys, each `(batch or 1, 1, kv_len, head_dim)`,
            where layers make keys of what was not rotated when it was written.
    """

    num_queries: int
    mask: torch.Tensor | BlockMask | None = None
    drop_own_token: bool = False
    sees_nothing: torch.Tensor | None = None
    varlen: VarlenBatch | None = None
    window: int | None = None
    reach: int | None = None
    key_rotation: PositionEmbeddings | None = None


def build_visible_keys(
    builder: MaskBuilder,
    num_outputs: int | None = None,
    positions: Positions | None = None,
) -> list[VisibleKeys | None]:
    """Builds what the queries of every layer see in one forward call, before the cache takes the call's tokens.

    From the highest owner on, nothing but the outputs of the last tokens leaves a layer, so only these have queries.

    Args:
        builder: what the call holds.
        num_outputs: how many of the last tokens' outputs are wanted; `None` for all.
        positions: of the new tokens, for keys that are rotated when they are read.

    Returns:
        For every layer what its queries see; `None` for layers from which no output is wanted.
    """
    config, layout = builder.config, builder.layout
    rotates_late = positions is not None and layout.rotates_keys_late
    rotations: dict[tuple[int, str | None], PositionEmbeddings] = {}  # by the layer that says where the keys lie
    masks: dict[MaskKind, VisibleKeys | None] = {}
    visible_keys = []
    for layer in config.sharing_plan.layers:
        is_cut = num_outputs is not None and layer.layer_idx >= layout.owners[-1]
        kind = builder.kind_of(layer, cast(int, num_outputs) if is_cut else builder.num_new_tokens)
        if kind not in masks:
            masks[kind] = builder.build(kind) if kind.num_queries else None
        visible = masks[kind]
        if visible is not None and positions is not None and rotates_late:
            place = kind.geometry_layer, config.query_label(layer.layer_idx)
            if place not in rotations:
                rotations[place] = positions.embed_keys(builder.past_key_values, place[0], builder.padding, place[1])
            visible = replace(visible, key_rotation=rotations[place])
        visible_keys.append(visible)
    return visible_keys


class MaskBuilder:
    """What one forward call holds, and how a mask follows from it and the kind of layer.

    Args:
        config: the model's configuration; its attention implementation decides the form of the masks.
        layout: what each layer reads.
        inputs_embeds: `(batch, q_len, hidden_size)`, for its sizes, type and device.
        attention_mask: `(batch, past + q_len)` with zeros at padding, or `(batch or 1, 1, q_len, past + q_len)`,
            boolean or additive, for which queries may see which keys (causality, windows and hidden own tokens are
            applied on top).
        past_key_values: the cache, before this call's tokens.
        document_ids: `(batch, past + q_len)`, equal for tokens that may see each other; `None` if all may.
    """

    def __init__(
        self,
        config: LCKVLlamaConfig,
        layout: KVLayout,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        document_ids: torch.Tensor | None,
    ) -> None:
        self.config, self.layout, self.past_key_values = config, layout, past_key_values
        self.batch_size, self.num_new_tokens = inputs_embeds.shape[:2]
        self.dtype, self.device = inputs_embeds.dtype, inputs_embeds.device
        self.padding = self.allowed = None  # `(batch, past + q_len)`, or `(batch, q_len, past + q_len)` of a 4D mask
        if attention_mask is not None:
            attention_mask = _as_boolean(attention_mask.to(self.device))
            if attention_mask.ndim == 4:
                self.allowed = attention_mask[:, 0].expand(self.batch_size, -1, -1)
            else:
                self.padding = attention_mask
        self.document_ids = document_ids
        self.hides_own_token, self.window = config.force_nodiag, config.sliding_window
        self.is_unpadded = self._nothing_is_hidden()

    def _nothing_is_hidden(self) -> bool:
        """Whether no key is padding or forbidden. It waits for the device, so it is asked once a call."""
        if self.padding is None:
            return self.allowed is None
        return not torch.compiler.is_compiling() and bool(self.padding.all())

    def kind_of(self, layer: LayerPlan, num_queries: int) -> MaskKind:
        """The kind of mask that `layer` needs."""
        return MaskKind(
            hides_own_token=layer.is_upward or self.hides_own_token,
            window=self.window if layer.is_sliding else None,
            # Some owners drop old keys, and some do not.
            geometry_layer=0 if self.past_key_values is None else self.layout.keeps_alike[layer.layer_idx],
            num_queries=num_queries,
        )

    def build(self, kind: MaskKind) -> VisibleKeys:
        """What the queries of layers of this kind see."""
        implementation = self.config._attn_implementation
        if implementation not in ALL_MASK_ATTENTION_FUNCTIONS:
            return VisibleKeys(kind.num_queries)
        at = self.locate(kind)
        # A window that reaches back to the first token hides nothing, and without one a cheaper form may do. A static
        # cache keeps its offset in a tensor, so that a compiled step serves every position: there the window stays.
        window = kind.window
        if window is not None and isinstance(at.q_offset, int) and at.q_offset + at.num_queries <= window:
            window = None
        if implementation in FLASH_ATTENTION:
            return self._flash(kind.hides_own_token, window, at)
        is_plain = window is None and self.document_ids is None and self.is_unpadded
        if implementation == "sdpa" and is_plain and isinstance(at.q_offset, int) and self._is_aligned(at):
            return VisibleKeys(at.num_queries, drop_own_token=kind.hides_own_token)
        return self._dense_or_block(kind.hides_own_token, window, at)

    def locate(self, kind: MaskKind) -> Geometry:
        """Where the keys in the cache of a layer of this kind, and its queries, lie."""
        num_tokens_before = self.num_new_tokens - kind.num_queries  # new ones that have no queries
        cache, layer_idx = self.past_key_values, kind.geometry_layer
        if cache is None:
            return Geometry(kind.num_queries, num_tokens_before, self.num_new_tokens)
        q_offset = cache.get_seq_length(layer_idx) + num_tokens_before
        if isinstance(q_offset, torch.Tensor):
            q_offset = q_offset.to(self.device)
        key_positions = None
        if isinstance(cache, SharingCache):
            key_positions = cache.get_key_positions(self.num_new_tokens, layer_idx)
        if key_positions is not None:
            key_positions = key_positions.to(self.device).expand(self.batch_size, -1)
        kv_length, kv_offset = cache.get_mask_sizes(self.num_new_tokens, layer_idx)
        return Geometry(kind.num_queries, q_offset, kv_length, kv_offset, key_positions)

    def _is_aligned(self, at: Geometry) -> bool:
        """Whether causality follows from the lengths: nothing cached, or one query behind all keys."""
        return at.kv_length == at.num_queries or (at.num_queries == 1 and not is_compileable(self.past_key_values))

    def _dense_or_block(self, hides_own_token: bool, window: int | None, at: Geometry) -> VisibleKeys:
        """A mask from transformers' own function for the backend, with our rule for who sees whom."""
        allowed = self.allowed_pairs(at)
        padding = prepare_padding_mask(self.padding, at.kv_length, at.kv_offset)
        sees = build_rule(at, hides_own_token, window, padding, self.documents_with_room(at), allowed)
        sees_nothing, mask_function = None, sees
        # Plain causality always leaves a query its own token; only what takes that away can leave it nothing.
        if hides_own_token or padding is not None or allowed is not None:
            if allowed is not None or at.key_positions is not None:
                nothing = self._rows_without_keys(sees, at)
            else:
                nothing = self._rows_without_earlier_keys(hides_own_token, window, padding, at)
            # Without hiding, only padding sees nothing, and what comes out at padding is nobody's business.
            sees_nothing = nothing if hides_own_token else None
            mask_function = or_own_token(sees, nothing, at)
        # Blocks need consecutive keys of which the last is the last query's, without a static cache's empty slots.
        has_reach = self.config._attn_implementation == "sdpa" and at.key_positions is None
        reach = window if has_reach and not is_compileable(self.past_key_values) else None
        return VisibleKeys(at.num_queries, self._mask(mask_function, at), sees_nothing=sees_nothing, reach=reach)

    def documents_with_room(self, at: Geometry) -> torch.Tensor | None:
        """The tokens' documents, `(batch, kv_offset + kv_len)`: a static cache has room behind them."""
        if self.document_ids is None:
            return None
        room = max(0, at.kv_length + at.kv_offset - self.document_ids.shape[1])
        return pad(self.document_ids, (0, room), value=-1)

    def allowed_pairs(self, at: Geometry) -> torch.Tensor | None:
        """The part `(batch, q_len, kv_len)` of a 4D mask for the keys that there are, false where it has none."""
        if self.allowed is None:
            return None
        allowed = self.allowed[:, -at.num_queries :]
        if at.key_positions is not None:
            return allowed.gather(2, at.key_positions[:, None].clamp(min=0).expand(-1, at.num_queries, -1))
        allowed = allowed[..., at.kv_offset : at.kv_offset + at.kv_length]
        return pad(allowed, (0, at.kv_length - allowed.shape[-1]))

    def _mask(self, mask_function: MaskFunction, at: Geometry) -> torch.Tensor | BlockMask:
        """What the backend takes for such a rule: `(batch, 1, q_len, kv_len)`, or blocks of that."""
        if self.config._attn_implementation == "flex_attention" and self.device.type == "cpu":
            # What transformers' function does, but without compiling it: inductor's C++ for such masks does not build.
            mask_mod = add_offsets_to_mask_function(mask_function, cast(int, at.q_offset), at.kv_offset)
            return create_block_mask(mask_mod, self.batch_size, None, at.num_queries, at.kv_length, self.device)
        return ALL_MASK_ATTENTION_FUNCTIONS[self.config._attn_implementation](
            batch_size=self.batch_size,
            q_length=at.num_queries,
            kv_length=at.kv_length,
            q_offset=at.q_offset,
            kv_offset=at.kv_offset,
            mask_function=mask_function,
            attention_mask=None,
            allow_is_causal_skip=False,
            dtype=self.dtype,
            config=self.config,
            use_vmap=False,
            device=self.device,
        )

    def _rows_without_keys(self, sees: MaskFunction, at: Geometry) -> torch.Tensor:
        """Which queries see no key at all, `(batch, q_len)`, by trying every pair."""
        batch_idx = torch.arange(self.batch_size, device=self.device)[:, None, None]
        q_idx = torch.arange(at.num_queries, device=self.device)[None, :, None] + at.q_offset
        kv_idx = torch.arange(at.kv_length, device=self.device)[None, None, :] + at.kv_offset
        return ~sees(batch_idx, None, q_idx, kv_idx).any(dim=-1)  # (batch, q_len, kv_len) -> (batch, q_len)

    def _rows_without_earlier_keys(
        self, hides_own_token: bool, window: int | None, padding: torch.Tensor | None, at: Geometry
    ) -> torch.Tensor:
        """The same `(batch, q_len)` by counting the keys of each query's span, without a matrix of pairs."""
        stop = torch.arange(at.num_queries, device=self.device)[None, :].expand(self.batch_size, -1) + at.q_offset
        # A query's span is `first <= k < stop`: from its window or the start of its document up to itself.
        first = torch.zeros_like(stop) if window is None else (stop - window + 1).clamp(min=0)
        if self.document_ids is not None:
            first = torch.maximum(first, _document_starts(self.document_ids).gather(1, stop))
        if not hides_own_token:
            stop = stop + 1
        if padding is None:
            return first >= stop
        # The span is empty if as many real tokens lie before its end as before its beginning.
        num_keys_before = pad(padding.long().cumsum(dim=1), (1, 0))
        return num_keys_before.gather(1, stop) == num_keys_before.gather(1, first.minimum(stop))

    def _flash(self, hides_own_token: bool, window: int | None, at: Geometry) -> VisibleKeys:
        """Flash attention is causal and windowed by itself; only padding and documents have to be cut out."""
        if self.allowed is not None:
            raise ValueError("flash attention takes no 4D attention_mask: use attn_implementation='sdpa'")
        if is_compileable(self.past_key_values):
            raise ValueError("flash attention takes no static cache: use attn_implementation='sdpa'")
        varlen = None
        if self.document_ids is not None:
            varlen = cut_packed(self.document_ids[:, : at.kv_length], at.num_queries, hides_own_token)
        elif not self.is_unpadded:
            padding = prepare_padding_mask(self.padding, at.kv_length, 0)
            assert padding is not None
            if at.key_positions is None:
                padding = padding[:, -at.kv_length :]
            else:
                padding = padding.gather(1, at.key_positions.clamp(min=0)) & (at.key_positions >= 0)
            varlen = cut_padded(padding, at.num_queries, hides_own_token)
        return VisibleKeys(at.num_queries, drop_own_token=hides_own_token, varlen=varlen, window=window)


def _as_boolean(attention_mask: torch.Tensor) -> torch.Tensor:
    """True where a key may be seen; additive masks have a zero there.

    Raises:
        ValueError: for a mask per head.
    """
    if attention_mask.ndim != 4:
        return attention_mask.bool()
    if attention_mask.shape[1] != 1:
        raise ValueError(
            f"a 4D attention_mask of shape {tuple(attention_mask.shape)}: allowed is (batch, 1, q_len, kv_len)"
        )
    return attention_mask >= 0 if attention_mask.is_floating_point() else attention_mask.bool()


def _document_starts(document_ids: torch.Tensor) -> torch.Tensor:
    """For every token, the position of its document's first token, `(batch, seq_len)`."""
    positions = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    is_first = pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True)
    return torch.where(is_first, positions, 0).cummax(dim=1).values


def find_documents(position_ids: torch.Tensor, batch_size: int) -> torch.Tensor | None:
    """Numbers the documents of a packed batch, `(batch, q_len)`; `None` if positions never restart."""
    document_ids = find_packed_sequence_indices(position_ids)
    return None if document_ids is None else document_ids.expand(batch_size, -1)


def is_compileable(past_key_values: Cache | None) -> bool:
    """Whether the cache has fixed sizes, so that it returns more keys than have been written."""
    return getattr(past_key_values, "is_compileable", False)


def build_rule(
    at: Geometry,
    hides_own_token: bool,
    window: int | None,
    padding: torch.Tensor | None,
    documents: torch.Tensor | None,
    allowed: torch.Tensor | None,
) -> MaskFunction:
    """Who sees whom: causality, the window, and what padding, documents and a 4D mask leave.

    Args:
        at: where keys and queries lie.
        hides_own_token: queries see `k < q` instead of `k <= q`.
        window: tokens that queries see, their own among them; `None` for all.
        padding: which tokens are none, false there, `(batch, kv_offset + kv_len)`; `None` if all are.
        documents: of every token, `(batch, kv_offset + kv_len)`; `None` for one.
        allowed: which pairs a 4D mask leaves, `(batch, q_len, kv_len)`; `None` for all.
    """
    kv_offset, q_offset, key_positions = at.kv_offset, at.q_offset, at.key_positions

    def sees(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        # Backends count keys by where they lie. In a ring or behind a sink that is not where the token stands in the
        # text, which is what causality and windows are about: so the slot is looked up first.
        index = kv_idx - kv_offset
        if key_positions is not None:
            kv_idx = key_positions[batch_idx, index]
        visible = kv_idx < q_idx if hides_own_token else kv_idx <= q_idx
        if key_positions is not None:
            visible, kv_idx = visible & (kv_idx >= 0), kv_idx.clamp(min=0)  # an empty slot has no token
        if window is not None:
            visible = visible & (kv_idx > q_idx - window)
        if padding is not None:
            visible = visible & padding[batch_idx, kv_idx]
        if documents is not None:
            visible = visible & (documents[batch_idx, q_idx] == documents[batch_idx, kv_idx])
        if allowed is not None:
            visible = visible & allowed[batch_idx, q_idx - q_offset, index]
        return visible

    return sees


def or_own_token(sees: MaskFunction, nothing: torch.Tensor, at: Geometry) -> MaskFunction:
    """The same rule, but queries that see `nothing`, `(batch, q_len)`, see their own token."""
    kv_offset, q_offset, key_positions = at.kv_offset, at.q_offset, at.key_positions

    def sees_something(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        position = kv_idx if key_positions is None else key_positions[batch_idx, kv_idx - kv_offset]
        own_token = nothing[batch_idx, q_idx - q_offset] & (position == q_idx)
        return sees(batch_idx, head_idx, q_idx, kv_idx) | own_token

    return sees_something


def has_cached_tokens(past_key_values: Cache | None, layout: KVLayout) -> bool:
    """Whether there are earlier tokens; a compiled static cache cannot tell and is taken to have some."""
    if past_key_values is None:
        return False
    seq_length = past_key_values.get_seq_length(layout.owners[0])
    if isinstance(seq_length, torch.Tensor) and torch.compiler.is_compiling():
        return True
    return bool(seq_length > 0)
