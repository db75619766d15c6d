"""From pretrained models to models that share keys and values."""

from lckv.config.names import CALIBRATED, TRAINED
from lckv.conversion.methods import METHODS
from lckv.conversion.pipeline import convert
from lckv.conversion.settings import adopt_source, model_settings, plan_of
from lckv.conversion.source import Source
from lckv.conversion.target import RECORD, source_config_of, write_trained

__all__ = [
    "CALIBRATED",
    "METHODS",
    "RECORD",
    "TRAINED",
    "Source",
    "adopt_source",
    "convert",
    "model_settings",
    "plan_of",
    "source_config_of",
    "write_trained",
]
