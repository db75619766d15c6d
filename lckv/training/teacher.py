"""What must be true of a teacher before a model can be trained against it."""

from __future__ import annotations

import math
from dataclasses import fields

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lckv.config import TeacherConfig, TrainConfig
from lckv.errors import UserError, check_choice, check_positive
from lckv.model_arguments import DTYPES

_WEIGHTS = ("logits_weight", "attention_weight", "labels_weight")


def check_teacher_settings(cfg: TrainConfig) -> None:
    """Checks what can be checked before the teacher is loaded.

    Raises:
        UserError: if a number or name is not allowed, has no effect, or goes with nothing else that is asked for.
    """
    teacher = cfg.teacher
    if teacher.source is None:
        for item in fields(teacher):
            if (value := getattr(teacher, item.name)) != item.default:
                raise UserError(f"teacher.{item.name}={value}: has no effect without teacher.source=...")
        return
    check_choice("teacher.dtype", teacher.dtype, ("auto", *DTYPES))
    check_positive("teacher.temperature", teacher.temperature)
    for name in _WEIGHTS:
        if not 0 <= getattr(teacher, name) < math.inf:
            raise UserError(f"teacher.{name}={getattr(teacher, name)}: allowed is a number, 0 or more")
    if not any(getattr(teacher, name) for name in _WEIGHTS):
        raise UserError(f"teacher.{', teacher.'.join(_WEIGHTS)}: are all 0, so there is nothing to train for")
    if teacher.attention_weight:
        _check_outputs_can_be_seen(cfg)


def _check_outputs_can_be_seen(cfg: TrainConfig) -> None:
    """Refuses what would hide the attention's outputs, or their gradients, from hooks."""
    given = f"teacher.attention_weight={cfg.teacher.attention_weight}"
    if cfg.trainer.torch_compile:
        raise UserError(f"{given}: cannot be had with trainer.torch_compile=true; set one to 0, or the other to false")
    for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        if (cfg.trainer.hf.get(name) or {}).get("use_reentrant"):
            raise UserError(f"{given}: needs trainer.hf.{name}.use_reentrant=false, or no gradient would get through")


def check_tokenizers(
    source: str, tokenizer: PreTrainedTokenizerBase, teachers_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Checks that two models mean the same by a token; special tokens may differ.

    Raises:
        UserError: naming a token that they do not share.
    """
    own, theirs = _plain_tokens(tokenizer), _plain_tokens(teachers_tokenizer)
    if different := sorted(token for token in own.keys() | theirs.keys() if own.get(token) != theirs.get(token)):
        raise UserError(
            f"teacher.source={source}: its tokenizer has other tokens, {len(different):,} of them, such as "
            f"{different[0]!r}; give tokenizer.name={source}"
        )


def _plain_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    added = tokenizer.get_added_vocab()
    return {token: number for token, number in tokenizer.get_vocab().items() if token not in added}


def check_teacher_fits(
    teacher: PreTrainedModel, student: PreTrainedModel, cfg: TeacherConfig, block_size: int
) -> None:
    """Checks that the outputs of two models can be compared.

    Args:
        teacher: the model to learn from.
        student: the model to train.
        cfg: what is compared.
        block_size: tokens per block.

    Raises:
        UserError: naming what differs.
    """
    compared = ["vocab_size"]
    if cfg.attention_weight:
        compared += ["num_hidden_layers", "hidden_size"]
    for name in compared:
        own, theirs = getattr(student.config, name), getattr(teacher.config, name)
        if own != theirs:
            ways_out = " or set teacher.attention_weight=0" if name != "vocab_size" else ""
            raise UserError(
                f"teacher.source={cfg.source}: its {name} is {theirs}, the trained model's {own}; they must be "
                f"equal: give another teacher{ways_out}"
            )
    if block_size > teacher.config.max_position_embeddings:
        raise UserError(
            f"data.block_size={block_size}: longer than the teacher's max_position_embeddings="
            f"{teacher.config.max_position_embeddings}; lower it"
        )
