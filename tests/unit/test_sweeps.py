"""What a failed job of a sweep tells the process that started the sweep."""

import pickle

import pytest

from lckv.sweeps import FailedJob, missing_extra


@pytest.fixture(autouse=True)
def received(monkeypatch):
    monkeypatch.setattr(FailedJob, "received", [])


def test_a_failure_from_another_process_leaves_its_reason():
    failure = FailedJob("seed=1: unlucky")
    sent = pickle.dumps(failure)
    assert FailedJob.received == []  # here, the reason has been reported already
    assert repr(pickle.loads(sent)) == "seed=1: unlucky"
    assert FailedJob.received == ["seed=1: unlucky"]


def test_a_failure_is_no_number():
    """Optuna takes what can be a float for a result."""
    with pytest.raises(TypeError):
        float(FailedJob("x"))  # type: ignore[arg-type]


def test_what_a_missing_plugin_asks_for():
    assert missing_extra("hydra/launcher", "ray") == "hydra/launcher=ray: is not installed; pip install 'lckv[ray]'"
    assert missing_extra("hydra/launcher", "basic") is None
    assert missing_extra("model", "ray") is None
