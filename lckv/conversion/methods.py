"""How the keys and values of an owner come from those that its readers used to compute; a method is one function."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lckv.conversion.alignment import align, match_heads
from lckv.conversion.calibration import InputMoments, Pair
from lckv.conversion.fitting import fit_mean, fit_subspace, predict_from
from lckv.conversion.heads import AttentionHeads, Tensors, layer_prefix, read_finite
from lckv.conversion.source import EMBEDDINGS
from lckv.errors import UserError
from lckv.models import LCKVLlamaConfig
from lckv.sharing.patterns import SharingPlan
from lckv.utils.registry import Registry


@dataclass(frozen=True)
class Group:
    """An owner of keys, values or both, the layers that are to read them, and what a method may look at.

    Attributes:
        owner: the layer that computes them.
        plan: whose keys and values each layer is to read.
        tensors: of the source.
        config: the source's.
        moments: second moments of the layers' inputs on calibration text, where the method asks for them.
        ridge: a penalty on large weights, relative to the mean square of the inputs.
    """

    owner: int
    plan: SharingPlan
    tensors: Tensors
    config: LCKVLlamaConfig
    moments: InputMoments | None = None
    ridge: float = 0.0

    @cached_property
    def before(self) -> tuple[dict[int, int], dict[int, int]]:
        """See [`sources_before`]."""
        return sources_before(self.plan, self.config.sharing_plan, self.owner)

    @property
    def readers(self) -> list[int]:
        """The layers that attend to the owner's keys or values, perhaps without itself."""
        return [layer.layer_idx for layer in self.plan.readers(self.owner)]

    @cached_property
    def heads(self) -> dict[int, AttentionHeads]:
        """The readers' attention weights by head, with the keys and values that they read in the source."""
        own = self.config.sharing_plan.sources
        return {reader: self._read(reader, own[reader]) for reader in self.readers}

    @cached_property
    def references(self) -> dict[int, AttentionHeads]:
        """For each reader the keys and values that the layers compute in the source which it is to read."""
        sources = {reader: self.plan.sources[reader] for reader in self.readers}
        found = {each: self._read(self.owner, each) for each in {*sources.values()}}
        return {reader: found[each] for reader, each in sources.items()}

    @cached_property
    def matched(self) -> dict[int, AttentionHeads]:
        """The readers with heads in the order in which they are most like those of their references, on the text.

        Those that go on to read what they did keep their order, as nothing else of them may be made anew.
        """
        assert self.moments is not None
        own, now, matched = self.config.sharing_plan.sources, self.plan.sources, dict(self.heads)
        for reader, heads in self.heads.items():
            if own[reader] != now[reader]:
                of_keys, of_values = (
                    self.moments[pair].float() for pair in zip(own[reader], now[reader], strict=True)
                )
                order = match_heads(heads, self.references[reader], (of_keys, of_values))
                matched[reader] = heads.permuted(order)
        return matched

    def _read(self, layer_idx: int, sources: tuple[int, int]) -> AttentionHeads:
        return AttentionHeads.read(self.tensors, layer_idx, self.config, sources)

    def name(self, layer_idx: int, tensor: str) -> str:
        """The full name of an attention tensor."""
        return layer_prefix(layer_idx) + tensor

    def dtype(self, name: str) -> torch.dtype:
        """The type of a tensor in the source; that of its embeddings for one that it lacks."""
        return self.tensors[name if name in self.tensors else EMBEDDINGS].dtype

    def merged_norm(self) -> Tensor | None:
        """The mean of the key norms, `(head_dim,)`, behind what the readers read in the source, if there are any."""
        names = [self.name(source, "k_norm.weight") for source in self.before[0].values()]
        return _mean([self.tensors[name] for name in names]) if names[0] in self.tensors else None


Method = Callable[[Group], dict[str, Tensor]]
"""Gives the tensors that change or that the source lacks, under the names that the converted model has for them.

Those are the owner's KV, and what its readers read them with. Each is written in the shape and type that it has.
"""

METHODS: Registry[Method] = Registry("conversion method")
"""By the names in `lckv.config.names.METHODS`; those that are calibrated there get `Group.moments`."""

# Of the mean size of an input norm's entries: what is smaller stands for an input that the layer does not look at.
_NO_SCALE = 1e-3


def make_tensors(method: str, group: Group) -> dict[str, Tensor]:
    """What a method, a name in `METHODS`, makes for a group.

    Raises:
        UserError: if a number is not finite: the source's own is not, or its type does not reach so far.
    """
    return refuse_not_finite(f"method={method}", METHODS[method](group))


def refuse_not_finite(made_by: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, if all of their numbers are finite.

    Raises:
        UserError: naming what made them, and the first that is not.
    """
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise UserError(
                f"{made_by}: {name} comes out with numbers that are not finite: the source's own are not, or "
                f"{dtype} cannot hold them; allowed are sources of finite weights whose layers {dtype} can merge"
            )
    return tensors


@METHODS.register("inherit")
def inherit(group: Group) -> dict[str, Tensor]:
    """The owner keeps its own keys and values."""
    return {}


@METHODS.register("average")
def average(group: Group) -> dict[str, Tensor]:
    """The mean of what makes the readers' keys and values: projections, biases and key norms (Wu and Tu, ACL 2024)."""
    tensors = {}
    of_both = ("k_proj.weight", "k_proj.bias", "k_norm.weight"), ("v_proj.weight", "v_proj.bias")
    for names, sources in zip(of_both, group.before, strict=True):
        for name in names:
            if sources and group.name(group.owner, name) in group.tensors:
                merged = _mean([group.tensors[group.name(source, name)] for source in sources.values()])
                tensors[group.name(group.owner, name)] = merged
    return tensors


@METHODS.register("aligned")
def aligned(group: Group) -> dict[str, Tensor]:
    """The mean of projections whose heads were first permuted and rotated towards the owner's.

    Projections are compared with the layers' input norms multiplied in, as what they do to a normalised input.
    """
    own, now = group.config.sharing_plan.sources, group.plan.sources
    layers = {layer for reader in group.readers for layer in (*own[reader], *now[reader])}
    scales = {layer: _input_scale(group, layer) for layer in layers}
    turned = {}
    for reader, found in group.heads.items():
        heads = _scaled(found, *(scales[source] for source in own[reader]))
        reference = _scaled(group.references[reader], *(scales[source] for source in now[reader]))
        turned[reader] = heads if own[reader] == now[reader] else align(heads, reference)
    key, value = (
        torch.stack([getattr(turned[reader], name) for reader in sources]).mean(0) * _reciprocal(scales[group.owner])
        if sources
        else None
        for name, sources in zip(("key", "value"), group.before, strict=True)
    )
    return _tensors(group, key, value, turned)


@METHODS.register("activation")
def activation(group: Group) -> dict[str, Tensor]:
    """Keys and values that come closest, in the mean square, to what all readers computed on calibration text."""
    assert group.moments is not None
    of_both = [source for sources in group.before for source in sources.values()]
    predictors = predict_from(group.owner, of_both, group.moments, group.ridge)
    key, value = (
        fit_mean({reader: getattr(group.heads[reader], name) for reader in sources}, sources, predictors)
        if sources
        else None
        for name, sources in zip(("key", "value"), group.before, strict=True)
    )
    return _tensors(group, key, value, {})


@METHODS.register("distill")  # which then learns from the source; see `lckv.training.distillation`
@METHODS.register("subspace")
def subspace(group: Group) -> dict[str, Tensor]:
    """Alignment and fit in one: the shared keys and values from which all readers' own can best be made.

    Heads are matched first. See [`lckv.conversion.fitting.fit_subspace`].
    """
    assert group.moments is not None
    key, value, changed = fit_subspace(group.matched, *group.before, group.owner, group.moments, group.ridge)
    return _tensors(group, key, value, changed)


def sources_before(plan: SharingPlan, source: SharingPlan, owner: int) -> tuple[dict[int, int], dict[int, int]]:
    """For each layer that is to read an owner's keys, whose keys it reads in the source; and the same of values."""
    keys, values = (
        {layer: source.sources[layer][stream] for layer, now in enumerate(plan.sources) if now[stream] == owner}
        for stream in (0, 1)
    )
    return keys, values


def changed_owners(plan: SharingPlan, source: SharingPlan, changed: Collection[int | None] = ()) -> list[int]:
    """Every owner one of whose readers reads others in the source, or that is in `changed`.

    Both owners of a layer with two are among them if either is new to it, as its heads have one order for both.
    """
    return [
        owner
        for owner in plan.kv_owners
        if owner in changed or any(source.sources[layer.layer_idx] != layer.sources for layer in plan.readers(owner))
    ]


def needed_pairs(plan: SharingPlan, source: SharingPlan) -> list[Pair]:
    """The pairs of layers whose inputs a calibrated method multiplies."""
    pairs = set()
    for owner in changed_owners(plan, source):
        keys, values = sources_before(plan, source, owner)
        sources = {*keys.values(), *values.values()}
        pairs |= {(owner, owner)} | {(layer, owner) for layer in sources}
        pairs |= {(layer, layer) for layer in {*keys, *values, *sources}}
    return sorted(pairs)


def _tensors(
    group: Group, key: Tensor | None, value: Tensor | None, readers: Mapping[int, AttentionHeads]
) -> dict[str, Tensor]:
    """The changed tensors by their full names, in the types that they had: what a stream is written and read with."""
    owner, made = next(iter(group.references.values())), {}
    if key is not None:
        made[group.owner] = replace(owner, key=key, key_norm=group.merged_norm()).key_tensors()
    if value is not None:
        made[group.owner] = made.get(group.owner, {}) | replace(owner, value=value).value_tensors()
    for reader, heads in readers.items():
        of_keys = heads.query_tensors() if reader in group.before[0] else {}
        of_values = heads.output_tensors() if reader in group.before[1] else {}
        made[reader] = made.get(reader, {}) | of_keys | of_values
    tensors = {group.name(layer, name): tensor for layer, each in made.items() for name, tensor in each.items()}
    return {name: tensor.to(group.dtype(name)).contiguous() for name, tensor in tensors.items()}


def _mean(tensors: list[Tensor]) -> Tensor:
    """The mean, taken in float32 or wider, in the tensors' own type."""
    dtype = tensors[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    return torch.stack([tensor.to(wide) for tensor in tensors]).mean(0).to(dtype)


def _input_scale(group: Group, layer_idx: int) -> Tensor:
    """What the layer's input norm multiplies each dimension by, and one where a column stands for a bias."""
    scale = read_finite(group.tensors, f"model.layers.{layer_idx}.input_layernorm.weight")
    return torch.cat([scale, scale.new_ones(1)]) if group.config.attention_bias else scale


def _reciprocal(scale: Tensor) -> Tensor:
    """One over each number; zero for those next to zero, whose inputs are zero, about, whatever multiplies them."""
    return torch.where(scale.abs() <= _NO_SCALE * scale.abs().mean(), 0.0, 1 / scale)


def _scaled(heads: AttentionHeads, key_scale: Tensor, value_scale: Tensor) -> AttentionHeads:
    return replace(heads, key=heads.key * key_scale, value=heads.value * value_scale)
