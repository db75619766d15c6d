"""Conversations as rows of tokens: rendered by the chat template, labelled, and packed or one to a row.

A row is `input_ids` and `labels`, and `seq_lengths`, the tokens of each conversation in it, as TRL's `pack_dataset`
makes it. Position ids restart at each conversation, which is how a model tells them apart; the first token of each has
the label -100, as nothing stands before it.

A row of a pair of answers is `prompt_ids`, `chosen_ids` and `rejected_ids`, as TRL's `DPOTrainer` takes it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lckv.config.sft import ALL, DPO, DROP, REFUSE
from lckv.data.cache import find_cache_dir, fingerprint, load_or_build
from lckv.data.chat_templates import Message, end_of_answer, explain_template_errors
from lckv.data.conversations import Conversation, build_conversations
from lckv.data.dataset import TRAIN, VALIDATION, RunData
from lckv.data.packing import IGNORE_INDEX
from lckv.data.tokenizer import vocab_size_of
from lckv.errors import UserError
from lckv.utils.console import track

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

    from lckv.config import SFTConfig

logger = logging.getLogger(__name__)

_COLUMNS = ("input_ids", "labels", "seq_lengths")
_PAIR_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
_ROWS_AT_ONCE = 1000
_VERSION = 1  # part of the cache's key: raise it when what is stored, or how conversations become rows, changes


@dataclass(frozen=True)
class ChatEncoder:
    """Turns conversations into tokens and labels.

    Attributes:
        tokenizer: with a chat template.
        template: the one that is rendered, where it is not the tokenizer's: the same text, with marks around what
            the assistant says.
        is_assistant_only: whether nothing else is learnt.
        multiple_of: every conversation is filled up to such a number of tokens, which are neither learnt nor seen by
            any that is: so that its tokens take the same turns in a cycle wherever in a row they stand.
        max_length: most tokens of a conversation.
        end: what follows the last answer where no token of the template ends it; `None`: nothing.
    """

    tokenizer: PreTrainedTokenizerFast
    template: str | None
    is_assistant_only: bool
    multiple_of: int
    max_length: int
    end: int | None

    def encode(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Tokens and labels of a conversation of any length, `(num_tokens,)` each."""
        encoded: Any = self.tokenizer.apply_chat_template(
            list(messages),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=self.is_assistant_only,
            chat_template=self.template,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        ids = list(encoded["input_ids"])
        is_learnt = list(encoded["assistant_masks"]) if self.is_assistant_only else [1] * len(ids)
        # Of the bytes of a character that are tokens each, transformers marks the first alone at an answer's end.
        places = encoded["offset_mapping"]
        for at in range(1, len(ids)):
            if is_learnt[at - 1] and places[at] == places[at - 1]:
                is_learnt[at] = 1
        if self.end is not None and messages[-1]["role"] == "assistant":
            num_kept = 1 + max((place for place, learnt in enumerate(is_learnt) if learnt), default=len(ids) - 1)
            ids, is_learnt = [*ids[:num_kept], self.end], [*is_learnt[:num_kept], 1]
        labels = [token if learnt else IGNORE_INDEX for token, learnt in zip(ids, is_learnt, strict=True)]
        return ids, [IGNORE_INDEX, *labels[1:]]

    def encode_pair(self, conversation: Conversation) -> list[tuple[list[int], list[int]]]:
        """The same with each of two answers, which alone is learnt, up to where it ends."""
        assert conversation.worse is not None
        sides = []
        for answer in conversation.messages[-1], conversation.worse:
            ids, labels = self.encode([*conversation.messages[:-1], answer])
            end = max((at + 1 for at, label in enumerate(labels) if label != IGNORE_INDEX), default=0)
            sides.append((ids[:end], labels[:end]))
        start = len(os.path.commonprefix([ids for ids, _ in sides]))
        labels = sides[0][1]  # as far as both are the same, these are too
        while start and labels[start - 1] != IGNORE_INDEX:  # back to where the answers begin, which may be alike
            start -= 1
        return [(ids, [IGNORE_INDEX] * start + ids[start:]) for ids, _ in sides]

    def fill_up(self, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        """What is no longer than `max_length`, filled up as `multiple_of` asks for."""
        num_more = min(-len(ids) % self.multiple_of, self.max_length - len(ids))
        return ids + [pad_token_of(self.tokenizer)] * num_more, labels + [IGNORE_INDEX] * num_more


def pad_token_of(tokenizer: PreTrainedTokenizerFast) -> int:
    """What stands where there is no text; nothing that is learnt sees it."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def build_encoder(
    tokenizer: PreTrainedTokenizerFast, cfg: SFTConfig, max_length: int, multiple_of: int
) -> ChatEncoder:
    """The encoder that a configuration asks for, tried on a conversation.

    Raises:
        UserError: if the template does not say which part of a text is the assistant's.
    """
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    is_assistant_only = cfg.loss != ALL
    given = f"chat_template={cfg.chat_template or 'null'}"
    template = None
    if is_assistant_only and not has_generation_markers(tokenizer.chat_template):
        try:
            template = get_training_chat_template(tokenizer)
        except ValueError:
            raise UserError(
                f"{given}: does not mark what the assistant says with {{% generation %}}, nor does TRL know it; give "
                "one that does (chat_template=chatml, or a file), or loss=all"
            ) from None
    end = end_of_answer(tokenizer)
    behind = tokenizer.eos_token_id if end.token is None else None
    encoder = ChatEncoder(tokenizer, template, is_assistant_only, multiple_of, max_length, behind)
    probe = [{"role": role, "content": "A"} for role in ("user", "assistant", "user")]
    ids, labels = encoder.encode(probe)
    learnt = str(tokenizer.decode([token for token, label in zip(ids, labels, strict=True) if label != IGNORE_INDEX]))
    if not learnt.strip():
        raise UserError(f"{given}: marks nothing that the assistant says; see {{% generation %}}, or give loss=all")
    if end.text not in learnt or (end.token is not None and end.token not in labels):
        logger.warning("%s: how an answer ends is not among what is learnt, so that the model may not stop", given)
    return encoder


@dataclass(frozen=True)
class SplitCounts:
    """What is in the rows of a split.

    Attributes:
        num_conversations: conversations.
        num_tokens: tokens, without those that fill up; of a pair, with both answers, and what was asked twice.
        num_predicted_tokens: labels that are not ignored; of a pair, those of the better answer.
        num_too_long: conversations that were longer than a row.
        num_left_out: those of which no label was left, or that were left out because they were too long.
    """

    num_conversations: int = 0
    num_tokens: int = 0
    num_predicted_tokens: int = 0
    num_too_long: int = 0
    num_left_out: int = 0


class ConversationData(RunData):
    """Rows of conversations, in a folder.

    Attributes:
        counts: of the training rows and of the validation rows.
    """

    def __init__(self, folder: Path, key: str, max_length: int) -> None:
        import datasets

        self.fingerprint, self.block_size = key, max_length
        self.train: Dataset = datasets.load_from_disk(str(folder / TRAIN))
        self.validation: Dataset = datasets.load_from_disk(str(folder / VALIDATION))
        stored = json.loads((folder / "counts.json").read_text(encoding="utf-8"))
        self.counts = {split: SplitCounts(**counts) for split, counts in stored.items()}
        self.label_counts = np.load(folder / f"{TRAIN}.npy"), np.load(folder / f"{VALIDATION}.npy")
        self.num_tokens = self.counts[TRAIN].num_tokens
        self.num_predicted_tokens = self.counts[VALIDATION].num_predicted_tokens
        self.validation_num_bytes = 0


@dataclass(frozen=True)
class ConversationCollator:
    """Makes a batch of rows: `input_ids`, `position_ids` and `labels`, each `(batch, longest row)`.

    Where a row ends, each token that fills it up is a conversation of its own: seen by nothing, and not learnt.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Fills shorter rows up."""
        length = max(len(row["input_ids"]) for row in rows)
        positions = [[place for count in row["seq_lengths"] for place in range(count)] for row in rows]
        columns = {
            "input_ids": ([row["input_ids"] for row in rows], self.pad_token_id),
            "position_ids": (positions, 0),
            "labels": ([row["labels"] for row in rows], IGNORE_INDEX),
        }
        return {
            name: torch.tensor([values + [filler] * (length - len(values)) for values in column])
            for name, (column, filler) in columns.items()
        }


def build_conversation_data(
    cfg: SFTConfig, tokenizer: PreTrainedTokenizerFast, max_length: int, multiple_of: int
) -> ConversationData:
    """Tokenises and packs the conversations that `cfg.data` chooses, or finds it done in the cache.

    Of several processes that ask at once, one does the work and the others wait for it.

    Raises:
        UserError: if they cannot be read, are too long, or none is left; or the cache cannot be written.
    """
    encoder = build_encoder(tokenizer, cfg, max_length, multiple_of)
    is_paired = cfg.loss == DPO
    source = build_conversations(cfg.data, is_paired)
    tokens = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, encoder.template, encoder.end]
    key = fingerprint(
        *(_VERSION, source.content, cfg.data.validation_fraction, tokens, tokenizer.special_tokens_map),
        *(cfg.loss, cfg.packing, cfg.too_long, max_length, multiple_of),
    )

    def build(folder: Path) -> None:
        logger.info("tokenising %s into rows of %d tokens", source.name, max_length)
        counts = {}
        for split, read in zip((TRAIN, VALIDATION), source.splits(), strict=True):
            writer = _SplitWriter(encoder, cfg.too_long, source.name, is_paired)
            writer.write(read, folder, split, is_packed=cfg.packing and not is_paired)
            counts[split] = asdict(writer.counts)
        (folder / "counts.json").write_text(json.dumps(counts), encoding="utf-8")

    folder = find_cache_dir(cfg.data.cache_dir) / "conversations" / key
    data = load_or_build(folder, build, lambda folder: ConversationData(folder, key, max_length))
    for split, counts in data.counts.items():
        if counts.num_too_long or counts.num_left_out:
            done = "left out" if cfg.too_long == DROP else "cut off"
            logger.warning(
                "%s (%s): %d of %d conversations are longer than max_length=%d and were %s; nothing was left to learn "
                "of %d",
                *(source.name, split, counts.num_too_long, counts.num_conversations, max_length, done),
                counts.num_left_out,
            )
    return data


class _SplitWriter:
    """Writes the rows of one split, and counts what is in them."""

    def __init__(self, encoder: ChatEncoder, too_long: str, name: str, is_paired: bool) -> None:
        self._encoder, self._too_long, self._name, self._is_paired = encoder, too_long, name, is_paired
        self._label_counts = np.zeros(vocab_size_of(encoder.tokenizer), np.int64)
        self._first_too_long: tuple[Conversation, int] | None = None
        self.counts = SplitCounts()

    def write(self, read: Callable[[], Iterable[Conversation]], folder: Path, split: str, *, is_packed: bool) -> None:
        """Writes them below `folder`.

        Raises:
            UserError: if conversations are too long and that is refused, or none is left.
        """
        import datasets
        import pyarrow
        from trl import pack_dataset

        work = folder / "work"
        work.mkdir()
        columns = _PAIR_COLUMNS if self._is_paired else _COLUMNS
        schema = pyarrow.schema({name: pyarrow.list_(pyarrow.int32()) for name in columns})
        # Not by `Dataset.from_generator`, which wraps up what is raised in it.
        with pyarrow.ipc.new_stream(str(work / "rows.arrow"), schema) as stream:
            for batch in _batches(self._rows(read()), _ROWS_AT_ONCE):
                stream.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema))
        rows: Any = datasets.Dataset.from_file(str(work / "rows.arrow"))
        if self._first_too_long is not None and self._too_long == REFUSE:
            (conversation, length), counts = self._first_too_long, self.counts
            limit = self._encoder.max_length
            raise UserError(
                f"{conversation.where}: is {length} tokens long, more than max_length={limit}, as are "
                f"{counts.num_too_long} of {counts.num_conversations} conversations for {split}; give a larger "
                "max_length, too_long=truncate or too_long=drop"
            )
        if not len(rows):
            counts = self.counts
            raise UserError(
                f"{self._name}: none of {counts.num_conversations} conversations for {split} is left: "
                f"{counts.num_too_long} are longer than max_length={self._encoder.max_length}, and of "
                f"{counts.num_left_out} nothing is left to learn"
            )
        if is_packed:
            rows = pack_dataset(rows.remove_columns("seq_lengths"), self._encoder.max_length, "bfd")
        rows.save_to_disk(str(folder / split))
        np.save(folder / f"{split}.npy", self._label_counts)
        shutil.rmtree(work)

    def _rows(self, conversations: Iterable[Conversation]) -> Iterator[dict[str, list[int]]]:
        found = asdict(self.counts)
        for conversation in track(conversations, "tokenising"):
            with explain_template_errors(f"{conversation.where}: "):
                sides = self._encode(conversation)
            found["num_conversations"] += 1
            is_kept = True
            longest, limit = max(len(ids) for ids, _ in sides), self._encoder.max_length
            if longest > limit:
                found["num_too_long"] += 1
                self._first_too_long = self._first_too_long or (conversation, longest)
                sides = [(ids[:limit], labels[:limit]) for ids, labels in sides]
                is_kept = self._too_long != DROP
            learnt = [[label for label in labels if label != IGNORE_INDEX] for _, labels in sides]
            # Two answers may have been made alike, by the template or by cutting them off.
            if is_kept and all(learnt) and learnt[1:] != learnt[:1]:
                self._label_counts += np.bincount(learnt[0], minlength=len(self._label_counts))
                found["num_tokens"] += sum(len(ids) for ids, _ in sides)
                found["num_predicted_tokens"] += len(learnt[0])
                yield self._row(sides, learnt)
            else:
                found["num_left_out"] += 1
            self.counts = SplitCounts(**found)

    def _encode(self, conversation: Conversation) -> list[tuple[list[int], list[int]]]:
        """Tokens and labels: of the conversation, or with the better answer and with the worse one."""
        if self._is_paired:
            return self._encoder.encode_pair(conversation)
        return [self._encoder.encode(conversation.messages)]

    def _row(self, sides: list[tuple[list[int], list[int]]], learnt: list[list[int]]) -> dict[str, list[int]]:
        ids, labels = sides[0]
        if self._is_paired:
            return dict(zip(_PAIR_COLUMNS, (ids[: len(ids) - len(learnt[0])], *learnt), strict=True))
        ids, labels = self._encoder.fill_up(ids, labels)
        return {"input_ids": ids, "labels": labels, "seq_lengths": [len(ids)]}


def _batches(rows: Iterator[dict[str, list[int]]], size: int) -> Iterator[list[dict[str, list[int]]]]:
    while batch := list(islice(rows, size)):
        yield batch
