"""Measures endless streaming with attention sinks: `python scripts/bench_streaming.py --help`.

`memory` streams tokens from a small random model and takes down, as they come, the bytes of the cache, the memory of
the process and the time of every token. `perplexity` reads real text with a trained model, token by token, and says
how surprised it is at every position: with the whole text in the cache, with the last tokens only, and with sinks and
the last tokens in as much memory. Each writes JSON and a picture.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import statistics
import time
from array import array
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lckv.cache import DynamicKVCache, KVCache, SinkKVCache
from lckv.data.readers import read_documents
from lckv.generation.streaming import Sampling, score_stream, stream
from lckv.loading import load_model
from lckv.models import LCKVLlamaConfig, LCKVLlamaForCausalLM

WARM_UP = 200


# --- memory and time -----------------------------------------------------------------------------------------------


def build_model(arguments: argparse.Namespace) -> LCKVLlamaForCausalLM:
    """A model with random weights."""
    torch.manual_seed(0)
    config = LCKVLlamaConfig(
        layer_types=arguments.layer_types,
        vocab_size=1024,
        hidden_size=arguments.hidden_size,
        intermediate_size=3 * arguments.hidden_size,
        num_attention_heads=8,
        num_key_value_heads=4,
        sliding_window=arguments.window,
    )
    return LCKVLlamaForCausalLM(config).eval()


def measure_memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """Streams; returns what was seen.

    Other load on the machine comes and goes while tens of thousands of tokens are streamed. So the last of them take
    turns with those of a second stream that has only just filled its cache.
    """
    model, process, num_tokens = build_model(arguments), psutil.Process(), arguments.tokens
    full = arguments.sinks + arguments.window + WARM_UP
    num_turns = min(2000, (num_tokens - full) // 2)
    if num_turns < 1:
        raise SystemExit(f"--tokens {num_tokens}: allowed is {full + 2} or more, to see the full cache")
    (old, cache), (young, _) = start_stream(arguments, model), start_stream(arguments, model)
    seconds, cache_bytes, rss = (array(kind, [0]) * num_tokens for kind in "dqq")  # so that they do not grow
    turns, console = array("d"), Console(stderr=True)
    for step in track(range(num_tokens), "streaming", console=console):
        seconds[step] = time_token(old)
        cache_bytes[step], rss[step] = cache.num_bytes(), process.memory_info().rss
        if step >= num_tokens - num_turns:
            if not turns:
                collections.deque(islice(young, full), maxlen=0)
            turns.append(time_token(young))
    return summarize_memory(arguments, cache, list(seconds), list(turns), list(cache_bytes), list(rss))


def start_stream(arguments: argparse.Namespace, model: LCKVLlamaForCausalLM) -> tuple[Iterator[int], KVCache]:
    """An endless text, and the cache that it is in."""
    cache = SinkKVCache(model.config, num_sinks=arguments.sinks, window=arguments.window)
    return stream(model, torch.tensor([[1]]), cache, sampling=Sampling(seed=0)), cache


def time_token(tokens: Iterator[int]) -> float:
    """Seconds of CPU time for the next token."""
    start = time.process_time()
    next(tokens)
    return time.process_time() - start


def summarize_memory(
    arguments: argparse.Namespace,
    cache: KVCache,
    seconds: list[float],
    turns: list[float],
    cache_bytes: list[int],
    rss: list[int],
) -> dict[str, Any]:
    """The figures that matter: sizes once the cache is full, and the last tokens against the first."""
    full, num_turns = arguments.sinks + arguments.window + WARM_UP, len(turns)
    young, last = statistics.median(turns), statistics.median(seconds[-num_turns:])
    first = statistics.median(seconds[full : full + num_turns])
    return {
        "layer_types": arguments.layer_types,
        "num_sinks": arguments.sinks,
        "window": arguments.window,
        "num_tokens": len(seconds),
        "cache_bytes_when_full": sorted(set(cache_bytes[full:])),
        "planned_bytes": cache.planned_bytes(len(seconds), 1, torch.float32),
        "rss_bytes": {"first": rss[full], "last": rss[-num_turns - 1], "last_with_second_stream": rss[-1]},
        "compared_tokens": num_turns,
        "milliseconds_per_token": {"first": 1e3 * first, "last": 1e3 * last, "second_stream": 1e3 * young},
        "time_ratio": last / first,
        "time_ratio_taking_turns": last / young,
        "curves": {
            "milliseconds": [1e3 * value for value in thin(seconds)],
            "cache_bytes": thin(cache_bytes, max),
            "rss_bytes": thin(rss, max),
        },
    }


def thin(values: list[Any], merge: Any = statistics.median, num_points: int = 200) -> list[Any]:
    """About `num_points` values, each of as many neighbours."""
    size = max(1, len(values) // num_points)
    return [merge(values[start : start + size]) for start in range(0, len(values) - size + 1, size)]


def plot_memory(result: dict[str, Any], path: Path) -> None:
    """Time and memory against tokens."""
    plt = load_pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for axis, name, scale, unit in zip(
        axes,
        ("milliseconds", "cache_bytes", "rss_bytes"),
        (1, 2**10, 2**20),
        ("CPU time per token (ms)", "cache (KiB)", "memory of the process (MiB)"),
        strict=True,
    ):
        values = [value / scale for value in result["curves"][name]]
        axis.plot([result["num_tokens"] * (i + 1) / len(values) for i in range(len(values))], values, color="#1f6f8b")
        axis.set(xlabel="tokens streamed", ylabel=unit, ylim=(0, 1.3 * max(values)))
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def print_memory(result: dict[str, Any]) -> None:
    """A table of the figures."""
    table = Table(title=f"{result['num_tokens']} tokens, {result['num_sinks']} sinks + window of {result['window']}")
    for column in ("", "first", "last"):
        table.add_column(column, justify="right" if column else "left")
    times, rss = result["milliseconds_per_token"], result["rss_bytes"]
    table.add_row("CPU ms per token", f"{times['first']:.3f}", f"{times['last']:.3f}")
    table.add_row("CPU ms per token, taking turns", f"{times['second_stream']:.3f}", f"{times['last']:.3f}")
    table.add_row("process, MiB", f"{rss['first'] / 2**20:.1f}", f"{rss['last'] / 2**20:.1f}")
    table.add_row("cache, bytes", *(str(size) for size in (result["cache_bytes_when_full"] * 2)[:2]))
    Console().print(table)
    Console().print(
        f"time ratio {result['time_ratio']:.3f}, taking turns {result['time_ratio_taking_turns']:.3f}; "
        f"planned bytes {result['planned_bytes']}"
    )


# --- perplexity ----------------------------------------------------------------------------------------------------


def read_text(path: str | None) -> str:
    """A file's text, or the Bible's."""
    if path is not None:
        return "\n\n".join(document.text for document in read_documents(Path(path), "text", None))
    from lckv.config import DataConfig
    from lckv.data.sources import build_source

    return "\n\n".join(document.text for document in build_source(DataConfig()).read_training())


def take_rows(arguments: argparse.Namespace, tokenizer: Any) -> torch.Tensor:
    """Stretches `(batch, length)` of the text, evenly spaced: read side by side they cost little more than one."""
    token_ids = tokenizer(read_text(arguments.text), return_tensors="pt", verbose=False)["input_ids"][0]
    length, batch_size = arguments.length, arguments.batch
    if len(token_ids) < length * batch_size:
        raise SystemExit(f"--length {length} --batch {batch_size}: the text has only {len(token_ids)} tokens")
    starts = [row * (len(token_ids) - length) // max(1, batch_size - 1) for row in range(batch_size)]
    return torch.stack([token_ids[start : start + length] for start in starts])


def make_caches(arguments: argparse.Namespace, config: Any) -> dict[str, KVCache]:
    """What is compared."""
    size = arguments.sinks + arguments.window
    return {
        "dense": DynamicKVCache(config),
        f"window of {size}": SinkKVCache(config, num_sinks=0, window=size),
        f"{arguments.sinks} sinks + window of {arguments.window}": SinkKVCache(
            config, num_sinks=arguments.sinks, window=arguments.window
        ),
    }


def measure_perplexity(arguments: argparse.Namespace) -> dict[str, Any]:
    """Reads the text with each cache."""
    model, tokenizer = load_model(arguments.model, dtype=arguments.dtype, device=arguments.device)
    rows = take_rows(arguments, tokenizer).to(model.device)
    curves = {}
    for name, cache in make_caches(arguments, model.config).items():
        scores = score_in_chunks(model, rows, cache) if name == "dense" else score_stream(model, rows, cache)
        progress = track(scores, name, total=rows.shape[1] - 1, console=Console(stderr=True))
        losses = torch.stack([loss.mean() for loss in progress]).tolist()
        curves[name] = {"losses": losses, "cache_bytes": cache.num_bytes()}
    return summarize_perplexity(arguments, curves)


@torch.inference_mode()
def score_in_chunks(model: LCKVLlamaForCausalLM, rows: torch.Tensor, cache: KVCache) -> Iterator[torch.Tensor]:
    """What `score_stream` yields, many tokens at a time, which is exact as long as nothing is dropped."""
    logits = None
    for chunk in rows.split(200, dim=1):
        outputs = model(chunk, past_key_values=cache).logits
        behind = outputs[:, :-1] if logits is None else torch.cat([logits, outputs[:, :-1]], dim=1)
        scored = chunk[:, chunk.shape[1] - behind.shape[1] :]
        losses = torch.nn.functional.cross_entropy(behind.flatten(0, 1), scored.flatten(), reduction="none")
        yield from losses.view_as(scored).unbind(dim=1)
        logits = outputs[:, -1:]


def summarize_perplexity(arguments: argparse.Namespace, curves: dict[str, Any]) -> dict[str, Any]:
    """Perplexity over stretches of `--bin` tokens, and before and after the cache is full."""
    size = arguments.sinks + arguments.window
    for curve in curves.values():
        losses = curve.pop("losses")
        bins = [losses[start : start + arguments.bin] for start in range(0, len(losses), arguments.bin)]
        curve["perplexity"] = [math.exp(statistics.mean(losses)) for losses in bins]
        curve["perplexity_until_full"] = math.exp(statistics.mean(losses[: size - 1]))
        curve["perplexity_once_full"] = math.exp(statistics.mean(losses[size - 1 :]))
        curve["num_tokens"] = len(losses) + 1
    shown = ("length", "batch", "sinks", "window", "bin", "dtype")
    return {name: getattr(arguments, name) for name in shown} | {"curves": curves}


def plot_perplexity(result: dict[str, Any], path: Path) -> None:
    """Perplexity against position, with a logarithmic scale: a window without sinks leaves every other."""
    plt = load_pyplot()
    figure, axis = plt.subplots(figsize=(7.5, 4), layout="constrained")
    colors, markers = ("#777777", "#c8553d", "#1f6f8b"), ("s", "x", "o")
    for (name, curve), color, marker in zip(result["curves"].items(), colors, markers, strict=True):
        positions = [result["bin"] * (i + 0.5) for i in range(len(curve["perplexity"]))]
        axis.plot(positions, curve["perplexity"], label=name, color=color, marker=marker, markersize=4)
    axis.axvline(result["sinks"] + result["window"], color="#bbbbbb", linestyle="--", linewidth=1)
    axis.annotate("cache full", (result["sinks"] + result["window"], 0.9), xycoords=("data", "axes fraction"))
    axis.set(xlabel="position in the text (tokens)", ylabel="perplexity", yscale="log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    figure.savefig(path, dpi=150)


def print_perplexity(result: dict[str, Any]) -> None:
    """A table of the figures."""
    table = Table(title=f"perplexity over {result['batch']} x {result['length']} tokens")
    for column in ("cache", "tokens", "until full", "once full", "cache bytes"):
        table.add_column(column, justify="left" if column == "cache" else "right")
    for name, curve in result["curves"].items():
        perplexities = [f"{curve[key]:.2f}" for key in ("perplexity_until_full", "perplexity_once_full")]
        table.add_row(name, str(curve["num_tokens"]), *perplexities, str(curve["cache_bytes"]))
    Console().print(table)


# --- the command ---------------------------------------------------------------------------------------------------


def load_pyplot() -> Any:
    """Matplotlib, without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", default="runs/streaming", help="folder for JSON and pictures")
    commands = parser.add_subparsers(dest="command", required=True)
    memory = commands.add_parser("memory", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    memory.add_argument("--tokens", type=int, default=20_000)
    memory.add_argument("--layer-types", default="0_2_2_3")
    memory.add_argument("--hidden-size", type=int, default=128)
    perplexity = commands.add_parser("perplexity", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    perplexity.add_argument("--model", required=True, help="a run, a folder with a model, or a GGUF file")
    perplexity.add_argument("--text", help="a text file (txt, jsonl, parquet); by default the Bible")
    perplexity.add_argument("--length", type=int, default=3000, help="tokens to read")
    perplexity.add_argument("--batch", type=int, default=4, help="stretches of text to read side by side")
    perplexity.add_argument("--bin", type=int, default=100, help="tokens for each point of the curve")
    perplexity.add_argument("--dtype", default="float32")
    perplexity.add_argument("--device", default="cpu")
    for command in (memory, perplexity):
        command.add_argument("--sinks", type=int, default=4)
        command.add_argument("--window", type=int, default=252)
    return parser.parse_args()


def main() -> None:
    """Measures, prints and writes."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    is_memory = arguments.command == "memory"
    result = measure_memory(arguments) if is_memory else measure_perplexity(arguments)
    (print_memory if is_memory else print_perplexity)(result)
    folder = Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{arguments.command}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (plot_memory if is_memory else plot_perplexity)(result, folder / f"{arguments.command}.png")


if __name__ == "__main__":
    main()
