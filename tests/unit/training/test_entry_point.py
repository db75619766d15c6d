"""`lckv.train` in this process: what it makes of a configuration."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lckv import train
from lckv.config import TrainConfig
from lckv.errors import UserError

MakeConfig = Callable[..., TrainConfig]


@pytest.fixture
def small_config(make_config: MakeConfig) -> MakeConfig:
    def make(**settings) -> TrainConfig:
        shortest = {"tokenizer__vocab_size": 300, "trainer__max_steps": 1, "trainer__save_steps": None}
        return make_config(**shortest, **settings)

    return make


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_have_the_type_that_the_model_asks_for(small_config: MakeConfig, dtype: str):
    cfg = small_config(model__dtype=dtype)
    train.main(cfg)
    saved = load_file(f"{cfg.run_dir}/model/model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {getattr(torch, dtype)}


@pytest.mark.parametrize(("layer_types", "is_bad"), [("3_2_2_3", True), ("0_2_2_3", False)])
def test_a_lowest_layer_that_looks_up_is_advised_against(small_config: MakeConfig, layer_types, is_bad, capsys):
    train.main(small_config(model__layer_types=layer_types))
    out = " ".join(capsys.readouterr().out.split())
    assert ("note: layer 0 reads layer 3, above it, which does worst" in out) == is_bad


def test_text_that_is_refused_leaves_no_folder(small_config: MakeConfig, corpus, tmp_path: Path):
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "and one more"}\n{"text": 3}\n')  # of which only reading all of it tells
    cfg = small_config(data=replace(corpus.config, files=str(text)))
    with pytest.raises(UserError, match=r"text.jsonl:2: field 'text' must be text"):
        train.main(cfg)
    assert not Path(cfg.run_dir).exists()


def test_finished_run_on_text_that_has_changed_is_refused(small_config: MakeConfig, corpus, tmp_path: Path):
    text = tmp_path / "text.jsonl"
    shutil.copy(corpus.config.files, text)
    cfg = small_config(data=replace(corpus.config, files=str(text)))
    train.main(cfg)
    train.main(cfg)  # shows the results
    with text.open("a") as file:
        file.write('{"text": "and one more"}\n')
    with pytest.raises(UserError, match="holds a run on other data"):
        train.main(cfg)
