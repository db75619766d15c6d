"""Training against a teacher: its next-token distributions, what its attention puts out, its keys and values."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple, Self, cast

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

_COMPARED = {
    "attention": ("num_hidden_layers", "hidden_size"),
    "reconstruction": ("num_hidden_layers", "hidden_size", "num_key_value_heads", "head_dim"),
}
"""Parts of the loss that compare what layers have, and the sizes in which a model and its teacher must agree."""

_WORDS = {"attention": "attention outputs", "reconstruction": "keys and values"}


class KeptOutputs(ExitStack):
    """A context in which a model's calls leave behind what some of its modules put out.

    Of the passes over a cycle the last one counts. Models that run token by token have each token's output kept.

    Args:
        modules: such as the attention of every layer, of which the first of what it puts out is kept.
        num_tokens: `q_len` of the calls.
    """

    def __init__(self, modules: Sequence[nn.Module], num_tokens: int) -> None:
        super().__init__()
        self.modules, self.num_tokens = modules, num_tokens
        self._parts: list[list[Tensor]] = [[] for _ in modules]

    def __enter__(self) -> Self:
        # Gone again before the backward pass, in which checkpointed layers are called once more.
        for number, module in enumerate(self.modules):
            self.enter_context(module.register_forward_hook(partial(self._keep, number)))
        return self

    def _keep(self, number: int, module: nn.Module, args: Any, output: Any) -> None:
        parts = self._parts[number]
        if sum(part.shape[1] for part in parts) == self.num_tokens:
            parts.clear()  # another pass begins
        parts.append(output[0] if isinstance(output, tuple) else output)

    def __iter__(self) -> Any:
        """Yields each module's output, `(batch, q_len, hidden_size)`, in their order."""
        for parts in self._parts:
            yield parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def keys_and_values(model: nn.Module, inputs: Iterable[Tensor], layers: Sequence[int]) -> list[Tensor]:
    """What some layers' queries read, of any inputs: keys before their rotation, and values.

    Args:
        model: one of ours.
        inputs: of every layer's attention, `(batch, q_len, hidden_size)`. No gradient flows into them.
        layers: which.

    Returns:
        Of each of them keys and then values, `(batch, q_len, num_kv_heads * head_dim)`.
    """
    ours = cast(Any, model)
    layout, attentions = ours.config.kv_layout, [layer.self_attn for layer in ours.model.layers]
    given = [each.detach().to(ours.dtype) for each in inputs]
    owners = sorted({source.owner for layer_idx in layers for source in layout.sources[layer_idx]})
    written = {owner: attentions[owner].project(given[owner]) for owner in owners}
    made = (
        attentions[layer_idx].unrotated([written[source.owner][source.index] for source in layout.sources[layer_idx]])
        for layer_idx in layers
    )
    return [states.transpose(1, 2).flatten(2) for pair in made for states in pair]


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


def relative_error(outputs: Iterable[Tensor], teacher_outputs: Iterable[Tensor], scales: Sequence[float]) -> Tensor:
    """Squared distance of outputs from the teacher's, relative to the teacher's size, averaged over layers.

    Layers in which the teacher puts out nothing but zeros have no size to go by, and are left out.

    Args:
        outputs: of each layer, `(batch, q_len, size)`; of its keys and of its values, where these are meant.
        teacher_outputs: like `outputs`.
        scales: like `outputs`, the mean square of the teacher's.

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
        scales: of the parts that are [relative errors][lckv.training.distillation.relative_error], by name.
    """

    def __init__(self, cfg: TeacherConfig, scales: Mapping[str, Sequence[float]]) -> None:
        self.weights = cfg.weights
        if not cfg.logits_weight:
            # Be it 0: every parameter takes part in every step, as processes that add up gradients rely on.
            self.weights["labels"] = cfg.labels_weight
        self.temperature = cfg.temperature
        self.scales = scales

    def parts(
        self,
        logits: Tensor,
        teacher_logits: Tensor | None,
        outputs: Mapping[str, tuple[Iterable[Tensor], Iterable[Tensor]]],
        labels: Tensor,
    ) -> dict[str, Tensor]:
        """The parts of the loss, each a sum over the predicted tokens, by name.

        Those that [`total`][lckv.training.distillation.DistillationLoss.total] has no use for are numbers to look at:
        no graph is kept for them.

        Args:
            logits: `(batch, q_len, vocab_size)`.
            teacher_logits: like `logits`; `None` if the teacher was not asked.
            outputs: for each name in `scales`, what the model has and what the teacher has.
            labels: `(batch, q_len)`, the one at *i* predicted from *i - 1*; -100 is not predicted.
        """
        own = {name: logits if name in self.weights else logits.detach() for name in ("logits", "labels")}
        parts = {}
        if teacher_logits is not None:
            parts["logits"] = sum_over_predicted(divergence(own["logits"], teacher_logits, self.temperature), labels)
        for name, scales in self.scales.items():
            parts[name] = sum_over_predicted(relative_error(*outputs[name], scales), labels)
        targets = labels[:, 1:].flatten()
        parts["labels"] = F.cross_entropy(
            own["labels"][:, :-1].float().flatten(0, 1), targets, ignore_index=IGNORE_INDEX, reduction="sum"
        )
        return parts

    def total(self, parts: dict[str, Tensor]) -> Tensor:
        """The loss, a scalar, that these parts make, with gradients only through those that have a weight."""
        return torch.stack([weight * parts[name] for name, weight in self.weights.items()]).sum()


def layers_of_latents(model: PreTrainedModel) -> list[int]:
    """The layers that make their keys and values of latents, their own or another layer's."""
    latents_of = getattr(model.config, "latents_of", lambda layer_idx: None)  # models of other families keep none
    return [layer_idx for layer_idx in range(model.config.num_hidden_layers) if latents_of(layer_idx) is not None]


def check_teacher_fits(
    teacher: PreTrainedModel, student: PreTrainedModel, cfg: TeacherConfig, block_size: int
) -> None:
    """Raises a UserError if the outputs of two models, on blocks of `block_size` tokens, cannot be compared."""
    compared: dict[str, list[str]] = {"vocab_size": []}  # and what to set where these need not be equal
    for part in cfg.weights:
        for name in _COMPARED.get(part, ()):
            compared.setdefault(name, []).append(f"teacher.{part}_weight=0")
    for name, keys in compared.items():
        own, theirs = getattr(student.config, name), getattr(teacher.config, name)
        if own != theirs:
            way_out = f" or set {' and '.join(keys)}" if keys else ""
            raise UserError(
                f"teacher.source={cfg.source}: its {name} is {theirs}, the trained model's {own}; they must be "
                f"equal: give another teacher{way_out}"
            )
    if cfg.reconstruction_weight and not layers_of_latents(student):
        raise UserError(
            f"teacher.reconstruction_weight={cfg.reconstruction_weight}: the trained model keeps no latents to make "
            "keys and values of; allowed is 0"
        )
    if block_size > teacher.config.max_position_embeddings:
        raise UserError(
            f"data.block_size={block_size}: longer than the teacher's max_position_embeddings="
            f"{teacher.config.max_position_embeddings}; lower it"
        )


class Seen(NamedTuple):
    """What a model's call returned; and of each layer, if it is looked at, what attention put out and was given."""

    outputs: Any
    attention: list[Tensor]  # `(batch, q_len, hidden_size)` each
    inputs: list[Tensor]


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
        self._weights = distillation.weights
        self._layers = layers_of_latents(cast(PreTrainedModel, self.model))  # whose keys and values can be compared
        self.distillation_loss = DistillationLoss(distillation, self._measure_scales())
        self._parts: dict[str, Tensor] = {}  # of the steps since the last log, each over its predicted tokens
        self._num_steps = 0

    @torch.no_grad()
    def _measure_scales(self) -> dict[str, list[float]]:
        """The mean squares of the teacher's outputs, layer by layer, over blocks from all of the data."""
        # Measured once: within a batch it would depend on how the batch is cut up.
        names = [name for name in _COMPARED if name in self._weights]
        dataset = cast(Any, self.train_dataset)
        num_blocks = min(_NUM_BLOCKS_FOR_SCALES, len(dataset)) if names else 0
        squares: dict[str, list[list[float]]] = {name: [] for name in names}
        num_tokens = 0
        for number in range(num_blocks):
            batch = self.data_collator([dataset[number * len(dataset) // num_blocks]])
            labels, inputs = batch["labels"], cast(dict[str, Any], self._prepare_inputs(batch))
            with self.compute_loss_context_manager():
                seen = self._run(self.teacher, self.teacher, inputs | {"use_cache": False})
                for name, outputs in self._compared(seen, seen, self.teacher).items():
                    each = [x.float().square().mean(-1).cpu() for x in outputs[1]]
                    squares[name].append([sum_over_predicted(x, labels).item() for x in each])
            num_tokens += int((labels[:, 1:] != IGNORE_INDEX).sum())
        scales = {
            name: [sum(layer) / max(1, num_tokens) for layer in zip(*rows, strict=True)]
            for name, rows in squares.items()
        }
        for name, found in scales.items():
            self._check_scales(name, found, num_blocks)
        return scales

    def _check_scales(self, name: str, scales: list[float], num_blocks: int) -> None:
        what = _WORDS[name]
        if not any(scales):
            raise UserError(
                f"teacher.{name}_weight={self._weights[name]}: the teacher's {what} in {num_blocks} blocks of the "
                "text are all zero, or no token is predicted there; allowed is 0"
            )
        if silent := [number for number, scale in enumerate(scales) if not scale]:
            logger.warning("of the teacher's %s, numbers %s are zeros; they are left out", what, silent)

    def _run(self, model: nn.Module, unwrapped: nn.Module, inputs: dict[str, Any]) -> Seen:
        # Without labels: the model's own loss would be computed for nothing, and Liger's writes into the logits.
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        num_tokens, layers = inputs["input_ids"].shape[1], cast(Any, unwrapped).model.layers
        attentions = [layer.self_attn for layer in layers] if "attention" in self._weights else []
        norms = [layer.input_layernorm for layer in layers] if "reconstruction" in self._weights else []
        with KeptOutputs(attentions, num_tokens) as attention, KeptOutputs(norms, num_tokens) as given:
            outputs = model(**inputs)
        return Seen(outputs, list(attention), list(given))

    def _compared(
        self, seen: Seen, of_teacher: Seen | None, model: nn.Module
    ) -> dict[str, tuple[Iterable[Tensor], Iterable[Tensor]]]:
        """By the name of the loss's part, what a model has and what the teacher has in its place.

        The keys and values that the teacher would make are those of the model's own inputs, so that no layer answers
        for what those below it have changed.
        """
        compared: dict[str, tuple[Iterable[Tensor], Iterable[Tensor]]] = {}
        if of_teacher is not None and "attention" in self._weights:
            compared["attention"] = seen.attention, of_teacher.attention
        if "reconstruction" in self._weights:
            with torch.no_grad():
                originals = keys_and_values(self.teacher, seen.inputs, self._layers)
            compared["reconstruction"] = keys_and_values(model, seen.inputs, self._layers), originals
        return compared

    def _ask_teacher(self, inputs: dict[str, Any]) -> Seen | None:
        """What the teacher makes of a batch; `None` where nothing of that has a weight."""
        if self._weights.keys().isdisjoint({"logits", "attention"}):
            return None
        with torch.no_grad():
            return self._run(self.teacher, self.teacher, inputs | {"use_cache": False})

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Computes the loss, and keeps its parts for the log."""
        of_teacher, unwrapped = self._ask_teacher(inputs), self.accelerator.unwrap_model(model)
        seen = self._run(model, unwrapped, inputs | self.step_arguments(model))
        parts = self.distillation_loss.parts(
            seen.outputs.logits,
            None if of_teacher is None else of_teacher.outputs.logits,
            self._compared(seen, of_teacher, unwrapped),
            inputs["labels"],
        )
        # As in transformers' own: gradients are averaged over the processes, but the sum is meant.
        factor = self.args.world_size / num_items_in_batch
        parts = {name: part * factor for name, part in parts.items()}
        for name, part in parts.items():
            self._parts[name] = self._parts.get(name, torch.zeros_like(part)) + part.detach()
        loss = self.distillation_loss.total(parts)
        return (loss, seen.outputs) if return_outputs else loss

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
