"""What came of prompts, as `lckv.generate` hands it out: figures for JSON, and a line for people."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from lckv.engine.requests import BatchStatistics
from lckv.generation.batch import Generation


class Answer(NamedTuple):
    """The tokens that follow a prompt, and why there are no more if something went wrong."""

    new_tokens: list[int]
    error: str | None = None


@dataclass(frozen=True)
class Part:
    """Answers to the next prompts, and what has been measured: JSON-able figures, if there are any, and in a line."""

    answers: list[Answer]
    figures: dict[str, Any] | None = None
    summary: str = ""


def batch_part(generation: Generation) -> Part:
    """What came of a batch."""
    num_new_tokens, speed = sum(map(len, generation.new_tokens)), generation.tokens_per_second
    per_token = generation.cache_bytes / generation.cache_tokens
    figures = asdict(generation)
    del figures["new_tokens"]
    figures |= {"num_new_tokens": num_new_tokens, "tokens_per_second": speed, "cache_bytes_per_token": per_token}
    parts = [count_tokens(num_new_tokens)]
    if speed is not None:
        parts.append(f"{speed:,.1f} tok/s")
    parts.append(f"first after {generation.first_token_seconds:.2f} s")
    parts.append(f"cache {generation.cache_bytes:,} bytes, {per_token:,.0f} per token")
    if max(generation.num_passes) > 1:
        parts.append(f"{max(generation.num_passes)} passes over the prompt")
    if generation.residual is not None:
        parts.append(f"KV residual {generation.residual:.1e}")
    return Part(list(map(Answer, generation.new_tokens)), figures, " · ".join(parts))


def requests_part(statistics: BatchStatistics) -> Part:
    """What all requests together took, behind the last of their answers."""
    figures = asdict(statistics)
    figures["num_new_tokens"] = figures.pop("num_generated_tokens")
    figures["tokens_per_second"] = statistics.tokens_per_second
    parts = [
        count_tokens(statistics.num_generated_tokens),
        f"{statistics.tokens_per_second:,.1f} tok/s",
        f"{statistics.num_steps:,} steps of up to {statistics.peak_rows:,} texts",
        f"cache up to {statistics.peak_used_bytes:,} bytes",
    ]
    if statistics.num_reused_tokens:
        parts.append(f"{statistics.num_reused_tokens:,} prompt tokens shared")
    if statistics.num_preemptions:
        parts.append(f"{statistics.num_preemptions:,} begun again for want of pages")
    return Part([], figures, " · ".join(parts))


def count_tokens(count: int) -> str:
    """Such as "1 token" or "1,234 tokens"."""
    return f"{count:,} token{'' if count == 1 else 's'}"
