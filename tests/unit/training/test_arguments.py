from collections.abc import Callable

import pytest
import torch

from lckv.config import TrainConfig, TrainerConfig
from lckv.errors import UserError
from lckv.processes import set_num_threads
from lckv.training import arguments
from lckv.training.arguments import build_training_arguments, gradient_accumulation_steps

MakeConfig = Callable[..., TrainConfig]


@pytest.mark.parametrize(
    ("global_size", "micro_size", "processes", "expected"),
    [(16, None, 1, (16, 1)), (16, None, 4, (4, 1)), (16, 2, 1, (2, 8)), (16, 2, 4, (2, 2)), (6, 3, 2, (3, 1))],
)
def test_global_batch_is_cut_up(global_size: int, micro_size: int | None, processes: int, expected: tuple[int, int]):
    cfg = TrainerConfig(global_batch_size=global_size, micro_batch_size=micro_size)
    micro, accumulation = gradient_accumulation_steps(cfg, processes)
    assert (micro, accumulation) == expected
    assert micro * accumulation * processes == global_size


@pytest.mark.parametrize(
    ("global_size", "micro_size", "processes", "nearest"), [(16, 3, 1, 15), (5, None, 2, 4), (2, 4, 2, 8)]
)
def test_global_batch_that_does_not_divide_is_refused(global_size, micro_size, processes, nearest):
    cfg = TrainerConfig(global_batch_size=global_size, micro_batch_size=micro_size)
    with pytest.raises(UserError, match=f"trainer.global_batch_size={global_size}.*nearest allowed is {nearest}$"):
        gradient_accumulation_steps(cfg, processes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainer__max_steps": 0}, "trainer.max_steps=0"),
        ({"seed": -1}, "seed=-1: allowed is a whole number, 0 to 4294967295"),
        ({"trainer__eval_steps": 0}, "trainer.eval_steps=0: allowed is a whole number, 1 or more, or null"),
        ({"trainer__micro_batch_size": 0}, "trainer.micro_batch_size=0"),
        ({"trainer__sample_tokens": -1}, "trainer.sample_tokens=-1"),
        ({"trainer__max_grad_norm": -1.0}, "trainer.max_grad_norm=-1.0"),
        ({"trainer__precision": "bf61"}, "did you mean 'bf16'"),
        ({"trainer__hf": {"fsdpp": True}}, "did you mean 'fsdp'"),
        ({"trainer__hf": {"learning_rate": 1.0}}, "set optim.learning_rate instead"),
        ({"trainer__hf": {"per_device_train_batch_size": 4}}, "set trainer.micro_batch_size instead"),
        ({"trainer__hf": {"gradient_checkpointing": True}}, "set trainer.gradient_checkpointing instead"),
        ({"trainer__hf": {"save_strategy": "no"}}, "decided by the training loop"),
        ({"trainer__hf": {"torch_compile": True}}, "set trainer.torch_compile instead"),
        ({"model__max_position_embeddings": 8}, "longer than model.max_position_embeddings=8"),
        ({"trainer__torch_compile": True, "trainer__torch_compile_backend": "inducter"}, "did you mean 'inductor'"),
        ({"model__dtype": "float16", "trainer__precision": "fp16"}, "model.dtype=float16: cannot be trained with"),
        ({"model__use_sequential": True, "trainer__gradient_checkpointing": True}, "trainer.gradient_checkpointing"),
        ({"model__hidden_act": "gelu", "trainer__use_liger_kernel": True}, "has no MLP for model.hidden_act=gelu"),
        ({"model__mlp_bias": True, "trainer__use_liger_kernel": True}, "has no MLP for model.mlp_bias=true"),
        ({"trainer__torch_compile_mode": "max-autotune"}, "trainer.torch_compile_mode=max-autotune: has no effect"),
        ({"trainer__torch_compile_backend": "eager"}, "has no effect without trainer.torch_compile=true"),
        ({"trainer__hf": {"use_cpu": True}}, "set the environment variable ACCELERATE_USE_CPU instead"),
        ({"trainer__hf": {"metric_for_best_model": "loss"}}, "trainer.hf.metric_for_best_model: is decided"),
        ({"optim__momentum": 0.9}, "optim.momentum=0.9: has no effect with optim.name='adamw'"),
    ],
)
def test_mistakes_name_the_key(make_config: MakeConfig, settings: dict, message: str):
    with pytest.raises(UserError) as raised:
        build_training_arguments(make_config(**settings))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainer__use_liger_kernel": True}, "trainer.use_liger_kernel=true: needs a CUDA GPU"),
        ({"trainer__precision": "fp16"}, "trainer.precision='fp16': needs a GPU"),
    ],
)
def test_switches_that_need_a_gpu_are_refused_without(make_config: MakeConfig, settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        build_training_arguments(make_config(**settings))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU needs no C++ compiler")
def test_compiling_is_refused_without_a_compiler(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="needs a C.. compiler"):
        build_training_arguments(make_config(trainer__torch_compile=True))
    no_code = {"trainer__torch_compile": True, "trainer__torch_compile_backend": "aot_eager"}
    build_training_arguments(make_config(**no_code))


def test_processes_that_would_train_alone_into_one_folder_are_refused(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(arguments, "num_processes", lambda: 2)
    with pytest.raises(UserError, match="2 processes were launched, but this one is on its own"):
        build_training_arguments(make_config())


def test_further_fields_are_passed_through(make_config: MakeConfig):
    assert build_training_arguments(make_config(trainer__hf={"dataloader_prefetch_factor": None})).max_steps == 6
    args = build_training_arguments(make_config(trainer__hf={"ddp_find_unused_parameters": True}))
    assert args.ddp_find_unused_parameters is True


def test_threads(monkeypatch: pytest.MonkeyPatch):
    before = torch.get_num_threads()
    try:
        assert set_num_threads(2) == 2
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert set_num_threads(None) == 2  # torch has read the variable when it was imported
        monkeypatch.delenv("OMP_NUM_THREADS")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "10000")
        assert set_num_threads(None) == 1
        with pytest.raises(UserError, match="trainer.num_threads=0"):
            set_num_threads(0)
    finally:
        torch.set_num_threads(before)
