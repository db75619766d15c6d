"""What is averaged and what is not, what is compared and what is not."""

import pytest

from lckv.reporting.analysis import analyse, llama_flops
from lckv.reporting.runs import read_runs
from tests.unit.reporting.sweeps import VERSIONS, write_evaluations, write_run


def analysed(folder):
    return analyse(read_runs(folder), folder)


def rows_of(folder):
    """Its groups by their labels."""
    return {row.label: row for row in analysed(folder).rows}


def labels(folder):
    return list(rows_of(folder))


def test_runs_that_differ_in_the_seed_and_in_what_changes_no_result_are_one_group(tmp_path):
    write_run(tmp_path / "a", "cla", 0)
    write_run(tmp_path / "b", "cla", 1, settings={"trainer.num_threads": 2, "trainer.resume": False})
    write_run(tmp_path / "c", "cla", 2, settings={"logger.names": ["wandb"], "trainer.micro_batch_size": 4})
    report = analysed(tmp_path)
    assert [(row.label, len(row.runs)) for row in report.rows] == [("cla", 3)]
    assert report.notes == report.warnings == []


def test_the_same_pattern_by_its_string_and_by_its_family_is_one_group(tmp_path):
    write_run(tmp_path / "a", "cla", 0)
    string = {"model.layer_types": "0_0_2_2_4_4_6_6", "model.num_hidden_layers": None, "sharing.name": "lckv"}
    write_run(tmp_path / "b", "cla", 1, settings=string)
    assert labels(tmp_path) == ["cla"]


def test_passes_matter_only_to_cycles_and_windows_only_to_windows(tmp_path):
    for seed, settings in enumerate(({}, {"model.forward_passes": 3, "model.sliding_window": 64})):
        for sharing in ("llama", "lckv", "yoco"):
            write_run(tmp_path / f"{sharing}{seed}", sharing, seed, settings=settings)
    assert labels(tmp_path) == [
        *("llama", "yoco sliding_window=4096", "yoco sliding_window=64"),
        *("lckv forward_passes=1", "lckv forward_passes=3"),
    ]


def test_other_settings_are_other_groups_and_say_so(tmp_path):
    write_run(tmp_path / "a", "cla")
    write_run(tmp_path / "b", "cla", settings={"optim.learning_rate": 0.002})
    write_run(tmp_path / "c", "cla", steps=200)
    assert labels(tmp_path) == [
        "cla learning_rate=0.001 max_steps=400",
        "cla learning_rate=0.002 max_steps=400",
        "cla learning_rate=0.001 max_steps=200",
    ]


def test_long_settings_are_shortened_and_need_no_escapes(tmp_path):
    write_run(tmp_path / "a", "cla", data_fingerprint="0" * 24, tokens=5)
    write_run(tmp_path / "b", "cla", data_fingerprint="f" * 24, tokens=6)
    write_run(tmp_path / "c", "lckv", settings={"data.subset": "données"})
    write_run(tmp_path / "d", "lckv")
    assert labels(tmp_path) == [
        "cla data=0000000…000000",
        "cla data=fffffff…ffffff",
        "lckv subset=données",
        "lckv subset=null",
    ]


def test_the_same_run_twice_counts_once(tmp_path):
    write_run(tmp_path / "a", "cla", 0)
    write_run(tmp_path / "b", "cla", 0)
    report = analysed(tmp_path)
    assert [run.name for run in report.finished] == ["a"]
    left_out = "b repeats a (same pattern, same settings, same seed) and is left out"
    assert report.notes == [left_out]
    write_evaluations(tmp_path / "a", {"perplexity": {"loss": 3.0}})
    write_evaluations(tmp_path / "b", {"perplexity": {"loss": 3.0}, "needle": {"accuracy": 0.5}})
    assert analysed(tmp_path).notes == [f"{left_out}, with its figures of needle, which a has not"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"versions": {**VERSIONS, "torch": "2.11.0"}}, "the version of torch differs: 2.13.0 in a; 2.11.0 in b"),
        ({"data_fingerprint": "ffff"}, "the text differs: a1b2c3d4e5f6 in a; ffff in b"),
        ({"tokens": 5}, "the number of tokens differs: 1,638,400 in a; 5 in b"),
        ({"settings": {"model.hidden_size": 128}}, "hidden_size differs: 256 in a; 128 in b"),
        ({"drop": ("data_fingerprint",)}, "the text differs: a1b2c3d4e5f6 in a; unknown in b"),
    ],
)
def test_what_is_not_comparable_is_named_and_never_averaged(tmp_path, changed, words):
    write_run(tmp_path / "a", "cla", 0)
    write_run(tmp_path / "b", "cla", 1, **changed)
    report = analysed(tmp_path)
    assert report.warnings == [f"not comparable: {words}"]
    assert [[len(runs) for runs in cohort.groups["runs"]] for cohort in report.cohorts] == [[1], [1]]
    assert [cohort.name for cohort in report.cohorts] == ["A", "B"]


def test_costs_are_relative_to_the_llama_of_the_sweep(tmp_path):
    write_run(tmp_path / "a", "llama", train_flops_per_token=100, tokens_per_second=50)
    write_run(tmp_path / "b", "cla", train_flops_per_token=80, tokens_per_second=40)
    write_run(tmp_path / "c", "lckv", settings={"trainer.num_threads": 7})
    write_run(tmp_path / "d", "yoco", hardware={"device": "another", "num_cores": 2, "num_threads": 2})
    rows = rows_of(tmp_path)
    assert {row.baseline for row in rows.values()} == {"llama"}
    assert (rows["cla"].flops_ratio, rows["cla"].time_ratio) == (0.8, 1.25)
    assert rows["lckv"].time_ratio is None  # another number of threads
    assert rows["yoco"].time_ratio is None  # another machine


def test_without_a_llama_its_flops_are_counted_where_the_sizes_are_certain(tmp_path):
    write_run(tmp_path / "a", "llama")
    write_run(tmp_path / "sweep" / "b", "lckv", settings={"model.forward_passes": 7})
    write_run(tmp_path / "sweep" / "c", "cla", train_flops_per_token=1.0)
    llama, lckv, cla = read_runs(tmp_path).itertuples()
    assert llama_flops(lckv) == pytest.approx(llama.train_flops_per_token)
    assert llama_flops(cla) is None
    rows = rows_of(tmp_path / "sweep")
    assert rows["lckv"].flops_ratio == pytest.approx(lckv.train_flops_per_token / llama.train_flops_per_token)
    assert rows["cla"].flops_ratio is None


def test_a_llama_of_the_same_settings_is_the_baseline_or_else_the_best(tmp_path):
    for rate in (0.001, 0.002):
        for sharing in ("llama", "cla"):
            settings = {"optim.learning_rate": rate}
            write_run(tmp_path / f"{sharing}{rate}", sharing, settings=settings, eval_bits_per_byte=rate)
    write_run(tmp_path / "other", "cla", settings={"optim.learning_rate": 0.003})
    assert {label: row.baseline for label, row in rows_of(tmp_path).items()} == {
        **{f"llama learning_rate={rate}": f"llama learning_rate={rate}" for rate in (0.001, 0.002)},
        **{f"cla learning_rate={rate}": f"llama learning_rate={rate}" for rate in (0.001, 0.002)},
        "cla learning_rate=0.003": "llama learning_rate=0.001",
    }
