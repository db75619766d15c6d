"""What can be configured of generation, its caches and its benchmark."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from lckv.config.literals import literal
from lckv.config.training import ModelConfig

CACHE_NAMES = ("dynamic", "static", "sink", "paged", "quantized", "none")
"""What `cache=` allows; the classes are in `lckv.cache`, but for "none": evaluations may go without."""


@dataclass
class CacheConfig:
    """How keys and values are kept while text is generated; None leaves an option at the cache's own default.

    Attributes:
        name: "dynamic", "static", "sink", "paged" or "quantized"; for evaluations also "none".
        max_length: cache "static": for how many tokens to make room, the prompt's among them; None: just enough.
        num_sinks: cache "sink": how many of the first tokens are kept for good.
        window: cache "sink": how many of the last tokens are kept beside them.
        page_size: caches of pages: tokens per page.
        num_pages: caches of pages: pages per layer that computes KV; None: as many as are needed.
        bits: cache "quantized": bits per number, 2, 4 or 8.
        group_size: cache "quantized": how many numbers share a scale and a zero point.
        residual_length: cache "quantized": how many of the last tokens stay in full precision.
        key_axis: cache "quantized": what the numbers of a group of keys have in common, "channel" or "token".
        value_axis: cache "quantized": the same for values.
        layout: cache "quantized": "dynamic" or "paged".
        offloading: whether to keep everything in the CPU's memory, and on the GPU only what is in use.
    """

    name: str = "dynamic"
    max_length: int | None = None
    num_sinks: int | None = None
    window: int | None = None
    page_size: int | None = None
    num_pages: int | None = None
    bits: int | None = None
    group_size: int | None = None
    residual_length: int | None = None
    key_axis: str | None = None
    value_axis: str | None = None
    layout: str | None = None
    offloading: bool | None = None

    def options(self) -> dict[str, Any]:
        """The options that are given."""
        options = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "name"}
        return {name: value for name, value in options.items() if value is not None}


DEFAULT_MAX_NEW_TOKENS = 256


@dataclass
class GenerateConfig:
    """Everything that `python -m lckv.generate` needs.

    Attributes:
        model: a run folder of `lckv.train`, a folder with a model and its tokenizer, a GGUF file, or a name on the
            Hub; the models are ours, or Llamas.
        revision: only for the Hub: branch, tag or commit.
        prompt: the text to continue.
        prompt_file: a file with the text to continue, `-` for standard input. Where nothing else is given, text is
            read from standard input, if that is no terminal.
        prompts_file: a file with one prompt per line, `-` for standard input; they are continued in batches.
        batching: with `prompts_file`, "static" continues batch after batch; "continuous" lets prompts join and leave
            at any step, which needs a cache of pages and no beams; None: "continuous" where it can be had.
        batch_size: with `prompts_file`, how many prompts to continue at once; None: all, and with
            `batching=continuous` 64.
        chat: whether the prompt is a message that the tokenizer's chat template makes a prompt of; None: if it has
            one.
        system: the system message of the chat.
        max_new_tokens: where to stop at the latest; None: at 256, and with `stream=endless` nowhere.
        greedy: whether to take the likeliest token every time; None: unless one of `temperature`, `top_k`, `top_p` and
            `seed` is given.
        temperature: sampling: logits are divided by it; None: 1.
        top_k: sampling: only among the so many likeliest tokens; None: all.
        top_p: sampling: only among the likeliest tokens that together have this probability; None: all.
        seed: sampling: where the random numbers start; None: somewhere else each time.
        repetition_penalty: above 1, tokens that occurred already become less likely.
        num_beams: how many continuations beam search pursues; 1: no beam search.
        stream: "tokens" prints the text as it comes, "off" at the end; "endless" goes on until Ctrl-C, with
            cache=sink; None: "tokens", where one text is printed.
        prefill_chunk: how many tokens of the prompt to run at once, which bounds memory; None: all. With
            `batching=continuous` how many tokens of all texts to run in one step; None: 512.
        prefill_passes: where layers read upward: passes over the prompt before the last ones, or `converge`; None: the
            model's, and with `batching=continuous` `converge`, so that no text depends on who runs beside it.
        prefill_tolerance: with `converge`: the relative change of the KV at which a chunk is done; None: the model's.
        compile: whether decoding is compiled; needs cache=static.
        device: such as "cpu", "cuda" or "cuda:1"; "auto": an accelerator, if there is one.
        dtype: "float32", "bfloat16" or "float16"; "auto": as the model was saved.
        num_threads: torch's threads on a CPU; None: torch's own choice.
        json: whether to print one JSON object, with the texts and what was measured, and nothing else.
    """

    model: str | None = literal()
    revision: str | None = None
    prompt: str | None = literal()
    prompt_file: str | None = literal()
    prompts_file: str | None = literal()
    batching: str | None = None
    batch_size: int | None = None
    chat: bool | None = None
    system: str | None = literal()
    max_new_tokens: int | None = None
    greedy: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    repetition_penalty: float = 1.0
    num_beams: int = 1
    stream: str | None = None
    prefill_chunk: int | None = None
    # Not `int | str | None`, which OmegaConf does not know.
    prefill_passes: Any = None
    prefill_tolerance: float | None = None
    cache: CacheConfig = field(default_factory=CacheConfig)
    compile: bool = False
    device: str = "auto"
    dtype: str = "auto"
    num_threads: int | None = None
    json: bool = False


@dataclass
class BenchmarkConfig:
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
        prefill_passes: where layers read upward: passes over the prompt before the last ones, or `converge`; None: the
            model's.
        prefill_tolerance: with `converge`: the relative change of the KV at which a chunk is done; None: the model's.
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
    checkpoints: list[str] = field(default_factory=list)
    cache: CacheConfig = field(default_factory=CacheConfig)
    caches: list[Any] = field(default_factory=list)
    prompt_length: int = 512
    new_tokens: int = 32
    batch_sizes: list[int] = field(default_factory=lambda: [1])
    kv_budget: Any = "64MB"
    max_batch_size: int = 4096
    rounds: int = 5
    prefill_chunk: int | None = None
    prefill_passes: Any = None
    prefill_tolerance: float | None = None
    device: str = "auto"
    dtype: str = "auto"
    num_threads: int | None = None
    seed: int = 0
    output_dir: str | None = None
    overwrite: bool = False
    plot_format: str = "png"
    json: bool = False
