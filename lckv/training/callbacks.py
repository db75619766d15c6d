"""What a run measures, shows and writes down while it trains, one callback for each thing.

Callbacks see `logs` in the order in which they were added: those that measure add their values to it, those behind
them write it out. They are told apart by what they are, not by what they hold: hence `eq=False`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from transformers import (
    BatchEncoding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers import TrainingArguments as Arguments

from lckv.config import TrainConfig
from lckv.config.names import LOSS_PARTS
from lckv.errors import UserError
from lckv.evaluation.evaluations import Outcome, Subject, run_evaluations
from lckv.evaluation.perplexity import in_eval_mode
from lckv.evaluation.results_file import scalar_figures
from lckv.training.run_folder import RunFolder
from lckv.utils.environment import peak_flops, peak_memory_bytes

logger = logging.getLogger(__name__)

Evaluate = Callable[[], Iterable[tuple[str, Outcome]]]
"""Evaluates the model that is trained, and yields each evaluation's name and outcome."""


class RhythmCallback(TrainerCallback):
    """Decides what happens at which step, beside what transformers' own flow of control decides.

    Before every checkpoint the metrics are logged, so that each logging window lies between two checkpoints and a
    run that goes on from one logs the same values again. At the end, everything happens.

    Args:
        periods: log every so many steps, because there a sample is taken, say; None: at the end.
    """

    def __init__(self, *periods: int | None) -> None:
        self.periods = periods

    def on_step_end(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Turns on what is due."""
        # Behind transformers' own callback, which has set what its periods ask for; nothing is ever turned off here.
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True
        if control.should_save or control.should_evaluate or any(is_due(state, period) for period in self.periods):
            control.should_log = True


def is_due(state: TrainerState, every: int | None) -> bool:
    """Whether something that happens every so many steps, and at the end, happens now."""
    return state.global_step >= state.max_steps or (every is not None and state.global_step % every == 0)


@dataclass(eq=False, kw_only=True)
class FiguresCallback(TrainerCallback):
    """Adds how fast the training is, what its loss means, and the first process's peak memory.

    Time spent in evaluation, sampling and saving counts as seconds and for the ETA, but not for the tokens per
    second. The bytes of the training text are not counted: its bits per byte take the validation text's bytes per
    token, and are exact as far as the two texts are alike.

    Args:
        tokens_per_step: tokens of a global batch.
        num_blocks: blocks of the training data, for the epoch.
        global_batch_size: blocks per step.
        flops_per_token: FLOPs of training on one token, iterations counted.
        precision: as in `trainer.precision`.
        bytes_per_token: UTF-8 bytes that a predicted token of the validation text stands for, on average.
        seconds_before: how long earlier sessions of this run took.
    """

    tokens_per_step: int
    num_blocks: int
    global_batch_size: int
    flops_per_token: float | None
    precision: str
    bytes_per_token: float | None
    seconds_before: float = 0.0

    def on_train_begin(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Starts the clocks."""
        self._first_step = self._logged_step = state.global_step
        self._start = self._mark = time.perf_counter()
        self._training_seconds = 0.0

    def on_step_end(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Counts the time since the last step, or since what came between."""
        now = time.perf_counter()
        self._training_seconds += now - self._mark
        self._mark = now

    def on_log(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Adds the measurements."""
        logs = kwargs["logs"]
        logs["tokens"] = state.global_step * self.tokens_per_step
        logs["epoch"] = round(state.global_step * (self.global_batch_size / self.num_blocks), 4)
        if "loss" in logs:
            self._add_speed(args, state, logs)
            loss = text_loss(logs)
            logs["perplexity"] = math.exp(min(loss, 700.0))
            if self.bytes_per_token:
                logs["bits_per_byte"] = loss / math.log(2) / self.bytes_per_token
            logs["peak_memory_bytes"] = peak_memory_bytes(args.device)
        self._mark = time.perf_counter()

    def _add_speed(self, args: Arguments, state: TrainerState, logs: dict[str, Any]) -> None:
        num_steps, self._logged_step = state.global_step - self._logged_step, state.global_step
        logs["tokens_per_second"] = round(num_steps * self.tokens_per_step / self._training_seconds, 1)
        self._training_seconds = 0.0
        # Model FLOPs utilisation: what the formula says training takes, over what all devices could do at best.
        peak = peak_flops(args.device, self.precision)
        if peak and self.flops_per_token:
            logs["mfu"] = logs["tokens_per_second"] * self.flops_per_token / (peak * args.world_size)
        seconds = time.perf_counter() - self._start
        logs["seconds"] = round(self.seconds_before + seconds, 3)
        steps_left = state.max_steps - state.global_step
        logs["eta_seconds"] = round(seconds / (state.global_step - self._first_step) * steps_left, 1)

    def on_save(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leaves what has just been done, a checkpoint or an evaluation, out of the speed."""
        self._mark = time.perf_counter()

    on_evaluate = on_save


def text_loss(logs: dict[str, Any]) -> float:
    """The cross entropy with the text in training metrics: the loss, or beside another loss, such as a teacher's."""
    return float(logs.get("loss_labels", logs["loss"]))


@dataclass(eq=False)
class SampleCallback(TrainerCallback):
    """Adds a text that the model writes, at every `sample_steps` steps and at the end.

    Args:
        generate: gets the model and returns the text.
        sample_steps: how often.
        on_every_process: whether all processes must call the model together, because it is sharded.
    """

    generate: Callable[[PreTrainedModel], str]
    sample_steps: int | None
    on_every_process: bool

    def on_log(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Adds the sample to the training metrics of the steps that are due."""
        logs = kwargs["logs"]
        if "loss" in logs and is_due(state, self.sample_steps):
            if state.is_world_process_zero or self.on_every_process:
                logs["sample"] = self.generate(kwargs["model"])


def check_sample_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> None:
    """Raises a UserError if the prompt has no token to be continued."""
    if not tokenizer(prompt)["input_ids"]:
        raise UserError(
            f"trainer.sample_prompt={prompt!r}: encodes to no token with this tokenizer, which adds none of its own; "
            "give some text"
        )


SAMPLING, SAMPLING_SEED = {"temperature": 0.8, "top_k": 50}, 0
"""How samples are drawn: the likeliest text of a small model soon repeats itself."""


def sample_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, inputs: BatchEncoding, num_tokens: int, start: int = 0
) -> str:
    """Continues a prompt by up to `num_tokens` drawn at random, the same draw each time; the random state stays.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        inputs: the prompt's `input_ids` and `attention_mask`, each `(1, num_tokens)`.
        num_tokens: how many tokens at most.
        start: how many of the first tokens are left out of what is returned.
    """
    inputs = inputs.to(model.device)
    room = model.config.max_position_embeddings - inputs["input_ids"].shape[1]
    # A compiled layer would be compiled again for the lengths that only decoding has.
    with in_eval_mode(model), torch.compiler.set_stance("force_eager"):
        torch.manual_seed(SAMPLING_SEED)
        output = model.generate(  # type: ignore[operator]
            **inputs,
            max_new_tokens=max(1, min(num_tokens, room)),
            do_sample=True,
            **SAMPLING,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
    return str(tokenizer.decode(output[0, start:], skip_special_tokens=True))


def build_evaluate(
    cfg: TrainConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: RunFolder
) -> Evaluate | None:
    """What evaluates the model during training, if anything is to.

    Raises:
        UserError: for texts that are longer than the model allows, and for tasks that cannot be had.
    """
    if not cfg.evaluation.evals:
        return None
    cfg.evaluation.check_lengths(model.config.max_position_embeddings, cfg.data.block_size, "evaluation.")
    if "harness" in cfg.evaluation.evals:
        from lckv.evaluation.harness import check_installed
        from lckv.evaluation.harness_tasks import check_tasks

        check_installed()
        check_tasks(cfg.evaluation.harness, "evaluation.harness.")
    subject = Subject(
        model,
        tokenizer,
        cfg.data,
        seed=cfg.seed,
        trained_length=cfg.data.block_size,
        folder=folder.path / "evaluation",
        key_prefix="evaluation.",
    )
    return partial(run_evaluations, subject, cfg.evaluation, {"cache": {"name": "none"}})


@dataclass(eq=False)
class EvaluationsCallback(TrainerCallback):
    """Adds the numbers among the figures of evaluations, every so many steps and at the end.

    One process evaluates, and the others wait. An evaluation that cannot be done says why, and the training goes on.

    Attributes:
        evaluate: runs the evaluations.
        every: how often; `None`: at the end.
        wait: makes the processes wait for each other.
        pause: takes the training's own bar away meanwhile.
        figures: what the last evaluations came to, by their names; `None`: there were none yet.
    """

    evaluate: Evaluate
    every: int | None
    wait: Callable[[], None]
    pause: Callable[[], AbstractContextManager[None]]
    figures: dict[str, dict[str, Any]] | None = None

    def on_log(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Adds the numbers to the training metrics of the steps that are due, as `perplexity/word_perplexity`."""
        logs = kwargs["logs"]
        if "loss" not in logs or not is_due(state, self.every):
            return
        if state.is_world_process_zero:
            logs.update(scalar_figures(self.run()))
        self.wait()

    def run(self) -> Mapping[str, dict[str, Any]]:
        """Runs the evaluations and keeps their figures."""
        self.figures = {}
        # A compiled layer would be compiled again for every length.
        with self.pause(), torch.compiler.set_stance("force_eager"):
            for name, outcome in self.evaluate():
                if isinstance(outcome, UserError):
                    logger.warning("%s: %s", name, outcome)
                    self.figures[name] = {"error": str(outcome)}
                else:
                    self.figures[name] = outcome
                    for part, line in outcome.get("errors", {}).items():
                        logger.warning("%s: %s: %s", name, part, line)
        return self.figures


@dataclass(eq=False)
class MetricsFileCallback(TrainerCallback):
    """Writes every log as a line of `metrics.jsonl`."""

    folder: RunFolder

    def on_log(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Writes the line; transformers' own summary at the end of training is left out."""
        logs = kwargs["logs"]
        if state.is_world_process_zero and ("loss" in logs or "eval_loss" in logs):
            self.folder.append_metrics({"step": state.global_step, **logs})


class ProgressCallback(TrainerCallback):
    """A bar with loss, tokens per second and ETA on a terminal; elsewhere a line per log.

    Args:
        console: where to show it.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._training = self._progress.add_task("training", shown="", visible=False)
        self._evaluating = self._progress.add_task("evaluating", shown="", visible=False)

    def on_train_begin(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Shows the bar."""
        if state.is_world_process_zero:
            self._progress.update(
                self._training, total=state.max_steps, completed=state.global_step, visible=True, refresh=True
            )
            self._progress.start()

    def on_step_end(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Moves the bar."""
        self._progress.update(self._training, completed=state.global_step)

    def on_eval_batch(self, number: int, total: int) -> None:
        """Moves the bar of the evaluation."""
        self._progress.update(self._evaluating, completed=number, total=total, visible=number < total)

    def on_log(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Shows the new values."""
        logs = kwargs["logs"]
        if not state.is_world_process_zero:
            return
        if "eval_loss" in logs:
            bits = logs.get("eval_bits_per_byte")
            shown = f"validation: loss {logs['eval_loss']:.3f}  perplexity {logs['eval_perplexity']:,.2f}"
            if "eval_preference_accuracy" in logs:
                shown += f"  pairs ranked right {logs['eval_preference_accuracy']:.1%}"
            self._print(state, shown if bits is None else f"{shown}  bits per byte {bits:.3f}")
        elif "loss" in logs:
            shown = _describe_training(logs)
            self._progress.update(self._training, shown=shown)
            if not self.console.is_terminal:
                self._print(state, shown)
            if "sample" in logs:
                self._print(state, f"sample: {' '.join(logs['sample'].split())}")

    def _print(self, state: TrainerState, text: str) -> None:
        self.console.print(f"step {state.global_step}/{state.max_steps}  {text}")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Takes the bar away while others are shown."""
        was_started = self._progress.live.is_started
        self._progress.stop()
        try:
            yield
        finally:
            if was_started:
                self._progress.start()

    def close(self) -> None:
        """Takes the bar away."""
        self._progress.stop()


def _describe_training(logs: dict[str, Any]) -> str:
    parts = [f"loss {logs['loss']:.3f}", f"ppl {logs['perplexity']:,.1f}", f"{logs['tokens_per_second']:,.0f} tok/s"]
    if "loss_labels" in logs:
        parts.insert(1, f"({describe_loss_parts(logs)})")
    if "mfu" in logs:
        parts.append(f"MFU {logs['mfu']:.1%}")
    if "kv_residual" in logs:
        parts.append(f"KV residual {logs['kv_residual']:.1e}")
    parts.append(f"ETA {format_duration(logs['eta_seconds'])}")
    return "  ".join(parts)


def describe_loss_parts(values: dict[str, Any]) -> str:
    """The parts of a loss against a teacher, or what is measured beside one of pairs, that are among `values`."""
    names = [name for name in LOSS_PARTS if f"loss_{name}" in values]
    return ", ".join(f"{name} {values[f'loss_{name}']:.4f}" for name in names)


def format_duration(seconds: float) -> str:
    """Seconds as `1:02` or `3:04:05`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
