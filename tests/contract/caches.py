"""What the tests of caches share: which there are, models and texts for them, and how two of them are compared.

A cache that is exact only up to some length (a recent window in full precision, say) gets options here with which the
short texts of these tests fit. What compares a cache with itself is also tested where it does lose something.
"""

import pytest
import torch

from lckv.cache import CACHES, build_cache
from lckv.sharing.layout import Store, Stream
from tests.reference import tiny_model, token_ids

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


def plain_store(window=None, num_heads=2, head_dim=8):
    """What an owner of keys and values keeps."""
    return Store(
        0, (Stream("keys", num_heads, head_dim, is_rotated=True), Stream("values", num_heads, head_dim)), window
    )


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(params=list(VARIANTS))
def name(request):
    """A key of `VARIANTS`, or, for tests that ask for that, of `LOSSY`."""
    return request.param


def in_patterns(patterns, per_name=2, names=tuple(VARIANTS), first=0):
    """Each cache in `per_name` of the patterns, and each pattern with some of the caches: not all pairs, for time.

    Args:
        patterns: `layer_types` strings; those that are alike stand side by side.
        per_name: how many a cache gets, spread over the list.
        names: keys of `VARIANTS` and `LOSSY`.
        first: where the first cache begins, so that tests differ in their pairs.
    """
    stride = len(patterns) / per_name
    pairs = [
        (name, patterns[int(first + start + number * stride) % len(patterns)])
        for start, name in enumerate(names)
        for number in range(per_name)
    ]
    assert {layer_types for _, layer_types in pairs} == set(patterns)
    return pytest.mark.parametrize(("name", "layer_types"), pairs, indirect=["name"])


with_lossy = pytest.mark.parametrize("name", [*VARIANTS, *LOSSY], indirect=True)


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


def check_continuation_is_lossy(model, cache, rows):
    """The text is long enough for something to be rounded or dropped, or tests of that would say nothing."""
    tokens = token_ids(len(rows), 2, seed=5)
    expected = model(torch.cat([rows, tokens], dim=1), use_cache=False).logits[:, -2:]
    assert (feed(model, cache, tokens) - expected).abs().max() > 1e-4
