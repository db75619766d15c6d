"""The decoder: Llama's parts, with keys and values (KV) handed from the layers that compute them to their readers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils import can_return_tuple

from lckv.models.configuration_lckv import LCKVLlamaConfig
from lckv.models.decoder_layer import AnyCache, LCKVDecoderLayer
from lckv.models.forward_call import ForwardCall, count_outputs
from lckv.models.iteration import (
    KeyValues,
    PassSchedule,
    new_sequential_cache,
    owners_read_upward,
    run_cycle,
    with_past,
)
from lckv.models.masks import VisibleKeys, build_visible_keys, find_documents, has_cached_tokens
from lckv.models.outputs import LCKVCausalLMOutputWithPast, LCKVModelOutputWithPast
from lckv.models.sharing_cache import SharingCache
from lckv.patterns import Segment


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
        attention_mask: torch.Tensor | None = None, past_key_values: Cache | None = None, **_: Any
    ) -> torch.Tensor | None:
        """Leaves the 2D mask to the model, whose kinds of masks transformers does not know.

        It gets the width of the static cache, so that a compiled decoding step sees the same shapes every time.
        """
        if attention_mask is None or past_key_values is None:
            return attention_mask
        if isinstance(past_key_values, SharingCache):
            past_key_values.check_length(attention_mask.shape[1])
        return nn.functional.pad(
            attention_mask, (0, max(0, past_key_values.get_max_length() - attention_mask.shape[1]))
        )


class LCKVLlamaModel(LCKVPreTrainedModel):
    """Llama's decoder stack with shared keys and values."""

    def __init__(self, config: LCKVLlamaConfig) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.sharing_plan = config.sharing_plan
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [LCKVDecoderLayer(config, layer_idx) for layer_idx in range(len(config.sharing_plan.layers))]
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

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
            ValueError: unless exactly one of `input_ids` and `inputs_embeds` is given; for options that
                `use_sequential`, a cache that takes single tokens or the attention backend does not have.
        """
        inputs_embeds = self._embed(input_ids, inputs_embeds)
        config, num_new_tokens = self.config, inputs_embeds.shape[1]
        use_cache = config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None and not (self.gradient_checkpointing and self.training):
            past_key_values = DynamicCache(config=config)
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        needs_each_layer = output_hidden_states or output_attentions
        is_sequential = self._begin(past_key_values, attention_mask, position_ids, num_new_tokens, needs_each_layer)
        has_past = has_cached_tokens(past_key_values, self.sharing_plan)
        document_ids = None
        if position_ids is None:
            position_ids = self._next_positions(inputs_embeds, past_key_values)
        elif attention_mask is None and not has_past:
            document_ids = find_documents(position_ids, inputs_embeds.shape[0])
        call = ForwardCall(
            attention_mask=attention_mask,
            document_ids=document_ids,
            has_past=has_past,
            position_embeddings=self.rotary_emb(inputs_embeds, position_ids=position_ids),
            past_key_values=past_key_values,
            layer_kwargs=kwargs,
            schedule=self._schedule(forward_passes, converge_tolerance, num_new_tokens),
            num_outputs=None if needs_each_layer else count_outputs(logits_to_keep, num_new_tokens),
            hidden_states=[inputs_embeds] if output_hidden_states else None,
            attentions=[] if output_attentions else None,
            needs_residual=output_kv_residual,
        )
        run = self._run_token_by_token if is_sequential else self._run_at_once
        return self._outputs(call, self.norm(run(call, inputs_embeds)), use_cache)

    def _begin(
        self,
        past_key_values: Cache | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        num_new_tokens: int,
        needs_each_layer: bool | None,
    ) -> bool:
        """Tells the cache what comes, and says whether the tokens have to go through the layers one by one."""
        is_sequential = num_new_tokens > 1 and self.config.use_sequential
        if isinstance(past_key_values, SharingCache):
            past_key_values.begin_forward(self.config, attention_mask, num_new_tokens)
            past_key_values.begin_positions(are_given=position_ids is not None)
            is_sequential |= num_new_tokens > 1 and past_key_values.needs_single_tokens(num_new_tokens)
        if is_sequential:
            asks_for_it = type(past_key_values).__name__ + " (single tokens)"
            reason = "use_sequential" if self.config.use_sequential else asks_for_it
            self._check_sequential(reason, attention_mask, needs_each_layer)
        return is_sequential

    def _schedule(
        self, forward_passes: int | str | None, converge_tolerance: float | None, num_new_tokens: int
    ) -> PassSchedule:
        """The passes over each cycle, by the configuration where the call says nothing."""
        return PassSchedule.from_config(
            self.config.forward_passes if forward_passes is None else forward_passes,
            self.config.backward_passes,
            self.config.converge_tolerance if converge_tolerance is None else converge_tolerance,
            num_new_tokens,
        )

    def _outputs(
        self, call: ForwardCall, hidden_states: torch.Tensor, use_cache: bool | None
    ) -> LCKVModelOutputWithPast:
        """What the call returns; `hidden_states` are those behind the norm."""
        if call.hidden_states is not None:
            call.hidden_states[-1] = hidden_states
        residuals = [report.residual for report in call.reports if report.residual is not None]
        return LCKVModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=call.past_key_values if use_cache else None,
            hidden_states=None if call.hidden_states is None else tuple(call.hidden_states),
            attentions=None if call.attentions is None else tuple(call.attentions),
            num_passes=max([1, *[report.num_passes for report in call.reports]]),
            kv_residual=torch.stack(residuals).max() if residuals else None,
        )

    def _embed(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        return self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

    def _check_sequential(
        self, reason: str, attention_mask: torch.Tensor | None, needs_each_layer: bool | None
    ) -> None:
        """Refuses what running token by token does not do; `reason` is what asks for it."""
        if self.gradient_checkpointing and self.training:
            raise ValueError(f"{reason} needs a cache, which gradient checkpointing takes away: switch one off")
        if attention_mask is not None and attention_mask.ndim == 4:
            raise ValueError(f"{reason} takes no 4D attention_mask: give a 2D one")
        if needs_each_layer:
            raise ValueError(f"{reason} returns no hidden states or attentions of single layers")

    def _next_positions(self, inputs_embeds: torch.Tensor, past_key_values: Cache | None) -> torch.Tensor:
        positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
        if isinstance(past_key_values, SharingCache):
            positions = positions + past_key_values.get_next_position()
        elif past_key_values is not None:
            positions = positions + past_key_values.get_seq_length(self.sharing_plan.kv_owners[0])
        return positions[None]  # (1, q_len)

    def _visible_keys(
        self, call: ForwardCall, inputs_embeds: torch.Tensor, num_queries: int | None = None
    ) -> list[VisibleKeys]:
        """What the queries of the call's tokens, or of its last `num_queries`, see in each layer."""
        return build_visible_keys(
            self.config,
            self.sharing_plan,
            inputs_embeds,
            call.attention_mask,
            call.past_key_values,
            call.document_ids,
            num_queries,
        )

    def _run_at_once(self, call: ForwardCall, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """Runs all layers for all tokens; returns `(batch, num_outputs or q_len, hidden_size)`."""
        call.visible_keys = self._visible_keys(call, inputs_embeds)
        if call.num_outputs is not None:
            call.visible_keys_of_outputs = self._visible_keys(call, inputs_embeds, call.num_outputs)
        return self._run_segments(call, inputs_embeds)

    def _run_segments(self, call: ForwardCall, hidden_states: torch.Tensor) -> torch.Tensor:
        """Runs all layers from the bottom, each cycle as often as it needs; without outputs, those that matter."""
        plan = self.sharing_plan
        key_values: KeyValues = {}
        for segment in plan.segments:
            if call.num_outputs == 0 and segment.start > plan.kv_owners[-1]:
                break
            run = partial(self._run_layers, call, segment)
            if not segment.is_cycle:
                hidden_states, key_values = run(hidden_states, key_values, call.past_key_values, True)
                continue
            owners = owners_read_upward(plan, segment)
            if call.has_past and call.past_key_values is not None:
                zeros = self._zero_states(hidden_states)
                key_values = with_past(key_values, owners, call.past_key_values, zeros)
            hidden_states, key_values, report = run_cycle(
                run,
                hidden_states,
                key_values,
                call.past_key_values,
                owners,
                call.schedule,
                needs_residual=call.needs_residual,
            )
            call.reports.append(report)
        return hidden_states

    def _run_layers(
        self,
        call: ForwardCall,
        segment: Segment,
        hidden_states: torch.Tensor,
        key_values: KeyValues,
        past_key_values: AnyCache | None,
        is_last: bool,
    ) -> tuple[torch.Tensor, KeyValues]:
        """Runs the layers of a segment once; passes before the last do only what the next pass will read."""
        key_values = dict(key_values)
        output = hidden_states
        top = segment.stop - 1
        read_again = {top, *self.sharing_plan.kv_source[segment.start : top]}
        highest_owner = self.sharing_plan.kv_owners[-1]
        for layer_idx in range(segment.start, segment.stop):
            source = self.sharing_plan.kv_source[layer_idx]
            visible_keys, num_outputs = call.visible_keys, None
            if not is_last and layer_idx == top:
                num_outputs = 0
            elif is_last and call.visible_keys_of_outputs is not None and layer_idx >= highest_owner:
                visible_keys, num_outputs = call.visible_keys_of_outputs, call.num_outputs
            key_states, value_states = key_values[source] if source in key_values else (None, None)
            output, own_keys, own_values, attn_weights = self.layers[layer_idx](
                output,
                key_states,
                value_states,
                visible_keys=visible_keys[layer_idx],
                position_embeddings=call.position_embeddings,
                past_key_values=past_key_values,
                needs_kv=is_last or layer_idx in read_again,
                num_outputs=num_outputs,
                **call.layer_kwargs,
            )
            if own_keys is not None:
                key_values[layer_idx] = own_keys, own_values
            if is_last and num_outputs == 0:
                break  # the highest layer that computes KV has done so
            if is_last and call.hidden_states is not None:
                call.hidden_states.append(output)
            if is_last and call.attentions is not None:
                call.attentions.append(attn_weights)
        return output, key_values

    def _zero_states(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """All-zero keys or values for the new tokens, `(batch, num_kv_heads, q_len, head_dim)`."""
        dtype = hidden_states.dtype
        if torch.is_autocast_enabled(hidden_states.device.type):
            dtype = torch.get_autocast_dtype(hidden_states.device.type)
        batch_size, q_len = hidden_states.shape[:2]
        num_heads, head_dim = self.config.num_key_value_heads, self.config.head_dim
        assert num_heads is not None and head_dim is not None  # the configuration fills them in
        return hidden_states.new_zeros(batch_size, num_heads, q_len, head_dim, dtype=dtype)

    def _run_token_by_token(self, call: ForwardCall, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """Runs all layers for one token after the other, which is exact for every pattern.

        Returns:
            The hidden states `(batch, num_outputs or q_len, hidden_size)` of the last tokens. For those before them,
            nothing runs that no later token reads.
        """
        cache = call.past_key_values
        if cache is None:
            cache = new_sequential_cache(self.sharing_plan.num_hidden_layers)
        num_past = int(cache.get_seq_length(self.sharing_plan.kv_owners[0]))
        cos, sin = call.position_embeddings
        outputs = []
        num_tokens = inputs_embeds.shape[1]
        num_unused = 0 if call.num_outputs is None else num_tokens - call.num_outputs
        for position in range(num_tokens):
            stop = num_past + position + 1
            token = slice(position, position + 1)
            mask = None if call.attention_mask is None else call.attention_mask[:, :stop]
            if isinstance(cache, SharingCache):
                cache.begin_forward(self.config, mask, 1)
            step = replace(
                call,
                attention_mask=mask,
                has_past=stop > 1,
                num_outputs=0 if position < num_unused else None,
                position_embeddings=(cos[:, token], sin[:, token]),
                past_key_values=cache,
                schedule=PassSchedule(num_ungraded=0, num_graded=1, tolerance=None),
            )
            step.visible_keys = self._visible_keys(step, inputs_embeds[:, token])
            if position < num_unused:
                step.visible_keys_of_outputs = step.visible_keys
            output = self._run_segments(step, inputs_embeds[:, token])
            if position >= num_unused:
                outputs.append(output)
        return torch.cat(outputs, dim=1)


class LCKVLlamaForCausalLM(LCKVPreTrainedModel, GenerationMixin):
    """The decoder stack with a language modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LCKVLlamaConfig) -> None:
        super().__init__(config)
        self.model = LCKVLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

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
        **kwargs: Any,
    ) -> LCKVCausalLMOutputWithPast:
        """Predicts the next token at every position.

        Beside the arguments of [`LCKVLlamaModel.forward`]: `labels` `(batch, q_len)`, where the label at *i* is
        predicted from position *i - 1* and -100 is not scored; `logits_to_keep`, the number of last positions to
        compute logits for (0: all), or which positions. The loss is the mean over scored tokens, or their sum over
        `num_items_in_batch` if that is given.
        """
        outputs = self.model(
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
