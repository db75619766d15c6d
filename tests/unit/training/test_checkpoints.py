import errno
import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lckv.errors import UserError
from lckv.training.checkpoints import CheckpointFolder, find_fault, saving, step_of


def save(folder: CheckpointFolder, step: int) -> Path:
    staging = folder.staging(step) / "new"
    (staging / "part").mkdir(parents=True)
    (staging / "weights").write_bytes(b"w" * step)
    (staging / "part" / "state").write_bytes(b"s")
    return folder.publish(step, staging)


def names(folder: CheckpointFolder) -> list[str]:
    return sorted(path.name for path in folder.path.iterdir())


def test_newest_whole_checkpoint_is_found(tmp_path: Path):
    folder = CheckpointFolder(tmp_path)
    assert folder.latest() is None
    for step in (90, 100):
        save(folder, step)
    latest = folder.latest()
    assert latest is not None
    assert step_of(latest) == 100
    assert find_fault(latest) is None
    assert names(folder) == ["checkpoint-100", "checkpoint-90"]


@pytest.mark.parametrize("damage", ["no manifest", "torn manifest", "missing file", "short file", "missing part"])
def test_damaged_checkpoint_is_never_picked_up(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture):
    folder = CheckpointFolder(tmp_path)
    save(folder, 10)
    newest = save(folder, 20)
    if damage == "no manifest":
        (newest / "manifest.json").unlink()
    elif damage == "torn manifest":
        (newest / "manifest.json").write_text('{"weights": 2')
    elif damage == "missing file":
        (newest / "weights").unlink()
    elif damage == "short file":
        (newest / "weights").write_bytes(b"w")
    else:
        (newest / "part" / "state").unlink()
    assert folder.latest() == tmp_path / "checkpoint-10"
    assert "checkpoint-20" in caplog.text


def test_what_is_written_aside_is_not_a_checkpoint_and_is_cleaned_up(tmp_path: Path):
    folder = CheckpointFolder(tmp_path)
    save(folder, 10)
    (folder.staging(20) / "checkpoint-20").mkdir(parents=True)
    (tmp_path / ".deleting-checkpoint-5").mkdir()
    assert folder.latest() == tmp_path / "checkpoint-10"
    folder.clean()
    assert names(folder) == ["checkpoint-10"]


def test_rotation_keeps_the_newest(tmp_path: Path):
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in (2, 10, 9, 100):
        save(folder, step)
    assert names(folder) == ["checkpoint-10", "checkpoint-100"]


def test_rotation_never_deletes_the_last_whole_checkpoint(tmp_path: Path):
    folder = CheckpointFolder(tmp_path, keep=1)
    save(folder, 10)
    for step in (20, 30):
        (tmp_path / f"checkpoint-{step}").mkdir()
    folder._rotate()
    assert folder.latest() == tmp_path / "checkpoint-10"


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path: Path):
    folder = CheckpointFolder(tmp_path)
    (save(folder, 10) / "weights").unlink()
    save(folder, 10)
    assert folder.latest() == tmp_path / "checkpoint-10"


@pytest.fixture
def no_large_files():
    """Lets the operating system fail every write beyond 100 kB, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("writer", ["torch", "safetensors", "bytes"])
def test_failed_write_is_one_line_and_leaves_nothing_half_written(tmp_path: Path, no_large_files, writer: str):
    weights = torch.zeros(100_000)
    aside = tmp_path / ".saving-5"
    with pytest.raises(UserError) as raised, saving("the checkpoint of step 5", aside, "checkpoint-4 is intact"):
        aside.mkdir()
        if writer == "torch":
            torch.save(weights, aside / "weights")
        elif writer == "safetensors":
            save_file({"weights": weights}, aside / "weights")
        else:
            (aside / "weights").write_bytes(bytes(weights.numpy()))
    message = str(raised.value)
    assert message.startswith(f"could not save the checkpoint of step 5 in {tmp_path}")
    assert message.endswith("checkpoint-4 is intact")
    assert "\n" not in message
    assert not aside.exists()


def test_full_disk_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="the disk is full"), saving("it", tmp_path / "aside", "nothing is lost"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_mistakes_of_the_program_stay_what_they_are(tmp_path: Path):
    with pytest.raises(RuntimeError, match="shape"), saving("it", tmp_path / "aside", "nothing is lost"):
        raise RuntimeError("shape mismatch")
