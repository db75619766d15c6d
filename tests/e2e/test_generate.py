"""`python -m lckv.generate` as a user runs it, on a model that `lckv.train` has trained."""

import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import FinishedRun

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_a_run_folder_continues_text(run_module: Run, finished_run: FinishedRun) -> None:
    arguments = [f"model={finished_run.folder}", "prompt=in the beginning was the", "max_new_tokens=12"]
    done = run_module("lckv.generate", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and "word" in done.stdout  # the text that it was trained on goes on like this
    assert done.stderr.startswith("12 tokens · ") and done.stderr.count("\n") == 1

    piped = run_module(
        "lckv.generate", arguments[0], arguments[2], "cache=quantized", "json=true", input="in the beginning was the\n"
    )
    assert (piped.returncode, piped.stderr) == (0, "")
    assert json.loads(piped.stdout)["texts"][0]["text"] == done.stdout.removesuffix("\n")


def test_mistakes_are_one_line_and_need_no_torch(run_module: Run, finished_run: FinishedRun, tmp_path: Path) -> None:
    done = run_module("lckv.generate", f"model={finished_run.folder}x", "prompt=a")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("lckv.generate: error: model=") and done.stderr.count("\n") == 1
    assert "did you mean 'run'" in done.stderr
    code = """
import runpy, sys
sys.argv = ["lckv.generate", "model=x", "prompt="]
try:
    runpy.run_module("lckv.generate", run_name="__main__")
except SystemExit as stop:
    assert stop.code == 2
assert not {"torch", "transformers"} & set(sys.modules), "slow to start"
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("cache", ["dynamic", "sink"])
def test_ctrl_c_leaves_the_terminal_clean(finished_run: FinishedRun, cache: str) -> None:
    options = ["max_new_tokens=2000"] if cache == "dynamic" else ["cache=sink", "cache.window=20", "stream=endless"]
    arguments = [f"model={finished_run.folder}", "prompt=in the beginning", "temperature=1.0", *options]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-m", "lckv.generate", *arguments])
    output, is_interrupted, deadline = b"", False, time.monotonic() + 50
    while time.monotonic() < deadline:
        if not select.select([terminal], [], [], 0.1)[0]:
            continue
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # how a terminal says that its process is gone
            break
        output += piece
        # A warning about the model's few positions comes first.
        if not is_interrupted and len(output.rpartition(b"bad\r\n")[2]) > 100:
            os.write(terminal, b"\x03")
            is_interrupted = True
    _, status = os.waitpid(pid, 0)
    text = output.decode("utf-8", errors="replace")
    assert is_interrupted and os.waitstatus_to_exitcode(status) == 130, text
    assert "Traceback" not in text and text.endswith("\n")
    assert "\x1b[?25l" not in text  # no cursor that was hidden and is not shown again
