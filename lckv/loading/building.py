"""The tokenizer and the models of a training run: the one that is trained, and the one that it learns from."""

from __future__ import annotations

from pathlib import Path

from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lckv.config import DataConfig, TeacherConfig, TokenizerConfig, TrainConfig
from lckv.config.data import BPE
from lckv.config.model_arguments import model_arguments
from lckv.data.tokenizer import build_tokenizer, check_tokenizer, vocab_size_of
from lckv.errors import UserError
from lckv.loading.model_files import holds_tokenizer
from lckv.loading.models import find_checkpoint, load_model
from lckv.models import LCKVLlamaConfig, LCKVLlamaForCausalLM


def choose_tokenizer(config: TokenizerConfig, data_config: DataConfig) -> PreTrainedTokenizerFast:
    """The tokenizer that `config.name` chooses, which may also be that of a training run or of a GGUF file.

    Raises:
        UserError: if there is none, it cannot be used here, or `vocab_size` is too small for `"bpe"`.
    """
    path = Path(config.name).expanduser()
    if not path.exists() or config.name == BPE or holds_tokenizer(path):
        return build_tokenizer(config, data_config)
    checkpoint = find_checkpoint(config.name, revision=config.revision, key="tokenizer.name")
    return check_tokenizer(checkpoint.load_tokenizer(), str(checkpoint))


def build_model(cfg: TrainConfig, tokenizer: PreTrainedTokenizerBase, init: Path | None) -> PreTrainedModel:
    """The model to train, with random weights, or with those of the converted model in the folder `init`.

    Raises:
        UserError: if a package for its attention is missing.
    """
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    try:
        if init is None:
            arguments = model_arguments(cfg, vocab_size_of(tokenizer))
            return AutoModelForCausalLM.from_config(LCKVLlamaConfig(**arguments, **special))
        config = LCKVLlamaConfig.from_pretrained(init)
        config.attention_dropout = cfg.model.attention_dropout
        attention, dtype = cfg.model.attn_implementation, cfg.model.dtype
        model: PreTrainedModel = LCKVLlamaForCausalLM.from_pretrained(
            init, config=config, attn_implementation=attention, dtype=dtype
        )
    except ImportError as error:  # such as FlashAttention's package
        raise UserError(f"model.attn_implementation={cfg.model.attn_implementation!r}: {error}") from error
    # The source's own may hold settings for sampling that transformers reads, but refuses to save. It may have several
    # tokens that end a text, where the tokenizer knows one.
    ends = model.generation_config.eos_token_id if model.generation_config else None
    model.generation_config = GenerationConfig(**special | ({} if ends is None else {"eos_token_id": ends}))
    return model


def build_teacher(cfg: TeacherConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | None:
    """The model to learn from, if there is one.

    Raises:
        UserError: if there is no such model, or its tokenizer has other tokens.
    """
    if cfg.source is None:
        return None
    model, its_tokenizer = load_model(
        cfg.source, revision=cfg.revision, dtype=cfg.dtype, device="cpu", key="teacher.source"
    )
    check_tokenizers(cfg.source, tokenizer, its_tokenizer)
    return model


def check_tokenizers(
    source: str, tokenizer: PreTrainedTokenizerBase, teachers_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raises a UserError if two models do not mean the same by a token, naming one; special tokens may differ."""
    own, theirs = (
        {token: number for token, number in each.get_vocab().items() if token not in each.get_added_vocab()}
        for each in (tokenizer, teachers_tokenizer)
    )
    if different := sorted(token for token in own.keys() | theirs.keys() if own.get(token) != theirs.get(token)):
        raise UserError(
            f"teacher.source={source}: its tokenizer has other tokens, {len(different):,} of them, such as "
            f"{different[0]!r}; give tokenizer.name={source}"
        )
