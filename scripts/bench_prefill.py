"""Compares ways to prefill a model whose layers read upward: `python scripts/bench_prefill.py MODEL --help`.

Exact is one token after the other. In parallel, the keys and values (KV) of a cycle are iterated: with a fixed number
of passes, until they change by less than a tolerance, or the same chunk by chunk, so that each chunk reads final KV of
the chunks before it. The ways take turns; a time is the process's CPU time, the median over the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import PreTrainedModel

from lckv.cache import KVCache, build_cache
from lckv.generation.loading import load_model
from lckv.generation.prefill import PrefillReport, prefill


@dataclass(frozen=True)
class Way:
    """How to prefill: chunk size (`None`: all at once), passes without gradient, tolerance of `"converge"`."""

    chunk_size: int | None
    forward_passes: int | str
    tolerance: float | None = None

    def __str__(self) -> str:
        passes = f"tolerance {self.tolerance:g}" if self.tolerance else f"{self.forward_passes} + 2 passes"
        return passes + (f", chunks of {self.chunk_size}" if self.chunk_size else "")


@dataclass
class Result:
    """One way's times, passes and errors against the exact prefill."""

    way: Way
    seconds: list[float]
    mean_passes: float
    residual: float | None
    logits_error: float
    kv_error: float
    divergence: float


def run(model: PreTrainedModel, input_ids: torch.Tensor, way: Way) -> tuple[PrefillReport, KVCache, float]:
    """Prefills a new cache; returns the report, the cache and the CPU time in seconds."""
    cache = build_cache("dynamic", model.config)
    start = time.process_time()
    report = prefill(
        model,
        input_ids,
        cache,
        chunk_size=way.chunk_size,
        forward_passes=way.forward_passes,
        tolerance=way.tolerance,
    )
    return report, cache, time.process_time() - start


def kv_distance(cache: KVCache, exact: KVCache) -> float:
    """Distance of all keys and values from the exact ones over the size of those (Frobenius norm)."""
    pairs = [
        (mine.double() - theirs.double(), theirs.double())
        for owner, layer in cache.owners().items()
        for mine, theirs in zip(layer.streams, exact.owners()[owner].streams, strict=True)
    ]
    distance = sum(float(difference.square().sum()) for difference, _ in pairs)
    return (distance / sum(float(size.square().sum()) for _, size in pairs)) ** 0.5


def compare(
    model: PreTrainedModel, input_ids: torch.Tensor, ways: list[Way], rounds: int
) -> tuple[float, list[Result]]:
    """Times the ways in turn; returns the exact prefill's CPU time and every way's result."""
    exact_report, exact, exact_seconds = run(model, input_ids, Way(chunk_size=1, forward_passes=0))
    expected = exact_report.logits.double()
    results: dict[Way, Result] = {}
    for _ in track(range(rounds), description="rounds"):
        for way in ways:
            report, cache, seconds = run(model, input_ids, way)
            if way in results:
                results[way].seconds.append(seconds)
                continue
            logits = report.logits.double()
            results[way] = Result(
                way,
                [seconds],
                statistics.mean(report.num_passes),
                report.residual,
                float((logits - expected).abs().max()),
                kv_distance(cache, exact),
                float(
                    torch.nn.functional.kl_div(
                        logits.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="batchmean"
                    )
                ),
            )
    return exact_seconds, list(results.values())


def table_of(exact_seconds: float, results: list[Result]) -> Table:
    """The results side by side; times relative to the first way's."""
    table = Table(box=None)
    for column in ("prefill", "CPU time", "passes", "residual", "KV error", "logits error", "KL (nats)"):
        table.add_column(column, justify="left" if column == "prefill" else "right")
    baseline = results[0].seconds
    table.add_row(
        "exact, token by token", f"{exact_seconds / statistics.median(baseline):.2f}", *["1", "0", "0"], "0", "0"
    )
    for result in results:
        ratio = statistics.median(mine / first for mine, first in zip(result.seconds, baseline, strict=True))
        table.add_row(
            str(result.way),
            f"{ratio:.2f}",
            f"{result.mean_passes:.1f}",
            "-" if result.residual is None else f"{result.residual:.1e}",
            f"{result.kv_error:.1e}",
            f"{result.logits_error:.1e}",
            f"{result.divergence:.1e}",
        )
    return table


def main() -> None:
    """Reads the command line and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="run folder or checkpoint of a model whose layers read upward")
    parser.add_argument("--text", type=Path, help="a text file; by default random tokens")
    parser.add_argument("--length", type=int, default=1024, help="tokens of the prompt")
    parser.add_argument("--chunk-sizes", type=int, nargs="*", default=[64, 256])
    parser.add_argument("--tolerances", type=float, nargs="*", default=[1e-2, 1e-3])
    parser.add_argument("--forward-passes", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    torch.set_num_threads(args.num_threads)
    torch.manual_seed(0)
    model, tokenizer = load_model(args.model)
    if args.text is None:
        input_ids = torch.randint(model.config.vocab_size, (1, args.length))
    else:
        input_ids = tokenizer(args.text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[:, : args.length]
    ways = [Way(None, args.forward_passes)]
    ways += [Way(None, "converge", tolerance) for tolerance in args.tolerances]
    ways += [Way(size, "converge", tolerance) for tolerance in args.tolerances for size in args.chunk_sizes]
    ways += [Way(size, args.forward_passes) for size in args.chunk_sizes]
    exact_seconds, results = compare(model, input_ids, ways, args.rounds)
    Console().print(table_of(exact_seconds, results))
    if args.json is not None:
        args.json.write_text(json.dumps([_as_dict(result) for result in results], indent=1), encoding="utf-8")


def _as_dict(result: Result) -> dict[str, Any]:
    return {**vars(result), "way": vars(result.way)}


if __name__ == "__main__":
    main()
