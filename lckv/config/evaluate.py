"""What can be configured of `python -m lckv.evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, field

from lckv.config.cache import CacheConfig
from lckv.config.data import DataConfig
from lckv.config.evaluation import EVALUATIONS, EvaluationConfig, an_evaluation
from lckv.config.keys import MODEL_REQUIRED, at_least, each, key, literal, once, one_of
from lckv.config.names import ATTENTIONS, DTYPES, NO_CACHE
from lckv.errors import UserError


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

    evals: list[str] = key(["perplexity"], each(an_evaluation), once)
    model: str | None = literal(required=MODEL_REQUIRED)
    revision: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    cache: CacheConfig = field(default_factory=lambda: CacheConfig(name=NO_CACHE))
    out: str | None = literal()
    attn_implementation: str | None = key(None, one_of(*ATTENTIONS))
    device: str = "auto"
    dtype: str = key("auto", one_of("auto", *DTYPES))
    num_threads: int | None = key(None, at_least())
    seed: int = 0
    json: bool = False

    def check(self, prefix: str) -> None:
        """Refuses to evaluate nothing, and a cache of a length that nothing says."""
        if not self.evals:
            raise UserError(f"{prefix}evals=[]: allowed are one or more of {', '.join(EVALUATIONS)}")
        if self.cache.name == "static" and self.cache.max_length is None:
            raise UserError(f"{prefix}cache=static: needs {prefix}cache.max_length, the tokens to make room for")
