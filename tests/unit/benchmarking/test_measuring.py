"""Measured bytes against the plan's arithmetic, and what happens when one contender fails."""

import pytest
import torch

from lckv.benchmarking import measuring
from lckv.benchmarking.measuring import Bench, CacheChoice, choose_caches, combine, measure
from lckv.benchmarking.settings import Workload
from lckv.benchmarking.traffic import RecordsTraffic, record_reads
from lckv.cache import CACHES, DynamicKVCache, StaticKVCache
from lckv.errors import UserError
from lckv.sharing.costs import ModelSizes, count_kv_bytes
from tests.reference import PATTERNS, tiny_model, token_ids

WORKLOAD = Workload(prompt_length=9, new_tokens=3, rounds=1)


def test_caches_by_name_and_with_options():
    assert choose_caches(["dynamic"], {}) == [CacheChoice("dynamic")]
    chosen = choose_caches(["dynamic", "sink", {"name": "sink", "num_sinks": 2}], {"window": 8, "num_sinks": 3})
    assert [choice.options for choice in chosen] == [
        {},
        {"window": 8, "num_sinks": 3},
        {"window": 8, "num_sinks": 2},
    ]
    assert chosen[2].label == "sink window=8 num_sinks=2"


def test_the_same_cache_twice_is_refused():
    with pytest.raises(UserError, match="caches: 'dynamic' is there twice"):
        choose_caches(["dynamic", {"name": "dynamic"}], {})


def test_every_model_meets_every_cache():
    models = {"a": tiny_model("0_1"), "b": tiny_model("0_0")}
    assert [each.label for each in combine(models, choose_caches(["dynamic"], {}))] == ["a", "b"]
    both = combine(models, choose_caches(["dynamic", "static"], {}))
    assert [each.label for each in both] == ["a, dynamic", "a, static", "b, dynamic", "b, static"]
    assert both[0].model is both[1].model
    assert both[2].model.config.sharing_plan.layer_types == "0_0"


def test_a_cache_of_fixed_length_gets_the_length_unless_told():
    model = tiny_model("0_0")
    default, given = combine({"m": model}, choose_caches(["static", {"name": "static", "max_length": 7}], {}))
    assert default.new_cache(30).options()["max_length"] == 30
    assert given.new_cache(30).options()["max_length"] == 7
    recording = default.new_cache(30, RecordsTraffic)
    assert isinstance(recording, RecordsTraffic) and isinstance(recording, StaticKVCache)
    assert type(combine({"m": model}, choose_caches(["dynamic"], {}))[0].new_cache(30)) is DynamicKVCache


def bench_of(layer_types, cache="dynamic", workload=WORKLOAD, **options):
    model = tiny_model(layer_types)
    return Bench(combine({layer_types: model}, choose_caches([{"name": cache, **options}], {}))[0], workload)


def planned(layer_types, length):
    model = tiny_model(layer_types)
    return count_kv_bytes(model.config.sharing_plan, ModelSizes.from_config(model.config), length, "float32")


@pytest.mark.parametrize("layer_types", PATTERNS)
def test_measured_bytes_are_the_plans(layer_types):
    bench = bench_of(layer_types)
    bench.inspect()
    expected = planned(layer_types, 12)
    assert bench.result.resident_bytes == expected.resident_total == bench.planned_bytes(12, 1)
    assert bench.result.written_bytes == expected.written
    assert bench.result.read_bytes == given_to_attention(bench.contender.model.config, 12)
    assert bench.result.read_bytes >= expected.read
    if not any(layer.is_sliding for layer in bench.contender.model.config.sharing_plan.layers):
        assert bench.result.read_bytes == expected.read


def given_to_attention(config, length):
    """As the plan counts, but for keys that are read and only then hidden by a mask, as windows may need."""
    plan, num_keys = config.sharing_plan, 0
    for layer in plan.layers:
        num_keys += min(length, config.sliding_window) if plan.owner_is_sliding(layer.key_source) else length
        num_keys -= layer.is_upward and not layer.is_sliding
    return num_keys * 2 * config.num_key_value_heads * config.head_dim * 4


SMALL_GROUPS = {"group_size": 8, "residual_length": 8}
EVERY_CACHE = [
    ("0s_1s_2_2", "dynamic", {}),
    ("0_3_3_3_4", "static", {}),
    ("0s_1s_2_2", "static", {}),
    ("0_1_2_3", "paged", {}),
    ("0s_1s_2_2", "paged", {}),
    ("0_1_2_3", "sink", {"window": 6, "num_sinks": 2}),
    ("0_3_3_3_4", "quantized", SMALL_GROUPS),
    ("0s_1s_2_2", "quantized", SMALL_GROUPS),
    ("0_3_3_3_4", "quantized", SMALL_GROUPS | {"layout": "paged"}),
    ("0s_1s_2_2", "quantized", SMALL_GROUPS | {"layout": "paged"}),
]


@pytest.mark.parametrize(("layer_types", "cache", "options"), EVERY_CACHE)
def test_measured_bytes_of_every_cache_are_those_it_plans(cache, options, layer_types):
    bench = bench_of(layer_types, cache, **options)
    bench.inspect()
    assert bench.result.error is None
    assert bench.result.resident_bytes == bench.planned_bytes(12, 1)
    written = planned(layer_types, 12).written
    if options.get("layout") == "paged":  # which encodes pages that leave a window, too; the others are all recent
        plan = bench.contender.model.config.sharing_plan
        windows = sum(plan.owner_is_sliding(owner) for owner in plan.kv_owners)
        written += windows * (stored_bytes(bench.contender.model.config, 8, 0) // 8)
    assert bench.result.written_bytes == written
    assert [batch.kv_bytes for batch in bench.result.batches] == [bench.planned_bytes(12, 1)]


def stored_bytes(config, num_encoded, num_exact, bits=8, group=8):
    """Of one layer: keys with a scale and a zero per channel and group, values per token and as many channels."""
    size = config.num_key_value_heads * config.head_dim
    parameters = 4 * (num_encoded // group * size + num_encoded * size // group)
    return num_encoded * 2 * size * bits // 8 + parameters + num_exact * 2 * size * 4


@pytest.mark.parametrize(
    ("layer_types", "num_upward", "bits", "layout"),
    [
        ("0_1_2_3", 0, 8, "paged"),
        ("0_0_2_2", 0, 4, "dynamic"),
        ("0_3_3_3_4", 1, 8, "dynamic"),
        ("0_3_3_3_4", 1, 4, "paged"),
    ],
)
def test_a_quantised_cache_writes_and_reads_what_it_stores(layer_types, num_upward, bits, layout):
    options = SMALL_GROUPS | {"bits": bits, "layout": layout}
    bench = bench_of(layer_types, "quantized", Workload(30, 4, rounds=1), **options)
    bench.inspect()
    assert bench.result.error is None
    config = bench.contender.model.config
    num_owners = len(config.sharing_plan.kv_owners)
    # The last step has 33 tokens before it, of which the last 8 and what fills no group of 8 are kept as they are.
    past, own = stored_bytes(config, 24, 33 - 24, bits), stored_bytes(config, 0, 1)
    # Layers that read upward get the past before its owner has computed the new token, and it is decoded once more.
    assert bench.result.read_bytes == num_owners * (past + own) + num_upward * past
    assert bench.result.written_bytes == num_owners * (own + stored_bytes(config, 24, 0, bits) // 24)


def test_where_a_quantised_cache_has_a_window_hidden_tokens_of_the_first_group_are_decoded():
    options = {"group_size": 2, "residual_length": 1}
    for new_tokens in 3, 4:
        bench = bench_of("0s_1s", "quantized", Workload(20, new_tokens, rounds=1), **options)
        bench.inspect()
        config = bench.contender.model.config
        length = 20 + new_tokens - 1
        first, edge = (length - config.sliding_window + 1) // 2 * 2, (length - 1) // 2 * 2
        expected = 2 * stored_bytes(config, edge - first, length - edge + 1, group=2)
        assert bench.result.read_bytes == expected


def test_reads_are_counted_by_layer_and_only_inside():
    model = tiny_model("0_3_3_3_4")
    cache = DynamicKVCache(model.config)
    model(token_ids(1, 6), past_key_values=cache)
    with record_reads(model) as reads:
        model(token_ids(1, 1), past_key_values=cache)
    per_key = 2 * model.config.num_key_value_heads * model.config.head_dim * 4
    assert reads == {0: 7 * per_key, 1: 6 * per_key, 2: 6 * per_key, 3: 7 * per_key, 4: 7 * per_key}
    before = reads.total()
    model(token_ids(1, 1), past_key_values=cache)
    assert reads.total() == before


@pytest.mark.parametrize(
    ("layer_types", "factor"),
    [("0_0_2_2_4_4_6_6", 2), ("0_6_6_6_6_6_6_7", 8 / 3)],
)
def test_the_batch_in_a_budget_grows_by_the_plans_factor(layer_types, factor):
    one = planned("0_1_2_3_4_5_6_7", 12).resident_total
    workload = Workload(prompt_length=9, new_tokens=3, kv_budget=6 * one + 5, rounds=1)
    models = {each: tiny_model(each) for each in ("0_1_2_3_4_5_6_7", layer_types)}
    llama, shared = (
        result.budget_batch for result in measure(combine(models, choose_caches(["dynamic"], {})), workload)[0]
    )
    assert (llama.batch_size, shared.batch_size) == (6, int(6 * factor))
    for batch in (llama, shared):
        assert batch.kv_bytes == batch.planned_kv_bytes <= workload.kv_budget
        assert batch.peak_bytes > batch.kv_bytes
        assert len(batch.seconds) == 1 and batch.error is None


def test_a_budget_that_ends_in_the_middle_of_a_sequence_fails_that_measurement_alone():
    bench = bench_of("0_0", workload=Workload(prompt_length=9, new_tokens=3, kv_budget=1000, rounds=1))
    bench.inspect()
    bench.run_round()
    assert bench.result.budget_batch.batch_size == 0
    assert bench.result.budget_batch.error == (
        "one sequence of 12 tokens needs 1,536 bytes of KV, and the budget is 1,000"
    )
    assert bench.result.budget_batch.seconds == [] and len(bench.result.batch(1).seconds) == 1


def test_a_budget_too_small_for_one_token_is_refused_with_both_numbers():
    contenders = combine({"mine": tiny_model("0_1")}, choose_caches(["dynamic"], {}))
    with pytest.raises(UserError, match="^kv_budget=255: one token of one sequence needs 256 bytes of KV in mine; "):
        measure(contenders, Workload(9, 3, kv_budget=255, rounds=1))
    assert measure(contenders, Workload(1, 1, kv_budget=512, rounds=1))[0][0].budget_batch.batch_size == 1


def test_the_budget_leads_to_no_more_than_the_largest_batch_allowed():
    bench = bench_of("0_0", workload=Workload(9, 3, kv_budget=10**9, max_batch_size=5, rounds=1))
    bench.inspect()
    assert bench.result.budget_batch.batch_size == 5


def test_a_cache_that_keeps_more_than_planned_does_not_pass_as_fitting(monkeypatch):
    monkeypatch.setattr(DynamicKVCache, "num_bytes", lambda self: 10**6)
    bench = bench_of("0_0", workload=Workload(9, 3, kv_budget=10**5, rounds=1))
    bench.inspect()
    assert "hold 1,000,000, more than the budget of 100,000" in bench.result.budget_batch.error


def test_sequences_of_a_batch_have_memory_of_their_own_in_every_cache():
    """The paged cache keeps equal sequences once; then each gets a prompt of its own."""
    for cache, repeats_are_copies in ("dynamic", True), ("static", True), ("paged", False):
        bench = bench_of("0_1", cache, workload=Workload(33, 3, batch_sizes=(5,), rounds=1))
        bench.inspect()
        assert bench.repeats_are_copies == repeats_are_copies
        assert bench.result.batches[0].kv_bytes == bench.planned_bytes(36, 5)


@pytest.mark.parametrize(("layer_types", "prompt_length"), [("0_1", 9), ("0_1_1", 2), ("0s_1s_1s", 15), ("0s_1_1", 9)])
def test_the_batch_in_a_budget_fills_pools_of_fixed_size(layer_types, prompt_length):
    workload = Workload(prompt_length, 9, kv_budget=10**8, rounds=1)
    bench = bench_of(layer_types, "paged", workload, page_size=4, num_pages=40)
    bench.inspect()
    bench.run_round()
    assert not bench.repeats_are_copies
    batch = bench.result.budget_batch
    assert batch.error is None and len(batch.seconds) == 1
    assert 1 < batch.batch_size <= 40 and batch.kv_bytes == batch.planned_kv_bytes
    one_more = Workload(prompt_length, 9, batch_sizes=(batch.batch_size + 1,), rounds=1)
    too_many = bench_of(layer_types, "paged", one_more, page_size=4, num_pages=40)
    too_many.inspect()
    assert "page" in too_many.result.batches[0].error


def test_contenders_take_turns(monkeypatch):
    turns = []
    run_round = Bench.run_round
    monkeypatch.setattr(Bench, "run_round", lambda bench: (turns.append(bench.result.label), run_round(bench))[1])
    models = {each: tiny_model(each) for each in ("0_1", "0_0", "1_1")}
    contenders = combine(models, choose_caches(["dynamic"], {}))
    results, num_rounds = measure(contenders, Workload(9, 3, batch_sizes=(1, 2), rounds=3))
    assert num_rounds == 3
    assert turns == ["0_1", "0_0", "1_1"] * 3
    for result in results:
        assert len(result.prefill_seconds) == len(result.first_token_seconds) == 3
        times = zip(result.first_token_seconds, result.prefill_seconds, strict=True)
        assert all(first > prefill > 0 for first, prefill in times)
        assert [len(batch.seconds) for batch in result.batches] == [3, 3]


def interrupt_turn(monkeypatch, number):
    """Presses Ctrl-C at the end of this turn, counted over all rounds and contenders."""
    turns, run_round = [], Bench.run_round

    def run(bench):
        turns.append(run_round(bench))
        if len(turns) == number:
            raise KeyboardInterrupt

    monkeypatch.setattr(Bench, "run_round", run)


def test_ctrl_c_leaves_the_rounds_that_all_contenders_have_ended(monkeypatch):
    interrupt_turn(monkeypatch, 5)
    contenders = combine({each: tiny_model(each) for each in ("0_1", "0_0")}, choose_caches(["dynamic"], {}))
    results, num_rounds = measure(contenders, Workload(9, 3, rounds=4))
    assert num_rounds == 2
    for result in results:
        times = result.prefill_seconds, result.first_token_seconds, result.batch(1).seconds
        assert [len(seconds) for seconds in times] == [2, 2, 2]


def test_ctrl_c_in_the_first_round_leaves_nothing(monkeypatch):
    interrupt_turn(monkeypatch, 1)
    contenders = combine({each: tiny_model(each) for each in ("0_1", "0_0")}, choose_caches(["dynamic"], {}))
    with pytest.raises(KeyboardInterrupt):
        measure(contenders, WORKLOAD)


def test_prompts_are_the_same_for_all_and_prefill_settings_count():
    workload = Workload(9, 3, prefill_chunk=4, prefill_passes=1, seed=3, rounds=1)
    llama, upward = bench_of("0_1", workload=workload), bench_of("1_1", workload=workload)
    assert torch.equal(llama._prompts(1), upward._prompts(1))
    upward.inspect()
    # Chunks of 4, 4 and 1 token; one ungraded pass and the two others.
    assert upward.result.prefill_passes == [3, 3, 1]
    assert upward.result.prefill_residual > 0


class TooBigCache(DynamicKVCache):
    """Has memory for one row only."""

    def batch_repeat_interleave(self, repeats):
        if repeats > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")
        super().batch_repeat_interleave(repeats)


class BrokenCache(DynamicKVCache):
    """Does not work with this model."""

    def __init__(self, config):
        raise UserError("head_dim=8: is not divisible by 3")


@pytest.fixture
def odd_caches(monkeypatch):
    monkeypatch.setitem(CACHES._entries, "too_big", TooBigCache)
    monkeypatch.setitem(CACHES._entries, "broken", BrokenCache)


def test_what_fails_fails_alone(odd_caches):
    nan = tiny_model("0_0")
    torch.nn.init.constant_(nan.lm_head.weight, float("nan"))
    caches = choose_caches(["dynamic", "broken", "too_big", {"name": "static", "max_length": 5}], {})
    contenders = combine({"fine": tiny_model("0_1")}, caches) + combine({"nan": nan}, choose_caches(["dynamic"], {}))
    workload = Workload(9, 3, batch_sizes=(1, 5), kv_budget=10**5, rounds=2)
    (fine, broken, too_big, short, no_number), _ = measure(contenders, workload)
    assert fine.error is None and all(len(batch.seconds) == 2 for batch in fine.batches)
    assert broken.error == "head_dim=8: is not divisible by 3"
    assert too_big.error is None
    assert [batch.error for batch in too_big.batches] == [
        None,
        *["out of memory: CUDA out of memory. Tried to allocate 1 TiB"] * 2,
    ]
    assert len(too_big.batch(1).seconds) == len(too_big.prefill_seconds) == 2
    assert "5" in short.error and short.prefill_seconds == []
    assert no_number.error.startswith("the logits behind the prompt are not finite")


def test_if_everything_fails_there_is_no_report(odd_caches):
    with pytest.raises(UserError, match="^m: head_dim=8: is not divisible by 3$"):
        measure(combine({"m": tiny_model("0_1")}, choose_caches(["broken"], {})), WORKLOAD)


def test_a_fault_of_the_program_is_no_result(monkeypatch):
    def fail(*args, **kwargs):
        raise TypeError("a bug")

    monkeypatch.setattr(measuring, "prefill", fail)
    with pytest.raises(TypeError, match="a bug"):
        measure(combine({"m": tiny_model("0_1")}, choose_caches(["dynamic"], {})), WORKLOAD)


def test_memory_errors_are_named_as_such():
    assert measuring.describe(MemoryError()) == "out of memory: MemoryError"
    assert measuring.describe(RuntimeError("a\n b")) == "a b"
    text = "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"
    assert measuring.describe(RuntimeError(text)).startswith("out of memory: ")


def test_nothing_of_a_measurement_stays_in_the_model():
    bench = bench_of("0_1")
    before = {name: tensor.clone() for name, tensor in bench.model.state_dict().items()}
    bench.inspect()
    assert all(torch.equal(before[name], tensor) for name, tensor in bench.model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in bench.model.modules())
