"""The most memory that a piece of work needs at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

_WORK = "lckv: work"  # in the trace


def peak_bytes(work: Callable[[Any], Any], device: torch.device, prepare: Callable[[], Any] = lambda: None) -> int:
    """The most bytes that torch's allocator had handed out at once during `work`, beyond those before `prepare`.

    On a GPU it is what CUDA's caching allocator counts. On a CPU torch's profiler records every allocation of tensors,
    those inside kernels among them, but not the scratch memory of BLAS libraries. Unlike the resident size of the
    process, which never shrinks, it is the same at every run and belongs to `work` alone.

    Args:
        work: gets what `prepare` returns.
        device: where it runs.
        prepare: makes what `work` begins with; counts as long as it lives, but its own peak does not.
    """
    if device.type == "cuda":
        return _peak_on_gpu(work, device, prepare)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        prepared = prepare()
        with record_function(_WORK):
            work(prepared)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return _peak_of_trace(json.loads(path.read_text(encoding="utf-8"))["traceEvents"])


def _peak_on_gpu(work: Callable[[Any], Any], device: torch.device, prepare: Callable[[], Any]) -> int:
    before = torch.cuda.memory_allocated(device)
    prepared = prepare()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    work(prepared)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_of_trace(events: list[dict[str, Any]]) -> int:
    """The highest sum of the bytes taken and given back so far, from the beginning of the work on."""
    start = min(event["ts"] for event in events if event.get("name") == _WORK)
    memory = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    total = peak = 0
    for event in memory:
        before, total = total, total + event["args"]["Bytes"]
        if event["ts"] >= start:
            peak = max(peak, before, total)
    return peak
