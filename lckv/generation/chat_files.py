"""Conversations on disk: JSON Lines, in each line an object with a list `messages`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lckv.data.chat_templates import Message
from lckv.data.conversations import USER, check_messages
from lckv.errors import UserError, near_miss
from lckv.utils.storage import check_folder, write_text


def save_conversation(path: Path, messages: list[Message], *, replaces: bool = False) -> None:
    """Writes a file with one conversation, whole or not at all.

    Args:
        path: where.
        messages: the oldest first.
        replaces: whether a file may be there already.

    Raises:
        UserError: if one is there that must stay, or none can be.
    """
    if path.exists() and not replaces:
        raise UserError(f"{path}: is there already; name a file that is not there yet")
    check_folder(path.parent, str(path), instead="name another file")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}")
    write_text(path, json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def load_conversation(path: Path, number: int | None = None) -> list[Message]:
    """Reads one conversation of a file.

    Args:
        path: the file.
        number: of its line; `None` where there is one conversation.

    Raises:
        UserError: if there is no such conversation; it says which line is broken.
    """
    try:
        lines = path.read_bytes().decode("utf-8").removesuffix("\n").split("\n")
    except OSError as error:
        names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = near_miss(path.name, names) if isinstance(error, FileNotFoundError) else ""
        raise UserError(f"{path}: {error.strerror}{hint}") from None
    except UnicodeDecodeError as error:
        num_lines = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {num_lines}: is not UTF-8 text") from None
    filled = {place: line for place, line in enumerate(lines, 1) if line.strip()}
    if not filled:
        raise UserError(f"{path}: holds no conversation")
    if number is None and len(filled) > 1:
        raise UserError(
            f"{path}: holds {len(filled):,} conversations; say which: the number of its line behind the name"
        )
    place = next(iter(filled)) if number is None else number
    if place not in filled:
        raise UserError(f"{path}: has no conversation in line {place}; there are {len(lines):,} lines")
    where = f"{path}, line {place}"
    try:
        value: Any = json.loads(filled[place])
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is no JSON: {error}") from None
    messages = check_messages(value.get("messages") if isinstance(value, dict) else None, where)
    if messages[-1]["role"] == USER:
        raise UserError(f"{where}: message {len(messages)} is the user's, and has no answer")
    return messages
