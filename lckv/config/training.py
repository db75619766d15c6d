"""What can be configured of a model and its training, and of what is counted before it runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lckv.config.evaluation import EvaluationConfig


@dataclass
class ModelConfig:
    """The decoder: Llama's own names, then how layers share keys and values and how cycles are iterated.

    Attributes:
        name: what run folders call this size; every preset sets it.
        layer_types: whose keys and values each layer reads, such as `0_0_2_2`; wins over the `sharing` group.
        num_hidden_layers: number of layers; follows `layer_types` unless it is given too, and then both must agree.
        default_num_hidden_layers: the preset's depth, used where neither of the two is given.
        vocab_size: None takes the tokenizer's.
        rope_parameters: such as `{rope_type: linear, factor: 2.0, rope_theta: 10000.0}`; empty: transformers' default.
        attention_output_bias: whether the output projection has a bias; None: as `attention_bias` says.
        use_qk_norm: whether each head's queries and keys are normalised, as in Qwen3.
        sliding_window: tokens that an entry with the suffix `s` sees, the query's own among them; None: 4096, or what
            the pretrained model has.
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
    attention_output_bias: bool | None = None
    use_qk_norm: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    sliding_window: int | None = None
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


SOURCE_NAMES = ("bible", "files", "hub")
"""What `data=` allows; the functions are in `lckv.data.sources`."""


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
        evaluation_steps: run the evaluations that `evaluation.evals` names every so many steps and at the end; None:
            only at the end.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
        torch_compile: compile the decoder layers; needs a C++ compiler, on a GPU Triton.
        torch_compile_backend: torch.compile's backend; only "inductor" generates code.
        torch_compile_mode: torch.compile's mode, such as "max-autotune"; None: torch's default.
        use_liger_kernel: Liger's fused kernels; needs a GPU, Triton and liger-kernel.
        precision: "fp32", or "bf16" or "fp16" for mixed precision.
        trainable: what is trained: "all", "kv" (the layers' key and value projections alone) or "qkv" (queries, too).
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
    evaluation_steps: int | None = None
    gradient_checkpointing: bool = False
    torch_compile: bool = False
    torch_compile_backend: str = "inductor"
    torch_compile_mode: str | None = None
    use_liger_kernel: bool = False
    precision: str = "fp32"
    trainable: str = "all"
    max_grad_norm: float = 1.0
    dataloader_num_workers: int = 0
    num_threads: int | None = None
    resume: bool = True
    hf: dict[str, Any] = field(default_factory=dict)


OPTIMIZER_NAMES = ("adamw", "muon")
"""What `optim=` allows, beside YAML files; the functions are in `lckv.training.optim`."""


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
class InitConfig:
    """What a model's weights are before training; without a source, random.

    Attributes:
        source: a pretrained model that brings sizes, weights and tokenizer: a run folder, a folder, a GGUF file, or a
            name on the Hub.
        revision: only for the Hub: branch, tag or commit.
        method: how keys and values that layers are to share come from those that each computes in the source.
        calibration_tokens: for methods that look at text: so many tokens of the training split.
        ridge: for these, too: the penalty on large weights, relative to the mean square of what they multiply.
    """

    source: str | None = None
    revision: str | None = None
    method: str = "average"
    calibration_tokens: int = 32768
    ridge: float = 1e-2


@dataclass
class TeacherConfig:
    """A model to learn from. The loss is the weighted sum of three parts, each a mean over the predicted tokens.

    Attributes:
        source: a run folder of `lckv.train`, a folder with a model, a GGUF file, or a name on the Hub; its tokens must
            be the trained model's. None: no teacher, the usual loss.
        revision: only for the Hub: branch, tag or commit.
        logits_weight: of the divergence of the model's next-token distributions from the teacher's.
        attention_weight: of the squared distance of each layer's attention output (projection included) from that of
            the teacher's same layer, relative to its mean square and averaged over layers; needs as many layers of the
            same size, and leaves out those in which the teacher's attention writes nothing.
        labels_weight: of the usual loss, the cross entropy with the text.
        temperature: what both models' logits are divided by in the divergence, which is multiplied by its square.
        dtype: "float32", "bfloat16" or "float16"; "auto": as the teacher was saved.
    """

    source: str | None = None
    revision: str | None = None
    logits_weight: float = 1.0
    attention_weight: float = 1.0
    labels_weight: float = 0.0
    temperature: float = 1.0
    dtype: str = "auto"


@dataclass
class TrainConfig:
    """Everything that `python -m lckv.train` needs.

    Attributes:
        evaluation: what is evaluated beside the validation loss, on the same text; see `lckv.evaluate`.
        run_name: name of the run folder; None makes one from model, sharing and seed.
        run_dir: the run folder; None puts it under `runs/`, and the jobs of a sweep under `runs/sweep/`.
        iso: what sharing must not change against Llama of the same sizes: "params" widens the MLP until the parameters
            are as many, "kv" takes more heads of keys and values, until as many bytes are written per token.
        iso_multiple: with "params", the MLP's width is a multiple of this.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    init: InitConfig = field(default_factory=InitConfig)
    sharing: SharingConfig = field(default_factory=SharingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    seed: int = 0
    run_name: str | None = None
    run_dir: str | None = None
    iso: str | None = None
    iso_multiple: int = 8


@dataclass
class PlanConfig(TrainConfig):
    """Everything that `python -m lckv.plan` needs: any training configuration can be looked at before it runs.

    Attributes:
        context_length: tokens in the context for which bytes and FLOPs are counted; None: as many as the model allows.
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
