"""The search for groups of layers that share latents: by what each group is expected to lose, and then by trying.

What a latent loses by its size is a sum of squared singular values. What a layer loses whose keys and values are made
of another layer's input is what that input does not tell of its own (see [`lckv.conversion.latents`]). Both are in the
same unit, so that for a price of a number the best groups of neighbouring layers are a shortest path, and the right
price is the one at which the budget is met. One thing is not known: errors of the second kind differ from token to
token and average out in attention, so they count less; how much less, a few tries on text say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lckv.config.latent_sizes import LatentBudget
from lckv.conversion.heads import Tensors
from lckv.conversion.latent_models import fit_latents, load_tensors, num_unturned_planes
from lckv.conversion.latents import Factors, KnownBy, LatentFit, Pairs
from lckv.conversion.pattern_search import ScoredPattern, SearchTrace, Span, plan_of_spans
from lckv.conversion.scoring import Scorer
from lckv.conversion.sensitivity import KEYS, VALUES, Sensitivity
from lckv.conversion.source import HEAD, expected_shapes
from lckv.conversion.target import converted_config, converted_tensors
from lckv.models import LCKVLlamaConfig, LCKVLlamaForCausalLM
from lckv.sharing.patterns import SharingPlan

MAX_DISTANCE = 3
"""How many owners of the source a group may reach up from its lowest one, where nothing else is said."""

DISCOUNTS = (0.05, 0.1, 0.15, 0.25, 0.5)
"""By how much errors of predicted inputs may count less than errors of latents."""

_PRICES = (1e-12, 1e3)  # of a number, in units of the loss
_NUM_HALVINGS = 60


@dataclass(frozen=True)
class ExpectedLoss:
    """What a group of layers is expected to lose, of which the lowest keeps latents for all.

    Attributes:
        latents: what is lost without each direction of each of its latents, and how many numbers a direction takes.
        unpredicted: what is lost since the other layers' keys and values are made of the lowest one's input.
    """

    latents: tuple[tuple[Tensor, int], ...]
    unpredicted: float

    def cost(self, price: float, discount: float) -> float:
        """The least loss at which numbers cost so much, with what these cost."""
        cut = sum(float(losses.clamp(max=price * cost).sum()) for losses, cost in self.latents)
        return cut + discount * self.unpredicted

    def kept(self, price: float) -> int:
        """How many numbers of a token that keeps."""
        return sum(cost * int((losses > price * cost).sum()) for losses, cost in self.latents)


def cheapest_spans(
    expected: Mapping[Span, ExpectedLoss], num_owners: int, total: int, discount: float
) -> tuple[Span, ...]:
    """The groups of a source's owners, from the bottom, that lose least where so many numbers may be kept.

    Args:
        expected: for every group that is allowed, each owner alone among them.
        num_owners: of the source.
        total: numbers of a token.
        discount: see [`DISCOUNTS`].
    """
    below, above = _PRICES
    best = _shortest_path(expected, num_owners, above, discount)
    for _ in range(_NUM_HALVINGS):
        price = math.sqrt(below * above)
        spans = _shortest_path(expected, num_owners, price, discount)
        if sum(expected[span].kept(price) for span in spans) > total:
            below = price
        else:
            above, best = price, spans
    return best


def _shortest_path(
    expected: Mapping[Span, ExpectedLoss], num_owners: int, price: float, discount: float
) -> tuple[Span, ...]:
    paths: list[tuple[float, tuple[Span, ...]]] = [(0.0, ()), *[(math.inf, ())] * num_owners]
    for span in sorted(expected, key=lambda span: span.stop):
        cost = paths[span.start][0] + expected[span].cost(price, discount)
        if cost < paths[span.stop][0]:
            paths[span.stop] = cost, (*paths[span.start][1], span)
    return paths[-1][1]


def groups_within(plan: SharingPlan, max_distance: int) -> dict[int, tuple[int, ...]]:
    """For each owner the owners, itself first, that a group may take together: what a search has to measure."""
    owners = plan.kv_owners
    return {owner: owners[place : place + max_distance + 1] for place, owner in enumerate(owners)}


class LatentConverter:
    """Makes models with latents in memory, of one kind and any groups of layers and sizes.

    Args:
        model: the pretrained model.
        kind: a name in [`lckv.conversion.latents.FITS`].
        sensitivity: of the model, in which tokens weigh alike in all groups that will be asked for.
        ridge: see [`lckv.conversion.fitting.predictor`].
        settings: other arguments of `LCKVLlamaConfig` that change.
    """

    def __init__(
        self,
        model: LCKVLlamaForCausalLM,
        kind: str,
        sensitivity: Sensitivity,
        ridge: float,
        settings: dict[str, Any],
    ) -> None:
        self.model, self.kind, self.sensitivity, self.ridge, self.settings = model, kind, sensitivity, ridge, settings
        self.config: LCKVLlamaConfig = model.config
        self._tensors: Tensors = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
        self._known: dict[KnownBy, Factors | Pairs] = {}

    @property
    def full_size(self) -> int:
        """Numbers of a token that the pretrained model keeps."""
        return sum(store.size for store in self.config.kv_layout.stores)

    def build(self, plan: SharingPlan, total: int) -> LCKVLlamaForCausalLM:
        """A model of this pattern whose owners keep `total` numbers of a token together, or all that they computed."""
        target = converted_config(self.config, plan, **self.settings)
        config, make = fit_latents(
            self._tensors,
            self.config,
            target,
            self._budget(plan, total),
            self.sensitivity,
            self.ridge,
            self._known,
        )
        shapes = expected_shapes(config, has_head=HEAD in self._tensors)
        made = converted_tensors(self._tensors, self.config.sharing_plan, plan, shapes, self.kind, make)
        return load_tensors(config, dict(made), self.model)

    def expect(self, span: Span) -> ExpectedLoss:
        """What a group is expected to lose, of the pretrained model's owners `span.start, ..., span.stop - 1`."""
        plan, sources = self.config.sharing_plan, self.config.sharing_plan.kv_owners[span.start : span.stop]
        budget = self._budget(plan, self.full_size // 2)
        fit = LatentFit(
            budget,
            self._tensors,
            self.config,
            {sources[0]: {KEYS: sources, VALUES: sources}},
            self.sensitivity,
            self.ridge,
            num_unturned_planes(budget, self.sensitivity, self.config),
            self._known,
        )
        return ExpectedLoss(
            tuple((each.losses, each.cost) for each in fit.factors.values()),
            sum(fit.unpredicted(sources[0], layer) for layer in sources[1:]),
        )

    def try_groups(self, plan: SharingPlan, total: int, scorer: Scorer) -> ScoredPattern:
        """Scores a pattern with so many numbers, and says how many it really keeps."""
        model = self.build(plan, total)
        size = sum(store.size for store in model.config.kv_layout.stores)
        return ScoredPattern(plan.layer_types, len(plan.kv_owners), scorer.score(model).loss, latent_size=size)

    def _budget(self, plan: SharingPlan, total: int) -> LatentBudget:
        assert self.config.head_dim is not None
        total = min(total, self.full_size * len(plan.kv_owners) // len(self.config.sharing_plan.kv_owners))
        return LatentBudget(
            plan, self.kind, plan.kv_owners, total, self.full_size / total, None, self.config.head_dim // 2
        )


class LatentSearch:
    """Goes through budgets, and for each through what predicted inputs may count, and tries the groups that come out.

    Args:
        scorer: of the pretrained model.
        converter: of the same.
        max_distance: how many owners of the source a group may reach up from its lowest one.
        totals: the budgets, numbers of a token.
    """

    def __init__(self, scorer: Scorer, converter: LatentConverter, max_distance: int, totals: Sequence[int]) -> None:
        self._scorer, self._converter, self._totals = scorer, converter, totals
        self._plan = converter.config.sharing_plan
        num_owners = len(self._plan.kv_owners)
        self._spans = [
            Span(start, start, stop)
            for start in range(num_owners)
            for stop in range(start + 1, min(start + 1 + max_distance, num_owners) + 1)
        ]

    @property
    def num_steps(self) -> int:
        """How often `run` calls back, at most."""
        return len(self._spans) + len(self._totals) * len(DISCOUNTS)

    def run(self, trace: SearchTrace, on_step: Callable[[], Any]) -> Iterator[ScoredPattern]:
        """Searches, and yields the best pattern of each budget.

        Args:
            trace: empty; what comes out is written there as it does.
            on_step: called after each group that was fitted, and each pattern that was scored.
        """
        num_owners, expected = len(self._plan.kv_owners), {}
        trace.frontier.append(ScoredPattern(self._plan.layer_types, num_owners, 0.0))
        for span in self._spans:
            expected[span] = self._converter.expect(span)
            on_step()
        for total in self._totals:
            tried: dict[tuple[Span, ...], ScoredPattern] = {}
            for discount in DISCOUNTS:
                spans = cheapest_spans(expected, num_owners, total, discount)
                if spans not in tried:
                    plan = plan_of_spans(spans, self._plan)
                    tried[spans] = self._converter.try_groups(plan, total, self._scorer)
                on_step()
            trace.candidates.extend(tried.values())
            trace.frontier.append(min(tried.values(), key=lambda each: each.loss))
            yield trace.frontier[-1]
