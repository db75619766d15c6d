"""Loads a model and its tokenizer for generation: a training run, a checkpoint, a plain Llama, a GGUF file."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from lckv.errors import UserError, near_miss
from lckv.model_arguments import DTYPES
from lckv.models import LCKVLlamaConfig, LCKVLlamaForCausalLM
from lckv.training.run_folder import RunFolder

logger = logging.getLogger(__name__)

_MODEL_TYPES = (LCKVLlamaConfig.model_type, LlamaConfig.model_type)
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_LLAMA_ONLY = ("model_type", "architectures", "transformers_version", "layer_types", "pretraining_tp")

# RuntimeError: torch's own format.
_BROKEN = (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, SafetensorError, StrictDataclassError)


@dataclass(frozen=True)
class _Checkpoint:
    """Where a model is: a local folder, perhaps with the name of a GGUF file in it, or a name on the Hub."""

    given: str
    path: str
    gguf_file: str | None = None
    is_local: bool = True
    revision: str | None = None
    local_files_only: bool = True

    def arguments(self) -> dict[str, Any]:
        """What every `from_pretrained` gets beside the path."""
        arguments: dict[str, Any] = {"revision": self.revision or "main", "local_files_only": self.local_files_only}
        return arguments if self.gguf_file is None else arguments | {"gguf_file": self.gguf_file}


def load_model(
    name: str, *, revision: str | None = None, dtype: str = "auto", device: str = "auto"
) -> tuple[LCKVLlamaForCausalLM, PreTrainedTokenizerBase]:
    """Loads a model, in evaluation mode, and its tokenizer.

    A Llama gets the sharing pattern in which every layer reads itself, and computes what it always did. Settings for
    sampling that came with the model are left out: nothing but what the caller asks for applies.

    Args:
        name: a run folder of `lckv.train` (its trained model, or the newest whole checkpoint of an unfinished run), a
            folder with a model, a GGUF file, or a name on the Hub.
        revision: only for the Hub: branch, tag or commit.
        dtype: "float32", "bfloat16", "float16", or "auto": as it was saved.
        device: such as "cpu" or "cuda:1", or "auto": an accelerator, if there is one.

    Raises:
        UserError: if there is no such model, something of it is missing or broken, it is of another architecture, or
            there is no such type or device.
    """
    if dtype not in ("auto", *DTYPES):
        raise UserError(f"dtype={dtype!r}: allowed are auto, {', '.join(DTYPES)}{near_miss(dtype, DTYPES)}")
    target = find_device(device)
    checkpoint = _find_checkpoint(name, revision)
    config = _load_config(checkpoint)
    _check_files(checkpoint)
    tokenizer = _load_tokenizer(checkpoint)
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


def _find_checkpoint(name: str, revision: str | None) -> _Checkpoint:
    path = Path(name).expanduser()
    if revision is not None and path.exists():
        raise UserError(f"revision={revision!r}: has no effect on model={name}, which is local; leave it out")
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UserError(f"model={name}: is a file; allowed are folders and GGUF files (.gguf)")
        return _Checkpoint(name, str(path.parent), gguf_file=path.name)
    if path.is_dir():
        return _Checkpoint(name, str(_model_folder(path, name)))
    if not _HUB_NAME.fullmatch(name) or path.parent.is_dir():
        raise UserError(f"model={name}: there is no such folder{_nearest_folder(path)}")
    return _Checkpoint(
        name, name, is_local=False, revision=revision, local_files_only=constants.HF_HUB_OFFLINE or not _hub_answers()
    )


def _hub_answers() -> bool:
    from lckv.data.tokenizer import hub_answers  # takes libraries along that nothing else here needs

    return hub_answers()


def _nearest_folder(path: Path) -> str:
    """For an error message: the folder beside a missing one whose name is most like it."""
    parent = path.parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    siblings = sorted(entry.name for entry in parent.iterdir() if entry.is_dir() or entry.suffix == ".gguf")
    if hint := near_miss(path.name, siblings):
        return f" ({hint.removeprefix('; ').removesuffix('?')} in {parent}?)"
    return ", and a name on the Hub is OWNER/NAME"


def _model_folder(folder: Path, name: str) -> Path:
    """The folder with the model: this one, or the one that a training run has put it into."""
    if (folder / "config.json").is_file():
        return folder
    run = RunFolder(folder)
    if (run.model / "config.json").is_file():
        return run.model
    if (latest := run.checkpoints.latest()) is not None:
        logger.warning("%s is not finished: using %s", name, latest.name)
        return latest
    if run.config.is_file() or run.checkpoints.path.is_dir():
        raise UserError(f"model={name}: this training run has no checkpoint yet")
    inner = sorted(entry.parent.name for entry in folder.glob("*/config.json"))
    files = sorted(entry.name for entry in folder.glob("*.gguf"))
    hint = f"; did you mean {str(folder / (inner + files)[0])!r}?" if inner + files else ""
    raise UserError(f"model={name}: holds no config.json, so this is no folder of a model or a training run{hint}")


def _load_config(checkpoint: _Checkpoint) -> LCKVLlamaConfig:
    with _loading(checkpoint, "the configuration"):
        values, _ = PretrainedConfig.get_config_dict(checkpoint.path, **checkpoint.arguments())
    model_type = values.get("model_type")
    if model_type not in _MODEL_TYPES:
        raise UserError(
            f"model={checkpoint.given}: is of model_type {model_type!r}; allowed are {' and '.join(_MODEL_TYPES)}"
        )
    with _loading(checkpoint, "the configuration"):
        if model_type == LCKVLlamaConfig.model_type:
            return LCKVLlamaConfig.from_dict(values)
        llama = LlamaConfig.from_dict(values).to_dict()
        return LCKVLlamaConfig(**{key: value for key, value in llama.items() if key not in _LLAMA_ONLY})


def _check_files(checkpoint: _Checkpoint) -> None:
    """Names what a local folder lacks."""
    if not checkpoint.is_local or checkpoint.gguf_file is not None:
        return
    present = {entry.name for entry in Path(checkpoint.path).iterdir()}
    for what, names in ("weights", _WEIGHTS), ("tokenizer", _TOKENIZERS):
        if present.isdisjoint(names):
            raise UserError(f"model={checkpoint.given}: {checkpoint.path} holds no {what} ({names[0]})")


def _load_tokenizer(checkpoint: _Checkpoint) -> PreTrainedTokenizerBase:
    with _loading(checkpoint, "the tokenizer"):
        return AutoTokenizer.from_pretrained(checkpoint.path, **checkpoint.arguments())


def _load_weights(checkpoint: _Checkpoint, config: LCKVLlamaConfig, dtype: str) -> LCKVLlamaForCausalLM:
    arguments = {
        "dtype": dtype,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
        **checkpoint.arguments(),
    }
    model_class: Any = LCKVLlamaForCausalLM if checkpoint.gguf_file is None else LlamaForCausalLM
    if checkpoint.gguf_file is None:
        arguments["config"] = config
    with _loading(checkpoint, "the weights"):
        model, info = model_class.from_pretrained(checkpoint.path, **arguments)
    missing = sorted({*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])})
    if missing:
        raise UserError(
            f"model={checkpoint.given}: the weights do not fit config.json: {len(missing)} are missing or of another "
            f"shape, such as {missing[0]}"
        )
    if unexpected := sorted(info["unexpected_keys"]):
        logger.warning("%s: %d weights are not used, such as %s", checkpoint.given, len(unexpected), unexpected[0])
    return _as_sharing_model(model, config) if isinstance(model, LlamaForCausalLM) else model


def _as_sharing_model(llama: LlamaForCausalLM, config: LCKVLlamaConfig) -> LCKVLlamaForCausalLM:
    """The same model as one of ours, with the same tensors."""
    model: LCKVLlamaForCausalLM = LCKVLlamaForCausalLM._from_config(config, dtype=llama.dtype)
    model.load_state_dict(llama.state_dict(), assign=True)
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


@contextlib.contextmanager
def _loading(checkpoint: _Checkpoint, what: str) -> Iterator[None]:
    """Keeps transformers' reports and progress bars away, and says in one line what could not be read.

    Raises:
        UserError: if what the block reads is missing or broken, or needs a package that is not installed.
    """
    verbosity, shows_progress = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    except UserError as error:
        raise UserError(f"model={checkpoint.given}: {error}") from error
    except Exception as error:
        if not isinstance(error, _BROKEN) and type(error) is not Exception:  # which is what tokenizers raises
            raise
        raise UserError(_describe_failure(checkpoint, what, error)) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shows_progress:
            transformers_logging.enable_progress_bar()


def _describe_failure(checkpoint: _Checkpoint, what: str, error: Exception) -> str:
    place = f"model={checkpoint.given}"
    if not checkpoint.is_local and isinstance(error, OSError):
        reason = (
            "the Hub cannot be reached" if checkpoint.local_files_only else "the Hub has none (misspelt, or gated?)"
        )
        return f"{place}: there is no such folder, {what} was never downloaded, and {reason}"
    lines = str(error).strip().splitlines() or [""]
    return f"{place}: {what} cannot be read: {type(error).__name__}: {lines[0]}"
