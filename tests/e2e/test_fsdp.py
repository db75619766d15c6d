"""Sharded parameters (FSDP2): repeated passes over the same layers give the gradients of the whole model."""

import sys
from pathlib import Path

import pytest

from tests import commands

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.timeout(150)
def test_two_processes_with_sharded_parameters_agree_with_one() -> None:
    command = [sys.executable, "-m", "tests.e2e.fsdp_worker"]
    process = commands.run(command, REPOSITORY, timeout=140, num_processes=2)
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.count("agrees") == 8
