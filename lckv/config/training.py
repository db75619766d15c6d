"""What can be configured of a training, and of what is counted before it runs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from lckv.config.data import DataConfig, TokenizerConfig
from lckv.config.evaluation import EvaluationConfig
from lckv.config.keys import Group, above_zero, at_least, each, is_named, key, not_negative, one_of, such_that
from lckv.config.model import LatentConfig, ModelConfig, SharingConfig
from lckv.config.names import (
    AUTO_LATENT,
    CALIBRATED,
    LATENTS,
    OPTIMIZERS,
    RANDOM,
    RIEMANNIAN,
    SCHEDULES,
    TRACKERS,
    TRAINABLE,
    TRAINED,
    XKV,
)
from lckv.config.pretrained import InitConfig, TeacherConfig
from lckv.errors import UserError
from lckv.sharing.costs import DTYPE_BYTES

OF_OURS = {
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
"""Fields of `TrainingArguments` that have a key of another name here, which `trainer.hf` must not contradict."""

# What the loop does in a way of its own, so that the field would have no effect or an undoing one.
_FIXED = {
    "eval_strategy", "save_strategy", "logging_strategy", "average_tokens_across_devices", "train_sampling_strategy",
    "dataloader_drop_last", "disable_tqdm", "logging_nan_inf_filter", "remove_unused_columns", "do_train", "do_eval",
    "do_predict", "load_best_model_at_end", "ignore_data_skip", "auto_find_batch_size", "save_only_model",
    "label_smoothing_factor", "n_gpu", "optim_args", "optim_target_modules", "liger_kernel_config", "bf16_full_eval",
    "fp16_full_eval", "prediction_loss_only", "eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics",
    "eval_do_concat_batches", "eval_use_gather_object", "metric_for_best_model", "greater_is_better",
    "parallelism_config",
}  # fmt: skip


def _no_key_of_ours(name: str, given: dict[str, Any]) -> None:
    """Fields that have no key of their own here, and that the training loop leaves open."""
    ours = {item.name: f"trainer.{item.name}" for item in fields(TrainerConfig)} | OF_OURS
    for item in given:
        if item in ours:
            raise UserError(f"{name}.{item}: set {ours[item]} instead")
        if item in _FIXED:
            raise UserError(f"{name}.{item}: is decided by the training loop and cannot be changed")


seed_of_32_bits = such_that(lambda value: 0 <= value < 2**32, f"allowed is a whole number, 0 to {2**32 - 1}")


@dataclass
class TrainerConfig(Group):
    """The training loop.

    The global batch is what the result depends on; how it is cut up is not: any micro batch and any number of
    processes see the same blocks in the same step, and the loss is divided by all their predicted tokens together.

    Attributes:
        max_steps: optimizer steps.
        global_batch_size: blocks per optimizer step, over all processes and accumulation steps.
        micro_batch_size: blocks per forward pass of one process; what is missing to the global batch is accumulated.
            None: the process's whole share at once.
        eval_batch_size: blocks per forward pass in evaluation; None: as `micro_batch_size`. Changes no result.
        eval_steps: evaluate on the validation split every so many steps and at the end; None: only at the end.
        save_steps: save a checkpoint every so many steps and at the end; None: only at the end.
        save_total_limit: how many checkpoints to keep; None: all.
        logging_steps: write the training metrics every so many steps.
        sample_steps: let the model continue `sample_prompt` every so many steps and at the end; None: only at the end.
        sample_tokens: how many tokens it adds.
        evaluation_steps: run the evaluations that `evaluation.evals` names every so many steps and at the end; None:
            only at the end.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
        torch_compile: compile the decoder layers; needs a C++ compiler, on a GPU Triton.
        torch_compile_backend: torch.compile's backend; only "inductor" generates code.
        torch_compile_mode: torch.compile's mode, such as "max-autotune"; None: torch's default.
        use_liger_kernel: Liger's fused kernels; needs a GPU, Triton and liger-kernel.
        precision: "fp32", or "bf16" or "fp16" for mixed precision.
        trainable: what is trained: "all", "kv" (the layers' key and value projections alone) or "qkv" (queries, too).
        max_grad_norm: gradients with a larger norm are scaled down to it; 0: never.
        num_threads: torch's threads per process; None: $OMP_NUM_THREADS, or physical cores / processes per machine.
        resume: whether the same command goes on with an interrupted run; false refuses a folder that holds one.
        hf: any further field of transformers' `TrainingArguments`, e.g. `trainer.hf.fsdp=true`,
            `trainer.hf.deepspeed=zero2.json` or `trainer.hf.ddp_timeout=3600`.
    """

    max_steps: int = key(1000, at_least())
    global_batch_size: int = key(16, at_least())
    micro_batch_size: int | None = key(None, at_least())
    eval_batch_size: int | None = key(None, at_least())
    eval_steps: int | None = key(200, at_least(or_null=True))
    save_steps: int | None = key(200, at_least(or_null=True))
    save_total_limit: int | None = key(2, at_least(or_null=True))
    logging_steps: int = key(10, at_least())
    sample_steps: int | None = key(200, at_least(or_null=True))
    sample_prompt: str = "In the beginning"
    sample_tokens: int = key(40, at_least(0))
    evaluation_steps: int | None = key(None, at_least(or_null=True))
    gradient_checkpointing: bool = False
    torch_compile: bool = False
    torch_compile_backend: str = key("inductor", only_with={"torch_compile": (True,)})
    torch_compile_mode: str | None = key(None, only_with={"torch_compile": (True,)})
    use_liger_kernel: bool = False
    precision: str = key("fp32", one_of(("fp32", "bf16", "fp16")))
    trainable: str = key("all", one_of(TRAINABLE))
    max_grad_norm: float = key(
        1.0, such_that(lambda value: 0 <= value < math.inf, "allowed is a number, 0 (no clipping) or more")
    )
    dataloader_num_workers: int = key(0, at_least(0))
    num_threads: int | None = key(None, at_least())
    resume: bool = True
    hf: dict[str, Any] = key({}, _no_key_of_ours)

    def cut_batch(self, num_processes: int) -> tuple[int, int]:
        """Cuts the global batch up: returns the micro batch size of a process, and how many of them it accumulates.

        Raises:
            UserError: if the global batch does not divide.
        """
        if self.micro_batch_size is None and self.global_batch_size % num_processes == 0:
            return self.global_batch_size // num_processes, 1
        micro_batch_size = self.micro_batch_size or 1
        at_once = micro_batch_size * num_processes
        if self.global_batch_size % at_once:
            micro = f"trainer.micro_batch_size={micro_batch_size} times " if self.micro_batch_size else ""
            raise UserError(
                f"trainer.global_batch_size={self.global_batch_size}: is not divisible by {micro}{num_processes} "
                f"process{'es' * (num_processes > 1)}; nearest allowed is "
                f"{max(1, round(self.global_batch_size / at_once)) * at_once}"
            )
        return micro_batch_size, self.global_batch_size // at_once


@dataclass
class OptimConfig(Group):
    """Optimizer and learning rate schedule.

    Attributes:
        name: "adamw", "muon" (hidden matrices by Muon, the rest by AdamW), or "riemannian_adam" (up-projections of
            latents by Riemannian Adam, so that their columns stay orthonormal, the rest by AdamW; needs geoopt).
        learning_rate: the peak; Muon's updates are scaled so that AdamW's value suits it too.
        min_learning_rate: what the schedules that decay end at; None: a tenth of the peak.
        schedule: "cosine", "wsd" (warm up, stay, decay), "linear" or "constant"; all warm up linearly.
        warmup_steps: None: 5 % of `trainer.max_steps`.
        decay_steps: schedule "wsd": length of the decay; None: 20 % of `trainer.max_steps`.
        weight_decay: for matrices; norms and biases have none.
        betas: AdamW's.
        eps: AdamW's.
        momentum: Muon's.
        fused: AdamW's one-kernel step; None: where torch has it.
    """

    name: str = key("adamw", one_of(OPTIMIZERS))
    learning_rate: float = key(1e-3, above_zero)
    min_learning_rate: float | None = key(None, only_with={"schedule": ("cosine", "wsd", "linear")})
    schedule: str = key("cosine", one_of(SCHEDULES))
    warmup_steps: int | None = None
    decay_steps: int | None = key(None, only_with={"schedule": ("wsd",)})
    weight_decay: float = key(0.1, not_negative)
    betas: tuple[float, float] = key(
        (0.9, 0.95),
        such_that(
            lambda betas: len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
            "allowed are two numbers, 0 up to, but without, 1",
        ),
    )
    eps: float = key(1e-8, not_negative)
    momentum: float = key(0.95, not_negative, only_with={"name": ("muon",)})
    fused: bool | None = None

    def check(self, prefix: str) -> None:
        """Refuses a learning rate that would grow where it is to decay."""
        if self.min_learning_rate is not None and not 0 <= self.min_learning_rate < self.learning_rate:
            raise UserError(
                f"{prefix}min_learning_rate={self.min_learning_rate}: must be 0 or more and below "
                f"{prefix}learning_rate={self.learning_rate}"
            )

    def num_warmup_steps(self, max_steps: int) -> int:
        """For how many of `max_steps` the learning rate grows."""
        return round(0.05 * max_steps) if self.warmup_steps is None else self.warmup_steps

    def num_decay_steps(self, max_steps: int) -> int:
        """For how many of `max_steps` the learning rate falls, with the schedule "wsd"."""
        return round(0.2 * max_steps) if self.decay_steps is None else self.decay_steps

    def check_steps(self, max_steps: int, prefix: str) -> None:
        """Refuses parts of a schedule that are longer than the `max_steps` of the whole."""
        warmup_steps, decay_steps = self.num_warmup_steps(max_steps), self.num_decay_steps(max_steps)
        for name, steps in ("warmup_steps", warmup_steps), ("decay_steps", decay_steps):
            if not 0 <= steps <= max_steps:
                raise UserError(f"{prefix}{name}={steps}: allowed is 0 to trainer.max_steps={max_steps}")
        if self.schedule == "wsd" and warmup_steps + decay_steps > max_steps:
            raise UserError(
                f"{prefix}decay_steps={decay_steps}: with {prefix}warmup_steps={warmup_steps} these are "
                f"more than trainer.max_steps={max_steps}"
            )


@dataclass
class LoggerConfig(Group):
    """Where the training curves go beside `metrics.jsonl`, which is always written.

    Attributes:
        names: any of "tensorboard", "wandb" and "trackio".
        project: wandb's or trackio's project.
        mode: wandb's mode, "online" or "offline" (`wandb sync` uploads later).
    """

    names: list[str] = key([], each(one_of(TRACKERS)))
    project: str = "lckv"
    mode: str = key("offline", one_of(("online", "offline")))


@dataclass
class RunConfig(Group):
    """What every training is told, whatever it trains and on what: all that its run folder and its loop ask for."""

    if TYPE_CHECKING:  # where each stands among its keys is for the classes to say that derive from this
        trainer: TrainerConfig
        optim: OptimConfig
        logger: LoggerConfig
        seed: int
        run_name: str | None
        run_dir: str | None

    @property
    def draws_patterns(self) -> bool:
        """Whether every step draws anew whom layers read."""
        return False


@dataclass
class TrainConfig(RunConfig):
    """Everything that `python -m lckv.train` needs.

    Attributes:
        evaluation: what is evaluated beside the validation loss, on the same text; see `lckv.evaluate`.
        run_name: name of the run folder; None makes one from model, sharing and seed.
        run_dir: the run folder; None puts it under `runs/`, and the jobs of a sweep under `runs/sweep/`.
        iso: what sharing must not change against Llama of the same sizes: "params" widens the MLP until the parameters
            are as many, "kv" takes more heads of keys and values, until as many bytes are written per token.
        iso_multiple: with "params", the MLP's width is a multiple of this.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    init: InitConfig = field(default_factory=InitConfig)
    sharing: SharingConfig = field(default_factory=SharingConfig)
    latent: LatentConfig = field(default_factory=LatentConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    seed: int = key(0, seed_of_32_bits)
    run_name: str | None = None
    run_dir: str | None = key(None, is_named)
    iso: str | None = key(None, one_of(("params", "kv")))
    iso_multiple: int = key(8, at_least(), only_with={"iso": ("params",)})

    @property
    def draws_patterns(self) -> bool:
        """Whether every step draws anew whom layers read."""
        return self.sharing.is_random

    @property
    def given_pattern(self) -> str | None:
        """The sharing pattern as one types it; `None` for Llama's, which a pretrained model replaces by its own.

        So it does for those that are drawn in training.
        """
        if self.model.layer_types is not None:
            return f"model.layer_types={self.model.layer_types}"
        return None if self.sharing.name in ("llama", RANDOM) else f"sharing={self.sharing.name}"

    @property
    def has_teacher(self) -> bool:
        """Whether there is a model to learn from: one that is named, or the one that the training starts from."""
        return self.teacher.source is not None or (self.init.source is not None and self.init.method in TRAINED)

    def check(self, prefix: str) -> None:
        """Refuses settings of the model, the text, the loop and the teacher that do not go together."""
        model, trainer = self.model, self.trainer
        self._check_kind_of_latents()
        self.data.check_trains(f"{prefix}data.")
        self.optim.check_steps(trainer.max_steps, f"{prefix}optim.")
        if model.dtype == "float16" and trainer.precision == "fp16":
            raise UserError(
                "model.dtype=float16: cannot be trained with trainer.precision=fp16, whose loss scaling needs "
                "gradients in float32; leave model.dtype out"
            )
        if model.use_sequential and trainer.gradient_checkpointing:
            raise UserError("model.use_sequential=true: cannot be trained with trainer.gradient_checkpointing=true")
        if self.has_teacher:
            self._check_outputs_can_be_seen()
        if self.optim.name == RIEMANNIAN and model.dtype != "float32":
            raise UserError(
                f"model.dtype={model.dtype}: is too coarse for the orthonormal columns of optim.name={RIEMANNIAN}; "
                "allowed is float32, with any trainer.precision"
            )
        if self.init.source is None:  # else the sizes are the source's
            self.check_sizes()
            self.check_latents(own=model.kv_latents is not None)
        elif self.init.method in CALIBRATED and not self.latent.is_used and not self.init.calibration_tokens:
            raise UserError(f"init.calibration_tokens=0: {self.init.method} looks at text; allowed is 1 or more")

    def _check_kind_of_latents(self) -> None:
        kind, given = self.latent.name, self.given_pattern
        if kind in (XKV, AUTO_LATENT) and self.init.source is None:
            others = ", ".join(name for name in LATENTS if name != XKV)
            raise UserError(f"latent={kind}: looks at a pretrained model; give init.source, or one of {others}")
        if kind == XKV and given is not None:
            raise UserError(f"latent={kind}: has groups of layers of its own; leave {given} out, or take latent=joint")

    def check_sizes(self) -> None:
        """Refuses sizes of the model for which it could not be trained so.

        Raises:
            UserError: naming the keys.
        """
        model = self.model
        if model.cyclic_groups > self.data.block_size:
            raise UserError(
                f"model.cyclic_groups={model.cyclic_groups}: more groups than the {self.data.block_size} tokens of a "
                "block (data.block_size); lower it"
            )
        if self.data.block_size > model.max_position_embeddings:
            raise UserError(
                f"data.block_size={self.data.block_size}: longer than model.max_position_embeddings="
                f"{model.max_position_embeddings}; lower the one or raise the other"
            )
        if self.trainer.use_liger_kernel and (model.hidden_act not in ("silu", "swish") or model.mlp_bias):
            given = "model.mlp_bias=true" if model.mlp_bias else f"model.hidden_act={model.hidden_act}"
            raise UserError(f"trainer.use_liger_kernel=true: Liger has no MLP for {given}, only for silu without bias")

    def check_latents(self, own: bool) -> None:
        """Refuses what is for latents only, where none are asked for and the model has no `own` ones.

        Raises:
            UserError: naming the key.
        """
        if own or self.latent.is_used:
            if self.sharing.is_random:
                given = "a model with latents" if own else f"latent={self.latent.name}"
                raise UserError(f"sharing={RANDOM}: not with {given}, of which only the layers made for it make keys")
            return
        if self.optim.name == RIEMANNIAN:
            others = ", ".join(name for name in OPTIMIZERS if name != RIEMANNIAN)
            raise UserError(f"optim.name={RIEMANNIAN}: needs a model with latents, latent=joint; allowed are {others}")
        if self.teacher.reconstruction_weight:
            given = f"teacher.reconstruction_weight={self.teacher.reconstruction_weight}"
            raise UserError(f"{given}: needs a model with latents, latent=joint; allowed is 0")

    def _check_outputs_can_be_seen(self) -> None:
        """Refuses what would hide the layers' inputs and outputs, or gradients, from the hooks of the distillation."""
        seen = {name: weight for name, weight in self.teacher.weights.items() if name not in ("logits", "labels")}
        for name, weight in seen.items() if self.trainer.torch_compile else ():
            way_out = "set one to 0, or the other to false"
            raise UserError(
                f"teacher.{name}_weight={weight}: cannot be had with trainer.torch_compile=true; {way_out}"
            )
        for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
            if "attention" in seen and (self.trainer.hf.get(name) or {}).get("use_reentrant"):
                needed = f"trainer.hf.{name}.use_reentrant=false"
                given = f"teacher.attention_weight={self.teacher.attention_weight}"
                raise UserError(f"{given}: needs {needed}, or no gradient would get through")


def refuse_random(sharing: SharingConfig) -> None:
    """Refuses patterns that are drawn, where one is needed.

    Raises:
        UserError: naming `sharing`.
    """
    if sharing.is_random:
        raise UserError(
            f"sharing={RANDOM}: draws a pattern at every step of lckv.train; give one that it may draw, such as cla"
        )


@dataclass
class PlanConfig(TrainConfig):
    """Everything that `python -m lckv.plan` needs: any training configuration can be looked at before it runs.

    Attributes:
        context_length: tokens in the context for which bytes and FLOPs are counted; None: as many as the model allows.
        kv_dtype: type of the KV cache whose bytes are counted.
        converge_passes: with `forward_passes=converge`, the passes without gradient to count; None leaves them open.
        draw: an SVG, PNG or PDF file for the drawing.
        json: whether to print one JSON object and nothing else.
    """

    context_length: int | None = key(None, at_least())
    kv_dtype: str = key("bfloat16", one_of(DTYPE_BYTES))
    converge_passes: int | None = key(None, at_least(0))
    draw: str | None = None
    json: bool = False

    def check(self, prefix: str) -> None:
        """Refuses, beside what a training would, that there is no one pattern to look at."""
        super().check(prefix)
        refuse_random(self.sharing)
