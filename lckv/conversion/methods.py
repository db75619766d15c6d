"""How the keys and values of an owner come from those that its readers used to compute; a method is one function."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lckv.conversion.alignment import align
from lckv.conversion.calibration import InputMoments, Pair
from lckv.conversion.fitting import fit_mean, fit_subspace
from lckv.conversion.heads import AttentionHeads, Tensors, layer_prefix, read_finite
from lckv.conversion.source import EMBEDDINGS
from lckv.errors import UserError
from lckv.models import LCKVLlamaConfig
from lckv.patterns import SharingPlan
from lckv.registry import Registry


@dataclass(frozen=True)
class Group:
    """An owner of keys and values, the layers that are to read them, and what a method may look at.

    Attributes:
        owner: the layer that computes keys and values.
        readers: the layers that attend to them, perhaps without the owner itself.
        tensors: of the source.
        config: the source's.
        moments: second moments of the layers' inputs on calibration text, where the method asks for them.
        ridge: a penalty on large weights, relative to the mean square of the inputs.
    """

    owner: int
    readers: tuple[int, ...]
    tensors: Tensors
    config: LCKVLlamaConfig
    moments: InputMoments | None = None
    ridge: float = 0.0

    @property
    def kv_sources(self) -> dict[int, int]:
        """For each reader, the layer whose keys and values it reads in the source."""
        kv_source = self.config.sharing_plan.kv_source
        return {reader: kv_source[reader] for reader in self.readers}

    def heads(self, layer_idx: int) -> AttentionHeads:
        """A reader's attention weights by head, with the keys and values that it reads in the source."""
        return AttentionHeads.read(self.tensors, layer_idx, self.config, self.kv_sources[layer_idx])

    def owner_heads(self) -> AttentionHeads:
        """The owner's attention weights by head, with the keys and values that it computes in the source."""
        return AttentionHeads.read(self.tensors, self.owner, self.config)

    def name(self, layer_idx: int, tensor: str) -> str:
        """The full name of an attention tensor."""
        return layer_prefix(layer_idx) + tensor

    def dtype(self, name: str) -> torch.dtype:
        """The type of a tensor in the source; that of its embeddings for one that it lacks."""
        return self.tensors[name if name in self.tensors else EMBEDDINGS].dtype

    def merged_norm(self) -> Tensor | None:
        """The mean of the key norms, `(head_dim,)`, behind what the readers read in the source, if there are any."""
        names = [self.name(kv_source, "k_norm.weight") for kv_source in self.kv_sources.values()]
        return _mean([self.tensors[name] for name in names]) if names[0] in self.tensors else None


Method = Callable[[Group], dict[str, Tensor]]
"""Gives the tensors that change or that the source lacks, under the names that the converted model has for them.

Those are the owner's KV, and what its readers read them with. Each is written in the shape and type that it has.
"""

METHODS: Registry[Method] = Registry("conversion method")
"""By the names in `lckv.config.names.METHODS`; those that are calibrated there get `Group.moments`."""
register = METHODS.register

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


@register("inherit")
def inherit(group: Group) -> dict[str, Tensor]:
    """The owner keeps its own keys and values."""
    return {}


@register("average")
def average(group: Group) -> dict[str, Tensor]:
    """The mean of what makes the readers' keys and values: projections, biases and key norms (Wu and Tu, ACL 2024)."""
    tensors = {}
    for name in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias", "k_norm.weight"):
        if group.name(group.owner, name) in group.tensors:
            merged = _mean([group.tensors[group.name(source, name)] for source in group.kv_sources.values()])
            tensors[group.name(group.owner, name)] = merged
    return tensors


@register("aligned")
def aligned(group: Group) -> dict[str, Tensor]:
    """The mean of projections whose heads were first permuted and rotated towards the owner's.

    Projections are compared with the layers' input norms multiplied in, as what they do to a normalised input.
    """
    scales = {layer: _input_scale(group, layer) for layer in {group.owner, *group.kv_sources.values()}}
    reference = _scaled(group.owner_heads(), scales[group.owner])
    turned = {}
    for reader, kv_source in group.kv_sources.items():
        heads = _scaled(group.heads(reader), scales[kv_source])
        turned[reader] = heads if kv_source == group.owner else align(heads, reference)
    merged = _scaled(
        replace(
            reference,
            key=torch.stack([heads.key for heads in turned.values()]).mean(0),
            value=torch.stack([heads.value for heads in turned.values()]).mean(0),
        ),
        _reciprocal(scales[group.owner]),
    )
    return _tensors(group, merged.key, merged.value, turned)


@register("activation")
def activation(group: Group) -> dict[str, Tensor]:
    """Keys and values that come closest, in the mean square, to what all readers computed on calibration text."""
    assert group.moments is not None
    heads = {reader: group.heads(reader) for reader in group.readers}
    key, value = fit_mean(heads, group.kv_sources, group.owner, group.moments, group.ridge)
    return _tensors(group, key, value, {})


@register("distill")  # which then learns from the source; see `lckv.training.distillation`
@register("subspace")
def subspace(group: Group) -> dict[str, Tensor]:
    """Alignment and fit in one: the shared keys and values from which all readers' own can best be made.

    See [`lckv.conversion.fitting.fit_subspace`].
    """
    assert group.moments is not None
    heads = {reader: group.heads(reader) for reader in group.readers}
    key, value, changed = fit_subspace(
        heads, group.owner_heads(), group.kv_sources, group.owner, group.moments, group.ridge
    )
    return _tensors(group, key, value, changed)


def groups_of(
    plan: SharingPlan, source: SharingPlan, changed: Collection[int | None] = ()
) -> list[tuple[int, tuple[int, ...]]]:
    """The owner and its readers, for every owner that some layer did not read in the source, or among `changed`."""
    groups = [(owner, tuple(layer.layer_idx for layer in plan.readers(owner))) for owner in plan.kv_owners]
    return [
        (owner, readers)
        for owner, readers in groups
        if owner in changed or any(source.kv_source[reader] != owner for reader in readers)
    ]


def needed_pairs(plan: SharingPlan, source: SharingPlan) -> list[Pair]:
    """The pairs of layers whose inputs a calibrated method multiplies."""
    pairs = set()
    for owner, readers in groups_of(plan, source):
        kv_sources = {source.kv_source[reader] for reader in readers}
        pairs |= {(owner, owner)} | {(layer, owner) for layer in kv_sources}
        pairs |= {(layer, layer) for layer in (*readers, *kv_sources)}
    return sorted(pairs)


def _tensors(group: Group, key: Tensor, value: Tensor, readers: Mapping[int, AttentionHeads]) -> dict[str, Tensor]:
    """The changed tensors by their full names, in the types that they had."""
    owner = replace(group.owner_heads(), key=key, value=value, key_norm=group.merged_norm())
    tensors = {group.name(group.owner, name): tensor for name, tensor in owner.kv_tensors().items()}
    for reader, heads in readers.items():
        tensors |= {group.name(reader, name): tensor for name, tensor in heads.reading_tensors().items()}
    return {name: tensor.to(group.dtype(name)).contiguous() for name, tensor in tensors.items()}


def _mean(tensors: list[Tensor]) -> Tensor:
    """The mean, taken in float32 or wider, in the tensors' own type."""
    dtype = tensors[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    return torch.stack([tensor.to(wide) for tensor in tensors]).mean(0).to(dtype)


def _input_scale(group: Group, layer_idx: int) -> Tensor:
    """What the layer's input norm multiplies each dimension by, and one where a column stands for a bias."""
    scale = read_finite(group.tensors, f"model.layers.{layer_idx}.input_layernorm.weight")
    has_bias = group.name(layer_idx, "k_proj.bias") in group.tensors
    return torch.cat([scale, scale.new_ones(1)]) if has_bias else scale


def _reciprocal(scale: Tensor) -> Tensor:
    """One over each number; zero for those next to zero, whose inputs are zero, about, whatever multiplies them."""
    return torch.where(scale.abs() <= _NO_SCALE * scale.abs().mean(), 0.0, 1 / scale)


def _scaled(heads: AttentionHeads, scale: Tensor) -> AttentionHeads:
    return replace(heads, key=heads.key * scale, value=heads.value * scale)
