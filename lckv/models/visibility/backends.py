"""How the attention backends of transformers are called, so that queries see their visible keys and no others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from lckv.models.visibility.masks import FLASH_ATTENTION, VisibleKeys

MIN_BLOCK = 128
"""Queries in a block of attention with a window, at least: smaller ones cost more calls than they save pairs."""


def attend(
    module: Any,
    query_states: torch.Tensor,
    key_states: torch.Tensor,
    value_states: torch.Tensor,
    visible_keys: VisibleKeys,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Calls the attention backend so that queries see their visible keys, and those without any get exactly zero.

    Args:
        module: the attention layer, from which backends read their settings.
        query_states: `(batch, num_heads, q_len, head_dim)`.
        key_states: `(batch, num_kv_heads, kv_len, head_dim)`.
        value_states: `(batch, num_kv_heads, kv_len, head_dim)`.
        visible_keys: which keys each query sees.
        kwargs: passed on to the backend.

    Returns:
        The output `(batch, q_len, num_heads, head_dim)` and the weights, where the backend has them.
    """
    window = visible_keys.window
    # A window counts the query's own token. Where keys are shifted so that it is hidden, the last visible key stands
    # in its place, and a backend that applies the window itself has to count one less.
    if window is not None and visible_keys.drop_own_token:
        window -= 1

    def backend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | BlockMask | None = visible_keys.mask,
        **backend_kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        implementation = module.config._attn_implementation
        if implementation in FLASH_ATTENTION and isinstance(mask, torch.Tensor):
            implementation = "sdpa"  # every fourth token's query, say, is nothing that flash attention has a word for
        dropout = module.attention_dropout if module.training else 0.0
        if query.shape[2] == 1 and dropout == 0.0 and not isinstance(mask, BlockMask):
            is_latent = value.shape[1::2] != key.shape[1::2]  # other heads, of another width, which few backends take
            is_compiled = torch.compiler.is_compiling() and query.device.type == "cpu" and implementation == "sdpa"
            if is_latent or is_compiled:
                return attend_with_one_query(query, key, value, mask, module.scaling)
        interface: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        return interface(module, query, key, value, mask, dropout=dropout, scaling=module.scaling, **backend_kwargs)

    if window is not None:
        kwargs["sliding_window"] = window
    if window == 0:
        return _zeros(query_states, value_states), None
    if visible_keys.varlen is not None:
        return _attend_varlen(backend, query_states, key_states, value_states, visible_keys, **kwargs), None
    if visible_keys.drop_own_token:
        return _attend_shifted(backend, query_states, key_states, value_states, **kwargs), None
    reach = visible_keys.reach
    if reach is not None and query_states.shape[2] > 2 * max(reach, MIN_BLOCK):
        attn_output, attn_weights = _attend_in_blocks(
            backend, query_states, key_states, value_states, visible_keys, **kwargs
        )
    else:
        attn_output, attn_weights = backend(query_states, key_states, value_states, **kwargs)
    if visible_keys.sees_nothing is not None:
        sees_nothing = visible_keys.sees_nothing[:, :, None, None]  # (batch, q_len, 1, 1)
        attn_output = attn_output.masked_fill(sees_nothing, 0.0)
        if attn_weights is not None:
            attn_weights = attn_weights.masked_fill(sees_nothing.transpose(1, 2), 0.0)
    return attn_output, attn_weights


def attend_with_one_query(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one query per row, whose values may have other heads than the keys, of another width.

    When compiled for a CPU, products are sums that the compiler fuses into one loop over the keys: the matrix products
    inside torch's own kernel take longer to set up than to compute for one query, in bfloat16 most of all: for 256
    keys the compiled kernel takes a third of the time.

    Args:
        query: `(batch, num_heads, 1, head_dim)`.
        key: `(batch, num_kv_heads, kv_len, head_dim)`.
        value: `(batch, 1 or num_kv_heads, kv_len, width)`.
        mask: boolean or additive, `(batch or 1, 1, 1, kv_len)`, or `None` if all keys are visible.
        scaling: of the scores.

    Returns:
        `(batch, 1, num_heads, width)`, and the weights `(batch, num_heads, 1, kv_len)`.
    """
    is_fused = torch.compiler.is_compiling() and query.device.type == "cpu"
    num_groups = query.shape[1] // key.shape[1]
    query = query.unflatten(1, (key.shape[1], num_groups))[..., 0, :]  # (batch, num_kv_heads, groups, head_dim)
    if is_fused:
        scores = (query[..., None, :].float() * scaling * key[:, :, None].float()).sum(-1)
    else:
        scores = (query * scaling @ key.transpose(2, 3)).float()
    if mask is not None:  # (batch, num_kv_heads, groups, kv_len)
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1)
    if is_fused:
        output = (weights[..., None] * value[:, :, None].float()).sum(-2)
    elif value.shape[1] == 1:  # heads are rows of one product, and the values are read once
        output = (weights.flatten(1, 2)[:, None].to(value.dtype) @ value)[:, 0].unflatten(1, (-1, num_groups))
    else:
        output = weights.to(value.dtype) @ value
    output = output.flatten(1, 2)[:, None].to(value.dtype)  # from (batch, num_kv_heads, groups, width)
    return output, weights.flatten(1, 2)[:, :, None].to(value.dtype)


def _zeros(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """What queries get that see nothing, `(batch, q_len, num_heads, width)`."""
    batch_size, num_heads, q_len = query.shape[:3]
    return query.new_zeros(batch_size, q_len, num_heads, value.shape[3])


def _attend_shifted(
    backend: Callable[..., Any], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any
) -> torch.Tensor:
    """Hides each query's own token by plain causal attention over keys that end one token earlier."""
    key, value = key[:, :, :-1], value[:, :, :-1]
    num_blind = 1 if key.shape[2] < query.shape[2] else 0  # nothing is cached: the first query has no key
    if num_blind and query.shape[2] == 1:
        return _zeros(query, value)
    # With the last key gone, lengths align queries with the token before theirs: causal as backends mean it, from
    # the last query backwards, now hides the own token too.
    attn_output, _ = backend(query[:, :, num_blind:], key, value, **kwargs)
    return nn.functional.pad(attn_output, (0, 0, 0, 0, num_blind, 0))


def _attend_in_blocks(
    backend: Callable[..., Any],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible_keys: VisibleKeys,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention with a window, block by block: a mask alone would hide most pairs after computing them.

    Returns:
        The output `(batch, q_len, num_heads, head_dim)`, and no weights.
    """
    mask, reach, q_len = visible_keys.mask, visible_keys.reach, query.shape[2]
    assert isinstance(mask, torch.Tensor) and reach is not None
    num_past = key.shape[2] - q_len
    # A block of as many queries as the window reaches computes at most twice the pairs that are seen; each block
    # takes the keys from `reach` before its first query to its last.
    outputs = []
    for start in range(0, q_len, max(reach, MIN_BLOCK)):
        stop = min(start + max(reach, MIN_BLOCK), q_len)
        keys = slice(max(0, num_past + start - reach + 1), num_past + stop)
        block = mask[:, :, start:stop, keys]
        outputs.append(backend(query[:, :, start:stop], key[:, :, keys], value[:, :, keys], block, **kwargs)[0])
    return torch.cat(outputs, dim=1), None


def _attend_varlen(
    backend: Callable[..., Any],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible_keys: VisibleKeys,
    **kwargs: Any,
) -> torch.Tensor:
    """Flash attention over the sequences of a padded or packed batch; queries without keys come out as zero."""
    varlen = visible_keys.varlen
    assert varlen is not None

    def pick(states: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return states.transpose(1, 2).flatten(0, 1)[indices].transpose(0, 1)[None]  # (1, num_heads, picked, head_dim)

    attn_output, _ = backend(
        pick(query, varlen.query_indices),
        pick(key, varlen.key_indices),
        pick(value, varlen.key_indices),
        cu_seq_lens_q=varlen.cu_seq_lens_q,
        cu_seq_lens_k=varlen.cu_seq_lens_k,
        max_length_q=varlen.max_length_q,
        max_length_k=varlen.max_length_k,
        **kwargs,
    )
    batch_size, num_heads, q_len, head_dim = query.shape
    output = attn_output.new_zeros(batch_size * q_len, num_heads, head_dim)
    output = output.index_copy(0, varlen.query_indices, attn_output[0])
    return output.view(batch_size, q_len, num_heads, head_dim)
