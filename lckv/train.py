"""`python -m lckv.train`: trains a model from a configuration; see `conf/train.yaml`."""

from __future__ import annotations

import logging
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lckv import cli
from lckv.config import TeacherConfig, TokenizerConfig, TrainConfig, validate
from lckv.config.names import TRAINED
from lckv.errors import UserError, near_miss
from lckv.model_arguments import model_arguments, resolve_plan
from lckv.training.failures import recorded_failure
from lckv.training.launch import launch_missing_processes
from lckv.training.run_folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

    from lckv.conversion import Source
    from lckv.training.evaluations import Evaluate


def main(cfg: TrainConfig, folder: RunFolder | None = None) -> float | None:
    """Trains what the configuration names, unless that has been done.

    Args:
        cfg: the configuration.
        folder: the run folder, where that is not simply `cfg.run_dir`.

    Returns:
        The validation loss at the end, for sweepers that look for a low one; `None` in every process but the first.
    """
    launch_missing_processes("lckv.train")
    assert cfg.run_dir is not None  # filled in with the run's name
    folder = folder or RunFolder(cfg.run_dir, cfg.trainer.save_total_limit)
    try:
        with recorded_failure(folder, cfg, cli.task_overrides()):
            validate(cfg)
            results = _finished_in_a_sweep(cfg, folder) or _train(cfg, folder)
    finally:
        folder.release()
    return None if results is None else float(results["eval_loss"])


def _finished_in_a_sweep(cfg: TrainConfig, folder: RunFolder) -> dict[str, Any] | None:
    """The results of a job of a sweep that need not run again, found before anything heavy is imported or read."""
    if not (cli.is_in_a_sweep() and cfg.trainer.resume and folder.results.is_file()):
        return None
    cfg, _ = _adopt_source(cfg, folder)
    if not folder.holds(asdict(cfg)):
        return None
    if (results := folder.finished_results()) is not None:
        Console().print(f"finished: skipped {folder.path}", markup=False, highlight=False, soft_wrap=True)
    return results


def _train(cfg: TrainConfig, folder: RunFolder) -> dict[str, Any] | None:
    """Builds everything that the configuration names, trains, and shows and returns the results."""
    if cfg.init.source is None:
        resolve_plan(cfg)

    # Behind the checks: importing torch and transformers takes seconds.
    from transformers import set_seed
    from transformers.activations import ACT2FN
    from transformers.utils.logging import disable_progress_bar

    from lckv.data import build_dataset, build_tokenizer
    from lckv.training.arguments import build_training_arguments, is_main_process, set_num_threads
    from lckv.training.callbacks import check_sample_prompt
    from lckv.training.loggers import check_loggers
    from lckv.training.report import show_results
    from lckv.training.session import Session

    disable_progress_bar()  # transformers' own, for every file that it reads or writes
    console = Console(quiet=not is_main_process())
    if not is_main_process():
        logging.getLogger("lckv").setLevel(logging.ERROR)

    cfg, source = _adopt_source(cfg, folder)
    if cfg.model.hidden_act not in ACT2FN:
        hint = near_miss(cfg.model.hidden_act, ACT2FN)
        raise UserError(f"model.hidden_act={cfg.model.hidden_act!r}: allowed are {', '.join(ACT2FN)}{hint}")
    set_num_threads(cfg.trainer.num_threads)
    args = build_training_arguments(cfg)
    check_loggers(cfg.logger)
    if is_main_process():
        # Two jobs of a sweep may be the same run: the second one waits, and finds it finished.
        wait = {"wait": -1.0} if cli.is_in_a_sweep() else {}
        folder.claim(asdict(cfg), resume=cfg.trainer.resume, **wait)
    if source is not None:
        _convert(cfg, source, folder.init, args, console)

    is_random = cfg.init.source is None
    tokenizer = build_tokenizer(cfg.tokenizer if is_random else TokenizerConfig(str(folder.init)), cfg.data)
    check_sample_prompt(tokenizer, cfg.trainer.sample_prompt)
    data = build_dataset(cfg.data, tokenizer)
    if is_main_process():
        folder.claim_data(data.fingerprint)
    if (results := folder.finished_results()) is not None:
        console.print(f"this run is finished: {folder.path}", style="bold")
        show_results(results, folder, console)
        return results

    teacher = _load_teacher(cfg.teacher, tokenizer)
    set_seed(cfg.seed)
    model = _build_model(cfg, tokenizer, None if is_random else folder.init)
    evaluate = evaluations_of(cfg, model, tokenizer, folder)
    if (results := Session(cfg, args, model, tokenizer, data, folder, console, teacher, evaluate).run()) is not None:
        show_results(results, folder, console)
    return results


def evaluations_of(
    cfg: TrainConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: RunFolder
) -> Evaluate | None:
    """What evaluates the model during training, if anything is to."""
    if not cfg.evaluation.evals:
        return None
    from lckv.evaluation.evaluations import Subject
    from lckv.evaluation.running import run_evaluations

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


def _adopt_source(cfg: TrainConfig, folder: RunFolder) -> tuple[TrainConfig, Source | None]:
    """The configuration with the sizes of the pretrained model to start from, and the model, if it is still needed.

    A run that has begun needs only what it has made of the model, and goes on where that is no longer there.
    """
    name, revision = cfg.init.source, cfg.init.revision
    if name is None:
        return cfg, None
    from lckv.conversion import Source, adopt_source, source_config_of
    from lckv.data.tokenizer import check_tokenizer

    if cfg.init.method in TRAINED and cfg.teacher.source is None:
        cfg = replace(cfg, teacher=replace(cfg.teacher, source=name, revision=revision))
    if folder.holds_a_run() and folder.init.is_dir():
        return adopt_source(cfg, source_config_of(folder.init)), None
    source = Source.find(name, revision=revision, key="init.source")
    check_tokenizer(source.load_tokenizer(), str(source.checkpoint))
    return adopt_source(cfg, source.config), source


def _convert(cfg: TrainConfig, source: Source, init: Path, args: TrainingArguments, console: Console) -> None:
    """Writes the converted model in one process; the others wait for it, and end if there is none."""
    from lckv.conversion import convert
    from lckv.training.arguments import is_main_process

    with args.main_process_first(local=False):
        if is_main_process():
            convert(cfg, source, init, console, device=str(args.device))
    if not init.is_dir():
        sys.exit(2)  # the first process has said why


def _build_model(cfg: TrainConfig, tokenizer: PreTrainedTokenizerBase, init: Path | None) -> PreTrainedModel:
    """The model with random weights, or with those of a converted one."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    from lckv.models import LCKVLlamaConfig, LCKVLlamaForCausalLM

    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    try:
        if init is None:
            return AutoModelForCausalLM.from_config(LCKVLlamaConfig(**model_arguments(cfg, len(tokenizer)), **special))
        config = LCKVLlamaConfig.from_pretrained(init)
        config.attention_dropout = cfg.model.attention_dropout
        attention, dtype = cfg.model.attn_implementation, cfg.model.dtype
        model: PreTrainedModel = LCKVLlamaForCausalLM.from_pretrained(
            init, config=config, attn_implementation=attention, dtype=dtype
        )
    except ImportError as error:  # such as FlashAttention's package
        raise UserError(f"model.attn_implementation={cfg.model.attn_implementation!r}: {error}") from error
    # The source's own may hold settings for sampling that transformers reads, but refuses to save. It may have several
    # tokens that end a text, where the tokenizer knows one.
    ends = model.generation_config.eos_token_id if model.generation_config else None
    model.generation_config = GenerationConfig(**special | ({} if ends is None else {"eos_token_id": ends}))
    return model


def _load_teacher(cfg: TeacherConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | None:
    """The model to learn from, if there is one."""
    if cfg.source is None:
        return None
    from lckv.generation.loading import load_model
    from lckv.training.teacher import check_tokenizers

    teacher, teachers_tokenizer = load_model(
        cfg.source, revision=cfg.revision, dtype=cfg.dtype, device="cpu", key="teacher.source"
    )
    check_tokenizers(cfg.source, tokenizer, teachers_tokenizer)
    return teacher


if __name__ == "__main__":
    cli.run(main, "train")
