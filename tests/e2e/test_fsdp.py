"""Sharded parameters (FSDP2): repeated passes over the same layers give the gradients of the whole model."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.timeout(150)
def test_two_processes_with_sharded_parameters_agree_with_one() -> None:
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "tests.e2e.fsdp_worker"]
    process = subprocess.run(
        [sys.executable, "-m", *command], cwd=REPOSITORY, capture_output=True, text=True, timeout=140, check=False
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.count("agrees") == 8
