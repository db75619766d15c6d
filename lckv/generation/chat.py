"""A conversation with a model, whose cache stays from turn to turn: only what is new goes through the model.

Every turn the whole conversation is rendered and encoded anew, and compared with the tokens that the cache holds. What
both begin with is kept; the rest is taken back, and what follows is read. So an answer is what the model would say to
the same conversation from scratch, whatever the template makes of earlier turns: it may strip them, leave out what the
model thought, or the same text may be other tokens than those that the model chose.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from os.path import commonprefix
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lckv.cache import KVCache, build_cache
from lckv.cache.paged.pages import OutOfPagesError
from lckv.data.chat_templates import Message, end_of_answer, render_chat
from lckv.data.readers import join_line_ends
from lckv.data.sources import SURROGATES
from lckv.errors import UserError
from lckv.generation.decoding_options import Sampling
from lckv.generation.prefill import PrefillOptions
from lckv.generation.streaming import TextPieces, interrupts_wait, read_tokens, stream
from lckv.models import LCKVLlamaForCausalLM

STOPPED, CUT, FULL, INTERRUPTED, FAILED = "stopped", "cut", "full", "interrupted", "failed"
"""How an answer may end: by the model, at `max_new_tokens`, at the end of the context, by Ctrl-C, or by an error."""

_FULL = "the context is full"

Reading = Callable[[int], AbstractContextManager[Any]]


class ContextFull(UserError):
    """A conversation has become longer than the model or its cache can hold. It is as it was before the message."""


@dataclass
class Turn:
    """An answer, and what it took.

    Attributes:
        text: the answer; a half one if it was interrupted.
        ending: one of those above.
        num_kept: tokens of the conversation that were in the cache already.
        num_dropped: tokens in the cache that were not of the conversation as it is rendered now.
        is_refilled: whether tokens could not be taken back, so that others were read once more.
        num_read: tokens that went through the model before the answer.
        num_new_tokens: of the answer.
        first_token_seconds: from the message until the first of them was known.
        decode_seconds: what the others took.
    """

    text: str = ""
    ending: str = FAILED
    num_kept: int = 0
    num_dropped: int = 0
    is_refilled: bool = False
    num_read: int = 0
    num_new_tokens: int = 0
    first_token_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """Of decoding; the first token belongs to what was read."""
        return (self.num_new_tokens - 1) / self.decode_seconds if self.num_new_tokens > 1 else None


@dataclass(frozen=True)
class _Snapshot:
    """A cache as it was when it held these tokens."""

    cache: KVCache
    tokens: list[int]


class ChatSession:
    """Messages, and the cache that holds what the model has seen of them.

    Args:
        model: the model, in evaluation mode.
        tokenizer: with a chat template.
        sampling: how tokens are chosen. With a seed, every turn has one of its own that follows from it.
        cache: the cache's name.
        cache_options: those of `build_cache`; without `max_length`, a static cache has room for all positions.
        max_new_tokens: where to cut an answer.
        prefill: how what is new goes through the model.
        system: the system message.

    Attributes:
        messages: the conversation, with the system message first if there is one.
        last: the last turn.

    Raises:
        UserError: for a cache that the model does not allow, and a template that has no system message.
    """

    def __init__(
        self,
        model: LCKVLlamaForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        *,
        cache: str = "dynamic",
        cache_options: dict[str, Any] | None = None,
        max_new_tokens: int = 1024,
        prefill: PrefillOptions | None = None,
        system: str | None = None,
    ) -> None:
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.max_new_tokens, self.prefill = max_new_tokens, prefill or PrefillOptions()
        self.cache_name, self.cache_options = cache, dict(cache_options or {})
        self.limit: int | None = model.config.max_position_embeddings
        if cache == "static":
            self.limit = min(self.limit, self.cache_options.setdefault("max_length", self.limit))
        elif cache == "sink":
            self.limit = None
        self._end = end_of_answer(tokenizer)
        self.messages: list[Message] = []
        self.last: Turn | None = None
        self.cache: KVCache
        self._tokens: list[int]  # the first of them are in the cache
        self._snapshot: _Snapshot | None
        self._empty_cache()
        if system is not None:
            self.set_system(system)

    @property
    def system(self) -> str | None:
        """The system message."""
        return self.messages[0]["content"] if self.messages and self.messages[0]["role"] == "system" else None

    @property
    def num_turns(self) -> int:
        """Questions that have been answered."""
        return sum(message["role"] == "assistant" for message in self.messages)

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values, those that are kept to go back to included."""
        return self.cache.num_bytes() + (0 if self._snapshot is None else self._snapshot.cache.num_bytes())

    @property
    def held_tokens(self) -> list[int]:
        """What the cache has seen."""
        return self._tokens[: int(self.cache.get_seq_length())]

    def reset(self) -> None:
        """Forgets the conversation, but for the system message."""
        self.messages = [message for message in self.messages if message["role"] == "system"]
        self._empty_cache()

    def set_system(self, text: str | None) -> None:
        """Gives the conversation another system message, or none.

        Raises:
            UserError: if the template takes none; nothing has changed then.
        """
        others = self.messages if self.system is None else self.messages[1:]
        self.set_messages([*([] if text is None else [_message("system", text)]), *others])

    def set_messages(self, messages: list[Message]) -> None:
        """Goes on with another conversation; what it has in common with this one stays in the cache.

        Raises:
            UserError: if the template cannot render it; nothing has changed then.
        """
        messages = [_message(**message) for message in messages]
        render_chat(self.tokenizer, [*messages, _message("user", "?")], add_generation_prompt=True)
        self.messages = messages

    def answer(self, text: str, write: Callable[[str], None], reading: Reading = lambda _: nullcontext()) -> Turn:
        """Has the model answer a message.

        Ctrl-C ends the answer. What there is of it stays in the conversation; the message itself is taken back where
        that is nothing.

        Args:
            text: of the message.
            write: gets pieces of the answer as they come.
            reading: of a number of tokens: a context in which they go through the model, before the answer begins.

        Raises:
            ContextFull: if there is no room for an answer.
            UserError: if the template refuses the message, or the model's logits are not finite.
        """
        turn, start_time = Turn(), time.perf_counter()
        self.messages.append(_message("user", text))
        try:
            self._say(turn, start_time, write, reading)
        except KeyboardInterrupt:
            turn.ending = INTERRUPTED
        except OutOfPagesError as error:  # nothing of the step has been written
            turn.ending = FULL
            if not turn.text:
                pages = f"cache.num_pages={self.cache_options['num_pages']}"
                raise ContextFull(f"{_FULL}: {pages} have no room for this message") from error
        except ContextFull:
            raise
        except BaseException:
            self._empty_cache()  # some layers may have seen more than others
            raise
        finally:
            with interrupts_wait():
                self._settle(turn, start_time)
        return turn

    def _say(self, turn: Turn, start_time: float, write: Callable[[str], None], reading: Reading) -> None:
        prompt = self._encode()
        room = self._room(len(prompt))
        with interrupts_wait():
            self._rewind(prompt, turn)
        new = torch.tensor([prompt[turn.num_kept :]], device=self.model.device)
        if new.shape[1] > 1:  # the last token goes with those of the answer, as in `generate`
            with reading(new.shape[1]):
                read_tokens(self.model, new[:, :-1], self.cache, self.prefill.chunk_size, self.prefill.iteration)
        with interrupts_wait():
            if any(layer.is_sliding for layer in self.cache.owners().values()):
                self._snapshot = _Snapshot(self.cache.fork(), prompt[:-1])
        turn.num_read = new.shape[1]
        most = min(self.max_new_tokens, room)
        tokens = self._record(self._stream(new[:, -1:], prompt[:-1], most), turn, start_time)
        text = TextPieces(self.tokenizer, prompt=prompt)
        for piece in filter(None, _until(_pieces(tokens, text), self._end.text)):
            turn.text += piece
            write(piece)
        turn.ending = STOPPED if turn.num_new_tokens < most else CUT if most == self.max_new_tokens else FULL

    def _stream(self, last: torch.Tensor, past_ids: list[int], most: int) -> Iterator[int]:
        """The tokens of an answer, without the one that ends it."""
        sampling, eos = self.sampling, self.model.generation_config.eos_token_id
        ends = {self._end.token, *([eos] if isinstance(eos, int) else eos or ())} - {None}
        if sampling.seed is not None:
            sampling = replace(sampling, seed=(sampling.seed + self.num_turns) % 2**64)
        return stream(
            self.model,
            last,
            self.cache,
            sampling=sampling,
            history=self.model.config.max_position_embeddings,
            past_ids=past_ids,
            max_new_tokens=most,
            stop_ids=ends,
            **self.prefill.iteration,
        )

    def _record(self, tokens: Iterable[int], turn: Turn, start_time: float) -> Iterator[int]:
        for token in tokens:
            self._tokens.append(token)  # before it goes into the cache
            turn.num_new_tokens += 1
            if turn.num_new_tokens == 1:
                turn.first_token_seconds = time.perf_counter() - start_time
            yield token

    def _settle(self, turn: Turn, start_time: float) -> None:
        """Ends a turn, however it came to its end."""
        if turn.ending in (STOPPED, CUT) or (turn.ending in (FULL, INTERRUPTED) and turn.text):
            turn.decode_seconds = time.perf_counter() - start_time - turn.first_token_seconds
            self.messages.append(_message("assistant", turn.text))
            self.last = turn
        else:
            self.messages.pop()

    def _encode(self) -> list[int]:
        """The conversation with the beginning of an answer, as tokens."""
        text = join_line_ends(render_chat(self.tokenizer, self.messages, add_generation_prompt=True))
        token_ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not token_ids:
            raise UserError("the chat template makes no token of this conversation")
        if (largest := max(token_ids)) >= (known := self.model.config.vocab_size):
            raise UserError(f"the tokenizer has a token {largest}, but the model knows {known}: they do not fit")
        return token_ids

    def _room(self, num_tokens: int) -> int:
        """How many tokens an answer may have behind so many."""
        if self.limit is None:
            return self.max_new_tokens
        if num_tokens >= self.limit:
            raise ContextFull(f"{_FULL}: {num_tokens:,} tokens with this message, of {self.limit:,}")
        return self.limit - num_tokens

    def _rewind(self, prompt: list[int], turn: Turn) -> None:
        """Has the cache hold nothing but a beginning of the prompt, the longest that can be had, without all of it."""
        held = self.held_tokens
        num_kept = min(len(commonprefix([held, prompt])), len(prompt) - 1)
        turn.num_dropped = len(held) - num_kept
        try:
            self.cache.crop(num_kept - len(held))
        except RuntimeError:  # a window has dropped what it would need again
            turn.is_refilled = True
            num_kept = self._go_back(prompt)
        turn.num_kept, self._tokens = num_kept, list(prompt)

    def _go_back(self, prompt: list[int]) -> int:
        """To the cache as it was before the last answer, or to an empty one; returns what that holds of the prompt."""
        snapshot, num_held = self._snapshot, 0 if self._snapshot is None else len(self._snapshot.tokens)
        self._empty_cache()
        if snapshot is None or snapshot.tokens != prompt[:num_held] or num_held == len(prompt):
            return 0
        self.cache = snapshot.cache
        return num_held

    def _empty_cache(self) -> None:
        self.cache = build_cache(self.cache_name, self.model.config, **self.cache_options)
        self._tokens = []
        self._snapshot = None


def _message(role: str, content: str) -> Message:
    # What is pasted, or stands in JSON, may hold half a surrogate pair, which no tokenizer can represent.
    return {"role": role, "content": SURROGATES.sub("\ufffd", content)}


def _pieces(tokens: Iterable[int], text: TextPieces) -> Iterator[str]:
    yield from map(text.push, tokens)
    yield text.flush()


def _until(pieces: Iterable[str], end: str) -> Iterator[str]:
    """The text before `end`, or all of it; what may be the beginning of `end` is kept back until more is known."""
    held = ""
    for piece in pieces:
        held += piece
        if end and end in held:
            yield held.partition(end)[0]
            return
        num_open = next((num for num in range(len(end) - 1, 0, -1) if held.endswith(end[:num])), 0)
        yield held[: len(held) - num_open]
        held = held[len(held) - num_open :]
    yield held
