"""The picture of a needle's grid."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot

from lckv.evaluation.needle import draw_needle
from lckv.utils.charts import save_chart


def figures(num_lengths: int = 4, num_depths: int = 5) -> dict:
    values = np.linspace(0, 1, num_lengths * num_depths).reshape(num_depths, num_lengths)
    return {
        "lengths": [512 * (number + 1) for number in range(num_lengths)],
        "depths": np.linspace(0, 1, num_depths).tolist(),
        "accuracy": values.tolist(),
        "choice_accuracy": (values**0.5).tolist(),
        "log_probability": (values - 1).tolist(),
        "chance": 0.1,
        "num_samples": 10,
        "seed": 0,
    }


def test_cells_say_what_was_measured_in_colours_from_0_to_1():
    given = figures()
    drawn = draw_needle(given)
    accuracy, choice, colors = drawn.axes
    for axes, name in ((accuracy, "accuracy"), (choice, "choice_accuracy")):
        texts = [[f"{value:.2f}" for value in row] for row in given[name]]
        assert [text.get_text() for text in axes.texts] == sum(texts, [])
        cells = axes.collections[0]
        assert np.array_equal(cells.get_array(), given[name]) and cells.get_clim() == (0, 1)
        assert [label.get_text() for label in axes.get_xticklabels()] == ["512", "1,024", "1,536", "2,048"]
        assert axes.get_xlabel() == "prompt (tokens)"
    assert [label.get_text() for label in accuracy.get_yticklabels()] == ["0%", "25%", "50%", "75%", "100%"]
    assert accuracy.yaxis_inverted() and accuracy.get_ylabel() == "depth of the needle"
    assert "chance: 0.1" in choice.get_title(loc="left") and "10 prompts" in colors.get_ylabel()
    assert drawn.get_suptitle() == "needle in a haystack"


def test_numbers_can_be_read_on_every_colour():
    axes = draw_needle(figures()).axes[0]
    for text in axes.texts:
        background = np.array(axes.collections[0].to_rgba(float(text.get_text()))[:3]) @ [0.299, 0.587, 0.114]
        assert abs(background - (text.get_color() == "#fdfdfc")) > 0.4


@pytest.mark.parametrize(("name", "start"), [("needle.png", b"\x89PNG"), ("needle.svg", b"<?xml")])
@pytest.mark.parametrize("size", [(1, 1), (9, 3)])
def test_pictures_are_never_half_written(tmp_path: Path, name: str, start: bytes, size):
    before = pyplot.get_fignums()
    save_chart(draw_needle(figures(*size)), tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)
    assert [path.name for path in tmp_path.iterdir()] == [name] and pyplot.get_fignums() == before
