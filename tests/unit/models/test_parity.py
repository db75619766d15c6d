"""Agreement with figures that the LCKV authors' implementation computed, in fp32 on a CPU."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lckv import LCKVLlamaConfig, LCKVLlamaForCausalLM

FOLDER = Path(__file__).parents[2] / "parity"
FLOATS = ("rms_norm_eps", "rope_theta")


def load(name, attn_implementation):
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        figures = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        options = {
            key: value if key == "layer_types" else float(value) if key in FLOATS else int(value)
            for key, value in file.metadata().items()
        }
    model = LCKVLlamaForCausalLM(LCKVLlamaConfig(**options, attn_implementation=attn_implementation))
    model.load_state_dict({key[2:]: value for key, value in figures.items() if key.startswith("w:")})
    return model, figures


@pytest.fixture(params=["eager", "sdpa"])
def attn_implementation(request):
    return request.param


@pytest.fixture(params=["llama", "cla", "yoco", "lckv"])
def case(request, attn_implementation):
    return load(request.param, attn_implementation)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_training(case):
    model, figures = case
    outputs = model.train()(figures["input_ids"], labels=figures["input_ids"], use_cache=False)
    outputs.loss.backward()
    assert_close(outputs.logits, figures["train_logits"])
    assert_close(outputs.loss.view(1), figures["loss"])
    gradients = {key[2:]: value for key, value in figures.items() if key.startswith("g:")}
    assert gradients
    for name, gradient in gradients.items():
        assert_close(model.get_parameter(name).grad, gradient)


@torch.no_grad()
def test_evaluation(case):
    model, figures = case
    assert_close(model.eval()(figures["input_ids"]).logits, figures["eval_logits"])


@torch.no_grad()
def test_decoding_token_by_token_with_a_cache_is_the_converged_answer(case):
    model, figures = case
    model.eval()
    past_key_values, logits = None, []
    for token in figures["input_ids"].split(1, dim=1):
        outputs = model(token, past_key_values=past_key_values, use_cache=True)
        past_key_values = outputs.past_key_values
        logits.append(outputs.logits)
    assert_close(torch.cat(logits, dim=1), figures["converged_logits"])


@torch.no_grad()
def test_iterating_until_convergence_is_the_converged_answer(case):
    model, figures = case
    model.config.forward_passes, model.config.converge_tolerance = "converge", 1e-6
    assert_close(model.eval()(figures["input_ids"]).logits, figures["converged_logits"])
