"""The paged cache beyond what every cache keeps to: sequences of different lengths, shared pages, fixed pools."""

import pytest
import torch

from lckv.cache import PagedKVCache, load_cache, save_cache
from lckv.cache.paged.pages import OutOfPagesError, PageAllocator
from lckv.errors import UserError
from tests.contract.caches import MIXED, assert_close, exact_model
from tests.reference import PATTERNS, exact_logits, tiny_model, token_ids

pytestmark = pytest.mark.usefixtures("no_grad")


class Texts:
    """Named sequences with their tokens, fed through the model a few at a time."""

    def __init__(self, model, **options):
        self.model, self.cache, self.tokens = model, PagedKVCache(model.config, **options), {}
        self.seed = 0

    def feed(self, **num_new):
        """Runs new random tokens of each sequence in one call; returns each one's logits."""
        new = {}
        for name, count in num_new.items():
            self.seed += 1
            new[name] = token_ids(1, count, seed=self.seed)[0].tolist()
            if name not in self.cache:
                self.cache.add(name)
                self.tokens[name] = []
        mask, positions = self.cache.select(list(new), [len(tokens) for tokens in new.values()])
        width = max(map(len, new.values()))
        input_ids = torch.tensor([[0] * (width - len(tokens)) + tokens for tokens in new.values()])
        logits = self.model(input_ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache).logits
        for name, tokens in new.items():
            self.tokens[name] += tokens
        return {name: row[width - len(new[name]) :] for name, row in zip(new, logits, strict=True)}

    def check(self, reference=None, **num_new):
        """The same, and compares with each sequence alone."""
        reference = reference or (lambda model, tokens: model(tokens[None], use_cache=False).logits[0])
        for name, logits in self.feed(**num_new).items():
            expected = reference(self.model, torch.tensor(self.tokens[name]))
            assert_close(logits, expected[len(self.tokens[name]) - num_new[name] :])


@pytest.mark.parametrize(
    ("layer_types", "page_size"),
    [(name, 4) for name in PATTERNS[::2]] + list(zip(MIXED, (1, 16, 16, 1), strict=True)),
)
def test_sequences_of_different_lengths_run_together(layer_types, page_size):
    texts = Texts(exact_model(layer_types), page_size=page_size)
    texts.check(a=9)
    texts.check(b=2, c=5)
    texts.check(a=1, b=1, c=1)
    texts.check(c=1, a=1)
    texts.check(b=4, a=1, d=6)  # a decoding row beside pieces of prompts
    texts.check(exact_logits, d=1, c=3, b=3)
    texts.cache.remove("a")
    texts.check(b=1, c=1, d=1)


def test_eager_attention():
    texts = Texts(exact_model("0_2s_2_2s", attn_implementation="eager"), page_size=4)
    texts.check(a=5)
    texts.check(b=2, a=4)
    texts.check(a=1, b=1)


def test_sequential_models_run_rows_of_equal_steps():
    texts = Texts(exact_model("0_3_3_3_4", use_sequential=True), page_size=4)
    texts.check(a=5)
    texts.check(b=3)
    texts.check(a=2, b=2)
    with pytest.raises(ValueError, match="select\\(\\) announced"):
        texts.feed(a=3, b=1)


@pytest.mark.parametrize("layer_types", MIXED)
def test_forked_sequences_share_pages_until_they_write(layer_types):
    texts = Texts(exact_model(layer_types), page_size=4)
    texts.check(a=10)
    pool = texts.cache.owners()[2 if layer_types == "0s_1s_2_2" else 0].group.allocator
    before = texts.cache.num_used_pages()
    texts.cache.fork_sequence("a", "b")
    texts.tokens["b"] = list(texts.tokens["a"])
    assert texts.cache.num_used_pages() == before
    assert pool.num_used == 3
    texts.check(a=1, b=1)
    assert pool.num_used == 4  # a copy of the last page
    texts.check(b=5)
    texts.check(a=2, b=1)
    texts.cache.remove("a")
    texts.check(b=3)
    texts.cache.remove("b")
    assert texts.cache.num_used_pages() == texts.cache.num_used_bytes() == 0


@pytest.mark.parametrize("layer_types", ["0_0_2_2", "0s_1s_2_2", "2_1_2_1", "0_2s_2_2s"])
def test_an_equal_beginning_is_computed_once(layer_types):
    model = exact_model(layer_types)
    texts = Texts(model, page_size=4)
    for count in (4, 4, 3):
        texts.check(a=count)
        prompt = texts.tokens["a"]
        texts.cache.record_tokens("a", prompt)
    used = texts.cache.owners()[2].group.allocator.num_used
    assert texts.cache.add("b", [*prompt[:8], 5, 6]) == 8
    assert texts.cache.owners()[2].group.allocator.num_used == used
    texts.tokens["b"] = prompt[:8]
    texts.check(b=3, a=1)
    assert texts.cache.add("c", [*prompt[:7], 60, 5, 6]) == (0 if layer_types == "0s_1s_2_2" else 4)
    texts.cache.remove("a")
    texts.cache.remove("b")
    if layer_types == "0s_1s_2_2":
        return  # what the window passed has been taken by others
    assert texts.cache.add("d", prompt[:9]) == 8  # nobody has taken the pages yet
    texts.tokens["d"] = prompt[:8]
    texts.check(d=2)
    assert texts.cache.add("e", prompt[:8]) in (0, 4)  # one token is left to compute


@pytest.mark.parametrize("layer_types", ["0_0_2_2", "0s_1s_2_2", "0s_0s_2s_2s"])
def test_looking_for_a_beginning_takes_time_in_proportion_to_the_prompt(layer_types, monkeypatch):
    cache = PagedKVCache(tiny_model(layer_types).config, page_size=2)
    num_asked, find = 0, PageAllocator.find

    def counted(allocator, key):
        nonlocal num_asked
        num_asked += 1
        return find(allocator, key)

    monkeypatch.setattr(PageAllocator, "find", counted)
    assert cache.add("a", list(range(3, 403))) == 0
    assert 0 < num_asked <= 2 * 200


def test_pages_change_hands_and_are_not_found_by_their_old_hash():
    texts = Texts(exact_model("0_0_2_2"), page_size=4, num_pages=3)
    texts.check(a=12)
    first = texts.tokens["a"]
    texts.cache.record_tokens("a", first)
    texts.cache.remove("a")
    texts.check(b=12)
    assert texts.cache.add("c", [*first, 1]) == 0


@pytest.mark.parametrize("layer_types", ["0_0_2_2", "0s_1s_2_2"])
def test_running_out_of_pages_names_the_sequence_and_harms_nobody(layer_types):
    texts = Texts(exact_model(layer_types), page_size=4, num_pages=6)
    texts.check(a=9, b=7)
    used, length = texts.cache.num_used_pages(), texts.cache.length("b")
    with pytest.raises(OutOfPagesError) as raised:
        texts.feed(a=2, b=8)
    message = str(raised.value)
    assert isinstance(raised.value, UserError) and "\n" not in message
    assert "sequence 'b' has 7 tokens and takes 8 more" in message
    assert "2 new pages of 4 tokens" in message and "num_pages=6 there are 1 free" in message
    assert texts.cache.num_used_pages() == used and texts.cache.length("b") == length
    texts.check(a=1, b=1)
    texts.check(b=3)
    with pytest.raises(OutOfPagesError, match="'c' has 0 tokens"):
        texts.feed(a=1, b=1, c=5)
    texts.check(a=1)
    texts.cache.remove("a")
    texts.check(b=1, c=4)
    num_bytes = texts.cache.num_bytes()
    assert num_bytes == 6 * 4 * 2 * 2 * 8 * 4 * len(texts.cache.owners()) > texts.cache.num_used_bytes()


def test_rows_of_a_batch_run_out_too():
    model = exact_model("0_0_2_2")
    cache = PagedKVCache(model.config, page_size=4, num_pages=4)
    with pytest.raises(OutOfPagesError, match="row 1 has 0 tokens and takes 9 more.*needs 6 new pages"):
        model(token_ids(2, 9), past_key_values=cache)
    assert cache.num_used_pages() == 0
    model(token_ids(2, 8), past_key_values=cache)
    with pytest.raises(OutOfPagesError, match="row 0 has 8 tokens and takes 1 more"):
        model.generate(token_ids(2, 9), past_key_values=cache, max_new_tokens=2, pad_token_id=0)


@pytest.mark.parametrize("layer_types", MIXED)
def test_a_call_that_breaks_off_does_not_count(layer_types):
    texts = Texts(exact_model(layer_types), page_size=4)
    texts.check(a=9, b=4)
    used = texts.cache.num_used_pages()
    top_owner = texts.model.model.layers[texts.model.config.sharing_plan.kv_owners[-1]]

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = top_owner.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        texts.feed(a=5, b=1)
    hook.remove()
    assert texts.cache.length("a") == 9 and texts.cache.length("b") == 4
    texts.check(b=2, a=1)
    texts.cache.remove("a")
    texts.cache.remove("b")
    assert texts.cache.num_used_pages() == 0 < used


def test_windows_give_pages_back():
    model = exact_model("0s_1s_2_2", sliding_window=5)
    texts = Texts(model, page_size=2)
    texts.feed(a=40)
    owners = texts.cache.owners()
    windowed, full = owners[0].group.allocator, owners[2].group.allocator
    assert owners[0].group is owners[1].group and windowed.num_used == 3 and full.num_used == 20
    for _ in range(6):
        texts.check(a=1)
        assert windowed.num_used == 3
    assert windowed.capacity == 4 and owners[0].keys.shape == (4, 2, 2, 8)


def test_nan_of_one_sequence_stays_with_it():
    texts = Texts(exact_model("0_2s_2_2s"), page_size=2, num_pages=8)
    texts.feed(bad=6)
    for owner in texts.cache.owners().values():
        owner.keys.fill_(float("nan"))
        owner.values.fill_(float("nan"))
    texts.check(good=3)
    logits = texts.feed(bad=1, good=1)
    assert logits["bad"].isnan().all() and not logits["good"].isnan().any()
    texts.cache.remove("bad")
    texts.check(other=7, good=1)
    texts.check(other=1, good=2)


def test_padding_takes_no_pages():
    model = exact_model("0_0_2_2")
    cache, mask = PagedKVCache(model.config, page_size=4), torch.ones(2, 16, dtype=torch.long)
    mask[1, :14] = 0
    model(token_ids(2, 16), attention_mask=mask, past_key_values=cache)
    assert cache.num_used_pages() == (4 + 1) * 2
    with pytest.raises(ValueError, match="attention_mask"):
        model(token_ids(2, 1), past_key_values=cache)


def test_named_sequences_are_saved_and_restored(tmp_path):
    texts = Texts(exact_model("0s_1s_2_2"), page_size=4)
    texts.check(a=9, b=4)
    texts.cache.fork_sequence("a", "c")
    texts.tokens["c"] = list(texts.tokens["a"])
    save_cache(texts.cache, tmp_path / "cache.safetensors")
    used = texts.cache.num_used_pages()
    texts.cache = load_cache(tmp_path / "cache.safetensors", texts.model.config)
    assert texts.cache.num_used_pages() == used
    texts.check(a=1, b=2, c=1)


def test_gathering_reads_what_a_loop_over_tokens_reads():
    texts = Texts(exact_model("0_0_2_2"), page_size=4)
    texts.feed(a=11)
    texts.feed(b=6)
    layer = texts.cache.owners()[0]
    rows = [texts.cache.named[name] for name in "ab"]
    texts.cache.select(["a", "b"])
    new = torch.randn(2, 2, 1, 8)
    keys, _ = layer.peek((new, new))
    for row, sequence in enumerate(rows):
        for position in range(sequence.length):
            page = sequence.tables[None].pages[position // 4]
            column = keys.shape[2] - 1 - sequence.length + position
            assert torch.equal(keys[row, :, column], layer.keys[page, :, position % 4])
    assert torch.equal(keys[:, :, -1:], new)


def test_wrong_use_is_refused():
    config = exact_model("0_0_2_2").config
    for option in ("page_size", "num_pages"):
        for value in (0, -1, 1.5, True):
            with pytest.raises(UserError, match=f"cache.{option}={value}: allowed is a whole number, 1 or more"):
                PagedKVCache(config, **{option: value})
    cache = PagedKVCache(config)
    cache.add("a")
    with pytest.raises(ValueError, match="second sequence called 'a'"):
        cache.add("a")
    with pytest.raises(ValueError, match="second sequence called 'a'"):
        cache.fork_sequence("a", "a")
    for wrong in (None, ("a", 1), 1.5, True):  # a file gives them back as something else, or as a row of a batch
        with pytest.raises(UserError, match="allowed are text and whole numbers"):
            cache.add(wrong)
        with pytest.raises(UserError, match="allowed are text and whole numbers"):
            cache.fork_sequence("a", wrong)
    with pytest.raises(KeyError, match="no sequence called 'b'"):
        cache.remove("b")
    with pytest.raises(ValueError, match="each once"):
        cache.select(["a", "a"])
    with pytest.raises(ValueError, match="select"):
        exact_model("0_0_2_2")(token_ids(1, 2), attention_mask=torch.ones(1, 2), past_key_values=cache)
    batch = PagedKVCache(config)
    exact_model("0_0_2_2")(token_ids(1, 2), past_key_values=batch)
    with pytest.raises(ValueError, match="reset"):
        batch.add("a")
    with pytest.raises(ValueError, match="a batch of 2 rows"):
        exact_model("0_0_2_2")(token_ids(2, 2), past_key_values=batch)
    states = torch.zeros(1, 2, 1, 8)
    batch.update(states, states, 0)
    with pytest.raises(RuntimeError, match="again before all layers"):
        batch.update(states, states, 0)
    for refused in (lambda layer: layer.crop(0), lambda layer: layer.batch_repeat_interleave(2)):
        with pytest.raises(RuntimeError, match="share their block tables"):
            refused(batch.owners()[0])
