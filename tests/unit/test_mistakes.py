"""A table of mistakes, `tests/mistakes.txt`, and the one line that each is answered with before torch is loaded."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lckv.commands.hydra_store import SCHEMAS
from tests.answers import FILE, read_mistakes


@pytest.mark.timeout(180)
def test_mistakes_are_answered_as_the_table_says() -> None:
    program = [sys.executable, "-m", "tests.answers"]  # one process for all: to import is most of a short one's work
    done = subprocess.run(program, cwd=Path(FILE).parents[1], capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    expected = list(read_mistakes())
    assert {mistake.command for mistake in expected} == set(SCHEMAS)
    assert json.loads(done.stdout.splitlines()[-1]) == [str(mistake) for mistake in expected]
