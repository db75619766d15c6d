"""A sweep that several tests look at."""

from pathlib import Path

import pytest

from tests.unit.reporting.sweeps import write_sweep


@pytest.fixture(scope="session")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three families by two seeds, a failure and an unfinished run; to be read only."""
    return write_sweep(tmp_path_factory.mktemp("sweeps") / "sweep", families=("llama", "cla", "lckv"))
