"""The configuration: every YAML composes, defaults are the dataclasses', and what does not fit together is refused."""

import dataclasses
import inspect
from pathlib import Path

import pytest
import yaml
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from lckv import cli
from lckv.cache import CACHES
from lckv.config import CacheConfig, ModelConfig, TrainConfig
from lckv.data import SOURCES
from lckv.errors import UserError
from lckv.hydra_store import NAMED_OPTIONS, config_dir, register_schemas
from lckv.model_arguments import check_model, model_arguments, resolve_layer_types
from lckv.models import LCKVLlamaConfig
from lckv.patterns import PATTERNS, build_layer_types, parse_layer_types
from lckv.run_names import default_run_name, file_name
from lckv.training.optim import OPTIMIZERS

CONF = config_dir()


def options(group: str) -> list[str]:
    """What Hydra knows, whether by a file or by a registered name."""
    register_schemas()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return sorted(GlobalHydra.instance().config_loader().get_group_options(group))


@pytest.mark.parametrize(
    ("group", "option"),
    [(group, option) for group in ("experiment", "debug", "sharing", "model") for option in options(group)],
)
def test_every_choice_composes_and_makes_a_model_config(group, option):
    cfg = cli.compose([f"{group}={option}"])
    plan = parse_layer_types(resolve_layer_types(cfg))
    config = LCKVLlamaConfig(**model_arguments(cfg, 256))
    assert config.kv_sharing == plan.layer_types
    assert config.num_hidden_layers == plan.num_hidden_layers


@pytest.mark.parametrize("group", ["data", "tokenizer", "trainer", "optim", "logger"])
def test_every_other_choice_composes(group):
    assert options(group)
    for option in options(group):
        cli.compose([f"{group}={option}"])


def test_every_registered_name_is_an_option():
    registered = {"sharing": PATTERNS, "data": SOURCES, "optim": OPTIMIZERS, "cache": [*CACHES, "none"]}
    assert {group: set(names) for group, names in NAMED_OPTIONS.items()} == {
        group: set(names) for group, names in registered.items()
    }
    for group, names in NAMED_OPTIONS.items():
        assert set(names) <= set(options(group))
        for name in names:
            cfg = cli.compose([f"{group}={name}"], "evaluate" if group == "cache" else "train")
            assert getattr(cfg, group).name == name


def test_there_is_a_key_for_each_option_of_a_cache():
    keys = {item.name for item in dataclasses.fields(CacheConfig)}
    for cache in CACHES._entries.values():
        assert set(inspect.signature(cache).parameters) - {"config"} <= keys


def test_presets_name_themselves():
    for option in options("model"):
        assert cli.compose([f"model={option}"]).model.name == option


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
    monkeypatch.setattr("lckv.hydra_store.__file__", str(package / "hydra_store.py"))
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
    with pytest.raises(UserError, match="model.layer_types='0_0_2_2': has 4 entries, but num_hidden_layers=8"):
        resolve_layer_types(config(layer_types="0_0_2_2", num_hidden_layers=8))
    with pytest.raises(UserError, match="model.layer_types='0_5': entry 1 is '5'"):
        resolve_layer_types(config(layer_types="0_5"))


def test_parameters_of_another_pattern_are_refused():
    with pytest.raises(UserError, match="'lckv' has no parameter 'group_size': allowed are warmup_layers"):
        resolve_layer_types(cli.compose(["sharing=lckv", "sharing.group_size=3"]))
    with pytest.raises(UserError, match="unknown sharing pattern 'lkcv'.*did you mean 'lckv'"):
        resolve_layer_types(cli.compose(["sharing.name=lkcv"]))
    with pytest.raises(UserError, match="^sharing.group_size=0"):
        resolve_layer_types(cli.compose(["sharing=cla", "sharing.group_size=0"]))
    with pytest.raises(UserError, match="^model.num_hidden_layers=0"):
        resolve_layer_types(cli.compose(["sharing=cla", "model.num_hidden_layers=0"]))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"hidden_size": 100, "num_attention_heads": 3},
            "model.hidden_size=100: is not divisible by model.num_attention_",
        ),
        (
            {"num_attention_heads": 4, "num_key_value_heads": 3},
            "model.num_attention_heads=4: is not divisible by model.num_k",
        ),
        ({"hidden_size": 12, "num_attention_heads": 4}, "rotary positions need an even size"),
        ({"head_dim": 5}, "model.head_dim=5: rotary"),
        ({"num_attention_heads": 0}, "model.num_attention_heads=0: allowed is a whole number, 1 or more"),
        ({"backward_passes": 1}, "model.backward_passes=1: with layers that read upward, 2 or more"),
        ({"backward_passes": 0}, "model.backward_passes=0: allowed is a whole number, 1 or more"),
        ({"forward_passes": -1}, "model.forward_passes=-1: allowed is a whole number, 0 or more, or 'converge'"),
        ({"forward_passes": "convrge"}, "model.forward_passes='convrge'.*did you mean 'converge'"),
        ({"forward_passes": 2.5}, "model.forward_passes=2.5"),
        ({"forward_passes": True}, "model.forward_passes=True"),
        ({"sliding_window": 0}, "model.sliding_window=0: allowed is a whole number, 1 or more"),
        ({"converge_tolerance": 0.0}, "model.converge_tolerance=0.0: allowed is a number above 0"),
        ({"attention_dropout": 1.0}, "model.attention_dropout=1.0"),
        ({"dtype": "bf16"}, "model.dtype='bf16': allowed are float32, bfloat16, float16"),
        ({"attn_implementation": "spda"}, "model.attn_implementation='spda': allowed are eager.*did you mean 'sdpa'"),
        ({"vocab_size": 255}, "model.vocab_size=255: is smaller than the tokenizer's 256"),
    ],
)
def test_what_does_not_fit_together_is_refused(model, message):
    with pytest.raises(UserError, match=message) as error:
        model_arguments(config(layer_types="1_1", **model), 256)
    assert "\n" not in str(error.value)


def test_what_does_fit_is_not_refused():
    model_arguments(config(layer_types="0_0", backward_passes=1), 256)
    model_arguments(config(layer_types="1_1", forward_passes="converge"), 256)
    model_arguments(config(layer_types="1_1", forward_passes=0), 256)
    check_model(ModelConfig(), parse_layer_types("0"))


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


def test_run_names():
    cfg = cli.compose(["sharing=cla", "sharing.group_size=3", "seed=5"])
    assert default_run_name(cfg) == "tiny-cla-group_size3-seed5"
    assert (cfg.run_name, cfg.run_dir) == ("tiny-cla-group_size3-seed5", str(Path("runs/tiny-cla-group_size3-seed5")))
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
        assert cli.compose([f"init.source={source}"]).run_dir == str(Path(f"runs/{name}-average-lckv-seed0"))
    assert file_name("a b/c'd") == "a_b_c_d"
    assert file_name("...") == "run"
