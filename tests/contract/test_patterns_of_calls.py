"""A call under another pattern: what a model of that pattern answers that has the same weights."""

import pytest
import torch
from transformers import DynamicCache

from lckv.errors import UserError
from lckv.sharing.patterns import build_layer_types, parse_layer_types
from tests.reference import PATTERNS, SHAPES, tiny_model, token_ids

BOTH_OR_NONE = {"keys and values", "no keys and values"}
WHOLE = [each for each in PATTERNS if {layer.computes for layer in parse_layer_types(each).layers} <= BOTH_OR_NONE]


def model_for_all(layer_types, **kwargs):
    """A model in which every layer has keys and values of its own, and one of a pattern that has its weights."""
    num_layers = parse_layer_types(layer_types).num_hidden_layers
    whole, fixed = (tiny_model(each, **kwargs) for each in (build_layer_types("llama", num_layers), layer_types))
    fixed.load_state_dict({name: whole.state_dict()[name] for name in fixed.state_dict()})
    return whole, fixed


def gradients(model, **call):
    model.zero_grad()
    outputs = model(**call)
    outputs.loss.backward()
    return outputs.logits, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "layer_types, checkpointing",
    [
        *((layer_types, None) for layer_types in WHOLE),
        *(
            (layer_types, {"use_reentrant": each})
            for layer_types in ("0_0_2_2s", "0_3_3_3_4")
            for each in (False, True)
        ),
    ],
    ids=str,
)
def test_logits_and_gradients_are_those_of_the_pattern(layer_types, checkpointing):
    models = model_for_all(layer_types)
    if checkpointing is not None:
        for model in models:
            model.train().gradient_checkpointing_enable(checkpointing)
    input_ids = token_ids(2, 9)
    whole, fixed = models
    batches = {
        "packed": {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 2)},
        "padded": {"attention_mask": torch.tensor([[1] * 9, [0] * 3 + [1] * 6])},
    }
    for batch in batches.values():
        call = {"input_ids": input_ids, "labels": input_ids, "use_cache": False} | batch
        logits, found = gradients(whole, **call, layer_types=layer_types)
        expected_logits, expected = gradients(fixed, **call)
        torch.testing.assert_close(logits, expected_logits, atol=1e-6, rtol=0)
        for name, gradient in found.items():
            if name in expected:
                torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5)
            else:
                assert gradient is None, name


@pytest.mark.parametrize("layer_types", WHOLE)
@torch.no_grad()
def test_a_cache_keeps_what_the_pattern_keeps(layer_types):
    whole, fixed = model_for_all(layer_types)
    caches = DynamicCache(config=whole.config.under(layer_types)), DynamicCache(config=fixed.config)
    for chunk in token_ids(2, 9).split([5, 1, 3], dim=1):
        logits = whole(chunk, past_key_values=caches[0], layer_types=layer_types).logits
        torch.testing.assert_close(logits, fixed(chunk, past_key_values=caches[1]).logits, atol=1e-6, rtol=0)
    assert [type(layer) for layer in caches[0].layers] == [type(layer) for layer in caches[1].layers]


@torch.no_grad()
def test_the_model_itself_stays_as_it_is():
    model, input_ids = tiny_model("0_1s_2_3"), token_ids(2, 9)
    before = model(input_ids).logits
    other = model(input_ids, layer_types="0_0s_2_2").logits
    assert (other - before).abs().max() > 1e-3
    assert torch.equal(model(input_ids).logits, before)
    assert model.config.kv_sharing == model.model.sharing_plan.layer_types == "0_1s_2_3"


@torch.no_grad()
def test_keys_are_rotated_as_their_layers_do_it():
    labels = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    whole, fixed = model_for_all("0_0s_3_3", **SHAPES["gemma"] | {"rope_layer_types": labels})
    input_ids = token_ids(2, 9)
    torch.testing.assert_close(whole(input_ids, layer_types="0_0s_3_3").logits, fixed(input_ids).logits)


def test_patterns_that_the_weights_cannot_serve_are_refused():
    with pytest.raises(
        UserError,
        match="layer 1 computes no keys and values, not keys and values, in this model, whose own are '0_0_2_2'",
    ):
        tiny_model("0_0_2_2")(token_ids(1, 3), layer_types="0_1_2_2")
    with pytest.raises(UserError, match="layer 2 computes keys and values, not values, in this model"):
        tiny_model("0_1_2_3")(token_ids(1, 3), layer_types="0_1_3:2_3")
    with pytest.raises(UserError, match="has 3 entries, but num_hidden_layers=4"):
        tiny_model("0_1_2_3")(token_ids(1, 3), layer_types="0_1_2")
    latents = tiny_model("0_1", kv_latents=[{"latent": 8}] * 2)
    with pytest.raises(UserError, match="layers keep latents"):
        latents(token_ids(1, 3), layer_types="0_0")
