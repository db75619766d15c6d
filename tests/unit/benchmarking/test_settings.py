"""What a benchmark's configuration means, and what is refused in it."""

import pytest
import torch

from lckv.benchmark import load_models
from lckv.benchmarking.settings import (
    DEFAULT_PATTERNS,
    build_workload,
    check_iteration,
    checkpoint_labels,
    random_models,
)
from lckv.commands.hydra_store import config_dir
from lckv.config import BenchmarkConfig
from lckv.errors import UserError
from lckv.sharing.patterns import build_layer_types
from tests import composing
from tests.reference import tiny_model


def compose(*arguments):
    return composing.compose(arguments, "benchmark")


def test_the_defaults():
    cfg = compose()
    workload = build_workload(cfg)
    assert (workload.prompt_length, workload.new_tokens, workload.batch_sizes) == (512, 32, (1,))
    assert workload.kv_budget == 64_000_000 and workload.length == 544
    assert {label: each["layer_types"] for label, each in random_models(cfg).items()} == {
        name: build_layer_types(name, 8) for name in DEFAULT_PATTERNS
    }


def test_patterns_stay_text_and_follow_the_model_group():
    cfg = compose(
        "patterns=[0_0_2_2,2_2_2_3,llama]",
        "model=nano",
        "prompt_length=9",
        "model.sliding_window=9",
        "model.vocab_size=77",
    )
    models = random_models(cfg)
    assert list(models) == ["0_0_2_2", "2_2_2_3", "llama"]
    assert models["llama"]["layer_types"] == "0_1_2_3" and models["2_2_2_3"]["layer_types"] == "2_2_2_3"
    assert {each["hidden_size"] for each in models.values()} == {64}
    assert {each["sliding_window"] for each in models.values()} == {9}
    assert {each["vocab_size"] for each in models.values()} == {77}


def test_named_patterns_have_as_many_layers_as_strings():
    models = random_models(compose("model=nano", "prompt_length=9", "patterns=[llama,1_1_1_1_4_4,cla]"))
    assert [each["num_hidden_layers"] for each in models.values()] == [6, 6, 6]


def test_checkpoints_alone_need_no_patterns():
    assert random_models(compose("checkpoints=[a,123]")) == {}
    assert compose("checkpoints=[a,123]").checkpoints == ["a", "123"]
    assert list(random_models(compose("checkpoints=[a]", "patterns=[cla]"))) == ["cla"]


def test_a_workload_from_the_command_line():
    cfg = compose(
        "kv_budget=1MiB", "batch_sizes=[1,4,4]", "prefill_passes=converge", "prefill_tolerance=0.1", "seed=3"
    )
    workload = build_workload(cfg)
    assert (workload.kv_budget, workload.batch_sizes, workload.seed) == (2**20, (1, 4), 3)
    assert (workload.prefill_passes, workload.prefill_tolerance) == ("converge", 0.1)
    assert build_workload(compose("kv_budget=null")).kv_budget is None
    assert build_workload(compose("prefill_passes=9", "kv_budget=2000")).kv_budget == 2000


def test_a_pattern_that_yaml_has_made_a_number_is_refused():
    cfg = compose()
    cfg.patterns = [222]
    with pytest.raises(UserError, match=r"patterns\[0\]=222: must be text.*write it in quotes"):
        random_models(cfg)


def test_checkpoints_are_called_by_what_tells_them_apart():
    labels = checkpoint_labels(["runs/a/model", "runs/b/model/", "c", "yoco"], taken=["yoco"])
    assert labels == {"model": "runs/a/model", "b/model": "runs/b/model/", "c": "c", "yoco ": "yoco"}


def test_random_weights_depend_on_the_seed_alone():
    sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=2)
    arguments = dict.fromkeys(("a", "b"), {"layer_types": "0_0", **sizes})
    models = load_models(BenchmarkConfig(device="cpu", dtype="bfloat16", seed=1), arguments)
    first, again = models.values()
    (other,) = load_models(BenchmarkConfig(device="cpu", seed=2), {"a": arguments["a"]}).values()
    assert (first.dtype, other.dtype) == (torch.bfloat16, torch.float32) and not first.training
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight.bfloat16())


@pytest.mark.parametrize(("passes", "tolerance", "name"), [(3, None, "passes"), (None, 0.1, "tolerance")])
def test_iteration_is_refused_where_nothing_iterates(passes, tolerance, name):
    downward, upward = tiny_model("0_0").config, tiny_model("1_1", forward_passes="converge").config
    in_sequence = tiny_model("1_1", use_sequential=True).config
    with pytest.raises(UserError, match=f"^prefill_{name}=.*: has no effect on a, b: none iterates"):
        check_iteration(passes, tolerance, {"a": downward, "b": in_sequence})
    check_iteration(passes, tolerance, {"a": downward, "b": upward})
    check_iteration(None, None, {"a": downward})


def test_a_tolerance_is_refused_where_the_number_of_passes_is_fixed():
    upward = tiny_model("1_1").config
    with pytest.raises(UserError, match="^prefill_tolerance=0.1: has no effect without prefill_passes=converge"):
        check_iteration(3, 0.1, {"a": upward})
    check_iteration(None, 0.1, {"a": upward})
    check_iteration("converge", 0.1, {"a": upward})


@pytest.mark.parametrize("suite", sorted(path.stem for path in (config_dir() / "suite").glob("*.yaml")))
def test_every_suite_can_be_run(suite):
    cfg = compose(f"suite={suite}")
    assert len(random_models(cfg)) > 2
    assert build_workload(cfg).prompt_length > 100


def test_the_decode_suite_holds_whole_sequences_of_llama():
    """The batch must be able to grow by the plan's factor: 8 sequences of Llama, 21 of LCKV's 8/3 = 2.67 times."""
    from lckv.sharing.costs import ModelSizes, count_kv_bytes
    from lckv.sharing.patterns import parse_layer_types

    cfg = compose("suite=decode")
    workload = build_workload(cfg)
    batches = {
        label: workload.kv_budget
        // count_kv_bytes(
            parse_layer_types(label), ModelSizes.from_config(each), workload.length, "float32"
        ).resident_total
        for label, each in random_models(cfg).items()
    }
    assert list(batches.values()) == [8, 16, 32, 21, 21]
