"""`python -m lckv.train teacher.source=...`: from the command line to the results, killed and resumed, in parallel."""

import json
import sys
from pathlib import Path

import pytest

from lckv import train
from lckv.commands import cli
from lckv.errors import UserError
from tests.e2e import training
from tests.e2e.conftest import FinishedRun
from tests.e2e.test_resume import assert_same_run, kill_when

pytestmark = pytest.mark.timeout(250)

PARTS = ("loss_logits", "loss_attention", "loss_labels")
LATENTS = (
    "latent=separate",
    "latent.dim=[8,12]",
    "teacher.attention_weight=0",
    "teacher.reconstruction_weight=1",
    "optim.name=riemannian_adam",
)


def command(teacher: FinishedRun, folder: Path, *settings: str) -> list[str]:
    """Trains another pattern against the run that all tests share."""
    pattern = ["model.layer_types=0_0_2_2", f"teacher.source={teacher.folder}"]
    return training.command(teacher.corpus, folder, *pattern, *settings)


def test_a_student_learns_from_a_run_folder(
    finished_run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    train.main(cli.compose(command(finished_run, folder, "trainer.max_steps=30", "trainer.trainable=qkv")[3:]))
    lines = [line for line in training.read_metrics(folder) if "loss" in line]
    assert lines[-1]["loss"] < 0.95 * lines[0]["loss"]
    assert all(line["loss"] == pytest.approx(line["loss_logits"] + line["loss_attention"]) for line in lines)
    results = json.loads((folder / "results.json").read_text())
    assert {name: results[name] for name in PARTS} == {name: lines[-1][name] for name in PARTS}
    output = capsys.readouterr().out
    assert f"logits {lines[-1]['loss_logits']:.4f}, attention {lines[-1]['loss_attention']:.4f}, labels" in output
    assert f"{results['num_trained_parameters']:,} of them trained" in output


@pytest.mark.slow
def test_killed_and_resumed_is_the_undisturbed_run_bit_for_bit(finished_run: FinishedRun, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train.main(cli.compose(command(finished_run, whole)[3:]))
    arguments = command(finished_run, killed)
    kill_when(lambda: (killed / "checkpoints" / "checkpoint-18").exists(), arguments, tmp_path)
    process = training.run(arguments, cwd=tmp_path)
    assert process.returncode == 0, process.stdout + process.stderr
    assert f"going on from {killed}/checkpoints/checkpoint-" in process.stdout
    assert_same_run(whole, killed)


@pytest.mark.parametrize(
    "weights",
    [
        pytest.param((), id="all"),
        pytest.param(LATENTS, id="latents"),
        pytest.param(("teacher.logits_weight=0",), id="attention", marks=pytest.mark.slow),
    ],
)
def test_two_processes_give_the_curve_of_one(
    finished_run: FinishedRun, tmp_path: Path, weights: tuple[str, ...]
) -> None:
    alike = ["model.attention_dropout=0", "trainer.max_steps=8", "trainer.sample_steps=null", *weights]
    one, two = tmp_path / "one", tmp_path / "two"
    train.main(cli.compose(command(finished_run, one, *alike)[3:]))
    arguments = command(finished_run, two, *alike, "trainer.micro_batch_size=2")
    process = training.run(arguments, tmp_path, num_processes=2)
    assert process.returncode == 0, process.stdout + process.stderr
    for mine, theirs in zip(training.read_metrics(one), training.read_metrics(two), strict=True):
        for name in ("step", "loss", "eval_loss", "grad_norm", "loss_reconstruction", *PARTS):
            assert theirs.get(name) == pytest.approx(mine.get(name), abs=1e-5)


def test_teacher_with_other_tokens_is_refused_in_one_line(finished_run: FinishedRun, tmp_path: Path) -> None:
    arguments = command(finished_run, tmp_path / "run", "tokenizer.vocab_size=270")[3:]
    with pytest.raises(UserError, match=r"^teacher\.source=.*: its tokenizer has other tokens") as raised:
        train.main(cli.compose(arguments))
    assert "\n" not in str(raised.value)


def test_teacher_that_is_not_there_is_refused_in_one_line(finished_run: FinishedRun, tmp_path: Path) -> None:
    arguments = command(finished_run, tmp_path / "run", "teacher.source=nowhere")
    process = training.run([sys.executable, *arguments[1:]], cwd=tmp_path)
    assert process.returncode == 2
    error = [line for line in process.stderr.splitlines() if "WARNING" not in line]
    assert len(error) == 1
    assert "error: teacher.source=nowhere: there is no such folder" in error[0]
