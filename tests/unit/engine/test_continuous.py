"""Continuous batching: every request gets what `generate()` gives it alone, whoever joins and leaves."""

import sys

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.continuous_batching.requests import RequestStatus

from lckv.cache import DynamicKVCache, PagedKVCache
from lckv.engine.continuous import ContinuousBatcher
from lckv.errors import UserError
from tests.reference import PATTERNS, SHAPES, tiny_model, token_ids

LENGTHS = [7, 1, 12, 3, 20, 5]
NEW_TOKENS = [9, 4, 1, 15, 6, 12]


def exact_model(layer_types, **config):
    model = tiny_model(layer_types, forward_passes="converge", converge_tolerance=1e-9, **config)
    model.generation_config.pad_token_id = 0
    return model


def make_prompts():
    return [token_ids(1, length, seed=seed)[0].tolist() for seed, length in enumerate(LENGTHS)]


def alone(model, prompt, **options):
    return model.generate(torch.tensor([prompt]), **({"do_sample": False} | options))[0, len(prompt) :].tolist()


def check_all(model, batcher, prompts, new_tokens):
    outputs = batcher.run()
    for index, (prompt, count) in enumerate(zip(prompts, new_tokens, strict=True)):
        output = outputs[str(index)]
        assert output.error is None and output.status == RequestStatus.FINISHED and output.prompt_ids == prompt
        assert output.generated_tokens == alone(model, prompt, max_new_tokens=count)
    assert batcher.cache.num_used_pages() == 0 and not batcher.has_work()


@pytest.mark.parametrize(
    ("layer_types", "family"), [*((each, {}) for each in PATTERNS), ("0_2s_2_2s", SHAPES["gpt2"])], ids=str
)
def test_requests_that_join_at_any_step_get_their_own_text(layer_types, family):
    model, prompts = exact_model(layer_types, **family), make_prompts()
    batcher = ContinuousBatcher(model, PagedKVCache(model.config, page_size=4), tokens_per_step=6)
    for prompt, count in zip(prompts, NEW_TOKENS, strict=True):
        batcher.add_request(prompt, max_new_tokens=count)
        batcher.step()
    check_all(model, batcher, prompts, NEW_TOKENS)
    statistics = batcher.statistics
    assert statistics.peak_rows > 2 and statistics.num_finished == len(prompts) and statistics.num_failed == 0
    assert statistics.num_prompt_tokens == sum(LENGTHS)
    assert statistics.num_generated_tokens == sum(len(o.generated_tokens) for o in batcher.outputs.values())
    assert statistics.tokens_per_second == statistics.num_generated_tokens / statistics.seconds > 0


@pytest.mark.parametrize("layer_types", ["0_0_2_2", "0s_1s_2_2", "0_3_3_3_4"])
def test_the_newest_waits_when_pages_run_out(layer_types):
    model, prompts = exact_model(layer_types), make_prompts()
    model.generation_config.eos_token_id = None
    batcher = ContinuousBatcher(model, PagedKVCache(model.config, page_size=2, num_pages=14), tokens_per_step=6)
    for prompt, count in zip(prompts, NEW_TOKENS, strict=True):
        batcher.add_request(prompt, max_new_tokens=count)
    check_all(model, batcher, prompts, NEW_TOKENS)
    assert batcher.statistics.num_preemptions > 0


def test_who_never_fits_fails_alone():
    model = exact_model("0_0_2_2")
    model.generation_config.eos_token_id = None
    batcher = ContinuousBatcher(model, PagedKVCache(model.config, page_size=4, num_pages=4))
    first, last = token_ids(1, 3, seed=1)[0].tolist(), token_ids(1, 5, seed=2)[0].tolist()
    batcher.add_request(first, "first", max_new_tokens=8)
    batcher.add_request(token_ids(1, 30)[0].tolist(), "long", max_new_tokens=2)
    batcher.add_request(last, "last", max_new_tokens=8)
    batcher.add_request(first, "grows", max_new_tokens=50)
    outputs = batcher.run()
    assert outputs["first"].generated_tokens == alone(model, first, max_new_tokens=8)
    assert outputs["last"].generated_tokens == alone(model, last, max_new_tokens=8)
    for name, match, count in (("long", "'long' has 0 tokens and takes 30 more", 0), ("grows", "'grows' has 16", 14)):
        assert outputs[name].status == RequestStatus.FAILED and match in outputs[name].error
        assert len(outputs[name].generated_tokens) == count
    assert batcher.statistics.num_failed == 2 and batcher.cache.num_used_pages() == 0


def test_any_number_of_requests_may_never_fit():
    model, count = exact_model("0_0_2_2"), sys.getrecursionlimit()
    batcher = ContinuousBatcher(model, PagedKVCache(model.config, page_size=4, num_pages=1))
    for _ in range(count):
        batcher.add_request([3] * 9, max_new_tokens=1)
    batcher.add_request([3], "short", max_new_tokens=1)
    outputs = batcher.run()
    assert outputs["short"].generated_tokens == alone(model, [3], max_new_tokens=1)
    assert batcher.statistics.num_failed == count and batcher.cache.num_used_pages() == 0


def test_names_are_not_looked_for_one_by_one():
    class Name(str):
        num_compared = 0
        __hash__ = str.__hash__

        def __eq__(self, other):
            Name.num_compared += 1
            return super().__eq__(other)

    batcher = ContinuousBatcher(exact_model("0_0"))
    for index in range(40):
        batcher.add_request([3], Name(index))
    assert Name.num_compared < 40
    with pytest.raises(UserError, match="there is one of that name"):
        batcher.add_request([3], "7")


@pytest.mark.parametrize("layer_types", ["0_0_2_2", "0_3_3_3_4"])
def test_equal_beginnings_are_computed_once(layer_types):
    model, system = exact_model(layer_types), token_ids(1, 16, seed=9)[0].tolist()
    prompts = [[*system, 5 + index, 7] for index in range(4)]
    batcher = ContinuousBatcher(model, PagedKVCache(model.config, page_size=4))
    for prompt in prompts:
        batcher.add_request(prompt, max_new_tokens=5)
    check_all(model, batcher, prompts, [5] * 4)
    assert batcher.statistics.num_reused_tokens == 3 * 16
    assert batcher.statistics.num_prompt_tokens == 18 + 3 * 2


def test_sampling_uses_generates_processors():
    model = exact_model("0_0_2_2")
    prompt = token_ids(1, 6)[0].tolist()
    options = {"repetition_penalty": 3.0, "min_new_tokens": 6, "no_repeat_ngram_size": 2}
    greedy = GenerationConfig(do_sample=False, max_new_tokens=10, eos_token_id=2, pad_token_id=0, **options)
    batcher = ContinuousBatcher(model)
    batcher.add_request(prompt, "greedy", generation_config=greedy)
    batcher.add_request(prompt, "plain", max_new_tokens=10)
    sampling = GenerationConfig(do_sample=True, temperature=0.7, top_k=9, top_p=0.95, max_new_tokens=10)
    for name in ("drawn", "again"):
        batcher.add_request(prompt, name, generation_config=sampling, seed=4)
    batcher.add_request(prompt, "other", generation_config=sampling, seed=5)
    outputs = {name: output.generated_tokens for name, output in batcher.run().items()}
    assert outputs["greedy"] == alone(model, prompt, max_new_tokens=10, **options) != outputs["plain"]
    assert outputs["plain"] == alone(model, prompt, max_new_tokens=10)
    assert outputs["drawn"] == outputs["again"] != outputs["other"]
    only_best = GenerationConfig(do_sample=True, top_k=1, max_new_tokens=10)
    batcher.add_request(prompt, "best", generation_config=only_best)
    assert batcher.run()["best"].generated_tokens == outputs["plain"]


def test_tokens_are_handed_out_as_they_are_made():
    model, prompts = exact_model("0_0_2_2"), make_prompts()
    seen = {}
    batcher = ContinuousBatcher(model, on_token=lambda name, token: seen.setdefault(name, []).append(token))
    for prompt in prompts[:3]:
        batcher.add_request(prompt, max_new_tokens=5)
    batcher.step()
    assert {len(tokens) for tokens in seen.values()} == {1}
    outputs = batcher.run()
    assert seen == {name: output.generated_tokens for name, output in outputs.items()}


def test_cancelled_requests_leave_at_once():
    model, prompts = exact_model("0_0_2_2"), make_prompts()
    model.generation_config.eos_token_id = None
    batcher = ContinuousBatcher(model, max_rows=1)
    for prompt in prompts[:3]:
        batcher.add_request(prompt, max_new_tokens=5)
    batcher.step()
    batcher.cancel("0")
    batcher.cancel("1")
    assert batcher.cache.num_used_pages() == 0
    outputs = batcher.run()
    assert outputs["0"].error == outputs["1"].error == "cancelled" and len(outputs["0"].generated_tokens) == 1
    assert outputs["2"].generated_tokens == alone(model, prompts[2], max_new_tokens=5)
    batcher.cancel("2")  # ended before
    assert outputs["2"].error is None and batcher.statistics.num_finished == 1 and batcher.statistics.num_failed == 2
    with pytest.raises(UserError, match="cancel\\('3'\\)"):
        batcher.cancel("3")


@pytest.mark.parametrize("at", [1, 3])
def test_a_callback_that_raises_costs_no_request_a_token(at):
    model, prompts, seen = exact_model("0_0_2_2"), make_prompts()[:3], {}
    model.generation_config.eos_token_id = None

    def on_token(name, token):
        seen.setdefault(name, []).append(token)
        if name == "0" and len(seen[name]) == at:  # at 3 with the last token
            raise OSError("the line is dead")

    batcher = ContinuousBatcher(model, PagedKVCache(model.config, page_size=4), on_token=on_token)
    for prompt, count in zip(prompts, [3, 3, 6], strict=True):
        batcher.add_request(prompt, max_new_tokens=count)
    with pytest.raises(OSError, match="the line is dead"):
        batcher.run()
    check_all(model, batcher, prompts, [3, 3, 6])
    assert seen == {name: output.generated_tokens for name, output in batcher.outputs.items()}
    assert batcher.statistics.num_finished == 3


@pytest.mark.parametrize("at", [1, 2, 4])
def test_callbacks_may_cancel_requests(at):
    model, prompts = exact_model("0_0_2_2"), make_prompts()
    model.generation_config.eos_token_id = None
    seen = []

    def on_token(name, token):
        seen.append(name)
        if name == "0" and seen.count("0") == at:  # at 4 with the last token
            batcher.cancel("0")
            batcher.cancel("4")

    batcher = ContinuousBatcher(model, tokens_per_step=30, on_token=on_token)
    for prompt in prompts:
        batcher.add_request(prompt, max_new_tokens=4)
    outputs = batcher.run()
    assert len(outputs["0"].generated_tokens) == at and outputs["0"].error == (None if at == 4 else "cancelled")
    for name in "1235":
        assert outputs[name].generated_tokens == alone(model, prompts[int(name)], max_new_tokens=4)
    statistics = batcher.statistics
    assert statistics.num_finished + statistics.num_failed == len(prompts) and not batcher.has_work()
    assert batcher.cache.num_used_pages() == 0


def test_names_that_are_given_are_not_given_again():
    model = exact_model("0_0_2_2")
    batcher = ContinuousBatcher(model)
    batcher.add_request([5], "1", max_new_tokens=1)
    names = [batcher.add_request([5, 6], max_new_tokens=1) for _ in range(3)]
    assert len({"1", *names}) == 4 and set(batcher.run()) == {"1", *names}


def test_a_step_that_breaks_off_can_be_taken_again():
    model, prompts = exact_model("0_0_2_2"), make_prompts()
    batcher = ContinuousBatcher(model, PagedKVCache(model.config, page_size=4))
    for prompt, count in zip(prompts, NEW_TOKENS, strict=True):
        batcher.add_request(prompt, max_new_tokens=count)
    for layer in (0, 2, 3):
        batcher.step()

        def interrupt(*_):
            raise KeyboardInterrupt

        hook = model.model.layers[layer].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            batcher.step()
        hook.remove()
    check_all(model, batcher, prompts, NEW_TOKENS)


@pytest.mark.parametrize("seed", [None, 1])
def test_infinite_logits_fail_requests(seed):
    model = exact_model("0_0_2_2")
    with torch.no_grad():
        model.lm_head.weight[3] *= float("inf")
    batcher = ContinuousBatcher(model)
    batcher.add_request([5, 6, 7], "bad", max_new_tokens=3, seed=seed)
    assert batcher.run()["bad"].error == "the model's logits are not finite (NaN or infinity)"


def test_nan_fails_the_request_alone():
    model = exact_model("0_0_2_2")
    with torch.no_grad():
        model.model.embed_tokens.weight[11] = float("nan")
    model.lm_head.weight = torch.nn.Parameter(exact_model("0_0_2_2").lm_head.weight.detach().clone())
    batcher = ContinuousBatcher(model)
    batcher.add_request([5, 11, 7], "bad", max_new_tokens=3)
    batcher.add_request([5, 6, 7], "good", max_new_tokens=3)
    outputs = batcher.run()
    assert outputs["bad"].error == "the model's logits are not finite (NaN or infinity)"
    assert not outputs["bad"].generated_tokens
    assert outputs["good"].generated_tokens == alone(model, [5, 6, 7], max_new_tokens=3)


def test_wrong_use_is_refused():
    model = exact_model("0_0_2_2")
    batcher = ContinuousBatcher(model)
    batcher.add_request([5], "a")
    for prompt, name, options, match in (
        ([], "b", {}, "'b': the prompt is empty"),
        ([5], "a", {}, "'a': there is one of that name"),
        ([5, 61], "b", {}, "allowed are 0 to 60"),
        ([5], "b", {"max_new_tokens": 0}, "'b': max_new_tokens=0: allowed is a whole number, 1 or more"),
        ([5], "b", {"generation_config": GenerationConfig(num_beams=2)}, "beam_search: allowed are greedy|with beam"),
        ([5], "b", {"generation_config": GenerationConfig(stop_strings=["x"])}, "stop_strings=\\['x'\\]"),
        (
            [5],
            "b",
            {"generation_config": GenerationConfig(num_return_sequences=2, do_sample=True)},
            "num_return_sequences=2: allowed is 1",
        ),
    ):
        with pytest.raises(UserError, match=match):
            batcher.add_request(prompt, name, **options)
    with pytest.raises(UserError, match="DynamicKVCache: allowed is cache=paged"):
        ContinuousBatcher(model, DynamicKVCache(model.config))
    for option in ("max_rows", "tokens_per_step"):
        with pytest.raises(UserError, match=f"{option}=0: allowed is a whole number, 1 or more"):
            ContinuousBatcher(model, **{option: 0})
    assert list(batcher.run()) == ["a"]
