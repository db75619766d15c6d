"""`scripts/bench.py` times what it says."""

import sys
from pathlib import Path

from tests import commands

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench.py"


def test_prints_a_row_per_model_and_schedule(tmp_path: Path) -> None:
    options = ["--rounds", "1", "--hidden-size", "64", "--length", "16", "--batch-size", "1", "--vocab-size", "64"]
    command = [sys.executable, str(SCRIPT), "--patterns", "0_0_2", "1_1_2", "--schedules", "3+2", "0+1x4", *options]
    process = commands.run(command, tmp_path)
    assert process.returncode == 0, process.stderr
    rows = [line.split("│")[1].strip() for line in process.stdout.splitlines() if line.startswith("│")]
    assert rows == ["transformers' Llama", "0_0_2", "1_1_2 3+2", "1_1_2 0+1x4"]
