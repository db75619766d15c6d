"""The configuration: every YAML composes, defaults are the dataclasses', and what does not fit together is refused."""

import dataclasses
import inspect
from pathlib import Path

import pytest
import yaml
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from tokenizers.pre_tokenizers import ByteLevel

from lckv import train
from lckv.cache import CACHES
from lckv.commands import cli
from lckv.commands.hydra_store import NAMED_OPTIONS, config_dir, register_schema
from lckv.config import (
    EvaluateConfig,
    EvaluationConfig,
    ModelConfig,
    OptimConfig,
    PerplexityConfig,
    TrainConfig,
    names,
    validate,
)
from lckv.config.cache import cache_options
from lckv.config.data import SMALLEST_BPE, SPECIAL_TOKENS
from lckv.config.evaluation import EVALUATIONS
from lckv.config.latent_sizes import STREAMS
from lckv.config.model_arguments import model_arguments, resolve_layer_types
from lckv.config.run_names import default_run_name, file_name
from lckv.conversion.latents import FITS
from lckv.conversion.methods import METHODS
from lckv.data.conversations import CONVERSATIONS
from lckv.data.sources import SOURCES
from lckv.errors import UserError
from lckv.evaluation.evaluations import FUNCTIONS
from lckv.models import LCKVLlamaConfig
from lckv.models.parts.rotary import rotary_frequencies
from lckv.sharing.patterns import PATTERNS, build_layer_types, parse_layer_types
from lckv.training.loggers import LOGGERS
from lckv.training.optim import OPTIMIZERS, SCHEDULES, TRAINABLE

CONF = config_dir()


def options(group: str) -> list[str]:
    """What Hydra knows, whether by a file or by a registered name."""
    register_schema("train")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return sorted(GlobalHydra.instance().config_loader().get_group_options(group))


NEEDED = {
    "riemannian_adam": ["latent=joint"],
    **{name: ["data.files=x"] for name in ("files", "conversion_study")},
    "hub": ["data.dataset=x"],
    "static": ["cache.max_length=9"],
}


OF_SFT = {option for option in options("experiment") if option.startswith("sft_")}


@pytest.mark.parametrize("option", sorted(OF_SFT))
def test_every_experiment_of_sft_composes(option):
    cfg = cli.compose([f"experiment={option}", "model=x"], "sft")
    assert (cfg.run_name, cfg.run_dir) == (option, f"runs/{option}")


@pytest.mark.parametrize(
    ("group", "option"),
    [
        (group, option)
        for group in ("experiment", "debug", "sharing", "model")
        for option in options(group)
        if option not in OF_SFT
    ],
)
def test_every_choice_composes_and_makes_a_model_config(group, option):
    cfg = cli.compose([f"{group}={option}", *NEEDED.get(option, [])])
    if group in ("sharing", "model"):
        assert getattr(cfg, group).name == option
    plan = parse_layer_types(resolve_layer_types(cfg))
    config = LCKVLlamaConfig(**model_arguments(cfg, 256))
    assert config.kv_sharing == plan.layer_types
    assert config.num_hidden_layers == plan.num_hidden_layers


@pytest.mark.parametrize("group", ["data", "tokenizer", "trainer", "optim", "logger", "cache"])
def test_every_other_choice_composes(group):
    assert options(group)
    command, given = ("evaluate", ["model=x"]) if group == "cache" else ("train", [])
    for option in options(group):
        cfg = cli.compose([f"{group}={option}", *NEEDED.get(option, []), *given], command)
        if option in NAMED_OPTIONS.get(group, ()):
            assert getattr(cfg, group).name == option


def test_every_registered_name_is_an_option():
    registered = {"sharing": [*PATTERNS, "random"], "data": SOURCES, "optim": OPTIMIZERS, "cache": [*CACHES, "none"]}
    registered["latent"] = [*STREAMS, "auto", "none"]
    assert {group: sorted(known) for group, known in NAMED_OPTIONS.items()} == {
        group: sorted(known) for group, known in registered.items()
    }
    for group, known in NAMED_OPTIONS.items():
        assert set(known) <= set(options(group))


def test_what_is_known_of_names_before_torch_is_what_is_registered_behind_it():
    for declared, registered in (
        (names.CACHES, CACHES),
        (names.METHODS, METHODS),
        (names.LATENTS, STREAMS),
        (names.LATENTS, FITS),
        (names.OPTIMIZERS, OPTIMIZERS),
        (names.SCHEDULES, SCHEDULES),
        (names.SOURCES, SOURCES),
        (names.SOURCES, CONVERSATIONS),
        (names.TRACKERS, LOGGERS),
        (names.TRAINABLE, TRAINABLE),
        (EVALUATIONS, FUNCTIONS),
    ):
        assert sorted(declared) == sorted(registered)
    for name, cache in CACHES._entries.items():
        assert sorted(cache_options(name)) == sorted(set(inspect.signature(cache).parameters) - {"config"})
    assert SMALLEST_BPE == len(ByteLevel.alphabet()) + len(SPECIAL_TOKENS)


def test_configurations_made_in_python_are_checked_like_those_of_the_command_line():
    evaluation = EvaluationConfig(["perplexity"], perplexity=PerplexityConfig(context_length=8, stride=9))
    with pytest.raises(UserError, match="^evaluation.perplexity.stride=9: allowed is evaluation.perplexity.context_"):
        validate(TrainConfig(evaluation=evaluation))
    with pytest.raises(UserError, match="^optim.momentum=0.5: has no effect with optim.name=adamw"):
        train.main(TrainConfig(optim=OptimConfig(momentum=0.5), run_dir="/dev/null/x"))
    with pytest.raises(UserError, match="^perplexity.stride=9: allowed is perplexity.context_length=8 or less"):
        validate(EvaluateConfig(model="x", perplexity=evaluation.perplexity))


def test_what_presets_set_is_in_vain_only_where_the_command_line_says_it():
    assert cli.compose(["source=x", "out=y"], "convert").trainer.max_steps == 200
    settings = ["method=distill", "trainer.max_steps=3", "seed=1", "model.dtype=bfloat16", "max_shard_size=1GB"]
    assert cli.compose(["source=x", "out=y", *settings], "convert").training().trainer.max_steps == 3
    assert cli.compose(["source=x", "out=y", "trainer.num_threads=1", "device=cpu"], "convert").device == "cpu"
    assert cli.compose(["tokenizer.vocab_size=300"]).tokenizer.vocab_size == 300
    cfg = cli.compose(["checkpoints=[a]", "patterns=[cla]", "prompt_length=9", "model=nano"], "benchmark")
    assert cfg.model.name == "nano"


def test_yaml_repeats_no_default():
    """A default that is written twice drifts apart."""
    schema = TrainConfig()
    sizes = {
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "default_num_hidden_layers",
    }  # what a preset is
    for group in ("model", "sharing", "data", "tokenizer", "trainer", "optim", "logger"):
        defaults = dataclasses.asdict(getattr(schema, group))
        for file in (CONF / group).glob("*.yaml"):
            values = yaml.safe_load(file.read_text()) or {}
            repeated = [key for key in values if key not in {"name", "names"} | sizes and values[key] == defaults[key]]
            assert not repeated, file


def test_the_wheel_is_preferred_over_the_checkout(tmp_path, monkeypatch):
    package = tmp_path / "lckv"
    (tmp_path / "conf").mkdir()
    (package / "conf").mkdir(parents=True)
    monkeypatch.setattr("lckv.commands.hydra_store.__file__", str(package / "commands" / "hydra_store.py"))
    with pytest.raises(UserError, match="no configuration files"):
        config_dir()
    (tmp_path / "conf" / "train.yaml").write_text("")
    assert config_dir() == tmp_path / "conf"
    (package / "conf" / "train.yaml").write_text("")
    assert config_dir() == package / "conf"


def config(**model) -> TrainConfig:
    return TrainConfig(model=ModelConfig(**model))


def test_layers_follow_the_string_the_number_or_the_preset():
    assert resolve_layer_types(config(layer_types="0_0_2_2")) == "0_0_2_2"
    assert resolve_layer_types(config(layer_types="0_0_2_2", num_hidden_layers=4)) == "0_0_2_2"
    assert resolve_layer_types(config(num_hidden_layers=3)) == "0_1_2"
    assert resolve_layer_types(config(default_num_hidden_layers=2)) == "0_1"
    assert resolve_layer_types(cli.compose(["sharing=cla", "sharing.group_size=3", "model.num_hidden_layers=7"])) == (
        "0_0_0_3_3_3_6"
    )


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused():
    with pytest.raises(UserError, match="model.vocab_size=255: is smaller than the tokenizer's 256"):
        model_arguments(config(layer_types="1_1", vocab_size=255), 256)


def test_what_does_fit_is_not_refused():
    model_arguments(config(layer_types="0_0", backward_passes=1), 256)
    model_arguments(config(layer_types="1_1", forward_passes="converge"), 256)
    model_arguments(config(layer_types="1_1", forward_passes=0), 256)
    ModelConfig().validate("model.")


def test_model_arguments_are_those_of_the_model():
    arguments = model_arguments(
        config(layer_types="0_0_2", hidden_act="gelu", rope_parameters={"rope_theta": 5.0}), 256
    )
    assert arguments["vocab_size"] == 256
    assert arguments["num_key_value_heads"] == arguments["num_attention_heads"]
    made = LCKVLlamaConfig(**arguments)
    for name, value in arguments.items():
        if name == "rope_parameters":
            assert made.rope_parameters["rope_theta"] == 5.0
        elif name not in ("layer_types", "attn_implementation", "dtype"):
            assert getattr(made, name) == value, name
    assert made._attn_implementation == "sdpa"
    assert made.head_dim == 64
    assert model_arguments(config(layer_types="0", vocab_size=300), 256)["vocab_size"] == 300


@pytest.mark.parametrize(
    "rotation",
    [
        {"rope_theta": 5.0, "partial_rotary_factor": 0.5},
        {"rope_type": "linear", "factor": 2},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "truncate": False},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
        {"full_attention": {"rope_type": "linear", "factor": 2.0}, "sliding_attention": {"rope_theta": 50.0}},
    ],
)
def test_rotations_that_are_allowed_make_a_model(rotation: dict):
    cfg = config(layer_types="0_0s_2_1s", head_dim=8, rope_parameters=rotation)
    cfg.model.validate("model.")
    made = LCKVLlamaConfig(**model_arguments(cfg, 256))
    for label in made.rotations:
        assert rotary_frequencies(made, label).isfinite().all()


def test_run_names():
    cfg = cli.compose(["sharing=cla", "sharing.group_size=3", "seed=5"])
    assert default_run_name(cfg) == "tiny-cla-group_size3-seed5"
    assert (cfg.run_name, cfg.run_dir) == ("tiny-cla-group_size3-seed5", str(Path("runs/tiny-cla-group_size3-seed5")))
    assert default_run_name(cli.compose(["model.layer_types=0_1_1:0s"])) == "tiny-0_1_1-0s-seed0"
    assert cli.compose(["run_name=2026_11_21"]).run_dir == str(Path("runs/2026_11_21"))
    assert cli.compose(["run_dir=elsewhere/x"]).run_dir == "elsewhere/x"
    long = [cli.compose([f"model.layer_types={build_layer_types(name, 40)}"]).run_dir for name in ("cla", "llama")]
    assert long[0] != long[1]
    assert all(len(Path(name).name) <= 100 for name in long)
    for source, name in (
        ("meta-llama/Llama-3.2-1B", "Llama-3.2-1B"),
        ("there/mine.gguf", "mine"),
        ("runs/a.b/model", "model"),
    ):
        for given, sharing in ([], "own"), (["sharing=cla"], "cla"):
            cfg = cli.compose([f"init.source={source}", *given])
            assert cfg.run_dir == str(Path(f"runs/{name}-average-{sharing}-seed0"))
    assert file_name("a b/c'd") == "a_b_c_d"
    assert file_name("...") == "run"
