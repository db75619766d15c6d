"""`python -m lckv.generate`: continues text with a trained model; see `conf/generate.yaml`."""

from __future__ import annotations

from lckv.commands import cli
from lckv.config import GenerateConfig, validate
from lckv.config.names import ENDLESS, TOKENS
from lckv.errors import UserError, is_out_of_memory
from lckv.generation.decoding_options import DecodingOptions
from lckv.generation.prompts import encode_prompts, read_prompts
from lckv.loading.model_files import check_model, choose_chat_template
from lckv.utils.console import new_console


def main(cfg: GenerateConfig) -> None:
    """Reads the prompts, loads the model, and prints what it makes of them."""
    validate(cfg)
    assert cfg.model is not None  # checked
    decoding = DecodingOptions.from_config(cfg)
    prompts = read_prompts(cfg.prompt, cfg.prompt_file, cfg.prompts_file)
    check_model(cfg.model, revision=cfg.revision)
    use_template = None
    if cfg.chat or cfg.chat_template is not None:
        use_template = choose_chat_template(cfg.chat_template, cfg.model, revision=cfg.revision)

    # Behind the checks: importing torch and transformers takes seconds.
    import torch

    from lckv.cache.base import check_offloading
    from lckv.generation.generator import TextGenerator
    from lckv.loading.models import load_model

    check_offloading(cfg.cache.offloading)
    if cfg.num_threads is not None:
        torch.set_num_threads(cfg.num_threads)
    model, tokenizer = load_model(
        cfg.model, revision=cfg.revision, dtype=cfg.dtype, device=cfg.device, on_tokenizer=use_template
    )
    encoded = encode_prompts(prompts, tokenizer, chat=cfg.chat, system=cfg.system)
    generator = TextGenerator(cfg, decoding, model, tokenizer, new_console(to_stderr=True))
    try:
        stream = cfg.chosen_stream()
        if stream == ENDLESS:
            generator.stream_endlessly(encoded[0])
        else:
            generator.answer(prompts, encoded, is_streamed=stream == TOKENS)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        smaller = "batch_size, prefill_chunk, max_new_tokens, or what the cache is made for"
        raise UserError(f"out of memory: give a smaller {smaller}") from error


if __name__ == "__main__":
    cli.run(main, "generate")
