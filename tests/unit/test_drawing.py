"""Drawings: who reads whom is legible from the text, and files are real pictures."""

import re

import pytest
from hypothesis import given, settings

from lckv.drawing import draw_in_terminal, save_drawing
from lckv.errors import UserError
from lckv.patterns import PATTERNS, build_layer_types, parse_layer_types
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


@settings(deadline=None)
@given(layer_types(max_layers=8))
def test_every_layer_is_drawn_and_named(string):
    plan = parse_layer_types(string)
    for layer, line in zip(reversed(plan.layers), lines(string), strict=True):
        assert re.search(rf" {layer.layer_idx} ", line)
        assert ("KV" in line) == layer.computes_kv
        assert ("reads itself" if layer.kv_source == layer.layer_idx else f"reads {layer.kv_source} ") in line
        assert ("window" in line) == layer.is_sliding
        assert bool(re.search("[▶◀]", line)) == (layer.kv_source != layer.layer_idx)


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
