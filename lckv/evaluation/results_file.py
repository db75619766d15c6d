"""The file with everything that is known about one model, `results.json`, and its figures as a table.

Its `evaluations` are the latest figures by name. Figures of the same evaluation with other settings, such as another
cache, are not lost: they move to `with_other_settings`, a list for each name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lckv.errors import UserError
from lckv.utils.storage import check_folder, locked, write_json


@dataclass
class ResultsFile:
    """Gathers the figures of one model, those of several calls, too.

    Attributes:
        path: the file.
        identity: `name`, what the user calls the model, and `fingerprint`, a short name for its weights.
        common: what every call writes anew, beside the evaluations.
    """

    path: Path
    identity: Mapping[str, Any]
    common: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Finds out whether the file can be written, and is this model's if it is there.

        Raises:
            UserError: if not.
        """
        self._read()
        check_folder(self.path.parent, f"out={self.path.parent}")
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, figures: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        """Writes the figures of evaluations, by their names, beside those of others, whole or not at all.

        Returns:
            Everything that the file then holds.
        """
        # Read again: another process may have added something, and must not add anything meanwhile.
        with locked(self.path.with_name(f".{self.path.name}.lock")):
            evaluations, others = self._read()
            for name, new in figures.items():
                _add(evaluations, others, name, new)
            kept = {"with_other_settings": others} if others else {}
            results = {"model": dict(self.identity), "evaluations": evaluations, **kept, **self.common}
            write_json(self.path, _finite(results), allow_nan=False)
        return results

    def _read(self) -> tuple[dict[str, Any], dict[str, list[Any]]]:
        """What lies there already: the latest evaluations, and those with other settings."""
        if not self.path.is_file():
            return {}, {}
        try:
            results = json.loads(self.path.read_text(encoding="utf-8"))
            model, evaluations = results["model"], dict(results["evaluations"])
            others = dict(results.get("with_other_settings", {}))
            fingerprint = model["fingerprint"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path}: holds no results of lckv.evaluate; give another out=") from error
        if fingerprint != self.identity["fingerprint"]:
            raise UserError(
                f"{self.path}: holds the results of other weights ({model.get('name')}); give another out=, "
                "or remove the file"
            )
        return evaluations, others


def _add(evaluations: dict[str, Any], others: dict[str, list[Any]], name: str, figures: dict[str, Any]) -> None:
    """Puts figures in the first place; those that were there move back, unless these replace them.

    They do if the settings are the same, and not only the earlier ones are whole.
    """
    earlier = [*others.pop(name, []), *([evaluations[name]] if name in evaluations else [])]
    others[name] = [
        each
        for each in earlier
        if each.get("settings") != figures.get("settings") or (figures.get("errors") and not each.get("errors"))
    ]
    evaluations[name] = figures
    if not others[name]:
        del others[name]


def _finite(value: Any) -> Any:
    """The value without numbers that JSON has no names for, such as the perplexity of a text of one word: `None`."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def scalar_figures(figures: Mapping[str, Any], prefix: str = "", separator: str = "/") -> Iterator[tuple[str, float]]:
    """Yields the numbers among an evaluation's figures, those of nested mappings with their path as the name.

    The settings that are noted with them are none.
    """
    for name, value in figures.items():
        if isinstance(value, Mapping) and name != "settings":
            yield from scalar_figures(value, f"{prefix}{name}{separator}", separator)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}", value


def show_results(results: Mapping[str, Any], path: Path, console: Console) -> None:
    """Prints the numbers among the figures of every evaluation, the costs, and where all of it is written."""
    title = f"{results['model']['name']}  {results['layer_types']}"
    table = Table(title=title, title_justify="left")
    for heading, justify in ("evaluation", "left"), ("figure", "left"), ("value", "right"):
        table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    sections = {name: map(_show, scalar_figures(figures)) for name, figures in results["evaluations"].items()}
    for section, rows in {**sections, "costs": _costs(results["costs"])}.items():
        shown = list(rows)
        for number, (name, value) in enumerate(shown):
            table.add_row("" if number else section, name, value, end_section=number == len(shown) - 1)
    console.print(table)
    others = results.get("with_other_settings", {})
    if others:
        told = ", ".join(f"{name} ({len(figures)})" for name, figures in others.items())
        console.print(f"the file also holds figures with other settings: {told}")
    console.print(f"written: {path}")


def _costs(costs: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    context = f"at {costs['kv_bytes_context_length']:,} tokens, in 16 bits"
    for name, what in (
        ("written", "written per token, in 16 bits"),
        ("resident", f"resident per token {context}"),
        ("read", f"read to decode a token {context}"),
    ):
        of_llama = f"Llama: {costs['kv_bytes_llama'][name]:,.0f}"
        yield f"KV bytes {what}", f"{costs['kv_bytes'][name]:,.0f}  ({of_llama})"
    yield "parameters", f"{costs['num_parameters']:,}"
    flops, speed = costs["train_flops_per_token"], costs["train_tokens_per_second"]
    yield "FLOPs to train on a token", "depends on the text" if flops is None else f"{flops:,.0f}"
    if speed is not None:
        yield "training tokens/s", f"{speed:,.0f}"


def _show(figure: tuple[str, float]) -> tuple[str, str]:
    name, value = figure
    return name, f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"
