"""Runs commands as a user does, each in a process of its own, but without importing the libraries anew every time.

Importing torch and transformers takes ten times as long as what most tests then do. So `python -m MODULE` is forked
from a server that has imported them, one for each test process. The package itself is imported by every command.
"""

import gc
import multiprocessing
import os
import runpy
import signal
import socket
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


class Command:
    """A command line that runs: `python -m MODULE ...` or `python FILE.py ...`, with this interpreter.

    Args:
        command: its words, `sys.executable` first.
        cwd: the folder to run in.
        env: all of its environment; by default that of the tests.
        input: what comes in.
        terminal: a terminal that it runs in, whose Ctrl-C it hears; nothing else comes in or goes out then.
    """

    def __init__(
        self,
        command: list[str],
        cwd: Path,
        env: dict[str, str] | None = None,
        input: str = "",
        terminal: Path | None = None,
    ) -> None:
        assert command[0] == sys.executable
        self.command = command
        self._folder = tempfile.TemporaryDirectory()
        streams = [Path(self._folder.name, name) for name in ("stdin", "stdout", "stderr")]
        for stream, text in zip(streams, (input, "", ""), strict=True):
            stream.write_text(text, encoding="utf-8")
        self._outputs = streams[1:]
        environment = dict(os.environ) if env is None else env
        given = streams if terminal is None else [terminal] * 3
        self._process = _SERVER.Process(target=_run, args=(command[1:], cwd, environment, given))
        self._process.start()

    def poll(self) -> int | None:
        """The exit code, or minus the signal that killed it; `None` while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Sends it a signal."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def finish(self, timeout: float) -> subprocess.CompletedProcess[str]:
        """Waits for its end, and returns what it printed, with its exit code; kills it after `timeout` seconds."""
        self._process.join(timeout)
        is_late = self._process.is_alive()
        if is_late:
            self._process.kill()
        stdout, stderr = (output.read_text(encoding="utf-8") for output in self._outputs)
        self._folder.cleanup()
        if is_late:
            raise subprocess.TimeoutExpired(self.command, timeout, stdout, stderr)
        assert self._process.exitcode is not None
        return subprocess.CompletedProcess(self.command, self._process.exitcode, stdout, stderr)


def run(
    command: list[str],
    cwd: Path,
    *,
    timeout: float = 50,
    env: dict[str, str] | None = None,
    input: str = "",
    num_processes: int = 1,
) -> subprocess.CompletedProcess[str]:
    """Runs a command line to its end; see [`Command`].

    Args:
        num_processes: so many of it, told of each other as `torchrun` does; what the first one printed is returned,
            and the exit code of one that failed.
    """
    environment = dict(os.environ) if env is None else env
    if num_processes == 1:
        return Command(command, cwd, environment, input).finish(timeout)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    shared = {**environment, **address, "WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
    ranks = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_processes))
    started = [Command(command, cwd, shared | rank, input) for rank in ranks]
    finished = [each.finish(timeout) for each in started]
    failed = (each for each in finished if each.returncode != 0)
    return next(failed, finished[0])


def _run(command: list[str], cwd: Path, environment: dict[str, str], streams: list[Path]) -> None:
    """What the forked process does: it becomes the command, with its streams in files."""
    gc.freeze()  # as in `conftest.py`
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    if len(set(streams)) == 1:
        os.setsid()  # the terminal that is opened below is then its own
    for number, stream in enumerate(streams):
        os.dup2(os.open(stream, os.O_RDONLY if number == 0 else os.O_WRONLY), number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # multiprocessing has put /dev/null there
    signal.signal(signal.SIGINT, signal.default_int_handler)  # to which the server is deaf
    if command[0] == "-m":
        sys.path[0] = str(cwd)
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(command[0]).parent)
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
