"""Every cache keeps any streams: of unequal widths and heads, of any number, read together from several owners."""

import pytest
import torch

from lckv.cache import QuantizedKVCache, QuantizedPagedKVCache, SinkKVCache, load_cache, save_cache
from lckv.cache.sink import KeyRotation
from lckv.errors import UserError
from tests.contract.caches import LOSSY, VARIANTS, live_bytes, new_cache, with_lossy
from tests.layouts import CASES
from tests.reference import tiny_config

pytestmark = pytest.mark.usefixtures("no_grad")


class Model:
    """Stands for a model: hands a cache random streams, and compares what it returns with a list of all tokens."""

    def __init__(self, name, case, num_rows=3):
        self.config = tiny_config(*CASES[case])
        self.layout = self.config.kv_layout
        self.cache = new_cache(name, self)
        self.generator = torch.Generator().manual_seed(0)
        self.tokens = {
            store.owner: [torch.zeros(num_rows, s.num_heads, 0, s.head_dim) for s in store.streams]
            for store in self.layout.stores
        }
        is_rounded = name in LOSSY and isinstance(self.cache, QuantizedKVCache | QuantizedPagedKVCache)
        self.tolerance = {"atol": 0.05 if is_rounded else 0.0 if "sink" not in name else 1e-5, "rtol": 0.0}

    @property
    def length(self):
        return self.tokens[self.layout.owners[0]][0].shape[2]

    def draw(self, states, num_new):
        return torch.randn(*states.shape[:2], num_new, states.shape[3], generator=self.generator)

    def step(self, num_new):
        """One forward call: `peek`, then `write` of every owner; then every layer reads."""
        cache = self.cache
        cache.begin_forward(self.config, None, num_new)
        cache.begin_positions(are_given=True)
        if cache.needs_single_tokens(num_new):
            for _ in range(num_new):
                self.step(1)
            return
        seen, positions = {}, {owner: self.positions(owner, num_new) for owner in self.tokens}
        for owner, tokens in self.tokens.items():
            new = tuple(self.draw(states, num_new) for states in tokens)
            peeked = cache.peek(new, owner)
            peeked = [states.clone() for states in peeked]
            seen[owner] = cache.write(new, owner)
            self.tokens[owner] = [torch.cat(pair, dim=2) for pair in zip(tokens, new, strict=True)]
            for both in zip(peeked, seen[owner], strict=True):
                assert torch.equal(*(states[:, :, positions[owner] >= 0] for states in both))
        for layer_idx in range(self.config.num_hidden_layers):
            self.check_reader(layer_idx, num_new, seen, positions)

    def positions(self, owner, num_new):
        """Which tokens are about to be returned, `(kv_len,)`; negative where there is none."""
        places = self.cache.get_key_positions(num_new, owner)
        if places is None:
            num_keys, offset = self.cache.get_mask_sizes(num_new, owner)
            places = torch.arange(offset, offset + num_keys)[None]
        return torch.where(places[0] < self.length + num_new, places[0], -1)

    def check_reader(self, layer_idx, num_new, seen, positions):
        """Compares what a layer reads, stream by stream, and finds all that its queries see among it."""
        sources, is_sliding = self.layout.sources[layer_idx], self.config.sharing_plan.layers[layer_idx].is_sliding
        places = positions[sources[0].owner]
        assert all(torch.equal(places, positions[source.owner]) for source in sources)
        given = [seen[source.owner][source.index][:, :, places >= 0] for source in sources]
        places = places[places >= 0]
        for source, actual in zip(sources, given, strict=True):
            torch.testing.assert_close(actual, self.expected(source, places), **self.tolerance)
        queries = torch.arange(self.length - num_new, self.length)[:, None]
        is_visible = places <= queries
        if is_sliding:
            is_visible &= places > queries - self.config.sliding_window
        if not isinstance(self.cache, SinkKVCache):  # nothing that a query sees is missing
            most = self.config.sliding_window if is_sliding else self.length
            assert torch.equal(is_visible.sum(dim=1), (queries[:, 0] + 1).clamp(max=most))

    def expected(self, source, places):
        """The tokens at these places; sinks are rotated so that they lie right before the window."""
        states = self.tokens[source.owner][source.index][:, :, places]
        num_dropped = self.length - getattr(self.cache.owners()[source.owner], "capacity", self.length)
        if num_dropped <= 0 or not self.layout.store(source.owner).streams[source.index].is_rotated:
            return states
        moved = KeyRotation(self.config)(states, [num_dropped])
        is_sink = (places < self.cache.num_sinks)[:, None]
        return torch.where(is_sink, moved, states)

    def change_rows(self, indices):
        self.tokens = {owner: [states[indices] for states in tokens] for owner, tokens in self.tokens.items()}

    def crop(self, num_removed):
        self.cache.crop(-num_removed)
        left = self.length - num_removed
        self.tokens = {owner: [states[:, :, :left] for states in tokens] for owner, tokens in self.tokens.items()}

    def check_bytes(self):
        num_bytes, num_rows = self.cache.num_bytes(), len(self.tokens[self.layout.owners[0]][0])
        assert num_bytes == live_bytes(self.cache)
        assert num_bytes == self.cache.planned_bytes(self.length, num_rows, torch.float32)


with_cases = pytest.mark.parametrize("case", CASES)


@with_lossy
@with_cases
def test_every_token_comes_back_as_it_was(name, case, tmp_path):
    model = Model(name, case)
    for num_new in (5, 1, 1, 3, 1):
        model.step(num_new)
        model.check_bytes()
    save_cache(model.cache, tmp_path / "cache.safetensors")
    fork = model.cache.fork()
    fork.reset()
    model.step(2)
    model.cache = load_cache(tmp_path / "cache.safetensors", model.config)
    model.tokens = {owner: [states[:, :, :-2] for states in tokens] for owner, tokens in model.tokens.items()}
    model.check_bytes()
    for num_new in (1, 1, 6, 1):
        model.step(num_new)
    model.check_bytes()


@with_lossy
@with_cases
def test_rows_move_with_all_their_streams(name, case):
    model = Model(name, case)
    model.step(7)
    model.step(1)
    for change, indices in (
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([5, 1])), [5, 1]),
    ):
        change(model.cache)
        model.change_rows(indices)
        for num_new in (1, 2, 1):
            model.step(num_new)
    assert model.cache.num_bytes() == live_bytes(model.cache) and model.cache.batch_size == 2


@with_lossy
@with_cases
def test_tokens_are_taken_back_from_all_streams(name, case):
    model = Model(name, case)
    if not model.cache.is_croppable:
        return
    model.step(9)
    model.cache.activate_past_recording()
    for num_removed in (2, 4):
        model.step(1)
        model.step(5 if name not in LOSSY else 2)
        model.crop(num_removed if name not in LOSSY else 2)
        assert model.cache.num_bytes() == live_bytes(model.cache)
    model.step(1)


@with_cases
def test_offloading_moves_all_streams(name, case):
    model = Model(name, case)
    model.step(4)
    for layer_idx, layer in enumerate(model.cache.layers):
        model.cache.offload(layer_idx, only_non_sliding=False)
        layer.prefetch()
    model.step(1)


@pytest.mark.parametrize("name", list(VARIANTS), indirect=True)
def test_a_model_with_other_streams_is_refused(name, tmp_path):
    model, plain = Model(name, "latent"), tiny_config(CASES["latent"][0])
    model.cache.begin_forward(tiny_config(*CASES["latent"]), None, 3)  # another object, but equal
    model.step(3)
    save_cache(model.cache, tmp_path / "cache.safetensors")
    message = "1 head of 96 latent in layers 0, 1.*2 heads of 8 rotated keys and 2 heads of 8 values in layers 0, 1"
    with pytest.raises(UserError, match=f"a cache for {message}: allowed is a cache made from the model's own"):
        model.cache.begin_forward(plain, None, 1)
    with pytest.raises(UserError, match=f"holds a cache for {message}"):
        load_cache(tmp_path / "cache.safetensors", plain)
