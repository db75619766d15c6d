"""What can be configured: the dataclasses that own every key's name, type, default and check.

The YAML files under `conf/` only choose among these values; `lckv.cli` composes them with Hydra and hands the result
to an entry point as the root dataclass that [`SCHEMAS`] names. No torch here, so that mistakes are reported at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from hashlib import sha256
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from lckv.errors import UserError


@dataclass
class ModelConfig:
    """The decoder: Llama's own names, then how layers share keys and values and how cycles are iterated.

    Attributes:
        name: what run folders call this size; every preset sets it.
        layer_types: whose keys and values each layer reads, such as `0_0_2_2`; wins over the `sharing` group.
        num_hidden_layers: number of layers; follows `layer_types` unless it is given too, and then both must agree.
        default_num_hidden_layers: the preset's depth, used where neither of the two is given.
        vocab_size: None takes the tokenizer's.
        rope_parameters: as in transformers, such as `{rope_type: linear, factor: 2.0, rope_theta: 10000.0}`; empty
            takes transformers' default.
        sliding_window: tokens that an entry with the suffix `s` sees, the query's own among them.
        forward_passes: passes over a cycle without gradient, or `converge`.
        backward_passes: passes over a cycle with gradient.
        converge_tolerance: with `converge`, the relative change of the KV at which the iteration stops.
        use_sequential: whether cycles run token by token, which is exact and slow.
        force_nodiag: whether every layer hides a token's own key from it, not only those that read upward.
    """

    name: str = "custom"
    # Not `str | None`: OmegaConf would silently turn YAML's number 222 into the text "222"; see `overrides`.
    layer_types: Any = None
    num_hidden_layers: int | None = None
    default_num_hidden_layers: int = 8
    vocab_size: int | None = None
    hidden_size: int = 256
    intermediate_size: int = 704
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_parameters: dict[str, Any] = field(default_factory=dict)
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    sliding_window: int = 4096
    forward_passes: Any = 7
    backward_passes: int = 2
    converge_tolerance: float = 1e-3
    use_sequential: bool = False
    force_nodiag: bool = False
    attn_implementation: str = "sdpa"
    dtype: str = "float32"


@dataclass
class SharingConfig:
    """A named sharing pattern and its parameters; None leaves a parameter at the pattern's own default."""

    name: str = "llama"
    num_kv_layers: int | None = None
    group_size: int | None = None
    warmup_layers: int | None = None
    num_self_layers: int | None = None


@dataclass
class DataConfig:
    """Where the text comes from and how it becomes blocks of tokens.

    Attributes:
        name: the source: "bible" (embedded), "files" or "hub".
        files: source "files": a path, a glob or a list of these; txt, jsonl (also compressed) and parquet.
        validation_files: source "files": the same for the validation split; `files` is then training text only.
        document_separator: source "files": what stands between the documents of one txt file (None: one document).
        dataset: source "hub": name of the data set on the Hub, or a local folder of one.
        subset: source "hub": its configuration, such as "en".
        revision: source "hub": branch, tag or commit; a commit makes the text certain.
        split: source "hub": the split with the training text.
        validation_split: source "hub": the split with the validation text (None: a part of `split`, by document).
        streaming: source "hub": read without downloading everything first; needs `max_documents`.
        text_field: sources "files" (jsonl, parquet) and "hub": the field that holds the text.
        validation_fraction: sources "files" and "hub", where no validation text is named: the part of the documents
            that is held out, chosen by a hash of each document's text.
        max_documents: read at most so many documents of each split (None: all).
        block_size: tokens per block.
        document_mask: whether position ids restart at each document, so that no token attends to another document;
            else each block is one sequence (the predicted tokens stay the same).
        cache_dir: where tokenised blocks and trained tokenizers are kept (None: $LCKV_CACHE, or ~/.cache/lckv).
    """

    name: str = "bible"
    files: Any = None
    validation_files: Any = None
    document_separator: str | None = None
    dataset: str | None = None
    subset: str | None = None
    revision: str | None = None
    split: str = "train"
    validation_split: str | None = None
    streaming: bool = False
    text_field: str = "text"
    validation_fraction: float = 0.05
    max_documents: int | None = None
    block_size: int = 256
    document_mask: bool = True
    cache_dir: str | None = None


@dataclass
class TokenizerConfig:
    """What turns text into tokens.

    Attributes:
        name: "bpe" (a byte-level BPE trained on the training documents, cached), a tokenizer's name on the Hub, or a
            local folder.
        vocab_size: only for "bpe": number of tokens, the 256 bytes and the special tokens included.
        revision: only for the Hub: branch, tag or commit.
    """

    name: str = "bpe"
    vocab_size: int = 4096
    revision: str | None = None


@dataclass
class TrainerConfig:
    """The training loop.

    The global batch is what the result depends on; how it is cut up is not: any micro batch and any number of
    processes see the same blocks in the same step, and the loss is divided by all their predicted tokens together.

    Attributes:
        max_steps: optimizer steps.
        global_batch_size: blocks per optimizer step, over all processes and accumulation steps.
        micro_batch_size: blocks per forward pass of one process; what is missing to the global batch is accumulated.
            None: the process's whole share at once.
        eval_batch_size: blocks per forward pass in evaluation; None: as `micro_batch_size`. Changes no result.
        eval_steps: evaluate on the validation split every so many steps and at the end; None: only at the end.
        save_steps: save a checkpoint every so many steps and at the end; None: only at the end.
        save_total_limit: how many checkpoints to keep; None: all.
        logging_steps: write the training metrics every so many steps.
        sample_steps: let the model continue `sample_prompt` every so many steps and at the end; None: only at the end.
        sample_tokens: how many tokens it adds.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
        torch_compile: compile the decoder layers; needs a C++ compiler, on a GPU Triton.
        torch_compile_backend: torch.compile's backend; only "inductor" generates code.
        torch_compile_mode: torch.compile's mode, such as "max-autotune"; None: torch's default.
        use_liger_kernel: Liger's fused kernels; needs a GPU, Triton and liger-kernel.
        precision: "fp32", or "bf16" or "fp16" for mixed precision.
        max_grad_norm: gradients with a larger norm are scaled down to it; 0: never.
        num_threads: torch's threads per process; None: $OMP_NUM_THREADS, or physical cores / processes per machine.
        resume: whether the same command goes on with an interrupted run; false refuses a folder that holds one.
        hf: any further field of transformers' `TrainingArguments`, e.g. `trainer.hf.fsdp=true`,
            `trainer.hf.deepspeed=zero2.json` or `trainer.hf.ddp_timeout=3600`.
    """

    max_steps: int = 1000
    global_batch_size: int = 16
    micro_batch_size: int | None = None
    eval_batch_size: int | None = None
    eval_steps: int | None = 200
    save_steps: int | None = 200
    save_total_limit: int | None = 2
    logging_steps: int = 10
    sample_steps: int | None = 200
    sample_prompt: str = "In the beginning"
    sample_tokens: int = 40
    gradient_checkpointing: bool = False
    torch_compile: bool = False
    torch_compile_backend: str = "inductor"
    torch_compile_mode: str | None = None
    use_liger_kernel: bool = False
    precision: str = "fp32"
    max_grad_norm: float = 1.0
    dataloader_num_workers: int = 0
    num_threads: int | None = None
    resume: bool = True
    hf: dict[str, Any] = field(default_factory=dict)


@dataclass
class OptimConfig:
    """Optimizer and learning rate schedule.

    Attributes:
        name: "adamw", or "muon" (hidden matrices by Muon, the rest by AdamW).
        learning_rate: the peak; Muon's updates are scaled so that AdamW's value suits it too.
        min_learning_rate: what the schedules that decay end at; None: a tenth of the peak.
        schedule: "cosine", "wsd" (warm up, stay, decay), "linear" or "constant"; all warm up linearly.
        warmup_steps: None: 5 % of `trainer.max_steps`.
        decay_steps: schedule "wsd": length of the decay; None: 20 % of `trainer.max_steps`.
        weight_decay: for matrices; norms and biases have none.
        betas: AdamW's.
        eps: AdamW's.
        momentum: Muon's.
        fused: AdamW's one-kernel step; None: where torch has it.
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    min_learning_rate: float | None = None
    schedule: str = "cosine"
    warmup_steps: int | None = None
    decay_steps: int | None = None
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    momentum: float = 0.95
    fused: bool | None = None


@dataclass
class LoggerConfig:
    """Where the training curves go beside `metrics.jsonl`, which is always written.

    Attributes:
        names: any of "tensorboard" and "wandb".
        project: wandb's project.
        mode: wandb's mode, "online" or "offline" (`wandb sync` uploads later).
    """

    names: list[str] = field(default_factory=list)
    project: str = "lckv"
    mode: str = "offline"


@dataclass
class TrainConfig:
    """Everything that `python -m lckv.train` needs.

    Attributes:
        run_name: name of the run folder; None makes one from model, sharing and seed.
        run_dir: the run folder; None puts it under `runs/`, and the jobs of a sweep under `runs/sweep/`.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    sharing: SharingConfig = field(default_factory=SharingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    seed: int = 0
    run_name: str | None = None
    run_dir: str | None = None


@dataclass
class PlanConfig(TrainConfig):
    """Everything that `python -m lckv.plan` needs: any training configuration can be looked at before it runs.

    Attributes:
        context_length: tokens in the context for which bytes and FLOPs are counted; None takes the longest that the
            model allows.
        kv_dtype: type of the KV cache whose bytes are counted.
        converge_passes: with `forward_passes=converge`, the passes without gradient to count; None leaves them open.
        draw: an SVG, PNG or PDF file for the drawing.
        json: whether to print one JSON object and nothing else.
    """

    context_length: int | None = None
    kv_dtype: str = "bfloat16"
    converge_passes: int | None = None
    draw: str | None = None
    json: bool = False


@dataclass
class CacheConfig:
    """How keys and values are kept while text is generated; None leaves an option at the cache's own default.

    Attributes:
        name: "dynamic", "static", "sink", "paged" or "quantized".
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


def literal() -> Any:
    """A key for text that the command line takes as it stands, up to the end of the argument; None by default.

    Nothing in it means anything to Hydra: neither commas, quotes and braces nor `null` or `${...}`.
    """
    return field(default=None, metadata={"literal": True})


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
        batch_size: with `prompts_file`, how many prompts to continue at once; None: all.
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
        prefill_chunk: how many tokens of the prompt to run at once, which bounds memory; None: all.
        prefill_passes: where layers read upward: passes over the prompt before the last ones, or `converge`; None: the
            model's.
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
        patterns: `layer_types` strings and names of sharing patterns; where neither these nor `checkpoints` are given,
            Llama and four families.
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


SCHEMAS: dict[str, type] = {
    "train": TrainConfig,
    "plan": PlanConfig,
    "generate": GenerateConfig,
    "benchmark": BenchmarkConfig,
}
"""The root dataclass of each entry point, by the name of its YAML file."""


@cache
def register_schemas() -> None:
    """Tells Hydra the dataclasses, as `<name>_schema`, and the functions that the root YAML files use."""
    OmegaConf.register_new_resolver(
        "lckv.first_given", lambda *values: next(value for value in values if value is not None), replace=True
    )
    OmegaConf.register_new_resolver(
        "lckv.temporary_folder", lambda name: str(Path(gettempdir()) / f"{name}-{os.getuid()}"), replace=True
    )
    OmegaConf.register_new_resolver("lckv.groups", _list_groups, replace=True)
    for name, schema in SCHEMAS.items():
        ConfigStore.instance().store(name=f"{name}_schema", node=schema, provider="lckv")
    register_literals({})


def register_literals(values: Mapping[str, str]) -> None:
    """Tells Hydra the values of keys that are [`literal`], which root YAML files merge last, under `literals`."""
    node = OmegaConf.create()
    for key, value in values.items():
        OmegaConf.update(node, key, value)
    ConfigStore.instance().store(name="literals", node=node, provider="lckv")


def _list_groups(*names: str) -> str:
    """For help texts: the options of these groups, one group a line, the user's own folders included."""
    loader = GlobalHydra.instance().config_loader()
    return "".join(f"{name}: {', '.join(sorted(loader.get_group_options(name)))}\n" for name in names)


def config_dir() -> Path:
    """The folder with the YAML files: inside the installed package, or beside it in a checkout.

    Raises:
        UserError: if neither is there.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise UserError(f"no configuration files in {package / 'conf'} or {package.parent / 'conf'}: install lckv again")


def default_run_name(cfg: TrainConfig) -> str:
    """A name for the run folder: the model's size, how it shares and the seed."""
    if cfg.model.layer_types is not None:
        sharing = str(cfg.model.layer_types)
    else:
        parameters = [(item.name, getattr(cfg.sharing, item.name)) for item in fields(cfg.sharing)[1:]]
        sharing = cfg.sharing.name + "".join(f"-{name}{value}" for name, value in parameters if value is not None)
    return file_name(f"{cfg.model.name}-{sharing}-seed{cfg.seed}")


def file_name(text: str, max_length: int = 100) -> str:
    """`text` as one path component; what is too long is cut, with a hash of the whole behind it."""
    name = re.sub(r"[^\w.,=+-]+", "_", text).strip("._") or "run"
    if len(name) <= max_length:
        return name
    return f"{name[: max_length - 9]}-{sha256(text.encode()).hexdigest()[:8]}"
