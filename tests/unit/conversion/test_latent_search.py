"""The search for groups that share latents: the cheapest that there are, of what is really lost."""

import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from lckv.commands import cli
from lckv.config import DataConfig, SearchConfig, validate
from lckv.config.latent_sizes import latent_budget
from lckv.config.model import LatentConfig
from lckv.config.model_arguments import model_arguments
from lckv.conversion.latent_search import ExpectedLoss, LatentConverter, LatentSearch, cheapest_spans, groups_within
from lckv.conversion.pattern_search import SearchTrace, Span
from lckv.conversion.scoring import Scorer
from lckv.conversion.search_report import write_report
from lckv.conversion.search_session import SearchOfLatents
from lckv.conversion.sensitivity import measure_sensitivity
from lckv.conversion.source import Source
from lckv.errors import UserError
from lckv.models import LCKVLlamaConfig
from lckv.sharing.patterns import parse_layer_types
from tests.e2e.conftest import write_corpus
from tests.unit.conversion.sources import random_source, save_source
from tests.unit.conversion.test_search import text, with_twins


def spans_of(*sizes):
    stops = list(itertools.accumulate(sizes))
    return tuple(Span(stop - size, stop - size, stop) for size, stop in zip(sizes, stops, strict=True))


def loss_of(expected, spans, total, discount):
    """What groups lose at most so many numbers, the cheapest ones gone."""
    directions = [
        (float(loss) / cost, float(loss), cost)
        for span in spans
        for losses, cost in expected[span].latents
        for loss in losses
    ]
    left, lost = total, discount * sum(expected[span].unpredicted for span in spans)
    for _, loss, cost in sorted(directions, reverse=True):
        if cost <= left:
            left -= cost
        else:
            left, lost = 0, lost + loss
    return lost


@pytest.mark.parametrize("discount", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_no_other_groups_lose_less(seed, discount):
    num_owners, generator = 6, torch.Generator().manual_seed(seed)
    expected = {}
    for start, stop in itertools.combinations(range(num_owners + 1), 2):
        if stop - start <= 3:
            decay = torch.arange(4 * (stop - start)) / (stop - start)
            latents = tuple(
                ((torch.rand(len(decay), generator=generator) * 10**-decay).sort(descending=True)[0], cost)
                for cost in (1, 2)
            )
            expected[Span(start, start, stop)] = ExpectedLoss(
                latents, float(torch.rand(1, generator=generator)) * (stop - start - 1)
            )
    sizes = [each for count in range(1, 7) for each in itertools.product((1, 2, 3), repeat=count) if sum(each) == 6]
    for total in (6, 12, 24):
        found = cheapest_spans(expected, num_owners, total, discount)
        assert [span.start for span in found] == [0, *(span.stop for span in found[:-1])] and found[-1].stop == 6
        # Not every size is the best one at some price, so that a little may be lost between two prices.
        best = min(loss_of(expected, spans_of(*each), total, discount) for each in sizes)
        assert loss_of(expected, found, total, discount) <= 1.15 * best


def search(model, totals, kind="joint", max_distance=2):
    groups = groups_within(model.config.sharing_plan, max_distance)
    sensitivity = measure_sensitivity(model, [text(10, 1)], groups, weighs_alike=True)
    converter = LatentConverter(model, kind, sensitivity, 1e-9, {})
    trace, steps = SearchTrace(), []
    found = LatentSearch(Scorer(model, text(2, 2)), converter, max_distance, totals)
    assert list(found.run(trace, lambda: steps.append(1))) == trace.frontier[1:]
    assert len(steps) == found.num_steps
    return trace


@pytest.mark.parametrize("kind", ["joint", "separate"])
def test_layers_with_equal_keys_and_values_share_a_latent_at_no_loss(kind):
    model = with_twins(6, twins=(1, 4))
    trace = search(model, [4 * 32, 64], kind)
    whole, half = trace.frontier[1:]
    assert whole.num_owners == 4 and whole.loss < 1e-6 < half.loss
    assert (whole.latent_size, half.latent_size) == (4 * 32, 64)


def test_no_owner_keeps_more_than_can_be_asked_for_by_a_ratio():
    """A group's latent could be wider than the keys and values of its owner were, which no ratio of 1 or more says."""
    model = random_source(6, num_key_value_heads=1, head_dim=4)
    for found in search(model, [5 * 8, 4 * 8, 3 * 8], max_distance=5).candidates:
        assert found.latent_size <= 8 * found.num_owners
    plan = parse_layer_types("0_0_0_0_0_0")
    sizes = SimpleNamespace(num_key_value_heads=1, head_dim=4, hidden_size=32, use_qk_norm=False)
    sizes.learned_positions = False
    for total in range(1, 9):
        assert latent_budget(LatentConfig("joint", 8 / total), plan, sizes).total == total


def test_layers_that_share_already_stay_together():
    model = random_source(6, layer_types="0_0_2_2_4_5")
    trace = search(model, [64, 32])
    for found in (*trace.candidates, *trace.frontier):
        sources = [int(each) for each in found.layer_types.split("_")]
        assert sources[0] == sources[1] and sources[2] == sources[3] and {*sources} <= {0, 2, 4, 5}
    assert [each.latent_size for each in trace.frontier] == [None, 64, 32]


def test_a_search_is_reported_and_can_be_trained_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_source(tmp_path / "mine", random_source(5))
    write_corpus(tmp_path / "corpus")
    data = DataConfig(name="files", files="corpus/*.txt", block_size=32)
    cfg = SearchConfig(
        source="mine",
        budget=0.2,
        latent=LatentConfig("joint"),
        data=data,
        calibration_tokens=256,
        eval_tokens=64,
        validation_tokens=128,
    )
    validate(cfg)
    report = SearchOfLatents(cfg, Source.find("mine"), Console(quiet=True)).run()
    out = write_report(report, tmp_path / "out")
    figures = json.loads((out / "search.json").read_text())
    assert [each["name"] for each in figures["frontier"]] == ["5 of 5", "50 percent", "25 percent", "20 percent"]
    assert [each["kv_bytes_per_token"] for each in figures["frontier"]] == [640, 320, 160, 128]
    assert [each["name"] for each in figures["baselines"]] == ["no groups", "groups of 2", "groups of 3"]
    assert [each["kv_bytes_per_token"] for each in figures["baselines"]] == [128, 128, 128]
    assert all(math.isfinite(each["perplexity"]) for each in figures["frontier"] + figures["baselines"])
    assert "Converted by `latent=joint` on 256 tokens" in (out / "frontier.md").read_text()
    for point in figures["frontier"][1:]:
        name = f"kv_{point['name'].replace(' ', '_')}"
        made = cli.compose([f"experiment={name}", f"hydra.searchpath=[file://{out.resolve()}]"])
        config = LCKVLlamaConfig(**model_arguments(made, 300))
        assert config.kv_sharing == point["layer_types"]
        kept = sum(store.size for store in config.kv_layout.stores)
        assert abs(kept - point["kv_bytes_per_token"] // 4) <= len(config.kv_layout.stores)  # rounded down for each


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (10**6, "budget=1000000: is what the model needs already: 640 bytes"),
        (4, "budget=4: is too little: 2 groups of up to 4 layers need 8 of 640 bytes"),
    ],
)
def test_budgets_that_cannot_be(tmp_path, budget, message):
    save_source(tmp_path / "mine", random_source(5))
    cfg = SearchConfig(source=str(tmp_path / "mine"), budget=budget, latent=LatentConfig("joint"))
    with pytest.raises(UserError, match=message):
        SearchOfLatents(cfg, Source.find(cfg.source), Console(quiet=True))
