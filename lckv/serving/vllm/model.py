"""The decoder in vLLM's layers, computing what [`lckv.models`] computes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.sequence import IntermediateTensors

from lckv.models.configuration_lckv import LCKVLlamaConfig
from lckv.serving.vllm.attention import LCKVAttention, TableRotaryEmbedding
from lckv.serving.vllm.settings import check_engine, first_of_last_readers, num_passes, read_served
from lckv.sharing.iteration import Iteration
from lckv.sharing.patterns import Segment


def build_norm(config: LCKVLlamaConfig) -> nn.Module:
    """What normalises hidden states."""
    kind = nn.LayerNorm if config.norm_type == "layer_norm" else RMSNorm
    return kind(config.hidden_size, eps=config.rms_norm_eps)


class LCKVMLP(nn.Module):
    """Llama's gated MLP, or a plain one, with any activation of transformers."""

    def __init__(self, config: LCKVLlamaConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        size, width, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        quant_config = vllm_config.quant_config
        self.is_gated = config.gated_mlp
        if self.is_gated:
            self.gate_up_proj = MergedColumnParallelLinear(
                size, [width, width], bias, quant_config=quant_config, prefix=f"{prefix}.gate_up_proj"
            )
        else:
            self.up_proj = ColumnParallelLinear(
                size, width, bias, quant_config=quant_config, prefix=f"{prefix}.up_proj"
            )
        self.down_proj = RowParallelLinear(width, size, bias, quant_config=quant_config, prefix=f"{prefix}.down_proj")
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """From `(num_tokens, hidden_size)` to the same shape."""
        if self.is_gated:
            gate, up = self.gate_up_proj(hidden_states)[0].chunk(2, dim=-1)
            return self.down_proj(self.act_fn(gate) * up)[0]
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)[0]))[0]


class LCKVDecoderLayer(nn.Module):
    """One decoder layer."""

    def __init__(
        self,
        config: LCKVLlamaConfig,
        layer_idx: int,
        vllm_config: VllmConfig,
        rotations: dict[str | None, TableRotaryEmbedding],
        prefix: str,
    ) -> None:
        super().__init__()
        self.self_attn = LCKVAttention(config, layer_idx, vllm_config, rotations, f"{prefix}.self_attn")
        self.mlp = LCKVMLP(config, vllm_config, f"{prefix}.mlp")
        self.input_layernorm = build_norm(config)
        self.post_attention_layernorm = build_norm(config)
        self.residual_multiplier = config.residual_multiplier
        self.use_output_norms = config.use_output_norms
        if config.use_output_norms:
            self.attention_output_layernorm = build_norm(config)
            self.mlp_output_layernorm = build_norm(config)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """From `(num_tokens, hidden_size)` to the same shape, for tokens at `positions`, `(num_tokens,)`."""
        attn_output = self.self_attn(positions, self.input_layernorm(hidden_states))
        if self.use_output_norms:
            attn_output = self.attention_output_layernorm(attn_output)
        hidden_states = torch.add(hidden_states, attn_output, alpha=self.residual_multiplier)
        mlp_output = self.mlp(self.post_attention_layernorm(hidden_states))
        if self.use_output_norms:
            mlp_output = self.mlp_output_layernorm(mlp_output)
        return torch.add(hidden_states, mlp_output, alpha=self.residual_multiplier)

    def write(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """Writes the layer's keys and values and computes nothing else."""
        self.self_attn.write(positions, self.input_layernorm(hidden_states))


@support_torch_compile(
    # A compiled stack cannot run its last layers for fewer tokens.
    enable_if=lambda vllm_config: not vllm_config.cache_config.kv_sharing_fast_prefill,
    dynamic_arg_dims={
        "input_ids": {0: "b"},
        "positions": {0: "b"},
        "intermediate_tensors": {0: "b"},
        "inputs_embeds": {0: "b"},
    },
)
class LCKVLlamaModel(nn.Module):
    """The decoder stack."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", config: LCKVLlamaConfig) -> None:
        super().__init__()
        model_config, quant_config = vllm_config.model_config, vllm_config.quant_config
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, quant_config=quant_config, prefix=f"{prefix}.embed_tokens"
        )
        self.embedding_multiplier = config.embedding_multiplier
        self.embed_positions = None
        if config.learned_positions:
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.rotations = {
            label: TableRotaryEmbedding(config, label, model_config.max_model_len, model_config.dtype)
            for label in config.rotations
        }
        self.layers = nn.ModuleList(
            LCKVDecoderLayer(config, layer_idx, vllm_config, self.rotations, f"{prefix}.layers.{layer_idx}")
            for layer_idx in range(config.sharing_plan.num_hidden_layers)
        )
        self.norm = build_norm(config)
        self.plan, self.iteration = config.sharing_plan, Iteration.from_config(config)
        self.first_reader = first_of_last_readers(self.plan)
        self.last_reader = f"{prefix}.layers.{len(self.layers) - 1}.self_attn.read"
        self.is_fast_prefill = vllm_config.cache_config.kv_sharing_fast_prefill

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """From `(num_tokens,)` to `(num_tokens, hidden_size)`."""
        embeds = self.embed_tokens(input_ids)
        if self.embedding_multiplier == 1.0:
            return embeds
        # Rounded to the type of the weights first, as in `lckv.models.parts.blocks.ScaledEmbedding`.
        return embeds * torch.tensor(self.embedding_multiplier, dtype=embeds.dtype)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states `(num_tokens, hidden_size)` of tokens `(num_tokens,)` at `positions`, `(num_tokens,)`."""
        if inputs_embeds is None:
            assert input_ids is not None  # vLLM gives one of both
            inputs_embeds = self.embed_input_ids(input_ids)
        hidden_states = inputs_embeds
        if self.embed_positions is not None:
            hidden_states = hidden_states + self.embed_positions(positions)
        for segment in self.plan.segments:
            if segment.is_cycle:
                self._iterate(segment, positions, hidden_states)
            for layer in self.layers[segment.start : min(segment.stop, self.first_reader)]:
                hidden_states = layer(positions, hidden_states)
        rows, num_rows = self._wanted_rows()
        if rows is None:
            return self.norm(self._run_readers(positions, hidden_states))
        outputs = self._run_readers(positions[rows], hidden_states[rows])
        hidden_states = hidden_states.clone()  # nobody looks at the other rows, but vLLM expects as many as it gave
        hidden_states[rows[:num_rows]] = outputs[:num_rows]
        return self.norm(hidden_states)

    def _iterate(self, cycle: Segment, positions: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """Writes what the layers of a cycle will read above themselves, pass by pass, up to the last pass.

        As in `lckv.models.stack`: every pass starts from the same hidden states, the first reads zeros, and none of
        these needs what leaves the top layer. The cache is the place where a pass finds what the one before wrote.
        Earlier tokens of a request are there already, so one new token needs no pass before the last.
        """
        num_drafts = num_passes(self.iteration, self._longest_query()) - 1
        if num_drafts == 0:
            return
        layers: Any = self.layers
        for owner in {layer.key_source for layer in self.plan.layers[cycle.start : cycle.stop] if layer.is_upward}:
            layers[owner].self_attn.write_zeros(hidden_states)
        for _ in range(num_drafts):
            draft = hidden_states
            for layer in layers[cycle.start : cycle.stop - 1]:
                draft = layer(positions, draft)
            layers[cycle.stop - 1].write(positions, draft)

    def _longest_query(self) -> int:
        """The most new tokens of a request in this batch."""
        metadata = get_forward_context().attn_metadata  # none when memory is measured, before the first request
        return next(iter(metadata.values())).max_query_len if isinstance(metadata, dict) else 1

    def _run_readers(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[self.first_reader :]:
            hidden_states = layer(positions, hidden_states)
        return hidden_states

    def _wanted_rows(self) -> tuple[torch.Tensor | None, int | None]:
        """The rows of the tokens whose logits are wanted, perhaps filled up, and how many; `None` for all.

        With `--kv-sharing-fast-prefill`, vLLM prepares the attention of the last readers for these alone.
        """
        if not self.is_fast_prefill:
            return None, None
        metadata = get_forward_context().attn_metadata  # none when memory is measured, before the first request
        of_readers = metadata[self.last_reader] if isinstance(metadata, dict) else None
        return getattr(of_readers, "logits_indices_padded", None), getattr(of_readers, "num_logits_indices", None)


class LCKVLlamaForCausalLM(nn.Module):
    """The decoder stack with a language modelling head, as vLLM calls it."""

    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.served = read_served(vllm_config.model_config.hf_config.to_dict())
        config, quant_config = self.served.config, vllm_config.quant_config
        check_engine(vllm_config, config)
        self.model = LCKVLlamaModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"), config=config)
        self.lm_head = ParallelLMHead(
            config.vocab_size, config.hidden_size, quant_config=quant_config, prefix=maybe_prefix(prefix, "lm_head")
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        scaling, softcap = config.logits_scaling, config.final_logit_softcapping
        # vLLM bounds logits before it scales them, our model after that.
        softcap = None if softcap is None else softcap * scaling
        self.logits_processor = LogitsProcessor(config.vocab_size, scale=1.0 / scaling, soft_cap=softcap)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """From `(num_tokens,)` to `(num_tokens, hidden_size)`."""
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See [`LCKVLlamaModel.forward`]."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """From `(num_tokens, hidden_size)` to `(num_tokens, vocab_size)`."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Loads the checkpoint's tensors, and returns the names of parameters that it has filled."""
        stacked: dict[str, tuple[str, str | int]] = {
            f".{layer_idx}.self_attn.{kind}_proj.": (f".{layer_idx}.self_attn.qkv_proj.", kind)
            for layer_idx in self.served.config.sharing_plan.kv_owners
            for kind in "qkv"
        }
        if self.served.config.gated_mlp:
            stacked |= {".gate_proj.": (".gate_up_proj.", 0), ".up_proj.": (".gate_up_proj.", 1)}
        mapper = WeightsMapper(orig_to_new_stacked=stacked)
        return AutoWeightsLoader(self).load_weights(self.served.tensors(weights), mapper=mapper)
