"""Where conversations come from: messages of a system, users and an assistant, each fixed to training or validation.

A source is one function `source(config) -> Conversations`, registered under the name that `data.name` chooses. No
torch: what is wrong with a file is said before anything slow is imported.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lckv.data.cache import fingerprint
from lckv.data.chat_templates import Message
from lckv.data.readers import ROW_READERS, check_field, find_files, inspect_file, read_rows
from lckv.data.sources import HELD_OUT_BOOKS, SURROGATES, explain_hub_errors, find_bible
from lckv.errors import UserError, near_miss
from lckv.utils.registry import Registry

if TYPE_CHECKING:
    from lckv.config import ConversationsConfig

SYSTEM, USER, ASSISTANT = ROLES = ("system", "user", "assistant")

_MAY_FOLLOW = {SYSTEM: (None,), USER: (None, SYSTEM, ASSISTANT), ASSISTANT: (USER,)}
"""Behind which role a message of each role may stand; `None` stands for the beginning."""


class Conversation(NamedTuple):
    """Messages, the oldest first, and where they are from, for error messages."""

    where: str
    messages: list[Message]

    @property
    def digest(self) -> int:
        """A number that equal conversations share."""
        text = json.dumps(self.messages, sort_keys=True)
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


@dataclass(frozen=True)
class Conversations:
    """Conversations for training and validation, that can be read any number of times.

    Attributes:
        name: what messages call them.
        content: a hash of everything that they depend on.
        read_training: yields those for training; of both splits, if `read_validation` is None.
        read_validation: yields those for validation; None: they are picked among `read_training`.
        validation_fraction: the part that is picked, if they are.
    """

    name: str
    content: str
    read_training: Callable[[], Iterable[Conversation]]
    read_validation: Callable[[], Iterable[Conversation]] | None = None
    validation_fraction: float | None = None

    def splits(self) -> tuple[Callable[[], Iterable[Conversation]], Callable[[], Iterable[Conversation]]]:
        """What yields those for training, and what yields those for validation, which holds none of the others.

        Raises:
            UserError: if one of the two has none.
        """
        if self.read_validation is not None:
            held_out = {each.digest for each in self.read_validation()}
            validation = self.read_validation
        else:
            digests = {each.digest for each in self.read_training()}
            held_out = {each for each in digests if each < (self.validation_fraction or 0) * 2**64}
            held_out = held_out or set(sorted(digests)[:1])  # of a handful, one at least
            validation = partial(self._pick, held_out, True)
        training = partial(self._pick, held_out, False)
        for read, what in (training, "to train on"), (validation, "for validation"):
            if not any(True for _ in read()):
                reason = f"{self.name}: holds no conversation {what}"
                if held_out:
                    reason += ", and none that validation does not hold too; give more, or data.validation_files"
                raise UserError(reason)
        return training, validation

    def _pick(self, held_out: set[int], is_held_out: bool) -> Iterator[Conversation]:
        return (each for each in self.read_training() if (each.digest in held_out) == is_held_out)


CONVERSATIONS: Registry[Callable[[ConversationsConfig], Conversations]] = Registry("source of conversations")
"""Sources of conversations by name: `source(config) -> Conversations`."""


def build_conversations(config: ConversationsConfig) -> Conversations:
    """Opens the source that `config.name` chooses; it is read later.

    Raises:
        UserError: if it cannot be opened.
    """
    return CONVERSATIONS[config.name](config)


def check_conversations(config: ConversationsConfig) -> None:
    """Reads all files, and refuses what cannot be trained on.

    Raises:
        UserError: naming the key, or the file and the line.
    """
    if config.name == "files":
        for key, files in _find_files(config).items():
            if not sum(1 for _ in _read_files(files, config)):
                raise UserError(f"data.{key}={getattr(config, key)!r}: holds no conversation")


def check_messages(messages: Any, where: str) -> list[Message]:
    """The messages of a conversation, with nothing but roles and contents.

    Args:
        messages: what was read.
        where: what an error message begins with.

    Raises:
        UserError: if they are not messages, roles are unknown or out of order.
    """
    if not isinstance(messages, list) or not messages:
        raise UserError(
            f"{where}: must hold a list of messages, each with a role and a content, but is {messages!r:.40}"
        )
    previous, checked = None, []
    for number, message in enumerate(messages, start=1):
        role, content = (message.get(name) if isinstance(message, dict) else None for name in ("role", "content"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise UserError(f"{where}: message {number} must have text as role and content, but is {message!r:.60}")
        if role not in ROLES:
            raise UserError(
                f"{where}: message {number} has the role {role!r}: allowed are {', '.join(ROLES)}"
                f"{near_miss(role, ROLES)}"
            )
        if previous not in _MAY_FOLLOW[role]:
            place = "first" if previous is None else f"behind one of the {previous}"
            raise UserError(
                f"{where}: message {number}, of the {role}, stands {place}: user and assistant take turns, the user "
                "first, behind at most one of the system"
            )
        previous = role
        # JSON can hold half a surrogate pair, which no tokenizer can represent.
        checked.append({"role": role, "content": SURROGATES.sub("\ufffd", content)})
    return checked


def _check_row(row: dict[str, Any], where: str, field: str) -> Conversation:
    check_field(field, list(row), where, "data.messages_field")
    messages = check_messages(row[field], where)
    if not any(message["role"] == ASSISTANT and message["content"].strip() for message in messages):
        raise UserError(f"{where}: the assistant says nothing, so that there is nothing to learn")
    return Conversation(where, messages)


def _find_files(config: ConversationsConfig) -> dict[str, list[Path]]:
    """The files that were given, by key."""
    return {
        key: find_files(given, f"data.{key}", ROW_READERS)
        for key in ("files", "validation_files")
        if (given := getattr(config, key))
    }


def _read_files(files: Iterable[Path], config: ConversationsConfig) -> Iterator[Conversation]:
    rows = (item for path in files for item in read_rows(path, config.messages_field))
    for where, row in islice(rows, config.max_conversations):
        yield _check_row(row, where, config.messages_field)


@CONVERSATIONS.register("files")
def local_files(config: ConversationsConfig) -> Conversations:
    """Local jsonl and parquet files."""
    found = _find_files(config)
    digests = {key: [inspect_file(path, None).digest for path in files] for key, files in found.items()}
    others = found.get("validation_files")
    return Conversations(
        name=f"data.files={config.files!r}",
        content=fingerprint(digests, config.messages_field, config.max_conversations),
        read_training=lambda: _read_files(found["files"], config),
        read_validation=None if others is None else lambda: _read_files(others, config),
        validation_fraction=config.validation_fraction,
    )


@CONVERSATIONS.register("hub")
def hub(config: ConversationsConfig) -> Conversations:
    """A data set of the Hub, or a local folder of one."""
    with explain_hub_errors(config):
        import datasets

        builder = datasets.load_dataset_builder(config.dataset, config.subset, revision=config.revision)
    version = [builder.config_id, builder.hash, str(builder.config.version), config.split, config.validation_split]
    return Conversations(
        name=f"data.dataset={config.dataset!r}",
        content=fingerprint(config.dataset, version, config.messages_field, config.max_conversations),
        read_training=lambda: _read_hub(config, config.split),
        read_validation=(lambda: _read_hub(config, config.validation_split)) if config.validation_split else None,
        validation_fraction=config.validation_fraction,
    )


def _read_hub(config: ConversationsConfig, split: str | None) -> Iterator[Conversation]:
    import datasets

    with explain_hub_errors(config):
        rows: Any = datasets.load_dataset(config.dataset, config.subset, split=split, revision=config.revision)
        for number, row in enumerate(islice(rows, config.max_conversations)):
            where = f"data set {config.dataset!r}, split {split!r}, row {number}"
            yield _check_row(row, where, config.messages_field)


@CONVERSATIONS.register("bible")
def bible(config: ConversationsConfig) -> Conversations:
    """Questions about verses of the King James Bible; those about whole books are held out, as in its text."""
    raw = find_bible().read_bytes()
    verses = [json.loads(line) for line in raw.decode("utf-8").splitlines()]
    return Conversations(
        name="data.name='bible'",
        content=fingerprint(hashlib.blake2b(raw).hexdigest(), sorted(HELD_OUT_BOOKS), config.max_conversations),
        read_training=lambda: _ask_about(verses, config.max_conversations, is_held_out=False),
        read_validation=lambda: _ask_about(verses, config.max_conversations, is_held_out=True),
    )


def _ask_about(
    verses: list[dict[str, Any]], max_conversations: int | None, *, is_held_out: bool
) -> Iterator[Conversation]:
    """Asks what a verse says, and how the next one goes on behind its first half."""
    chosen = [verse for verse in verses if (verse["book"] in HELD_OUT_BOOKS) == is_held_out]
    if is_held_out:
        chosen = chosen[::10]  # two hundred, enough to tell and quick to measure
    for number, verse in enumerate(islice(chosen, max_conversations)):
        words = verse["text"].split()
        half = len(words) // 2
        question, answer = f"What does {verse['citation']} say?", verse["text"]
        if number % 2 and half:
            question = f"How does this verse go on: {' '.join(words[:half])}"
            answer = " ".join(words[half:])
        messages = [{"role": USER, "content": question}, {"role": ASSISTANT, "content": answer}]
        yield Conversation(verse["citation"], messages)
