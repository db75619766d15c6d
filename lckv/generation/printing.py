"""Text as it comes, printed piece by piece while tokens are decoded, and a bar where it does not come yet."""

from __future__ import annotations

from typing import Self, TextIO

import torch
from rich.console import Console
from rich.progress import Progress
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


class PromptsBar:
    """How many prompts are done: a bar on a terminal, gone at the end, and nothing elsewhere.

    Args:
        console: where to show it.
        num_prompts: how many there are.
    """

    def __init__(self, console: Console, num_prompts: int) -> None:
        self._progress: Progress | None = None
        if console.is_interactive:
            # What is printed goes to standard output, not where the bar is.
            self._progress = Progress(console=console, transient=True, redirect_stdout=False)
            self._task = self._progress.add_task("continuing the prompts", total=num_prompts)

    def __enter__(self) -> Self:
        self.show()
        return self

    def __exit__(self, *_: object) -> None:
        self.hide()

    def show(self) -> None:
        """Puts the bar below what has been printed."""
        if self._progress is not None:
            self._progress.start()

    def hide(self) -> None:
        """Makes room for text on the same terminal."""
        if self._progress is not None:
            self._progress.stop()

    def update(self, num_done: int) -> None:
        """Says how many prompts are done."""
        if self._progress is not None:
            self._progress.update(self._task, completed=num_done)
