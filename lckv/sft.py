"""`python -m lckv.sft`: tunes a model on conversations; see `conf/sft.yaml`."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lckv.commands import cli
from lckv.commands.runs import claim, claim_data, in_run_folder
from lckv.config import SFTConfig
from lckv.config.sft import DPO
from lckv.data.conversations import check_conversations
from lckv.errors import UserError
from lckv.loading.model_files import check_model, choose_chat_template
from lckv.training.adapters import check_adapter_pattern, read_adapter
from lckv.training.run_folder import RunFolder
from lckv.utils.console import new_console
from lckv.utils.processes import is_main_process, num_processes, prepare_process
from lckv.utils.storage import check_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_MAX_LENGTH = 1024


def main(cfg: SFTConfig, folder: RunFolder | None = None) -> float | None:
    """Tunes the model that the configuration names, unless that has been done.

    Args:
        cfg: the configuration.
        folder: the run folder, where that is not simply `cfg.run_dir`.

    Returns:
        The validation loss at the end, for sweepers that look for a low one; `None` in every process but the first.
    """
    return in_run_folder("lckv.sft", cfg, folder, _tune)


def _tune(cfg: SFTConfig, folder: RunFolder) -> dict[str, Any] | None:
    """Builds everything that the configuration names, tunes, and shows and returns the results."""
    use_template = _check_files(cfg, folder)

    # Behind the checks: importing torch and transformers takes seconds.
    from datasets import disable_progress_bars
    from transformers import set_seed

    from lckv.data.chat_tokens import build_conversation_data
    from lckv.data.tokenizer import check_tokenizer
    from lckv.loading.models import load_model, set_attention
    from lckv.training.loggers import check_loggers
    from lckv.training.run_summary import show_results
    from lckv.training.sft import SFTSession, build_sft_arguments, next_commands

    prepare_process(cfg.trainer.num_threads)
    disable_progress_bars()
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # TRL's metrics have it tell of every last batch
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # which PEFT asks for
    console = new_console(is_quiet=not is_main_process())
    args = build_sft_arguments(cfg)
    check_loggers(cfg.logger)
    claim(folder, cfg)
    assert cfg.model is not None  # checked
    model, loaded = load_model(
        cfg.model, revision=cfg.revision, dtype=cfg.dtype, device="cpu", on_tokenizer=use_template
    )
    set_attention(model, cfg.attn_implementation)
    tokenizer = check_tokenizer(loaded, f"model={cfg.model}")
    max_length = _choose_max_length(cfg, model.config.max_position_embeddings)
    data = build_conversation_data(cfg, tokenizer, max_length, multiple_of=model.config.cyclic_groups)
    if (results := claim_data(folder, data.fingerprint, console)) is None:
        set_seed(cfg.seed)
        results = SFTSession(cfg, args, model, tokenizer, data, folder, console).run()
    if results is not None:
        show_results(results, folder, console, next_commands(cfg, folder))
    return results


def _check_files(cfg: SFTConfig, folder: RunFolder) -> Callable[[PreTrainedTokenizerBase], None]:
    """Finds mistakes in folder, model, adapter and files before anything slow is imported; returns the template."""
    for package in ("trl", "peft"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{package} is not installed; pip install 'lckv[sft]'")
    check_folder(folder.path, f"run_dir={folder.path}", folder.instead)
    cfg.trainer.cut_batch(num_processes())
    assert cfg.model is not None  # checked
    plan = check_model(cfg.model, revision=cfg.revision)
    if cfg.lora.adapter is not None and plan is not None:
        check_adapter_pattern(read_adapter(cfg.lora.adapter), plan, f"lora.adapter={cfg.lora.adapter}")
    if not folder.results.is_file():
        check_conversations(cfg.data, is_paired=cfg.loss == DPO)
    return choose_chat_template(cfg.chat_template, cfg.model, revision=cfg.revision)


def _choose_max_length(cfg: SFTConfig, limit: int) -> int:
    if cfg.max_length is not None and cfg.max_length > limit:
        raise UserError(f"max_length={cfg.max_length}: the model allows {limit} tokens (max_position_embeddings)")
    return min(DEFAULT_MAX_LENGTH, limit) if cfg.max_length is None else cfg.max_length


if __name__ == "__main__":
    cli.run(main, "sft")
