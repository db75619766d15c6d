"""The README and the pages of the site, as their tests read them: blocks of code, and the commands in these.

Above a block, a comment may say why what is in it is not run: `<!-- no-run: why -->` for all of it, and
`<!-- no-run TEXT: why -->` for the commands that have this text in them.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"((?:^<!-- no-run[^\n]*-->\n)*)^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_MARK = re.compile(r"<!-- no-run( [^:]+)?: (.+) -->")


@dataclass(frozen=True)
class Block:
    """Code between fences.

    Attributes:
        page: where it stands, from the repository's root.
        line: its first line.
        language: what stands behind its fence.
        marks: why it, or those of its commands that have a text in them, are not run: `(text, reason)`.
        text: what is in it.
    """

    page: str
    line: int
    language: str
    marks: tuple[tuple[str, str], ...]
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """Its commands, without comments, each on one line."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [command for line in lines if (command := re.split(r"(?:^|\s+)# ", line)[0].strip())]

    def reason(self, command: str) -> str | None:
        """Why a command is not run, if it is not."""
        return next((reason for text, reason in self.marks if text in command), None)


def _blocks(page: Path) -> list[Block]:
    content = page.read_text(encoding="utf-8")
    name = str(page.relative_to(ROOT))
    return [
        Block(
            name,
            content[: found.start(3)].count("\n") + 1,
            found[2],
            tuple((text.strip(), reason) for text, reason in _MARK.findall(found[1])),
            found[3],
        )
        for found in _BLOCK.finditer(content)
    ]


BLOCKS = [block for page in PAGES for block in _blocks(page)]


def entry_point(command: str) -> tuple[str, list[str]] | None:
    """Which of our modules a command starts, `train` for `python -m lckv.train`, and with which arguments."""
    words = shlex.split(command)
    for index, word in enumerate(words[1:], 1):
        if word.startswith("lckv.") and words[index - 1] == "-m":
            return word.removeprefix("lckv."), words[index + 1 :]
    return None
