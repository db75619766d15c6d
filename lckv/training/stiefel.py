"""Up-projections of latents with orthonormal columns: how they get them, and an optimizer that keeps them so.

A latent may have any coordinates: with `c = A x` and keys and values `U c`, any invertible `R` gives the same function
by `U R^-1` and `R A`. This takes those in which the columns of `U` are orthonormal, the Stiefel manifold, and moves on
it by Riemannian Adam (Bécigneul and Ganea, ICLR 2019), so that lengths of latents stay those of keys and values. `U`
is the stack of all matrices that read one latent: of keys and of values, in every layer that reads it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lckv.config import OptimConfig
from lckv.config.names import RIEMANNIAN
from lckv.errors import UserError

_TINY = 1e-12  # a latent of nothing, through which no gradient comes


@dataclass(frozen=True)
class Stack:
    """What reads one latent.

    Attributes:
        down: the projection that the latent, perhaps among others, comes from.
        start: the first of its rows there.
        weights: of the projections from the latent, each `(rows, size)`.
    """

    down: nn.Linear
    start: int
    weights: list[nn.Parameter]

    @property
    def matrix(self) -> Tensor:
        """The weights, one below the other, `(sum of rows, size)`."""
        return torch.cat([weight.detach() for weight in self.weights])

    @property
    def length(self) -> float:
        """Of the rows that make the latent, the root mean square over them."""
        size = self.weights[0].shape[1]
        return float(self.down.weight.detach()[self.start : self.start + size].norm()) / math.sqrt(size)

    @torch.no_grad()
    def write(self, matrix: Tensor) -> None:
        """Puts `(sum of rows, size)` into the weights."""
        for weight, part in zip(self.weights, matrix.split([len(each) for each in self.weights]), strict=True):
            weight.copy_(part)

    @torch.no_grad()
    def orthonormalize(self) -> None:
        """Makes the columns orthonormal, and changes the latent so that what is made of it stays the same."""
        orthonormal, triangle = torch.linalg.qr(self.matrix.double())
        self.write(orthonormal)
        rows = slice(self.start, self.start + len(triangle))
        for parameter in self.down.parameters():  # a bias is added before
            parameter[rows] = (triangle @ parameter[rows].double()).to(parameter.dtype)


def stacks_of(model: nn.Module) -> list[Stack]:
    """The stacks of all latents of a model, from the bottom.

    Factors of rotated pairs are in none: what they read is no latent.

    Raises:
        UserError: if it keeps no latents, or one is wider than what is made of it.
    """
    config, layers = cast(Any, model).config, cast(Any, model).model.layers
    stacks: dict[tuple[int, int], Stack] = {}
    for layer_idx, read in enumerate(config.kv_layout.sources if config.kv_latents else ()):
        if config.latents_of(layer_idx) is None:
            continue
        attention = layers[layer_idx].self_attn
        for source, module in (read[0], attention.k_b_proj), (read[-1], attention.v_b_proj):
            owner = layers[source.owner].self_attn
            stack = Stack(owner.kv_a_proj, sum(owner.own_sizes[: source.index]), [])
            stacks.setdefault((source.owner, source.index), stack).weights.append(module.weight)
    if not stacks:
        raise UserError(f"optim.name={RIEMANNIAN}: the model keeps no latents; allowed are adamw, muon")
    for (owner_idx, _), stack in stacks.items():
        num_rows, size = stack.matrix.shape
        if size > num_rows:
            raise UserError(
                f"optim.name={RIEMANNIAN}: the latent of layer {owner_idx} has {size} numbers, of which only "
                f"{num_rows} are made, so that columns cannot be orthonormal; allowed is {num_rows} or less"
            )
    return [stacks[place] for place in sorted(stacks)]


def orthonormalize(model: nn.Module) -> None:
    """Makes the columns of a model's up-projections orthonormal; what it computes stays the same.

    Raises:
        UserError: see [`stacks_of`].
    """
    for stack in stacks_of(model):
        stack.orthonormalize()


class StiefelAdam(Optimizer):
    """Riemannian Adam for stacks of matrices whose columns are orthonormal, and stay so.

    Each stack moves as one point, and changes what is made of the latent about as much as AdamW would, so that one
    learning rate suits both. Riemannian Adam divides by the length of the whole gradient and not by that of each
    entry: hence the square root of how many there are. What was large in the stack before it was made orthonormal is
    now in the rows that make the latent: hence their length, by which steps are smaller. Nothing decays: the lengths
    of columns are fixed.

    Args:
        stacks: what to train.
        cfg: learning rate, betas and eps.
    """

    def __init__(self, stacks: Sequence[Stack], cfg: OptimConfig) -> None:
        from geoopt import ManifoldParameter, Stiefel
        from geoopt.optim import RiemannianAdam

        self.stacks = list(stacks)
        parameters = [weight for stack in self.stacks for weight in stack.weights]
        super().__init__([{"params": parameters, "weight_decay": 0.0}], {"lr": cfg.learning_rate})
        # Its retraction is a QR decomposition, which leaves rounding errors of one step and not of all.
        self.points = [ManifoldParameter(stack.matrix, Stiefel(canonical=False)) for stack in self.stacks]
        self.adam = RiemannianAdam([{"params": [point]} for point in self.points], betas=cfg.betas, eps=cfg.eps)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Moves every stack once, from where its matrices are."""
        for stack, point, group in zip(self.stacks, self.points, self.adam.param_groups, strict=True):
            point.copy_(stack.matrix)
            point.grad = torch.cat([cast(Tensor, weight.grad) for weight in stack.weights])
            group["lr"] = self.param_groups[0]["lr"] * math.sqrt(point.numel()) / max(stack.length, _TINY)
        self.adam.step()
        for stack, point in zip(self.stacks, self.points, strict=True):
            stack.write(point)

    def state_dict(self) -> dict[str, Any]:
        """The learning rate, and the moments of the points; these themselves are weights of the model."""
        return {"group": super().state_dict(), "points": self.adam.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned."""
        super().load_state_dict(state_dict["group"])
        self.adam.load_state_dict(state_dict["points"])
        for state in self.adam.state.values():  # torch makes it a float32, geoopt works with Python's numbers
            state["step"] = int(state["step"])

    def metrics(self) -> dict[str, float]:
        """How far from orthonormal the columns are: the largest entry of any `U^T U - 1`."""
        return {"stiefel_deviation": max(deviation(stack.matrix) for stack in self.stacks)}


def deviation(matrix: Tensor) -> float:
    """How far the columns of `(rows, size)` are from orthonormal."""
    matrix = matrix.double()
    return float(
        (matrix.T @ matrix - torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)).abs().max()
    )
