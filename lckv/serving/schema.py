"""Checks JSON against a JSON Schema, as far as the schemas of this package go, and names mistakes in one line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lckv.errors import UserError, check_choice, near_miss

_TYPES: dict[str, tuple[str, tuple[type, ...]]] = {
    "object": ("an object", (Mapping,)),
    "array": ("a list", (list, tuple)),
    "string": ("text", (str,)),
    "boolean": ("true or false", (bool,)),
    "integer": ("a whole number", (int,)),
    "number": ("a number", (int, float)),
    "null": ("null", (type(None),)),
}
"""What the types are called, and what they are in Python."""


def check_schema(value: Any, schema: Mapping[str, Any], path: str = "") -> None:
    """Refuses what a schema does not allow; known are the keywords that the schemas here are made of.

    A mistake in a known key is found before a key that is unknown: a file of another version says which one it is of.

    Args:
        value: as `json.loads` gives it.
        schema: as it is in the file.
        path: the full name of the value.

    Raises:
        UserError: for the first mistake, naming the key.
    """
    _check_type(value, schema.get("type", list(_TYPES)), path)
    if "const" in schema or "enum" in schema:
        check_choice(path, value, schema.get("enum", [schema.get("const")]))
    if isinstance(value, int | float) and value < schema.get("minimum", value):
        raise UserError(f"{path}={value}: allowed is {schema['minimum']} or more")
    if isinstance(value, Mapping):
        _check_object(value, schema, path)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            check_schema(item, schema.get("items", {}), f"{path}[{index}]")


def _check_type(value: Any, allowed: str | list[str], path: str) -> None:
    names = [allowed] if isinstance(allowed, str) else allowed
    kinds = {kind for name in names for kind in _TYPES[name][1]}
    # In Python, though not in JSON, true is a whole number.
    fits = bool in kinds if isinstance(value, bool) else isinstance(value, tuple(kinds))
    if not fits:
        given = f"{path}={json.dumps(value)}" if path else f"is {json.dumps(value)}"
        raise UserError(f"{given}: allowed is {' or '.join(_TYPES[name][0] for name in names)}")


def _check_object(value: Mapping[str, Any], schema: Mapping[str, Any], path: str) -> None:
    known, others = schema.get("properties", {}), schema.get("additionalProperties", {})
    prefix = f"{path}." if path else ""
    for name in [*(name for name in known if name in value), *(name for name in value if name not in known)]:
        if name not in known and others is False:
            raise UserError(f"unknown key {prefix + name!r}{near_miss(name, known)}")
        check_schema(value[name], known.get(name, others), prefix + name)
    if missing := [name for name in schema.get("required", ()) if name not in value]:
        raise UserError(f"has no {prefix + missing[0]!r}")
