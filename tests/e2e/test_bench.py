"""`scripts/bench.py` times what it says: the plain schedule beside it computes the same function."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

from tests import commands
from tests.reference import tiny_model, token_ids

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench.py"


def test_prints_a_row_per_model(tmp_path: Path) -> None:
    options = ["--rounds", "1", "--hidden-size", "64", "--length", "16", "--batch-size", "1", "--vocab-size", "64"]
    command = [sys.executable, str(SCRIPT), "--patterns", "0_0_2", "1_1_2", *options]
    process = commands.run(command, tmp_path)
    assert process.returncode == 0, process.stderr
    rows = [line.split("│")[1].strip() for line in process.stdout.splitlines() if line.startswith("│")]
    assert rows == ["transformers' Llama", "0_0_2", "1_1_2", "1_1_2, plain", "1_1_2, plain, masked"]


@pytest.mark.parametrize("schedule", ["plain", "plain, masked"])
def test_plain_schedule_computes_the_same(schedule: str) -> None:
    model, plain = tiny_model("0_3_3_3_4"), tiny_model("0_3_3_3_4")
    plain.model.__class__ = runpy.run_path(str(SCRIPT))["PLAIN"][schedule]
    input_ids = token_ids(2, 20)
    losses = [each(input_ids=input_ids, labels=input_ids).loss for each in (model, plain)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    for (name, mine), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, msg=lambda text, name=name: f"{name}: {text}")
