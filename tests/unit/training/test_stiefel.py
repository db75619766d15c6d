"""Up-projections with orthonormal columns: the same function, one step by hand, and a run that keeps them so."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lckv.config import OptimConfig
from lckv.errors import UserError
from lckv.models import LCKVLlamaForCausalLM
from lckv.training.optim import build_optimizer
from lckv.training.session import Session
from lckv.training.stiefel import StiefelAdam, orthonormalize, stacks_of
from tests.reference import tiny_model, token_ids

MakeSession = Callable[..., Session]

KINDS: dict[str, dict[str, Any]] = {
    "joint": {"latent": 6},
    "separate": {"key_latent": 5, "value_latent": 7},
    "decoupled_rope": {"latent": 6, "rotated_planes": [0, 2, 2]},
}
ROWS = {"joint": [("k", "v")], "separate": [("k",), ("v",)], "decoupled_rope": [("k", "v")]}
"""Which up-projections read each latent."""


def build(kind: str, layer_types: str = "0_0_2_2") -> LCKVLlamaForCausalLM:
    owners = set(map(int, layer_types.split("_")))
    latents = [KINDS[kind] if layer_idx in owners else None for layer_idx in range(4)]
    model = tiny_model(layer_types, kv_latents=latents, attention_bias=True, use_qk_norm=kind != "decoupled_rope")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def stacked(model: LCKVLlamaForCausalLM, kind: str) -> list[list[torch.nn.Parameter]]:
    """The matrices that read each latent."""
    attentions = [layer.self_attn for layer in model.model.layers]
    return [
        [getattr(attentions[reader], f"{name}_b_proj").weight for reader in readers for name in names]
        for readers in ((0, 1), (2, 3))
        for names in ROWS[kind]
    ]


def matrices(model: LCKVLlamaForCausalLM, kind: str) -> list[torch.Tensor]:
    """What should have orthonormal columns."""
    return [torch.cat(weights).detach() for weights in stacked(model, kind)]


def train(model: LCKVLlamaForCausalLM, optimizer: torch.optim.Optimizer, num_steps: int) -> None:
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(token_ids(2, 9), labels=token_ids(2, 9)).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer_types", ["0_1_2_3", "0_0_2_2"])
@torch.no_grad()
def test_the_function_stays_the_same(kind: str, layer_types: str):
    model = build(kind, layer_types)
    before = model(token_ids(2, 9)).logits
    orthonormalize(model)
    assert torch.allclose(model(token_ids(2, 9)).logits, before, atol=1e-5)
    if layer_types == "0_0_2_2":
        for matrix in matrices(model, kind):
            assert torch.allclose(matrix.T @ matrix, torch.eye(matrix.shape[1]), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_by_hand(kind: str):
    model = build(kind)
    orthonormalize(model)
    optimizer = build_optimizer(model, OptimConfig(name="riemannian_adam", learning_rate=1e-2, weight_decay=0.5))
    before = [matrix.double() for matrix in matrices(model, kind)]
    model(token_ids(2, 9), labels=token_ids(2, 9)).loss.backward()
    gradients = [torch.cat([weight.grad for weight in weights]).double() for weights in stacked(model, kind)]
    optimizer.step()
    owners = [model.model.layers[owner].self_attn.kv_a_proj.weight.detach().double() for owner in (0, 2)]
    sizes = [matrix.shape[1] for matrix in before[: len(ROWS[kind])]]
    downs = [rows for owner in owners for rows in owner[: sum(sizes)].split(sizes)]  # AdamW has moved them before
    for after, u, gradient, down in zip(matrices(model, kind), before, gradients, downs, strict=True):
        product = u.T @ gradient
        tangent = gradient - u @ (product + product.T) / 2
        rate = 1e-2 * math.sqrt(u.numel()) / down.square().sum(1).mean().sqrt()
        moved = u - rate * tangent / (tangent.norm() + 1e-8)
        # The orthonormal matrix of the same span whose triangle has a positive diagonal.
        triangle = torch.linalg.cholesky(moved.T @ moved).T
        assert (after - moved @ triangle.inverse()).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_everything_else_is_adamws(kind: str):
    model = build(kind)
    orthonormalize(model)
    adamw, stiefel = build_optimizer(model, OptimConfig(name="riemannian_adam", weight_decay=0.5)).optimizers
    assert isinstance(stiefel, StiefelAdam)
    names = {id(item): name for name, item in model.named_parameters()}
    of_each = [
        {names[id(item)] for group in each.param_groups for item in group["params"]} for each in (adamw, stiefel)
    ]
    assert of_each[1] == {name for name in names.values() if name.endswith(("k_b_proj.weight", "v_b_proj.weight"))}
    assert not of_each[0] & of_each[1] and of_each[0] | of_each[1] == set(names.values())
    assert [group["weight_decay"] for group in stiefel.param_groups] == [0]


def test_saved_state_goes_on_bit_for_bit():
    cfg = OptimConfig(name="riemannian_adam", learning_rate=0.01)
    whole, parts = build("joint"), build("joint")
    orthonormalize(whole)
    parts.load_state_dict(whole.state_dict())
    train(whole, build_optimizer(whole, cfg), 5)
    first = build_optimizer(parts, cfg)
    train(parts, first, 3)
    second = build_optimizer(parts, cfg)
    second.load_state_dict(first.state_dict())
    train(parts, second, 2)
    assert not [key for key, value in whole.state_dict().items() if not torch.equal(value, parts.state_dict()[key])]
    for group in second.param_groups:
        group["lr"] = 0.0
    before = matrices(parts, "joint")
    train(parts, second, 1)
    for matrix, old in zip(matrices(parts, "joint"), before, strict=True):
        assert torch.allclose(matrix, old, atol=1e-6)  # a scheduler's rate arrives, after loading too


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_interrupted_run_stays_orthonormal_and_goes_on_bit_for_bit(
    make_session: MakeSession, interrupt: Callable[[Session, int], None], precision: str
):
    settings = {
        "latent__name": "joint",
        "latent__dim": 8,
        "optim__name": "riemannian_adam",
        "optim__learning_rate": 0.01,
        "trainer__micro_batch_size": 2,
        "trainer__precision": precision,
    }
    whole = make_session("whole", **settings)
    results = whole.run()
    interrupt(make_session("parts", **settings), 5)
    again = make_session("parts", **settings)
    assert again.first_step == 3
    again.run()
    names = ("loss", "grad_norm", "learning_rate", "stiefel_deviation")
    lines = [[line for line in each.folder.read_metrics() if "loss" in line] for each in (whole, again)]
    curves = [[[line[name] for name in names] for line in each] for each in lines]
    assert curves[0] == curves[1]
    assert all(0 < line["stiefel_deviation"] < 2e-6 for line in lines[0])
    assert results["stiefel_deviation"] == lines[0][-1]["stiefel_deviation"]
    assert max(line["learning_rate"] for line in lines[0]) == pytest.approx(0.01, rel=0.1)


def test_models_without_latents_or_with_too_wide_ones_are_refused():
    with pytest.raises(UserError, match=r"^optim.name=riemannian_adam: the model keeps no latents; allowed are adamw"):
        stacks_of(tiny_model("0_0"))
    wide = tiny_model("0_1", kv_latents=[{"key_latent": 17, "value_latent": 4}] * 2)
    with pytest.raises(UserError, match=r"latent of layer 0 has 17 numbers, of which only 16 are made"):
        stacks_of(wide)
