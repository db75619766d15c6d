"""The default cache: what its layers hold, rings above all, gradients, and mixed precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from lckv.cache import DynamicKVCache
from lckv.cache.dynamic import FullLayer, RingLayer
from lckv.cache.layers import check_crop
from tests.contract.caches import plain_store
from tests.reference import PATTERNS, tiny_model, token_ids


def numbered(first, stop):
    """Keys that say which token they belong to, `(2, 1, stop - first, 1)`; the values are their negatives."""
    states = torch.arange(float(first), float(stop)).view(1, 1, -1, 1).expand(2, -1, -1, -1).clone()
    return states, -states


def tokens_of(states):
    keys, values = states
    assert torch.equal(keys, -values)
    return keys[0, 0, :, 0].int().tolist()


@given(st.integers(1, 6), st.lists(st.one_of(st.integers(1, 9), st.integers(-6, 0)), max_size=12), st.booleans())
@settings(max_examples=100, deadline=None)
def test_a_ring_returns_what_a_list_of_all_tokens_would(window, steps, records):
    """Positive steps are new tokens, others are rollbacks."""
    ring, text = RingLayer(plain_store(window, 1, 1)), []
    lost = 0  # tokens before this one have been dropped
    if records:
        ring.activate_past_recording()
    for step in steps:
        if step > 0:
            new = numbered(len(text), len(text) + step)
            expected = [*text[max(0, len(text) - window + 1) :], *new[0][0, 0, :, 0].int().tolist()]
            assert ring.get_mask_sizes(step) == (len(expected), max(0, len(text) - window + 1))
            assert tokens_of(ring.peek(new)) == expected == tokens_of(ring.write(new))
            text = [*text, *range(len(text), len(text) + step)]
            lost = lost if records else max(lost, len(text) - window)
        elif -step <= len(text):
            left = len(text) + step
            if step and max(lost, 0) > max(0, left - window + 1):
                with pytest.raises(RuntimeError, match=f"window of {window} tokens has dropped"):
                    ring.crop(step)
                continue
            ring.crop(step)
            text = text[:left]
            lost = max(lost, left - window)
        assert ring.get_seq_length() == len(text)
        if text and not records:
            assert ring.keys.shape[2] == min(len(text), window)
    if records and text:
        ring.crop(0)
        assert ring.keys.shape[2] == min(len(text), window)


@given(st.lists(st.one_of(st.integers(1, 9), st.integers(-6, 0)), max_size=12))
@settings(max_examples=50, deadline=None)
def test_a_full_layer_returns_everything(steps):
    layer, text = FullLayer(plain_store(None, 1, 1)), []
    for step in steps:
        if step > 0:
            new = numbered(len(text), len(text) + step)
            assert layer.get_mask_sizes(step) == (len(text) + step, 0)
            text = [*text, *range(len(text), len(text) + step)]
            assert tokens_of(layer.peek(new)) == text == tokens_of(layer.write(new))
        elif -step <= len(text):
            layer.crop(step)
            text = text[: len(text) + step]
        assert layer.get_seq_length() == len(text)


def test_a_full_ring_is_written_in_place():
    ring = RingLayer(plain_store(4, 1, 1))
    ring.write(numbered(0, 5))
    address = ring.keys.data_ptr()
    for position in range(5, 12):
        ring.write(numbered(position, position + 1))
    assert ring.keys.data_ptr() == address and ring.num_bytes() == 2 * 2 * 4 * 4


def test_returned_states_do_not_change_when_the_ring_moves_on():
    ring = RingLayer(plain_store(3, 1, 1))
    ring.write(numbered(0, 3))
    keys, _ = ring.write(numbered(3, 4))
    before = keys.clone()
    ring.write(numbered(4, 6))
    assert torch.equal(keys, before)


def test_recording_ends_when_it_is_switched_off():
    """What transformers does before it hands a cache back."""
    ring = RingLayer(plain_store(3, 1, 1))
    ring.activate_past_recording()
    ring.write(numbered(0, 8))
    assert ring.keys.shape[2] == 8
    ring.crop(-1)
    ring.record_past = False
    assert tokens_of(ring.write(numbered(7, 8))) == [5, 6, 7]
    assert ring.keys.shape[2] == 3
    ring.activate_past_recording()
    ring.write(numbered(8, 12))
    ring.record_past = False  # without a crop in between
    assert tokens_of(ring.write(numbered(12, 13))) == [10, 11, 12]
    assert ring.keys.shape[2] == 3


@pytest.mark.parametrize("tokens_to_remove", [1, -6])
def test_impossible_rollbacks_are_refused(tokens_to_remove):
    with pytest.raises(ValueError, match=f"crop\\({tokens_to_remove}\\) of 5 tokens: allowed are -5 to 0"):
        check_crop(tokens_to_remove, 5)


@pytest.mark.parametrize("layer_types", ["0_0_2_2", "0s_1s_2_2", "0_1s_1s_0"])
def test_gradients_flow_through_chunks(layer_types):
    model, input_ids = tiny_model(layer_types), token_ids(2, 9)
    gradients = []
    for chunks in ([9], [4, 1, 1, 3]):
        model.zero_grad()
        cache = DynamicKVCache(model.config)
        logits = [model(chunk, past_key_values=cache).logits for chunk in input_ids.split(chunks, dim=1)]
        torch.cat(logits, dim=1).square().sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("layer_types", PATTERNS)
@torch.no_grad()
def test_half_precision_equals_transformers_cache_bit_by_bit(layer_types):
    model, input_ids = tiny_model(layer_types).to(torch.bfloat16), token_ids(2, 9)
    ours, theirs = DynamicKVCache(model.config), DynamicCache(config=model.config)
    for chunk in input_ids.split([5, 1, 1, 2], dim=1):
        assert torch.equal(model(chunk, past_key_values=ours).logits, model(chunk, past_key_values=theirs).logits)
    assert {tensor.dtype for layer in ours.owners().values() for tensor in layer.tensors().values()} == {
        torch.bfloat16
    }
