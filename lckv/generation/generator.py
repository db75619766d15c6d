"""A loaded model at work for `lckv.generate`: from prompts to what is printed."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from lckv.cache import KVCache, PagedKVCache, build_cache
from lckv.config import DEFAULT_MAX_NEW_TOKENS, GenerateConfig
from lckv.config.names import CONTINUOUS
from lckv.engine.continuous import ContinuousBatcher
from lckv.engine.requests import BatchStatistics
from lckv.errors import UserError
from lckv.generation.batch import Generation, generate, generation_config
from lckv.generation.decoding_options import DecodingOptions
from lckv.generation.limits import check_span, prefill_options
from lckv.generation.loops import LONGEST_TAIL, is_looping
from lckv.generation.streaming import Printer, TextPieces, stream_text
from lckv.models import LCKVLlamaForCausalLM
from lckv.utils.console import Bar

logger = logging.getLogger(__name__)


class Answer(NamedTuple):
    """The tokens that follow a prompt, and why there are no more if something went wrong."""

    new_tokens: list[int]
    error: str | None = None


@dataclass(frozen=True)
class Part:
    """Answers to the next prompts, and what has been measured: JSON-able figures, if there are any, and in a line."""

    answers: list[Answer]
    figures: dict[str, Any] | None = None
    summary: str = ""


@dataclass
class TextGenerator:
    """A loaded model, and how to use it; `console` is for what is no text: figures and progress.

    Raises:
        UserError: for settings that mean nothing to this model.
    """

    cfg: GenerateConfig
    decoding: DecodingOptions
    model: LCKVLlamaForCausalLM
    tokenizer: PreTrainedTokenizerBase
    console: Console

    def __post_init__(self) -> None:
        self.prefill = prefill_options(self.cfg, self.model.config)
        given = self.cfg.max_new_tokens
        self.max_new_tokens = DEFAULT_MAX_NEW_TOKENS if given is None else given  # of text that ends

    def answer(self, prompts: list[str], encoded: list[list[int]], *, is_streamed: bool) -> None:
        """Continues the prompts, and prints texts and what they took as soon as they are there.

        Raises:
            UserError: at the end, if some prompts have failed alone.
        """
        is_continuous = self.cfg.chosen_batching() == CONTINUOUS
        parts = self._requests(encoded) if is_continuous else self._batches(encoded, is_streamed=is_streamed)
        texts: list[dict[str, Any]] = []
        figures: list[dict[str, Any]] = []
        loops: list[bool] = []  # the texts that the next figures are of
        for part in parts:
            for answer in part.answers:
                index = len(texts)
                loops.append(self._loops(answer.new_tokens))
                texts.append(self._result(prompts[index], encoded[index], answer))
                if not (self.cfg.json or is_streamed):
                    text = texts[index]["text"]
                    _print(text if self.cfg.prompts_file is None else f"==> {prompts[index]} <==\n{text}\n")
                if answer.error is not None:
                    self.console.print(f"prompt {index + 1}: {answer.error}")
            if part.figures is not None:
                figures.append(part.figures)
                if not self.cfg.json:
                    self.console.print(part.summary + _loop_note(loops), style="dim")
                loops = []
        if self.cfg.json:
            _print(json.dumps(self._about() | {"texts": texts, "batches": figures}, ensure_ascii=False, indent=2))
        if num_failed := sum("error" in text for text in texts):
            raise UserError(f"prompts_file={self.cfg.prompts_file}: {num_failed} of {len(texts)} prompts have failed")

    def stream_endlessly(self, prompt: list[int]) -> None:
        """Prints text until Ctrl-C, or `max_new_tokens` if that is given."""
        cfg, cache = self.cfg, self._build_cache(len(prompt))
        check_span(cache, math.inf if cfg.max_new_tokens is None else len(prompt) + cfg.max_new_tokens)
        pieces = stream_text(
            self.model,
            self.tokenizer,
            torch.tensor([prompt]),
            cache,
            sampling=self.decoding,
            max_new_tokens=cfg.max_new_tokens,
            chunk_size=self.prefill.chunk_size,
            **self.prefill.iteration,
        )
        printer, tail = Printer(self.tokenizer, sys.stdout), deque[str](maxlen=LONGEST_TAIL)
        start_time = time.perf_counter()
        try:
            for piece in pieces:
                printer.write(piece)
                tail.append(piece)
        finally:
            printer.end()
            num_seen, seconds = int(cache.get_seq_length()), time.perf_counter() - start_time
            speed = f"{num_seen / seconds:,.1f} tok/s, the prompt's among them"
            seen = f"{_count_tokens(num_seen)} · {speed} · cache {cache.num_bytes():,} bytes"
            self.console.print(seen + _loop_note([self._loops(list(tail))]), style="dim")

    def _requests(self, encoded: list[list[int]]) -> Iterator[Part]:
        """Continues all prompts in one batch that they join and leave at any step; answers come in their order."""
        batcher = self._build_batcher(encoded)
        waited_for = deque(
            batcher.add_request(prompt, str(number), seed=self._seed_of(number))
            for number, prompt in enumerate(encoded, 1)
        )
        with Bar(self.console, "continuing the prompts", total=len(encoded)) as bar:
            while batcher.has_work():
                batcher.step()
                bar.update(len(batcher.outputs))
                ready = []
                while waited_for and waited_for[0] in batcher.outputs:
                    output = batcher.outputs[waited_for.popleft()]
                    ready.append(Answer(output.generated_tokens, output.error))
                if ready:
                    bar.hide()
                    yield Part(ready)
                    bar.show()
        yield _requests_part(batcher.statistics)

    def _build_batcher(self, encoded: list[list[int]]) -> ContinuousBatcher:
        cfg, longest = self.cfg, _length(encoded)
        self._check_length(longest)
        options: dict[str, Any] = {"max_rows": cfg.batch_size, "tokens_per_step": cfg.prefill_chunk}
        return ContinuousBatcher(
            self.model,
            cast(PagedKVCache, self._build_cache(longest)),
            generation_config=generation_config(self.model, self.decoding, self.max_new_tokens),
            **self.prefill.iteration,
            **{option: value for option, value in options.items() if value is not None},
        )

    def _seed_of(self, number: int) -> int | None:
        """A seed for each prompt, so that its text does not depend on when it gets its turn; or for each batch."""
        return None if self.decoding.seed is None else (self.decoding.seed + number) % 2**64

    def _batches(self, encoded: list[list[int]], *, is_streamed: bool) -> Iterator[Part]:
        """Continues one batch after the other."""
        size = self.cfg.batch_size or len(encoded)
        batches = [encoded[start : start + size] for start in range(0, len(encoded), size)]
        for batch in batches:
            self._check_length(_length(batch))
        if self.cfg.compile:
            generations = self._compiled_batches(batches, is_streamed=is_streamed)
        else:
            generations = (
                self._generate(batch, self._cache_for(batch), _length(batch), index, is_streamed=is_streamed)
                for index, batch in enumerate(batches)
            )
        yield from map(_batch_part, generations)

    def _compiled_batches(self, batches: list[list[list[int]]], *, is_streamed: bool) -> Iterator[Generation]:
        """Continues batches that share what is compiled for the first.

        It fits one cache: all batches get it, the longest of them decides on its length, and the last is filled up
        with copies of its last prompt, which nobody gets to see. And it fits calls with an attention mask, or without
        one, as transformers leaves it where nothing is padding: if one batch has padding, all get some.
        """
        num_rows, has_padding = len(batches[0]), any(map(_is_ragged, batches))
        widths = [_length(batch) + (has_padding and not _is_ragged(batch)) for batch in batches]
        cache = self._build_cache(max(widths))
        for index, (batch, width) in enumerate(zip(batches, widths, strict=True)):
            if self.decoding.num_beams > 1:
                cache = self._build_cache(max(widths))  # the last one has a row for every beam
            cache.reset()
            filled = batch + [batch[-1]] * (num_rows - len(batch))
            generation = self._generate(filled, cache, width, index, is_streamed=is_streamed)
            yield replace(generation, new_tokens=generation.new_tokens[: len(batch)])

    def _generate(
        self, batch: list[list[int]], cache: KVCache, width: int, index: int, *, is_streamed: bool
    ) -> Generation:
        cfg = self.cfg
        printer = Printer(self.tokenizer, sys.stdout) if is_streamed else None
        try:
            with self._prefill_progress(width - 1) as on_chunk:
                return generate(
                    self.model,
                    batch,
                    cache,
                    replace(self.decoding, seed=self._seed_of(index)),
                    self.max_new_tokens,
                    num_columns=width,
                    prefill_options=self.prefill,
                    compile_step=cfg.compile,
                    streamer=printer,
                    on_chunk=on_chunk,
                )
        except BaseException:  # Ctrl-C among them: the text so far stays, on a line of its own
            if printer is not None:
                printer.end()
            raise

    def _cache_for(self, batch: list[list[int]]) -> KVCache:
        """An empty cache for a batch, with a warning if it may turn out too small in the midst of the text."""
        cache, length = self._build_cache(_length(batch)), _length(batch) + self.max_new_tokens
        check_span(cache, length)
        num_rows = len(batch) * self.decoding.num_beams
        if isinstance(cache, PagedKVCache) and (fits := cache.max_sequences(length)) is not None and fits < num_rows:
            logger.warning(
                "cache.num_pages=%d: holds %d texts of %d tokens, and %d may become as long; give more pages",
                *(cache.num_pages, fits, length, num_rows),
            )
        return cache

    def _build_cache(self, prompt_length: int) -> KVCache:
        """An empty cache, as long as is needed if it has a length.

        Raises:
            UserError: if its length is given and too short.
        """
        options, needed = self.cfg.cache.options(), prompt_length + self.max_new_tokens
        if self.cfg.cache.name == "static" and options.setdefault("max_length", needed) < needed:
            raise UserError(
                f"cache.max_length={options['max_length']}: the prompt has {prompt_length} tokens and "
                f"max_new_tokens={self.max_new_tokens} follow; allowed is {needed} or more, or leave it out"
            )
        return build_cache(self.cfg.cache.name, self.model.config, **options)

    def _check_length(self, prompt_length: int) -> None:
        """Warns of positions that the model was not made for, and refuses those that it has not."""
        limit, length = self.model.config.max_position_embeddings, prompt_length + self.max_new_tokens
        if length > limit and self.model.config.learned_positions:
            raise UserError(
                f"max_new_tokens={self.max_new_tokens}: with the {prompt_length} tokens of the prompt, that is more "
                f"than the {limit} positions that the model has learned"
            )
        if length > limit and self.cfg.cache.name != "sink":
            logger.warning(
                "the prompt has %d tokens and max_new_tokens=%d follow, but the model was made for %d: "
                "text beyond them is likely to be bad",
                prompt_length,
                self.max_new_tokens,
                limit,
            )

    @contextmanager
    def _prefill_progress(self, num_tokens: int) -> Iterator[Callable[[int], Any] | None]:
        """A bar for a prompt that comes in several chunks, gone as soon as it is through."""
        chunk = self.cfg.prefill_chunk
        if chunk is None or chunk >= num_tokens or not self.console.is_terminal:
            yield None
            return
        with Bar(self.console, "reading the prompt", "tokens", num_tokens) as bar:
            yield bar.advance

    def _loops(self, text: Sequence[Hashable]) -> bool:
        """Whether a text goes round in circles because the likeliest token is taken every time."""
        return not self.decoding.samples and is_looping(text)

    def _result(self, prompt: str, encoded: list[int], answer: Answer) -> dict[str, Any]:
        """What came of one prompt, as JSON-able data."""
        text = TextPieces(self.tokenizer, prompt=encoded).all_of(answer.new_tokens)
        counts = {"num_prompt_tokens": len(encoded), "num_new_tokens": len(answer.new_tokens)}
        error = {} if answer.error is None else {"error": answer.error}
        return {"prompt": prompt, "text": text, **counts, **error}

    def _about(self) -> dict[str, Any]:
        """Where the texts come from, as JSON-able data."""
        return {
            "model": self.cfg.model,
            "layer_types": self.model.config.sharing_plan.layer_types,
            "cache": {"name": self.cfg.cache.name, **self.cfg.cache.options()},
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.model.device),
            "batching": self.cfg.chosen_batching(),
        }


def _batch_part(generation: Generation) -> Part:
    """What came of a batch."""
    num_new_tokens, speed = sum(map(len, generation.new_tokens)), generation.tokens_per_second
    per_token = generation.cache_bytes / generation.cache_tokens
    figures = asdict(generation)
    del figures["new_tokens"]
    figures |= {"num_new_tokens": num_new_tokens, "tokens_per_second": speed, "cache_bytes_per_token": per_token}
    parts = [_count_tokens(num_new_tokens)]
    if speed is not None:
        parts.append(f"{speed:,.1f} tok/s")
    parts.append(f"first after {generation.first_token_seconds:.2f} s")
    parts.append(f"cache {generation.cache_bytes:,} bytes, {per_token:,.0f} per token")
    if max(generation.num_passes) > 1:
        parts.append(f"{max(generation.num_passes)} passes over the prompt")
    if generation.residual is not None:
        parts.append(f"KV residual {generation.residual:.1e}")
    return Part(list(map(Answer, generation.new_tokens)), figures, " · ".join(parts))


def _requests_part(statistics: BatchStatistics) -> Part:
    """What all requests together took, behind the last of their answers."""
    figures = asdict(statistics)
    figures["num_new_tokens"] = figures.pop("num_generated_tokens")
    figures["tokens_per_second"] = statistics.tokens_per_second
    parts = [
        _count_tokens(statistics.num_generated_tokens),
        f"{statistics.tokens_per_second:,.1f} tok/s",
        f"{statistics.num_steps:,} steps of up to {statistics.peak_rows:,} texts",
        f"cache up to {statistics.peak_used_bytes:,} bytes",
    ]
    if statistics.num_reused_tokens:
        parts.append(f"{statistics.num_reused_tokens:,} prompt tokens shared")
    if statistics.num_preemptions:
        parts.append(f"{statistics.num_preemptions:,} begun again for want of pages")
    return Part([], figures, " · ".join(parts))


def _loop_note(loops: Sequence[bool]) -> str:
    """What a closing line says of texts that repeat themselves, and what helps."""
    if not (num_looping := sum(loops)):
        return ""
    which = "the text repeats itself" if len(loops) == 1 else f"{num_looping} of {len(loops)} texts repeat themselves"
    return f" · {which}: try temperature=0.8"


def _count_tokens(count: int) -> str:
    """Such as "1 token" or "1,234 tokens"."""
    return f"{count:,} token{'' if count == 1 else 's'}"


def _length(batch: list[list[int]]) -> int:
    """Of a batch's longest prompt."""
    return max(map(len, batch))


def _is_ragged(batch: list[list[int]]) -> bool:
    """Whether its prompts have different lengths, so that some are padded."""
    return len(set(map(len, batch))) > 1


def _print(text: str) -> None:
    """Writes a result, and nothing else, to standard output."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
