"""Finds and loads tasks of lm-eval; those whose data cannot be had do not keep the others from running."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from lckv.config import HarnessConfig
from lckv.errors import UserError, near_miss
from lckv.utils.hub import hub_answers

TASKS = Path(__file__).parent / "tasks"
"""The folder of the task and group files that come with this package."""

_DATASET_PATH = re.compile(r"^dataset_path: *([^\s#]+)", re.MULTILINE)


def check_tasks(options: HarnessConfig, prefix: str) -> None:
    """Raises a UserError for the first unknown task or folder, without loading any data."""
    _find_names(options.tasks, _task_manager(options, prefix), prefix)


def load_tasks(options: HarnessConfig, max_length: int, prefix: str) -> LoadedTasks:
    """Loads the tasks that `options.tasks` names, or a group, or a pattern such as `blimp_*`, or a YAML file.

    Args:
        options: the settings.
        max_length: tokens that the model sees at once.
        prefix: what stands before the names of settings in messages.

    Raises:
        UserError: for an unknown task or folder, a task that is asked for twice, and if no task can be loaded.
    """
    manager = _task_manager(options, prefix)
    loaded = LoadedTasks(manager, max_length)
    for name in _find_names(options.tasks, manager, prefix):
        loaded.load(name)
    if not loaded.specs:
        raise UserError(f"{prefix}tasks={options.tasks}: none can be loaded; {join_errors(loaded.errors)}")
    try:
        loaded.tasks = dict(manager.load(loaded.specs)["tasks"])
    except ValueError as error:  # a task that is also in a group
        raise UserError(f"{prefix}tasks={options.tasks}: {error}") from error
    return loaded


def _task_manager(options: HarnessConfig, prefix: str) -> Any:
    """lm-eval's index of tasks; without its own thousands, which take seconds to read, where none is needed."""
    from lm_eval.tasks import TaskManager

    folders = [TASKS]
    if options.include_path is not None:
        folders.append(Path(options.include_path).expanduser())
        if not any(folders[-1].glob("**/*.yaml")):
            reason = "holds no YAML file" if folders[-1].is_dir() else "is no folder"
            raise UserError(f"{prefix}include_path={options.include_path!r}: {reason}; allowed is a folder with tasks")
    manager = TaskManager(include_path=folders, include_defaults=False)
    known = manager.task_index
    if all(name in known and all(leaf in known for leaf in _leaves(manager, name)) for name in options.tasks):
        return manager
    return _full_task_manager(tuple(folders))


@cache  # training may ask again and again
def _full_task_manager(folders: tuple[Path, ...]) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(folders))


def _find_names(given: list[str], manager: Any, prefix: str) -> list[str]:
    """Checks the names, and resolves patterns."""
    names: list[str] = []
    for name in given:
        is_known = name in manager.task_index or Path(name).is_file()
        # A pattern means tasks alone: with their groups, they would be there twice.
        found = [name] if is_known else fnmatch.filter(manager.all_subtasks, name)
        if not found:
            raise UserError(
                f"{prefix}tasks={name!r}: no task, group or YAML file of this name; allowed are lckv_papers, "
                f"lckv_local, lm-eval's own and those in {prefix}include_path{near_miss(name, manager.all_tasks)}"
            )
        names += found
    return list(dict.fromkeys(names))


def _members(manager: Any, name: str) -> list[str]:
    """The names in a group or tag; none for a task."""
    entry = manager.task_index.get(name)
    if name in manager.all_tags:
        return sorted(entry.tags)
    if name not in manager.all_groups:
        return []
    return [item if isinstance(item, str) else item.get("task", item.get("group")) for item in entry.cfg["task"]]


def _leaves(manager: Any, name: str) -> Iterator[str]:
    """The tasks below a group, at any depth; of a task, itself."""
    members = _members(manager, name)
    for member in members:
        yield from _leaves(manager, member)
    if not members:
        yield name


@dataclass
class LoadedTasks:
    """What lm-eval is to run; one name after the other is added.

    Attributes:
        manager: lm-eval's `TaskManager`, which knows all names.
        max_length: tokens that the model sees at once.
        specs: its tasks, and its groups where they are complete.
        tasks: by name, those of groups too.
        errors: one line for each task that could not be loaded, or done.
    """

    manager: Any
    max_length: int
    specs: list[Any] = field(default_factory=list)
    tasks: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def load(self, name: str) -> None:
        """Loads a task or a group; of a group that has a gap, the tasks that are there, without the group's mean."""
        try:
            for leaf in _leaves(self.manager, name):
                self._check_reachable(leaf)
            found = self.manager.load(name)
            for task in found["tasks"].values():
                self._check_task(task)
        # Whatever goes wrong in the code and data of one task must not stop the others.
        except Exception as error:
            members = self._separable(name)
            for member in members:
                self.load(member)
            if not members:
                self.errors[name] = first_line(error) + self._hint(name, error)
        else:
            self.specs += [found["groups"][name]] if name in found["groups"] else found["tasks"].values()

    def _separable(self, name: str) -> list[str]:
        """The members of a group that mean the same outside of it."""
        from lm_eval.config.group import GroupConfig

        members = _members(self.manager, name)
        config = self.manager.task_index[name].cfg or {} if members else {}
        is_plain = all(isinstance(item, str) for item in config.get("task", []))
        return members if is_plain and config.keys() <= {entry.name for entry in fields(GroupConfig)} else []

    def _check_reachable(self, name: str) -> None:
        """Raises a ConnectionError for what the Hub's client would try to download for half a minute, in vain."""
        path = self._dataset_path(name)
        is_on_hub = "/" in path and not Path(path).exists()
        if is_on_hub and self._is_offline and not _is_downloaded(path):
            raise ConnectionError(f"the data set {path!r} cannot be reached")

    @cached_property
    def _is_offline(self) -> bool:
        return not hub_answers()

    def _dataset_path(self, name: str) -> str:
        entry = self.manager.task_index.get(name)
        config = entry.cfg if entry is not None and entry.cfg else {}
        return "" if "custom_dataset" in config else config.get("dataset_path") or ""

    def _check_task(self, task: Any) -> None:
        """Refuses what lm-eval would stop at in the midst of everything."""
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError("it runs code that the model writes, which is not done here")
        if getattr(task, "MULTIMODAL", False):
            raise UserError("it needs a model for images or sound")
        if task.OUTPUT_TYPE == "generate_until":
            from lm_eval.models.utils import normalize_gen_kwargs  # which knows all names of the number of tokens

            num_new = normalize_gen_kwargs(task.get_config("generation_kwargs") or {})["max_gen_toks"]
            if num_new >= self.max_length:
                raise UserError(f"it generates {num_new} tokens, but the model sees {self.max_length} at once")

    def _hint(self, name: str, error: Exception) -> str:
        """Why a data set may not be there."""
        path = self._dataset_path(name)
        if not path or not isinstance(error, OSError):
            return ""
        known = _datasets_of_lm_eval()
        hint = "" if path in known else near_miss(path, known)
        return f": is this machine offline (or HF_HUB_OFFLINE set), or the name misspelt{hint or '?'}"


@cache
def _datasets_of_lm_eval() -> frozenset[str]:
    """Names of data sets that are spelt right. lm-eval's index has them, too, but takes seconds to make."""
    import lm_eval.tasks

    texts = (path.read_text(encoding="utf-8") for path in Path(lm_eval.tasks.__file__).parent.rglob("*yaml"))
    return frozenset(name for text in texts for name in _DATASET_PATH.findall(text))


def _is_downloaded(path: str) -> bool:
    """Whether `datasets` has the data set in its cache, from which it then takes it."""
    from datasets import config
    from datasets.naming import camelcase_to_snakecase

    owner, _, dataset = path.rpartition("/")
    return (Path(config.HF_DATASETS_CACHE) / f"{owner}___{camelcase_to_snakecase(dataset)}").is_dir()


def first_line(error: Exception) -> str:
    """The beginning of what an exception says; that of one that is no mistake of the user with its type."""
    reason = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    is_told = isinstance(error, UserError | OSError)
    return reason if is_told and reason else f"{type(error).__name__}: {reason}".removesuffix(": ")


def join_errors(errors: dict[str, str]) -> str:
    """One line of many."""
    return "; ".join(f"{name}: {line}" for name, line in errors.items())
