"""Which fields of transformers' `TrainingArguments` are not for `trainer.hf` to set."""

from __future__ import annotations

from typing import Any

from lckv.errors import UserError

OURS = {
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
FIXED = {
    "eval_strategy", "save_strategy", "logging_strategy", "average_tokens_across_devices", "train_sampling_strategy",
    "dataloader_drop_last", "disable_tqdm", "logging_nan_inf_filter", "remove_unused_columns", "do_train", "do_eval",
    "do_predict", "load_best_model_at_end", "ignore_data_skip", "auto_find_batch_size", "save_only_model",
    "label_smoothing_factor", "n_gpu", "optim_args", "optim_target_modules", "liger_kernel_config", "bf16_full_eval",
    "fp16_full_eval", "prediction_loss_only", "eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics",
    "eval_do_concat_batches", "eval_use_gather_object", "metric_for_best_model", "greater_is_better",
}  # fmt: skip


def no_key_of_ours(name: str, given: dict[str, Any]) -> None:
    """Fields that have no key of their own here, and that the training loop leaves open."""
    for field in given:
        if field in OURS:
            raise UserError(f"{name}.{field}: set {OURS[field]} instead")
        if field in FIXED:
            raise UserError(f"{name}.{field}: is decided by the training loop and cannot be changed")
