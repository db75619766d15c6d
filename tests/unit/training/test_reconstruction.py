"""Latents that learn to give back the keys and values of the teacher's projections, against a slow reading of both."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lckv.config import TeacherConfig
from lckv.conversion.latent_models import to_latents
from lckv.errors import UserError
from lckv.loading.models import load_model
from lckv.models import LCKVLlamaForCausalLM
from lckv.training.distillation import check_teacher_fits, keys_and_values
from lckv.training.session import Session
from lckv.training.stiefel import stacks_of
from tests.reference import tiny_model, token_ids
from tests.unit.conversion.sources import random_source, run_convert, save_source

MakeSession = Callable[..., Session]

LATENTS: dict[str, dict[str, Any]] = {
    "joint": {"latent__name": "joint", "latent__dim": 10},
    "separate": {"latent__name": "separate", "latent__dim": [6, 9]},
    "decoupled_rope": {"latent__name": "decoupled_rope", "latent__dim": [8, 6]},
}
ALONE = {"teacher__source": "x", "teacher__logits_weight": 0.0, "teacher__attention_weight": 0.0}


def teacher_for(corpus, layer_types: str = "0_1_2_3", **settings: Any) -> LCKVLlamaForCausalLM:
    sizes = {"vocab_size": len(corpus.tokenizer), "num_key_value_heads": 4, **settings}
    model = tiny_model(layer_types, seed=1, **sizes)
    shake(model)
    return model


def shake(model: nn.Module) -> None:
    """Biases and norms that do something."""
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, float("norm" in name), 0.3)


def normed(states: Tensor, norm: nn.Module | None) -> Tensor:
    if norm is None:
        return states
    return states / (states.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt() * norm.weight


def original(model: LCKVLlamaForCausalLM, inputs: list[Tensor], layer_idx: int) -> tuple[Tensor, Tensor]:
    """Keys `(num_tokens, num_heads, head_dim)` and values that a layer's readers read, of explicit projections."""
    source = model.config.sharing_plan.layers[layer_idx].key_source
    attention, x = model.model.layers[source].self_attn, inputs[source]
    keys, values = (
        (x @ proj.weight.T + (0 if proj.bias is None else proj.bias)).unflatten(-1, (-1, attention.head_dim))
        for proj in (attention.k_proj, attention.v_proj)
    )
    return normed(keys, getattr(attention, "k_norm", None)), values


def from_latent(model: LCKVLlamaForCausalLM, inputs: list[Tensor], layer_idx: int) -> tuple[Tensor, Tensor]:
    """The same for a model with latents, pair by pair and head by head where pairs are rotated."""
    owner = model.config.sharing_plan.layers[layer_idx].key_source
    attention, down = model.model.layers[layer_idx].self_attn, model.model.layers[owner].self_attn.kv_a_proj
    kept = inputs[owner] @ down.weight.T + (0 if down.bias is None else down.bias)
    key_proj, value_proj, head_dim = attention.k_b_proj, attention.v_b_proj, attention.head_dim
    sizes = model.config.kv_latents[owner]
    first = next(iter(sizes.values()))
    key_latent, value_latent = kept[:, :first], kept[:, first:] if "value_latent" in sizes else kept[:, :first]
    values = value_latent @ value_proj.weight.T + (0 if value_proj.bias is None else value_proj.bias)
    made = key_latent @ key_proj.weight.T + (0 if key_proj.bias is None else key_proj.bias)
    if planes := sizes.get("rotated_planes"):
        half = head_dim // 2
        free = [row for row in range(head_dim) if row % half not in planes]
        keys = torch.zeros(len(kept), len(key_proj.rotated), head_dim)
        keys[:, :, free] = made.unflatten(-1, (-1, len(free)))
        for number, plane in enumerate(planes):
            a, b = kept[:, first + number], kept[:, first + len(planes) + number]
            for head, (real, imaginary) in enumerate(key_proj.rotated[:, :, number]):
                keys[:, head, plane] += a * real - b * imaginary
                keys[:, head, plane + half] += a * imaginary + b * real
    else:
        keys = normed(made.unflatten(-1, (-1, head_dim)), getattr(attention, "k_norm", None))
    return keys, values.unflatten(-1, (-1, head_dim))


def inputs_of(model: LCKVLlamaForCausalLM, batch: dict[str, Tensor], scored: Tensor) -> list[Tensor]:
    """What every layer's queries are made of in a model without cycles, of the scored tokens."""
    seen: list[Tensor] = []
    hooks = [
        layer.self_attn.q_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0][0, :-1][scored]))
        for layer in model.model.layers
    ]
    model(**batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("kind", LATENTS)
@pytest.mark.parametrize(
    ("layer_types", "of_teacher", "settings"),
    [
        ("0_1_2_3", "0_1_2_3", {"attention_bias": True}),
        ("0_0_2_2", "0_1_2_3", {}),
        ("0_0_0_3", "0_1_1_3", {"attention_bias": True, "use_qk_norm": True}),
    ],
)
@torch.no_grad()
def test_the_loss_of_a_step_by_hand(make_session: MakeSession, corpus, kind, layer_types, of_teacher, settings):
    if kind == "decoupled_rope":
        settings = settings | {"use_qk_norm": False}
    teacher = teacher_for(corpus, of_teacher, **settings)
    session = make_session(
        teacher=teacher,
        model__layer_types=layer_types,
        model__num_attention_heads=4,
        model__initializer_range=0.2,
        trainer__max_steps=1,
        trainer__micro_batch_size=2,
        teacher__source="x",
        teacher__reconstruction_weight=0.5,
        teacher__labels_weight=0.25,
        **{f"model__{name}": value for name, value in settings.items()},
        **LATENTS[kind],
    )
    shake(session.model)
    scales, data = [0.0] * 8, session.data.train
    parts: list[list[Tensor]] = [[] for _ in scales]
    for index in [number * len(data) // 8 for number in range(8)]:
        batch = {name: value[None] for name, value in data[index].items()}
        scored = batch.pop("labels")[0, 1:] != -100
        inputs = inputs_of(teacher, batch, scored)
        each = [states for layer_idx in range(4) for states in original(teacher, inputs, layer_idx)]
        for found, states in zip(parts, each, strict=True):
            found.append(states.flatten())
    scales = [torch.cat(each).square().mean().item() for each in parts]
    total, count = 0.0, 0
    for index in list(session.trainer.order)[:4]:
        batch = {name: value[None] for name, value in data[index].items()}
        scored = batch.pop("labels")[0, 1:] != -100
        count += int(scored.sum())
        inputs = inputs_of(session.model.eval(), batch, scored)
        for layer_idx in range(4):
            pairs = zip(
                from_latent(session.model, inputs, layer_idx), original(teacher, inputs, layer_idx), strict=True
            )
            for number, (mine, theirs) in enumerate(pairs):
                error = (mine - theirs).double().square().mean((-1, -2)).sum().item()
                total += error / scales[2 * layer_idx + number] / 8
    with torch.enable_grad():
        session.run()
    line = next(line for line in session.folder.read_metrics() if "loss" in line)
    assert session.trainer.distillation_loss.scales["reconstruction"] == pytest.approx(scales, rel=1e-4)
    assert line["loss_reconstruction"] == pytest.approx(total / count, rel=1e-4)
    by_hand = line["loss_logits"] + line["loss_attention"] + line["loss_reconstruction"] / 2 + line["loss_labels"] / 4
    assert line["loss"] == pytest.approx(by_hand, rel=1e-5)


def test_only_what_makes_keys_and_values_gets_gradients():
    latents = [{"latent": 6}, None, {"key_latent": 4, "value_latent": 5}, None]
    model = tiny_model("0_0_2_2", kv_latents=latents, use_qk_norm=True, attention_bias=True)
    ids = token_ids(2, 7)
    states = model(ids, output_hidden_states=True).hidden_states
    inputs = [layer.input_layernorm(x) for layer, x in zip(model.model.layers, states[:-1], strict=True)]
    torch.stack([each.square().sum() for each in keys_and_values(model, inputs, [1, 2, 3])]).sum().backward()
    reached = {name for name, item in model.named_parameters() if item.grad is not None and item.grad.any()}
    made = ("k_b_proj.weight", "k_b_proj.bias", "v_b_proj.weight", "v_b_proj.bias", "k_norm.weight")
    expected = {f"model.layers.{layer}.self_attn.{name}" for layer in (1, 2, 3) for name in made}
    assert reached == expected | {f"model.layers.{owner}.self_attn.kv_a_proj.weight" for owner in (0, 2)}


@pytest.mark.parametrize("kind", LATENTS)
def test_latents_at_full_size_give_everything_back(kind: str):
    teacher = tiny_model("0_1_2_3", attention_bias=True)
    shake(teacher)
    student = to_latents(teacher, [token_ids(4, 40, seed=seed) for seed in range(2)], kind, ratio=1.0)
    inputs = [torch.randn(2, 5, 32) for _ in range(4)]
    layers = [0, 1, 2, 3]
    pairs = zip(keys_and_values(student, inputs, layers), keys_and_values(teacher, inputs, layers), strict=True)
    for mine, theirs in pairs:
        assert torch.allclose(mine, theirs, atol=1e-4)


def test_the_teacher_is_not_asked_where_nothing_of_its_answer_counts(make_session: MakeSession, corpus):
    teacher = teacher_for(corpus)
    settings = {"model__layer_types": "0_0_2_3", "model__num_attention_heads": 4, **LATENTS["joint"]}
    session = make_session(
        teacher=teacher, teacher__reconstruction_weight=1.0, latent__skip_layers=1, **ALONE, **settings
    )
    calls: list[Any] = []
    teacher.register_forward_hook(lambda module, args, output: calls.append(None))
    before = {name: value.clone() for name, value in session.model.state_dict().items()}
    session.run()
    lines = [line for line in session.folder.read_metrics() if "loss" in line]
    assert not calls
    assert all(line["loss"] == pytest.approx(line["loss_reconstruction"]) for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert "loss_labels" in lines[0] and "loss_logits" not in lines[0]
    # The original projections, which are the teacher's, are in nothing that is saved.
    saved = load_file(session.folder.model / "model.safetensors")
    latest = session.folder.checkpoints.latest()
    assert latest is not None
    assert set(saved) == set(load_file(latest / "model.safetensors")) == {*before} - {"lm_head.weight"}
    plain = {name for name in saved if "k_proj" in name or "v_proj" in name}
    assert plain == {f"model.layers.0.self_attn.{name}_proj.weight" for name in "kv"}  # of the layer that is skipped


def test_models_that_have_nothing_to_compare_are_refused():
    cfg = TeacherConfig(source="x", attention_weight=0.0, reconstruction_weight=2.0)
    plain, latent = tiny_model("0_0"), tiny_model("0_0", kv_latents=[{"latent": 6}, None])
    check_teacher_fits(plain, latent, cfg, block_size=32)
    with pytest.raises(UserError, match=r"^teacher.reconstruction_weight=2.0: the trained model keeps no latents"):
        check_teacher_fits(plain, plain, cfg, block_size=32)
    other = tiny_model("0_1", num_key_value_heads=4)
    with pytest.raises(UserError, match=r"num_key_value_heads is 4, .* or set teacher.reconstruction_weight=0$"):
        check_teacher_fits(other, latent, cfg, block_size=32)


def test_a_conversion_is_healed_by_its_own_source(tmp_path):
    source = save_source(tmp_path / "source", random_source(4))
    (tmp_path / "text.txt").write_text("In the beginning was the word, and light shone upon deep waters. " * 60)
    settings = ["method=distill", "latent=joint", "latent.ratio=2", "sharing=cla", "init.calibration_tokens=0"]
    settings += ["teacher.attention_weight=0", "teacher.reconstruction_weight=1", "optim.name=riemannian_adam"]
    settings += ["data=files", f"data.files={tmp_path / 'text.txt'}", "data.block_size=32", "trainer.max_steps=6"]
    run_convert(source, tmp_path / "out", *settings, "trainer.global_batch_size=2", "trainer.logging_steps=1")
    lines = (tmp_path / "out-training" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss_reconstruction"] for line in lines if "loss_reconstruction" in line]
    assert losses[-1] < losses[0]
    model, _ = load_model(str(tmp_path / "out"), device="cpu")
    assert model.config.kv_sharing == "0_0_2_2" and model.config.kv_latents[0] is not None
    for stack in stacks_of(model):
        assert torch.allclose(stack.matrix.T @ stack.matrix, torch.eye(stack.matrix.shape[1]), atol=1e-5)
