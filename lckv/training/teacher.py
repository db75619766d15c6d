"""What must be true of a teacher before a model can be trained against it."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lckv.config import TeacherConfig
from lckv.errors import UserError


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
