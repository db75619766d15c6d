"""Moments of calibration text, and what is fitted to them: against direct computations, and better than averages."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from lckv.conversion.alignment import match_heads
from lckv.conversion.calibration import InputMoments, collect_moments
from lckv.conversion.fitting import fit_mean, fit_subspace, predict_from, predictor
from lckv.conversion.heads import AttentionHeads, to_planes
from lckv.conversion.methods import METHODS, Group, changed_owners, needed_pairs
from lckv.errors import UserError
from lckv.sharing.patterns import parse_layer_types
from tests.reference import token_ids
from tests.unit.conversion.sources import KINDS, convert_model, convert_tensors, random_source
from tests.unit.conversion.test_alignment import model_with_scrambled_copies

RIDGE = 1e-12


def attention_inputs(model, input_ids):
    """What enters each layer's attention, `(tokens, hidden_size)`, by layer."""
    states = model(input_ids, output_hidden_states=True).hidden_states
    layers = model.model.layers
    return [layer.input_layernorm(state).flatten(0, 1) for layer, state in zip(layers, states, strict=False)]


def batch(input_ids):
    positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    return {"input_ids": input_ids, "position_ids": positions, "labels": input_ids}


def moments_of(model, layer_types, input_ids):
    pairs = needed_pairs(parse_layer_types(layer_types), model.config.sharing_plan)
    return collect_moments(model, [batch(input_ids)], pairs)


@pytest.mark.parametrize("has_ones", [False, True])
@torch.no_grad()
def test_moments_are_means_of_products(has_ones):
    model, input_ids = random_source(3, attention_bias=has_ones), token_ids(3, 10, vocab_size=300)
    moments = collect_moments(model, [batch(input_ids)], [(2, 0), (1, 1), (0, 2)])
    inputs = attention_inputs(model, input_ids)
    if has_ones:
        inputs = [torch.cat([states, torch.ones(30, 1)], dim=1) for states in inputs]
    assert moments.num_tokens == 30 and moments.pairs == [(0, 2), (1, 1)]
    for first, second in (0, 2), (2, 0), (1, 1):
        expected = sum(torch.outer(x, y).double() for x, y in zip(inputs[first], inputs[second], strict=True)) / 30
        assert moments[first, second].dtype == torch.float64
        torch.testing.assert_close(moments[first, second], expected, atol=1e-5, rtol=0)
    with pytest.raises(KeyError):
        moments[0, 1]


@torch.no_grad()
def test_batches_add_up():
    model, input_ids = random_source(3), token_ids(5, 10, vocab_size=300)
    done = []
    parts = [batch(part) for part in input_ids.split([2, 1, 2])]
    streamed = collect_moments(model, parts, [(0, 1)], on_batch=done.append)
    at_once = collect_moments(model, [batch(input_ids)], [(0, 1)])
    torch.testing.assert_close(streamed[0, 1], at_once[0, 1], atol=1e-6, rtol=0)
    assert done == [20, 10, 20]
    assert not any(module._forward_hooks for module in model.modules())


def test_needed_pairs():
    plan = parse_layer_types("0_0_4_4_3")
    own = parse_layer_types("0_1_2_3_4")
    assert changed_owners(plan, own) == [0, 3, 4]
    assert needed_pairs(plan, own) == [(0, 0), (1, 0), (1, 1), (2, 2), (2, 4), (3, 3), (3, 4), (4, 3), (4, 4)]


def random_heads(hidden_size, num_kv_heads, num_groups, head_dim):
    return AttentionHeads(
        torch.randn(num_kv_heads, num_groups, head_dim, hidden_size),
        torch.randn(num_kv_heads, head_dim, hidden_size),
        torch.randn(num_kv_heads, head_dim, hidden_size),
        torch.randn(num_kv_heads, num_groups, hidden_size, head_dim),
        key_norm=None,
    )


def moments_from(inputs):
    """Of given inputs `(tokens, hidden_size)` by layer, for all pairs."""
    layers = range(len(inputs))
    moments = InputMoments([(i, j) for i in layers for j in layers], has_ones=False)
    moments.add({i: inputs[i][None] for i in layers})
    return moments


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), num_readers=st.integers(1, 3), owner_reads=st.booleans())
def test_fits_are_the_least_squares_of_all_tokens(seed, num_readers, owner_reads):
    """`fit_mean` against a solver that sees the inputs themselves."""
    torch.manual_seed(seed)
    inputs = [torch.randn(40, 6) + 0.3 for _ in range(num_readers + 1)]
    heads = {layer: random_heads(6, 2, 1, 4) for layer in range(num_readers + 1)}
    readers = list(range(0 if owner_reads else 1, num_readers + 1))
    predictors = predict_from(0, readers, moments_from(inputs), RIDGE)
    for name in ("key", "value"):
        projections = {reader: getattr(heads[reader], name) for reader in readers}
        fitted = fit_mean(projections, {reader: reader for reader in readers}, predictors)
        targets = torch.stack([(getattr(heads[reader], name) @ inputs[reader].T).mT for reader in readers])
        expected = torch.linalg.lstsq(inputs[0].double().expand(2, -1, -1), targets.mean(0).double()).solution.mT
        torch.testing.assert_close(fitted.double(), expected, atol=1e-4, rtol=1e-4)


def value_error(originals, outputs, values, inputs):
    """Mean square over tokens of the error of what heads write, for each reader, summed up.

    Args:
        originals: the readers as they were.
        outputs: their output projections now.
        values: the shared value projection, which sees the inputs of layer 0.
        inputs: `(tokens, hidden_size)` by layer; layer *i* is reader *i*.
    """
    error = 0.0
    for heads, output, own_inputs in zip(originals, outputs, inputs, strict=True):
        now = output @ (values @ inputs[0].T)[:, None]
        before = heads.output @ (heads.value @ own_inputs.T)[:, None]
        # The heads of one group share the values: what they write is compared head by head.
        error += float((now - before).square().sum((0, 1, 2)).mean())
    return error


def key_error(originals, gains, keys, inputs):
    """Mean square over tokens of the error of keys, plane by plane, times the power of the queries that read them."""
    error = 0.0
    for heads, gain, own_inputs in zip(originals, gains, inputs, strict=True):
        power = to_planes(heads.query @ own_inputs.T).abs().square().mean(-1).sum(1)  # (num_kv_heads, head_dim / 2)
        now = gain[..., None] * to_planes(keys @ inputs[0].T)
        before = to_planes(heads.key @ own_inputs.T)
        error += float((power * (now - before).abs().square().mean(-1)).sum())
    return error


def matched_heads(heads, moments):
    """Layers with heads in the order of those of layer 0 that they are most like."""
    return [
        each.permuted(match_heads(each, heads[0], (moments[reader, 0].float(),) * 2)) for reader, each in heads.items()
    ]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_readers=st.integers(2, 4),
    num_kv_heads=st.integers(1, 3),
    num_groups=st.integers(1, 2),
)
def test_a_subspace_is_never_worse_than_a_mean(seed, num_readers, num_kv_heads, num_groups):
    """In what it is fitted to, on the tokens that it is fitted to, even if the mean has its heads matched."""
    torch.manual_seed(seed)
    readers = range(num_readers)
    base = torch.randn(60, 8)
    inputs = [base + 0.5 * torch.randn(60, 8) for _ in readers]
    heads = {reader: random_heads(8, num_kv_heads, num_groups, 4) for reader in readers}
    moments = moments_from(inputs)
    originals = matched_heads(heads, moments)
    sources = {reader: reader for reader in readers}
    key, value, changed = fit_subspace(dict(enumerate(originals)), sources, sources, 0, moments, RIDGE)

    outputs = [each.output for each in originals]
    ratios = [
        to_planes(changed[reader].query) / to_planes(each.query)
        for reader, each in zip(readers, originals, strict=True)
    ]
    gains = [ratio[:, 0, :, 0].conj() for ratio in ratios]
    subspace_errors = (
        value_error(originals, [changed[reader].output for reader in readers], value, inputs),
        key_error(originals, gains, key, inputs),
    )
    ones = [torch.ones_like(gain) for gain in gains]
    of_each = {name: [getattr(each, name) for each in originals] for name in ("key", "value")}
    predictors = predict_from(0, readers, moments, RIDGE)
    fitted = [fit_mean(dict(enumerate(each)), sources, predictors) for each in of_each.values()]
    averaged = [torch.stack(each).mean(0) for each in of_each.values()]
    for mean_key, mean_value in fitted, averaged:
        assert subspace_errors[0] <= value_error(originals, outputs, mean_value, inputs) * (1 + 1e-4)
        assert subspace_errors[1] <= key_error(originals, ones, mean_key, inputs) * (1 + 1e-4)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), num_groups=st.integers(1, 2))
def test_a_subspace_is_the_best_for_its_readers(seed, num_groups):
    """Normal equations: no other keys and values would come closer, nor would readers with other factors."""
    torch.manual_seed(seed)
    readers = range(3)
    base = torch.randn(60, 8)
    sizes = torch.linspace(0.5, 2, 8)
    inputs = [(base + 0.5 * torch.randn(60, 8)) * sizes * (1 + reader) for reader in readers]
    heads = {reader: random_heads(8, 2, num_groups, 4) for reader in readers}
    moments = moments_from(inputs)
    originals = matched_heads(heads, moments)
    sources = {reader: reader for reader in readers}
    key, value, changed = fit_subspace(dict(enumerate(originals)), sources, sources, 0, moments, RIDGE)
    predictors = [torch.linalg.lstsq(inputs[0].double(), inputs[reader].double()).solution.T for reader in readers]
    gram = inputs[0].T.double() @ inputs[0].double()

    weights, right = 0, 0
    for reader in readers:
        now, before = changed[reader].output.double(), originals[reader].output.double()
        predicted = originals[reader].value.double() @ predictors[reader]
        weights += (now.mT @ now).sum(1)
        right += (now.mT @ before).sum(1) @ predicted
        shared = value.double()
        decoder = torch.linalg.solve(shared @ gram @ shared.mT, shared @ gram @ predicted.mT).mT
        torch.testing.assert_close(now, before @ decoder[:, None], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(value.double(), torch.linalg.solve(weights, right), atol=1e-3, rtol=1e-3)

    weights, right = 0, 0
    for reader in readers:
        power = to_planes(originals[reader].query @ inputs[reader].T).abs().square().mean(-1).sum(1)
        gain = (to_planes(changed[reader].query) / to_planes(originals[reader].query))[:, 0, :, 0].conj()
        weights += power * gain.abs().square()
        predicted, shared = to_planes(originals[reader].key.double() @ predictors[reader]), to_planes(key.double())
        products = [((each @ gram.to(each.dtype)) * shared.conj()).sum(-1) for each in (predicted, shared)]
        torch.testing.assert_close(gain.to(products[0].dtype), products[0] / products[1], atol=1e-3, rtol=1e-3)
        right += (power * gain.conj())[..., None] * predicted
    torch.testing.assert_close(to_planes(key).to(right.dtype), right / weights[..., None], atol=1e-3, rtol=1e-3)


def test_a_ridge_leaves_biases_as_they_are():
    """Normal equations with a column of ones, which is neither shrunk nor among what a large weight is measured by."""
    inputs = [5 * torch.randn(50, 6).double() + 3, torch.randn(50, 6).double() - 7]
    moments = InputMoments([(0, 0), (0, 1)], has_ones=True)
    moments.add({i: inputs[i][None].float() for i in (0, 1)})
    penalised = predictor(moments, 1, 0, 0.1)
    first, second = (torch.cat([each, torch.ones(50, 1)], dim=1) for each in inputs)
    gram = first.T @ first / 50
    gram[range(6), range(6)] += 0.1 * inputs[0].square().mean()
    expected = second.T @ first / 50 @ gram.inverse()
    torch.testing.assert_close(penalised, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(penalised[-1], torch.eye(7, dtype=torch.float64)[-1], atol=1e-4, rtol=0)
    huge = predictor(moments, 1, 0, 1e9)  # nothing is left but the bias, which is the mean
    torch.testing.assert_close(huge[:6, -1], inputs[1].mean(0), atol=1e-4, rtol=0)


def test_a_ridge_shrinks_and_a_layer_predicts_itself():
    inputs = [torch.randn(50, 6), torch.randn(50, 6)]
    moments = moments_from(inputs)
    assert torch.equal(predictor(moments, 1, 1, 0.5), torch.eye(6, dtype=torch.float64))
    sizes = [float(predictor(moments, 1, 0, ridge).norm()) for ridge in (1e-9, 1e-2, 1, 1e9)]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < 1e-6
    penalised = predictor(moments, 1, 0, 0.1)
    gram = inputs[0].T.double() @ inputs[0].double() / 50
    gram += 0.1 * gram.diagonal().mean() * torch.eye(6)
    expected = inputs[1].T.double() @ inputs[0].double() / 50 @ gram.inverse()
    torch.testing.assert_close(penalised, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("kind", "layer_types"), [("plain", "1_1_1_3"), ("biases", "2_2_2_3"), ("norms", "0_0_0_3")])
@torch.no_grad()
def test_a_subspace_merges_scrambled_copies_without_loss(kind, layer_types):
    model = model_with_scrambled_copies(kind)
    input_ids = token_ids(8, 30, vocab_size=300)
    moments = moments_of(model, layer_types, input_ids)
    converted = convert_model(model, layer_types, "subspace", moments=moments, ridge=RIDGE)
    converted.config.use_sequential = True  # else reading upward takes passes
    new = token_ids(2, 11, seed=1, vocab_size=300)
    torch.testing.assert_close(converted(new).logits, model(new).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["plain", "biases"])
@torch.no_grad()
def test_activation_recovers_what_depends_linearly_on_what_the_owner_sees(kind):
    """Layer 1 sees what layer 0 sees through another norm, and nothing else does: its keys and values come back."""
    model = random_source(3, **KINDS[kind])
    first = model.model.layers[0]
    first.self_attn.o_proj.weight.data.zero_()
    first.mlp.down_proj.weight.data.zero_()
    input_ids = token_ids(8, 30, vocab_size=300)
    before = model(input_ids).logits
    assert (model.model.layers[1].input_layernorm.weight - first.input_layernorm.weight).abs().max() > 0.1
    moments = moments_of(model, "0_0_2", input_ids)
    # Layer 0 does not say anything, so it does not matter what it reads: layer 1 alone decides.
    only_layer_1 = parse_layer_types("1_0_2")
    only_reader = Group(0, only_layer_1, model.state_dict(), model.config, moments, RIDGE)
    tensors = model.state_dict() | METHODS["activation"](only_reader)
    scale = model.model.layers[1].input_layernorm.weight / first.input_layernorm.weight
    for name in ("k_proj", "v_proj"):
        expected = model.state_dict()[f"model.layers.1.self_attn.{name}.weight"] * scale
        torch.testing.assert_close(tensors[f"model.layers.0.self_attn.{name}.weight"], expected, atol=1e-3, rtol=1e-3)
    converted = convert_model_with(tensors, model, "0_0_2")
    torch.testing.assert_close(converted(input_ids).logits, before, atol=1e-4, rtol=0)
    averaged = convert_model(model, "0_0_2", "average")
    assert (averaged(input_ids).logits - before).abs().max() > 1e-2


def convert_model_with(tensors, model, layer_types):
    """A shared model of given tensors, those of a model that does not share among them."""
    target = convert_model(model, layer_types, "inherit")
    target.load_state_dict({name: tensors[name] for name in target.state_dict()})
    return target


@pytest.mark.parametrize("method", ["aligned", "activation", "subspace"])
@torch.no_grad()
def test_layers_that_write_nothing_can_be_merged(method):
    """Such as those that were put between the layers of a finished model, to be trained."""
    model = random_source(3)
    for layer_idx in (0, 1):
        model.model.layers[layer_idx].self_attn.o_proj.weight.data.zero_()
        model.model.layers[layer_idx].self_attn.q_proj.weight.data.zero_()
    moments = moments_of(model, "0_0_2", token_ids(8, 30, vocab_size=300))
    options = {} if method == "aligned" else {"moments": moments, "ridge": 1e-2}
    converted = convert_model(model, "0_0_2", method, **options)
    assert all(parameter.isfinite().all() for parameter in converted.parameters())
    new = token_ids(1, 9, vocab_size=300)
    torch.testing.assert_close(converted(new).logits, model(new).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_inputs_that_are_not_finite_are_refused_by_their_layer():
    model = random_source(4)
    model.model.layers[1].mlp.down_proj.weight.data[3, 2] = float("inf")
    with pytest.raises(UserError, match="^layer 2's inputs are not finite") as error:
        moments_of(model, "0_0_0_0", token_ids(2, 9, vocab_size=300))
    assert "\n" not in str(error.value)


class CallOrder(TorchFunctionMode):
    """Notes where tensors are widened and sent."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.cpu, torch.Tensor.double):
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_sums_are_widened_where_every_machine_can():
    """Apple's accelerators have no float64."""
    moments = InputMoments([(0, 0), (0, 1)], has_ones=True)
    with CallOrder() as calls:
        moments.add({i: torch.randn(1, 5, 4) for i in (0, 1)})
    assert calls.names == ["cpu", "double"] * 2


@pytest.mark.parametrize("method", ["average", "aligned", "activation", "subspace"])
@torch.no_grad()
def test_key_norms_are_averaged(method):
    model = random_source(3, **KINDS["norms"])
    moments = moments_of(model, "0_0_0", token_ids(8, 30, vocab_size=300))
    converted = convert_model(model, "0_0_0", method, moments=moments, ridge=1e-2)
    norms = [layer.self_attn.k_norm.weight for layer in model.model.layers]
    torch.testing.assert_close(converted.model.layers[0].self_attn.k_norm.weight, torch.stack(norms).mean(0))


@pytest.mark.parametrize("method", ["activation", "subspace"])
@torch.no_grad()
def test_types_are_kept(method):
    model = random_source(4)
    moments = moments_of(model, "0_0_2_2", token_ids(8, 30, vocab_size=300))
    converted = convert_model(model, "0_0_2_2", method, moments=moments, ridge=1e-2)
    half = convert_model(model.to(torch.bfloat16), "0_0_2_2", method, moments=moments, ridge=1e-2)
    tensors, _ = convert_tensors(model.state_dict(), model.config, "0_0_2_2", method, moments=moments, ridge=1e-2)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    name = "model.layers.0.self_attn.v_proj.weight"
    torch.testing.assert_close(half.state_dict()[name], converted.state_dict()[name], atol=0.02, rtol=0)
