"""How the next token is chosen, and when decoding stops, with settings that contradict each other refused."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Self

from lckv.config import ChatConfig, GenerateConfig
from lckv.errors import UserError, check_whole_number

if TYPE_CHECKING:
    from transformers import GenerationConfig


_SMALLEST, _LARGEST = 1e-6, 1e6
"""Beyond these, temperatures and penalties make logits that are no longer finite."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, by the settings of these names in [`lckv.config.GenerateConfig`].

    Raises:
        UserError: for values out of range, and an option that would have no effect beside another.
    """

    greedy: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.top_k is not None:
            check_whole_number("top_k", self.top_k)
        for name in ("temperature", "repetition_penalty"):
            if (value := getattr(self, name)) is not None and not _SMALLEST <= value <= _LARGEST:
                raise UserError(f"{name}={value}: allowed is a number from {_SMALLEST:g} to {_LARGEST:g}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: allowed is a number above 0, up to 1")
        if self.seed is not None:
            check_whole_number("seed", self.seed, minimum=0)
            if self.seed >= 2**64:
                raise UserError(f"seed={self.seed}: allowed is less than 2**64")
        if self.greedy and (given := self._sampling_options()):
            name, value = next(iter(given.items()))
            raise UserError(f"{name}={value}: has no effect with greedy=true; leave one of them out")

    @classmethod
    def from_config(cls, cfg: ChatConfig | GenerateConfig) -> Self:
        """What the user asks for."""
        return cls(**{item.name: getattr(cfg, item.name) for item in fields(cls)})

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn at random."""
        return bool(self._sampling_options()) if self.greedy is None else not self.greedy

    def _sampling_options(self) -> dict[str, float]:
        given = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "seed")}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class DecodingOptions(Sampling):
    """What `lckv.config.GenerateConfig` says about decoding, which may pursue several continuations (beam search)."""

    num_beams: int = 1

    def generation_config(self, max_new_tokens: int, eos_token_id: int | list[int] | None) -> GenerationConfig:
        """The same for transformers, with nothing left to its defaults."""
        from transformers import GenerationConfig  # not at the top: mistakes are found before it is loaded

        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=self.samples,
            repetition_penalty=self.repetition_penalty,
            num_beams=self.num_beams,
            eos_token_id=eos_token_id,
            use_cache=True,
            disable_compile=True,
        )
        if self.samples:
            config.update(
                temperature=1.0 if self.temperature is None else self.temperature,
                top_k=self.top_k or 0,
                top_p=1.0 if self.top_p is None else self.top_p,
            )
        return config
