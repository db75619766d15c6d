"""A slow, plain reading of what a `layer_types` string means, against which the model is checked.

It uses a model's weights and none of its code paths: one token at a time, one head at a time, explicit lists of keys.
"""

from itertools import product

import torch
from torch import nn

from lckv import LCKVLlamaConfig, LCKVLlamaForCausalLM

WINDOW = 3

PATTERNS = [
    "0_1_2_3",
    "0_0_2_2",
    "0s_1s_2_2",
    "0_1s_1s_0",
    "0_3_3_3_4",
    "0_3_3_3_3_5",
    "3_3_3_3",
    "0_2s_2_2s",
    "2_1_2_1",
    "1s_1s_3s_3s",
    "2_0s_2s_0",
    "1_2_3_3",
    "0_1_1:0_1:0",  # keys of the middle with values of the bottom
    "0:1_1:0_3:2s_3:2s",  # own keys with values from above, and the reverse in rings of keys alone and values alone
]


SHAPES = {
    "gpt2": {
        "learned_positions": True,
        "norm_type": "layer_norm",
        "gated_mlp": False,
        "attention_bias": True,
        "mlp_bias": True,
        "hidden_act": "gelu_new",
        "tie_word_embeddings": True,
    },
    "stablelm": {
        "norm_type": "layer_norm",
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
    },
    "gemma": {
        "head_dim": 16,
        "use_qk_norm": True,
        "use_output_norms": True,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 5.5,
        "final_logit_softcapping": 2.0,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
    },
    "granite": {
        "attention_multiplier": 0.1,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.3,
        "logits_scaling": 0.25,
        "tie_word_embeddings": True,
    },
    "smollm3": {  # the lowest layer does not rotate
        "rope_parameters": {
            "rotated": {"rope_type": "default", "rope_theta": 1e4},
            "unrotated": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.0},
        },
        "rope_layer_types": ["unrotated", "rotated", "rotated", "rotated"],
    },
}
"""What families add to Llama, as settings of `tiny_config`, for patterns of four layers."""


def tiny_config(layer_types, config_class=LCKVLlamaConfig, **kwargs):
    defaults = dict(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        sliding_window=WINDOW,
        forward_passes=2,
        backward_passes=2,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="sdpa",
    )
    return config_class(layer_types=layer_types, **(defaults | kwargs))


def tiny_model(layer_types, seed=0, **kwargs):
    torch.manual_seed(seed)
    return LCKVLlamaForCausalLM(tiny_config(layer_types, **kwargs)).eval()


def token_ids(batch_size, length, seed=0, vocab_size=61):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab_size, (batch_size, length), generator=generator)


def _rotate(vector, position, inv_freq):
    half = vector.shape[-1] // 2
    angles = position * inv_freq
    first, second = vector[..., :half], vector[..., half:]
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
    )


def _attend(queries, keys, values, scaling):
    """`queries` `(num_heads, head_dim)`; lists of keys and values `(num_kv_heads, head_dim)`."""
    if not keys:
        return torch.zeros_like(queries)
    groups = queries.shape[0] // keys[0].shape[0]
    outputs = []
    for head in range(queries.shape[0]):
        scores = torch.stack([queries[head] @ key[head // groups] for key in keys]) * scaling
        weights = scores.softmax(dim=0)
        outputs.append(sum(weight * value[head // groups] for weight, value in zip(weights, values, strict=True)))
    return torch.stack(outputs)


def _visible(layer, position, force_nodiag, window):
    """The key positions that a query at `position` may see."""
    stop = position if (layer.is_upward or force_nodiag) else position + 1
    first = max(0, position - window + 1) if layer.is_sliding else 0
    return range(first, stop)


def _project_latents(owner, hidden, position, inv_freq, reader):
    """A reader's keys and values, made of what an owner keeps of a token; of one that keeps one of them, that."""
    own, attention, keys, values = owner.self_attn, reader.self_attn, None, None
    kept = own.kv_a_proj(owner.input_layernorm(hidden)).split(own.own_sizes)
    if not own.own_planes:
        if len(kept[0]) == attention.k_b_proj.in_features:
            keys = _rotate(attention.k_b_proj(kept[0]).view(-1, attention.head_dim), position, inv_freq)
        if len(kept[-1]) == attention.v_b_proj.in_features:
            values = attention.v_b_proj(kept[-1]).view(-1, attention.head_dim)
        return keys, values
    projection, planes, head_dim = attention.k_b_proj, list(own.own_planes), attention.head_dim
    latent, pairs = kept[0].split([attention.v_b_proj.in_features, 2 * len(planes)])
    pairs = torch.complex(*_rotate(pairs, position, inv_freq[planes]).chunk(2))
    made = iter(projection.weight @ latent + (0 if projection.bias is None else projection.bias))
    keys = torch.zeros(len(projection.rotated), head_dim)
    for head, factors in enumerate(torch.complex(*projection.rotated.unbind(1))):
        for index in range(head_dim):
            plane = index % (head_dim // 2)
            if plane in planes:
                turned = sum(pairs[i] * factors[i] for i, each in enumerate(planes) if each == plane)
                keys[head, index] = turned.real if index == plane else turned.imag
            else:
                keys[head, index] = next(made)
    return keys, attention.v_b_proj(latent).view(-1, head_dim)


def _project_kv(layer, hidden, position, inv_freq, reader=None):
    """What an owner keeps of a token; `None` for keys or values that nobody reads."""
    attention, keys, values = layer.self_attn, None, None
    normed = layer.input_layernorm(hidden)
    if hasattr(attention, "k_proj"):
        keys = attention.k_proj(normed).view(-1, attention.head_dim)
        if attention.config.use_qk_norm:
            keys = attention.k_norm(keys)
        keys = _rotate(keys, position, inv_freq)
    if hasattr(attention, "v_proj"):
        values = attention.v_proj(normed).view(-1, attention.head_dim)
    return keys, values


def _frequencies(model, owner):
    """By how much the planes of an owner's keys turn, `(head_dim / 2,)`: not at all, behind those that do."""
    label, embedding = model.config.rope_label(owner), model.model.rotary_emb
    turning = embedding.inv_freq if label is None else embedding[label].inv_freq
    return nn.functional.pad(turning, (0, model.config.head_dim // 2 - len(turning)))


def _embed(model, token, position):
    hidden = nn.functional.embedding(token, model.model.embed_tokens.weight) * model.config.embedding_multiplier
    return hidden + model.model.embed_positions.weight[position] if model.config.learned_positions else hidden


def _predict(model, hidden):
    logits = model.model.norm(hidden) @ model.lm_head.weight.T / model.config.logits_scaling
    bound = model.config.final_logit_softcapping
    return logits if bound is None else bound * torch.tanh(logits / bound)


def _run_layer(layer, hidden, position, inv_freq, keys, values):
    attention = layer.self_attn
    config = attention.config
    queries = attention.q_proj(layer.input_layernorm(hidden)).view(-1, attention.head_dim)
    if config.use_qk_norm:
        queries = attention.q_norm(queries)
    if planes := getattr(attention, "planes", ()):  # others stay as they are
        inv_freq = torch.stack([each if plane in planes else each * 0 for plane, each in enumerate(inv_freq)])
    queries = _rotate(queries, position, inv_freq)
    scaling = config.attention_multiplier or attention.head_dim**-0.5
    output = attention.o_proj(_attend(queries, keys, values, scaling).flatten())
    if config.use_output_norms:
        output = layer.attention_output_layernorm(output)
    hidden = hidden + config.residual_multiplier * output
    output = layer.mlp(layer.post_attention_layernorm(hidden))
    if config.use_output_norms:
        output = layer.mlp_output_layernorm(output)
    return hidden + config.residual_multiplier * output


@torch.no_grad()
def exact_logits(model, input_ids):
    """Token by token: every token passes all layers and reads earlier tokens' final keys and values.

    Args:
        input_ids: `(length,)`, one document.

    Returns:
        `(length, vocab_size)`.
    """
    saved = model.config.to_diff_dict() | dict.fromkeys(_CHANGES_NO_RESULT)
    weights = [(name, float(weight.double().sum())) for name, weight in model.named_parameters()]
    asked = str((saved, weights, input_ids.tolist()))
    if asked not in _EXACT:
        _EXACT[asked] = _exact_logits(model, input_ids)
    return _EXACT[asked]


_EXACT = {}
"""Answers by the question, as many tests ask the same."""

_CHANGES_NO_RESULT = ("forward_passes", "backward_passes", "cyclic_groups", "converge_tolerance", "use_sequential")


def _exact_logits(model, input_ids):
    config, plan = model.config, model.config.sharing_plan
    cache = {owner: [] for owner in plan.kv_owners}
    made = {}  # keys and values of earlier tokens, by reader, owner and position
    logits = []
    for position, token in enumerate(input_ids):
        hidden = _embed(model, token, position)
        for layer_plan, layer in zip(plan.layers, model.model.layers, strict=True):
            if layer_plan.computes_kv:
                cache[layer_plan.layer_idx].append(hidden)
            latents = config.latents_of(layer_plan.layer_idx)
            makes_keys = latents is not None and "rotated_planes" not in latents
            inv_freq = _frequencies(model, layer_plan.layer_idx if makes_keys else layer_plan.key_source)
            seen = _visible(layer_plan, position, config.force_nodiag, config.sliding_window)
            project = _project_kv if latents is None else _project_latents
            for read in product([layer_plan.layer_idx], layer_plan.sources, seen):
                if read not in made:
                    _, owner, i = read
                    made[read] = project(model.model.layers[owner], cache[owner][i], i, inv_freq, layer)
            keys, values = (
                [made[layer_plan.layer_idx, owner, i][which] for i in seen]
                for which, owner in enumerate([layer_plan.key_source, layer_plan.value_source])
            )
            hidden = _run_layer(layer, hidden, position, inv_freq, keys, values)
        logits.append(_predict(model, hidden))
    return torch.stack(logits)


def plain_schedule_logits(model, input_ids, forward_passes, backward_passes, cyclic_groups=1):
    """Every layer of a cycle in every pass, in which groups of tokens take turns, with nothing left out.

    Args:
        input_ids: `(length,)`, one document.

    Returns:
        `(length, vocab_size)`, with a gradient through the last `backward_passes` passes.
    """
    plan = model.config.sharing_plan
    hidden = list(model.model.embed_tokens(input_ids))
    key_values = {owner: [None] * len(hidden) for owner in plan.kv_owners}
    for segment in plan.segments:
        layers = range(segment.start, segment.stop)
        if not segment.is_cycle:
            hidden = _run_pass(model, layers, hidden, key_values)
            continue
        entering = hidden
        for _ in range(forward_passes):
            with torch.no_grad():
                _run_pass(model, layers, entering, key_values, cyclic_groups)
        for _ in range(backward_passes):
            hidden = _run_pass(model, layers, entering, key_values, cyclic_groups)
    return torch.stack([model.lm_head(model.model.norm(token)) for token in hidden])


def _run_pass(model, layers, hidden, key_values, num_groups=1):
    """What leaves the layers; the highest reads when all tokens have had their turn. `None` is what nobody wrote."""
    config, plan, inv_freq = model.config, model.config.sharing_plan, model.model.rotary_emb.inv_freq
    hidden = list(hidden)

    def read(layer_idx, position):
        layer_plan = plan.layers[layer_idx]
        seen = _visible(layer_plan, position, config.force_nodiag, config.sliding_window)
        of_keys, of_values = key_values[layer_plan.key_source], key_values[layer_plan.value_source]
        written = [(of_keys[i][0], of_values[i][1]) for i in seen if of_keys[i] and of_values[i]]
        keys, values = [key for key, _ in written], [value for _, value in written]
        return _run_layer(model.model.layers[layer_idx], hidden[position], position, inv_freq, keys, values)

    for group in range(num_groups):
        positions = range(group, len(hidden), num_groups)
        for layer_idx in layers:
            for position in positions:
                if plan.layers[layer_idx].computes_kv:
                    layer = model.model.layers[layer_idx]
                    key_values[layer_idx][position] = _project_kv(layer, hidden[position], position, inv_freq)
            if layer_idx != layers[-1]:
                for position in positions:
                    hidden[position] = read(layer_idx, position)
    return [read(layers[-1], position) for position in range(len(hidden))]


def cross_entropy(logits, input_ids):
    """Mean next-token loss over a batch; `logits` `(batch, length, vocab_size)`."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
