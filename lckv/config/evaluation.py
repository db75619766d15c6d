"""What can be configured of evaluations: which to run, and each one's own settings.

Training has these, too, so nothing of its configuration is known here; see `lckv.config.evaluate`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lckv.config.literals import literal


@dataclass
class PerplexityConfig:
    """Sliding evaluation of held-out text: every token is scored once, with as much text before it as there is room.

    Attributes:
        context_length: tokens that the model sees at once; None: `data.block_size` of its training, where that was
            one of `lckv.train`, else as many as it was made for, at most 2048.
        stride: how many tokens the window moves on, each scored once; None: half of `context_length`.
        max_documents: evaluate at most so many documents; None: all.
        cache_chunk: with a cache, how many tokens a forward pass adds to it; 1: as decoding would. None: 32.
    """

    context_length: int | None = None
    stride: int | None = None
    max_documents: int | None = None
    cache_chunk: int | None = None


@dataclass
class HarnessConfig:
    """LM-Harness (lm-eval): its own options, under its own names.

    Attributes:
        tasks: names of tasks and groups; `lckv_papers` are the seven of the LCKV papers, `lckv_local` those that come
            with this package and need no download.
        include_path: a folder with task YAML files of your own.
        num_fewshot: examples before each question; None: the task's own number.
        limit: at most so many questions of each task, or below 1 that part of them; None: all.
        batch_size: sequences per forward pass, or `auto`: as many as fit.
        max_length: tokens that the model sees at once; None: as many as it was made for, those behind the length
            that it was trained on too.
        apply_chat_template: whether questions are put as messages of a chat.
        log_samples: whether to write every question with the model's answer, to `output_path`.
        output_path: the folder for lm-eval's own files; None: with `log_samples` it is `harness/` beside the results,
            else it writes none.
        bootstrap_iters: how often lm-eval draws anew for standard errors; 0: none.
    """

    tasks: list[str] = field(default_factory=lambda: ["lckv_local"])
    include_path: str | None = literal()
    num_fewshot: int | None = None
    limit: float | None = None
    batch_size: Any = 8
    max_length: int | None = None
    apply_chat_template: bool = False
    log_samples: bool = False
    output_path: str | None = literal()
    bootstrap_iters: int = 100000


@dataclass
class NeedleConfig:
    """Needle in a haystack: a sentence to be found again in a long text, at every length and depth.

    Attributes:
        lengths: tokens of the whole prompt; None: quarters of `data.block_size` of its training, where that was one of
            `lckv.train`, else of what the model was made for, at most 2048.
        depths: where the needle lies, from 0 (first) to 1 (last).
        num_samples: prompts for each length and depth.
    """

    lengths: list[int] | None = None
    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    num_samples: int = 10


@dataclass
class RecallConfig:
    """Multi-query associative recall: pairs of keys and values, then keys whose values are asked for (MQAR).

    Attributes:
        num_pairs: how many pairs a sequence holds, one measurement each.
        num_queries: how many of them are asked for.
        num_samples: sequences for each number of pairs.
    """

    num_pairs: list[int] = field(default_factory=lambda: [4, 8, 16, 32])
    num_queries: int = 4
    num_samples: int = 50


@dataclass
class SpeedConfig:
    """What generation costs in time, for one model; see `lckv.benchmark` for several side by side.

    Attributes:
        prompt_length: tokens of the prompt.
        new_tokens: decoding steps behind it.
        batch_size: how many sequences side by side.
        rounds: how often everything is timed.
    """

    prompt_length: int = 512
    new_tokens: int = 32
    batch_size: int = 1
    rounds: int = 3


@dataclass
class EvaluationConfig:
    """Which evaluations to run, and their settings.

    Attributes:
        evals: any of "perplexity", "harness", "needle", "recall" and "speed".
        batch_size: sequences per forward pass, in all but "harness" and "speed". Changes no result, but where a
            cache rounds padding and text together.
    """

    evals: list[str] = field(default_factory=list)
    batch_size: int = 8
    perplexity: PerplexityConfig = field(default_factory=PerplexityConfig)
    harness: HarnessConfig = field(default_factory=HarnessConfig)
    needle: NeedleConfig = field(default_factory=NeedleConfig)
    recall: RecallConfig = field(default_factory=RecallConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
