"""Small stand-ins for what a model comes with."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


def byte_tokenizer(**options) -> PreTrainedTokenizerFast:
    """One token per byte."""
    vocab = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab | {"<eos>": len(vocab)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", **options)


def merging_tokenizer(pre_tokenizer=None, *, ignore_merges=False, **options) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["the other said that they had seen it there, and that the sea was near " * 3], trainer
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", **options)


def letter_tokenizer(**options) -> PreTrainedTokenizerFast:
    """One token per printable character, so that whatever a model says is encoded as what it said."""
    characters = ["\n", *map(chr, range(32, 127))]
    vocab = {character: index for index, character in enumerate(characters)}
    tokenizer = Tokenizer(models.BPE(vocab | {"<eos>": len(vocab)}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", **options)
