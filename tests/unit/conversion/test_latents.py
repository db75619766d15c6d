"""Latents in closed form: exact at full rank, the best there is below, with the sizes that were asked for."""

import json
import runpy
import shutil
import sys
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from lckv.cache import build_cache
from lckv.config.latent_sizes import latent_budget, suit_source
from lckv.config.model import LatentConfig
from lckv.config.names import LATENTS
from lckv.conversion.latent_models import num_unturned_planes, rope_labels, to_latents
from lckv.conversion.latents import Factors, LatentFit, Pairs, allot, roots, sources_of, stream_sources
from lckv.conversion.sensitivity import KEYS, VALUES, measure_sensitivity
from lckv.conversion.source import expected_shapes
from lckv.conversion.target import converted_config, converted_tensors
from lckv.errors import UserError
from lckv.loading.models import load_model
from lckv.models import LCKVLlamaConfig, LCKVLlamaForCausalLM
from lckv.sharing.costs import ModelSizes
from lckv.sharing.patterns import parse_layer_types
from tests.reference import SHAPES, token_ids
from tests.samples import pairwise
from tests.unit.conversion.sources import KINDS, random_source, run_convert, save_source

ALONE = {kind: {"group_size": 1} if kind == "xkv" else {} for kind in LATENTS}
TEXT = ["trainer.num_threads=1 init.calibration_tokens=64 data.block_size=16".split()][0]


def batches(count=8, length=24):
    positions = torch.arange(length)[None].expand(2, -1)
    return [{"input_ids": token_ids(2, length, seed, 300), "position_ids": positions} for seed in range(count)]


def fit_of(model, kind, layer_types=None, ratio=1.0, num_unturned=0, **options):
    config = model.config
    plan = config.sharing_plan if layer_types is None else parse_layer_types(layer_types)
    budget = latent_budget(LatentConfig(kind, ratio, **options), plan, config)
    groups = sources_of(plan, config.sharing_plan, budget.owners)
    sensitivity = measure_sensitivity(model, batches(), groups)
    streams = stream_sources(plan, config.sharing_plan, budget.owners)
    fit = LatentFit(budget, model.state_dict(), config, streams, sensitivity, 1e-9, num_unturned)
    return fit, sensitivity


def converted(model, fit, kv_latents):
    labels = rope_labels(model.config, fit.plan, kv_latents)
    config = converted_config(model.config, fit.plan, kv_latents=kv_latents, rope_layer_types=labels)
    made = converted_tensors(
        model.state_dict(),
        model.config.sharing_plan,
        fit.plan,
        expected_shapes(config, has_head=True),
        "latents",
        lambda owner: fit.make(kv_latents, owner),
    )
    other = LCKVLlamaForCausalLM(config).eval()
    other.load_state_dict(dict(made))
    return other


@pytest.mark.parametrize(
    ("family", "kind", "patterns"),
    pairwise([*KINDS, "gpt2", "stablelm", "gemma"], LATENTS, [(None, "0_2_1_3"), ("0_1s_1_3", "0_2_2_3")]),
)
@torch.no_grad()
def test_full_rank_gives_the_original_logits(family, kind, patterns):
    settings = (KINDS | SHAPES)[family]
    if kind == "decoupled_rope" and settings.get("use_qk_norm"):
        pytest.skip("normalised keys are no sum of two projections")
    if kind == "decoupled_rope" and settings.get("learned_positions"):
        pytest.skip("no key is rotated")
    for layer_types in patterns:
        shared = {} if layer_types is None else {"layer_types": layer_types, "forward_passes": "converge"}
        model = random_source(4, **settings, **shared)
        fit, _ = fit_of(model, kind)
        other, input_ids = converted(model, fit, fit.sizes()), token_ids(2, 20, 99, 300)
        expected = model(input_ids, use_cache=False).logits
        torch.testing.assert_close(other(input_ids, use_cache=False).logits, expected, atol=1e-4, rtol=1e-4)


def keep(kept, name, _module, _args, output):
    kept[name] = output


def test_gradients_are_those_of_a_whole_graph():
    """Without checkpointing, for one layer, from the definition; the model comes back as it was."""
    model = random_source(3, attention_dropout=0.5)
    sensitivity = measure_sensitivity(model, batches(3), {1: (1,)}, seed=5)
    assert not model.training and not any(layer.gradient_checkpointing for layer in model.model.layers)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert {layer.self_attn.attention_dropout for layer in model.model.layers} == {0.5}
    generator, sums, weighted, scales = torch.Generator().manual_seed(5), {KEYS: 0.0, VALUES: 0.0}, 0.0, None
    for batch in batches(3):
        kept: dict = {}
        attention, norm = model.model.layers[1].self_attn, model.model.layers[1].input_layernorm
        hooks = [
            module.register_forward_hook(partial(keep, kept, name))
            for name, module in {"inputs": norm, KEYS: attention.k_proj, VALUES: attention.v_proj}.items()
        ]
        logits = model(**batch, use_cache=False).logits.flatten(0, 1)
        for hook in hooks:
            hook.remove()
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        loss = torch.nn.functional.cross_entropy(logits, drawn, reduction="sum")
        gradients = torch.autograd.grad(loss, [kept[name] for name in sums])
        rows = {name: gradient.flatten(0, 1).double() for name, gradient in zip(sums, gradients, strict=True)}
        scales = scales or {name: each.norm(dim=1).mean() for name, each in rows.items()}
        weights = torch.stack([each.norm(dim=1) / scales[name] for name, each in rows.items()]).mean(0)
        inputs = kept["inputs"].detach().flatten(0, 1).double()
        weighted = weighted + (inputs * weights[:, None]).T @ inputs
        sums = {name: sums[name] + each.T @ each for name, each in rows.items()}
    num_tokens = 3 * batches(1)[0]["input_ids"].numel()
    for name, total in sums.items():
        torch.testing.assert_close(sensitivity.gradients[1, name], total / num_tokens, atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(sensitivity.moments[1][1, 1], weighted / num_tokens, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_no_other_latent_of_the_size_loses_less():
    """Against random ones, and the plain singular vectors of the weights, in the loss that is minimised."""
    model = random_source(2)
    fit, sensitivity = fit_of(model, "joint")
    size, factors = 5, fit.factors[1, "latent"]
    cut = factors.cut(size)
    torch.testing.assert_close(cut.down @ cut.down.T, torch.eye(size, dtype=torch.float64))
    weight = torch.cat([getattr(model.model.layers[1].self_attn, name).weight.double() for name in (KEYS, VALUES)])
    gram = torch.block_diag(*(sensitivity.gradients[1, name] for name in (KEYS, VALUES)))
    moments = sensitivity.moments[1][1, 1]

    def loss(down, up):
        left = weight - up @ down
        return torch.trace(gram @ left @ moments @ left.T)

    best = loss(cut.down, torch.cat(list(cut.up.values())))
    torch.testing.assert_close(best, factors.losses[size:].sum(), rtol=1e-6, atol=1e-9)
    root, _ = roots(moments)
    generator = torch.Generator().manual_seed(0)
    others = [torch.randn(size, weight.shape[1], generator=generator, dtype=torch.float64) for _ in range(20)]
    others += [torch.linalg.svd(weight)[2][:size], torch.linalg.svd(weight @ root)[2][:size] @ torch.linalg.inv(root)]
    for down in others:  # each with the decoder that is best for it
        up = weight @ moments @ down.T @ torch.linalg.inv(down @ moments @ down.T)
        assert loss(down, up) >= best * (1 - 1e-9)


def factors(*losses):
    return Factors(torch.tensor(losses), torch.zeros(0), {})


def test_sizes_are_allotted_where_least_is_lost():
    pairs = Pairs(torch.tensor([9.0, 5.0, 3.0]), [0, 2, 1], *(torch.zeros(0),) * 2, {})
    of = {(0, "a"): factors(9.0, 4.0, 1.0), (1, "a"): factors(8.0, 0.5), (2, "a"): factors(0.1, 0.05)}
    assert [*allot(of, 5).values()] == [3, 1, 1]
    assert [*allot(of, 6).values()] == [3, 2, 1]
    assert [*allot(of, 99).values()] == [3, 2, 2]
    # A pair counts two numbers, so that half of its loss is weighed against another's.
    assert [*allot({(0, "a"): factors(9.0, 2.4, 1.4), (0, "b"): pairs}, 4).values()] == [2, 1]
    assert [*allot({(0, "a"): factors(9.0, 2.4, 1.4), (0, "b"): pairs}, 5).values()] == [1, 2]
    many = {(layer, "a"): factors(*(2.0 ** -(layer + index) for index in range(64))) for layer in range(2)}
    assert [*allot(many, 77).values()] == [40, 32]


def test_pairs_are_the_best_of_each_plane():
    """All of one plane's keys as complex numbers: by hand, for a rank of one of two heads."""
    model = random_source(1)
    fit, sensitivity = fit_of(model, "decoupled_rope")
    pairs, half = fit.factors[0, "rotated_planes"], model.config.head_dim // 2
    weight = model.model.layers[0].self_attn.k_proj.weight.detach().double().unflatten(0, (2, 2, half))
    moments = sensitivity.moments[0][0, 0].to(torch.complex128)
    for plane in range(half):
        first, second = (index for index, each in enumerate(pairs.planes) if each == plane)
        keys = torch.complex(weight[:, 0, plane], weight[:, 1, plane])
        made = pairs.up[0][:, first, None] @ pairs.down[first, None]
        gram = fit._gram(0, plane)
        lost, total = (torch.trace(gram @ each @ moments @ each.mH).real / 2 for each in (keys - made, keys))
        torch.testing.assert_close(lost, pairs.losses[second], rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(total, pairs.losses[first] + pairs.losses[second], rtol=1e-6, atol=1e-12)


def test_what_is_read_upward_counts_in_the_pass_that_is_read():
    model = random_source(4, layer_types="0_2_2_3")
    _, sensitivity = fit_of(model, "joint")
    sizes = {place: float(torch.trace(gram)) for place, gram in sensitivity.gradients.items()}
    assert min(sizes.values()) > 1e-3 * max(sizes.values())
    fit, _ = fit_of(model, "joint", ratio=1.3)
    other, input_ids = converted(model, fit, fit.sizes()), token_ids(2, 20, 99, 300)
    with torch.no_grad():
        expected, made = (each(input_ids, use_cache=False).logits for each in (model, other))
    assert (made - expected).std() < 0.3 * expected.std()


def test_sizes_that_kernels_for_one_head_of_keys_take():
    """512 numbers of a latent with 64 rotated behind them are one stream of 576, whose first 512 the values are."""
    sizes = ModelSizes(32, 512, 8, 8, 8, 64, sliding_window=8)
    plan = parse_layer_types("0_1")
    (latents, _) = latent_budget(LatentConfig("decoupled_rope", dim=[512, 64]), plan, sizes).uniform
    config = LCKVLlamaConfig(
        layer_types="0_1",
        hidden_size=512,
        intermediate_size=8,
        num_attention_heads=8,
        vocab_size=32,
        kv_latents=[latents] * 2,
    )
    assert [[stream.num_heads, stream.head_dim] for stream in config.kv_layout.stores[0].streams] == [[1, 576]]
    model, cache = LCKVLlamaForCausalLM(config).eval(), build_cache("dynamic", config)
    reads = []
    attention = model.model.layers[1].self_attn
    model(token_ids(1, 3, 0, 32), past_key_values=cache)
    keep = attention.keys_and_values
    attention.keys_and_values = lambda *args: reads.append(keep(*args)) or reads[-1]
    model(token_ids(1, 1, 0, 32), past_key_values=cache)
    keys, values = reads[0]
    assert keys.shape == (1, 1, 4, 576) and torch.equal(values, keys[..., :512])


@torch.no_grad()
def test_planes_that_hardly_turn_go_to_the_latent():
    """A model whose slow planes do not turn at all over the text loses nothing by it."""
    rope = {"rope_type": "default", "rope_theta": 1e18}
    model = random_source(3, rope_parameters=rope, attention_bias=True, attention_output_bias=False)
    fit, sensitivity = fit_of(model, "decoupled_rope", dim=[28, 4], num_unturned=3)
    assert num_unturned_planes(fit.budget, sensitivity, model.config) == 3
    assert fit.sizes() == [{"latent": 28, "rotated_planes": [0, 0]}] * 3
    other, input_ids = converted(model, fit, fit.sizes()), token_ids(2, 20, 99, 300)
    torch.testing.assert_close(
        other(input_ids, use_cache=False).logits, model(input_ids, use_cache=False).logits, atol=2e-3, rtol=2e-3
    )


@torch.no_grad()
def test_a_merged_layer_is_predicted_from_its_owners_input():
    """Layers with equal inputs lose nothing; the latent holds what both need."""
    model = random_source(3)
    for layer in model.model.layers[:1]:  # whose block adds nothing, so that layer 1 has layer 0's input
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    model.model.layers[1].input_layernorm.weight.copy_(model.model.layers[0].input_layernorm.weight)
    fit, _ = fit_of(model, "joint", "0_0_2", dim=32)
    assert len(fit.factors[0, "latent"].losses) == 32  # all of the input, for four projections of 16
    other, input_ids = converted(model, fit, fit.sizes()), token_ids(2, 20, 99, 300)
    torch.testing.assert_close(
        other(input_ids, use_cache=False).logits, model(input_ids, use_cache=False).logits, atol=1e-3, rtol=1e-3
    )


@cache
def source_folder(tmp):
    return save_source(tmp / "source", random_source(4))


@pytest.fixture
def source(tmp_path_factory):
    return source_folder(tmp_path_factory.getbasetemp())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["latent=joint", "latent.ratio=2"], 4 * 16),
        (["latent=separate", "latent.ratio=4"], 4 * 8),
        (["latent=separate", "latent.dim=[3,5]"], 4 * 8),
        (["latent=joint", "latent.ratio=2", "latent.skip_layers=1"], 32 + 3 * 16),
        (["latent=joint", "latent.ratio=2", "sharing=cla"], 2 * 16),
        (["latent=joint", "latent.dim=7", "model.layer_types=0_2_2_3"], 3 * 7),
        (["latent=decoupled_rope", "latent.ratio=2"], 4 * 16),
        (["latent=decoupled_rope", "latent.dim=[9,6]"], 4 * 15),
        (["latent=xkv", "latent.ratio=4"], 4 * 8),
        (["latent=xkv", "latent.dim=18", "latent.group_size=3", "latent.skip_layers=1"], 32 + 18),
        (["latent=xkv", "latent.ratio=2", "latent.warmup_layers=2"], 3 * 21 + 1),
        (["latent=auto", "latent.ratio=2"], 4 * 16),
        (["latent=auto", "latent.ratio=8"], 4 * 4),
    ],
)
def test_convert_writes_what_was_asked_for(source, tmp_path, arguments, expected):
    out = tmp_path / "out"
    run_convert(source, out, *arguments, *TEXT)
    model, _ = load_model(str(out), device="cpu")
    assert sum(store.size for store in model.config.kv_layout.stores) == expected
    assert load_file(out / "model.safetensors").keys() == expected_shapes(model.config, has_head=True).keys()
    cache = build_cache("dynamic", model.config)
    model(token_ids(1, 10), past_key_values=cache)
    assert cache.num_bytes() == 10 * expected * 4


def test_what_keeps_latents_already_is_not_converted_again(source, tmp_path):
    run_convert(source, tmp_path / "out", "latent=joint", *TEXT)
    with pytest.raises(UserError, match="the source keeps latents already"):
        run_convert(tmp_path / "out", tmp_path / "again", "latent=joint", *TEXT)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("kind", LATENTS)
@torch.no_grad()
def test_a_loaded_model_is_converted_in_memory(kind):
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=kind == "joint",
        initializer_range=0.2,
    )
    model, text = LlamaForCausalLM(config).eval(), [batch["input_ids"] for batch in batches()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = to_latents(model, text, kind, ratio=1, **ALONE[kind])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    input_ids = token_ids(2, 20, 99, 300)
    torch.testing.assert_close(whole(input_ids).logits, model(input_ids).logits, atol=1e-4, rtol=1e-4)
    for parameter in whole.parameters():  # which are its own
        parameter.add_(1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.generation_config.eos_token_id = 7
    groups = {"group_size": 2, "warmup_layers": 1} if kind == "xkv" else {"layer_types": "0_0_2"}
    shared = to_latents(model, text, kind, ratio=3 if kind == "xkv" else 2, **groups)
    assert shared.generation_config.eos_token_id == 7
    assert sum(store.size for store in shared.config.kv_layout.stores) == 2 * 16
    assert shared.generate(input_ids, max_new_tokens=4, do_sample=False).shape == (2, 24)
    with pytest.raises(UserError, match="latent=joint: the source keeps latents already"):
        to_latents(shared, text)
    with pytest.raises(UserError, match="the calibration text has 24 tokens: latents need as many .* 32"):
        to_latents(model, [token_ids(1, 24, 0, 300)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "foo"}, "latent.name='foo'"),
        ({"kind": "none"}, "kind='none': allowed are"),
        ({"kind": "xkv", "skip_layers": 2}, "latent.skip_layers=2 and latent.warmup_layers=0: leave none of the 2"),
        ({"ratio": 0.5}, "latent.ratio=0.5: allowed is a number, 1 or more"),
        ({"ratio": float("nan")}, "latent.ratio=nan: allowed"),
        ({"ratio": float("inf")}, "latent.ratio=inf: leaves 0 of 32 numbers; allowed is at most 32"),
        ({"skip_layers": -1}, "latent.skip_layers=-1"),
        ({"dim": 99}, "latent.dim=99: allowed for latent are 1 to 32"),
        ({"kind": "decoupled_rope", "dim": [8, 3]}, "latent.dim=.8, 3.: rotated_planes are pairs"),
        ({"kind": "xkv", "group_size": 3}, "latent.group_size=3: does not divide the 2 layers; allowed are 1, 2"),
        ({"kind": "xkv", "layer_types": "0_0"}, "latent=xkv: makes groups of layers that compute their own"),
        ({"batches": []}, "the calibration text has 0 tokens"),
    ],
)
def test_mistakes_from_python(options, message):
    with pytest.raises(UserError, match=message):
        to_latents(random_source(2), **({"batches": [token_ids(2, 20, 0, 300)]} | options))


def test_groups_are_joint_latents_of_a_pattern():
    """The lowest layer of a group keeps for all; the ratio is to what they kept, and more than one could say fits."""
    model, text = random_source(4), [token_ids(2, 40, 0, 300)]
    model.config.kv_sharing = model.config.kv_sharing.replace("2", "2s").replace("3", "3s")
    made = to_latents(model, text, "xkv", ratio=2, warmup_layers=0)
    assert made.config.kv_sharing == "0_0_2s_2s"
    same = to_latents(model, text, "joint", ratio=1, layer_types="0_0_2s_2s")
    assert [store.size for store in made.config.kv_layout.stores] == [32, 32]
    for name, tensor in same.state_dict().items():
        torch.testing.assert_close(made.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("heads", "ratio", "expected"),
    [
        (8, 4, ("joint", 0)),  # keys and values of 128 numbers: half of them say all of the input
        (8, 8.1, ("xkv", 2)),
        (2, 4, ("joint", 0)),
        (2, 4.1, ("xkv", 2)),
        (1, 4.1, ("xkv", 2)),
    ],
)
def test_auto_looks_at_the_heads(heads, ratio, expected):
    sizes = SimpleNamespace(num_key_value_heads=heads, head_dim=8, hidden_size=64)
    latent, plan = LatentConfig("auto", ratio), parse_layer_types("_".join(map(str, range(12))))
    found = suit_source(latent, plan, sizes, may_group=True)
    assert (found.name, found.warmup_layers) == expected
    assert suit_source(latent, plan, sizes, may_group=False).name == "joint"
    windows = parse_layer_types("0_1s_2_3s")
    assert suit_source(latent, windows, sizes, may_group=True).name == "joint"


@torch.no_grad()
def test_more_keys_than_inputs_are_exact_too():
    model = random_source(2, num_key_value_heads=4, head_dim=16)  # 64 keys of 32 inputs
    for kind in LATENTS:
        fit, _ = fit_of(model, kind)
        other, input_ids = converted(model, fit, fit.sizes()), token_ids(2, 20, 99, 300)
        torch.testing.assert_close(
            other(input_ids, use_cache=False).logits, model(input_ids, use_cache=False).logits, atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("kind", LATENTS)
@torch.no_grad()
def test_a_layer_on_which_nothing_depends_is_converted_too(kind):
    model, text = random_source(3, attention_bias=True), [token_ids(2, 40, 0, 300)]
    model.model.layers[1].self_attn.o_proj.weight.zero_()
    input_ids = token_ids(2, 20, 99, 300)
    expected = model(input_ids, use_cache=False).logits
    torch.testing.assert_close(
        to_latents(model, text, kind, ratio=1, **ALONE[kind])(input_ids).logits, expected, atol=1e-4, rtol=1e-4
    )
    half = to_latents(model, text, kind, ratio=2, **ALONE[kind])
    assert all(parameter.isfinite().all() for parameter in half.parameters())


def test_numbers_that_overflow_are_told():
    model = random_source(2)
    model.model.layers[1].mlp.up_proj.weight.data.fill_(float("inf"))
    with pytest.raises(UserError, match="what enters layer 2 on the calibration text.*bfloat16 reaches further"):
        measure_sensitivity(model, batches(1), {0: (0,), 1: (1,)})


@pytest.mark.parametrize("kind", LATENTS)
@torch.no_grad()
def test_without_text_the_weights_decide(kind):
    """At full size nothing is lost; below, directions that no query or output looks at go first."""
    model, input_ids = random_source(2), token_ids(2, 20, 99, 300)
    whole = to_latents(model, None, kind, ratio=1, **ALONE[kind])
    torch.testing.assert_close(whole(input_ids).logits, model(input_ids).logits, atol=1e-4, rtol=1e-4)
    for layer in model.model.layers:  # the second half of each value head is read by nobody
        layer.self_attn.o_proj.weight.unflatten(1, (-1, 8))[..., 4:] = 0
    made = to_latents(model, None, "separate", dim=[16, 8])
    torch.testing.assert_close(made(input_ids).logits, model(input_ids).logits, atol=1e-3, rtol=1e-3)


def test_convert_without_text(source, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(source, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    run_convert(bare, tmp_path / "out", "latent=joint", "latent.ratio=2", "init.calibration_tokens=0")
    config = LCKVLlamaConfig.from_pretrained(tmp_path / "out")
    assert sum(store.size for store in config.kv_layout.stores) == 4 * 16
    LCKVLlamaForCausalLM.from_pretrained(tmp_path / "out")


def test_the_table_and_the_picture_of_the_docs(source, tmp_path, monkeypatch, capsys):
    text, figures = tmp_path / "text.jsonl", tmp_path / "new" / "figures.json"
    words = "in the beginning was the word and the word was with all of them who read it "
    text.write_text("".join(json.dumps({"text": words[start:] * 3}) + "\n" for start in range(6)), encoding="utf-8")
    script = Path(__file__).parents[3] / "scripts" / "latents.py"
    arguments = (
        "--roads sharing joint pairs pattern_joint groups --layer-types 0_1_1_1 --ratios 2 4 --bits 16 8 --length 128 "
    )
    arguments += f"--num-heldout 2 --num-calibration 4 --output {figures} --keep {tmp_path / 'kept'}"
    monkeypatch.setattr(sys, "argv", [str(script), str(source), str(text), str(text), *arguments.split()])
    runpy.run_path(str(script), run_name="__main__")
    rows = json.loads(figures.read_text())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(lines) == 2 * 11 and figures.with_suffix(".png").stat().st_size > 10_000
    found = {(row["road"], row["numbers"], row["bits"]): row for row in rows}
    # Two bytes of each number, or one; keys have a scale and a zero of two bytes for 64 tokens, values for each token.
    assert found["original", 128, 16]["bytes"] == 2 * 128
    assert found["original", 128, 8]["bytes"] == 128 + 4 * 2 * (8 * 4 / 64 + 4)
    for road in ("sharing", "joint", "pairs", "pattern_joint", "groups"):
        assert [found[road, numbers, 16]["bytes"] for numbers in (64, 32)] == [2 * 64, 2 * 32]
    for (road, numbers, bits), row in found.items():
        exact = found[road, numbers, 16]["perplexity"]
        assert row["perplexity"] == pytest.approx(exact, rel=0.01) and (row["perplexity"] == exact) == (bits == 16)
    made, _ = load_model(str(tmp_path / "kept" / "pairs_32"), device="cpu")
    assert made.config.kv_layout.owners == (0, 2)
