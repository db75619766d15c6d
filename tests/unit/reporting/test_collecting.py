"""Reading run folders of any state and version."""

import datetime
import io
import json
import math

import pytest
import yaml
from rich.console import Console

from lckv.errors import UserError
from lckv.reporting.analysis import analyse
from lckv.reporting.collecting import Run, read_runs
from lckv.reporting.curves import curves_of
from lckv.reporting.grouping import group_runs
from lckv.reporting.metrics import Metric, available_metrics, choose_metric
from lckv.reporting.terminal import print_report
from lckv.reporting.troubles import trouble_of, troubles_of
from lckv.reporting.writing import write_report
from tests.unit.reporting.sweeps import write_config, write_evaluations, write_failure, write_run


def test_a_folder_that_is_not_there_names_the_one_that_is_meant(tmp_path):
    (tmp_path / "sweep").mkdir()
    with pytest.raises(UserError, match="folder=.*swep: there is no such folder; did you mean 'sweep'"):
        read_runs(tmp_path / "swep")
    with pytest.raises(UserError, match="holds no run"):
        read_runs(tmp_path / "sweep")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        read_runs(tmp_path / "file")


def test_runs_are_found_at_any_depth_behind_links_and_once(tmp_path):
    write_run(tmp_path / "sweep" / "deep" / "er" / "one")
    write_config(tmp_path / "sweep" / ".hydra", "llama", {})
    elsewhere = write_run(tmp_path / "elsewhere", "cla")
    (tmp_path / "sweep" / "link").symlink_to(elsewhere)
    (tmp_path / "sweep" / "circle").symlink_to(tmp_path / "sweep")
    assert [run.name for run in read_runs(tmp_path / "sweep")] == ["deep/er/one", "link"]
    assert [run.name for run in read_runs(elsewhere)] == ["elsewhere"]


def test_states_and_their_reasons(tmp_path):
    write_failure(tmp_path / "a", error="out of\n memory")
    write_run(tmp_path / "b", "cla", stop_at=230)
    write_run(tmp_path / "c", eval_loss=float("nan"))
    write_run(tmp_path / "d")
    (write_run(tmp_path / "e") / "results.json").write_text('{"eval_loss": 1')
    write_config(tmp_path / "f", "cla", {})
    write_failure(write_run(tmp_path / "g"))  # finished after it had failed
    runs = read_runs(tmp_path)
    found = {trouble.run.name: (trouble.state, trouble.reason) for trouble in troubles_of(runs)}
    assert found == {
        "a": ("failed", "RuntimeError: out of memory"),
        "b": ("unfinished", "step 230 of 400"),
        "c": ("diverged", "the validation loss is nan"),
        "e": ("unreadable", "results.json cannot be read: JSONDecodeError"),
        "f": ("unfinished", "no step of 1,000 is logged yet"),
    }
    assert [trouble.run.name for trouble in troubles_of(runs)] == ["a", "c", "e", "b", "f"]


def test_a_failure_before_there_was_a_configuration(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "failure.json").write_text(json.dumps({"error": "no", "layer_types": "0_0"}))
    (run,) = read_runs(tmp_path)
    assert trouble_of(run).reason == "no"
    assert (run.layer_types, run.family) == ("0_0", None)


def test_torn_lines_are_passed_over(tmp_path):
    run = write_run(tmp_path / "a")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 401, "lo')
    (read,) = read_runs(run)
    assert read.lines[-1]["step"] == 400


def test_patterns_and_families(tmp_path):
    write_run(tmp_path / "a", "cla")
    write_run(tmp_path / "b", settings={"model.layer_types": "0_0_2_2", "model.num_hidden_layers": None})
    write_run(tmp_path / "c", settings={"model.layer_types": "0_1", "model.num_hidden_layers": None})
    write_run(tmp_path / "d", "cla", settings={"sharing.group_size": 4})
    write_run(tmp_path / "e", "yoco", stop_at=10)
    runs = read_runs(tmp_path)
    assert [(run.family, run.layer_types) for run in runs] == [
        ("cla", "0_0_2_2_4_4_6_6"),
        (None, "0_0_2_2"),
        ("llama", "0_1"),
        ("cla (group_size=4)", "0_0_0_0_4_4_4_4"),
        ("yoco", "0s_1s_2s_3s_4_4_4_4"),
    ]
    assert Run("x").layer_types is None


def test_evaluations_beside_the_run_win(tmp_path):
    within = {"needle": {"accuracy": [[0.5, 1.0]]}, "mine": {"a": 1, "flag": True, "text": "x", "deep": {"b": 2.5}}}
    run = write_run(tmp_path / "a", evaluations=within)
    tasks = {"arc": {"acc": 0.25, "acc_stderr": 0.1}}
    write_evaluations(run, {"harness": {"tasks": tasks}, "needle": {"accuracy": [[0.0, 0.5], [1.0, None]]}})
    metrics = available_metrics(read_runs(tmp_path))
    (read,) = read_runs(tmp_path)
    assert {name: metric.of(read) for name, metric in metrics.items() if ":" in name} == {
        "needle:accuracy": 0.5,
        "mine:a": 1,
        "mine:deep.b": 2.5,
        "harness:arc.acc": 0.25,
    }
    assert not metrics["harness:arc.acc"].lower_is_better
    assert metrics["perplexity"].lower_is_better


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
    assert Metric(name, name, lambda run: None).lower_is_better is lower_is_better


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("config.yaml", {"seed": [1]}),
        ("config.yaml", {"seed": datetime.date(2020, 1, 2)}),
        ("results.json", {"data_fingerprint": ["a"]}),
        ("results.json", {"versions": {"lckv": {"a": 1}}}),
        ("results.json", {"kv_bytes": {"written": 0}}),
        ("results.json", {"kv_bytes": {"written": -4.0}}),
        ("results.json", {"kv_bytes_llama": {"written": -4.0}}),
        ("results.json", {"eval_bits_per_byte": 10**400}),
        ("results.json", {"eval_perplexity": 1e300, "eval_bits_per_byte": 1e300}),
        ("results.json", {"evaluations": {"needle": {"lengths": ["a"], "depths": [0.5], "accuracy": [[1.0]]}}}),
        ("results.json", {"evaluations": {"needle": {"lengths": [8], "depths": [math.nan], "accuracy": [[1.0]]}}}),
        ("results.json", "[" * 100_000),
    ],
)
def test_a_damaged_run_does_not_keep_others_from_their_report(tmp_path, file, damage):
    sweep = tmp_path / "sweep"
    for name, sharing in (("a", "llama"), ("b", "cla"), ("c", "lckv")):
        write_run(sweep / name, sharing)
    path = sweep / "c" / file
    if isinstance(damage, str):
        path.write_text(damage)
    else:
        dump = yaml.safe_dump if path.suffix == ".yaml" else json.dumps
        path.write_text(dump(yaml.safe_load(path.read_text()) | damage))
    report = analyse(read_runs(sweep), sweep)
    write_report(report, tmp_path / "out")
    print_report(report, [], Console(file=io.StringIO()))
    assert {"llama", "cla"} <= {row.group.label for row in report.rows}


def test_metrics_that_no_run_has_are_refused(tmp_path):
    write_run(tmp_path / "a", drop=("eval_bits_per_byte",))
    runs = read_runs(tmp_path)
    assert choose_metric(None, runs).name == "perplexity"
    assert choose_metric("loss", runs).name == "loss"
    with pytest.raises(UserError, match="metric='perplexty': allowed are perplexity, loss; did you mean 'perplexity'"):
        choose_metric("perplexty", runs)
    with pytest.raises(UserError, match="metric=bits_per_byte: no finished run has it"):
        choose_metric("bits_per_byte", runs)
    with pytest.raises(UserError, match="did you mean 'loss'"):
        choose_metric("los", [])


def test_curves_are_means_at_common_steps(tmp_path):
    for seed, losses in enumerate(([4.0, 2.0], [2.0, 1.0, 0.5])):
        run = write_run(tmp_path / str(seed), seed=seed, train_flops_per_token=10)
        lines = [{"step": n, "tokens": 8 * n, "seconds": n + seed, "loss": loss} for n, loss in enumerate(losses)]
        lines.append({"step": 1, "tokens": 8, "eval_loss": 3.0})
        lines[0] |= {"loss_labels": 5.0, "loss": 9.0}  # with a teacher, the loss is another thing
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (curves,) = curves_of(group_runs(read_runs(tmp_path))[0])
    assert [(point.tokens, point.loss, point.seconds, point.flops) for point in curves.training] == [
        (0, 5.0, 0.5, 0),
        (8, 1.5, 1.5, 80),
    ]
    assert [(point.loss, point.seconds) for point in curves.validation] == [(3.0, 1.5)]
