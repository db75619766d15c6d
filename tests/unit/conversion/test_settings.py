"""What a configuration takes from a pretrained model, and what calibration text comes to."""

import json

import numpy as np
import pytest
import torch

from lckv.config.model_arguments import resolve_plan
from lckv.conversion.calibration import batches_of, choose_blocks, collect_moments
from lckv.conversion.settings import adopt_source
from lckv.data.dataset import build_dataset
from lckv.errors import UserError
from lckv.families import read_model
from lckv.loading.models import load_model
from tests.composing import compose
from tests.reference import tiny_config, token_ids
from tests.tiny import byte_tokenizer
from tests.unit.conversion.sources import (
    assert_identical,
    convert_model,
    random_source,
    read_folder,
    run_convert,
    save_source,
)
from tests.unit.families.test_registered import CONFIGS

TEXT = "\n\n".join(
    f"{number}: in the beginning was the word, and the word was {number} waters" for number in range(60)
)


def adopted(source, *arguments, config_name="convert"):
    if config_name == "convert":
        return adopt_source(compose(["source=x", "out=y", *arguments], config_name).training(), source)
    return adopt_source(compose(["init.source=x", *arguments], config_name), source)


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_are_the_sources_and_every_layer_reads_itself(name):
    config, layer_types = CONFIGS[name]
    source = read_model(config.to_dict()).config
    cfg = adopted(source)
    assert resolve_plan(cfg).layer_types == layer_types
    assert cfg.model.hidden_size == 32 and cfg.model.num_hidden_layers == 3 and cfg.model.vocab_size == 300
    assert cfg.model.head_dim == source.head_dim and cfg.model.tie_word_embeddings == source.tie_word_embeddings


def test_patterns_come_from_the_sharing_group_too():
    source = tiny_config("0_1_2_3_4_5")
    assert resolve_plan(adopted(source, "sharing=cla")).layer_types == "0_0_2_2_4_4"
    assert resolve_plan(adopted(source, "sharing=lckv", config_name="train")).layer_types == "0_4_4_4_4_5"
    assert resolve_plan(adopted(source, config_name="train")).layer_types == "0_1_2_3_4_5"  # what it was
    assert resolve_plan(adopted(source, "sharing=llama", config_name="train")).layer_types == "0_1_2_3_4_5"


def test_settings_that_a_source_leaves_open_arrive_in_the_model(tmp_path):
    source = save_source(tmp_path / "source", random_source(3))
    settings = ["forward_passes=4", "converge_tolerance=0.01", "sliding_window=7", "force_nodiag=true"]
    run_convert(source, tmp_path / "out", "model.layer_types=2_2s_2", *(f"model.{each}" for each in settings))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["kv_sharing"] == "2_2s_2" and config["num_hidden_layers"] == 3
    assert (config["forward_passes"], config["converge_tolerance"]) == (4, 0.01)
    assert (config["sliding_window"], config["force_nodiag"]) == (7, True)


def test_a_source_that_hides_a_tokens_own_key_stays_so(tmp_path):
    source = save_source(tmp_path / "source", random_source(3, force_nodiag=True))
    run_convert(source, tmp_path / "out", "model.layer_types=0_0_2")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["force_nodiag"] is True
    converted, _ = load_model(str(tmp_path / "out"), device="cpu")
    expected = convert_model(random_source(3, force_nodiag=True), "0_0_2", "average")
    torch.testing.assert_close(converted(token_ids(1, 9)).logits, expected(token_ids(1, 9)).logits, atol=1e-4, rtol=0)
    for config_name, key in ("convert", "source"), ("train", "init.source"):
        with pytest.raises(UserError, match="^model.force_nodiag=false: has no effect on the model x, which brings"):
            compose([f"{key}=x", "model.force_nodiag=false"], config_name)


@pytest.mark.parametrize(("given", "window"), [([], 5), (["model.sliding_window=3"], 3)])
def test_windows_are_the_sources_where_the_pattern_has_them(given, window, tmp_path, caplog):
    source = read_model(CONFIGS["mistral"][0].to_dict()).config
    cfg = adopted(source, "model.layer_types=0s_0s_2s", *given)
    assert cfg.model.sliding_window == window and caplog.text == ""


def test_lost_windows_are_warned_of_with_what_keeps_them(caplog):
    source = read_model(CONFIGS["mistral"][0].to_dict()).config
    adopted(source, "model.layer_types=0_0s_2")
    assert "2 layers see a window of 5 tokens in the source and all tokens in this pattern, such as layer 0" in (
        caplog.text
    )
    assert "an s keeps the window: model.layer_types=0s_0s_2s" in caplog.text
    caplog.clear()
    adopted(read_model(CONFIGS["qwen2 with windows"][0].to_dict()).config, "model.layer_types=0_0_2s")
    assert "1 layers see a window of 4" in caplog.text and "model.layer_types=0_0s_2s" in caplog.text


def test_patterns_of_another_length():
    with pytest.raises(UserError, match=r"model\.layer_types='0_0': has 2 entries, but .*3") as error:
        adopted(tiny_config("0_1_2"), "model.layer_types=0_0")
    assert "\n" not in str(error.value)


def test_sizes_of_the_source_are_not_told_as_keys():
    with pytest.raises(UserError, match="^the source says max_position_embeddings=0: allowed is a whole number, 1"):
        adopted(tiny_config("0_1", max_position_embeddings=0))


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return ["data=files", f"data.files={tmp_path}/text.txt", r"data.document_separator='\n\n'", "data.block_size=32"]


@pytest.mark.parametrize(("method", "kind"), [("activation", "biases"), ("subspace", "plain")])
def test_calibrated_methods_look_at_the_training_split(tmp_path, text, method, kind):
    options = {} if kind == "plain" else {"attention_bias": True, "attention_output_bias": False}
    model = random_source(4, **options)
    source = save_source(tmp_path / "source", model)
    settings = ["model.layer_types=0_0_2_2", f"method={method}", "init.calibration_tokens=250", "init.ridge=0.02"]
    run_convert(source, tmp_path / "out", *settings, *text)

    data = build_dataset(compose(text, "train").data, byte_tokenizer())
    assert len(data.train) > 8
    chosen = choose_blocks(data.train, 250)
    assert len(chosen) == 8 and chosen[0] == 0 and chosen[-1] == len(data.train) - 1
    pairs = [(0, 0), (0, 1), (1, 1), (2, 2), (2, 3), (3, 3)]
    moments = collect_moments(model, batches_of(data.train, chosen), pairs)
    assert moments.num_tokens == 256
    expected = convert_model(model, "0_0_2_2", method, moments=moments, ridge=0.02)
    out = read_folder(tmp_path / "out")
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(out[name], tensor, atol=1e-4, rtol=1e-4)
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert record["method"] == method and record["calibration_tokens"] == 256 and record["ridge"] == 0.02
    assert record["data"] == "files" and record["data_fingerprint"] == data.fingerprint
    converted, _ = load_model(str(tmp_path / "out"), device="cpu")
    assert converted(token_ids(1, 9)).logits.isfinite().all()


def test_sources_that_would_run_token_by_token_are_calibrated_like_others(tmp_path, text):
    settings = ["model.layer_types=0_0_2", "method=activation", "init.calibration_tokens=64", *text]
    for name, use_sequential in ("parallel", False), ("sequential", True):
        source = save_source(tmp_path / name, random_source(3, use_sequential=use_sequential, forward_passes=0))
        run_convert(source, tmp_path / f"{name}_out", *settings)
    assert_identical(read_folder(tmp_path / "parallel_out"), read_folder(tmp_path / "sequential_out"))


def test_more_tokens_than_there_are():
    class Blocks:
        block_size = 10

        def __len__(self):
            return 7

    assert choose_blocks(Blocks(), 10**6) == list(range(7))
    assert choose_blocks(Blocks(), 21) == [0, 3, 6]
    assert choose_blocks(Blocks(), 1) == [0]


def test_batches_hold_a_few_thousand_tokens(text):
    blocks = build_dataset(compose(text, "train").data, byte_tokenizer()).train
    sizes = [batch["input_ids"].shape for batch in batches_of(blocks, list(range(70)))]
    assert sizes == [(64, 32), (6, 32)]
    again = np.concatenate([batch["input_ids"] for batch in batches_of(blocks, [3, 1])])
    assert np.array_equal(again, [blocks[3]["input_ids"], blocks[1]["input_ids"]])


def test_nothing_is_calibrated_where_nothing_is_shared(tmp_path):
    source = save_source(tmp_path / "source", random_source(2))
    run_convert(source, tmp_path / "out", "method=activation", "data=files", "data.files=nowhere.txt")
    assert_identical(read_folder(source), read_folder(tmp_path / "out"))
