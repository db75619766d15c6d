"""`lckv.chat` from the command line to what is printed: through pipes, and in a terminal."""

import fcntl
import io
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from pathlib import Path

import pytest
import torch

from lckv import chat
from lckv.errors import UserError
from tests.commands import Command
from tests.composing import compose
from tests.tiny import letter_tokenizer
from tests.unit.generation.test_chat import TEMPLATE, chat_model, make_session

COLUMNS = 80


def endless_model():
    model = chat_model(max_position_embeddings=4096)
    with torch.no_grad():
        model.lm_head.weight[model.config.eos_token_id] = 0  # the likeliest token's logit is above that
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose answers end where they are cut."""
    path = tmp_path_factory.mktemp("model")
    endless_model().save_pretrained(path)
    letter_tokenizer(chat_template=TEMPLATE.replace("eos_token", "'<|end|>'")).save_pretrained(path)
    return str(path)


@pytest.fixture
def run(folder, capsys, monkeypatch):
    """Runs `main` as the command line would, with text piped in; returns what it printed to stdout and stderr."""

    def run(text: str, *arguments: str, model: str = folder) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        chat.main(compose([f"model={model}", "max_new_tokens=12", *arguments], "chat"))
        out = capsys.readouterr()
        return out.out, out.err

    return run


def test_a_pipe(run):
    out, err = run("Why?\n\nAnd?\n/stats\n", "system=Be brief.", "cache=paged", "cache.page_size=4")
    session = make_session(
        endless_model(),
        letter_tokenizer(chat_template=TEMPLATE.replace("eos_token", "'<|end|>'")),
        system="Be brief.",
    )
    answers = [session.answer(text, lambda piece: None).text for text in ("Why?", "And?")]
    assert out == "".join(answer if answer.endswith("\n") else f"{answer}\n" for answer in answers)
    assert "kept from earlier turns\ncontext: " in err and err.endswith("2 turns\n")
    with pytest.raises(UserError, match="^unknown command /statz; did you mean '/stats'"):
        run("/statz\nWhy?\n")


def test_templates(run, tmp_path):
    chat_model().save_pretrained(tmp_path)
    letter_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"^model=.*: its tokenizer has no chat template; give one: chat_template=chatml,"
    ):
        run("", model=str(tmp_path))
    (tmp_path / "mine.jinja").write_text(TEMPLATE)
    texts = [
        run("Why?\n", f"chat_template={name}", model=str(tmp_path)) for name in ("chatml", tmp_path / "mine.jinja")
    ]
    assert texts[0] != texts[1]
    (tmp_path / "mine.jinja").write_text("{% if %}")
    (tmp_path / "model.safetensors").write_text("torn")  # which is not looked at before the template
    with pytest.raises(UserError, match=r"^chat_template=.*mine.jinja: the chat template fails: "):
        run("", f"chat_template={tmp_path}/mine.jinja", model=str(tmp_path))


def test_settings_that_this_model_does_not_allow(run, tmp_path):
    with pytest.raises(UserError, match=r"^prefill_tolerance=0.1: has no effect without prefill_passes=converge"):
        run("", "prefill_passes=3", "prefill_tolerance=0.1")
    with pytest.raises(UserError, match=r"^the context is full: \d+ tokens with this message, of 20; /reset"):
        run("Why is that so?\n", "cache=static", "cache.max_length=20")


class Terminal:
    """A chat in a terminal of 80 columns, and somebody who types and reads."""

    def __init__(self, folder: str, cwd: Path) -> None:
        self.screen = ""
        self._ours, self._theirs = pty.openpty()  # both stay open: the chat opens its own by name
        fcntl.ioctl(self._theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
        arguments = [sys.executable, "-m", "lckv.chat", f"model={folder}", "max_new_tokens=4000"]
        environment = os.environ | {"TERM": "xterm"}
        self.command = Command(arguments, cwd, environment, terminal=Path(os.ttyname(self._theirs)))

    def close(self) -> None:
        if self.command.poll() is None:
            self.command.send_signal(signal.SIGKILL)
        os.close(self._ours)
        os.close(self._theirs)

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def wait_for(self, pattern: str, timeout: float = 40) -> str:
        """Reads until something comes, and returns all up to its end."""
        stop = time.monotonic() + timeout
        while not (found := re.search(pattern, self.screen, re.DOTALL)):
            assert time.monotonic() < stop, f"waiting for {pattern}: {self.screen!r}"
            if select.select([self._ours], [], [], 0.1)[0]:
                data = os.read(self._ours, 65536)
                if b"\x1b[6n" in data:  # where is the cursor?
                    self.type("\x1b[1;1R")
                self.screen += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", data.decode(errors="replace"))
        seen, self.screen = self.screen[: found.end()], self.screen[found.end() :]
        return seen


@pytest.fixture
def terminal(folder, tmp_path):
    terminal = Terminal(folder, tmp_path)
    yield terminal
    terminal.close()


def test_a_terminal(terminal, folder):
    assert f"{folder} · cache=dynamic · 4,096 tokens · /help".replace(" ", "") in "".join(
        terminal.wait_for("/help.*>").split()
    )
    terminal.type("Why?\r")
    terminal.wait_for(r"Why\?\r\r\n[^\s>]")  # the answer has begun, not only what was typed been drawn again
    terminal.type("\x03")
    answer = terminal.wait_for(r"\(stopped\).*>").partition("^C")[0]
    assert max(map(len, answer.splitlines())) <= COLUMNS
    terminal.type("\x1b[200~/system one\ntwo\x1b[201~\r")  # pasted
    assert "(system message: one\r\ntwo)" in terminal.wait_for(r"\(system message: .*>")
    terminal.type("\x03")
    terminal.wait_for("/exit or Ctrl-D ends the chat.*>")
    terminal.type("/stats\r")
    assert "1 turn" in terminal.wait_for("KV .* turn.*>")
    terminal.type("\x04")
    finished = terminal.command.finish(timeout=20)
    assert finished.returncode == 0
