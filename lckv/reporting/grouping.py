"""Which runs are the same but for their seed, and which baseline each group of them has."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from lckv.config import TrainConfig
from lckv.reporting.collecting import Run
from lckv.reporting.metrics import Metric
from lckv.reporting.provenance import provenance_of
from lckv.training.run_folder import flatten

_DEFAULTS = dict(flatten(asdict(TrainConfig())))
"""What a run of an earlier version, which did not know a setting, did."""

_CHANGES_NO_RESULT = (
    *("seed", "run_name", "run_dir", "logger.", "data.cache_dir", "trainer.resume", "trainer.num_threads"),
    *("trainer.dataloader_num_workers", "trainer.micro_batch_size", "trainer.eval_batch_size", "trainer.eval_steps"),
    *(
        "trainer.save_",
        "trainer.logging_steps",
        "trainer.sample_",
        "trainer.evaluation_steps",
        "evaluation.batch_size",
    ),
)
_OF_WINDOWS = ("model.sliding_window",)
_OF_CYCLES = (
    *("model.forward_passes", "model.backward_passes", "model.converge_tolerance"),
    "model.use_sequential",
)
_OF_PATTERN = (
    *("sharing.", "model.layer_types", "model.num_hidden_layers", "model.default_num_hidden_layers"),
    *(*_OF_WINDOWS, *_OF_CYCLES),
)
_MAX_LABEL = 26
_MAX_VALUE = 14

Settings = Mapping[str, str]
"""Values as JSON text, so that they can be compared and hashed."""


@dataclass(frozen=True)
class Group:
    """Runs that differ in no more than their seed.

    Attributes:
        label: a short name that no other group of the report has.
        runs: one for each seed.
        settings: what else was set, without what changes no result.
        pattern_settings: those settings that say what the pattern does.
        provenance: what else must be equal for figures to be comparable.
    """

    label: str
    runs: tuple[Run, ...]
    settings: Settings
    pattern_settings: Settings
    provenance: Settings

    @property
    def layer_types(self) -> str | None:
        """The pattern, as `layer_types`."""
        return self.runs[0].layer_types

    @property
    def family_name(self) -> str | None:
        """What it shares its colour with: the family of its pattern at any budget, or the pattern alone."""
        return self.runs[0].family_name or self.layer_types

    @property
    def is_llama(self) -> bool:
        """Whether nothing is shared."""
        return self.runs[0].family == "llama"

    @cached_property
    def cohort(self) -> tuple[tuple[str, str], ...]:
        """Groups with an equal one can be compared."""
        return tuple(sorted(self.provenance.items()))

    def figure(self, *keys: str) -> float | None:
        """A figure that does not depend on the seed."""
        return next((value for run in self.runs if (value := run.figure(*keys)) is not None), None)

    def values(self, metric: Metric) -> dict[Any, float]:
        """The metric by seed; runs that do not have it are left out."""
        pairs = ((run.seed, metric.of(run)) for run in self.runs)
        return {seed: value for seed, value in pairs if value is not None}

    @property
    def written(self) -> float | None:
        """KV bytes written per token; no pattern does without any."""
        written = self.figure("kv_bytes", "written")
        return written if written is not None and written > 0 else None

    @property
    def fraction(self) -> float | None:
        """The written bytes, of Llama's."""
        llama = self.figure("kv_bytes_llama", "written")
        return self.written / llama if self.written is not None and llama is not None and llama > 0 else None


def group_runs(runs: Sequence[Run]) -> tuple[list[Group], list[str]]:
    """Puts finished runs that differ in no more than their seed together.

    Returns:
        The groups, Llamas first, then from many KV bytes to few; and a sentence about every run that is left out
        because the same one is there already.
    """
    members: dict[tuple[Any, ...], dict[Any, Run]] = {}
    notes = []
    for run in runs:
        seeds = members.setdefault(tuple(tuple(part.items()) for part in _parts(run)), {})
        if run.seed in seeds:
            same = "same pattern, same settings, same seed"
            notes.append(f"{run.name} repeats {seeds[run.seed].name} ({same}) and is left out")
        else:
            seeds[run.seed] = run
    groups = [_make_group(tuple(seeds.values())) for seeds in members.values()]
    groups.sort(key=lambda group: (not group.is_llama, -(group.written or 0), group.layer_types or "", group.label))
    return _with_labels(groups), notes


def _parts(run: Run) -> tuple[Settings, Settings, Settings]:
    config = {**_DEFAULTS, **run.config}
    kept = {key: value for key, value in config.items() if not key.startswith((*_CHANGES_NO_RESULT, *_OF_PATTERN))}
    return _as_text(kept), _as_text(_pattern_settings(run, config)), _as_text(provenance_of(run))


def _pattern_settings(run: Run, config: Mapping[str, Any]) -> dict[str, Any]:
    """The pattern, and of what says how it is run, only what it reads."""
    settings = {"layer_types": run.layer_types}
    if run.plan is not None and run.plan.has_cycles:
        settings |= {key: config[key] for key in _OF_CYCLES}
    if run.plan is not None and any(layer.is_sliding for layer in run.plan.layers):
        settings |= {key: run.sliding_window for key in _OF_WINDOWS}
    return settings


def _as_text(settings: Mapping[str, Any]) -> dict[str, str]:
    return {
        key: json.dumps(settings[key], sort_keys=True, default=str, ensure_ascii=False) for key in sorted(settings)
    }


def _make_group(runs: tuple[Run, ...]) -> Group:
    first = runs[0]
    label = first.family or _shorten(first.layer_types or "unknown pattern")
    return Group(label, runs, *_parts(first))


def _shorten(text: str, max_length: int = _MAX_LABEL) -> str:
    """A long text without its middle."""
    return text if len(text) <= max_length else f"{text[: max_length // 2]}…{text[-max_length // 2 + 1 :]}"


def _with_labels(groups: list[Group]) -> list[Group]:
    """The groups with labels of which no two are alike: of equal ones, each also says what sets it apart."""
    alike = {group.label: [other for other in groups if other.label == group.label] for group in groups}
    labels = [" ".join([group.label, *_differences(group, alike[group.label])]) for group in groups]
    times: Counter[str] = Counter()
    for place, label in enumerate(labels):
        times[label] += 1
        labels[place] = label if times[label] == 1 else f"{label} ({times[label]})"
    return [
        Group(label, group.runs, group.settings, group.pattern_settings, group.provenance)
        for label, group in zip(labels, groups, strict=True)
    ]


def _differences(group: Group, others: Sequence[Group]) -> list[str]:
    """What sets groups apart from each other, as this one has it: no more settings than it takes."""
    found = []
    apart: list[tuple[str | None, ...]] = [()] * len(others)
    for kind in ("pattern_settings", "settings", "provenance"):
        own, theirs = getattr(group, kind), [getattr(other, kind) for other in others]
        for key in sorted({key for each in theirs for key in each} - {"layer_types"}):
            further = [(*before, each.get(key)) for before, each in zip(apart, theirs, strict=True)]
            if len(set(further)) > len(set(apart)):
                apart = further
                found.append(f"{key.rpartition('.')[2]}={_shorten(own.get(key, '–').strip(chr(34)), _MAX_VALUE)}")
    return found


def baseline_of(group: Group, groups: Sequence[Group], metric: Metric) -> Group | None:
    """The Llama that a group is compared with: one of the same settings, or else the best one that is comparable."""
    llamas = [other for other in groups if other.is_llama and other.cohort == group.cohort]
    same = [llama for llama in llamas if llama.settings == group.settings]
    if same or not llamas:
        return same[0] if same else None
    return best_of(llamas, metric) or llamas[0]


def best_of(groups: Iterable[Group], metric: Metric) -> Group | None:
    """The group with the best mean; `None` if none has any value."""
    means = [(group, values) for group in groups if (values := list(group.values(metric).values()))]
    sign = 1 if metric.lower_is_better else -1
    return min(means, key=lambda pair: sign * sum(pair[1]) / len(pair[1]), default=(None, None))[0]
