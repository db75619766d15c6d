"""`python -m lckv.search` as a user runs it."""

import json

import pytest

from lckv import search
from lckv.commands import cli
from tests.e2e.conftest import write_corpus
from tests.unit.conversion.sources import random_source, save_source

SMALL = ("data.block_size=32", "calibration_tokens=512", "eval_tokens=64", "validation_tokens=128", "num_threads=1")
TEXT = ("data=files", "data.files=corpus/*.txt")
POINT = ("--config-dir", "found", "experiment=kv_3_of_5")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The folder that commands run in, with a model and text for it."""
    monkeypatch.chdir(tmp_path)
    save_source(tmp_path / "mine", random_source(5))
    write_corpus(tmp_path / "corpus")
    return tmp_path


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command in this process, and returns its exit code and what it printed."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["search", *arguments])
        capsys.readouterr()
        try:
            cli.run(search.main, "search")
        except SystemExit as stop:
            return stop.code, *capsys.readouterr()
        return 0, *capsys.readouterr()

    return run


def test_a_pattern_is_proposed_and_can_be_looked_at(run_module, folder):
    done = run_module("lckv.search", "source=mine", *TEXT, *SMALL, "budget=0.6", "out=found")
    assert done.returncode == 0, done.stderr
    assert "cla, groups of 2" in done.stdout
    figures = json.loads((folder / "found" / "search.json").read_text())
    best = figures["frontier"][-1]
    assert best["num_owners"] == 3 and f"3 of 5: {best['layer_types']}\n" in done.stdout
    assert "python -m lckv.train --config-dir found experiment=kv_3_of_5\n" in done.stderr
    plan = run_module("lckv.plan", *POINT, "kv_dtype=float32", "json=true")
    assert plan.returncode == 0, plan.stderr
    described = json.loads(plan.stdout)
    assert described["layer_types"] == best["layer_types"]
    assert described["costs"]["kv_bytes"]["written"] == best["kv_bytes_per_token"] == 3 * 2 * 16 * 4


def test_what_was_found_can_be_trained_and_is_never_overwritten(run_module, command, folder):
    search_again = ("source=mine", *TEXT, *SMALL, "budget=0.6", "out=found", "baselines=false")
    code, out, err = command(*search_again)
    assert code == 0, err
    settings = ("debug=default", "trainer.max_steps=1", "run_dir=run")
    trained = run_module("lckv.train", *POINT, *settings)
    assert trained.returncode == 0, trained.stderr
    layer_types = json.loads((folder / "run" / "model" / "config.json").read_text())["kv_sharing"]
    assert f"3 of 5: {layer_types}\n" in out
    code, out, err = command(*search_again)
    assert (code, out) == (2, "")
    assert err == "lckv.search: error: out=found: is not empty; name a folder that is not there yet\n"


def test_ctrl_c_leaves_what_there_is(command, folder, monkeypatch):
    from lckv.conversion.search_session import SharingSearch

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(SharingSearch, "_evaluate", interrupt)
    without_calibration = [each for each in SMALL if not each.startswith("calibration_tokens")]
    code, out, _ = command("source=mine", *TEXT, *without_calibration, "budget=0.6", "method=average")
    assert code == 130 and "3 of 5: " in out
    found = folder / "runs" / "search" / "mine-average-0.6"
    assert json.loads((found / "search.json").read_text())["is_interrupted"]
    assert (found / "experiment" / "kv_3_of_5.yaml").is_file()
    assert [path.name for path in found.parent.iterdir()] == [found.name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["budget=0.5"], "source: give one"),
        (["source=mine"], "budget=null: allowed is a fraction"),
        (["source=mine", "budget=150%"], "budget="),
        (["source=mine", "budget=0.5", "method=subspce"], "method='subspce': allowed are inherit, average, "),
        (["source=mine", "budget=0.1"], "budget=0.1: is too little"),
        (["source=nowhere", "budget=0.5"], "source=nowhere: there is no such folder"),
        (["source=mine", "budget=0.5", "direction=up"], "unknown key 'direction'; did you mean 'directions'?"),
    ],
)
def test_mistakes_are_one_line_each(command, folder, arguments, message):
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith(f"lckv.search: error: {message}") and err.count("\n") == 1
    assert not (folder / "runs").exists()
