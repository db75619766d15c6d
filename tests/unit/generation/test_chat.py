"""Conversations: what stays in the cache, and that answers are those of a conversation from scratch."""

import signal

import pytest
import torch

from lckv.cache import build_cache
from lckv.config import SFTConfig
from lckv.data.chat_templates import render_chat
from lckv.data.chat_tokens import build_encoder
from lckv.errors import UserError
from lckv.generation.batch import PrefillOptions, generate
from lckv.generation.chat import CUT, FULL, INTERRUPTED, STOPPED, ChatSession, ContextFull
from lckv.generation.decoding_options import DecodingOptions, Sampling
from lckv.generation.streaming import TextPieces
from tests.layouts import KINDS, layout_model
from tests.reference import tiny_model
from tests.tiny import byte_tokenizer, letter_tokenizer

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MARKING = TEMPLATE.replace("{{ m.content }}", "{{ '!' if m.role == 'assistant' }}{{ m.content }}")
MESSAGES = ["Who are you?", "And why is that, then?", "Go on."]


def chat_model(layer_types="0_3_3_3_4", *, tokenizer=None, kind=None, **config):
    """A model that answers in the tokenizer's tokens; decoding and prefill agree, whatever the chunks."""
    settings = dict(
        vocab_size=97 if tokenizer is None else len(tokenizer),
        forward_passes="converge",
        converge_tolerance=1e-9,
        bos_token_id=None,
        eos_token_id=96 if tokenizer is None else tokenizer.eos_token_id,
        max_position_embeddings=512,
    )
    settings |= config
    model = tiny_model(layer_types, **settings) if kind is None else layout_model(kind, layer_types, **settings)
    model.generation_config.eos_token_id = settings["eos_token_id"]
    return model.eval()


def make_session(model, tokenizer=None, **options):
    tokenizer = tokenizer or letter_tokenizer(chat_template=TEMPLATE)
    settings = dict(sampling=Sampling(greedy=True), max_new_tokens=12) | options
    return ChatSession(model, tokenizer, **settings)


def from_scratch(session, messages, cache=None, **options):
    """What `generate` makes of a conversation, with a cache that is new."""
    text = render_chat(session.tokenizer, messages, add_generation_prompt=True)
    prompt = session.tokenizer(text, add_special_tokens=False)["input_ids"]
    cache = cache or build_cache(session.cache_name, session.model.config, **session.cache_options)
    decoding = DecodingOptions(**vars(session.sampling))
    tokens = generate(session.model, [prompt], cache, decoding, session.max_new_tokens, **options).new_tokens[0]
    return TextPieces(session.tokenizer, prompt=prompt).all_of(tokens)


def talk(session, texts=MESSAGES, **options):
    """Has every message answered, and compares each answer with one from scratch."""
    turns = []
    for text in texts:
        expected = from_scratch(session, [*session.messages, {"role": "user", "content": text}], **options)
        pieces = []
        turns.append(session.answer(text, pieces.append))
        assert "".join(pieces) == turns[-1].text == session.messages[-1]["content"] == expected
    return turns


CACHES = [("dynamic", {}), ("static", {}), ("sink", {}), ("paged", {"page_size": 4})]


@pytest.mark.parametrize(("cache", "options"), CACHES)
@pytest.mark.parametrize("layer_types", ["0_3_3_3_4", "0s_1s_2_2", "0_1_2_3"])
def test_answers_are_those_of_the_conversation_from_scratch(layer_types, cache, options):
    session = make_session(chat_model(layer_types), cache=cache, cache_options=options, system="Be brief.")
    turns = talk(session)
    held, behind = 0, len("[system]Be brief.") + 1
    for text, turn in zip(MESSAGES, turns, strict=True):
        assert (turn.num_kept, turn.num_dropped, turn.is_refilled) == (held, 0, False)
        assert turn.num_read == behind + len("[user][assistant]" + text) + 1
        held += turn.num_read + num_fed(turn)
        behind = 1 + turn.num_new_tokens - num_fed(turn)  # what ends the answer
    assert len(session.held_tokens) == held and session.num_turns == 3


def num_fed(turn):
    """Tokens of an answer that have been in the model: of one that was cut, the last has not."""
    return turn.num_new_tokens - (turn.ending == CUT)


@pytest.mark.parametrize("kind", KINDS)
def test_latents(kind):
    talk(make_session(chat_model("0_0_2_2", kind=kind)))


@pytest.mark.parametrize(("cache", "options"), CACHES)
def test_what_is_rendered_otherwise_is_taken_back(cache, options):
    """The bytes that a random model chooses are hardly ever those of a text."""
    tokenizer = byte_tokenizer(chat_template=TEMPLATE)
    turns = talk(make_session(chat_model(tokenizer=tokenizer), tokenizer, cache=cache, cache_options=options))
    assert all(turn.num_dropped > 0 and not turn.is_refilled for turn in turns[1:])
    assert all(turn.num_kept > 0 for turn in turns[1:])


def test_quantized_where_every_token_reads_the_codes():
    options = {"bits": 4, "group_size": 8, "residual_length": 8}
    prefill = PrefillOptions(chunk_size=1)
    session = make_session(chat_model("0_0_2_2"), cache="quantized", cache_options=options, prefill=prefill)
    turns = talk(session, prefill_options=prefill)
    assert turns[2].num_kept and not turns[2].num_dropped


SINK = {"num_sinks": 2, "window": 30}


def test_a_conversation_without_end():
    session = make_session(chat_model(max_position_embeddings=128), cache="sink", cache_options=SINK)
    turns = [session.answer(text, lambda piece: None) for text in MESSAGES]
    turns += talk(session, ["So?"])
    assert len(session.held_tokens) > session.model.config.max_position_embeddings and session.limit is None
    assert all(turn.num_kept > 0 and not turn.num_dropped for turn in turns[1:])


@pytest.mark.parametrize("layer_types", ["0_3_3_3_4", "0s_1s_2_2"])
@pytest.mark.parametrize(("cache", "options"), [*CACHES, ("sink", SINK)])
def test_a_cache_that_cannot_take_back_goes_back_to_where_the_answer_began(layer_types, cache, options):
    session = make_session(
        chat_model(layer_types), letter_tokenizer(chat_template=MARKING), cache=cache, cache_options=options
    )
    turns = talk(session)
    slides = options is SINK or "s" in layer_types
    for before, turn in zip(turns, turns[1:], strict=False):
        assert turn.num_dropped == num_fed(before)
        assert turn.is_refilled == slides
        assert turn.num_kept == before.num_kept + before.num_read - slides


def test_a_cache_that_cannot_go_back_far_enough_is_refilled():
    session = make_session(chat_model("0_0_2_2"), cache="sink", cache_options=SINK)
    session.answer(MESSAGES[0], lambda piece: None)
    session.set_system("Be brief.")
    turn = talk(session, ["Now?"])[0]
    assert turn.is_refilled and turn.num_kept == 0 and turn.num_read > 70


@pytest.mark.parametrize(("cache", "options"), [*CACHES, ("sink", SINK)])
@pytest.mark.parametrize("num_forwards", [1, 7])
def test_ctrl_c_stops_the_answer_and_nothing_else(cache, options, num_forwards):
    """It comes in the midst of a forward pass: no layer may be ahead of another afterwards."""
    session = make_session(chat_model(), cache=cache, cache_options=options)
    talk(session, MESSAGES[:1])
    before = list(session.messages)
    calls = iter(range(1, 100))

    def interrupt(*_):
        if next(calls) == num_forwards:
            signal.raise_signal(signal.SIGINT)

    handle = session.model.model.layers[-1].register_forward_pre_hook(interrupt)
    turn = session.answer("And then?", lambda piece: None)
    handle.remove()
    assert turn.ending == INTERRUPTED
    if turn.text:
        half = [{"role": "user", "content": "And then?"}, {"role": "assistant", "content": turn.text}]
        assert session.messages == before + half
    else:
        assert session.messages == before
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    talk(session, ["Go on."])


def test_ctrl_c_while_the_answer_is_printed():
    session = make_session(chat_model())
    pieces = []

    def write(piece):
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    assert session.answer("Hm?", write).text == "".join(pieces)
    assert session.last.ending == INTERRUPTED and session.last.num_new_tokens == 3
    talk(session, ["Go on."])


def test_a_context_that_is_full():
    session = make_session(chat_model(max_position_embeddings=70))
    assert talk(session, MESSAGES[:1])[0].ending == CUT
    turn = session.answer("Why?", lambda piece: None)
    assert turn.ending == FULL and turn.num_kept + turn.num_read + turn.num_new_tokens == 70
    before = list(session.messages)
    with pytest.raises(ContextFull, match=r"^the context is full: \d+ tokens with this message, of 70$"):
        session.answer("Why?", lambda piece: None)
    assert session.messages == before
    session.reset()
    talk(session, MESSAGES[:1])


@pytest.mark.parametrize("num_pages", [21, 3])
def test_pages_that_run_out(num_pages):
    session = make_session(chat_model(), cache="paged", cache_options={"page_size": 3, "num_pages": num_pages})
    if num_pages > 3:
        turns = [session.answer("Why?", lambda piece: None) for _ in range(2)]
        assert turns[1].ending == FULL and 0 < turns[1].num_new_tokens < 12
    before = list(session.messages)
    with pytest.raises(ContextFull, match="^the context is full: cache.num_pages=.* have no room for this message$"):
        session.answer("Why?", lambda piece: None)
    assert session.messages == before


def test_answers_end_where_the_template_says():
    """The tokenizer does not know what ends a message: only the text shows it."""
    template = TEMPLATE.replace("eos_token", "'<|end|>'")
    session = make_session(chat_model(), letter_tokenizer(chat_template=template), max_new_tokens=25)
    turn, _ = answer_by_rote(session, "", session.tokenizer("so<|en <|end|>and")["input_ids"])
    assert turn.text == "so<|en " and turn.ending == STOPPED


def answer_by_rote(session, message, tokens):
    """Has the model choose these tokens; returns its turn, and what it has not come to."""
    spoken = iter([0, *tokens])  # the first one where the prompt is read

    def say(module, args, logits):
        return torch.nn.functional.one_hot(torch.tensor([[next(spoken)]]), logits.shape[-1]).float()

    handle = session.model.lm_head.register_forward_hook(say)
    turn = session.answer(message, lambda piece: None)
    handle.remove()
    return turn, list(spoken)


@pytest.mark.parametrize(
    ("end", "unread"),
    [
        ("{{ eos_token }}", ""),
        ("<|eot|>", ""),
        ("<|eot|><|sep|>", "<|sep|>"),
        ("<end>", "<eos>"),
        ("The end", "<eos>"),
        ("", ""),
    ],
)
def test_answers_end_where_tuning_ends_them(end, unread):
    pytest.importorskip("trl", reason="needs the extra 'sft'")
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}?{{ m.content }}\n{% else %}!{% generation %}{{ m.content }}"
        f"{end}{{% endgeneration %}}{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}!{{% endif %}}"
    )
    tokenizer = byte_tokenizer(chat_template=template)
    tokenizer.add_tokens(["<|eot|>", "<|sep|>"], special_tokens=True)
    tokenizer.add_tokens(["The"])
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me <en"}]
    _, labels = build_encoder(tokenizer, SFTConfig(), 500, 1).encode(messages)
    learnt = [label for label in labels if label != -100]
    session = make_session(chat_model(tokenizer=tokenizer), tokenizer, max_new_tokens=40)
    turn, left = answer_by_rote(session, "Who?", [*learnt, *tokenizer("so on")["input_ids"]])
    assert (turn.text, turn.ending, tokenizer.decode(left)) == ("Me <en", STOPPED, f"{unread}so on")


def test_sampling_with_a_seed_and_penalties():
    model = chat_model()
    first, again, other = (make_session(model, sampling=Sampling(seed=seed)) for seed in (3, 3, 4))
    texts = [[session.answer("Why?", lambda piece: None).text for _ in range(2)] for session in (first, again, other)]
    assert texts[0] == texts[1] != texts[2] and texts[0][0] != texts[0][1]
    talk(make_session(model, sampling=Sampling(greedy=True, repetition_penalty=1.5)))


def test_messages_that_a_template_refuses_change_nothing():
    template = TEMPLATE.replace("[{{ m.role }}]", "{{ raise_exception('no system') if m.role == 'system' }}")
    session = make_session(chat_model(), letter_tokenizer(chat_template=template))
    session.answer("Why?", lambda piece: None)
    before = list(session.messages)
    with pytest.raises(UserError, match="^the chat template fails: no system$"):
        session.set_system("Be brief.")
    assert session.messages == before and session.system is None


def test_an_error_takes_the_message_back():
    session = make_session(chat_model())
    session.answer("Why?", lambda piece: None)
    before = list(session.messages)

    def fail(piece):
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        session.answer("Why?", fail)
    assert session.messages == before and session.held_tokens == []
    talk(session, ["Why?"])
