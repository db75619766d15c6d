"""Makes `accelerate launch --cpu --num_processes N` start N processes.

accelerate leaves the processes of a CPU run to MPI, and without it starts a single one, without a word.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence

import psutil  # type: ignore[import-untyped]

from lckv.errors import UserError


def launch_missing_processes(module: str) -> None:
    """Starts the processes that accelerate was asked for and did not start, in place of this one.

    Args:
        module: what this process runs, e.g. `"lckv.train"`.

    Raises:
        UserError: if more than one process was asked for and it cannot be found out how many.
    """
    if not is_alone_by_mistake(os.environ):
        return
    parent = psutil.Process().parent()
    asked = num_processes_asked_for(parent.cmdline() if parent else ())
    if asked is None:
        raise UserError(
            "accelerate starts only one process on a CPU without MPI: give --num_processes N on the command line "
            f"of `accelerate launch --cpu`, or use `torchrun --nproc_per_node N -m {module} ...`"
        )
    if asked > 1:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(asked), "-m", module]
        os.execv(sys.executable, [sys.executable, *command, *sys.argv[1:]])


def is_alone_by_mistake(environment: Mapping[str, str]) -> bool:
    """Whether accelerate prepared for several CPU processes (it names a master then) and nobody started them."""
    has_rank = any(
        name in environment for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    )
    is_cpu_launch = environment.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes")
    return is_cpu_launch and "MASTER_ADDR" in environment and not has_rank


def num_processes_asked_for(command: Sequence[str]) -> int | None:
    """Finds `--num_processes N` among the arguments of `accelerate launch`; the last one counts."""
    found = re.findall(r"(?:^|\0)--num[_-]processes[=\0](\d+)(?=\0|$)", "\0".join(command))
    return int(found[-1]) if found else None
