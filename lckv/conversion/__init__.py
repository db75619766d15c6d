"""From pretrained models to models that share keys and values."""

from lckv.conversion.methods import CALIBRATED, METHODS, TRAINED
from lckv.conversion.pipeline import convert
from lckv.conversion.settings import adopt_source, check_calibration, model_settings, plan_of
from lckv.conversion.source import Source
from lckv.conversion.target import RECORD, source_config_of, write_trained

__all__ = [
    "CALIBRATED",
    "METHODS",
    "RECORD",
    "TRAINED",
    "Source",
    "adopt_source",
    "check_calibration",
    "convert",
    "model_settings",
    "plan_of",
    "source_config_of",
    "write_trained",
]
