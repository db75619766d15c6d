"""What can be configured of `python -m lckv.evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, field

from lckv.config.evaluation import EvaluationConfig
from lckv.config.generation import CacheConfig
from lckv.config.literals import literal
from lckv.config.training import DataConfig


@dataclass
class EvaluateConfig(EvaluationConfig):
    """Everything that `python -m lckv.evaluate` needs.

    Attributes:
        model: a run folder of `lckv.train`, a folder with a model and its tokenizer, a GGUF file, or a name on the
            Hub; the models are ours, or Llamas and their like.
        revision: only for the Hub: branch, tag or commit.
        data: the text; its validation split is what is evaluated, and what needles are hidden in.
        cache: what keys and values go through; `cache=none`: each forward pass has its own.
        out: the folder for `results.json`, where results of other evaluations stay; None: `evaluation/` in a run
            folder, or one in `runs/evaluation/`.
        attn_implementation: as in `model.attn_implementation` of `lckv.train`; None: as the model was saved.
        device: such as "cpu", "cuda" or "cuda:1"; "auto": an accelerator, if there is one.
        dtype: "float32", "bfloat16" or "float16"; "auto": as the model was saved.
        num_threads: torch's threads on a CPU; None: torch's own choice.
        seed: of whatever is drawn.
        json: whether to print one JSON object instead of the tables.
    """

    evals: list[str] = field(default_factory=lambda: ["perplexity"])
    model: str | None = literal()
    revision: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    cache: CacheConfig = field(default_factory=lambda: CacheConfig(name="none"))
    out: str | None = literal()
    attn_implementation: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    num_threads: int | None = None
    seed: int = 0
    json: bool = False
