"""A training process that is killed, and the same command again."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import commands
from tests.e2e import training
from tests.e2e.conftest import FinishedRun


def kill_when(condition: Callable[[], bool], arguments: list[str], cwd: Path) -> None:
    """Starts a command and kills it, with a signal that it cannot see, as soon as `condition` holds."""
    process = commands.Command(arguments, cwd)
    deadline = time.monotonic() + 100
    while process.poll() is None and not condition():
        assert time.monotonic() < deadline, "the run never got there"
        time.sleep(0.005)  # the cores are the run's
    process.send_signal(signal.SIGKILL)
    assert process.finish(10).returncode == -signal.SIGKILL, "the run ended before it could be killed"


def assert_same_run(first: Path, second: Path) -> None:
    assert training.learned(first) == training.learned(second)
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (first, second))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.timeout(250)
def test_killed_while_saving_and_resumed_is_the_undisturbed_run_bit_for_bit(
    finished_run: FinishedRun, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    checkpoints = folder / "checkpoints"
    arguments = training.command(finished_run.corpus, folder)

    def is_saving_again() -> bool:
        # Half-way through a save after the second: the weights are written, the optimizer's state is not, or not all.
        staging = [checkpoints / f".saving-{step}" / f"checkpoint-{step}" for step in range(18, 60, 6)]
        return any((path / "model.safetensors").exists() for path in staging)

    kill_when(is_saving_again, arguments, tmp_path)
    assert not (folder / "results.json").exists()
    process = training.run(arguments, cwd=tmp_path)
    assert process.returncode == 0, process.stdout + process.stderr
    assert f"going on from {checkpoints}/checkpoint-" in process.stdout
    assert_same_run(finished_run.folder, folder)
    assert sorted(os.listdir(checkpoints)) == ["checkpoint-54", "checkpoint-60"]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("delay", [0.0, 0.1, 0.25])
def test_killed_again_and_again_at_any_moment(finished_run: FinishedRun, tmp_path: Path, delay: float) -> None:
    folder = tmp_path / "run"
    arguments = training.command(finished_run.corpus, folder)
    for step in (6, 18, 36):

        def is_past(step: int = step) -> bool:
            return any(int(path.name.split("-")[1]) >= step for path in folder.glob("checkpoints/checkpoint-*"))

        def is_later() -> bool:
            if not is_past():
                return False
            time.sleep(delay)
            return True

        kill_when(is_later, arguments, tmp_path)
    process = training.run(arguments, cwd=tmp_path)
    assert process.returncode == 0, process.stdout + process.stderr
    assert_same_run(finished_run.folder, folder)
