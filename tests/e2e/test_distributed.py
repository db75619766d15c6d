"""Two processes and one: the same loss curve."""

import json
import shutil
from pathlib import Path

import pytest

from lckv import train
from lckv.commands import cli
from tests.e2e import training
from tests.e2e.conftest import FinishedRun

# Dropout draws other random numbers in every process.
ALIKE = ["model.attention_dropout=0", "trainer.max_steps=12", "trainer.eval_steps=6", "trainer.save_steps=6"]


def assert_same_curve(first: Path, second: Path) -> None:
    one, other = training.read_metrics(first), training.read_metrics(second)
    assert [line["step"] for line in one] == [line["step"] for line in other]
    for mine, theirs in zip(one, other, strict=True):
        for name in ("loss", "eval_loss", "grad_norm", "tokens"):
            assert theirs.get(name) == pytest.approx(mine.get(name), abs=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(250)
def test_two_processes_draw_the_same_patterns(finished_run: FinishedRun, tmp_path: Path) -> None:
    """Projections that nobody reads in a step have no gradient in any process, and rest."""
    one, two = tmp_path / "one", tmp_path / "two"
    random = [
        *ALIKE,
        "sharing=random",
        "sharing.probability=0.5",
        "model.layer_types=null",
        "model.num_hidden_layers=4",
    ]
    train.main(cli.compose(training.command(finished_run.corpus, one, *random)[3:]))
    arguments = training.command(finished_run.corpus, two, *random, "trainer.micro_batch_size=2")
    process = training.run(arguments, tmp_path, num_processes=2)
    assert process.returncode == 0, process.stdout + process.stderr
    assert_same_curve(one, two)
    owners = [[line.get("kv_owners") for line in training.read_metrics(run)] for run in (one, two)]
    assert owners[0] == owners[1] and len(set(owners[0])) > 2


@pytest.mark.timeout(250)
def test_two_processes_give_the_curve_of_one(finished_run: FinishedRun, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    train.main(cli.compose(training.command(finished_run.corpus, one, *ALIKE)[3:]))
    # Other micro batches than alone: 2 of 2 blocks in each of 2 processes, not 2 of 4.
    arguments = training.command(finished_run.corpus, two, *ALIKE, "trainer.micro_batch_size=2")
    process = training.run(arguments, tmp_path, num_processes=2)
    assert process.returncode == 0, process.stdout + process.stderr
    assert_same_curve(one, two)
    assert json.loads((two / "results.json").read_text())["num_processes"] == 2
    assert process.stdout.count("validation perplexity") == 1
    # One process goes on with what two have begun.
    (two / "results.json").unlink()
    shutil.rmtree(two / "checkpoints" / "checkpoint-12")
    train.main(cli.compose(training.command(finished_run.corpus, two, *ALIKE, "trainer.micro_batch_size=2")[3:]))
    assert_same_curve(one, two)
    assert json.loads((two / "results.json").read_text())["num_processes"] == 1
