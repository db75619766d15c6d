"""What the columns of a report mean, and how far its figures can be trusted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from lckv.reporting.analysis import Report
from lckv.reporting.statistics import SIGNIFICANT


def method_notes(report: Report) -> list[str]:
    """Sentences for the end of a report."""
    contexts = {run.figure("kv_bytes_context_length") for run in report.finished} - {None}
    lengths = ", ".join(f"{each:,.0f}" for each in sorted(filter(None, contexts)))
    context = f" in a context of {lengths or 'the trained length in'} tokens"
    return [
        "KV written: bytes of keys and values that each new token adds, in 16 bits. KV resident: bytes held per "
        f"token. KV read: bytes loaded to decode one token. The last two{context}.",
        f"{_seeds(report)} Figures are means, with the sample standard deviation (n − 1) behind ±. Runs are averaged "
        "if they differ in no more than the seed and in settings that change no result.",
        "Tests: a t-test paired by seed where two groups have the same seeds, else Welch's; two-sided. p (Holm) is "
        f"adjusted for the number of tests against Llama, and within each budget; the level is {SIGNIFICANT}. The "
        "best of a budget was chosen on the same figures, which makes these p-values a little too small; two or "
        "three seeds detect nothing but large differences.",
        "Training FLOPs are counted, iterations included. Training time is measured, and compared only where "
        "hardware, number of threads and way of training are the same, as far as runs note them; what else the "
        "machine did falls into it. "
        f"{_hardware(report)}",
        _versions(report),
    ]


def _seeds(report: Report) -> str:
    counts = sorted({len(group.runs) for group in report.groups})
    if counts in ([], [1]):
        return "One seed for each pattern: no spread, no test."
    return f"{counts[0] if len(counts) == 1 else f'{counts[0]} to {counts[-1]}'} seeds for each pattern."


def _hardware(report: Report) -> str:
    found = {_machine(run.results.get("hardware")) for run in report.finished}
    return f"Hardware: {'; '.join(sorted(found)) or 'unknown'}."


def _machine(hardware: object) -> str:
    if not isinstance(hardware, Mapping):
        return "not noted"
    return f"{hardware.get('device')} ({hardware.get('num_cores')} cores, {hardware.get('num_threads')} threads used)"


def _versions(report: Report) -> str:
    known: dict[str, Counter[str]] = {}
    for run in report.finished:
        versions = run.results.get("versions")
        for name, version in versions.items() if isinstance(versions, Mapping) else ():
            known.setdefault(str(name), Counter())[str(version)] += 1
    parts = [f"{name} {', '.join(sorted(versions))}" for name, versions in known.items()]
    return f"Versions: {'; '.join(parts) or 'unknown'}."
