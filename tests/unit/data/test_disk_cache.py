"""The cache on disk: whole folders or none, whatever happens to the process that writes."""

import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from lckv.data.cache import NpyWriter, find_cache_dir, fingerprint, load_or_build
from lckv.errors import UserError


def load(folder: Path) -> str:
    return (folder / "a.txt").read_text() + (folder / "sub/b.txt").read_text()


def write(folder: Path, text: str = "content") -> None:
    (folder / "a.txt").write_text(text[:3])
    (folder / "sub").mkdir()
    (folder / "sub/b.txt").write_text(text[3:])


def refuse(folder: Path) -> None:
    raise AssertionError("was built again")


def test_is_built_once_and_found_again(tmp_path: Path) -> None:
    folder = tmp_path / "deep/er/key"
    assert load_or_build(folder, write, load) == "content"
    assert load_or_build(folder, refuse, load) == "content"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["key", "key.lock"]


@pytest.mark.parametrize("damage", ["truncate", "overwrite", "remove", "add", "no manifest", "broken manifest"])
def test_a_damaged_folder_is_built_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "key"
    load_or_build(folder, write, load)
    match damage:
        case "truncate":
            (folder / "sub/b.txt").write_text("")
        case "overwrite":
            (folder / "sub/b.txt").write_text("TENT")
        case "remove":
            (folder / "a.txt").unlink()
        case "add":
            (folder / "c.txt").write_text("")
        case "no manifest":
            (folder / "manifest.json").unlink()
        case "broken manifest":
            (folder / "manifest.json").write_text('{"a.txt"')
    assert load_or_build(folder, write, load) == "content"
    assert "building it again" in caplog.text
    assert load_or_build(folder, refuse, load) == "content"


def _build_slowly(folder: Path, builders: Path, results) -> None:
    def build(temporary: Path) -> None:
        (builders / str(os.getpid())).touch()
        time.sleep(0.2)
        write(temporary)

    results.put(load_or_build(folder, build, load))


def test_of_processes_that_ask_at_once_one_builds(tmp_path: Path) -> None:
    builders = tmp_path / "builders"
    builders.mkdir()
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    arguments = (tmp_path / "cache/key", builders, results)
    processes = [context.Process(target=_build_slowly, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [results.get() for _ in processes] == ["content"] * 3
    assert len(list(builders.iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to the cache '.*file/cache'.*data\.cache_dir or \$LCKV_CACHE"):
        load_or_build(tmp_path / "file/cache/key", write, load)


def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        write(folder)
        with open("/dev/full", "w") as file:
            file.write("x")

    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(UserError, match="No space left on device"):
        load_or_build(tmp_path / "key", fill, load)
    assert [path.name for path in tmp_path.iterdir()] == ["key.lock"]


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LCKV_CACHE", str(tmp_path))
    assert find_cache_dir() == tmp_path
    assert find_cache_dir("/else/where") == Path("/else/where")
    monkeypatch.delenv("LCKV_CACHE")
    assert find_cache_dir() == Path.home() / ".cache/lckv"


def test_fingerprints_tell_content_apart() -> None:
    assert fingerprint("a", 1, {"x": 1, "y": 2}) == fingerprint("a", 1, {"y": 2, "x": 1})
    assert len({fingerprint(*parts) for parts in (["a", "b"], ["ab"], [["a", "b"]], ["a", "b", None])}) == 4


@pytest.mark.parametrize("num_rows", [0, 1, 1000])
def test_rows_are_written_as_numpy_reads_them(tmp_path: Path, num_rows: int) -> None:
    rows = np.arange(num_rows * 3).reshape(num_rows, 3)
    writer = NpyWriter(tmp_path / "x.npy", 3, np.dtype(np.uint16))
    for part in np.array_split(rows, 4):
        writer.append(part)
    writer.close()
    found = np.load(tmp_path / "x.npy", mmap_mode="r" if num_rows else None)
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, rows)
