"""How models of other families are read as ours: their configurations, and their tensors one by one.

[`FAMILIES`] and [`TENSORS`] are where a family is registered; one that nobody has registered is tried and proven.
"""

from lckv.families.registered import FAMILIES, Reading, read_model
from lckv.families.tensors import TENSORS, LazyTensors

__all__ = ["FAMILIES", "TENSORS", "LazyTensors", "Reading", "read_model"]
