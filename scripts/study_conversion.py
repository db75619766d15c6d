"""Converts a pretrained model by every method to several patterns, and measures perplexity before and after training.

    python scripts/study_conversion.py convert --source MODEL --train-text FILE --heldout-text FILE --out FOLDER
    python scripts/study_conversion.py uptrain ... --steps 20        the same short training for each
    python scripts/study_conversion.py show --out FOLDER             tables and the picture

Results go to FOLDER/results.json after each measurement; the same command goes on where it stopped, and one with other
settings is refused. Perplexity is that of the beginnings of some held-out documents, the same for all. Training is
`python -m lckv.train`, in its own process.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from lckv.config import DataConfig
from lckv.conversion import CALIBRATED, METHODS, TRAINED, Source
from lckv.conversion.calibration import calibrate
from lckv.conversion.scoring import Converter
from lckv.costs import ModelSizes, count_kv_bytes
from lckv.data import TokenizedData, build_dataset
from lckv.data.tokenizer import check_tokenizer
from lckv.evaluation.perplexity import evaluate_perplexity
from lckv.patterns import SharingPlan, build_layer_types, parse_layer_types
from lckv.storage import write_json

PATTERNS = {"CLA2": "cla", "YOCO half": "yoco", "sandwich-middle": "sandwich_middle", "LCKV w=2": "lckv"}
ORIGINAL = "original"
ZERO_SHOT = [name for name in METHODS if name not in TRAINED]
SETTINGS = (
    *("source", "train_text", "heldout_text", "block_size", "heldout_documents", "heldout_characters"),
    *("calibration_tokens", "ridge", "forward_passes", "sliding_window"),
)
"""What all measurements in a folder have in common."""

SETTINGS_OF_STAGE = {"convert": SETTINGS, "uptrain": (*SETTINGS, "steps", "batch_size"), "show": ()}

logger = logging.getLogger("study_conversion")


class Study:
    """The results so far, and what is needed for the next."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.path = Path(arguments.out) / "results.json"
        self.results: dict[str, Any] = json.loads(self.path.read_text()) if self.path.is_file() else {}
        self._claim({name: getattr(arguments, name) for name in SETTINGS_OF_STAGE[arguments.stage]})

    def _claim(self, settings: dict[str, Any]) -> None:
        """Notes the settings, or ends if the folder holds results of others."""
        before = self.results.get("settings", {})
        different = [name for name, value in settings.items() if before.get(name, value) != value]
        if different:
            shown = ", ".join(f"{name}={settings[name]} (there: {before[name]})" for name in different)
            sys.stderr.write(f"--out={self.arguments.out}: holds results of other settings: {shown}\n")
            sys.exit(2)
        if settings:
            self.results["settings"] = before | settings
            self._write()

    def patterns(self, num_hidden_layers: int) -> dict[str, str]:
        """The patterns to look at, by their label."""
        found = {label: build_layer_types(name, num_hidden_layers) for label, name in PATTERNS.items()}
        found |= dict(item.split("=", 1) for item in self.arguments.pattern)
        return {label: found[label] for label in self.arguments.label or found}

    def missing(self, stage: str, label: str) -> bool:
        """Whether this has not been measured yet."""
        return label not in self.results.get(stage, {})

    def note(self, stage: str, label: str, **figures: Any) -> None:
        """Keeps what was measured."""
        self.results.setdefault(stage, {})[label] = figures
        self._write()
        logger.info("%s, %s: %s", stage, label, figures)

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.results)


def held_out(arguments: argparse.Namespace) -> Path:
    """A file with the beginnings of documents that lie evenly in the held-out text: the same for every measurement."""
    path = Path(arguments.out) / "heldout.jsonl"
    if not path.is_file():
        texts = [json.loads(line)["text"] for line in Path(arguments.heldout_text).read_text().splitlines()]
        count = arguments.heldout_documents
        step = max(1, len(texts) // count)
        lines = [json.dumps({"text": text[: arguments.heldout_characters]}) + "\n" for text in texts[::step][:count]]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines))
    return path.resolve()


def convert_all(study: Study) -> None:
    """Perplexity of the original, and of every conversion before any training."""
    arguments = study.arguments
    source = Source.find(arguments.source)
    data = read_data(arguments, source)
    model = source.load_model("cpu", dtype="float32")
    settings = {"forward_passes": arguments.forward_passes, "sliding_window": arguments.sliding_window}
    if study.missing("conversion", ORIGINAL):
        figures = measure(model, data)
        study.note("conversion", ORIGINAL, layer_types=source.config.kv_sharing, kv_fraction=1.0, **figures)
    for label, layer_types in study.patterns(source.config.sharing_plan.num_hidden_layers).items():
        plan = parse_layer_types(layer_types)
        methods = [method for method in ZERO_SHOT if study.missing("conversion", f"{label} / {method}")]
        moments = None
        if CALIBRATED & set(methods):
            moments = calibrate(source, plan, data.train, arguments.calibration_tokens, device="cpu")
        for method in methods:
            start = time.perf_counter()
            converted = Converter(model, method, moments, arguments.ridge, settings).build(plan)
            seconds = time.perf_counter() - start
            figures = measure(converted, data) | {"conversion_seconds": round(seconds, 2)}
            fraction = kv_fraction(source, plan)
            study.note("conversion", f"{label} / {method}", layer_types=layer_types, kv_fraction=fraction, **figures)


def read_data(arguments: argparse.Namespace, source: Source) -> TokenizedData:
    """Blocks of the texts."""
    tokenizer = check_tokenizer(source.load_tokenizer(), str(source.checkpoint))
    files = {"files": arguments.train_text, "validation_files": str(held_out(arguments))}
    return build_dataset(DataConfig(name="files", block_size=arguments.block_size, **files), tokenizer)


def measure(model: Any, data: TokenizedData) -> dict[str, Any]:
    """Loss and perplexity on the held-out text."""
    start = time.perf_counter()
    result = evaluate_perplexity(model, data.validation, batch_size=4)
    seconds = round(time.perf_counter() - start, 1)
    return {"loss": result.loss, "perplexity": result.perplexity, "tokens": result.num_tokens, "seconds": seconds}


def kv_fraction(source: Source, plan: SharingPlan) -> float:
    """The written KV bytes of a pattern, to those of the original."""
    sizes = ModelSizes.from_config(source.config)
    written = [count_kv_bytes(each, sizes, 2048).written for each in (plan, source.config.sharing_plan)]
    return written[0] / written[1]


def uptrain_all(study: Study) -> None:
    """The same short training behind every conversion."""
    arguments = study.arguments
    layers = Source.find(arguments.source).config.sharing_plan.num_hidden_layers
    for label, layer_types in study.patterns(layers).items():
        for method in arguments.method or METHODS:
            name = f"{label} / {method}"
            if study.missing("uptraining", name):
                lines = uptrain(arguments, name, layer_types, method)
                study.note("uptraining", name, layer_types=layer_types, **summary(lines))


def uptrain(arguments: argparse.Namespace, name: str, layer_types: str, method: str) -> list[dict[str, Any]]:
    """Runs one training and returns the lines of its metrics."""
    folder = Path(arguments.out) / "runs" / re.sub(r"[^\w-]+", "-", name)
    overrides = [
        f"init.source={Path(arguments.source).resolve()}",
        f"init.method={method}",
        f"init.calibration_tokens={arguments.calibration_tokens}",
        f"init.ridge={arguments.ridge}",
        f"model.layer_types={layer_types}",
        f"model.forward_passes={arguments.forward_passes}",
        f"model.sliding_window={arguments.sliding_window}",
        "data=files",
        f"data.files={Path(arguments.train_text).resolve()}",
        f"data.validation_files={held_out(arguments)}",
        f"data.block_size={arguments.block_size}",
        "trainer=uptrain",
        "optim=uptrain",
        f"trainer.max_steps={arguments.steps}",
        f"trainer.global_batch_size={arguments.batch_size}",
        f"trainer.micro_batch_size={math.gcd(arguments.batch_size, 4)}",
        "trainer.save_steps=null",
        "trainer.logging_steps=1",
        f"trainer.num_threads={arguments.threads}",
        f"run_dir={folder.resolve()}",
    ]
    if method in TRAINED:
        overrides.append("trainer.trainable=kv")
    if failed := subprocess.run([sys.executable, "-m", "lckv.train", *overrides]).returncode:
        sys.exit(failed)  # it has said why
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Losses on the held-out text at the start and at the end, the training curve, and the time."""
    held_out = [line["eval_loss"] for line in lines if "eval_loss" in line]
    # Of the text, also where a teacher is what is learnt from.
    steps = [line for line in lines if "loss" in line]
    curve = [[line["tokens"], line.get("loss_labels", line["loss"])] for line in steps]
    return {"eval_losses": held_out, "curve": curve, "seconds": steps[-1]["seconds"]}


def show(study: Study) -> None:
    """Prints the tables, and draws the training curves."""
    console = Console()
    for stage, column in ("conversion", "perplexity"), ("uptraining", "eval_losses"):
        table = Table("pattern", *METHODS, title=stage)
        rows: dict[str, dict[str, str]] = {}
        for name, figures in study.results.get(stage, {}).items():
            label, _, method = name.partition(" / ")
            value = figures[column]
            shown = f"{value:,.2f}" if isinstance(value, float) else " -> ".join(f"{each:.3f}" for each in value)
            rows.setdefault(label, {})[method] = shown
        for label, cells in rows.items():
            table.add_row(label, *([cells[""]] if "" in cells else [cells.get(method, "") for method in METHODS]))
        console.print(table)
    if study.results.get("uptraining"):
        draw(study.results["uptraining"], Path(study.arguments.out) / "uptraining.png")


def draw(results: dict[str, Any], path: Path) -> None:
    """Training loss over tokens, one panel for each pattern; a method has the same colour in all of them."""
    panels: dict[str, dict[str, Any]] = {}
    for name, figures in results.items():
        label, _, method = name.partition(" / ")
        panels.setdefault(label, {})[method] = figures["curve"]
    columns = min(3, len(panels) + 1)
    figure = Figure(figsize=(3.4 * columns, 3 * -(-(len(panels) + 1) // columns)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    cells = list(figure.subplots(-(-(len(panels) + 1) // columns), columns, squeeze=False).flat)
    for axes, (label, curves) in zip(cells, panels.items(), strict=False):
        for method, curve in curves.items():
            axes.plot(*zip(*smoothed(curve), strict=True), label=method, color=f"C{list(METHODS).index(method)}")
        axes.set(title=label, xlabel="training tokens", ylabel="training loss (nats)")
        axes.grid(alpha=0.3)
    handles = {text: handle for axes in cells for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    for axes in cells[len(panels) :]:
        axes.axis("off")
    cells[-1].legend(handles.values(), handles.keys(), loc="center", title="smoothed over three steps")
    figure.savefig(path)


def smoothed(curve: list[list[float]], width: int = 3) -> Iterator[tuple[float, float]]:
    """The mean of each point and those just before it."""
    for index, (tokens, _) in enumerate(curve):
        window = [loss for _, loss in curve[max(0, index - width + 1) : index + 1]]
        yield tokens, sum(window) / len(window)


def main() -> None:
    """Does what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["convert", "uptrain", "show"])
    parser.add_argument("--source", help="the pretrained model")
    parser.add_argument("--train-text", help="jsonl, for calibration and training")
    parser.add_argument("--heldout-text", help="jsonl, for perplexity")
    parser.add_argument("--out", default="runs/conversion_study")
    parser.add_argument("--pattern", action="append", default=[], metavar="LABEL=LAYER_TYPES", help="one more pattern")
    parser.add_argument("--label", action="append", help="look only at the pattern of this label (may be repeated)")
    parser.add_argument("--method", action="append", help="train only behind this method (may be repeated)")
    parser.add_argument("--block-size", type=int, default=512)
    parser.add_argument("--heldout-documents", type=int, default=25)
    parser.add_argument("--heldout-characters", type=int, default=1800, help="of each")
    parser.add_argument("--calibration-tokens", type=int, default=32768)
    parser.add_argument("--ridge", type=float, default=1e-2)
    parser.add_argument("--forward-passes", type=int, default=2)
    parser.add_argument("--sliding-window", type=int, default=256, help="of YOCO's lower half")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    {"convert": convert_all, "uptrain": uptrain_all, "show": show}[arguments.stage](Study(arguments))


if __name__ == "__main__":
    main()
