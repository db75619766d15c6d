"""From what the user gives to tokens: a text, a file, standard input, a list of prompts, a chat."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lckv.data.chat_templates import render_chat
from lckv.data.readers import join_line_ends
from lckv.errors import UserError, near_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STANDARD_INPUT = "-"


def read_prompts(
    prompt: str | None = None, prompt_file: str | None = None, prompts_file: str | None = None
) -> list[str]:
    """Reads the prompts: the text, the file's, one per line of the file, or else what standard input has.

    Raises:
        UserError: unless exactly one is given; if a file cannot be read, or there is no text.
    """
    sources = {"prompt": prompt, "prompt_file": prompt_file, "prompts_file": prompts_file}
    given = {key: value for key, value in sources.items() if value is not None}
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} are both given: only one of them can have an effect")
    if prompt is not None:
        return [_check_text("prompt", prompt, prompt)]
    if prompts_file is not None:
        lines = [line for line in _read("prompts_file", prompts_file).split("\n") if line.strip()]
        return lines or [_check_text("prompts_file", prompts_file, "")]
    if prompt_file is None and sys.stdin.isatty():
        raise UserError('prompt: give one: prompt="...", prompt_file=FILE, prompts_file=FILE, or pipe text in')
    path = STANDARD_INPUT if prompt_file is None else prompt_file
    key = "prompt" if prompt_file is None else "prompt_file"
    text = _read(key, path).removesuffix("\n")
    return [_check_text(key, "standard input" if path == STANDARD_INPUT else path, text)]


def _check_text(key: str, given: str, text: str) -> str:
    if not text.strip():
        shown = repr(given) if key == "prompt" and given == text else given
        raise UserError(f"{key}={shown}: holds no text; give at least one word to continue")
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes on the command line that are no text
        raise UserError(f"{key}={text!r}: is not UTF-8 text") from None
    return text


def _read(key: str, path: str) -> str:
    try:
        data = sys.stdin.buffer.read() if path == STANDARD_INPUT else Path(path).expanduser().read_bytes()
        return join_line_ends(data.decode("utf-8-sig"))  # without the mark that some editors put first
    except UnicodeDecodeError as error:
        raise UserError(f"{key}={path}: is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        hint = near_file(Path(path).expanduser()) if isinstance(error, FileNotFoundError) else ""
        raise UserError(f"{key}={path}: {error.strerror}{hint}") from None


def encode_prompts(
    prompts: list[str], tokenizer: PreTrainedTokenizerBase, *, chat: bool | None = None, system: str | None = None
) -> list[list[int]]:
    """Turns prompts into tokens, each as a message for the tokenizer's chat template if `chat` says so, or it has one.

    Raises:
        UserError: if the template refuses a prompt or `system`, there is no chat for that, or a prompt makes no token.
    """
    has_template = tokenizer.chat_template is not None
    is_chat = has_template if chat is None else chat
    if system is not None and not is_chat:
        reason = "chat=false" if has_template else "a tokenizer that has no chat template; give chat_template, or"
        raise UserError(f"system: has no effect with {reason}{';' * has_template} leave it out")
    if is_chat:
        prompts = [_apply_template(tokenizer, prompt, system) for prompt in prompts]
    texts = [join_line_ends(prompt) for prompt in prompts]
    # A chat template writes the special tokens out.
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=not is_chat)["input_ids"]
    for prompt, tokens in zip(prompts, encoded, strict=True):
        if not tokens:
            raise UserError(f"prompt={prompt!r}: encodes to no token with this tokenizer; give some text")
    return encoded


def _apply_template(tokenizer: PreTrainedTokenizerBase, prompt: str, system: str | None) -> str:
    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return render_chat(tokenizer, messages, add_generation_prompt=True)
