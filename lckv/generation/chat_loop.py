"""What people type in a chat, and what they see: answers on standard output, everything else on standard error."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console

from lckv.cache import PagedKVCache, SinkKVCache
from lckv.errors import UserError, is_out_of_memory, near_miss
from lckv.generation.chat import CUT, FULL, INTERRUPTED, ChatSession, ContextFull, Turn
from lckv.generation.chat_files import load_conversation, save_conversation
from lckv.generation.loops import is_looping

PROMPT = "> "
LONG_TEXT = 256
WAY_OUT = "/reset begins anew; to go on without end: /save FILE, start again with cache=sink, /load FILE"


@dataclass
class ChatLoop:
    """A session, and where its notes go.

    Attributes:
        session: the conversation.
        notes: for what is no answer.
        is_interactive: whether somebody types: a mistake is then noted, and else ends the chat.
        saved: files that this chat has written, and may write again.
    """

    session: ChatSession
    notes: Console
    is_interactive: bool
    saved: set[Path] = field(default_factory=set)

    def run(self, messages: Iterator[str]) -> None:
        """Answers messages and obeys commands until there are no more.

        Raises:
            UserError: for a mistake, unless somebody types.
        """
        for text in messages:
            try:
                if text.startswith("/"):
                    if self._obey(text) is EXIT:
                        return
                elif text.strip():
                    self._answer(text.strip())
            except UserError as error:
                if not self.is_interactive:
                    raise
                self._note(str(error), "red")
            except KeyboardInterrupt:  # at a moment when there was no answer to stop
                if not self.is_interactive:
                    raise

    def _answer(self, text: str) -> None:
        is_shown = self.is_interactive and sys.stdout.isatty()
        printer = _Writer(self.notes.width if is_shown else None)
        try:
            turn = self.session.answer(text, printer.write, self._reading)
        except ContextFull as error:
            raise UserError(f"{error}; {self._way_out()}") from error
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError("out of memory: /reset, or start again with prefill_chunk=256 or cache=sink") from error
        finally:
            printer.end()
        if turn.ending == INTERRUPTED and not self.is_interactive:
            raise KeyboardInterrupt
        for note in self._notes_on(turn):
            self._note(note)
        if self.is_interactive:
            self._note("")

    def _reading(self, num_tokens: int) -> AbstractContextManager[Any]:
        """Shows that a long text is read."""
        is_shown = self.is_interactive and num_tokens > LONG_TEXT
        return self.notes.status(f"reading {num_tokens:,} tokens") if is_shown else nullcontext()

    def _notes_on(self, turn: Turn) -> Iterator[str]:
        if turn.ending == INTERRUPTED:
            yield "(stopped)" if turn.text else "(stopped before the answer began: the message is taken back)"
        elif turn.ending == CUT:
            yield f"(cut at max_new_tokens={self.session.max_new_tokens})"
        elif turn.ending == FULL:
            yield f"(the context is full: {self._way_out()})"
        elif not turn.text:
            yield "(an empty answer)"
        if not self.session.sampling.samples and is_looping(self.session.held_tokens):
            yield "(the answer repeats itself: try temperature=0.8)"

    def _way_out(self) -> str:
        limit = self.session.model.config.max_position_embeddings
        window = "" if limit >= 1024 else f" cache.window={max(1, limit - 4)}"
        return WAY_OUT.replace("cache=sink", f"cache=sink{window}")

    def _note(self, text: str, style: str = "dim") -> None:
        self.notes.print(text, style=style, soft_wrap=not self.is_interactive)

    def _obey(self, text: str) -> object:
        name, _, argument = text.partition(" ")
        name, _, below = name.partition("\n")
        if name not in COMMANDS:
            hint = near_miss(name, COMMANDS) or f"; allowed are {', '.join(COMMANDS)}"
            raise UserError(f"unknown command {name}{hint} (a space in front makes it a message)")
        command = COMMANDS[name]
        argument = "\n".join(filter(None, (below, argument))).strip()
        if argument and not command.argument:
            raise UserError(f"{name} {argument}: has nothing behind its name; write {name}")
        if command.argument and not argument and not command.argument.startswith("["):
            raise UserError(f"{name}: needs something behind its name; write {name} {command.argument}")
        return command.obey(self, argument)

    def _help(self, _: str) -> None:
        """Says which commands there are."""
        for name, command in COMMANDS.items():
            self._note(f"{f'{name} {command.argument}':<15} {command.what}")
        if self.is_interactive:
            self._note("Alt-Enter begins a new line, Ctrl-C stops an answer, Ctrl-D ends the chat.")

    def _reset(self, _: str) -> None:
        self.session.reset()
        kept = "" if self.session.system is None else "; the system message stays"
        self._note(f"(a new conversation{kept})")

    def _system(self, text: str) -> None:
        if text:
            self.session.set_system(None if text == "off" else text)
        given = self.session.system
        self._note("(no system message)" if given is None else f"(system message: {given})")

    def _save(self, name: str) -> None:
        path = _path(name)
        if not self.session.num_turns:
            raise UserError(f"/save {name}: there is no answer to save yet")
        is_again = path.resolve() in self.saved
        try:
            save_conversation(path, self.session.messages, replaces=is_again)
        except UserError as error:
            raise UserError(f"/save {error}") from error
        except OSError as error:
            raise UserError(f"/save {name}: {error.strerror}") from error
        self.saved.add(path.resolve())
        again = ", in place of what this chat saved there" if is_again else ""
        self._note(f"(saved {_count(len(self.session.messages), 'message')} to {path}{again})")

    def _load(self, argument: str) -> None:
        name, number = argument, None
        before, _, last = argument.rpartition(" ")
        if before and last.isdecimal() and not _path(argument).exists():
            name, number = before, int(last)
        try:
            self.session.set_messages(load_conversation(_path(name), number))
        except UserError as error:
            raise UserError(f"/load {error}") from error
        self._note(f"(loaded {_count(len(self.session.messages), 'message')} from {name})")

    def _cache(self, _: str) -> None:
        """Says which cache there is, and what it holds."""
        session, cache = self.session, self.session.cache
        options = "".join(f" cache.{name}={value}" for name, value in cache.options().items() if value)
        self._note(f"cache={session.cache_name}{options}")
        num_seen, num_bytes, num_layers = len(session.held_tokens), session.num_bytes, len(cache.layout.sources)
        per_token = f", {num_bytes / num_seen:,.0f} per token" if num_seen else ""
        self._note(f"{_count(num_seen, 'token')} · {num_bytes:,} bytes{per_token}")
        pattern = "" if len(cache.owners()) == num_layers else f": {cache.plan.layer_types}"
        self._note(f"{len(cache.owners())} of {_count(num_layers, 'layer')} keep something{pattern}")
        if isinstance(cache, PagedKVCache):
            self._note(f"{_count(cache.num_used_pages(), 'page')} in use, {cache.num_used_bytes():,} bytes")
        if isinstance(cache, SinkKVCache) and num_seen > cache.num_sinks + cache.window:
            self._note(f"the first {cache.num_sinks} and the last {cache.window:,} of these tokens are kept")

    def _stats(self, _: str) -> None:
        """Says what the last answer took."""
        session, turn = self.session, self.session.last
        if turn is None:
            self._note("(no answer yet)")
        else:
            speed = turn.tokens_per_second
            parts = [_count(turn.num_new_tokens, "token"), *([] if speed is None else [f"{speed:,.1f} tok/s"])]
            self._note(
                " · ".join(["answer: " + parts[0], *parts[1:], f"first after {turn.first_token_seconds:.2f} s"])
            )
            read = [f"{turn.num_read:,} read", f"{turn.num_kept:,} kept from earlier turns"]
            if turn.is_refilled:
                read.append(f"{turn.num_dropped:,} rendered otherwise, which this cache cannot take back: read again")
            elif turn.num_dropped:
                read.append(f"{turn.num_dropped:,} rendered otherwise, and taken back")
            self._note("tokens: " + " · ".join(read))
        limit = "" if session.limit is None else f" of {session.limit:,}"
        held, turns = f"{len(session.held_tokens):,}{limit} tokens", _count(session.num_turns, "turn")
        self._note(f"context: {held} · KV {session.num_bytes:,} bytes · {turns}")

    def _exit(self, _: str) -> object:
        return EXIT


EXIT = object()


@dataclass(frozen=True)
class _Command:
    argument: str
    what: str
    obey: Callable[[ChatLoop, str], object]


COMMANDS = {
    "/reset": _Command("", "forgets the conversation, but for the system message", ChatLoop._reset),
    "/system": _Command("[TEXT]", "gives a system message, or says which there is; off: none", ChatLoop._system),
    "/save": _Command("FILE", "writes the conversation to a new file, as a line of JSON", ChatLoop._save),
    "/load": _Command("FILE [N]", "goes on with the conversation in a file, or in its line N", ChatLoop._load),
    "/cache": _Command("", "says which cache there is, and what it holds", ChatLoop._cache),
    "/stats": _Command("", "says what the last answer took, and how full the context is", ChatLoop._stats),
    "/help": _Command("", "says this", ChatLoop._help),
    "/exit": _Command("", "ends the chat", ChatLoop._exit),
}


class _Writer:
    """Writes an answer to standard output as it comes, and ends its last line.

    Args:
        width: of the terminal. A word is then held back until it is whole, and begins a line where it would not fit.
    """

    def __init__(self, width: int | None = None) -> None:
        self._width, self._column, self._held = width, 0, ""
        self._last = "\n"

    def write(self, text: str) -> None:
        """Prints a piece of the answer at once, but for a word that may go on, and the space before it."""
        if self._width is None:
            self._print(text)
            return
        *whole, self._held = re.split(r"(?<=\S)(?=\s)", self._held + text)
        self._print("".join(map(self._placed, whole)))

    def end(self) -> None:
        """Prints what was held back, and ends the line, if one has begun."""
        self._print(self._placed(self._held))
        if self._last != "\n":
            self._print("\n")

    def _placed(self, word: str) -> str:
        """A word with the space before it, or on a new line in its place."""
        *lines, word = word.split("\n")
        self._column *= not lines
        if self._width is not None and 0 < self._column and self._column + cell_len(word) > self._width:
            lines, word, self._column = [""], word.lstrip(), 0
        self._column += cell_len(word)
        return "\n".join([*lines, word])

    def _print(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
        self._last = text[-1:] or self._last


def piped_lines() -> Iterator[str]:
    """What standard input has, a message a line.

    Raises:
        UserError: for a line that is no UTF-8 text.
    """
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            raise UserError(f"line {number} of standard input: is not UTF-8 text") from None


def typed_messages(notes: Console) -> Iterator[str]:
    """What somebody types, until Ctrl-D. Pasted text may have several lines; Alt-Enter begins another one."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import create_output
    from prompt_toolkit.shortcuts import CompleteStyle

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    prompt: PromptSession[str] = PromptSession(
        PROMPT,
        multiline=True,
        prompt_continuation=" " * len(PROMPT),
        key_bindings=keys,
        completer=WordCompleter(list(COMMANDS), sentence=True),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,  # keeps no room for a menu
        output=create_output(sys.stdout if sys.stdout.isatty() else sys.stderr),
    )
    while True:
        try:
            yield prompt.prompt()
        except KeyboardInterrupt:
            notes.print("(/exit or Ctrl-D ends the chat)", style="dim")
        except EOFError:
            return


def _count(number: int, what: str) -> str:
    """Such as "1 token" or "1,234 tokens"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _path(name: str) -> Path:
    """A path with the home folder for `~`, and for `~who` that of a user, if there is one."""
    return Path(os.path.expanduser(name))  # where Path.expanduser raises
