"""`python -m lckv.generate`: continues text with a trained model; see `conf/generate.yaml`."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress

from lckv import cli
from lckv.config import DEFAULT_MAX_NEW_TOKENS, CacheConfig, GenerateConfig
from lckv.errors import UserError, near_miss
from lckv.generation.decoding_options import DecodingOptions
from lckv.generation.prompts import encode_prompts, read_prompts
from lckv.model_arguments import CONVERGE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lckv.cache import KVCache
    from lckv.generation.generating import Generation
    from lckv.models import LCKVLlamaForCausalLM

logger = logging.getLogger("lckv.generate")  # not `__main__`

TOKENS, OFF, ENDLESS = STREAMS = ("tokens", "off", "endless")


def main(cfg: GenerateConfig) -> None:
    """Reads the prompts, loads the model, and prints what it makes of them."""
    stream = check_config(cfg)
    decoding = _decoding_options(cfg)
    prompts = read_prompts(cfg.prompt, cfg.prompt_file, cfg.prompts_file)

    # Behind the checks: importing torch and transformers takes seconds.
    import torch

    from lckv.generation.loading import load_model

    check_cache(cfg.cache)
    if cfg.num_threads is not None:
        torch.set_num_threads(cfg.num_threads)
    assert cfg.model is not None  # checked
    model, tokenizer = load_model(cfg.model, revision=cfg.revision, dtype=cfg.dtype, device=cfg.device)
    _check_passes(cfg, model)
    encoded = encode_prompts(prompts, tokenizer, chat=cfg.chat, system=cfg.system)
    session = Session(cfg, decoding, model, tokenizer, Console(stderr=True, highlight=False, soft_wrap=True))
    if stream == ENDLESS:
        session.stream_endlessly(encoded[0])
    else:
        session.answer(prompts, encoded, is_streamed=stream == TOKENS)


def check_config(cfg: GenerateConfig) -> str:
    """Finds mistakes that need no model, and says how the text is to be printed.

    Raises:
        UserError: for values out of range, and options that have no effect beside others.
    """
    if cfg.model is None:
        raise UserError("model: give one: model=FOLDER (a run folder or a checkpoint), or a name on the Hub")
    for name in ("batch_size", "num_threads", "prefill_chunk"):
        if (value := getattr(cfg, name)) is not None and value < 1:
            raise UserError(f"{name}={value}: allowed is 1 or more")
    passes = cfg.prefill_passes
    is_number = isinstance(passes, int) and not isinstance(passes, bool) and passes >= 0
    if not (passes is None or passes == CONVERGE or is_number):
        hint = near_miss(str(passes), [CONVERGE])
        raise UserError(f"prefill_passes={passes!r}: allowed is a whole number, 0 or more, or '{CONVERGE}'{hint}")
    if cfg.prefill_tolerance is not None and not cfg.prefill_tolerance > 0:
        raise UserError(f"prefill_tolerance={cfg.prefill_tolerance}: allowed is a number above 0")
    if cfg.batch_size is not None and cfg.prompts_file is None:
        raise UserError(f"batch_size={cfg.batch_size}: has no effect without prompts_file; leave it out")
    if cfg.compile and cfg.cache.name != "static":
        raise UserError(f"compile=true: has no effect with cache={cfg.cache.name}; choose cache=static")
    return _check_stream(cfg)


def check_cache(cache: CacheConfig) -> None:
    """Finds mistakes in the cache's options before gigabytes are loaded: makes one for the smallest of models.

    Raises:
        UserError: for an unknown name or option, and values that no model allows.
    """
    from lckv.cache import build_cache
    from lckv.models import LCKVLlamaConfig

    options = cache.options()
    if cache.name == "static":
        options.setdefault("max_length", 1)
    config = LCKVLlamaConfig(layer_types="0", vocab_size=8, hidden_size=8, intermediate_size=8, num_attention_heads=1)
    build_cache(cache.name, config, **options)


def _check_stream(cfg: GenerateConfig) -> str:
    unstreamed = {"json": cfg.json, "num_beams": cfg.num_beams > 1, "prompts_file": cfg.prompts_file is not None}
    reasons = [f"{key}={getattr(cfg, key)}" for key, holds in unstreamed.items() if holds]
    stream = cfg.stream
    if stream is None:
        return OFF if reasons else TOKENS
    if stream not in STREAMS:
        raise UserError(f"stream={stream!r}: allowed are {', '.join(STREAMS)}{near_miss(stream, STREAMS)}")
    if stream != OFF and reasons:
        raise UserError(f"stream={stream}: cannot be had with {reasons[0]}; leave one of them out")
    if stream == ENDLESS and cfg.cache.name != "sink":
        raise UserError(f"stream=endless: cannot be had with cache={cfg.cache.name}, which grows; choose cache=sink")
    return stream


def _decoding_options(cfg: GenerateConfig) -> DecodingOptions:
    names = ("greedy", "temperature", "top_k", "top_p", "seed", "repetition_penalty", "num_beams", "max_new_tokens")
    return DecodingOptions(**{name: getattr(cfg, name) for name in names})


def _check_passes(cfg: GenerateConfig, model: LCKVLlamaForCausalLM) -> None:
    """Refuses settings for iterating over the prompt where nothing iterates, or not until it converges."""
    plan, config = model.config.sharing_plan, model.config
    for name in ("prefill_passes", "prefill_tolerance"):
        value = getattr(cfg, name)
        if value is None:
            continue
        if not plan.has_cycles or config.use_sequential:
            reason = "its layers run token by token" if plan.has_cycles else "none of its layers reads upward"
            raise UserError(f"{name}={value}: has no effect on model={cfg.model}: {reason}; leave it out")
        if name == "prefill_tolerance" and (cfg.prefill_passes or config.forward_passes) != CONVERGE:
            raise UserError(f"{name}={value}: has no effect without prefill_passes={CONVERGE}")


@dataclass
class Session:
    """A loaded model, and how to use it."""

    cfg: GenerateConfig
    decoding: DecodingOptions
    model: LCKVLlamaForCausalLM
    tokenizer: PreTrainedTokenizerBase
    console: Console

    @property
    def max_new_tokens(self) -> int:
        """Where text that ends does so at the latest."""
        return DEFAULT_MAX_NEW_TOKENS if self.cfg.max_new_tokens is None else self.cfg.max_new_tokens

    def answer(self, prompts: list[str], encoded: list[list[int]], *, is_streamed: bool) -> None:
        """Continues the prompts, and prints each batch's texts and what they took as soon as they are there."""
        size = self.cfg.batch_size or len(prompts)
        batches = [encoded[start : start + size] for start in range(0, len(encoded), size)]
        for batch in batches:
            self._check_length(_length(batch))
        generations: list[Generation] = []
        texts: list[str] = []
        for batch, generation in zip(batches, self._generations(batches, is_streamed=is_streamed), strict=True):
            first = len(texts)
            generations.append(generation)
            texts += [self._decode(tokens) for tokens in generation.new_tokens]
            if not self.cfg.json:
                self._print_batch(prompts[first : first + len(batch)], texts[first:], generation, is_streamed)
        if self.cfg.json:
            _print(json.dumps(self._as_dict(prompts, encoded, texts, generations), ensure_ascii=False, indent=2))

    def _generations(self, batches: list[list[list[int]]], *, is_streamed: bool) -> Iterator[Generation]:
        """Continues one batch after the other.

        A compiled step fits one cache: all batches get it, the longest of them decides on its length, and the last
        is filled up with copies of its last prompt, which nobody gets to see.
        """
        if not self.cfg.compile:
            for batch in batches:
                yield self._generate(batch, self._build_cache(_length(batch)), is_streamed=is_streamed)
            return
        num_rows, longest = len(batches[0]), max(map(_length, batches))
        cache = self._build_cache(longest)
        for batch in batches:
            if self.decoding.num_beams > 1:
                cache = self._build_cache(longest)  # the last one has a row for every beam
            cache.reset()
            filled = batch + [batch[-1]] * (num_rows - len(batch))
            generation = self._generate(filled, cache, is_streamed=is_streamed)
            yield replace(generation, new_tokens=generation.new_tokens[: len(batch)])

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _print_batch(self, prompts: list[str], texts: list[str], generation: Generation, is_streamed: bool) -> None:
        if not is_streamed:
            for prompt, text in zip(prompts, texts, strict=True):
                _print(f"==> {prompt} <==\n{text}\n" if self.cfg.prompts_file is not None else text)
        self._say(describe(generation))

    def stream_endlessly(self, prompt: list[int]) -> None:
        """Prints text until Ctrl-C, or `max_new_tokens` if that is given."""
        import torch

        from lckv.generation.printing import Printer
        from lckv.generation.streaming import Sampling, stream_text

        cfg, cache = self.cfg, self._build_cache(len(prompt))
        options = {"forward_passes": cfg.prefill_passes, "converge_tolerance": cfg.prefill_tolerance}
        pieces = stream_text(
            self.model,
            self.tokenizer,
            torch.tensor([prompt]),
            cache,
            sampling=Sampling(
                greedy=not self.decoding.samples,
                temperature=cfg.temperature,
                top_k=cfg.top_k,
                top_p=cfg.top_p,
                repetition_penalty=cfg.repetition_penalty,
                seed=cfg.seed,
            ),
            max_new_tokens=cfg.max_new_tokens,
            chunk_size=cfg.prefill_chunk,
            **options,
        )
        printer = Printer(self.tokenizer, sys.stdout)
        start_time = time.perf_counter()
        try:
            for piece in pieces:
                printer.write(piece)
        finally:
            printer.end()
            num_seen, seconds = int(cache.get_seq_length()), time.perf_counter() - start_time
            speed = f"{num_seen / seconds:,.1f} tok/s, the prompt's among them"
            self._say(f"{num_seen:,} tokens · {speed} · cache {cache.num_bytes():,} bytes")

    def _generate(self, batch: list[list[int]], cache: KVCache, *, is_streamed: bool) -> Generation:
        from lckv.generation.generating import PrefillOptions, generate
        from lckv.generation.printing import Printer

        cfg = self.cfg
        printer = Printer(self.tokenizer, sys.stdout) if is_streamed else None
        try:
            with self._prefill_progress(_length(batch) - 1) as on_chunk:
                return generate(
                    self.model,
                    batch,
                    cache,
                    self.decoding,
                    self.max_new_tokens,
                    prefill_options=PrefillOptions(cfg.prefill_chunk, cfg.prefill_passes, cfg.prefill_tolerance),
                    compile_step=cfg.compile,
                    streamer=printer,
                    on_chunk=on_chunk,
                )
        except BaseException:  # Ctrl-C among them: the text so far stays, on a line of its own
            if printer is not None:
                printer.end()
            raise

    def _build_cache(self, prompt_length: int) -> KVCache:
        """An empty cache, as long as is needed if it has a length.

        Raises:
            UserError: if its length is given and too short.
        """
        from lckv.cache import build_cache

        options, needed = self.cfg.cache.options(), prompt_length + self.max_new_tokens
        if self.cfg.cache.name == "static" and options.setdefault("max_length", needed) < needed:
            raise UserError(
                f"cache.max_length={options['max_length']}: the prompt has {prompt_length} tokens and "
                f"max_new_tokens={self.max_new_tokens} follow; allowed is {needed} or more, or leave it out"
            )
        return build_cache(self.cfg.cache.name, self.model.config, **options)

    def _check_length(self, prompt_length: int) -> None:
        """Warns of positions that the model was not made for."""
        limit, length = self.model.config.max_position_embeddings, prompt_length + self.max_new_tokens
        if length > limit and self.cfg.cache.name != "sink":
            logger.warning(
                "the prompt has %d tokens and max_new_tokens=%d follow, but the model was made for %d: "
                "text beyond them is likely to be bad",
                prompt_length,
                self.max_new_tokens,
                limit,
            )

    @contextmanager
    def _prefill_progress(self, num_tokens: int) -> Iterator[Callable[[int], Any] | None]:
        """A bar for a prompt that comes in several chunks, gone as soon as it is through."""
        chunk = self.cfg.prefill_chunk
        if chunk is None or chunk >= num_tokens or not self.console.is_terminal:
            yield None
            return
        with Progress(console=self.console, transient=True) as progress:
            task = progress.add_task("reading the prompt", total=num_tokens)

            def advance(num_done: int) -> None:
                progress.advance(task, num_done)
                if progress.finished:
                    progress.stop()

            yield advance

    def _say(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False)

    def _as_dict(
        self, prompts: list[str], encoded: list[list[int]], texts: list[str], generations: list[Generation]
    ) -> dict[str, Any]:
        """Everything as JSON-able data."""
        new_tokens = [tokens for generation in generations for tokens in generation.new_tokens]
        return {
            "model": self.cfg.model,
            "layer_types": self.model.config.sharing_plan.layer_types,
            "cache": {"name": self.cfg.cache.name, **self.cfg.cache.options()},
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.model.device),
            "texts": [
                {"prompt": prompt, "text": text, "num_prompt_tokens": len(given), "num_new_tokens": len(new)}
                for prompt, text, given, new in zip(prompts, texts, encoded, new_tokens, strict=True)
            ],
            "batches": [_figures(generation) for generation in generations],
        }


def _figures(generation: Generation) -> dict[str, Any]:
    """What one batch took."""
    figures = asdict(generation)
    figures["num_new_tokens"] = sum(map(len, figures.pop("new_tokens")))
    figures["tokens_per_second"] = generation.tokens_per_second
    figures["cache_bytes_per_token"] = generation.cache_bytes / generation.cache_tokens
    return figures


def describe(generation: Generation) -> str:
    """What one batch took, in a line."""
    num_tokens, speed = sum(map(len, generation.new_tokens)), generation.tokens_per_second
    parts = [f"{num_tokens:,} token{'' if num_tokens == 1 else 's'}"]
    if speed is not None:
        parts.append(f"{speed:,.1f} tok/s")
    parts.append(f"first after {generation.first_token_seconds:.2f} s")
    per_token = generation.cache_bytes / generation.cache_tokens
    parts.append(f"cache {generation.cache_bytes:,} bytes, {per_token:,.0f} per token")
    if max(generation.num_passes) > 1:
        parts.append(f"{max(generation.num_passes)} passes over the prompt")
    if generation.residual is not None:
        parts.append(f"KV residual {generation.residual:.1e}")
    return " · ".join(parts)


def _length(batch: list[list[int]]) -> int:
    """Of a batch's longest prompt."""
    return max(map(len, batch))


def _print(text: str) -> None:
    """Writes a result, and nothing else, to standard output."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    cli.run(main, "generate")
