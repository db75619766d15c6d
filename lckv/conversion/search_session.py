"""One search from the configuration to what is reported: text, moments, the search itself, perplexities, baselines."""

from __future__ import annotations

import logging
import time
from typing import Any, cast

from rich.console import Console
from torch import Tensor
from torch.utils.data import Subset

from lckv.byte_sizes import parse_budget
from lckv.config import SearchConfig
from lckv.config.names import CALIBRATED
from lckv.console import Bar
from lckv.conversion.calibration import InputMoments, Pair, calibrate, choose_blocks
from lckv.conversion.methods import needed_pairs
from lckv.conversion.pattern_search import (
    PatternSearch,
    Reach,
    SearchLimits,
    SearchTrace,
    owners_in,
    plan_of,
    resolve_reach,
)
from lckv.conversion.scoring import Converter, Scorer
from lckv.conversion.search_report import KVCount, SearchReport
from lckv.conversion.settings import check_block_size
from lckv.conversion.source import Source
from lckv.data.dataset import BlockDataset, build_dataset, collate
from lckv.evaluation.perplexity import Blocks, evaluate_perplexity
from lckv.model_arguments import iteration_settings
from lckv.models import LCKVLlamaForCausalLM
from lckv.patterns import SharingPlan, build_layer_types, parse_layer_types

_BASELINES = ("lasagna_bottom", "pizza_bottom", "sandwich_bottom")
_VALIDATION_BATCH = 8

logger = logging.getLogger(__name__)


class SearchSession:
    """A search as the configuration says.

    Raises:
        UserError: if the budget cannot be met.
    """

    def __init__(self, cfg: SearchConfig, source: Source, console: Console) -> None:
        self._cfg, self._source, self._console = cfg, source, console
        self._plan = source.config.sharing_plan
        self._kv = KVCount.of(source.config)
        num_before = len(self._plan.kv_owners)
        num_owners = owners_in(parse_budget(cfg.budget), self._kv.bytes_of("0"), num_before)
        reach = resolve_reach(cfg.directions, cfg.max_distance, num_owners, num_before)
        self._limits = SearchLimits(reach, num_owners, cfg.beam, cfg.shortlist)
        self._trace = SearchTrace()

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
        baselines = self._baselines()
        calibration = choose_blocks(data.train, self._cfg.calibration_tokens)
        converter = Converter(
            model,
            self._cfg.method,
            self._calibrate(model, data.train, calibration, baselines),
            self._cfg.ridge,
            iteration_settings(self._cfg),
        )
        batch = _scored_batch(data.train, calibration, self._cfg)
        chosen = choose_blocks(data.validation, self._cfg.validation_tokens)
        validation: Any = Subset(cast(Any, data.validation), chosen)
        report = SearchReport(self._cfg, self._source.config, self._kv, data.fingerprint, self._trace)
        report.num_tokens = {
            "calibration": 0 if converter.moments is None else converter.moments.num_tokens,
            "eval": batch["input_ids"].numel(),
            "validation": len(chosen) * data.validation.block_size,
        }
        try:
            scorer = Scorer(converter, batch)
            self._search(scorer)
            report.search_seconds = time.monotonic() - started
            self._evaluate(scorer, validation, baselines, report)
        except KeyboardInterrupt:
            if len(self._trace.frontier) < 2:
                raise
            report.is_interrupted = True
        report.seconds = time.monotonic() - started
        return report

    def _baselines(self) -> dict[str, SharingPlan]:
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
            plan = plan_of(parse_layer_types(layer_types).kv_source, self._plan)
            if plan not in plans.values():
                plans[name] = plan
        return plans

    def _calibrate(
        self, model: LCKVLlamaForCausalLM, blocks: BlockDataset, chosen: list[int], baselines: dict[str, SharingPlan]
    ) -> InputMoments | None:
        """The second moments that any pattern may need, summed up in one pass over the text."""
        if self._cfg.method not in CALIBRATED:
            return None
        pairs = _pairs_within(self._plan, self._limits.reach)
        pairs |= {pair for plan in baselines.values() for pair in needed_pairs(plan, self._plan)}
        num_pairs = len({(min(pair), max(pair)) for pair in pairs})
        size = num_pairs * self._source.config.hidden_size**2 * 8
        logger.info("calibrating: the moments of %d pairs of layers take %.3g GB of memory", num_pairs, size / 1e9)
        return calibrate(model, blocks, chosen, pairs, self._console)

    def _search(self, scorer: Scorer) -> None:
        num_before = len(self._plan.kv_owners)
        total = self._limits.num_scored(num_before)
        with Bar(self._console, "searching", "patterns", total) as bar:
            for best in PatternSearch(scorer, self._limits).run(self._trace, bar.advance):
                self._console.print(f"{best.num_owners} of {num_before}: loss {best.loss:.4f}: {best.layer_types}")

    def _evaluate(
        self, scorer: Scorer, validation: Blocks, baselines: dict[str, SharingPlan], report: SearchReport
    ) -> None:
        """Perplexities on text that nothing was fitted to or chosen by."""

        def perplexity(plan: SharingPlan) -> float:
            model = scorer.converter.build(plan)
            return evaluate_perplexity(model, validation, batch_size=_VALIDATION_BATCH).perplexity

        total = len(self._trace.frontier) + len(baselines)
        with Bar(self._console, "measuring", "perplexities", total) as bar:
            for candidate in self._trace.frontier:
                report.perplexities[candidate.layer_types] = perplexity(parse_layer_types(candidate.layer_types))
                bar.advance()
            for name, plan in baselines.items():
                loss = scorer.score(plan, 0, scorer.original).loss
                report.baselines.append(self._kv.point(name, plan.layer_types, loss, perplexity(plan)))
                bar.advance()


def _pairs_within(plan: SharingPlan, reach: Reach) -> set[Pair]:
    """All pairs of owners of which one may take the other's place, and every layer with itself."""
    owners, distance = plan.kv_owners, max(reach.down, reach.up)
    near = {(low, high) for place, low in enumerate(owners) for high in owners[place : place + distance + 1]}
    return near | {(layer.layer_idx, layer.layer_idx) for layer in plan.layers}


def _scored_batch(blocks: BlockDataset, calibration: list[int], cfg: SearchConfig) -> dict[str, Tensor]:
    """Blocks to score patterns on, evenly among those that nothing is fitted to, if there are any."""
    free = sorted(set(range(len(blocks))) - set(calibration))
    if not free and cfg.method in CALIBRATED:
        logger.warning(
            "all %d tokens of the training split are calibration text, so patterns are scored on what they were "
            "fitted to; give more text, or fewer calibration_tokens",
            len(blocks) * blocks.block_size,
        )
    free = free or list(range(len(blocks)))
    count = min(len(free), -(-cfg.eval_tokens // blocks.block_size))
    step = len(free) / count
    return collate([blocks[free[int((number + 0.5) * step)]] for number in range(count)])
