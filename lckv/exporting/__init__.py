"""Models in the forms that other programs read: one file for each format, registered under its name."""

from lckv.exporting import gguf, hub
from lckv.exporting.formats import FORMATS, ExportFormat

__all__ = ["FORMATS", "ExportFormat", "gguf", "hub"]
