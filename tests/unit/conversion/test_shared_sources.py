"""Models that share keys and values already as the start of conversions, searches and trainings."""

import json
from pathlib import Path

import pytest
import torch

from lckv import train
from lckv.commands import cli
from lckv.conversion.calibration import collect_moments
from lckv.conversion.heads import AttentionHeads
from lckv.conversion.latent_models import to_latents
from lckv.conversion.methods import METHODS, needed_pairs
from lckv.conversion.pattern_search import PatternSearch, Reach, SearchLimits, SearchTrace
from lckv.conversion.scoring import Converter, Scorer
from lckv.conversion.settings import adopt_source
from lckv.errors import UserError
from lckv.loading.models import load_model
from lckv.sharing.patterns import parse_layer_types
from tests.reference import tiny_config, token_ids
from tests.unit.conversion.sources import (
    KINDS,
    assert_identical,
    convert_model,
    random_source,
    read_folder,
    run_convert,
    save_source,
)

PATTERNS = ("0_0_2_2", "0_2_2_3", "1_0_2_1s", "0_2:0_2:1_1")
TEXT = "\n\n".join(f"{number}: in the beginning was the word number {number}" for number in range(60))


@pytest.mark.parametrize("layer_types", PATTERNS)
def test_a_shared_model_is_taken_as_it_is(layer_types, tmp_path, capsys):
    original = random_source(4, layer_types=layer_types, forward_passes=3, sliding_window=5)
    source = save_source(tmp_path / "source", original)
    run_convert(source, tmp_path / "out", "method=aligned")
    assert_identical(read_folder(tmp_path / "out"), read_folder(source))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["kv_sharing"], config["sliding_window"]) == (layer_types, 5)
    if parse_layer_types(layer_types).has_cycles:
        assert config["forward_passes"] == 3
    assert capsys.readouterr().err.endswith(
        "; shared as before: give model.layer_types, or sharing other than llama\n"
    )
    model, _ = load_model(str(tmp_path / "out"), device="cpu")
    assert torch.equal(model(token_ids(1, 9)).logits, original(token_ids(1, 9)).logits)


def test_a_released_checkpoint_has_its_string_as_layer_types(tmp_path):
    source = save_source(tmp_path / "source", random_source(4, layer_types="0_1_1_3"))
    config = json.loads((source / "config.json").read_text())
    config["layer_types"] = config.pop("kv_sharing")
    (source / "config.json").write_text(json.dumps(config))
    run_convert(source, tmp_path / "out", "model.layer_types=0_1_1_1", "method=inherit")
    expected = convert_model(random_source(4, layer_types="0_1_1_3"), "0_1_1_1", "inherit")
    assert_identical(read_folder(tmp_path / "out"), expected.state_dict())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("0_0_2_2_4", "0_0_0_0_4"),
        ("0_1_1_1_4", "4_1_1_1_1"),
        ("0_1_2_3_3", "1_1_1_3_3"),
        ("0_1_1_0_4", "0_4_4_0_4"),
        ("0_1_1:0_3_3:0", "0_1_1:0_1:0_1:0"),
        ("0_2:0_2:1_3:1_3", "0_2:0_2:0_2:0_2:0"),
    ],
)
def test_steps_of_a_plain_mean_come_to_the_mean(first, then, kind):
    model = random_source(5, **KINDS[kind])
    once = convert_model(model, then, "average")
    twice = convert_model(convert_model(model, first, "average"), then, "average")
    for name, tensor in once.state_dict().items():
        torch.testing.assert_close(twice.state_dict()[name], tensor, atol=1e-6, rtol=1e-6)


def with_positions(input_ids):
    """A batch of whole texts."""
    return {"input_ids": input_ids, "position_ids": torch.arange(input_ids.shape[1]).expand_as(input_ids)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [name for name in METHODS if name != "distill"])
@torch.no_grad()
def test_keys_and_values_that_are_alike_are_merged_at_no_loss(method, kind):
    """Layers 2 and 3 read what layer 2 makes, layer 4 the same: made of the same input, with its heads permuted."""
    model = random_source(5, layer_types="0_0_2_2_4", **KINDS[kind])
    layers = model.model.layers
    for layer in layers[2:4]:  # so that the inputs of layers 2, 3 and 4 are the same
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        if layer.self_attn.o_proj.bias is not None:
            layer.self_attn.o_proj.bias.zero_()
    layers[4].input_layernorm.load_state_dict(layers[2].input_layernorm.state_dict())
    for name in ("k_proj", "v_proj", *(["k_norm"] if kind == "norms" else [])):
        getattr(layers[4].self_attn, name).load_state_dict(getattr(layers[2].self_attn, name).state_dict())
    plan, input_ids = parse_layer_types("0_0_2_2_2"), token_ids(8, 24, vocab_size=300)
    pairs = needed_pairs(plan, model.config.sharing_plan)
    assert pairs == [(2, 2), (3, 3), (4, 2), (4, 4)]
    moments = collect_moments(model, [with_positions(input_ids)], pairs)
    converted = convert_model(model, "0_0_2_2_2", method, moments=moments, ridge=1e-9)
    torch.testing.assert_close(converted(input_ids).logits, model(input_ids).logits, atol=2e-3, rtol=0)


def split_source(**settings):
    """A model whose layer 4 makes the keys of layer 2 with the values of layer 1, all of the same input."""
    model = random_source(5, **settings)
    layers = model.model.layers
    for layer in layers[1:4]:  # which write nothing
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            for parameter in projection.parameters():
                parameter.data.zero_()
        layers[4].input_layernorm.load_state_dict(layers[1].input_layernorm.state_dict())
        layer.input_layernorm.load_state_dict(layers[1].input_layernorm.state_dict())
    own, of_keys, of_values = (layers[layer_idx].self_attn for layer_idx in (4, 2, 1))
    for name in ("k_proj", "k_norm"):
        if hasattr(own, name):
            getattr(own, name).load_state_dict(getattr(of_keys, name).state_dict())
    own.v_proj.load_state_dict(of_values.v_proj.state_dict())
    return model


@pytest.mark.parametrize("is_permuted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [name for name in METHODS if name != "distill"])
@torch.no_grad()
def test_keys_and_values_of_two_layers_are_merged_at_no_loss(method, kind, is_permuted):
    model = split_source(**KINDS[kind])
    if is_permuted:
        if method not in ("aligned", "subspace"):
            pytest.skip("finds no order of heads")
        heads = AttentionHeads.read(model.state_dict(), 4, model.config, (4, 4)).permuted(torch.tensor([1, 0]))
        parts = heads.query_tensors() | heads.key_tensors() | heads.value_tensors() | heads.output_tensors()
        model.model.layers[4].self_attn.load_state_dict(parts, strict=False)
    plan, input_ids = parse_layer_types("0_1_2_3_2:1"), token_ids(8, 24, vocab_size=300)
    pairs = needed_pairs(plan, model.config.sharing_plan)
    assert pairs == [(1, 1), (2, 2), (4, 1), (4, 2), (4, 4)]
    moments = collect_moments(model, [with_positions(input_ids)], pairs)
    converted = convert_model(model, "0_1_2_3_2:1", method, moments=moments, ridge=1e-9)
    torch.testing.assert_close(converted(input_ids).logits, model(input_ids).logits, atol=2e-3, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_separate_latents_of_two_layers_lose_nothing_where_they_are_wide(kind):
    model, input_ids = split_source(**KINDS[kind]), token_ids(8, 24, vocab_size=300)
    shared = convert_model(model, "0_2:1_2_3_2:1", "inherit")
    for source, layer_types in (model, "0_1_2_3_2:1"), (shared, None):
        made = to_latents(source, [input_ids], "separate", ratio=1, layer_types=layer_types, ridge=1e-9)
        torch.testing.assert_close(made(input_ids).logits, source(input_ids).logits, atol=2e-3, rtol=0)
    assert [each and [*each] for each in made.config.kv_latents] == [
        ["key_latent", "value_latent"], ["value_latent"], ["key_latent", "value_latent"],
        ["key_latent", "value_latent"], None,
    ]  # fmt: skip
    shared = random_source(5, layer_types="0_2:1_2_3_2:1", **KINDS[kind])
    narrow = to_latents(shared, None, "separate", ratio=4)
    assert narrow.config.kv_layout.num_bytes(1, 1) * 4 == shared.config.kv_layout.num_bytes(1, 1)
    for kind in ("joint", "decoupled_rope"):
        with pytest.raises(UserError, match=f"latent={kind}: layer 1 reads the keys .*; allowed is separate"):
            to_latents(shared, None, kind)


@pytest.mark.parametrize("layer_types", ["0_0_2_3_3_5", "0_2_2_3_5_5", "0_1_0_3_1_5"])
@torch.no_grad()
def test_a_search_merges_what_layers_share(layer_types):
    model = random_source(6, layer_types=layer_types, forward_passes="converge", converge_tolerance=1e-7)
    plan = model.config.sharing_plan
    batch = {"input_ids": token_ids(2, 16, vocab_size=300), "position_ids": torch.arange(16).expand(2, -1)}
    settings = {"forward_passes": "converge", "converge_tolerance": 1e-7}
    converter, trace = Converter(model, "average", settings=settings), SearchTrace()
    list(PatternSearch(Scorer(converter.model, batch), converter, SearchLimits(Reach.of("both", 9), 2)).run(trace))
    assert [each.num_owners for each in trace.frontier] == [4, 3, 2]
    assert trace.frontier[0].layer_types == layer_types
    for candidate in trace.candidates:
        found = parse_layer_types(candidate.layer_types)
        assert {*found.kv_owners} <= {*plan.kv_owners}
        instead = dict(zip(plan.sources, found.sources, strict=True))
        assert [instead[source] for source in plan.sources] == [*found.sources]
        made = Converter(model, "average", settings=settings).build(found)
        assert candidate.loss == pytest.approx(Scorer(model, batch).score(made).loss, abs=1e-5)


def test_the_iteration_is_the_sources_unless_another_is_asked_for(caplog):
    source = tiny_config("0_2_2_3", forward_passes=3, backward_passes=4)
    caplog.set_level("INFO")
    cfg = adopt_source(cli.compose(["init.source=x", "model.backward_passes=5"]), source)
    assert (cfg.model.forward_passes, cfg.model.backward_passes) == (3, 5)
    assert "iterated as in the source: forward_passes=3" in caplog.text


def test_training_goes_on_from_what_training_wrote(tmp_path, make_run):
    first = make_run("first", "model.layer_types=0_2_2_3", "model.forward_passes=2")
    second = make_run("second", f"init.source={tmp_path}/first", "optim.learning_rate=1e-12")
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in (first, second)]
    assert results[1]["eval_loss"] == pytest.approx(results[0]["eval_loss"], abs=1e-5)
    config = json.loads((tmp_path / second / "model" / "config.json").read_text())
    assert (config["kv_sharing"], config["forward_passes"]) == ("0_2_2_3", 2)
    run_convert(tmp_path / second, tmp_path / "out", "model.layer_types=0_2_2_2")
    third = make_run("third", f"init.source={tmp_path}/out", "model.layer_types=2_2_2_2")
    assert json.loads((tmp_path / third / "model" / "config.json").read_text())["kv_sharing"] == "2_2_2_2"


@pytest.fixture
def make_run(tmp_path: Path):
    (tmp_path / "text.txt").write_text(TEXT)
    sizes = (
        "hidden_size=32 intermediate_size=64 num_attention_heads=2 num_key_value_heads=2 max_position_embeddings=64"
    )

    def run(name: str, *arguments: str) -> str:
        is_new = not arguments[0].startswith("init.source")
        settings = [
            *([f"model.{size}" for size in sizes.split()] if is_new else []),
            *(["tokenizer.vocab_size=280"] if is_new else []),
            "data=files",
            f"data.files={tmp_path}/text.txt",
            r"data.document_separator='\n\n'",
            "data.validation_fraction=0.3",
            "data.block_size=32",
            "trainer.max_steps=2",
            "trainer.micro_batch_size=2",
            "trainer.sample_tokens=0",
            "optim.warmup_steps=0",
            "logger.names=[]",
            f"run_dir={tmp_path}/{name}",
        ]
        train.main(cli.compose([*settings, *arguments]))
        return name

    return run
