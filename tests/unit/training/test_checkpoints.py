import errno
import os
from pathlib import Path

import pytest

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


@pytest.mark.parametrize(
    ("name", "left"),
    [("manifest.json", None), ("manifest.json", '{"weights": 2'), ("weights", "w"), ("part/state", None)],
)
def test_damaged_checkpoint_is_never_picked_up(
    tmp_path: Path, name: str, left: str | None, caplog: pytest.LogCaptureFixture
):
    folder = CheckpointFolder(tmp_path)
    save(folder, 10)
    damaged = save(folder, 20) / name
    damaged.unlink() if left is None else damaged.write_text(left)
    assert folder.latest() == tmp_path / "checkpoint-10"
    assert "checkpoint-20" in caplog.text


def test_what_is_written_aside_is_not_a_checkpoint_and_is_cleaned_up(tmp_path: Path):
    folder = CheckpointFolder(tmp_path)
    save(folder, 10)
    (folder.staging(20) / "checkpoint-20").mkdir(parents=True)
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


def test_failed_write_is_one_line(tmp_path: Path):
    with pytest.raises(UserError) as raised, saving("the checkpoint of step 5", tmp_path / "run", "nothing is lost"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    start = f"could not save the checkpoint of step 5 in {tmp_path}/run: the disk is full ("
    assert str(raised.value).startswith(start) and str(raised.value).endswith(" MB are free); nothing is lost")


def test_mistakes_of_the_program_stay_what_they_are(tmp_path: Path):
    with pytest.raises(RuntimeError, match="shape"), saving("it", tmp_path, "nothing is lost"):
        raise RuntimeError("shape mismatch")
