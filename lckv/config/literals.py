"""Keys for text that the command line takes as it stands."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def literal() -> Any:
    """A key for text that the command line takes as it stands, up to the end of the argument; None by default.

    Nothing in it means anything to Hydra: neither commas, quotes and braces nor `null` or `${...}`.
    """
    return field(default=None, metadata={"literal": True})
