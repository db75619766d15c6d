"""What every entry point shares: Hydra composes the configuration, mistakes become one line and exit code 2."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import re
import sys
import typing
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import nullcontext
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from lckv import config
from lckv.commands import hydra_store, overrides
from lckv.commands.config_errors import CONFIG_ERRORS, check_elements, describe, describe_flag, describe_key
from lckv.config import validate
from lckv.config.keys import keys_of
from lckv.config.run_names import default_run_name, file_name
from lckv.errors import UserError
from lckv.training.run_folder import RunFolder, recorded_failure
from lckv.utils.processes import hear_every_interrupt, share_cores
from lckv.utils.storage import CANNOT_WRITE

logger = logging.getLogger(__name__)

_NO_PATH = (errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


def run(main: Callable[[Any], Any], config_name: str) -> None:
    """Runs an entry point on the configuration that the command line asks for, once per job of a sweep.

    Mistakes of the user are printed as one line each, and the process ends with exit code 2. Any other exception
    passes through, so that a bug shows its traceback. In a sweep, neither ends more than its own job: the reasons are
    printed, a bug's with its traceback, and the process ends with exit code 2 after the other jobs.

    Args:
        main: gets the root dataclass of `config_name`, checked, with the run folder filled in; what it returns goes to
            Hydra's sweeper, which may look for a low value.
        config_name: the root YAML file, without its ending.
    """
    # Else Hydra itself prints exceptions and exits, before anything here can see them.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    share_cores()
    hear_every_interrupt()
    job = _Job(main, config_name, [])
    FailedJob.received.clear()
    try:
        sys.argv[1:], literals = _prepare_arguments(sys.argv[1:], config_name)
        job.arguments = [*sys.argv[1:], *literals]
        hydra.main(config_path=str(hydra_store.config_dir()), config_name=config_name, version_base="1.3")(job)()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        mistake = _mistake(error)
        if mistake is None and error is not job.bug:
            mistake = _mistake_in_the_configuration(error, hydra_store.SCHEMAS[config_name])
        if mistake is None:
            raise
        job.report(mistake)
    for line in FailedJob.received:  # of jobs in other processes, whose output may have gone elsewhere
        job.report(line)
    if job.has_failed:
        sys.exit(2)


def is_in_a_sweep() -> bool:
    """Whether this process runs a job of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def task_overrides() -> list[str]:
    """What the command line says of the configuration; in a sweep, of this job's alone."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def compose(arguments: Sequence[str] = (), config_name: str = "train") -> Any:
    """The configuration that `python -m lckv.<config_name>` gets from these arguments, for notebooks and tests.

    Raises:
        UserError: if the arguments are wrong.
    """
    given, _ = _prepare_arguments(arguments, config_name)
    try:
        with hydra.initialize_config_dir(str(hydra_store.config_dir()), version_base="1.3"):
            composed = hydra.compose(config_name, given, return_hydra_config=True)
        hydra_cfg = composed.hydra
        with flag_override(composed, ["struct", "readonly"], False):
            del composed["hydra"]
        return prepare(composed, hydra_cfg)
    except UserError:
        raise
    except CONFIG_ERRORS as error:
        raise UserError(describe(error, hydra_store.SCHEMAS[config_name])) from error


def _prepare_arguments(arguments: Sequence[str], config_name: str) -> tuple[list[str], list[str]]:
    """Makes arguments for Hydra, beside those with literal text, and registers what it needs to compose both.

    Raises:
        UserError: for a flag that Hydra does not have.
    """
    schema = hydra_store.SCHEMAS[config_name]
    if flag := overrides.find_foreign_flag(arguments):
        raise UserError(describe_flag(*flag, schema))
    others, literals = overrides.take_literals(arguments, literal_keys(schema))
    hydra_store.register_schema(config_name)
    hydra_store.register_literals({key: overrides.escape(text) for key, text in literals.items()})
    prepared = overrides.quote_overrides(overrides.flags_first(others), open_keys(schema))
    return prepared, [f"{key}={text}" for key, text in literals.items()]


class _Job:
    """What Hydra calls with each composed configuration, perhaps in another process, which gets a pickled copy.

    Attributes:
        has_failed: whether a mistake was printed.
        bug: the exception that was let pass.
    """

    def __init__(self, main: Callable[[Any], Any], config_name: str, arguments: list[str]) -> None:
        self.main = main
        self.config_name = config_name
        self.arguments = arguments
        self.has_failed = False
        self.bug: Exception | None = None

    def __call__(self, composed: DictConfig) -> Any:
        sys.argv[1:] = self.arguments  # what a run says to type next begins with them
        hydra_cfg = typing.cast(DictConfig, HydraConfig.get())
        name = job_name(hydra_cfg) if is_in_a_sweep() else ""
        try:
            cfg = _to_dataclass(composed, hydra_cfg)
            is_run = _is_run(cfg) and is_in_a_sweep()
            with recorded_failure(RunFolder(cfg.run_dir), cfg, task_overrides()) if is_run else nullcontext():
                validate(cfg, task_overrides())
            return self.main(cfg)
        except Exception as error:
            mistake = _mistake(error)
            if mistake is None and not name:
                self.bug = error
                raise
            if mistake is None:
                logger.error("%s has failed", name, exc_info=error)
                mistake = f"{type(error).__name__}: {error}"
            return FailedJob(self.report(f"{name}: {mistake}" if name else mistake))

    def report(self, message: str) -> str:
        """Prints a mistake as one line, and returns it."""
        line = " ".join(message.split())
        sys.stderr.write(f"lckv.{self.config_name}: error: {line}\n")
        self.has_failed = True
        return line

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"main": _importable(self.main)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        hydra_store.register_schema(self.config_name)  # Hydra composes once more where the job runs


class FailedJob:
    """What a failed job returns in place of a result, so that the launcher and the sweeper go on with the others.

    Hydra drops what jobs return. So in a process that gets this object from another one, as with joblib, submitit and
    Ray, it leaves its reason in `received` when it arrives.
    """

    received: ClassVar[list[str]] = []

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __repr__(self) -> str:
        return self.reason

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return _receive, (self.reason,)


def _receive(reason: str) -> FailedJob:
    FailedJob.received.append(reason)
    return FailedJob(reason)


def _importable(main: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function of the module behind `python -m`, by the name under which another process can import it.

    Else it would be pickled as code, whose tracebacks name no file.
    """
    spec = sys.modules["__main__"].__spec__
    if main.__module__ != "__main__" or spec is None:
        return main
    return typing.cast(Callable[[Any], Any], getattr(importlib.import_module(spec.name), main.__name__))


def _mistake(error: Exception) -> str | None:
    """What to say of a mistake of the user, or of a file that cannot be written; None for other exceptions."""
    if isinstance(error, BrokenPipeError):  # whoever read the output has seen enough, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes what is left at its end
        sys.exit(141)
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
        return f"{error.filename or 'a file'}: {error.strerror}; check permissions and free space"
    if isinstance(error, OSError) and error.errno in _NO_PATH:
        return f"{error.filename}: {error.strerror}; give another path"
    return None


def _mistake_in_the_configuration(error: Exception, schema: type) -> str | None:
    """The same for what Hydra finds wrong with the configuration, and launchers with the machine."""
    if isinstance(error, CONFIG_ERRORS):
        return describe(error, schema)
    if isinstance(error, BrokenExecutor):
        return "a process of the sweep was killed; the same command again goes on with what is unfinished"
    if isinstance(error, RuntimeError):  # such as of SLURM that is not there
        return f"the launcher has failed: {error}"
    return None


def prepare(composed: DictConfig, hydra_cfg: DictConfig) -> Any:
    """Turns what Hydra composed into the root dataclass, with mistakes found that Hydra lets pass.

    Raises:
        UserError: if a key was added that nothing reads or a value refers to a key that does not exist, if
            `layer_types` came in as a number, and for what `lckv.config.validate` refuses.
    """
    cfg = _to_dataclass(composed, hydra_cfg)
    validate(cfg, list(hydra_cfg.overrides.task))
    return cfg


def _to_dataclass(composed: DictConfig, hydra_cfg: DictConfig) -> Any:
    schema = OmegaConf.get_type(composed)
    assert schema is not None
    try:
        cfg: Any = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:  # such as an interpolation of a key that does not exist
        raise UserError(describe(error, schema)) from error
    if isinstance(model := getattr(cfg, "model", None), config.ModelConfig):
        overrides.check_is_text(model.layer_types, "model.layer_types", _config_files(hydra_cfg))
    _check_keys(composed, schema)
    check_elements(cfg, schema)
    for key in literal_keys(schema):
        group, _, name = key.rpartition(".")
        parent = attrgetter(group)(cfg) if group else cfg
        setattr(parent, name, overrides.unescape(getattr(parent, name)))
    if isinstance(cfg, config.RunConfig):
        _fill_run_dir(cfg, hydra_cfg)
    return cfg


def _config_files(hydra_cfg: DictConfig) -> list[Path]:
    """The YAML files behind a composed configuration."""
    folders = [Path(source.path) for source in hydra_cfg.runtime.config_sources if source.schema == "file"]
    choices = OmegaConf.to_container(hydra_cfg.runtime.choices)
    return overrides.config_files(folders, hydra_cfg.job.config_name, typing.cast(dict[str, Any], choices))


def _check_keys(composed: DictConfig, schema: type, prefix: str = "") -> None:
    """Refuses keys that `+key=value` has added: nothing would read them."""
    known = keys_of(schema)
    for name in map(str, composed):
        if (key := prefix + name) not in known:
            raise UserError(describe_key(key, schema))
        if known[key].is_group:
            _check_keys(composed[name], schema, f"{key}.")


def _is_run(cfg: Any) -> bool:
    """Whether something is trained, which leaves a run folder."""
    return isinstance(cfg, config.RunConfig) and not isinstance(cfg, config.PlanConfig)


def _fill_run_dir(cfg: config.RunConfig, hydra_cfg: DictConfig) -> None:
    cfg.run_name = cfg.run_name or default_run_name(cfg)
    if hydra_cfg.mode == RunMode.MULTIRUN:
        if _is_run(cfg) and cfg.run_dir and Path(cfg.run_dir) != Path(hydra_cfg.sweep.dir):
            raise UserError(
                f"run_dir={cfg.run_dir}: has no effect in a sweep beside hydra.sweep.dir={hydra_cfg.sweep.dir}; "
                "leave one of them out"
            )
        cfg.run_dir = str(Path(hydra_cfg.sweep.dir) / job_name(hydra_cfg))
    else:
        cfg.run_dir = str(Path("runs") / file_name(cfg.run_name)) if cfg.run_dir is None else cfg.run_dir


def job_name(hydra_cfg: DictConfig) -> str:
    """The overrides of one job of a sweep as a folder name: `layer_types=0_0_2_2,seed=1`."""
    parts = []
    for override in hydra_cfg.overrides.task:
        key, _, value = override.lstrip("+~").partition("=")
        if key != "run_dir":
            parts.append(f"{key.rpartition('.')[2]}={value}")
    return file_name(re.sub(r"['\"]", "", ",".join(parts)))


def open_keys(schema: type) -> list[str]:
    """The keys of a root dataclass that hold dictionaries with entries of any name."""
    return [name for name, key in keys_of(schema).items() if typing.get_origin(key.type) is dict]


def literal_keys(schema: type) -> list[str]:
    """The keys of a root dataclass whose values the command line gives as they stand; see `lckv.config.literal`."""
    return [name for name, key in keys_of(schema).items() if key.traits.get("is_literal")]
