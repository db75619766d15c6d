"""Where conversations come from: messages of a system, users and an assistant, each fixed to training or validation.

A source is one function `source(config, is_paired) -> Conversations`, registered under the name that `data.name`
chooses. No torch: what is wrong with a file is said before anything slow is imported.

Where they are paired, a conversation has two last answers, the better and the worse one, as TRL reads them: the fields
`chosen` and `rejected`, each a text or messages, behind `prompt`, a text or messages, or with it inside of both.
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

PROMPT, CHOSEN, REJECTED = "prompt", "chosen", "rejected"

_MAY_FOLLOW = {SYSTEM: (None,), USER: (None, SYSTEM, ASSISTANT), ASSISTANT: (USER,)}
"""Behind which role a message of each role may stand; `None` stands for the beginning."""


class Conversation(NamedTuple):
    """Messages, the oldest first, where they are from, for error messages, and perhaps a worse last message."""

    where: str
    messages: list[Message]
    worse: Message | None = None

    @property
    def digest(self) -> int:
        """A number that equal conversations share; so do pairs of answers to the same."""
        text = json.dumps(self.messages if self.worse is None else self.messages[:-1], sort_keys=True)
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


CONVERSATIONS: Registry[Callable[[ConversationsConfig, bool], Conversations]] = Registry("source of conversations")
"""Sources of conversations by name: `source(config, is_paired) -> Conversations`."""


def build_conversations(config: ConversationsConfig, is_paired: bool = False) -> Conversations:
    """Opens the source that `config.name` chooses, of pairs of answers or not; it is read later.

    Raises:
        UserError: if it cannot be opened.
    """
    return CONVERSATIONS[config.name](config, is_paired)


def check_conversations(config: ConversationsConfig, is_paired: bool = False) -> None:
    """Reads all files, and refuses what cannot be trained on.

    Raises:
        UserError: naming the key, or the file and the line.
    """
    if config.name == "files":
        for key, files in _find_files(config).items():
            if not sum(1 for _ in _read_files(files, config, is_paired)):
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


def _check_row(row: dict[str, Any], where: str, field: str | None) -> Conversation:
    if field is None:
        return _check_pair(row, where)
    if field not in row and CHOSEN in row:
        raise UserError(f"{where}: is a pair of answers, {', '.join(row)}; give loss=dpo, which learns from pairs")
    check_field(field, list(row), where, "data.messages_field")
    messages = check_messages(row[field], where)
    if not any(message["role"] == ASSISTANT and message["content"].strip() for message in messages):
        raise UserError(f"{where}: the assistant says nothing, so that there is nothing to learn")
    return Conversation(where, messages)


def _check_pair(row: dict[str, Any], where: str) -> Conversation:
    if missing := {CHOSEN, REJECTED} - row.keys():
        raise UserError(
            f"{where}: has no {' and no '.join(sorted(missing))}; a pair has {CHOSEN} and {REJECTED}, and {PROMPT} "
            f"where it is not in both; here are {', '.join(row) or 'none'}"
        )
    (*asked, better), (*also_asked, worse) = (_side(row, name, where) for name in (CHOSEN, REJECTED))
    if asked != also_asked:
        raise UserError(f"{where}: {CHOSEN} and {REJECTED} part before the last message, which alone may differ")
    if better == worse:
        raise UserError(f"{where}: {CHOSEN} and {REJECTED} are the same, so that there is nothing to learn")
    return Conversation(where, [*asked, better], worse)


def _side(row: dict[str, Any], name: str, where: str) -> list[Message]:
    """The conversation with one of the two answers, which is its last message."""
    prompt, answer = row.get(PROMPT), row[name]
    if isinstance(answer, str):
        answer = [{"role": ASSISTANT, "content": answer}]
    if prompt is None and (isinstance(row[name], str) or _first_role(answer) == ASSISTANT):
        raise UserError(f"{where}: has no {PROMPT}, nor does {name} begin with one; here are {', '.join(row)}")
    if prompt is not None and isinstance(answer, list):
        asked = [{"role": USER, "content": prompt}] if isinstance(prompt, str) else prompt
        asked = asked if isinstance(asked, list) else [asked]
        answer = answer if answer[: len(asked)] == asked else asked + answer  # some have it in both places
    messages = check_messages(answer, f"{where}: {name}")
    if messages[-1]["role"] != ASSISTANT or not messages[-1]["content"].strip():
        raise UserError(f"{where}: {name} does not end with something that the assistant says")
    return messages


def _first_role(messages: Any) -> Any:
    first = messages[0] if isinstance(messages, list) and messages else None
    return first.get("role") if isinstance(first, dict) else None


def _field(config: ConversationsConfig, is_paired: bool) -> str | None:
    """What holds the messages of a row; `None`: the fields of pairs do."""
    return None if is_paired else config.messages_field


def _find_files(config: ConversationsConfig) -> dict[str, list[Path]]:
    """The files that were given, by key."""
    return {
        key: find_files(given, f"data.{key}", ROW_READERS)
        for key in ("files", "validation_files")
        if (given := getattr(config, key))
    }


def _read_files(files: Iterable[Path], config: ConversationsConfig, is_paired: bool) -> Iterator[Conversation]:
    field = _field(config, is_paired)
    rows = (item for path in files for item in read_rows(path, field))
    for where, row in islice(rows, config.max_conversations):
        yield _check_row(row, where, field)


@CONVERSATIONS.register("files")
def local_files(config: ConversationsConfig, is_paired: bool) -> Conversations:
    """Local jsonl and parquet files."""
    found = _find_files(config)
    digests = {key: [inspect_file(path, None).digest for path in files] for key, files in found.items()}
    others = found.get("validation_files")
    return Conversations(
        name=f"data.files={config.files!r}",
        content=fingerprint(digests, config.messages_field, config.max_conversations),
        read_training=lambda: _read_files(found["files"], config, is_paired),
        read_validation=None if others is None else lambda: _read_files(others, config, is_paired),
        validation_fraction=config.validation_fraction,
    )


@CONVERSATIONS.register("hub")
def hub(config: ConversationsConfig, is_paired: bool) -> Conversations:
    """A data set of the Hub, or a local folder of one."""
    with explain_hub_errors(config):
        import datasets

        builder = datasets.load_dataset_builder(config.dataset, config.subset, revision=config.revision)
    version = [builder.config_id, builder.hash, str(builder.config.version), config.split, config.validation_split]
    return Conversations(
        name=f"data.dataset={config.dataset!r}",
        content=fingerprint(config.dataset, version, config.messages_field, config.max_conversations),
        read_training=lambda: _read_hub(config, config.split, is_paired),
        read_validation=(
            (lambda: _read_hub(config, config.validation_split, is_paired)) if config.validation_split else None
        ),
        validation_fraction=config.validation_fraction,
    )


def _read_hub(config: ConversationsConfig, split: str | None, is_paired: bool) -> Iterator[Conversation]:
    import datasets

    with explain_hub_errors(config):
        rows: Any = datasets.load_dataset(config.dataset, config.subset, split=split, revision=config.revision)
        for number, row in enumerate(islice(rows, config.max_conversations)):
            where = f"data set {config.dataset!r}, split {split!r}, row {number}"
            yield _check_row(row, where, _field(config, is_paired))


@CONVERSATIONS.register("bible")
def bible(config: ConversationsConfig, is_paired: bool) -> Conversations:
    """Questions about verses of the King James Bible; those about whole books are held out, as in its text.

    The worse answer to a question is that to the one before.
    """
    raw = find_bible().read_bytes()
    verses = [json.loads(line) for line in raw.decode("utf-8").splitlines()]
    return Conversations(
        name="data.name='bible'",
        content=fingerprint(hashlib.blake2b(raw).hexdigest(), sorted(HELD_OUT_BOOKS), config.max_conversations),
        read_training=lambda: _ask_about(verses, config.max_conversations, is_paired, is_held_out=False),
        read_validation=lambda: _ask_about(verses, config.max_conversations, is_paired, is_held_out=True),
    )


def _ask_about(
    verses: list[dict[str, Any]], max_conversations: int | None, is_paired: bool, *, is_held_out: bool
) -> Iterator[Conversation]:
    """Asks what a verse says, and how the next one goes on behind its first half."""
    chosen = [verse for verse in verses if (verse["book"] in HELD_OUT_BOOKS) == is_held_out]
    if is_held_out:
        chosen = chosen[::10]  # two hundred, enough to tell and quick to measure
    before = {"role": ASSISTANT, "content": chosen[-1]["text"]}
    for number, verse in enumerate(islice(chosen, max_conversations)):
        words = verse["text"].split()
        half = len(words) // 2
        question, answer = f"What does {verse['citation']} say?", verse["text"]
        if number % 2 and half:
            question = f"How does this verse go on: {' '.join(words[:half])}"
            answer = " ".join(words[half:])
        messages = [{"role": USER, "content": question}, {"role": ASSISTANT, "content": answer}]
        yield Conversation(verse["citation"], messages, before if is_paired else None)
        before = messages[-1]
