"""The text that a model is evaluated on: all that is given, but of its own training text what that held out."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import islice
from typing import Any

from lckv.config import DataConfig, EvaluateConfig
from lckv.data.sources import build_source
from lckv.errors import UserError

logger = logging.getLogger(__name__)


def choose_text(given: DataConfig, *, is_named: bool, stored: dict[str, Any] | None) -> DataConfig:
    """Which documents count, as the validation split of a configuration.

    Args:
        given: the text that was asked for.
        is_named: whether it was, and is not merely the default.
        stored: the text of the model's training run, as its configuration has it; `None`: it is of none.
    """
    if stored is None:
        return given
    own = DataConfig(**{item.name: stored[item.name] for item in fields(DataConfig) if item.name in stored})
    if not is_named:
        default = EvaluateConfig().data
        changed = {name: value for name, value in vars(given).items() if value != getattr(default, name)}
        logger.info("the text is what the training run held out of its own")
        return replace(own, **changed)
    if given.validation_fraction == 1 and _is_trained_on(given, own):
        logger.info("the model was trained on this text: only what the training run held out of it is scored")
        limit = given.max_documents or own.max_documents
        return replace(given, validation_fraction=own.validation_fraction, max_documents=limit)
    return given


def _is_trained_on(given: DataConfig, own: DataConfig) -> bool:
    """Whether both are the same text; warns where it is so in part, and validation text would be training text."""
    if given.name != own.name:
        return False
    source = build_source(given)
    try:
        trained = build_source(own)
    except UserError:  # such as of files that are gone
        return False
    if source.content == trained.content:
        return True
    if trained.training_parts & (source.validation_parts or source.training_parts):
        logger.warning("%s: is in part what the model was trained on, so the figures flatter it", source.description)
    return False


def validation_documents(config: DataConfig, max_documents: int | None = None) -> Iterator[str]:
    """Yields the documents of the validation split, the first `max_documents` of them.

    Raises:
        UserError: if there is none.
    """
    source = build_source(config)
    is_empty = True
    for document in islice(source.validation_documents(), max_documents):
        is_empty = False
        yield document
    if is_empty:
        raise UserError(f"{source.description}: there is no document to evaluate")
