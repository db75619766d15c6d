"""What every cache keeps to when rows, tokens and whole caches are moved, taken back, copied, saved and restored."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lckv.cache import load_cache, save_cache
from lckv.errors import UserError
from tests.contract.caches import (
    LENGTH,
    LOSSY,
    MIXED,
    VARIANTS,
    WINDOWED,
    assert_close,
    check_alike,
    check_continuation,
    check_continuation_is_lossy,
    exact_model,
    feed,
    filled_cache,
    in_patterns,
    live_bytes,
    new_cache,
    with_lossy,
)
from tests.reference import token_ids

pytestmark = pytest.mark.usefixtures("no_grad")


# --- what transformers does to caches ---------------------------------------------------------------------------


@in_patterns(MIXED[1:], 1, LOSSY)
def test_what_is_lost_does_not_depend_on_what_happens_to_rows(name, layer_types):
    model, rows = exact_model(layer_types), token_ids(3, LENGTH)
    for change, indices in [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    ]:
        changed = filled_cache(name, model, rows)
        change(changed)
        assert changed.num_bytes() == live_bytes(changed)
        check_alike(model, changed, filled_cache(name, model, rows[indices]), len(indices))


@in_patterns(MIXED[1:], 1, LOSSY, first=1)
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


@in_patterns(MIXED)
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


@with_lossy
def test_a_removed_sequence_takes_its_bytes_along(name):
    model = exact_model("0s_1s_2_2")
    cache, alone = new_cache(name, model), new_cache(name, model)
    rows = token_ids(3, 9)
    feed(model, cache, rows)
    cache.batch_select_indices(torch.tensor([1]))
    feed(model, alone, rows[1:2])
    assert cache.num_bytes() == live_bytes(cache) == alone.num_bytes() == alone.planned_bytes(9, 1, torch.float32)
    assert cache.batch_size == 1


@in_patterns(MIXED, first=1)
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


@in_patterns(["0_0_2_2", "0_3_3_3_4", "2_1_2_1"], 1)
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


@in_patterns(WINDOWED, 2)
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


@in_patterns(WINDOWED, 2, first=1)
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


@in_patterns(MIXED, 2, LOSSY)
def test_recorded_tokens_that_are_taken_back_leave_no_trace_where_something_is_lost(name, layer_types):
    model, rows = exact_model(layer_types), token_ids(2, LENGTH)
    cache, twin = filled_cache(name, model, rows), filled_cache(name, model, rows)
    cache.activate_past_recording()
    for seed in (1, 2):  # no more than is kept unrounded
        feed(model, cache, token_ids(2, 2, seed=seed), [1, 1])
        cache.crop(-2)
        assert int(cache.get_seq_length()) == LENGTH and cache.num_bytes() == live_bytes(cache)
    check_continuation_is_lossy(model, cache.fork(), rows)
    check_alike(model, cache, twin, 2)


@in_patterns(MIXED, 2, LOSSY, first=1)
def test_a_crop_where_something_is_lost_is_whole_or_refused(name, layer_types):
    model, rows = exact_model(layer_types), token_ids(2, LENGTH)
    cache, twin = filled_cache(name, model, rows), new_cache(name, model)
    try:
        cache.crop(-1)
    except RuntimeError as error:
        assert "window" in str(error)
        feed(model, twin, rows, [5, 1, 1, 4])
    else:
        feed(model, twin, rows[:, :-1], [5, 1, 1, 3])
    check_alike(model, cache, twin, 2)


@in_patterns(MIXED, 1)
def test_reset_forgets_everything(name, layer_types):
    model = exact_model(layer_types)
    cache = new_cache(name, model)
    feed(model, cache, token_ids(3, 7))
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    rows = token_ids(2, 5, seed=1)
    feed(model, cache, rows)
    check_continuation(model, cache, rows, token_ids(2, 3, seed=2))


@in_patterns(["0s_1s_2_2", "0_2s_2_2s"], 1)
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


# --- saving -----------------------------------------------------------------------------------------------------


@in_patterns(MIXED, 2, (*VARIANTS, *LOSSY))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
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


def test_rows_of_an_empty_cache_are_arranged_by_leaving_it(name):
    model = exact_model("0s_1s_2_2")
    cache = new_cache(name, model)
    cache.reorder_cache(torch.tensor([0, 0]))
    cache.batch_select_indices(torch.tensor([1]))
    check_continuation(model, cache, token_ids(2, 0), token_ids(2, 4))


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


@in_patterns(WINDOWED, 1)
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
