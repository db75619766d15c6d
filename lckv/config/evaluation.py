"""What can be configured of evaluations: which to run, each one's own settings, and `python -m lckv.evaluate`.

Training has all but the last, too, so nothing of its configuration is known here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lckv.config.cache import CacheConfig
from lckv.config.data import DataConfig
from lckv.config.keys import (
    MODEL_REQUIRED,
    Group,
    Rule,
    at_least,
    each,
    is_named,
    key,
    literal,
    once,
    one_of,
    passes,
    such_that,
)
from lckv.config.names import ATTENTIONS, DTYPES, NO_CACHE
from lckv.errors import UserError, check_whole_number
from lckv.sharing.iteration import CONVERGE

EVALUATIONS = ("perplexity", "harness", "needle", "recall", "speed")
"""Each has a group of settings of its name in [`EvaluationConfig`]."""

DEFAULT_CONTEXT_LENGTH = 2048
"""Tokens that a model sees at once where neither its training nor the user says how many."""

_MADE_FOR = "what the model was made for"


def default_context_length(limit: int, trained_length: int | None) -> int:
    """Tokens that a model sees at once where nothing else is asked for: no positions that are new to it."""
    return min(limit, trained_length or DEFAULT_CONTEXT_LENGTH)


def _batch_size(name: str, value: object) -> None:
    if isinstance(value, str) and value != "auto":
        raise UserError(f"{name}={value!r}: allowed is a whole number, 1 or more, or 'auto'")
    if value != "auto":
        check_whole_number(name, value)


_distinct: Rule = such_that(
    lambda values: values and len(set(values)) == len(values), "allowed are one or more numbers, each of them once"
)
_limit = such_that(
    lambda value: 0 < value < 1 or (value >= 1 and float(value).is_integer()),
    "allowed is a whole number, 1 or more, or a part between 0 and 1",
)


@dataclass
class PerplexityConfig(Group):
    """Sliding evaluation of held-out text: every token is scored once, with as much text before it as there is room.

    Attributes:
        context_length: tokens that the model sees at once; None: `data.block_size` of its training, where that was
            one of `lckv.train`, else as many as it was made for, at most 2048.
        stride: how many tokens the window moves on, each scored once; None: half of `context_length`.
        max_documents: evaluate at most so many documents; None: all.
        cache_chunk: with a cache, how many tokens a forward pass adds to it; 1: as decoding would. None: 32.
    """

    context_length: int | None = key(None, at_least())
    stride: int | None = key(None, at_least())
    max_documents: int | None = key(None, at_least())
    cache_chunk: int | None = key(None, at_least())

    def check(self, prefix: str) -> None:
        """Refuses a window that jumps over tokens, where its length is known."""
        if self.context_length is not None:
            self.window_sizes(self.context_length, None, prefix)

    def window_sizes(self, limit: int, trained_length: int | None, prefix: str) -> tuple[int, int]:
        """Length and stride of the window; the arguments are those of `EvaluationConfig.check_lengths`.

        Raises:
            UserError: for a window that is longer than that, or would jump over tokens.
        """
        context_length = self.context_length or default_context_length(limit, trained_length)
        if context_length > limit:
            raise UserError(f"{prefix}context_length={context_length}: allowed is {limit} or less, {_MADE_FOR}")
        if self.stride is not None and self.stride > context_length:
            raise UserError(
                f"{prefix}stride={self.stride}: allowed is {prefix}context_length={context_length} or less, so that "
                "no token is left out"
            )
        return context_length, self.stride or max(1, context_length // 2)


@dataclass
class HarnessConfig(Group):
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

    tasks: list[str] = key(["lckv_local"], such_that(bool, "name at least one task or group, such as lckv_local"))
    include_path: str | None = literal()
    num_fewshot: int | None = key(None, at_least(0))
    limit: float | None = key(None, _limit)
    batch_size: Any = key(8, _batch_size)
    max_length: int | None = key(None, at_least())
    apply_chat_template: bool = False
    log_samples: bool = False
    output_path: str | None = literal(is_named)
    bootstrap_iters: int = key(100000, at_least(0))

    def check_length(self, limit: int, prefix: str) -> None:
        """Refuses more tokens at once than the `limit` that the model was made for.

        Raises:
            UserError: naming the key.
        """
        if self.max_length is not None and self.max_length > limit:
            raise UserError(f"{prefix}max_length={self.max_length}: allowed is {limit} or less, {_MADE_FOR}")


@dataclass
class NeedleConfig(Group):
    """Needle in a haystack: a sentence to be found again in a long text, at every length and depth.

    Attributes:
        lengths: tokens of the whole prompt; None: quarters of `data.block_size` of its training, where that was one of
            `lckv.train`, else of what the model was made for, at most 2048.
        depths: where the needle lies, from 0 (first) to 1 (last).
        num_samples: prompts for each length and depth.
    """

    lengths: list[int] | None = key(None, _distinct, each(at_least()))
    depths: list[float] = key(
        [0.0, 0.25, 0.5, 0.75, 1.0],
        _distinct,
        each(such_that(lambda value: 0 <= value <= 1, "allowed are numbers from 0 (first) to 1 (last)")),
    )
    num_samples: int = key(10, at_least())


@dataclass
class RecallConfig(Group):
    """Multi-query associative recall: pairs of keys and values, then keys whose values are asked for (MQAR).

    Attributes:
        num_pairs: how many pairs a sequence holds, one measurement each.
        num_queries: how many of them are asked for.
        num_samples: sequences for each number of pairs.
    """

    num_pairs: list[int] = key([4, 8, 16, 32], _distinct, each(at_least()))
    num_queries: int = key(4, at_least())
    num_samples: int = key(50, at_least())

    def check(self, prefix: str) -> None:
        """Refuses more queries than pairs."""
        if self.num_queries > (fewest := min(self.num_pairs)):
            least = f"the least of {prefix}num_pairs"
            raise UserError(f"{prefix}num_queries={self.num_queries}: allowed is at most {fewest}, {least}")


@dataclass
class SpeedConfig(Group):
    """What generation costs in time, for one model; see `lckv.benchmark` for several side by side.

    Attributes:
        prompt_length: tokens of the prompt.
        new_tokens: decoding steps behind it.
        batch_size: how many sequences side by side.
        rounds: how often everything is timed.
    """

    prompt_length: int = key(512, at_least())
    new_tokens: int = key(32, at_least())
    batch_size: int = key(1, at_least())
    rounds: int = key(3, at_least())

    def check_length(self, limit: int, prefix: str) -> None:
        """Refuses sequences that are longer than the `limit` tokens that the model was made for.

        Raises:
            UserError: naming the keys.
        """
        length = self.prompt_length + self.new_tokens
        if length > limit:
            raise UserError(
                f"{prefix}prompt_length={self.prompt_length} and {prefix}new_tokens={self.new_tokens}: make "
                f"{length} tokens, and the model was made for {limit}; lower them"
            )


@dataclass
class EvaluationConfig(Group):
    """Which evaluations to run, and their settings.

    Attributes:
        evals: any of "perplexity", "harness", "needle", "recall" and "speed".
        batch_size: sequences per forward pass, in all but "harness" and "speed". Changes no result, but where a
            cache rounds padding and text together.
        forward_passes: where layers read upward: passes before the last ones, such as the model was trained with;
            `converge`: until its answers are those of decoding token by token.
    """

    evals: list[str] = key([], each(one_of(EVALUATIONS)), once)
    batch_size: int = key(8, at_least())
    perplexity: PerplexityConfig = field(default_factory=PerplexityConfig)
    harness: HarnessConfig = field(default_factory=HarnessConfig)
    needle: NeedleConfig = field(default_factory=NeedleConfig)
    recall: RecallConfig = field(default_factory=RecallConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    forward_passes: Any = key(CONVERGE, passes)

    def check_lengths(self, limit: int, trained_length: int | None, prefix: str) -> None:
        """Finds texts that are too long for a model, before it is trained.

        Args:
            limit: how many tokens the model was made for.
            trained_length: tokens of the sequences that it is trained on, where that is known.
            prefix: what stands before the settings' names in messages.

        Raises:
            UserError: naming the setting.
        """
        if "perplexity" in self.evals:
            self.perplexity.window_sizes(limit, trained_length, f"{prefix}perplexity.")
        if "speed" in self.evals:
            self.speed.check_length(limit, f"{prefix}speed.")
        if "harness" in self.evals:
            self.harness.check_length(limit, f"{prefix}harness.")
        longest, num_pairs = max(self.needle.lengths or [0]), max(self.recall.num_pairs)
        if "needle" in self.evals and longest > limit:
            raise UserError(f"{prefix}needle.lengths={longest}: allowed is {limit} or less, {_MADE_FOR}")
        num_tokens = 2 * (num_pairs + self.recall.num_queries) - 1
        if "recall" in self.evals and num_tokens > limit:
            raise UserError(
                f"{prefix}recall.num_pairs={num_pairs}: makes {num_tokens} tokens with its queries; allowed are "
                f"{limit} or less, {_MADE_FOR}"
            )


@dataclass
class EvaluateConfig(EvaluationConfig):
    """Everything that `python -m lckv.evaluate` needs.

    Attributes:
        model: a run folder of `lckv.train`, a folder with a model and its tokenizer, a GGUF file, or a name on the
            Hub; the models are ours, or Llamas and their like.
        revision: only for the Hub: branch, tag or commit.
        data: the text that is evaluated, and that needles are hidden in: all of it, or its validation text where it
            has some of its own. None given: what the model's training run held out of its text, or of the Bible.
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

    evals: list[str] = key(["perplexity"], each(one_of(EVALUATIONS)), once)
    model: str | None = literal(required=MODEL_REQUIRED)
    revision: str | None = None
    data: DataConfig = field(default_factory=lambda: DataConfig(validation_fraction=1.0))
    cache: CacheConfig = field(default_factory=lambda: CacheConfig(name=NO_CACHE))
    out: str | None = literal(is_named)
    attn_implementation: str | None = key(None, one_of(ATTENTIONS))
    device: str = "auto"
    dtype: str = key("auto", one_of(("auto", *DTYPES)))
    num_threads: int | None = key(None, at_least())
    seed: int = 0
    json: bool = False

    def check(self, prefix: str) -> None:
        """Refuses to evaluate nothing, and a cache of a length that nothing says."""
        if not self.evals:
            raise UserError(f"{prefix}evals=[]: allowed are one or more of {', '.join(EVALUATIONS)}")
        if self.cache.name == "static" and self.cache.max_length is None:
            raise UserError(f"{prefix}cache=static: needs {prefix}cache.max_length, the tokens to make room for")
