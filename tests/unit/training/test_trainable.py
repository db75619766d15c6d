"""Training a part of the model: only that moves, and only that is in the optimizer."""

from collections.abc import Callable

import pytest
import torch
from rich.console import Console

from lckv.training.optim import freeze_all_but
from lckv.training.run_summary import show_results
from lckv.training.session import Session
from tests.reference import tiny_model

MakeSession = Callable[..., Session]

PROJECTIONS = {"kv": ("k_proj", "v_proj"), "qkv": ("q_proj", "k_proj", "v_proj")}


@pytest.mark.parametrize(("trainable", "optimizer"), [("kv", "muon"), ("qkv", "adamw")])
def test_only_the_named_projections_move(make_session: MakeSession, trainable: str, optimizer: str):
    session = make_session(trainer__trainable=trainable, optim__name=optimizer, trainer__max_steps=2)
    before = {name: value.clone() for name, value in session.model.state_dict().items()}
    results = session.run()
    moved = {name for name, value in session.model.state_dict().items() if not torch.equal(value, before[name])}
    wanted = {name for name in before if any(part in name for part in PROJECTIONS[trainable])}
    assert moved == wanted
    optimized = [item for group in session.trainer.optimizer.param_groups for item in group["params"]]
    assert {id(item) for item in optimized} == {
        id(item) for name, item in session.model.named_parameters() if name in wanted
    }
    assert results["num_trained_parameters"] == sum(before[name].numel() for name in wanted)
    assert results["num_trained_parameters"] < results["num_parameters"]


def test_norms_of_queries_and_keys_are_trained_with_them():
    model = tiny_model("0_0", attention_bias=True, use_qk_norm=True)
    freeze_all_but(model, "kv")
    attention = "model.layers.0.self_attn."
    kv = {f"{attention}{name}.{kind}" for name in ("k_proj", "v_proj") for kind in ("weight", "bias")}
    kv.add(f"{attention}k_norm.weight")
    assert {name for name, item in model.named_parameters() if item.requires_grad} == kv
    freeze_all_but(model, "qkv")
    trained = {name for name, item in model.named_parameters() if item.requires_grad}
    assert {"model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.q_norm.weight"} <= trained
    freeze_all_but(model, "kv")
    freeze_all_but(model, "all")
    assert {name for name, item in model.named_parameters() if item.requires_grad} == kv  # nothing is taken away


def test_the_report_says_how_many_are_trained(make_session: MakeSession, capsys: pytest.CaptureFixture[str]):
    for trainable in ("kv", "all"):
        session = make_session(trainable, trainer__trainable=trainable, trainer__max_steps=1)
        results = session.run()
        show_results(results, session.folder, Console(width=200), [])
        said = f"{results['num_trained_parameters']:,} of them trained" in capsys.readouterr().out
        assert said == (trainable == "kv")
