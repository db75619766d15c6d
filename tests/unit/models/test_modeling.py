import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from lckv import LCKVLlamaForCausalLM
from lckv.cache import SinkKVCache
from lckv.models.visibility.backends import attend, attend_with_one_query
from lckv.models.visibility.masks import MaskBuilder, VarlenBatch, VisibleKeys, build_visible_keys
from tests.reference import exact_logits, tiny_config, tiny_model, token_ids

LENGTH = 9


def assert_close(actual, expected, tolerance=1e-4):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}], ids=str)
def test_identity_pattern_is_llama(options, attn_implementation):
    torch.manual_seed(0)
    sizes = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, **options))
    llama.set_attn_implementation(attn_implementation)
    model = LCKVLlamaForCausalLM(tiny_config("0_1_2", attn_implementation=attn_implementation, **options))
    model.load_state_dict(llama.state_dict())
    input_ids = token_ids(2, LENGTH)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, :3] = 0
    for mask in (torch.ones_like(input_ids), attention_mask):
        labels = input_ids.masked_fill(mask == 0, -100).masked_fill(mask.diff(dim=1, prepend=mask[:, :1]) == 1, -100)
        expected = llama(input_ids, attention_mask=mask, labels=labels)
        actual = model(input_ids, attention_mask=mask, labels=labels)
        assert_close(actual.loss, expected.loss, 1e-6)
        assert_close(actual.logits[mask == 1], expected.logits[mask == 1], 1e-6)


def test_layers_without_kv_have_no_kv_projections():
    names = set(tiny_model("0_2_2_3").state_dict())
    for layer_idx, computes_kv in enumerate([True, False, True, True]):
        for projection in ("k_proj", "v_proj"):
            assert (f"model.layers.{layer_idx}.self_attn.{projection}.weight" in names) == computes_kv


layer_types_strings = st.integers(1, 6).flatmap(
    lambda count: st.lists(st.tuples(st.integers(0, count - 1), st.booleans()), min_size=count, max_size=count).map(
        lambda entries: "_".join(f"{source}{'s' * is_sliding}" for source, is_sliding in entries)
    )
)


@settings(max_examples=25, deadline=None)
@given(layer_types_strings, st.integers(1, 4), st.booleans(), st.data())
def test_any_pattern_parallel_cached_checkpointed_and_token_by_token_agree(layer_types, window, force_nodiag, data):
    length = 6
    chunks = data.draw(st.lists(st.integers(1, 4), min_size=length, max_size=length))
    options = {"sliding_window": window, "force_nodiag": force_nodiag}
    model = tiny_model(layer_types, forward_passes=length, **options)
    input_ids = token_ids(1, length)
    expected = exact_logits(model, input_ids[0])[None]
    outputs = model(input_ids, labels=input_ids, use_cache=False)
    outputs.loss.backward()
    assert_close(outputs.logits, expected)
    with torch.no_grad():
        assert_close(model(input_ids, use_cache=True).logits, expected)
        cache = DynamicCache(config=model.config)
        pieces = []
        while (done := sum(piece.shape[1] for piece in pieces)) < length:
            chunk = input_ids[:, done : done + chunks.pop()]
            pieces.append(model(chunk, past_key_values=cache).logits)
        assert_close(torch.cat(pieces, dim=1), expected)
        packed = torch.cat([input_ids[:, 2:], input_ids], dim=1)
        position_ids = torch.cat([torch.arange(length - 2), torch.arange(length)])[None]
        assert_close(model(packed, position_ids=position_ids).logits[:, length - 2 :], expected)
    recomputed = copy.deepcopy(model).train()
    recomputed.zero_grad()
    recomputed.gradient_checkpointing_enable({"use_reentrant": False})
    recomputed(input_ids, labels=input_ids).loss.backward()
    for (name, parameter), other in zip(model.named_parameters(), recomputed.parameters(), strict=True):
        if parameter.grad is not None:
            assert_close(other.grad, parameter.grad), name


@settings(max_examples=2, deadline=None)
@given(layer_types_strings)
def test_any_pattern_compiles_in_one_graph(layer_types):
    torch._dynamo.reset()
    model = tiny_model(layer_types, forward_passes=1)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    input_ids = token_ids(2, 6)
    assert_close(compiled(input_ids, use_cache=False).logits, model(input_ids, use_cache=False).logits, 1e-6)


@pytest.mark.parametrize(
    "layer_types",
    ["0_2_2", pytest.param("0_0_2_2", marks=pytest.mark.slow), pytest.param("1s_1s_3s_3s", marks=pytest.mark.slow)],
)
def test_compiled_in_one_graph_equals_eager(layer_types):
    torch._dynamo.reset()
    model = tiny_model(layer_types, forward_passes=1).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    input_ids = token_ids(2, LENGTH)
    position_ids = torch.cat([torch.arange(4), torch.arange(LENGTH - 4)])[None].expand(2, -1)
    for options in ({}, {"position_ids": position_ids}, {"attention_mask": torch.ones_like(input_ids)}):
        losses, gradients = [], []
        for forward in (model, compiled):
            model.zero_grad()
            loss = forward(input_ids, labels=input_ids, use_cache=False, **options).loss
            loss.backward()
            losses.append(loss.detach())
            gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        assert_close(losses[1], losses[0], 1e-6)
        for actual, expected in zip(*gradients, strict=True):
            assert_close(actual, expected, 1e-5)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("layer_types", ["0_0_2_2", "0_2_2_3"])
def test_compiled_with_inductor_equals_eager(layer_types):
    torch._dynamo.reset()
    model = tiny_model(layer_types).train()
    input_ids = token_ids(2, LENGTH)
    expected = model(input_ids, labels=input_ids, use_cache=False)
    actual = torch.compile(model, fullgraph=True)(input_ids, labels=input_ids, use_cache=False)
    assert_close(actual.logits, expected.logits, 1e-5)
    actual.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("layer_types", ["0_2_2", "0s_1s_1"])
@torch.no_grad()
def test_compiled_decoding_with_a_static_cache(layer_types):
    torch._dynamo.reset()
    model = tiny_model(layer_types)
    input_ids = token_ids(2, 6)
    step = torch.compile(model, backend="eager")
    cache = StaticCache(config=model.config, max_cache_len=8)
    logits = [model(input_ids[:, :2], past_key_values=cache).logits]
    logits += [step(token, past_key_values=cache).logits for token in input_ids[:, 2:].split(1, dim=1)]
    expected = torch.stack([exact_logits(model, row) for row in input_ids])
    assert_close(torch.cat(logits, dim=1), expected)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("layer_types", ["0_3_3_3_4", "0s_2_2_2", "1s_1s_3s_3s"])
@torch.no_grad()
def test_flex_attention_is_exact(layer_types):
    torch._dynamo.reset()
    model = tiny_model(layer_types, attn_implementation="flex_attention", forward_passes=LENGTH)
    input_ids = token_ids(2, LENGTH)
    rows = [exact_logits(model, row) for row in input_ids]
    assert_close(model(input_ids).logits, torch.stack(rows))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, :4] = 0
    position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    logits = model(input_ids, attention_mask=attention_mask, position_ids=position_ids).logits
    assert logits.isfinite().all()
    assert_close(logits[1, 4:], exact_logits(model, input_ids[1, 4:]))
    position_ids = torch.cat([torch.arange(4), torch.arange(LENGTH - 4)])[None].expand(2, -1)
    assert_close(model(input_ids, position_ids=position_ids).logits[1, 4:], exact_logits(model, input_ids[1, 4:]))


def _flash_like(model, input_ids, **options):
    """The sequences that flash attention would get, for a layer that hides its own token."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = "flash_attention_2"
    embeds = model.model.embed_tokens(input_ids)
    arguments = {"attention_mask": None, "past_key_values": None, "document_ids": None} | options
    return build_visible_keys(MaskBuilder(config, config.kv_layout, embeds, **arguments))


def _spans(varlen: VarlenBatch):
    cuts = zip(varlen.cu_seq_lens_q.tolist(), varlen.cu_seq_lens_k.tolist(), strict=True)
    cuts = list(cuts)
    return [
        (varlen.query_indices[q0:q1].tolist(), varlen.key_indices[k0:k1].tolist())
        for (q0, k0), (q1, k1) in zip(cuts, cuts[1:], strict=False)
    ]


def test_flash_attention_gets_padded_and_packed_batches_as_sequences():
    model = tiny_model("1_1")
    input_ids = token_ids(2, 4)
    padded = _flash_like(model, input_ids, attention_mask=torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]]))
    assert _spans(padded[0].varlen) == [([2, 3], [2]), ([4, 5, 6], [4, 5])]
    assert _spans(padded[1].varlen) == [([2, 3], [2, 3]), ([4, 5, 6], [4, 5, 6])]
    packed = _flash_like(model, input_ids, document_ids=torch.tensor([[0, 0, 0, 1], [0, 0, 1, 1]]))
    assert _spans(packed[0].varlen) == [([0, 1, 2], [0, 1]), ([3], []), ([4, 5], [4]), ([6, 7], [6])]
    plain = _flash_like(model, input_ids)
    assert plain[0].varlen is None and plain[0].drop_own_token and not plain[1].drop_own_token


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_four_dimensional_masks_boolean_and_additive(attn_implementation):
    model = tiny_model("0_2_2_3", forward_passes=LENGTH, attn_implementation=attn_implementation)
    input_ids = token_ids(2, LENGTH)
    documents = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1])
    position_ids = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    boolean = (documents[:, None] == documents[None, :])[None, None]
    additive = torch.zeros(1, 1, LENGTH, LENGTH).masked_fill(~boolean, torch.finfo(torch.float32).min)
    for mask in (boolean, additive):
        logits = model(input_ids, attention_mask=mask, position_ids=position_ids).logits
        assert_close(logits[0, 4:], exact_logits(model, input_ids[0, 4:]))
    with pytest.raises(ValueError, match="4D attention_mask"):
        model(input_ids, attention_mask=boolean.expand(-1, 4, -1, -1))


@pytest.mark.parametrize("layer_types", ["0s_1s_2s", "0_1s_2s", "2s_2s_2"])
@torch.no_grad()
def test_four_dimensional_mask_with_a_cache_equals_the_two_dimensional(layer_types):
    model = tiny_model(layer_types)
    input_ids = token_ids(2, 12)
    padding = torch.ones(2, 12, dtype=torch.bool)
    padding[0, 9] = False
    logits = []
    for mask in (padding, padding[:, None, None].expand(-1, -1, 2, -1)):
        cache = DynamicCache(config=model.config)
        model(input_ids[:, :10], past_key_values=cache)
        logits.append(model(input_ids[:, 10:], attention_mask=mask, past_key_values=cache).logits)
    assert_close(*logits)


@torch.no_grad()
def test_packed_documents_fill_a_static_cache():
    model = tiny_model("0_2_2_3", forward_passes=LENGTH)
    input_ids = token_ids(1, LENGTH)
    position_ids = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    cache = StaticCache(config=model.config, max_cache_len=12)
    logits = model(input_ids, position_ids=position_ids, past_key_values=cache).logits
    assert_close(logits[0, 4:], exact_logits(model, input_ids[0, 4:]))


def test_gradients_flow_while_a_static_cache_fills():
    model = tiny_model("0_2_2_3")
    input_ids = token_ids(1, LENGTH)
    cache = StaticCache(config=model.config, max_cache_len=12)
    with torch.no_grad():
        model(input_ids[:, :4], past_key_values=cache)
    logits = model(input_ids[:, 4:8], past_key_values=cache).logits
    assert_close(logits[0], exact_logits(model, input_ids[0])[4:8])


def test_options_that_sequential_does_not_have_are_refused():
    model = tiny_model("0_2_2_3", use_sequential=True)
    input_ids = token_ids(1, LENGTH)
    with pytest.raises(ValueError, match="hidden states"):
        model(input_ids, output_hidden_states=True)
    with pytest.raises(ValueError, match="4D attention_mask"):
        model(input_ids, attention_mask=torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model.train()(input_ids)


@pytest.mark.parametrize("cache_class", [DynamicCache, SinkKVCache])
def test_a_cache_is_not_written_twice_by_recomputation(cache_class):
    model = tiny_model("0_0_2_2").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    cache = cache_class(config=model.config)
    with pytest.raises(ValueError, match="would write to a cache twice"):
        model(token_ids(1, LENGTH), past_key_values=cache)
    with torch.no_grad():  # where nothing is recomputed
        model(token_ids(1, LENGTH), past_key_values=cache)
    assert cache.get_seq_length() == LENGTH


@pytest.mark.parametrize("tie_word_embeddings", [False, True])
def test_a_token_that_pads_begins_and_ends_texts_is_learned(tie_word_embeddings):
    """GPT-2's habit: one token for all three, so that the first position of every document reads its embedding."""
    model = tiny_model(
        "0_2_2_3", pad_token_id=5, bos_token_id=5, eos_token_id=5, tie_word_embeddings=tie_word_embeddings
    )
    input_ids = token_ids(2, LENGTH)
    input_ids[:, 0] = 5
    model(input_ids, labels=input_ids).loss.backward()
    assert model.model.embed_tokens.weight[5].abs().min() > 0
    gradient = model.model.embed_tokens.weight.grad[5]
    assert gradient.abs().max() > 0
    labels = torch.full_like(input_ids, -100)
    labels[:, 1] = input_ids[:, 1]
    model.zero_grad()
    model(input_ids, labels=labels).loss.backward()  # what only the first position predicts teaches its row
    assert model.model.embed_tokens.weight.grad[5].abs().max() > 0


def test_a_cache_that_takes_single_tokens_is_named_where_that_is_in_the_way():
    model = tiny_model("0_2_2_3")
    cache = SinkKVCache(model.config, num_sinks=1, window=3)
    with pytest.raises(ValueError, match=r"^SinkKVCache \(single tokens\) returns no hidden states"):
        model(token_ids(1, LENGTH), past_key_values=cache, output_hidden_states=True)


def test_flash_attention_takes_no_static_cache():
    model = tiny_model("0_2_2_3")
    with pytest.raises(ValueError, match="static cache"):
        _flash_like(model, token_ids(1, 4), past_key_values=StaticCache(config=model.config, max_cache_len=8))


@pytest.mark.parametrize("layer_types", ["0_0_2_2", "0_3_3_3_4", "2s_2_2_0", "3_3_3_3"])
@torch.no_grad()
def test_generate(layer_types):
    model = tiny_model(layer_types, forward_passes=16)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    input_ids = token_ids(2, 6)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, :3] = 0
    options = {"attention_mask": attention_mask, "max_new_tokens": 6, "do_sample": False}
    uncached = model.generate(input_ids, use_cache=False, **options)
    assert torch.equal(model.generate(input_ids, **options), uncached)
    static = model.generate(input_ids, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, uncached)
    beams = [model.generate(input_ids, num_beams=3, use_cache=use_cache, **options) for use_cache in (True, False)]
    assert torch.equal(*beams)


@torch.no_grad()
def test_hidden_states_and_attentions_come_from_the_last_pass():
    model = tiny_model("0_2_2_3", attn_implementation="eager")
    outputs = model(token_ids(2, LENGTH), output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == 5 and len(outputs.attentions) == 4
    assert torch.equal(model.lm_head(outputs.hidden_states[-1]), outputs.logits)
    upward = outputs.attentions[1]  # (batch, num_heads, q_len, kv_len)
    assert upward[:, :, 0].abs().max() == 0
    assert_close(upward[:, :, 1:].sum(-1), torch.ones_like(upward[:, :, 1:, 0]))
    assert upward.triu().abs().max() == 0


@torch.no_grad()
def test_kv_residual_shrinks_with_passes():
    input_ids = token_ids(2, LENGTH)
    residuals = [
        tiny_model("0_3_3_3_4", forward_passes=passes)(input_ids, output_kv_residual=True).kv_residual
        for passes in (0, 2, 4)
    ]
    assert residuals[0] > residuals[1] > residuals[2] > 0
    assert tiny_model("0_0_2_2")(input_ids, output_kv_residual=True).kv_residual is None


@torch.no_grad()
def test_saved_checkpoint_loads_through_auto_classes(tmp_path):
    model = tiny_model("0_2_2_3")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is LCKVLlamaForCausalLM
    input_ids = token_ids(1, LENGTH)
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_with_one_query_equals_torch(dtype):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, length, 8, generator=generator).to(dtype) for heads, length in ((6, 1), (2, 9), (2, 9))
    )
    mask = torch.rand(2, 1, 1, 9, generator=generator) > 0.4
    for visible in (None, mask):
        expected = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, scale=0.3, enable_gqa=True
        )
        actual, weights = attend_with_one_query(query, key, value, visible, scaling=0.3)
        assert actual.dtype == dtype
        tolerance = 1e-6 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(actual, expected.transpose(1, 2), atol=tolerance, rtol=0)
        for num_heads in (1, 2):  # of values, one for all or as many as of keys, of another width
            latents = torch.randn(2, num_heads, 9, 5, generator=generator).to(dtype)
            actual, again = attend_with_one_query(query, key, latents, visible, scaling=0.3)
            assert torch.equal(weights, again)
            expected = weights @ latents.repeat_interleave(6 // num_heads, dim=1)
            torch.testing.assert_close(actual, expected.transpose(1, 2), atol=tolerance, rtol=0)


@pytest.mark.parametrize("force_nodiag", [False, True])
@pytest.mark.parametrize("layer_types", ["0s_1s_2_2", "0_2s_2_2s", "1s_1s_3s_3s"])
def test_windows_in_blocks_equal_one_mask(layer_types, force_nodiag, monkeypatch):
    model = tiny_model(layer_types, sliding_window=3, force_nodiag=force_nodiag, attn_implementation="sdpa")
    input_ids = token_ids(2, 33)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :5] = 0
    for mask in (None, attention_mask):
        results = []
        for min_block in (4, 100):
            monkeypatch.setattr("lckv.models.visibility.backends.MIN_BLOCK", min_block)
            cache = DynamicCache(config=model.config)
            before = model(
                input_ids[:, :7], attention_mask=None if mask is None else mask[:, :7], past_key_values=cache
            )
            after = model(input_ids[:, 7:], attention_mask=mask, past_key_values=cache)
            results.append(torch.cat([before.logits, after.logits], dim=1))
        is_real = slice(None) if mask is None else mask.bool()
        assert_close(results[0][is_real], results[1][is_real], 1e-5)


def test_blocks_are_used_where_a_window_is_short(monkeypatch):
    model = tiny_model("0s_1s_2s_3s", sliding_window=3, attn_implementation="sdpa")
    monkeypatch.setattr("lckv.models.visibility.backends.MIN_BLOCK", 4)
    lengths = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def record(query, key, *args, **kwargs):
        lengths.append((query.shape[2], key.shape[2]))
        return sdpa(query, key, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    model(token_ids(1, 10), use_cache=False)
    assert set(lengths) == {(4, 4), (4, 6), (2, 4)}  # blocks of 4 and what is left, looking back 2 tokens


def test_generation_takes_a_cache_under_the_name_that_transformers_5_24_gives_it():
    model = tiny_model("0_0_2_2")
    cache, mask = StaticCache(config=model.config, max_cache_len=12), torch.ones(1, 3, dtype=torch.long)
    before = model.create_masks_for_generate(attention_mask=mask, past_key_values=cache)
    since = model.create_masks_for_generate(attention_mask=mask, cache=cache)
    assert before.shape == (1, 12) and torch.equal(before, since)
    assert model.prepare_inputs_for_generation(token_ids(1, 3), cache=cache)["past_key_values"] is cache


@torch.no_grad()
def test_groups_of_tokens_take_masks_where_all_take_flash_attention():
    attention = tiny_model("0_1").model.layers[0].self_attn
    heads = attention.config.num_attention_heads
    states = [torch.randn(2, count, length, 8) for count, length in ((heads, 3), (2, 7), (2, 7))]
    visible = VisibleKeys(3, mask=torch.rand(2, 1, 3, 7) < 0.7)
    outputs = []
    for implementation in ("sdpa", "flash_attention_2"):
        attention.config._attn_implementation_internal = implementation
        outputs.append(attend(attention, *states, visible)[0])
    torch.testing.assert_close(*outputs)
