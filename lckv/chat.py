"""`python -m lckv.chat`: a conversation with a model in the terminal, or through a pipe; see `conf/chat.yaml`."""

from __future__ import annotations

import sys

from lckv.commands import cli
from lckv.config import ChatConfig, validate
from lckv.generation.decoding_options import Sampling
from lckv.loading.model_files import check_model, choose_chat_template
from lckv.utils.console import new_console


def main(cfg: ChatConfig) -> None:
    """Loads the model, and answers what is typed or piped in."""
    validate(cfg)
    assert cfg.model is not None  # checked
    sampling = Sampling.from_config(cfg)
    check_model(cfg.model, revision=cfg.revision)
    use_template = choose_chat_template(cfg.chat_template, cfg.model, revision=cfg.revision)

    # Behind the checks: importing torch and transformers takes seconds.
    import torch

    from lckv.cache.base import check_offloading
    from lckv.generation.chat import ChatSession
    from lckv.generation.chat_loop import ChatLoop, piped_lines, typed_messages
    from lckv.generation.limits import check_span, prefill_options
    from lckv.loading.models import load_model

    check_offloading(cfg.cache.offloading)
    if cfg.num_threads is not None:
        torch.set_num_threads(cfg.num_threads)
    model, tokenizer = load_model(
        cfg.model, revision=cfg.revision, dtype=cfg.dtype, device=cfg.device, on_tokenizer=use_template
    )
    session = ChatSession(
        model,
        tokenizer,
        sampling,
        cache=cfg.cache.name,
        cache_options=cfg.cache.options(),
        max_new_tokens=cfg.max_new_tokens,
        prefill=prefill_options(cfg, model.config),
        system=cfg.system,
    )
    check_span(session.cache, float("inf"))
    notes = new_console(to_stderr=True)
    is_interactive = sys.stdin.isatty()
    if is_interactive:
        limit = "no limit" if session.limit is None else f"{session.limit:,} tokens"
        notes.print(f"{cfg.model} · cache={cfg.cache.name} · {limit} · /help", style="dim")
    ChatLoop(session, notes, is_interactive).run(typed_messages(notes) if is_interactive else piped_lines())


if __name__ == "__main__":
    cli.run(main, "chat")
