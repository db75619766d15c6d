"""Attention sinks and a window, against StreamingLLM's definition recomputed from scratch for every token."""

import math

import pytest
import torch

from lckv.cache import CACHES, DynamicKVCache, build_cache
from lckv.cache.saving import load_cache, save_cache
from lckv.cache.sink import SinkKVCache, SinkLayer
from lckv.errors import UserError
from tests.contract.caches import assert_close, exact_model, plain_store
from tests.reference import PATTERNS, tiny_config, token_ids

pytestmark = pytest.mark.usefixtures("no_grad")

SINKS, WINDOW = 2, 5
LENGTH = 20
YOCO = "0s_1s_2_2"
MIXED = ["0_0_2_2", YOCO, "0_3_3_3_4", "0_2s_2_2s", "2_0s_2s_0"]


# --- the definition ------------------------------------------------------------------------------------------------


def rotate(vectors, positions, inv_freq):
    """Plain RoPE of `(num_tokens, num_heads, head_dim)`, written with complex numbers."""
    half = vectors.shape[-1] // 2
    turned = torch.complex(vectors[..., :half].double(), vectors[..., half:].double())
    angles = torch.as_tensor(positions, dtype=torch.float64)[:, None, None] * inv_freq
    turned = turned * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1).float()


def attend(layer, hidden, keys, values, positions, seen, inv_freq):
    """`keys`, `values` are `(num_tokens, num_kv_heads, head_dim)`, keys not rotated; `seen` are rows of theirs."""
    attention = layer.self_attn
    query = attention.q_proj(layer.input_layernorm(hidden)).view(1, -1, attention.head_dim)
    if not seen:
        return torch.zeros(query.numel())
    query = rotate(query, positions[-1:], inv_freq)[0]
    keys = rotate(keys, positions, inv_freq)[seen].repeat_interleave(attention.num_key_value_groups, dim=1)
    values = values[seen].repeat_interleave(attention.num_key_value_groups, dim=1)
    scores = torch.einsum("hd,nhd->hn", query, keys) / math.sqrt(attention.head_dim)
    return torch.einsum("hn,nhd->hd", scores.softmax(dim=-1), values).flatten()


_KNOWN = {}


def streaming_logits(model, input_ids, num_sinks, window):
    """Like `compute_streaming_logits`, but each text once: many tests ask for the same."""
    config = model.config
    weights = sum(parameter.double().sum().item() for parameter in model.parameters())
    key = (config.kv_sharing, config.force_nodiag, config.sliding_window, num_sinks, window, weights)
    key = (*key, str(config.rope_parameters))
    key = (*key, tuple(input_ids.tolist()))
    if key not in _KNOWN:
        _KNOWN[key] = compute_streaming_logits(model, input_ids, num_sinks, window)
    return _KNOWN[key]


def compute_streaming_logits(model, input_ids, num_sinks, window):
    """What StreamingLLM defines: for each token, its cache is a text of its own, at positions 0, 1, 2, ...

    Args:
        input_ids: `(length,)`, one document.

    Returns:
        `(length, vocab_size)`.
    """
    config, plan = model.config, model.config.sharing_plan
    dim = config.head_dim
    keys, values = ({owner: [] for owner in plan.kv_owners} for _ in range(2))
    logits = []
    for token_idx, token in enumerate(input_ids):
        hidden = model.model.embed_tokens(token)
        for layer_plan, layer in zip(plan.layers, model.model.layers, strict=True):
            if layer_plan.computes_kv:
                normed = layer.input_layernorm(hidden)
                for states, name in (keys, "k_proj"), (values, "v_proj"):
                    if hasattr(layer.self_attn, name):
                        states[layer_plan.layer_idx].append(getattr(layer.self_attn, name)(normed).view(-1, dim))
            owner, value_owner = layer_plan.sources
            label = config.rope_label(owner)
            rope = config.rope_parameters if label is None else config.rope_parameters[label]
            inv_freq = rope["rope_theta"] ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            kept = list(range(token_idx + 1))
            if not plan.owner_is_sliding(owner):
                kept = [token for token in kept if token < num_sinks or token > token_idx - window]
            positions = list(range(len(kept)))
            seen = [
                row
                for row, other in enumerate(kept)
                if not (layer_plan.is_sliding and token_idx - other >= config.sliding_window)
                and not ((layer_plan.is_upward or config.force_nodiag) and other == token_idx)
            ]
            zeros = torch.zeros(config.num_key_value_heads, dim)  # the token's own key may not exist yet
            rows = [[*states[: token_idx + 1], zeros] for states in (keys[owner], values[value_owner])]
            kept_keys, kept_values = (torch.stack([states[other] for other in kept]) for states in rows)
            output = attend(layer, hidden, kept_keys, kept_values, positions, seen, inv_freq)
            hidden = hidden + layer.self_attn.o_proj(output)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        logits.append(model.lm_head(model.model.norm(hidden)))
    return torch.stack(logits)


# --- helpers -------------------------------------------------------------------------------------------------------


def new_cache(model, num_sinks=SINKS, window=WINDOW):
    return SinkKVCache(model.config, num_sinks=num_sinks, window=window)


def feed(model, cache, input_ids, chunk_size=1, **options):
    chunks = input_ids.split(chunk_size, dim=1)
    return torch.cat([model(chunk, past_key_values=cache, **options).logits for chunk in chunks], dim=1)


def feed_at_text_positions(model, cache, input_ids, attention_mask=None):
    """Token by token, at the positions that `generate` gives."""
    logits, start = [], cache.get_seq_length()
    for offset in range(input_ids.shape[1]):
        stop = start + offset + 1
        options = {"position_ids": torch.tensor([[stop - 1]])}
        if attention_mask is not None:
            mask = attention_mask[:, :stop]
            options = {"position_ids": (mask.sum(dim=1, keepdim=True) - 1).clamp(min=0), "attention_mask": mask}
        logits.append(model(input_ids[:, offset : offset + 1], past_key_values=cache, **options).logits)
    return torch.cat(logits, dim=1)


# --- exactness -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer_types", PATTERNS)
def test_every_token_sees_what_streaming_llm_defines(layer_types):
    model = exact_model(layer_types)
    input_ids = token_ids(2, LENGTH)
    logits = feed(model, new_cache(model), input_ids)
    for row in range(2):
        assert_close(logits[row], streaming_logits(model, input_ids[row], SINKS, WINDOW))


@pytest.mark.parametrize(("num_sinks", "window"), [(0, 1), (3, 1), (1, 2), (4, 9), (6, 3)])
@pytest.mark.parametrize("layer_types", ["0_1_2_3", "0_3_3_3_4", "0_2s_2_2s"])
def test_sizes(layer_types, num_sinks, window):
    model = exact_model(layer_types)
    input_ids = token_ids(1, LENGTH)
    logits = feed(model, new_cache(model, num_sinks, window), input_ids)
    assert_close(logits[0], streaming_logits(model, input_ids[0], num_sinks, window))


@pytest.mark.parametrize(("layer_types", "chunk_size"), list(zip(MIXED, [LENGTH, 2, 7, 11, LENGTH], strict=True)))
def test_chunks(layer_types, chunk_size):
    model = exact_model(layer_types)
    input_ids = token_ids(2, LENGTH)
    logits = feed(model, new_cache(model), input_ids, chunk_size)
    for row in range(2):
        assert_close(logits[row], streaming_logits(model, input_ids[row], SINKS, WINDOW))


def test_no_layer_may_see_its_own_token():
    model = exact_model(YOCO, force_nodiag=True)
    input_ids = token_ids(1, LENGTH)
    logits = feed(model, new_cache(model), input_ids, 4)
    assert_close(logits[0], streaming_logits(model, input_ids[0], SINKS, WINDOW))


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_attention_backends(attn_implementation):
    model = exact_model("0_2s_2_2s", attn_implementation=attn_implementation)
    input_ids = token_ids(1, 12)
    logits = feed(model, new_cache(model), input_ids)
    assert_close(logits[0], streaming_logits(model, input_ids[0], SINKS, WINDOW))


@pytest.mark.parametrize("layer_types", ["0_1_2_3", "0_0_2_2"])
def test_without_sinks_it_is_a_plain_window(layer_types):
    model = exact_model(layer_types)
    windowed = exact_model("_".join(f"{entry}s" for entry in layer_types.split("_")), sliding_window=WINDOW)
    windowed.load_state_dict(model.state_dict())
    input_ids = token_ids(2, LENGTH)
    logits = feed(model, new_cache(model, num_sinks=0), input_ids, 4)
    assert_close(logits, windowed(input_ids, use_cache=False).logits)
    assert_close(logits, feed(windowed, DynamicKVCache(windowed.config), input_ids, 4))


@pytest.mark.parametrize("layer_types", MIXED)
def test_as_long_as_everything_fits_nothing_changes(layer_types):
    model = exact_model(layer_types)
    input_ids = token_ids(2, SINKS + WINDOW)
    logits = model(input_ids, past_key_values=new_cache(model)).logits
    assert_close(logits, model(input_ids, use_cache=False).logits)


@pytest.mark.parametrize("rope_type", ["linear", "llama3", "yarn"])
def test_other_rotary_embeddings(rope_type):
    rope = {"rope_type": rope_type, "rope_theta": 100.0, "factor": 4.0}
    if rope_type == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if rope_type != "linear":
        rope["original_max_position_embeddings"] = 32
    model = exact_model("0_1_2_3", rope_parameters=rope)
    cache = new_cache(model, window=400)
    input_ids = token_ids(1, LENGTH)
    near = model(input_ids, past_key_values=cache).logits
    moved = cache.rotations[None](cache.owners()[0].keys, [37])
    positions = torch.arange(37, 37 + LENGTH)[None]
    shifted = new_cache(model, window=400)
    assert_close(model(input_ids, past_key_values=shifted, position_ids=positions).logits, near)
    assert_close(moved, shifted.owners()[0].keys)
    assert not torch.allclose(moved, cache.owners()[0].keys, atol=1e-2)


# --- positions -----------------------------------------------------------------------------------------------------


BY_KIND = {name: {"rope_type": "default", "rope_theta": theta} for name, theta in (("a", 1e4), ("b", 10.0))}


@pytest.mark.parametrize("layer_types", [YOCO, "0_2s_2_2s"])
@pytest.mark.parametrize("labels", [None, ["b", "a", "a", "a"]])
def test_positions_stay_bounded_and_nothing_changes(layer_types, labels):
    model = exact_model(
        layer_types, **({} if labels is None else {"rope_parameters": BY_KIND, "rope_layer_types": labels})
    )
    input_ids = token_ids(1, 60)
    cache, positions, logits = new_cache(model), [], []
    for token in input_ids.split(1, dim=1):
        logits.append(model(token, past_key_values=cache).logits)
        positions.append(cache.get_next_position())
    assert max(positions) == 2 * (SINKS + WINDOW) and cache.offset > 40
    assert cache.get_seq_length() == 60
    given = feed_at_text_positions(model, new_cache(model), input_ids)
    assert_close(torch.cat(logits, dim=1), given)
    assert_close(given[0], streaming_logits(model, input_ids[0], SINKS, WINDOW))


def test_each_key_is_rotated_back_at_most_once(monkeypatch):
    model = exact_model("0s_1_1_0s", sliding_window=9)
    cache, rebased = new_cache(model), []
    original = SinkLayer.rebase

    def rebase(layer, offset):
        rebased.append(layer.seq_length)
        original(layer, offset)

    monkeypatch.setattr(SinkLayer, "rebase", rebase)
    feed(model, cache, token_ids(1, 70))
    gaps = [later - earlier for earlier, later in zip(rebased, rebased[1:], strict=False)]
    assert len(gaps) > 3 and min(gaps) >= max(WINDOW, 9)


@pytest.mark.parametrize("layer_types", ["0_3_3_3_4", YOCO])
def test_the_caller_may_begin_and_cease_to_give_positions(layer_types):
    model = exact_model(layer_types)
    input_ids = token_ids(1, 70)
    cache = new_cache(model)
    first = feed(model, cache, input_ids[:, :30])
    assert cache.offset > 0
    second = feed_at_text_positions(model, cache, input_ids[:, 30:40])
    assert cache.offset == 0
    third = feed(model, cache, input_ids[:, 40:], 7)
    assert cache.offset > 0
    expected = streaming_logits(model, input_ids[0], SINKS, WINDOW)
    assert_close(torch.cat([first, second, third], dim=1)[0], expected)


def test_far_from_the_beginning_the_angles_are_still_exact():
    """Keys that arrive a million tokens on, at given positions: what the sinks are moved by is not rounded."""
    model = exact_model("0_1_2_3", rope_parameters={"rope_type": "default", "rope_theta": 10000.0}).double()
    rotation = new_cache(model).rotations[None]
    keys = torch.randn(1, 2, 3, 8, dtype=torch.float64)
    far = rotation(rotation(rotation(keys, [1_000_003]), [-999_999]), [-4])
    torch.testing.assert_close(far, keys, atol=1e-8, rtol=0)


def test_in_half_precision_a_long_stream_ends_where_a_short_one_does():
    """After 150 tokens, with positions counted anew every 7, the state is that of the last tokens alone."""
    model = exact_model("0_1_2_3").to(torch.bfloat16)
    input_ids = token_ids(1, 150)
    cache = new_cache(model, num_sinks=0)
    long = feed(model, cache, input_ids)[:, -1]
    depth = 4 * WINDOW  # what reaches the last token through four layers of windows
    short = feed(model, new_cache(model, num_sinks=0), input_ids[:, -depth:])[:, -1]
    torch.testing.assert_close(long, short, atol=0.05, rtol=0.05)


# --- padding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer_types", "chunk_size"), [*zip(MIXED, [6, 1, LENGTH + 6, 6, 1], strict=True), ("0_3_3_3_4", 1)]
)
def test_sinks_of_a_padded_row_are_its_first_real_tokens(layer_types, chunk_size):
    model = exact_model(layer_types)
    num_padding = [0, 3, 10, LENGTH + 3]
    length = LENGTH + 6
    input_ids = token_ids(4, length)
    attention_mask = torch.stack([torch.arange(length) >= padding for padding in num_padding]).long()
    cache, logits = new_cache(model), []
    positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    for chunk in torch.arange(length).split(chunk_size):
        stop = int(chunk[-1]) + 1
        options = {"attention_mask": attention_mask[:, :stop], "position_ids": positions[:, chunk]}
        logits.append(model(input_ids[:, chunk], past_key_values=cache, **options).logits)
    for row, padding in enumerate(num_padding):
        expected = streaming_logits(model, input_ids[row, padding:], SINKS, WINDOW)
        assert_close(torch.cat(logits, dim=1)[row, padding:], expected)


def test_padded_rows_without_given_positions():
    model = exact_model("0_1_2_3")
    input_ids = token_ids(2, 60)
    attention_mask = torch.ones(2, 60, dtype=torch.long)
    attention_mask[1, :20] = 0
    cache, logits = new_cache(model), []
    for stop in range(1, 61):
        options = {"attention_mask": attention_mask[:, :stop]}
        logits.append(model(input_ids[:, stop - 1 : stop], past_key_values=cache, **options).logits)
    assert cache.offset > 0
    expected = streaming_logits(model, input_ids[1, 20:], SINKS, WINDOW)
    assert_close(torch.cat(logits, dim=1)[1, 20:], expected)


def test_rows_keep_their_padding_when_the_batch_changes():
    model = exact_model("0_3_3_3_4")
    input_ids = token_ids(3, LENGTH)
    num_padding = torch.tensor([0, 4, 11])
    attention_mask = (torch.arange(LENGTH) >= num_padding[:, None]).long()
    cache, rows, stop = new_cache(model), [2, 0, 0, 1], 15
    feed_at_text_positions(model, cache, input_ids[:, :stop], attention_mask)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([1, 3, 2, 5]))
    logits = feed_at_text_positions(model, cache, input_ids[rows, stop:], attention_mask[rows])
    for row, source in enumerate(rows):
        padding = int(num_padding[source])
        expected = streaming_logits(model, input_ids[source, padding:], SINKS, WINDOW)
        assert_close(logits[row], expected[stop - padding :])
    fresh = SinkLayer(plain_store(), 1, 1, cache.rotations[None])
    fresh.padding = [0, 4]
    fresh.batch_select_indices(torch.tensor([1]))
    assert fresh.padding == [4]


# --- rollback ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer_types", "num_past"),
    [*zip(MIXED, [3, 6, 7, 8, 19], strict=True), *zip(MIXED, [7, 8, 19, 3, 6], strict=True)],
)
def test_recorded_tokens_can_be_taken_back(layer_types, num_past):
    model = exact_model(layer_types)
    input_ids, others = token_ids(2, LENGTH), token_ids(2, 4, seed=9)
    cache = new_cache(model)
    feed_at_text_positions(model, cache, input_ids[:, :num_past])
    cache.activate_past_recording()
    logits = []
    for start in range(num_past, LENGTH):
        feed_at_text_positions(model, cache, others)
        cache.crop(-4)
        assert cache.get_seq_length() == start
        logits.append(feed_at_text_positions(model, cache, input_ids[:, start : start + 1]))
    for row in range(2):
        expected = streaming_logits(model, input_ids[row], SINKS, WINDOW)[num_past:]
        assert_close(torch.cat(logits, dim=1)[row], expected)


@pytest.mark.parametrize(("num_seen", "num_removed"), [(7, 3), (6, 6), (4, 1)])
def test_tokens_can_be_taken_back_as_long_as_none_was_dropped(num_seen, num_removed):
    model = exact_model("0_3_3_3_4")
    input_ids = token_ids(2, LENGTH)
    cache, stop = new_cache(model), num_seen - num_removed
    feed(model, cache, input_ids[:, :num_seen], 4)
    cache.crop(-num_removed)
    logits = feed(model, cache, input_ids[:, stop:], 3)
    assert_close(logits[0], streaming_logits(model, input_ids[0], SINKS, WINDOW)[stop:])


def test_padding_that_was_dropped_is_not_missed():
    model = exact_model("0_1_2_3")
    input_ids, stop = token_ids(2, LENGTH), 11
    attention_mask = (torch.arange(LENGTH) >= torch.tensor([[6], [9]])).long()
    cache = new_cache(model)
    feed_at_text_positions(model, cache, input_ids[:, :stop], attention_mask)
    cache.crop(-5)
    cache.crop(-1)
    logits = feed_at_text_positions(model, cache, input_ids[:, stop - 6 :], attention_mask)
    for row, padding in enumerate([6, 9]):
        expected = streaming_logits(model, input_ids[row, padding:], SINKS, WINDOW)
        assert_close(logits[row, padding - stop + 6 :], expected)


def test_a_rollback_into_what_was_dropped_is_refused_and_changes_nothing():
    model = exact_model(YOCO)
    input_ids = token_ids(1, LENGTH)
    cache = new_cache(model)
    feed(model, cache, input_ids[:, :9])
    with pytest.raises(RuntimeError, match="2 sinks and a window of 5 tokens have dropped"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="allowed are -9 to 0"):
        cache.crop(-10)
    logits = feed(model, cache, input_ids[:, 9:])
    assert_close(logits[0], streaming_logits(model, input_ids[0], SINKS, WINDOW)[9:])


def test_assisted_generation_beyond_the_window():
    model, assistant = exact_model("0_3_3_3_4"), exact_model("0_1_2_3", seed=1)
    prompt = token_ids(1, 5)
    expected = model.generate(prompt, past_key_values=new_cache(model), max_new_tokens=20, do_sample=False)
    assisted = model.generate(
        prompt, past_key_values=new_cache(model), max_new_tokens=20, do_sample=False, assistant_model=assistant
    )
    assert assisted.tolist() == expected.tolist()


# --- the rest of what caches do ------------------------------------------------------------------------------------


def test_beams_and_left_padding_in_generate():
    model = exact_model("0_0_2_2")
    prompt = token_ids(2, 12)
    attention_mask = torch.ones_like(prompt)
    attention_mask[1, :5] = 0
    options = {"max_new_tokens": 10, "do_sample": False, "num_beams": 3}
    batch = model.generate(prompt, attention_mask=attention_mask, past_key_values=new_cache(model), **options)
    alone = model.generate(prompt[1:, 5:], past_key_values=new_cache(model), **options)
    assert batch[1, 12:].tolist() == alone[0, 7:].tolist()


def test_greedy_generation_follows_the_definition():
    model = exact_model("0_3_3_3_4")
    tokens = model.generate(token_ids(1, 4), past_key_values=new_cache(model), max_new_tokens=16, do_sample=False)
    expected = streaming_logits(model, tokens[0, :-1], SINKS, WINDOW).argmax(dim=-1)
    assert tokens[0, 4:].tolist() == expected[3:].tolist()


@pytest.mark.parametrize("num_past", [4, 30])
def test_forks_go_their_own_ways(num_past):
    model = exact_model(YOCO)
    texts = token_ids(2, 40)
    texts[1, :num_past] = texts[0, :num_past]
    cache = new_cache(model)
    feed(model, cache, texts[:1, :num_past])
    fork = cache.fork()
    first, second = [], []
    for token in range(num_past, 40):
        first.append(feed(model, cache, texts[:1, token : token + 1]))
        second.append(feed(model, fork, texts[1:, token : token + 1]))
    for logits, text in ((first, texts[0]), (second, texts[1])):
        assert_close(torch.cat(logits, dim=1)[0], streaming_logits(model, text, SINKS, WINDOW)[num_past:])


def test_a_saved_cache_goes_on_identically(tmp_path):
    model = exact_model("0_3_3_3_4")
    input_ids = token_ids(2, 60)
    attention_mask = torch.ones(2, 60, dtype=torch.long)
    attention_mask[1, :10] = 0
    cache = new_cache(model)
    for stop in range(1, 41):
        model(input_ids[:, stop - 1 : stop], past_key_values=cache, attention_mask=attention_mask[:, :stop])
    assert cache.offset > 0
    save_cache(cache, tmp_path / "cache.safetensors")
    restored = load_cache(tmp_path / "cache.safetensors", model.config)
    logits = [feed(model, each, input_ids[:, 40:]) for each in (cache, restored)]
    assert torch.equal(*logits)


def test_reset_forgets_everything():
    model = exact_model(YOCO)
    cache = new_cache(model)
    feed(model, cache, token_ids(1, 40, seed=5))
    cache.reset()
    assert cache.offset == 0 and cache.get_seq_length() == 0 and cache.num_bytes() == 0
    input_ids = token_ids(2, LENGTH)
    logits = feed(model, cache, input_ids)
    assert_close(logits[1], streaming_logits(model, input_ids[1], SINKS, WINDOW))


def test_what_was_returned_is_not_written_into():
    model = exact_model("0_1_2_3")
    layer = new_cache(model).owners()[0]
    states = torch.randn(1, 2, SINKS + WINDOW, 8)
    given = states.clone()
    returned = layer.update(states, states)[0]
    layer.update(torch.ones(1, 2, 1, 8), torch.ones(1, 2, 1, 8))
    layer.update(torch.ones(1, 2, 1, 8), torch.ones(1, 2, 1, 8))
    assert torch.equal(states, given) and torch.equal(returned, given)


def test_tensors_made_in_inference_mode_can_be_streamed_on():
    model = exact_model("0_1_2_3")
    input_ids = token_ids(1, LENGTH)
    cache = new_cache(model)
    with torch.inference_mode():
        feed(model, cache, input_ids[:, :10])
    logits = feed(model, cache, input_ids[:, 10:])
    assert_close(logits[0], streaming_logits(model, input_ids[0], SINKS, WINDOW)[10:])


# --- size ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer_types", PATTERNS)
def test_memory_is_constant_once_full(layer_types):
    model = exact_model(layer_types)
    cache, empty, sizes = new_cache(model), new_cache(model), []
    for token in token_ids(2, 50).split(1, dim=1):
        model(token, past_key_values=cache)
        sizes.append(cache.num_bytes())
        assert sizes[-1] == empty.planned_bytes(len(sizes), 2, torch.float32)
    assert len(set(sizes[SINKS + WINDOW - 1 :])) == 1 < len(set(sizes))
    plan, per_token = model.config.sharing_plan, 2 * 2 * 8 * 4  # of keys, and of values, in two rows
    num_tokens = [
        (layer.computes_keys + layer.computes_values)
        * (model.config.sliding_window if plan.owner_is_sliding(layer.layer_idx) else SINKS + WINDOW)
        for layer in plan.layers
    ]
    assert sizes[-1] == sum(num_tokens) * per_token


def test_lengths_are_announced():
    model = exact_model("0_1_2_3")
    cache = new_cache(model)
    assert cache.get_max_length() == SINKS + WINDOW
    assert not cache.needs_single_tokens(SINKS + WINDOW) and cache.needs_single_tokens(SINKS + WINDOW + 1)
    feed(model, cache, token_ids(1, 12))
    assert not cache.needs_single_tokens(1) and cache.needs_single_tokens(2)
    assert cache.get_mask_sizes(1, 0) == (SINKS + WINDOW, 6)
    assert cache.get_key_positions(1, 0).tolist() == [[0, 1, 8, 9, 10, 11, 12]]
    windowed = exact_model("0s_1s_2s_3s")
    assert not new_cache(windowed).needs_single_tokens(100)


def test_several_tokens_at_once_beyond_the_size_are_refused():
    model = exact_model("0_1_2_3")
    states = torch.zeros(1, 2, 8, 8)
    with pytest.raises(RuntimeError, match="8 tokens at once after 0, in a cache of 7"):
        new_cache(model).update(states, states, 0)


# --- wrong use -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_sinks": -1}, "cache.num_sinks=-1: allowed is a whole number, 0 or more"),
        ({"window": 0}, "cache.window=0: allowed is a whole number, 1 or more"),
        ({"window": 2.5}, "cache.window=2.5"),
        ({"num_sinks": True}, "cache.num_sinks=True"),
        ({"sinks": 4}, "has no option 'sinks'.*did you mean 'num_sinks'"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        build_cache("sink", tiny_config("0_1"), **options)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_frequencies_that_change_with_the_length_are_refused(rope_type):
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 2.0}
    if rope_type == "longrope":
        factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
        rope |= {"original_max_position_embeddings": 64} | factors
    config = tiny_config("0_1", rope_parameters=rope)
    with pytest.raises(UserError, match=f"rope_type='{rope_type}': allowed are types whose frequencies do not"):
        SinkKVCache(config)


def test_learned_positions_are_refused():
    with pytest.raises(UserError, match="cache 'sink' for a model with learned_positions: what it keeps of a token"):
        SinkKVCache(tiny_config("0_1", learned_positions=True))


def test_it_is_in_the_registry():
    cache = build_cache("sink", tiny_config("0_1"), num_sinks=3, window=8)
    assert CACHES["sink"] is SinkKVCache and cache.options() == {"num_sinks": 3, "window": 8}
    assert SinkKVCache(tiny_config("0_1")).options() == {"num_sinks": 4, "window": 1020}
