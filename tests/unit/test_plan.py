"""The report on a sharing plan: its figures are those of `lckv.sharing.costs`, and every part is there to read."""

import io
import json

import pytest
from rich.console import Console

from lckv.errors import UserError
from lckv.plan import as_dict, build_report, main, print_report
from lckv.sharing.costs import ModelSizes, count_costs
from lckv.sharing.iteration import Iteration
from lckv.sharing.patterns import parse_layer_types
from tests.composing import compose


def report_on(*arguments: str):
    return build_report(compose(arguments, "plan"))


def printed(report) -> str:
    stream = io.StringIO()
    print_report(report, Console(file=stream, width=100))
    return stream.getvalue()


def row(text: str, name: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"│ {name}")]
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_figures_are_those_of_the_configuration():
    report = report_on(
        "model.layer_types=0_2s_2_3s",
        "model.sliding_window=10",
        "model.forward_passes=3",
        "model.cyclic_groups=4",
        "model.vocab_size=500",
        "context_length=100",
        "kv_dtype=float32",
    )
    sizes = ModelSizes(500, 192, 512, 3, 3, 64, 10, tie_word_embeddings=True, max_position_embeddings=1024)
    assert report.sizes == sizes
    expected = count_costs(parse_layer_types("0_2s_2_3s"), sizes, 100, iteration=Iteration(3, 1, 4), dtype="float32")
    assert report.costs == expected
    assert report.llama_costs == count_costs(parse_layer_types("0_1_2_3"), sizes, 100, dtype="float32")
    assert json.loads(json.dumps(as_dict(report)))["costs"]["kv_bytes"]["written"] == expected.kv_bytes.written


def test_the_report_says_it_all():
    text = printed(report_on("sharing=sandwich_middle", "model=llama_50m", "context_length=1000"))
    assert text.startswith("0_4_4_4_4_4_4_7\n")
    assert "╭──  4  KV ──╯  reads itself" in text
    assert "layers 1 to 4: a cycle" in text
    assert "A cycle runs once without gradient, then once with gradient" in text
    assert "In each pass tokens take turns in 4 groups" in text
    assert row(text, "3 ") == ["3", "4 above", "-", "-", "yes", "1 to 4"]
    assert row(text, "7 ") == ["7", "itself", "yes", "-", "-", "-"]
    one = 2 * 4 * 64 * 2  # keys and values, 4 heads of 64, in 2 bytes
    assert row(text, "KV bytes written per new token")[1:] == [f"{3 * one:,}", f"{8 * one:,}", "0.375"]
    assert row(text, "KV bytes resident per token")[1:] == [f"{3 * one:,}", f"{8 * one:,}", "0.375"]
    assert row(text, "KV bytes read per decoded token")[1:] == ["8.189 M", "8.192 M", "1.000"]
    assert float(row(text, "FLOPs per token, training")[3]) > 1


def test_windows_and_acyclic_plans():
    text = printed(report_on("sharing=yoco", "model.sliding_window=64", "context_length=640"))
    assert "No layer reads upward: every layer runs once." in text
    assert row(text, "0 ") == ["0", "itself", "yes", "64", "-", "-"]
    assert row(text, "KV bytes written per new token")[3] == "0.625"
    assert row(text, "KV bytes resident per token")[3] == f"{(1 + 4 * 0.1) / 8:.3f}"
    assert row(text, "KV bytes read per decoded token")[3] == f"{(4 + 4 * 0.1) / 8:.3f}"


def test_a_lowest_layer_that_looks_up_is_advised_against():
    for layer_types, layer in ("3_1_2_3", 3), ("1_0_2_3", 1):
        text = " ".join(printed(report_on(f"model.layer_types={layer_types}")).split())
        assert f"Note: layer 0 reads layer {layer}, above it, which does worst in the comparison of Wu, Wu" in text
    for layer_types in "0_2_2_3", "0_0_2_2":
        assert "Note:" not in printed(report_on(f"model.layer_types={layer_types}"))


def test_passes_that_depend_on_the_data():
    text = printed(report_on("sharing=lckv", "model.forward_passes=converge"))
    assert "A cycle runs until the KV stops changing, then once with gradient" in text
    assert row(text, "FLOPs per token, training")[1] == "depends on the data"
    counted = report_on("sharing=lckv", "model.forward_passes=converge", "converge_passes=7")
    assert counted.costs == report_on("sharing=lckv", "model.forward_passes=7").costs


def test_the_published_passes_are_one_override_away():
    text = printed(report_on("sharing=lckv", "passes=published"))
    assert "A cycle runs 7 times without gradient, then 2 times with gradient" in text
    assert "Each pass reads the KV of the one before; the first reads none" in text


def test_defaults_come_from_the_rest_of_the_configuration():
    report = report_on("model=llama_110m")
    assert report.context_length == 1024
    assert report.sizes.vocab_size == 32000
    assert report_on("tokenizer.vocab_size=300").sizes.vocab_size == 300
    with pytest.raises(UserError, match="give model.vocab_size"):
        report_on("tokenizer=gpt2")
    assert report_on("tokenizer=gpt2", "model.vocab_size=50257").sizes.vocab_size == 50257
    assert report_on("experiment=demo_lckv").plan.has_cycles


def test_json_and_drawing(tmp_path, capsys):
    main(compose(["sharing=cla", "json=true", f"draw={tmp_path}/x.svg"], "plan"))
    assert json.loads(capsys.readouterr().out)["layer_types"] == "0_0_2_2_4_4_6_6"
    assert (tmp_path / "x.svg").is_file()
    main(compose(["sharing=cla", f"draw={tmp_path}/y.svg"], "plan"))
    assert f"drawn into {tmp_path}/y.svg" in capsys.readouterr().out
