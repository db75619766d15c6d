"""What Hydra is told before it composes: the dataclasses, the named options, the YAML's folder and functions."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import cache
from hashlib import sha256
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from lckv.config import (
    BenchmarkConfig,
    ChatConfig,
    ConvertConfig,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    HintsConfig,
    PlanConfig,
    ReportConfig,
    SearchConfig,
    SFTConfig,
    TrainConfig,
    names,
)
from lckv.errors import UserError
from lckv.sharing.patterns import PATTERNS

SCHEMAS: dict[str, type] = {
    "train": TrainConfig,
    "sft": SFTConfig,
    "plan": PlanConfig,
    "convert": ConvertConfig,
    "search": SearchConfig,
    "evaluate": EvaluateConfig,
    "generate": GenerateConfig,
    "chat": ChatConfig,
    "benchmark": BenchmarkConfig,
    "report": ReportConfig,
    "export": ExportConfig,
    "hints": HintsConfig,
}
"""The root dataclass of each entry point, by the name of its YAML file."""

NAMED_OPTIONS: dict[str, Iterable[str]] = {
    "sharing": [*PATTERNS, names.RANDOM],
    "latent": (*names.LATENTS, names.AUTO_LATENT, names.NO_LATENT),
    "cache": (*names.CACHES, names.NO_CACHE),
    "data": names.SOURCES,
    "optim": names.OPTIMIZERS,
}
"""The options of a group that choose a name and nothing else, so that they need no YAML file."""


@cache
def register_schema(config_name: str) -> None:
    """Tells Hydra a root dataclass, as `<config_name>_schema`, the named options, and the functions of YAML files.

    No other one: Hydra copies all that it was told whenever it composes, and for a help text hundreds of times.
    """
    OmegaConf.register_new_resolver(
        "lckv.first_given", lambda *values: next(value for value in values if value is not None), replace=True
    )
    OmegaConf.register_new_resolver(
        "lckv.temporary_folder", lambda name: str(Path(gettempdir()) / f"{name}-{os.getuid()}"), replace=True
    )
    OmegaConf.register_new_resolver(
        "lckv.default_sharing", lambda source: "lckv" if source is None else "llama", replace=True
    )
    OmegaConf.register_new_resolver("lckv.fingerprint", _fingerprint, replace=True)
    OmegaConf.register_new_resolver("lckv.groups", _list_groups, replace=True)
    store = ConfigStore.instance()
    store.store(name=f"{config_name}_schema", node=SCHEMAS[config_name], provider="lckv")
    for group, options in NAMED_OPTIONS.items():
        for name in options:
            store.store(group=group, name=name, node={"name": name}, provider="lckv")
    register_literals({})


def register_literals(values: Mapping[str, str]) -> None:
    """Tells Hydra the values of keys that are `lckv.config.literal`, which root YAML files merge last."""
    node = OmegaConf.create()
    for key, value in values.items():
        OmegaConf.update(node, key, value)
    ConfigStore.instance().store(name="literals", node=node, provider="lckv")


def _fingerprint(*, _root_: Any) -> str:
    """A short name for all settings but those that say what a run is called, where it is and whether it may go on."""
    settings: Any = OmegaConf.to_container(_root_)
    settings.get("trainer", {}).pop("resume", None)
    kept = {key: value for key, value in settings.items() if key not in ("run_name", "run_dir", "hydra")}
    return sha256(repr(sorted(kept.items())).encode()).hexdigest()[:8]


def _list_groups(*names: str) -> str:
    """For help texts: the options of these groups, one group a line, the user's own folders included."""
    loader: Any = GlobalHydra.instance().config_loader()
    # Hydra fills in help texts whenever it composes; the loader's own method copies everything for each group.
    options = {name: sorted(loader.repository.get_group_options(name)) for name in names}
    return "".join(f"{name}: {', '.join(found)}\n" for name, found in options.items())


@cache
def groups() -> frozenset[str]:
    """The names of all groups of options, such as `model` and `hydra/launcher`."""
    folders = (path.relative_to(config_dir()).as_posix() for path in config_dir().rglob("*") if path.is_dir())
    return frozenset((*NAMED_OPTIONS, *folders))


def config_dir() -> Path:
    """The folder with the YAML files: inside the installed package, or beside it in a checkout.

    Raises:
        UserError: if neither is there.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise UserError(f"no configuration files in {package / 'conf'} or {package.parent / 'conf'}: install lckv again")
