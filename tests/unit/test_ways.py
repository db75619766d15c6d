"""What the scripts share: turns, the command line, and what is shown of the figures."""

import json

import pytest
from ways import draw, milliseconds, read_arguments, show, take_turns


def test_ways_take_turns_behind_rounds_that_do_not_count():
    calls, now = [], [0.0]

    def way(name, seconds):
        def run():
            calls.append(name)
            now[0] += seconds

        return run

    seconds = take_turns({"slow": way("slow", 4), "quick": way("quick", 1)}, rounds=2, clock=lambda: now[0])
    assert calls == ["slow", "quick"] * 3
    assert seconds == {"slow": [4, 4], "quick": [1, 1]}
    assert milliseconds(seconds, "slow")["quick"] == {"ms": 1000, "to slow": 0.25}


def test_the_command_line_has_the_types_of_the_defaults(monkeypatch):
    given = ["model", "--sizes", "3", "4", "--bare", "--rounds", "2", "--batch-size", "9"]
    monkeypatch.setattr("sys.argv", ["bench", *given])
    arguments = read_arguments("help", "model", sizes=(1,), bare=False, text="", batch_size=4, threads=1)
    assert vars(arguments) == {
        "model": "model",
        "threads": 1,
        "rounds": 2,
        "output": "",
        "sizes": [3, 4],
        "bare": True,
        "text": "",
        "batch_size": 9,
    }


@pytest.mark.parametrize("num_panels", [1, 2])
def test_figures_are_shown_written_and_drawn(tmp_path, capsys, num_panels):
    rows = {"a": {"ms": 1.23456}, "b": {"ms": 2, "error": None, "share": 0.5}}
    show(rows, output=str(tmp_path / "out" / "figures.json"))
    out = capsys.readouterr().out
    assert "1.235" in out and "share" in out
    assert json.loads((tmp_path / "out" / "figures.json").read_text()) == [rows]
    draw({f"y{number}": {"a": ([1, 2], [3, 4])} for number in range(num_panels)}, "x", tmp_path / "new" / "a.png")
    assert (tmp_path / "new" / "a.png").stat().st_size > 1000
