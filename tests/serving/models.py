"""Tiny random models, what they answer by our own `generate`, and engines that serve them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lckv import LCKVLlamaConfig, LCKVLlamaForCausalLM
from tests.tiny import byte_tokenizer

SIZES = dict(
    vocab_size=257,
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,  # the smallest of vLLM's kernel for CPUs
    sliding_window=24,
    max_position_embeddings=512,
    initializer_range=0.2,  # so that tokens are far apart
)
CHAT_TEMPLATE = "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}[assistant]"
LENGTHS = (5, 37, 100, 1, 64)
NUM_NEW_TOKENS = 40


def tiny_model(**settings: Any) -> LCKVLlamaForCausalLM:
    """A model whose norms and biases count, too."""
    torch.manual_seed(0)
    model = LCKVLlamaForCausalLM(LCKVLlamaConfig(**(SIZES | settings))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def save(model: Any, folder: Path) -> Path:
    """Saves a model with a tokenizer of bytes and a chat template."""
    model.save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def prompts() -> list[list[int]]:
    """Texts of several lengths: within a window and beyond it, a block and a chunk."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in LENGTHS]


@torch.no_grad()
def answer(
    model: Any, prompt: list[int], num_tokens: int = NUM_NEW_TOKENS, **options: Any
) -> tuple[list[int], list[float]]:
    """What our own `generate` says after a prompt, and how likely it finds each of these tokens (log)."""
    output = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=num_tokens,
        eos_token_id=-1,  # no token ends a text
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    tokens = output.sequences[0, len(prompt) :]
    logprobs = torch.stack(output.logits)[:, 0].float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    return tokens.tolist(), logprobs.tolist()


@contextlib.contextmanager
def engine(folder: Path, **options: Any) -> Iterator[Any]:
    """An offline engine of vLLM, in this process; prompts are cut into chunks, and their beginnings kept."""
    from vllm import LLM

    given = dict(
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        block_size=32,
        max_num_batched_tokens=48,
        max_num_seqs=8,
        enable_prefix_caching=True,
    )
    llm = LLM(str(folder), **(given | options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def served_answers(llm: Any, given: list[list[int]], num_tokens: int = NUM_NEW_TOKENS) -> Any:
    """What an engine says after prompts: tokens, and how likely each is (log)."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in given], sampling, use_tqdm=False)
    for output in outputs:
        tokens, logprobs = list(output.outputs[0].token_ids), output.outputs[0].logprobs
        yield tokens, [step[token].logprob for step, token in zip(logprobs, tokens, strict=True)]


def assert_served_alike(llm: Any, model: Any, given: list[list[int]], **options: Any) -> None:
    """Whether an engine answers as our own `generate` does with such options."""
    for prompt, (tokens, logprobs) in zip(given, served_answers(llm, given), strict=True):
        expected_tokens, expected_logprobs = answer(model, prompt, **options)
        assert tokens == expected_tokens
        torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(expected_logprobs), atol=1e-4, rtol=0)


def kv_tokens(llm: Any) -> int:
    """How many tokens fit into the cache, as vLLM reports it."""
    return int(llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens)
