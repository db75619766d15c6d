import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lckv.config import TrainConfig, TrainerConfig
from lckv.errors import UserError
from lckv.training import arguments
from lckv.training.arguments import build_training_arguments
from lckv.utils.processes import set_num_threads

MakeConfig = Callable[..., TrainConfig]


@pytest.mark.parametrize(
    ("global_size", "micro_size", "processes", "expected"),
    [(16, None, 1, (16, 1)), (16, None, 4, (4, 1)), (16, 2, 1, (2, 8)), (16, 2, 4, (2, 2)), (6, 3, 2, (3, 1))],
)
def test_global_batch_is_cut_up(global_size: int, micro_size: int | None, processes: int, expected: tuple[int, int]):
    cfg = TrainerConfig(global_batch_size=global_size, micro_batch_size=micro_size)
    micro, accumulation = cfg.cut_batch(processes)
    assert (micro, accumulation) == expected
    assert micro * accumulation * processes == global_size


@pytest.mark.parametrize(
    ("global_size", "micro_size", "processes", "nearest"), [(16, 3, 1, 15), (5, None, 2, 4), (2, 4, 2, 8)]
)
def test_global_batch_that_does_not_divide_is_refused(global_size, micro_size, processes, nearest):
    cfg = TrainerConfig(global_batch_size=global_size, micro_batch_size=micro_size)
    with pytest.raises(UserError, match=f"trainer.global_batch_size={global_size}.*nearest allowed is {nearest}$"):
        cfg.cut_batch(processes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainer__hf": {"fsdpp": True}}, "did you mean 'fsdp'"),
        ({"trainer__hf": {"log_level": "infoo"}}, "trainer.hf.log_level='infoo': allowed are"),
        ({"model__max_position_embeddings": 8}, "longer than model.max_position_embeddings=8"),
        ({"trainer__torch_compile": True, "trainer__torch_compile_backend": "inducter"}, "did you mean 'inductor'"),
        (
            {"trainer__torch_compile": True, "trainer__torch_compile_mode": "max-autotone"},
            "did you mean 'max-autotune'",
        ),
        ({"model__mlp_bias": True, "trainer__use_liger_kernel": True}, "has no MLP for model.mlp_bias=true"),
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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("split_batches", True),
        ("dispatch_batches", True),
        ("even_batches", False),
        ("gradient_accumulation_kwargs", {"num_steps": 2}),
    ],
)
@pytest.mark.parametrize("in_a_file", [False, True])
def test_accelerate_does_not_cut_batches_up(
    make_config: MakeConfig, tmp_path: Path, name: str, value: Any, in_a_file: bool
):
    given: Any = {name: value}
    if in_a_file:
        (tmp_path / "accelerate.json").write_text(json.dumps(given))
        given = str(tmp_path / "accelerate.json")
    with pytest.raises(UserError, match=rf"^trainer.hf.accelerator_config.{name}=.*: is decided by the training loop"):
        build_training_arguments(make_config(trainer__hf={"accelerator_config": given}))


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("ddp_timeout", "abc", "a whole number"),
        ("ddp_timeout", 2.5, "a whole number"),
        ("neftune_noise_alpha", "5", "a number, or null"),
        ("full_determinism", 3, "true or false"),
        ("adam_epsilon", None, "a number"),
        ("label_names", 3, "a list, in brackets, or null"),
        ("gradient_checkpointing_kwargs", 3, "keys of its own, or text, or null"),
        ("debug", 3, "text, or a list, in brackets"),
    ],
)
def test_fields_of_transformers_have_values_of_their_types(
    make_config: MakeConfig, field: str, value: Any, allowed: str
):
    with pytest.raises(UserError) as caught:
        build_training_arguments(make_config(trainer__hf={field: value}))
    assert str(caught.value) == f"trainer.hf.{field}={value!r}: allowed is {allowed}"


def test_a_whole_number_is_a_number_to_transformers(make_config: MakeConfig):
    args = build_training_arguments(make_config(trainer__hf={"neftune_noise_alpha": 5, "ddp_timeout": 60}))
    assert (args.neftune_noise_alpha, args.ddp_timeout) == (5, 60)


def test_accelerate_may_load_as_it_likes(make_config: MakeConfig):
    given = {"dispatch_batches": False, "non_blocking": True}
    args = build_training_arguments(make_config(trainer__hf={"accelerator_config": given}))
    assert args.accelerator_config.non_blocking


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", "but trainer.precision=fp32; give trainer.precision=bf16"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "in a way that is not supported"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "in a way that is not supported"),
    ],
)
def test_what_its_launcher_says_of_the_model_is_not_obeyed_in_silence(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"^{name}={value}: .*{message}"):
        build_training_arguments(make_config())


def test_threads(monkeypatch: pytest.MonkeyPatch):
    before = torch.get_num_threads()
    try:
        set_num_threads(2)
        assert torch.get_num_threads() == 2
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        set_num_threads(None)
        assert torch.get_num_threads() == 2  # torch has read the variable when it was imported
        monkeypatch.delenv("OMP_NUM_THREADS")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "10000")
        set_num_threads(None)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
