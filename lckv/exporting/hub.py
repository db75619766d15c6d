"""A folder that transformers loads on a machine without this package: weights, tokenizer, card, and the model's code.

The code is one file, made of our modules when the folder is written; see `lckv.exporting.bundle`. A model that shares
nothing needs none where a family of transformers' own computes the same; see `lckv.exporting.plain`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lckv.config.names import HUB
from lckv.errors import UserError
from lckv.exporting.formats import FORMATS, ExportFormat
from lckv.loading.model_files import find_files
from lckv.sharing.model_values import OURS
from lckv.sharing.patterns import SharingPlan
from lckv.utils.byte_sizes import parse_bytes
from lckv.utils.storage import check_new_folder, new_folder, write_text

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from lckv.conversion.source import Source
    from lckv.models import LCKVLlamaConfig

_CODE = "modeling_lckv"
_CLASSES = {
    "AutoConfig": "LCKVLlamaConfig",
    "AutoModel": "LCKVLlamaModel",
    "AutoModelForCausalLM": "LCKVLlamaForCausalLM",
}


@FORMATS.register(HUB)
class HubFolder(ExportFormat):
    """A model folder with the code that it needs."""

    def check(self, plan: SharingPlan | None) -> None:
        """Refuses a folder that is there already, a foreign model, and an upload that cannot be."""
        check_new_folder(self.out)
        found = find_files(self.model, revision=self.cfg.revision)
        if found.is_folder:
            self._check_ours(found.stored_values()["model_type"])
        if self.cfg.push is not None:
            from lckv.exporting.upload import check_access, check_repo_name

            check_repo_name(self.cfg.push)
            check_access(self.cfg.push)

    def _check_ours(self, model_type: str) -> None:
        if model_type != OURS:
            raise UserError(
                f"model={self.model}: is of model_type {model_type!r}, which transformers loads as it is; allowed are "
                f"models of lckv.train and lckv.convert ({OURS}), and GGUF files"
            )

    def write(self) -> str:
        """Writes the folder, and uploads it if that is asked for."""
        from lckv.conversion.source import Source
        from lckv.exporting.plain import plain_config

        source = Source.find(self.model, revision=self.cfg.revision, key="model")
        if source.checkpoint.gguf_file is None:
            self._check_ours(source.checkpoint.config_values()["model_type"])
        plain = plain_config(source.config)
        with new_folder(self.out) as folder:
            self._describe(folder, source, plain)
            write_model(folder, source, plain, parse_bytes(self.cfg.max_shard_size, "max_shard_size"))
        made = "with its code" if plain is None else f"as {plain.model_type}, which needs no code of ours"
        if self.cfg.push is None:
            return made
        from lckv.exporting.upload import upload

        return f"{made}; uploaded: {upload(self.out, self.cfg.push)}"

    def _describe(self, folder: Path, source: Source, plain: PretrainedConfig | None) -> None:
        """Writes the card and the picture in it."""
        from lckv.exporting.card import DRAWING, model_card
        from lckv.exporting.provenance import find_provenance
        from lckv.sharing.drawing import save_drawing

        save_drawing(source.config.sharing_plan, folder / DRAWING)
        family = None if plain is None else plain.model_type
        name, provenance = self.cfg.push or self.out.name, find_provenance(source.checkpoint)
        card = model_card(name, source.config, provenance, family, requirements_of(source.config))
        write_text(folder / "README.md", card)


def requirements_of(config: LCKVLlamaConfig) -> tuple[str, ...]:
    """What a model's code needs: what this package does, and for rotations by the kind of layer a little more."""
    return ("torch>=2.11", "transformers>=5.17" if config.rope_layer_types is None else "transformers>=5.18")


def write_model(folder: Path, source: Source, plain: PretrainedConfig | None, max_shard_size: int) -> None:
    """Writes all that is needed to load a model.

    Args:
        folder: where to.
        source: the model.
        plain: its configuration where it is written as a model of transformers' own; else its code goes with it.
        max_shard_size: bytes of a file of weights.
    """
    from lckv.conversion.source import EMBEDDINGS, HEAD
    from lckv.conversion.weights import write_weights
    from lckv.exporting.bundle import bundle

    tensors, config = source.tensors, source.config if plain is None else plain
    write_weights(folder, tensors.items(), max_shard_size)
    source.copy_rest(folder)
    if plain is None:
        write_text(folder / f"{_CODE}.py", bundle("lckv.models.modeling_lckv", requirements_of(source.config)))
        config.architectures = [_CLASSES["AutoModelForCausalLM"]]
        config.auto_map = {auto: f"{_CODE}.{ours}" for auto, ours in _CLASSES.items()}
    config.tie_word_embeddings = source.config.tie_word_embeddings and HEAD not in tensors
    config.dtype = tensors[EMBEDDINGS].dtype
    config.save_pretrained(folder)  # last: without it, nothing loads
