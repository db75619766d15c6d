"""Finds a model by what the user calls it, and says what is wrong with its files as far as torch is not needed."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lckv.data.chat_templates import no_chat_template, read_chat_template, set_chat_template
from lckv.errors import UserError, near_miss
from lckv.sharing.model_values import check_family, stored_plan
from lckv.sharing.patterns import SharingPlan
from lckv.training.run_folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""Where weights are, the better first: in this file, or in several that `index_name` lists."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
"""A tokenizer has one of these."""

CHAT_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
"""Where chat templates are that the tokenizer's settings do not hold."""

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_GGUF = b"GGUF"


def index_name(file: str) -> str:
    """What the list of several files is called that stand for one of `WEIGHT_FILES`."""
    return f"{file}.index.json"


@dataclass(frozen=True)
class ModelFiles:
    """Where a model is.

    Attributes:
        key: what the user gave its name under, for error messages.
        given: the name.
        path: a local folder, or a name on the Hub.
        gguf_file: the file in the folder, where the model is one.
        is_local: whether it is a folder.
        revision: of the Hub.
    """

    key: str
    given: str
    path: str
    gguf_file: str | None = None
    is_local: bool = True
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.key}={self.given}"

    @property
    def is_folder(self) -> bool:
        """Whether it is a local folder whose files can be read as they are."""
        return self.is_local and self.gguf_file is None

    def check_files(self, *, needs_tokenizer: bool = True) -> None:
        """Names what a local folder lacks.

        Raises:
            UserError: if it has no weights, or no tokenizer.
        """
        if not self.is_folder:
            return
        present = {entry.name for entry in Path(self.path).iterdir()}
        needed = {"weights": [name for file in WEIGHT_FILES for name in (file, index_name(file))]}
        if needs_tokenizer:
            needed["tokenizer"] = list(TOKENIZER_FILES)
        for what, names in needed.items():
            if present.isdisjoint(names):
                raise UserError(f"{self}: {self.path} holds no {what} ({names[0]})")

    def stored_values(self) -> dict[str, Any]:
        """What the `config.json` of a local folder holds, checked to be of a model that can be read here.

        Raises:
            UserError: if it cannot be read, or is of another family.
        """
        try:
            values = json.loads(Path(self.path, "config.json").read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise ValueError(f"is no object, but a {type(values).__name__}")
        except (OSError, ValueError) as error:
            raise UserError(f"{self}: the configuration cannot be read: {type(error).__name__}: {error}") from error
        try:
            check_family(values)
        except UserError as error:
            raise UserError(f"{self}: {error}") from error
        return values

    def stored_plan(self) -> SharingPlan | None:
        """The model's own sharing pattern; see [`lckv.sharing.model_values.stored_plan`]."""
        values = self.stored_values()
        try:
            return stored_plan(values)
        except UserError as error:
            raise UserError(f"{self}: {error}") from error


def find_files(name: str, *, revision: str | None = None, key: str = "model") -> ModelFiles:
    """Finds a model, without reading it.

    Raises:
        UserError: if there is none.
    """
    path = Path(name).expanduser()
    if revision is not None and path.exists():
        raise UserError(f"revision={revision!r}: has no effect on {key}={name}, which is local; leave it out")
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UserError(f"{key}={name}: is a file; allowed are folders and GGUF files (.gguf)")
        with path.open("rb") as file:
            if file.read(len(_GGUF)) != _GGUF:
                raise UserError(f"{key}={name}: is no GGUF file, though it is called one; it may be torn, or a page")
        return ModelFiles(key, name, str(path.parent), gguf_file=path.name)
    if path.is_dir():
        return ModelFiles(key, name, str(_model_folder(path, name, key)))
    if not _HUB_NAME.fullmatch(name) or path.parent.is_dir():
        raise UserError(f"{key}={name}: there is no such folder{_nearest_folder(path)}")
    return ModelFiles(key, name, name, is_local=False, revision=revision)


def check_model(
    name: str, *, revision: str | None = None, key: str = "model", needs_tokenizer: bool = True
) -> SharingPlan | None:
    """Finds what is wrong with a model before anything slow is imported.

    Returns:
        Its sharing pattern, but for other families' windows; `None` where only a slower look can tell.

    Raises:
        UserError: if there is none, something of it is missing, or it is of another family.
    """
    found = find_files(name, revision=revision, key=key)
    if not found.is_folder:
        return None
    plan = found.stored_plan()
    found.check_files(needs_tokenizer=needs_tokenizer)
    return plan


def keeps_latents(name: str, key: str) -> bool | None:
    """Whether a model keeps latents, where its `config.json` lies in a folder; `None` elsewhere.

    Raises:
        UserError: if it cannot be read, or is of another family.
    """
    found = find_files(name, key=key)
    return found.stored_values().get("kv_latents") is not None if found.is_folder else None


def choose_chat_template(
    choice: str | None, model: str, *, revision: str | None = None
) -> Callable[[PreTrainedTokenizerBase], None]:
    """What gives a model's tokenizer the template that `chat_template=` chose, or sees to it that its own is of use.

    Raises:
        UserError: if the choice is none, or there is none and the model's folder has none either. Of models elsewhere,
            and of what templates make of a conversation, what is returned tells, once there is a tokenizer.
    """
    template = read_chat_template(choice)
    given = f"model={model}" if template is None else f"chat_template={choice}"
    if template is None and _lacks_chat_template(find_files(model, revision=revision)):
        raise no_chat_template(given)
    return partial(set_chat_template, template=template, given=given)


def _lacks_chat_template(found: ModelFiles) -> bool:
    """Whether the tokenizer in a model's folder has no chat template; of what lies elsewhere nothing is known here."""
    folder, settings = Path(found.path), Path(found.path, "tokenizer_config.json")
    if not found.is_folder or any((folder / template).exists() for template in CHAT_TEMPLATE_FILES):
        return False
    try:
        return not settings.is_file() or '"chat_template"' not in settings.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{found}: {settings.name} cannot be read: {error}") from error


def holds_tokenizer(path: Path) -> bool:
    """Whether `path` is a folder with a tokenizer in it."""
    return any((path / file).is_file() for file in TOKENIZER_FILES)


def check_tokenizer_name(name: str) -> None:
    """Refuses what has no tokenizer: a folder, a training run, and what cannot be a name on the Hub either.

    Raises:
        UserError: naming the key.
    """
    path = Path(name).expanduser()
    folder = path
    if path.is_file() or RunFolder(path).holds_a_run():
        folder = Path(find_files(name, key="tokenizer.name").path)
    if path.is_dir() and not holds_tokenizer(folder):
        raise UserError(f"tokenizer.name={name!r}: holds no tokenizer ({TOKENIZER_FILES[0]})")
    if not path.exists() and (path.is_absolute() or name.startswith((".", "~"))):
        raise UserError(f"tokenizer.name={name!r}: there is no such folder{_nearest_folder(path)}")


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
