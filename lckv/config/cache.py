"""What can be configured of the cache of keys and values."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from lckv.config.keys import Group, at_least, key, one_of
from lckv.config.names import CACHES, NO_CACHE
from lckv.errors import UserError, check_choice, near_miss


@dataclass
class CacheConfig(Group):
    """How keys and values are kept while text is generated; None leaves an option at the cache's own default.

    Attributes:
        name: "dynamic", "static", "sink", "paged" or "quantized"; for evaluations also "none".
        max_length: cache "static": for how many tokens to make room, the prompt's among them; None: just enough.
        num_sinks: cache "sink": how many of the first tokens are kept for good.
        window: cache "sink": how many of the last tokens are kept beside them.
        page_size: caches of pages: tokens per page.
        num_pages: caches of pages: pages per layer that computes KV; None: as many as are needed.
        bits: cache "quantized": bits per number, 2, 4 or 8.
        group_size: cache "quantized": how many numbers share a scale and a zero point.
        residual_length: cache "quantized": how many of the last tokens stay in full precision.
        key_axis: cache "quantized": what the numbers of a group of keys have in common, "channel" or "token".
        value_axis: cache "quantized": the same for values.
        layout: cache "quantized": "dynamic" or "paged".
        offloading: whether to keep everything in the CPU's memory, and on the GPU only what is in use.
    """

    name: str = key("dynamic", one_of((*CACHES, NO_CACHE)))
    max_length: int | None = key(None, at_least(), of="static")
    num_sinks: int | None = key(None, at_least(0), of="sink")
    window: int | None = key(None, at_least(), of="sink")
    page_size: int | None = key(None, at_least(), of="paged")
    num_pages: int | None = key(None, at_least(), of="paged quantized")
    bits: int | None = key(None, one_of((2, 4, 8)), of="quantized")
    group_size: int | None = key(None, at_least(), of="quantized")
    residual_length: int | None = key(None, at_least(0), of="quantized")
    key_axis: str | None = key(None, one_of(("channel", "token")), of="quantized")
    value_axis: str | None = key(None, one_of(("channel", "token")), of="quantized")
    layout: str | None = key(None, one_of(("dynamic", "paged")), of="quantized")
    offloading: bool | None = key(None, of="dynamic")

    @property
    def has_pages(self) -> bool:
        """Whether keys and values are kept in pages."""
        return self.name == "paged" or (self.name == "quantized" and self.layout == "paged")


def one_of_several(name: str, value: Any) -> None:
    """A cache's name, or `{name: NAME, OPTION: VALUE, ...}`."""
    given = {"name": value} if isinstance(value, str) else value
    if not isinstance(given, dict) or not isinstance(given.get("name"), str):
        raise UserError(f"{name}={value!r}: allowed is a cache's name, or {{name: NAME, OPTION: VALUE, ...}}")
    check_choice(name, given["name"], CACHES)
    known = cache_options(given["name"])
    for option in given:
        if option not in ("name", *known):
            raise UserError(
                f"{name}: cache {given['name']!r} has no option {option!r}: allowed are {', '.join(known)}"
                f"{near_miss(option, known)}"
            )
    CacheConfig(**given).validate(f"{name}.")


def cache_options(name: str) -> list[str]:
    """The options of the cache of this name; every other one means nothing to it."""
    return [item.name for item in fields(CacheConfig) if name in item.metadata.get("of", "").split()]
