"""The processes that work together: how many they are, which one speaks, and how many threads each has.

Importing it brings no torch: whoever was launched in vain is told at once.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping, MutableMapping
from typing import Any

import psutil  # type: ignore[import-untyped]

from lckv.errors import UserError

_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""What launchers say how many processes there are in: torchrun's and accelerate's, and those of MPI."""


SPIN_COUNT = "GOMP_SPINCOUNT"
"""What GNU's OpenMP, which torch's Linux builds bring, calls the turns for which a waiting thread spins."""


def share_cores(environment: MutableMapping[str, str] = os.environ) -> None:
    """Has threads that wait for others go to sleep soon, unless the user has said how they shall wait.

    They spin for some milliseconds else, on cores on which the others could run: beside a single busy process, two
    threads of two cores do a third of their work. It counts if it is said before torch is loaded.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault(SPIN_COUNT, "1000")


def check_launch(module: str, environment: Mapping[str, str] = os.environ) -> None:
    """Refuses a process that accelerate prepared for company and then started alone.

    Without several GPUs, accelerate leaves other processes to MPI. It tells the one that it starts where the first of
    them listens, as it does if there are to be several, but nobody says how many there are.

    Args:
        module: what this process runs, e.g. `"lckv.train"`.
        environment: what its launcher told it.

    Raises:
        UserError: naming a launcher that starts them.
    """
    is_from_accelerate = "ACCELERATE_DYNAMO_USE_FULLGRAPH" in environment  # which nothing but its launchers sets
    if is_from_accelerate and "MASTER_ADDR" in environment and not any(name in environment for name in _SIZES):
        raise UserError(
            "accelerate launch was asked for several processes, but starts a single one here: "
            f"use torchrun --nproc-per-node N -m {module} ..., or start them by MPI"
        )


def num_processes() -> int:
    """How many processes train together, as `accelerate launch` and `torchrun` tell each of them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process is the one that writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def prepare_process(num_threads: int | None) -> None:
    """Gets this process ready for work: its threads, and silence from whoever is not the first to speak."""
    from transformers.utils.logging import disable_progress_bar

    set_num_threads(num_threads)
    disable_progress_bar()  # transformers' own, for every file that it reads or writes
    if not is_main_process():
        logging.getLogger("lckv").setLevel(logging.ERROR)


def set_num_threads(num_threads: int | None) -> None:
    """Sets torch's threads: the given number, $OMP_NUM_THREADS, or this process's share of the physical cores."""
    import torch

    if num_threads is None and "OMP_NUM_THREADS" not in os.environ:
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        cores = min(usable, psutil.cpu_count(logical=False) or usable)
        num_threads = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if num_threads is not None:
        torch.set_num_threads(num_threads)


def hear_every_interrupt() -> None:
    """Sends a Ctrl-C once more that came while Python was freeing objects, and was lost in a finalizer of one of them.

    What is raised there goes no further. Behind imports as large as transformers' that takes long enough to be met.
    """
    otherwise = sys.unraisablehook

    def hook(lost: Any) -> None:
        if not issubclass(lost.exc_type, KeyboardInterrupt):
            otherwise(lost)
            return
        again = threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
        again.daemon = True
        again.start()

    sys.unraisablehook = hook
