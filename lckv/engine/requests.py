"""A request of continuous batching: what it asks for, what `generate()` would make of that, and what all took."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.continuous_batching.requests import RequestState

from lckv.errors import UserError, check_whole_number

OnToken = Callable[[str, int], Any]
"""Called with the request's name and each token as it is made."""

UNSUPPORTED = {
    "num_return_sequences": (None, 1),
    "stop_strings": (None,),
    "max_time": (None,),
    "guidance_scale": (None, 1),
}
"""Options of `generate()` that concern several rows, or the loop around it, and the values that ask for nothing."""


@dataclass
class BatchStatistics:
    """What a batcher has done so far.

    Attributes:
        seconds: wall time of all steps.
        num_steps: how many there were.
        num_prompt_tokens: tokens that were run through the model without one being generated from them, those of
            requests that had to begin again included.
        num_reused_tokens: tokens whose keys and values an earlier request had left.
        num_generated_tokens: tokens that requests got.
        num_preemptions: how often a request lost its pages and had to begin again.
        num_finished: requests that ended well.
        num_failed: requests that did not.
        peak_rows: most requests that were running at once.
        peak_used_bytes: most bytes of pages that were in use after a step.
    """

    seconds: float = 0.0
    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_reused_tokens: int = 0
    num_generated_tokens: int = 0
    num_preemptions: int = 0
    num_finished: int = 0
    num_failed: int = 0
    peak_rows: int = 0
    peak_used_bytes: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second of wall time, prefill included."""
        return self.num_generated_tokens / self.seconds if self.seconds else 0.0


@dataclass(eq=False)
class Request:
    """A request and what it takes to choose its tokens.

    Attributes:
        state: transformers' record of it.
        tokens: of the prompt, and those generated so far.
        processors: what `generate()` would do to the logits.
        do_sample: whether tokens are drawn.
        generator: draws them; `None` for torch's own.
        on_token: told each token.
        hashes: of the prompt's full pages.
    """

    state: RequestState
    tokens: list[int]
    processors: LogitsProcessorList
    do_sample: bool
    generator: torch.Generator | None
    on_token: OnToken | None
    hashes: list[bytes] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What the user calls it."""
        return str(self.state.request_id)


def make_request(
    model: Any,
    name: str,
    prompt: list[int],
    generation_config: GenerationConfig | None,
    *,
    max_new_tokens: int | None = None,
    seed: int | None = None,
    on_token: OnToken | None = None,
) -> Request:
    """Finds out what `generate()` would do for a prompt; see `ContinuousBatcher.add_request`."""
    vocab_size = model.config.vocab_size
    if not prompt:
        raise UserError(f"request {name!r}: the prompt is empty: give at least one token")
    if not 0 <= min(prompt) <= max(prompt) < vocab_size:
        raise UserError(f"request {name!r}: tokens {min(prompt)} to {max(prompt)}: allowed are 0 to {vocab_size - 1}")
    config = _prepare_config(model, generation_config)
    if max_new_tokens is None:
        max_new_tokens = config.max_new_tokens  # and else the same as in `generate()`
    if max_new_tokens is None:
        max_new_tokens = 20 if config.max_length is None else config.max_length - len(prompt)
    check_whole_number(f"request {name!r}: max_new_tokens", max_new_tokens)
    return Request(
        RequestState(name, prompt, max_new_tokens=max_new_tokens, eos_token_id=config.eos_token_id),
        list(prompt),
        _processors(model, config, len(prompt)),
        do_sample=bool(config.do_sample),
        generator=None if seed is None else torch.Generator(model.device).manual_seed(seed),
        on_token=on_token,
    )


def _prepare_config(model: Any, config: GenerationConfig | None) -> GenerationConfig:
    """The options with defaults filled in, as `generate()` sees them."""
    config = copy.deepcopy(model.generation_config if config is None else config)
    for option, allowed in UNSUPPORTED.items():
        if getattr(config, option, None) not in allowed:
            raise UserError(f"continuous batching with {option}={getattr(config, option)!r}: allowed is {allowed[-1]}")
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise UserError(f"continuous batching with {mode.value}: allowed are greedy search and sampling")
    return config


def _processors(model: Any, config: GenerationConfig, prompt_length: int) -> LogitsProcessorList:
    """What `generate()` would do to the logits of this prompt's continuation."""
    config, _ = model._prepare_generation_config(config)
    model._prepare_special_tokens(config, kwargs_has_attention_mask=True, device=model.device)
    processors: LogitsProcessorList = model._get_logits_processor(
        config, input_ids_seq_length=prompt_length, logits_processor=LogitsProcessorList(), device=model.device
    )
    return processors
