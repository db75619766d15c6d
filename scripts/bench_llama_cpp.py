"""Times llama.cpp on two GGUF files, prefill and decoding: `python scripts/bench_llama_cpp.py --help`.

The files take turns, each in a process of its own, so that other load on the machine falls on both. The speeds are
those that llama.cpp reports, as are the sizes of its caches, which are in float16.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ways import read_arguments, show

from lckv.benchmarking.results import median, ratio
from lckv.exporting.gguf_verification import run_llama_cpp

_CACHE = re.compile(r"llama_kv_cache: size = +([\d.]+) MiB \( *(\d+) cells, +(\d+) layers")
_PHASES = {"prefill": "prompt_per_second", "decoding": "predicted_per_second"}


def main() -> None:
    """Prints a table with a row per file: tokens per second, and what the second file gains."""
    arguments = read_arguments(__doc__, "baseline", "other", prompt=3000, new=64)
    files = (arguments.baseline, arguments.other)
    speeds: dict[str, dict[str, list[float]]] = {file: {phase: [] for phase in _PHASES} for file in files}
    caches = {}
    for _ in range(arguments.rounds):
        for file in files:
            timings, caches[file] = _run(Path(file), arguments.prompt, arguments.new, arguments.threads)
            for phase, name in _PHASES.items():
                speeds[file][phase].append(timings[name])
    rows: dict[str, dict[str, Any]] = {}
    for file in files:
        row: dict[str, Any] = {}
        for phase in _PHASES:
            row[f"{phase} tokens/s"] = median(speeds[file][phase])
            row[f"{phase} ratio"] = ratio(speeds[file][phase], speeds[files[0]][phase])
        row["cache MiB"] = sum(float(size) for size, _, _ in caches[file])
        row["layers x cells"] = ", ".join(f"{layers} x {cells}" for _, cells, layers in caches[file])
        rows[Path(file).name] = row
    show(rows, output=arguments.output)


def _run(
    file: Path, num_prompt: int, num_new: int, num_threads: int
) -> tuple[dict[str, float], list[tuple[str, str, str]]]:
    """What llama.cpp says of its speed, and of each cache: MiB, cells, layers."""
    prompt = [index % 200 + 20 for index in range(num_prompt)]
    request: dict[str, Any] = {"prompt": prompt, "n_predict": num_new, "ignore_eos": True, "temperature": 0}
    num_tokens = num_prompt + num_new
    answer, log = run_llama_cpp(file, "", [request], num_tokens, float32_cache=False, num_threads=num_threads)
    return answer["completions"][0]["timings"], _CACHE.findall(log)


if __name__ == "__main__":
    main()
