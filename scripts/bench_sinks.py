"""Perplexity of long text with attention sinks: `python scripts/bench_sinks.py MODEL --help`.

A trained model reads real text token by token, with the whole text in the cache, with the last tokens only, and with
sinks and the last tokens in as much memory. Stretches of the text are read side by side, evenly spaced.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from ways import draw, read_arguments, show

from lckv.cache import DynamicKVCache, KVCache, SinkKVCache
from lckv.config import DataConfig
from lckv.data.readers import read_documents
from lckv.data.sources import build_source
from lckv.generation.streaming import score_stream
from lckv.loading.models import load_model
from lckv.utils.console import track


@torch.inference_mode()
def score_in_chunks(model: Any, rows: torch.Tensor, cache: KVCache) -> Iterator[torch.Tensor]:
    """What `score_stream` yields, many tokens at a time, which is exact as long as nothing is dropped."""
    logits = torch.cat([model(chunk, past_key_values=cache).logits for chunk in rows.split(200, dim=1)], dim=1)
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
    yield from losses.view(len(rows), -1).unbind(dim=1)


def perplexity(losses: torch.Tensor) -> float:
    """Of any number of losses."""
    return math.exp(losses.mean())


def main() -> None:
    """Reads the text with each cache, prints a table and draws the curves beside `output`."""
    sizes = {"length": 3000, "batch": 4, "bin": 100, "sinks": 4, "window": 252}
    output = {"output": "runs/streaming/perplexity.json", "dtype": "float32", "device": "cpu"}
    arguments = read_arguments(__doc__, "model", text="", **sizes, **output)
    model, tokenizer = load_model(arguments.model, dtype=arguments.dtype, device=arguments.device)
    given = read_documents(Path(arguments.text), "text", None) if arguments.text else None
    documents = given or build_source(DataConfig()).read_training()
    text = "\n\n".join(documents)
    token_ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    length, batch, size = arguments.length, arguments.batch, arguments.sinks + arguments.window
    starts = [row * (len(token_ids) - length) // max(1, batch - 1) for row in range(batch)]
    token_rows = torch.stack([token_ids[start : start + length] for start in starts]).to(model.device)
    caches = {
        "dense": DynamicKVCache(model.config),
        f"window of {size}": SinkKVCache(model.config, num_sinks=0, window=size),
        f"{arguments.sinks} sinks + window of {arguments.window}": SinkKVCache(
            model.config, num_sinks=arguments.sinks, window=arguments.window
        ),
    }
    rows, curves = {}, {}
    for name, cache in caches.items():
        scores = (score_in_chunks if name == "dense" else score_stream)(model, token_rows, cache)
        losses = torch.stack(list(track(scores, name, length - 1)), dim=1).double()  # (batch, length - 1)
        rows[name] = {
            "until full": perplexity(losses[:, : size - 1]),
            "once full": perplexity(losses[:, size - 1 :]),
            "cache bytes": cache.num_bytes(),
        }
        bins = losses.split(arguments.bin, dim=1)
        curves[name] = [arguments.bin * (i + 0.5) for i in range(len(bins))], [perplexity(each) for each in bins]
    show(rows, output=arguments.output)
    draw({"perplexity": curves}, "position in the text (tokens)", Path(arguments.output).with_suffix(".png"))


if __name__ == "__main__":
    main()
