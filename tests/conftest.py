"""Settings of every test: one thread per process, no network, caches in a temporary folder."""

import atexit
import gc
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

gc.disable()  # until all is imported: a fifth of the time that imports take, and nothing of them is garbage

# Before torch or a Hugging Face library is imported, here or in a subprocess: they read these once. More than one
# thread per process makes tiny models many times slower as soon as two test processes share two cores.
os.environ.update(
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    HF_HOME=tempfile.mkdtemp(prefix="hub-of-tests-"),  # not the user's
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="offline",
    MPLBACKEND="Agg",
)
os.environ.pop("HF_TOKEN", None)  # nor the user's account

atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

import pytest  # noqa: E402

from lckv.commands import hydra_store  # noqa: E402
from tests import commands  # noqa: E402

# A shell that starts the tests in the background makes them, and the processes they start, deaf to Ctrl-C.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


FIRST = ("tests/contract/", "tests/e2e/", "tests/unit/training/")
"""Whose files take longest: begun last, one would leave the other processes nothing to do."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first; `--no-loadscope-reorder` keeps them there."""
    items.sort(key=lambda item: not item.nodeid.startswith(FIRST))


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keeps tokenisers and blocks that tests build out of the user's cache; all test processes share the folder."""
    base = tmp_path_factory.getbasetemp()
    path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "lckv_cache"
    path.mkdir(exist_ok=True)
    os.environ["LCKV_CACHE"] = str(path)
    return path


@pytest.fixture(autouse=True)
def imported() -> None:
    """Spares the garbage collector what has been imported by now: to look through it takes a quarter of a second.

    Accelerate has all that there is looked through around every training.
    """
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def seed() -> None:
    """Makes every test start from the same random state, in whatever order the tests run."""
    import torch  # not by the process that only hands the tests out, which all others wait for

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def loggers() -> Iterator[None]:
    """Undoes what Hydra does to the loggers where a test runs a command in this process.

    Its handlers write to a stream that pytest has closed by the next test, and its `--help` switches loggers off.
    """
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for logger in root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.disabled = False


@pytest.fixture(autouse=True)
def literals() -> Iterator[None]:
    """Takes back the texts that a command line in this process gave: Hydra merges them into all that it composes."""
    yield
    hydra_store.register_literals({})


@pytest.fixture
def run_module(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python -m MODULE ARGUMENTS...` in the empty folder `tmp_path` and returns the finished process."""

    def run(module: str, *arguments: str, **options) -> subprocess.CompletedProcess[str]:
        return commands.run([sys.executable, "-m", module, *arguments], tmp_path, **options)

    return run
