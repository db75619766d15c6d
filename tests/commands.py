"""Runs commands as a user does, each in a process of its own, but without importing the libraries anew every time.

Importing torch and transformers takes ten times as long as what most tests then do. So `python -m MODULE` is forked
from a server that has imported them, one for each test process. The package itself is imported by every command.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

_LIBRARIES = [
    "accelerate",
    "datasets",
    "huggingface_hub",
    "hydra",
    "matplotlib.pyplot",
    "pandas",
    "rich.console",
    "torch",
    "transformers.generation",
    "transformers.trainer",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
]

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(_LIBRARIES)


def run(
    command: list[str], cwd: Path, *, timeout: float = 50, env: dict[str, str] | None = None, input: str = ""
) -> subprocess.CompletedProcess[str]:
    """Runs a command line to its end, and returns what it printed, with its exit code.

    Args:
        command: forked if it begins with this interpreter and `-m`, else started as it is.
        cwd: the folder to run in.
        timeout: seconds.
        env: all of its environment; by default that of the tests.
        input: what comes in.
    """
    environment = dict(os.environ) if env is None else env
    if command[:2] != [sys.executable, "-m"]:
        options = {"env": environment, "input": input, "timeout": timeout, "capture_output": True, "text": True}
        return subprocess.run(command, cwd=cwd, check=False, **options)
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("stdin", "stdout", "stderr")]
        for stream, text in zip(streams, (input, "", ""), strict=True):
            stream.write_text(text, encoding="utf-8")
        process = _SERVER.Process(target=_run, args=(command[2:], cwd, environment, streams))
        process.start()
        process.join(timeout)
        outputs = [stream.read_text(encoding="utf-8") for stream in streams[1:]]
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(command, timeout, *outputs)
    assert process.exitcode is not None
    return subprocess.CompletedProcess(command, process.exitcode, *outputs)


def _run(command: list[str], cwd: Path, environment: dict[str, str], streams: list[Path]) -> None:
    """What the forked process does: `python -m MODULE ARGUMENTS...` with its streams in files."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, stream in enumerate(streams):
        os.dup2(os.open(stream, os.O_RDONLY if number == 0 else os.O_WRONLY), number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # multiprocessing has put /dev/null there
    sys.path[0] = str(cwd)
    sys.argv = command
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)
