"""Writes down what a fixed list of commands computes: losses, texts, bytes and report figures, but no times.

A change that must not change numbers shows that it does not: run this in both checkouts, and `diff` the two files.

    python scripts/record_figures.py before.json
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

SMOKE = "debug=cpu_smoke data.max_documents=40 trainer.num_threads=1 trainer.logging_steps=1"
PATTERNS = {
    "llama": "sharing=llama",
    "cla": "sharing=cla trainer.micro_batch_size=8",
    "yoco": "sharing=yoco model.sliding_window=16 model.attention_dropout=0.1",
    "lckv": "sharing=lckv trainer.gradient_checkpointing=true",
    "mixed": "model.layer_types=2s_0_3s_2 model.sliding_window=8 model.num_key_value_heads=1 seed=3",
    "converge": "model.layer_types=0_2_2_3 model.forward_passes=converge model.attn_implementation=eager",
    "nodiag": "sharing=pizza_top model.force_nodiag=true optim=muon",
    "compiled": "sharing=sandwich_middle trainer.torch_compile=true",
}
CACHES = (
    "dynamic",
    "static",
    "sink cache.num_sinks=2 cache.window=24",
    "paged cache.page_size=4",
    "quantized cache.bits=4 cache.group_size=16 cache.residual_length=4",
    "quantized cache.layout=paged cache.group_size=8 cache.residual_length=0",
)
METHODS = ("inherit", "average", "aligned", "activation", "subspace")
VOLATILE = ("second", "memory", "time", "hardware", "version", "started", "speed", "commit", "eta", "path")


def commands() -> dict[str, str]:
    """The command lines, by the name of what they make; each may use what those before it have made."""
    lines = {f"train/{name}": f"train {SMOKE} run_dir=runs/{name} {given}" for name, given in PATTERNS.items()}
    for method in METHODS:
        lines[f"convert/{method}"] = f"convert source=runs/llama method={method} sharing=lckv out=to/{method}"
        lines[f"eval/{method}"] = f"evaluate model=to/{method} perplexity.max_documents=1 json=true"
    lines["train/distill"] = (
        f"train {SMOKE} run_dir=runs/distill init.source=runs/llama init.method=distill sharing=cla"
    )
    for name in ("llama", "yoco", "lckv", "mixed"):
        for cache in CACHES:
            prompts = "max_new_tokens=40 json=true prompts_file=prompts.txt batch_size=2"
            lines[f"generate/{name}/{cache}"] = f"generate model=runs/{name} {prompts} cache={cache}"
        evals = "evals=[perplexity,needle,recall] needle.num_samples=2 recall.num_samples=4"
        lines[f"eval/{name}"] = f"evaluate model=runs/{name} {evals} perplexity.max_documents=2"
    lines["harness"] = "evaluate model=runs/lckv evals=[harness] harness.limit=8 cache=quantized"
    lines["search"] = "search source=runs/llama budget=0.5 out=to/search calibration_tokens=2048 eval_tokens=256"
    lines["plan"] = "plan sharing=lckv model=tinyllama_1b context_length=8192"
    lines["benchmark"] = (
        "benchmark patterns=[llama,yoco,lckv] model=nano prompt_length=64 new_tokens=8 kv_budget=1MB rounds=1 "
        "output_dir=runs/benchmark json=true 'caches=[dynamic,paged,{name:quantized,bits:4}]'"
    )
    lines["report"] = "report runs out=report"
    return lines


def steady(value: Any) -> Any:
    """The value without what differs from run to run."""
    if isinstance(value, dict):
        return {key: steady(each) for key, each in value.items() if not any(word in key for word in VOLATILE)}
    return [steady(each) for each in value] if isinstance(value, list) else value


def files_of(folder: Path) -> dict[str, Any]:
    """What the JSON files below a folder hold."""
    found: dict[str, Any] = {}
    for file in sorted(folder.rglob("*.json*")):
        if {"model", "checkpoints", "init"} & set(file.parts) or file.suffix not in (".json", ".jsonl"):
            continue
        lines = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
        found[str(file.relative_to(folder))] = [steady(json.loads(line)) for line in lines if line.strip()]
    return found


def run(line: str) -> tuple[int, str, str]:
    """Runs one command in this process, which saves the seconds that imports take: exit code, output, errors."""
    module, *arguments = shlex.split(line)
    sys.argv = [module, *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_module(f"lckv.{module}", run_name="__main__")
        except SystemExit as stopped:
            return int(stopped.code or 0), out.getvalue(), err.getvalue()
    return 0, out.getvalue(), err.getvalue()


def main() -> None:
    """Runs all commands in a new folder."""
    target = Path(sys.argv[1]).absolute()
    sys.path.insert(0, os.getcwd())
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("prompts.txt").write_text("In the beginning God created\nAnd the\nBlessed are they that\n")
        for name, line in commands().items():
            code, out, err = run(line)
            printed: Any = out if name == "plan" else None
            if "json=true" in line and code == 0:
                printed = steady(json.loads(out))
            error = err.strip().splitlines()[-1:] if code else []
            figures[name] = {"exit": code, "error": error, "printed": printed}
            print(name, code, *error, flush=True)
        figures["files"] = {each: files_of(Path(each)) for each in ("runs", "to", "report")}
        target.write_text(json.dumps(figures, indent=1, sort_keys=True))


if __name__ == "__main__":
    main()
