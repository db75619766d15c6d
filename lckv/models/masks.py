"""Which keys each query sees: one mask per kind of layer, for every attention backend of transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import Cache
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    add_offsets_to_mask_function,
    find_packed_sequence_indices,
    prepare_padding_mask,
)

from lckv.models.configuration_lckv import LCKVLlamaConfig
from lckv.models.sharing_cache import SharingCache
from lckv.models.visibility import Geometry, MaskFunction, build_rule, or_own_token
from lckv.patterns import LayerPlan, SharingPlan

FLASH_ATTENTION = ("flash_attention_2", "flash_attention_3", "flash_attention_4")


@dataclass(frozen=True)
class MaskKind:
    """Layers with equal kinds share one mask.

    Attributes:
        hides_own_token: queries see `k < q` instead of `k <= q`.
        window: number of tokens that queries see, counting their own, or `None` for all.
        geometry_layer: the layer whose cache says how many keys there are and where they start.
    """

    hides_own_token: bool
    window: int | None
    geometry_layer: int


@dataclass
class VisibleKeys:
    """What an attention backend needs to know about the keys that the queries of one layer see.

    Attributes:
        mask: what transformers' mask function for the backend returned; `None` means plain causal attention.
        drop_own_token: the backend shall hide each query's own token by shifting keys against queries.
        sees_nothing: `(batch or 1, q_len)`, true for queries without any visible key. Their row in `mask` shows their
            own token, so that no backend divides by zero, and their attention output has to be replaced by zero.
        varlen: for flash attention, how padded or packed batches are cut into sequences.
        window: as in [`MaskKind`]; flash attention applies it itself.
        reach: how many keys up to its own each query looks back at most, where `mask` is long enough to be cut into
            blocks; the last key is the last query's own.
    """

    mask: torch.Tensor | BlockMask | None = None
    drop_own_token: bool = False
    sees_nothing: torch.Tensor | None = None
    varlen: VarlenBatch | None = None
    window: int | None = None
    reach: int | None = None


@dataclass
class VarlenBatch:
    """A padded or packed batch as consecutive sequences without padding.

    Attributes:
        query_indices: positions in the flattened `(batch * q_len)` queries to keep, `(num_queries,)`.
        key_indices: positions in the flattened `(batch * kv_len)` keys to keep, `(num_keys,)`.
        cu_seq_lens_q: where each sequence's queries begin, and their end, `(num_sequences + 1,)`.
        cu_seq_lens_k: the same for keys.
        max_length_q: most queries of a sequence.
        max_length_k: most keys of a sequence.
    """

    query_indices: torch.Tensor
    key_indices: torch.Tensor
    cu_seq_lens_q: torch.Tensor
    cu_seq_lens_k: torch.Tensor
    max_length_q: int
    max_length_k: int


def build_visible_keys(
    config: LCKVLlamaConfig,
    plan: SharingPlan,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    document_ids: torch.Tensor | None,
    num_queries: int | None = None,
) -> list[VisibleKeys]:
    """Builds what the queries of every layer see in one forward call, before the cache takes the call's tokens.

    Args:
        config: the model's configuration; its attention implementation decides the form of the masks.
        plan: the sharing pattern.
        inputs_embeds: `(batch, q_len, hidden_size)`, for its sizes, type and device.
        attention_mask: `(batch, past + q_len)` with zeros at padding, or `(batch or 1, 1, q_len, past + q_len)`,
            boolean or additive, for which queries may see which keys (causality, windows and hidden own tokens are
            applied on top).
        past_key_values: the cache, before this call's tokens.
        document_ids: `(batch, past + q_len)`, equal for tokens that may see each other; `None` if all may.
        num_queries: how many of the last new tokens have queries; `None` if all do.
    """
    num_new_tokens = inputs_embeds.shape[1]
    num_queries = num_new_tokens if num_queries is None else num_queries
    if attention_mask is not None:
        attention_mask = _as_boolean(attention_mask.to(inputs_embeds.device))
        if attention_mask.ndim == 4:
            attention_mask = attention_mask[:, :, -num_queries:]
    builder = _MaskBuilder(
        config,
        plan,
        inputs_embeds[:, -num_queries:],
        attention_mask,
        past_key_values,
        document_ids,
        num_tokens_before=num_new_tokens - num_queries,
    )
    kinds = [builder.kind_of(layer) for layer in plan.layers]
    masks = {kind: builder.build(kind) for kind in set(kinds)}
    return [masks[kind] for kind in kinds]


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


@dataclass
class _MaskBuilder:
    """The arguments of [`build_visible_keys`], and how a mask follows from them and the kind of layer.

    `inputs_embeds` are those of the tokens with queries, `num_tokens_before` counts the new tokens before them.
    """

    config: LCKVLlamaConfig
    plan: SharingPlan
    inputs_embeds: torch.Tensor
    attention_mask: torch.Tensor | None
    past_key_values: Cache | None
    document_ids: torch.Tensor | None
    num_tokens_before: int

    def __post_init__(self) -> None:
        self.batch_size, self.q_length = self.inputs_embeds.shape[:2]
        self.dtype, self.device = self.inputs_embeds.dtype, self.inputs_embeds.device
        self.is_unpadded = self._nothing_is_padded()  # waits for the device, so once

    def kind_of(self, layer: LayerPlan) -> MaskKind:
        """The kind of mask that `layer` needs."""
        return MaskKind(
            hides_own_token=layer.is_upward or self.config.force_nodiag,
            window=self.config.sliding_window if layer.is_sliding else None,
            geometry_layer=self._geometry_layer(layer.kv_source),
        )

    def _geometry_layer(self, owner: int) -> int:
        """The lowest layer with as many cached keys as `owner`: owners differ in whether the cache drops old keys."""
        if self.past_key_values is None:
            return 0
        is_sliding = self.plan.owner_is_sliding(owner)
        return next(layer for layer in self.plan.kv_owners if self.plan.owner_is_sliding(layer) == is_sliding)

    def build(self, kind: MaskKind) -> VisibleKeys:
        """What the queries of layers of this kind see."""
        implementation = self.config._attn_implementation
        if implementation not in ALL_MASK_ATTENTION_FUNCTIONS:
            return VisibleKeys(mask=None)
        at = self._geometry(kind.geometry_layer)
        window = kind.window
        if window is not None and isinstance(at.q_offset, int) and at.q_offset + self.q_length <= window:
            window = None
        is_plain = window is None and self.document_ids is None and self.is_unpadded
        if implementation in FLASH_ATTENTION:
            return self._flash(kind, at.kv_length, window, at.key_positions)
        if implementation == "sdpa" and is_plain and isinstance(at.q_offset, int) and self._is_aligned(at.kv_length):
            return VisibleKeys(mask=None, drop_own_token=kind.hides_own_token)
        return self._dense_or_block(kind.hides_own_token, window, at)

    def _geometry(self, layer_idx: int) -> Geometry:
        """Where the keys in this layer's cache and the queries lie."""
        num_new_tokens = self.num_tokens_before + self.q_length
        if self.past_key_values is None:
            return Geometry(num_new_tokens, 0, self.num_tokens_before)
        q_offset = self.past_key_values.get_seq_length(layer_idx) + self.num_tokens_before
        if isinstance(q_offset, torch.Tensor):
            q_offset = q_offset.to(self.device)
        kv_length, kv_offset = self.past_key_values.get_mask_sizes(num_new_tokens, layer_idx)
        return Geometry(kv_length, kv_offset, q_offset, self._key_positions(layer_idx))

    def _key_positions(self, layer_idx: int) -> torch.Tensor | None:
        """The position of each key, `(batch, kv_len)`; `None` where they are consecutive."""
        if not isinstance(self.past_key_values, SharingCache):
            return None
        positions = self.past_key_values.get_key_positions(self.num_tokens_before + self.q_length, layer_idx)
        return None if positions is None else positions.to(self.device).expand(self.batch_size, -1)

    def _is_aligned(self, kv_length: int) -> bool:
        """Whether causality follows from the lengths: nothing cached, or one query behind all keys."""
        return kv_length == self.q_length or (self.q_length == 1 and not is_compileable(self.past_key_values))

    def _nothing_is_padded(self) -> bool:
        if self.attention_mask is None:
            return True
        if self.attention_mask.ndim == 4 or torch.compiler.is_compiling():
            return False
        return bool(self.attention_mask.all())

    def _dense_or_block(self, hides_own_token: bool, window: int | None, at: Geometry) -> VisibleKeys:
        """A mask from transformers' own function for the backend, with our rule for who sees whom."""
        allowed = padding = None
        if self.attention_mask is not None and self.attention_mask.ndim == 4:
            allowed = self._allowed_pairs(self.attention_mask, at)
        else:
            padding = prepare_padding_mask(self.attention_mask, at.kv_length, at.kv_offset)
        sees = build_rule(at, hides_own_token, window, padding, self._documents_with_room(at), allowed)
        sees_nothing, mask_function = None, sees
        if hides_own_token or padding is not None or allowed is not None:
            if allowed is not None or at.key_positions is not None:
                nothing = self._rows_without_keys(sees, at)
            else:
                nothing = self._rows_without_earlier_keys(hides_own_token, window, padding, at.q_offset)
            sees_nothing = nothing if hides_own_token else None
            mask_function = or_own_token(sees, nothing, at)
        is_sdpa = self.config._attn_implementation == "sdpa"
        has_reach = is_sdpa and at.key_positions is None and self._ends_with_the_last_query()
        return VisibleKeys(
            self._mask(mask_function, at), sees_nothing=sees_nothing, reach=window if has_reach else None
        )

    def _documents_with_room(self, at: Geometry) -> torch.Tensor | None:
        """The tokens' documents, `(batch, kv_offset + kv_len)`: a static cache has room behind them."""
        if self.document_ids is None:
            return None
        room = max(0, at.kv_length + at.kv_offset - self.document_ids.shape[1])
        return torch.nn.functional.pad(self.document_ids, (0, room), value=-1)

    def _mask(self, mask_function: MaskFunction, at: Geometry) -> torch.Tensor | BlockMask:
        """What the backend takes for such a rule."""
        if self.config._attn_implementation == "flex_attention" and self.device.type == "cpu":
            return self._block_mask_on_cpu(mask_function, at)
        return ALL_MASK_ATTENTION_FUNCTIONS[self.config._attn_implementation](
            batch_size=self.batch_size,
            q_length=self.q_length,
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

    def _ends_with_the_last_query(self) -> bool:
        """Whether no key lies behind the last query's, as empty slots of a static cache do."""
        return not is_compileable(self.past_key_values)

    def _allowed_pairs(self, attention_mask: torch.Tensor, at: Geometry) -> torch.Tensor:
        """The part `(batch, q_len, kv_len)` of a 4D mask for the keys that there are, false where it has none."""
        allowed = attention_mask[:, 0].expand(self.batch_size, -1, -1)
        if at.key_positions is not None:
            return allowed.gather(2, at.key_positions[:, None].clamp(min=0).expand(-1, self.q_length, -1))
        allowed = allowed[..., at.kv_offset : at.kv_offset + at.kv_length]
        return torch.nn.functional.pad(allowed, (0, at.kv_length - allowed.shape[-1]))

    def _block_mask_on_cpu(self, mask_function: MaskFunction, at: Geometry) -> BlockMask:
        """What transformers' function does, but without compiling it: inductor's C++ for such masks does not build."""
        return create_block_mask(
            mask_mod=add_offsets_to_mask_function(mask_function, cast(int, at.q_offset), at.kv_offset),
            B=self.batch_size,
            H=None,
            Q_LEN=self.q_length,
            KV_LEN=at.kv_length,
            device=self.device,
        )

    def _rows_without_keys(self, sees: MaskFunction, at: Geometry) -> torch.Tensor:
        """Which queries see no key at all, `(batch, q_len)`, by trying every pair."""
        batch_idx = torch.arange(self.batch_size, device=self.device)[:, None, None]
        q_idx = torch.arange(self.q_length, device=self.device)[None, :, None] + at.q_offset
        kv_idx = torch.arange(at.kv_length, device=self.device)[None, None, :] + at.kv_offset
        return ~sees(batch_idx, None, q_idx, kv_idx).any(dim=-1)  # (batch, q_len, kv_len) -> (batch, q_len)

    def _rows_without_earlier_keys(
        self, hides_own_token: bool, window: int | None, padding: torch.Tensor | None, q_offset: int | torch.Tensor
    ) -> torch.Tensor:
        """The same `(batch, q_len)` by counting the keys of each query's span, without a matrix of pairs."""
        stop = torch.arange(self.q_length, device=self.device)[None, :].expand(self.batch_size, -1) + q_offset
        first = torch.zeros_like(stop) if window is None else (stop - window + 1).clamp(min=0)
        if self.document_ids is not None:
            first = torch.maximum(first, _document_starts(self.document_ids).gather(1, stop))
        if not hides_own_token:
            stop = stop + 1
        if padding is None:
            return first >= stop
        num_keys_before = torch.nn.functional.pad(padding.long().cumsum(dim=1), (1, 0))
        return num_keys_before.gather(1, stop) == num_keys_before.gather(1, first.minimum(stop))

    def _flash(
        self, kind: MaskKind, kv_length: int, window: int | None, key_positions: torch.Tensor | None
    ) -> VisibleKeys:
        """Flash attention is causal and windowed by itself; only padding and documents have to be cut out."""
        if self.attention_mask is not None and self.attention_mask.ndim == 4:
            raise ValueError("flash attention takes no 4D attention_mask: use attn_implementation='sdpa'")
        if is_compileable(self.past_key_values):
            raise ValueError("flash attention takes no static cache: use attn_implementation='sdpa'")
        is_uncut = self.document_ids is None and self.is_unpadded
        varlen = None if is_uncut else self._varlen(kind.hides_own_token, kv_length, key_positions)
        return VisibleKeys(drop_own_token=kind.hides_own_token, varlen=varlen, window=window)

    def _varlen(self, hides_own_token: bool, kv_length: int, key_positions: torch.Tensor | None) -> VarlenBatch:
        """Cuts the batch into its documents, or rows without padding; each loses its last key if own tokens hide."""
        rows = torch.arange(self.batch_size, device=self.device)[:, None]
        if self.document_ids is not None:
            documents = self.document_ids[:, :kv_length] + rows * self.document_ids.shape[1]
            query_sequences, key_sequences = documents[:, -self.q_length :].flatten(), documents.flatten()
            is_query, is_key = (
                torch.ones_like(query_sequences, dtype=torch.bool),
                torch.isin(key_sequences, query_sequences),
            )
        else:
            padding = prepare_padding_mask(self.attention_mask, kv_length, 0)
            assert padding is not None
            padding = padding[:, -kv_length:] if key_positions is None else _at_positions(padding, key_positions)
            is_key, key_sequences = padding.flatten(), rows.expand_as(padding).flatten()
            is_query = padding[:, -self.q_length :].flatten()
            query_sequences = rows.expand(-1, self.q_length).flatten()
        query_indices, query_sequences = is_query.nonzero().flatten(), query_sequences[is_query]
        key_indices, key_sequences = is_key.nonzero().flatten(), key_sequences[is_key]
        sequences, num_keys = key_sequences.unique_consecutive(return_counts=True)
        num_queries = torch.bincount(torch.searchsorted(sequences, query_sequences), minlength=len(sequences))
        if hides_own_token:
            key_indices = key_indices[_not_last_of(num_keys)]
            num_keys = num_keys - 1
        return VarlenBatch(
            query_indices,
            key_indices,
            _offsets(num_queries),
            _offsets(num_keys),
            max_length_q=int(num_queries.max()),
            max_length_k=int(num_keys.max()),
        )


def _at_positions(padding: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:
    """Which keys `(batch, kv_len)` belong to a token, and one that is no padding."""
    return padding.gather(1, key_positions.clamp(min=0)) & (key_positions >= 0)


def _not_last_of(lengths: torch.Tensor) -> torch.Tensor:
    """For concatenated sequences of these `lengths`, which elements are not the last of theirs."""
    keep = torch.ones(int(lengths.sum()), dtype=torch.bool, device=lengths.device)
    keep[lengths.cumsum(0) - 1] = False
    return keep


def _offsets(lengths: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def _document_starts(document_ids: torch.Tensor) -> torch.Tensor:
    """For every token, the position of its document's first token, `(batch, seq_len)`."""
    positions = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    is_first = torch.nn.functional.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True)
    return torch.where(is_first, positions, 0).cummax(dim=1).values


def find_documents(position_ids: torch.Tensor, batch_size: int) -> torch.Tensor | None:
    """Numbers the documents of a packed batch, `(batch, q_len)`; `None` if positions never restart."""
    document_ids = find_packed_sequence_indices(position_ids)
    return None if document_ids is None else document_ids.expand(batch_size, -1)


def is_compileable(past_key_values: Cache | None) -> bool:
    """Whether the cache has fixed sizes, so that it returns more keys than have been written."""
    return getattr(past_key_values, "is_compileable", False)


def has_cached_tokens(past_key_values: Cache | None, plan: SharingPlan) -> bool:
    """Whether there are earlier tokens; a compiled static cache cannot tell and is taken to have some."""
    if past_key_values is None:
        return False
    seq_length = past_key_values.get_seq_length(plan.kv_owners[0])
    if isinstance(seq_length, torch.Tensor) and torch.compiler.is_compiling():
        return True
    return bool(seq_length > 0)
