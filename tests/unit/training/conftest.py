"""Real parts of a tiny run: text, tokenizer, blocks and an LCKV model that trains in a second."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback, set_seed

from lckv.config import DataConfig, ModelConfig, TokenizerConfig, TrainConfig, TrainerConfig
from lckv.config.model_arguments import model_arguments
from lckv.data.dataset import TokenizedData, build_dataset
from lckv.data.tokenizer import build_tokenizer
from lckv.models import LCKVLlamaConfig, LCKVLlamaForCausalLM
from lckv.training import session
from lckv.training.arguments import build_training_arguments
from lckv.training.callbacks import build_evaluate
from lckv.training.run_folder import RunFolder
from lckv.training.session import Session


@dataclass
class Corpus:
    config: DataConfig
    tokenizer: PreTrainedTokenizerFast
    data: TokenizedData


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Corpus:
    """Documents of very different lengths, so that blocks differ in how many tokens they predict."""
    words = "in the beginning was word and light shone upon deep waters of earth".split()
    rng = random.Random(0)
    file = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    texts = [" ".join(rng.choices(words, k=rng.choice([2, 3, 5, 60]))) for _ in range(150)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = DataConfig(name="files", files=str(file), block_size=32, validation_fraction=0.2)
    tokenizer = build_tokenizer(TokenizerConfig(vocab_size=300), config)
    return Corpus(config, tokenizer, build_dataset(config, tokenizer))


def set_key(cfg: Any, key: str, value: Any) -> None:
    group, _, name = key.rpartition(".")
    setattr(getattr(cfg, group) if group else cfg, name, value)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """To draw a loss curve takes half as long as a tiny run; `test_loss_plot.py` and the end-to-end tests do."""
    monkeypatch.setattr(session, "plot_loss", lambda lines, path, **_: path.touch())


@pytest.fixture
def make_config(corpus: Corpus, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Builds a configuration; keyword `trainer__max_steps` sets `trainer.max_steps`."""

    def make(name: str = "run", **settings: Any) -> TrainConfig:
        cfg = TrainConfig(
            model=ModelConfig(
                layer_types="0_2_2_3",
                hidden_size=32,
                intermediate_size=64,
                num_attention_heads=2,
                max_position_embeddings=64,
                forward_passes=1,
                tie_word_embeddings=True,
            ),
            data=corpus.config,
            trainer=TrainerConfig(
                max_steps=6,
                global_batch_size=4,
                eval_steps=None,
                save_steps=3,
                logging_steps=1,
                sample_steps=None,
                sample_tokens=4,
            ),
            run_dir=str(tmp_path / name),
            run_name=name,
        )
        for key, value in settings.items():
            set_key(cfg, key.replace("__", "."), value)
        return cfg

    return make


@pytest.fixture
def make_session(corpus: Corpus, make_config: Callable[..., TrainConfig]) -> Callable[..., Session]:
    """Builds what `lckv.train` builds, with the settings of `make_config`."""

    def make(name: str = "run", teacher: PreTrainedModel | None = None, **settings: Any) -> Session:
        cfg = make_config(name, **settings)
        assert cfg.run_dir is not None
        args = build_training_arguments(cfg)
        set_seed(cfg.seed)
        model = LCKVLlamaForCausalLM(LCKVLlamaConfig(**model_arguments(cfg, len(corpus.tokenizer))))
        folder = RunFolder(cfg.run_dir, cfg.trainer.save_total_limit)
        folder.claim({"seed": cfg.seed})
        evaluate = build_evaluate(cfg, model, corpus.tokenizer, folder)
        console = Console(quiet=True)
        return Session(cfg, args, model, corpus.tokenizer, corpus.data, folder, console, teacher, evaluate)

    return make


@pytest.fixture
def interrupt() -> Callable[[Session, int], None]:
    """Runs a session that ends as abruptly as an exception can, behind the given step."""

    class KillAt(TrainerCallback):
        def __init__(self, step: int) -> None:
            self.step = step

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == self.step:
                raise KeyboardInterrupt

    def run(session: Session, step: int) -> None:
        session.trainer.add_callback(KillAt(step))
        with pytest.raises(KeyboardInterrupt):
            session.run()

    return run
