"""Logits that no token can be chosen from: found, and said, in one way wherever text is made."""

from __future__ import annotations

import torch

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
