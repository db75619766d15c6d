"""Refuses what a command line says in vain: settings that another one, or a pretrained model, makes useless."""

from __future__ import annotations

import re
from typing import Any

from lckv.config import ConvertConfig, SearchConfig, TrainConfig
from lckv.errors import UserError
from lckv.iso import check_iso
from lckv.model_arguments import KEPT_WITH_SOURCE

# What only training reads.
_TRAINING_GROUPS = ("trainer", "optim", "teacher", "logger", "evaluation")
_TRAINING_KEYS = (
    "seed",
    "run_dir",
    "run_name",
    "model.dtype",
    "model.attention_dropout",
    "model.attn_implementation",
)
_CALIBRATION_KEYS = ("init.calibration_tokens", "init.ridge")


def check_overrides(cfg: Any, given: list[str]) -> None:
    """Refuses what the command line says in vain.

    Args:
        cfg: the whole configuration.
        given: what the command line says of it, in a sweep of this job's.

    Raises:
        UserError: naming the first of them, and why.
    """
    if isinstance(cfg, TrainConfig):
        for check in (_check_one_sharing, _check_vocab_size, _check_source, _check_iso):
            check(cfg, given)
    if isinstance(cfg, ConvertConfig):
        _check_read_by_method(cfg, given)
    if isinstance(cfg, SearchConfig):
        _check_read_by_search(cfg, given)


def _check_one_sharing(cfg: TrainConfig, given: list[str]) -> None:
    """Refuses `sharing` on the command line where `model.layer_types` would win over it without a word."""
    sharing = [override for override in given if re.match(r"\+{0,2}sharing[.=@]", override)]
    layer_types = cfg.model.layer_types
    if sharing and layer_types is not None:
        raise UserError(
            f"{sharing[0]}: has no effect beside model.layer_types={layer_types}; "
            "leave one of them out (model.layer_types=null lets the sharing group decide)"
        )


def _check_vocab_size(cfg: TrainConfig, given: list[str]) -> None:
    """Refuses `tokenizer.vocab_size` on the command line for a tokenizer that has a size of its own."""
    if cfg.tokenizer.name != "bpe" and any(re.match(r"\+{0,2}tokenizer\.vocab_size=", each) for each in given):
        raise UserError(
            f"tokenizer.vocab_size={cfg.tokenizer.vocab_size}: has no effect with "
            f"tokenizer.name={cfg.tokenizer.name}; leave it out"
        )


def _check_source(cfg: TrainConfig, given: list[str]) -> None:
    """Refuses, on the command line, what a pretrained model decides, and how to use one where none is given."""
    source = cfg.source if isinstance(cfg, ConvertConfig) else cfg.init.source
    for override in given:
        key = override.lstrip("+").partition("=")[0]
        group, _, name = key.partition(".")
        if source is None and group == "init":
            raise UserError(f"{override}: has no effect without init.source; give one, or leave it out")
        if source is None:
            continue
        is_sources = group == "tokenizer" or (group == "model" and name not in KEPT_WITH_SOURCE)
        if is_sources or (key == "model.force_nodiag" and not cfg.model.force_nodiag):
            raise UserError(f"{override}: has no effect on the model {source}, which brings its own; leave it out")


def _check_iso(cfg: TrainConfig, given: list[str]) -> None:
    """Refuses `iso` where nothing could be kept equal, and how to do it where it is not asked for."""
    check_iso(cfg.iso, cfg.iso_multiple)
    source = cfg.source if isinstance(cfg, ConvertConfig) else cfg.init.source
    if cfg.iso is not None and source is not None:
        raise UserError(
            f"iso={cfg.iso}: has no effect on the model {source}, which brings its own sizes; leave it out"
        )
    for override in given:
        if override.lstrip("+").startswith("iso_multiple=") and cfg.iso != "params":
            raise UserError(f"{override}: has no effect without iso=params; leave it out")


def _check_read_by_method(cfg: ConvertConfig, given: list[str]) -> None:
    """Refuses, on the command line, what a conversion does not read."""
    for override in given:
        key = override.lstrip("+~").partition("=")[0]
        if key in _CALIBRATION_KEYS or key.partition(".")[0] == "data":
            _check_calibrates(cfg, override)
        is_of_training = key in _TRAINING_KEYS or key.partition(".")[0] in _TRAINING_GROUPS
        if key == "trainer.num_threads" or not is_of_training:
            continue
        from lckv.conversion import TRAINED  # takes torch along, which nothing else here needs

        if cfg.method not in TRAINED or key == "run_dir":
            trains = f"does not train ({', '.join(sorted(TRAINED))} does)"
            reason = "trains in a folder beside out" if cfg.method in TRAINED else trains
            raise UserError(f"{override}: has no effect with method={cfg.method}, which {reason}; leave it out")


def _check_read_by_search(cfg: SearchConfig, given: list[str]) -> None:
    """Refuses, on the command line, what a search with a method that looks at no text does not read."""
    for override in given:
        if override.lstrip("+~").partition("=")[0] in ("calibration_tokens", "ridge"):
            _check_calibrates(cfg, override)


def _check_calibrates(cfg: ConvertConfig | SearchConfig, override: str) -> None:
    from lckv.conversion import CALIBRATED, METHODS  # takes torch along, which nothing else here needs

    if cfg.method in METHODS and cfg.method not in CALIBRATED:
        looks = f"looks at no text ({', '.join(sorted(CALIBRATED))} do)"
        raise UserError(f"{override}: has no effect with method={cfg.method}, which {looks}; leave it out")
