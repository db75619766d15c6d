"""Filling a cache: in chunks, iterated to a tolerance, and only as far as somebody reads."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from lckv.cache import build_cache
from lckv.errors import UserError
from lckv.generation.prefill import prefill
from tests.reference import PATTERNS, tiny_model, token_ids

UPWARD = "0_3_3_3_4"


def exact_states(model, input_ids):
    """Every owner's keys and values, and the last logits, from running token by token."""
    cache = build_cache("dynamic", model.config)
    report = prefill(model, input_ids, cache, chunk_size=1)
    return report, cache


def assert_same_states(cache, exact, tolerance):
    for owner, layer in cache.owners().items():
        assert_close(layer.keys, exact.owners()[owner].keys, atol=tolerance, rtol=0)
        assert_close(layer.values, exact.owners()[owner].values, atol=tolerance, rtol=0)


@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("layer_types", PATTERNS)
def test_chunks_of_any_size_leave_the_same_cache_and_logits(layer_types, chunk_size):
    model = tiny_model(layer_types, sliding_window=3)
    input_ids = token_ids(2, 13)
    expected, exact = exact_states(model, input_ids)
    cache = build_cache("dynamic", model.config)
    report = prefill(model, input_ids, cache, chunk_size=chunk_size, forward_passes="converge", tolerance=1e-9)
    assert_close(report.logits, expected.logits, atol=1e-4, rtol=0)
    assert_same_states(cache, exact, 1e-4)


def test_left_padded_rows_get_what_they_get_alone():
    model = tiny_model(UPWARD)
    input_ids = token_ids(2, 9)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :4] = 0
    options = {"chunk_size": 3, "forward_passes": "converge", "tolerance": 1e-9}
    cache = build_cache("dynamic", model.config)
    report = prefill(model, input_ids, cache, attention_mask=attention_mask, **options)
    alone = prefill(model, input_ids[:1, 4:], build_cache("dynamic", model.config), **options)
    assert_close(report.logits[:1], alone.logits, atol=1e-4, rtol=0)


def test_tolerance_decides_on_the_passes_and_bounds_the_residual():
    model = tiny_model(UPWARD)
    input_ids = token_ids(1, 24)
    _, exact = exact_states(model, input_ids)
    passes, errors = [], []
    for tolerance in (1e-1, 1e-3, 1e-6):
        cache = build_cache("dynamic", model.config)
        report = prefill(model, input_ids, cache, forward_passes="converge", tolerance=tolerance)
        assert report.residual is not None and report.residual < tolerance
        passes.append(report.num_passes[0])
        owner = cache.owners()[3]
        errors.append(float((owner.keys - exact.owners()[3].keys).abs().max()))
    assert passes == sorted(set(passes))  # a tighter tolerance takes more passes
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-5


def test_fixed_passes_are_run_as_often_in_every_chunk():
    model = tiny_model(UPWARD, backward_passes=2)
    report = prefill(model, token_ids(1, 25), build_cache("dynamic", model.config), chunk_size=10, forward_passes=4)
    assert report.num_passes == [6, 6, 5]  # as many passes as tokens are exact: the last chunk has 5


def test_a_chunk_that_is_exact_has_no_residual():
    model, cache = tiny_model(UPWARD), build_cache("dynamic", tiny_model(UPWARD).config)
    report = prefill(model, token_ids(1, 26), cache, chunk_size=24, forward_passes="converge", tolerance=1e-5)
    assert report.num_passes[1] == 2 and len(report.residuals) == 1  # two passes for two tokens
    assert report.residual is not None and report.residual < 1e-5


def test_patterns_without_upward_layers_take_one_pass_and_have_no_residual():
    model = tiny_model("0_0_2_2")
    report = prefill(model, token_ids(1, 8), build_cache("dynamic", model.config), chunk_size=4)
    assert (report.num_passes, report.residuals, report.residual) == ([1, 1], [], None)


def test_goes_on_behind_what_is_cached_and_reports_each_chunk():
    model = tiny_model(UPWARD)
    input_ids = token_ids(1, 12)
    expected, exact = exact_states(model, input_ids)
    cache, seen = build_cache("dynamic", model.config), []
    options = {"chunk_size": 4, "forward_passes": "converge", "tolerance": 1e-9, "on_chunk": seen.append}
    prefill(model, input_ids[:, :7], cache, **options)
    report = prefill(model, input_ids[:, 7:], cache, **options)
    assert seen == [4, 3, 4, 1]
    assert_close(report.logits, expected.logits, atol=1e-4, rtol=0)
    assert_same_states(cache, exact, 1e-4)


def flops(model, input_ids, **options):
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(input_ids, past_key_values=build_cache("dynamic", model.config), **options)
    return counter.get_total_flops()


def test_layers_above_the_highest_owner_run_for_the_kept_positions_only():
    model = tiny_model("0s_1s_2_2_2_2", sliding_window=64)
    input_ids = token_ids(1, 48)
    whole, skipped = flops(model, input_ids), flops(model, input_ids, logits_to_keep=1)
    assert skipped < 0.5 * whole  # two of six layers, and the keys and values of a third
    expected = model(input_ids).logits
    for num_kept in (1, 3, 48, 50):
        assert_close(model(input_ids, logits_to_keep=num_kept).logits, expected[:, -num_kept:], atol=1e-5, rtol=0)


def layer_calls(model):
    """Counts, from now on, the tokens that each layer is called for."""
    counts = [0] * len(model.model.layers)

    def count(index):
        def hook(_, arguments):
            counts[index] += arguments[0].shape[1]

        return hook

    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(count(index))
    return counts


@pytest.mark.parametrize("layer_types", ["0s_1s_2_2_2_2", "0_3_3_3_4_4"])
def test_token_by_token_too_nothing_runs_that_nobody_reads(layer_types):
    model = tiny_model(layer_types, sliding_window=64, use_sequential=True)
    input_ids = token_ids(2, 12)
    whole, skipped = flops(model, input_ids), flops(model, input_ids, logits_to_keep=1)
    assert skipped < 0.85 * whole
    with torch.no_grad():
        expected = model(input_ids).logits
        for num_kept in (1, 3, 50):
            assert_close(model(input_ids, logits_to_keep=num_kept).logits, expected[:, -num_kept:], atol=1e-5, rtol=0)
    counts, highest = layer_calls(model), model.config.sharing_plan.kv_owners[-1]
    model(input_ids, logits_to_keep=3)
    assert counts == [12 if layer <= highest else 3 for layer in range(len(counts))]


@pytest.mark.parametrize(("layer_types", "chunk_size"), [("0s_1s_2_2", 7), (UPWARD, None), ("2_0s_2s_0", 7)])
def test_what_fits_into_a_cache_goes_in_at_once(layer_types, chunk_size):
    model = tiny_model(layer_types, sliding_window=64)
    input_ids, options = token_ids(2, 20), {"num_sinks": 2, "window": 10}
    exact = build_cache("sink", model.config, **options)
    for token in input_ids.split(1, dim=1):
        expected = model(token, past_key_values=exact).logits[:, -1]
    cache, calls = build_cache("sink", model.config, **options), []
    model.model.layers[0].register_forward_pre_hook(lambda _, arguments: calls.append(arguments[0].shape[1]))
    settings = {"chunk_size": chunk_size, "forward_passes": "converge", "tolerance": 1e-9}
    report = prefill(model, input_ids, cache, **settings)
    assert_close(report.logits, expected, atol=1e-4, rtol=0)
    sizes = [12] if chunk_size is None else [7, 5]
    assert [size for size in dict.fromkeys(calls) if size > 1] == sizes
    assert calls.count(1) == 8


@pytest.mark.parametrize(
    ("layer_types", "implementation"), [*((each, "sdpa") for each in PATTERNS), (PATTERNS[-1], "eager")]
)
def test_kept_positions_are_those_of_the_whole_call(layer_types, implementation):
    model = tiny_model(layer_types, sliding_window=3, attn_implementation=implementation)
    input_ids = token_ids(2, 11)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, :2] = 0
    for mask in (None, attention_mask):
        expected = model(input_ids, attention_mask=mask).logits
        for num_kept in (1, 4):
            kept = model(input_ids, attention_mask=mask, logits_to_keep=num_kept).logits
            assert_close(kept, expected[:, -num_kept:], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"chunk_size": 0}, "chunk=0"),
        ({"forward_passes": -1}, "passes=-1"),
        ({"forward_passes": "convergent"}, "'converge'"),
        ({"tolerance": 0.0}, "tolerance=0.0"),
    ],
)
def test_bad_options_are_refused_in_one_line(options, words):
    model = tiny_model("0_0")
    with pytest.raises(UserError, match=words):
        prefill(model, token_ids(1, 4), build_cache("dynamic", model.config), **options)


def test_an_empty_prompt_is_refused():
    model = tiny_model("0_0")
    with pytest.raises(UserError, match="empty"):
        prefill(model, token_ids(1, 4)[:, :0], build_cache("dynamic", model.config))
