"""The file with everything that is known about one model: `results.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lckv.errors import UserError
from lckv.training.run_folder import write_atomically


class ResultsFile:
    """Gathers the figures of one model, those of several calls, too.

    Args:
        path: the file.
        identity: `name`, what the user calls the model, and `fingerprint`, a short name for its weights.

    Attributes:
        common: what every call writes anew, beside the evaluations.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self.identity = identity
        self.common: dict[str, Any] = {}

    def check(self) -> None:
        """Finds out whether the file can be written, and is this model's if it is there.

        Raises:
            UserError: if not.
        """
        self._evaluations()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"out={self.path.parent}: cannot be made ({error.strerror}); give another out=") from error

    def add(self, name: str, figures: Mapping[str, Any]) -> dict[str, Any]:
        """Writes the figures of an evaluation beside those of others, whole or not at all.

        Returns:
            Everything that the file then holds.
        """
        # Read again: another process may have added something meanwhile.
        return self._write(self._evaluations() | {name: dict(figures)})

    def touch(self) -> dict[str, Any]:
        """Writes what does not come from evaluations, and returns everything that the file then holds."""
        return self._write(self._evaluations())

    def _write(self, evaluations: Mapping[str, Any]) -> dict[str, Any]:
        results = {"model": dict(self.identity), "evaluations": dict(evaluations), **self.common}
        write_atomically(self.path, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
        return results

    def _evaluations(self) -> dict[str, Any]:
        """What lies there already."""
        if not self.path.is_file():
            return {}
        try:
            results = json.loads(self.path.read_text(encoding="utf-8"))
            model, evaluations = results["model"], dict(results["evaluations"])
            fingerprint = model["fingerprint"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path}: holds no results of lckv.evaluate; give another out=") from error
        if fingerprint != self.identity["fingerprint"]:
            raise UserError(
                f"{self.path}: holds the results of other weights ({model.get('name')}); give another out=, "
                "or remove the file"
            )
        return evaluations
