"""How much a sharing pattern changes what a pretrained model says, without writing the converted model anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lckv.conversion.calibration import InputMoments
from lckv.conversion.heads import Tensors
from lckv.conversion.methods import Group, changed_owners, make_tensors
from lckv.conversion.target import converted_config, converted_tensors
from lckv.models import LCKVLlamaConfig, LCKVLlamaForCausalLM
from lckv.sharing.patterns import LayerPlan, SharingPlan, join_layer_types, parse_layer_types

_GroupKey = tuple[int, tuple[tuple[int, tuple[int, int]], ...]]
"""An owner and its readers, with what each of them reads."""


@dataclass
class Converter:
    """Converts a model in memory, into models that share with it all tensors that stay as they are.

    What a method has made for an owner and its readers is kept for the next pattern that has them, until `forget`.

    Attributes:
        model: the pretrained model.
        method: a name in `METHODS`.
        moments: for methods that look at calibration text, of all pairs of layers that will be asked for.
        ridge: for these, too.
        settings: other arguments of `LCKVLlamaConfig` that change, such as `forward_passes`.
    """

    model: LCKVLlamaForCausalLM
    method: str
    moments: InputMoments | None = None
    ridge: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)
    _made: dict[_GroupKey, dict[str, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._tensors: Tensors = self.model.state_dict()
        # Methods work on the CPU; there, this is the same tensors again.
        self._on_cpu: Tensors = {name: tensor.cpu() for name, tensor in self._tensors.items()}

    @property
    def config(self) -> LCKVLlamaConfig:
        """The pretrained model's."""
        return self.model.config

    def build(self, plan: SharingPlan, start: int = 0) -> LCKVLlamaForCausalLM:
        """The model with another sharing pattern, in evaluation mode.

        Args:
            plan: the pattern, of all layers.
            start: leave out the layers below this one, none of which may be read by one that stays; the embeddings'
                place is then taken by `inputs_embeds`.
        """
        upper = _without_layers_below(plan, start)
        labels = self.config.rope_layer_types
        config = converted_config(
            self.config,
            upper,
            num_hidden_layers=upper.num_hidden_layers,
            rope_layer_types=labels and labels[start:],
            learned_positions=self.config.learned_positions and start == 0,  # else what enters has its own
            **self.settings,
        )
        with torch.device("meta"):
            model = LCKVLlamaForCausalLM(config)
        shapes = {_shifted(name, start): tensor.shape for name, tensor in model.state_dict().items()}
        own = self.config.sharing_plan
        converted = dict(converted_tensors(self._tensors, own, plan, shapes, self.method, partial(self._make, plan)))
        model.load_state_dict({name: converted[_shifted(name, start)] for name in model.state_dict()}, assign=True)
        model.model.rotary_emb = self.model.model.rotary_emb  # whose tables no checkpoint holds
        return model.eval()

    def forget(self, plans: Sequence[SharingPlan]) -> None:
        """Drops what was made for owners and readers that none of these patterns has."""
        own = self.config.sharing_plan
        kept = {_key_of(plan, owner) for plan in plans for owner in changed_owners(plan, own)}
        self._made = {key: made for key, made in self._made.items() if key in kept}

    def _make(self, plan: SharingPlan, owner: int) -> dict[str, Tensor]:
        key = _key_of(plan, owner)
        if key not in self._made:
            group = Group(owner, plan, self._on_cpu, self.config, self.moments, self.ridge)
            made = make_tensors(self.method, group)
            self._made[key] = {name: tensor.to(self.model.device) for name, tensor in made.items()}
        return self._made[key]


def _key_of(plan: SharingPlan, owner: int) -> _GroupKey:
    return owner, tuple((layer.layer_idx, layer.sources) for layer in plan.readers(owner))


@dataclass(frozen=True)
class Score:
    """What came of a pattern.

    Attributes:
        loss: the divergence from the pretrained model's predictions, in nats per token.
        inputs: for each layer what enters it, `(batch, block_size, hidden_size)`.
    """

    loss: float
    inputs: tuple[Tensor, ...]


class Scorer:
    """Measures on a few blocks of text how far converted models are from the pretrained one.

    The measure is the Kullback-Leibler divergence of the next-token distributions from the pretrained model's, a mean
    over tokens: how many nats per token the conversion would cost on text that the pretrained model itself had
    written. On few tokens it says more than the loss on the text, which looks at one word of each distribution only;
    it is zero for the pretrained model, and never negative.

    The pretrained model's distributions stay in memory: 4 bytes for every token and entry of the vocabulary. The text
    is `input_ids` and `position_ids`, each `(batch, block_size)`.
    """

    def __init__(self, model: LCKVLlamaForCausalLM, batch: dict[str, Tensor]) -> None:
        self._position_ids = batch["position_ids"].to(model.device)
        with torch.no_grad():
            embeddings = model.model.embed_tokens(batch["input_ids"].to(model.device))
            self.original, states = self._run(model, (embeddings,))
            self._log_probs = [model.lm_head(row).float().log_softmax(-1) for row in states]

    @torch.no_grad()
    def score(self, model: LCKVLlamaForCausalLM, start: int = 0, inputs: tuple[Tensor, ...] | None = None) -> Score:
        """Scores a converted model, of which the layers below `start` are left out, as it is known what they do.

        Args:
            model: the layers from `start` on.
            start: how many are left out.
            inputs: for the layers up to `start`, or more, what enters them, `(batch, block_size, hidden_size)`; by
                default, what enters those of the pretrained model.
        """
        inputs = self.original if inputs is None else inputs
        above, states = self._run(model, inputs[start : start + 1])
        total = torch.zeros((), dtype=torch.float64)
        for row, expected in zip(states, self._log_probs, strict=True):
            log_probs = model.lm_head(row).float().log_softmax(-1)
            total += F.kl_div(log_probs, expected, log_target=True, reduction="none").sum(-1).double().sum().cpu()
        return Score(float(total) / self._position_ids.numel(), (*inputs[:start], *above))

    @torch.no_grad()
    def _run(self, model: LCKVLlamaForCausalLM, inputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
        """What enters each layer, and what leaves the last one's norm."""
        outputs = model.model(
            inputs_embeds=inputs[0], position_ids=self._position_ids, use_cache=False, output_hidden_states=True
        )
        assert outputs.hidden_states is not None and outputs.last_hidden_state is not None
        return (inputs[0], *outputs.hidden_states[1:-1]), outputs.last_hidden_state


def _without_layers_below(plan: SharingPlan, start: int) -> SharingPlan:
    kept: list[LayerPlan] = list(plan.layers[start:])
    assert all(min(layer.sources) >= start for layer in kept)
    sources = [(layer.key_source - start, layer.value_source - start) for layer in kept]
    return parse_layer_types(join_layer_types(sources, [layer.is_sliding for layer in kept]))


def _shifted(name: str, start: int) -> str:
    """What a tensor of a model without its `start` lowest layers is called in the whole model."""
    parts = name.split(".")
    if parts[:2] == ["model", "layers"]:
        parts[2] = str(int(parts[2]) + start)
    return ".".join(parts)
