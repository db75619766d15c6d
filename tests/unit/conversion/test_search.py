"""The search for a sharing pattern: what it finds, that it scores what a conversion writes, and what it reports."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from torch.nn import functional as F

from lckv.commands import cli
from lckv.config import DataConfig, ModelConfig, SearchConfig, TrainConfig, validate
from lckv.config.model_arguments import model_arguments, plan_from_source
from lckv.conversion.calibration import collect_moments
from lckv.conversion.pattern_search import PatternSearch, Reach, ScoredPattern, SearchLimits, SearchTrace
from lckv.conversion.scoring import Converter, Scorer
from lckv.conversion.search_report import KVCount, SearchReport, write_report
from lckv.conversion.search_session import SharingSearch
from lckv.conversion.source import Source
from lckv.conversion.split_search import SplitSearch
from lckv.conversion.target import converted_config, write_converted
from lckv.data.readers import find_files
from lckv.errors import UserError
from lckv.loading.models import load_model
from lckv.models import LCKVLlamaConfig
from lckv.sharing.patterns import parse_layer_types
from tests.reference import SHAPES, tiny_config, tiny_model, token_ids
from tests.unit.conversion.sources import KINDS, random_source, save_source

SETTINGS = {"forward_passes": "converge", "converge_tolerance": 1e-6}


def text(num_blocks, seed):
    """Blocks in which documents begin anew."""
    position_ids = torch.cat([torch.arange(9), torch.arange(15)]).expand(num_blocks, -1)
    return {"input_ids": token_ids(num_blocks, 24, seed=seed, vocab_size=300), "position_ids": position_ids}


def converter_for(model, method="average", ridge=1e-2):
    num_layers = model.config.num_hidden_layers
    pairs = itertools.combinations_with_replacement(range(num_layers), 2)
    moments = collect_moments(model, [text(30, 1)], pairs)
    return Converter(model, method, moments, ridge, SETTINGS)


def search(converter, num_owners, directions="down", batch=None, **limits):
    trace = SearchTrace()
    reach = Reach.of(directions, limits.pop("max_distance", 9))
    scorer = Scorer(converter.model, batch or text(2, 2))
    steps = list(PatternSearch(scorer, converter, SearchLimits(reach, num_owners, **limits)).run(trace))
    assert steps == trace.frontier[1:]
    return trace


def with_twins(num_layers, twins):
    """A model in which, for each of `twins`, the layer above has the same input, keys and values."""
    model = random_source(num_layers)
    for lower in twins:
        first, second = model.model.layers[lower], model.model.layers[lower + 1]
        first.self_attn.o_proj.weight.data.zero_()
        first.mlp.down_proj.weight.data.zero_()
        second.input_layernorm.load_state_dict(first.input_layernorm.state_dict())
        second.self_attn.k_proj.load_state_dict(first.self_attn.k_proj.state_dict())
        second.self_attn.v_proj.load_state_dict(first.self_attn.v_proj.state_dict())
    return model


@pytest.mark.parametrize("method", ["average", "aligned", "activation"])
def test_layers_with_equal_keys_and_values_are_merged_first_at_no_loss(method):
    converter = converter_for(with_twins(6, twins=(1, 4)), method, ridge=1e-9)
    trace = search(converter, 3)
    assert trace.frontier[2].layer_types == "0_1_1_3_4_4"
    losses = [each.loss for each in trace.frontier]
    assert losses[0] == 0 and max(losses[:3]) < 1e-6 and losses[3] > 1e-3
    others = [each for each in trace.candidates if each.num_owners == 5 and each.loss > 1e-6]
    assert len(others) == 3


def test_twins_with_equal_inputs_are_found_by_the_subspace_fit():
    """Layer 1 all but passes its input on, and layer 2 makes the same keys and values of it."""
    model = with_twins(4, twins=(1,))
    model.model.layers[1].self_attn.o_proj.weight.data.normal_(std=1e-6)
    trace = search(converter_for(model, "subspace", ridge=1e-9), 3)
    losses = {each.layer_types: each.loss for each in trace.candidates}
    assert losses["0_1_1_3"] < 1e-6
    assert losses["0_1_2_2"] > 1e-3 and trace.frontier[1].loss <= losses["0_1_1_3"]


@pytest.mark.parametrize(
    ("method", "kind", "directions"),
    [
        ("aligned", "plain", "down"),
        ("subspace", "biases", "both"),
        ("activation", "norms", "down"),
        ("average", "norms", "both"),
    ],
)
@torch.no_grad()
def test_scores_are_those_of_the_whole_converted_model(method, kind, directions):
    """Whatever the search has kept from pattern to pattern makes no difference."""
    model = random_source(5, **KINDS[kind], tie_word_embeddings=kind == "biases")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    converter, batch = converter_for(model, method), text(2, 2)
    trace = search(converter, 2, directions, batch, shortlist=3, beam=2)
    for candidate in trace.candidates:
        whole = replace(converter, _made={}).build(parse_layer_types(candidate.layer_types))
        assert candidate.loss == pytest.approx(divergence(model, whole, batch), abs=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert any(parse_layer_types(each.layer_types).has_cycles for each in trace.candidates) == (directions == "both")


def divergence(model, other, batch):
    expected, found = (each(**batch, use_cache=False).logits.double().log_softmax(-1) for each in (model, other))
    return F.kl_div(found, expected, log_target=True, reduction="none").sum(-1).mean().item()


@pytest.mark.parametrize("family", [{}, SHAPES["gpt2"], SHAPES["gemma"]], ids=["plain", "gpt2", "gemma"])
@pytest.mark.parametrize("layer_types", ["0_1_2s_2_4", "0_1_3s_3_3"])
@torch.no_grad()
def test_reused_layers_give_what_the_written_checkpoint_does(tmp_path, layer_types, family):
    model = tiny_model("0_1_2s_3_4", vocab_size=300, **family)
    source = Source.find(str(save_source(tmp_path / "source", model)))
    converter, batch, plan = converter_for(model, "subspace"), text(2, 2), parse_layer_types(layer_types)
    scorer = Scorer(converter.model, batch)
    score = scorer.score(converter.build(plan, 2), 2)
    write_converted(
        source,
        converted_config(source.config, plan, **SETTINGS),
        "subspace",
        tmp_path / "out",
        moments=converter.moments,
        ridge=converter.ridge,
    )
    written, _ = load_model(str(tmp_path / "out"), device="cpu")
    assert score.loss > 1e-3
    assert score.loss == pytest.approx(divergence(model, written, batch), abs=1e-5)
    states = written(**batch, use_cache=False, output_hidden_states=True).hidden_states
    assert len(score.inputs) == 5
    for found, expected in zip(score.inputs[1:], states[1:], strict=False):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_wide_search_finds_the_best_of_all_patterns():
    converter, batch = converter_for(random_source(5)), text(2, 2)
    trace = search(converter, 2, batch=batch, beam=99, shortlist=99)
    scorer = Scorer(converter.model, batch)
    for num_owners in (3, 2):
        patterns = [
            layer_types
            for owners in itertools.combinations(range(1, 5), num_owners - 1)
            if (layer_types := "_".join(str(max(each for each in (0, *owners) if each <= i)) for i in range(5)))
        ]
        losses = {each: scorer.score(converter.build(parse_layer_types(each))).loss for each in patterns}
        best = min(losses, key=lambda each: losses[each])
        assert trace.frontier[5 - num_owners].layer_types == best
        assert {each.layer_types for each in trace.candidates if each.num_owners == num_owners} == set(patterns)


def test_only_the_shortlist_is_scored_and_each_pattern_once():
    converter = converter_for(random_source(6))
    limits = SearchLimits(Reach.of("down", 9), 2, beam=2, shortlist=2)
    trace = search(converter, 2, beam=2, shortlist=2)
    counts = [sum(each.num_owners == num for each in trace.candidates) for num in (6, 5, 4, 3, 2)]
    assert counts[:4] == [1, 5, 4, 4] and 2 <= counts[4] <= 4  # two patterns may come to the same
    assert sum(counts[1:]) <= limits.num_scored(6)
    assert len({each.layer_types for each in trace.candidates}) == len(trace.candidates)
    assert [each.expected is None for each in trace.candidates] == [True] * 6 + [False] * sum(counts[2:])


def test_a_search_ends_at_the_budget_and_gets_there_the_same_way_again():
    converter = converter_for(random_source(6), "activation")
    first, second = (search(converter, 2, max_distance=2) for _ in range(2))
    assert first == second
    assert [each.num_owners for each in first.frontier] == [6, 5, 4, 3, 2]
    assert first.frontier[-1].layer_types == "0_0_0_3_3_3"  # all that a distance of two leaves
    kv = KVCount.of(tiny_config("0_1_2_3_4_5"))
    kv_bytes = [kv.bytes_of(each.layer_types) for each in first.frontier]
    assert kv_bytes == sorted(kv_bytes, reverse=True)
    assert kv_bytes[-1] == 2 * kv.bytes_of("0") == 2 * 2 * 16 * 4


def test_a_search_goes_on_to_keys_and_values_of_two_layers(folder, tmp_path):
    settings = {"budget": "256", "method": "subspace", "max_distance": 5, "baselines": False}
    report = run(config(folder, split_sources=True, **settings))
    plain, apart = report.frontier[4:]
    assert plain.kv_bytes_per_token == apart.kv_bytes_per_token == 256 and apart.loss < plain.loss
    assert (plain.name, apart.name) == ("2 of 6", "2 of 6 apart") and ":" in apart.layer_types
    out = write_report(report, tmp_path / "found")
    experiment = f"hydra.searchpath=[file://{out.resolve()}]"
    assert cli.compose(["experiment=kv_2_of_6_apart", experiment]).model.layer_types == apart.layer_types


def test_keys_and_values_are_looked_for_apart_where_that_loses_less():
    """Layers 1 to 4 have one input; layer 4 makes the keys of layer 3 with the values of layer 1."""
    model = random_source(5)
    layers = model.model.layers
    for layer in layers[1:4]:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    for layer in layers[2:5]:
        layer.input_layernorm.load_state_dict(layers[1].input_layernorm.state_dict())
    layers[4].self_attn.k_proj.load_state_dict(layers[3].self_attn.k_proj.state_dict())
    layers[4].self_attn.v_proj.load_state_dict(layers[1].self_attn.v_proj.state_dict())
    converter, batch = converter_for(model, "inherit"), text(2, 2)
    scorer, trace = Scorer(converter.model, batch), SearchTrace()
    found = SplitSearch(scorer, converter, Reach.of("down", 3))
    begin = ScoredPattern("0_1_2_3_3", 4, scorer.score(converter.build(parse_layer_types("0_1_2_3_3"))).loss)
    best = found.run(begin, trace)
    assert best.layer_types == "0_1_2_3_3:1" and best.loss < 1e-6 < begin.loss and trace.frontier == [best]
    assert len(trace.candidates) == found.num_scored(begin) == 4  # layers 1 and 2 for keys, and for values
    nearer = SplitSearch(scorer, converter, Reach.of("down", 2))
    assert nearer.run(begin, SearchTrace()).layer_types != "0_1_2_3_3:1"


def test_what_is_made_is_forgotten():
    converter = converter_for(random_source(6))
    search(converter, 2)
    kept = set(converter._made)
    assert 0 < len(kept) <= 6
    converter.forget([])
    assert not converter._made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and text for it."""
    path = tmp_path_factory.mktemp("search")
    save_source(path / "mine", random_source(6))
    words = "in the beginning was the word and the light shone upon the face of the deep waters".split()
    for number in range(40):
        text = [words[(number * i) % len(words)] for i in range(60)]
        (path / f"{number:02}.txt").write_text(" ".join([*text, str(number)]))
    return path


def config(folder, **values) -> SearchConfig:
    data = DataConfig(name="files", files=str(folder / "*.txt"), block_size=32)
    sizes = dict(calibration_tokens=256, eval_tokens=64, validation_tokens=64, method="activation")
    return SearchConfig(**({"source": str(folder / "mine"), "budget": 0.5, "data": data} | sizes | values))


def run(cfg) -> SearchReport:
    validate(cfg)
    session = SharingSearch(cfg, Source.find(cfg.source), Console(quiet=True))
    return session.run()


def test_a_report_and_configurations_that_train(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = run(config(folder, directions="both", budget="384"))  # three layers of 128 bytes in float32
    first = write_report(report, None)
    assert first == Path("runs/search/mine-activation-384")
    assert write_report(report, None) == first.with_name("mine-activation-384-2")
    assert sorted(path.name for path in first.parent.iterdir()) == ["mine-activation-384", "mine-activation-384-2"]

    figures = json.loads((first / "search.json").read_text())
    assert [each["kv_bytes_per_token"] for each in figures["frontier"]] == [768, 640, 512, 384]
    assert [each["fraction"] for each in figures["frontier"]] == [1, 5 / 6, 4 / 6, 0.5]
    assert len(figures["candidates"]) > 4 and not figures["is_interrupted"]
    assert "spin_count" in figures["hardware"]
    assert all(math.isfinite(each["perplexity"]) for each in figures["frontier"] + figures["baselines"])
    assert {each["num_owners"] for each in figures["baselines"]} == {3}
    assert "cla, groups of 2" in (first / "frontier.md").read_text()
    assert (first / "frontier.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.stem for path in (first / "experiment").iterdir()) == ["kv_3_of_6", "kv_4_of_6", "kv_5_of_6"]

    for point in figures["frontier"][1:]:
        name = f"kv_{point['num_owners']}_of_6"
        cfg = cli.compose([f"experiment={name}", f"hydra.searchpath=[file://{first.resolve()}]"])
        assert cfg.model.layer_types == point["layer_types"]
        assert (cfg.init.source, cfg.init.method, cfg.init.calibration_tokens) == (
            str(folder / "mine"),
            "activation",
            256,
        )
        assert (cfg.data.name, cfg.data.files, cfg.data.block_size) == ("files", str(folder / "*.txt"), 32)
        assert LCKVLlamaConfig(**model_arguments(cfg, 300)).kv_sharing == point["layer_types"]
        assert cfg.model.hidden_size == 32
        assert cfg.optim == cli.compose(["optim=uptrain"]).optim
        assert cfg.trainer == cli.compose(["trainer=uptrain"]).trainer
        has_cycles = parse_layer_types(point["layer_types"]).has_cycles
        assert cfg.model.forward_passes == ("converge" if has_cycles else 1)


def test_configurations_keep_that_a_source_hides_a_tokens_own_key(folder, tmp_path):
    save_source(tmp_path / "mine", random_source(6, force_nodiag=True))
    out = write_report(run(config(folder, source=str(tmp_path / "mine"))), tmp_path / "out")
    cfg = cli.compose(["experiment=kv_3_of_6", f"hydra.searchpath=[file://{out.resolve()}]"])
    assert cfg.model.force_nodiag is True


def test_reports_say_how_much_text_there_was(folder, tmp_path, caplog):
    report = run(config(folder, calibration_tokens=250, eval_tokens=33, validation_tokens=10**6))
    num_validation = report.num_tokens["validation"]
    assert report.num_tokens == {"calibration": 256, "eval": 64, "validation": num_validation}
    assert 64 < num_validation < 10**5 and num_validation % 32 == 0
    assert "patterns are scored on what they were fitted to" not in caplog.text
    out = write_report(report, tmp_path / "out")
    assert json.loads((out / "search.json").read_text())["num_tokens"] == report.num_tokens
    markdown = (out / "frontier.md").read_text()
    assert "`activation` on 256 tokens" in markdown and "on 64 tokens of the training split" in markdown
    assert f"of {num_validation:,} tokens of the validation split" in markdown


def test_scores_on_calibration_text_are_warned_of(folder, caplog):
    run(config(folder, calibration_tokens=10**6, baselines=False))
    assert "so patterns are scored on what they were fitted to; give more text, or fewer" in caplog.text
    caplog.clear()
    run(config(folder, calibration_tokens=32768, baselines=False, method="average"))
    assert "scored" not in caplog.text


def test_configurations_find_their_text_from_any_folder(folder, tmp_path, monkeypatch):
    (tmp_path / "[1]").mkdir()
    monkeypatch.chdir(tmp_path / "[1]")
    Path("texts").symlink_to(folder)
    files = ["texts/[01]*.txt", str(folder / "2*.txt")]
    data = DataConfig(name="files", files=files, validation_files="texts/3*.txt", block_size=32)
    out = write_report(run(config(folder, data=data, baselines=False)), tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    cfg = cli.compose(["experiment=kv_3_of_6", f"hydra.searchpath=[file://{out}]"])
    names = [path.name for path in find_files(cfg.data.files, "data.files")]
    assert names == [f"{number:02}.txt" for number in range(30)]
    assert len(find_files(cfg.data.validation_files, "data.validation_files")) == 10


def test_bytes_are_counted_in_the_type_of_the_source():
    kv = KVCount.of(tiny_config("0_1_2", dtype="bfloat16"))
    assert (kv.dtype, kv.bytes_of("0"), kv.bytes_of("0_0_2")) == ("bfloat16", 64, 128)
    assert kv.point(ScoredPattern("0_0_2s", 2, 0.0), None).fraction == pytest.approx(2 / 3)


def test_patterns_of_eights_and_nines_stay_text(folder, tmp_path):
    """`0_0_2` is a number to YAML, `0_0_8` is not."""
    layer_types = "0_0_2_2_2_2_8_8_8"
    model, frontier = (
        tiny_config("0_1_2_3_4_5_6_7_8"),
        [ScoredPattern("0_1_2_3_4_5_6_7_8", 9, 0.0), ScoredPattern(layer_types, 3, 0.5)],
    )
    report = SearchReport(config(folder), model, KVCount.of(model), "", SearchTrace(frontier, frontier))
    out = write_report(report, tmp_path / "out")
    experiment = yaml.safe_load((out / "experiment" / "kv_3_of_9.yaml").read_text())
    assert experiment["model"]["layer_types"] == layer_types


def test_an_interrupted_search_reports_what_it_has(folder, tmp_path, monkeypatch):
    score, count = Scorer.score, itertools.count()

    def interrupted(self, *given):
        if next(count) == 7:
            raise KeyboardInterrupt
        return score(self, *given)

    monkeypatch.setattr(Scorer, "score", interrupted)
    report = run(config(folder))
    assert report.is_interrupted and [each.num_owners for each in report.trace.frontier] == [6, 5]
    out = write_report(report, tmp_path / "out")
    figures = json.loads((out / "search.json").read_text())
    assert len(figures["candidates"]) == 8 and figures["frontier"][1]["perplexity"] is None
    assert (out / "frontier.png").is_file() and (out / "experiment" / "kv_5_of_6.yaml").is_file()


def test_a_search_interrupted_before_it_found_anything_has_no_report(folder, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Scorer, "score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(config(folder))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"budget": "100B"}, "^budget=100 bytes: is too little: .* alone are 128 bytes per token"),
        ({"max_distance": 1, "budget": 0.4}, "^max_distance=1: leaves 3 of 6 layers"),
    ],
)
def test_mistakes(folder, values, message):
    with pytest.raises(UserError, match=message):
        run(config(folder, **values))


@pytest.mark.parametrize("method", ["activation", "subspace"])
def test_a_source_that_shares_already_is_searched_further(folder, tmp_path, method):
    source = save_source(tmp_path / "shared", random_source(6, layer_types="0_0_2_4_4_5", forward_passes="converge"))
    report = run(config(folder, source=str(source), method=method, directions="both", budget=0.5))
    assert [(point.name, point.fraction) for point in report.frontier] == [
        ("4 of 4", 1),
        ("3 of 4", 0.75),
        ("2 of 4", 0.5),
    ]
    assert report.frontier[0].layer_types == "0_0_2_4_4_5" and report.frontier[0].loss == 0
    assert all(math.isfinite(point.perplexity) for point in [*report.frontier, *report.baselines])
    assert {parse_layer_types(each.layer_types).kv_owners for each in report.baselines} <= {(0, 4), (0, 2), (0, 5)}
    experiment = yaml.safe_load((write_report(report, tmp_path / "out") / "experiment" / "kv_2_of_4.yaml").read_text())
    cfg = TrainConfig(model=ModelConfig(layer_types=experiment["model"]["layer_types"]))
    assert len(plan_from_source(cfg, parse_layer_types("0_0_2_4_4_5")).kv_owners) == 2


def test_a_source_that_would_run_token_by_token_is_searched_like_any_other(folder, tmp_path):
    save_source(tmp_path / "sequential", random_source(6, use_sequential=True))
    frontiers = [run(config(folder, source=str(path))).trace for path in (folder / "mine", tmp_path / "sequential")]
    assert frontiers[0] == frontiers[1]
