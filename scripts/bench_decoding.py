"""Times the decoding of one sequence: `python scripts/bench_decoding.py MODEL --help`.

transformers' own Llama with its dynamic cache is the yardstick; beside it stand the same weights in our model with the
dynamic cache, and with the static cache and compiled steps. Every figure is tokens per second of transformers'
`generate()` behind the prompt, the time of a run with one new token taken off; or with `--bare` of a loop that does
nothing but run the model and take the likeliest token. The ways take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lckv.cache import build_cache
from lckv.generation.batch import compile_config
from lckv.loading import load_model
from lckv.models import LCKVLlamaConfig

Generate = Callable[[int], torch.Tensor]


def transformers_llama(model: PreTrainedModel) -> LlamaForCausalLM:
    """A Llama of transformers with the weights of our model, whose layers must all read themselves."""
    names = set(LlamaConfig().to_dict()) - {"layer_types", "model_type", "architectures", "sliding_window"}
    config = LlamaConfig(**{name: value for name, value in model.config.to_dict().items() if name in names})
    llama = LlamaForCausalLM(config)
    llama.load_state_dict(model.state_dict())
    return llama.to(model.dtype).eval()  # type: ignore[arg-type]


def ways_of(model: PreTrainedModel, input_ids: torch.Tensor, max_length: int) -> dict[str, Generate]:
    """The ways to generate, each a function of the number of new tokens."""
    llama = transformers_llama(model)
    static = build_cache("static", model.config, max_length=max_length)

    def with_transformers(num_tokens: int) -> torch.Tensor:
        return generate(llama, input_ids, num_tokens, DynamicCache(config=llama.config))

    def dynamic(num_tokens: int) -> torch.Tensor:
        return generate(model, input_ids, num_tokens, build_cache("dynamic", model.config))

    def compiled(num_tokens: int) -> torch.Tensor:
        static.reset()
        return generate(model, input_ids, num_tokens, static, compile_config=compile_config(model.device))

    return {"transformers' Llama, dynamic": with_transformers, "dynamic": dynamic, "static, compiled": compiled}


def bare_ways_of(model: PreTrainedModel, input_ids: torch.Tensor, max_length: int) -> dict[str, Generate]:
    """The same as [`ways_of`] without `generate()`."""
    llama = transformers_llama(model)
    static = build_cache("static", model.config, max_length=max_length)
    step = torch.compile(model.__call__, **compile_config(model.device).to_dict())

    def with_transformers(num_tokens: int) -> torch.Tensor:
        return decode(llama, llama, input_ids, num_tokens, DynamicCache(config=llama.config))

    def dynamic(num_tokens: int) -> torch.Tensor:
        return decode(model, model, input_ids, num_tokens, build_cache("dynamic", model.config))

    def compiled(num_tokens: int) -> torch.Tensor:
        static.reset()
        return decode(model, step, input_ids, num_tokens, static)

    return {"transformers' Llama, dynamic": with_transformers, "dynamic": dynamic, "static, compiled": compiled}


@torch.no_grad()
def decode(model: Any, step: Any, input_ids: torch.Tensor, num_tokens: int, cache: object) -> torch.Tensor:
    """Greedy, exactly `num_tokens` tokens, with `model` for the prompt and `step` for what follows."""
    tokens = [input_ids]
    logits = model(input_ids, past_key_values=cache, logits_to_keep=1).logits
    for _ in range(num_tokens - 1):
        tokens.append(logits[:, -1:].argmax(-1))
        logits = step(tokens[-1], past_key_values=cache, logits_to_keep=1).logits
    return torch.cat([*tokens, logits[:, -1:].argmax(-1)], dim=1)


def generate(model: Any, input_ids: torch.Tensor, num_tokens: int, cache: object, **options: object) -> torch.Tensor:
    """Greedy, exactly `num_tokens` tokens."""
    return model.generate(
        input_ids,
        past_key_values=cache,
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        **options,
    )


def time_of(way: Generate, num_tokens: int) -> float:
    """Seconds."""
    start = time.perf_counter()
    way(num_tokens)
    return time.perf_counter() - start


def main() -> None:
    """Reads the command line and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint, Hub name or GGUF file of a Llama")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--prompt-length", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=256, help="of the static cache")
    parser.add_argument("--bare", action="store_true", help="without transformers' generate()")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--num-threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.num_threads)
    torch.manual_seed(0)
    model, _ = load_model(args.model, dtype=args.dtype)
    assert isinstance(model.config, LCKVLlamaConfig)
    input_ids = torch.randint(model.config.vocab_size, (1, args.prompt_length))
    ways = (bare_ways_of if args.bare else ways_of)(model, input_ids, args.max_length)
    texts = {name: way(args.new_tokens) for name, way in ways.items()}  # compiles, too
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in track(range(args.rounds), description="rounds"):
        for name, way in ways.items():
            seconds = time_of(way, args.new_tokens) - time_of(way, 1)
            speeds[name].append((args.new_tokens - 1) / seconds)
    baseline, expected = next(iter(speeds.values())), next(iter(texts.values()))
    table = Table("way", "tokens/s", "to the first", "first tokens that agree", box=None)
    for name, values in speeds.items():
        ratio = statistics.median(mine / first for mine, first in zip(values, baseline, strict=True))
        agreeing = int((texts[name] == expected)[0, args.prompt_length :].long().cumprod(0).sum())
        table.add_row(name, f"{statistics.median(values):.1f}", f"{ratio:.2f}", f"{agreeing} of {args.new_tokens}")
    Console().print(table)


if __name__ == "__main__":
    main()
