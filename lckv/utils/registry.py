"""Name -> object tables: how patterns, data sources and caches are added in one place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from lckv.errors import UserError, near_miss

T = TypeVar("T")


class Registry(Generic[T]):
    """A table of named objects of one kind, whose look-up errors name the nearest entry.

    Args:
        kind: what the entries are, as error messages call them, e.g. `"sharing pattern"`.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds the decorated object under `name`."""

        def add(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = entry
            return entry

        return add

    def __getitem__(self, name: str) -> T:
        """Returns the entry called `name`.

        Raises:
            UserError: if there is none; the message lists the names and the nearest one.
        """
        if name not in self._entries:
            names = sorted(self._entries)
            raise UserError(f"unknown {self.kind} {name!r}: allowed are {', '.join(names)}{near_miss(name, names)}")
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries
