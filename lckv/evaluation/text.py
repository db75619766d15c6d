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
    asked = {name: value for name, value in vars(given).items() if value != getattr(EvaluateConfig().data, name)}
    text = given if is_named else replace(own, **asked)
    if own.name == "hub" and own.dataset != text.dataset:  # not to be downloaded only to be compared
        return text
    try:
        trained = build_source(own)
    except UserError:  # such as of files that are gone
        return text
    source = build_source(text)
    if source.content == trained.content:
        text = _parted_alike(text, asked, own, is_picked=trained.read_validation is None)
        logger.info("only what the training run held out of its own text is scored")
        if own.max_documents is None or (text.max_documents or 0) <= own.max_documents:
            return text
        source = build_source(text)
    if source.is_in_training_text_of(trained):
        logger.warning("%s: is in part what the model was trained on, so the figures flatter it", source.description)
    return text


def _parted_alike(text: DataConfig, asked: dict[str, Any], own: DataConfig, *, is_picked: bool) -> DataConfig:
    """The text of the training, parted as it was there.

    Args:
        text: the text.
        asked: what was asked for in so many words.
        own: the text as training had it.
        is_picked: whether validation documents were picked, and not named.

    Raises:
        UserError: for a setting that would pick others, which may have been trained on.
    """
    parted: dict[str, Any] = {"max_documents": text.max_documents or own.max_documents}
    if is_picked:
        parted = {name: getattr(own, name) for name in ("validation_fraction", "max_documents")}
        for name in parted.keys() & asked.keys():
            if asked[name] != parted[name]:
                raise UserError(
                    f"data.{name}={asked[name]}: this is the text of the model's training, and only what that held "
                    "out of it is scored; leave it out (perplexity.max_documents=... scores less of it)"
                )
    return replace(text, **parted)


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
        raise source.missing(is_validation=True)
