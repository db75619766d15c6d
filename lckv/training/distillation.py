"""Training against a teacher: its next-token distributions, and what its attention layers put out."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lckv.config import TeacherConfig
from lckv.errors import UserError
from lckv.evaluation.perplexity import IGNORE_INDEX
from lckv.training.trainer import LCKVTrainer

logger = logging.getLogger(__name__)

_NUM_BLOCKS_FOR_SCALES = 8


class AttentionOutputs(ExitStack):
    """A context in which a model's calls leave behind what their attention layers put out, projection included.

    Of the passes over a cycle the last one counts. Models that run token by token have each token's output kept.

    Args:
        model: a Llama-shaped model.
        num_tokens: `q_len` of the calls.
    """

    def __init__(self, model: nn.Module, num_tokens: int) -> None:
        super().__init__()
        self.modules = [layer.self_attn for layer in cast(Any, model).model.layers]
        self.num_tokens = num_tokens
        self._parts: list[list[Tensor]] = [[] for _ in self.modules]

    def __enter__(self) -> Self:
        # Gone again before the backward pass, in which checkpointed layers are called once more.
        for layer_idx, module in enumerate(self.modules):
            self.enter_context(module.register_forward_hook(partial(self._keep, layer_idx)))
        return self

    def _keep(self, layer_idx: int, module: nn.Module, args: Any, output: tuple[Tensor, Any]) -> None:
        parts = self._parts[layer_idx]
        if sum(part.shape[1] for part in parts) == self.num_tokens:
            parts.clear()  # another pass begins
        parts.append(output[0])

    def __iter__(self) -> Any:
        """Yields each layer's output, `(batch, q_len, hidden_size)`, from the bottom."""
        for parts in self._parts:
            yield parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def divergence(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of a model's distributions from the teacher's, in nats.

    Both are taken at a temperature whose square the result is multiplied by, which keeps gradients of a size (Hinton
    et al., 2015).

    Args:
        logits: `(batch, q_len, vocab_size)`.
        teacher_logits: like `logits`.
        temperature: what both are divided by.

    Returns:
        `(batch, q_len)`.
    """
    log_probs = F.log_softmax(logits.float() / temperature, dim=-1)
    target = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    return F.kl_div(log_probs, target, reduction="none", log_target=True).sum(-1) * temperature**2


def attention_error(outputs: Iterable[Tensor], teacher_outputs: Iterable[Tensor], scales: Sequence[float]) -> Tensor:
    """Squared distance of attention outputs from the teacher's, relative to the teacher's size, averaged over layers.

    Layers in which the teacher puts out nothing but zeros have no size to go by, and are left out.

    Args:
        outputs: of each layer, `(batch, q_len, hidden_size)`.
        teacher_outputs: like `outputs`.
        scales: of each layer, the mean square of the teacher's outputs.

    Returns:
        `(batch, q_len)`.
    """
    errors = [
        (output.float() - target.float()).square().mean(-1) / scale
        for output, target, scale in zip(outputs, teacher_outputs, scales, strict=True)
        if scale
    ]
    return torch.stack(errors).mean(0)


def sum_over_predicted(values: Tensor, labels: Tensor) -> Tensor:
    """Adds up `values` `(batch, q_len)` of the tokens from which `labels` `(batch, q_len)` has something predicted."""
    return torch.where(labels[:, 1:] != IGNORE_INDEX, values[:, :-1], 0.0).sum()


class DistillationLoss:
    """The weighted sum of what a model differs from its teacher in, and of the usual loss.

    Args:
        cfg: the weights and the temperature.
        scales: for each layer, the mean square of the teacher's attention output; `None` where that has no weight.
    """

    def __init__(self, cfg: TeacherConfig, scales: Sequence[float] | None) -> None:
        weights = {"logits": cfg.logits_weight, "attention": cfg.attention_weight, "labels": cfg.labels_weight}
        self.weights = {name: weight for name, weight in weights.items() if weight}
        if not cfg.logits_weight:
            # Be it 0: every parameter takes part in every step, as processes that add up gradients rely on.
            self.weights["labels"] = cfg.labels_weight
        self.temperature = cfg.temperature
        self.scales = scales

    def parts(
        self,
        logits: Tensor,
        teacher_logits: Tensor,
        outputs: Iterable[Tensor],
        teacher_outputs: Iterable[Tensor],
        labels: Tensor,
    ) -> dict[str, Tensor]:
        """The parts of the loss, each a sum over the predicted tokens, by name.

        Those that [`total`][lckv.training.distillation.DistillationLoss.total] has no use for are numbers to look at:
        no graph is kept for them.

        Args:
            logits: `(batch, q_len, vocab_size)`.
            teacher_logits: like `logits`.
            outputs: attention outputs of each layer, `(batch, q_len, hidden_size)`; used where they have a weight.
            teacher_outputs: like `outputs`.
            labels: `(batch, q_len)`, the one at *i* predicted from *i - 1*; -100 is not predicted.
        """
        own = {name: logits if name in self.weights else logits.detach() for name in ("logits", "labels")}
        parts = {"logits": sum_over_predicted(divergence(own["logits"], teacher_logits, self.temperature), labels)}
        if self.scales is not None:
            parts["attention"] = sum_over_predicted(attention_error(outputs, teacher_outputs, self.scales), labels)
        targets = labels[:, 1:].flatten()
        parts["labels"] = F.cross_entropy(
            own["labels"][:, :-1].float().flatten(0, 1), targets, ignore_index=IGNORE_INDEX, reduction="sum"
        )
        return parts

    def total(self, parts: dict[str, Tensor]) -> Tensor:
        """The loss, a scalar, that these parts make, with gradients only through those that have a weight."""
        return torch.stack([weight * parts[name] for name, weight in self.weights.items()]).sum()


def check_teacher_fits(
    teacher: PreTrainedModel, student: PreTrainedModel, cfg: TeacherConfig, block_size: int
) -> None:
    """Raises a UserError if the outputs of two models, on blocks of `block_size` tokens, cannot be compared."""
    compared = ["vocab_size"]
    if cfg.attention_weight:
        compared += ["num_hidden_layers", "hidden_size"]
    for name in compared:
        own, theirs = getattr(student.config, name), getattr(teacher.config, name)
        if own != theirs:
            ways_out = " or set teacher.attention_weight=0" if name != "vocab_size" else ""
            raise UserError(
                f"teacher.source={cfg.source}: its {name} is {theirs}, the trained model's {own}; they must be "
                f"equal: give another teacher{ways_out}"
            )
    if block_size > teacher.config.max_position_embeddings:
        raise UserError(
            f"data.block_size={block_size}: longer than the teacher's max_position_embeddings="
            f"{teacher.config.max_position_embeddings}; lower it"
        )


class DistillationTrainer(LCKVTrainer):
    """Trains a model against a teacher, which sees the same tokens, positions and documents.

    Args:
        *args: as for [`LCKVTrainer`].
        teacher: the model to learn from; it is moved to the trained model's device, and frozen.
        distillation: what is learnt from it.
        **kwargs: as for [`LCKVTrainer`].
    """

    def __init__(self, *args: Any, teacher: PreTrainedModel, distillation: TeacherConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher.requires_grad_(False).eval()
        self.teacher.to(self.args.device)
        self._attention_weight = distillation.attention_weight
        self.distillation_loss = DistillationLoss(
            distillation, self._measure_scales() if self._attention_weight else None
        )
        self._parts: dict[str, Tensor] = {}  # of the steps since the last log, each over its predicted tokens
        self._num_steps = 0

    @torch.no_grad()
    def _measure_scales(self) -> list[float]:
        """The mean square of the teacher's attention outputs, layer by layer, over blocks from all of the data."""
        # Measured once: within a batch it would depend on how the batch is cut up.
        dataset = cast(Any, self.train_dataset)
        num_blocks = min(_NUM_BLOCKS_FOR_SCALES, len(dataset))
        squares, num_tokens = [], 0
        for number in range(num_blocks):
            inputs = self.data_collator([dataset[number * len(dataset) // num_blocks]])
            labels = inputs["labels"]
            with self.compute_loss_context_manager():
                _, outputs = self._run_teacher(cast(dict[str, Any], self._prepare_inputs(inputs)))
            squares.append([sum_over_predicted(x.float().square().mean(-1).cpu(), labels).item() for x in outputs])
            num_tokens += int((labels[:, 1:] != IGNORE_INDEX).sum())
        scales = [sum(layer) / max(1, num_tokens) for layer in zip(*squares, strict=True)]
        if not any(scales):
            raise UserError(
                f"teacher.attention_weight={self._attention_weight}: the teacher's attention outputs in {num_blocks} "
                "blocks of the text are all zero, or no token is predicted there; allowed is 0"
            )
        if silent := [layer_idx for layer_idx, scale in enumerate(scales) if not scale]:
            logger.warning("the attention of the teacher's layers %s puts out zeros; they are left out", silent)
        return scales

    def _run_teacher(self, inputs: dict[str, Any]) -> tuple[Tensor, Iterable[Tensor]]:
        """The teacher's logits and, if they have a weight, attention outputs."""
        with torch.no_grad():
            outputs, attention_outputs = self._run(self.teacher, self.teacher, {**inputs, "use_cache": False})
        return outputs.logits, attention_outputs

    def _run(self, model: nn.Module, unwrapped: nn.Module, inputs: dict[str, Any]) -> tuple[Any, Iterable[Tensor]]:
        # Without labels: the model's own loss would be computed for nothing, and Liger's writes into the logits.
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        if not self._attention_weight:
            return model(**inputs), ()
        with AttentionOutputs(unwrapped, inputs["input_ids"].shape[1]) as attention_outputs:
            return model(**inputs), attention_outputs

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Computes the loss, and keeps its parts for the log and, at logging steps, the residual."""
        teacher_logits, teacher_attention = self._run_teacher(inputs)
        outputs, attention = self._run(
            model, self.accelerator.unwrap_model(model), inputs | self.residual_arguments(model)
        )
        self.keep_residual(outputs)
        parts = self.distillation_loss.parts(
            outputs.logits, teacher_logits, attention, teacher_attention, inputs["labels"]
        )
        # As in transformers' own: gradients are averaged over the processes, but the sum is meant.
        factor = self.args.world_size / num_items_in_batch
        parts = {name: part * factor for name, part in parts.items()}
        for name, part in parts.items():
            self._parts[name] = self._parts.get(name, torch.zeros_like(part)) + part.detach()
        loss = self.distillation_loss.total(parts)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Computes loss and gradients of one micro batch, and counts the steps that are to be logged."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._num_steps += int(self.accelerator.sync_gradients)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the parts of the loss to the training metrics and logs them."""
        if "loss" in logs:
            for name, part in self._parts.items():
                mean = self.accelerator.reduce(part / self._num_steps, "mean")
                logs[f"loss_{name}"] = cast(Tensor, mean).item()
            self._parts, self._num_steps = {}, 0
        super().log(logs, start_time)
