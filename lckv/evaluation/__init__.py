"""Measuring a trained model: perplexity, tasks, retrieval and speed, each one function in a module of its own.

Nothing is imported here: the training imports parts of this package, and names are checked before torch is loaded.
"""

from __future__ import annotations

MODULES = {
    "perplexity": "lckv.evaluation.sliding",
    "harness": "lckv.evaluation.harness",
    "needle": "lckv.evaluation.needle",
    "recall": "lckv.evaluation.recall",
    "speed": "lckv.benchmarking.speed",
}
"""Where each evaluation is: the module that registers it in `lckv.evaluation.evaluations.EVALUATIONS` under its name.

By name, because one of them needs what lies above this package.
"""
