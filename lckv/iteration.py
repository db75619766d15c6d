"""How often the layers of a cycle run. No torch: the model runs these passes, and the costs count them.

Where a layer reads the keys and values (KV) of a layer above it, one parallel pass is not enough: in each pass, upward
readers use what the pass before wrote, starting from all-zero KV. After *p* passes the first *p* tokens are exact
(Wu and Tu, ACL 2024), so no more passes are run than there are tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

CONVERGE = "converge"
"""In place of a number of passes: until the KV of a cycle stop changing."""


@dataclass(frozen=True)
class Passes:
    """The passes over each cycle in one forward call.

    Attributes:
        num_ungraded: passes without gradient, or the most of them if they stop at `tolerance`.
        num_graded: passes with gradient after those.
        tolerance: relative change of KV at which the ungraded passes stop early, or `None`.
    """

    num_ungraded: int
    num_graded: int
    tolerance: float | None = None


@dataclass(frozen=True)
class Iteration:
    """What a configuration says of the passes, under its names.

    Attributes:
        forward_passes: passes without gradient, or "converge"; `None` where their number is not known.
        backward_passes: passes with gradient after those.
        converge_tolerance: with "converge", the relative change of KV (Frobenius norm) at which they stop.
        use_sequential: token by token, which is exact and needs one pass.
    """

    forward_passes: int | str | None = 7
    backward_passes: int = 2
    converge_tolerance: float = 1e-3
    use_sequential: bool = False

    @classmethod
    def from_config(cls, config: Any) -> Iteration:
        """Reads an `LCKVLlamaConfig`, or the `model` group of a configuration."""
        return cls(config.forward_passes, config.backward_passes, config.converge_tolerance, config.use_sequential)

    @property
    def converges(self) -> bool:
        """Whether the number of passes depends on the data."""
        return not isinstance(self.forward_passes, int)

    def passes(self, num_tokens: int, needs_gradient: bool = True) -> Passes:
        """Plans the passes over `num_tokens` new tokens, of which as many passes make an exact result.

        Where nobody wants a gradient, a converged iteration needs but one more pass: the one that writes the cache.
        """
        num_graded = min(self.backward_passes, num_tokens)
        if self.converges:
            num_graded = num_graded if needs_gradient else 1
            return Passes(num_tokens - num_graded, num_graded, self.converge_tolerance)
        assert isinstance(self.forward_passes, int)
        return Passes(min(self.forward_passes, num_tokens - num_graded), num_graded)
