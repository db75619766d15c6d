"""From our configuration to transformers' `TrainingArguments`, with every switch checked before any work."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from transformers import TrainingArguments
from transformers.activations import ACT2FN
from transformers.trainer_pt_utils import AcceleratorConfig

from lckv.config import RunConfig, TrainConfig, TrainerConfig
from lckv.config.keys import WORDS
from lckv.config.names import RIEMANNIAN
from lckv.errors import UserError, check_choice, near_miss
from lckv.training.optim import schedule_arguments
from lckv.utils.processes import num_processes

_TRUE = ("true", "1", "yes")
_USES_OF_ACCELERATE = ("ACCELERATE_USE_PARALLELISM_CONFIG", "ACCELERATE_USE_MEGATRON_LM")


def build_training_arguments(
    cfg: RunConfig,
    kind: type[TrainingArguments] = TrainingArguments,
    *,
    left_open: Collection[str] = (),
    **own: Any,
) -> TrainingArguments:
    """Builds transformers' arguments for a run.

    Args:
        cfg: the configuration.
        kind: the class of arguments, where another library derives one.
        left_open: the fields of that class that `trainer.hf` may set.
        own: those that it may not, and what they are.

    Raises:
        UserError: if the sizes do not go together, transformers has no such activation function, a switch cannot work
            on this machine, or `trainer.hf` has an unknown field or one of a wrong type.
    """
    trainer = cfg.trainer
    if isinstance(cfg, TrainConfig):
        cfg.check_sizes()
        check_choice("model.hidden_act", cfg.model.hidden_act, ACT2FN)
    _check_switches(trainer)
    if cfg.optim.name == RIEMANNIAN and importlib.util.find_spec("geoopt") is None:
        raise UserError(
            f"optim.name={RIEMANNIAN}: needs geoopt, which is not installed; pip install 'lckv[riemannian]'"
        )
    types = get_type_hints(kind)
    for name, value in trainer.hf.items():
        if name not in (allowed := _fields() | {*left_open}):
            raise UserError(
                f"trainer.hf.{name}: transformers' TrainingArguments has no such field{near_miss(name, allowed)}"
            )
        _check_type(f"trainer.hf.{name}", value, types[name])
        if choices := kind.__dataclass_fields__[name].metadata.get("choices"):
            check_choice(f"trainer.hf.{name}", value, choices)
    if not torch.accelerator.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # else processes under torchrun do not find each other
    fields = _fields_set_here(cfg) | own | trainer.hf
    try:
        args = kind(**fields)
    except (ValueError, ImportError, TypeError) as error:
        raise UserError(f"transformers refuses these training arguments: {error}") from error
    _check_accelerate(args, trainer.precision)
    if args.world_size != num_processes():
        # Each would train alone, all into one run folder.
        raise UserError(
            f"{num_processes()} processes were launched, but this one is on its own; launch with `torchrun` or "
            "`accelerate launch`, which set RANK and LOCAL_RANK, and with as many processes as there are devices"
        )
    return args


def _check_type(key: str, value: Any, declared: Any) -> None:
    """Refuses what is not of a field's type: transformers itself does not look.

    Not where only text is declared, in whose place it takes other things, such as `fsdp=True`.
    """
    kinds = get_args(declared) if get_origin(declared) in (Union, UnionType) else (declared,)
    shapes = [get_origin(kind) or kind for kind in kinds]
    is_text = not {*shapes} & (WORDS.keys() - {str, NoneType})
    if not is_text and type(value) not in shapes and not (type(value) is int and float in shapes):
        raise UserError(f"{key}={value!r}: allowed is {', or '.join(WORDS[shape] for shape in shapes)}")


def _check_accelerate(args: TrainingArguments, precision: str) -> None:
    """Refuses what would have accelerate cut batches up, count them or compute in another way than is configured.

    Its launcher hands over such settings in the environment, and transformers a file or mapping of them.
    """
    given, default = args.accelerator_config, AcceleratorConfig()
    for name in ("split_batches", "dispatch_batches", "even_batches", "gradient_accumulation_kwargs"):
        if bool(value := getattr(given, name)) != bool(getattr(default, name)):
            raise UserError(
                f"trainer.hf.accelerator_config.{name}={value!r}: is decided by the training loop, not to be changed"
            )
    for name in _USES_OF_ACCELERATE:
        if os.environ.get(name, "").lower() in _TRUE:
            raise UserError(
                f"{name}={os.environ[name]}: accelerate is to spread the model in a way that is not supported"
            )
    if args.mixed_precision != precision.replace("fp32", "no"):
        raise UserError(
            f"ACCELERATE_MIXED_PRECISION={args.mixed_precision}: accelerate is to compute so, but "
            f"trainer.precision={precision}; give trainer.precision={args.mixed_precision}, or change accelerate's"
        )


def _fields_set_here(cfg: RunConfig) -> dict[str, Any]:
    """The fields of `TrainingArguments` that follow from our configuration, or that our loop relies on."""
    trainer, optim = cfg.trainer, cfg.optim
    micro_batch_size, accumulation = trainer.cut_batch(num_processes())
    schedule, schedule_kwargs, warmup_steps = schedule_arguments(optim, trainer.max_steps)
    ours = {
        "output_dir": str(Path(cfg.run_dir or ".") / "checkpoints"),
        "seed": cfg.seed,
        "run_name": cfg.run_name,
        "report_to": "none",
        "max_steps": trainer.max_steps,
        "per_device_train_batch_size": micro_batch_size,
        "per_device_eval_batch_size": trainer.eval_batch_size or micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "logging_steps": trainer.logging_steps,
        "save_strategy": "steps",
        "save_steps": trainer.save_steps or trainer.max_steps,
        "eval_strategy": "steps",
        "eval_steps": trainer.eval_steps or trainer.max_steps,
        "learning_rate": optim.learning_rate,
        "lr_scheduler_type": schedule,
        "lr_scheduler_kwargs": schedule_kwargs,
        "warmup_steps": warmup_steps,
        "max_grad_norm": trainer.max_grad_norm,
        "gradient_checkpointing": trainer.gradient_checkpointing,
        "bf16": trainer.precision == "bf16",
        "fp16": trainer.precision == "fp16",
        "use_cpu": os.environ.get("ACCELERATE_USE_CPU", "").lower() in _TRUE,  # else no bf16 there
        "dataloader_num_workers": trainer.dataloader_num_workers,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "dataloader_drop_last": True,
        "average_tokens_across_devices": True,  # the loss is divided by the predicted tokens of all processes
        "logging_nan_inf_filter": False,  # it would hide what must stop the run
        "disable_tqdm": True,  # there is a bar of our own
        "log_level": "warning",
        # Else every parameter takes part in every step; looking for idle ones costs a walk through the graph.
        "ddp_find_unused_parameters": cfg.draws_patterns,
    }
    # Newer versions call it activation checkpointing.
    if "activation_checkpointing" in _fields():
        ours["activation_checkpointing"] = ours.pop("gradient_checkpointing")
    return ours


def _fields() -> set[str]:
    return {field.name for field in dataclasses.fields(TrainingArguments) if field.init}


def _check_switches(cfg: TrainerConfig) -> None:
    """Refuses what cannot work on this machine."""
    if cfg.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("trainer.precision='fp16': needs a GPU, which torch does not see; use bf16 or fp32")
    if cfg.use_liger_kernel:
        for fault, is_there in (
            ("a CUDA GPU, which torch does not see", torch.cuda.is_available()),
            ("Triton, which is not installed", importlib.util.find_spec("triton") is not None),
            ("liger-kernel: pip install 'lckv[gpu]'", importlib.util.find_spec("liger_kernel") is not None),
        ):
            if not is_there:
                raise UserError(f"trainer.use_liger_kernel=true: needs {fault}")
    if not cfg.torch_compile:
        return
    backends = torch.compiler.list_backends(exclude_tags=())
    check_choice("trainer.torch_compile_backend", cfg.torch_compile_backend, backends)
    if cfg.torch_compile_backend == "inductor" and cfg.torch_compile_mode is not None:
        from torch._inductor import list_mode_options  # takes seconds to import

        check_choice("trainer.torch_compile_mode", cfg.torch_compile_mode, list_mode_options())
    if cfg.torch_compile_backend == "inductor" and torch.cuda.is_available():
        if importlib.util.find_spec("triton") is None:
            raise UserError("trainer.torch_compile=true: needs Triton, which is not installed")
    elif cfg.torch_compile_backend == "inductor":
        if shutil.which(os.environ.get("CXX", "g++")) is None and shutil.which("clang++") is None:
            raise UserError(
                "trainer.torch_compile=true: needs a C++ compiler on a CPU, and there is no g++ or clang++ on the PATH"
            )
