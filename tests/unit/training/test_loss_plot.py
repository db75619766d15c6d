from pathlib import Path

from lckv.training.loss_plot import plot_loss


def test_plot_is_a_picture_and_never_half_written(tmp_path: Path):
    lines = [{"step": step, "tokens": step * 100, "loss": 5 - step} for step in range(3)]
    lines.append({"step": 2, "tokens": 200, "eval_loss": 3.5})
    plot_loss(lines, tmp_path / "loss.png", title="a run", unigram_loss=4.0)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    plot_loss([], tmp_path / "loss.png", title="nothing yet", unigram_loss=None)
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
