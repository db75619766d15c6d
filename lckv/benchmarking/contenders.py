"""What is compared: models, each with a cache."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lckv.cache import CACHES, KVCache, build_cache
from lckv.config.keys import once
from lckv.models import LCKVLlamaConfig, LCKVLlamaForCausalLM


@dataclass(frozen=True)
class CacheChoice:
    """A cache by name, with the options that it gets."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Name and options, such as `quantized bits=4`."""
        return " ".join([self.name, *(f"{name}={value}" for name, value in self.options.items())])


@dataclass
class Contender:
    """A model with a cache.

    Attributes:
        label: what the table and the plot call it; unique.
        model: in evaluation mode, on its device; contenders that differ in the cache share one.
        cache: which cache it uses.
    """

    label: str
    model: LCKVLlamaForCausalLM
    cache: CacheChoice

    @property
    def config(self) -> LCKVLlamaConfig:
        """The model's."""
        return self.model.config

    def new_cache(self, max_length: int, base: type[KVCache] | None = None) -> KVCache:
        """Makes an empty cache.

        Args:
            max_length: of a cache that is made for a fixed length, unless its options say otherwise.
            base: a class to mix in, such as one that counts.

        Raises:
            UserError: if the model or the options are not fit for the cache.
        """
        options = dict(self.cache.options)
        if "max_length" in _option_names(self.cache.name):
            options.setdefault("max_length", max_length)
        if base is None:
            return build_cache(self.cache.name, self.config, **options)
        cache_class = CACHES[self.cache.name].class_for(options)
        mixed = type(f"{base.__name__}{cache_class.__name__}", (base, cache_class), {})
        return mixed(self.config, **options)


def choose_caches(given: Sequence[Any], common: dict[str, Any]) -> list[CacheChoice]:
    """The caches to compare.

    Args:
        given: names, or mappings with `name` and options.
        common: options for every cache that has them and does not say otherwise.

    Raises:
        UserError: for an unknown cache, and one that is given twice.
    """
    choices = []
    for entry in given:
        own = {"name": entry} if isinstance(entry, str) else dict(entry)
        name = own.pop("name")
        known = _option_names(name)
        choices.append(CacheChoice(name, {key: value for key, value in common.items() if key in known} | own))
    once("caches", [choice.label for choice in choices])
    return choices


def _option_names(cache_name: str) -> set[str]:
    return set(inspect.signature(CACHES[cache_name]).parameters) - {"config"}


def combine(models: dict[str, LCKVLlamaForCausalLM], caches: Sequence[CacheChoice]) -> list[Contender]:
    """Every model with every cache; labels name the cache where there are several."""
    return [
        Contender(label if len(caches) == 1 else f"{label}, {cache.label}", model, cache)
        for label, model in models.items()
        for cache in caches
    ]


def random_model(
    arguments: dict[str, Any], device: torch.device, dtype: torch.dtype, seed: int
) -> LCKVLlamaForCausalLM:
    """A model with random weights.

    Args:
        arguments: of `LCKVLlamaConfig`.
        device: where it will run.
        dtype: of its weights, and so of the keys and values.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    config = LCKVLlamaConfig(**arguments)
    return LCKVLlamaForCausalLM(config).to(device=device, dtype=dtype).eval()  # type: ignore[call-arg]


def checkpoint_labels(paths: Sequence[str], taken: Sequence[str]) -> dict[str, str]:
    """A short name for every checkpoint: the last parts of its path that tell it from the others.

    Args:
        paths: of the checkpoints.
        taken: names that are not free.
    """
    labels: dict[str, str] = {}
    for path in paths:
        parts = path.rstrip("/").split("/")
        names = ["/".join(parts[start:]) for start in reversed(range(len(parts)))]
        labels[next(name for name in [*names, f"{path} "] if name not in labels and name not in taken)] = path
    return labels
