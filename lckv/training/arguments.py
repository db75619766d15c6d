"""From our configuration to transformers' `TrainingArguments`, with every switch checked before any work."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from lckv.config import TrainConfig, TrainerConfig
from lckv.errors import UserError, check_choice, check_whole_number, near_miss
from lckv.processes import num_processes
from lckv.training.optim import schedule_arguments
from lckv.training.teacher import check_teacher_settings
from lckv.training.trainable import TRAINABLE

_OURS = {
    "output_dir": "run_dir",
    "seed": "seed",
    "data_seed": "seed",
    "run_name": "run_name",
    "report_to": "logger.names",
    "per_device_train_batch_size": "trainer.micro_batch_size",
    "per_device_eval_batch_size": "trainer.eval_batch_size",
    "gradient_accumulation_steps": "trainer.global_batch_size",
    "num_train_epochs": "trainer.max_steps",
    "activation_checkpointing": "trainer.gradient_checkpointing",
    "bf16": "trainer.precision",
    "fp16": "trainer.precision",
    "resume_from_checkpoint": "trainer.resume",
    "optim": "optim.name",
    "lr_scheduler_type": "optim.schedule",
    "lr_scheduler_kwargs": "optim.schedule",
    "learning_rate": "optim.learning_rate",
    "warmup_steps": "optim.warmup_steps",
    "warmup_ratio": "optim.warmup_steps",
    "weight_decay": "optim.weight_decay",
    "adam_beta1": "optim.betas",
    "adam_beta2": "optim.betas",
    "adam_epsilon": "optim.eps",
    "use_cpu": "the environment variable ACCELERATE_USE_CPU",
}
"""Fields of `TrainingArguments` that have a key of their own here, which `trainer.hf` must not contradict."""

# What the loop does in a way of its own, so that the field would have no effect or an undoing one.
_FIXED = {
    "eval_strategy", "save_strategy", "logging_strategy", "average_tokens_across_devices", "train_sampling_strategy",
    "dataloader_drop_last", "disable_tqdm", "logging_nan_inf_filter", "remove_unused_columns", "do_train", "do_eval",
    "do_predict", "load_best_model_at_end", "ignore_data_skip", "auto_find_batch_size", "save_only_model",
    "label_smoothing_factor", "n_gpu", "optim_args", "optim_target_modules", "liger_kernel_config", "bf16_full_eval",
    "fp16_full_eval", "prediction_loss_only", "eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics",
    "eval_do_concat_batches", "eval_use_gather_object", "metric_for_best_model", "greater_is_better",
}  # fmt: skip


def gradient_accumulation_steps(cfg: TrainerConfig, num_processes: int) -> tuple[int, int]:
    """Cuts the global batch up: returns the micro batch size of a process, and how many of them it accumulates.

    Raises:
        UserError: if the global batch does not divide.
    """
    for name in ("global_batch_size", "micro_batch_size", "eval_batch_size"):
        if getattr(cfg, name) is not None:
            check_whole_number(f"trainer.{name}", getattr(cfg, name))
    if cfg.micro_batch_size is None and cfg.global_batch_size % num_processes == 0:
        return cfg.global_batch_size // num_processes, 1
    micro_batch_size = cfg.micro_batch_size or 1
    at_once = micro_batch_size * num_processes
    if cfg.global_batch_size % at_once:
        micro = f"trainer.micro_batch_size={micro_batch_size} times " if cfg.micro_batch_size else ""
        raise UserError(
            f"trainer.global_batch_size={cfg.global_batch_size}: is not divisible by {micro}{num_processes} "
            f"process{'es' * (num_processes > 1)}; nearest allowed is "
            f"{max(1, round(cfg.global_batch_size / at_once)) * at_once}"
        )
    return micro_batch_size, cfg.global_batch_size // at_once


def build_training_arguments(cfg: TrainConfig) -> TrainingArguments:
    """Builds transformers' arguments for a run.

    Raises:
        UserError: if a number is out of range, a switch cannot work on this machine, or `trainer.hf` has an unknown
            field, or one that has a key of its own.
    """
    trainer = cfg.trainer
    if not 0 <= cfg.seed < 2**32:
        raise UserError(f"seed={cfg.seed}: allowed is a whole number, 0 to {2**32 - 1}")
    _check_numbers(trainer)
    _check_combinations(cfg)
    _check_switches(trainer)
    check_teacher_settings(cfg)
    _check_pass_through(trainer.hf)
    if not torch.accelerator.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # else processes under torchrun do not find each other
    try:
        args = TrainingArguments(**{**_fields_set_here(cfg), **trainer.hf})
    except (ValueError, ImportError, TypeError) as error:
        raise UserError(f"transformers refuses these training arguments: {error}") from error
    if args.world_size != num_processes():
        # Each would train alone, all into one run folder.
        raise UserError(
            f"{num_processes()} processes were launched, but this one is on its own; launch with `torchrun` or "
            "`accelerate launch`, which set RANK and LOCAL_RANK, and with as many processes as there are devices"
        )
    return args


def _fields_set_here(cfg: TrainConfig) -> dict[str, Any]:
    """The fields of `TrainingArguments` that follow from our configuration, or that our loop relies on."""
    trainer, optim = cfg.trainer, cfg.optim
    micro_batch_size, accumulation = gradient_accumulation_steps(trainer, num_processes())
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
        "use_cpu": os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes"),  # else no bf16 there
        "dataloader_num_workers": trainer.dataloader_num_workers,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "dataloader_drop_last": True,
        "average_tokens_across_devices": True,  # the loss is divided by the predicted tokens of all processes
        "logging_nan_inf_filter": False,  # it would hide what must stop the run
        "disable_tqdm": True,  # there is a bar of our own
        "log_level": "warning",
        # Every parameter takes part in every step; looking for idle ones would cost a walk through the graph.
        "ddp_find_unused_parameters": False,
    }
    # Newer versions call it activation checkpointing.
    if "activation_checkpointing" in _fields():
        ours["activation_checkpointing"] = ours.pop("gradient_checkpointing")
    return ours


def _fields() -> set[str]:
    return {field.name for field in dataclasses.fields(TrainingArguments) if field.init}


def _check_numbers(cfg: TrainerConfig) -> None:
    for name, minimum in (("max_steps", 1), ("logging_steps", 1), ("sample_tokens", 0), ("dataloader_num_workers", 0)):
        check_whole_number(f"trainer.{name}", getattr(cfg, name), minimum)
    for name in ("eval_steps", "save_steps", "save_total_limit", "sample_steps", "evaluation_steps"):
        value = getattr(cfg, name)
        if value is not None and value < 1:
            raise UserError(f"trainer.{name}={value}: allowed is a whole number, 1 or more, or null")
    if not 0 <= cfg.max_grad_norm < math.inf:
        raise UserError(f"trainer.max_grad_norm={cfg.max_grad_norm}: allowed is a number, 0 (no clipping) or more")


def _check_switches(cfg: TrainerConfig) -> None:
    check_choice("trainer.precision", cfg.precision, ("fp32", "bf16", "fp16"))
    check_choice("trainer.trainable", cfg.trainable, TRAINABLE)
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
    if cfg.torch_compile:
        _check_can_compile(cfg.torch_compile_backend)


def _check_combinations(cfg: TrainConfig) -> None:
    """Refuses settings of the model and of the loop that do not go together."""
    model, trainer = cfg.model, cfg.trainer
    if model.dtype == "float16" and trainer.precision == "fp16":
        raise UserError(
            "model.dtype=float16: cannot be trained with trainer.precision=fp16, whose loss scaling needs gradients "
            "in float32; leave model.dtype out"
        )
    if cfg.data.block_size > model.max_position_embeddings:
        raise UserError(
            f"data.block_size={cfg.data.block_size}: longer than model.max_position_embeddings="
            f"{model.max_position_embeddings}; lower the one or raise the other"
        )
    if model.use_sequential and trainer.gradient_checkpointing:
        raise UserError("model.use_sequential=true: cannot be trained with trainer.gradient_checkpointing=true")
    if trainer.use_liger_kernel and (model.hidden_act not in ("silu", "swish") or model.mlp_bias):
        given = "model.mlp_bias=true" if model.mlp_bias else f"model.hidden_act={model.hidden_act}"
        raise UserError(f"trainer.use_liger_kernel=true: Liger has no MLP for {given}, only for silu without bias")
    for name in ("torch_compile_backend", "torch_compile_mode"):
        value = getattr(trainer, name)
        if not trainer.torch_compile and value != getattr(TrainerConfig, name):
            raise UserError(f"trainer.{name}={value}: has no effect without trainer.torch_compile=true")


def _check_can_compile(backend: str) -> None:
    check_choice("trainer.torch_compile_backend", backend, torch.compiler.list_backends(exclude_tags=()))
    if backend != "inductor":
        return
    if torch.cuda.is_available():
        if importlib.util.find_spec("triton") is None:
            raise UserError("trainer.torch_compile=true: needs Triton, which is not installed")
    elif shutil.which(os.environ.get("CXX", "g++")) is None and shutil.which("clang++") is None:
        raise UserError(
            "trainer.torch_compile=true: needs a C++ compiler on a CPU, and there is no g++ or clang++ on the PATH"
        )


def _check_pass_through(given: dict[str, Any]) -> None:
    allowed = _fields()
    ours = dict(_OURS, **{item.name: f"trainer.{item.name}" for item in dataclasses.fields(TrainerConfig)})
    for name in given:
        if name in ours:
            raise UserError(f"trainer.hf.{name}: set {ours[name]} instead")
        if name in _FIXED:
            raise UserError(f"trainer.hf.{name}: is decided by the training loop and cannot be changed")
        if name not in allowed:
            raise UserError(
                f"trainer.hf.{name}: transformers' TrainingArguments has no such field{near_miss(name, allowed)}"
            )
