"""One undisturbed training run, which the end-to-end tests look at and compare theirs with."""

import random
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

from tests.e2e import training


@dataclass
class FinishedRun:
    """A finished run, the text that it was trained on, and what it printed."""

    folder: Path
    corpus: Path
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def finished_run(cache_dir: Path) -> FinishedRun:
    """Trains once; of several test processes, the others wait for the first."""
    shared = cache_dir.with_name("finished_run")
    outputs = [shared / "stdout.txt", shared / "stderr.txt"]
    with FileLock(shared.with_suffix(".lock")):
        if not shared.exists():
            shared.mkdir()
            write_corpus(shared / "corpus")
            process = training.run(training.command(shared / "corpus" / "*.txt", shared / "run"), cwd=shared)
            outputs[0].write_text(process.stdout)
            outputs[1].write_text(process.stderr)
    assert (shared / "run" / "results.json").is_file(), outputs[0].read_text() + outputs[1].read_text()
    return FinishedRun(shared / "run", shared / "corpus" / "*.txt", *(output.read_text() for output in outputs))


def write_corpus(folder: Path) -> None:
    """Text files of very different lengths, one document each, that a small model learns in seconds."""
    folder.mkdir()
    words = "in the beginning was the word and the light shone upon the face of the deep waters".split()
    rng = random.Random(0)
    for number in range(60):
        start = rng.randrange(len(words))
        text = " ".join(words[(start + position) % len(words)] for position in range(rng.choice([5, 20, 200])))
        (folder / f"{number:02}.txt").write_text(text)
