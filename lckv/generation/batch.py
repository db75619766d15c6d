"""Prefill and decoding of one batch of prompts, with what they took."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import CompileConfig, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from lckv.cache import KVCache
from lckv.errors import UserError
from lckv.generation.decoding_options import DecodingOptions
from lckv.generation.prefill import PrefillOptions, prefill
from lckv.utils.logits import check_logits
from lckv.utils.padding import pad_left

logger = logging.getLogger(__name__)

_STEPS_TO_COMPILE = 3
"""How many steps after the first are slow: torch compiles in one, and may record CUDA graphs in two more."""


@dataclass(frozen=True)
class Generation:
    """What came of one batch.

    Attributes:
        new_tokens: for each prompt, the tokens behind it, without what follows the end of the text.
        num_steps: tokens decoded in each row.
        num_untimed: how many of them `decode_seconds` leaves out: the first belongs to the prefill, and others may
            have been spent compiling.
        first_token_seconds: from the start of the prefill until the first new token is known.
        decode_seconds: what the other tokens took.
        cache_bytes: bytes of the cache's live tensors at the end.
        cache_tokens: tokens that have gone into the cache, in all rows together.
        num_passes: for each chunk of the prompt, how often the layers of a cycle ran.
        residual: how far KV still moved in the last pass, if there were several.
    """

    new_tokens: list[list[int]]
    num_steps: int
    num_untimed: int
    first_token_seconds: float
    decode_seconds: float
    cache_bytes: int
    cache_tokens: int
    num_passes: list[int]
    residual: float | None

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of all rows per second of decoding."""
        num_decoded = sum(max(0, len(tokens) - self.num_untimed) for tokens in self.new_tokens)
        return num_decoded / self.decode_seconds if num_decoded and self.decode_seconds else None


class StepWatch(LogitsProcessor):
    """Notes when logits are known, and stops at the first that cannot be chosen from.

    Args:
        num_untimed: after how many steps decoding is timed.
    """

    def __init__(self, num_untimed: int = 1) -> None:
        self.num_untimed = num_untimed
        self.num_steps = 0
        self.first_token_time = self.decode_start_time = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Looks at the logits `(batch, vocab_size)` of one step.

        Raises:
            UserError: if a row's largest is no finite number.
        """
        self.num_steps += 1
        check_logits(scores, f"the logits of new token {self.num_steps}")
        now = time.perf_counter()  # behind the check, which waits for the device
        if self.num_steps == 1:
            self.first_token_time = now
        if self.num_steps <= self.num_untimed:
            self.decode_start_time = now
        return scores


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    prompts: list[list[int]],
    cache: KVCache,
    decoding: DecodingOptions,
    max_new_tokens: int,
    *,
    num_columns: int | None = None,
    prefill_options: PrefillOptions | None = None,
    compile_step: bool = False,
    streamer: BaseStreamer | None = None,
    on_chunk: Callable[[int], Any] | None = None,
) -> Generation:
    """Continues a batch of prompts by transformers' `generate`, behind a prefill of our own.

    Args:
        model: the model, in evaluation mode.
        prompts: the prompts' tokens.
        cache: an empty cache; a static one may have been in use before, and reset.
        decoding: how tokens are chosen.
        max_new_tokens: where to stop at the latest.
        num_columns: to how many tokens prompts are padded; by default the longest prompt's.
        prefill_options: how the prompt goes through the model.
        compile_step: whether to compile the step that decodes a token, which needs the static cache.
        streamer: gets each token as it comes, for a single prompt without beams.
        on_chunk: called after each chunk of the prefill with the number of its tokens.

    Raises:
        UserError: if the logits are not finite, or the tokenizer has more tokens than the model.
    """
    config = generation_config(model, decoding, max_new_tokens, compile_step)
    input_ids, attention_mask = _pad(model, prompts, config.pad_token_id, num_columns)
    if compile_step and cache.batch_size < 0:  # else this cache has been here before
        logger.info("compiling the decoding step, which takes a minute or so")
    if decoding.seed is not None:
        torch.manual_seed(decoding.seed)
    watch = StepWatch(num_untimed=1 + _STEPS_TO_COMPILE if compile_step else 1)
    report, start_time = None, time.perf_counter()
    if input_ids.shape[1] > 1:  # the last token is left to `generate`, which wants something to run
        report = prefill(
            model,
            input_ids[:, :-1],
            cache,
            attention_mask=attention_mask,
            on_chunk=on_chunk,
            **asdict(prefill_options or PrefillOptions()),
        )
    if decoding.num_beams > 1:
        cache.batch_repeat_interleave(decoding.num_beams)
    output = model.generate(  # type: ignore[operator]
        input_ids,
        attention_mask=torch.ones_like(input_ids) if attention_mask is None else attention_mask,
        past_key_values=cache,
        generation_config=config,
        logits_processor=LogitsProcessorList([watch]),
        streamer=streamer,
    )
    decode_seconds = time.perf_counter() - watch.decode_start_time
    return Generation(
        new_tokens=_cut_at_eos(output[:, input_ids.shape[1] :].tolist(), config.eos_token_id),
        num_steps=watch.num_steps,
        num_untimed=watch.num_untimed,
        first_token_seconds=watch.first_token_time - start_time,
        decode_seconds=decode_seconds,
        cache_bytes=cache.num_bytes(),
        cache_tokens=int(cache.get_seq_length()) * len(prompts) * decoding.num_beams,
        num_passes=[1] if report is None else report.num_passes,
        residual=None if report is None else report.residual,
    )


def _pad(
    model: PreTrainedModel, prompts: list[list[int]], pad_token_id: int, num_columns: int | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tokens and mask as `pad_left` makes them, on the model's device."""
    largest, known = max(map(max, prompts)), model.config.vocab_size
    if largest >= known:
        raise UserError(f"the tokenizer has a token {largest}, but the model knows {known}: they do not fit")
    input_ids, attention_mask = pad_left(prompts, pad_token_id, num_columns)
    return input_ids.to(model.device), None if attention_mask is None else attention_mask.to(model.device)


def compile_config(device: torch.device) -> CompileConfig:
    """What makes transformers' `generate()` compile its decoding steps, given a static cache.

    On a GPU the compiled step is replayed as a CUDA graph. On a CPU, where transformers compiles only if told to, the
    gain lies in loops that are fused and calls that are saved. The first steps take a minute or so. Afterwards the
    model must stay as it is (its settings and types, not the values of its weights): to look at all of its modules
    before every token, as torch otherwise does, takes a CPU as long as a layer.
    """
    if device.type == "cuda":
        return CompileConfig(fullgraph=True, dynamic=False, mode="reduce-overhead")
    options = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    config = CompileConfig(fullgraph=True, dynamic=False, mode=None, options=options)  # type: ignore[arg-type]
    config._compile_all_devices = True  # type: ignore[assignment]  # declared without a type
    return config


def generation_config(
    model: PreTrainedModel, decoding: DecodingOptions, max_new_tokens: int, compile_step: bool = False
) -> GenerationConfig:
    """What transformers' `generate()` is told of how tokens are chosen, where a text ends, and what fills rows up.

    Some models fill up with a token that they do not know: -1, or one that was added to the tokenizer alone. Any that
    the model knows will do, as nothing attends to it.
    """
    config = decoding.generation_config(max_new_tokens, model.generation_config.eos_token_id)
    token = model.generation_config.pad_token_id
    config.pad_token_id = token if token is not None and 0 <= token < model.config.vocab_size else 0
    if compile_step:
        config.disable_compile, config.compile_config = False, compile_config(model.device)
    return config


def _cut_at_eos(rows: list[list[int]], eos_token_id: int | list[int] | None) -> list[list[int]]:
    """Takes off what follows the first token that ends a text, and keeps that token."""
    ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or ())
    stops = [next((index + 1 for index, token in enumerate(row) if token in ends), len(row)) for row in rows]
    return [row[:stop] for row, stop in zip(rows, stops, strict=True)]
