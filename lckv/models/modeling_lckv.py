"""The model: embedding, masks and passes of one forward call, the stack of layers that it runs, and the head."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self, cast

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from lckv.models.configuration_lckv import LCKVLlamaConfig
from lckv.models.layer import LCKVDecoderLayer
from lckv.models.parts.blocks import build_embedding, build_head, build_norm
from lckv.models.parts.rotary import PositionEmbeddings, Positions, rotary_embedding
from lckv.models.parts.sharing_cache import SharingCache
from lckv.models.stack import Stack, Trace
from lckv.models.visibility.groups import GroupKeys
from lckv.models.visibility.masks import MaskBuilder, build_visible_keys, find_documents, has_cached_tokens
from lckv.sharing.iteration import EXACT, Iteration, Passes


@dataclass
class LCKVModelOutputWithPast(BaseModelOutputWithPast):
    """[`BaseModelOutputWithPast`] with what iterating over layers that read upward came to.

    Args:
        num_passes: passes over the cycle that took most; 1 where none was needed.
        kv_residual: how far KV still moved in the last pass (a scalar), if asked for.
    """

    num_passes: int | None = None
    kv_residual: torch.Tensor | None = None


@dataclass
class LCKVCausalLMOutputWithPast(CausalLMOutputWithPast):
    """[`CausalLMOutputWithPast`] with `num_passes` and `kv_residual` as in [`LCKVModelOutputWithPast`]."""

    num_passes: int | None = None
    kv_residual: torch.Tensor | None = None


class LCKVPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about the family."""

    config: LCKVLlamaConfig
    config_class = LCKVLlamaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LCKVDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True  # but for several tokens with forward_passes="converge", which looks at values

    @staticmethod
    def create_masks_for_generate(
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        **_: Any,
    ) -> torch.Tensor | None:
        """Leaves the 2D mask to the model, whose kinds of masks transformers does not know.

        It gets the width of the static cache, `(batch, max_length)`, so that a compiled decoding step sees the same
        shapes every time. From version 5.24 on, transformers calls it `cache`.
        """
        past_key_values = cache if past_key_values is None else past_key_values
        if attention_mask is None or past_key_values is None:
            return attention_mask
        if isinstance(past_key_values, SharingCache):
            past_key_values.check_length(attention_mask.shape[1])
        return nn.functional.pad(
            attention_mask, (0, max(0, past_key_values.get_max_length() - attention_mask.shape[1]))
        )


class LCKVLlamaModel(LCKVPreTrainedModel):
    """Llama's decoder stack with shared keys and values."""

    stack_class: type[Stack] = Stack
    """What runs the layers; another way to iterate is a subclass."""

    def __init__(self, config: LCKVLlamaConfig) -> None:
        super().__init__(config)
        self.vocab_size = config.vocab_size
        self._follow(config)
        self.embed_tokens = build_embedding(config)
        self.embed_positions = None
        if config.learned_positions:
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(
            [LCKVDecoderLayer(config, layer_idx) for layer_idx in range(len(config.sharing_plan.layers))]
        )
        self.norm = build_norm(config)
        self.rotary_emb: nn.Module  # one, or several by name
        self.rope_labels = list(config.rotations)
        if config.rope_layer_types is None:
            self.rotary_emb = rotary_embedding(config)
        else:
            self.rotary_emb = nn.ModuleDict(
                {str(label): rotary_embedding(config, label) for label in self.rope_labels}
            )
        self.gradient_checkpointing = False
        self.post_init()

    def _follow(self, config: LCKVLlamaConfig) -> None:
        """Has the layers read what a configuration says."""
        self.config, self.sharing_plan, self.layout = config, config.sharing_plan, config.kv_layout
        self.iterates = self.sharing_plan.has_cycles
        self.query_labels = [config.query_label(layer_idx) for layer_idx in range(self.sharing_plan.num_hidden_layers)]

    def under(self, layer_types: str) -> Self:
        """The same layers under another pattern: a second view of their weights, which this one does not notice.

        Projections that nobody reads under the pattern rest, and get no gradient.
        """
        view = copy.copy(self)  # which takes over the very dictionaries of modules and parameters
        view._follow(self.config.under(layer_types))
        return view

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_kv_residual: bool = False,
        forward_passes: int | str | None = None,
        converge_tolerance: float | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> LCKVModelOutputWithPast:
        """Runs the decoder stack.

        Args:
            input_ids: `(batch, q_len)`.
            attention_mask: `(batch, past + q_len)`, zero at padding; or boolean or additive
                `(batch or 1, 1, q_len, past + q_len)`.
            position_ids: `(batch or 1, q_len)`. Without an `attention_mask`, a new document begins wherever they
                restart, and nothing is attended to across documents.
            past_key_values: any transformers cache.
            inputs_embeds: `(batch, q_len, hidden_size)`, instead of `input_ids`.
            use_cache: whether to return a cache, a new one if none is given; by default `config.use_cache`.
            output_hidden_states: whether to return what enters each layer and what leaves the last, after the norm.
            output_attentions: whether to return each layer's attention weights (eager backend).
            output_kv_residual: whether to return how far KV still moved in the last pass, where layers iterate.
            forward_passes: instead of the configuration's.
            converge_tolerance: instead of the configuration's.
            logits_to_keep: how many of the last tokens' hidden states are wanted (0: all). Nothing else leaves the
                layers above the highest one that computes KV, so they run for these tokens alone. For positions in a
                tensor, and where every layer's output is asked for, all are returned.
            kwargs: passed on to the attention backend.

        Raises:
            ValueError: unless exactly one of `input_ids` and `inputs_embeds` is given, for a cache beside gradient
                checkpointing, and for options that `use_sequential`, the cache or the attention backend lack.
        """
        inputs_embeds = self._embed(input_ids, inputs_embeds)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        past_key_values = self._choose_cache(past_key_values, use_cache)
        trace = self._new_trace(output_hidden_states, output_attentions, output_kv_residual)
        num_tokens = inputs_embeds.shape[1]
        num_outputs = None if trace.wants_each_layer else _num_outputs(logits_to_keep, num_tokens)
        is_sequential = self._begin(past_key_values, attention_mask, position_ids, num_tokens, trace)
        has_past = has_cached_tokens(past_key_values, self.layout)
        reads_documents = attention_mask is None and not has_past
        position_ids, document_ids = self._place(position_ids, inputs_embeds, past_key_values, reads_documents)
        if self.embed_positions is not None:
            inputs_embeds = inputs_embeds + self.embed_positions(position_ids)
        trace.note(inputs_embeds)
        positions = Positions(position_ids, partial(self._rotate, inputs_embeds), has_past)
        stack = self.stack_class(
            list(self.layers),  # which finds one sooner
            self.sharing_plan,
            self.layout,
            self.query_labels,
            position_embeddings={label: positions.embed(position_ids, label) for label in self.rope_labels},
            visible_keys=[],
            cache=past_key_values,
            has_past=has_past,
            passes=self._passes(num_tokens, forward_passes, converge_tolerance),
            kwargs=kwargs,
            trace=trace,
        )
        run = self._run_token_by_token if is_sequential else self._run_at_once
        hidden_states = run(stack, inputs_embeds, attention_mask, document_ids, num_outputs, positions)
        return self._outputs(trace, self.norm(hidden_states), past_key_values if use_cache else None)

    def _embed(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """What enters the first layer, `(batch, q_len, hidden_size)`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        return self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

    def _rotate(self, like: torch.Tensor, positions: torch.Tensor, label: str | None) -> PositionEmbeddings:
        """Cosines and sines for positions `(batch or 1, num_tokens)`, of the type of another tensor."""
        embedding = self.rotary_emb if label is None else cast(nn.ModuleDict, self.rotary_emb)[label]
        cos, sin = embedding(like, position_ids=positions)
        real, imaginary = sin.chunk(2, dim=-1)
        return cos[:, None], torch.cat((-real, imaginary), dim=-1)[:, None]

    def _choose_cache(self, past_key_values: Cache | None, use_cache: bool) -> Cache | None:
        """The cache of the call: the given one, or a new one if one is to be returned."""
        recomputes = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if recomputes and past_key_values is not None:
            raise ValueError("gradient checkpointing runs layers twice, which would write to a cache twice: give none")
        if use_cache and past_key_values is None and not recomputes:
            return DynamicCache(config=self.config)
        return past_key_values

    def _new_trace(
        self,
        output_hidden_states: bool | None,
        output_attentions: bool | None,
        output_kv_residual: bool,
    ) -> Trace:
        """What the call shall report: what it asks for, and where it says nothing, the configuration."""
        config = self.config
        wants_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        wants_attentions = config.output_attentions if output_attentions is None else output_attentions
        return Trace(
            hidden_states=[] if wants_hidden_states else None,
            attentions={} if wants_attentions else None,
            residuals=[] if output_kv_residual else None,
        )

    def _outputs(
        self, trace: Trace, hidden_states: torch.Tensor, past_key_values: Cache | None
    ) -> LCKVModelOutputWithPast:
        """What the call returns; `hidden_states` `(batch, q_len, hidden_size)` are those behind the norm."""
        return LCKVModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values,
            hidden_states=None if trace.hidden_states is None else (*trace.hidden_states[:-1], hidden_states),
            attentions=None if trace.attentions is None else tuple(trace.attentions.values()),
            num_passes=trace.num_passes,
            kv_residual=torch.stack(trace.residuals).max() if trace.residuals else None,
        )

    def _passes(self, num_tokens: int, forward_passes: int | str | None, converge_tolerance: float | None) -> Passes:
        """How often cycles run: as the call says, and where it says nothing, as the configuration does."""
        if num_tokens == 1 or not self.iterates:
            return Passes(num_ungraded=0, num_graded=1)
        given = {"forward_passes": forward_passes, "converge_tolerance": converge_tolerance}
        said: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return replace(Iteration.from_config(self.config), **said).passes(num_tokens, torch.is_grad_enabled())

    def _begin(
        self,
        past_key_values: Cache | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        num_tokens: int,
        trace: Trace,
    ) -> bool:
        """Tells the cache what comes, and says whether the tokens have to go through the layers one by one."""
        reason = "use_sequential" if num_tokens > 1 and self.config.use_sequential else None
        if isinstance(past_key_values, SharingCache):
            past_key_values.begin_forward(self.config, attention_mask, num_tokens)
            past_key_values.begin_positions(are_given=position_ids is not None)
            if num_tokens > 1 and past_key_values.needs_single_tokens(num_tokens):
                reason = reason or f"{type(past_key_values).__name__} (single tokens)"
        if reason is None:
            return False
        if self.gradient_checkpointing and self.training:
            raise ValueError(f"{reason} needs a cache, which gradient checkpointing takes away: switch one off")
        if attention_mask is not None and attention_mask.ndim == 4:
            raise ValueError(f"{reason} takes no 4D attention_mask: give a 2D one")
        if trace.wants_each_layer:
            raise ValueError(f"{reason} returns no hidden states or attentions of single layers")
        return True

    def _place(
        self,
        position_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        past_key_values: Cache | None,
        reads_documents: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The positions of the new tokens, `(batch or 1, q_len)`; and where given ones tell, the document of each."""
        if position_ids is not None:
            return position_ids, find_documents(position_ids, len(inputs_embeds)) if reads_documents else None
        positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
        if isinstance(past_key_values, SharingCache):
            positions = positions + past_key_values.get_next_position()
        elif past_key_values is not None:
            positions = positions + past_key_values.get_seq_length(self.layout.owners[0])
        return positions[None], None

    def _run_at_once(
        self,
        stack: Stack,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        document_ids: torch.Tensor | None,
        num_outputs: int | None,
        positions: Positions,
    ) -> torch.Tensor:
        """Runs all tokens together, and returns the hidden states `(batch, num_outputs or q_len, hidden_size)`."""
        builder = MaskBuilder(self.config, self.layout, inputs_embeds, attention_mask, stack.cache, document_ids)
        stack.visible_keys = build_visible_keys(builder, num_outputs, positions)
        if stack.passes.num_groups > 1:
            stack.group_keys = GroupKeys(builder, stack.visible_keys)
        return stack.run(inputs_embeds)

    def _run_token_by_token(
        self,
        stack: Stack,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        document_ids: torch.Tensor | None,
        num_outputs: int | None,
        positions: Positions,
    ) -> torch.Tensor:
        """Runs all layers for one token after the other, which is exact for every pattern.

        Returns:
            The hidden states `(batch, num_outputs or q_len, hidden_size)` of the last tokens. For those before them,
            nothing runs that no later token reads.
        """
        cache = stack.cache
        if cache is None:  # one that forgets nothing and lets gradients through
            cache = DynamicCache()
            cache.layers = [DynamicLayer() for _ in self.layers]
        num_past = int(cache.get_seq_length(self.layout.owners[0]))
        num_tokens = inputs_embeds.shape[1]
        num_unused = 0 if num_outputs is None else num_tokens - num_outputs
        outputs = []
        for position in range(num_tokens):
            stop, token, is_used = num_past + position + 1, slice(position, position + 1), position >= num_unused
            mask = None if attention_mask is None else attention_mask[:, :stop]
            if isinstance(cache, SharingCache):
                cache.begin_forward(self.config, mask, 1)
            visible_keys = build_visible_keys(
                MaskBuilder(self.config, self.layout, inputs_embeds[:, token], mask, cache, document_ids),
                None if is_used else 0,
                replace(positions, new=positions.new[:, token], has_past=stop > 1),
            )
            token_stack = replace(
                stack,
                position_embeddings={
                    label: (cos[:, :, token], sin[:, :, token])
                    for label, (cos, sin) in stack.position_embeddings.items()
                },
                visible_keys=visible_keys,
                cache=cache,
                has_past=stop > 1,
                passes=Passes(num_ungraded=0, num_graded=1),
            )
            output = token_stack.run(inputs_embeds[:, token])
            if is_used:
                outputs.append(output)
        return torch.cat(outputs, dim=1)


def _num_outputs(logits_to_keep: int | torch.Tensor, num_tokens: int) -> int | None:
    """How many of the last tokens' outputs are wanted; `None` for all, also where a tensor says which."""
    is_fewer = isinstance(logits_to_keep, int) and 0 < logits_to_keep < num_tokens
    return cast(int, logits_to_keep) if is_fewer else None


class LCKVLlamaForCausalLM(LCKVPreTrainedModel, GenerationMixin):
    """The decoder stack with a language modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LCKVLlamaConfig) -> None:
        super().__init__(config)
        self.model = LCKVLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = build_head(config)
        self.post_init()

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What `generate` gives to `forward`: prompts are read as decoding would, unless a count is asked for."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]
        if "cache" in inputs:  # as transformers 5.24 calls it
            inputs["past_key_values"] = inputs.pop("cache")
        return inputs if inputs.get("forward_passes") is not None else inputs | EXACT

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_kv_residual: bool = False,
        forward_passes: int | str | None = None,
        converge_tolerance: float | None = None,
        layer_types: str | None = None,
        **kwargs: Any,
    ) -> LCKVCausalLMOutputWithPast:
        """Predicts the next token at every position.

        Beside the arguments of [`LCKVLlamaModel.forward`]: `labels` `(batch, q_len)`, where the label at *i* is
        predicted from position *i - 1* and -100 is not scored; `logits_to_keep`, the number of last positions to
        compute logits for (0: all), or which positions; `layer_types`, a pattern for this call in place of the model's
        own (see [`LCKVLlamaModel.under`]). The loss is the mean over scored tokens, or their sum over
        `num_items_in_batch` if that is given.
        """
        model = self.model if layer_types is None else self.model.under(layer_types)
        outputs = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_kv_residual=output_kv_residual,
            forward_passes=forward_passes,
            converge_tolerance=converge_tolerance,
            logits_to_keep=0 if labels is not None else logits_to_keep,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return LCKVCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            num_passes=outputs.num_passes,
            kv_residual=outputs.kv_residual,
        )
