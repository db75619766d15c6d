"""A folder that transformers loads on a machine without this package."""

from __future__ import annotations

from lckv.config.names import HUB
from lckv.exporting.formats import FORMATS, ExportFormat
from lckv.patterns import SharingPlan
from lckv.storage import check_new_folder


@FORMATS.register(HUB)
class HubFolder(ExportFormat):
    """A model folder with the code that it needs."""

    def check(self, plan: SharingPlan | None) -> None:
        """Refuses a folder that is there already."""
        check_new_folder(self.out)

    def write(self) -> str:
        """Writes the folder."""
        raise NotImplementedError
