"""Finds and loads a model by what the user calls it: a training run, a folder, a GGUF file, a name on the Hub."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from lckv.config.names import DTYPES
from lckv.errors import UserError, check_choice, near_miss
from lckv.gguf_settings import complete_config
from lckv.models import LCKVLlamaConfig, LCKVLlamaForCausalLM
from lckv.models.families import read_config
from lckv.training.run_folder import RunFolder

logger = logging.getLogger(__name__)

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""Where weights are, the better first: in this file, or in several that `index_name` lists."""

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def index_name(file: str) -> str:
    """What the list of several files is called that stand for one of `WEIGHT_FILES`."""
    return f"{file}.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """Where a model is.

    Attributes:
        key: what the user gave its name under, for error messages.
        given: the name.
        path: a local folder, or a name on the Hub.
        gguf_file: the file in the folder, where the model is one.
        is_local: whether it is a folder.
        revision: of the Hub.
        local_files_only: whether the Hub is not to be asked.
    """

    key: str
    given: str
    path: str
    gguf_file: str | None = None
    is_local: bool = True
    revision: str | None = None
    local_files_only: bool = True

    def __str__(self) -> str:
        return f"{self.key}={self.given}"

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
            values: dict[str, Any] = PretrainedConfig.get_config_dict(self.path, **self.arguments())[0]
            return values if self.gguf_file is None else complete_config(Path(self.path, self.gguf_file), values)

    def load_config(self) -> LCKVLlamaConfig:
        """The configuration as one of ours; see [`lckv.models.families.read_config`].

        Raises:
            UserError: if it cannot be read, or is of a family that is not supported.
        """
        values = self.config_values()
        with self.loading("the configuration"):
            return read_config(values)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer.

        Raises:
            UserError: if there is none, or it is broken.
        """
        with self.loading("the tokenizer"):
            return AutoTokenizer.from_pretrained(self.path, **self.arguments())

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

    def check_files(self) -> None:
        """Names what a local folder lacks.

        Raises:
            UserError: if it has no weights, or no tokenizer.
        """
        if not self.is_local or self.gguf_file is not None:
            return
        present = {entry.name for entry in Path(self.path).iterdir()}
        weights = [name for file in WEIGHT_FILES for name in (file, index_name(file))]
        for what, names in ("weights", weights), ("tokenizer", _TOKENIZERS):
            if present.isdisjoint(names):
                raise UserError(f"{self}: {self.path} holds no {what} ({names[0]})")

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
        lines = str(error).strip().splitlines() or [""]
        return f"{self}: {what} cannot be read: {type(error).__name__}: {lines[0]}"


def find_checkpoint(name: str, *, revision: str | None = None, key: str = "model") -> Checkpoint:
    """Finds a model, without reading it; see `load_model` for what the arguments are.

    Raises:
        UserError: if there is none.
    """
    path = Path(name).expanduser()
    if revision is not None and path.exists():
        raise UserError(f"revision={revision!r}: has no effect on {key}={name}, which is local; leave it out")
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UserError(f"{key}={name}: is a file; allowed are folders and GGUF files (.gguf)")
        return Checkpoint(key, name, str(path.parent), gguf_file=path.name)
    if path.is_dir():
        return Checkpoint(key, name, str(_model_folder(path, name, key)))
    if not _HUB_NAME.fullmatch(name) or path.parent.is_dir():
        raise UserError(f"{key}={name}: there is no such folder{_nearest_folder(path)}")
    from lckv.data.tokenizer import hub_answers  # takes libraries along that nothing else here needs

    offline = constants.HF_HUB_OFFLINE or not hub_answers()
    return Checkpoint(key, name, name, is_local=False, revision=revision, local_files_only=offline)


def find_run(checkpoint: Checkpoint) -> RunFolder | None:
    """The training run that the model is of, if it was given as a run folder, or as a model or checkpoint in it."""
    given = Path(checkpoint.given).expanduser().resolve()
    folders = (given.parent, given.parent.parent) if is_of_training(given) else (given, given.parent)
    runs = [RunFolder(folder) for folder in folders] if checkpoint.is_local else []
    return next((run for run in runs if run.config.is_file() and run.metrics.is_file()), None)


def holds_tokenizer(path: Path) -> bool:
    """Whether `path` is a folder with a tokenizer in it."""
    return any((path / name).is_file() for name in _TOKENIZERS)


def is_of_training(folder: Path) -> bool:
    """Whether a folder is a checkpoint that a run has kept, not the model at its end."""
    return folder.parent.name == "checkpoints"


def _nearest_folder(path: Path) -> str:
    """For an error message: the folder beside a missing one whose name is most like it."""
    parent = path.parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    siblings = sorted(entry.name for entry in parent.iterdir() if entry.is_dir() or entry.suffix == ".gguf")
    if hint := near_miss(path.name, siblings):
        return f" ({hint.removeprefix('; ').removesuffix('?')} in {parent}?)"
    return ", and a name on the Hub is OWNER/NAME"


def _model_folder(folder: Path, name: str, key: str) -> Path:
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
        raise UserError(f"{key}={name}: this training run has no checkpoint yet")
    inner = sorted(entry.parent.name for entry in folder.glob("*/config.json"))
    files = sorted(entry.name for entry in folder.glob("*.gguf"))
    hint = f"; did you mean {str(folder / (inner + files)[0])!r}?" if inner + files else ""
    raise UserError(f"{key}={name}: holds no config.json, so this is no folder of a model or a training run{hint}")


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
    check_choice("dtype", dtype, ("auto", *DTYPES))
    target = find_device(device)
    checkpoint = find_checkpoint(name, revision=revision, key=key)
    config = checkpoint.load_config()
    checkpoint.check_files()
    tokenizer = checkpoint.load_tokenizer()
    model = _load_weights(checkpoint, config, dtype)
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
