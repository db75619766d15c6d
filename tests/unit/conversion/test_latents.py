"""Latents in closed form: exact at full rank, the best there is below, with the sizes that were asked for."""

from functools import cache, partial

import pytest
import torch
from safetensors.torch import load_file

from lckv.cache import build_cache
from lckv.conversion.latents import LatentFit, allot, roots, sources_of
from lckv.conversion.sensitivity import KEYS, VALUES, measure_sensitivity
from lckv.conversion.source import expected_shapes
from lckv.conversion.target import converted_config, converted_tensors
from lckv.errors import UserError
from lckv.loading import load_model
from lckv.models import LCKVLlamaForCausalLM
from lckv.patterns import parse_layer_types
from tests.reference import token_ids
from tests.unit.conversion.sources import KINDS, random_source, run_convert, save_source

TEXT = ["trainer.num_threads=1 init.calibration_tokens=64 data.block_size=16".split()][0]


def batches(count=8, length=24):
    positions = torch.arange(length)[None].expand(2, -1)
    return [{"input_ids": token_ids(2, length, seed, 300), "position_ids": positions} for seed in range(count)]


def fit_of(model, kind, layer_types=None, owners=None):
    own = model.config.sharing_plan
    plan = own if layer_types is None else parse_layer_types(layer_types)
    groups = sources_of(plan, own, plan.kv_owners if owners is None else owners)
    sensitivity = measure_sensitivity(model, batches(), groups)
    return LatentFit(kind, model.state_dict(), plan, own, groups, sensitivity, ridge=1e-3), sensitivity


def converted(model, fit, kv_latents):
    config = converted_config(model.config, fit.plan, kv_latents=kv_latents)
    made = converted_tensors(
        model.state_dict(),
        model.config.sharing_plan,
        fit.plan,
        expected_shapes(config, has_head=True),
        "latents",
        lambda owner, readers: fit.make(kv_latents, owner),
    )
    other = LCKVLlamaForCausalLM(config).eval()
    other.load_state_dict(dict(made))
    return other


def whole(fit):
    """Latents that keep every direction."""
    latents = [None] * fit.plan.num_hidden_layers
    for (owner, stream), factors in fit.factors.items():
        latents[owner] = (latents[owner] or {}) | {stream: len(factors.losses)}
    return latents


@pytest.mark.parametrize("layer_types", [None, "0_1s_1_3", "0_2_2_3"])
@pytest.mark.parametrize("kind", ["joint", "separate"])
@pytest.mark.parametrize("family", KINDS)
@torch.no_grad()
def test_full_rank_gives_the_original_logits(family, kind, layer_types):
    shared = {} if layer_types is None else {"layer_types": layer_types, "forward_passes": "converge"}
    model = random_source(4, **KINDS[family], **shared)
    fit, _ = fit_of(model, kind)
    other, input_ids = converted(model, fit, whole(fit)), token_ids(2, 20, 99, 300)
    torch.testing.assert_close(
        other(input_ids, use_cache=False).logits, model(input_ids, use_cache=False).logits, atol=1e-4, rtol=1e-4
    )


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


def test_sizes_are_allotted_where_least_is_lost():
    losses = {"a": torch.tensor([9.0, 4.0, 1.0]), "b": torch.tensor([8.0, 0.5]), "c": torch.tensor([0.1, 0.05])}
    assert allot(losses, 5) == {"a": 3, "b": 1, "c": 1}
    assert allot(losses, 6) == {"a": 3, "b": 2, "c": 1}
    assert allot(losses, 1) == {"a": 1, "b": 1, "c": 1}
    assert allot(losses, 99) == {"a": 3, "b": 2, "c": 2}


@torch.no_grad()
def test_a_merged_layer_is_predicted_from_its_owners_input():
    """Layers with equal inputs lose nothing; the latent holds what both need."""
    model = random_source(3)
    for layer in model.model.layers[:1]:  # whose block adds nothing, so that layer 1 has layer 0's input
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    model.model.layers[1].input_layernorm.weight.copy_(model.model.layers[0].input_layernorm.weight)
    plan, own = parse_layer_types("0_0_2"), model.config.sharing_plan
    groups = sources_of(plan, own, plan.kv_owners)
    sensitivity = measure_sensitivity(model, batches(), groups)
    fit = LatentFit("joint", model.state_dict(), plan, own, groups, sensitivity, ridge=1e-9)
    other, input_ids = converted(model, fit, whole(fit)), token_ids(2, 20, 99, 300)
    assert len(fit.factors[0, "latent"].losses) == 32  # all of the input, for four projections of 16
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
    with pytest.raises(UserError, match="the source keeps latents already"):
        run_convert(out, tmp_path / "again", "latent=joint", *TEXT)
    assert not (tmp_path / "again").exists()
