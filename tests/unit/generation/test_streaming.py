"""Endless text: the same tokens as `generate`, in constant memory, and safe to interrupt."""

import gc
import io
import itertools
import os
import signal
import threading
import types

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lckv.cache import DynamicKVCache
from lckv.cache.sink import SinkKVCache
from lckv.errors import UserError
from lckv.generation.streaming import Printer, Sampling, TextPieces, score_stream, stream, stream_text
from tests.reference import tiny_model, token_ids

PATTERN = "0s_3_3_3_4"
GREEDY = Sampling(greedy=True)


@pytest.fixture
def model():
    model = tiny_model(PATTERN, forward_passes="converge", converge_tolerance=1e-9)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model


@pytest.fixture
def cache(model):
    return SinkKVCache(model.config, num_sinks=2, window=5)


@pytest.fixture
def tokenizer():
    """One token for each byte, and a mark at the end of documents."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<end>": 0} | {symbol: index for index, symbol in enumerate(alphabet, start=1)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


def generate(model, prompt, max_new_tokens, **options):
    cache = SinkKVCache(model.config, num_sinks=2, window=5)
    tokens = model.generate(prompt, past_key_values=cache, max_new_tokens=max_new_tokens, **options)
    return tokens[0, prompt.shape[1] :].tolist()


# --- tokens --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt_length", [1, 8, 19])
def test_it_goes_on_as_generate_does(model, cache, prompt_length):
    prompt = token_ids(1, prompt_length)
    streamed = list(stream(model, prompt, cache, sampling=GREEDY, max_new_tokens=30))
    assert streamed == generate(model, prompt, 30, do_sample=False)
    assert cache.get_seq_length() == prompt_length + 29  # the last token has not been read


def test_it_goes_on_where_the_cache_ends(model, cache):
    prompt = token_ids(1, 5)
    expected = generate(model, prompt, 25, do_sample=False)
    first = list(stream(model, prompt[0], cache, sampling=GREEDY, max_new_tokens=11))
    second = list(stream(model, torch.tensor(first[-1:]), cache, sampling=GREEDY, max_new_tokens=14))
    assert first + second == expected


def test_the_prompt_in_chunks(model, cache):
    prompt = token_ids(1, 19)
    tokens = stream(model, prompt, cache, sampling=GREEDY, max_new_tokens=10, chunk_size=2, forward_passes=7)
    assert list(tokens) == generate(model, prompt, 10, do_sample=False)


def test_without_a_limit_it_does_not_end(model, cache):
    tokens = stream(model, token_ids(1, 3), cache, sampling=Sampling(seed=1))
    assert len(list(itertools.islice(tokens, 200))) == 200
    assert cache.get_next_position() < 30


def test_stop_tokens(model, cache):
    prompt = token_ids(1, 5)
    expected = generate(model, prompt, 30, do_sample=False)
    stop = expected[12]
    tokens = stream(model, prompt, cache, sampling=GREEDY, max_new_tokens=30, stop_ids=[stop])
    assert list(tokens) == expected[: expected.index(stop)]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"top_k": 3},
        {"top_p": 0.6},
        {"repetition_penalty": 1.7},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2},
    ],
)
def test_sampling_is_that_of_generate(model, cache, options):
    prompt = token_ids(1, 6)
    torch.manual_seed(3)
    expected = generate(model, prompt, 30, do_sample=True, **({"top_k": 0} | options))
    torch.manual_seed(3)
    assert (
        list(stream(model, prompt, cache, sampling=Sampling(greedy=False, **options), max_new_tokens=30)) == expected
    )


def test_seeds(model):
    def run(seed):
        cache = SinkKVCache(model.config, num_sinks=2, window=5)
        return list(stream(model, token_ids(1, 3), cache, sampling=Sampling(seed=seed), max_new_tokens=20))

    assert run(1) == run(1) != run(2)


def test_the_penalty_looks_back_on_the_last_tokens_only(model, cache):
    """With a penalty that forbids repetition, each token differs from as many before it as are remembered."""
    sampling = Sampling(greedy=True, repetition_penalty=1e6)
    prompt = token_ids(1, 9)
    tokens = prompt[0].tolist() + list(stream(model, prompt, cache, sampling=sampling, history=6, max_new_tokens=80))
    for index in range(9, len(tokens)):
        assert tokens[index] not in tokens[index - 6 : index]
    assert len(set(tokens[9:])) < 80  # but tokens do come back


# --- memory --------------------------------------------------------------------------------------------------------


def held_by(root, *outside):
    """How many objects, and bytes of tensors, can be reached from `root` without going through `outside`."""
    seen, todo, num_bytes = {id(each) for each in outside}, [root], 0
    start = len(seen)
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, type | types.ModuleType | types.FunctionType):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            num_bytes += item.untyped_storage().nbytes()
        todo += gc.get_referents(item)
    return len(seen) - start, num_bytes


def test_nothing_grows(tokenizer):
    model = tiny_model("0_1s_1", vocab_size=257)
    cache = SinkKVCache(model.config, num_sinks=2, window=5)
    sampling = Sampling(seed=0, repetition_penalty=1.1)
    pieces = stream_text(model, tokenizer, "ab", cache, sampling=sampling, history=20)
    sizes = []
    for _ in range(4):
        for _ in itertools.islice(pieces, 60):
            pass
        num_objects, num_bytes = held_by(pieces, model, model.config, tokenizer, cache.plan, cache.layout)
        sizes.append((num_bytes, cache.num_bytes()))
        assert 50 < num_objects < 120
    assert len(set(sizes)) == 1


def test_the_model_sees_single_tokens_without_masks_and_positions(model, cache):
    calls = []

    def note(module, arguments, options):
        calls.append((arguments[0].shape[1], options))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    list(stream(model, token_ids(1, 9), cache, sampling=GREEDY, max_new_tokens=5))
    handle.remove()
    assert [num_tokens for num_tokens, _ in calls] == [7, 1, 1, 1, 1, 1, 1]
    assert not any({"attention_mask", "position_ids"} & set(options) for _, options in calls)


# --- text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["plain words, one after the other", "Grüße, 世界 🌍! 👩‍👩‍👧", " lead", "naïve — café\n\n"]
)
def test_pieces_make_up_the_text(tokenizer, text):
    pieces = TextPieces(tokenizer)
    out = [pieces.push(token) for token in tokenizer(text)["input_ids"]]
    assert "".join(out) + pieces.flush() == text
    assert not any("\ufffd" in piece for piece in out)
    assert pieces.flush() == ""


def test_bytes_that_make_no_character_come_out_in_the_end(tokenizer):
    broken = tokenizer("世")["input_ids"][:2]
    pieces = TextPieces(tokenizer)
    assert [pieces.push(token) for token in broken] == ["", ""]
    assert pieces.flush() == "\ufffd"
    pieces, (stray,) = TextPieces(tokenizer), tokenizer("é")["input_ids"][1:]
    out = [pieces.push(stray) for _ in range(100)]
    assert "".join(out) + pieces.flush() == "\ufffd" * 100
    assert len(pieces._context) + len(pieces._pending) <= TextPieces.num_context + TextPieces.max_pending


def test_special_tokens_are_left_out_unless_wanted(tokenizer):
    token_ids = [*tokenizer("one ")["input_ids"], 0, *tokenizer("two")["input_ids"]]
    for skip, expected in ((True, "one two"), (False, "one <end>two")):
        pieces = TextPieces(tokenizer, skip_special_tokens=skip)
        assert "".join(pieces.push(token) for token in token_ids) == expected


def test_text_is_that_of_the_tokens(tokenizer):
    model = tiny_model("0_0", vocab_size=257)
    caches = [SinkKVCache(model.config, num_sinks=2, window=5) for _ in range(2)]
    options = {"sampling": Sampling(seed=4), "max_new_tokens": 60}
    pieces = list(stream_text(model, tokenizer, "prompt", caches[0], **options))
    tokens = list(stream(model, torch.tensor(tokenizer("prompt")["input_ids"]), caches[1], **options))
    assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True)
    assert len(pieces) > 10 and all(pieces)


# --- scores --------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_one_forward_pass(model):
    input_ids = token_ids(3, 20)
    with torch.no_grad():
        logits = model(input_ids, use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), input_ids[:, 1:], reduction="none")
    scores = torch.stack(list(score_stream(model, input_ids, DynamicKVCache(model.config))), dim=1)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)


def test_scores_of_text_without_an_end(model, cache):
    scores = score_stream(model, itertools.cycle([5, 9, 30]), cache)
    values = [float(score) for score in itertools.islice(scores, 100)]
    assert len(values) == 100 and cache.get_seq_length() == 100
    other = SinkKVCache(model.config, num_sinks=2, window=5)
    again = score_stream(model, torch.tensor([5, 9, 30] * 34), other)
    torch.testing.assert_close(values, [float(score) for score in itertools.islice(again, 100)])


# --- interruption --------------------------------------------------------------------------------------------------


def interrupt_in_forward(model, at_call):
    """Sends SIGINT while the second of the layers runs."""
    calls = itertools.count()

    def send(module, *_):
        if next(calls) == at_call:
            os.kill(os.getpid(), signal.SIGINT)

    return model.model.layers[1].register_forward_hook(send)


def test_ctrl_c_takes_effect_between_tokens(model, cache):
    handler = signal.getsignal(signal.SIGINT)
    handle, seen = interrupt_in_forward(model, at_call=40), []
    with pytest.raises(KeyboardInterrupt):
        for token in stream(model, token_ids(1, 1), cache, sampling=GREEDY):
            seen.append(token)
    handle.remove()
    assert signal.getsignal(signal.SIGINT) is handler
    assert {layer.get_seq_length() for layer in cache.owners().values()} == {1 + len(seen)}
    expected = generate(model, token_ids(1, 1), len(seen) + 5, do_sample=False)
    assert seen == expected[: len(seen)]


def test_other_handlers_get_the_signal_too(model, cache):
    received = []
    previous = signal.signal(signal.SIGINT, lambda *_: received.append(cache.get_seq_length()))
    try:
        handle = interrupt_in_forward(model, at_call=3)
        list(stream(model, token_ids(1, 1), cache, sampling=GREEDY, max_new_tokens=6))
        handle.remove()
    finally:
        signal.signal(signal.SIGINT, previous)
    assert received == [4]


def test_in_another_thread(model, cache):
    results = []
    thread = threading.Thread(
        target=lambda: results.append(list(stream(model, token_ids(1, 3), cache, sampling=GREEDY, max_new_tokens=5)))
    )
    thread.start()
    thread.join()
    assert results == [generate(model, token_ids(1, 3), 5, do_sample=False)]


# --- wrong use -----------------------------------------------------------------------------------------------------


def test_an_empty_prompt_is_refused(model, cache, tokenizer):
    with pytest.raises(UserError, match="the prompt is empty"):
        stream(model, torch.zeros(1, 0, dtype=torch.long), cache)
    with pytest.raises(UserError, match="the prompt is empty"):
        stream_text(model, tokenizer, "", cache)


def test_several_texts_at_once_are_refused(model, cache):
    with pytest.raises(ValueError, match="2 texts at once: allowed is one"):
        stream(model, token_ids(2, 3), cache)


def test_a_cache_that_grows_is_no_place_for_endless_text(model):
    with pytest.raises(UserError, match="endless text with cache=dynamic: .*allowed is cache=sink"):
        stream(model, token_ids(1, 3), DynamicKVCache(model.config))
    windowed = tiny_model("0s_1s")
    tokens = stream(windowed, token_ids(1, 3), DynamicKVCache(windowed.config))
    assert len(list(itertools.islice(tokens, 9))) == 9


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named(model, cache, value):
    with torch.no_grad():
        model.lm_head.weight[7] = value
    with pytest.raises(UserError, match="logits are not finite"):
        next(stream(model, token_ids(1, 3), cache))


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.0}, {"top_k": 0}, {"top_p": 1.5}, {"repetition_penalty": -1.0}, {"top_p": 0.0}],
)
def test_sampling_out_of_range_is_refused(options):
    with pytest.raises(UserError, match=f"{next(iter(options))}=.*: allowed is "):
        Sampling(**options)


def test_a_history_of_nothing_is_refused(model, cache):
    with pytest.raises(UserError, match="history=0: allowed is a whole number, 1 or more"):
        stream(model, token_ids(1, 3), cache, sampling=GREEDY, history=0)


def test_the_space_before_the_first_word_is_kept():
    """Llama 2's decoder strips it from whatever it decodes."""
    vocab = {"<unk>": 0, "<eos>": 1, "\u2581in": 2, "\u2581the": 3, "ory": 4}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", left=1, right=0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    assert tokenizer.decode([3]) == "the"
    assert TextPieces(tokenizer, prompt=[2]).all_of([3, 4]) == " theory"
    file = io.StringIO()
    printer = Printer(tokenizer, file)
    for tokens in ([2], [3], [4]):
        printer.put(torch.tensor(tokens))
    printer.end()
    assert file.getvalue() == " theory\n"


@pytest.mark.parametrize(
    ("prompt", "text"), [("", "世界" * 8), ("a", "世界" * 8 + " a"), ("世界" * 8, " a 世"), ("a ", " a世")]
)
def test_a_piece_does_not_depend_on_half_of_a_character_before_it(prompt, text):
    """The decoders of Llama 2 and Mistral take a run of bytes for broken as a whole if any byte of it is."""
    vocab = {token: index for index, token in enumerate(["\u2581", "a", *(f"<0x{byte:02X}>" for byte in range(256))])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    before, after = (tokenizer(part)["input_ids"] for part in (prompt, prompt + text))
    assert TextPieces(tokenizer, prompt=before).all_of(after[len(before) :]) == text
