"""One undisturbed training run, which the end-to-end tests look at and compare theirs with."""

import random
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e import training


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text files, one document each."""
    words = "in the beginning was the word and the light shone upon the face of the deep waters".split()
    rng = random.Random(0)
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(60):
        start = rng.randrange(len(words))
        text = " ".join(words[(start + position) % len(words)] for position in range(rng.choice([5, 20, 200])))
        (folder / f"{number:02}.txt").write_text(text)
    return folder / "*.txt"


@dataclass
class FinishedRun:
    folder: Path
    process: subprocess.CompletedProcess[str]
    corpus: Path


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, corpus: Path, cache_dir: Path) -> FinishedRun:
    folder = tmp_path_factory.mktemp("finished") / "run"
    process = training.run(training.command(corpus, folder), cwd=folder.parent)
    assert process.returncode == 0, process.stdout + process.stderr
    return FinishedRun(folder, process, corpus)
