"""Measures the quantised cache: bytes, perplexity and the codec's speed: `python scripts/bench_quantized.py --help`.

Perplexity is that of real text which the model reads through the cache in chunks: the keys and values of earlier
chunks are those that the cache gives back, so that all but the recent tokens are read from codes. Every cache reads
the same windows of text, and its change is taken over the same tokens. Bytes are counted from the live tensors, with
scales, zero points and recent tokens. The codec is timed against itself called once per token.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from ways import draw, read_arguments, show, take_turns

from lckv.benchmarking.results import ratio
from lckv.cache import KVCache, build_cache
from lckv.cache.quantization import GroupCodec
from lckv.config import DataConfig
from lckv.data.readers import read_documents
from lckv.data.sources import build_source
from lckv.loading.models import load_model

LENGTHS = (2048, 4096, 8192)
OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    ", residual 128": {"residual_length": 128},
    ", residual 0": {"residual_length": 0},
    ", keys per token": {"key_axis": "token"},
}
CACHES = {
    f"int{bits}{label}": {"name": "quantized", "bits": bits, **options}
    for bits in (8, 4, 2)
    for label, options in OPTIONS.items()
}


def cut_windows(tokenizer: Any, path: str, length: int, count: int) -> torch.Tensor:
    """Windows of text `(count, length)`: the first of each document that is long enough, then the second of each."""
    documents = read_documents(Path(path), "text", None) if path else build_source(DataConfig()).validation_documents()
    by_document = []
    for _, document in zip(range(200), documents, strict=False):
        token_ids = torch.tensor(tokenizer(document, verbose=False).input_ids)
        by_document.append(token_ids[: len(token_ids) // length * length].view(-1, length))
    windows = [window for turn in zip_longest(*by_document) for window in turn if window is not None]
    return torch.stack(windows[:count])


@torch.inference_mode()
def score(model: Any, new_cache: Any, windows: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """Negative log-likelihoods `(num_windows, length - 1)` of all tokens but the first of each window."""
    losses = []
    for window in windows:
        cache = new_cache()
        logits = [model(chunk[None], past_key_values=cache).logits[0] for chunk in window.split(chunk_size)]
        losses.append(torch.nn.functional.cross_entropy(torch.cat(logits)[:-1].float(), window[1:], reduction="none"))
    return torch.stack(losses).double()


@torch.inference_mode()
def count_bytes(cache: KVCache, config: Any) -> list[int]:
    """Live bytes after each of `LENGTHS` tokens; what the tokens are does not matter."""
    counts = []
    for length in LENGTHS:
        for owner in cache.owners():
            states = torch.randn(1, config.num_key_value_heads, length - cache.get_seq_length(owner), config.head_dim)
            cache.update(states, states, owner)
        counts.append(cache.num_bytes())
    return counts


def codec_ways(bits: int, config: Any, num_tokens: int) -> list[tuple[str, Callable[[], object]]]:
    """Encoding and decoding one owner's keys, all tokens at once and one at a time."""
    codec = GroupCodec.along("token", bits, config.head_dim, config.head_dim)  # groups that a single token fills
    states = torch.randn(1, config.num_key_value_heads, num_tokens, config.head_dim)
    encoded, dtype = codec.encode(states), states.dtype
    return [
        (f"int{bits} encode", lambda: codec.encode(states)),
        (f"int{bits} encode by token", lambda: [codec.encode(token) for token in states.split(1, dim=2)]),
        (f"int{bits} decode", lambda: codec.decode(encoded, dtype)),
        (
            f"int{bits} decode by token",
            lambda: [codec.decode(codec.cut(encoded, token, token + 1), dtype) for token in range(num_tokens)],
        ),
    ]


def main() -> None:
    """Measures the caches, then the codec."""
    sizes = {"windows": 4, "length": 1024, "chunk_size": 32, "codec_tokens": 4096}
    arguments = read_arguments(__doc__, "model", text="", **sizes)
    model, tokenizer = load_model(arguments.model, dtype="float32", device="cpu")
    windows = cut_windows(tokenizer, arguments.text, arguments.length, arguments.windows)
    rows: dict[str, dict[str, Any]] = {}
    for label, options in ({"float32": {"name": "dynamic"}} | CACHES).items():
        new_cache = partial(build_cache, config=model.config, **options)
        losses, counts = score(model, new_cache, windows, arguments.chunk_size), count_bytes(new_cache(), model.config)
        if label == "float32":
            reference, reference_counts = losses, counts
        change, error = (losses - reference).mean(), (losses - reference).std() / math.sqrt(losses.numel())
        ratios = [mine / other for mine, other in zip(counts, reference_counts, strict=True)]
        rows[label] = {f"bytes, {length}": ratio for length, ratio in zip(LENGTHS, ratios, strict=True)} | {
            "perplexity": math.exp(losses.mean()),
            "change, %": 100 * math.expm1(change),
            "standard error, %": 100 * float(error * change.exp()),
        }
    if arguments.output:
        lines = {
            name: [rows[f"int{bits}{label}"] for bits in (8, 4, 2)]
            for name, label in {"keys per channel": "", "keys per token": ", keys per token"}.items()
        }
        x, y = f"bytes, {LENGTHS[-1]}", "change, %"
        curves = {name: ([row[x] for row in line], [row[y] for row in line]) for name, line in lines.items()}
        draw({f"perplexity: {y}": curves}, x, Path(arguments.output).with_suffix(".png"))
    ways = {name: way for bits in (8, 4, 2) for name, way in codec_ways(bits, model.config, arguments.codec_tokens)}
    seconds = take_turns(ways, arguments.rounds)
    codec = {
        name: {
            "ms": 1000 * statistics.median(seconds[name]),
            "token by token": ratio(seconds[f"{name} by token"], seconds[name]),
        }
        for name in ways
        if not name.endswith("by token")
    }
    show(rows, codec, output=arguments.output)


if __name__ == "__main__":
    main()
