"""Conversations on disk: JSON Lines, in each line an object with a list `messages`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lckv.chat_templates import Message
from lckv.errors import UserError, check_choice, near_miss
from lckv.storage import check_folder, write_text

ROLES = ("system", "user", "assistant")


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
    try:
        return _read(filled[place])
    except UserError as error:
        raise UserError(f"{path}, line {place}: {error}") from None


def _read(line: str) -> list[Message]:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"is no JSON: {error}") from None
    messages = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(messages, list) or not messages:
        raise UserError("is no object with a list 'messages'")
    read = []
    for number, message in enumerate(messages, 1):
        try:
            read.append(_read_message(message, is_first=number == 1))
        except UserError as error:
            raise UserError(f"message {number}: {error}") from None
    if read[-1]["role"] == "user":
        raise UserError(f"message {len(read)}: is the user's, and has no answer")
    return read


def _read_message(message: Any, *, is_first: bool) -> Message:
    if not isinstance(message, dict):
        raise UserError("is no object")
    role, content = message.get("role"), message.get("content")
    check_choice("role", role, ROLES)
    if role == "system" and not is_first:
        raise UserError("is of the system, which only the first may be")
    if not isinstance(content, str):
        raise UserError("its content is no text")
    return {"role": str(role), "content": content}
