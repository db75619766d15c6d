"""What can be configured of supervised fine-tuning: conversations, what is learnt of them, and adapters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lckv.config.data import NO_FRACTION, SourceConfig
from lckv.config.keys import (
    MODEL_REQUIRED,
    Group,
    above_zero,
    at_least,
    fraction,
    is_named,
    key,
    literal,
    one_of,
    such_that,
)
from lckv.config.names import ATTENTIONS, DTYPES, RIEMANNIAN
from lckv.config.training import LoggerConfig, OptimConfig, RunConfig, TrainerConfig, seed_of_32_bits
from lckv.errors import UserError

ALL_LINEAR = "all-linear"
REFUSE, TRUNCATE, DROP = TOO_LONG = ("refuse", "truncate", "drop")
ASSISTANT, ALL, DPO = LOSSES = ("assistant", "all", "dpo")


def _module_names(name: str, value: Any) -> None:
    is_list = isinstance(value, list) and value and all(isinstance(item, str) for item in value)
    if value != ALL_LINEAR and not is_list:
        raise UserError(
            f"{name}={value!r}: allowed is {ALL_LINEAR}, or a list of names such as [q_proj,k_proj,v_proj]"
        )


@dataclass
class ConversationsConfig(SourceConfig):
    """Where conversations come from: `{"messages": [{"role": ..., "content": ...}, ...]}` each.

    For `loss=dpo` they are pairs: `{"prompt": ..., "chosen": ..., "rejected": ...}`.

    Attributes:
        name: the source: "files", "hub", or "bible" (questions about the embedded text, and their answers).
        messages_field: sources "files" and "hub": the field that holds the messages; pairs have fields of their own.
        max_conversations: read at most so many conversations, or pairs, of each split (None: all).
    """

    split: str = key("train", only_with={"name": ("hub",)})
    messages_field: str = key("messages", only_with={"name": ("files", "hub")})
    validation_fraction: float = key(
        0.05, such_that(lambda value: 0 < value < 1, NO_FRACTION), only_with={"name": ("files", "hub")}
    )
    max_conversations: int | None = key(None, at_least(or_null=True))

    def check(self, prefix: str) -> None:
        """Refuses a source that lacks what it needs."""
        if self.name == "files" and not self.files:
            example = f"such as {prefix}files=conversations.jsonl"
            raise UserError(f"{prefix}files: is not set; give a path, a glob or a list, {example}, or data=bible")
        self.check_hub(prefix, "HuggingFaceTB/smoltalk")


@dataclass
class LoraConfig(Group):
    """Adapters of low rank beside frozen projections (Hu et al., ICLR 2022), by PEFT.

    Attributes:
        rank: columns of an adapter; None: no adapters, the weights themselves are trained.
        alpha: what an adapter's output is multiplied by, times `rank`; None: twice the rank.
        dropout: of what enters an adapter.
        target_modules: names of projections, such as [q_proj,v_proj]; "all-linear": every one but the head.
        adapter: a folder that PEFT has saved, to go on from; it brings its rank and modules.
    """

    rank: int | None = key(None, at_least())
    alpha: float | None = key(None, above_zero)
    dropout: float = key(0.0, fraction)
    target_modules: Any = key(ALL_LINEAR, _module_names)
    adapter: str | None = key(None, is_named)

    @property
    def is_used(self) -> bool:
        """Whether adapters are trained, and nothing else."""
        return self.rank is not None or self.adapter is not None


@dataclass
class SFTConfig(RunConfig):
    """Everything that `python -m lckv.sft` needs.

    Attributes:
        model: what is tuned: a run folder, a folder with a model and its tokenizer, a GGUF file, or a name on the Hub.
        revision: only for the Hub: branch, tag or commit.
        chat_template: a file with a Jinja template, or "chatml"; None: the tokenizer's own.
        loss: which tokens are learnt: "assistant" (what the assistant says and how it ends) or "all"; or "dpo": of
            pairs of answers, which is the better one (Rafailov et al., NeurIPS 2023).
        beta: loss "dpo": how dearly it is paid for to become unlike the model that training starts from.
        packing: whether several conversations share a row, none of which sees another; else each has its own.
        max_length: tokens of a row; None: 1024, or as many as the model allows if that is fewer.
        too_long: what becomes of longer conversations: "refuse" ends the run, "truncate" cuts their ends off, "drop"
            leaves them out; how many is said.
        dtype: the type of the weights.
        attn_implementation: the attention backend.
        run_name: name of the run folder; None makes one from the model and the seed.
        run_dir: the run folder; None puts it under `runs/`, and the jobs of a sweep under `runs/sweep/`.
    """

    model: str | None = literal(required=MODEL_REQUIRED)
    revision: str | None = None
    chat_template: str | None = literal(is_named)
    data: ConversationsConfig = field(default_factory=ConversationsConfig)
    loss: str = key(ASSISTANT, one_of(LOSSES))
    beta: float = key(0.1, above_zero, only_with={"loss": (DPO,)})
    packing: bool = key(True, only_with={"loss": (ASSISTANT, ALL)})
    max_length: int | None = key(None, at_least(8))
    too_long: str = key(REFUSE, one_of(TOO_LONG))
    lora: LoraConfig = field(default_factory=LoraConfig)
    dtype: str = key("float32", one_of(DTYPES))
    attn_implementation: str = key("sdpa", one_of(ATTENTIONS))
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    seed: int = key(0, seed_of_32_bits)
    run_name: str | None = None
    run_dir: str | None = key(None, is_named)

    def check(self, prefix: str) -> None:
        """Refuses settings of the loop that do not go together."""
        self.optim.check_steps(self.trainer.max_steps, f"{prefix}optim.")
        if self.dtype == "float16" and self.trainer.precision == "fp16":
            raise UserError(
                "dtype=float16: cannot be trained with trainer.precision=fp16, whose loss scaling needs gradients in "
                "float32; leave dtype out"
            )
        if self.optim.name == RIEMANNIAN and self.dtype != "float32":
            raise UserError(f"dtype={self.dtype}: is too coarse for optim.name={RIEMANNIAN}; allowed is float32")
