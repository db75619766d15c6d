"""Has llama.cpp run a file, and compares its tokens and logits with the model's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lckv.errors import UserError
from lckv.models import LCKVLlamaForCausalLM

MAX_NMSE = 1e-3
"""How far logits may be apart: the mean squared difference over the logits' variance."""

_TEXT = """\
In the beginning there were 3 rivers, and every one of them ran to the sea. "Where are you going?" the old man asked;
nobody had an answer, so he wrote down what he saw: 12 boats, 1,047 sheep, and a café that wasn't there in 1989.

\t- Zoë's naïve façade: 50% off!  (It's 7:45 -- don't be late.)
\t- Привет, мир; καλημέρα κόσμε; 日本語の文章です。 🙂

def add(a, b):
    return a + b  # she said: we'll see what they've done, I'm sure you'd agree

And he said unto them, Let us go over unto the other side of the lake. And they launched forth, and as they sailed he
fell asleep; and there came down a storm of wind on the water, and they were filled with it, and were in danger.
"""
_MAX_TOKENS, _NUM_PLACES = 256, 8
_ROOM = 8  # behind the text, for the token that llama.cpp adds to it


def verify(
    path: Path, model: LCKVLlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, *, float32_cache: bool
) -> float:
    """Compares a file with the model that it was made of.

    Args:
        path: the file.
        model: in float32.
        tokenizer: its tokenizer.
        float32_cache: whether llama.cpp's cache is in float32; else it is in float16, as by default.

    Returns:
        The mean squared difference of logits at some places of a text, over their variance.

    Raises:
        UserError: if llama.cpp does not run the file, cuts the text into other tokens, or computes something else.
    """
    tokens = tokenizer(_TEXT)["input_ids"]
    length = min(len(tokens), _MAX_TOKENS, model.config.max_position_embeddings - _ROOM)
    places = sorted({max(1, length * place // _NUM_PLACES) for place in range(1, _NUM_PLACES + 1)})
    # A longer prompt goes on from what the cache holds of a shorter one: prefill and cache are both compared.
    requests = [_ask_for_logits(tokens[:place], model.config.vocab_size, tokenizer) for place in places]
    answer, _ = run_llama_cpp(path, _TEXT, requests, length + _ROOM, float32_cache=float32_cache)
    if answer["tokens"] != tokens:
        raise UserError("llama.cpp cuts text into other tokens; nothing was written")
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens[:length]]), use_cache=False).logits[0].float()
    expected = logits[[place - 1 for place in places]].log_softmax(-1)
    found = torch.stack([_read_logits(completion, expected.shape[1]) for completion in answer["completions"]])
    spread = (expected - expected.mean(-1, keepdim=True)).square().mean()
    nmse = float((found - expected).square().mean() / spread)
    if not nmse <= MAX_NMSE:
        raise UserError(
            f"llama.cpp computes something else: its logits differ by an NMSE of {nmse:.1e}, where {MAX_NMSE:.0e} is "
            "allowed; nothing was written"
        )
    return nmse


def run_llama_cpp(
    path: Path,
    text: str,
    completions: list[dict[str, Any]],
    num_tokens: int,
    *,
    float32_cache: bool,
    num_threads: int | None = None,
) -> tuple[dict[str, Any], str]:
    """Has llama.cpp run a file in a process of its own.

    Args:
        path: the file.
        text: what to cut into tokens.
        completions: requests of llama.cpp's server.
        num_tokens: of the longest text.
        float32_cache: whether its cache is in float32; else it is in float16, as by default.
        num_threads: its threads; `None`: torch's.

    Returns:
        The answer (see [`lckv.exporting.run_llama_cpp`]), and what llama.cpp reports.

    Raises:
        UserError: if it ends without an answer.
    """
    request = {
        "path": str(path),
        "num_tokens": num_tokens,
        "num_threads": num_threads or torch.get_num_threads(),
        "float32_cache": float32_cache,
        "text": text,
        "completions": completions,
    }
    command = [sys.executable, "-m", "lckv.exporting.run_llama_cpp"]
    # llama.cpp reports tokens as they are, and one may be a part of a character.
    ended = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, errors="replace")
    if ended.returncode:
        errors = [line for line in ended.stderr.splitlines() if " E " in line or "GGML_ASSERT" in line]
        reason = (errors or ended.stderr.splitlines() or ["no reason"])[0]
        raise UserError(f"llama.cpp does not run the file: {reason}; nothing was written")
    answer: dict[str, Any] = json.loads(ended.stdout)
    return answer, ended.stderr


def _ask_for_logits(tokens: list[int], vocab_size: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A request for the log probabilities of all tokens behind some.

    llama.cpp's server leaves out those of a token that is no whole character. So the next token is to be an "a", which
    changes nothing about what is reported.
    """
    letter = tokenizer.convert_tokens_to_ids("a")
    return {"prompt": tokens, "n_predict": 1, "n_probs": vocab_size, "logit_bias": [[letter, 1e4]], "temperature": 0}


def _read_logits(completion: dict[str, Any], vocab_size: int) -> torch.Tensor:
    """The log probabilities `(vocab_size,)` of a completion's token."""
    logits = torch.full((vocab_size,), torch.nan)
    for entry in completion["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        if entry["logprob"] is not None:  # JSON's word for what is no number, such as where a float16 cache overflows
            logits[entry["id"]] = entry["logprob"]
    return logits
