"""Keys and values of a layer fitted in closed form to what its readers used to compute."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lckv.conversion.calibration import InputMoments
from lckv.conversion.heads import AttentionHeads, from_planes, to_planes

_TINY = 1e-30  # beside which numbers of any use are infinite, and whose square root is not lost in float64


def predictor(moments: InputMoments, reader: int, owner: int, ridge: float) -> Tensor:
    """The matrix `(inputs, inputs)` that predicts what enters layer `reader` from what enters layer `owner`.

    Args:
        moments: of both layers' inputs.
        reader: the layer to predict.
        owner: the layer to predict from.
        ridge: a penalty on large weights, relative to the mean square of the owner's inputs. What stands for a bias
            is not among them: shrinking it would move every key and value towards zero.
    """
    if reader == owner:
        return torch.eye(len(moments[owner, owner]), dtype=torch.float64)
    gram = moments[owner, owner]
    num_weights = len(gram) - moments.has_ones
    penalty = torch.zeros_like(gram.diagonal())
    penalty[:num_weights] = ridge * gram.diagonal()[:num_weights].mean()
    return torch.linalg.solve(gram + penalty.diag(), moments[owner, reader]).T


def predict_from(owner: int, sources: Iterable[int], moments: InputMoments, ridge: float) -> dict[int, Tensor]:
    """For each of these layers the matrix that predicts what enters it from what enters `owner`; see [`predictor`]."""
    return {source: predictor(moments, source, owner, ridge) for source in {*sources}}


def fit_mean(
    projections: Mapping[int, Tensor], sources: Mapping[int, int], predictors: Mapping[int, Tensor]
) -> Tensor:
    """The projection whose outputs come closest, in the mean square, to those that all readers read.

    Args:
        projections: of the readers, to keys or to values, each `(num_kv_heads, head_dim, inputs)`.
        sources: for each reader, the layer that computes these so far.
        predictors: of what enters these layers, from what enters the one that is to compute them.

    Returns:
        Like one of them.
    """
    predicted = [projections[reader].double() @ predictors[source] for reader, source in sources.items()]
    return torch.stack(predicted).mean(0).float()


def fit_subspace(
    matched: Mapping[int, AttentionHeads],
    key_sources: Mapping[int, int],
    value_sources: Mapping[int, int],
    owner: int,
    moments: InputMoments,
    ridge: float,
) -> tuple[Tensor | None, Tensor | None, dict[int, AttentionHeads]]:
    """Shared keys and values that tell most about each reader's own, and readers that make theirs of them.

    A reader's values are a matrix times the shared ones, and its keys, in each rotary plane, a complex number times
    the shared ones; its output projection and its queries take both over. The best shared values for given inputs are
    a reduced-rank regression (Izenman, 1975), weighted by what the output projections make of an error. The keys are
    the same with rank one in each plane, weighted by the power of the queries; where keys are normalised dimension by
    dimension, which no plane's factor commutes with, they are the mean's fit instead.

    Args:
        matched: the readers, with heads in the order in which they are most like those that they are to read.
        key_sources: for each reader of the owner's keys, the layer that computes its keys so far.
        value_sources: for each reader of the owner's values, the layer that computes its values so far.
        owner: the layer that is to compute them.
        moments: of the inputs of all these layers.
        ridge: see [`predictor`].

    Returns:
        The key and value projections, both `(num_kv_heads, head_dim, inputs)`, `None` for what nobody reads; and the
        changed readers.
    """
    predictors = predict_from(owner, (*key_sources.values(), *value_sources.values()), moments, ridge)
    eigenvalues, vectors = torch.linalg.eigh(moments[owner, owner])
    root = vectors * eigenvalues.clamp(min=0).sqrt()  # root @ root.T are the second moments of the owner's inputs
    key = value = None
    gains: dict[int, Tensor] = {}
    decoders: dict[int, Tensor] = {}
    of_keys, of_values = ([matched[reader] for reader in sources] for sources in (key_sources, value_sources))
    if of_keys and of_keys[0].key_norm is None:
        powers = [_query_power(matched[reader], moments[reader, reader]) for reader in key_sources]
        key, found = _fit_keys(of_keys, powers, [predictors[source] for source in key_sources.values()], root)
        gains = dict(zip(key_sources, found, strict=True))
    elif of_keys:
        key = fit_mean({reader: heads.key for reader, heads in matched.items()}, key_sources, predictors)
    if of_values:
        value, found = _fit_values(of_values, [predictors[source] for source in value_sources.values()], root)
        decoders = dict(zip(value_sources, found, strict=True))
    changed = {
        reader: turned.with_readers_changed(gains.get(reader), decoders.get(reader))
        for reader, turned in matched.items()
    }
    return key, value, changed


def _fit_keys(
    readers: Sequence[AttentionHeads], powers: Sequence[Tensor], predictors: Sequence[Tensor], root: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The shared key projection, and each reader's factor, complex `(num_kv_heads, head_dim / 2)`."""
    predicted = [to_planes(heads.key.double() @ matrix) for heads, matrix in zip(readers, predictors, strict=True)]
    # (num_kv_heads, head_dim / 2, readers, 1), and below (num_kv_heads, head_dim / 2, readers, inputs)
    weight = torch.stack([power.sqrt() for power in powers], dim=-1)[..., None]
    weighted = torch.stack(predicted, dim=2) * weight
    left = weighted @ root.to(weighted.dtype)
    top = torch.linalg.eigh(left @ left.mH).eigenvectors[..., -1:]
    shared = (top.mH @ weighted)[..., 0, :]
    gains = (top / weight)[..., 0]
    # Any factor may go from the readers to the keys: this one makes the keys as large as the readers' were.
    first = gains[..., :1]
    phase = torch.polar(torch.ones_like(first.abs()), first.angle())
    factor = gains.abs().square().mean(-1, keepdim=True).sqrt() * phase
    gains = (gains / factor).to(torch.complex64)
    return from_planes(shared * factor).float(), list(gains.unbind(-1))


def _fit_values(
    readers: Sequence[AttentionHeads], predictors: Sequence[Tensor], root: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The shared value projection, and each reader's matrix `(num_kv_heads, head_dim, head_dim)`."""
    predicted = [heads.value.double() @ matrix for heads, matrix in zip(readers, predictors, strict=True)]
    weights = [_output_weight(heads) for heads in readers]
    stacked = torch.cat([weight @ value for weight, value in zip(weights, predicted, strict=True)], dim=1)
    head_dim = predicted[0].shape[1]
    left = torch.linalg.svd(stacked @ root, full_matrices=False).U[..., :head_dim]
    shared = left.mT @ stacked  # (num_kv_heads, head_dim, inputs)
    size = torch.stack([_size(value @ root) for value in predicted]).mean(0)
    factor = size / _size(shared @ root)
    decoders = [
        (torch.linalg.solve(weight, part) / factor).float()
        for weight, part in zip(weights, left.split(head_dim, dim=1), strict=True)
    ]
    return (shared * factor).float(), decoders


def _query_power(heads: AttentionHeads, inputs: Tensor) -> Tensor:
    """The mean square of the queries that read a KV head, in each rotary plane: `(num_kv_heads, head_dim / 2)`."""
    query = heads.query.double()
    square = ((query @ inputs) * query).sum(-1).sum(1)  # (num_kv_heads, head_dim)
    power = sum(square.unflatten(-1, (2, -1)).unbind(-2))
    assert isinstance(power, Tensor)
    return _with_floor(power)


def _output_weight(heads: AttentionHeads) -> Tensor:
    """The symmetric root of how output projections weight an error of values, `(num_kv_heads, head_dim, head_dim)`."""
    output = heads.output.double()
    values, vectors = torch.linalg.eigh((output.mT @ output).sum(1))
    values = _with_floor(values).sqrt()
    return (vectors * values[:, None]) @ vectors.mT


def _with_floor(weights: Tensor) -> Tensor:
    """What is next to nothing raised to a little, so that it can be divided by; all may be zero, in new layers."""
    return weights.clamp(min=max(1e-9 * float(weights.mean()), _TINY))


def _size(states: Tensor) -> Tensor:
    """Root mean square of each head, `(num_heads, 1, 1)`, never zero."""
    return states.square().mean((1, 2), keepdim=True).sqrt().clamp(min=_TINY)
