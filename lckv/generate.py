"""`python -m lckv.generate`: continues text with a trained model; see `conf/generate.yaml`."""

from __future__ import annotations

from lckv import cli
from lckv.config import GenerateConfig, validate
from lckv.config.names import ENDLESS, TOKENS
from lckv.errors import UserError, is_out_of_memory
from lckv.generation.decoding_options import DecodingOptions
from lckv.generation.prompts import encode_prompts, read_prompts


def main(cfg: GenerateConfig) -> None:
    """Reads the prompts, loads the model, and prints what it makes of them."""
    validate(cfg)
    assert cfg.model is not None  # checked
    decoding = _decoding_options(cfg)
    prompts = read_prompts(cfg.prompt, cfg.prompt_file, cfg.prompts_file)

    # Behind the checks: importing torch and transformers takes seconds.
    import torch
    from rich.console import Console

    from lckv.cache.base import check_offloading
    from lckv.generation.loading import load_model
    from lckv.generation.session import Session

    check_offloading(cfg.cache.offloading)
    if cfg.num_threads is not None:
        torch.set_num_threads(cfg.num_threads)
    model, tokenizer = load_model(cfg.model, revision=cfg.revision, dtype=cfg.dtype, device=cfg.device)
    session = Session(cfg, decoding, model, tokenizer, Console(stderr=True, highlight=False, soft_wrap=True))
    encoded = encode_prompts(prompts, tokenizer, chat=cfg.chat, system=cfg.system)
    try:
        stream = cfg.chosen_stream()
        if stream == ENDLESS:
            session.stream_endlessly(encoded[0])
        else:
            session.answer(prompts, encoded, is_streamed=stream == TOKENS)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        smaller = "batch_size, prefill_chunk, max_new_tokens, or what the cache is made for"
        raise UserError(f"out of memory: give a smaller {smaller}") from error


def _decoding_options(cfg: GenerateConfig) -> DecodingOptions:
    names = ("greedy", "temperature", "top_k", "top_p", "seed", "repetition_penalty", "num_beams", "max_new_tokens")
    return DecodingOptions(**{name: getattr(cfg, name) for name in names})


if __name__ == "__main__":
    cli.run(main, "generate")
