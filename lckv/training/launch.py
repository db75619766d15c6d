"""Refuses to train alone where `accelerate launch` was asked for several processes."""

from __future__ import annotations

import os
from collections.abc import Mapping

from lckv.errors import UserError

_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


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
