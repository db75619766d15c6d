"""`layer_types` stays text on the command line and is never a wrong pattern in YAML."""

import re

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lckv.commands import cli, overrides
from lckv.errors import UserError
from tests.strategies import layer_types

KEY = "model.layer_types"


def parsed(override: str):
    """What Hydra reads from one command line argument."""
    (quoted,) = overrides.quote_overrides([override])
    return OverridesParser.create().parse_override(quoted)


def test_hydra_still_has_the_trap():
    """Else all of this could go."""
    assert OverridesParser.create().parse_override(f"{KEY}=2_2_2").value() == 222


@settings(max_examples=50, deadline=None)
@given(layer_types(), st.sampled_from(["", "+", "++", "~"]))
@example("2_2_2_5_5_5_8_8_8", "")
@example("0", "")
@example("0_1_2_3_4_5_6_7_8_9_10_11", "")
@example("0_6_6_6_6_6_6_7", "++")
@example("0s_1s_2s_3s_4_4_4_4", "")
def test_any_pattern_survives_the_command_line(string, prefix):
    override = parsed(f"{prefix}{KEY}={string}")
    assert override.value() == string
    assert override.key_or_group == KEY


@settings(max_examples=40, deadline=None)
@given(
    st.lists(layer_types(), min_size=2, max_size=5),
    st.sampled_from(["{}", "choice({})"]),
    st.sampled_from([",", ", "]),
)
def test_any_sweep_survives_the_command_line(strings, form, comma):
    override = parsed(f"{KEY}={form.format(comma.join(strings))}")
    jobs = [OverridesParser.create().parse_override(f"{KEY}={job}") for job in override.sweep_string_iterator()]
    assert [job.value() for job in jobs] == strings


@settings(max_examples=20, deadline=None)
@given(st.lists(layer_types(), min_size=1, max_size=4))
def test_lists_keep_their_elements(strings):
    assert parsed(f"{KEY}=[{','.join(strings)}]").value() == strings


@settings(max_examples=10, deadline=None)
@given(layer_types())
@example("1_1_1")
def test_any_pattern_reaches_the_configuration(string):
    assert cli.compose([f"{KEY}={string}"]).model.layer_types == string


@pytest.mark.parametrize(
    "argument",
    [
        f"{KEY}='1_1'",
        f'{KEY}="1_1"',
        f"{KEY}='1_1','0_0'",
        f"{KEY}=['1_1']",
        f"{KEY}=null",
        f"{KEY}=",
        f"{KEY}=${{other.key}}",
        f"~{KEY}",
        "trainer.max_steps=1_000",
        "trainer.max_steps=1_000,2_000",
        "data.files=1_1.txt",
        "--config-dir=1_1",
        "-m",
        "sharing=cla",
        "my_layer_types=1_1",
    ],
)
def test_what_needs_no_quotes_is_left_alone(argument):
    assert overrides.quote_overrides([argument]) == [argument]


def test_other_texts_of_digits_and_dictionaries():
    assert overrides.quote_overrides(["run_name=2026_11_21", "run_dir=1"]) == ["run_name='2026_11_21'", "run_dir='1'"]
    assert parsed("model={layer_types: 1_1_1, hidden_size: 1_0}").value() == {
        "layer_types": "1_1_1",
        "hidden_size": 10,
    }
    assert parsed(f"{KEY}=choice('1_1', 2_2)").value() == parsed(f"{KEY}=1_1,2_2").value()
    assert overrides.quote_overrides([f"{KEY}='1_1',2_2_2"]) == [f"{KEY}='1_1','2_2_2'"]


@pytest.mark.parametrize("text", ["runs/sweep/sharing=cla,seed=0", "x=", "a=b=c", "/data/lang=en/*.txt"])
def test_text_with_equals_signs_reaches_the_configuration(text):
    assert cli.compose([f"run_dir={text}", f"init.source={text}"]).init.source == text
    assert overrides.quote_overrides([f"run_dir={text}"]) == [f"run_dir='{text}'"]


@pytest.mark.parametrize("value", ["'a=b'", r"a\=b", "range(start=1,stop=3)", "[a,'b=c']", "{a: 'b=c'}"])
def test_equals_signs_that_hydra_reads_are_left_alone(value):
    assert overrides.quote_overrides([f"seed={value}"]) == [f"seed={value}"]


def test_flags_keep_their_values():
    given = ["seed=1", "--cfg", "job", "-c", "hydra", "sharing=cla", "--config-dir", "d", "-m"]
    flags = ["--cfg", "job", "-c", "hydra", "--config-dir", "d", "-m"]
    assert overrides.flags_first(given) == [*flags, "seed=1", "sharing=cla"]


def test_hydra_pluses():
    given = [
        "+experiment=a",
        "+debug=b",
        "trainer.hf.seed=1",
        "trainer.hf={seed:1}",
        "+trainer.hf.seed=1",
        "trainer.hfx=1",
    ]
    assert overrides.quote_overrides(given, ["trainer.hf"]) == [
        "experiment=a",
        "debug=b",
        "++trainer.hf.seed=1",
        "++trainer.hf={seed:1}",
        "+trainer.hf.seed=1",
        "trainer.hfx=1",
    ]


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")) | st.text(
    "\\${}'\"=, ?[]()null1_:-#&*!|\n"
)


@settings(max_examples=10, deadline=None)
@given(TEXTS.filter(bool), TEXTS)
@example("Hello, world: {x} = [1, 'a', \"b\"] # no comment", "--help")
@example("???", "null")
@example("${nowhere} \\${x} \\\\${y}", "${oc.env:HOME}")
@example("2_2_2", "")
@example("a,b", "choice(a,b)")
@example("runs/sweep/layer_types=1_1_1,seed=0", "true")
def test_literal_text_arrives_unchanged(model, prompt):
    cfg = cli.compose([f"model={model}", f"++prompt={prompt}", "seed=3"], "generate")
    assert (cfg.model, cfg.prompt, cfg.system, cfg.seed) == (model, prompt, None, 3)


def test_literals_are_taken_out_of_the_others():
    arguments = ["-m", "prompt=a=b", "seed=1", "model.x=1", "prompts=y", "+model=z", "prompt"]
    others, literals = overrides.take_literals(arguments, ["model", "prompt"])
    assert others == ["-m", "seed=1", "model.x=1", "prompts=y", "prompt"]
    assert literals == {"prompt": "a=b", "model": "z"}


def yaml_overlay(tmp_path, text: str):
    (tmp_path / "experiment").mkdir(exist_ok=True)
    file = tmp_path / "experiment" / "mine.yaml"
    file.write_text(f"# @package _global_\nmodel:\n  layer_types: {text}\n  hidden_size: 64\n", encoding="utf-8")
    return file


@settings(max_examples=100, deadline=None)
@given(layer_types(max_layers=9))
@example("0_6_6_6_6_6_6_7")  # 1797559, read as octal
@example("0_0")  # 0
@example("1_0")
@example("0_1")
@example("0_6_6_6_6_6_6_6_8")  # no octal number: YAML leaves it text
def test_yaml_reads_it_right_or_is_refused_with_the_line_to_write(tmp_path_factory, string):
    file = yaml_overlay(tmp_path_factory.mktemp("overlay"), string)
    value = yaml.safe_load(file.read_text())["model"]["layer_types"]
    if value == string:
        overrides.check_is_text(value, KEY, [file])
        return
    with pytest.raises(UserError) as error:
        overrides.check_is_text(value, KEY, [file])
    assert f'{file}, line 3: YAML reads layer_types: {string} as {value!r}; write layer_types: "{string}"' in str(
        error.value
    )


def test_the_right_file_is_named(tmp_path):
    overlay = yaml_overlay(tmp_path, "0_1_2")
    other = tmp_path / "experiment" / "another.yaml"
    other.write_text("model:\n  layer_types: 0_3_3_3\n")
    files = overrides.config_files([tmp_path], "train", {"experiment": "mine", "model": "nano", "debug": None})
    assert files == [overlay, other]
    with pytest.raises(UserError, match=re.escape(f"{overlay}, line 3")):
        overrides.check_is_text(10, KEY, files)
    with pytest.raises(UserError, match=re.escape(f"{other}, line 2")):
        overrides.check_is_text(219, KEY, files)


def test_a_number_from_nowhere_is_refused_too():
    with pytest.raises(
        UserError, match="model.layer_types=222: must be text, but the configuration holds a int.*in quotes"
    ):
        overrides.check_is_text(222, KEY)
    with pytest.raises(UserError):
        overrides.check_is_text([0, 0, 2, 2], KEY)
