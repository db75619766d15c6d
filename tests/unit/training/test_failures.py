"""A run that fails says why in its folder, and in no other."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from lckv.config import ModelConfig, SharingConfig, TrainConfig
from lckv.errors import UserError
from lckv.training.run_folder import RunFolder, recorded_failure

CONFIG = TrainConfig(sharing=SharingConfig("cla"), model=ModelConfig(num_hidden_layers=4), run_name="mine")


def fail(folder: RunFolder, error: BaseException, cfg: TrainConfig = CONFIG, **options: bool) -> None:
    with pytest.raises(type(error)), recorded_failure(folder, cfg, ["seed=1", "sharing=cla"], **options):
        raise error


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def test_the_reason_is_one_line_with_what_the_run_was(folder):
    fail(folder, RuntimeError("out of memory:\n  tried 8 GiB"))
    assert json.loads(folder.failure.read_text()) == {
        "error": "out of memory: tried 8 GiB",
        "type": "RuntimeError",
        "overrides": ["seed=1", "sharing=cla"],
        "layer_types": "0_0_2_2",
        "run_name": "mine",
    }
    assert [path.name for path in folder.path.iterdir()] == ["failure.json"]
    fail(folder, KeyError())
    assert json.loads(folder.failure.read_text())["error"] == "KeyError"


def test_a_pattern_that_cannot_be_known_is_left_out(folder):
    fail(folder, UserError("wrong"), replace(CONFIG, sharing=SharingConfig("cla", group_size=0)))
    failure = json.loads(folder.failure.read_text())
    assert (failure["type"], failure["layer_types"]) == ("UserError", None)


def test_whoever_stops_a_run_makes_no_failure(folder):
    fail(folder, KeyboardInterrupt())
    assert not folder.path.exists()


def test_mistakes_leave_no_trace_where_none_is_asked_for(folder):
    fail(folder, UserError("x"), keeps_mistakes=False)
    assert not folder.path.exists()
    with folder:
        folder.claim(asdict(CONFIG))
        folder.claim_data("text")
        fail(folder, UserError("x"), keeps_mistakes=False)
    assert not folder.path.exists()
    fail(folder, RuntimeError("x"), keeps_mistakes=False)
    assert [path.name for path in folder.path.iterdir()] == ["failure.json"]
    fail(folder, UserError("y"), keeps_mistakes=False)
    assert json.loads(folder.failure.read_text())["error"] == "x"


def test_of_a_run_that_has_begun_mistakes_are_told_and_nothing_is_lost(folder):
    folder.claim(asdict(CONFIG))
    folder.append_metrics({"step": 1})
    fail(folder, UserError("x"), keeps_mistakes=False)
    assert json.loads(folder.failure.read_text())["error"] == "x"
    assert folder.config.is_file() and folder.read_metrics() == [{"step": 1}]


def test_what_others_have_put_into_a_folder_stays_there(folder):
    folder.path.mkdir()
    (folder.path / "notes.txt").touch()
    folder.claim(asdict(CONFIG))
    fail(folder, UserError("x"), keeps_mistakes=False)
    assert [path.name for path in folder.path.iterdir()] == ["notes.txt"]


def test_it_is_gone_once_the_run_goes_on(folder):
    fail(folder, RuntimeError("x"))
    folder.claim(asdict(CONFIG))
    assert not folder.failure.exists()
    folder.append_metrics({"step": 1})
    fail(folder, RuntimeError("y"))
    assert json.loads(folder.failure.read_text())["error"] == "y"
    fail(RunFolder(folder.path), RuntimeError("z"))  # the same run again, which fails before it takes the folder
    assert json.loads(folder.failure.read_text())["error"] == "z"


def test_another_run_and_a_finished_one_stay_as_they_are(folder):
    folder.claim(asdict(CONFIG))
    folder.append_metrics({"step": 1})
    fail(RunFolder(folder.path), RuntimeError("x"), replace(CONFIG, seed=5))
    assert not folder.failure.exists()
    folder.results.write_text("{}")
    fail(folder, RuntimeError("x"))
    assert not folder.failure.exists()


def test_a_folder_that_cannot_be_written_to_hides_no_reason(tmp_path):
    (tmp_path / "file").write_text("")
    fail(RunFolder(tmp_path / "file" / "run"), RuntimeError("the reason"))
