"""The model that a conversion starts from: its configuration, its tensors, and what lies beside them."""

from __future__ import annotations

import logging
import re
import shutil
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from lckv.conversion.heads import Tensors
from lckv.data.tokenizer import check_tokenizer
from lckv.errors import UserError
from lckv.families import LazyTensors
from lckv.loading.model_files import CHAT_TEMPLATE_FILES, TOKENIZER_FILES
from lckv.loading.models import Checkpoint, find_checkpoint, find_device, load_weights
from lckv.loading.stored_weights import map_weights, stored_type
from lckv.models import LCKVLlamaConfig, LCKVLlamaForCausalLM

logger = logging.getLogger(__name__)

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_COPIED = (
    *("generation_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *(*TOKENIZER_FILES, *CHAT_TEMPLATE_FILES),
)
EMBEDDINGS = "model.embed_tokens.weight"
"""The tensor whose type is the model's."""

HEAD = "lm_head.weight"
"""The tensor that is not there where it is the embeddings once more."""

_DISPENSABLE = re.compile(r".*\.rotary_emb\.inv_freq")  # not used, and no loss: rotations are worked out anew


@dataclass(frozen=True)
class Source:
    """A pretrained model: where it is, and its configuration."""

    checkpoint: Checkpoint
    config: LCKVLlamaConfig

    @classmethod
    def find(cls, name: str, *, revision: str | None = None, key: str = "source") -> Source:
        """Finds a model that can be converted, see [`lckv.loading.models.find_checkpoint`], and reads no weights.

        Raises:
            UserError: if there is none, it is of a family that is not supported, or its weights are quantised.
        """
        checkpoint = find_checkpoint(name, revision=revision, key=key)
        config = checkpoint.load_config()
        checkpoint.check_files(needs_tokenizer=False)
        return cls(checkpoint, config)

    @cached_property
    def tensors(self) -> Tensors:
        """Its tensors under our names, each read when it is used; those of a GGUF file are the model's.

        They are those that the model has when it is loaded: of tied embeddings, the head is there only if it differs.

        Raises:
            UserError: if they do not fit the configuration, or cannot be read.
        """
        if self.checkpoint.gguf_file is not None:
            tensors = self._model.state_dict()
            return self._untied(LazyTensors({name: partial(tensors.__getitem__, name) for name in tensors}))
        folder = self._folder()
        with self.checkpoint.loading("the weights"):
            return self._checked(self._untied(self.checkpoint.reading().tensors(map_weights(folder))), folder)

    def load_model(self, device: str) -> LCKVLlamaForCausalLM:
        """The whole model, in evaluation mode; of a GGUF file, on a CPU, the one whose tensors are `tensors`."""
        target = find_device(device)
        # What is wanted in another type than it has would change its tensors with it.
        if self.checkpoint.gguf_file is not None and target.type == "cpu" and self._model.dtype == torch.float32:
            return self._model
        return load_weights(self.checkpoint, self.checkpoint.load_config()).eval().to(target)

    def load_for_text(self, device: str) -> LCKVLlamaForCausalLM:
        """The model with text to run through it whole: not token by token, which would show a layer's last input only.

        On a CPU it is in float32, in which everything is fast there.
        """
        model = self.load_model(device)
        model.config.use_sequential = False
        return model.float() if model.device.type == "cpu" else model

    @cached_property
    def _model(self) -> LCKVLlamaForCausalLM:
        """The model of a GGUF file, which is slow to read and cannot be mapped: read once, and in memory once."""
        return load_weights(self.checkpoint, self.checkpoint.load_config()).eval()

    def load_tokenizer(self) -> PreTrainedTokenizerFast:
        """Its tokenizer.

        Raises:
            UserError: if there is none that makes blocks of documents.
        """
        self.checkpoint.check_files()
        return check_tokenizer(self.checkpoint.load_tokenizer(), str(self.checkpoint))

    def copy_rest(self, folder: Path) -> None:
        """Copies tokenizer and settings for generation; where they are inside a GGUF file, writes them anew."""
        if self.checkpoint.gguf_file is not None:
            self.checkpoint.load_tokenizer().save_pretrained(folder)
            return
        origin = self._folder()
        if not any((origin / name).is_file() for name in TOKENIZER_FILES):
            logger.warning("%s: holds no tokenizer (%s), nor does what is made", self.checkpoint, TOKENIZER_FILES[0])
        for name in _COPIED:
            if (origin / name).is_dir():
                shutil.copytree(origin / name, folder / name)
            elif (origin / name).is_file():
                shutil.copyfile(origin / name, folder / name)

    def _folder(self) -> Path:
        """Where its files are; those of the Hub are fetched first, if they are not there yet."""
        return self.checkpoint.fetch([*_COPIED, *(f"{name}/*" for name in CHAT_TEMPLATE_FILES)])

    def _untied(self, tensors: LazyTensors) -> LazyTensors:
        """Of tied embeddings one tensor, whichever the file has, and both where they are not the same after all."""
        makers = tensors.makers
        if self.config.tie_word_embeddings and HEAD in makers:
            if EMBEDDINGS not in makers or torch.equal(tensors[EMBEDDINGS], tensors[HEAD]):
                makers.setdefault(EMBEDDINGS, makers[HEAD])
                del makers[HEAD]
        return tensors

    def _checked(self, tensors: LazyTensors, folder: Path) -> Tensors:
        """Those that the model has, all of them and of its shapes."""
        expected = expected_shapes(self.config, has_head=HEAD in tensors)
        for name, shape in expected.items():
            if name not in tensors:
                raise UserError(f"the weights do not fit config.json: there is no {name}")
            tensor = tensors[name]
            if tensor.dtype not in _DTYPES:
                raise UserError(
                    f"{name} is of type {stored_type(folder, name, tensor)}: its weights are quantised, which cannot "
                    "be read here; take the original ones"
                )
            if tensor.shape != shape:
                actual = list(tensor.shape)
                raise UserError(f"the weights do not fit config.json: {name} is {actual}, not {list(shape)}")
        if unused := [name for name in tensors if name not in expected and not _DISPENSABLE.fullmatch(name)]:
            logger.warning("%s: %d weights are not used, such as %s", self.checkpoint, len(unused), unused[0])
        return LazyTensors({name: tensors.makers[name] for name in expected})


def expected_shapes(
    config: LCKVLlamaConfig,
    model_class: type[LCKVLlamaForCausalLM] = LCKVLlamaForCausalLM,
    *,
    has_head: bool = False,
) -> dict[str, torch.Size]:
    """The tensors that a checkpoint of this configuration holds, tied ones once unless it `has_head` all the same."""
    with torch.device("meta"):
        model = model_class(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings and not has_head:
        del shapes[HEAD]
    return shapes
