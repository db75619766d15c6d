"""MLPs with SiLU as wider ones with GELU, nearly: for an architecture of llama.cpp that has no other activation.

The logistic function is close to a mixture of three normal distribution functions (Monahan and Stefanski, 1992), so
that SiLU is close to a sum of three GELUs. Every unit becomes three.
"""

from __future__ import annotations

import copy

import torch

from lckv.exporting.gguf_plain import Weights
from lckv.exporting.gguf_reuse import GELU
from lckv.models import LCKVLlamaConfig

GELUS = (
    (0.35479775, 0.84633671),
    (0.53718813, 0.53616427),
    (0.10801412, 0.34083863),
)
"""Weights p and slopes s for which the sum of p / s * gelu(s * x) is nearest to silu(x): 2e-4 at the most, anywhere.
Fitted to the approximation of GELU by a hyperbolic tangent, which is what is computed."""


def approximate_silu(config: LCKVLlamaConfig, weights: Weights) -> tuple[LCKVLlamaConfig, Weights]:
    """A model whose MLPs have GELU and are three times as wide, and compute nearly the same.

    Args:
        config: of a model with SiLU.
        weights: of its plain Llama, by our names.
    """
    wider = copy.deepcopy(config)
    wider.hidden_act, wider.intermediate_size = GELU[0], len(GELUS) * config.intermediate_size
    factors = {
        ".gate_proj.": [slope for _, slope in GELUS],
        ".up_proj.": [1.0] * len(GELUS),
        ".down_proj.": [weight / slope for weight, slope in GELUS],
    }
    widened = dict(weights)
    for name, tensor in weights.items():
        for part, scales in factors.items():
            if part in name:
                dim = 1 if part == ".down_proj." else 0  # of `(hidden_size, intermediate_size)`, or the other way
                widened[name] = torch.cat([tensor * scale for scale in scales], dim)
    return wider, widened
