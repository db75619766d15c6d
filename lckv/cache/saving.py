"""Caches on disk: a prompt that many texts begin with is computed once."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lckv.cache.base import KVCache, build_cache, describe_streams, plan_of
from lckv.errors import UserError
from lckv.sharing.layout import Stream
from lckv.utils.storage import new_file, save_tensors

FORMAT = "1"
CHECKED_SIZES = ("num_key_value_heads", "head_dim", "sliding_window", "force_nodiag")
"""What a model must have in common with the one that filled the cache, beside the sharing pattern and the streams."""


def save_cache(cache: KVCache, path: str | Path) -> None:
    """Writes the tensors of all owners, and all that is needed to go on, to one safetensors file.

    A file of that name is replaced once the new one is complete.

    Raises:
        UserError: if the folder does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise UserError(f"cannot save a cache to {path}: there is no folder {path.parent}")
    tensors, scalars = cache.state()
    about = {
        "name": cache.name,
        "options": cache.options(),
        "layer_types": cache.plan.layer_types,
        "sizes": _sizes(cache.config),
        "streams": {owner: [asdict(stream) for stream in streams] for owner, streams in cache.layout.streams.items()},
        "tensors": sorted(tensors),
        "scalars": scalars,
    }
    metadata = {"lckv_cache": FORMAT, **{key: json.dumps(value) for key, value in about.items()}}
    with new_file(path) as file:
        save_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata)


def load_cache(path: str | Path, config: Any, device: str | torch.device = "cpu") -> KVCache:
    """Makes the cache that `save_cache` wrote.

    Args:
        path: the file.
        config: the configuration of the model that will use the cache.
        device: where its tensors go.

    Raises:
        UserError: if the file is missing, no saved cache, incomplete, or made with a model of another sharing pattern
            or other sizes.
    """
    tensors, metadata = _read(Path(path), device)
    _check_model(Path(path), metadata, config)
    cache = build_cache(metadata["name"], config, **metadata["options"])
    _check_complete(Path(path), metadata, tensors, cache)
    cache.load_state(tensors, metadata["scalars"])
    return cache


def _sizes(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name) for name in CHECKED_SIZES}


def _read(path: Path, device: str | torch.device) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and the metadata of a file."""
    if not path.is_file():
        raise UserError(f"cannot load a cache from {path}: there is no such file")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise UserError(f"cannot load a cache from {path}: it is no complete safetensors file ({error})") from error
    version = metadata.pop("lckv_cache", None)
    if version != FORMAT:
        given = "no saved cache" if version is None else f"a cache in format {version}"
        raise UserError(f"cannot load a cache from {path}: it is {given}, allowed is format {FORMAT}")
    return tensors, {key: json.loads(value) for key, value in metadata.items()}


def _check_model(path: Path, metadata: dict[str, Any], config: Any) -> None:
    """Refuses a model whose KV has another form than what was saved."""
    layer_types = plan_of(config).layer_types
    if metadata["layer_types"] != layer_types:
        raise UserError(
            f"{path} holds a cache for layer_types {metadata['layer_types']!r}: the model has {layer_types!r}"
        )
    for name, size in _sizes(config).items():
        if metadata["sizes"][name] != size:
            raise UserError(f"{path} holds a cache for {name}={metadata['sizes'][name]}: the model has {size}")
    given = config.kv_layout.streams
    if "streams" in metadata:  # files that do not say so have plain keys and values of the sizes above
        saved = {
            int(owner): tuple(Stream(**each | {"planes": tuple(each.get("planes", ()))}) for each in streams)
            for owner, streams in metadata["streams"].items()
        }
        if saved != given:
            raise UserError(
                f"{path} holds a cache for {describe_streams(saved)}: the model has {describe_streams(given)}"
            )


def _check_complete(path: Path, metadata: dict[str, Any], tensors: dict[str, torch.Tensor], cache: KVCache) -> None:
    """Refuses a file that lacks a layer's KV."""
    missing = sorted(set(metadata["tensors"]) - set(tensors))
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}: a saved cache has the KV of every layer that computes it")
    missing_layers = {str(owner) for owner in cache.owners()} - set(metadata["scalars"].get("layers", {}))
    if missing_layers:
        raise UserError(f"{path} lacks layer {', '.join(sorted(missing_layers))}, whose KV the model computes")
