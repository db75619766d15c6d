"""LM-Harness: tasks of lm-eval, with our model handed in, through any cache."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lckv.config import EvaluationConfig, HarnessConfig
from lckv.errors import UserError, is_out_of_memory
from lckv.evaluation.evaluations import EVALUATIONS, Subject
from lckv.evaluation.harness_model import make_language_model
from lckv.evaluation.harness_tasks import LoadedTasks, first_line, join_errors, load_tasks
from lckv.evaluation.perplexity import in_eval_mode

logger = logging.getLogger(__name__)


@EVALUATIONS.register("harness")
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
    _check_output(options, subject, prefix)
    with _undisturbed(subject.model):
        check_installed()
        loaded = load_tasks(options, options.max_length or limit, prefix)
        results = _evaluate_all(subject, options, loaded, prefix)
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


def _output_path(options: HarnessConfig, subject: Subject) -> str | None:
    """Where lm-eval's own files go: to the given place, or if there must be one, beside `results.json`."""
    if options.output_path is None and options.log_samples and subject.folder is not None:
        return str(subject.folder / "harness")
    return None if options.output_path is None else str(Path(options.output_path).expanduser())


def _check_output(options: HarnessConfig, subject: Subject, prefix: str) -> None:
    """lm-eval writes when all is done, and only logs it if it cannot."""
    output_path = _output_path(options, subject)
    if output_path is None:
        if options.log_samples:
            raise UserError(f"{prefix}log_samples=True: needs {prefix}output_path, the folder to write them to")
        return
    path = Path(output_path)
    folder = path.parent if path.suffix == ".json" else path  # a file's name gets the date behind it
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{prefix}output_path={output_path!r}: cannot be made ({error.strerror})") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"{prefix}output_path={output_path!r}: cannot be written to")


@contextmanager
def _undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Keeps to itself what lm-eval does to the process: it seeds, prints, logs and sets environment variables."""
    lm_eval_logger = logging.getLogger("lm_eval")
    environment, level = dict(os.environ), lm_eval_logger.level
    lm_eval_logger.setLevel(logging.ERROR)
    try:
        with in_eval_mode(model), redirect_stdout(io.StringIO()):
            yield
    finally:
        lm_eval_logger.setLevel(level)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


def _evaluate_all(subject: Subject, options: HarnessConfig, loaded: LoadedTasks, prefix: str) -> dict[str, Any]:
    """All tasks together; where one cannot be done, each alone, so that it keeps no other from its figures."""
    try:
        return _evaluate(subject, options, loaded.specs, loaded.manager)
    except Exception as error:  # whatever is wrong in the documents or the code of a task
        if is_out_of_memory(error):
            raise
        logger.debug("tasks=%s", list(loaded.tasks), exc_info=error)
    results: dict[str, Any] = {"results": {}, "n-shot": {}, "n-samples": {}}
    for name, task in loaded.tasks.items():
        try:
            of_task = _evaluate(subject, options, [task], loaded.manager)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            logger.debug("%s", name, exc_info=error)
            loaded.errors[name] = first_line(error)
        else:
            for key, figures in results.items():
                figures |= of_task[key]
    if not results["results"]:
        raise UserError(f"{prefix}tasks={options.tasks}: none can be done; {join_errors(loaded.errors)}")
    return results


def _evaluate(subject: Subject, options: HarnessConfig, specs: list[Any], manager: Any) -> dict[str, Any]:
    """Lets lm-eval do it, and writes its files."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.loggers import EvaluationTracker

    output_path = _output_path(options, subject)
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
