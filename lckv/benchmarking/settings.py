"""Checks a benchmark's configuration, before anything is loaded: what is measured, and where the results go."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lckv.config import BenchmarkConfig, ModelConfig, SharingConfig, TokenizerConfig, TrainConfig
from lckv.config.model_arguments import model_arguments
from lckv.errors import UserError, near_miss
from lckv.sharing.iteration import CONVERGE
from lckv.sharing.patterns import PATTERNS
from lckv.utils.byte_sizes import parse_bytes
from lckv.utils.storage import check_folder, numbered, write_json

if TYPE_CHECKING:  # importing it takes seconds, and most mistakes are found without
    from lckv.models import LCKVLlamaConfig

DEFAULT_PATTERNS = ("llama", "cla", "yoco", "lckv", "sandwich_middle")
_DEFAULT_FOLDER = Path("runs") / "benchmark"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Workload:
    """What every contender has to do: the settings of these names in [`lckv.config.BenchmarkConfig`], checked.

    Attributes:
        kv_budget: bytes; `None`: no batch is sought that fills it.
    """

    prompt_length: int
    new_tokens: int
    batch_sizes: tuple[int, ...] = (1,)
    kv_budget: int | None = None
    max_batch_size: int = 4096
    rounds: int = 5
    prefill_chunk: int | None = None
    prefill_passes: int | str | None = None
    prefill_tolerance: float | None = None
    seed: int = 0

    @property
    def length(self) -> int:
        """Tokens of a sequence at its end."""
        return self.prompt_length + self.new_tokens


def build_workload(cfg: BenchmarkConfig) -> Workload:
    """What every contender has to do."""
    given = {item.name: getattr(cfg, item.name) for item in fields(Workload)}
    given["batch_sizes"] = tuple(dict.fromkeys(cfg.batch_sizes))
    if cfg.kv_budget is not None:
        given["kv_budget"] = parse_bytes(cfg.kv_budget, "kv_budget")
    return Workload(**given)


def random_models(cfg: BenchmarkConfig) -> dict[str, dict[str, Any]]:
    """The arguments of `LCKVLlamaConfig` for every pattern, by its label; all have the same number of layers.

    Raises:
        UserError: for a wrong pattern, or one of another number of layers.
    """
    patterns = cfg.patterns if cfg.patterns or cfg.checkpoints else DEFAULT_PATTERNS
    model = _with_depth_of(patterns, cfg.model)
    arguments = {}
    for index, pattern in enumerate(patterns):
        made = _arguments(model, pattern, f"patterns[{index}]")
        if pattern in arguments:
            raise UserError(f"patterns[{index}]={pattern}: is there twice; leave one of them out")
        arguments[pattern] = made
    return arguments


def _with_depth_of(patterns: Sequence[Any], model: ModelConfig) -> ModelConfig:
    """The settings with the depth of the `layer_types` strings for named patterns, too, unless one is asked for."""
    depths = {
        f"patterns[{index}]={pattern}": pattern.count("_") + 1
        for index, pattern in enumerate(patterns)
        if _is_layer_types(pattern)
    }
    if not depths:
        return model
    (first, depth), *others = depths.items()
    for other, number in others:
        if number != depth:
            raise UserError(f"{other}: has {number} entries, but {first} has {depth}; all must have as many")
    return replace(model, default_num_hidden_layers=depth)


def _is_layer_types(pattern: Any) -> bool:
    return isinstance(pattern, str) and pattern[:1].isdigit()


def checkpoint_labels(paths: Sequence[str], taken: Sequence[str]) -> dict[str, str]:
    """A short name for every checkpoint: the last parts of its path that tell it from the others.

    Args:
        paths: of the checkpoints.
        taken: names that are not free.
    """
    labels: dict[str, str] = {}
    for path in paths:
        parts = path.rstrip("/").split("/")
        names = ["/".join(parts[start:]) for start in reversed(range(len(parts)))]
        labels[next(name for name in [*names, f"{path} "] if name not in labels and name not in taken)] = path
    return labels


def check_iteration(passes: Any, tolerance: float | None, configs: Mapping[str, LCKVLlamaConfig]) -> None:
    """Refuses settings for iterating over the prompt where no model does, or not until it converges.

    Args:
        passes: `prefill_passes`.
        tolerance: `prefill_tolerance`.
        configs: of all models, by label.

    Raises:
        UserError: naming the setting.
    """
    iterating = [each for each in configs.values() if each.sharing_plan.has_cycles and not each.use_sequential]
    for name, value in (("prefill_passes", passes), ("prefill_tolerance", tolerance)):
        if value is not None and not iterating:
            raise UserError(
                f"{name}={value}: has no effect on {', '.join(configs)}: none iterates over a prompt, for which "
                "layers must read upward; leave it out"
            )
    if tolerance is not None and passes not in (None, CONVERGE):
        raise UserError(f"prefill_tolerance={tolerance}: has no effect without prefill_passes={CONVERGE}")


def _arguments(model: ModelConfig, pattern: Any, key: str) -> dict[str, Any]:
    """For a `layer_types` string, or the name of a sharing pattern."""
    if not isinstance(pattern, str):
        raise UserError(
            f"{key}={pattern!r}: must be text, but the configuration holds a {type(pattern).__name__} (YAML reads "
            'unquoted digits and underscores as a number); write it in quotes, such as "0_0_2_2"'
        )
    if _is_layer_types(pattern):
        cfg = TrainConfig(model=replace(model, layer_types=pattern))
    elif pattern in PATTERNS:
        cfg = TrainConfig(model=model, sharing=SharingConfig(name=pattern))
    else:
        raise UserError(
            f"{key}={pattern}: allowed are layer_types such as 0_0_2_2 and the names {', '.join(PATTERNS)}"
            f"{near_miss(pattern, PATTERNS)}"
        )
    try:
        return model_arguments(cfg, model.vocab_size or TokenizerConfig().vocab_size)
    except UserError as error:
        raise UserError(str(error).replace("model.layer_types", key, 1)) from None


class OutputFolder:
    """Holds `benchmark.json` and the picture beside it.

    Args:
        path: the folder; `None` takes the first of `runs/benchmark`, `runs/benchmark-2`, ... that does not exist.
        overwrite: whether the results of an earlier run there may be replaced.
        plot_format: of the picture.

    Raises:
        UserError: if the folder holds results, or cannot be written to.
    """

    def __init__(self, path: str | None, *, overwrite: bool, plot_format: str) -> None:
        self.path = _DEFAULT_FOLDER if path is None else Path(path)
        self._is_named, self._overwrite, self._plot_format = path is not None, overwrite, plot_format
        if path is not None:
            check_folder(self.path, f"output_dir={path}")
        if path is not None and self.results.exists() and not overwrite:
            raise UserError(
                f"output_dir={path}: holds the results of an earlier run; name another folder, or give overwrite=true"
            )

    @property
    def results(self) -> Path:
        """The file with the figures."""
        return self.path / "benchmark.json"

    @property
    def plot(self) -> Path:
        """The file with the picture."""
        return self.path / f"benchmark.{self._plot_format}"

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Makes the folder, so that no run that begins meanwhile takes it, too; if it stays empty, it goes again."""
        is_new = not self._is_named or not self.path.exists()
        if self._is_named:
            self.path.mkdir(parents=True, exist_ok=True)
        else:
            self.path = _make_first_free(self.path)
        try:
            yield
        finally:
            if is_new and not any(self.path.iterdir()):
                self.path.rmdir()

    def write(self, figures: dict[str, Any]) -> None:
        """Writes the figures inside `claimed`.

        If another run has left its own there since this one began, it takes a numbered folder beside it.
        """
        try:
            self.results.touch(exist_ok=self._overwrite)
        except FileExistsError:
            taken, self.path = self.path, _make_first_free(self.path)
            logger.warning("%s has got the results of another run meanwhile; these go to %s", taken, self.path)
        write_json(self.results, figures)


def _make_first_free(path: Path) -> Path:
    """Makes the first of `path`, `path-2`, ... that does not exist; of several runs, each gets one of its own."""
    folders = numbered(path)
    while True:
        try:  # asked beforehand whether it exists, another process could come in between
            (folder := next(folders)).mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
