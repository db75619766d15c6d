"""Keeps text from being read as something else: `layer_types` strings as numbers, and prompts as Hydra's grammar.

To YAML and to Hydra `2_2_2` is the number 222, and YAML even reads `0_6_6_7` as octal. On the command line the text is
still there to be quoted before Hydra sees it. In a YAML file it is too late for that, so a number is refused, with the
line to write instead; the file itself still says what was meant.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from lckv.commands import hydra_store
from lckv.errors import UserError

# Keys (their last part) whose value is text, though digits and underscores may be all that it has.
_TEXT_KEYS = ("layer_types", "patterns", "checkpoints", "run_name", "run_dir", "output_dir")

_FLAGS_WITH_VALUE = (
    *("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"),
    *("--package", "-p", "--experimental-rerun", "--cfg", "-c"),
)
FLAGS = (
    *_FLAGS_WITH_VALUE,
    *("--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m"),
    *("--shell-completion", "-sc", "--info", "-i"),
)

_KEY = re.compile(rf"(?:\+\+|[+~])?(?:[\w$/-]+\.)*(?:{'|'.join(_TEXT_KEYS)})(?:@[\w.]*)?=\s*", re.ASCII)
_OPTIONAL_GROUP = re.compile(r"^\+(?=(?:experiment|debug)=)")
_NO_TEXT = re.compile(r"[+-]?\d[\w.+-]*|true|false|null|nan|inf", re.IGNORECASE)
# Text such as the folders of a sweep, `runs/sweep/sharing=cla,seed=0`: in what Hydra's grammar allows, a value has an
# equals sign only in quotes, behind a backslash, or among the arguments of a function.
_TEXT_WITH_EQUALS = re.compile(r"""(?P<key>[^=]+=)(?P<text>[^\s'"\\(\[{$][^'"\\(\[{$]*=[^'"\\(\[{$]*)""")
_CHOICE = re.compile(r"choice\s*\((.*)\)\s*", re.DOTALL)
_QUOTED = r"""(?P<kept>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|\$\{[^}]*\})"""
_NUMBER = r"(?P<number>[+-]?\d[\w.:+-]*)(?![^\s,\])}])"
_ELEMENT = re.compile(rf"{_QUOTED}|(?<![^\s,\[(=]){_NUMBER}", re.ASCII)
_DICT_ITEM = re.compile(rf"{_QUOTED}|(?P<key>\blayer_types\s*:\s*){_NUMBER}", re.ASCII)


def _with_flags(arguments: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Yields each argument, and whether it is one of Hydra's flags or the value of one."""
    takes_value = False
    for argument in arguments:
        is_flag = takes_value or argument.startswith("-")
        takes_value = is_flag and argument in _FLAGS_WITH_VALUE
        yield argument, is_flag


def flags_first(arguments: Iterable[str]) -> list[str]:
    """Puts Hydra's flags, with their values, before the `key=value` pairs: its parser takes no pairs on both sides."""
    return [argument for argument, _ in sorted(_with_flags(arguments), key=lambda pair: not pair[1])]


def find_foreign_flag(arguments: Sequence[str]) -> tuple[str, str | None] | None:
    """The first flag that Hydra does not have, and the value given with it, as other tools take their settings."""
    for number, argument in enumerate(arguments):
        name, is_set, value = argument.partition("=")
        is_value = number > 0 and arguments[number - 1] in _FLAGS_WITH_VALUE
        if not name.startswith("-") or is_value or name in FLAGS:
            continue
        if is_set:
            return name, value
        following = arguments[number + 1] if number + 1 < len(arguments) else "-"
        following = following.removeprefix(f"{name.lstrip('-')}=")
        return name, None if following.startswith("-") or "=" in following else following
    return None


def name_the_first(arguments: Iterable[str], key: str) -> list[str]:
    """Puts `key=` before the first word that is neither a flag, a flag's value nor a `key=value` pair.

    A path may have equals signs in it, as the folders of a sweep have; a key has no slash.
    """
    named = list(arguments)
    for place, (argument, is_flag) in enumerate(_with_flags(named)):
        is_pair = "=" in argument and "/" not in argument.partition("=")[0] and not Path(argument).exists()
        if not is_flag and not is_pair:
            named[place] = f"{key}={argument}"
            break
    return named


def quote_overrides(arguments: Iterable[str], open_keys: Sequence[str] = ()) -> list[str]:
    """Makes command line arguments mean what they say, before Hydra parses them.

    Puts quotes around the `layer_types` strings among command line arguments that Hydra would read as numbers, and
    around text with an equals sign in it, which Hydra would not read at all.

    Sweeps (`a,b`, `[a,b]`, `choice(a,b)`) are quoted element by element; what is quoted already, `null` and
    `${interpolations}` stay as they are, and so does every other key: `trainer.max_steps=1_000` is a number. The plus
    that Hydra's manual puts before an optional group (`+experiment=demo`) goes, since ours has the groups already; and
    the pluses that it wants before a new entry of one of the `open_keys`, whose entries are free, are added.
    """
    is_open = re.compile(rf"(?:{'|'.join(map(re.escape, open_keys)) or '(?!)'})[.=]").match
    overrides = [argument if argument.startswith("-") else _quote_override(argument) for argument in arguments]
    return [f"++{override}" if is_open(override) else override for override in overrides]


def take_literals(arguments: Iterable[str], literal_keys: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """Takes the arguments that set one of `literal_keys` out of the others.

    Hydra never sees them: its grammar would find lists, sweeps, numbers and quotes in any longer text, and a key such
    as `model` would be a group to it.

    Returns:
        The other arguments, and each key's text.
    """
    others: list[str] = []
    literals: dict[str, str] = {}
    keys = set(literal_keys)
    for argument in arguments:
        key, is_set, text = argument.partition("=")
        if is_set and key.lstrip("+") in keys:
            literals[key.lstrip("+")] = text
        else:
            others.append(argument)
    return others, literals


def escape(text: str) -> str:
    """Any text of a command line as a value that OmegaConf reads as that text, once `unescape` has been through."""
    if text == "???":  # its mark of a missing value
        return "\0???"  # a command line has no zero bytes
    if "${" not in text:  # else it takes no notice of backslashes
        return text
    return re.sub(r"(\\*)\$\{", lambda found: rf"{found[1]}{found[1]}\${{", text)


def unescape(text: str | None) -> str | None:
    """Takes back what OmegaConf leaves of `escape`."""
    return None if text is None else text.removeprefix("\0")


def _quote_override(override: str) -> str:
    override = _OPTIONAL_GROUP.sub("", override)
    name, _, text = override.partition("=")
    if name in hydra_store.groups() and _NO_TEXT.fullmatch(text):
        return f"{name}='{text}'"
    if pair := _TEXT_WITH_EQUALS.fullmatch(override):
        return f"{pair['key']}'{pair['text']}'"
    key = _KEY.match(override)
    if key is None:
        return _DICT_ITEM.sub(lambda found: found["kept"] or f"{found['key']}'{found['number']}'", override)
    value = override[key.end() :]
    if choice := _CHOICE.fullmatch(value):
        value = choice[1]  # means the same, but Hydra would take the quotes off the elements of `choice(...)`
    return key[0] + _ELEMENT.sub(lambda found: found["kept"] or f"'{found['number']}'", value)


def check_is_text(value: Any, key: str, files: Iterable[Path] = ()) -> None:
    """Refuses a `layer_types` value that YAML has turned into something else than text.

    Args:
        value: what the composed configuration holds.
        key: the full key, for the message.
        files: the YAML files that may have set it, the most likely first; they still have the original text.

    Raises:
        UserError: if `value` is neither a string nor None; the message names file and line and the line to write.
    """
    if value is None or isinstance(value, str):
        return
    name = key.rpartition(".")[2]
    for file in files:
        for text, line in _unquoted(file, name):
            if yaml.safe_load(text) == value:
                raise UserError(
                    f'{file}, line {line}: YAML reads {name}: {text} as {value!r}; write {name}: "{text}" with quotes'
                )
    raise UserError(
        f"{key}={value!r}: must be text, but the configuration holds a {type(value).__name__} (YAML reads unquoted "
        f'digits and underscores as a number); write it in quotes, such as {name}: "0_0_2_2"'
    )


def _unquoted(file: Path, name: str) -> Iterator[tuple[str, int]]:
    """Yields text and line number (from 1) of every value of the key `name` in a YAML file that has no quotes."""
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        for found in re.finditer(rf"\b{name}\s*:\s*([\w.:-]+)(?=,?\s|\}}|$)", line.partition("#")[0]):
            yield found[1], number


def config_files(folders: Sequence[Path], config_name: str, choices: dict[str, Any]) -> list[Path]:
    """The YAML files behind a composed configuration, the last to be merged first, then the others beside them.

    Args:
        folders: Hydra's search path.
        config_name: the root configuration.
        choices: the option chosen in each group, as in `hydra.runtime.choices`.
    """
    names = [f"{group.partition('@')[0]}/{option}" for group, option in choices.items() if isinstance(option, str)]
    chosen = [folder / f"{name}.yaml" for name in reversed([config_name, *names]) for folder in folders]
    others = [file for folder in folders for depth in ("*", "*/*") for file in sorted(folder.glob(f"{depth}.yaml"))]
    return list(dict.fromkeys(file for file in chosen + others if file.is_file()))
