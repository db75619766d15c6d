"""What `model.rope_parameters` may hold: of wrong keys transformers warns and goes on, or fails when data is there."""

from __future__ import annotations

import math
from typing import Any

from lckv.config.keys import Rule, one_of, such_that
from lckv.errors import UserError, near_miss

_TYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": (("factor",), ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ()),
    "longrope": (("short_factor", "long_factor"), ("factor", "attention_factor")),
    "proportional": ((), ("factor",)),
}
"""What each `rope_type` needs, and what else it takes beside what all do."""

_OF_ALL = ("rope_type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
_KINDS = ("full_attention", "sliding_attention")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


_number = such_that(_is_number, "allowed is a number above 0")
_numbers = such_that(
    lambda value: isinstance(value, list) and all(map(_is_number, value)),
    "allowed are numbers above 0 in brackets, one for each plane",
)
_VALUES: dict[str, Rule] = {
    "rope_type": one_of(_TYPES),
    "partial_rotary_factor": such_that(
        lambda value: value == 0 or (_is_number(value) and value <= 1), "allowed is a number from 0 to 1"
    ),
    "truncate": one_of((True, False)),
    "short_factor": _numbers,
    "long_factor": _numbers,
}
"""What is no number above 0."""


def rotations(name: str, given: dict[str, Any]) -> None:
    """What rotates queries and keys: one for all layers, or one for each kind of them."""
    if not any(isinstance(value, dict) for value in given.values()):
        _check(name, given)
        return
    for kind, values in given.items():
        if kind not in _KINDS or not isinstance(values, dict):
            raise UserError(f"{name}.{kind}={values!r}: allowed are keys of {' and of '.join(_KINDS)}, or of neither")
        _check(f"{name}.{kind}", values)


def _check(name: str, given: dict[str, Any]) -> None:
    rope_type = given.get("rope_type", "default")
    _VALUES["rope_type"](f"{name}.rope_type", rope_type)
    needed, others = _TYPES[rope_type]
    allowed = (*_OF_ALL, *needed, *others)
    for key, value in given.items():
        if key not in allowed:
            raise UserError(
                f"{name}.{key}: has no effect with rope_type={rope_type}; allowed are {', '.join(allowed)}"
                f"{near_miss(key, allowed)}"
            )
        _VALUES.get(key, _number)(f"{name}.{key}", value)
    if lacking := [key for key in needed if key not in given]:
        raise UserError(f"{name}.{lacking[0]}: is not set; rope_type={rope_type} needs it")
