"""Padded and packed batches as flash attention takes them: sequences one behind the other, without padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch


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


def cut_packed(document_ids: torch.Tensor, q_len: int, hides_own_token: bool) -> VarlenBatch:
    """Cuts a packed batch into its documents.

    Args:
        document_ids: of the keys, `(batch, kv_len)`, in each row in ascending order.
        q_len: how many of the last tokens have queries.
        hides_own_token: queries see `k < q`, so that each document loses its last key.
    """
    num_rows, width = document_ids.shape
    rows = torch.arange(num_rows, device=document_ids.device)[:, None]
    documents = document_ids + rows * (document_ids.max() + 1)  # numbered on through the rows
    queries, keys = documents[:, width - q_len :].flatten(), documents.flatten()
    return _cut(torch.ones_like(queries, dtype=torch.bool), queries, torch.isin(keys, queries), keys, hides_own_token)


def cut_padded(is_token: torch.Tensor, q_len: int, hides_own_token: bool) -> VarlenBatch:
    """Cuts the padding out of a batch, so that each row is one sequence.

    Args:
        is_token: which of the keys are no padding, `(batch, kv_len)`.
        q_len: how many of the last tokens have queries.
        hides_own_token: queries see `k < q`, so that each row loses its last key.
    """
    rows = torch.arange(len(is_token), device=is_token.device)[:, None].expand_as(is_token)
    queries = slice(is_token.shape[1] - q_len, None)
    return _cut(
        is_token[:, queries].flatten(), rows[:, queries].flatten(), is_token.flatten(), rows.flatten(), hides_own_token
    )


def _cut(
    is_query: torch.Tensor,
    query_sequences: torch.Tensor,
    is_key: torch.Tensor,
    key_sequences: torch.Tensor,
    hides_own_token: bool,
) -> VarlenBatch:
    """Which of the flattened queries and keys to keep, and where their sequences begin, whose numbers ascend."""
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


def _not_last_of(lengths: torch.Tensor) -> torch.Tensor:
    """For concatenated sequences of these `lengths`, which elements are not the last of theirs."""
    keep = torch.ones(int(lengths.sum()), dtype=torch.bool, device=lengths.device)
    keep[lengths.cumsum(0) - 1] = False
    return keep


def _offsets(lengths: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
