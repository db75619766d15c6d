"""LM-Harness: tasks of lm-eval, with our model handed in, through any cache."""

from __future__ import annotations

import copy
import io
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from transformers import Cache, PreTrainedModel

from lckv.cache import KVCache, build_cache
from lckv.config import EvaluationConfig, HarnessConfig
from lckv.errors import UserError, is_out_of_memory
from lckv.evaluation.evaluations import Subject
from lckv.evaluation.harness_tasks import LoadedTasks, first_line, join_errors, load_tasks
from lckv.utils.logits import check_logits
from lckv.utils.storage import check_folder

logger = logging.getLogger(__name__)

_FLOATS_PER_LOGIT = 3
"""Logits, their logarithms, and what comes and goes in between."""


def harness(subject: Subject, cfg: EvaluationConfig) -> dict[str, Any]:
    """Runs tasks of lm-eval.

    Returns:
        `tasks` and `groups`: for each, its metrics and their standard errors (`acc`, `acc_stderr`); those behind a
        filter carry its name, as in `exact_match,strict-match`. `errors`: why a task could not be loaded, or done.
        `num_fewshot` and `num_samples` of each task, `limit` and `lm_eval_version`.

    Raises:
        UserError: if lm-eval is not installed, for settings out of range, unknown tasks, and if no task can be done.
    """
    options, prefix = cfg.harness, f"{subject.key_prefix}harness."
    limit = subject.model.config.max_position_embeddings
    # What lm-eval would ignore, or fail on after the model has run.
    options.check_length(limit, prefix)
    if options.apply_chat_template and subject.tokenizer.chat_template is None:
        raise UserError(f"{prefix}apply_chat_template=True: the tokenizer has no chat template; allowed is False")
    output_path = _output_path(options, subject, prefix)
    with _undisturbed():
        check_installed()
        loaded = load_tasks(options, options.max_length or limit, prefix)
        evaluate = partial(_evaluate, subject, options, loaded.manager, output_path)
        results = _evaluate_all(evaluate, loaded, f"{prefix}tasks={options.tasks}")
    # Some tasks are made for no examples, and lm-eval leaves them so.
    fixed = [name for name, number in results["n-shot"].items() if number != options.num_fewshot]
    if options.num_fewshot is not None and fixed:
        logger.warning("%snum_fewshot=%d: not so for %s", prefix, options.num_fewshot, ", ".join(fixed))
    return _summary(results, loaded, options)


def check_installed() -> None:
    """Raises a UserError that says what to install, unless lm-eval is there."""
    try:
        import lm_eval.evaluator  # noqa: F401
    except ImportError as error:
        raise UserError(f"needs lm-eval ({error}); pip install lckv[eval]") from error


def _output_path(options: HarnessConfig, subject: Subject, prefix: str) -> str | None:
    """Where lm-eval's own files go: to the given place, or if there must be one, beside `results.json`.

    lm-eval writes when all is done, and only logs it if it cannot.

    Raises:
        UserError: if there is no such place, or nothing can be written there.
    """
    path = None if options.output_path is None else Path(options.output_path).expanduser()
    if path is None and options.log_samples:
        if subject.folder is None:
            raise UserError(f"{prefix}log_samples=True: needs {prefix}output_path, the folder to write them to")
        path = subject.folder / "harness"
    if path is None:
        return None
    folder = path.parent if path.suffix == ".json" else path  # a file's name gets the date behind it
    check_folder(folder, f"{prefix}output_path={str(path)!r}")
    folder.mkdir(parents=True, exist_ok=True)
    return str(path)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keeps to itself what lm-eval does to the process: it prints, logs and sets environment variables."""
    lm_eval_logger = logging.getLogger("lm_eval")
    environment, level = dict(os.environ), lm_eval_logger.level
    lm_eval_logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        lm_eval_logger.setLevel(level)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


def _evaluate_all(evaluate: Callable[[list[Any]], dict[str, Any]], loaded: LoadedTasks, given: str) -> dict[str, Any]:
    """All tasks together; where one cannot be done, each alone, so that it keeps no other from its figures."""
    try:
        return evaluate(loaded.specs)
    except Exception as error:  # whatever is wrong in the documents or the code of a task
        if is_out_of_memory(error):
            raise
        logger.debug("%s", given, exc_info=error)
    results: dict[str, Any] = {"results": {}, "n-shot": {}, "n-samples": {}}
    for name, task in loaded.tasks.items():
        try:
            of_task = evaluate([task])
        except Exception as error:
            if is_out_of_memory(error):
                raise
            logger.debug("%s", name, exc_info=error)
            loaded.errors[name] = first_line(error)
        else:
            for key, figures in results.items():
                figures |= of_task[key]
    if not results["results"]:
        raise UserError(f"{given}: none can be done; {join_errors(loaded.errors)}")
    return results


def _evaluate(
    subject: Subject, options: HarnessConfig, manager: Any, output_path: str | None, specs: list[Any]
) -> dict[str, Any]:
    """Lets lm-eval do it, and writes its files."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.loggers import EvaluationTracker

    tracker = EvaluationTracker(output_path=output_path)
    results = simple_evaluate(
        model=make_language_model(subject, options),
        model_args={"pretrained": subject.model.name_or_path or subject.model.config.model_type},
        tasks=specs,
        task_manager=manager,
        num_fewshot=options.num_fewshot,
        batch_size=options.batch_size,
        limit=options.limit,
        bootstrap_iters=options.bootstrap_iters,
        log_samples=options.log_samples,
        apply_chat_template=options.apply_chat_template,
        evaluation_tracker=tracker,
        random_seed=subject.seed,
        numpy_random_seed=subject.seed,
        torch_random_seed=subject.seed,
        fewshot_random_seed=subject.seed,
    )
    if output_path is not None:
        samples = results.pop("samples", {})
        tracker.save_results_aggregated(results=results, samples=samples)
        for name, rows in samples.items():
            tracker.save_results_samples(task_name=name, samples=rows)
    return results


def _summary(results: dict[str, Any], loaded: LoadedTasks, options: HarnessConfig) -> dict[str, Any]:
    from lm_eval import __version__
    from lm_eval.utils import handle_non_serializable

    names = [name for name in loaded.tasks if name in results["results"]]
    summary = {
        "tasks": {name: _figures(results["results"][name]) for name in names},
        "groups": {name: _figures(figures) for name, figures in results.get("groups", {}).items()},
        "errors": loaded.errors,
        "num_fewshot": {name: results["n-shot"][name] for name in names},
        "num_samples": {name: results["n-samples"][name]["effective"] for name in names},
        "limit": options.limit if options.limit is None or options.limit < 1 else int(options.limit),
        "lm_eval_version": __version__,
    }
    return json.loads(json.dumps(summary, default=handle_non_serializable))


def _figures(figures: dict[str, Any]) -> dict[str, Any]:
    """Metrics under their names; what lm-eval calls `acc,none` has gone through no filter."""
    return {
        key.removesuffix(",none"): None if value == "N/A" else value for key, value in figures.items() if "," in key
    }


def make_language_model(subject: Subject, options: HarnessConfig) -> Any:
    """The `lm_eval.api.model.LM` for a subject; its class is made here, because lm-eval is optional."""
    from lm_eval.models.huggingface import HFLM

    class SubjectLM(HFLM):
        """Scores and continues by the subject's model and cache; all else is lm-eval's own."""

        add_bos_token: Any  # an option of lm-eval's: `None` leaves it to the tokenizer

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            # lm-eval puts bos before such a text itself; one that the tokenizer adds would be scored.
            before, self.add_bos_token = self.add_bos_token, False
            try:
                return super().loglikelihood_rolling(requests, disable_tqdm)
            finally:
                self.add_bos_token = before

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            longest = max((len(answer) for _, _, answer in requests), default=0)
            if longest > self.max_length:
                raise UserError(
                    f"an answer of {longest} tokens does not fit the {self.max_length} that the model sees at once"
                )
            return super()._loglikelihood_tokens(requests, *args, **kwargs)

        def _model_call(
            self, inps: torch.Tensor, attn_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None
        ) -> torch.Tensor:
            # Without the mask: padding is on the right, where no token that counts can see it.
            logits = score(self.model, inps, subject.new_cache)
            check_logits(logits.flatten(0, 1), "the model's logits")
            return logits

        def _model_generate(
            self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
        ) -> torch.Tensor:
            past = build_cache("dynamic", self.model.config) if subject.new_cache is None else subject.new_cache()
            # transformers would compile the steps of a static cache by itself.
            own = {"past_key_values": past, "disable_compile": True, "logits_processor": [_checked]}
            return super()._model_generate(context, max_length, stop, **own, **generation_kwargs)

        def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
            if self.device.type != "cpu":
                return super()._detect_batch_size(requests, pos)
            # lm-eval tries until memory runs out, which on a CPU ends the process.
            num_tokens = self.max_length if requests is None else len(requests[pos][1] + requests[pos][2])
            return num_rows_that_fit(self.model, min(num_tokens, self.max_length), self.max_batch_size)

    return SubjectLM(
        subject.model,
        tokenizer=copy.deepcopy(subject.tokenizer),  # lm-eval gives padding to one that has none
        backend="causal",
        max_length=options.max_length,
        batch_size=options.batch_size,
        # As `frame_texts` says: a chat template writes the special tokens out.
        add_bos_token=False if options.apply_chat_template else None,
    )


def _checked(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """For `generate`: refuses to go on from logits `(batch, vocab_size)` that are not finite."""
    check_logits(scores, "the model's logits")
    return scores


@torch.no_grad()
def score(model: PreTrainedModel, input_ids: torch.Tensor, new_cache: Callable[[], Cache] | None) -> torch.Tensor:
    """Logits `(batch, q_len, vocab_size)` of tokens `(batch, q_len)` that may be padded on the right.

    Through a cache, all tokens go at once, unless it rounds those of earlier calls only: then so few at a time that
    hardly more of them are exact than when text is decoded.
    """
    if new_cache is None:
        return model(input_ids, use_cache=False).logits
    past = new_cache()
    # How many of the last tokens a cache that rounds keeps as they are; `None` if it keeps all.
    num_exact = past.options().get("residual_length") if isinstance(past, KVCache) else None
    pieces = input_ids.split(input_ids.shape[1] if num_exact is None else max(1, num_exact), dim=1)
    return torch.cat([model(piece, past_key_values=past, use_cache=True).logits for piece in pieces], dim=1)


def num_rows_that_fit(model: PreTrainedModel, num_tokens: int, max_rows: int) -> int:
    """How many sequences' logits fit into half of the memory that is free, at least 1 and at most `max_rows`."""
    row_bytes = num_tokens * model.config.vocab_size * torch.float32.itemsize * _FLOATS_PER_LOGIT
    return max(1, min(max_rows, psutil.virtual_memory().available // 2 // row_bytes))
