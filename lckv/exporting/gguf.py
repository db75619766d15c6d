"""A GGUF file for llama.cpp."""

from __future__ import annotations

from lckv.config.names import GGUF
from lckv.exporting.formats import FORMATS, ExportFormat
from lckv.patterns import SharingPlan
from lckv.storage import check_new_file


@FORMATS.register(GGUF)
class GGUFFile(ExportFormat):
    """A model in one file of llama.cpp's."""

    def check(self, plan: SharingPlan | None) -> None:
        """Refuses a file that is there already."""
        check_new_file(self.out, ".gguf")

    def write(self) -> str:
        """Writes the file."""
        raise NotImplementedError
