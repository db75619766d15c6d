"""Adapters of low rank, by PEFT: which modules get them, and whether a saved one fits a model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lckv.config import LoraConfig
from lckv.config.sft import ALL_LINEAR
from lckv.errors import UserError, near_miss
from lckv.sharing.patterns import SharingPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"

Shapes = Mapping[str, Sequence[int]]

_WITHOUT_FORWARD = ("k_b_proj", "v_b_proj")
"""Projections whose matrix is read as it is when a single token is decoded, past any adapter."""

_PREFIX = "base_model.model."
_PART = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
_KEYS_OR_VALUES = re.compile(r"layers\.(?P<layer>\d+)\.self_attn\.(?P<stream>[kv])_proj$")


def read_adapter(folder: str) -> Shapes:
    """The shapes of a saved adapter's tensors by their names in the model, read without torch.

    Raises:
        UserError: if it is none of PEFT's, or none of low rank.
    """
    path, given = Path(folder).expanduser(), f"lora.adapter={folder}"
    if not path.is_dir():
        raise UserError(f"{given}: there is no such folder")
    try:
        kind = json.loads((path / SETTINGS).read_text(encoding="utf-8")).get("peft_type")
        with (path / WEIGHTS).open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    except FileNotFoundError as error:
        name = Path(str(error.filename)).name
        raise UserError(f"{given}: holds no {name}, so this is no adapter that PEFT has saved") from None
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{given}: cannot be read ({error})") from error
    if kind != "LORA":
        raise UserError(f"{given}: is an adapter of the kind {kind!r}; allowed is 'LORA'")
    return {name.removeprefix(_PREFIX): entry["shape"] for name, entry in header.items() if name != "__metadata__"}


def check_adapter_pattern(adapter: Shapes, plan: SharingPlan, given: str) -> None:
    """Refuses an adapter of keys and values that layers do not compute.

    Raises:
        UserError: naming the first of these layers.
    """
    for name in sorted(adapter):
        found = _PART.fullmatch(name)
        at = _KEYS_OR_VALUES.search(found["module"]) if found else None
        if at is None:
            continue
        number, is_of_keys = int(at["layer"]), at["stream"] == "k"
        layer = plan.layers[number] if number < len(plan.layers) else None
        if layer is not None and (layer.computes_keys if is_of_keys else layer.computes_values):
            continue
        owner = f"reads those of layer {layer.sources[not is_of_keys]}" if layer else "is not there"
        raise UserError(
            f"{given}: adapts the {'keys' if is_of_keys else 'values'} of layer {number}, which {owner} in the model "
            f"({plan.layer_types}); give an adapter of the model's pattern"
        )


def check_adapter_fits(adapter: Shapes, model: Shapes, given: str) -> None:
    """Refuses an adapter that is not of this model.

    Args:
        adapter: the shapes of its tensors, as [`read_adapter`] gives them.
        model: the shapes of the model's parameters by name.
        given: what the message begins with.

    Raises:
        UserError: naming the first tensor that does not fit.
    """
    for name, shape in adapter.items():
        found = _PART.fullmatch(name)
        target = f"{found['module']}.weight" if found else name
        if target not in model:
            raise UserError(f"{given}: is of another model: there is no {target} here")
        rows, *columns = model[target]
        needed: Any = [rows, *columns]
        if found:  # `(rank, columns)` and `(rows, rank)`
            needed = [shape[0], *columns] if found["part"] == "A" else [rows, shape[-1]]
        if list(shape) != needed:
            raise UserError(
                f"{given}: is of a model of other sizes: {name} has the shape {list(shape)}, where {needed} would fit"
            )


def build_lora_config(cfg: LoraConfig, model: PreTrainedModel) -> Any:
    """PEFT's settings of new adapters.

    Raises:
        UserError: for names of no projection.
    """
    from peft import LoraConfig as PeftLoraConfig
    from torch import nn

    head = model.get_output_embeddings()
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and not name.endswith(_WITHOUT_FORWARD)
    }
    for target in cfg.target_modules if cfg.target_modules != ALL_LINEAR else ():
        if target not in names:
            raise UserError(
                f"lora.target_modules: {target!r} can have no adapter in this model; allowed are "
                f"{', '.join(sorted(names))}{near_miss(target, names)}"
            )
    assert cfg.rank is not None
    return PeftLoraConfig(
        r=cfg.rank,
        lora_alpha=2 * cfg.rank if cfg.alpha is None else cfg.alpha,
        lora_dropout=cfg.dropout,
        target_modules=sorted(names) if cfg.target_modules == ALL_LINEAR else list(cfg.target_modules),
        task_type="CAUSAL_LM",
    )
