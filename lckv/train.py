"""`python -m lckv.train`: trains a model from a configuration; see `conf/train.yaml`."""

from __future__ import annotations

import logging
from dataclasses import asdict

from rich.console import Console

from lckv import cli
from lckv.config import TrainConfig
from lckv.errors import UserError, near_miss
from lckv.model_arguments import check_model, model_arguments, resolve_layer_types
from lckv.patterns import parse_layer_types
from lckv.training.launch import launch_missing_processes


def main(cfg: TrainConfig) -> None:
    """Builds everything that the configuration names, trains, and shows the results."""
    launch_missing_processes("lckv.train")
    check_model(cfg.model, parse_layer_types(resolve_layer_types(cfg)))

    # Behind the checks: importing torch and transformers takes seconds.
    from transformers import AutoModelForCausalLM, set_seed
    from transformers.activations import ACT2FN

    from lckv.data import build_dataset, build_tokenizer
    from lckv.models import LCKVLlamaConfig
    from lckv.training.arguments import build_training_arguments, is_main_process, set_num_threads
    from lckv.training.callbacks import check_sample_prompt
    from lckv.training.loggers import check_loggers
    from lckv.training.report import show_results
    from lckv.training.run_folder import RunFolder
    from lckv.training.session import Session

    console = Console(quiet=not is_main_process())
    if not is_main_process():
        logging.getLogger("lckv").setLevel(logging.ERROR)

    if cfg.model.hidden_act not in ACT2FN:
        hint = near_miss(cfg.model.hidden_act, ACT2FN)
        raise UserError(f"model.hidden_act={cfg.model.hidden_act!r}: allowed are {', '.join(ACT2FN)}{hint}")
    set_num_threads(cfg.trainer.num_threads)
    args = build_training_arguments(cfg)
    check_loggers(cfg.logger)
    assert cfg.run_dir is not None  # filled in with the run's name
    folder = RunFolder(cfg.run_dir, cfg.trainer.save_total_limit)
    if is_main_process():
        folder.claim(asdict(cfg), resume=cfg.trainer.resume)

    tokenizer = build_tokenizer(cfg.tokenizer, cfg.data)
    check_sample_prompt(tokenizer, cfg.trainer.sample_prompt)
    data = build_dataset(cfg.data, tokenizer)
    if is_main_process():
        folder.claim_data(data.fingerprint)
    if (results := folder.finished_results()) is not None:
        console.print(f"this run is finished: {folder.path}", style="bold")
        show_results(results, folder, console)
        return

    set_seed(cfg.seed)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model_config = LCKVLlamaConfig(**model_arguments(cfg, len(tokenizer)), **special)
    try:
        model = AutoModelForCausalLM.from_config(model_config)
    except ImportError as error:  # such as FlashAttention's package
        raise UserError(f"model.attn_implementation={cfg.model.attn_implementation!r}: {error}") from error
    if (results := Session(cfg, args, model, tokenizer, data, folder, console).run()) is not None:
        show_results(results, folder, console)


if __name__ == "__main__":
    cli.run(main, "train")
