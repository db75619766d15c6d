"""Evaluations during training."""

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict

import pytest
import torch
from transformers import TrainerControl, TrainerState

from lckv.config import EvaluationConfig, HarnessConfig, NeedleConfig, PerplexityConfig, RecallConfig, SpeedConfig
from lckv.errors import UserError
from lckv.evaluation import evaluations
from lckv.training.callbacks import EvaluationsCallback
from lckv.training.session import Session
from tests.unit.training.test_callbacks import ARGS, Clock, clock, log, take_steps, throughput  # noqa: F401

MakeSession = Callable[..., Session]

EVALUATION = EvaluationConfig(
    ["perplexity", "speed"],
    perplexity=PerplexityConfig(context_length=16, max_documents=4),
    speed=SpeedConfig(prompt_length=6, new_tokens=2, rounds=1),
)
SETTINGS = {"model__attention_dropout": 0.3, "trainer__save_steps": 2}
EVALUATED = {"evaluation": EVALUATION, "trainer__evaluation_steps": 2}


def losses(session: Session) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in session.folder.read_metrics() if "loss" in line]


def figures(session: Session) -> dict[int, float]:
    lines = session.folder.read_metrics()
    return {line["step"]: line["perplexity/loss"] for line in lines if "perplexity/loss" in line}


@pytest.fixture
def plain(make_session: MakeSession) -> Session:
    session = make_session("plain", **SETTINGS)
    session.run()
    return session


def test_evaluations_are_written_and_leave_no_trace_in_training(make_session: MakeSession, plain: Session):
    session = make_session("evaluated", **SETTINGS, **EVALUATED)
    results = session.run()
    assert losses(session) == losses(plain)
    for name, tensor in session.model.state_dict().items():
        assert torch.equal(tensor, plain.model.state_dict()[name]), name
    lines = [line for line in session.folder.read_metrics() if "loss" in line]
    assert list(figures(session)) == [2, 4, 6]
    assert all("kv_residual" in line for line in lines)
    last = lines[-1]
    assert last["perplexity"] == pytest.approx(math.exp(last["loss"]))  # the training's own
    assert last["speed/decode_tokens_per_second"] > 0
    assert results == json.loads(session.folder.results.read_text())
    assert results["evaluations"]["perplexity"]["loss"] == last["perplexity/loss"]
    assert results["evaluations"]["perplexity"]["settings"]["data"] == asdict(session.cfg.data)
    assert "evaluations" not in json.loads(plain.folder.results.read_text())


def test_an_interrupted_run_has_the_figures_of_a_whole_one(
    make_session: MakeSession, interrupt: Callable[[Session, int], None]
):
    whole = make_session("whole", **SETTINGS, **EVALUATED)
    whole.run()
    interrupt(make_session("parts", **SETTINGS, **EVALUATED), 5)
    parts = make_session("parts", **SETTINGS, **EVALUATED)
    results = parts.run()
    assert figures(parts) == figures(whole)
    assert results["evaluations"]["perplexity"]["loss"] == figures(whole)[6]


def test_a_run_that_ended_before_its_results_evaluates_once_more(make_session: MakeSession):
    first = make_session(**SETTINGS, **EVALUATED)
    first.run()
    first.folder.results.unlink()
    results = make_session(**SETTINGS, **EVALUATED).run()
    assert results["evaluations"]["perplexity"]["loss"] == pytest.approx(figures(first)[6], rel=1e-6)


def test_an_evaluation_that_fails_does_not_end_the_training(
    make_session: MakeSession, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fail(subject, config):
        raise UserError("cannot be done")

    found = evaluations.find_evaluation
    monkeypatch.setattr(evaluations, "find_evaluation", lambda name: fail if name == "speed" else found(name))
    session = make_session(evaluation=EVALUATION)
    results = session.run()
    assert list(figures(session)) == [6]  # without a rhythm, the end is evaluated
    assert results["evaluations"]["speed"] == {"error": "cannot be done"}
    assert results["evaluations"]["perplexity"]["loss"] > 0
    assert caplog.messages.count("speed: cannot be done") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evals": ["harness"], "harness": HarnessConfig(include_path="no/where")}, "include_path='no/where': is no"),
        ({"evals": ["harness"], "harness": HarnessConfig(max_length=10**6)}, "max_length=1000000: allowed is"),
        ({"evals": ["needle"], "needle": NeedleConfig(lengths=[10**6])}, "needle.lengths=1000000: allowed is"),
        ({"evals": ["recall"], "recall": RecallConfig(num_pairs=[10**6])}, "recall.num_pairs=1000000: makes"),
    ],
)
def test_mistakes_are_found_before_the_training(make_session: MakeSession, options, message: str):
    with pytest.raises(UserError, match=f"^evaluation.*{message}"):
        make_session(evaluation=EvaluationConfig(**options))


def test_one_process_evaluates_and_the_others_wait():
    calls = []
    for is_first in True, False:
        callback = EvaluationsCallback(
            lambda: calls.append("evaluated") or [("recall", {"accuracy": 0.5, "per_pair": [1, 2]})],
            2,
            lambda: calls.append("waited"),
            nullcontext,
        )
        state = TrainerState(global_step=4, max_steps=9, is_world_process_zero=is_first)
        logs = log(callback, state, loss=1.0)
        assert logs == {"loss": 1.0} | ({"recall/accuracy": 0.5} if is_first else {})
        log(callback, state, eval_loss=1.0)
        log(callback, TrainerState(global_step=5, max_steps=9, is_world_process_zero=is_first), loss=1.0)
    assert calls == ["evaluated", "waited", "waited"]


def test_evaluations_and_samples_come_before_the_clock_starts_again(make_session: MakeSession):
    names = [type(callback).__name__ for callback in make_session(evaluation=EVALUATION)._callbacks()]
    for name in "EvaluationsCallback", "SampleCallback":
        assert names.index(name) < names.index("FiguresCallback")


def test_time_of_evaluations_is_left_out_of_the_speed(clock: Clock):  # noqa: F811
    def evaluate():
        clock.now += 50
        return []

    speed, state = throughput(), TrainerState(max_steps=10, is_world_process_zero=True)
    callback = EvaluationsCallback(evaluate, 2, lambda: None, nullcontext)
    speed.on_train_begin(ARGS, state, TrainerControl())
    measured = []
    for _ in range(2):
        take_steps(speed, state, clock, [1.0, 1.0])
        logs = log(callback, state, loss=1.0)
        speed.on_log(ARGS, state, TrainerControl(), logs=logs)
        measured.append(logs["tokens_per_second"])
    assert measured == [1000.0, 1000.0]
