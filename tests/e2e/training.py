"""The training command that the end-to-end tests share, and how its runs are compared."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests import commands

# Sixty steps last a few seconds: long enough to be killed in the middle, wherever that is.
SETTINGS = [
    "debug=default",
    "model.layer_types=0_2_2_3",
    "model.attention_dropout=0.1",
    "data.block_size=32",
    "trainer.max_steps=60",
    "trainer.global_batch_size=8",
    "trainer.micro_batch_size=4",
    "trainer.logging_steps=4",
    "trainer.save_steps=6",
    "trainer.eval_steps=30",
    "trainer.sample_steps=30",
    "trainer.sample_tokens=8",
    "optim.learning_rate=0.003",
]

_CLOCK = {"seconds", "eta_seconds", "tokens_per_second", "peak_memory_bytes"}


def command(corpus: Path, run_dir: Path, *settings: str) -> list[str]:
    data = ["data=files", f"data.files={corpus}"]
    return [sys.executable, "-m", "lckv.train", *SETTINGS, *data, f"run_dir={run_dir}", *settings]


def run(arguments: list[str], cwd: Path, num_processes: int = 1) -> subprocess.CompletedProcess[str]:
    return commands.run(arguments, cwd, timeout=100, num_processes=num_processes)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def learned(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics without what the clock and the machine have to do with."""
    return [{name: line[name] for name in line if name not in _CLOCK} for line in read_metrics(run_dir)]
