"""`lckv.train init.source=...` in this process: what a run that starts from a pretrained model is made of."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import TrainerCallback
from transformers.utils.logging import enable_progress_bar

from lckv import plan, train
from lckv.commands import cli
from lckv.config import InitConfig, ModelConfig, TokenizerConfig, TrainConfig
from lckv.conversion.target import RECORD
from lckv.errors import UserError
from lckv.loading.models import load_model
from lckv.training.session import Session
from tests.unit.conversion.sources import random_source, save_source

MakeConfig = Callable[..., TrainConfig]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model whose `generation_config.json` has a temperature without `do_sample`, as some on the Hub do."""
    folder = save_source(tmp_path / "source", random_source(4))
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text()) | {"do_sample": False, "temperature": 0.6}
    path.write_text(json.dumps(settings))
    return folder


@pytest.fixture
def from_source(make_config: MakeConfig, source: Path) -> MakeConfig:
    def make(layer_types: str = "0_1_2_2", method: str = "average", **settings) -> TrainConfig:
        cfg = make_config(
            trainer__sample_tokens=4, **{"trainer__max_steps": 1, "trainer__save_steps": None} | settings
        )
        cfg.model = ModelConfig(layer_types=layer_types)
        cfg.tokenizer, cfg.init = TokenizerConfig(), InitConfig(source=str(source), method=method)
        return cfg

    return make


def test_a_run_that_failed_behind_its_conversion_is_converted_anew(from_source: MakeConfig):
    failing = from_source("0_0_2_2", "inherit", trainer__sample_prompt="")
    with pytest.raises(UserError, match="sample_prompt"):
        train.main(failing)
    init = Path(str(failing.run_dir)) / "init"
    assert json.loads((init / RECORD).read_text())["method"] == "inherit"
    train.main(from_source("0_1_2_2", "average"))
    assert json.loads((init / RECORD).read_text())["method"] == "average"
    model, _ = load_model(str(failing.run_dir), device="cpu")
    assert model.config.kv_sharing == "0_1_2_2"


def test_settings_for_sampling_that_cannot_be_saved_stay_behind(from_source: MakeConfig, capfd):
    enable_progress_bar()
    cfg = from_source()
    train.main(cfg)
    saved = json.loads((Path(str(cfg.run_dir)) / "model" / "generation_config.json").read_text())
    assert "temperature" not in saved
    written = "".join(capfd.readouterr())
    assert "Loading weights" not in written and "Writing model shards" not in written


def test_a_finished_run_is_shown_where_it_was_moved_and_without_its_source(
    from_source: MakeConfig, source: Path, capsys
):
    cfg = from_source()
    train.main(cfg)
    shutil.move(str(cfg.run_dir), f"{cfg.run_dir}-moved")
    shutil.rmtree(source)
    capsys.readouterr()
    train.main(replace(cfg, run_dir=f"{cfg.run_dir}-moved"))
    assert "this run is finished" in capsys.readouterr().out


def test_an_interrupted_run_goes_on_where_it_was_moved_and_without_its_source(
    from_source: MakeConfig, source: Path, capsys, interrupt_training
):
    cfg = from_source(trainer__max_steps=4, trainer__save_steps=2)
    interrupt_training(cfg, 3)
    shutil.move(str(cfg.run_dir), f"{cfg.run_dir}-moved")
    shutil.rmtree(source)
    moved = replace(cfg, run_dir=f"{cfg.run_dir}-moved")
    train.main(moved)
    assert f"going on from {moved.run_dir}/checkpoints/checkpoint-2" in capsys.readouterr().out
    assert json.loads((Path(str(moved.run_dir)) / "results.json").read_text())["steps"] == 4


@pytest.fixture
def interrupt_training(monkeypatch: pytest.MonkeyPatch) -> Callable[[TrainConfig, int], None]:
    """Runs `lckv.train` until Ctrl-C comes behind the given step."""

    class CtrlC(TrainerCallback):
        def __init__(self, step: int) -> None:
            self.step = step

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == self.step:
                raise KeyboardInterrupt

    def run(cfg: TrainConfig, step: int) -> None:
        begin = Session._callbacks
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Session, "_callbacks", lambda session: [*begin(session), CtrlC(step)])
            train.main(cfg)

    return run


def test_the_plan_of_a_source_has_its_sizes(source: Path):
    report = plan.build_report(cli.compose([f"init.source={source}", "model.layer_types=0_1_2_2"], "plan"))
    config = random_source(4).config
    assert (report.sizes.vocab_size, report.sizes.hidden_size) == (config.vocab_size, config.hidden_size)
    assert report.plan.layer_types == "0_1_2_2"
