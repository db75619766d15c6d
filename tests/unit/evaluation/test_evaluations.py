"""Evaluations one after the other, and the file with what they came to."""

import json
import math
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from lckv.config import DataConfig, EvaluationConfig, PerplexityConfig, SpeedConfig
from lckv.errors import UserError
from lckv.evaluation import evaluations
from lckv.evaluation.evaluations import FUNCTIONS, Subject, find_evaluation, run_evaluations
from lckv.evaluation.results_file import ResultsFile, scalar_figures
from tests.reference import tiny_model
from tests.tiny import byte_tokenizer


@pytest.fixture
def subject() -> Subject:
    return Subject(tiny_model("0_0"), byte_tokenizer(), DataConfig(), seed=3)


def draw(subject: Subject, config: EvaluationConfig) -> dict:
    return {"drawn": [random.random(), np.random.rand(), torch.rand(1).item()], "is_training": subject.model.training}


def fail(subject: Subject, config: EvaluationConfig) -> dict:
    raise UserError("cannot be done")


def test_one_that_fails_keeps_no_other_from_its_figures(subject: Subject, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(evaluations, "find_evaluation", {"needle": fail, "perplexity": draw}.get)
    config = EvaluationConfig(["needle", "perplexity"], 5, perplexity=PerplexityConfig(stride=7))
    subject.model.train()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    outcomes = dict(run_evaluations(subject, config, {"cache": {"name": "paged"}}))
    assert isinstance(outcomes["needle"], UserError)
    assert outcomes["perplexity"]["is_training"] is False and subject.model.training is True
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    settings = outcomes["perplexity"]["settings"]
    config = EvaluationConfig(["speed"], speed=SpeedConfig(batch_size=2))
    monkeypatch.setattr(evaluations, "find_evaluation", lambda name: draw)
    ((_, figures),) = run_evaluations(subject, config, {})
    assert figures["settings"]["batch_size"] == 2
    assert (settings["stride"], settings["batch_size"], settings["seed"]) == (7, 5, 3)
    assert settings["cache"] == {"name": "paged"} and settings["data"]["name"] == "bible"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_evaluation_is_where_the_table_says(name: str):
    assert callable(find_evaluation(name))


def test_numbers_among_figures():
    figures = {"a": 1, "b": {"c": 0.5, "d": [1, 2], "e": True}, "settings": {"batch_size": 8}, "f": "text", "g": None}
    assert dict(scalar_figures(figures)) == {"a": 1, "b/c": 0.5}


# --- the file ---------------------------------------------------------------------------------------------------


def open_file(folder: Path, fingerprint: str = "1234", **common) -> ResultsFile:
    file = ResultsFile(folder / "deep" / "results.json", {"name": "mine", "fingerprint": fingerprint})
    file.check()
    file.common = common
    return file


def test_results_of_several_calls_stay(tmp_path: Path):
    first = open_file(tmp_path, costs=1)
    first.write({})
    first.write({"perplexity": {"loss": 1.0}})
    second = open_file(tmp_path, costs=2)
    first.write({"recall": {"accuracy": 0.5}})
    second.write({"needle": {"accuracy": 0.25}})
    results = second.write({"perplexity": {"loss": 0.5}})
    assert results == json.loads(second.path.read_text())
    assert results == {
        "model": {"name": "mine", "fingerprint": "1234"},
        "evaluations": {"perplexity": {"loss": 0.5}, "recall": {"accuracy": 0.5}, "needle": {"accuracy": 0.25}},
        "costs": 2,
    }
    assert {path.name for path in second.path.parent.iterdir()} == {"results.json", ".results.json.lock"}


def test_figures_with_other_settings_stay(tmp_path: Path):
    file = open_file(tmp_path)
    of = {name: {"loss": len(name), "settings": {"cache": name}} for name in ("none", "static", "paged")}
    for name in of:
        results = file.write({"perplexity": of[name]})
    assert results["evaluations"] == {"perplexity": of["paged"]}
    assert results["with_other_settings"] == {"perplexity": [of["none"], of["static"]]}
    again = of["none"] | {"loss": 7}
    results = open_file(tmp_path).write({"perplexity": again})
    assert results["evaluations"] == {"perplexity": again}
    assert results["with_other_settings"] == {"perplexity": [of["static"], of["paged"]]}


def test_a_part_of_the_figures_does_not_replace_the_whole(tmp_path: Path):
    file = open_file(tmp_path)
    whole = {"tasks": {"a": 1, "b": 2}, "errors": {}, "settings": {"limit": 8}}
    part = {"tasks": {"a": 1}, "errors": {"b": "offline"}, "settings": {"limit": 8}}
    file.write({"harness": part})
    file.write({"harness": whole})
    results = file.write({"harness": part})
    assert results["evaluations"] == {"harness": part}
    assert results["with_other_settings"] == {"harness": [whole]}
    results = file.write({"harness": whole})
    assert (results["evaluations"], "with_other_settings" in results) == ({"harness": whole}, False)


def test_the_file_is_json_whatever_the_figures_are(tmp_path: Path):
    file = open_file(tmp_path)
    file.write({"perplexity": {"word_perplexity": math.inf, "deep": [math.nan, 1.0]}})
    results = json.loads(file.path.read_text(), parse_constant=pytest.fail)
    assert results["evaluations"]["perplexity"] == {"word_perplexity": None, "deep": [None, 1.0]}


def test_several_processes_may_add_at_once(tmp_path: Path):
    names = [str(number) for number in range(20)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: open_file(tmp_path).write({name: {"loss": 1.0}}), names))
    assert sorted(open_file(tmp_path).write({})["evaluations"]) == sorted(names)


def test_results_of_other_weights_and_other_files_are_refused(tmp_path: Path):
    file = open_file(tmp_path)
    file.write({"perplexity": {"loss": 1.0}})
    before = file.path.read_text()
    with pytest.raises(UserError, match="holds the results of other weights .*give another out="):
        open_file(tmp_path, "5678")
    assert file.path.read_text() == before
    for text in "{", "[]", '{"model": "mine", "evaluations": {}}':
        file.path.write_text(text)
        with pytest.raises(UserError, match="holds no results of lckv.evaluate"):
            open_file(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="^out=.*file is a file"):
        open_file(tmp_path / "file")
