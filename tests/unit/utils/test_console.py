"""Bars are for terminals, and what is said to type next can be typed."""

import io
import shlex
import sys

import pytest
from rich.console import Console

from lckv.utils.console import Bar, arguments_of_this_run, command


@pytest.mark.parametrize("is_terminal", [True, False])
def test_bars_are_shown_on_terminals_only(is_terminal):
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=100)
    with Bar(console, "counting", "tokens", 2500) as bar:
        bar.advance(1000)
        bar.advance(500)
    with Bar(console, "reading") as bar:
        assert list(bar.track("abc")) == ["a", "b", "c"]
    shown = console.file.getvalue()
    assert ("counting 1,500 of 2,500 tokens" in shown) == ("reading 3" in shown) == is_terminal


@pytest.mark.parametrize(
    ("on_path", "executable", "typed"),
    [
        (".venv/bin", ".venv/bin/python", "python"),
        ("other/bin", ".venv/bin/python", ".venv/bin/python"),
        (None, ".venv/bin/python3", ".venv/bin/python3"),
        ("other/bin", "/opt/my env/bin/python", "/opt/my env/bin/python"),
    ],
)
def test_the_interpreter_is_one_that_the_shell_finds(monkeypatch, tmp_path, on_path, executable, typed):
    for folder in (".venv/bin", "other/bin"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "python").touch(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / on_path) if on_path else str(tmp_path / "empty"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / executable))
    assert shlex.split(command("lckv.plan", ["a b"])) == [typed, "-m", "lckv.plan", "a b"]


def test_without_hydra_the_command_line_is_the_run(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", "-m", "seed=0,1"])
    assert arguments_of_this_run() == ["-m", "seed=0,1"]
