"""Where `tokenizer.name` finds a tokenizer: the places where models are found, too."""

from pathlib import Path

import pytest

from lckv.config import DataConfig, TokenizerConfig
from lckv.errors import UserError
from lckv.loading.building import choose_tokenizer
from lckv.training.run_folder import RunFolder
from tests.reference import tiny_model
from tests.tiny import byte_tokenizer


def choose(path: Path, **settings: str) -> dict[str, int]:
    return choose_tokenizer(TokenizerConfig(str(path), **settings), DataConfig()).get_vocab()


def test_of_a_run_a_model_or_alone(tmp_path: Path):
    run = RunFolder(tmp_path / "run")
    checkpoint = run.checkpoints.staging(4)
    for folder in run.model, checkpoint:
        tiny_model("0_0", vocab_size=300).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    byte_tokenizer().save_pretrained(tmp_path / "alone")
    newest = run.checkpoints.publish(4, checkpoint)
    for path in run.path, run.model, newest, tmp_path / "alone":
        assert choose(path) == byte_tokenizer().get_vocab()
    (run.model / "config.json").rename(run.model / "gone.json")  # as if the run were not finished
    assert choose(run.path) == byte_tokenizer().get_vocab()


def test_mistakes(tmp_path: Path):
    with pytest.raises(UserError, match=f"^tokenizer.name={tmp_path}: holds no config.json"):
        choose(tmp_path)
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match="is a file; allowed are folders and GGUF files"):
        choose(tmp_path / "a.txt")
    with pytest.raises(UserError, match="^revision='x': has no effect on tokenizer.name="):
        choose(tmp_path, revision="x")
