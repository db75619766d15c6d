"""Sharing patterns in files, as an engine is told of one beside a model that has none. No torch."""

from __future__ import annotations

import json
from pathlib import Path

from lckv.errors import UserError, first_line
from lckv.patterns import join_layer_types, parse_layer_types

HINT = "sharing_hint"
"""The key under which an engine is given such a file."""

PATTERN_KEYS = ("layer_types", "kv_sharing", HINT)
"""The keys under which it may be given a pattern. Some families have a list of their own under the first."""


def read_hint(file: str, num_hidden_layers: int | None = None) -> str:
    """The `layer_types` string of a sharing hint, a JSON object with `layer_types`, `kv_source`, or both.

    Args:
        file: where it is.
        num_hidden_layers: how many layers the model has, where it is known.

    Raises:
        UserError: if there is no such file, it holds something else, or it is for another number of layers.
    """
    try:
        hint = json.loads(Path(file).read_text(encoding="utf-8"))
        layer_types, sources = (hint.get(key) for key in ("layer_types", "kv_source"))
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{HINT}={file}: is no hint that can be read: {first_line(error)}") from error
    if layer_types is None and isinstance(sources, list):
        layer_types = join_layer_types(sources)
    if layer_types is None:
        raise UserError(
            f"{HINT}={file}: has neither layer_types, a string such as '0_0_2_2', nor kv_source, a list of layers"
        )
    plan = parse_layer_types(layer_types)
    if sources is not None and list(plan.kv_source) != sources:
        raise UserError(f"{HINT}={file}: layer_types={layer_types!r} and kv_source={sources} differ; give one of them")
    if num_hidden_layers not in (None, plan.num_hidden_layers):
        raise UserError(
            f"{HINT}={file}: is for {plan.num_hidden_layers} layers, but the model has {num_hidden_layers}; "
            "make one for this model"
        )
    return layer_types
