"""`python -m lckv.train -m`: several runs, one after the other and at once, of which some fail or are killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from joblib import cpu_count

from tests.e2e import training
from tests.e2e.conftest import FinishedRun
from tests.e2e.test_resume import kill_when

# Writes how many threads a job has and where; seed 1 has a bug, seed 2 a mistake, seed 3 is killed.
PROGRAM = """
import os, signal
from pathlib import Path
from lckv.commands import cli
from lckv.errors import UserError

def main(cfg):
    if cfg.seed == 1:
        raise ZeroDivisionError("unlucky")
    if cfg.seed == 2:
        raise UserError("seed=2: wrong")
    if cfg.seed == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    import torch
    from lckv.utils.processes import set_num_threads
    set_num_threads(cfg.trainer.num_threads)
    Path(cfg.run_dir + ".txt").write_text(f"{torch.get_num_threads()} {os.getpid()}")

if __name__ == "__main__":
    cli.run(main, "train")
"""


def sweep(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the program above as a sweep into `sweep`, with as many threads as there are unless something says else."""
    (folder / "program.py").write_text(PROGRAM)
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "program.py", "-m", "run_dir=sweep", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100)


def written(folder: Path) -> dict[str, list[str]]:
    return {path.stem: path.read_text().split() for path in (folder / "sweep").glob("*.txt")}


@pytest.mark.timeout(120)
def test_jobs_at_once_share_the_cores_and_fail_alone(tmp_path: Path) -> None:
    process = sweep(tmp_path, "hydra/launcher=local", "seed=0,1,2,4,5")
    assert process.returncode == 2, process.stderr
    threads = written(tmp_path)
    assert sorted(threads) == ["seed=0", "seed=4", "seed=5"]
    assert {number for number, _ in threads.values()} == {str(max(1, cpu_count() // 2))}
    last = process.stderr.splitlines()[-2:]
    assert sorted(last) == [
        "lckv.train: error: seed=1: ZeroDivisionError: unlucky",
        "lckv.train: error: seed=2: seed=2: wrong",
    ]
    assert process.stderr.count("Traceback") == 1  # of the bug


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_given_threads_win_and_a_killed_process_is_one_line(tmp_path: Path) -> None:
    process = sweep(tmp_path, "hydra/launcher=local", "trainer.num_threads=3", "seed=0,4")
    assert process.returncode == 0, process.stderr
    assert {number for number, _ in written(tmp_path).values()} == {"3"}
    process = sweep(tmp_path, "hydra/launcher=local", "seed=3,3")
    assert process.returncode == 2
    assert "lckv.train: error: a process of the sweep was killed; the same command again goes on" in process.stderr
    assert "Traceback" not in process.stderr


def test_slurm_gets_one_array_that_may_be_queued_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    refusing = "for last; do :; done; cp $last submitted; echo 'sbatch: invalid partition: gpu' >&2; exit 1"
    for name, script in (("srun", ""), ("sbatch", refusing)):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    process = sweep(tmp_path, "hydra/launcher=slurm", "hydra.launcher.partition=gpu", "seed=0,1,2")
    assert process.returncode == 2
    assert process.stderr.endswith("lckv.train: error: the launcher has failed: sbatch: invalid partition: gpu\n")
    assert "Traceback" not in process.stderr
    lines = (tmp_path / "submitted").read_text().splitlines()
    for option in ("--array=0-2%3", "--partition=gpu", "--requeue", "--signal=USR2@120", "--time=240"):
        assert f"#SBATCH {option}" in lines


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_jobs_by_submitit(tmp_path: Path) -> None:
    process = sweep(tmp_path, "hydra/launcher=slurm_trial", "seed=0,1,2")
    assert process.returncode == 2, process.stderr
    assert sorted(written(tmp_path)) == ["seed=0"]
    errors = [line for line in process.stderr.splitlines() if line.startswith("lckv.train: error: ")]
    assert errors == [
        "lckv.train: error: seed=1: ZeroDivisionError: unlucky",
        "lckv.train: error: seed=2: seed=2: wrong",
    ]


def run_of(sweep_dir: Path, seed: int) -> Path:
    """The folder of the run with this seed, once it has begun to train."""
    runs = (path.parent for path in sweep_dir.glob("*/metrics.jsonl"))
    (folder,) = (path for path in runs if yaml.safe_load((path / "config.yaml").read_text())["seed"] == seed)
    return folder


def files_of(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.timeout(250)
def test_a_killed_sweep_skips_what_is_finished_and_goes_on_with_the_rest(
    finished_run: FinishedRun, tmp_path: Path
) -> None:
    sweep_dir = tmp_path / "sweep"
    patterns = "model.layer_types=0_9_9_9,0_2_2_3"
    arguments = training.command(finished_run.corpus, sweep_dir, "-m", patterns, "seed=0,1")

    def second_has_saved() -> bool:
        return len({path.parent for path in sweep_dir.glob("*/checkpoints/checkpoint-*")}) == 2

    kill_when(second_has_saved, arguments, tmp_path)
    first = run_of(sweep_dir, 0)
    before = files_of(first)
    process = training.run(arguments, cwd=tmp_path)
    assert process.returncode == 2  # for the pattern that cannot be
    assert process.stdout.count("finished: skipped") == 1 and f"finished: skipped {first}" in process.stdout
    assert "going on from" in process.stdout
    assert files_of(first) == before
    assert training.learned(first) == training.learned(finished_run.folder)
    assert json.loads((run_of(sweep_dir, 1) / "results.json").read_text())["steps"] == 60
    failures = [json.loads(path.read_text()) for path in sweep_dir.glob("*/failure.json")]
    assert len(failures) == 2
    assert {failure["type"] for failure in failures} == {"UserError"}
    assert all(failure["error"].startswith("model.layer_types='0_9_9_9': entry 1 is '9'") for failure in failures)
    assert [failure["error"] in process.stderr for failure in failures] == [True, True]
