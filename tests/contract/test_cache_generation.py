"""What every cache keeps to in `generate` and pipelines."""

import functools
import threading

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, TextIteratorStreamer, TextStreamer, pipeline

from lckv.errors import UserError
from tests.contract.caches import (
    MIXED,
    VARIANTS,
    exact_model,
    in_patterns,
    new_cache,
)
from tests.reference import token_ids

pytestmark = pytest.mark.usefixtures("no_grad")


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


@pytest.mark.parametrize(
    ("name", "layer_types", "way"),  # each cache in each pattern and each way, and each pattern in each way
    [
        (name, MIXED[(number + shift) % len(MIXED)], way)
        for number, name in enumerate(VARIANTS)
        for shift, way in enumerate(WAYS)
    ],
    indirect=["name"],
)
def test_generate_equals_generating_without_a_cache(name, layer_types, way):
    model = exact_model(layer_types)
    expected = uncached_generation(layer_types, way, max_new_tokens=6)
    options = {**padded_prompts(), "max_new_tokens": 6, **WAYS[way]}
    torch.manual_seed(3)
    assert torch.equal(model.generate(**options, past_key_values=new_cache(name, model)), expected)


@in_patterns(MIXED, 1)
def test_generate_prefills_in_chunks(name, layer_types):
    model = exact_model(layer_types)
    options = {**padded_prompts(), "max_new_tokens": 6, "do_sample": False}
    expected = uncached_generation(layer_types, "greedy", max_new_tokens=6)
    actual = model.generate(**options, past_key_values=new_cache(name, model), prefill_chunk_size=4)
    assert torch.equal(actual, expected)


@in_patterns(["0_0_2_2", "0s_1s_2_2", "0_2s_2_2s"], 1)
def test_generate_goes_on_where_it_stopped(name, layer_types):
    model = exact_model(layer_types)
    cache, options = new_cache(name, model), {"max_new_tokens": 4, "do_sample": False}
    first = model.generate(token_ids(1, 5), past_key_values=cache, **options)
    prompt = torch.cat([first, token_ids(1, 3, seed=1)], dim=1)
    expected = model.generate(prompt, use_cache=False, **options)
    assert torch.equal(model.generate(prompt, past_key_values=cache, **options), expected)


@in_patterns(MIXED, first=1)
@pytest.mark.parametrize("do_sample", [False, True])
def test_assisted_decoding(name, layer_types, do_sample):
    # The draft's own cache is transformers', which in older versions cannot be cropped where a layer keeps nothing.
    draft_layer_types = "0_0" if hasattr(transformers.cache_utils, "DummyLayer") else "0_1"
    model, draft = exact_model(layer_types), exact_model(draft_layer_types, seed=1)
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


@pytest.mark.parametrize("layer_types", MIXED)
def test_assisted_decoding_with_sinks_that_drop_tokens(layer_types):
    # Quantised caches round a piece's tokens when it has come, and so other tokens for pieces of other lengths.
    model, draft = exact_model(layer_types), exact_model("0_1", seed=1)
    draft.generation_config.num_assistant_tokens = 4
    prompt, options = token_ids(1, 6), {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(prompt, past_key_values=new_cache("sink-lossy", model), **options)
    cache = new_cache("sink-lossy", model)
    assert torch.equal(model.generate(prompt, assistant_model=draft, past_key_values=cache, **options), expected)


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


@in_patterns(["0s_1s_2_2", "0_3_3_3_4"], 1)
def test_pipeline(name, layer_types):
    model, tokenizer = exact_model(layer_types), word_tokenizer()
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    prompts = ["w5 w9 w20 w7 w33", "w8 w50"]
    expected = pipe(prompts, batch_size=2, use_cache=False, **options)
    actual = pipe(prompts, batch_size=2, past_key_values=new_cache(name, model), **options)
    assert actual == expected and actual[0][0]["generated_text"]
