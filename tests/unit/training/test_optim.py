import pytest
import torch
from torch import nn
from transformers import get_scheduler

from lckv.config import OptimConfig
from lckv.config.names import RIEMANNIAN
from lckv.training.optim import OPTIMIZERS, JointOptimizer, build_optimizer, schedule_arguments

OF_ANY_MODEL = sorted(set(OPTIMIZERS) - {RIEMANNIAN})  # which needs latents; test_stiefel.py has it


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(7, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
        self.norm = nn.LayerNorm(4, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed_tokens(ids)
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        return self.norm(hidden).square().sum()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int) -> None:
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(torch.arange(7)).backward()
        optimizer.step()


def group_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict:
    return next(group for group in optimizer.param_groups if any(parameter is other for other in group["params"]))


@pytest.mark.parametrize("name", OF_ANY_MODEL)
def test_only_matrices_decay_and_every_parameter_moves(name: str):
    model = Toy()
    optimizer = build_optimizer(model, OptimConfig(name=name, weight_decay=0.3))
    assert group_of(optimizer, model.embed_tokens.weight)["weight_decay"] == 0.3
    assert group_of(optimizer, model.layers[0].weight)["weight_decay"] == 0.3
    assert group_of(optimizer, model.layers[0].bias)["weight_decay"] == 0
    assert group_of(optimizer, model.norm.weight)["weight_decay"] == 0
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train(model, optimizer, 1)
    assert not [key for key, value in model.state_dict().items() if torch.equal(value, before[key])]


def test_muon_takes_the_matrices_of_the_layers_only():
    model = Toy()
    optimizer = build_optimizer(model, OptimConfig(name="muon"))
    assert isinstance(optimizer, JointOptimizer)
    by_muon = optimizer.optimizers[0].param_groups[0]["params"]
    assert [parameter.shape for parameter in by_muon] == [(4, 4), (4, 4)]
    assert all(parameter is layer.weight for parameter, layer in zip(by_muon, model.layers, strict=True))


def test_adamw_is_fused_unless_told_otherwise():
    assert build_optimizer(Toy(), OptimConfig()).defaults["fused"]
    assert not build_optimizer(Toy(), OptimConfig(fused=False)).defaults["fused"]


@pytest.mark.parametrize("name", OF_ANY_MODEL)
def test_saved_state_goes_on_bit_for_bit(name: str):
    cfg = OptimConfig(name=name, learning_rate=0.01)
    whole, parts = Toy(), Toy()
    parts.load_state_dict(whole.state_dict())
    train(whole, build_optimizer(whole, cfg), 5)
    first = build_optimizer(parts, cfg)
    train(parts, first, 3)
    second = build_optimizer(parts, cfg)
    second.load_state_dict(first.state_dict())
    train(parts, second, 2)
    assert not [key for key, value in whole.state_dict().items() if not torch.equal(value, parts.state_dict()[key])]


def test_scheduler_reaches_the_joined_optimizers_also_after_loading():
    optimizer = build_optimizer(Toy(), OptimConfig(name="muon"))
    optimizer.load_state_dict(optimizer.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.123
    assert {group["lr"] for part in optimizer.optimizers for group in part.param_groups} == {0.123}


def rates(num_steps: int, **settings) -> list[float]:
    cfg = OptimConfig(learning_rate=1.0, **settings)
    optimizer = build_optimizer(Toy(), cfg)
    name, kwargs, warmup = schedule_arguments(cfg, num_steps)
    scheduler = get_scheduler(name, optimizer, warmup, num_steps, kwargs)
    used = []
    for _ in range(num_steps + 1):
        used.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return used


@pytest.mark.parametrize(
    ("name", "schedule", "settings", "end"),
    [
        ("adamw", "cosine", {}, 0.1),
        ("muon", "cosine", {"min_learning_rate": 0.0}, 0.0),
        ("adamw", "wsd", {"min_learning_rate": 0.2, "decay_steps": 30}, 0.2),
        ("muon", "linear", {"min_learning_rate": 0.05}, 0.05),
        ("adamw", "constant", {}, 1.0),
    ],
)
def test_schedule_warms_up_to_the_peak_and_ends_at_the_minimum(name, schedule, settings, end):
    used = rates(100, name=name, schedule=schedule, warmup_steps=10, **settings)
    assert used[10] == max(used) == pytest.approx(1.0)
    assert used[:11] == sorted(used[:11])
    assert used[0] < 0.3
    assert used[100] == pytest.approx(end, abs=1e-6)
    assert used[10:] == sorted(used[10:], reverse=True)


def test_wsd_stays_at_the_peak_before_it_decays():
    used = rates(100, schedule="wsd", warmup_steps=10, decay_steps=30)
    assert used[10:70] == pytest.approx([1.0] * 60)
    assert used[72] < 1.0


def test_lengths_follow_the_run_where_they_are_not_given():
    assert schedule_arguments(OptimConfig(schedule="wsd"), 1000)[1:] == (
        {"min_lr_ratio": pytest.approx(0.1), "num_decay_steps": 200},
        50,
    )
