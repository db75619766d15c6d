"""`python -m lckv.benchmark` as a user runs it."""

import json

import pytest

from lckv import benchmark
from lckv.benchmarking.measuring import Bench
from lckv.commands import cli
from lckv.sharing.costs import ModelSizes, count_kv_bytes
from lckv.sharing.patterns import parse_layer_types
from tests.reference import tiny_model

SHORT = ("num_threads=1", "prompt_length=20", "new_tokens=3", "rounds=2", "kv_budget=100kB")
TINY = ("model=nano", *SHORT)


def test_patterns_and_caches_side_by_side(run_module, tmp_path):
    done = run_module("lckv.benchmark", *TINY, "patterns=[llama,0_2_2_3]", "caches=[dynamic,static]")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "Largest batch in 100 kB of KV" in done.stdout and "0_2_2_3, static" in done.stdout
    assert sorted(path.name for path in (tmp_path / "runs" / "benchmark").iterdir()) == [
        "benchmark.json",
        "benchmark.png",
    ]
    figures = json.loads((tmp_path / "runs" / "benchmark" / "benchmark.json").read_text())
    labels = ["llama, dynamic", "llama, static", "0_2_2_3, dynamic", "0_2_2_3, static"]
    assert [each["label"] for each in figures["candidates"]] == labels
    sizes = ModelSizes(4096, 64, 176, 4, 2, 16, 4096)
    for each in figures["candidates"]:
        assert each["error"] is None and len(each["prefill_seconds"]["rounds"]) == 2
        plan = count_kv_bytes(parse_layer_types(each["layer_types"]), sizes, 23, "float32")
        assert each["written_bytes"] == plan.written
        single, largest = each["batches"]
        assert (single["batch_size"], single["kv_bytes"]) == (1, each["resident_bytes"])
        assert largest["kv_bytes"] <= 100_000 and largest["tokens_per_second"]["median"] > 0
        if each["cache"] == "dynamic":
            assert each["resident_bytes"] == plan.resident_total
            assert each["read_bytes"] == plan.read
            assert largest["batch_size"] == 100_000 // plan.resident_total


def test_one_json_object_for_other_programs_and_a_checkpoint(run_module, tmp_path):
    model = tiny_model("0_0_2_2", vocab_size=300)
    model.save_pretrained(tmp_path / "mine")
    save_tokenizer(tmp_path / "mine")
    done = run_module("lckv.benchmark", *SHORT, "checkpoints=[mine]", "output_dir=out", "json=true", "plot_format=svg")
    assert done.returncode == 0, done.stderr
    (contender,) = json.loads(done.stdout)["candidates"]
    assert (contender["label"], contender["layer_types"], contender["error"]) == ("mine", "0_0_2_2", None)
    assert contender["weight_bytes"] == sum(weight.nbytes for weight in model.parameters())
    assert (tmp_path / "out" / "benchmark.svg").is_file()
    again = run_module("lckv.benchmark", *SHORT, "checkpoints=[mine]", "output_dir=out")
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == (
        "lckv.benchmark: error: output_dir=out: holds the results of an earlier run; name another folder, or give "
        "overwrite=true\n"
    )


def test_ctrl_c_writes_what_there_is(tmp_path, monkeypatch, capsys):
    turns, run_round = [], Bench.run_round

    def run(bench):
        turns.append(run_round(bench))
        if len(turns) == 3:
            raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Bench, "run_round", run)
    given = [each for each in TINY if not each.startswith(("num_threads", "rounds"))]
    monkeypatch.setattr(
        "sys.argv", ["benchmark", *given, "patterns=[llama,0_2_2_3]", "rounds=9", "cache=paged", "cache.page_size=4"]
    )
    with pytest.raises(SystemExit) as caught:
        cli.run(benchmark.main, "benchmark")
    assert caught.value.code == 130
    assert "interrupted after 1 of 9 rounds" in capsys.readouterr().out
    figures = json.loads((tmp_path / "runs" / "benchmark" / "benchmark.json").read_text())
    assert figures["is_interrupted"] and figures["num_rounds"] == 1
    assert [len(each["prefill_seconds"]["rounds"]) for each in figures["candidates"]] == [1, 1]
    assert [(each["cache"], each["cache_options"]) for each in figures["candidates"]] == [
        ("paged", {"page_size": 4})
    ] * 2
    assert (tmp_path / "runs" / "benchmark" / "benchmark.png").is_file()


def save_tokenizer(folder):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "a": 1}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<s>")))
    tokenizer.save_pretrained(folder)


def test_mistakes_are_one_line_each(run_module, tmp_path):
    for argument, message in (
        ("checkpoints=[nowhere]", "checkpoints=nowhere: there is no such folder"),
        ("round=3", "unknown key 'round'; did you mean 'rounds'?"),
    ):
        done = run_module("lckv.benchmark", *SHORT, argument)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert done.stderr.startswith(f"lckv.benchmark: error: {message}") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
