"""A tokenizer in GGUF's words. llama.cpp cuts text by a rule that it knows by name, then merges as tokenizers does."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from transformers import AddedToken, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lckv.errors import UserError

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_CUTS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_BYTES],
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTES],
    "llama-bpe": [
        {"type": "Split", "pattern": {"Regex": _LLAMA3}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ],
}
"""How text is cut before it is merged: llama.cpp's names, and what they are in `tokenizer.json`."""

_TAKES_WHOLE_WORDS = ("llama-bpe",)
"""The rules with which llama.cpp takes a word that is a token as it is, whether or not merges lead there."""

_BY_SURROUNDINGS = ("lstrip", "rstrip", "single_word")  # of `AddedToken`

_OFFSETS = "trim_offsets"  # about the places of tokens in the text


_ENDS = ("eos", "eot", "eom")
"""GGUF's names for tokens that end a text, a turn and a message: llama.cpp stops behind any of them."""


def tokenizer_settings(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_token_id: int | list[int] | None
) -> dict[str, Any]:
    """What a GGUF file says of a tokenizer, by GGUF's names.

    Args:
        tokenizer: one over bytes.
        vocab_size: rows of the embedding; those without a token are filled with tokens that no text has.
        eos_token_id: what ends a text for the model; the tokenizer may know only one of several.

    Raises:
        UserError: for a tokenizer that llama.cpp would not follow token by token.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError("the tokenizer has no fast version (tokenizer.json), which is needed here")
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    cut = _find_cut(backend)
    from gguf import TokenType

    texts = {index: token for token, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    _check_added(added.values())
    types = []
    for index in range(vocab_size):
        kind = TokenType.NORMAL if index in texts else TokenType.UNUSED
        if index in added:
            kind = TokenType.CONTROL if added[index].special else TokenType.USER_DEFINED
        types.append(int(kind))
    if not (merges := backend["model"]["merges"]):
        raise UserError("the tokenizer has no merges, without which llama.cpp does not begin")
    ids = {"bos": tokenizer.bos_token_id, **_find_ends(tokenizer, eos_token_id)}
    settings = {
        "model": "gpt2",
        "pre": cut,
        "tokens": [texts.get(index, f"[UNUSED{index}]") for index in range(vocab_size)],
        "token_type": types,
        "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
        # As every text begins here; see `lckv.data.tokenizer.frame_texts`.
        "add_bos_token": ids["bos"] is not None,
        "add_eos_token": False,
        **{f"{name}_token_id": index for name, index in ids.items() if index is not None},
        "padding_token_id": tokenizer.pad_token_id,
        "chat_template": tokenizer.chat_template,
    }
    kept = {name: value for name, value in settings.items() if value is not None and value != []}
    return {f"tokenizer.{'' if name == 'chat_template' else 'ggml.'}{name}": kept[name] for name in kept}


def _check_added(tokens: Iterable[AddedToken]) -> None:
    """Refuses tokens that are found by what stands around them."""
    for token in tokens:
        if found := next((name for name in _BY_SURROUNDINGS if getattr(token, name)), None):
            raise UserError(
                f"the tokenizer's token {token.content!r} has {found}=True, which llama.cpp would not heed"
            )


def _find_ends(tokenizer: PreTrainedTokenizerBase, eos_token_id: int | list[int] | None) -> dict[str, int]:
    """The tokens that end a text, by GGUF's names; the tokenizer's own is the first."""
    given = [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id or []
    ends = sorted(dict.fromkeys(given), key=lambda index: index != tokenizer.eos_token_id)
    if len(ends) > len(_ENDS):
        raise UserError(f"eos_token_id={given}: a GGUF file has room for {len(_ENDS)} tokens that end a text")
    return dict(zip(_ENDS, ends, strict=False))


def _find_cut(backend: dict[str, Any]) -> str:
    """llama.cpp's name for how the tokenizer of a `tokenizer.json` cuts text."""
    model, cut = backend["model"], backend["pre_tokenizer"] or {}
    if model["type"] != "BPE" or model["byte_fallback"] or model["dropout"] or backend["normalizer"] is not None:
        normalizer = (backend["normalizer"] or {}).get("type", "none")
        raise UserError(
            f"the tokenizer is of type {model['type']} with normalizer {normalizer}; allowed is BPE over bytes without"
        )
    steps = [{name: value for name, value in step.items() if name != _OFFSETS} for step in _steps(cut)]
    name = next((name for name, known in _CUTS.items() if steps == known), None)
    if name is None or model["ignore_merges"] != (name in _TAKES_WHOLE_WORDS):
        kinds = ", ".join(str(step["type"]) for step in steps) or "nothing"
        raise UserError(
            f"the tokenizer cuts text by {kinds} in a way that llama.cpp has no name for here; allowed are those of "
            "GPT-2, SmolLM and Llama 3"
        )
    return name


def _steps(pre_tokenizer: dict[str, Any]) -> list[dict[str, Any]]:
    return list(pre_tokenizer.get("pretokenizers", [pre_tokenizer]))
