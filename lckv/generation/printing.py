"""Text as it comes, printed piece by piece while tokens are decoded."""

from __future__ import annotations

from typing import TextIO

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from lckv.generation.streaming import TextPieces


class Printer(BaseStreamer):
    """Writes a text while it is generated, and ends it with the end of a line.

    Args:
        tokenizer: the model's.
        file: where to write.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, file: TextIO) -> None:
        self._pieces = TextPieces(tokenizer)
        self._file = file
        self._is_prompt = True
        self._last = ""

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt from `generate`, which is not printed, and then token after token."""
        if self._is_prompt:
            self._is_prompt = False
            return
        for token in value.flatten().tolist():
            self.write(self._pieces.push(token))

    def write(self, text: str) -> None:
        """Prints a piece of the text at once."""
        if text:
            self._last = text
            self._file.write(text)
            self._file.flush()

    def end(self) -> None:
        """Prints what was kept back, and ends the line; also where generation was interrupted."""
        self.write(self._pieces.flush())
        if self._last and not self._last.endswith("\n"):
            self.write("\n")
