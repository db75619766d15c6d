"""The end of a run: what it says to type next is what can be typed."""

import shlex
import sys
from pathlib import Path

import pytest

from lckv.commands import cli
from lckv.config.model_arguments import plan_from_source
from lckv.sharing.patterns import SharingPlan, parse_layer_types
from lckv.training.run_folder import RunFolder
from lckv.training.run_summary import _evaluation, next_commands


def commands(
    layer_types: str, folder: Path, prompt: str = "In the beginning", source: SharingPlan | None = None, **figures
) -> list[list[str]]:
    results = {"layer_types": layer_types, "run_name": "mine", "sample_prompt": prompt} | figures
    return [shlex.split(command) for command in next_commands(results, RunFolder(str(folder)), source)]


def test_the_next_run_differs_in_its_pattern_only(monkeypatch, tmp_path):
    monkeypatch.setattr(
        sys, "argv", ["train", "--config-dir", "d", "sharing=cla", "++run_dir=x", "data.files=a b.txt"]
    )
    _, train, _ = commands("0_0_2_2", tmp_path)
    assert train[1:] == [
        *("-m", "lckv.train", "--config-dir", "d", "data.files=a b.txt"),
        *("model.layer_types=0_1_2_3", "run_name=mine_llama"),
    ]
    assert commands("0_1_2_3", tmp_path)[1][-2:] == ["model.layer_types=0_0_2_2", "run_name=mine_cla"]


def test_latents_are_not_taken_over_by_another_pattern(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["train", "init.source=a", "latent=xkv", "latent.group_size=2", "seed=1"])
    _, train, _ = commands("0_0_2_2", tmp_path, source=parse_layer_types("0_1_2_3"))
    assert train[3:] == ["init.source=a", "seed=1", "model.layer_types=0_1_2_3", "run_name=mine_source"]


def test_another_pattern_starts_from_the_same_source(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["train", "init.source=a b", "init.revision=main", "init.method=activation"])
    plan, train, _ = commands("0_0_2_2", tmp_path)
    assert cli.compose(plan[3:], "plan").init.source == str(tmp_path)
    assert cli.compose(train[3:], "train").init.source == "a b"


@pytest.mark.parametrize("given", [[], ["trainer=demo", "optim=adamw"]])
def test_what_was_converted_by_training_can_be_trained_with_another_pattern(monkeypatch, tmp_path, given):
    own = ["source=a", "revision=main", "method=distill", "max_shard_size=1GB"]
    monkeypatch.setattr(sys, "argv", ["convert", *own, "out=b", *given, "trainer.max_steps=7"])
    _, train, _ = commands("0_0_2_2", tmp_path)
    cfg = cli.compose(train[3:], "train")
    assert (cfg.init.source, cfg.init.revision, cfg.init.method) == ("a", "main", "distill")
    before = cli.compose(sys.argv[1:], "convert")
    assert cfg.trainer == before.trainer and cfg.optim == before.optim
    assert cfg.model.layer_types == "0_1_2_3"


def test_a_model_for_all_patterns_can_have_one(tmp_path):
    _, convert, _ = commands("0_1_2_3", tmp_path, is_for_all_patterns=True)
    cfg = cli.compose(convert[3:], "convert")
    assert (cfg.source, cfg.sharing.name, cfg.method) == (str(tmp_path), "cla", "inherit")


def test_a_single_layer_has_nothing_to_compare_with(tmp_path):
    plan, generate = commands("0", tmp_path)
    assert plan[1:] == ["-m", "lckv.plan", f"init.source={tmp_path}"]
    assert generate[1:3] == ["-m", "lckv.generate"]


@pytest.mark.parametrize(
    ("own", "layer_types", "other"),
    [
        ("0_1_2_3", "0_0_2_2", ["model.layer_types=0_1_2_3", "run_name=mine_source"]),
        ("0_0_2_3", "0_0_2_2", ["model.layer_types=0_0_2_3", "run_name=mine_source"]),
        ("0_0_2_3", "0_0_2_3", ["model.layer_types=0_0_2_2", "run_name=mine_cla"]),
        ("0_0_0_3", "0_0_0_3", None),
    ],
)
def test_a_source_that_shares_already_can_start_the_next_run(own, layer_types, other, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["train", "init.source=a"])
    _, *train, _ = commands(layer_types, tmp_path, source=parse_layer_types(own))
    assert [each[4:] for each in train] == ([] if other is None else [other])
    for each in train:
        assert plan_from_source(cli.compose(each[3:], "train"), parse_layer_types(own))


def test_any_prompt_survives_the_shell(tmp_path):
    prompt = 'He said: "it\'s $HOME" \\ n'
    cfg = cli.compose(commands("0_0", tmp_path / "a 'run'", prompt)[-1][3:], "generate")
    assert (cfg.model, cfg.prompt) == (str(tmp_path / "a 'run'"), prompt)


def test_text_is_drawn_as_samples_of_the_training_are(tmp_path):
    for prompt, asked in ("And God", "And God"), (" ", "In the beginning"):  # nothing is no prompt
        cfg = cli.compose(commands("0_0", tmp_path, prompt)[-1][3:], "generate")
        assert (cfg.prompt, cfg.temperature, cfg.top_k, cfg.seed) == (asked, 0.8, 50, 0)


def test_evaluations_are_told_without_their_counts():
    figures = {"acc": 0.25, "num_tokens": 1000, "tasks": {"arc": {"acc": 0.5}}, "settings": {"tolerance": 1e-3}}
    assert _evaluation(figures) == "acc 0.2500, tasks/arc/acc 0.5000"
    assert _evaluation({"error": "no such data"}) == "no such data"
