"""What can be configured of conversions, and of the search for a pattern."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lckv.config.literals import literal
from lckv.config.training import DataConfig, TrainConfig


@dataclass
class ConvertConfig(TrainConfig):
    """Everything that `python -m lckv.convert` needs; of the training, what the method `distill` does.

    Attributes:
        source: the pretrained model: a run folder, a folder, a GGUF file, or a name on the Hub.
        revision: only for the Hub: branch, tag or commit.
        method: how keys and values that layers are to share come from those that each computes in the source.
        out: the folder to write; it must not be there yet.
        max_shard_size: bytes of a file of weights, such as `5GB`.
        device: where calibration text runs: "cpu", "cuda" or "cuda:1"; "auto": an accelerator, if there is one.
    """

    source: str | None = literal()
    revision: str | None = None
    method: str = "average"
    out: str | None = literal()
    max_shard_size: str = "5GB"
    device: str = "auto"


@dataclass
class SearchConfig:
    """Everything that `python -m lckv.search` needs.

    Attributes:
        source: the pretrained model: a run folder, a folder, a GGUF file, or a name on the Hub.
        revision: only for the Hub: branch, tag or commit.
        budget: how much KV may remain: a fraction such as 0.5, or bytes per token in the model's type, such
            as `12KiB`.
        method: how keys and values that layers are to share come from those that each computes in the source.
        directions: where a layer that gives up its KV may look: "down" at the next owner below, "both" also at the
            next one above.
        beam: how many patterns of each number of owners to go on from.
        shortlist: how many of each one's successors to score.
        max_distance: how many layers a layer and the one that it reads may be apart at most, which bounds memory:
            `hidden_size`^2 * 8 bytes for each layer and distance, with methods that look at text. None: twice what
            equal groups would need.
        calibration_tokens: for methods that look at text: so many tokens of the training split.
        ridge: for these, too: the penalty on large weights, relative to the mean square of what they multiply.
        eval_tokens: on how many other tokens of the training split to score each pattern, which takes
            `vocab_size` * 4 bytes each.
        validation_tokens: on how many tokens of the validation split to measure the perplexity of the best ones.
        forward_passes: where layers read upward: passes before the last, or `converge`.
        converge_tolerance: with `converge`, the relative change of the KV at which the passes stop.
        baselines: whether patterns made by hand are measured beside the searched ones.
        data: the text.
        out: the folder to write; it must not be there yet. None: one in `runs/search/`.
        device: where the model runs: "cpu", "cuda" or "cuda:1"; "auto": an accelerator, if there is one.
        num_threads: torch's threads on a CPU; None: $OMP_NUM_THREADS, or the physical cores.
    """

    source: str | None = literal()
    revision: str | None = None
    budget: Any = None
    method: str = "subspace"
    directions: str = "down"
    beam: int = 1
    shortlist: int = 4
    max_distance: int | None = None
    calibration_tokens: int = 32768
    ridge: float = 1e-2
    eval_tokens: int = 1024
    validation_tokens: int = 4096
    forward_passes: Any = "converge"
    converge_tolerance: float = 1e-3
    baselines: bool = True
    data: DataConfig = field(default_factory=DataConfig)
    out: str | None = literal()
    device: str = "auto"
    num_threads: int | None = None
