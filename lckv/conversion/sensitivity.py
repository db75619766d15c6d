"""How much a pretrained model's predictions depend on the keys and values of every token, measured on text.

Which directions of keys and values matter is asked of the model itself: text runs through it, what it would say next
is drawn from its own distribution, and the gradient of that prediction's loss with respect to keys and values says how
the distribution changes with them (the Fisher information). Its covariance weighs the directions of a layer's keys and
values; its size weighs tokens, so that those that much attends to count more; and as all layers share one loss, what
is lost in one layer compares with what is lost in another, in keys with values, whatever the architecture between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lckv.conversion.calibration import InputMoments
from lckv.conversion.heads import AttentionHeads, Tensors, layer_prefix, read_finite
from lckv.errors import UserError
from lckv.models import LCKVLlamaConfig, LCKVLlamaForCausalLM

KEYS, VALUES = "k_proj", "v_proj"
"""The projections whose outputs are looked at, before norms and rotations."""

_TAPPED = (KEYS, VALUES)

_ROWS_AT_ONCE = 32
"""Tokens whose distributions over the vocabulary are in memory at a time."""


class Sensitivity:
    """Second moments of inputs, weighted by token, and of gradients, of the layers that compute keys and values.

    Args:
        groups: for each layer that will write, the layers of the source whose keys and values are to be made of it.
        weighs_alike: whether a token counts the same in all groups, so that their moments compare: as much as keys and
            values of any layer depend on it. Second moments of every layer of a group are there, then.

    Attributes:
        moments: for each group the second moments of its layers' inputs, under the layers' pairs. A token counts as
            much as the keys and values of the group depend on it, in the mean over all of them.
        gradients: for each layer and projection, the mean of `g g^T` over tokens, `(kv_size, kv_size)` in float64,
            where `g` is the loss's gradient with respect to what the projection gives.
        num_tokens: that were looked at; 0 if there was no text.
        seq_length: of the longest text among them.
    """

    def __init__(self, groups: dict[int, tuple[int, ...]], *, weighs_alike: bool = False) -> None:
        self.groups, self.weighs_alike = groups, weighs_alike
        self.layers = sorted({layer for sources in groups.values() for layer in sources})
        self.inputs = sorted({*groups, *self.layers})
        pairs = {owner: {(owner, owner)} | {(owner, each) for each in sources} for owner, sources in groups.items()}
        if weighs_alike:
            own = {(layer, layer) for layer in self.layers}
            self.moments = dict.fromkeys(groups, InputMoments(own.union(*pairs.values()), has_ones=False))
        else:
            self.moments = {owner: InputMoments(pairs[owner], has_ones=False) for owner in groups}
        self.gradients: dict[tuple[int, str], Tensor] = {}
        self.num_tokens = self.seq_length = 0
        self._scales: dict[tuple[int, str], Tensor] = {}

    def add(self, inputs: dict[int, Tensor], gradients: dict[tuple[int, str], Tensor]) -> None:
        """Adds a batch: of each layer the inputs `(batch, q_len, hidden_size)`, and gradients `(..., kv_size)`."""
        num_tokens = next(iter(inputs.values())).shape[:2].numel()
        sizes = {}
        for place, gradient in gradients.items():
            rows = gradient.flatten(0, 1).float()
            product = (rows.T @ rows).cpu().double()
            old = self.gradients.get(place, 0.0)
            self.gradients[place] = old + (product / num_tokens - old) * (num_tokens / (self.num_tokens + num_tokens))
            sizes[place] = rows.norm(dim=1)
            # Measured once: the first text says how large gradients are, so that all projections count alike.
            self._scales.setdefault(place, sizes[place].mean().clamp(min=torch.finfo(torch.float32).tiny))
        groups = {next(iter(self.groups)): tuple(self.layers)} if self.weighs_alike else self.groups
        for owner, sources in groups.items():
            places = [place for place in sizes if place[0] in sources]
            weights = torch.stack([sizes[place] / self._scales[place] for place in places]).mean(0)
            shape = (*inputs[owner].shape[:2], 1)
            kept = {layer: inputs[layer].float() * weights.sqrt().view(shape) for layer in {owner, *sources}}
            self.moments[owner].add(kept)
        self.num_tokens += num_tokens
        self.seq_length = max(self.seq_length, next(iter(inputs.values())).shape[1])


def measure_sensitivity(
    model: LCKVLlamaForCausalLM,
    batches: Iterable[dict[str, Tensor]],
    groups: dict[int, tuple[int, ...]],
    *,
    weighs_alike: bool = False,
    seed: int = 0,
    on_batch: Callable[[int], Any] | None = None,
) -> Sensitivity:
    """Runs text through a model, and back.

    No more than one layer's activations are in memory, beside what leaves each of them.

    Args:
        model: a model of ours, in evaluation mode.
        batches: `input_ids` and `position_ids`, each `(batch, q_len)`, and perhaps `labels`.
        groups: see [`Sensitivity`].
        weighs_alike: see there.
        seed: of the predictions that are drawn.
        on_batch: called after each batch with the number of its tokens.

    Raises:
        UserError: if what a layer computes, or what comes back to it, is not finite.
    """
    sensitivity = Sensitivity(groups, weighs_alike=weighs_alike)
    generator = torch.Generator(model.device).manual_seed(seed)
    needs_grad = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with ExitStack() as stack:
        stack.callback(lambda: [parameter.requires_grad_(True) for parameter in needs_grad])
        model.requires_grad_(False)
        stack.enter_context(_recomputing(model))
        taps = stack.enter_context(_Taps(model, sensitivity.inputs, sensitivity.layers))
        for batch in batches:
            batch = {name: batch[name].to(model.device) for name in ("input_ids", "position_ids")}
            gradients = _gradients(model, batch, taps, generator)
            sensitivity.add(taps.inputs, gradients)
            if on_batch is not None:
                on_batch(batch["input_ids"].numel())
    return sensitivity


def assume_sensitivity(tensors: Tensors, config: LCKVLlamaConfig, groups: dict[int, tuple[int, ...]]) -> Sensitivity:
    """The same from the weights alone, for want of text: what the norms in front of the projections make likely.

    A normalised input has independent numbers of the norm's sizes. Values count as the output projection reads them,
    keys as the queries of such inputs do, and all projections alike.
    """
    sensitivity = Sensitivity(groups)
    scales = {
        layer: read_finite(tensors, f"model.layers.{layer}.input_layernorm.weight") for layer in sensitivity.inputs
    }
    for owner, moments in sensitivity.moments.items():
        moments.add({layer: scales[layer].diag()[None] for layer in {owner, *groups[owner]}})
    for layer in sensitivity.layers:
        heads = AttentionHeads.read(tensors, layer, config, config.sharing_plan.sources[layer])
        queries = heads.query[..., : heads.hidden_size] * scales[layer]  # without biases
        grams = {
            KEYS: torch.einsum("hgdi,hgei->hde", queries, queries),
            VALUES: torch.einsum("hgid,hgie->hde", heads.output, heads.output),
        }
        for name, by_head in grams.items():
            if f"{layer_prefix(layer)}{name}.weight" not in tensors:  # which nobody reads
                continue
            gram = torch.block_diag(*by_head).double()
            weight = read_finite(tensors, f"{layer_prefix(layer)}{name}.weight").double() * scales[layer].double()
            sensitivity.gradients[layer, name] = gram / torch.trace(gram @ weight @ weight.T)
    return sensitivity


@contextmanager
def _recomputing(model: LCKVLlamaForCausalLM) -> Iterator[None]:
    """Within, layers keep no activations but compute them again on the way back, and drop nothing out."""
    attentions = [layer.self_attn for layer in model.model.layers]
    dropout, is_training = attentions[0].attention_dropout, model.training
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # its former name
    getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
    model.train()  # without which nothing is computed again
    for attention in attentions:
        attention.attention_dropout = 0.0
    try:
        yield
    finally:
        for attention in attentions:
            attention.attention_dropout = dropout
        model.train(is_training)
        getattr(model, f"{name}_checkpointing_disable")()


class _Taps(ExitStack):
    """Keeps what enters the layers in the last pass over them, and what their projections give in all graded ones.

    Where layers read upward, what those below read was written in the pass before.
    """

    def __init__(self, model: LCKVLlamaForCausalLM, inputs: list[int], layers: list[int]) -> None:
        super().__init__()
        self.inputs: dict[int, Tensor] = {}
        self.outputs: dict[tuple[int, str], list[Tensor]] = {}
        self.is_open = True
        for layer in inputs:
            norm = model.model.layers[layer].input_layernorm
            self.callback(norm.register_forward_hook(partial(self._enter, layer)).remove)
        for layer, name in product(layers, _TAPPED):
            projection = getattr(model.model.layers[layer].self_attn, name, None)
            if projection is not None:  # some layer reads it
                self.outputs[layer, name] = []
                self.callback(projection.register_forward_hook(partial(self._leave, (layer, name))).remove)

    # Nothing is kept while checkpointing recomputes, which makes other tensors of the same numbers.

    def _enter(self, layer: int, _module: Any, _args: Any, output: Tensor) -> None:
        if self.is_open:
            self.inputs[layer] = output.detach()

    def _leave(self, place: tuple[int, str], _module: Any, _args: Any, output: Tensor) -> None:
        if self.is_open and output.requires_grad:
            self.outputs[place].append(output)


def _gradients(
    model: LCKVLlamaForCausalLM, batch: dict[str, Tensor], taps: _Taps, generator: torch.Generator
) -> dict[tuple[int, str], Tensor]:
    """Gradients of one batch's loss with respect to what the tapped projections gave, `(batch, q_len, kv_size)`."""
    with torch.enable_grad():
        embeddings = model.model.embed_tokens(batch["input_ids"]).requires_grad_(True)
        taps.is_open = True
        states = model.model(inputs_embeds=embeddings, position_ids=batch["position_ids"], use_cache=False)[0]
        taps.is_open = False
    _check_finite(taps.inputs | {len(model.model.layers): states})
    above = _gradient_above(model, states.detach(), generator)
    tapped = [(place, output) for place, outputs in taps.outputs.items() for output in outputs]
    found = torch.autograd.grad(states, [output for _, output in tapped], above, allow_unused=True)
    gradients: dict[tuple[int, str], Tensor] = {}
    for (place, output), gradient in zip(tapped, found, strict=True):
        added = torch.zeros_like(output) if gradient is None else gradient
        gradients[place] = gradients[place] + added if place in gradients else added
    for outputs in taps.outputs.values():
        outputs.clear()
    _check_finite({layer: gradient for (layer, _), gradient in gradients.items()})
    return gradients


def _check_finite(states: dict[int, Tensor]) -> None:
    """Refuses numbers to which nothing can be fitted, of the lowest layer that has such."""
    if broken := [layer for layer, each in sorted(states.items()) if not each.isfinite().all()]:
        raise UserError(
            f"what enters layer {broken[0]} on the calibration text, or comes back to it, is not finite: the weights "
            "are broken, or their type is too narrow (bfloat16 reaches further than float16); take another source"
        )


def _gradient_above(model: LCKVLlamaForCausalLM, states: Tensor, generator: torch.Generator) -> Tensor:
    """The loss's gradient with respect to what leaves the last norm, `(batch, q_len, hidden_size)`."""
    parts = []
    for rows in states.flatten(0, 1).split(_ROWS_AT_ONCE):
        with torch.enable_grad():
            rows = rows.requires_grad_(True)
            logits = model.lm_head(rows).float()
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            loss = F.cross_entropy(logits, drawn, reduction="sum")
        parts.append(torch.autograd.grad(loss, rows)[0])
    return torch.cat(parts).view_as(states)
