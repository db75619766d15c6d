"""Times llama.cpp on GGUF files, prefill and decoding: `python scripts/time_llama_cpp.py --help`.

All files are read by one server each, in turns, so that a machine that is slower for a while is so for all of them.
"""

from __future__ import annotations

import re
import statistics
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from lckv.exporting.gguf_verification import run_llama_cpp

_CACHE = re.compile(r"llama_kv_cache: size = +([\d.]+ MiB) \( *(\d+) cells, +(\d+) layers")


def main() -> None:
    """Prints a line per file: the median speeds, and the caches that llama.cpp reports."""
    parser = ArgumentParser(description="Tokens per second of llama.cpp, median over repetitions.")
    parser.add_argument("files", nargs="+", type=Path, help="GGUF files")
    parser.add_argument("--prompt", type=int, default=896, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=96, help="tokens to decode behind it")
    parser.add_argument("--repeat", type=int, default=5, help="repetitions")
    parser.add_argument("--threads", type=int, default=1, help="threads")
    arguments = parser.parse_args()
    timings: dict[Path, list[dict[str, float]]] = {file: [] for file in arguments.files}
    logs = {}
    for _ in range(arguments.repeat):
        for file in arguments.files:
            timing, logs[file] = _time(file, arguments.prompt, arguments.new, arguments.threads)
            timings[file].append(timing)
    for file in arguments.files:
        speeds = [
            statistics.median(timing[f"{phase}_per_second"] for timing in timings[file])
            for phase in ("prompt", "predicted")
        ]
        caches = "; ".join(f"{size}, {layers} layers of {cells}" for size, cells, layers in _CACHE.findall(logs[file]))
        print(f"{file}: prefill {speeds[0]:,.0f} tokens/s, decoding {speeds[1]:,.0f} tokens/s; cache {caches}")


def _time(file: Path, num_prompt: int, num_new: int, num_threads: int) -> tuple[dict[str, float], str]:
    prompt = [index % 200 + 20 for index in range(num_prompt)]
    request: dict[str, Any] = {"prompt": prompt, "n_predict": num_new, "ignore_eos": True, "temperature": 0}
    answer, log = run_llama_cpp(
        file, "", [request], num_prompt + num_new, float32_cache=False, num_threads=num_threads
    )
    timings: dict[str, float] = answer["completions"][0]["timings"]
    return timings, log


if __name__ == "__main__":
    main()
