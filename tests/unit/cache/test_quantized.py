import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lckv.cache import QuantizedKVCache, build_cache, load_cache, save_cache
from lckv.cache.quantization import GroupCodec
from lckv.cache.quantized import QuantizedLayer
from lckv.errors import UserError
from tests.contract.caches import exact_model, feed, plain_store
from tests.reference import PATTERNS, tiny_config, token_ids

HEAD_DIM = 8
CODECS = (GroupCodec.along("channel", 4, 4, HEAD_DIM), GroupCodec.along("token", 4, 4, HEAD_DIM))
TOLERANCES = {8: 0.004, 4: 0.06, 2: 0.25}  # root mean square of the error over the standard deviation of logits

pytestmark = pytest.mark.usefixtures("no_grad")


def random_text(length, batch_size=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch_size, 2, length, HEAD_DIM, generator=generator) for _ in range(2)]


def rounded(states, codec, group_size):
    """Every whole group of tokens, encoded on its own and decoded."""
    groups = [group for group in states.split(group_size, dim=2) if group.shape[2] == group_size]
    decoded = [codec.decode(codec.encode(group), states.dtype) for group in groups]
    return torch.cat([states[:, :, :0], *decoded], dim=2)


def expected_past(text, length, window, residual_length, group_size):
    """What is to be read after `length` tokens, by the definition: old groups rounded once, the rest not."""
    first = 0 if window is None else max(0, length - window + 1)
    num_old = max(0, length - residual_length) // group_size * group_size
    if window is not None and window <= residual_length:
        num_old = 0
    return [
        torch.cat([rounded(states[:, :, :num_old], codec, group_size), states[:, :, num_old:length]], dim=2)[
            :, :, first:
        ]
        for states, codec in zip(text, CODECS, strict=True)
    ]


def fill(layer, text, length, chunk=3):
    for start in range(layer.seq_length, length, chunk):
        layer.write(tuple(states[:, :, start : min(start + chunk, length)] for states in text))
    return layer


def read(layer, num_heads=2):
    """All that the next token sees of the past."""
    nothing = torch.zeros(2, num_heads, 0, HEAD_DIM)
    return layer.peek((nothing, nothing))


def num_bytes(layer):
    return sum(tensor.untyped_storage().nbytes() for tensor in layer.tensors().values())


# --- one layer -----------------------------------------------------------------------------------------------------


@given(
    chunks=st.lists(st.integers(1, 11), min_size=1, max_size=6),
    window=st.one_of(st.none(), st.integers(1, 30)),
    residual_length=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_old_groups_are_rounded_once_whatever_the_chunks(chunks, window, residual_length):
    text, length = random_text(sum(chunks)), 0
    layer = QuantizedLayer(plain_store(window), CODECS, 4, residual_length)
    for chunk in chunks:
        num_keys, offset = layer.get_mask_sizes(chunk)
        new = [states[:, :, length : length + chunk] for states in text]
        past = expected_past(text, length, window, residual_length, 4)
        for given_back in (layer.peek(new), layer.write(new)):
            for states, old, fresh in zip(given_back, past, new, strict=True):
                assert torch.equal(states, torch.cat([old, fresh], dim=2))
                assert states.shape[2] == num_keys and offset == length - old.shape[2]
        length += chunk
        assert num_bytes(layer) == layer.num_bytes() == layer.planned_bytes(length, 2, 4)
        assert layer.get_seq_length() == length


def test_the_recent_window_has_its_length_and_less_than_a_group_more():
    text, layer = random_text(60), QuantizedLayer(plain_store(None), CODECS, 4, 6)
    lengths = set()
    for length in range(1, 61):
        fill(layer, text, length)
        assert (
            layer.encoded[0].codes.shape[2] % 4 == 0
            and layer.encoded[0].codes.shape[2] + layer.keys.shape[2] == length
        )
        if length >= 6:
            lengths.add(layer.keys.shape[2])
    assert lengths == {6, 7, 8, 9}


def test_codes_never_change_as_the_text_grows():
    text, layer = random_text(200), QuantizedLayer(plain_store(None), CODECS, 4, 2)
    fill(layer, text, 50)
    before = {name: tensor.clone() for name, tensor in layer.tensors().items() if name.endswith(("codes", "zeros"))}
    fill(layer, text, 200, chunk=1)
    for name, tensor in before.items():
        assert torch.equal(layer.tensors()[name][:, :, : tensor.shape[2]], tensor)


@pytest.mark.parametrize("window", [5, 12, 17])
def test_a_sliding_layer_keeps_whole_groups_and_no_more(window):
    text, layer = random_text(80), QuantizedLayer(plain_store(window), CODECS, 4, 3)
    for length in range(1, 81):
        fill(layer, text, length)
        num_kept = layer.encoded[0].codes.shape[2] + layer.keys.shape[2]
        assert min(length, window) <= num_kept <= layer.get_max_length() == window + 3
    long_prompt = fill(QuantizedLayer(plain_store(window), CODECS, 4, 3), text, 80, chunk=80)
    for name, tensor in layer.tensors().items():
        assert torch.equal(long_prompt.tensors()[name], tensor)


def test_a_short_window_is_never_encoded():
    layer = fill(QuantizedLayer(plain_store(6), CODECS, 4, 6), random_text(50), 50)
    assert layer.keys.shape[2] == layer.get_max_length() == 6 and not layer.encoded[0].codes.numel()


@pytest.mark.parametrize("num_removed", [0, 1, 5, 6, 9, 14, 31, 40])
def test_taking_tokens_back_cuts_the_last_group_only(num_removed):
    text, layer = random_text(60), QuantizedLayer(plain_store(None), CODECS, 4, 5)
    fill(layer, text, 40)
    whole = {name: tensor.clone() for name, tensor in layer.tensors().items()}
    expected = [states[:, :, : 40 - num_removed] for states in read(layer)]
    layer.crop(-num_removed)
    for states, wanted in zip(read(layer), expected, strict=True):
        assert torch.equal(states, wanted)
    assert layer.get_seq_length() == 40 - num_removed and num_bytes(layer) == layer.num_bytes()
    num_groups = min(32, 40 - num_removed) // 4
    assert torch.equal(layer.encoded[0].codes, whole["key_codes"][:, :, : num_groups * 4])
    assert torch.equal(layer.encoded[0].scales, whole["key_scales"][:, :, :num_groups])
    fill(layer, text, 60)
    assert layer.encoded[0].codes.shape[2] == 52 and torch.equal(layer.keys, text[0][:, :, 52:])


def test_taking_back_no_more_than_the_recent_window_leaves_no_trace():
    text, other = random_text(60), random_text(60, seed=1)
    straight, winding = (QuantizedLayer(plain_store(None), CODECS, 4, 5) for _ in range(2))
    for length in range(6, 61, 2):
        fill(straight, text, length)
        fill(winding, text, length)
        winding.write(tuple(states[:, :, :2] for states in other))
        winding.crop(-2)
    for states, wanted in zip(read(winding), read(straight), strict=True):
        torch.testing.assert_close(states, wanted, atol=0.3, rtol=0)
    num_recent = winding.keys.shape[2]
    assert torch.equal(winding.keys, text[0][:, :, 60 - num_recent :])


def test_a_window_brings_recorded_tokens_back():
    text, other = random_text(60), random_text(60, seed=1)
    layer = fill(QuantizedLayer(plain_store(11), CODECS, 4, 3), text, 30)
    expected = read(layer)
    layer.activate_past_recording()
    fill(layer, other, 45)
    layer.crop(-15)
    for states, wanted in zip(read(layer), expected, strict=True):
        torch.testing.assert_close(states, wanted, atol=0.3, rtol=0)
        assert torch.equal(states[:, :, :4], wanted[:, :, :4])  # what was encoded before is as it was


def test_a_window_refuses_to_bring_back_what_it_has_dropped():
    layer = fill(QuantizedLayer(plain_store(11), CODECS, 4, 3), random_text(60), 30)
    before = read(layer)
    with pytest.raises(RuntimeError, match="window of 11 tokens has dropped"):
        layer.crop(-9)
    assert all(torch.equal(*pair) for pair in zip(read(layer), before, strict=True))
    with pytest.raises(ValueError, match="crop"):
        layer.crop(2)


def test_rows_move_with_their_codes():
    text = random_text(30, batch_size=3)
    layer = fill(QuantizedLayer(plain_store(None), CODECS, 4, 5), text, 30)
    order = torch.tensor([2, 0])
    layer.batch_select_indices(order)
    alone = fill(QuantizedLayer(plain_store(None), CODECS, 4, 5), [states[order] for states in text], 30)
    for name, tensor in layer.tensors().items():
        assert torch.equal(tensor, alone.tensors()[name])
    layer.batch_repeat_interleave(2)
    assert layer.encoded[0].codes.shape[0] == layer.encoded[1].scales.shape[0] == 4


# --- whole caches --------------------------------------------------------------------------------------------------


def error(actual, expected):
    return float((actual - expected).square().mean().sqrt() / expected.std())


@pytest.mark.parametrize("layer_types", PATTERNS[1::3])
def test_logits_are_near_those_without_a_cache(layer_types):
    model, input_ids = exact_model(layer_types, sliding_window=11), token_ids(2, 40)
    expected = model(input_ids, use_cache=False).logits
    for bits, tolerance in TOLERANCES.items():
        cache = QuantizedKVCache(model.config, bits=bits, group_size=4, residual_length=4)
        assert 0 < error(feed(model, cache, input_ids, [6, 1, 9, 1, 1, 4, 12, 1, 5]), expected) < tolerance
        assert cache.num_bytes() == cache.planned_bytes(40, 2, torch.float32)


def test_more_bits_lose_less():
    model, input_ids = exact_model("0_0_2_2"), token_ids(2, 40)
    expected = model(input_ids, use_cache=False).logits
    errors = [
        error(
            feed(
                model,
                build_cache("quantized", model.config, bits=bits, residual_length=4, group_size=8),
                input_ids,
                [20] + [1] * 20,
            ),
            expected,
        )
        for bits in (8, 4, 2)
    ]
    assert errors[0] * 4 < errors[1] and errors[1] * 2 < errors[2]


@pytest.mark.parametrize("layer_types", ["0_0_2_2", "0s_1s_2_2", "0_3_3_3_4"])
def test_left_padding(layer_types):
    model, rows = exact_model(layer_types, sliding_window=9), [token_ids(1, n, seed=n)[0] for n in (24, 17)]
    input_ids = torch.stack([torch.nn.functional.pad(row, (24 - len(row), 0)) for row in rows])
    attention_mask = torch.stack([torch.arange(24) >= 24 - len(row) for row in rows]).long()
    position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    cache = QuantizedKVCache(model.config, group_size=4, residual_length=2)
    logits, stop = [], 0
    for chunk in (10, 1, 8, 1, 4):
        new = slice(stop, stop + chunk)
        stop += chunk
        outputs = model(
            input_ids[:, new],
            attention_mask=attention_mask[:, :stop],
            position_ids=position_ids[:, new],
            past_key_values=cache,
        )
        logits.append(outputs.logits)
    for row, tokens in enumerate(rows):
        expected = model(tokens[None], use_cache=False).logits[0]
        assert error(torch.cat(logits, dim=1)[row, 24 - len(tokens) :], expected) < TOLERANCES[8]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_half_precision(dtype):
    model = exact_model("0s_1s_2_2").to(dtype)
    cache = QuantizedKVCache(model.config, bits=4, group_size=4, residual_length=4)
    feed(model, cache, token_ids(2, 30), [20, 1, 9])
    layer = cache.owners()[2]
    assert layer.keys.dtype == layer.encoded[0].scales.dtype == layer.encoded[1].zeros.dtype == dtype
    assert cache.num_bytes() == cache.planned_bytes(30, 2, dtype)
    assert layer.peek(layer.streams)[0].dtype == dtype


@pytest.mark.parametrize(("bits", "goal"), [(8, 0.30), (4, 0.18)])
@pytest.mark.parametrize("length", [2048, 3000, 4096])
def test_bytes_with_everything_counted_meet_the_goal(bits, goal, length):
    config = tiny_config("0_0_2_2", hidden_size=256, num_attention_heads=4, num_key_value_heads=2)
    assert config.head_dim == 64
    caches = [build_cache("quantized", config, bits=bits), build_cache("dynamic", config)]
    for cache in caches:
        for owner in cache.owners():
            states = torch.randn(1, 2, length, 64)
            cache.update(states, states, owner)
    assert caches[0].num_bytes() <= goal * caches[1].num_bytes()


@pytest.mark.parametrize("layer_types", ["0s_1s_2_2", "0_2s_2_2s"])
def test_forks_reordering_and_saving_keep_every_bit(layer_types, tmp_path):
    model, rows = exact_model(layer_types, sliding_window=9), token_ids(3, 30)
    cache = QuantizedKVCache(model.config, bits=2, group_size=4, residual_length=3)
    feed(model, cache, rows, [21, 1, 8])
    save_cache(cache, tmp_path / "cache.safetensors")
    twins = [cache.fork(), load_cache(tmp_path / "cache.safetensors", model.config), cache]
    logits = [feed(model, twin, token_ids(3, 20, seed=1), [1] * 12 + [8]) for twin in twins]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
    order = torch.tensor([1, 1, 0])
    for twin in twins:
        twin.reorder_cache(order)
    moved = [feed(model, twin, token_ids(3, 5, seed=2), [1] * 5) for twin in twins]
    assert torch.equal(moved[0], moved[1]) and torch.equal(moved[0], moved[2])


@pytest.mark.parametrize("way", [{"num_beams": 3}, {"do_sample": True}, {"prefill_chunk_size": 7}])
def test_generate(way):
    model = exact_model("0_2s_2_2s", sliding_window=9)
    model.generation_config.pad_token_id = 0
    cache = QuantizedKVCache(model.config, group_size=4, residual_length=4)
    tokens = model.generate(token_ids(2, 20), past_key_values=cache, max_new_tokens=20, min_new_tokens=20, **way)
    assert tokens.shape == (2, 40) and cache.owners()[2].encoded[0].codes.shape[2] == 32


def test_assisted_decoding_takes_candidates_back():
    model, draft = exact_model("0s_1s_2_2", sliding_window=9), exact_model("0_0", seed=1)
    for each in (model, draft):
        each.generation_config.pad_token_id, each.generation_config.eos_token_id = 0, None
    draft.generation_config.num_assistant_tokens = 4
    cache = QuantizedKVCache(model.config, bits=8, group_size=4, residual_length=8)
    options = {"past_key_values": cache, "max_new_tokens": 20, "do_sample": False}
    assert model.generate(token_ids(1, 12), assistant_model=draft, **options).shape == (1, 32)
    assert cache.owners()[2].encoded[0].codes.shape[2] > 0


# --- wrong use -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, r"cache\.bits=3: allowed are 2, 4 and 8"),
        ({"bits": 16}, r"cache\.bits=16"),
        ({"bits": "4"}, r"cache\.bits='4'"),
        ({"group_size": 0}, r"cache\.group_size=0: allowed is a whole number, 1 or more"),
        ({"group_size": 2.5}, r"cache\.group_size=2\.5"),
        ({"residual_length": -1}, r"cache\.residual_length=-1: allowed is a whole number, 0 or more"),
        ({"residual_length": True}, r"cache\.residual_length=True"),
        ({"key_axis": "channek"}, r"cache\.key_axis='channek': allowed are .*; did you mean 'channel'\?"),
        ({"value_axis": 3}, r"cache\.value_axis=3: allowed are channel, token"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        build_cache("quantized", tiny_config("0_0_2_2"), **options)


@pytest.mark.parametrize(("bits", "head_dim"), [(2, 6), (2, 10)])
def test_heads_that_do_not_fill_bytes_are_refused(bits, head_dim):
    config = tiny_config("0_0_2_2", head_dim=head_dim)
    with pytest.raises(
        UserError, match=f"head_dim={head_dim}: allowed are heads whose size is divisible by {8 // bits}"
    ):
        build_cache("quantized", config, bits=bits)
    build_cache("quantized", config, bits=8)


def test_a_model_that_computes_nan_is_told_so():
    model = exact_model("0_0_2_2")
    model.model.layers[2].self_attn.k_proj.weight.fill_(float("nan"))
    cache = QuantizedKVCache(model.config, group_size=4, residual_length=0)
    with pytest.raises(UserError, match="NaN"):
        model(token_ids(1, 9), past_key_values=cache)
