"""`lckv.train` in this process: what it makes of a configuration."""

from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file

from lckv import train
from lckv.config import TrainConfig

MakeConfig = Callable[..., TrainConfig]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_have_the_type_that_the_model_asks_for(make_config: MakeConfig, dtype: str):
    cfg = make_config(model__dtype=dtype, tokenizer__vocab_size=300, trainer__max_steps=1, trainer__save_steps=None)
    train.main(cfg)
    saved = load_file(f"{cfg.run_dir}/model/model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {getattr(torch, dtype)}
