"""Every path through the model that should agree does, for every kind of pattern."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from lckv.sharing.patterns import parse_layer_types
from tests.reference import PATTERNS, SHAPES, cross_entropy, exact_logits, plain_schedule_logits, tiny_model, token_ids
from tests.samples import pairwise

LENGTH = 9
CHUNKS = [([1] * LENGTH, 1), ([4, 1, 1, 3], 1), ([2, 4, 3], 1), ([1, 4, 4], 1), ([2, 6, 1], 2)]
BACKENDS = ["eager", "sdpa"]
PASSES = ("forward_passes", "backward_passes", "cyclic_groups")


def assert_close(actual, expected, tolerance=1e-4):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def exact_batch(model, input_ids):
    return torch.stack([exact_logits(model, row) for row in input_ids])


@pytest.fixture(params=PATTERNS)
def model(request):
    return tiny_model(request.param)


@pytest.mark.parametrize(("layer_types", "attn_implementation", "cyclic_groups"), pairwise(PATTERNS, BACKENDS, [1, 4]))
def test_iterated_to_the_end_is_exact(layer_types, attn_implementation, cyclic_groups):
    passes = {"forward_passes": LENGTH - 2, "cyclic_groups": cyclic_groups}
    model = tiny_model(layer_types, attn_implementation=attn_implementation, **passes)
    input_ids = token_ids(2, LENGTH)
    expected = exact_batch(model, input_ids)
    for use_cache in (False, True):
        assert_close(model(input_ids, use_cache=use_cache).logits, expected)


@torch.no_grad()
def test_few_new_tokens_are_exact_with_any_number_of_passes(model):
    input_ids = token_ids(2, 4)  # forward_passes + backward_passes
    assert_close(model(input_ids).logits, exact_batch(model, input_ids))


@torch.no_grad()
def test_sequential_is_exact(model):
    model.config.use_sequential = True
    input_ids = token_ids(2, LENGTH)
    expected = exact_batch(model, input_ids)
    assert_close(model(input_ids, use_cache=False).logits, expected)
    assert_close(model(input_ids, use_cache=True).logits, expected)


@pytest.mark.parametrize("cyclic_groups", [1, 2, LENGTH])
@torch.no_grad()
def test_converge_is_exact_with_a_tight_tolerance(model, cyclic_groups):
    model.config.forward_passes, model.config.converge_tolerance = "converge", 1e-7
    model.config.cyclic_groups = cyclic_groups
    input_ids = token_ids(2, LENGTH)
    assert_close(model(input_ids).logits, exact_batch(model, input_ids))


@pytest.mark.parametrize(
    ("layer_types", "passes"),
    [
        (layer_types, passes)
        for layer_types in PATTERNS
        for passes in [(2, 2, 1), (1, 1, 4), (0, 1, 2), (0, 2, 4)][
            : 4 if parse_layer_types(layer_types).has_cycles else 1
        ]
    ],
)
def test_fixed_passes_equal_the_plain_schedule_with_gradients(layer_types, passes):
    model = tiny_model(layer_types, **dict(zip(PASSES, passes, strict=True))).train()
    input_ids = token_ids(2, LENGTH)
    outputs = model(input_ids, labels=input_ids, use_cache=False)
    outputs.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    expected = torch.stack([plain_schedule_logits(model, row, *passes) for row in input_ids])
    loss = cross_entropy(expected, input_ids)
    loss.backward()
    assert_close(outputs.logits, expected)
    assert_close(outputs.loss, loss)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert_close(gradients[name], parameter.grad)


@pytest.mark.parametrize(("layer_types", "chunking", "force_nodiag"), pairwise(PATTERNS, CHUNKS, [False, True]))
@torch.no_grad()
def test_chunked_input_with_a_cache_is_exact(layer_types, chunking, force_nodiag):
    chunks, cyclic_groups = chunking
    model = tiny_model(layer_types, force_nodiag=force_nodiag, cyclic_groups=cyclic_groups)
    input_ids = token_ids(2, LENGTH)
    expected = exact_batch(model, input_ids)
    caches = [DynamicCache(config=model.config), DynamicCache(), StaticCache(config=model.config, max_cache_len=12)]
    for cache in caches:
        logits = [model(chunk, past_key_values=cache).logits for chunk in input_ids.split(chunks, dim=1)]
        assert_close(torch.cat(logits, dim=1), expected)


@pytest.mark.parametrize(
    ("layer_types", "backend", "side"),
    pairwise(PATTERNS, [("eager", 1), ("sdpa", 1), ("sdpa", 3)], ["left", "right"]),
)
@torch.no_grad()
def test_padding_changes_nothing(layer_types, backend, side):
    attn_implementation, cyclic_groups = backend
    model = tiny_model(layer_types, attn_implementation=attn_implementation, cyclic_groups=cyclic_groups)
    rows = [token_ids(1, length, seed=length)[0] for length in (LENGTH, 5, 1)]
    input_ids = torch.zeros(3, LENGTH, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, tokens in enumerate(rows):
        place = slice(LENGTH - len(tokens), None) if side == "left" else slice(len(tokens))
        input_ids[row, place] = tokens
        attention_mask[row, place] = 1
    position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    model.config.forward_passes = LENGTH
    for use_cache in (False, True):
        outputs = model(input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache)
        assert outputs.logits.isfinite().all()
        for row, tokens in enumerate(rows):
            assert_close(outputs.logits[row][attention_mask[row].bool()], exact_logits(model, tokens))


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("layer_types", PATTERNS)
@torch.no_grad()
def test_left_padding_with_a_cache_step_by_step(layer_types, attn_implementation):
    model = tiny_model(layer_types, attn_implementation=attn_implementation)
    rows = [token_ids(1, LENGTH)[0], token_ids(1, 5, seed=5)[0]]
    input_ids = torch.stack([rows[0], torch.nn.functional.pad(rows[1], (LENGTH - 5, 0))])
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, : LENGTH - 5] = 0
    position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    cache, logits, done = DynamicCache(config=model.config), [], 0
    for size in (4, 3, 1, 1):
        chunk = slice(done, done + size)
        outputs = model(
            input_ids[:, chunk],
            attention_mask=attention_mask[:, : done + size],
            position_ids=position_ids[:, chunk],
            past_key_values=cache,
        )
        logits.append(outputs.logits)
        done += size
    logits = torch.cat(logits, dim=1)
    assert logits.isfinite().all()
    for row, tokens in enumerate(rows):
        assert_close(logits[row, -len(tokens) :], exact_logits(model, tokens))


@pytest.mark.parametrize(("attn_implementation", "cyclic_groups"), [("eager", 1), ("sdpa", 1), ("eager", 2)])
@pytest.mark.parametrize("layer_types", PATTERNS)
def test_packed_documents_are_separate(layer_types, attn_implementation, cyclic_groups):
    passes = {"forward_passes": LENGTH, "cyclic_groups": cyclic_groups}
    model = tiny_model(layer_types, attn_implementation=attn_implementation, **passes)
    lengths = [[4, 1, 4], [2, 7]]
    input_ids = token_ids(2, LENGTH)
    position_ids = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    expected = torch.stack(
        [
            torch.cat([exact_logits(model, document) for document in tokens.split(row)])
            for tokens, row in zip(input_ids, lengths, strict=True)
        ]
    )
    with torch.no_grad():
        for use_cache in (False, True):
            assert_close(model(input_ids, position_ids=position_ids, use_cache=use_cache).logits, expected)
        model.config.use_sequential = True
        assert_close(model(input_ids, position_ids=position_ids, use_cache=False).logits, expected)
    model.config.use_sequential = False
    model.train()
    loss = model(input_ids, position_ids=position_ids, labels=input_ids, use_cache=False).loss
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("layer_types", ["0_3_3_3_4", "2_1_2_1", "1_2_3_3"])
def test_generated_text_is_that_of_decoding_unless_passes_are_asked_for(layer_types):
    differing = 0
    for seed in range(8):
        model = tiny_model(layer_types, seed=seed, forward_passes=0, initializer_range=0.4)
        prompt = token_ids(1, LENGTH, seed)
        few = model.generate(prompt, max_new_tokens=6, do_sample=False, forward_passes=0)
        texts = [model.generate(prompt, max_new_tokens=6, do_sample=False)]
        model.config.use_sequential = True
        texts.append(model.generate(prompt, max_new_tokens=6, do_sample=False))
        assert torch.equal(*texts)
        differing += not torch.equal(few, texts[0])
    assert differing  # so that the passes do matter


def _loss_and_gradients(model, input_ids, **kwargs):
    model.zero_grad()
    loss = model(input_ids, labels=input_ids, **kwargs).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("use_reentrant", "passes"), [(False, (2, 2, 1)), (True, (2, 2, 1)), (True, (0, 1, 3))])
@pytest.mark.parametrize("layer_types", PATTERNS)
def test_gradient_checkpointing_and_cache_change_nothing(layer_types, use_reentrant, passes):
    model = tiny_model(layer_types, **dict(zip(PASSES, passes, strict=True))).train()
    input_ids = token_ids(2, LENGTH)
    loss, gradients = _loss_and_gradients(model, input_ids, use_cache=False)
    with_cache, cached_gradients = _loss_and_gradients(model, input_ids, use_cache=True)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    checkpointed, recomputed_gradients = _loss_and_gradients(model, input_ids)
    assert_close(with_cache, loss, 1e-6)
    assert_close(checkpointed, loss, 1e-6)
    for name, gradient in gradients.items():
        assert_close(cached_gradients[name], gradient, 1e-6)
        assert_close(recomputed_gradients[name], gradient, 1e-6)


@pytest.mark.parametrize("layer_types", ["0_0_2_2", "0_3_3_3_4", "1s_1s_3s_3s"])
def test_autocast_trains_the_weights_that_ungraded_passes_used_before(layer_types):
    model = tiny_model(layer_types).train()
    input_ids = token_ids(2, LENGTH)
    _, gradients = _loss_and_gradients(model, input_ids, use_cache=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, rough = _loss_and_gradients(model, input_ids, use_cache=False)
    for name, gradient in gradients.items():
        assert (rough[name] - gradient).norm() <= 0.15 * gradient.norm(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_weights_stay_near_fp32(model, dtype):
    input_ids = token_ids(2, LENGTH)
    expected = model(input_ids).logits
    actual = model.to(dtype)(input_ids).logits.float()
    assert (actual - expected).norm() <= 0.06 * expected.norm()


@pytest.mark.parametrize(
    "options",
    [
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4},
        {"attention_bias": True, "mlp_bias": True},
        {"tie_word_embeddings": True},
        {"head_dim": 16},
        {"sliding_window": 1},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 4.0,
                "rope_theta": 1e4,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
        *SHAPES.values(),
    ],
    ids=str,
)
@pytest.mark.parametrize("layer_types", ["0_0_2_2", "0_3_3_3", "1s_1s_3s_3s", "2_0s_2s_0"])
@torch.no_grad()
def test_options_of_llama_and_other_families(layer_types, options, tmp_path):
    model = tiny_model(layer_types, forward_passes=LENGTH, **options)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)  # biases start at zero
    input_ids = token_ids(2, LENGTH)
    expected = exact_batch(model, input_ids)
    assert_close(model(input_ids).logits, expected)
    cache = DynamicCache(config=model.config)
    steps = [model(token, past_key_values=cache).logits for token in input_ids.split(1, dim=1)]
    assert_close(torch.cat(steps, dim=1), expected)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.kv_sharing == layer_types
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)
