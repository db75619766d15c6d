"""Layers that read other layers' keys and values, as llama.cpp's Gemma 4 with norms that are made to do nothing.

Gemma 4 also normalises each head's queries, keys and values, and what attention and MLP give. All its norms add the
same constant E to the mean square of x before they divide by the root of both. Where E is far the larger, a norm
divides by the root of E whatever x is. So hidden states are made large, all alike, and E as much larger, which norms
that a Llama has do not notice. What the additional norms are given is scaled to be small beside E, and their weights
undo it all. That of values has no weights: what it does is undone behind the attention of their readers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lckv.errors import UserError
from lckv.exporting.gguf_plain import (
    ROPE_DIVISORS,
    Description,
    Rotation,
    Weights,
    common_settings,
    find_rotation,
    named,
)
from lckv.exporting.gguf_reuse import Reuse
from lckv.models import LCKVLlamaConfig

_EMBEDDING_FACTOR, _LARGEST = 2.0**12, 2.0**15
"""What embeddings are multiplied by, and how large they may become: float16 ends at twice that."""

_LINEAR = math.sqrt(2e-4)
"""How large the root mean square may become, relative to the root of E: then the norm is linear to 1e-4. What texts
lead to is far smaller than what weights allow, and the error falls with the square."""

_EMBEDDING = "model.embed_tokens.weight"


def describe_gemma4(config: LCKVLlamaConfig, weights: Weights, reuse: Reuse) -> Description:
    """A model with layers that read others, or through a window, as Gemma 4.

    Args:
        config: of the model.
        weights: as of a plain Llama, by our names.
        reuse: who reads whom.

    Raises:
        UserError: for what that does not have.
    """
    window, is_sliding = config.sliding_window, reuse.is_sliding
    if not any(is_sliding):  # llama.cpp wants a window somewhere; one as wide as the context hides nothing
        window, is_sliding = config.max_position_embeddings, (True, *is_sliding[1:])
    full, sliding = (_find_rotation(config, is_sliding, slides) for slides in (False, True))
    if not sliding.is_plain:
        raise UserError("rope_parameters: llama.cpp's gemma4 scales no frequencies in layers with a window")
    if not config.rms_norm_eps:
        raise UserError("rms_norm_eps=0.0: llama.cpp's gemma4 needs a number above 0")
    inflated = Inflated(config, weights)
    settings = common_settings(config) | {
        "attention.layer_norm_rms_epsilon": inflated.constant,
        "attention.key_length_swa": config.head_dim,
        "attention.value_length_swa": config.head_dim,
        "attention.sliding_window": window,
        "attention.sliding_window_pattern": list(is_sliding),
        "attention.shared_kv_layers": reuse.num_readers,
        "rope.dimension_count_swa": config.head_dim,
        "rope.freq_base": full.theta,
        "rope.freq_base_swa": sliding.theta,
        "embedding_length_per_layer_input": 0,
        "final_logit_softcapping": config.final_logit_softcapping or 0.0,
    }
    divisors = {} if all(is_sliding) else {ROPE_DIVISORS: full.divisors}  # of layers without a window only
    return Description("gemma4", settings, named("gemma4", inflated.tensors()) | divisors)


def _find_rotation(config: LCKVLlamaConfig, is_sliding: Sequence[bool], slides: bool) -> Rotation:
    """How the layers rotate that have a window, or those that have none."""
    layers = [layer_idx for layer_idx, each in enumerate(is_sliding) if each is slides] or [0]
    labels = [config.query_label(layer_idx) for layer_idx in layers]
    if other := next((layer for layer, label in zip(layers, labels, strict=True) if label != labels[0]), None):
        raise UserError(f"rope_layer_types: layers {layers[0]} and {other} rotate differently, which llama.cpp cannot")
    return find_rotation(config, labels[0])


class Inflated:
    """A plain Llama as a Gemma 4 with larger hidden states.

    Args:
        config: of the model.
        weights: as of a plain Llama, by our names.

    Attributes:
        factor: what the file multiplies embeddings by.
        growth: what hidden states are multiplied by; Gemma multiplies embeddings by the root of their width.
        constant: what norms add to the mean square.
        root: what a linear norm divides by.
        shrinkage: what the values of each owner are multiplied by in the cache.
    """

    def __init__(self, config: LCKVLlamaConfig, weights: Weights) -> None:
        self.config, self.weights = config, weights
        self.factor = min(_EMBEDDING_FACTOR, _power_of_two(_LARGEST, float(weights[_EMBEDDING].abs().max())))
        self.growth = self.factor * math.sqrt(config.hidden_size)
        self.constant = self.growth**2 * config.rms_norm_eps
        self.root = math.sqrt(self.constant)
        self.shrinkage: dict[int, float] = {}

    def tensors(self) -> Weights:
        """All tensors, by the names that transformers has in a Gemma 4."""
        tensors = {name: tensor for name, tensor in self.weights.items() if not name.startswith("model.layers.")}
        tensors[_EMBEDDING] = tensors[_EMBEDDING] * self.factor
        if "lm_head.weight" not in tensors:  # the head is the embedding
            tensors["model.norm.weight"] = tensors["model.norm.weight"] / self.factor
        for layer_idx in range(self.config.sharing_plan.num_hidden_layers):
            for name, tensor in (self._attention(layer_idx) | self._mlp(layer_idx)).items():
                tensors[f"model.layers.{layer_idx}.{name}.weight"] = tensor
        return tensors

    def _attention(self, layer_idx: int) -> Weights:
        config, norm = self.config, self._get(layer_idx, "input_layernorm")
        assert config.head_dim is not None  # filled in by the configuration
        tensors = {"input_layernorm": norm, **self._heads(layer_idx, "q", norm, config.head_dim**-0.5)}
        source = config.sharing_plan.layers[layer_idx].key_source
        if source == layer_idx:
            tensors |= self._heads(layer_idx, "k", norm, 1.0)
            values = self._get(layer_idx, "self_attn.v_proj")
            scale = self._scale(self._largest_head(values * norm))
            tensors["self_attn.v_proj"] = values * scale
            self.shrinkage[layer_idx] = scale / self.root
        output = self._get(layer_idx, "self_attn.o_proj")
        # Weighted means of values are no larger than values, whose scale has this bound.
        largest = _LINEAR * _spectral_norm(output) * math.sqrt(output.shape[1] / output.shape[0])
        tensors["self_attn.o_proj"], undoing = self._undone(output, largest, self.growth / self.shrinkage[source])
        tensors["post_attention_layernorm"] = torch.full_like(norm, undoing)
        return tensors

    def _heads(self, layer_idx: int, part: str, norm: torch.Tensor, gain: float) -> Weights:
        """What makes queries or keys, `gain` times as large, and their norm."""
        head_dim = self.config.head_dim
        assert head_dim is not None  # filled in by the configuration
        matrix = self._get(layer_idx, f"self_attn.{part}_proj")
        if self.config.use_qk_norm:  # the constant has grown under this norm, too
            weight = self._get(layer_idx, f"self_attn.{part}_norm") * gain
            return {f"self_attn.{part}_proj": matrix * self.growth, f"self_attn.{part}_norm": weight}
        matrix, undoing = self._undone(matrix, self._largest_head(matrix * norm), gain)
        return {f"self_attn.{part}_proj": matrix, f"self_attn.{part}_norm": norm.new_full((head_dim,), undoing)}

    def _mlp(self, layer_idx: int) -> Weights:
        norm = self._get(layer_idx, "post_attention_layernorm")
        gate, up, down = (self._get(layer_idx, f"mlp.{part}_proj") for part in ("gate", "up", "down"))
        # Hidden states that a norm has left are no longer than the root of their width, times its weights; and the
        # activation makes nothing larger.
        width = norm.shape[0]
        longest = _spectral_norm(gate * norm) * float((up * norm).norm(dim=1).max()) * width
        down, undoing = self._undone(down, _spectral_norm(down) * longest / math.sqrt(width), self.growth)
        return {
            "pre_feedforward_layernorm": norm,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": down,
            "post_feedforward_layernorm": torch.full_like(norm, undoing),
        }

    def _get(self, layer_idx: int, name: str) -> torch.Tensor:
        return self.weights[f"model.layers.{layer_idx}.{name}.weight"]

    def _largest_head(self, matrix: torch.Tensor) -> float:
        """The largest root mean square of a head, of a matrix `(num_heads * head_dim, hidden_size)` behind a norm."""
        heads = matrix.unflatten(0, (-1, self.config.head_dim))
        return _spectral_norm(heads) * math.sqrt(matrix.shape[1] / heads.shape[1])

    def _undone(self, matrix: torch.Tensor, largest: float, gain: float) -> tuple[torch.Tensor, float]:
        """A matrix for whose products, of this root mean square at most, a norm is linear, and that norm's weight.

        Behind the norm is `gain` times what the matrix gave.
        """
        scale = self._scale(largest)
        return matrix * scale, gain * self.root / scale

    def _scale(self, largest: float) -> float:
        return _power_of_two(_LINEAR * self.root, largest)


def _spectral_norm(matrices: torch.Tensor) -> float:
    """By how much a matrix lengthens vectors at most; the largest of several, `(..., rows, columns)`."""
    matrices = matrices.float()
    if matrices.shape[-2] > matrices.shape[-1]:
        matrices = matrices.mT
    return float(torch.linalg.eigvalsh(matrices @ matrices.mT).amax().clamp(min=0).sqrt())


def _power_of_two(bound: float, size: float) -> float:
    """The largest power of two that takes `size` no further than `bound`: a factor that rounds nothing. 1 for zero."""
    return 2.0 ** math.floor(math.log2(bound / size)) if size else 1.0
