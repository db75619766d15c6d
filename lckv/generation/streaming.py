"""Text without end: token after token from a cache that does not grow, and scores of given text the same way.

Nothing here remembers more than the cache does: the model sees one token at a time, without masks or positions, text
leaves in pieces, and what the repetition penalty looks back on is bounded.
"""

from __future__ import annotations

import signal
import threading
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, TextIO

import torch
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from lckv.cache import KVCache
from lckv.data.readers import join_line_ends
from lckv.errors import UserError, check_whole_number
from lckv.generation.decoding_options import Sampling
from lckv.generation.prefill import num_at_once
from lckv.sharing.iteration import EXACT
from lckv.utils.logits import check_logits, choose_token


def _processors(sampling: Sampling) -> LogitsProcessorList:
    """Those of transformers, in the order in which `generate` applies them."""
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    if sampling.temperature is not None:
        processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k is not None:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None and sampling.top_p < 1:
        processors.append(TopPLogitsWarper(float(sampling.top_p)))
    return processors


class TextPieces:
    """Turns tokens into text as they come, looking at few of them at a time.

    A character of several tokens comes out when it is whole. Each token is decoded behind the last piece of text, as
    tokenizers treat the first word of a text in their own way: Llama 2's drops the space before it. That piece is
    whole: behind half a character, some tokenizers take whole ones for broken too.

    Args:
        tokenizer: of the model.
        skip_special_tokens: leaves tokens such as the end of a document out of the text.
        prompt: the tokens that the text continues.
    """

    num_context, max_pending = 8, 16

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, skip_special_tokens: bool = True, prompt: Sequence[int] = ()
    ) -> None:
        self.tokenizer, self.skip_special_tokens = tokenizer, skip_special_tokens
        ends = (list(prompt[-length:]) for length in range(1, self.num_context + 1))
        self._context: list[int] = next((end for end in ends if _is_whole(self._decode(end))), [])
        self._pending: list[int] = []

    def each(self, token_ids: Iterable[int]) -> Iterator[str]:
        """The pieces of text, none of them empty, as their tokens come."""
        yield from filter(None, map(self.push, token_ids))
        yield from filter(None, [self.flush()])

    def all_of(self, token_ids: Iterable[int]) -> str:
        """The text of tokens that are all there."""
        return "".join(self.each(token_ids))

    def push(self, token_id: int) -> str:
        """The text that is whole with this token; empty if a character is not."""
        self._pending.append(token_id)
        text = self._decode(self._context + self._pending)
        if text.endswith("\ufffd") and len(self._pending) < self.max_pending:
            return ""
        return self._take(text)

    def flush(self) -> str:
        """What is left at the end."""
        return self._take(self._decode(self._context + self._pending)) if self._pending else ""

    def _take(self, text: str) -> str:
        piece = text[len(self._decode(self._context)) :]
        if _is_whole(piece):
            self._context = self._pending
        elif not text:  # a first space, which the next word shows
            self._context = (self._context + self._pending)[-self.num_context :]
        self._pending = []
        return piece

    def _decode(self, token_ids: list[int]) -> str:
        text = self.tokenizer.decode(
            token_ids, skip_special_tokens=self.skip_special_tokens, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text


def _is_whole(text: str) -> bool:
    return text != "" and "\ufffd" not in text


class Printer(BaseStreamer):
    """Writes a text to a file while it is generated, and ends it with the end of a line."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, file: TextIO) -> None:
        self._tokenizer, self._file = tokenizer, file
        self._pieces: TextPieces | None = None
        self._last = ""

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt of `generate`, `(1, prompt_len)`, which is not printed, then token after token, `(1,)`."""
        token_ids = value.flatten().tolist()
        if self._pieces is None:
            self._pieces = TextPieces(self._tokenizer, prompt=token_ids)
            return
        for token in token_ids:
            self.write(self._pieces.push(token))

    def write(self, text: str) -> None:
        """Prints a piece of the text at once."""
        if text:
            self._last = text
            self._file.write(text)
            self._file.flush()

    def end(self) -> None:
        """Prints what was kept back, and ends the line; also where generation was interrupted."""
        if self._pieces is not None:
            self.write(self._pieces.flush())
        if self._last and not self._last.endswith("\n"):
            self.write("\n")


def stream(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    past_key_values: Cache,
    *,
    sampling: Sampling | None = None,
    history: int = 256,
    past_ids: Sequence[int] = (),
    max_new_tokens: int | None = None,
    stop_ids: Collection[int] = (),
    chunk_size: int | None = None,
    **options: Any,
) -> Iterator[int]:
    """Continues a text for as long as anybody asks for more.

    Ctrl-C takes effect between two tokens, so that every layer of the cache has seen the same of them.

    Args:
        model: the model, in evaluation mode.
        input_ids: `(1, q_len)` or `(q_len,)`, the tokens that are not in the cache yet.
        past_key_values: the cache, empty or not.
        sampling: how tokens are chosen; by default from the model's plain probabilities.
        history: how many of the last tokens the repetition penalty looks back on.
        past_ids: of the tokens before, which it looks back on, too.
        max_new_tokens: where to stop at the latest; None: nowhere, which takes a cache that does not grow.
        stop_ids: tokens that end the text, and are not returned.
        chunk_size: how many tokens of the prompt to run at once; None: as many as the cache takes.
        options: for the model, such as `forward_passes`; by default prompts are read as decoding would.

    Returns:
        The new tokens, one at a time.

    Raises:
        UserError: for an empty prompt, a history below 1, a cache that would grow for ever, and, where the next token
            is asked for, logits that are not finite.
    """
    input_ids = input_ids.reshape(1, -1) if input_ids.ndim == 1 else input_ids
    if input_ids.shape[0] != 1:
        raise ValueError(f"{input_ids.shape[0]} texts at once: allowed is one")
    if input_ids.shape[1] == 0:
        raise UserError("the prompt is empty: give at least one token")
    if max_new_tokens is None:
        check_bounded(past_key_values)
    check_whole_number("history", history)
    sampling = sampling or Sampling(greedy=False)
    samples, processors, generator = sampling.samples, _processors(sampling), None
    if sampling.seed is not None:
        generator = torch.Generator(model.device).manual_seed(sampling.seed)
    recent = deque([*past_ids, *input_ids[0].tolist()], maxlen=history)
    steps = count() if max_new_tokens is None else range(max_new_tokens)

    def tokens(input_ids: torch.Tensor) -> Iterator[int]:  # apart from the checks, which a generator would put off
        for _ in steps:
            logits = read_tokens(model, input_ids, past_key_values, chunk_size, EXACT | options)
            check_logits(logits, "the model's logits")
            token = choose_token(logits, processors, recent, samples=samples, generator=generator)
            recent.append(token)
            if token in stop_ids:
                return
            yield token
            input_ids = input_ids.new_tensor([[token]])

    return tokens(input_ids.to(model.device))


def stream_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | torch.Tensor,
    past_key_values: Cache,
    *,
    skip_special_tokens: bool = True,
    **options: Any,
) -> Iterator[str]:
    """Like `stream`, whose options it takes, from text or tokens to pieces of text, none of them empty.

    `skip_special_tokens` leaves tokens such as the end of a document out of the text.
    """
    if isinstance(prompt, str):
        token_ids = tokenizer(join_line_ends(prompt))["input_ids"]
        prompt = torch.tensor([token_ids], dtype=torch.long)
    text = TextPieces(tokenizer, skip_special_tokens, prompt[0].tolist())
    return text.each(stream(model, prompt, past_key_values, **options))


def score_stream(
    model: PreTrainedModel, token_ids: torch.Tensor | Iterable[Any], past_key_values: Cache
) -> Iterator[torch.Tensor]:
    """Reads given text token by token and says how much each surprised the model.

    Args:
        model: the model, in evaluation mode.
        token_ids: `(seq_len,)`, `(batch, seq_len)`, or one after the other, numbers or `(batch,)`, without an end.
        past_key_values: the cache, empty or not.

    Returns:
        The negative log-likelihood of each token but the first, `(batch,)` in float32, one token at a time.
    """
    steps = token_ids.unbind(dim=-1) if isinstance(token_ids, torch.Tensor) else token_ids
    logits = None
    for step in steps:
        tokens = torch.as_tensor(step, device=model.device).reshape(-1, 1)  # (batch, 1)
        if logits is not None:
            yield torch.nn.functional.cross_entropy(logits.float(), tokens[:, 0], reduction="none")
        logits = _step(model, tokens, past_key_values)


def check_bounded(cache: Cache) -> None:
    """Refuses a cache that grows with the text.

    Raises:
        UserError: naming it.
    """
    if not isinstance(cache, KVCache) or not all(layer.is_sliding for layer in cache.owners().values()):
        name = getattr(cache, "name", type(cache).__name__)
        raise UserError(f"endless text with cache={name}: it ends or grows with the text; allowed is cache=sink")


def read_tokens(
    model: PreTrainedModel, input_ids: torch.Tensor, cache: Cache, chunk_size: int | None, options: dict[str, Any]
) -> torch.Tensor:
    """Runs tokens that are not in the cache yet, in the largest pieces that it takes.

    Ctrl-C takes effect between two pieces, so that every layer of the cache has seen the same tokens.

    Args:
        model: the model, in evaluation mode.
        input_ids: `(1, q_len)`.
        cache: the cache, empty or not.
        chunk_size: how many tokens to run at once; None: as many as the cache takes.
        options: for the model, such as `forward_passes`.

    Returns:
        The logits `(1, vocab_size)` behind the tokens.
    """
    while True:
        num_tokens = num_at_once(cache, input_ids.shape[1])
        num_tokens = min(num_tokens, chunk_size or num_tokens)
        piece, input_ids = input_ids[:, :num_tokens], input_ids[:, num_tokens:]
        logits = _step(model, piece, cache, **options)
        if not input_ids.shape[1]:
            return logits


@torch.inference_mode()
def _step(model: PreTrainedModel, token_ids: torch.Tensor, cache: Cache, **options: Any) -> torch.Tensor:
    """Runs tokens `(batch, q_len)`; returns the last one's logits `(batch, vocab_size)`."""
    with interrupts_wait():
        outputs = model(token_ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **options)
    return outputs.logits[:, -1]


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """Puts Ctrl-C off to the end of the block, so that no layer of a cache is ahead of another."""
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or previous is None:
        yield
        return
    received: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if received:
            signal.raise_signal(signal.SIGINT)
