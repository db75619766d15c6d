"""What the README and the pages of the site say is true: their commands, their tables, their Python and their links.

Commands are composed here, as far as that goes without their files; `tests/e2e/test_docs.py` runs them.
"""

import re
import runpy
import shlex
import tomllib
from pathlib import Path

import pytest

from lckv.commands.hydra_store import SCHEMAS
from lckv.commands.overrides import flags_first, name_the_first
from lckv.config import TrainConfig
from lckv.config.keys import keys_of
from lckv.config.model import ModelConfig
from lckv.config.model_arguments import resolve_layer_types
from lckv.families import FAMILIES, TENSORS
from lckv.sharing.costs import ModelSizes, count_costs
from lckv.sharing.iteration import Iteration
from lckv.sharing.patterns import PATTERNS, build_layer_types, parse_layer_types
from tests.composing import compose
from tests.docs import BLOCKS, PAGES, ROOT, entry_point

SHELL = [block for block in BLOCKS if block.language == "sh"]
COMMANDS = [(block, command) for block in SHELL for command in block.commands]
OURS = sorted({command: block for block, command in COMMANDS if entry_point(command)}.items())
TABLED = re.findall(r"\| `(python -m lckv\.[^`]+)`", PAGES[0].read_text(encoding="utf-8"))
# What is no command of ours, and of which nothing can be said without running it.
OTHERS = {"curl", "uv", "cd", "python3", ".venv/bin/python"}
ROWS = {
    cells[0].strip("`"): cells[1:]
    for cells in (
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in (ROOT / "docs" / "patterns.md").read_text(encoding="utf-8").splitlines()
        if line[:3] == "| `"
    )
    if len(cells) == 8
}


def test_table_has_every_pattern() -> None:
    assert list(ROWS) == list(PATTERNS)


@pytest.mark.parametrize("name", ROWS)
def test_table_agrees_with_the_counted_costs(name: str) -> None:
    sizes = ModelSizes(
        32000, 2048, 5632, num_attention_heads=32, num_key_value_heads=4, head_dim=64, sliding_window=1024
    )
    layer_types, _, *figures = ROWS[name]
    assert layer_types == f"`{build_layer_types(name, 8)}`"
    plans = (parse_layer_types(build_layer_types(pattern, 8)) for pattern in (name, "llama"))
    iteration = Iteration.from_config(ModelConfig())
    costs, llama = (count_costs(plan, sizes, 8192, iteration=iteration) for plan in plans)
    kv, llama_kv = costs.kv_bytes, llama.kv_bytes
    flops, llama_flops = costs.flops_per_token, llama.flops_per_token
    assert flops.train is not None and llama_flops.train is not None
    assert figures == [
        f"{kv.written / llama_kv.written:.0%}",
        f"{kv.resident / llama_kv.resident:.0%}",
        f"{kv.read / llama_kv.read:.0%}",
        f"{flops.decode / llama_flops.decode:.2f}",
        f"{flops.train / llama_flops.train:.2f}",
    ]


@pytest.mark.parametrize("command", [*(command for command, _ in OURS), *TABLED])
def test_commands_compose(command: str) -> None:
    module, given = entry_point(command) or ("", [])
    assert module in SCHEMAS
    if "--help" in given or "--config-dir" in given:  # whose files are not there
        return
    if module == "report":
        given = name_the_first(given, "folder")
    for job in sweep([word for word in flags_first(given) if not word.startswith("-")]):
        cfg = compose(job, module)
        assert not isinstance(cfg, TrainConfig) or cfg.init.source is not None or resolve_layer_types(cfg)


def sweep(overrides: list[str]) -> list[list[str]]:
    """As few jobs as have every value of those overrides that have several; what has brackets is its sweeper's."""
    values = {
        key: [value] if value[:1] in "[{'\"" or " " in value else value.split(",")
        for key, _, value in (override.partition("=") for override in overrides)
        if "(" not in value
    }
    jobs = range(max(map(len, values.values()), default=0))
    return [[f"{key}={choices[job % len(choices)]}" for key, choices in values.items()] for job in jobs] or [[]]


def test_keys_in_the_text_exist() -> None:
    keys = {key for schema in SCHEMAS.values() for key in keys_of(schema)}
    groups = {key.partition(".")[0] for key in keys if "." in key}
    unknown = [
        f"{page.name}: {group}.{name}"
        for page in PAGES
        for code in re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))
        for group, name in re.findall(r"(?<![\w./])([a-z]+)\.([a-z_]+)(?![\w/(])", code)
        if group in groups and name not in ("json", "safetensors") and f"{group}.{name}" not in keys
    ]
    assert not unknown


def test_other_commands_name_what_there_is() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    wrong = []
    for block, command in COMMANDS:
        first, *rest = shlex.split(command)
        script = first if first.startswith("scripts/") else next((word for word in rest if "scripts/" in word), "")
        known = (
            entry_point(command) is not None
            or (first == "make" and rest[0] in targets)
            or (first == "pip" and set(re.findall(r"lckv\[(\w+)\]", command)) <= set(extras))
            or (script and (ROOT / script).is_file() and flags_fit(command, ROOT / script))
            or (first in OTHERS and block.reason(command) is not None)
        )
        if not known:
            wrong.append(f"{block}: {command}")
    assert not wrong


def flags_fit(command: str, script: Path) -> bool:
    """Whether a script has the flags of a command; one of the shell hands them on."""
    text = script.read_text(encoding="utf-8")
    flags = [word.removeprefix("--") for word in shlex.split(command) if word.startswith("--")]
    return script.suffix == ".sh" or all(re.search(rf"\b{flag.replace('-', '[-_]')}\b", text) for flag in flags)


def test_every_block_says_what_it_is() -> None:
    """No test looks at a block without a language, and a mark that fits nothing is one too many."""
    assert not [str(block) for block in BLOCKS if block.language not in ("sh", "python", "text", "json", "toml")]
    idle = [
        f"{block}: {text}"
        for block in BLOCKS
        for text, _ in block.marks
        if not any(text in command for command in [*block.commands, block.text])
    ]
    assert not idle


@pytest.mark.parametrize(
    "page", sorted({block.page for block in BLOCKS if block.language == "python" and not block.marks})
)
def test_python_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for table in (PATTERNS, FAMILIES, TENSORS):  # what a page adds is none of the package's
        monkeypatch.setattr(table, "_entries", dict(table._entries))
    blocks = [block.text for block in BLOCKS if block.page == page and block.language == "python" and not block.marks]
    program = tmp_path / "page.py"
    program.write_text("\n".join(blocks))
    names = runpy.run_path(str(program))
    if page == "docs/python.md":
        assert names["model"].config.sharing_plan.kv_owners == (0, 2, 3)


def test_links_lead_somewhere() -> None:
    """Those of the pages to each other are also followed, with their anchors, when the site is built."""
    broken = [
        f"{page.name}: {link}"
        for page in PAGES
        for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
        if "://" not in link and not (page.parent / link.partition("#")[0]).exists()
    ]
    assert not broken
