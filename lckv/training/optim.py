"""What is trained, by which optimizer, and the learning rate schedules in transformers' terms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from lckv.config import OptimConfig
from lckv.config.names import RIEMANNIAN
from lckv.errors import UserError
from lckv.training.stiefel import StiefelAdam, stacks_of
from lckv.utils.registry import Registry

NamedParameters = list[tuple[str, nn.Parameter]]

OPTIMIZERS: Registry[Callable[[nn.Module, OptimConfig], Optimizer]] = Registry("optimizer")
"""Builders of optimizers by name: `builder(model, cfg) -> Optimizer`, of the parameters that have gradients."""

SCHEDULES = {
    "cosine": "cosine_with_min_lr",
    "wsd": "warmup_stable_decay",
    "linear": "polynomial",
    "constant": "constant_with_warmup",
}
"""Our names of the schedules, and transformers' names of what they are made from."""


TRAINABLE = {"all": (), "kv": ("stream_modules",), "qkv": ("stream_modules", "query_modules")}
"""For each value of `trainer.trainable`, which submodules of attention are trained, as it names them; () for all."""


def freeze_all_but(model: nn.Module, trainable: str) -> None:
    """Takes the gradients away from the parameters of a Llama-shaped model that are not `trainable`."""
    parts = TRAINABLE[trainable]
    if not parts:
        return
    model.requires_grad_(False)
    for attention in model.modules():
        for part in parts:
            for name in getattr(attention, part, ()):  # only an attention has any
                if hasattr(attention, name):
                    getattr(attention, name).requires_grad_(True)


def build_optimizer(model: nn.Module, cfg: OptimConfig) -> Optimizer:
    """Builds the optimizer that `cfg` names for the trainable parameters of `model`.

    Raises:
        UserError: if there is no such optimizer, or it cannot run here.
    """
    return OPTIMIZERS[cfg.name](model, cfg)


def trainable_parameters(model: nn.Module) -> NamedParameters:
    """The parameters that have gradients."""
    return [item for item in model.named_parameters() if item[1].requires_grad]


@OPTIMIZERS.register("adamw")
def adamw(model: nn.Module, cfg: OptimConfig) -> Optimizer:
    """AdamW (Loshchilov and Hutter, ICLR 2019), all parameters in one kernel where torch can."""
    return adamw_for(trainable_parameters(model), cfg)


def adamw_for(named_parameters: NamedParameters, cfg: OptimConfig) -> Optimizer:
    """AdamW for some parameters.

    Raises:
        UserError: if one kernel for all is asked for where torch has none.
    """
    parameters = [parameter for _, parameter in named_parameters]
    kinds = {parameter.device.type for parameter in parameters}
    can_fuse = kinds <= {"cpu", "cuda", "xpu", "mps"} and all(map(torch.is_floating_point, parameters))
    if cfg.fused and not can_fuse:
        raise UserError(f"optim.fused=true: torch has no fused AdamW for {', '.join(sorted(kinds))}; leave it out")
    groups = [  # vectors, such as norms and biases, do not decay
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": cfg.weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=cfg.learning_rate,
        betas=cast(tuple[float, float], tuple(cfg.betas)),
        eps=cfg.eps,
        fused=can_fuse if cfg.fused is None else cfg.fused,
    )


@OPTIMIZERS.register("muon")
def muon(model: nn.Module, cfg: OptimConfig) -> Optimizer:
    """Muon (Jordan et al., 2024) for the matrices of the layers, AdamW for embeddings, head, norms and biases."""
    if not hasattr(torch.optim, "Muon"):
        raise UserError(f"optim.name='muon': torch {torch.__version__} does not have it; use torch 2.9 or later")
    named_parameters = trainable_parameters(model)
    is_hidden = [parameter.ndim == 2 and ".layers." in f".{name}" for name, parameter in named_parameters]
    hidden = [parameter for (_, parameter), inside in zip(named_parameters, is_hidden, strict=True) if inside]
    others = [item for item, inside in zip(named_parameters, is_hidden, strict=True) if not inside]
    if not hidden:
        raise UserError("optim.name='muon': the model has no matrices in its layers; use optim.name=adamw")
    by_muon = torch.optim.Muon(
        hidden,
        lr=cfg.learning_rate,
        weight_decay=cfg.weight_decay,
        momentum=cfg.momentum,
        adjust_lr_fn="match_rms_adamw",  # updates as large as AdamW's, so that one learning rate suits both
    )
    return JointOptimizer([by_muon, *([adamw_for(others, cfg)] if others else [])])


@OPTIMIZERS.register(RIEMANNIAN)
def riemannian_adam(model: nn.Module, cfg: OptimConfig) -> Optimizer:
    """Riemannian Adam for the up-projections of latents, which keep orthonormal columns; AdamW for the rest."""
    stacks = stacks_of(model)
    on_manifold = {id(weight) for stack in stacks for weight in stack.weights}
    others = [item for item in trainable_parameters(model) if id(item[1]) not in on_manifold]
    return JointOptimizer([adamw_for(others, cfg), StiefelAdam(stacks, cfg)])


class JointOptimizer(Optimizer):
    """Several optimizers with parameters of their own that step, are scheduled and saved as one.

    The parameter groups are the very dictionaries of the optimizers within, so that a learning rate set here by a
    scheduler is set there.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = list(optimizers)
        groups = self._groups_within()
        super().__init__(groups, {"lr": groups[0]["lr"]})

    def _groups_within(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Steps every optimizer once."""
        for optimizer in self.optimizers:
            optimizer.step(closure)

    def state_dict(self) -> dict[str, Any]:
        """The states of all, in order."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned."""
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        # Loading gives every optimizer new group dictionaries.
        self.param_groups = self._groups_within()

    def metrics(self) -> dict[str, float]:
        """What there is to say of the optimizers beside the loss."""
        return {name: value for each in self.optimizers for name, value in metrics_of(each).items()}


def metrics_of(optimizer: Optimizer) -> dict[str, float]:
    """What there is to say of an optimizer beside the loss, by name."""
    metrics = getattr(optimizer, "metrics", dict)  # torch's own have none
    return metrics()


def schedule_arguments(cfg: OptimConfig, max_steps: int) -> tuple[str, dict[str, Any], int]:
    """Says a schedule in transformers' terms: its name there, its own arguments, and the warm-up steps."""
    minimum = cfg.min_learning_rate if cfg.min_learning_rate is not None else cfg.learning_rate / 10
    kwargs: dict[str, Any] = {
        "cosine": {"min_lr_rate": minimum / cfg.learning_rate},
        "linear": {"lr_end": minimum, "power": 1.0},
        "wsd": {"min_lr_ratio": minimum / cfg.learning_rate},
        "constant": {},
    }[cfg.schedule]
    if cfg.schedule == "wsd":
        kwargs["num_decay_steps"] = cfg.num_decay_steps(max_steps)
    return SCHEDULES[cfg.schedule], kwargs, cfg.num_warmup_steps(max_steps)
