"""Which module may import which, and which must not need torch."""

import ast
import importlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import lckv

PACKAGE = Path(lckv.__file__).parent
PYPROJECT = PACKAGE.parent / "pyproject.toml"

# From the bottom: a module may import from its own layer and from those above it in this list.
LAYERS = [
    ["errors"],
    ["utils"],
    ["sharing"],
    ["config"],
    ["data", "models"],
    ["families"],
    ["cache"],
    ["evaluation", "training"],
    ["loading"],
    ["engine"],
    ["generation"],
    ["serving"],
    ["conversion"],
    ["benchmarking", "exporting", "reporting"],
    ["commands"],
    [
        "plan",
        "train",
        "sft",
        "generate",
        "chat",
        "evaluate",
        "benchmark",
        "convert",
        "search",
        "report",
        "export",
        "hints",
    ],
]
# Siblings that must not know each other. `training` receives built models and data sets, it does not import them.
STRANGERS = {"data": {"models"}, "models": {"data", "config"}, "cache": {"data", "config"}, "training": {"models"}}
TORCH_FREE = [
    "lckv",
    "lckv.serving",
    "lckv.serving.vllm",
    "lckv.errors",
    "lckv.utils.registry",
    "lckv.utils.storage",
    "lckv.utils.console",
    "lckv.data.chat_templates",
    "lckv.sharing.patterns",
    "lckv.sharing.layout",
    "lckv.sharing.iteration",
    "lckv.sharing.costs",
    "lckv.sharing.iso",
    "lckv.config",
    "lckv.commands.hydra_store",
    "lckv.config.model_arguments",
    "lckv.loading.model_files",
    "lckv.report",
    "lckv.serving.hints",
    "lckv.hints",
    "lckv.reporting.writing",
    "lckv.generate",
    "lckv.chat",
    "lckv.evaluate",
    "lckv.benchmark",
    "lckv.convert",
    "lckv.export",
    "lckv.search",
    "lckv.train",
    "lckv.sft",
]

# What only an engine imports, which is not installed beside the tests: `make test-serving` has an environment for it.
OF_ENGINES = {"lckv.serving.vllm.attention", "lckv.serving.vllm.model", "lckv.serving.vllm.strict_past"}

RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
SOURCES = sorted(PACKAGE.rglob("*.py"))
MODULES = [".".join(("lckv", *path.relative_to(PACKAGE).with_suffix("").parts)) for path in SOURCES]


def part(module: str) -> str:
    """The name in `LAYERS` that a module such as `lckv.data.sources` belongs to."""
    return module.split(".")[1] if "." in module else ""


def imported_modules(path: Path, top_level_only: bool = False) -> Iterator[str]:
    """The absolute names of the modules that a source file imports, inside functions too unless told otherwise."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively; write the absolute name"
            assert node.module is not None
            yield node.module
            if node.module == "lckv":
                yield from (f"lckv.{alias.name}" for alias in node.names if part(f"lckv.{alias.name}") in RANK)


def test_imports_go_one_way() -> None:
    assert not (unplaced := {part(module) for module in MODULES} - {*RANK, "__init__"}), f"{unplaced}: not in LAYERS"
    wrong = []
    for path in SOURCES:
        importer = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if importer == "__init__":  # the lazy exports; the test below sees to it that they are lazy
            continue
        for module in imported_modules(path):
            imported = part(module)
            if module.startswith("lckv.") and imported != importer:
                if RANK[imported] > RANK[importer] or imported in STRANGERS.get(importer, ()):
                    wrong.append(f"{path.relative_to(PACKAGE)} imports {module}")
    assert not wrong


def test_torch_free_modules_import_no_torch() -> None:
    program = f"import sys, {', '.join(TORCH_FREE)}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert process.stdout.strip() == "[]", process.stdout + process.stderr


def test_every_module_can_be_imported_and_says_what_it_is() -> None:
    names = set(MODULES) - OF_ENGINES
    assert not [name for name in names if not importlib.import_module(name.removesuffix(".__init__")).__doc__]


def test_every_library_that_is_imported_is_required() -> None:
    """What a module imports at its top is among the requirements; what a function imports may be an extra."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    required, optional = (distributions(lines) for lines in (project["dependencies"], extras))
    providers = importlib.metadata.packages_distributions()
    for path, own_name in zip(SOURCES, MODULES, strict=True):
        at_top = set() if own_name in OF_ENGINES else set(imported_modules(path, top_level_only=True))
        for module in {*imported_modules(path)}:
            name = module.split(".")[0]
            if name in sys.stdlib_module_names or name == "lckv":
                continue
            allowed = required if module in at_top else required | optional
            found = {canonical(distribution) for distribution in providers.get(name, [name])}
            assert found & allowed, f"{path} imports {module}, which pyproject.toml does not require"


def distributions(requirements: list[str]) -> set[str]:
    return {canonical(re.split(r"[^\w.-]", line, maxsplit=1)[0]) for line in requirements}


def canonical(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()
