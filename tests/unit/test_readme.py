"""What the README says is true: its table, its commands, its Python and its links."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lckv import cli
from lckv.config import TrainConfig
from lckv.config.model import ModelConfig
from lckv.costs import ModelSizes, count_costs
from lckv.hydra_store import SCHEMAS, config_dir, register_schema
from lckv.iteration import Iteration
from lckv.model_arguments import resolve_layer_types
from lckv.overrides import name_the_first, quote_overrides
from lckv.patterns import PATTERNS, build_layer_types, parse_layer_types

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    line.split("  #")[0].strip()
    for language, block in BLOCKS
    if not language
    for line in block.splitlines()
    if "-m lckv." in line and "--help" not in line  # which needs no model where the command does
]
ROWS = {
    cells[0].strip("`"): cells[1:]
    for cells in (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in README.splitlines() if line[:3] == "| `"
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


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_compose(command: str) -> None:
    words = shlex.split(command)
    module = next(word for word in words if word.startswith("lckv."))
    config_name = module.removeprefix("lckv.")
    given = words[words.index(module) + 1 :]
    if config_name == "report":
        given = name_the_first(given, "folder")
    overrides = [word for word in given if "=" in word]
    if not issubclass(SCHEMAS[config_name], TrainConfig):
        cli.compose(overrides, config_name)
        return
    register_schema(config_name)
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        for job in sweep(quote_overrides(overrides)):
            cfg = compose(config_name, overrides=job)
            assert resolve_layer_types(OmegaConf.to_object(cfg))


def sweep(overrides: list[str]) -> list[list[str]]:
    """One list of overrides for each value of those that have several; what has brackets is left to its sweeper."""
    jobs: list[list[str]] = [[]]
    for override in overrides:
        key, _, values = override.partition("=")
        if "(" not in values:
            jobs = [[*job, f"{key}={value}"] for job in jobs for value in values.split(",")]
    return jobs


def test_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(PATTERNS, "_entries", dict(PATTERNS._entries))  # a README's pattern is none of the package's
    program = tmp_path / "readme.py"
    program.write_text("\n".join(block for language, block in BLOCKS if language == "python"))
    names = runpy.run_path(str(program))
    assert names["model"].config.sharing_plan.kv_owners == (0, 2, 3)


def test_links_lead_somewhere() -> None:
    assert not [link for link in re.findall(r"\]\(([^):]+)\)", README) if not (ROOT / link).is_file()]


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"\bmake ([a-z-]+)", "\n".join(block for _, block in BLOCKS)))
    assert targets <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
