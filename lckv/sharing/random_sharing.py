"""Sources drawn at random while a model trains, so that one training makes a model for many patterns. No torch.

After Filippova, Grangier, Cuturi and Monteiro, *Stochastic KV Routing* (2026), in whose random cross-layer attention
layers choose, while they train, between their own keys and values and those of a layer below. Here a layer that does
not read its own reads what the layer below it reads. So what is drawn are groups of consecutive layers that read the
lowest of the group: `llama`, `cla`, and the `_bottom` patterns of the NAACL 2025 study are among them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from lckv.errors import UserError
from lckv.sharing.patterns import SharingPlan


@dataclass(frozen=True)
class RandomSharing:
    """Draws a pattern for each optimizer step, of the seed and the step alone: every process draws the same.

    Attributes:
        plan: the model's own, in which every layer reads itself. Windows stay as they are there.
        seed: of the draws.
        probability: of a layer to read what the layer below it reads. A half does worse than a quarter, even where few
            layers are to be read in the end.
        reach: how many layers below itself a layer may read at most; `None`: down to the lowest.

    Raises:
        UserError: if there is nothing to choose from.
    """

    plan: SharingPlan
    seed: int
    probability: float = 0.25
    reach: int | None = None

    def __post_init__(self) -> None:
        num_layers = self.plan.num_hidden_layers
        if not all(layer.reads_itself for layer in self.plan.layers):
            raise UserError(
                f"sharing=random: draws whom layers read who all have keys and values of their own, not "
                f"{self.plan.layer_types}; give a source that shares nothing"
            )
        if num_layers == 1:
            raise UserError("sharing=random: a model of one layer has nothing to choose from; give it two or more")
        if self.reach is not None and self.reach >= num_layers:
            raise UserError(
                f"sharing.reach={self.reach}: layer {num_layers - 1} is the highest; allowed is 1 to {num_layers - 1}"
            )

    def layer_types(self, step: int) -> str:
        """The pattern of an optimizer step."""
        draw = random.Random(f"{self.seed} {step}").random
        sources: list[int] = []
        for layer_idx in range(self.plan.num_hidden_layers):
            reads_below = draw() < self.probability
            below = sources[-1] if sources else layer_idx
            is_within = self.reach is None or layer_idx - below <= self.reach
            sources.append(below if reads_below and is_within else layer_idx)
        return self.plan.with_sources(sources).layer_types
