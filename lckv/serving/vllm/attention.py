"""Attention over vLLM's cache, in which each owner has one place and readers have none."""

from __future__ import annotations

import copy

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.utils.torch_utils import _encode_layer_name

from lckv.errors import UserError
from lckv.models.configuration_lckv import LCKVLlamaConfig
from lckv.models.parts.rotary import rotary_embedding
from lckv.serving.vllm.strict_past import StrictPastAttention


class TableRotaryEmbedding(RotaryEmbedding):
    """vLLM's kernel for rotations, with the cosines and sines of our own rotary embedding.

    So every kind of scaling is exact, and planes that do not turn have the frequency zero.

    Args:
        config: the model's.
        label: which entry of `rope_parameters`; `None` for the only one.
        num_positions: tokens of the longest text.
        dtype: of queries and keys.
    """

    def __init__(self, config: LCKVLlamaConfig, label: str | None, num_positions: int, dtype: torch.dtype) -> None:
        with torch.device("cpu"):
            embedding = rotary_embedding(config, label)
            positions = torch.arange(num_positions)[None]
            cos, sin = embedding(torch.empty(0, dtype=torch.float32), position_ids=positions)
        assert config.head_dim is not None  # filled in by the configuration
        half = config.head_dim // 2  # the two halves of a head are rotated alike
        self._table = torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=-1)
        super().__init__(config.head_dim, config.head_dim, num_positions, 0.0, is_neox_style=True, dtype=dtype)

    def _compute_cos_sin_cache(self) -> torch.Tensor:
        return self._table.to(torch.get_default_device())


class LCKVAttention(nn.Module):
    """Multi-head attention that reads the keys and values of its own or of another layer.

    A layer that computes keys and values has an `attn`, which keeps what its widest reader needs: a window only if all
    of them have one. Where the layer itself reads that, it does so through `attn`. Where it reads another layer's, or
    less than others do, or not the token's own key, it has a second attention, `read`, which keeps nothing, as all
    layers have that compute no keys and values.

    Args:
        config: the model's.
        layer_idx: which layer it is.
        vllm_config: the engine's.
        rotations: rotary embeddings by name.
        prefix: of the module in the model, such as `model.layers.3.self_attn`.
    """

    def __init__(
        self,
        config: LCKVLlamaConfig,
        layer_idx: int,
        vllm_config: VllmConfig,
        rotations: dict[str | None, TableRotaryEmbedding],
        prefix: str,
    ) -> None:
        super().__init__()
        assert config.head_dim is not None and config.num_key_value_heads is not None
        plan = config.sharing_plan
        layer = plan.layers[layer_idx]
        num_processes = get_tensor_model_parallel_world_size()
        self.head_dim = config.head_dim
        self.num_heads = config.num_attention_heads // num_processes
        self.num_kv_heads = max(1, config.num_key_value_heads // num_processes)
        self.scaling = self.head_dim**-0.5 if config.attention_multiplier is None else config.attention_multiplier
        self.computes_kv = layer.computes_kv
        self.is_strict = layer.is_upward or config.force_nodiag
        self.rotate_queries, self.rotate_keys = (
            rotations[config.query_label(layer_idx)],
            rotations[config.rope_label(layer_idx)],
        )
        self._add_projections(config, vllm_config, prefix)
        windows = {True: config.sliding_window, False: None}
        keeps_window = plan.owner_is_sliding(layer_idx)
        if layer.computes_kv:
            self.attn = self._attention(vllm_config, f"{prefix}.attn", windows[keeps_window])
        self.reads_attn = layer.reads_itself and layer.is_sliding == keeps_window and not self.is_strict
        if not self.reads_attn:
            owner = prefix.replace(f"layers.{layer_idx}.", f"layers.{layer.key_source}.")
            window = windows[layer.is_sliding]
            self.read = self._attention(vllm_config, f"{prefix}.read", window, f"{owner}.attn", self.is_strict)

    def _add_projections(self, config: LCKVLlamaConfig, vllm_config: VllmConfig, prefix: str) -> None:
        sizes = (config.hidden_size, self.head_dim, config.num_attention_heads, config.num_key_value_heads)
        query_size = config.num_attention_heads * self.head_dim
        bias, quant_config = config.attention_bias, vllm_config.quant_config
        if self.computes_kv:
            self.qkv_proj = QKVParallelLinear(*sizes, bias, quant_config=quant_config, prefix=f"{prefix}.qkv_proj")
        else:
            self.q_proj = ColumnParallelLinear(
                config.hidden_size, query_size, bias, quant_config=quant_config, prefix=f"{prefix}.q_proj"
            )
        self.o_proj = RowParallelLinear(
            query_size,
            config.hidden_size,
            config.has_output_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        if config.use_qk_norm:
            self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            if self.computes_kv:
                self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def _attention(
        self,
        vllm_config: VllmConfig,
        name: str,
        window: int | None,
        owner: str | None = None,
        is_strict: bool = False,
    ) -> Attention:
        # Else vLLM takes a window that the configuration has for some layers as that of all without their own.
        cache_config = copy.copy(vllm_config.cache_config)
        cache_config.sliding_window = None
        attention = (StrictPastAttention if is_strict else Attention)(
            self.num_heads,
            self.head_dim,
            self.scaling,
            num_kv_heads=self.num_kv_heads,
            cache_config=cache_config,
            quant_config=vllm_config.quant_config,
            per_layer_sliding_window=window,
            kv_sharing_target_layer_name=owner,
            prefix=name,
        )
        backend = attention.attn_backend
        if not backend.supports_head_size(self.head_dim):
            sizes = ", ".join(map(str, backend.get_supported_head_sizes()))
            raise UserError(
                f"head_dim={self.head_dim}: {backend.get_name()} of vLLM has no such size; allowed are {sizes}"
            )
        return attention

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Writes keys and values, if the layer does, and reads.

        Args:
            positions: `(num_tokens,)`.
            hidden_states: `(num_tokens, hidden_size)`.

        Returns:
            The output, `(num_tokens, hidden_size)`.
        """
        if not self.computes_kv:
            query = self._rotated_queries(positions, self.q_proj(hidden_states)[0])
            return self.o_proj(self._masked(positions, self.read(query, None, None)))[0]
        query, key, value = self._project(positions, hidden_states)
        query = self._rotated_queries(positions, query)
        if self.reads_attn:
            return self.o_proj(self.attn(query, key, value))[0]
        return self.o_proj(self._masked(positions, self._write_and_read(query, key, value)))[0]

    def write(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """Writes keys and values, as `forward` does, and reads nothing."""
        _, key, value = self._project(positions, hidden_states)
        self._write(key, value)

    def write_zeros(self, hidden_states: torch.Tensor) -> None:
        """Writes zeros where `forward` will write the keys and values of these tokens."""
        zeros = hidden_states.new_zeros(len(hidden_states), self.num_kv_heads * self.head_dim)
        self._write(zeros, zeros)

    def _project(
        self, positions: torch.Tensor, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, still to be rotated, keys and values, each `(num_tokens, num_heads * head_dim)`."""
        sizes = [heads * self.head_dim for heads in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]
        query, key, value = self.qkv_proj(hidden_states)[0].split(sizes, dim=-1)
        return query, self.rotate_keys(positions, self._normed(key, "k_norm"))[0], value

    def _masked(self, positions: torch.Tensor, attn_output: torch.Tensor) -> torch.Tensor:
        """What was read, `(num_tokens, num_heads * head_dim)`, and zero where there was nothing to see."""
        # What kernels give for a text's first token, if that does not see its own key, may be no number.
        return attn_output.masked_fill(positions[:, None] == 0, 0.0) if self.is_strict else attn_output

    def _rotated_queries(self, positions: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        return self.rotate_queries(positions, self._normed(query, "q_norm"))[0]

    def _normed(self, states: torch.Tensor, name: str) -> torch.Tensor:
        """Queries or keys `(num_tokens, num_heads * head_dim)`, normalised head by head where the model does so."""
        norm = getattr(self, name, None)
        return states if norm is None else norm(states.unflatten(-1, (-1, self.head_dim)).contiguous()).flatten(-2)

    def _write_and_read(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Writes to the cache of `attn` and reads through `read`, each `(num_tokens, heads * head_dim)`.

        By vLLM's operators, as its layers have no verb for each. What the first gives is empty, and tells compilers
        that the second comes after it, without which they would drop the first.
        """
        written = self._write(key, value)
        query, key, value = (states.unflatten(-1, (-1, self.head_dim)) for states in (query, key, value))
        output, reader = query.new_empty(query.shape), _encode_layer_name(self.read.layer_name)
        torch.ops.vllm.unified_attention_with_output(query, key, value, output, reader, kv_cache_dummy_dep=written)
        return output.flatten(1)

    def _write(self, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        key, value = (states.unflatten(-1, (-1, self.head_dim)) for states in (key, value))
        return torch.ops.vllm.unified_kv_cache_update(key, value, _encode_layer_name(self.attn.layer_name))
