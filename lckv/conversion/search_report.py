"""What a search has found: a table, a picture, figures for other programs, and configurations to train from."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

import lckv
from lckv.config import DataConfig, InitConfig, SearchConfig
from lckv.config.model_arguments import iteration_settings
from lckv.config.run_names import file_name, source_name
from lckv.conversion.pattern_search import ScoredPattern, SearchTrace
from lckv.loading.models import find_device
from lckv.models import LCKVLlamaConfig
from lckv.sharing.costs import DTYPE_BYTES, ModelSizes, count_kv_bytes
from lckv.sharing.patterns import parse_layer_types
from lckv.utils.charts import new_chart, save_chart, tidy
from lckv.utils.console import command
from lckv.utils.environment import describe_hardware
from lckv.utils.storage import new_folder, numbered, write_json

_UPTRAINING = (("trainer", "uptrain"), ("optim", "uptrain"))
"""What keeps what the pretrained model knows."""

_TEXTS = ("calibration", "eval", "validation")
_MARKERS = "sD^vPX*<>hpd"


@dataclass(frozen=True)
class Point:
    """A pattern with what it needs and what it costs, as it goes into `search.json`.

    Attributes:
        name: what it is called: "15 of 30" owners, "15 of 30 apart" where layers read the keys of one and the values
            of another, or "25 percent" of the source's bytes in latents.
        layer_types: the pattern.
        num_owners: layers that compute keys and values.
        kv_bytes_per_token: bytes of keys and values that each token adds, in the source's own type.
        fraction: of the bytes that the source needs.
        loss: see [`lckv.conversion.scoring.Scorer`].
        perplexity: on held-out text; `None` where the search was interrupted before.
    """

    name: str
    layer_types: str
    num_owners: int
    kv_bytes_per_token: int
    fraction: float
    loss: float
    perplexity: float | None

    def cells(self) -> list[str]:
        """What `COLUMNS` ask for."""
        perplexity = "-" if self.perplexity is None else f"{self.perplexity:,.2f}"
        figures = [f"{self.kv_bytes_per_token:,}", f"{self.fraction:.1%}", f"{self.loss:.4f}", perplexity]
        return [self.name, *figures, self.layer_types]


@dataclass(frozen=True)
class KVCount:
    """Counts the bytes of keys and values that each token adds, in the type of a model with so many owners of them."""

    sizes: ModelSizes
    dtype: str
    num_owners: int

    @classmethod
    def of(cls, config: LCKVLlamaConfig) -> KVCount:
        """For the model of this configuration."""
        dtype = str(config.dtype or "float32").removeprefix("torch.")
        return cls(ModelSizes.from_config(config), dtype, len(config.sharing_plan.kv_owners))

    def bytes_of(self, layer_types: str) -> int:
        """Bytes per token of a pattern; "0" is one layer that computes keys and values."""
        return count_kv_bytes(parse_layer_types(layer_types), self.sizes, 1, self.dtype).written

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return DTYPE_BYTES[self.dtype]

    @property
    def full(self) -> int:
        """Bytes per token of the model itself."""
        return self.num_owners * self.bytes_of("0")

    def point(self, pattern: ScoredPattern, perplexity: float | None, name: str | None = None) -> Point:
        """The pattern with what it needs, under a name that says so if none is given."""
        if pattern.latent_size is None:
            kv_bytes, own_name = self.bytes_of(pattern.layer_types), f"{pattern.num_owners} of {self.num_owners}"
            own_name += " apart" * (parse_layer_types(pattern.layer_types).first_split is not None)
        else:
            kv_bytes = pattern.latent_size * self.itemsize
            own_name = f"{100 * kv_bytes / self.full:.3g} percent"
        fraction = kv_bytes / self.full
        return Point(
            name or own_name, pattern.layer_types, pattern.num_owners, kv_bytes, fraction, pattern.loss, perplexity
        )


COLUMNS = ("pattern", "KV bytes per token", "of the source's", "loss", "perplexity", "layer_types")


@dataclass
class SearchReport:
    """Everything about one search.

    Attributes:
        cfg: what was asked for.
        source: the pretrained model's configuration.
        kv: counts bytes.
        data_fingerprint: a short name of the text.
        trace: all patterns that were scored, and the best ones.
        num_tokens: how many tokens of "calibration", "eval" and "validation" text there were, in whole blocks.
        perplexities: of the patterns of the frontier.
        baselines: patterns made by hand.
        search_seconds: from the start to the end of the search; `None` if it was interrupted.
        seconds: to the end.
        is_interrupted: whether the user has interrupted it.
    """

    cfg: SearchConfig
    source: LCKVLlamaConfig
    kv: KVCount
    data_fingerprint: str
    trace: SearchTrace
    num_tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_TEXTS, 0))
    perplexities: dict[ScoredPattern, float] = field(default_factory=dict)
    baselines: list[Point] = field(default_factory=list)
    search_seconds: float | None = None
    seconds: float = 0.0
    is_interrupted: bool = False

    @property
    def frontier(self) -> list[Point]:
        """The best pattern for each number of owners or budget, the source's own first."""
        return [self.kv.point(each, self.perplexities.get(each)) for each in self.trace.frontier]

    def table(self) -> Table:
        """The frontier and the baselines for a terminal."""
        table = Table(*COLUMNS[:1], title="Frontier")
        for column in COLUMNS[1:-1]:
            table.add_column(column, justify="right")
        for point in (*self.frontier, *self.baselines):
            table.add_row(*point.cells()[:-1])
        return table

    def summary(self, folder: Path) -> str:
        """What was found, and what to do with it."""
        last = self.frontier[-1]
        state = "interrupted; the last pattern" if self.is_interrupted else "the pattern"
        return (
            f"{state} of {last.kv_bytes_per_token:,} bytes per token: {last.layer_types}\n"
            f"written to {folder}; to train it: "
            + command("lckv.train", ["--config-dir", str(folder), f"experiment={self.experiment_name(last)}"])
        )

    def write(self, folder: Path) -> None:
        """Writes `search.json`, `frontier.md`, `frontier.png` and `experiment/*.yaml`."""
        write_json(folder / "search.json", self._figures())
        (folder / "frontier.md").write_text(self._markdown(), encoding="utf-8")
        draw_frontier(self, folder / "frontier.png")
        (folder / "experiment").mkdir()
        for point in self.frontier[1:]:
            file = folder / "experiment" / f"{self.experiment_name(point)}.yaml"
            file.write_text(_experiment(point, self), encoding="utf-8")

    def experiment_name(self, point: Point) -> str:
        """What the configuration of a point is called: `kv_15_of_30`, `kv_25_percent`."""
        return f"kv_{re.sub(r'[^0-9a-z]+', '_', point.name)}"

    def _figures(self) -> dict[str, Any]:
        return {
            "settings": asdict(self.cfg),
            "data_fingerprint": self.data_fingerprint,
            "num_tokens": self.num_tokens,
            "kv_dtype": self.kv.dtype,
            "is_interrupted": self.is_interrupted,
            "search_seconds": self.search_seconds,
            "seconds": self.seconds,
            "frontier": list(map(asdict, self.frontier)),
            "baselines": list(map(asdict, self.baselines)),
            "candidates": list(map(asdict, self.trace.candidates)),
            "hardware": describe_hardware(find_device(self.cfg.device)),
            "lckv_version": lckv.__version__,
        }

    def _markdown(self) -> str:
        cfg, num_tokens = self.cfg, self.num_tokens
        calibrated = f" on {num_tokens['calibration']:,} tokens" if num_tokens["calibration"] else ""
        lines = [
            f"# Sharing patterns for {cfg.source}",
            "",
            f"Converted by `{cfg.converted_by}`{calibrated}. The loss is the divergence of the next-token "
            f"distributions from the source's, in nats per token, on {num_tokens['eval']:,} tokens of the training "
            f"split; the perplexity is of {num_tokens['validation']:,} tokens of the validation split. KV bytes are "
            f"of type {self.kv.dtype}.",
            *(["", "The search was interrupted."] if self.is_interrupted else []),
            *_markdown_table(self.frontier),
            *(["", "Made by hand:", *_markdown_table(self.baselines)] if self.baselines else []),
        ]
        return "\n".join(lines) + "\n"


def _markdown_table(points: Sequence[Point]) -> list[str]:
    rows = [[*point.cells()[:-1], f"`{point.layer_types}`"] for point in points]
    rule = ["---", *["---:"] * (len(COLUMNS) - 2), "---"]
    return ["", *(f"| {' | '.join(row)} |" for row in ([*COLUMNS], rule, *rows))]


def draw_frontier(report: SearchReport, path: Path) -> None:
    """Draws perplexity, or loss where the search did not come so far, against KV bytes per token."""
    figure, (axes,) = new_chart()
    has_perplexities = report.baselines or len(report.perplexities) == len(report.frontier)
    points = [
        (each.kv_bytes_per_token, each.perplexity if has_perplexities else each.loss) for each in report.frontier
    ]
    known = [(kv_bytes, value) for kv_bytes, value in points if value is not None]
    axes.plot(*zip(*known, strict=True), color="#c0392b", marker="o", markersize=4, label="searched")
    axes.set_ylabel("divergence from the source (nats per token)")
    if has_perplexities:  # on a logarithmic scale, with the source's own as a line to stay close to
        axes.axhline(known[0][1], color="0.45", linestyle="--", linewidth=1.2, label="source")
        style: dict[str, Any] = {"color": "#3b6ea8", "markersize": 7}
        for marker, point in zip(cycle(_MARKERS), report.baselines, strict=False):
            assert point.perplexity is not None
            axes.plot(point.kv_bytes_per_token, point.perplexity, marker, label=point.name, **style)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:,.4g}")
        axes.yaxis.set_minor_formatter("{x:,.4g}")
        axes.set_ylabel("perplexity on held-out text")
        axes.grid(which="minor", color="0.9", linewidth=0.6)
    axes.set_xlabel(f"KV bytes per token ({report.kv.dtype})")
    axes.set_title(
        f"{Path(report.cfg.source or '').name}, converted by {report.cfg.converted_by}", loc="left", fontsize=11
    )
    axes.set_xlim(left=0)
    tidy(axes)
    axes.legend(frameon=False)
    save_chart(figure, path)


def _experiment(point: Point, report: SearchReport) -> str:
    """A configuration for `lckv.train` that starts from the point: same method, same text, same windows."""
    cfg, plan = report.cfg, parse_layer_types(point.layer_types)
    source = str(Path(cfg.source or "").expanduser())
    init = {
        "source": str(Path(source).resolve()) if Path(source).exists() else source,
        "revision": cfg.revision,
        "method": InitConfig().method if cfg.latent.is_used else cfg.method,
        "calibration_tokens": cfg.calibration_tokens,
        "ridge": cfg.ridge,
    }
    # lckv.train takes the sizes from the source, but lckv.plan looks at no model.
    sizes = {name: value for name, value in asdict(ModelSizes.from_config(report.source)).items() if value is not None}
    model = {"name": source_name(source), "layer_types": plan.layer_types, **sizes}
    if plan.has_cycles:
        model |= iteration_settings(cfg)
    groups = [("data", cfg.data.name), *_UPTRAINING]
    latent = {}
    if cfg.latent.is_used:
        groups.append(("latent", cfg.latent.name))
        latent["ratio"] = point.num_owners * report.kv.bytes_of("0") / point.kv_bytes_per_token
    body = {
        "defaults": [{f"override /{group}": name} for group, name in groups],
        "model": model,
        "latent": latent,
        "init": _changed(init, InitConfig()),
        "data": _changed(_with_absolute_files(asdict(cfg.data)), DataConfig(name=cfg.data.name)),
    }
    kept = "Latents" if cfg.latent.is_used else "Keys and values"
    comment = (
        f"# {kept} of {point.num_owners} of {report.kv.num_owners} layers, {point.kv_bytes_per_token:,} bytes per "
        f"token: divergence from the source {point.loss:.4f}"
    )
    if point.perplexity is not None:
        comment += f", perplexity {point.perplexity:.2f} before training"
    text = yaml.safe_dump({key: value for key, value in body.items() if value}, sort_keys=False, width=10**6)
    return f"# @package _global_\n{comment}\n{text}"


def _with_absolute_files(data: dict[str, Any]) -> dict[str, Any]:
    """The settings of the text with paths and globs that mean the same files from any folder."""

    def absolute(pattern: str) -> str:
        path = Path(pattern).expanduser()
        return str(path) if path.is_absolute() else f"{glob.escape(str(Path.cwd()))}/{path}"

    given = {name: data[name] for name in ("files", "validation_files") if data[name] is not None}
    return data | {
        name: absolute(str(files)) if isinstance(files, str | Path) else [absolute(str(each)) for each in files]
        for name, files in given.items()
    }


def _changed(values: dict[str, Any], defaults: Any) -> dict[str, Any]:
    """The values that are not what a dataclass says anyway."""
    return {name: value for name, value in values.items() if value != getattr(defaults, name)}


def write_report(report: SearchReport, out: Path | None) -> Path:
    """Writes everything into a folder that appears when it is whole, and returns it.

    Args:
        report: what to write.
        out: the folder. `None` makes a name in `runs/search` of model, method and budget; this, or one that another
            program has filled meanwhile, gets a number.
    """
    cfg = report.cfg
    if out is None:
        out = Path("runs") / "search" / file_name(f"{source_name(cfg.source or '')}-{cfg.converted_by}-{cfg.budget}")
    out = next(path for path in numbered(out) if not path.exists() or (path.is_dir() and not any(path.iterdir())))
    with new_folder(out) as folder:
        report.write(folder)
    return out
