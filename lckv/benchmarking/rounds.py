"""Lets contenders take turns, so that other load on the machine falls on all of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing

from lckv.benchmarking.contenders import Contender
from lckv.benchmarking.measurements import Measurements, Workload
from lckv.benchmarking.measuring import FAILURES, Bench, attempt
from lckv.console import track
from lckv.errors import UserError

logger = logging.getLogger(__name__)


class InterruptedMeasurement(KeyboardInterrupt):
    """Ctrl-C when at least one round was over.

    Args:
        results: of the rounds that all contenders have ended.
        num_rounds: how many these are.
    """

    def __init__(self, results: list[Measurements], num_rounds: int) -> None:
        super().__init__()
        self.results, self.num_rounds = results, num_rounds


def measure(contenders: Sequence[Contender], workload: Workload) -> list[Measurements]:
    """Measures all contenders: bytes first, one after the other, then times in rounds.

    A contender that fails keeps its reason in `error`, and the others go on.

    Raises:
        UserError: if not one token of one sequence fits into the budget, and if every contender has failed.
        InterruptedMeasurement: for Ctrl-C after a round; before that, it passes as it is.
    """
    benches = [Bench(contender, workload) for contender in contenders]
    check_budget(benches, workload.kv_budget)
    num_done, total = 0, len(benches) * (1 + workload.rounds)
    try:
        with closing(track(schedule(benches, workload.rounds), "measuring", total)) as turns:  # takes the bar away
            for bench, work in turns:
                if bench.result.error is None:
                    attempt(work, bench.result, bench.device)
                    if bench.result.error is not None:
                        logger.warning("%s: %s", bench.result.label, bench.result.error)
                num_done += 1
    except KeyboardInterrupt:
        num_rounds = num_done // len(benches) - 1  # the first time round, bytes were counted
        if num_rounds < 1:
            raise
        raise InterruptedMeasurement(_results(benches, num_rounds), num_rounds) from None
    return _results(benches, workload.rounds)


def _results(benches: Sequence[Bench], num_rounds: int) -> list[Measurements]:
    """What is known after this many rounds."""
    results = [bench.result for bench in benches]
    if all(result.error is not None for result in results):
        raise UserError("; ".join(f"{result.label}: {result.error}" for result in results))
    for result in results:
        times = [result.prefill_seconds, result.first_token_seconds, *(batch.seconds for batch in result.batches)]
        for seconds in times:  # without those of a round that not all have ended
            del seconds[num_rounds:]
    return results


def schedule(benches: Sequence[Bench], rounds: int) -> Iterable[tuple[Bench, Callable[[], None]]]:
    """Inspects each once, then goes round."""
    yield from ((bench, bench.inspect) for bench in benches)
    for _ in range(rounds):
        yield from ((bench, bench.run_round) for bench in benches)


def check_budget(benches: Sequence[Bench], budget: int | None) -> None:
    """Refuses a budget that does not hold one token of one sequence of every contender.

    Raises:
        UserError: naming both numbers.
    """
    if budget is None:
        return
    for bench in benches:
        try:
            needed = bench.planned_bytes(1, 1)
        except FAILURES:  # its cache cannot be made, which it will say itself
            continue
        if needed > budget:
            raise UserError(
                f"kv_budget={budget}: one token of one sequence needs {needed} bytes of KV in {bench.result.label}; "
                "allowed is that or more"
            )
