import importlib.util

import pytest

from lckv.config import LoggerConfig
from lckv.errors import UserError
from lckv.training.loggers import check_loggers


def test_logger_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"logger.names=wandb: is not installed; pip install 'lckv\[track\]'"):
        check_loggers(LoggerConfig(names=["wandb"]))


def test_tensorboard_gets_the_curves_and_the_samples(make_session):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    session = make_session(logger__names=["tensorboard"], trainer__sample_steps=3)
    session.run()
    events = EventAccumulator(str(session.folder.tensorboard))
    events.Reload()
    losses = [event.value for event in events.Scalars("train/loss")]
    assert losses == pytest.approx([line["loss"] for line in session.folder.read_metrics() if "loss" in line])
    assert len(events.Scalars("train/tokens_per_second")) == 6
    assert len(events.Scalars("eval/perplexity")) == 1


@pytest.mark.timeout(60)
def test_wandb_offline_keeps_its_data_in_the_run_folder(make_session, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb")
    session = make_session(logger__names=["wandb"])
    session.run()
    assert list(session.folder.path.glob("wandb/offline-run-*"))


@pytest.mark.timeout(60)
def test_trackio_gets_the_curves(make_session, tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    trackio = pytest.importorskip("trackio", reason="wants a Pillow below 13")
    session = make_session(logger__names=["trackio"])
    session.run()
    lines = trackio.sqlite_storage.SQLiteStorage.get_logs("lckv", session.cfg.run_name or session.folder.path.name)
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses == pytest.approx([line["loss"] for line in session.folder.read_metrics() if "loss" in line])
