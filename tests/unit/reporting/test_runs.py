"""Reading run folders of any state and version."""

import io
import json
import math
from dataclasses import asdict

import pytest
import yaml
from rich.console import Console

from lckv.config import ModelConfig
from lckv.errors import UserError
from lckv.reporting.analysis import analyse
from lckv.reporting.metrics import Metric, choose_metric
from lckv.reporting.pictures.losses import curves_of
from lckv.reporting.runs import read_runs
from lckv.reporting.tables import tables_of
from lckv.reporting.writing import print_report, write_report
from tests.unit.reporting.sweeps import write_config, write_evaluations, write_failure, write_run


def test_runs_are_found_at_any_depth_behind_links_and_once(tmp_path):
    write_run(tmp_path / "sweep" / "deep" / "er" / "one")
    write_config(tmp_path / "sweep" / ".hydra", "llama", {})
    elsewhere = write_run(tmp_path / "elsewhere", "cla")
    (tmp_path / "sweep" / "link").symlink_to(elsewhere)
    (tmp_path / "sweep" / "circle").symlink_to(tmp_path / "sweep")
    assert [*read_runs(tmp_path / "sweep")["name"]] == ["deep/er/one", "link"]
    assert [*read_runs(elsewhere)["name"]] == ["elsewhere"]


def test_a_folder_without_runs_is_named(tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "file").write_text("")
    for name, answer in [
        ("swep", "folder=.*swep: there is no such folder; did you mean 'sweep'"),
        ("sweep", "holds no run"),
        ("file", "is a file"),
    ]:
        with pytest.raises(UserError, match=answer):
            read_runs(tmp_path / name)


def test_states_and_their_reasons(tmp_path):
    write_failure(tmp_path / "a", error="out of\n memory")
    write_run(tmp_path / "b", "cla", stop_at=230)
    write_run(tmp_path / "c", eval_loss=float("nan"))
    write_run(tmp_path / "d")
    (write_run(tmp_path / "e") / "results.json").write_text('{"eval_loss": 1')
    write_config(tmp_path / "f", "cla", {})
    write_failure(write_run(tmp_path / "g"))  # finished after it had failed
    write_evaluations(tmp_path / "g", {})
    (tmp_path / "g" / "evaluation" / "results.json").write_text("{")
    (tmp_path / "h").mkdir()  # failed before there was a configuration
    (tmp_path / "h" / "failure.json").write_text(json.dumps({"error": "no", "layer_types": "0_0"}))
    runs = read_runs(tmp_path)
    assert {run.name: (run.state, run.reason) for run in runs.itertuples()} == {
        "a": ("failed", "RuntimeError: out of memory"),
        "b": ("unfinished", "step 230 of 400"),
        "c": ("diverged", "the validation loss is nan"),
        "d": ("finished", ""),
        "e": ("unreadable", "results.json cannot be read: JSONDecodeError"),
        "f": ("unfinished", "no step of 1,000 is logged yet"),
        "g": ("finished", ""),
        "h": ("failed", "no"),
    }
    report = analyse(runs, tmp_path)
    assert [run.name for run in report.troubles] == ["a", "c", "e", "h", "b", "f"]
    assert report.notes == ["g: evaluation/results.json cannot be read: JSONDecodeError"]
    assert [*runs.iloc[-1][["layer_types", "family"]]] == ["0_0", None]


def test_patterns_by_family_string_and_parameters(tmp_path):
    write_run(tmp_path / "a", "cla")
    string = {"model.num_hidden_layers": None}
    write_run(tmp_path / "b", settings={"model.layer_types": "0_0_2_2", **string})
    write_run(tmp_path / "c", settings={"model.layer_types": "0_1", **string})
    write_run(tmp_path / "d", "cla", settings={"sharing.group_size": 4})
    write_run(tmp_path / "e", "yoco", stop_at=10)
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "config.yaml").write_text("seed: 1\n")
    write_run(tmp_path / "g", "random", settings={"sharing.reach": 3})
    assert read_runs(tmp_path)[["family", "layer_types"]].values.tolist() == [
        ["cla", "0_0_2_2_4_4_6_6"],
        [None, "0_0_2_2"],
        ["llama", "0_1"],
        ["cla (group_size=4)", "0_0_0_0_4_4_4_4"],
        ["yoco", "0s_1s_2s_3s_4_4_4_4"],
        [None, None],
        ["random (reach=3)", "0_1_2_3_4_5_6_7"],
    ]


def test_figures_keep_their_types_and_evaluations_beside_the_run_win(tmp_path):
    within = {"needle": {"accuracy": [[0.5, 1.0]]}, "mine": {"a": 1, "flag": True, "text": "x", "deep": {"b": 2.5}}}
    within["mine"]["settings"] = {"seed": 3, "data": {"validation_fraction": 0.5}}
    run = write_run(tmp_path / "a", evaluations=within)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('[1]\n{"step": 41')  # torn by a kill
    tasks = {"arc": {"acc": 0.25, "acc_stderr": 0.1, "num_samples": 8}}
    write_evaluations(run, {"harness": {"tasks": tasks}, "needle": {"accuracy": [[0.0, 0.5], [1.0, None]]}})
    write_run(tmp_path / "b", drop=("kv_bytes",))
    first, second = read_runs(tmp_path).itertuples()
    assert {name: value for name, value in first.metrics.items() if ":" in name} == {
        "needle:accuracy": 0.5,
        "mine:a": 1,
        "mine:deep.b": 2.5,
        "harness:arc.acc": 0.25,
    }
    assert (first.written, second.written, type(first.written)) == (8192, None, int)
    assert first.lines[-1]["step"] == 400


@pytest.mark.parametrize(
    ("name", "lower_is_better"),
    [
        *(("perplexity", True), ("bits_per_byte", True), ("loss", True), ("perplexity:byte_perplexity", True)),
        *(("harness:wikitext.word_perplexity", True), ("harness:lambada.perplexity,strict", True)),
        *(("harness:lambada.acc", False), ("recall:accuracy", False), ("speed:decode.tokens_per_second", False)),
        ("harness:bbh_fewshot_salient_translation_error_detection.exact_match", False),
        ("harness:include_base_44_applied_science.acc,none", False),
        ("harness:glossary.acc", False),
    ],
)
def test_the_figure_and_not_the_task_says_what_is_better(name, lower_is_better):
    assert Metric(name).lower_is_better is lower_is_better


def test_metrics_that_no_run_has_are_refused():
    metrics = [{"perplexity": 3.0, "loss": 1.0}]
    assert choose_metric(None, metrics).name == "perplexity"
    assert choose_metric("loss", metrics).name == "loss"
    assert choose_metric(None, []).name == "bits_per_byte"
    with pytest.raises(UserError, match="metric='perplexty': allowed are perplexity, loss; did you mean 'perplexity'"):
        choose_metric("perplexty", metrics)
    with pytest.raises(UserError, match="metric=bits_per_byte: no finished run has it"):
        choose_metric("bits_per_byte", metrics)
    with pytest.raises(UserError, match="did you mean 'loss'"):
        choose_metric("los", [])


DAMAGES = [
    ("config.yaml", {"seed": [1]}),
    ("results.json", {"data_fingerprint": ["a"]}),
    ("results.json", {"versions": {"lckv": {"a": 1}}}),
    ("results.json", {"kv_bytes": {"written": 0}}),
    ("results.json", {"kv_bytes_llama": {"written": -4.0}}),
    ("results.json", {"eval_bits_per_byte": 10**400}),
    ("results.json", {"eval_perplexity": 1e300, "eval_bits_per_byte": 1e300}),
    ("results.json", {"evaluations": {"needle": {"lengths": [8], "depths": [math.nan], "accuracy": [[1.0]]}}}),
    ("results.json", {"evaluations": {"needle": {"lengths": [8], "depths": [0.5], "accuracy": [[10**400]]}}}),
    ("results.json", "[" * 100_000),
    ("config.yaml", {"model": {**asdict(ModelConfig()), "num_attention_heads": 0}}),
    ("config.yaml", {"model": {**asdict(ModelConfig()), "vocab_size": "many"}}),
]


def test_damaged_runs_do_not_keep_others_from_their_report(tmp_path):
    healthy = [write_run(tmp_path / "sweep" / sharing, sharing) for sharing in ("llama", "cla")]
    for number, (file, damage) in enumerate(DAMAGES):
        path = write_run(tmp_path / "sweep" / f"lckv{number}", "lckv", number) / file
        if isinstance(damage, str):
            path.write_text(damage)
        else:
            dump = yaml.safe_dump if path.suffix == ".yaml" else json.dumps
            path.write_text(dump(yaml.safe_load(path.read_text()) | damage))
        alone = tmp_path / str(number)
        alone.mkdir()
        for run in (*healthy, path.parent):
            (alone / run.name).symlink_to(run)
        report = analyse(read_runs(alone), alone)
        assert tables_of(report) and {"llama", "cla"} <= {row.label for row in report.rows}
    report = analyse(read_runs(tmp_path / "sweep"), tmp_path)
    write_report(report, tmp_path / "out")
    print_report(report, [], Console(file=io.StringIO()))


def test_curves_are_means_at_common_steps(tmp_path):
    for seed, losses in enumerate(([4.0, 2.0], [2.0, 1.0, 0.5])):
        run = write_run(tmp_path / str(seed), seed=seed, train_flops_per_token=10)
        lines = [{"step": n, "tokens": 8 * n, "seconds": n + seed, "loss": loss} for n, loss in enumerate(losses)]
        lines.append({"step": 1, "tokens": 8, "eval_loss": 3.0})
        lines[0] |= {"loss_labels": 5.0, "loss": 9.0}  # with a teacher, the loss is another thing
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curves = curves_of(read_runs(tmp_path))
    assert curves[["kind", "tokens", "loss", "seconds", "flops"]].values.tolist() == [
        ["training", 0, 5.0, 0.5, 0],
        ["training", 8, 1.5, 1.5, 80],
        ["validation", 8, 3.0, 1.5, 80],
    ]
