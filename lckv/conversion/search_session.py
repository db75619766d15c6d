"""One search from the configuration to what is reported: text, moments, the search itself, perplexities, baselines."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, cast

from rich.console import Console
from torch import Tensor
from torch.utils.data import Subset

from lckv.config import SearchConfig
from lckv.config.latent_sizes import num_least
from lckv.config.model_arguments import iteration_settings
from lckv.config.names import CALIBRATED
from lckv.conversion.calibration import InputMoments, Pair, batches_of, calibrate, choose_blocks
from lckv.conversion.latent_models import budget_of, check_num_tokens
from lckv.conversion.latent_search import MAX_DISTANCE, LatentConverter, LatentSearch, groups_within
from lckv.conversion.methods import needed_pairs
from lckv.conversion.pattern_search import (
    PatternSearch,
    Reach,
    ScoredPattern,
    SearchLimits,
    SearchTrace,
    owners_in,
    plan_of,
    resolve_reach,
)
from lckv.conversion.scoring import Converter, Scorer
from lckv.conversion.search_report import KVCount, SearchReport
from lckv.conversion.sensitivity import measure_sensitivity
from lckv.conversion.settings import check_block_size
from lckv.conversion.source import Source
from lckv.conversion.split_search import SplitSearch
from lckv.data.dataset import BlockDataset, build_dataset, collate
from lckv.errors import UserError
from lckv.evaluation.perplexity import Blocks, evaluate_perplexity
from lckv.models import LCKVLlamaForCausalLM
from lckv.sharing.patterns import SharingPlan, build_layer_types, describe_split, parse_layer_types
from lckv.utils.byte_sizes import parse_budget
from lckv.utils.console import Bar

_BASELINES = ("lasagna_bottom", "pizza_bottom", "sandwich_bottom")
_VALIDATION_BATCH = 8

logger = logging.getLogger(__name__)


class SearchSession(ABC):
    """A search as the configuration says: what all have in common.

    Args:
        cfg: the configuration.
        source: the model to search patterns for.
        console: where it is shown how far the search has come.

    Raises:
        UserError: if the budget cannot be met.
    """

    def __init__(self, cfg: SearchConfig, source: Source, console: Console) -> None:
        self._cfg, self._source, self._console = cfg, source, console
        self._plan = source.config.sharing_plan
        if self._plan.first_split is not None:
            raise UserError(
                f"source={cfg.source}: {describe_split(self._plan.first_split)}, but the search merges layers that "
                "compute both; allowed are sources whose entries are one number"
            )
        self._kv = KVCount.of(source.config)
        self._trace = SearchTrace()

    @abstractmethod
    def _prepare(self, model: LCKVLlamaForCausalLM, blocks: BlockDataset, chosen: list[int]) -> int:
        """Looks at calibration text, the chosen blocks of it; returns how many tokens that were."""

    @abstractmethod
    def _search(self, scorer: Scorer) -> None:
        """Searches, into the trace."""

    @abstractmethod
    def _build(self, pattern: ScoredPattern) -> LCKVLlamaForCausalLM:
        """The converted model of a pattern."""

    @abstractmethod
    def _baselines(self, scorer: Scorer) -> dict[str, ScoredPattern]:
        """Patterns made by hand, which need no less than the budget, by their names."""

    def run(self) -> SearchReport:
        """Searches. A search that is interrupted is reported as far as it came, or ends if it found nothing yet.

        Raises:
            UserError: for wrong text or weights.
        """
        started = time.monotonic()
        tokenizer = self._source.load_tokenizer()
        check_block_size(self._cfg.data, self._source.config)
        data = build_dataset(self._cfg.data, tokenizer)
        model = self._source.load_for_text(self._cfg.device)
        calibration = choose_blocks(data.train, self._cfg.calibration_tokens)
        num_tokens = self._prepare(model, data.train, calibration)
        batch = _scored_batch(data.train, calibration, self._cfg)
        chosen = choose_blocks(data.validation, self._cfg.validation_tokens)
        validation: Any = Subset(cast(Any, data.validation), chosen)
        report = SearchReport(self._cfg, self._source.config, self._kv, data.fingerprint, self._trace)
        report.num_tokens = {
            "calibration": num_tokens,
            "eval": batch["input_ids"].numel(),
            "validation": len(chosen) * data.validation.block_size,
        }
        try:
            scorer = Scorer(model, batch)
            self._search(scorer)
            report.search_seconds = time.monotonic() - started
            self._evaluate(scorer, validation, report)
        except KeyboardInterrupt:
            if len(self._trace.frontier) < 2:
                raise
            report.is_interrupted = True
        report.seconds = time.monotonic() - started
        return report

    def _evaluate(self, scorer: Scorer, validation: Blocks, report: SearchReport) -> None:
        """Perplexities on text that nothing was fitted to or chosen by."""

        def perplexity(pattern: ScoredPattern) -> float:
            model = self._build(pattern)
            return evaluate_perplexity(model, validation, batch_size=_VALIDATION_BATCH).perplexity

        baselines = self._baselines(scorer) if self._cfg.baselines else {}
        with Bar(self._console, "measuring", "perplexities", len(self._trace.frontier) + len(baselines)) as bar:
            for pattern in self._trace.frontier:
                report.perplexities[pattern] = perplexity(pattern)
                bar.advance()
            for name, pattern in baselines.items():
                report.baselines.append(self._kv.point(pattern, perplexity(pattern), name))
                bar.advance()


class SharingSearch(SearchSession):
    """The search for layers that share keys and values."""

    def __init__(self, cfg: SearchConfig, source: Source, console: Console) -> None:
        super().__init__(cfg, source, console)
        num_before = len(self._plan.kv_owners)
        num_owners = owners_in(parse_budget(cfg.budget), self._kv.bytes_of("0"), num_before)
        reach = resolve_reach(cfg.directions, cfg.max_distance, num_owners, num_before)
        self._limits = SearchLimits(reach, num_owners, cfg.beam, cfg.shortlist)

    def _prepare(self, model: LCKVLlamaForCausalLM, blocks: BlockDataset, chosen: list[int]) -> int:
        cfg, moments = self._cfg, self._calibrate(model, blocks, chosen)
        self._converter = Converter(model, cfg.method, moments, cfg.ridge, iteration_settings(cfg))
        return 0 if moments is None else moments.num_tokens

    def _calibrate(self, model: LCKVLlamaForCausalLM, blocks: BlockDataset, chosen: list[int]) -> InputMoments | None:
        """The second moments that any pattern may need, summed up in one pass over the text."""
        if self._cfg.method not in CALIBRATED:
            return None
        pairs = _pairs_within(self._plan, self._limits.reach)
        pairs |= {pair for plan in self._by_hand().values() for pair in needed_pairs(plan, self._plan)}
        num_pairs = len({(min(pair), max(pair)) for pair in pairs})
        size = num_pairs * self._source.config.hidden_size**2 * 8
        logger.info("calibrating: the moments of %d pairs of layers take %.3g GB of memory", num_pairs, size / 1e9)
        return calibrate(model, blocks, chosen, pairs, self._console)

    def _search(self, scorer: Scorer) -> None:
        num_before = len(self._plan.kv_owners)
        total = self._limits.num_scored(num_before)
        with Bar(self._console, "searching", "patterns", total) as bar:
            for best in PatternSearch(scorer, self._converter, self._limits).run(self._trace, bar.advance):
                self._console.print(f"{best.num_owners} of {num_before}: loss {best.loss:.4f}: {best.layer_types}")
        if self._cfg.split_sources:
            self._split(scorer)

    def _split(self, scorer: Scorer) -> None:
        """Goes on from the last pattern to keys and values of two owners."""
        search, last = SplitSearch(scorer, self._converter, self._limits.reach), self._trace.frontier[-1]
        with Bar(self._console, "splitting", "patterns", search.num_scored(last)) as bar:
            best = search.run(last, self._trace, bar.advance)
        self._console.print(f"keys and values apart: loss {best.loss:.4f}: {best.layer_types}")

    def _build(self, pattern: ScoredPattern) -> LCKVLlamaForCausalLM:
        return self._converter.build(parse_layer_types(pattern.layer_types))

    def _baselines(self, scorer: Scorer) -> dict[str, ScoredPattern]:
        return {
            name: ScoredPattern(plan.layer_types, len(plan.kv_owners), scorer.score(self._converter.build(plan)).loss)
            for name, plan in self._by_hand().items()
        }

    def _by_hand(self) -> dict[str, SharingPlan]:
        """Patterns of the source's owners made by hand, which need no less than the budget; none occurs twice."""
        if not self._cfg.baselines:
            return {}
        num_before, num_owners = len(self._plan.kv_owners), self._limits.num_owners
        built = {
            f"cla, groups of {size}": build_layer_types("cla", num_before, group_size=size)
            for size in range(2, num_before + 1)
            if -(-num_before // size) >= num_owners
        }
        built |= {name: build_layer_types(name, num_before, num_kv_layers=num_owners) for name in _BASELINES}
        plans: dict[str, SharingPlan] = {}
        for name, layer_types in built.items():
            plan = plan_of([owner for owner, _ in parse_layer_types(layer_types).sources], self._plan)
            if plan not in plans.values():
                plans[name] = plan
        return plans


class SearchOfLatents(SearchSession):
    """The search for layers that share latents."""

    def __init__(self, cfg: SearchConfig, source: Source, console: Console) -> None:
        super().__init__(cfg, source, console)
        budget, full = parse_budget(cfg.budget), self._kv.full
        share = budget if isinstance(budget, float) else budget / full
        if share >= 1:
            raise UserError(f"budget={cfg.budget}: is what the model needs already: {full} bytes per token")
        budget_of(replace(cfg.latent, ratio=1.0), source.config)  # which knows what kinds the model can have
        self._shares = [2.0**-power for power in range(1, 10) if 2.0**-power > share * 1.01] + [share]
        self._max_distance = MAX_DISTANCE if cfg.max_distance is None else cfg.max_distance
        num_groups = -(-len(self._plan.kv_owners) // (self._max_distance + 1))
        least = num_groups * num_least(cfg.latent.name) * self._kv.itemsize
        if share * full < least:
            raise UserError(
                f"budget={cfg.budget}: is too little: {num_groups} groups of up to {self._max_distance + 1} layers "
                f"need {least} of {full} bytes per token"
            )

    def _prepare(self, model: LCKVLlamaForCausalLM, blocks: BlockDataset, chosen: list[int]) -> int:
        cfg, groups = self._cfg, groups_within(self._plan, self._max_distance)
        with Bar(self._console, "calibrating", "tokens", len(chosen) * blocks.block_size) as bar:
            batches = batches_of(blocks, chosen, num_tokens=1)
            sensitivity = measure_sensitivity(model, batches, groups, weighs_alike=True, on_batch=bar.advance)
        check_num_tokens(sensitivity, model)
        self._converter = LatentConverter(model, cfg.latent.name, sensitivity, cfg.ridge, iteration_settings(cfg))
        return sensitivity.num_tokens

    def _search(self, scorer: Scorer) -> None:
        totals = [int(share * self._converter.full_size) for share in self._shares]
        search = LatentSearch(scorer, self._converter, self._max_distance, totals)
        with Bar(self._console, "searching", "steps", search.num_steps) as bar:
            for best in search.run(self._trace, bar.advance):
                name = self._kv.point(best, None).name
                self._console.print(f"{name}: loss {best.loss:.4f}: {best.layer_types}")

    def _build(self, pattern: ScoredPattern) -> LCKVLlamaForCausalLM:
        plan = parse_layer_types(pattern.layer_types)
        if pattern.latent_size is None:
            return self._converter.model
        return self._converter.build(plan, pattern.latent_size)

    def _baselines(self, scorer: Scorer) -> dict[str, ScoredPattern]:
        total, num_before = int(self._shares[-1] * self._converter.full_size), len(self._plan.kv_owners)
        found = {}
        for name, size in {"no groups": 1, "groups of 2": 2, "groups of 3": 3}.items():
            owners = [layer - layer % size for layer in range(num_before)]
            found[name] = self._converter.try_groups(plan_of(owners, self._plan), total, scorer)
        return found


def _pairs_within(plan: SharingPlan, reach: Reach) -> set[Pair]:
    """All pairs of owners of which one may take the other's place, and every layer with itself."""
    owners, distance = plan.kv_owners, max(reach.down, reach.up)
    near = {(low, high) for place, low in enumerate(owners) for high in owners[place : place + distance + 1]}
    return near | {(layer.layer_idx, layer.layer_idx) for layer in plan.layers}


def _scored_batch(blocks: BlockDataset, calibration: list[int], cfg: SearchConfig) -> dict[str, Tensor]:
    """Blocks to score patterns on, evenly among those that nothing is fitted to, if there are any."""
    free = sorted(set(range(len(blocks))) - set(calibration))
    if not free and (cfg.method in CALIBRATED or cfg.latent.is_used):
        logger.warning(
            "all %d tokens of the training split are calibration text, so patterns are scored on what they were "
            "fitted to; give more text, or fewer calibration_tokens",
            len(blocks) * blocks.block_size,
        )
    free = free or list(range(len(blocks)))
    count = min(len(free), -(-cfg.eval_tokens // blocks.block_size))
    step = len(free) / count
    return collate([blocks[free[int((number + 0.5) * step)]] for number in range(count)])
