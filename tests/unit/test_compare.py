"""`scripts/compare.py`, on run folders with known figures."""

import json
import subprocess
import sys
from pathlib import Path

from tests import commands

SCRIPT = Path(__file__).parents[2] / "scripts" / "compare.py"


def write_run(folder: Path, name: str, perplexity: float, written: int) -> Path:
    folder.mkdir(parents=True)
    results = {
        "run_name": name,
        "layer_types": "0_1",
        "num_parameters": 12345,
        "tokens": 200,
        "eval_loss": 2.5,
        "eval_perplexity": perplexity,
        "eval_bits_per_byte": None,
        "unigram_loss": 5.0,
        "unigram_perplexity": 148.41,
        "kv_bytes_context_length": 64,
        "kv_bytes": {"written": written, "resident": float(written), "resident_total": written * 64, "read": 777},
        "seconds": 61.0,
        "tokens_per_second": 1000.0,
        "peak_memory_bytes": 3 * 2**20,
    }
    (folder / "results.json").write_text(json.dumps(results))
    lines = [{"step": 1, "tokens": 100, "eval_loss": 3.0}, {"step": 2, "tokens": 200, "loss": 2.4}]
    lines.append({"step": 2, "tokens": 200, "eval_loss": 2.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def compare(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return commands.run(command, cwd)


def test_table_and_picture(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", "first", 12.18, 512), write_run(tmp_path / "b", "second", 13.57, 384)]
    process = compare(*runs, "--picture", tmp_path / "both.png", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    cells = {row[0]: row[1:] for row in ([cell.strip() for cell in line.split("│")[1:-1]] for line in table(process))}
    assert cells["validation perplexity"] == ["12.18", "13.57"]
    assert cells["KV bytes written per token"] == ["512", "384"]
    assert cells["training time"] == ["61 s", "61 s"]
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


def table(process: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in process.stdout.splitlines() if line.startswith("│")]


def test_unfinished_run_is_named(tmp_path: Path) -> None:
    process = compare(tmp_path / "nothing", cwd=tmp_path)
    assert process.returncode == 1
    assert len(process.stderr.splitlines()) == 1
    assert "nothing/results.json" in process.stderr
