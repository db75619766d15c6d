"""`python -m lckv.train` from the command line to the run folder."""

import json
from pathlib import Path

import pytest
import yaml

from lckv import train
from lckv.commands import cli
from tests.e2e import training
from tests.e2e.conftest import FinishedRun

pytestmark = pytest.mark.timeout(150)  # the first test to come trains the run that all of them look at


def test_run_folder_has_everything(finished_run: FinishedRun) -> None:
    folder = finished_run.folder
    names = {path.name for path in folder.iterdir()}
    files = {"config.yaml", "data.json", "metrics.jsonl", "results.json", "loss.png"}
    assert names == files | {".lock", "checkpoints", "model"}
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["layer_types"] == "0_2_2_3"
    assert config["trainer"]["max_steps"] == 60
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["checkpoint-54", "checkpoint-60"]


def test_model_learns_and_the_results_say_so(finished_run: FinishedRun) -> None:
    results = json.loads((finished_run.folder / "results.json").read_text())
    train_losses = [line["loss"] for line in training.read_metrics(finished_run.folder) if "loss" in line]
    assert train_losses[-1] < train_losses[0] - 1
    assert results["eval_perplexity"] < results["unigram_perplexity"]
    assert 0 < results["eval_bits_per_byte"] < 8
    assert results["kv_residual"] >= 0
    assert results["eval_forward_passes"] == "converge"
    assert results["steps"] == 60


def test_output_ends_with_results_places_and_what_to_type_next(finished_run: FinishedRun) -> None:
    output = finished_run.stdout
    for part in ("validation perplexity", "unigram", "bits per byte", "KV bytes per token", "sample", "peak memory"):
        assert part in output
    for name in ("loss.png", "results.json", "metrics.jsonl", "checkpoints", "model"):
        assert str(finished_run.folder / name) in output
    assert output.index("next:") > output.index("loss.png")
    assert "python -m lckv.train debug=default" in output
    assert "Traceback" not in finished_run.stderr


def test_finished_run_shows_its_results_again(finished_run: FinishedRun, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished_run.folder.rglob("*")}
    arguments = training.command(finished_run.corpus, finished_run.folder)[3:]
    train.main(cli.compose(arguments))
    output = capsys.readouterr().out
    assert "this run is finished" in output
    assert "validation perplexity" in output
    after = {path: path.stat().st_mtime_ns for path in finished_run.folder.rglob("*")}
    assert {path: time for path, time in after.items() if path.is_file()} == {
        path: time for path, time in before.items() if path.is_file()
    }


def test_run_folder_of_another_config_is_refused_in_one_line(finished_run: FinishedRun, tmp_path: Path) -> None:
    arguments = training.command(finished_run.corpus, finished_run.folder, "optim.learning_rate=0.5", "seed=3")
    process = training.run(arguments, cwd=tmp_path)
    assert process.returncode == 2
    for different in "optim.learning_rate=0.5 (there: 0.003), ", ", seed=3 (there: 0)":
        assert different in process.stderr
    assert "another run_dir=" in process.stderr
    assert len(process.stderr.strip().splitlines()) == 1
