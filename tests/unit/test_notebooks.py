"""What can be said of the notebooks without running them; `tests/e2e/test_notebooks.py` does that."""

import base64
import json
import re
from pathlib import Path

import pytest
from IPython.core.inputtransformer2 import TransformerManager

from lckv.commands.hydra_store import SCHEMAS
from tests.composing import compose
from tests.docs import ROOT, entry_point

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CELLS = {path.stem: json.loads(path.read_text(encoding="utf-8"))["cells"] for path in NOTEBOOKS}
SOURCES = {
    stem: ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"] for stem, cells in CELLS.items()
}
MOST_BYTES = 60_000


@pytest.mark.parametrize("stem", SOURCES)
def test_compiles(stem: str) -> None:
    for source in SOURCES[stem]:
        compile(TransformerManager().transform_cell(source), stem, "exec")


@pytest.mark.parametrize("stem", SOURCES)
def test_commands_compose(stem: str) -> None:
    shell = "\n".join(source for source in SOURCES[stem] if source.startswith("%%bash")).replace("\\\n", " ")
    commands = [re.split(r" [|>] ", line)[0] for line in shell.splitlines() if line.startswith("python ")]
    assert commands
    for command in commands:
        module, given = entry_point(command) or ("", [])
        assert module in SCHEMAS
        compose(given, module)


@pytest.mark.parametrize("stem", CELLS)
def test_has_outputs_of_any_machine(stem: str) -> None:
    """All cells were run, in order, without an error; there are pictures, and no traces of where they were drawn."""
    cells = [cell for cell in CELLS[stem] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert all(output["output_type"] != "error" and output.get("name") != "stderr" for output in outputs)
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert pictures
    assert all(len(base64.b64decode(picture)) < MOST_BYTES for picture in pictures)
    texts = "".join("".join(output.get("text", "")) for output in outputs)
    assert not re.search(r"/(home|root|tmp|work|Users)/|tok/s|tokens/s", texts)


def test_page_lists_all() -> None:
    page = Path(ROOT, "docs", "notebooks.md").read_text(encoding="utf-8")
    assert re.findall(r"\(\.\./notebooks/(\w+)\.ipynb\)", page) == list(CELLS)
