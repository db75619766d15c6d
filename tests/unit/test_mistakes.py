"""A table of mistakes, `tests/mistakes.txt`, and the one line that each is answered with before torch is loaded."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lckv.hydra_store import SCHEMAS
from tests.answers import FILE, read_mistakes


@pytest.mark.parametrize("command", SCHEMAS)
def test_mistakes_are_answered_as_the_table_says(command: str) -> None:
    program = [sys.executable, "-m", "tests.answers", command]
    done = subprocess.run(program, cwd=Path(FILE).parents[1], capture_output=True, text=True, timeout=55)
    assert done.returncode == 0, done.stderr  # torch was asked for, if nothing else
    expected = [str(mistake) for mistake in read_mistakes() if mistake.command == command]
    assert expected and json.loads(done.stdout.splitlines()[-1]) == expected
