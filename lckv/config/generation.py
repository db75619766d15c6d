"""What can be configured of generation and its benchmark."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lckv.config.cache import CacheConfig, one_of_several
from lckv.config.keys import (
    MODEL_REQUIRED,
    Group,
    above_zero,
    at_least,
    each,
    is_named,
    key,
    literal,
    once,
    one_of,
    passes,
    such_that,
)
from lckv.config.model import ModelConfig
from lckv.config.names import BATCHINGS, CACHES, CONTINUOUS, DTYPES, ENDLESS, OFF, STATIC, STREAMS, TOKENS
from lckv.errors import UserError, check_choice
from lckv.utils.byte_sizes import parse_bytes

DEFAULT_MAX_NEW_TOKENS = 256


@dataclass
class _DecodingConfig(Group):
    """What every command needs that has a model write text.

    Attributes:
        model: a run folder of `lckv.train`, a folder with a model and its tokenizer, a GGUF file, or a name on the
            Hub; the models are ours, or Llamas.
        revision: only for the Hub: branch, tag or commit.
        system: the system message of the chat.
        greedy: whether to take the likeliest token every time; None: unless one of `temperature`, `top_k`, `top_p` and
            `seed` is given.
        temperature: sampling: logits are divided by it; None: 1.
        top_k: sampling: only among the so many likeliest tokens; None: all.
        top_p: sampling: only among the likeliest tokens that together have this probability; None: all.
        seed: sampling: where the random numbers start; None: somewhere else each time.
        repetition_penalty: above 1, tokens that occurred already become less likely.
        prefill_chunk: how many tokens of the prompt to run at once, which bounds memory; None: all.
        prefill_passes: where layers read upward: passes over the prompt before the last ones, or `converge`: until the
            KV is what decoding would make; None: `converge`.
        prefill_tolerance: with `converge`: the relative change of the KV at which a chunk is done; None: one that
            changes no greedy text.
        device: such as "cpu", "cuda" or "cuda:1"; "auto": an accelerator, if there is one.
        dtype: "float32", "bfloat16" or "float16"; "auto": as the model was saved.
        num_threads: torch's threads on a CPU; None: torch's own choice.
    """

    model: str | None = literal(required=MODEL_REQUIRED)
    revision: str | None = None
    system: str | None = literal()
    greedy: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    repetition_penalty: float = 1.0
    prefill_chunk: int | None = key(None, at_least())
    # Not `int | str | None`, which OmegaConf does not know.
    prefill_passes: Any = key(None, passes)
    prefill_tolerance: float | None = key(None, above_zero)
    cache: CacheConfig = field(default_factory=CacheConfig)
    device: str = "auto"
    dtype: str = key("auto", one_of(("auto", *DTYPES)))
    num_threads: int | None = key(None, at_least())

    def check(self, prefix: str) -> None:
        """Refuses to go without a cache, as only evaluations can."""
        check_choice(f"{prefix}cache", self.cache.name, CACHES)


@dataclass
class ChatConfig(_DecodingConfig):
    """Everything that `python -m lckv.chat` needs, beside what `lckv.generate` needs, too.

    Attributes:
        chat_template: what makes one text of the messages: a name, such as "chatml", or a file with a Jinja template;
            None: the tokenizer's own.
        max_new_tokens: where to cut an answer at the latest.
    """

    chat_template: str | None = literal(is_named)
    max_new_tokens: int = key(1024, at_least())


@dataclass
class GenerateConfig(_DecodingConfig):
    """Everything that `python -m lckv.generate` needs, beside what a chat needs, too.

    Attributes:
        prompt: the text to continue.
        prompt_file: a file with the text to continue, `-` for standard input. Where nothing else is given, text is
            read from standard input, if that is no terminal.
        prompts_file: a file with one prompt per line, `-` for standard input; they are continued in batches.
        batching: with `prompts_file`, "static" continues batch after batch; "continuous" lets prompts join and leave
            at any step, which needs a cache of pages and no beams; None: "continuous" where it can be had.
            Greedy texts are the same for both with exact pages; quantised ones may depend on prompts that begin alike.
            `prefill_chunk` then says how many tokens of all texts to run in one step; None: 512.
        batch_size: with `prompts_file`, how many prompts to continue at once; None: all, and with
            `batching=continuous` 64.
        chat: whether the prompt is a message that a chat template makes a prompt of; None: if there is one.
        chat_template: the template, in the place of the tokenizer's: a name, such as "chatml", or a file.
        max_new_tokens: where to stop at the latest; None: at 256, and with `stream=endless` nowhere.
        num_beams: how many continuations beam search pursues; 1: no beam search.
        stream: "tokens" prints the text as it comes, "off" at the end; "endless" goes on until Ctrl-C, with
            cache=sink; None: "tokens", where one text is printed.
        compile: whether decoding is compiled; needs cache=static.
        json: whether to print one JSON object, with the texts and what was measured, and nothing else.
    """

    prompt: str | None = literal()
    prompt_file: str | None = literal()
    prompts_file: str | None = literal()
    batching: str | None = key(None, one_of(BATCHINGS))
    batch_size: int | None = key(None, at_least())
    chat: bool | None = None
    chat_template: str | None = literal(is_named, only_with={"chat": (None, True)})
    max_new_tokens: int | None = key(None, at_least())
    num_beams: int = key(1, at_least())
    stream: str | None = key(None, one_of(STREAMS))
    compile: bool = key(False, only_with={"cache.name": ("static",)})
    json: bool = False

    def check(self, prefix: str) -> None:
        """Refuses ways to batch and to print that cannot be had."""
        super().check(prefix)
        if self.batching == CONTINUOUS and not self.cache.has_pages:
            raise UserError(
                f"batching=continuous: cannot be had with cache={self.cache.name}; "
                "choose cache=paged, or cache=quantized with cache.layout=paged"
            )
        if self.batching == CONTINUOUS and self.num_beams > 1:
            raise UserError(
                f"batching=continuous: cannot be had with num_beams={self.num_beams}; leave one of them out"
            )
        if self.stream not in (None, OFF) and (reasons := self._unstreamed()):
            raise UserError(f"stream={self.stream}: cannot be had with {reasons[0]}; leave one of them out")
        if self.stream == ENDLESS and self.cache.name != "sink":
            raise UserError(
                f"stream=endless: cannot be had with cache={self.cache.name}, which grows; choose cache=sink"
            )

    def _unstreamed(self) -> list[str]:
        """Settings with which no text can be printed as it comes."""
        holds = {
            "json=true": self.json,
            f"num_beams={self.num_beams}": self.num_beams > 1,
            f"prompts_file={self.prompts_file}": self.prompts_file is not None,
        }
        return [setting for setting, is_set in holds.items() if is_set]

    def chosen_stream(self) -> str:
        """What `stream` stands for: tokens as they come wherever it can be had, unless the user wants otherwise."""
        return self.stream or (OFF if self._unstreamed() else TOKENS)

    def chosen_batching(self) -> str:
        """What `batching` stands for: continuous wherever it can be had, unless the user wants otherwise."""
        can_be_had = self.prompts_file is not None and self.cache.has_pages and self.num_beams == 1
        return self.batching or (CONTINUOUS if can_be_had else STATIC)


@dataclass
class BenchmarkConfig(Group):
    """Everything that `python -m lckv.benchmark` needs.

    Attributes:
        model: sizes and type of the models with random weights, one for each of `patterns`.
        patterns: `layer_types`, names of sharing patterns; without these and `checkpoints`: Llama and four more.
        checkpoints: trained models, as `lckv.generate` takes them: run folders, folders, names on the Hub.
        cache: the cache of all models; with `caches`, options for those of them that have them.
        caches: several caches, each tried with each model: names, or `{name: quantized, bits: 4}`.
        prompt_length: tokens of the prompt.
        new_tokens: decoding steps behind it.
        batch_sizes: how many sequences to decode side by side, one measurement each.
        kv_budget: bytes, such as `64MB` or `1GiB`: the largest batch whose keys and values fit is measured, too; null:
            no such batch.
        max_batch_size: the largest batch that the budget may lead to.
        rounds: how often everything is timed.
        prefill_chunk: how many tokens of the prompt to run at once; None: all.
        prefill_passes: where layers read upward: passes over the prompt before the last ones, or `converge`; None:
            `converge`.
        prefill_tolerance: with `converge`: the relative change of the KV at which a chunk is done; None: one that
            changes no greedy text.
        device: such as "cpu", "cuda" or "cuda:1"; "auto": an accelerator, if there is one.
        dtype: of all models: "float32", "bfloat16" or "float16"; "auto": `model.dtype`, and checkpoints as saved.
        num_threads: torch's threads on a CPU; None: torch's own choice.
        seed: of random weights and prompts.
        output_dir: the folder for `benchmark.json` and the picture; None: `runs/benchmark`, or one with a number.
        overwrite: whether results in `output_dir` may be replaced.
        plot_format: of the picture: "png", "svg" or "pdf".
        json: whether to print one JSON object instead of the tables.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    patterns: list[Any] = field(default_factory=list)
    checkpoints: list[str] = key([], once)
    cache: CacheConfig = field(default_factory=CacheConfig)
    caches: list[Any] = key([], each(one_of_several))
    prompt_length: int = key(512, at_least())
    new_tokens: int = key(32, at_least())
    batch_sizes: list[int] = key([1], such_that(bool, "name at least one, such as 1"), each(at_least()))
    kv_budget: Any = key("64MB", lambda name, value: value is None or parse_bytes(value, name))
    max_batch_size: int = key(4096, at_least())
    rounds: int = key(5, at_least())
    prefill_chunk: int | None = key(None, at_least())
    prefill_passes: Any = key(None, passes)
    prefill_tolerance: float | None = key(None, above_zero)
    device: str = "auto"
    dtype: str = key("auto", one_of(("auto", *DTYPES)))
    num_threads: int | None = key(None, at_least())
    seed: int = 0
    output_dir: str | None = key(None, is_named)
    overwrite: bool = False
    plot_format: str = key("png", one_of(("png", "svg", "pdf")))
    json: bool = False

    def check(self, prefix: str) -> None:
        """Refuses sequences that are longer than the models with random weights are made for."""
        if not self.caches:
            check_choice(f"{prefix}cache", self.cache.name, CACHES)
        length = self.prompt_length + self.new_tokens
        if (self.patterns or not self.checkpoints) and length > self.model.max_position_embeddings:
            raise UserError(
                f"prompt_length={self.prompt_length} and new_tokens={self.new_tokens}: make {length} tokens, but "
                f"model.max_position_embeddings={self.model.max_position_embeddings}; raise it, or lower them"
            )
