"""Log-probabilities at the end of sequences, in one forward pass or through a cache."""

from __future__ import annotations

import torch

from lckv.evaluation.evaluations import Subject


@torch.no_grad()
def last_log_probabilities(
    subject: Subject, input_ids: torch.Tensor, *, num_kept: int, num_cached: int
) -> torch.Tensor:
    """What the model expects behind each of the last tokens.

    Args:
        subject: its model and, where it has one, its cache.
        input_ids: `(batch, q_len)`, without padding.
        num_kept: for how many of the last tokens; logits of no others are computed.
        num_cached: with a cache, how many of the first tokens are written to it before the others are scored on it.

    Returns:
        `(batch, num_kept, vocab_size)` in float32, on the CPU.
    """
    model = subject.model
    input_ids = input_ids.to(model.device)
    if subject.new_cache is None:
        outputs = model(input_ids, use_cache=False, logits_to_keep=num_kept)
    else:
        cache = subject.new_cache()
        model(input_ids[:, :num_cached], past_key_values=cache, use_cache=True, logits_to_keep=1)
        rest = input_ids[:, num_cached:]
        outputs = model(rest, past_key_values=cache, use_cache=True, logits_to_keep=num_kept)
    return outputs.logits.float().log_softmax(dim=-1).cpu()
