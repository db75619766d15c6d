"""Trainings that draw whom layers read: what each step is told, and what becomes of the model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lckv import convert, train
from lckv.commands import cli
from lckv.config import InitConfig, ModelConfig, SharingConfig, TokenizerConfig
from lckv.conversion.settings import adopt_source
from lckv.errors import UserError
from lckv.loading.models import load_model
from lckv.models import LCKVLlamaConfig
from lckv.sharing.patterns import parse_layer_types
from lckv.sharing.random_sharing import RandomSharing
from lckv.training.session import Session
from tests.unit.conversion.sources import random_source, save_source

OWN = "0_1_2_3"
RANDOM = {"sharing": SharingConfig(name="random"), "model__layer_types": None, "model__num_hidden_layers": 4}
DRAWN = [RandomSharing(parse_layer_types(OWN), 0).layer_types(step) for step in range(1, 7)]


def watched(session: Session) -> list[tuple[bool, str | None]]:
    """Whether each call of the model was in training, and under which pattern."""
    calls: list[tuple[bool, str | None]] = []
    session.model.register_forward_pre_hook(
        lambda model, args, kwargs: calls.append((model.training, kwargs.get("layer_types"))), with_kwargs=True
    )
    return calls


def learned(session: Session) -> list[dict[str, float]]:
    kept = ("step", "loss", "grad_norm", "eval_loss", "kv_owners")
    return [{name: line[name] for name in kept if name in line} for line in session.folder.read_metrics()]


def test_every_step_has_a_pattern_of_its_own_and_evaluation_the_models(make_session: Callable[..., Session]):
    session = make_session(**RANDOM, trainer__micro_batch_size=2, trainer__logging_steps=2, trainer__save_steps=None)
    blocks = [session.data.train[index] for index in list(session.trainer.order)[:4]]
    batch = {name: torch.stack([block[name] for block in blocks]) for name in blocks[0]}
    first = session.model(**batch, use_cache=False, layer_types=DRAWN[0]).loss.item()
    calls = watched(session)
    results = session.run()
    assert [pattern for is_training, pattern in calls if is_training] == [each for each in DRAWN for _ in range(2)]
    assert {pattern for is_training, pattern in calls if not is_training} == {None}
    assert session.model.config.kv_sharing == results["layer_types"] == OWN
    owners = [len(parse_layer_types(pattern).kv_owners) for pattern in DRAWN]
    logged = [line["kv_owners"] for line in session.folder.read_metrics() if "kv_owners" in line]
    assert logged == [(one + other) / 2 for one, other in zip(owners[::2], owners[1::2], strict=True)]
    single = make_session("single", **RANDOM, trainer__max_steps=1)
    single.run()
    assert single.folder.read_metrics()[0]["loss"] == pytest.approx(first, rel=1e-5)


def test_an_interrupted_run_draws_what_it_would_have_drawn(make_session: Callable[..., Session], interrupt):
    whole = make_session("whole", **RANDOM)
    whole.run()
    interrupt(make_session("parts", **RANDOM), 4)
    resumed = make_session("parts", **RANDOM)
    calls = watched(resumed)
    resumed.run()
    assert [pattern for is_training, pattern in calls if is_training] == DRAWN[3:]
    assert learned(resumed) == learned(whole)
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_gradient_checkpointing_and_muon_take_part(make_session: Callable[..., Session]):
    settings = RANDOM | {"optim__name": "muon"}
    plain = make_session("plain", **settings)
    checkpointed = make_session("checkpointed", **settings, trainer__gradient_checkpointing=True)
    plain.run()
    checkpointed.run()
    for one, other in zip(learned(plain), learned(checkpointed), strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_a_source_whose_layers_keep_latents_is_refused(make_config):
    source = LCKVLlamaConfig(layer_types=OWN, hidden_size=32, kv_latents=[{"latent": 8}] * 4)
    with pytest.raises(UserError, match="sharing=random: the source keeps latents already"):
        adopt_source(make_config(**RANDOM), source)


def test_a_source_is_trained_on_and_converted_to_any_pattern(make_config, tmp_path: Path):
    cfg = make_config(**RANDOM, trainer__max_steps=2)
    cfg.model, cfg.tokenizer = ModelConfig(), TokenizerConfig()
    cfg.init = InitConfig(source=str(save_source(tmp_path / "source", random_source(4))), method="inherit")
    train.main(cfg)
    model, _ = load_model(str(cfg.run_dir), device="cpu")
    assert model.config.kv_sharing == OWN
    out = tmp_path / "shared"
    given = [f"source={cfg.run_dir}", "sharing=cla", "method=inherit", f"out={out}"]
    convert.main(cli.compose(given, "convert"))
    shared, _ = load_model(str(out), device="cpu")
    input_ids = torch.arange(3, 40)[None]
    assert shared.config.kv_sharing == "0_0_2_2"
    with torch.no_grad():
        expected = model(input_ids, layer_types="0_0_2_2").logits
        torch.testing.assert_close(shared(input_ids).logits, expected, atol=1e-6, rtol=0)
