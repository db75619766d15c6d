"""`python -m lckv.evaluate` as a user runs it, on a model that `lckv.train` has trained."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import commands
from tests.e2e.conftest import FinishedRun

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run_folder(finished_run: FinishedRun, tmp_path: Path) -> Path:
    """A copy: evaluations write into it."""
    return shutil.copytree(finished_run.folder, tmp_path / "run")


def test_a_run_folder_is_evaluated(run_module: Run, run_folder: Path, finished_run: FinishedRun) -> None:
    text = ["data=files", f"data.files={finished_run.corpus}"]
    done = run_module("lckv.evaluate", "model=run", *text, "json=true")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results == json.loads((run_folder / "evaluation" / "results.json").read_text())
    trained = json.loads((run_folder / "results.json").read_text())
    assert results["layer_types"] == trained["layer_types"]
    assert results["costs"]["train_tokens_per_second"] == trained["tokens_per_second"]
    assert results["costs"]["kv_bytes"] == trained["kv_bytes"]  # of the context that it was trained on
    assert results["costs"]["train_flops_per_token"] == trained["train_flops_per_token"]
    assert results["evaluations"]["perplexity"]["context_length"] == trained["kv_bytes_context_length"]
    assert results["evaluations"]["perplexity"]["perplexity"] < trained["unigram_perplexity"]
    again = run_module("lckv.evaluate", "model=run/model", *text, "evals=[nedle]")
    assert (again.returncode, again.stderr.count("\n")) == (2, 1) and "did you mean 'needle'" in again.stderr


def test_mistakes_are_one_line_and_need_no_torch(tmp_path: Path) -> None:
    code = """
import runpy, sys
sys.argv = ["lckv.evaluate", "model=x", "evals=[perplexty]"]
try:
    runpy.run_module("lckv.evaluate", run_name="__main__")
except SystemExit as stop:
    assert stop.code == 2
assert not {"torch", "transformers"} & set(sys.modules), "slow to start"
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("lckv.evaluate: error: evals[0]='perplexty': allowed are perplexity")


def test_ctrl_c_keeps_what_is_done(run_folder: Path, finished_run: FinishedRun, tmp_path: Path) -> None:
    arguments = ["model=run", "data=files", f"data.files={finished_run.corpus}", "evals=[perplexity,speed]"]
    workload = ["speed.prompt_length=8", "speed.new_tokens=8", "speed.rounds=1000000"]
    command = [sys.executable, "-m", "lckv.evaluate", *arguments, *workload]
    file = run_folder / "evaluation" / "results.json"
    process = commands.Command(command, tmp_path)
    deadline = time.monotonic() + 50
    while not (file.is_file() and json.loads(file.read_text())["evaluations"]):
        assert process.poll() is None and time.monotonic() < deadline, process.finish(0)
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    done = process.finish(30)
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert set(json.loads(file.read_text())["evaluations"]) == {"perplexity"}
