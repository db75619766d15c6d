"""What vLLM is asked to serve, read as one of our models, and what of it cannot be served exactly."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch

from lckv.errors import UserError
from lckv.families import Reading, read_model
from lckv.families.tensors import our_tensors
from lckv.models import LCKVLlamaConfig, LCKVLlamaForCausalLM
from lckv.serving.hints import hinted_layer_types, read_hint
from lckv.serving.vllm import HINT, PATTERN_KEYS
from lckv.sharing.iteration import Iteration
from lckv.sharing.patterns import SharingPlan, describe_split

logger = logging.getLogger(__name__)

EXPERIMENTAL = "experimental"
"""The key of `--hf-overrides` that lets layers see earlier tokens alone, as those do that read a layer above them."""

_ENABLE = f"--hf-overrides '{{\"{EXPERIMENTAL}\": true}}'"
_ITERATION_KEYS = tuple(field.name for field in fields(Iteration))
_PASSES_OF_GROUPS = 4
"""Here no tokens take turns: so many passes over all at once bring about what one in groups does."""

_KEYS_AND_VALUES = re.compile(r"model\.layers\.\d+\.self_attn\.[kv]_(proj|norm)\.\w+")
_TIED = ("model.embed_tokens.weight", "lm_head.weight")
_ROPE_TYPES_BY_LENGTH = ("dynamic", "longrope")


@dataclass(frozen=True)
class Served:
    """A model as vLLM serves it.

    Attributes:
        config: the model's, with the pattern that it is served with.
        reading: how its stored tensors become ours.
        is_asked_for: whether the pattern is not the checkpoint's own, so that readers may have projections to leave
            out.
    """

    config: LCKVLlamaConfig
    reading: Reading
    is_asked_for: bool

    def tensors(self, stored: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of a checkpoint under our names, none more and none less than the model has.

        vLLM itself would let some be missing, and drop biases that the model has no place for.

        Raises:
            UserError: naming the first that is missing, or that another pattern would need.
        """
        with torch.device("meta"):
            missing = set(LCKVLlamaForCausalLM(self.config).state_dict())
        read, config = self.reading.read or our_tensors, self.reading.config
        tied = []
        for stored_name, tensor in stored:
            for name, change in read(stored_name, config).items():
                if name in missing:
                    missing.remove(name)
                    if self.config.tie_word_embeddings and name in _TIED:
                        tied.append(tensor)
                    yield name, change(tensor).contiguous()
                elif not self._is_left_out(name):
                    logger.warning("%s is not used", name)
        if len(tied) == 2 and not torch.equal(*tied):  # which transformers would not tie either, without a word
            raise UserError(f"tie_word_embeddings=True: the checkpoint has a {_TIED[1]} of its own; allowed is False")
        if tied:
            missing.discard(_TIED[1])
        if missing:
            raise UserError(f"{self._says} has {min(missing)}, which the checkpoint has not; it is of another pattern")

    def _is_left_out(self, name: str) -> bool:
        """Whether a tensor that the model has no place for is one that a reader of this pattern does not need."""
        if _KEYS_AND_VALUES.fullmatch(name) is None:
            return False
        if not self.is_asked_for:
            raise UserError(f"{self._says} has no {name}, which the checkpoint has; it is of another pattern")
        return True

    @property
    def _says(self) -> str:
        return f"layer_types={self.config.kv_sharing!r}: a model of this pattern"


def read_served(values: dict[str, Any]) -> Served:
    """Reads what vLLM has made of `config.json` and `--hf-overrides`.

    Args:
        values: a configuration of ours, or of any family that can be read as ours. As overrides only set attributes,
            a string may stand under `layer_types` where the family has a list, or nothing.

    Raises:
        UserError: for a model, a pattern or a hint that cannot be served, in one line.
    """
    own = {name: value for name, value in values.items() if name != "layer_types" or not isinstance(value, str)}
    reading = read_model(own)
    config = reading.config
    asked_for = _asked_for(values, config)
    if asked_for:
        passes = {name: values[name] for name in _ITERATION_KEYS if name in values}
        config = LCKVLlamaConfig.from_dict({**config.to_dict(), **passes, **asked_for})
    check_served(config, values.get(EXPERIMENTAL, False))
    return Served(config, reading, bool(asked_for))


def _asked_for(values: dict[str, Any], config: LCKVLlamaConfig) -> dict[str, Any]:
    """The settings of `config` that the overrides ask for; none for the model's own pattern."""
    if values.get(HINT) is not None:
        layer_types = hinted_layer_types(values[HINT], len(config.sharing_plan.layers), key=HINT)
        window = read_hint(values[HINT], HINT).sliding_window
        return {"layer_types": layer_types} | ({} if window is None else {"sliding_window": window})
    is_ours = values.get("model_type") == LCKVLlamaConfig.model_type
    names = [name for name in PATTERN_KEYS if not is_ours or name != "kv_sharing"]  # where ours have their own
    return next(({"layer_types": values[name]} for name in names if isinstance(values.get(name), str)), {})


def sees_past_alone(config: LCKVLlamaConfig) -> bool:
    """Whether some layer sees earlier tokens and not its own, which vLLM itself has no attention for."""
    return config.sharing_plan.has_cycles or config.force_nodiag


def num_passes(iteration: Iteration, num_tokens: int) -> int:
    """How often each cycle runs for a batch in which no request has more than `num_tokens` new tokens.

    As many passes as tokens are exact. That many are run where a configuration asks for an exact result, or to stop by
    what has changed: whatever is beside a request in its batch would change that, too.
    """
    if iteration.use_sequential or not isinstance(iteration.forward_passes, int):
        return num_tokens
    passes = iteration.forward_passes + iteration.backward_passes
    return min(num_tokens, passes * (_PASSES_OF_GROUPS if iteration.cyclic_groups > 1 else 1))


def check_served(config: LCKVLlamaConfig, experimental: bool) -> None:
    """Refuses what the layers for vLLM do not compute.

    Args:
        config: the model's, with the pattern that it is served with.
        experimental: whether layers may see earlier tokens alone.

    Raises:
        UserError: naming the setting.
    """
    plan = config.sharing_plan
    if experimental not in (True, False):
        raise UserError(f"{EXPERIMENTAL}={experimental!r}: allowed are true and false")
    if experimental and not sees_past_alone(config):
        raise UserError(
            f"{EXPERIMENTAL}=True: has no effect, as no layer of {plan.layer_types!r} reads a layer above it"
        )
    if plan.first_split is not None:
        raise UserError(
            f"layer_types={plan.layer_types!r}: {describe_split(plan.first_split)}, but layers of vLLM share the keys "
            "and values of one layer; allowed are entries of one number"
        )
    upward = next((layer for layer in plan.layers if layer.is_upward), None)
    if upward is not None and not experimental:
        raise UserError(
            f"layer_types={plan.layer_types!r}: layer {upward.layer_idx} reads layer {upward.key_source}, above it, "
            f"which vLLM serves only with {_ENABLE}; without it, allowed are layers that read themselves or layers "
            "below"
        )
    if config.force_nodiag and not experimental:
        raise UserError(f"force_nodiag=True: vLLM lets tokens see their own keys without {_ENABLE}; allowed is False")
    if sees_past_alone(config) and config.sliding_window == 1 and plan.has_windows:
        raise UserError("sliding_window=1: is the token itself, which not all layers see; allowed is 2 or more")
    if config.kv_latents is not None:
        owner = next(layer_idx for layer_idx, latents in enumerate(config.kv_latents) if latents is not None)
        raise UserError(
            f"kv_latents: layer {owner} keeps {config.kv_latents[owner]}, but vLLM's latent attention on a CPU has "
            "one size, 512 numbers and 64 rotated ones, and shares nothing between layers; allowed are keys and values"
        )
    for label, parameters in config.rotations.items():
        kind = parameters.get("rope_type", "default")
        if kind in _ROPE_TYPES_BY_LENGTH:
            where = "" if label is None else f"{label}."
            raise UserError(
                f"rope_parameters: {where}rope_type={kind!r} rotates by the length of the text, which a cache shared "
                "by requests cannot; allowed are those that do not, such as 'default', 'linear', 'llama3' and 'yarn'"
            )


def first_of_last_readers(plan: SharingPlan) -> int:
    """From which layer on no layer computes keys and values, so that nobody needs their outputs for a prompt."""
    return max(plan.kv_owners) + 1


def check_engine(vllm_config: Any, config: LCKVLlamaConfig) -> None:
    """Refuses options of vLLM with which a model that shares keys and values would be wrong, or gain nothing.

    Args:
        vllm_config: the engine's.
        config: the model's.

    Raises:
        UserError: naming the option.
    """
    if vllm_config.use_v2_model_runner:
        raise UserError(
            "VLLM_USE_V2_MODEL_RUNNER: layers that share keys and values were only seen to be right under the first "
            "model runner, and wrong without an error under the second (vLLM #43185); set it to 0"
        )
    option, plan = "--kv-sharing-fast-prefill", config.sharing_plan
    if sees_past_alone(config):
        check_eager(config, vllm_config.model_config.enforce_eager)
        untried = {
            option: vllm_config.cache_config.kv_sharing_fast_prefill,
            "--speculative-config": vllm_config.speculative_config is not None,
        }
        if any(untried.values()):
            name = next(filter(untried.get, untried))
            raise UserError(f"{name}: was not seen to be right with {EXPERIMENTAL}=True; allowed is one of the two")
    if not vllm_config.cache_config.kv_sharing_fast_prefill:
        return
    if vllm_config.speculative_config is not None:
        raise UserError(f"{option}: is wrong with speculative decoding; allowed is one of the two")
    last = plan.layers[-1]
    if last.computes_kv:
        raise UserError(
            f"{option}: has no effect, as the last layer of {plan.layer_types!r} computes keys and values; allowed "
            "are patterns that end with readers, such as YOCO's"
        )
    owner = plan.layers[first_of_last_readers(plan) - 1]
    if not owner.reads_itself or owner.is_sliding != plan.owner_is_sliding(owner.layer_idx):
        raise UserError(
            f"{option}: layer {owner.layer_idx} of {plan.layer_types!r} reads less than it keeps, or another layer, "
            "so that vLLM takes it for a reader; allowed are patterns whose last owner reads what it keeps"
        )


def check_eager(config: LCKVLlamaConfig, enforce_eager: bool) -> None:
    """Refuses compilation where layers run again and again.

    Raises:
        UserError: saying what to add.
    """
    if sees_past_alone(config) and not enforce_eager:
        raise UserError(
            f"{EXPERIMENTAL}=True: how often layers run depends on the batch, which no compiled graph can follow; add "
            "--enforce-eager"
        )
