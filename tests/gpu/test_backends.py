"""Attention backends, compilation and half precision on a CUDA device, against fp32 SDPA."""

import importlib.util

import pytest
import torch

from tests.reference import PATTERNS, tiny_model, token_ids

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LENGTH = 40
needs_flash_attention = pytest.mark.skipif(
    importlib.util.find_spec("flash_attn") is None, reason="needs the package flash-attn"
)
BACKENDS = ["eager", "sdpa", "flex_attention", pytest.param("flash_attention_2", marks=needs_flash_attention)]


def models(layer_types, attn_implementation, dtype=torch.float32):
    sizes = {"hidden_size": 128, "head_dim": 32, "sliding_window": 5}
    expected = tiny_model(layer_types, **sizes).cuda()
    actual = tiny_model(layer_types, **sizes, attn_implementation=attn_implementation).cuda().to(dtype)
    return expected, actual


def inputs(kind):
    input_ids = token_ids(3, LENGTH).cuda()
    if kind == "packed":
        lengths = [13, 1, 26]
        position_ids = torch.cat([torch.arange(length) for length in lengths])[None].expand(3, -1)
        return {"input_ids": input_ids, "position_ids": position_ids.cuda()}
    attention_mask = torch.ones_like(input_ids)
    if kind == "left padded":
        attention_mask[1, :7] = 0
    if kind == "right padded":
        attention_mask[1, -7:] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


@pytest.mark.parametrize("kind", ["plain", "left padded", "right padded", "packed"])
@pytest.mark.parametrize("attn_implementation", BACKENDS)
@pytest.mark.parametrize("layer_types", PATTERNS)
def test_backends_agree_in_logits_and_gradients(layer_types, attn_implementation, kind):
    is_half = attn_implementation.startswith("flash")  # the kernels take no fp32
    expected, actual = models(layer_types, attn_implementation, torch.bfloat16 if is_half else torch.float32)
    batch = inputs(kind)
    seen = batch.get("attention_mask", torch.ones_like(batch["input_ids"])) == 1
    labels = batch["input_ids"].masked_fill(~seen, -100)
    outputs = [model(**batch, labels=labels, use_cache=False) for model in (expected, actual)]
    for output in outputs:
        output.loss.backward()
    tolerance = 6e-2 if is_half else 2e-3  # TF32 is off; flex accumulates in another order
    difference = (outputs[1].logits[seen].float() - outputs[0].logits[seen]).norm()
    assert difference <= tolerance * outputs[0].logits[seen].norm()
    assert outputs[1].logits.isfinite().all()
    for (name, parameter), other in zip(expected.named_parameters(), actual.parameters(), strict=True):
        assert other.grad.isfinite().all(), name
        assert (other.grad.float() - parameter.grad).norm() <= 5 * tolerance * parameter.grad.norm() + 1e-4, name


@pytest.mark.parametrize("attn_implementation", BACKENDS)
@pytest.mark.parametrize("layer_types", ["0_0_2_2", "0_3_3_3_4", "0s_2_2_2s"])
@torch.no_grad()
def test_decoding_with_a_cache_equals_one_forward_pass(layer_types, attn_implementation):
    is_half = attn_implementation.startswith("flash")
    expected, actual = models(layer_types, attn_implementation, torch.bfloat16 if is_half else torch.float32)
    expected.config.forward_passes = LENGTH
    input_ids = token_ids(2, LENGTH).cuda()
    reference = expected(input_ids).logits
    past_key_values, logits = None, []
    for token in input_ids.split(1, dim=1):
        outputs = actual(token, past_key_values=past_key_values, use_cache=True)
        past_key_values = outputs.past_key_values
        logits.append(outputs.logits.float())
    difference = (torch.cat(logits, dim=1) - reference).norm()
    assert difference <= (8e-2 if is_half else 2e-3) * reference.norm()


@pytest.mark.parametrize("layer_types", ["0_0_2_2", "0_3_3_3_4"])
def test_compiled_training_step_agrees(layer_types):
    torch._dynamo.reset()
    expected, actual = models(layer_types, "sdpa")
    batch = inputs("packed")
    compiled = torch.compile(actual, fullgraph=True)
    losses = [model(**batch, labels=batch["input_ids"], use_cache=False).loss for model in (expected, compiled)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0], atol=1e-4, rtol=1e-4)
    for parameter, other in zip(expected.parameters(), actual.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad, atol=1e-3, rtol=1e-2)
