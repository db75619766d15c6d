"""What makes one text of a conversation: the tokenizer's own template, a file's, or one that has a name here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jinja2 import TemplateError

from lckv.errors import UserError, first_line, near_file, near_miss

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
"""A `role`, such as "system", "user" or "assistant", and its `content`."""

CHATML = """\
{% for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}
{{- message['content'] + '<|im_end|>' }}
{%- endgeneration %}
{%- else %}
{{- message['content'] + '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
"""Every message between `<|im_start|>` and `<|im_end|>`. What the assistant says, its `<|im_end|>` included, is marked
as transformers' `return_assistant_tokens_mask` needs it, and so TRL's `assistant_only_loss`."""

CHAT_TEMPLATES = {"chatml": CHATML}
"""Jinja texts by the names that `chat_template=<name>` gives."""


def no_chat_template(given: str) -> UserError:
    """What is said of a model without a template; the message begins with `given`."""
    how = f"chat_template={' or '.join(CHAT_TEMPLATES)}, or chat_template=FILE"
    return UserError(f"{given}: its tokenizer has no chat template; give one: {how}")


def read_chat_template(choice: str | None, key: str = "chat_template") -> str | None:
    """The Jinja text that a name or a file stands for; `None` where the tokenizer's own is to do. Needs no torch.

    Raises:
        UserError: if it is neither, or the file holds no text.
    """
    if choice is None or choice in CHAT_TEMPLATES:
        return None if choice is None else CHAT_TEMPLATES[choice]
    path = Path(choice).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        is_missing = isinstance(error, FileNotFoundError)
        reason = "there is no such file" if is_missing else error.strerror
        hint = near_miss(choice, CHAT_TEMPLATES) or (near_file(path) if is_missing else "")
        raise UserError(f"{key}={choice}: {reason}; allowed are {', '.join(CHAT_TEMPLATES)} and files{hint}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{key}={choice}: is not UTF-8 text (byte {error.start})") from None
    if not text.strip():
        raise UserError(f"{key}={choice}: holds no text; give a Jinja template")
    return text


def set_chat_template(tokenizer: PreTrainedTokenizerBase, template: str | None, given: str) -> None:
    """Gives a tokenizer the template that `read_chat_template` returned, and tries it.

    Args:
        tokenizer: which keeps its own where `template` is None.
        template: a Jinja text.
        given: what the message of an error begins with: who has no template, or where it is from.

    Raises:
        UserError: if there is none, or it cannot render a question and its answer.
    """
    if template is not None:
        tokenizer.chat_template = template
    if tokenizer.chat_template is None:
        raise no_chat_template(given)
    try:
        turn_end(tokenizer)
    except UserError as error:
        raise UserError(f"{given}: {error}") from error


@contextmanager
def explain_template_errors(where: str = "") -> Iterator[None]:
    """Raises a UserError for what templates refuse, and what they stumble over; it begins with `where`."""
    try:
        yield
    except (TemplateError, TypeError, ValueError) as error:
        raise UserError(f"{where}the chat template fails: {first_line(error)}") from error


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, add_generation_prompt: bool = False
) -> str:
    """The text of a conversation, special tokens written out: it is to be encoded without adding any.

    Args:
        tokenizer: which has a template.
        messages: the oldest first.
        add_generation_prompt: whether what an answer begins with follows.

    Raises:
        UserError: if the template is none, or refuses such a conversation.
    """
    with explain_template_errors():
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    assert isinstance(text, str)
    return text


class AnswerEnd(NamedTuple):
    """What ends an answer beside eos: a token, or a text that the tokenizer spells in several; or neither.

    Where it is no token, tuning has eos follow the last answer.
    """

    token: int | None
    text: str


def end_of_answer(tokenizer: PreTrainedTokenizerBase) -> AnswerEnd:
    """What the template ends an answer with, which need not be eos: the one place that says so.

    Of several tokens, the first is enough where it is a special one, of which no text is made.

    Raises:
        UserError: for the reasons of [`turn_end`].
    """
    text = turn_end(tokenizer)
    answer, whole = (tokenizer(each, add_special_tokens=False)["input_ids"] for each in ("a", f"a{text}"))
    is_behind = whole[: len(answer)] == answer  # a text may begin with another token than what follows another one
    end = whole[len(answer) :] if is_behind else tokenizer(text, add_special_tokens=False)["input_ids"]
    first, *others = end or [None]
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    is_unknown = first == tokenizer.unk_token_id != tokenizer.eos_token_id
    if is_unknown or (others and first not in special):
        return AnswerEnd(None, text)
    return AnswerEnd(first, "")


def turn_end(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template writes behind an answer, without white space around it; empty if there is nothing.

    Raises:
        UserError: if the template cannot render a question and its answer, or leaves the answer out.
    """
    answer = "ANSWER"
    text = render_chat(tokenizer, [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}])
    if answer not in text:
        raise UserError("the chat template leaves the assistant's messages out")
    return text.rpartition(answer)[2].strip()
