"""How a key is declared: its default beside what its values may be; and how a group of keys checks itself."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import field, fields, is_dataclass
from functools import cache
from typing import Any, NamedTuple, cast, get_type_hints

from lckv.errors import UserError, check_choice, check_positive, check_whole_number, near_miss
from lckv.sharing.iteration import CONVERGE

Rule = Callable[[str, Any], object]
"""Refuses a wrong value of the key of this full name, with a `UserError`."""

WORDS: dict[type, str] = {
    **{int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"},
    **{list: "a list, in brackets", dict: "keys of its own"},
}
"""What is allowed of a key of this type, in answers to mistakes."""

MODEL_REQUIRED = "give one: model=FOLDER (a run folder or a checkpoint), or a name on the Hub"


def key(default: Any, *rules: Rule, required: str | None = None, is_literal: bool = False, **traits: Any) -> Any:
    """A key, as the field of a dataclass that derives from [`Group`].

    Args:
        default: its value where nothing else is said.
        rules: what its values may be; None, where it is the default or the type allows it, needs no rule.
        required: how to give a value, where there must be one.
        is_literal: whether it is text that the command line takes as it stands, up to the end of the argument.
            Nothing in it means anything to Hydra: neither commas, quotes and braces nor `null` or `${...}`.
        traits: what else is to be known about it: `only_with`, the values of another key of its group beside which it
            has an effect, `{"name": ("muon",)}`.
    """
    metadata = {"rules": rules, "required": required, "is_literal": is_literal, **traits}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def literal(*rules: Rule, required: str | None = None, **traits: Any) -> Any:
    """A key for text that the command line takes as it stands; None by default."""
    return key(None, *rules, required=required, is_literal=True, **traits)


class Group:
    """Keys that belong together. A dataclass that derives from this says by [`key`] what is allowed, and checks it.

    Nothing is checked while a group is built, when it does not know yet what its keys are called on the command line.
    """

    def validate(self, prefix: str = "") -> None:
        """Checks every key, those of the groups inside too.

        Args:
            prefix: what stands before the names of its keys, such as `trainer.`.

        Raises:
            UserError: for the first mistake; the message names the key in full.
        """
        for item in fields(cast(Any, self)):
            name, value = prefix + item.name, getattr(self, item.name)
            if isinstance(value, Group):
                value.validate(f"{name}.")
            elif value in (None, "") and item.metadata.get("required"):
                raise UserError(f"{name}: {item.metadata['required']}")
            # OmegaConf refuses None where the type does; `Any` has it always.
            elif value is not None or (item.type == "Any" and item.default is not None):
                for rule in item.metadata.get("rules", ()):
                    rule(name, value)
        self.check(prefix)

    def options(self) -> dict[str, Any]:
        """What is given beside the name, in a group whose `name` says what other keys have an effect."""
        values = {item.name: getattr(self, item.name) for item in fields(cast(Any, self)) if item.name != "name"}
        return {name: value for name, value in values.items() if value is not None}

    def check(self, prefix: str) -> None:
        """Refuses values that do not go together.

        Raises:
            UserError: naming the keys, with `prefix` before their names.
        """


class Declaration(NamedTuple):
    """How a key is declared: its type, and what [`key`] was told."""

    type: Any
    traits: Mapping[str, Any]

    @property
    def is_group(self) -> bool:
        """Whether there are keys inside."""
        return is_dataclass(self.type)


@cache
def keys_of(schema: type) -> dict[str, Declaration]:
    """Every key of a root dataclass by its full name, `model` and `model.hidden_size` alike."""
    return dict(_walk(schema, ""))


def _walk(schema: Any, prefix: str) -> Iterator[tuple[str, Declaration]]:
    types = get_type_hints(schema)
    for item in fields(schema):
        found = Declaration(types[item.name], item.metadata)
        yield prefix + item.name, found
        if found.is_group:
            yield from _walk(found.type, f"{prefix}{item.name}.")


def at_least(minimum: int = 1, *, or_null: bool = False) -> Rule:
    """A whole number; `or_null` says that None is another choice, where the default does not say so."""

    def rule(name: str, value: Any) -> None:
        try:
            check_whole_number(name, value, minimum)
        except UserError as error:
            raise UserError(f"{error}, or null") if or_null else error from None

    return rule


def one_of(allowed: Iterable[object]) -> Rule:
    """One of these, those that were declared since included."""
    return lambda name, value: check_choice(name, value, allowed)


def such_that(holds: Callable[[Any], bool], allowed: str) -> Rule:
    """A value of which this holds; `allowed` says so in words."""

    def rule(name: str, value: Any) -> None:
        if not holds(value):
            raise UserError(f"{name}={value!r}: {allowed}")

    return rule


is_named = such_that(bool, "is empty; name a folder, or leave it out")
"""A path, which an empty text would make that of the current folder."""


def each(rule: Rule) -> Rule:
    """A list whose elements are allowed by `rule`."""

    def rule_of_all(name: str, values: Any) -> None:
        for index, value in enumerate(values):
            rule(f"{name}[{index}]", value)

    return rule_of_all


def once(name: str, values: Any) -> None:
    """A list in which nothing is there twice."""
    for value in values:
        if values.count(value) > 1:
            raise UserError(f"{name}: {value!r} is there twice; leave one of them out")


def passes(name: str, value: Any) -> None:
    """A number of passes over a cycle, or `converge`."""
    if value == CONVERGE or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return
    hint = near_miss(value, [CONVERGE]) if isinstance(value, str) else ""
    raise UserError(f"{name}={value!r}: allowed is a whole number, 0 or more, or {CONVERGE!r}{hint}")


above_zero: Rule = check_positive
not_negative = such_that(lambda value: 0 <= value < math.inf, "allowed is a number, 0 or more")
fraction = such_that(lambda value: 0 <= value < 1, "allowed is 0 up to, but without, 1")
