"""Finds and loads a model by what the user calls it: a training run, a folder, a GGUF file, a name on the Hub."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from lckv.config.names import DTYPES
from lckv.config.run_names import file_name
from lckv.data.tokenizer import frame_texts
from lckv.errors import UserError, check_choice, first_line
from lckv.families import Reading, read_model
from lckv.loading.gguf_settings import BIASES, complete_config, open_gguf
from lckv.loading.gguf_weights import read_weights
from lckv.loading.model_files import WEIGHT_FILES, ModelFiles, find_files, index_name, is_of_training
from lckv.loading.stored_weights import map_weights
from lckv.models import LCKVLlamaConfig, LCKVLlamaForCausalLM
from lckv.training.run_folder import RunFolder
from lckv.utils.hub import hub_answers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint(ModelFiles):
    """Where a model is, and what can be read there.

    Attributes:
        local_files_only: whether the Hub is not to be asked.
    """

    local_files_only: bool = True

    def arguments(self) -> dict[str, Any]:
        """What every `from_pretrained` gets beside the path."""
        arguments: dict[str, Any] = {"revision": self.revision or "main", "local_files_only": self.local_files_only}
        return arguments if self.gguf_file is None else arguments | {"gguf_file": self.gguf_file}

    def config_values(self) -> dict[str, Any]:
        """What its `config.json` holds, or what a GGUF file says instead.

        Raises:
            UserError: if it cannot be read.
        """
        with self.loading("the configuration"):
            # A torn file is found here, before transformers stumbles over it.
            reader = None if self.gguf_file is None else open_gguf(Path(self.path, self.gguf_file))
            values: dict[str, Any] = PretrainedConfig.get_config_dict(self.path, **self.arguments())[0]
            return values if reader is None else complete_config(reader, values)

    def load_config(self) -> LCKVLlamaConfig:
        """The configuration as one of ours; see [`lckv.families.read_model`].

        Raises:
            UserError: if it cannot be read, or is of a family that is not supported.
        """
        return self.reading().config

    def reading(self) -> Reading:
        """How the model is read as one of ours.

        Raises:
            UserError: for the reasons of `load_config`.
        """
        if self.is_folder:
            self.stored_values()  # which says what is wrong in fewer words
        values = self.config_values()
        with self.loading("the configuration"):
            settings = {} if self.gguf_file is None else {name: values[name] for name in BIASES}
            reading = read_model(values, settings)
            if self.gguf_file is not None and reading.read is not None:
                raise UserError(
                    f"is a GGUF file of model_type {values['model_type']!r}, which is read only from a folder"
                )
        return reading

    def fetch(self, others: Iterable[str] = ()) -> Path:
        """The folder with the weights; those of the Hub are fetched first, and `others`, if they are not there yet.

        Raises:
            UserError: if that cannot be done.
        """
        if self.is_local:
            return Path(self.path)
        safetensors, torchs_own = (  # as some have the same weights once more, under other names
            [file.replace(".", "*.", 1), index_name(file)] for file in WEIGHT_FILES
        )
        with self.loading("the weights"):
            folder = Path(snapshot_download(self.path, allow_patterns=[*safetensors, *others], **self.arguments()))
            if not any(folder.glob(safetensors[0])):
                snapshot_download(self.path, allow_patterns=torchs_own, **self.arguments())
        return folder

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer.

        Raises:
            UserError: if there is none, or it is broken.
        """
        with self.loading("the tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(self.path, **self.arguments())
        frame_texts(tokenizer)
        return tokenizer

    def fingerprint(self) -> str:
        """A short name for the weights: a hash of their files, or the commit on the Hub."""
        if not self.is_local:
            return str(self.config_values().get("_commit_hash"))
        folder = Path(self.path)
        names = ("*.safetensors", "pytorch_model*.bin") if self.gguf_file is None else (self.gguf_file,)
        digest = hashlib.sha256()
        for file in sorted(path for name in names for path in folder.glob(name)):
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()[:16]

    @contextlib.contextmanager
    def loading(self, what: str) -> Iterator[None]:
        """Keeps transformers' reports and progress bars away, and says in one line what could not be read.

        Raises:
            UserError: if what the block reads is missing or broken, or needs a package that is not installed.
        """
        verbosity = transformers_logging.get_verbosity()
        shows_progress = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity(transformers_logging.CRITICAL)
        transformers_logging.disable_progress_bar()
        try:
            yield
        except UserError as error:
            raise UserError(f"{self}: {error}") from error
        except Exception as error:  # whatever reading foreign files may end in
            raise UserError(self._describe_failure(what, error)) from error
        finally:
            transformers_logging.set_verbosity(verbosity)
            if shows_progress:
                transformers_logging.enable_progress_bar()

    def _describe_failure(self, what: str, error: Exception) -> str:
        if not self.is_local and isinstance(error, OSError):
            reason = "the Hub cannot be reached" if self.local_files_only else "the Hub has none (misspelt, or gated?)"
            return f"{self}: there is no such folder, {what} was never downloaded, and {reason}"
        return f"{self}: {what} cannot be read: {type(error).__name__}: {first_line(error)}"


def find_checkpoint(name: str, *, revision: str | None = None, key: str = "model") -> Checkpoint:
    """Finds a model, without reading it; see `load_model` for what the arguments are.

    Raises:
        UserError: if there is none.
    """
    found = find_files(name, revision=revision, key=key)
    return Checkpoint(**vars(found), local_files_only=found.is_local or not hub_answers())


def find_run(checkpoint: Checkpoint) -> RunFolder | None:
    """The training run that the model is of, if it was given as a run folder, or as a model or checkpoint in it."""
    given = Path(checkpoint.given).expanduser().resolve()
    folders = (given.parent, given.parent.parent) if is_of_training(given) else (given, given.parent)
    runs = [RunFolder(folder) for folder in folders] if checkpoint.is_local else []
    return next((run for run in runs if run.config.is_file() and run.metrics.is_file()), None)


def evaluation_folder(checkpoint: Checkpoint, run: RunFolder | None) -> Path:
    """Where `lckv.evaluate` puts its results if it is not told: in the run that the model is of, if there is one."""
    path = Path(checkpoint.given).expanduser().resolve()
    if run is not None:
        return run.path / "evaluation" / (path.name if is_of_training(path) else "")
    return Path("runs") / "evaluation" / file_name(path.name if checkpoint.is_local else checkpoint.given)


def load_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    key: str = "model",
    on_tokenizer: Callable[[PreTrainedTokenizerBase], object] | None = None,
) -> tuple[LCKVLlamaForCausalLM, PreTrainedTokenizerBase]:
    """Loads a model, in evaluation mode, and its tokenizer.

    A model of another family (see [`lckv.families`]) gets the sharing pattern in which every layer reads
    itself, and computes what it always did. Settings for sampling that came with the model are left out: nothing but
    what the caller asks for applies.

    Args:
        name: a run folder of `lckv.train` (its trained model, or the newest whole checkpoint of an unfinished run), a
            folder with a model, a GGUF file, or a name on the Hub.
        revision: only for the Hub: branch, tag or commit.
        dtype: "float32", "bfloat16", "float16", or "auto": as it was saved.
        device: such as "cpu" or "cuda:1", or "auto": an accelerator, if there is one.
        key: what the user gave the name under, for error messages.
        on_tokenizer: what is done with the tokenizer, and may refuse it, before the weights are read.

    Raises:
        UserError: if there is no such model, something of it is missing or broken, it is of another architecture, or
            there is no such type or device.
    """
    check_choice("dtype", dtype, ("auto", *DTYPES))
    target = find_device(device)
    checkpoint = find_checkpoint(name, revision=revision, key=key)
    config = checkpoint.load_config()
    checkpoint.check_files()
    tokenizer = checkpoint.load_tokenizer()
    if on_tokenizer is not None:
        on_tokenizer(tokenizer)
    model = load_weights(checkpoint, config, dtype)
    _tidy_generation_config(model, tokenizer)
    return model.eval().to(target), tokenizer


def set_attention(model: PreTrainedModel, attn_implementation: str | None) -> None:
    """Chooses how a model's attention is computed; `None`: as it is.

    Raises:
        UserError: if that cannot be had here.
    """
    if attn_implementation is None:
        return
    try:
        model.set_attn_implementation(attn_implementation)
    except (ImportError, ValueError) as error:
        raise UserError(f"attn_implementation={attn_implementation!r}: {error}") from error


def find_device(name: str) -> torch.device:
    """The device of this name; for "auto" an accelerator, or else the CPU.

    Raises:
        UserError: if there is none.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return accelerator or torch.device("cpu")
    name = "cpu" if name == "cpu:0" else name  # as it is called where processes share a machine
    allowed = ["auto", "cpu"]
    if accelerator is not None:
        allowed += [f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count())]
    if name in allowed or (accelerator is not None and name == accelerator.type):
        return torch.device(name)
    raise UserError(f"device={name!r}: there is no such device here; allowed are {', '.join(allowed)}")


def load_weights(checkpoint: Checkpoint, config: LCKVLlamaConfig, dtype: str = "auto") -> LCKVLlamaForCausalLM:
    """Loads a model whose configuration was read already; that says afterwards whether embeddings are tied.

    Raises:
        UserError: if the weights cannot be read, or do not fit.
    """
    with checkpoint.loading("the weights"):
        arguments = _weights_of(checkpoint, config, dtype) | {"output_loading_info": True, "config": config}
        loaded: Any = LCKVLlamaForCausalLM.from_pretrained(**arguments, ignore_mismatched_sizes=True)
    model, info = loaded
    missing = sorted({*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])})
    if missing:
        raise UserError(
            f"{checkpoint}: the weights do not fit config.json: {len(missing)} are missing or of another "
            f"shape, such as {missing[0]}"
        )
    if unexpected := sorted(info["unexpected_keys"]):
        logger.warning("%s: %d weights are not used, such as %s", checkpoint.given, len(unexpected), unexpected[0])
    # Where the file holds a head of its own, transformers does not tie it, whatever the configuration says.
    config.tie_word_embeddings = model.lm_head.weight is model.model.embed_tokens.weight
    model.config.tie_word_embeddings = config.tie_word_embeddings
    assert isinstance(model, LCKVLlamaForCausalLM)
    return model


def _weights_of(checkpoint: Checkpoint, config: LCKVLlamaConfig, dtype: str) -> dict[str, Any]:
    """For `from_pretrained`: where the weights are, or these themselves where they are changed when they are read.

    Those of a GGUF file are float32 unless asked for otherwise.
    """
    asked = None if dtype == "auto" else getattr(torch, dtype)
    if checkpoint.gguf_file is not None:
        kind = asked or torch.float32
        weights = read_weights(Path(checkpoint.path, checkpoint.gguf_file), config, kind)
    else:
        reading = checkpoint.reading()
        if reading.read is None:
            return {"pretrained_model_name_or_path": checkpoint.path, "dtype": dtype, **checkpoint.arguments()}
        weights = dict(reading.tensors(map_weights(checkpoint.fetch())))
        kind = asked or weights["model.embed_tokens.weight"].dtype
    return {"pretrained_model_name_or_path": None, "dtype": kind, "state_dict": weights}


def _tidy_generation_config(model: LCKVLlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Leaves of the model's own settings for generation only which tokens end a text, begin it and fill it up."""
    saved = model.generation_config or GenerationConfig()
    ids: dict[str, Any] = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        candidates = (getattr(saved, name), getattr(model.config, name), getattr(tokenizer, name))
        ids[name] = next((value for value in candidates if value is not None), None)
    model.generation_config = GenerationConfig(**ids)
    model.config.use_cache = True  # training switches it off
