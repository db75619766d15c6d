"""What must be equal for the figures of two runs to be comparable, and a plain warning where it is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lckv.reporting.collecting import Run, scalar

_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
_MAX_NAMES = 3
UNKNOWN = "unknown"
_WORDS = {
    "lckv": "the version of lckv",
    "torch": "the version of torch",
    "data": "the text",
    "steps": "the number of steps",
    "tokens": "the number of tokens",
    "layers": "the number of layers",
    "vocab_size": "the vocabulary's size",
}


def provenance_of(run: Run) -> dict[str, Any]:
    """Versions, text, length of the training and sizes of a run; "unknown" where it does not say."""
    versions = run.results.get("versions")
    versions = versions if isinstance(versions, Mapping) else {}
    vocab_size = run.config.get("model.vocab_size") or run.config.get("tokenizer.vocab_size")
    values = {
        "lckv": versions.get("lckv"),
        "torch": versions.get("torch"),
        "data": run.results.get("data_fingerprint"),
        "steps": run.figure("steps"),
        "tokens": run.figure("tokens"),
        "layers": None if run.plan is None else run.plan.num_hidden_layers,
        "vocab_size": vocab_size,
        **{name: run.config.get(f"model.{name}", "") or "default" for name in _SIZES},
    }
    return {name: UNKNOWN if value is None else scalar(value) for name, value in values.items()}


def warnings_of(runs: Sequence[Run]) -> list[str]:
    """One sentence for each thing in which finished runs differ so that they cannot be compared."""
    provenances = [provenance_of(run) for run in runs]
    sentences = []
    for name in provenances[0] if provenances else ():
        holders: dict[Any, list[str]] = {}
        for run, provenance in zip(runs, provenances, strict=True):
            holders.setdefault(provenance[name], []).append(run.name)
        if len(holders) > 1:
            parts = "; ".join(f"{_show(name, value)} in {_list(names)}" for value, names in holders.items())
            sentences.append(f"not comparable: {_WORDS.get(name, name)} differs: {parts}")
    return sentences


def _show(name: str, value: Any) -> str:
    if name == "data":
        return str(value)[:12]
    return f"{value:,}" if isinstance(value, int) else str(value)


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MAX_NAMES])
    return shown if len(names) <= _MAX_NAMES else f"{shown} and {len(names) - _MAX_NAMES} more"
