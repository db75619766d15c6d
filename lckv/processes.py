"""The processes that work together: how many they are, which one speaks, and how many threads each has."""

from __future__ import annotations

import logging
import os

import psutil  # type: ignore[import-untyped]
import torch
from transformers.utils.logging import disable_progress_bar

from lckv.errors import check_whole_number


def num_processes() -> int:
    """How many processes train together, as `accelerate launch` and `torchrun` tell each of them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process is the one that writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def prepare_process(num_threads: int | None) -> None:
    """Gets this process ready for work: its threads, and silence from whoever is not the first to speak."""
    set_num_threads(num_threads)
    disable_progress_bar()  # transformers' own, for every file that it reads or writes
    if not is_main_process():
        logging.getLogger("lckv").setLevel(logging.ERROR)


def set_num_threads(num_threads: int | None) -> int:
    """Sets torch's threads: the given number, $OMP_NUM_THREADS, or this process's share of the physical cores.

    Raises:
        UserError: if the number is below 1.
    """
    if num_threads is not None:
        check_whole_number("trainer.num_threads", num_threads)
    if num_threads is None and "OMP_NUM_THREADS" not in os.environ:
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        cores = min(usable, psutil.cpu_count(logical=False) or usable)
        num_threads = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    return torch.get_num_threads()
