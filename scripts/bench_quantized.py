"""Measures the quantised cache: bytes, perplexity and the codec's speed: `python scripts/bench_quantized.py --help`.

Perplexity is that of real text which the model reads through the cache in chunks: the keys and values of earlier
chunks are those that the cache gives back, so that all but the recent tokens are read from codes. Every setting reads
the same windows of text, and its change is taken over the same tokens. Bytes are counted from the live tensors, with
scales, zero points and recent tokens. The codec is timed against itself called once per token.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

from lckv.cache import KVCache, build_cache
from lckv.cache.quantization import GroupCodec
from lckv.config import DataConfig
from lckv.data.readers import read_documents
from lckv.data.sources import build_source
from lckv.errors import UserError
from lckv.loading import load_model

REFERENCE = "float32"
LENGTHS = (1024, 2048, 4096, 8192)
SHOWN = (2048, 4096)
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setting:
    """One row of the result: a cache with its options."""

    label: str
    cache: str
    options: dict[str, Any]

    def build(self, config: Any) -> KVCache:
        """An empty cache."""
        return build_cache(self.cache, config, **self.options)


def all_settings() -> list[Setting]:
    """The reference, each number of bits with the default and a short recent window, and keys grouped per token."""
    settings = [Setting(REFERENCE, "dynamic", {})]
    for bits in (8, 4, 2):
        settings.append(Setting(f"int{bits}", "quantized", {"bits": bits}))
        for residual_length in (128, 0):
            options = {"bits": bits, "residual_length": residual_length}
            settings.append(Setting(f"int{bits}, residual {residual_length}", "quantized", options))
        settings.append(Setting(f"int{bits}, keys per token", "quantized", {"bits": bits, "key_axis": "token"}))
    return settings


def read_texts(path: Path | None) -> Iterator[str]:
    """The documents of a file, or the books of the Bible that training never sees."""
    if path is None:
        source = build_source(DataConfig(name="bible"))
        assert source.read_validation is not None  # whole books are held out
        for document in source.read_validation():
            yield document.text
        return
    if not path.is_file():
        raise UserError(f"--text {path}: there is no such file")
    for document in read_documents(path, "text", None):
        yield document.text


def cut_windows(tokenizer: Any, texts: Iterable[str], length: int, count: int, most_texts: int = 200) -> torch.Tensor:
    """Windows of text `(count, length)`: the first of each document that is long enough, then the second of each."""
    by_document = []
    for _, text in zip(range(most_texts), texts, strict=False):
        token_ids = torch.tensor(tokenizer(text, verbose=False).input_ids)
        if len(token_ids) >= length:
            by_document.append(token_ids[: len(token_ids) // length * length].view(-1, length))
    windows = [window for turn in zip_longest(*by_document) for window in turn if window is not None]
    if len(windows) < count:
        raise UserError(f"--windows {count}: the text has {len(windows)} windows of {length} tokens")
    return torch.stack(windows[:count])


@torch.inference_mode()
def score(model: nn.Module, cache: KVCache, window: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """Negative log-likelihood of all tokens of a window `(length,)` but the first."""
    logits = [model(chunk[None], past_key_values=cache).logits[0] for chunk in window.split(chunk_size)]
    return nn.functional.cross_entropy(torch.cat(logits)[:-1].float(), window[1:], reduction="none")


def measure_perplexity(model: Any, windows: torch.Tensor, settings: list[Setting], chunk_size: int) -> dict[str, Any]:
    """Perplexity of each setting, and how far it is from the reference."""
    losses: dict[str, list[torch.Tensor]] = {setting.label: [] for setting in settings}
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("perplexity", total=len(windows) * len(settings))
        for window in windows:
            for setting in settings:
                progress.update(task, description=setting.label)
                losses[setting.label].append(score(model, setting.build(model.config), window, chunk_size))
                progress.advance(task)
    reference = torch.stack(losses[REFERENCE])
    return {label: compare(torch.stack(values), reference) for label, values in losses.items()}


def compare(losses: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Perplexity over all windows `(num_windows, length - 1)`, and its change in percent with a standard error."""
    differences = (losses - reference).double()
    change = math.expm1(differences.mean().item())
    error = differences.std().item() / math.sqrt(differences.numel())
    return {
        "perplexity": math.exp(losses.double().mean().item()),
        "change_percent": 100 * change,
        "standard_error_percent": 100 * error * (1 + change),
    }


@torch.inference_mode()
def measure_bytes(config: Any, settings: list[Setting]) -> dict[str, dict[int, float]]:
    """Bytes of each cache over those of the reference, by number of tokens, counted from live tensors."""
    num_bytes = {setting.label: fill(setting.build(config), config) for setting in settings}
    return {
        label: {length: count / num_bytes[REFERENCE][length] for length, count in counts.items()}
        for label, counts in num_bytes.items()
    }


def fill(cache: KVCache, config: Any) -> dict[int, int]:
    """Bytes after each of `LENGTHS` tokens; what the tokens are does not matter."""
    num_bytes, before = {}, 0
    for length in LENGTHS:
        for owner in cache.owners():
            states = torch.randn(1, config.num_key_value_heads, length - before, config.head_dim)
            cache.update(states, states, owner)
        num_bytes[length], before = cache.num_bytes(), length
    return num_bytes


def _encode_token_by_token(codec: GroupCodec, states: torch.Tensor) -> torch.Tensor:
    return torch.cat([codec.encode(token).codes for token in states.split(1, dim=2)], dim=2)


def _decode_token_by_token(codec: GroupCodec, encoded: Any, num_tokens: int, dtype: torch.dtype) -> torch.Tensor:
    tokens = [codec.decode(codec.cut(encoded, token, token + 1), dtype) for token in range(num_tokens)]
    return torch.cat(tokens, dim=2)


@torch.inference_mode()
def measure_codec(num_heads: int, head_dim: int, num_tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds to encode and decode one owner's keys at once, and one token at a time."""
    states = torch.randn(1, num_heads, num_tokens, head_dim)
    results = {}
    for bits in (8, 4, 2):
        codec = GroupCodec.along("token", bits, head_dim, head_dim)  # groups that a single token fills
        encoded = codec.encode(states)
        results[f"int{bits} encode"] = race(
            partial(codec.encode, states),
            partial(_encode_token_by_token, codec, states),
            rounds,
        )
        results[f"int{bits} decode"] = race(
            partial(codec.decode, encoded, states.dtype),
            partial(_decode_token_by_token, codec, encoded, num_tokens, states.dtype),
            rounds,
        )
    return results


def race(at_once: Callable[[], object], one_by_one: Callable[[], object], rounds: int) -> dict[str, float]:
    """Median CPU time of both in milliseconds, in turns, and the median of their ratios within a round."""
    pairs = [(milliseconds(at_once), milliseconds(one_by_one)) for _ in range(rounds + 1)][1:]
    fast, slow = (statistics.median(times) for times in zip(*pairs, strict=True))
    return {"ms": fast, "loop_ms": slow, "ratio": statistics.median(slow / fast for fast, slow in pairs)}


def milliseconds(function: Callable[[], object]) -> float:
    """CPU time of one call."""
    start = time.process_time()
    function()
    return 1000 * (time.process_time() - start)


def show(results: dict[str, Any]) -> None:
    """Prints the tables."""
    table = Table("cache", *(f"bytes, {length}" for length in SHOWN), "perplexity", "change", "std. error")
    for label, row in results["perplexity"].items():
        ratios = [f"{results['bytes'][label][length]:.3f}" for length in SHOWN]
        table.add_row(
            label,
            *ratios,
            f"{row['perplexity']:.3f}",
            f"{row['change_percent']:+.2f}%",
            f"{row['standard_error_percent']:.2f}%",
        )
    codec = Table("codec", "ms at once", "ms token by token", "ratio")
    for name, row in results["codec"].items():
        codec.add_row(name, f"{row['ms']:.2f}", f"{row['loop_ms']:.0f}", f"{row['ratio']:.0f}")
    console = Console()
    console.print(table, codec)


def plot(results: dict[str, Any], path: Path) -> None:
    """Draws the change in perplexity over the bytes at the longest length."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    longest = LENGTHS[-1]
    kinds = {"": ("keys per channel", "o"), ", keys per token": ("keys per token", "^")}
    for ending, (name, marker) in kinds.items():
        rows = [(f"int{bits}", f"int{bits}{ending}") for bits in (8, 4, 2)]
        x = [results["bytes"][label][longest] for _, label in rows]
        changes = [results["perplexity"][label] for _, label in rows]
        y = [row["change_percent"] for row in changes]
        axes.errorbar(
            x,
            y,
            [row["standard_error_percent"] for row in changes],
            marker=marker,
            capsize=3,
            linestyle="",
            label=name,
        )
        for (text, _), left, up in zip(rows, x, y, strict=True) if not ending else ():
            axes.annotate(text, (left, up), textcoords="offset points", xytext=(8, -3))
    axes.set_yscale("symlog", linthresh=1)  # a change within the noise may be negative
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.margins(x=0.1)
    axes.set_xlabel(f"KV bytes at {longest} tokens over those of float32")
    axes.set_ylabel("change of perplexity in percent, with standard error")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a run folder, a checkpoint folder, a GGUF file or a name on the Hub")
    parser.add_argument("--text", type=Path, help="txt, jsonl or parquet; by default held-out books of the Bible")
    parser.add_argument("--windows", type=int, default=4, help="how many windows of text")
    parser.add_argument("--length", type=int, default=1024, help="tokens per window")
    parser.add_argument("--chunk-size", type=int, default=32, help="tokens per forward call")
    parser.add_argument("--rounds", type=int, default=5, help="of timing the codec")
    parser.add_argument("--codec-tokens", type=int, default=4096, help="tokens that the timed codec gets")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    parser.add_argument("--plot", type=Path, help="a PNG file for the picture")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> None:
    """Measures everything that the command line asks for."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model, tokenizer = load_model(arguments.model, dtype="float32", device="cpu")
    windows = cut_windows(tokenizer, read_texts(arguments.text), arguments.length, arguments.windows)
    config, settings = model.config, all_settings()
    logger.info("%d windows of %d tokens, %d settings", *windows.shape, len(settings))
    num_heads, head_dim = config.num_key_value_heads, config.head_dim
    assert num_heads is not None and head_dim is not None  # the configuration fills them in
    results = {
        "settings": [asdict(setting) for setting in settings],
        "arguments": {name: str(value) for name, value in vars(arguments).items() if name != "text"},
        "codec": measure_codec(num_heads, head_dim, arguments.codec_tokens, arguments.rounds),
        "bytes": measure_bytes(config, settings),
        "perplexity": measure_perplexity(model, windows, settings, arguments.chunk_size),
    }
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(results, indent=2))
    if arguments.plot is not None:
        plot(results, arguments.plot)
    show(results)


def main() -> None:
    """Runs the benchmark; mistakes on the command line end it with one line."""
    logging.basicConfig(level="WARNING", format="%(message)s", handlers=[RichHandler(console=Console(stderr=True))])
    logger.setLevel("INFO")
    try:
        run(parse_arguments())
    except UserError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
