import json
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from lckv.errors import UserError
from lckv.training.run_folder import RunFolder, flatten

CONFIG = {"seed": 0, "run_dir": "here", "trainer": {"max_steps": 10, "resume": True, "hf": {}}, "betas": (0.9, 0.95)}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "a" / "run")
    folder.claim(CONFIG)
    return folder


def test_claim_writes_the_config_and_lets_the_same_run_go_on(folder: RunFolder):
    folder.append_metrics({"step": 1})
    folder.claim(CONFIG)
    moved = {**CONFIG, "run_dir": "there"}
    folder.claim(moved)
    assert "max_steps: 10" in folder.config.read_text()
    assert "run_dir: here" in folder.config.read_text()


def test_run_of_another_config_is_refused_and_left_as_it_is(folder: RunFolder):
    folder.append_metrics({"step": 1})
    before = folder.config.read_text()
    other = {**CONFIG, "seed": 1, "trainer": {**CONFIG["trainer"], "max_steps": 20}}
    with pytest.raises(UserError) as raised:
        folder.claim(other)
    assert "seed=1 (there: 0)" in str(raised.value)
    assert "trainer.max_steps=20 (there: 10)" in str(raised.value)
    assert "betas" not in str(raised.value)
    assert "another run_dir=" in str(raised.value)
    assert folder.config.read_text() == before


def test_folder_in_which_nothing_has_been_trained_yet_can_be_taken_over(folder: RunFolder):
    folder.claim({**CONFIG, "seed": 1})
    assert "seed: 1" in folder.config.read_text()


def test_of_two_processes_one_trains(folder: RunFolder):
    claim = f"""
from lckv.training.run_folder import RunFolder
RunFolder({str(folder.path)!r}).claim({{**{CONFIG!r}}}, wait=float("WAIT"))
"""
    folder.append_metrics({"step": 1})
    refused, waiting = (
        subprocess.Popen([sys.executable, "-c", claim.replace("WAIT", wait)], stderr=subprocess.PIPE, text=True)
        for wait in ("0", "-1")
    )
    _, err = refused.communicate(timeout=50)
    assert f"UserError: run_dir={folder.path}: another process trains there; wait for it" in err
    assert waiting.poll() is None
    folder.close()
    assert waiting.wait(timeout=50) == 0


def test_whoever_is_refused_leaves_no_failure_with_who_trains(folder: RunFolder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(FileLock, "acquire", raise_timeout)
    other = RunFolder(folder.path)
    with pytest.raises(UserError, match="another process trains there"):
        other.claim(CONFIG, wait=0)
    assert folder.is_open_to(CONFIG) and not other.is_open_to(CONFIG)


def raise_timeout(lock: FileLock, timeout: float) -> None:
    raise Timeout(lock.lock_file)


def test_torn_results_are_named(folder: RunFolder):
    folder.results.write_text('{"eval_loss": ')
    with pytest.raises(UserError, match=r"run/results.json: cannot be read \(.*\); remove it"):
        folder.finished_results()


def test_run_on_other_data_is_refused_and_left_as_it_is(folder: RunFolder):
    folder.claim_data("first")
    folder.claim_data("second")  # nothing has been trained yet
    folder.append_metrics({"step": 1})
    folder.claim_data("second")
    with pytest.raises(UserError, match=r"run_dir=\S+run: holds a run on other data.*another run_dir=") as raised:
        folder.claim_data("third")
    assert "\n" not in str(raised.value)
    assert json.loads(folder.data.read_text()) == {"fingerprint": "second"}


def test_run_without_readable_config_is_refused(folder: RunFolder):
    folder.append_metrics({"step": 1})
    folder.config.write_text("a: [")
    with pytest.raises(UserError, match="config.yaml"):
        folder.claim(CONFIG)
    folder.config.unlink()
    with pytest.raises(UserError, match="config.yaml"):
        folder.claim(CONFIG)


def test_resume_off_refuses_a_folder_that_holds_the_run(folder: RunFolder):
    folder.claim(CONFIG, resume=False)
    folder.append_metrics({"step": 1})
    with pytest.raises(UserError, match="trainer.resume=false"):
        folder.claim(CONFIG, resume=False)


def test_folder_that_cannot_be_written_to_is_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written to"):
        RunFolder(tmp_path / "file" / "run").claim(CONFIG)


def test_metrics_behind_the_checkpoint_and_a_torn_line_are_dropped(folder: RunFolder):
    for step in (1, 2, 2, 3, 4):
        folder.append_metrics({"step": step, "loss": 1.5})
    with folder.metrics.open("a") as file:
        file.write('{"step": 2, "lo')
    assert [line["step"] for line in folder.read_metrics()] == [1, 2, 2, 3, 4]
    folder.truncate_metrics(2)
    assert [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()] == [1, 2, 2]


def test_finished_is_what_has_results(folder: RunFolder):
    assert folder.finished_results() is None
    folder.results.write_text('{"steps": 3}')
    assert folder.finished_results() == {"steps": 3}


def test_flatten_keeps_empty_mappings():
    assert dict(flatten({"a": {"b": 1, "c": {"d": []}}, "e": {}})) == {"a.b": 1, "a.c.d": [], "e": {}}


def test_run_id_is_the_same_when_the_run_goes_on(folder: RunFolder, tmp_path: Path):
    assert folder.run_id() == RunFolder(folder.path).run_id() != RunFolder(tmp_path / "b").run_id()


def test_run_from_before_there_was_a_key_has_its_default(folder: RunFolder):
    folder.append_metrics({"step": 1})
    folder.claim({**CONFIG, "iso": None, "iso_multiple": 8})
    with pytest.raises(UserError, match=r"iso=params \(there: None\)"):
        folder.claim({**CONFIG, "iso": "params", "iso_multiple": 8})


def test_run_of_the_same_config_is_recognised(folder: RunFolder):
    assert folder.holds(CONFIG)
    assert not folder.holds({**CONFIG, "seed": 1})
    assert not RunFolder(folder.path / "elsewhere").holds(CONFIG)
