"""How often the layers of a cycle run. No torch: the model runs these passes, and the costs count them.

Where a layer reads the keys and values (KV) of a layer above it, one parallel pass is not enough: in each pass, upward
readers use what the pass before wrote, starting from all-zero KV. After *p* passes the first *p* tokens are exact
(Wu and Tu, ACL 2024), so no more passes are run than there are tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lckv.errors import UserError

CONVERGE = "converge"
"""In place of a number of passes: until the KV of a cycle stop changing."""

EXACT = {"forward_passes": CONVERGE, "converge_tolerance": 1e-5}
"""What answers as decoding token by token would, as arguments of `forward`, or of the configuration."""


def exact_unless(forward_passes: int | str | None = None, converge_tolerance: float | None = None) -> dict[str, Any]:
    """The arguments of [`EXACT`], but for those that are given."""
    given = {"forward_passes": forward_passes, "converge_tolerance": converge_tolerance}
    return EXACT | {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class Passes:
    """The passes over each cycle in one forward call.

    Attributes:
        num_ungraded: passes without gradient, or the most of them if they stop at `tolerance`.
        num_graded: passes with gradient after those.
        tolerance: relative change of KV at which the ungraded passes stop early, or `None`.
        num_groups: groups of tokens that take turns in each pass; 1 for all tokens at once.
    """

    num_ungraded: int
    num_graded: int
    tolerance: float | None = None
    num_groups: int = 1

    @property
    def is_single(self) -> bool:
        """Whether all tokens pass at once, a single time."""
        return self.num_ungraded + self.num_graded == self.num_groups == 1


@dataclass(frozen=True)
class Iteration:
    """What a configuration says of the passes, under its names.

    Attributes:
        forward_passes: passes without gradient, or "converge"; `None` where their number is not known.
        backward_passes: passes with gradient after those.
        cyclic_groups: groups of tokens that take turns in a pass, each reading what those before it have just
            written; 1 for all tokens at once.
        converge_tolerance: with "converge", the relative change of KV (Frobenius norm) at which they stop.
        use_sequential: token by token, which is exact and needs one pass.
    """

    forward_passes: int | str | None = 7
    backward_passes: int = 2
    cyclic_groups: int = 1
    converge_tolerance: float = 1e-3
    use_sequential: bool = False

    @classmethod
    def from_config(cls, config: Any) -> Iteration:
        """Reads an `LCKVLlamaConfig`, or the `model` group of a configuration."""
        return cls(**{name: getattr(config, name) for name in cls.__dataclass_fields__ if hasattr(config, name)})

    @property
    def converges(self) -> bool:
        """Whether the number of passes depends on the data."""
        return not isinstance(self.forward_passes, int)

    def passes(self, num_tokens: int, needs_gradient: bool = True) -> Passes:
        """Plans the passes over `num_tokens` new tokens, no more than make an exact result.

        A pass makes one more token exact for each group. Where nobody wants a gradient, a converged iteration needs
        but one more pass: the one that writes the cache.
        """
        num_groups = min(self.cyclic_groups, num_tokens)
        most = -(-num_tokens // num_groups)
        num_graded = min(self.backward_passes, most)
        if self.converges:
            num_graded = num_graded if needs_gradient else 1
            return Passes(most - num_graded, num_graded, self.converge_tolerance, num_groups)
        assert isinstance(self.forward_passes, int)
        return Passes(min(self.forward_passes, most - num_graded), num_graded, None, num_groups)


def check_iteration(iteration: Iteration, has_cycles: bool, prefix: str = "") -> None:
    """Refuses a number of passes that cannot train the owners of a cycle.

    In a single graded pass over all tokens at once, upward readers read what has no gradient.

    Raises:
        UserError: naming `backward_passes`.
    """
    if has_cycles and iteration.backward_passes < 2 and iteration.cyclic_groups < 2:
        raise UserError(
            f"{prefix}backward_passes={iteration.backward_passes}: with layers that read upward, 2 or more is needed, "
            f"or {prefix}cyclic_groups=2; else the owners' key and value projections would get no gradient from the "
            "layers below them"
        )
