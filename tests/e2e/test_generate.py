"""`python -m lckv.generate` as a user runs it, on a model that `lckv.train` has trained."""

import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import commands
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


@pytest.mark.timeout(120)
def test_a_file_of_prompts_is_batched_continuously(run_module: Run, finished_run: FinishedRun, tmp_path: Path) -> None:
    prompts = [
        "in the beginning",
        "was",
        "in the beginning was the word and the light shone upon the face of the deep",
        "the",
    ]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    arguments = [f"model={finished_run.folder}", f"prompts_file={tmp_path}/prompts.txt", "max_new_tokens=6"]
    pages = ["cache=paged", "cache.page_size=4", "cache.num_pages=4", "prefill_passes=converge"]
    done = run_module("lckv.generate", *arguments, *pages)
    failure, summary, error = done.stderr.splitlines()
    assert done.returncode == 2 and failure.startswith("prompt 3: out of pages: ")
    assert error == f"lckv.generate: error: prompts_file={tmp_path}/prompts.txt: 1 of 4 prompts have failed"
    assert re.match(r"\d+ tokens · [\d,.]+ tok/s · \d+ steps of up to \d texts · ", summary)

    static = run_module("lckv.generate", *arguments, "prefill_passes=converge", "batch_size=1", "json=true")
    texts = {text["prompt"]: text["text"] for text in json.loads(static.stdout)["texts"]} | {prompts[2]: ""}
    assert done.stdout == "".join(f"==> {prompt} <==\n{texts[prompt]}\n\n" for prompt in prompts)


@pytest.mark.parametrize("cache", ["dynamic", "sink"])
def test_ctrl_c_leaves_the_terminal_clean(finished_run: FinishedRun, tmp_path: Path, cache: str) -> None:
    folder = shutil.copytree(finished_run.folder / "model", tmp_path / "model")
    generation_config = json.loads((folder / "generation_config.json").read_text())
    # No token of the vocabulary: a text that ends by itself may do so before it is interrupted.
    (folder / "generation_config.json").write_text(json.dumps(generation_config | {"eos_token_id": 10**6}))
    options = ["max_new_tokens=2000"] if cache == "dynamic" else ["cache=sink", "cache.window=20", "stream=endless"]
    arguments = [f"model={folder}", "prompt=in the beginning", "temperature=1.0", *options]
    terminal, theirs = pty.openpty()
    command = [sys.executable, "-m", "lckv.generate", *arguments]
    process = commands.Command(command, tmp_path, terminal=Path(os.ttyname(theirs)))
    output, is_interrupted, deadline = b"", False, time.monotonic() + 50
    while time.monotonic() < deadline:
        has_ended = process.poll() is not None
        if select.select([terminal], [], [], 0.1)[0]:
            output += os.read(terminal, 4096)
        elif has_ended:
            break
        # A warning about the model's few positions comes first.
        if not is_interrupted and len(output.rpartition(b"bad\r\n")[2]) > 100:
            os.write(terminal, b"\x03")
            is_interrupted = True
    text = output.decode("utf-8", errors="replace")
    assert is_interrupted and process.finish(10).returncode == 130, text
    assert "Traceback" not in text and text.endswith("\n")
    assert "\x1b[?25l" not in text  # no cursor that was hidden and is not shown again
