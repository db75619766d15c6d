"""What to say of a configuration that Hydra, OmegaConf or YAML refuses: one line, with what is allowed."""

from __future__ import annotations

import re
import typing
from difflib import get_close_matches
from operator import attrgetter
from typing import Any

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from lckv import config
from lckv.commands import hydra_store, overrides
from lckv.config.keys import WORDS, keys_of
from lckv.config.training import OF_OURS
from lckv.errors import UserError, near_miss

CONFIG_ERRORS = (HydraException, OmegaConfBaseException, YAMLError, ValueError)  # ValueError: Hydra's own checks

_WRONG_TYPE = re.compile(
    r"Value '(.*)' (?:of type|is not a valid)|Cannot convert '\w+' to string: '(.*)'$|field '.*' is not Optional"
    r"|is not a ListConfig, list or tuple|is not a subclass of|Cannot assign \w+ to Dict|Cannot merge \w+ with"
)

_EXTRAS = {
    "hydra/launcher": {"joblib": "sweep", "submitit_local": "sweep", "submitit_slurm": "sweep", "ray": "ray"},
    "hydra/sweeper": {"optuna": "sweep"},
}
"""The extra of this package that brings an option of Hydra's own plugins."""


def describe(error: Exception, schema: type) -> str:
    """What a Hydra, OmegaConf or YAML error means, in one line that names the key and the nearest allowed one."""
    chain = (error, error.__cause__, error.__context__)
    cause = next((each for each in chain if isinstance(each, OmegaConfBaseException)), error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        if (extra := _EXTRAS.get(group, {}).get(option)) is not None:
            return f"{group}={option}: is not installed; pip install 'lckv[{extra}]'"
        options = [str(name) for name in error.options or ()]
        if group == "cache" and not issubclass(schema, config.EvaluateConfig):
            options.remove("none")  # generation cannot do without
        allowed = f"; allowed are {', '.join(options)}" if options else ""
        return f"{group or 'config'}={option}: there is no such option{allowed}{near_miss(option, options)}"
    if found := re.match(r"In '(\w+)/(\w+)': Could not override '([^']+)'", str(error)):
        given, group = f"{found[1]}={found[2]}", found[3]
        return f"{given}: is for another command: it chooses {group}=..., and there is no such group here"
    found = re.match(r"Could not override '([^'.]+)'", str(error))
    if found and found[1] not in keys_of(schema):  # one that other commands have
        return f"unknown key {found[1]!r}{_hint(found[1], schema)}"
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        return _describe_unknown_key(cause, error, schema)
    if isinstance(cause, OmegaConfBaseException) and (full_key := re.search(r"^ *full_key: (\S+)", str(cause), re.M)):
        key, reason = full_key[1], str(cause).splitlines()[0]
        return f"{_describe_wrong_type(key, reason, schema) or f'{key}: {reason}'}{_where(error)}"
    if (where := _where(error)) and "Cannot merge" in str(error):  # which does not say what
        return f"{where.strip(' ()')}: has a list in the place of keys of its own, or these in the place of a list"
    lines = [line for line in str(error).splitlines() if line.strip(" ^") and not line.startswith("See https://")]
    if isinstance(error, OverrideParseException):
        reasons = [line for line in lines if error.override not in line]
        lines = [f"{error.override}: cannot be read as key=value", *reasons]
    return "; ".join(lines)


def _describe_wrong_type(key: str, reason: str, schema: type) -> str | None:
    """What is allowed where a value is not of its key's type; `None` where the reason of an error is another."""
    found, declared = _WRONG_TYPE.search(reason), keys_of(schema).get(re.sub(r"\[\d+\]$", "", key))
    if found is None or declared is None:
        return None
    is_element = key.endswith("]")
    if declared.is_group or typing.get_origin(declared.type) is dict:
        return f"{key}: holds keys of its own; write {key}.KEY=VALUE"
    shapes = {typing.get_origin(each) for each in (declared.type, *typing.get_args(declared.type))}
    if not is_element and shapes & {list, tuple}:
        return f"{key}: is a list; write {key}=[...], in brackets"
    given = next((text for text in found.groups() if text is not None), None)
    for rule in () if is_element else declared.traits.get("rules", ()):
        try:
            rule(key, given)
        except UserError as error:
            return str(error)
        except TypeError:  # a rule for numbers alone
            pass
    return f"{key}={given or 'null'}: allowed is {_allowed(declared.type, is_element)}"


def check_elements(cfg: Any, schema: type) -> None:
    """Refuses lists and mappings in a list of numbers or texts: OmegaConf looks at its other elements alone.

    Raises:
        UserError: naming the element.
    """
    for key, declared in keys_of(schema).items():
        value = attrgetter(key)(cfg)
        for index, element in enumerate(value if isinstance(value, list | tuple) else ()):
            if isinstance(element, list | dict) and {*_kinds_of(declared.type)} <= WORDS.keys():
                raise UserError(f"{key}[{index}]={element}: allowed is {_allowed(declared.type, is_element=True)}")


def _allowed(declared: Any, is_element: bool) -> str:
    """A type in words, or that of a list's elements."""
    kinds = [kind for kind in _kinds_of(declared) if not (is_element and kind is type(None))]
    return ", or ".join(dict.fromkeys(WORDS[kind] for kind in kinds))


def _kinds_of(declared: Any) -> list[type]:
    """The types that are in one such as `list[float] | None`."""
    inner = typing.get_args(declared)
    return [kind for each in inner for kind in _kinds_of(each)] if inner else [declared]


def describe_flag(flag: str, value: str | None, schema: type) -> str:
    """What to write in place of `--name value`, where other tools have flags."""
    name, known = flag.lstrip("-").replace("-", "_"), keys_of(schema)
    keys = [key for key in (*known, *_groups_without_key(schema)) if f".{key}".endswith(f".{name}")]
    if not keys and name in OF_OURS and (ours := OF_OURS[name]) in known:
        keys, value = [ours], "..."  # which may count something else
    if not keys:
        begun = [each for each in overrides.FLAGS if each.startswith(flag) and flag.startswith("--")]
        hint = f"; did you mean {begun[0]!r}?" if begun else ""
        return f"{flag}: there is no such flag; settings are given as key=value{hint or _hint(name, schema)}"
    if value is None:
        value = "true" if all(key in known and known[key].type is bool for key in keys) else "..."
    exact = [key for key in keys if key == name] or keys
    return f"{flag}: settings are given as key=value: write {' or '.join(f'{key}={value}' for key in exact)}"


def _describe_unknown_key(cause: OmegaConfBaseException, error: Exception, schema: type) -> str:
    key = str(cause.full_key or cause.key)
    where = _where(error)
    if key in _groups_without_key(schema) and where:
        return f"{where.strip(' ()')}: needs '# @package _global_' as its first line"
    return f"{describe_key(key, schema)}{where}"


def describe_key(key: str, schema: type) -> str:
    """What an unknown key is to be."""
    if key not in _groups_without_key(schema):
        return f"unknown key {key!r}{_hint(key, schema)}"
    options = sorted(file.stem for file in (hydra_store.config_dir() / key).glob("*.yaml"))
    return f"{key}: has no keys of its own; allowed are {', '.join(f'{key}={option}' for option in options)}"


def _groups_without_key(schema: type) -> tuple[str, ...]:
    """Groups whose options are settings of other groups."""
    names = ("experiment", "debug") if "trainer" in keys_of(schema) else ()
    return names[:1] if issubclass(schema, config.SFTConfig) else names


def _hint(key: str, schema: type) -> str:
    """The known key most like `key`: one of (nearly) the same last part anywhere, else one like it in its group."""
    parent, _, name = key.rpartition(".")
    keys = [*keys_of(schema), *_groups_without_key(schema)]
    siblings = {known.rpartition(".")[2]: known for known in keys if known.rpartition(".")[0] == parent}
    anywhere = {known.rpartition(".")[2]: known for known in reversed(keys)} | siblings
    for names, cutoff in (anywhere, 1.0), (siblings, 0.7), (anywhere, 0.8), (siblings, 0.6):
        for match in get_close_matches(name, names, n=1, cutoff=cutoff):
            return f"; did you mean {names[match]!r}?"
    return f"; allowed are {', '.join(siblings)}" if siblings else ""


def _where(error: Exception) -> str:
    """The YAML file that Hydra says an error is in."""
    found = re.match(r"In '([^']+)'", str(error))
    return f" (in {found[1]}.yaml)" if found else ""
