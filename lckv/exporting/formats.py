"""What every export format does, and the table of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from lckv.config import ExportConfig
from lckv.sharing.patterns import SharingPlan
from lckv.utils.registry import Registry


class ExportFormat(ABC):
    """One way to write a model down for others.

    Args:
        cfg: what is asked for, checked.

    Attributes:
        model: what the user calls the model.
        out: the file or folder to write.
    """

    def __init__(self, cfg: ExportConfig) -> None:
        assert cfg.model is not None and cfg.out is not None  # checked
        self.cfg, self.model, self.out = cfg, cfg.model, Path(cfg.out).expanduser()

    @abstractmethod
    def check(self, plan: SharingPlan | None) -> None:
        """Refuses, without torch, what cannot be exported, and a place that cannot be written.

        Args:
            plan: the model's sharing pattern; None where only a slower look can tell.

        Raises:
            UserError: for the first mistake.
        """

    @abstractmethod
    def write(self) -> str:
        """Loads the model and writes it, whole or not at all.

        Returns:
            What was made, in a few words.

        Raises:
            UserError: for what `check` could not see.
        """


FORMATS: Registry[type[ExportFormat]] = Registry("export format")
"""The formats by name."""
