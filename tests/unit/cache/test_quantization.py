import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lckv.cache.quantization import ALLOWED_BITS, GroupCodec, Quantized, pack, unpack
from lckv.errors import UserError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_states(batch_size=2, num_heads=3, num_tokens=24, head_dim=16, seed=0, dtype=torch.float32):
    """Channels of very different sizes and offsets, as those of keys are."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(batch_size, num_heads, num_tokens, head_dim, generator=generator)
    return (states * torch.logspace(-2, 1, head_dim) + torch.linspace(-20, 20, head_dim)).to(dtype)


def grouped(tensor, codec):
    """`(..., token groups, group_tokens, channel groups, group_channels)`, by the definition of a group."""
    tensor = tensor.unflatten(3, (-1, codec.group_channels))
    return tensor.unflatten(2, (-1, codec.group_tokens))


@given(st.sampled_from(ALLOWED_BITS), st.integers(1, 5), st.integers(1, 6), st.integers(0, 99))
@settings(deadline=None)
def test_packing_is_undone_and_takes_no_spare_bit(bits, rows, num_bytes, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (rows, num_bytes * 8 // bits), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, num_bytes)
    assert torch.equal(unpack(packed, bits), codes)


@pytest.mark.parametrize("bits", ALLOWED_BITS)
def test_packing_uses_every_byte(bits):
    every_byte = torch.arange(256, dtype=torch.uint8)[None]
    assert torch.equal(pack(unpack(every_byte, bits), bits), every_byte)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("bits", ALLOWED_BITS)
def test_no_number_moves_by_more_than_half_its_scale(bits, axis, dtype):
    codec, states = GroupCodec.along(axis, bits, 8, 16), random_states(dtype=dtype)
    before = states.clone()
    encoded = codec.encode(states)
    assert torch.equal(states, before)
    error = grouped((codec.decode(encoded, torch.float32) - states.float()).abs(), codec).amax(dim=(3, 5))
    rounding = 1e-6 * states.float().abs().max()  # of sums in float32
    assert (error <= encoded.scales.float() / 2 + rounding).all()
    spread = grouped(states.float(), codec)
    steps = (spread.amax(dim=(3, 5)) - spread.amin(dim=(3, 5))) / (2**bits - 1)
    coarse = 2.0**-7 * (steps + spread.abs().amax(dim=(3, 5)) / (2**bits - 1))  # scales and zeros have few digits
    assert (encoded.scales.float() <= steps + coarse).all()


@given(
    bits=st.sampled_from(ALLOWED_BITS),
    axis=st.sampled_from(["channel", "token"]),
    numbers=st.lists(st.floats(-60000, 60000, width=32), min_size=16, max_size=16),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=100, deadline=None)
def test_the_error_is_bounded_for_any_numbers(bits, axis, numbers, dtype):
    states = torch.tensor(numbers).view(1, 1, 2, 8).to(dtype)
    codec = GroupCodec.along(axis, bits, 2 if axis == "channel" else 4, 8)
    encoded = codec.encode(states)
    error = grouped((codec.decode(encoded, torch.float32) - states.float()).abs(), codec).amax(dim=(3, 5))
    largest = grouped(states.float().abs(), codec).amax(dim=(3, 5))
    assert (error <= encoded.scales.float() * (0.5 + 1e-5) + 4e-7 * largest + 1e-30).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", [0.0, 1.0, -3.1415927, 1e-6, 50000.0])
def test_groups_of_equal_numbers(number, dtype):
    states = torch.full((1, 2, 8, 4), number).to(dtype)
    for codec in (GroupCodec.along(axis, 2, 8, 4) for axis in ("channel", "token")):
        encoded = codec.encode(states)
        decoded = codec.decode(encoded, torch.float32)
        if dtype == torch.float32:  # float16 zero points are a little below; the rest fits one step
            torch.testing.assert_close(decoded, states, rtol=2**-10, atol=2**-24)
        else:
            assert torch.equal(decoded, states.float()) and not encoded.scales.any()


def test_the_ends_of_a_range_of_exact_steps_are_met():
    states = torch.arange(16.0).view(1, 1, 16, 1).expand(1, 1, 16, 2).contiguous()
    codec = GroupCodec.along("channel", 4, 16, 2)
    assert torch.equal(codec.decode(codec.encode(states), torch.float32), states)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf"), 1e6, -1e6])
def test_what_has_no_scale_is_refused(number):
    states = random_states()
    states[1, 2, 3, 4] = number
    with pytest.raises(UserError, match="NaN, infinity"):
        GroupCodec.along("channel", 4, 8, 16).encode(states)


def test_bfloat16_has_room_for_large_numbers():
    states = random_states(dtype=torch.bfloat16) * 1e6
    codec = GroupCodec.along("token", 8, 16, 16)
    decoded = codec.decode(codec.encode(states), torch.bfloat16)
    torch.testing.assert_close(decoded, states, rtol=0.02, atol=0.005 * float(states.abs().max()))


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("bits", ALLOWED_BITS)
def test_sizes_and_bytes(bits, axis):
    codec, states = GroupCodec.along(axis, bits, 8, 16), random_states()
    encoded = codec.encode(states)
    num_groups = (3, 16) if axis == "channel" else (24, 2)
    assert encoded.codes.shape == (2, 3, 24, 16 * bits // 8) and encoded.codes.dtype == torch.uint8
    assert encoded.scales.shape == encoded.zeros.shape == (2, 3, *num_groups)
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in encoded)
    assert num_bytes == 2 * 3 * codec.num_bytes(24, 16)


@pytest.mark.parametrize(
    ("group_size", "head_dim", "expected"), [(64, 64, 64), (64, 96, 48), (64, 16, 16), (7, 16, 4), (1, 16, 1)]
)
def test_groups_of_channels_divide_the_head(group_size, head_dim, expected):
    assert GroupCodec.along("token", 4, group_size, head_dim).group_channels == expected


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_groups_do_not_touch_each_other(axis):
    """Rows, heads and later tokens change nothing, so groups can be appended, dropped and selected."""
    codec, states = GroupCodec.along(axis, 4, 8, 16), random_states()
    encoded = codec.encode(states)
    for tensor, row in zip(encoded, codec.encode(states[1:, 2:]), strict=True):
        assert torch.equal(tensor[1:, 2:], row)
    parts = [codec.encode(states[:, :, :8]), codec.encode(states[:, :, 8:])]
    joined = Quantized(*(torch.cat(pair, dim=2) for pair in zip(*parts, strict=True)))
    for tensor, other in zip(encoded, joined, strict=True):
        assert torch.equal(tensor, other)
    cut = codec.cut(encoded, 8, 16)
    assert torch.equal(codec.decode(cut, torch.float32), codec.decode(encoded, torch.float32)[:, :, 8:16])


def test_nothing_can_be_encoded_too():
    codec = GroupCodec.along("channel", 4, 8, 16)
    encoded = codec.encode(random_states()[:, :, :0])
    assert codec.decode(encoded, torch.float32).shape == (2, 3, 0, 16)


def test_keys_lose_less_with_a_scale_per_channel():
    states = random_states(num_tokens=64)
    errors = []
    for axis in ("channel", "token"):
        codec = GroupCodec.along(axis, 4, 16, 16)
        errors.append((codec.decode(codec.encode(states), torch.float32) - states).square().mean())
    assert errors[0] * 10 < errors[1]


def test_one_step_is_much_faster_than_a_loop_over_tokens():
    codec, states = GroupCodec.along("token", 4, 16, 16), random_states(num_tokens=1000)

    def seconds(function):
        times = []
        for _ in range(3):
            start = time.process_time()
            function()
            times.append(time.process_time() - start)
        return min(times)

    loop = seconds(lambda: [codec.encode(token) for token in states.split(1, dim=2)])
    assert seconds(lambda: codec.encode(states)) * 20 < loop  # over 100 in measurements; here without waiting for calm
