"""What every cache keeps to, in every sharing pattern: a new entry of the registry is tested without being named here.

A cache that is exact only up to some length (a recent window in full precision, say) gets options here with which the
short texts of these tests fit. What compares a cache with itself is also tested where it does lose something.
"""

import functools
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, TextIteratorStreamer, TextStreamer, pipeline

from lckv.cache import CACHES, build_cache, load_cache, save_cache
from lckv.cache.base import KVLayer, ReaderLayer
from lckv.errors import UserError
from tests.reference import PATTERNS, tiny_model, token_ids

OPTIONS = {
    "static": {"max_length": 48},
    "sink": {"num_sinks": 2, "window": 46},
    "paged": {"page_size": 4},
    "quantized": {"residual_length": 48},
}
LOSSY = {  # these drop or round tokens of texts as short as those of these tests
    "quantized-lossy": ("quantized", {"residual_length": 2, "group_size": 4}),
    "quantized-paged-lossy": ("quantized", {"layout": "paged", "residual_length": 2, "group_size": 4}),
    "sink-lossy": ("sink", {"num_sinks": 1, "window": 4}),
}
VARIANTS = {
    **{name: (name, OPTIONS.get(name, {})) for name in CACHES},
    "quantized-paged": ("quantized", {"layout": "paged", "residual_length": 48, "group_size": 4}),
}
LENGTH = 11
WINDOWED = ["0s_1s_2_2", "0_1s_1s_0", "0_2s_2_2s", "1s_1s_3s_3s", "2_0s_2s_0"]
MIXED = ["0_0_2_2", "0_3_3_3_4", "0s_1s_2_2", "0_2s_2_2s"]  # downward, upward, windows, both

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(params=list(VARIANTS))
def name(request):
    """A key of `VARIANTS`, or, for tests that ask for that, of `LOSSY`."""
    return request.param


with_lossy = pytest.mark.parametrize("name", [*VARIANTS, *LOSSY], indirect=True)
# Sinks that drop tokens also hold the last rotation tables, which are no keys or values and are not reported.
with_rounded = pytest.mark.parametrize("name", [*VARIANTS, "quantized-lossy", "quantized-paged-lossy"], indirect=True)


def exact_model(layer_types, **config):
    """A tiny model whose parallel passes go on until they are exact."""
    model = tiny_model(layer_types, forward_passes="converge", converge_tolerance=1e-9, **config)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model


def new_cache(name, model):
    cache_name, options = (VARIANTS | LOSSY)[name]
    return build_cache(cache_name, model.config, **options)


def feed(model, cache, input_ids, chunks=None, attention_mask=None):
    """Runs tokens `(batch, num_tokens)` in chunks of the given sizes; a mask covers earlier tokens too."""
    logits, stop = [], 0 if attention_mask is None else attention_mask.shape[1] - input_ids.shape[1]
    for chunk in input_ids.split(chunks or input_ids.shape[1], dim=1):
        stop += chunk.shape[1]
        options = {}
        if attention_mask is not None:
            positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
            options["attention_mask"] = attention_mask[:, :stop]
            options["position_ids"] = positions[:, stop - chunk.shape[1] : stop]
        logits.append(model(chunk, past_key_values=cache, **options).logits)
    return torch.cat(logits, dim=1)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def live_bytes(cache):
    """Bytes of every tensor that can be reached from the cache, views with all that they keep alive."""
    storages, seen, todo = {}, set(), [cache.layers, vars(cache)]
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()  # an empty one of a file may have the address of its neighbour
            storages[storage.data_ptr()] = max(storage.nbytes(), storages.get(storage.data_ptr(), 0))
        elif isinstance(item, dict):
            todo += item.values()
        elif isinstance(item, list | tuple | set):
            todo += item
        elif type(item).__module__.startswith("lckv.cache"):
            todo.append(vars(item))
    return sum(storages.values())


def addresses(layer):
    return {name: tensor.data_ptr() for name, tensor in layer.tensors().items()}


# --- 1. one store per layer that computes KV -----------------------------------------------------------------------


@with_lossy
@pytest.mark.parametrize("layer_types", PATTERNS)
def test_readers_resolve_to_their_owners_storage_and_never_write(name, layer_types):
    model = exact_model(layer_types)
    cache = new_cache(name, model)
    plan = model.config.sharing_plan
    feed(model, cache, token_ids(2, 5), [3, 1, 1])
    assert tuple(cache.owners()) == plan.kv_owners and len(cache) == plan.num_hidden_layers
    assert len({id(layer) for layer in cache.owners().values()}) == len(plan.kv_owners)
    for layer_plan, layer in zip(plan.layers, cache.layers, strict=True):
        store = cache.storage(layer_plan.layer_idx)
        assert store is cache.owners()[layer_plan.kv_source]
        assert isinstance(store, KVLayer) and isinstance(layer, KVLayer if layer_plan.computes_kv else ReaderLayer)
        if not layer_plan.computes_kv:
            before = addresses(store)
            assert before and addresses(layer.owner) == before
            if layer.keys is not None:
                assert layer.keys.data_ptr() == store.keys.data_ptr()
                assert layer.values.data_ptr() == store.values.data_ptr()
            states = torch.ones(2, 2, 1, 8)
            with pytest.raises(RuntimeError, match=f"layer {layer_plan.layer_idx} reads the KV of layer"):
                cache.update(states, states, layer_plan.layer_idx)
            assert addresses(store) == before


@with_rounded
@pytest.mark.parametrize("layer_types", PATTERNS)
def test_reported_bytes_are_those_of_live_tensors_and_of_the_plan(name, layer_types):
    model, batch_size = exact_model(layer_types), 3
    cache, empty = new_cache(name, model), new_cache(name, model)
    assert cache.num_bytes() == 0
    seq_length = 0
    for chunk in (2, 1, 1, 6, 1, 3):  # windows of 3 fill up by single tokens and by a longer chunk
        seq_length += chunk
        model(token_ids(batch_size, chunk, seed=seq_length), past_key_values=cache)
        assert cache.num_bytes() == live_bytes(cache)
        assert cache.num_bytes() == empty.planned_bytes(seq_length, batch_size, torch.float32)
        assert cache.batch_size == batch_size


@with_rounded
def test_reported_bytes_in_half_precision(name):
    model = exact_model("0s_1s_2_2").to(torch.bfloat16)
    cache = new_cache(name, model)
    feed(model, cache, token_ids(2, 6), [5, 1])
    assert cache.num_bytes() == live_bytes(cache) == new_cache(name, model).planned_bytes(6, 2, torch.bfloat16)


# --- 2, 3. windows and exactness -----------------------------------------------------------------------------------


def check_step_by_step(name, layer_types, chunks, batch_size=2, **config):
    model = exact_model(layer_types, **config)
    input_ids = token_ids(batch_size, sum(chunks))
    assert_close(feed(model, new_cache(name, model), input_ids, chunks), model(input_ids, use_cache=False).logits)


@pytest.mark.parametrize("layer_types", PATTERNS)
def test_token_by_token_equals_one_forward_pass(name, layer_types):
    check_step_by_step(name, layer_types, [1] * LENGTH)


@pytest.mark.parametrize("window", [1, 5])
@pytest.mark.parametrize("layer_types", WINDOWED)
def test_windows_of_other_sizes(name, layer_types, window):
    check_step_by_step(name, layer_types, [4, 1, 1, 3, 1, 1], sliding_window=window)


def test_no_layer_may_see_its_own_token(name):
    check_step_by_step(name, "0s_1s_2_2", [4, 1, 2, 1], force_nodiag=True)


@given(st.data())
@settings(max_examples=12, deadline=None)
def test_any_chunks_in_any_pattern(data):
    with torch.no_grad():
        check_step_by_step(
            data.draw(st.sampled_from(list(VARIANTS)), label="name"),
            data.draw(st.sampled_from(PATTERNS), label="layer_types"),
            data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=5), label="chunks"),
            batch_size=data.draw(st.integers(1, 3), label="batch_size"),
            sliding_window=data.draw(st.integers(1, 6), label="window"),
        )


@pytest.mark.parametrize(
    ("layer_types", "attn_implementation"),
    [
        *[(each, "sdpa") for each in ("0_0_2_2", *WINDOWED, "0_3_3_3_4")],
        ("0s_1s_2_2", "eager"),
        ("0_2s_2_2s", "eager"),
    ],
)
def test_left_padding(name, layer_types, attn_implementation):
    model = exact_model(layer_types, attn_implementation=attn_implementation)
    rows = [token_ids(1, length, seed=length)[0] for length in (LENGTH, 7, 4)]
    input_ids = torch.stack([torch.nn.functional.pad(row, (LENGTH - len(row), 0)) for row in rows])
    attention_mask = torch.stack([torch.arange(LENGTH) >= LENGTH - len(row) for row in rows]).long()
    chunks = [8, 1, 1, 1] if attn_implementation == "sdpa" else [4, 4, 1, 2]
    cache, stop = new_cache(name, model), 0
    logits = []
    for size in chunks:
        stop += size
        logits.append(feed(model, cache, input_ids[:, stop - size : stop], None, attention_mask[:, :stop]))
    for row, tokens in enumerate(rows):
        expected = model(tokens[None], use_cache=False).logits[0]
        assert_close(torch.cat(logits, dim=1)[row, LENGTH - len(tokens) :], expected)


@pytest.mark.parametrize("precision", ["bfloat16", "autocast"])
@pytest.mark.parametrize("layer_types", MIXED)
def test_half_precision(name, layer_types, precision):
    model, input_ids = exact_model(layer_types), token_ids(2, LENGTH)
    expected = model(input_ids, use_cache=False).logits
    cache = new_cache(name, model)
    if precision == "bfloat16":
        model = model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        logits = feed(model, cache, input_ids, [5, 1, 1, 3, 1]).float()
    assert (logits - expected).norm() < 0.05 * expected.norm()
    assert cache.num_bytes() == live_bytes(cache)


@pytest.mark.parametrize("layer_types", ["0_0_2_2", "0s_1s_2_2", "0_2s_2_2s"])
def test_announced_sizes_are_those_of_the_returned_keys(name, layer_types):
    model = exact_model(layer_types)
    cache = new_cache(name, model)
    seq_length = 0
    for num_new in (1, 5, 1, 1, 4):
        before = {owner: int(cache.get_seq_length(owner)) for owner in cache.owners()}
        sizes = {owner: cache.get_mask_sizes(num_new, owner) for owner in cache.owners()}
        cache.begin_forward(model.config.sharing_plan, None, num_new)
        for owner in cache.owners():
            positions = cache.get_key_positions(num_new, owner)
            states = torch.randn(2, 2, num_new, 8)
            peeked = cache.peek(states, states + 1, owner)
            keys, values = cache.update(states, states + 1, owner)
            assert torch.equal(peeked[0], keys) and torch.equal(peeked[1], values)
            num_keys, offset = sizes[owner]
            assert keys.shape[2] == values.shape[2] == num_keys and before[owner] == seq_length
            places = torch.arange(offset, offset + num_keys) if positions is None else positions[0]
            for index in range(num_new):
                place = (places == seq_length + index).nonzero().item()
                assert torch.equal(keys[:, :, place], states[:, :, index])
        seq_length += num_new
        assert {int(cache.get_seq_length(layer)) for layer in range(len(cache))} == {seq_length}


# --- 4. what transformers does to caches ---------------------------------------------------------------------------


def check_continuation(model, cache, rows, tokens):
    """The cache must hold `rows`: continuing gives what those rows and `tokens` give without a cache."""
    logits = feed(model, cache, tokens, [1] * tokens.shape[1])
    expected = model(torch.cat([rows, tokens], dim=1), use_cache=False).logits
    assert_close(logits, expected[:, rows.shape[1] :])


def check_alike(model, cache, other, num_rows):
    """Both go on in the same way, in steps and in pieces."""
    tokens, chunks = token_ids(num_rows, 9, seed=9), [1, 1, 4, 1, 2]
    assert_close(feed(model, cache, tokens, chunks), feed(model, other, tokens, chunks))


def filled_cache(name, model, rows):
    """Holds rows `(batch, num_tokens)` that came in pieces, so that what is old is rounded or dropped."""
    cache = new_cache(name, model)
    feed(model, cache, rows, [5, 1, 1, 4])
    return cache


@pytest.mark.parametrize("name", LOSSY, indirect=True)
@pytest.mark.parametrize("layer_types", MIXED)
def test_what_is_lost_does_not_depend_on_what_happens_to_rows(name, layer_types):
    model, rows = exact_model(layer_types), token_ids(3, LENGTH)
    for change, indices in [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    ]:
        changed = filled_cache(name, model, rows)
        change(changed)
        if name != "sink-lossy":
            assert changed.num_bytes() == live_bytes(changed)
        check_alike(model, changed, filled_cache(name, model, rows[indices]), len(indices))


@pytest.mark.parametrize("name", LOSSY, indirect=True)
@pytest.mark.parametrize("layer_types", MIXED)
def test_forks_and_what_was_reset_or_offloaded_lose_the_same(name, layer_types):
    model, rows = exact_model(layer_types), token_ids(2, LENGTH)
    cache, twin = filled_cache(name, model, rows), filled_cache(name, model, rows)
    fork = cache.fork()
    check_continuation_is_lossy(model, fork.fork(), rows)
    check_alike(model, fork, twin, 2)
    for layer_idx, layer in enumerate(cache.layers):
        cache.offload(layer_idx, only_non_sliding=False)
        layer.prefetch()
    check_alike(model, cache, filled_cache(name, model, rows), 2)  # the fork has not disturbed it
    cache.reset()
    feed(model, cache, rows, [5, 1, 1, 4])
    check_alike(model, cache, filled_cache(name, model, rows), 2)


def check_continuation_is_lossy(model, cache, rows):
    """The text is long enough for something to be rounded or dropped, or tests of that would say nothing."""
    tokens = token_ids(len(rows), 2, seed=5)
    expected = model(torch.cat([rows, tokens], dim=1), use_cache=False).logits[:, -2:]
    assert (feed(model, cache, tokens) - expected).abs().max() > 1e-4


@pytest.mark.parametrize("layer_types", MIXED)
def test_rows_are_reordered_repeated_and_selected(name, layer_types):
    model = exact_model(layer_types)
    rows, cache = token_ids(3, 6), new_cache(name, model)
    feed(model, cache, rows)
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    rows = rows[order]
    check_continuation(model, cache.fork(), rows, token_ids(3, 4, seed=1))
    cache.batch_repeat_interleave(2)
    rows = rows.repeat_interleave(2, dim=0)
    check_continuation(model, cache.fork(), rows, token_ids(6, 4, seed=2))
    kept = torch.tensor([5, 1])
    cache.batch_select_indices(kept)
    assert cache.num_bytes() == live_bytes(cache)
    check_continuation(model, cache, rows[kept], token_ids(2, 4, seed=3))


@with_rounded
def test_a_removed_sequence_takes_its_bytes_along(name):
    model = exact_model("0s_1s_2_2")
    cache, alone = new_cache(name, model), new_cache(name, model)
    rows = token_ids(3, 9)
    feed(model, cache, rows)
    cache.batch_select_indices(torch.tensor([1]))
    feed(model, alone, rows[1:2])
    assert cache.num_bytes() == live_bytes(cache) == alone.num_bytes() == alone.planned_bytes(9, 1, torch.float32)
    assert cache.batch_size == 1


@pytest.mark.parametrize("layer_types", MIXED)
def test_forks_do_not_disturb_each_other(name, layer_types):
    model = exact_model(layer_types)
    rows, cache = token_ids(2, 5), new_cache(name, model)
    feed(model, cache, rows)
    fork = cache.fork()
    other_fork = fork.fork()
    continuations = [token_ids(2, 4, seed=seed) for seed in (1, 2, 3)]
    logits = []
    for step in range(4):  # in turns, so that each would overwrite the others
        for branch, tokens in zip((cache, fork, other_fork), continuations, strict=True):
            logits.append(feed(model, branch, tokens[:, step : step + 1]))
    for index, tokens in enumerate(continuations):
        expected = model(torch.cat([rows, tokens], dim=1), use_cache=False).logits[:, 5:]
        assert_close(torch.cat(logits[index::3], dim=1), expected)
    fork.reset()
    check_continuation(model, cache, torch.cat([rows, continuations[0]], dim=1), token_ids(2, 2, seed=4))


@pytest.mark.parametrize("layer_types", ["0_0_2_2", "0_3_3_3_4", "2_1_2_1"])
def test_crop_takes_tokens_back(name, layer_types):
    model = exact_model(layer_types)
    rows, cache = token_ids(2, 8), new_cache(name, model)
    feed(model, cache, rows)
    cache.crop(-3)
    cache.crop(0)
    assert int(cache.get_seq_length()) == 5 and cache.num_bytes() == live_bytes(cache)
    assert cache.num_bytes() == new_cache(name, model).planned_bytes(5, 2, torch.float32)
    check_continuation(model, cache, rows[:, :5], token_ids(2, 4, seed=1))
    for wrong in (1, -10):
        with pytest.raises(ValueError, match="crop"):
            cache.crop(wrong)


@pytest.mark.parametrize("layer_types", WINDOWED)
def test_crop_refuses_what_a_window_has_dropped(name, layer_types):
    model = exact_model(layer_types)
    rows, cache = token_ids(2, 8), new_cache(name, model)
    feed(model, cache, rows, [5, 1, 1, 1])
    try:
        cache.crop(-3)
    except RuntimeError as error:
        assert "window" in str(error)
    else:
        rows = rows[:, :5]  # it had kept enough
    check_continuation(model, cache, rows, token_ids(2, 4, seed=1))


@pytest.mark.parametrize("layer_types", WINDOWED)
def test_recorded_tokens_come_back_again_and_again(name, layer_types):
    model = exact_model(layer_types)
    rows, cache = token_ids(2, 8), new_cache(name, model)
    feed(model, cache, rows)
    if not cache.is_croppable:
        with pytest.raises(UserError, match=VARIANTS[name][0]):
            cache.activate_past_recording()
        return
    cache.activate_past_recording()
    for seed in (1, 2, 3):
        candidates = token_ids(2, 5, seed=seed)
        check_continuation(model, cache, rows, candidates)
        cache.crop(-3)
        rows = torch.cat([rows, candidates[:, :2]], dim=1)
        assert cache.num_bytes() == live_bytes(cache)
        assert cache.num_bytes() == new_cache(name, model).planned_bytes(rows.shape[1], 2, torch.float32)
    check_continuation(model, cache, rows, token_ids(2, 3, seed=4))


@pytest.mark.parametrize("layer_types", MIXED)
def test_reset_forgets_everything(name, layer_types):
    model = exact_model(layer_types)
    cache = new_cache(name, model)
    feed(model, cache, token_ids(3, 7))
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    rows = token_ids(2, 5, seed=1)
    feed(model, cache, rows)
    check_continuation(model, cache, rows, token_ids(2, 3, seed=2))


@pytest.mark.parametrize("layer_types", ["0s_1s_2_2", "0_2s_2_2s"])
def test_offload_and_prefetch_change_nothing(name, layer_types):
    model = exact_model(layer_types)
    rows, cache = token_ids(2, 6), new_cache(name, model)
    feed(model, cache, rows)
    num_bytes = cache.num_bytes()
    for layer_idx, layer in enumerate(cache.layers):
        cache.offload(layer_idx, only_non_sliding=False)
        layer.prefetch()
    assert cache.num_bytes() == num_bytes
    check_continuation(model, cache, rows, token_ids(2, 3, seed=1))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_what_inference_mode_has_filled_can_be_continued_outside(name, mode):
    model, rows = exact_model("0s_1s_2_2"), token_ids(2, 6)
    with torch.inference_mode():
        cache = new_cache(name, model)
        feed(model, cache, rows)
        fork, one_row = cache.fork(), cache.fork()
        one_row.batch_select_indices(torch.tensor([1]))
    with mode():
        for branch in (cache, fork):
            check_continuation(model, branch, rows, token_ids(2, 3, seed=1))
        check_continuation(model, one_row, rows[1:], token_ids(1, 3, seed=1))


# --- 5. saving -----------------------------------------------------------------------------------------------------


@with_lossy
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer_types", MIXED)
def test_a_restored_cache_continues_bit_by_bit(name, layer_types, dtype, tmp_path):
    model = exact_model(layer_types).to(dtype)
    rows, cache = token_ids(2, 8), new_cache(name, model)
    feed(model, cache, rows, [5, 1, 1, 1])
    save_cache(cache, tmp_path / "cache.safetensors")
    restored = load_cache(tmp_path / "cache.safetensors", model.config)
    assert type(restored) is type(cache) and restored.options() == cache.options()
    assert restored.num_bytes() == cache.num_bytes() == live_bytes(restored)
    assert int(restored.get_seq_length()) == 8
    tokens, chunks = token_ids(2, 7, seed=1), [1, 3, 1, 2]
    assert torch.equal(feed(model, restored, tokens, chunks), feed(model, cache, tokens, chunks))


def test_an_empty_cache_is_saved_too(name, tmp_path):
    model = exact_model("0s_1s_2_2")
    save_cache(new_cache(name, model), tmp_path / "cache.safetensors")
    restored = load_cache(tmp_path / "cache.safetensors", model.config)
    check_continuation(model, restored, token_ids(2, 0), token_ids(2, 4))


@with_lossy
def test_a_restored_cache_has_padding_where_it_was(name, tmp_path):
    model = exact_model("0s_1s_2_2")
    input_ids, attention_mask = token_ids(2, 8), torch.ones(2, 8, dtype=torch.long)
    attention_mask[1, :3] = 0
    cache = new_cache(name, model)
    feed(model, cache, input_ids[:, :6], None, attention_mask[:, :6])
    save_cache(cache, tmp_path / "cache.safetensors")
    restored = load_cache(tmp_path / "cache.safetensors", model.config)
    logits = [feed(model, twin, input_ids[:, 6:], [1, 1], attention_mask) for twin in (cache, restored)]
    assert torch.equal(*logits)


def test_a_restored_cache_is_refused_in_another_precision(name, tmp_path):
    model = exact_model("0s_1s_2_2").to(torch.bfloat16)
    cache = new_cache(name, model)
    feed(model, cache, token_ids(2, 6))
    save_cache(cache, tmp_path / "cache.safetensors")
    restored = load_cache(tmp_path / "cache.safetensors", model.config)
    with pytest.raises(UserError, match="the cache holds bfloat16, and the model gives it float32"):
        feed(model.to(torch.float32), restored, token_ids(2, 1))


@pytest.mark.parametrize("layer_types", WINDOWED)
def test_a_restored_cache_goes_on_recording_for_rollbacks(name, layer_types, tmp_path):
    model = exact_model(layer_types)
    rows, cache = token_ids(2, 8), new_cache(name, model)
    if not cache.is_croppable:
        pytest.skip("it cannot take tokens back")
    cache.activate_past_recording()
    feed(model, cache, rows)
    save_cache(cache, tmp_path / "cache.safetensors")
    restored = load_cache(tmp_path / "cache.safetensors", model.config)
    feed(model, restored, token_ids(2, 5, seed=1), [2, 1, 2])
    restored.crop(-5)
    check_continuation(model, restored, rows, token_ids(2, 3, seed=2))


def test_loading_into_another_model_is_refused(name, tmp_path):
    model, path = exact_model("0s_1s_2_2"), tmp_path / "cache.safetensors"
    cache = new_cache(name, model)
    feed(model, cache, token_ids(2, 6))
    save_cache(cache, path)
    with pytest.raises(UserError, match="'0s_1s_2_2': the model has '0_0_2_2'"):
        load_cache(path, exact_model("0_0_2_2").config)
    with pytest.raises(UserError, match="sliding_window=3: the model has 5"):
        load_cache(path, exact_model("0s_1s_2_2", sliding_window=5).config)


def test_a_file_without_an_owner_is_refused(name, tmp_path):
    model, path = exact_model("0s_1s_2_2"), tmp_path / "cache.safetensors"
    cache = new_cache(name, model)
    feed(model, cache, token_ids(2, 6))
    save_cache(cache, path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    assert {key.split(".")[1] for key in tensors if key.startswith("layers.")} == {"0", "1", "2"}
    save_file({key: tensor for key, tensor in tensors.items() if ".2." not in key}, path, metadata)
    with pytest.raises(UserError, match=r"lacks layers\.2\."):
        load_cache(path, model.config)


# --- generate() and pipelines --------------------------------------------------------------------------------------


@functools.cache
def uncached_generation(layer_types, way, **options):
    """What `generate` gives without a cache; it is the same for all of them, so it is computed once."""
    model, prompts = exact_model(layer_types), padded_prompts() if way in WAYS else {"input_ids": token_ids(1, 6)}
    torch.manual_seed(3)
    return model.generate(**prompts, use_cache=False, **WAYS.get(way, {}), **options)


def padded_prompts():
    input_ids = token_ids(2, 6)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, :3] = 0
    return {"input_ids": input_ids * attention_mask, "attention_mask": attention_mask}


WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
    "several": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layer_types", MIXED)
def test_generate_equals_generating_without_a_cache(name, layer_types, way):
    model = exact_model(layer_types)
    expected = uncached_generation(layer_types, way, max_new_tokens=6)
    options = {**padded_prompts(), "max_new_tokens": 6, **WAYS[way]}
    torch.manual_seed(3)
    assert torch.equal(model.generate(**options, past_key_values=new_cache(name, model)), expected)


@pytest.mark.parametrize("layer_types", MIXED)
def test_generate_prefills_in_chunks(name, layer_types):
    model = exact_model(layer_types)
    options = {**padded_prompts(), "max_new_tokens": 6, "do_sample": False}
    expected = uncached_generation(layer_types, "greedy", max_new_tokens=6)
    actual = model.generate(**options, past_key_values=new_cache(name, model), prefill_chunk_size=4)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("layer_types", ["0_0_2_2", "0s_1s_2_2", "0_2s_2_2s"])
def test_generate_goes_on_where_it_stopped(name, layer_types):
    model = exact_model(layer_types)
    cache, options = new_cache(name, model), {"max_new_tokens": 4, "do_sample": False}
    first = model.generate(token_ids(1, 5), past_key_values=cache, **options)
    prompt = torch.cat([first, token_ids(1, 3, seed=1)], dim=1)
    expected = model.generate(prompt, use_cache=False, **options)
    assert torch.equal(model.generate(prompt, past_key_values=cache, **options), expected)


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("layer_types", MIXED)
def test_assisted_decoding(name, layer_types, do_sample):
    model, draft = exact_model(layer_types), exact_model("0_0", seed=1)
    draft.generation_config.num_assistant_tokens = 4
    options = {"max_new_tokens": 8, "do_sample": False}
    cache = new_cache(name, model)
    if not cache.is_croppable:
        with pytest.raises(UserError, match=VARIANTS[name][0]):
            model.generate(token_ids(1, 6), assistant_model=draft, past_key_values=cache, **options)
        return
    if do_sample:  # what is drawn depends on the number of draws: a draft that is always right leaves none to chance
        options |= {"do_sample": True, "top_k": 1}
    expected = uncached_generation(layer_types, "one prompt", **options)
    actual = model.generate(token_ids(1, 6), assistant_model=draft, past_key_values=cache, **options)
    assert torch.equal(actual, expected)


def word_tokenizer():
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{index}": index for index in range(3, 61)}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def test_streamed_text_is_the_generated_text(name, capsys):
    model, tokenizer = exact_model("0_2s_2_2s"), word_tokenizer()
    options = {"input_ids": token_ids(1, 6), "max_new_tokens": 8, "do_sample": False}
    expected = tokenizer.decode(model.generate(**options, use_cache=False)[0, 6:])
    model.generate(**options, past_key_values=new_cache(name, model), streamer=TextStreamer(tokenizer, True))
    assert capsys.readouterr().out.strip() == expected.strip()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
    thread = threading.Thread(
        target=model.generate, kwargs={**options, "past_key_values": new_cache(name, model), "streamer": streamer}
    )
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert len(pieces) > 4 and "".join(pieces).strip() == expected.strip()


@pytest.mark.parametrize("layer_types", ["0s_1s_2_2", "0_3_3_3_4"])
def test_pipeline(name, layer_types):
    model, tokenizer = exact_model(layer_types), word_tokenizer()
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    prompts = ["w5 w9 w20 w7 w33", "w8 w50"]
    expected = pipe(prompts, batch_size=2, use_cache=False, **options)
    actual = pipe(prompts, batch_size=2, past_key_values=new_cache(name, model), **options)
    assert actual == expected and actual[0][0]["generated_text"]


# --- 6. wrong use --------------------------------------------------------------------------------------------------


def test_a_cache_for_another_pattern_is_refused(name):
    model = exact_model("0_0_2_2")
    cache = new_cache(name, exact_model("0_1_2_3"))
    with pytest.raises(UserError, match="0_1_2_3.*0_0_2_2"):
        model(token_ids(1, 2), past_key_values=cache)
    assert cache.num_bytes() == 0


def test_a_model_without_a_pattern_is_refused(name):
    from transformers import LlamaConfig

    with pytest.raises(UserError, match="'llama'"):
        build_cache(VARIANTS[name][0], LlamaConfig(num_hidden_layers=2), **VARIANTS[name][1])


@pytest.mark.parametrize("name", list(CACHES), indirect=True)
def test_unknown_names_and_options_are_refused(name):
    config = exact_model("0_0_2_2").config
    with pytest.raises(UserError, match=f"did you mean '{name}'"):
        build_cache(name + "x", config)
    with pytest.raises(UserError, match="no option 'no_such_option'"):
        build_cache(name, config, no_such_option=1)


def test_options_make_an_equal_cache(name):
    model = exact_model("0s_1s_2_2")
    cache = new_cache(name, model)
    twin = build_cache(cache.name, model.config, **cache.options())
    assert type(twin) is type(cache) and twin.options() == cache.options()
    assert set(VARIANTS[name][1]) <= set(cache.options())
