"""Loss curves, against what was seen, what was computed and what was waited for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from lckv.reporting.analysis import Report
from lckv.reporting.curves import Curves, Point, curves_of
from lckv.reporting.grouping import group_runs
from lckv.reporting.pictures.base import HitTexts, Panel, Picture, add_hits
from lckv.reporting.pictures.style import MUTED, PAPER, Style, tidy

_SIZE = (2.9, 2.5)
_WARM_UP = 0.12
_UNFINISHED = Style(MUTED, "o", (0, (1.6, 1.2)))
_DURATIONS = ((3 * 86400, 86400, "days"), (3 * 3600, 3600, "hours"), (180, 60, "minutes"), (0, 1, "seconds"))

Abscissa = Callable[[Point], float | None]


def draw_losses(report: Report, styles: Mapping[str, Style]) -> Picture | None:
    """Training and validation loss against tokens, FLOPs and time, of runs that failed or still go on too.

    `None` without any curve.
    """
    finished = curves_of(report.groups)
    unfinished = curves_of(group for trouble in report.troubles for group in group_runs([trouble.run])[0])
    curves = finished + unfinished
    if not curves:
        return None
    longest = max((point.seconds or 0 for each in curves for point in each.training), default=0)
    _, unit, name = next(duration for duration in _DURATIONS if longest >= duration[0])
    axes: list[tuple[str, Abscissa, str]] = [
        ("tokens", lambda point: point.tokens, "training tokens"),
        ("FLOPs", lambda point: point.flops, "training FLOPs"),
        ("wall time", lambda point: None if point.seconds is None else point.seconds / unit, f"wall time ({name})"),
    ]
    looks = [styles[each.group.label] for each in finished] + [_UNFINISHED] * len(unfinished)
    panels = [
        Panel(f"against {title}", _SIZE, _drawer(curves, abscissa, label, looks, _top(finished or unfinished)))
        for title, abscissa, label in axes
        if any(abscissa(point) is not None for each in curves for point in (*each.training, *each.validation))
    ]
    caption = "Validation loss (markers) and training loss (thin lines) in nats per token, means over seeds."
    legend = {each.group.label: styles[each.group.label] for each in finished}
    if unfinished:
        legend["no result"] = _UNFINISHED
        caption += " Grey: runs that failed, or have not ended yet."
    return Picture("loss", "Loss curves", caption, panels, legend)


def _drawer(
    curves: Sequence[Curves], abscissa: Abscissa, label: str, looks: Sequence[Style], top: float | None
) -> Callable[[Axes], HitTexts]:
    return lambda axes: _draw(axes, curves, abscissa, label, looks, top)


def _draw(
    axes: Axes,
    curves: Sequence[Curves],
    abscissa: Abscissa,
    label: str,
    looks: Sequence[Style],
    top: float | None,
) -> HitTexts:
    texts: HitTexts = {}
    for number, (each, style) in enumerate(zip(curves, looks, strict=True)):
        _plot(axes, each.training, abscissa, color=style.color, linewidth=0.6, alpha=0.35, zorder=2)
        drawn = _plot(
            axes, each.validation, abscissa, color=style.color, linestyle=style.dashes, linewidth=1.2, zorder=3,
            marker=style.marker, markersize=3.8, markeredgecolor=PAPER, markeredgewidth=0.4,
        )  # fmt: skip
        if drawn:
            gid = f"hits-loss-{number}"
            add_hits(axes, gid, [(x, point.loss) for x, point in drawn], size=9)
            name = f"{each.group.runs[0].name} (no result)" if style is _UNFINISHED else each.group.label
            texts[gid] = [f"{name}\n{label}: {_short(x)}\nvalidation loss: {p.loss:.4f}" for x, p in drawn]
    axes.set_xlabel(label)
    axes.set_ylabel("loss (nats per token)")
    if not label.startswith("wall time"):
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(left=0)
    axes.set_ylim(top=top)
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
