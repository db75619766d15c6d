"""What `lckv.convert` refuses, in one line, before anything is written."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, LlamaConfig, MixtralConfig, Qwen2MoeConfig

from lckv import search, train
from lckv.commands import cli
from lckv.errors import UserError
from tests.tiny import byte_tokenizer
from tests.unit.conversion.sources import assert_identical, random_source, read_folder, run_convert, save_source
from tests.unit.families.test_registered import SIZES


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return save_source(tmp_path_factory.mktemp("whole"), random_source(3))


@pytest.fixture
def source(whole, tmp_path):
    """A folder that a test may break."""
    return shutil.copytree(whole, tmp_path / "source")


def message_of(source, out, *arguments):
    with pytest.raises(UserError) as error:
        run_convert(source, out, *arguments)
    assert "\n" not in str(error.value)
    left = sorted(path.name for path in out.parent.iterdir() if "out" in path.name)
    assert left == []  # neither the folder nor a half of it
    return str(error.value)


MISTAKES = [
    (["model.layer_types=0_0"], "model.layer_types='0_0': has 2 entries"),
    (["model.layer_types=0_0_3"], "there is no layer 3"),
    (["device=gpu"], "device='gpu': there is no such device here"),
    (["revision=main"], "revision='main': has no effect on source="),
    (["model.layer_types=2_2_2", "model.cyclic_groups=1"], "model.backward_passes=1: with layers that read upward"),
    (["method=activation", "sharing=cla", "data.block_size=4096"], "data.block_size=4096: allowed is "),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes(whole, tmp_path, arguments, message):
    assert message in message_of(whole, tmp_path / "out", *arguments)


def test_outputs(whole, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for out, message in [
        ("full", "is not empty"),
        ("full/file", "is a file"),
        ("full/file/new", "full/file is a file"),
    ]:
        with pytest.raises(UserError, match=f"^out={tmp_path}/{out}: .*{message}; name a folder that is not there"):
            run_convert(whole, tmp_path / out)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]


@pytest.mark.parametrize("config", [BertConfig(), MixtralConfig(), Qwen2MoeConfig()], ids=lambda each: each.model_type)
def test_other_families_are_refused_by_name(source, tmp_path, config):
    config.save_pretrained(source)
    message = message_of(source, tmp_path / "out")
    assert f"source={source}: is of model_type '{config.model_type}'" in message
    assert "llama, mistral, qwen2, qwen3" in message


def test_layers_that_compute_no_keys_and_values_cannot_be_read(tmp_path):
    folder = save_source(tmp_path / "source", random_source(layer_types="0_1_1_3"))
    for given in "model.layer_types=0_2_2_3", "sharing=cla":
        assert message_of(folder, tmp_path / "out", given) == (
            f"{given}: lets layers read layer 2, which computes no keys and values in the source (0_1_1_3); "
            "allowed are 0, 1, 3"
        )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ([], "the configuration cannot be read"),
        ({"quantization_config": "gptq"}, "its weights are quantised (gptq)"),
        ({"num_attention_heads": 0}, "num_attention_heads=0: allowed is a whole number, 1 or more"),
        ({"hidden_act": 0}, "the configuration"),
    ],
)
def test_damaged_configurations(source, tmp_path, damage, message):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | damage if isinstance(damage, dict) else damage))
    told = message_of(source, tmp_path / "out")
    assert told.startswith(f"source={source}: ") and message in told


def test_quantised_weights(source, tmp_path):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    assert f"source={source}: its weights are quantised (awq)" in message_of(source, tmp_path / "out")
    (source / "config.json").write_text(json.dumps(config))
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    for dtype, given in (torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.uint8, "U8"):
        save_file(tensors | {name: tensors[name].to(dtype)}, source / "model.safetensors", metadata={"format": "pt"})
        message = message_of(source, tmp_path / "out")
        assert message.startswith(f"source={source}: {name} is of type {given}: its weights are quantised, which")
    (source / "model.safetensors").unlink()
    torch.save(tensors | {name: tensors[name].to(torch.int8)}, source / "pytorch_model.bin")
    assert f"{name} is of type int8: its weights are quantised" in message_of(source, tmp_path / "out")


def test_packed_weights_of_another_shape_are_called_quantised(source, tmp_path):
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(tensors | {name: torch.zeros(512, 1, dtype=torch.uint8)}, source / "model.safetensors")
    assert "its weights are quantised" in message_of(source, tmp_path / "out")


def test_tensors_that_do_not_fit(source, tmp_path):
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({each: tensors[each] for each in tensors if each != name}, source / "model.safetensors")
    begin = f"source={source}: the weights do not fit config.json: "
    assert message_of(source, tmp_path / "out") == f"{begin}there is no {name}"
    save_file(tensors | {name: torch.zeros(3, 4)}, source / "model.safetensors")
    assert message_of(source, tmp_path / "out") == f"{begin}{name} is [3, 4], not [48, 32]"


def test_broken_files(source, tmp_path):
    weights = source / "model.safetensors"
    data = weights.read_bytes()
    for size in (len(data) // 2, 5, 0):
        weights.write_bytes(data[:size])
        assert message_of(source, tmp_path / "out").startswith(f"source={source}: {weights} cannot be read: Safetens")
    weights.unlink()
    assert f"source={source}: {source} holds no weights" in message_of(source, tmp_path / "out")
    for content in (b"", b"PK\x03\x04 half an archive", b"\x80\x02cos\nsystem\nq\x00."):
        (source / "pytorch_model.bin").write_bytes(content)
        message = message_of(source, tmp_path / "out")
        assert message.startswith(f"source={source}: {source}/pytorch_model.bin cannot be read: ")
    (source / "pytorch_model.bin").unlink()
    (source / "model.safetensors").write_bytes(data)


def test_a_source_without_a_tokenizer(source, tmp_path, caplog):
    """It is needed where text is."""
    run_convert(source, tmp_path / "with", "sharing=cla")
    for file in source.glob("tokenizer*"):
        file.unlink()
    message = f"source={source}: {source} holds no tokenizer (tokenizer.json)"
    assert message_of(source, tmp_path / "out", "sharing=cla", "method=subspace") == message
    with pytest.raises(UserError, match=re.escape(f"init.{message}")):
        train.main(cli.compose([f"init.source={source}", f"run_dir={tmp_path}/run"]))
    with pytest.raises(UserError, match=re.escape(message)):
        search.main(cli.compose([f"source={source}", "budget=0.5"], "search"))
    for out, method in ("without", "average"), ("identity", "subspace"):
        caplog.clear()
        pattern = [] if out == "identity" else ["sharing=cla"]
        run_convert(source, tmp_path / out, f"method={method}", *pattern)
        assert caplog.messages == [f"source={source}: holds no tokenizer (tokenizer.json), nor does what is made"]
    assert not list((tmp_path / "without").glob("tokenizer*"))
    assert_identical(read_folder(tmp_path / "without"), read_folder(tmp_path / "with"))


def test_missing_shards(tmp_path):
    source = save_source(tmp_path / "source", random_source(3), max_shard_size="40KB")
    index = source / "model.safetensors.index.json"
    shard = sorted(source.glob("model-*"))[1]
    shard.rename(tmp_path / "away")
    message = message_of(source, tmp_path / "out")
    assert message == f"source={source}: {index} names {shard.name}, which is not there"
    (tmp_path / "away").rename(shard)
    for content in ("{", '{"weights": {}}', "[]"):
        index.write_text(content)
        assert message_of(source, tmp_path / "out").startswith(f"source={source}: {index} cannot be read: ")


def test_names_that_lead_nowhere(source, tmp_path):
    message = message_of(tmp_path / "sorce", tmp_path / "out")
    assert message == f"source={tmp_path}/sorce: there is no such folder (did you mean 'source' in {tmp_path}?)"


def test_a_config_that_says_nothing_of_weights(tmp_path):
    LlamaConfig(**SIZES).save_pretrained(tmp_path / "empty")
    byte_tokenizer().save_pretrained(tmp_path / "empty")
    assert "holds no weights (model.safetensors)" in message_of(tmp_path / "empty", tmp_path / "out")


def test_the_last_line_says_what_was_made(whole, tmp_path, capsys):
    run_convert(whole, tmp_path / "[out]", "sharing=cla")
    run_convert(whole, tmp_path / "other")
    captured = capsys.readouterr()
    lines = [
        f"{tmp_path}/[out]: cla from {whole} by average",
        f"{tmp_path}/other: 0_1_2 from {whole} by average; nothing is shared: give model.layer_types or sharing",
    ]
    assert captured.out == "" and captured.err.splitlines() == lines
