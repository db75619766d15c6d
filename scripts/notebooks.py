"""Executes notebooks in place, one after the other: `python scripts/notebooks.py notebooks/*.ipynb`."""

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]


def execute(notebook: Path, folder: Path) -> Any:
    """Runs a notebook from top to bottom with a kernel of this interpreter, on the package of this checkout.

    Args:
        notebook: the file.
        folder: where the kernel runs, and what the cells write is put.

    Returns:
        The notebook with its outputs, without what differs from run to run or machine to machine.

    Raises:
        nbclient.exceptions.CellExecutionError: for the first cell that fails.
    """
    found = nbformat.read(notebook, as_version=4)
    paths = {"PATH": Path(sys.executable).parent, "PYTHONPATH": ROOT}
    env = os.environ | {name: f"{path}{os.pathsep}{os.environ.get(name, '')}" for name, path in paths.items()}
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(found, timeout=600, resources=resources, record_timing=False, coalesce_streams=True).execute(
        env=env
    )
    found.metadata = {key: found.metadata[key] for key in ("kernelspec",)}
    for cell in found.cells:
        if cell.cell_type == "code":  # a command says on standard error how far it has come, and how fast
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if "text" in output:  # colours are noise to those who read the file, or a diff of it
                    output.text = re.sub(r"\x1b\[[\d;]*m", "", output.text)
    return found


def main() -> None:
    """Executes all in one new folder, where later ones find the models that earlier ones have trained."""
    with tempfile.TemporaryDirectory() as folder:
        for name in sys.argv[1:]:
            print(f"==> {name}", flush=True)
            nbformat.write(execute(Path(name), Path(folder)), name)


if __name__ == "__main__":
    main()
