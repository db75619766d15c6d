"""What a run folder is called where the user does not say."""

from __future__ import annotations

import re
from hashlib import sha256
from pathlib import Path

from lckv.config import RunConfig, SFTConfig, TrainConfig
from lckv.config.model import LatentConfig
from lckv.config.names import XKV
from lckv.config.sft import DPO


def default_run_name(cfg: RunConfig) -> str:
    """A name for the run folder: the model's size or where it comes from, how it shares or is tuned, and the seed."""
    if isinstance(cfg, SFTConfig):
        how = DPO if cfg.loss == DPO else "sft"
        return file_name(f"{source_name(cfg.model or '')}-{how}{'-lora' if cfg.lora.is_used else ''}-seed{cfg.seed}")
    assert isinstance(cfg, TrainConfig)
    if cfg.model.layer_types is not None:
        sharing = str(cfg.model.layer_types).replace(":", "-")  # no file name has a colon, and "_" is between layers
    elif cfg.init.source is not None and cfg.sharing.name == "llama":
        sharing = "own"
    else:
        sharing = cfg.sharing.name + "".join(f"-{name}{value}" for name, value in cfg.sharing.options().items())
    model = cfg.model.name if cfg.init.source is None else f"{source_name(cfg.init.source)}-{cfg.init.method}"
    iso = f"-iso_{cfg.iso}" if cfg.iso is not None else ""
    return file_name(f"{model}-{sharing}{_latent_name(cfg.latent)}{iso}-seed{cfg.seed}")


def _latent_name(latent: LatentConfig) -> str:
    if not latent.is_used:
        return ""
    size = f"_ratio{latent.ratio:g}" if latent.dim is None else f"_dim{latent.dim}"
    layers = {name: getattr(latent, f"{name}_layers") for name in ("skip", "warmup")}
    groups = f"_group{latent.group_size}" if latent.name == XKV else ""
    return f"-{latent.name}{size}{groups}" + "".join(f"_{name}{count}" for name, count in layers.items() if count)


def source_name(source: str) -> str:
    """What a pretrained model is called, without owner and folders: `Llama-3.2-1B`."""
    return re.sub(r"\.gguf$", "", Path(source).name, flags=re.IGNORECASE)


def file_name(text: str, max_length: int = 100) -> str:
    """`text` as one path component; what is too long is cut, with a hash of the whole behind it."""
    name = re.sub(r"[^\w.,=+-]+", "_", text).strip("._") or "run"
    if len(name) <= max_length:
        return name
    return f"{name[: max_length - 9]}-{sha256(text.encode()).hexdigest()[:8]}"
