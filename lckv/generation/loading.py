"""Loads a model and its tokenizer: a training run, a checkpoint, a plain Llama or its like, a GGUF file."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lckv.checkpoint import Checkpoint, find_checkpoint
from lckv.config.names import DTYPES
from lckv.errors import UserError, near_miss
from lckv.models import LCKVLlamaConfig, LCKVLlamaForCausalLM

logger = logging.getLogger(__name__)


def load_model(
    name: str, *, revision: str | None = None, dtype: str = "auto", device: str = "auto", key: str = "model"
) -> tuple[LCKVLlamaForCausalLM, PreTrainedTokenizerBase]:
    """Loads a model, in evaluation mode, and its tokenizer.

    A model of another family (see [`lckv.models.families`]) gets the sharing pattern in which every layer reads
    itself, and computes what it always did. Settings for sampling that came with the model are left out: nothing but
    what the caller asks for applies.

    Args:
        name: a run folder of `lckv.train` (its trained model, or the newest whole checkpoint of an unfinished run), a
            folder with a model, a GGUF file, or a name on the Hub.
        revision: only for the Hub: branch, tag or commit.
        dtype: "float32", "bfloat16", "float16", or "auto": as it was saved.
        device: such as "cpu" or "cuda:1", or "auto": an accelerator, if there is one.
        key: what the user gave the name under, for error messages.

    Raises:
        UserError: if there is no such model, something of it is missing or broken, it is of another architecture, or
            there is no such type or device.
    """
    if dtype not in ("auto", *DTYPES):
        raise UserError(f"dtype={dtype!r}: allowed are auto, {', '.join(DTYPES)}{near_miss(dtype, DTYPES)}")
    target = find_device(device)
    checkpoint = find_checkpoint(name, revision=revision, key=key)
    config = checkpoint.load_config()
    checkpoint.check_files()
    tokenizer = checkpoint.load_tokenizer()
    model = _load_weights(checkpoint, config, dtype)
    _tidy_generation_config(model, tokenizer)
    return model.eval().to(target), tokenizer


def find_device(name: str) -> torch.device:
    """The device of this name; for "auto" an accelerator, or else the CPU.

    Raises:
        UserError: if there is none.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return accelerator or torch.device("cpu")
    allowed = ["auto", "cpu"]
    if accelerator is not None:
        allowed += [f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count())]
    if name in allowed or (accelerator is not None and name == accelerator.type):
        return torch.device(name)
    raise UserError(f"device={name!r}: there is no such device here; allowed are {', '.join(allowed)}")


def _load_weights(checkpoint: Checkpoint, config: LCKVLlamaConfig, dtype: str) -> LCKVLlamaForCausalLM:
    arguments = {
        "dtype": dtype,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
        **checkpoint.arguments(),
    }
    model_class: Any = LCKVLlamaForCausalLM if checkpoint.gguf_file is None else AutoModelForCausalLM
    if checkpoint.gguf_file is None:
        arguments["config"] = config
    with checkpoint.loading("the weights"):
        model, info = model_class.from_pretrained(checkpoint.path, **arguments)
    missing = sorted({*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])})
    if missing:
        raise UserError(
            f"{checkpoint}: the weights do not fit config.json: {len(missing)} are missing or of another "
            f"shape, such as {missing[0]}"
        )
    if unexpected := sorted(info["unexpected_keys"]):
        logger.warning("%s: %d weights are not used, such as %s", checkpoint.given, len(unexpected), unexpected[0])
    return model if isinstance(model, LCKVLlamaForCausalLM) else _as_sharing_model(model, config)


def _as_sharing_model(original: PreTrainedModel, config: LCKVLlamaConfig) -> LCKVLlamaForCausalLM:
    """The same model as one of ours, with the same tensors."""
    model: LCKVLlamaForCausalLM = LCKVLlamaForCausalLM._from_config(config, dtype=original.dtype)
    model.load_state_dict(original.state_dict(), assign=True)
    model.tie_weights()
    return model


def _tidy_generation_config(model: LCKVLlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Leaves of the model's own settings for generation only which tokens end a text, begin it and fill it up."""
    saved = model.generation_config or GenerationConfig()
    ids: dict[str, Any] = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        candidates = (getattr(saved, name), getattr(model.config, name), getattr(tokenizer, name))
        ids[name] = next((value for value in candidates if value is not None), None)
    model.generation_config = GenerationConfig(**ids)
    model.config.use_cache = True  # training switches it off
