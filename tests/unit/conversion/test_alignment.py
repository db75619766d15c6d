"""Heads that are turned compute what they did, and copies that were turned are merged without loss."""

from dataclasses import replace

import pytest
import torch

from lckv.conversion.alignment import align, inner_products, match_heads
from lckv.conversion.heads import AttentionHeads, from_planes, layer_prefix, to_planes
from lckv.errors import UserError
from tests.reference import token_ids
from tests.unit.conversion.sources import KINDS, assert_identical, convert_model, random_source

NUM_TOKENS = 11


def heads_of(model, layer_idx):
    return AttentionHeads.read(model.state_dict(), layer_idx, model.config, (layer_idx, layer_idx))


def put_heads(model, layer_idx, heads):
    """Writes attention weights back into a model."""
    parts = heads.query_tensors(), heads.key_tensors(), heads.value_tensors(), heads.output_tensors()
    tensors = {layer_prefix(layer_idx) + name: tensor for part in parts for name, tensor in part.items()}
    assert not model.load_state_dict(tensors, strict=False).unexpected_keys


def random_rotations(*shape):
    return torch.linalg.qr(torch.randn(*shape)).Q


def scrambled(heads):
    """The same layer with KV heads swapped, keys rotated in their planes where they may be, values anyhow."""
    heads = heads.permuted(torch.tensor([1, 0]))
    num_heads, head_dim = heads.key.shape[:2]
    rotation = random_rotations(num_heads, head_dim, head_dim)
    gain = None
    key = heads.key
    if heads.key_norm is None:
        gain = torch.polar(torch.ones(num_heads, head_dim // 2), 2 * torch.pi * torch.rand(num_heads, head_dim // 2))
        key = from_planes(to_planes(key) * gain.conj()[..., None])
    turned = heads.with_readers_changed(gain, rotation.mT)
    return replace(turned, key=key, value=rotation @ heads.value)


def model_with_scrambled_copies(kind="plain"):
    """Layers 0 to 2 see the same, and the attention of each is that of layer 2, with its heads scrambled.

    Both add nothing to the hidden states, so nothing could be heard of what they attend to. Layer 2, which sees the
    same, is heard: its attention is the one that both are copies of. All three have the same norm.
    """
    model = random_source(4, **KINDS[kind])
    for layer_idx in (0, 1):
        model.model.layers[layer_idx].self_attn.o_proj.weight.data.zero_()
        model.model.layers[layer_idx].mlp.down_proj.weight.data.zero_()
    norm = model.model.layers[0].input_layernorm.weight.data
    for layer_idx in (1, 2):
        model.model.layers[layer_idx].input_layernorm.weight.data.copy_(norm)
        if kind == "norms":
            k_norm = model.model.layers[0].self_attn.k_norm.weight.data
            model.model.layers[layer_idx].self_attn.k_norm.weight.data.copy_(k_norm)
    spoken = heads_of(model, 2)  # what layer 2 says must come out of keys and values that layer 0 computes
    put_heads(model, 0, scrambled(spoken))
    model.model.layers[0].self_attn.o_proj.weight.data.zero_()
    put_heads(model, 1, scrambled(spoken))
    model.model.layers[1].self_attn.o_proj.weight.data.zero_()
    return model


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_reading_and_writing_heads_changes_no_bit(kind):
    model = random_source(2, **KINDS[kind])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter in model.model.layers[1].self_attn.parameters():
        parameter.zero_()
    put_heads(model, 1, AttentionHeads.read(before, 1, model.config, (1, 1)))
    names = [name for name in before if "q_norm" not in name and "o_proj.bias" not in name]
    assert_identical({name: model.state_dict()[name] for name in names}, {name: before[name] for name in names})


@pytest.mark.parametrize(("kind", "num_kv_heads"), [("plain", 4), ("biases", 1), ("norms", 2)])
@torch.no_grad()
def test_turned_heads_compute_what_they_did(kind, num_kv_heads):
    model = random_source(3, num_key_value_heads=num_kv_heads, **KINDS[kind])
    input_ids = token_ids(2, NUM_TOKENS, vocab_size=300)
    before = model(input_ids).logits
    reference = heads_of(model, 2)
    for layer_idx in (0, 1):
        heads = heads_of(model, layer_idx)
        turned = align(heads, reference)
        assert not torch.allclose(turned.value, heads.value, atol=1e-2)
        distances = [(each.value - reference.value).square().sum() for each in (heads, turned)]
        assert distances[1] < distances[0]
        if kind != "norms":
            distances = [(each.key - reference.key).square().sum() for each in (heads, turned)]
            assert distances[1] < distances[0]
        put_heads(model, layer_idx, turned)
    torch.testing.assert_close(model(input_ids).logits, before, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_scrambled_copy_is_turned_back(kind):
    heads = heads_of(random_source(1, **KINDS[kind]), 0)
    turned = align(scrambled(heads), heads)
    for name in ("query", "key", "value", "output"):
        torch.testing.assert_close(getattr(turned, name), getattr(heads, name), atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_best_of_all_orders_is_found():
    heads = heads_of(random_source(1, num_key_value_heads=4), 0)
    order = torch.tensor([2, 0, 3, 1])
    assert match_heads(heads.permuted(order), heads).tolist() == order.argsort().tolist()


@torch.no_grad()
def test_inputs_that_differ_are_compared_through_their_moments():
    """A layer whose inputs are another's, mixed, is matched by what it makes of them, not by its weights."""
    heads = heads_of(random_source(1, num_key_value_heads=4), 0)
    mixing = random_rotations(heads.hidden_size, heads.hidden_size)
    mixed = replace(heads, key=heads.key @ mixing.T, value=heads.value @ mixing.T)  # reads mixing @ inputs
    order = torch.tensor([3, 2, 0, 1])
    assert match_heads(mixed.permuted(order), heads, (mixing, mixing)).tolist() == order.argsort().tolist()
    for found, expected in zip(
        inner_products(mixed, heads, (mixing, mixing)), inner_products(heads, heads), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("kind", "layer_types"), [("plain", "2_2_2_3"), ("biases", "0_0_0_3"), ("norms", "1_1_1_3")])
@torch.no_grad()
def test_scrambled_copies_are_merged_without_loss(kind, layer_types):
    model = model_with_scrambled_copies(kind)
    input_ids = token_ids(2, NUM_TOKENS, vocab_size=300)
    expected = model(input_ids).logits
    aligned, averaged, inherited = (
        convert_model(model, layer_types, method) for method in ("aligned", "average", "inherit")
    )
    for converted in (aligned, averaged, inherited):
        converted.config.use_sequential = True  # else reading upward takes passes
    torch.testing.assert_close(aligned(input_ids).logits, expected, atol=1e-4, rtol=0)
    assert (averaged(input_ids).logits - expected).abs().max() > 1e-2
    if not layer_types.startswith("2"):  # else what layer 2 has is all that is heard
        assert (inherited(input_ids).logits - expected).abs().max() > 1e-2


@torch.no_grad()
def test_input_norms_are_made_up_for():
    """Copies that read the same states through other norms, with weights that make up for them."""
    model = model_with_scrambled_copies()
    for layer_idx in (0, 1, 2):
        scale = 0.25 + 2 * torch.rand(model.config.hidden_size)
        layer = model.model.layers[layer_idx]
        layer.input_layernorm.weight.data *= scale
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.weight.data /= scale
    input_ids = token_ids(2, NUM_TOKENS, vocab_size=300)
    converted = convert_model(model, "0_0_0_3", "aligned")
    torch.testing.assert_close(converted(input_ids).logits, model(input_ids).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_inputs_that_a_norm_all_but_removes_are_left_out():
    """Dividing by what their norm multiplies them with would leave the range of 16 bits."""
    model = random_source(3)
    model.model.layers[0].input_layernorm.weight.data[5] = 6e-8
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = convert_model(model.half(), "0_0_2", "aligned").half().state_dict()
    for name in ("k_proj", "v_proj"):
        weight = tensors[f"{layer_prefix(0)}{name}.weight"]
        assert weight.isfinite().all() and weight[:, 5].abs().max() == 0
        assert weight.abs().max() < 10 * before[f"{layer_prefix(0)}{name}.weight"].abs().max()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("average", "^method=average: model.layers.0.self_attn.v_proj.weight comes out with numbers that are not"),
        ("aligned", "^model.layers.1.self_attn.v_proj.weight: holds numbers that are not finite"),
    ],
)
@torch.no_grad()
def test_weights_that_are_not_finite_are_refused_by_name(method, message):
    model = random_source(3)
    model.model.layers[1].self_attn.v_proj.weight.data[2, 3] = float("inf")
    with pytest.raises(UserError, match=message) as error:
        convert_model(model, "0_0_2", method)
    assert "\n" not in str(error.value)


@torch.no_grad()
def test_numbers_that_a_type_cannot_hold_are_refused():
    """Rotated in their planes, keys at the edge of float16 leave its range."""
    model = random_source(2).half()
    for layer in model.model.layers:
        layer.self_attn.k_proj.weight.data.fill_(65000)
    model.model.layers[0].input_layernorm.weight.data.fill_(0.5)
    with pytest.raises(UserError, match="^method=aligned: model.layers.0.self_attn.k_proj.weight .*float16 cannot"):
        convert_model(model, "0_0", "aligned")


@torch.no_grad()
def test_normalised_keys_are_matched_as_they_are():
    """Keys that a rotation would make equal, but that cannot be rotated, are no match."""
    heads = heads_of(random_source(1, num_key_value_heads=2, **KINDS["norms"]), 0)
    key = from_planes(1j * to_planes(heads.key)).flip(0)
    turned = replace(
        heads, key=heads.key + 3 * key, value=torch.eye(heads.value.shape[1], heads.hidden_size).repeat(2, 1, 1)
    )
    reference = replace(heads, value=turned.value)
    assert match_heads(turned, reference).tolist() == [0, 1]
    assert match_heads(replace(turned, key_norm=None), replace(reference, key_norm=None)).tolist() == [1, 0]


@torch.no_grad()
def test_layers_without_keys_or_values_can_be_aligned():
    """Such as those that were put between the layers of a finished model, to be trained."""
    model = random_source(3)
    for projection in ("k_proj", "v_proj"):
        getattr(model.model.layers[1].self_attn, projection).weight.data.zero_()
    converted = convert_model(model, "0_0_2", "aligned")
    assert all(parameter.isfinite().all() for parameter in converted.parameters())


def test_readers_below_their_owner_are_turned_too():
    model = random_source(3)
    converted = convert_model(model, "2_2_2", "aligned").state_dict()
    for layer_idx in (0, 1):
        for name in ("q_proj", "o_proj"):
            full_name = f"{layer_prefix(layer_idx)}{name}.weight"
            assert not torch.allclose(converted[full_name], model.state_dict()[full_name], atol=1e-2)
