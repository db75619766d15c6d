"""Times the decoding of one sequence: `python scripts/bench_decoding.py MODEL --help`.

transformers' own Llama with its dynamic cache is the yardstick; beside it stand the same weights in our model with the
dynamic cache, and with the static cache and compiled steps. Every figure is tokens per second of transformers'
`generate()` behind the prompt, the time of a run with one new token taken off; or with `--bare` of a loop that does
nothing but run the model and take the likeliest token.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from ways import read_arguments, show, take_turns

from lckv.benchmarking.results import median, ratio
from lckv.cache import build_cache
from lckv.generation.batch import compile_config
from lckv.loading.models import load_model

BASELINE = "transformers' Llama, dynamic"


def transformers_llama(model: Any) -> LlamaForCausalLM:
    """A Llama of transformers with the weights of our model, whose layers must all read themselves."""
    names = set(LlamaConfig().to_dict()) - {"layer_types", "model_type", "architectures", "sliding_window"}
    config = LlamaConfig(**{name: value for name, value in model.config.to_dict().items() if name in names})
    llama = LlamaForCausalLM(config)
    llama.load_state_dict(model.state_dict())
    return llama.to(model.dtype).eval()


@torch.no_grad()
def decode(model: Any, step: Any, new_cache: Any, input_ids: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Greedy, exactly `num_tokens` tokens, with `model` for the prompt and `step` for what follows."""
    cache, tokens = new_cache(), [input_ids]
    logits = model(input_ids, past_key_values=cache, logits_to_keep=1).logits
    for _ in range(num_tokens - 1):
        tokens.append(logits[:, -1:].argmax(-1))
        logits = step(tokens[-1], past_key_values=cache, logits_to_keep=1).logits
    return torch.cat([*tokens, logits[:, -1:].argmax(-1)], dim=1)


def generate(model: Any, options: Any, new_cache: Any, input_ids: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """The same by transformers' `generate()`."""
    options = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "do_sample": False, **options}
    return model.generate(input_ids, past_key_values=new_cache(), **options)


def ways_of(model: Any, bare: bool, max_length: int) -> dict[str, Any]:
    """The ways to generate, each a function of the prompt and the number of new tokens."""
    llama, static = transformers_llama(model), build_cache("static", model.config, max_length=max_length)

    def emptied() -> Any:
        static.reset()
        return static

    caches = partial(DynamicCache, config=llama.config), partial(build_cache, "dynamic", model.config), emptied
    config = compile_config(model.device)
    if bare:
        steps = llama, model, torch.compile(model.__call__, **config.to_dict())
        found = [partial(decode, *way) for way in zip((llama, model, model), steps, caches, strict=True)]
    else:
        options: list[dict[str, Any]] = [{}, {}, {"compile_config": config}]
        found = [partial(generate, *way) for way in zip((llama, model, model), options, caches, strict=True)]
    return dict(zip((BASELINE, "dynamic", "static, compiled"), found, strict=True))


def main() -> None:
    """Times the ways in turn, and prints a table."""
    lengths = {"prompt_length": 64, "new_tokens": 32, "max_length": 256}
    arguments = read_arguments(__doc__, "model", dtype="float32", bare=False, threads=2, rounds=9, **lengths)
    model, _ = load_model(arguments.model, dtype=arguments.dtype)
    input_ids, count = torch.randint(model.config.vocab_size, (1, arguments.prompt_length)), arguments.new_tokens
    ways = ways_of(model, arguments.bare, arguments.max_length)
    texts = {name: way(input_ids, count) for name, way in ways.items()}  # compiles, too
    runs = {(name, length): partial(way, input_ids, length) for name, way in ways.items() for length in (count, 1)}
    seconds = take_turns(runs, arguments.rounds, time.perf_counter, warm_up=0)
    speeds = {
        name: [(count - 1) / (all_ - one) for all_, one in zip(seconds[name, count], seconds[name, 1], strict=True)]
        for name in ways
    }
    rows = {}
    for name, text in texts.items():
        agreeing = int((text == texts[BASELINE])[0, arguments.prompt_length :].long().cumprod(0).sum())
        rows[name] = {
            "tokens/s": median(speeds[name]),
            "to the first": ratio(speeds[name], speeds[BASELINE]),
            "first tokens that agree": agreeing,
        }
    show(rows, output=arguments.output)


if __name__ == "__main__":
    main()
