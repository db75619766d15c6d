"""Drawings: who reads whom is legible from the text, and files are real pictures."""

import re

import pytest
from hypothesis import given, settings

from lckv.errors import UserError
from lckv.sharing.drawing import draw_in_terminal, save_drawing
from lckv.sharing.patterns import PATTERNS, build_layer_types, parse_layer_types
from tests.strategies import layer_types


def lines(string: str) -> list[str]:
    return draw_in_terminal(parse_layer_types(string)).plain.splitlines()


def test_sandwich_in_the_terminal():
    assert lines("0_4_4_4_4_4_4_7") == [
        "     7  KV      reads itself",
        "     6 ▕  ▏◀─╮  reads 4 below",
        "     5 ▕  ▏◀─┤  reads 4 below",
        "╭──  4  KV ──╯  reads itself            ╮",
        "├─▶  3 ▕  ▏     reads 4 above           │ cycle",
        "├─▶  2 ▕  ▏     reads 4 above           │",
        "╰─▶  1 ▕  ▏     reads 4 above           ╯",
        "     0  KV      reads itself",
    ]


def test_long_lines_stay_outside_short_ones_and_windows_are_named():
    assert lines("0_1s_1s_0") == [
        "   3 ▕  ▏◀───╮  reads 0 below",
        "   2 ▕  ▏◀─╮ │  reads 1 below, window",
        "   1  KV ──╯ │  reads itself, window",
        "   0  KV ────╯  reads itself",
    ]


def test_keys_and_values_of_two_layers():
    assert lines("0_1_2_2:0_2:1s") == [
        "   4 ▕  ▏◀─┬───╮  keys 2, values 1, window",
        "   3 ▕  ▏◀─┼─╮ │  keys 2, values 0",
        "   2  KV ──╯ │ │  reads itself",
        "   1  KV ────┼─╯  reads itself",
        "   0  KV ────╯    reads itself",
    ]
    assert lines("0:1_2:0_3:0_3:1") == [
        "  ╭──  3  K  ◀───╮  keys 3, values 1        ╮",
        "╭─┴─▶  2  K  ◀─╮ │  keys 3, values 0        │ cycle",
        "╰─┬─▶  1  V  ◀─┼─╯  keys 2, values 0        │",
        "  ╰─▶  0  KV ──╯    keys 0, values 1        ╯",
    ]


@settings(deadline=None)
@given(layer_types(max_layers=8))
def test_every_layer_is_drawn_and_named(string):
    plan = parse_layer_types(string)
    for layer, line in zip(reversed(plan.layers), lines(string), strict=True):
        assert re.search(rf" {layer.layer_idx} ", line)
        kept = re.search(r" [KV]+ ", line)
        assert (kept[0].strip() if kept else "") == "K" * layer.computes_keys + "V" * layer.computes_values
        key, value = layer.sources
        words = (
            f"keys {key}, values {value}" if key != value else "itself" if key == layer.layer_idx else f"reads {key} "
        )
        assert words in line
        assert ("window" in line) == layer.is_sliding
        assert ("▶" in line) == (max(layer.sources) > layer.layer_idx)
        assert ("◀" in line) == (min(layer.sources) < layer.layer_idx)


@settings(max_examples=50, deadline=None)
@given(layer_types(max_layers=40))
def test_every_pattern_fits_the_terminal(string):
    assert all(len(line) <= 80 for line in lines(string))


def test_large_models_are_listed():
    assert lines(build_layer_types("lckv", 40)) == [
        "    38 to 39  KV   read themselves",
        "     1 to 37       read 38 above",
        "           0  KV   reads itself",
        "cycle: layers 1 to 38",
    ]


@pytest.mark.parametrize(("ending", "magic"), [(".png", b"\x89PNG"), (".pdf", b"%PDF")])
def test_files(tmp_path, ending, magic):
    file = tmp_path / "new" / f"drawing{ending}"
    save_drawing(parse_layer_types("0_1s_1s_4_4"), file)
    assert file.read_bytes().startswith(magic)


def test_svg_is_the_same_every_time(tmp_path):
    plan = parse_layer_types("0_2_2_0s")
    for name in "a.svg", "b.svg":
        save_drawing(plan, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_every_family_can_be_drawn(tmp_path):
    for name in PATTERNS:
        save_drawing(parse_layer_types(build_layer_types(name, 8)), tmp_path / f"{name}.svg")
        assert (tmp_path / f"{name}.svg").stat().st_size > 2_000


def test_wrong_endings_and_places_are_refused(tmp_path):
    plan = parse_layer_types("0")
    with pytest.raises(UserError, match=r"cannot draw a .pgn; allowed are .svg, .png, .pdf; did you mean '.png'"):
        save_drawing(plan, tmp_path / "x.pgn")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="^draw=.*file is a file; name another folder"):
        save_drawing(plan, tmp_path / "file" / "x.svg")
