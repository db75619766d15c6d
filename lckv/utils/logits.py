"""From logits to the next token, and logits that none can be chosen from: in one way wherever text is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from transformers import LogitsProcessorList

from lckv.errors import UserError

NOT_FINITE = "not finite (NaN or infinity)"


def are_finite(logits: torch.Tensor) -> torch.Tensor:
    """Whether a token can be chosen from each row of `(batch, vocab_size)`: `(batch,)`, on the same device."""
    # The maximum of numbers that NaN is among is NaN; minus infinity only rules a token out.
    return logits.max(dim=-1).values.isfinite()


def check_logits(logits: torch.Tensor, what: str) -> None:
    """Refuses to choose from `(batch, vocab_size)` if that makes no sense in some row; waits for the device.

    Raises:
        UserError: calling the logits `what`.
    """
    if not are_finite(logits).all():
        reason = "the weights are broken, or the type is too narrow for them; try dtype=float32"
        raise UserError(f"{what} are {NOT_FINITE}: {reason}")


def choose_token(
    logits: torch.Tensor,
    processors: LogitsProcessorList,
    earlier: Sequence[int],
    *,
    samples: bool,
    generator: torch.Generator | None,
) -> int:
    """The next token, as transformers' `generate()` would choose it.

    Args:
        logits: `(1, vocab_size)`.
        processors: what is done to them, in float32.
        earlier: tokens that processors look back on.
        samples: whether to draw; else the likeliest is taken.
        generator: draws; `None` for torch's own.
    """
    input_ids = torch.tensor([list(earlier)], dtype=torch.long, device=logits.device)
    scores = processors(cast(torch.LongTensor, input_ids), cast(torch.FloatTensor, logits.float()))
    if samples:
        return int(torch.multinomial(scores.softmax(dim=-1), num_samples=1, generator=generator))
    return int(scores.argmax())
