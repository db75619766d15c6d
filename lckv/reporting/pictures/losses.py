"""Loss curves, against what was seen, what was computed and what was waited for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from lckv.reporting.analysis import Report
from lckv.reporting.curves import Curves, Point, curves_of
from lckv.reporting.pictures.base import HitTexts, Panel, Picture, add_hits
from lckv.reporting.pictures.style import PAPER, Style, tidy

_SIZE = (2.9, 2.5)
_WARM_UP = 0.12
_DURATIONS = ((3 * 86400, 86400, "days"), (3 * 3600, 3600, "hours"), (180, 60, "minutes"), (0, 1, "seconds"))

Abscissa = Callable[[Point], float | None]


def draw_losses(report: Report, styles: Mapping[str, Style]) -> Picture | None:
    """Training and validation loss against tokens, FLOPs and time; `None` without any curve."""
    curves = curves_of(report.groups)
    if not curves:
        return None
    longest = max((point.seconds or 0 for each in curves for point in each.training), default=0)
    _, unit, name = next(duration for duration in _DURATIONS if longest >= duration[0])
    axes: list[tuple[str, Abscissa, str]] = [
        ("tokens", lambda point: point.tokens, "training tokens"),
        ("FLOPs", lambda point: point.flops, "training FLOPs"),
        ("wall time", lambda point: None if point.seconds is None else point.seconds / unit, f"wall time ({name})"),
    ]
    panels = [
        Panel(f"against {title}", _SIZE, _drawer(curves, abscissa, label, styles))
        for title, abscissa, label in axes
        if any(abscissa(point) is not None for each in curves for point in (*each.training, *each.validation))
    ]
    caption = "Validation loss (markers) and training loss (thin lines) in nats per token, means over seeds."
    legend = {each.group.label: styles[each.group.label] for each in curves}
    return Picture("loss", "Loss curves", caption, panels, legend)


def _drawer(
    curves: Sequence[Curves], abscissa: Abscissa, label: str, styles: Mapping[str, Style]
) -> Callable[[Axes], HitTexts]:
    return lambda axes: _draw(axes, curves, abscissa, label, styles)


def _draw(
    axes: Axes, curves: Sequence[Curves], abscissa: Abscissa, label: str, styles: Mapping[str, Style]
) -> HitTexts:
    texts: HitTexts = {}
    for number, each in enumerate(curves):
        style = styles[each.group.label]
        _plot(axes, each.training, abscissa, color=style.color, linewidth=0.6, alpha=0.35, zorder=2)
        drawn = _plot(
            axes, each.validation, abscissa, color=style.color, linestyle=style.dashes, linewidth=1.2, zorder=3,
            marker=style.marker, markersize=3.8, markeredgecolor=PAPER, markeredgewidth=0.4,
        )  # fmt: skip
        if drawn:
            gid = f"hits-loss-{number}"
            add_hits(axes, gid, [(x, point.loss) for x, point in drawn], size=9)
            texts[gid] = [f"{each.group.label}\n{label}: {_short(x)}\nvalidation loss: {p.loss:.4f}" for x, p in drawn]
    axes.set_xlabel(label)
    axes.set_ylabel("loss (nats per token)")
    if not label.startswith("wall time"):
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(left=0)
    axes.set_ylim(top=_top(curves))
    tidy(axes)
    return texts


def _plot(axes: Axes, points: Sequence[Point], abscissa: Abscissa, **style: object) -> list[tuple[float, Point]]:
    drawn = [(x, point) for point in points if (x := abscissa(point)) is not None]
    if drawn:
        axes.plot([x for x, _ in drawn], [point.loss for _, point in drawn], **style)  # type: ignore[arg-type]
    return drawn


def _top(curves: Sequence[Curves]) -> float | None:
    """The highest loss after the first steps, which would press all others together."""
    end = max((point.tokens for each in curves for point in each.training), default=0)
    late = [point.loss for each in curves for point in each.training if point.tokens >= _WARM_UP * end]
    validation = [point.loss for each in curves for point in each.validation]
    low = min((*late, *validation), default=0.0)
    return max(late) + 0.04 * (max(late) - low) if late and max(late) > low else None


def _short(value: float) -> str:
    """Four digits, with a unit where there are more before the point."""
    return f"{value:.4g}" if abs(value) < 1e4 else EngFormatter(sep="")(float(f"{value:.4g}"))
