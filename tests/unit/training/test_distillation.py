"""Training against a teacher: what the loss is, and that it does not depend on how the batch is cut up."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lckv.config import TeacherConfig
from lckv.config.names import LOSS_PARTS
from lckv.errors import UserError
from lckv.models import LCKVLlamaConfig, LCKVLlamaForCausalLM
from lckv.training.distillation import (
    DistillationLoss,
    KeptOutputs,
    divergence,
    relative_error,
    sum_over_predicted,
)
from lckv.training.session import Session

MakeSession = Callable[..., Session]

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # attention outputs and logits that are not almost zero
    "tie_word_embeddings": True,
}
PARTS = ("loss_logits", "loss_attention", "loss_reconstruction", "loss_labels")
LATENTS = {"latent__name": "separate", "latent__dim": [8, 12], "model__layer_types": "0_2_2_3"}
"""Of a cycle."""


@pytest.fixture
def build_teacher(corpus) -> Callable[..., LCKVLlamaForCausalLM]:
    def build(layer_types: str = "0_1_2_3", **settings) -> LCKVLlamaForCausalLM:
        torch.manual_seed(1)
        config = LCKVLlamaConfig(layer_types=layer_types, vocab_size=len(corpus.tokenizer), **{**SIZES, **settings})
        return LCKVLlamaForCausalLM(config)

    return build


def train_lines(session: Session) -> list[dict]:
    return [line for line in session.folder.read_metrics() if "loss" in line]


def curve(session: Session) -> list[dict[str, float]]:
    names = ("loss", "grad_norm", "perplexity", *PARTS)
    return [{name: line[name] for name in names if name in line} for line in train_lines(session)]


def assert_same_curve(first: Session, second: Session, tolerance: float = 1e-5) -> None:
    assert len(curve(first)) == len(curve(second)) > 0
    for one, other in zip(curve(first), curve(second), strict=True):
        assert other == pytest.approx(one, rel=tolerance)


def attentions_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [layer.self_attn for layer in model.model.layers]


def attention_outputs(model: torch.nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """What the output projections of a model without cycles give out."""
    outputs = []
    hooks = [
        layer.self_attn.o_proj.register_forward_hook(lambda module, args, output: outputs.append(output))
        for layer in model.model.layers
    ]
    model(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return outputs


# The parts, by hand.


def test_divergence_by_hand():
    teacher, student = torch.tensor([[[0.9, 0.1]]]).log(), torch.tensor([[[0.5, 0.5]]]).log()
    by_hand = 0.9 * torch.tensor(0.9 / 0.5).log() + 0.1 * torch.tensor(0.1 / 0.5).log()
    assert divergence(student + 3, teacher - 1, temperature=1.0).item() == pytest.approx(by_hand.item(), rel=1e-5)
    # At temperature 2 probabilities go with their square roots: 3 to 1 in the place of 9 to 1.
    warm = 0.75 * torch.tensor(0.75 / 0.5).log() + 0.25 * torch.tensor(0.25 / 0.5).log()
    assert divergence(student, teacher, temperature=2.0).item() == pytest.approx(4 * warm.item(), rel=1e-5)


def test_attention_error_by_hand():
    teacher = [torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[0.0, 2.0]]])]
    student = [torch.tensor([[[2.0, 3.0]]]), torch.tensor([[[4.0, 0.0]]])]
    # Mean squares of the differences are 1/2 and 10.
    error = relative_error(student, teacher, scales=[5.0, 2.0])
    assert error.item() == pytest.approx((0.5 / 5 + 10 / 2) / 2)


def test_layers_without_a_scale_are_left_out_of_the_attention_error():
    outputs, zeros = [torch.ones(1, 1, 2), torch.full((1, 1, 2), 4.0)], [torch.zeros(1, 1, 2)] * 2
    assert relative_error(outputs, zeros, scales=[0.0, 8.0]).item() == 16 / 8


def test_only_tokens_that_predict_something_count():
    labels = torch.tensor([[-100, 7, -100, 8], [-100, -100, -100, 9]])
    values = torch.tensor([[1.0, 10.0, 100.0, 1e9], [1e9, 1e9, 1000.0, 1e9]])
    assert sum_over_predicted(values, labels).item() == 1 + 100 + 1000


def test_loss_is_the_weighted_sum_of_its_parts():
    cfg = TeacherConfig(source="x", logits_weight=2.0, attention_weight=0.5, labels_weight=0.25)
    parts = {"logits": torch.tensor(3.0), "attention": torch.tensor(5.0), "labels": torch.tensor(7.0)}
    assert DistillationLoss(cfg, {}).total(parts).item() == 2 * 3 + 0.5 * 5 + 0.25 * 7


@pytest.mark.parametrize(
    ("weights", "with_graph"),
    [
        ((1.0, 0.0, 0.0), {"logits"}),
        ((0.0, 0.0, 1.0), {"labels"}),
        ((0.0, 1.0, 0.0), {"attention", "labels"}),  # labels times zero: what every parameter takes part in
        ((1.0, 1.0, 1.0), {"logits", "attention", "labels"}),
    ],
)
def test_parts_that_are_only_looked_at_keep_no_graph(weights, with_graph):
    names = ("logits_weight", "attention_weight", "labels_weight")
    loss = DistillationLoss(TeacherConfig(source="x", **dict(zip(names, weights, strict=True))), {"attention": [1.0]})
    logits, output = (torch.randn(1, 3, 5, requires_grad=True) for _ in range(2))
    labels = torch.tensor([[-100, 1, 2]])
    parts = loss.parts(logits, torch.randn(1, 3, 5), {"attention": ([output], [torch.randn(1, 3, 5)])}, labels)
    assert {name for name, part in parts.items() if part.requires_grad} - {"attention"} == with_graph - {"attention"}
    by_hand = torch.nn.functional.cross_entropy(logits[0, :2], labels[0, 1:], reduction="sum")
    assert parts["labels"].item() == pytest.approx(by_hand.item(), rel=1e-5)
    loss.total(parts).backward()
    assert logits.grad is not None


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_the_loss_of_a_step_by_hand(make_session: MakeSession, build_teacher, micro_batch_size: int):
    teacher = build_teacher()
    session = make_session(
        teacher=teacher,
        model__layer_types="0_0_2_2",
        model__initializer_range=0.2,
        trainer__max_steps=1,
        trainer__micro_batch_size=micro_batch_size,
        teacher__source="x",
        teacher__labels_weight=0.5,
    )
    scales = session.trainer.distillation_loss.scales["attention"]
    totals, count = dict.fromkeys(("loss_logits", "loss_attention", "loss_labels"), 0.0), 0
    for index in list(session.trainer.order)[:4]:
        batch = {name: value[None] for name, value in session.data.train[index].items()}
        labels = batch.pop("labels")[0, 1:]
        scored = labels != -100
        count += int(scored.sum())
        with torch.no_grad():
            mine, theirs = (model(**batch).logits[0, :-1][scored] for model in (session.model.eval(), teacher))
            ours, targets = (attention_outputs(model, batch) for model in (session.model, teacher))
        p, q = theirs.double().softmax(-1), mine.double().softmax(-1)
        totals["loss_logits"] += (p * (p / q).log()).sum().item()
        totals["loss_labels"] -= q[torch.arange(len(q)), labels[scored]].log().sum().item()
        for one, other, scale in zip(ours, targets, scales, strict=True):
            error = (one - other)[0, :-1][scored].double().square().mean(-1) / scale
            totals["loss_attention"] += error.sum().item() / len(scales)
    session.run()
    line = train_lines(session)[0]
    for name, total in totals.items():
        assert line[name] == pytest.approx(total / count, rel=1e-4)
    assert line["loss"] == pytest.approx(line["loss_logits"] + line["loss_attention"] + line["loss_labels"] / 2)
    assert line["perplexity"] == pytest.approx(torch.tensor(line["loss_labels"]).exp().item(), rel=1e-5)


def test_scales_are_the_mean_squares_of_the_teachers_outputs(make_session: MakeSession, build_teacher):
    teacher = build_teacher()
    session = make_session(teacher=teacher, teacher__source="x")
    data, outputs = session.data.train, []
    for index in [number * len(data) // 8 for number in range(8)]:
        batch = {name: value[None] for name, value in data[index].items()}
        scored = batch.pop("labels")[0, 1:] != -100
        outputs.append([output[0, :-1][scored] for output in attention_outputs(teacher, batch)])
    for scale, *parts in zip(session.trainer.distillation_loss.scales["attention"], *outputs, strict=True):
        assert scale == pytest.approx(torch.cat(parts).square().mean().item(), rel=1e-4)


def test_a_teachers_layer_that_puts_out_zeros_is_left_out(make_session: MakeSession, build_teacher):
    teacher = build_teacher()
    torch.nn.init.zeros_(teacher.model.layers[1].self_attn.o_proj.weight)
    session = make_session(teacher=teacher, teacher__source="x", trainer__max_steps=1)
    scales = session.trainer.distillation_loss.scales["attention"]
    assert [scale > 0 for scale in scales] == [True, False, True, True]
    session.run()
    assert 0 < train_lines(session)[0]["loss_attention"] < 1e4


def test_a_teacher_without_any_attention_is_refused(make_session: MakeSession, build_teacher):
    teacher = build_teacher()
    for layer in teacher.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    with pytest.raises(UserError, match=r"^teacher.attention_weight=1.0: .* are all zero, .*; allowed is 0"):
        make_session("silent", teacher=teacher, teacher__source="x")


# What the hooks see.


@pytest.mark.parametrize("layer_types", ["0_0_2_2", "1_1_2", "0_2_2_3"])
def test_outputs_are_those_of_the_pass_that_the_model_goes_on_from(build_teacher, layer_types: str):
    model = build_teacher(layer_types, forward_passes=2, backward_passes=2)
    inputs = {"input_ids": torch.randint(0, 256, (2, 12))}
    with KeptOutputs(attentions_of(model), 12) as outputs:
        states = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    outputs = list(outputs)
    assert len(outputs) == len(model.model.layers)
    for layer, output, (before, after) in zip(model.model.layers, outputs, pairwise(states), strict=True):
        middle = before + output
        expected = middle + layer.mlp(layer.post_attention_layernorm(middle))
        if layer is model.model.layers[-1]:
            expected = model.model.norm(expected)
        assert torch.allclose(expected, after, atol=1e-5)


def test_outputs_of_a_model_that_runs_token_by_token(build_teacher):
    at_once = build_teacher("1_1_2", forward_passes=20)
    one_by_one = build_teacher("1_1_2", use_sequential=True)
    inputs = {"input_ids": torch.randint(0, 256, (2, 6))}
    seen = []
    for model in (at_once, one_by_one):
        with torch.no_grad(), KeptOutputs(attentions_of(model), 6) as outputs:
            model(**inputs, use_cache=False)
        seen.append(list(outputs))
    for one, other in zip(*seen, strict=True):
        assert one.shape == (2, 6, 32)
        assert torch.allclose(one, other, atol=1e-5)


# The loop.


def test_a_model_that_is_its_teacher_has_nothing_to_learn(make_session: MakeSession, build_teacher):
    teacher = build_teacher()
    # Not more: AdamW makes whole steps of the rounding errors that the first one's gradients are.
    session = make_session(teacher=teacher, model__layer_types="0_1_2_3", teacher__source="x", trainer__max_steps=1)
    session.model.load_state_dict(teacher.state_dict())
    session.run()
    line = train_lines(session)[0]
    assert line["loss_logits"] == pytest.approx(0, abs=1e-6)
    assert line["loss_attention"] == pytest.approx(0, abs=1e-6)
    assert line["loss_labels"] > 1
    for model in (teacher, session.model):  # no hook stays behind
        assert not any(module._forward_hooks for module in model.modules())


def test_a_llama_of_transformers_can_teach(make_session: MakeSession, build_teacher, corpus):
    teacher = build_teacher()
    llama = LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, vocab_size=len(corpus.tokenizer), **SIZES))
    llama.load_state_dict(teacher.state_dict())
    settings = {"model__layer_types": "0_0_2_2", "teacher__source": "x", "data": corpus.config}
    sessions = [make_session(str(n), teacher=model, **settings) for n, model in enumerate((teacher, llama))]
    scales = [session.trainer.distillation_loss.scales["attention"] for session in sessions]
    # What one of them sees of other documents in its blocks, the other sees too.
    assert scales[0] == pytest.approx(scales[1], rel=1e-4)


@pytest.mark.parametrize(
    "weights", [(1.0, 1.0, 0.0, 0.5), (0.0, 1.0, 0.0, 0.0), (1.0, 0.0, 2.0, 0.5), (0.0, 0.0, 1.0, 0.0)]
)
def test_accumulation_does_not_change_the_curve(make_session: MakeSession, build_teacher, weights):
    names = [f"teacher__{name}_weight" for name in LOSS_PARTS]
    settings = {"teacher__source": "x", "teacher__temperature": 2.0, **dict(zip(names, weights, strict=True))}
    settings |= LATENTS if weights[2] else {}
    whole = make_session("whole", teacher=build_teacher(), **settings)
    whole.run()
    accumulated = make_session("accumulated", teacher=build_teacher(), trainer__micro_batch_size=1, **settings)
    accumulated.run()
    assert_same_curve(whole, accumulated)
    assert all("kv_residual" in line for line in train_lines(whole))
    named = {name for name in PARTS if name in train_lines(whole)[0]}
    measured = {name for name, weight in zip(LOSS_PARTS, weights, strict=True) if weight} | {"labels"}
    assert named == {f"loss_{name}" for name in measured | ({"logits"} if weights[1] else set())}


def test_metrics_are_means_over_the_steps_since_the_last_log(make_session: MakeSession, build_teacher):
    every = make_session("every", teacher=build_teacher(), teacher__source="x", trainer__save_steps=None)
    every.run()
    rarely = make_session(
        "rarely", build_teacher(), teacher__source="x", trainer__save_steps=None, trainer__logging_steps=3
    )
    rarely.run()
    for name in ("loss", "loss_logits", "loss_attention", "loss_labels"):
        values = [line[name] for line in train_lines(every)]
        means = [sum(values[start : start + 3]) / 3 for start in (0, 3)]
        assert [line[name] for line in train_lines(rarely)] == pytest.approx(means, rel=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"teacher__logits_weight": 0.0},
        {"teacher__attention_weight": 0.0, "teacher__reconstruction_weight": 1.0, **LATENTS},
    ],
)
def test_gradient_checkpointing_does_not_change_the_curve(make_session: MakeSession, build_teacher, settings):
    plain = make_session("plain", teacher=build_teacher(), teacher__source="x", **settings)
    plain.run()
    checkpointed = make_session(
        "checkpointed",
        teacher=build_teacher(),
        teacher__source="x",
        trainer__gradient_checkpointing=True,
        **settings,
    )
    checkpointed.run()
    assert checkpointed.model.model.layers[0].gradient_checkpointing
    assert train_lines(plain)[0]["grad_norm"] > 0
    assert_same_curve(plain, checkpointed)


@pytest.mark.parametrize("trainable", ["kv", "all"])
def test_a_student_with_the_teachers_weights_comes_closer_to_it(
    make_session: MakeSession, build_teacher, trainable: str
):
    teacher = build_teacher()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    session = make_session(
        teacher=teacher,
        model__layer_types="0_0_2_2",
        trainer__max_steps=20,
        trainer__trainable=trainable,
        teacher__source="x",
        optim__learning_rate=0.01,
        optim__schedule="constant",
    )
    missing, _ = session.model.load_state_dict(teacher.state_dict(), strict=False)
    assert missing == []
    results = session.run()
    lines = train_lines(session)
    for name in ("loss", "loss_logits", "loss_attention"):
        assert lines[-1][name] < 0.9 * lines[0][name]
    after = session.model.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    if trainable == "kv":
        assert moved == {name for name in after if "k_proj" in name or "v_proj" in name}
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher.training
    assert {name: results.get(name) for name in PARTS} == {name: lines[-1].get(name) for name in PARTS}


def test_interrupted_run_goes_on_bit_for_bit(
    make_session: MakeSession, build_teacher, interrupt: Callable[[Session, int], None]
):
    settings = {
        "model__attention_dropout": 0.3,
        "trainer__logging_steps": 2,
        "trainer__micro_batch_size": 2,
        "trainer__trainable": "kv",
        "teacher__source": "x",
    }
    whole = make_session("whole", teacher=build_teacher(), **settings)
    whole.run()
    interrupt(make_session("parts", teacher=build_teacher(), **settings), 5)
    again = make_session("parts", teacher=build_teacher(), **settings)
    assert again.first_step == 3
    again.run()
    assert curve(again) == curve(whole)
    one, other = whole.model.state_dict(), again.model.state_dict()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_teacher_that_does_not_fit_is_refused_at_the_start(make_session: MakeSession, build_teacher):
    with pytest.raises(UserError, match="teacher.source=x: its hidden_size is 16"):
        make_session(teacher=build_teacher(hidden_size=16), teacher__source="x")
