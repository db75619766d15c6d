"""Whatever ends a process in the midst of writing: what was there stays, or what is new is there whole; no litter."""

import errno
import os
import platform
import resource
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors_torch

from lckv.errors import UserError
from lckv.utils import storage
from lckv.utils.storage import (
    check_folder,
    check_new_folder,
    clear_away,
    locked,
    new_file,
    new_folder,
    numbered,
    save_tensors,
)

KINDS = ["file", "folder", "replaced folder"]


def write(kind: str, path: Path, text: str) -> None:
    if kind == "file":
        with new_file(path) as file:
            file.write_text(text)
        return
    with new_folder(path, replaces=kind == "replaced folder") as folder:
        (folder / "sub").mkdir()
        for name in ("a", "sub/b"):
            (folder / name).write_text(text)
            assert not (path / name).exists() or (path / name).read_text() != text


def read(path: Path) -> str | None:
    """What is there, if it is there as a whole."""
    if not path.exists():
        return None
    if path.is_file():
        return path.read_text()
    assert (path / "a").read_text() == (path / "sub/b").read_text()
    return (path / "a").read_text()


def start(kind: str, path: Path) -> str | None:
    """What is there before the test; a folder that must not be replaced begins with nothing."""
    if kind != "folder":
        write(kind, path, "before")
    return read(path)


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def no_large_files():
    """Lets the operating system fail every write beyond 100 kB, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_is_new_takes_the_place_of_what_was_there(tmp_path, kind):
    start(kind, tmp_path / "out")
    write(kind, tmp_path / "out", "after")
    assert read(tmp_path / "out") == "after" and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError("mistake"), KeyboardInterrupt()])
def test_an_exception_leaves_what_was_there(tmp_path, kind, error, monkeypatch):
    before = start(kind, tmp_path / "out")
    monkeypatch.setattr(storage, "_sync", lambda path: (_ for _ in ()).throw(error))
    with pytest.raises(type(error)):
        write(kind, tmp_path / "out", "after")
    assert read(tmp_path / "out") == before and os.listdir(tmp_path) == ["out"] * (before is not None)


def test_a_full_disk_leaves_what_was_there(tmp_path, kind, no_large_files):
    before = start(kind, tmp_path / "out")
    with pytest.raises(OSError) as raised:
        write(kind, tmp_path / "out", "x" * 200_000)
    assert storage.why_not_written(raised.value) == "File too large"
    assert read(tmp_path / "out") == before and os.listdir(tmp_path) == ["out"] * (before is not None)


@pytest.mark.parametrize("num_calls", range(5))
@pytest.mark.parametrize("call", ["_sync", "replace"])
def test_a_kill_at_any_moment_loses_nothing(tmp_path, kind, call, num_calls):
    before = start(kind, tmp_path / "out")
    if (pid := os.fork()) == 0:
        place = storage if call == "_sync" else os
        original, count = getattr(place, call), iter(range(100))

        def die(*args):
            if next(count) == num_calls:
                os.kill(os.getpid(), signal.SIGKILL)
            original(*args)

        setattr(place, call, die)
        write(kind, tmp_path / "out", "after")
        os._exit(0)
    os.waitpid(pid, 0)
    if kind != "replaced folder":
        assert read(tmp_path / "out") in (before, "after")
    clear_away(tmp_path)
    found = read(tmp_path / "out")
    assert found in (before, "after") and os.listdir(tmp_path) == ["out"] * (found is not None)
    if kind != "folder":
        write(kind, tmp_path / "out", "again")
        assert read(tmp_path / "out") == "again" and os.listdir(tmp_path) == ["out"]


def test_only_what_the_dead_of_this_machine_left_is_cleared_away(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    here, folder = platform.node(), tmp_path / "out"
    gone = [f".out.{kind}-{here}-{dead.pid}-01234567" for kind in ("partial", "deleted")]
    kept = [f".out.partial-{here}-{os.getpid()}-01234567", f".out.partial-other-{dead.pid}-01234567"]
    kept += [f".else.partial-{here}-{dead.pid}-01234567", ".out.partial-of-mine"]
    for name in (*gone, *kept):
        (tmp_path / name).mkdir()
    write("folder", folder, "text")
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "out"])


@pytest.mark.parametrize("place", ["missing", "empty", "link", "deeper/than/there/is"])
def test_a_folder_appears_where_there_is_room_for_it(tmp_path, place):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    write("folder", tmp_path / place, "text")
    assert read(tmp_path / place) == "text" and (tmp_path / "link").is_symlink()


def test_two_that_write_the_same_do_not_disturb_each_other(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"^out=.*/out: something else was written there meanwhile; name .*\Z"):
        with new_folder(out) as first:
            (first / "a").write_text("1")
            with new_folder(out) as second:
                assert (first / "a").read_text() == "1"
                (second / "b").write_text("2")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(out) == ["b"]


def test_a_folder_that_cannot_be_replaced_comes_back(tmp_path, monkeypatch):
    start("replaced folder", tmp_path / "out")
    replace, count = os.replace, iter(range(9))

    def fail_at_the_second(*args):
        if next(count) == 1:
            raise OSError(errno.EIO, "no")
        replace(*args)

    monkeypatch.setattr(os, "replace", fail_at_the_second)
    with pytest.raises(OSError):
        write("replaced folder", tmp_path / "out", "after")
    assert read(tmp_path / "out") == "before" and os.listdir(tmp_path) == ["out"]


def test_places_where_something_would_be_lost_are_refused(tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for given, reason in {
        tmp_path / "full": "is not empty",
        tmp_path / "full/b/..": "is not empty",
        tmp_path / "full/a": f"{tmp_path}/full/a is a file",
        tmp_path / "full/a/b/c": f"{tmp_path}/full/a is a file",
        Path("."): "is the current folder, or holds it",
        Path("new/.."): "is the current folder, or holds it",
        Path(".."): "is the current folder, or holds it",
    }.items():
        with pytest.raises(UserError) as error:
            check_new_folder(given)
        assert str(error.value).startswith(f"out={given}: {reason}; name a folder") and "\n" not in str(error.value)
    for name in ("new", "new/newer", tmp_path / "empty/new"):
        check_new_folder(Path(name))
    assert not any(Path().iterdir())


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no place where nobody can make a folder")
@pytest.mark.parametrize("place", ["/proc/nope", "/proc", "n" * 250])
def test_folders_that_cannot_be_written_are_found_by_trying(place):
    with pytest.raises(UserError, match=rf"^out={place}: cannot be written to \(.+\); name another folder$"):
        check_folder(Path(place), f"out={place}")


def test_of_two_processes_one_is_let_in(tmp_path):
    told = []
    with locked(tmp_path / "lock"), locked(tmp_path / "lock"):  # one process may come in again
        if (pid := os.fork()) == 0:
            try:
                with locked(tmp_path / "lock", wait=0):
                    os._exit(0)
            except TimeoutError:
                os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    with locked(tmp_path / "lock", on_wait=lambda: told.append("waited")):
        assert told == []


@pytest.mark.parametrize("writer", ["torch", "safetensors", "bytes"])
def test_what_a_full_disk_does_to_every_writer_is_said_alike(tmp_path, no_large_files, writer):
    weights = torch.zeros(100_000)
    with pytest.raises((OSError, RuntimeError)) as raised, new_file(tmp_path / "weights") as file:
        if writer == "torch":
            torch.save(weights, file)
        elif writer == "safetensors":
            save_tensors({"weights": weights}, file, {})
        else:
            file.write_bytes(bytes(weights.numpy()))
    assert storage.why_not_written(raised.value) and os.listdir(tmp_path) == []


def test_mistakes_of_the_program_are_no_failures_to_write(tmp_path, monkeypatch):
    assert storage.why_not_written(RuntimeError("shape mismatch")) is None
    assert storage.why_not_written(OSError(errno.ENOSPC, "No space left on device")) == "the disk is full"

    def save_file(*args, **options):
        raise SafetensorError("some bug")

    monkeypatch.setattr(safetensors_torch, "save_file", save_file)
    with pytest.raises(SafetensorError, match="some bug"):
        save_tensors({}, tmp_path / "a", {})


def test_numbers_follow_a_name():
    places = numbered(Path("runs/a"))
    assert [str(next(places)) for _ in range(3)] == ["runs/a", "runs/a-2", "runs/a-3"]
