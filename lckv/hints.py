"""`python -m lckv.hints`: which layers may share KV while a model serves one agent; see `conf/hints.yaml`."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

from lckv.commands import cli
from lckv.config import GroupConfig, HintsConfig, validate
from lckv.serving.hints import ModelKV, SharingHint, emit_hint, find_model
from lckv.sharing.patterns import parse_layer_types
from lckv.utils.console import new_console
from lckv.utils.storage import check_new_file, write_json


def main(cfg: HintsConfig) -> None:
    """Prints the hint that `cfg` asks for, and writes it into a file if asked."""
    validate(cfg)
    out = None if cfg.out is None else Path(cfg.out).expanduser()
    if out is not None:
        check_new_file(out, ".json")
    values = build_hint(cfg).as_dict()
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, values)
    new_console().print_json(json.dumps(values))


def build_hint(cfg: HintsConfig) -> SharingHint:
    """Makes the hint.

    Raises:
        UserError: if there is no such model, or it cannot share so.
    """
    assert cfg.role is not None  # checked
    if cfg.model is not None:
        model = find_model(cfg.model, revision=cfg.revision)
    else:
        model = ModelKV.of_layers(cfg.num_layers or parse_layer_types(cfg.layer_types).num_hidden_layers)
    return emit_hint(
        cfg.role,
        model,
        GroupConfig(**{item.name: getattr(cfg, item.name) for item in fields(GroupConfig)}),
        thinking=cfg.thinking,
        sliding_window=cfg.sliding_window,
        context_length=cfg.context_length,
        kv_dtype=cfg.kv_dtype,
        experimental=cfg.experimental,
    )


if __name__ == "__main__":
    cli.run(main, "hints")
