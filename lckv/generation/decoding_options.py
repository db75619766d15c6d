"""How the next token is chosen, and when decoding stops, with settings that contradict each other refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lckv.errors import UserError

if TYPE_CHECKING:
    from transformers import GenerationConfig


@dataclass(frozen=True)
class DecodingOptions:
    """What `lckv.config.GenerateConfig` says about decoding; see there.

    Raises:
        UserError: for values out of range, and an option that would have no effect beside another.
    """

    max_new_tokens: int | None = None
    greedy: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    repetition_penalty: float = 1.0
    num_beams: int = 1

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "top_k", "num_beams"):
            _check(name, value := getattr(self, name), value is None or value >= 1, "1 or more")
        for name in ("temperature", "repetition_penalty"):
            _check(name, value := getattr(self, name), value is None or value > 0, "a number above 0")
        _check("top_p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "above 0, and 1 or less")
        _check("seed", self.seed, self.seed is None or 0 <= self.seed < 2**64, "0 or more")
        if self.greedy and (given := self._sampling_options()):
            name, value = next(iter(given.items()))
            raise UserError(f"{name}={value}: has no effect with greedy=true; leave one of them out")

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn at random."""
        return bool(self._sampling_options()) if self.greedy is None else not self.greedy

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

    def _sampling_options(self) -> dict[str, float]:
        given = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "seed")}
        return {name: value for name, value in given.items() if value is not None}


def _check(name: str, value: object, is_allowed: bool, allowed: str) -> None:
    if not is_allowed:
        raise UserError(f"{name}={value}: allowed is {allowed}")
