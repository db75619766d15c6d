"""What can be configured of conversions, and of the search for a pattern."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from lckv.config.data import DataConfig
from lckv.config.evaluation import EvaluationConfig
from lckv.config.keys import Group, above_zero, at_least, key, literal, one_of, passes
from lckv.config.model import LatentConfig, ModelConfig, SharingConfig
from lckv.config.names import AUTO_LATENT, LATENTS, METHODS, TRAINED, XKV
from lckv.config.pretrained import CalibrationConfig, InitConfig, TeacherConfig
from lckv.config.training import (
    LoggerConfig,
    OptimConfig,
    TrainConfig,
    TrainerConfig,
    refuse_random,
    seed_of_32_bits,
)
from lckv.errors import UserError
from lckv.utils.byte_sizes import parse_budget, parse_bytes

_GIVE_BOTH = "give one: python -m lckv.convert source=MODEL model.layer_types=... out=FOLDER"


@dataclass
class ConvertConfig(Group):
    """Everything that `python -m lckv.convert` needs, and what the method `distill` trains with.

    Attributes:
        source: the pretrained model: a run folder, a folder, a GGUF file, or a name on the Hub.
        revision: only for the Hub: branch, tag or commit.
        method: how keys and values that layers are to share come from those that each computes in the source.
        out: the folder to write; it must not be there yet.
        max_shard_size: bytes of a file of weights, such as `5GB`.
        device: where calibration text runs: "cpu", "cuda" or "cuda:1"; "auto": an accelerator, if there is one.
        model: how cycles are iterated, and with `distill` the type of the weights; sizes are the source's.
        init: what methods that look at text do with it.
        run_name: with `distill`, what trackers call the run.
    """

    source: str | None = literal(required=_GIVE_BOTH)
    revision: str | None = None
    method: str = key("average", one_of(METHODS))
    out: str | None = literal(required=_GIVE_BOTH)
    max_shard_size: str = key("5GB", lambda name, value: parse_bytes(value, name))
    device: str = "auto"
    model: ModelConfig = field(default_factory=ModelConfig)
    init: CalibrationConfig = field(default_factory=CalibrationConfig)
    sharing: SharingConfig = field(default_factory=SharingConfig)
    latent: LatentConfig = field(default_factory=LatentConfig)
    data: DataConfig = field(default_factory=DataConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    seed: int = key(0, seed_of_32_bits)
    run_name: str | None = None

    def training(self) -> TrainConfig:
        """What `lckv.train` is asked for by the methods that train; the others read the model and the text of it."""
        shared = {item.name: getattr(self, item.name) for item in fields(TrainConfig) if hasattr(self, item.name)}
        init = InitConfig(**vars(self.init), source=self.source, revision=self.revision, method=self.method)
        return TrainConfig(**shared | {"init": init})

    def check(self, prefix: str) -> None:
        """Refuses what the training would, and that there is no one pattern to convert to."""
        refuse_random(self.sharing)
        self.training().check(prefix)


@dataclass
class SearchConfig(Group):
    """Everything that `python -m lckv.search` needs.

    Attributes:
        source: the pretrained model: a run folder, a folder, a GGUF file, or a name on the Hub.
        revision: only for the Hub: branch, tag or commit.
        budget: how much KV may remain: a fraction such as 0.5, or bytes per token in the model's type, such
            as `12KiB`.
        method: how keys and values that layers are to share come from those that each computes in the source.
        directions: where a layer that gives up its KV may look: "down" at the next owner below, "both" also at the
            next one above.
        split_sources: whether in the end, among as many owners as the budget has room for, layers may read the keys of
            one and the values of another where that loses less. For each such layer and owner, two scores more.
        beam: how many patterns of each number of owners to go on from.
        shortlist: how many of each one's successors to score.
        max_distance: how many layers a layer and the one that it reads may be apart at most, of those that compute KV
            in the source, which bounds memory: `hidden_size`^2 * 8 bytes for each layer and distance, with methods
            that look at text. None: twice what equal groups would need; with latents, 3.
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
        latent: the kind of latents that owners are to keep; the budget says how large they are.
    """

    source: str | None = literal(required="give one: python -m lckv.search source=MODEL budget=0.5")
    revision: str | None = None
    budget: Any = None
    method: str = key("subspace", one_of(METHODS))
    directions: str = key("down", one_of(("down", "both")))
    split_sources: bool = False
    beam: int = key(1, at_least())
    shortlist: int = key(4, at_least())
    max_distance: int | None = key(None, at_least())
    calibration_tokens: int = key(32768, at_least())
    ridge: float = key(1e-2, above_zero)
    eval_tokens: int = key(1024, at_least())
    validation_tokens: int = key(4096, at_least())
    forward_passes: Any = key("converge", passes)
    converge_tolerance: float = key(1e-3, above_zero)
    baselines: bool = True
    data: DataConfig = field(default_factory=DataConfig)
    out: str | None = literal()
    device: str = "auto"
    num_threads: int | None = key(None, at_least())
    latent: LatentConfig = field(default_factory=LatentConfig)

    @property
    def converted_by(self) -> str:
        """The method, or the kind of latents."""
        return f"latent={self.latent.name}" if self.latent.is_used else self.method

    def check(self, prefix: str) -> None:
        """Refuses a budget that is none, and methods that are no way to try many patterns."""
        parse_budget(self.budget)
        self.data.check_trains(f"{prefix}data.")
        if self.latent.name in (XKV, AUTO_LATENT):
            allowed = ", ".join(name for name in LATENTS if name != XKV)
            raise UserError(
                f"{prefix}latent={self.latent.name}: the search finds groups itself; allowed are {allowed}"
            )
        if self.method in TRAINED:
            untrained = ", ".join(name for name in METHODS if name not in TRAINED)
            given = f"{prefix}method={self.method}"
            raise UserError(f"{given}: would train every pattern that is tried; allowed are {untrained}")
