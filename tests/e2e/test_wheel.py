"""The wheel, installed away from the checkout, plans and trains from an empty folder."""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)], cwd=folder)
    (path,) = folder.glob("lckv-*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has the wheel, and the libraries but not the checkout of this one."""
    folder = tmp_path_factory.mktemp("venv")
    run([sys.executable, "-m", "venv", "--without-pip", str(folder)], cwd=folder)
    python = folder / "bin" / "python"
    site_packages = Path(
        run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], cwd=folder).strip()
    )
    # Python reads no .pth files in a folder that a .pth file names, so an editable install stays out of sight.
    libraries = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (site_packages / "libraries.pth").write_text("\n".join(libraries))
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    run([*pip, "--ignore-installed", str(wheel)], cwd=folder)
    return python


def run(command: list, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=180)
    assert process.returncode == 0, f"{command} failed:\n{process.stdout}\n{process.stderr}"
    return process.stdout


def test_wheel_has_every_yaml_file_and_the_licence(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    yaml_files = {f"lckv/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    assert yaml_files and yaml_files <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests", "conf"))]


def test_package_comes_from_the_wheel(python: Path, tmp_path: Path) -> None:
    location = run([python, "-c", "import lckv; print(lckv.__file__)"], cwd=tmp_path)
    assert Path(location.strip()).is_relative_to(python.parents[1])


def test_plan_runs_in_an_empty_folder(python: Path, tmp_path: Path) -> None:
    output = run([python, "-m", "lckv.plan", "model.layer_types=0_2_2_3", "json=true"], cwd=tmp_path)
    assert json.loads(output)["layer_types"] == "0_2_2_3"
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_training_runs_in_an_empty_folder(python: Path, tmp_path: Path) -> None:
    run([python, "-m", "lckv.train", "debug=cpu_smoke", "data.max_documents=60", "run_dir=out"], cwd=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "results.json").is_file()
    assert (tmp_path / "out" / "model" / "config.json").is_file()
