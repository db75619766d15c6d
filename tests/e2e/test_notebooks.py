"""The notebooks run from top to bottom, each in a folder of its own, where nothing has been trained yet."""

import runpy
from pathlib import Path

import pytest

from tests.docs import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(notebook: Path, tmp_path: Path) -> None:
    execute = runpy.run_path(str(ROOT / "scripts" / "notebooks.py"))["execute"]
    execute(notebook, tmp_path)  # fails with the cell that does
