"""The figures as data, as tables and as a picture."""

import io
import json

import pytest
from rich.console import Console

from lckv.benchmarking.results import (
    BatchMeasurements,
    Measurements,
    as_dict,
    draw_results,
    failures,
    median,
    print_report,
    ratio,
    tokens_per_second,
)
from lckv.benchmarking.settings import OutputFolder, Workload
from lckv.errors import UserError
from lckv.sharing.costs import FlopsPerToken, KVBytes
from lckv.utils.charts import save_chart

WORKLOAD = Workload(100, 10, batch_sizes=(1,), kv_budget=10_000, rounds=3)
ENVIRONMENT = {"device": "cpu (x)", "num_threads": 1, "torch_version": "2.0"}


def result(label, factor, **settings):
    """A contender that is `factor` times as slow and needs `1 / factor` of the bytes."""
    return Measurements(
        label=label,
        layer_types="0_1",
        cache="dynamic",
        cache_options={},
        kv_bytes=KVBytes(100 // factor, 100 / factor, 11_000 // factor, 11_000),
        flops=FlopsPerToken(2.0, 1.0, 3.0, 9.0),
        weight_bytes=5_000,
        resident_bytes=11_000 // factor,
        written_bytes=100 // factor,
        read_bytes=11_000,
        prefill_peak_bytes=20_000,
        prefill_seconds=[factor * 0.5, factor * 1.0, factor * 10.0],
        first_token_seconds=[factor * 0.6, factor * 1.1, factor * 10.1],
        batches=[
            BatchMeasurements(1, False, 11_000, 11_000, 12_000, [factor * 1.0, factor * 2.0, factor * 4.0]),
            BatchMeasurements(4 * factor, True, 9_000, 9_000, 12_000, [1.0, 2.0, 4.0]),
        ],
        **settings,
    )


def failed(label="broken"):
    lost = result(label, 1, error="out of memory")
    for name in ("resident_bytes", "written_bytes", "read_bytes", "prefill_peak_bytes"):
        setattr(lost, name, None)
    lost.prefill_seconds, lost.first_token_seconds, lost.batches = [], [], []
    return lost


def test_ratios_are_taken_within_a_round():
    assert ratio([2.0, 20.0, 6.0], [1.0, 10.0, 1.0]) == 2.0
    assert ratio([2.0], [1.0, 10.0]) == 2.0
    assert ratio([], [1.0]) is None and median([]) is None
    assert tokens_per_second(BatchMeasurements(3, False, 0, seconds=[2.0, 4.0]), 10) == [15.0, 7.5]
    assert tokens_per_second(None, 10) == []


def test_the_data_has_every_figure():
    figures = json.loads(json.dumps(as_dict([result("a", 1), result("b", 2), failed()], WORKLOAD, ENVIRONMENT, 3)))
    assert list(figures) == ["workload", "environment", "num_rounds", "is_interrupted", "candidates"]
    assert (figures["num_rounds"], figures["is_interrupted"]) == (3, False)
    assert figures["workload"]["kv_budget"] == 10_000 and figures["environment"]["num_threads"] == 1
    first, second, broken = figures["candidates"]
    assert {*first} == {*second} == {*broken}
    assert {*second} >= {"label", "layer_types", "cache", "cache_options", "error", "weight_bytes", "prefill_passes"}
    assert second["prefill_seconds"] == {"rounds": [1.0, 2.0, 20.0], "median": 2.0, "to_first": 2.0}
    assert second["first_token_seconds"]["median"] == 2.2
    assert second["kv_bytes_per_token"] == {"resident": 50.0, "written": 50, "read": 11_000}
    assert second["plan"]["kv_bytes"]["written"] == 50 and second["plan"]["flops_per_token"]["prefill"] == 1.0
    single, largest = second["batches"]
    assert single["tokens_per_second"] == {"rounds": [5.0, 2.5, 1.25], "median": 2.5, "to_first": 0.5}
    assert (largest["batch_size"], largest["fills_budget"], largest["kv_bytes"]) == (8, True, 9_000)
    assert largest["tokens_per_second"]["to_first"] == 2.0
    assert (second["budget_growth"], second["planned_budget_growth"]) == (2.0, 2.0)
    assert broken["error"] == "out of memory" and broken["prefill_seconds"]["median"] is None


def test_growth_needs_both_batches():
    def growths(mine, first):
        candidate = as_dict([first, mine], WORKLOAD, ENVIRONMENT, 3)["candidates"][1]
        return candidate["budget_growth"], candidate["planned_budget_growth"]

    assert growths(failed(), result("a", 1)) == growths(result("a", 1), failed()) == (None, None)
    none_fits = result("a", 1)
    none_fits.batches[1].batch_size, none_fits.batches[1].seconds = 0, []
    assert growths(result("b", 2), none_fits) == (None, 8.0)  # planned for one sequence where none fits


def text_of(results, workload=WORKLOAD, num_rounds=3):
    console = Console(width=160, record=True, file=io.StringIO())
    print_report(as_dict(results, workload, ENVIRONMENT, num_rounds), console)
    return console.export_text()


def test_the_tables_say_what_was_measured():
    other = result("b", 2)
    other.written_bytes = 77
    other.batches[0].error = "no room"
    text = text_of([result("a", 1), other, failed()])
    assert "2.00 s 2.00x" in text and "1,100.0 ms" not in text
    assert "500.0 ms" not in text and "1.00 s 1.00x" in text
    assert "2.00x" in text and "10 kB of KV" in text
    assert "77 0.77x [50]" in text  # measured, to the first, and the plan's in brackets
    assert "written are the states that the cache is given" in text and "reads what it stores once per step" in text
    assert "b, batch 1: no room" in text and "broken: out of memory" in text
    assert failures(as_dict([other], WORKLOAD, ENVIRONMENT, 3)) == ["b, batch 1: no room"]
    assert "Largest batch" not in text_of([result("a", 1)], Workload(100, 10))


def test_an_interrupted_measurement_says_so():
    assert as_dict([result("a", 1)], WORKLOAD, ENVIRONMENT, 2)["is_interrupted"]
    text = text_of([result("a", 1)], num_rounds=2)
    assert "interrupted after 2 of 3 rounds" in text and "Medians of 2 rounds" in text
    assert "interrupted" not in text_of([result("a", 1)])


def test_the_picture_has_every_contender_and_figure():
    figure = draw_results(as_dict([result("a", 1), result("b", 2), failed()], WORKLOAD, ENVIRONMENT, 3))
    prefill, speed, kv_bytes, budget = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "prefill of 100 tokens (ms)",
        "decoding (tokens/s, all sequences together)",
        "KV bytes, measured (a = 100%)",
        "sequences of 110 tokens in 0.01 MB of KV",
    ]
    for axes in figure.axes:
        assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "broken"]
    assert [bar.get_width() for bar in prefill.patches] == [1000.0, 2000.0, 0.0]
    assert [text.get_text() for text in prefill.texts] == ["1,000", "2,000", "failed"]
    assert legend(speed) == ["batch 1", "largest batch in the budget"]
    assert legend(kv_bytes) == ["resident, per token", "written, per token", "read, per decoded token"]
    assert [bar.get_width() for bar in kv_bytes.patches][:2] == [100.0, 50.0]
    assert list(budget.lines[0].get_xdata()) == [4.0, 8.0]
    assert [bar.get_width() for bar in budget.patches] == [4.0, 8.0, 0.0]


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize(("ending", "start"), [("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_the_picture_is_written(tmp_path, ending, start):
    path = tmp_path / f"benchmark.{ending}"
    figures = as_dict([failed("first"), result("b", 2)], Workload(100, 10), ENVIRONMENT, 5)
    save_chart(draw_results(figures), path)
    assert path.read_bytes().startswith(start)
    assert list(tmp_path.iterdir()) == [path]


def test_results_are_never_overwritten_unasked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(3):
        folder = OutputFolder(None, overwrite=False, plot_format="png")
        with folder.claimed():
            folder.write({"a": 1})
        names.append(str(folder.path))
    assert names == ["runs/benchmark", "runs/benchmark-2", "runs/benchmark-3"]
    with pytest.raises(
        UserError, match="^output_dir=runs/benchmark: holds the results of an earlier run; name another"
    ):
        OutputFolder("runs/benchmark", overwrite=False, plot_format="png")
    replaced = OutputFolder("runs/benchmark", overwrite=True, plot_format="svg")
    with replaced.claimed():
        replaced.write({"a": 2})
    assert json.loads(replaced.results.read_text()) == {"a": 2} and replaced.plot.name == "benchmark.svg"
    assert [path.name for path in replaced.path.iterdir()] == ["benchmark.json"]


def test_runs_side_by_side_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = (OutputFolder(None, overwrite=False, plot_format="png") for _ in range(2))
    with first.claimed(), second.claimed():
        second.write({"run": 2})
        first.write({"run": 1})
    assert (str(first.path), str(second.path)) == ("runs/benchmark", "runs/benchmark-2")
    assert [json.loads(folder.results.read_text())["run"] for folder in (first, second)] == [1, 2]
    with OutputFolder(None, overwrite=False, plot_format="png").claimed():
        assert (tmp_path / "runs" / "benchmark-3").is_dir()
    assert not (tmp_path / "runs" / "benchmark-3").exists()  # nothing was written


def test_results_that_have_come_meanwhile_stay(tmp_path, caplog):
    first, second = (OutputFolder(str(tmp_path / "out"), overwrite=False, plot_format="png") for _ in range(2))
    with first.claimed(), second.claimed():
        second.write({"run": 2})
        first.write({"run": 1})
    assert json.loads((tmp_path / "out" / "benchmark.json").read_text()) == {"run": 2}
    assert json.loads((tmp_path / "out-2" / "benchmark.json").read_text()) == {"run": 1}
    assert first.plot == tmp_path / "out-2" / "benchmark.png" and "these go to" in caplog.text


def test_a_file_is_no_folder_for_results(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="^output_dir=.*file is a file; name another folder"):
        OutputFolder(str(tmp_path / "file"), overwrite=True, plot_format="png")
