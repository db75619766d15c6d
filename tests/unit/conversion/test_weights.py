"""A conversion that ends early leaves nothing, and takes no more memory than a shard and a group."""

import errno
import os
import weakref
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors import torch as safetensors_torch
from safetensors.torch import load_file

from lckv.conversion.methods import METHODS
from lckv.conversion.source import Source
from lckv.conversion.target import RECORD, converted_config, write_converted, write_trained
from lckv.conversion.weights import cut_into_shards, write_weights
from lckv.errors import UserError
from lckv.loading.models import load_model
from lckv.models import LCKVLlamaForCausalLM
from lckv.sharing.patterns import parse_layer_types
from lckv.utils import storage
from tests.layouts import LATENT, LatentAttention, LatentConfig
from tests.unit.conversion.sources import assert_identical, random_source, read_folder, run_convert, save_source

SHARED = "model.layer_types=0_1_2_2"
SHARDS = "max_shard_size=40KB"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_source(tmp_path_factory.mktemp("source"), random_source(4))


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("expected") / "out"
    run_convert(source, out, SHARED, SHARDS)
    return read_folder(out)


def test_tensors_in_one_place_are_written_apart(tmp_path):
    tensors = {"a": torch.ones(2, 3), "c": torch.zeros(1)}
    tensors["b"] = tensors["a"]
    write_weights(tmp_path, tensors.items(), max_shard_size=10**6)
    written = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(written[name], tensors[name]) for name in "abc")


@given(st.lists(st.integers(0, 50), min_size=1), st.integers(1, 60))
def test_shards_hold_everything_in_order(sizes, max_size):
    named = {str(number): torch.zeros(size, dtype=torch.uint8) for number, size in enumerate(sizes)}
    shards = [
        {name: tensor.nbytes for name, tensor in shard.items()} for shard in cut_into_shards(named.items(), max_size)
    ]
    assert [entry for shard in shards for entry in shard.items()] == [(str(n), size) for n, size in enumerate(sizes)]
    for shard, after in zip(shards, [*shards[1:], {}], strict=True):
        size = sum(shard.values())
        assert size <= max_size or len(shard) == 1
        assert not after or size + next(iter(after.values())) > max_size  # the next one did not fit


def fail_at_second_shard(error):
    """Writes the first shard, and then fails as a full disk makes it."""
    saved = []

    def save_file(tensors, file, **options):
        if saved:
            raise error
        saved.append(file)
        original(tensors, file, **options)

    original = safetensors_torch.save_file
    return save_file


FULL_DISK = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), FULL_DISK])
def test_interrupted_writing_leaves_nothing_and_the_next_run_works(source, expected, tmp_path, monkeypatch, error):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(safetensors_torch, "save_file", fail_at_second_shard(error))
        with pytest.raises(OSError if error is FULL_DISK else type(error)) as raised:
            run_convert(source, out, SHARED, SHARDS)
    if error is FULL_DISK:
        assert raised.value.errno == errno.ENOSPC and raised.value.filename.endswith(".safetensors")
    assert os.listdir(tmp_path) == []
    run_convert(source, out, SHARED, SHARDS)
    assert_identical(read_folder(out), expected)


def test_what_a_killed_process_left_does_not_load_and_is_cleared_away(source, expected, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(storage.shutil, "rmtree", lambda *args, **options: None)  # as if there were no time for it
        patch.setattr(safetensors_torch, "save_file", fail_at_second_shard(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run_convert(source, tmp_path / "out", SHARED, SHARDS)
    (partial,) = tmp_path.glob(".out.partial-*")
    assert list(partial.glob("*.safetensors")) and not (partial / "config.json").exists()
    for name in (partial, tmp_path / "out"):
        with pytest.raises(UserError):
            load_model(str(name))
    (partial / "left.txt").touch()
    with monkeypatch.context() as patch:
        patch.setattr(storage.psutil, "pid_exists", lambda pid: pid != os.getpid())  # it was another process
        run_convert(source, tmp_path / "out", SHARED, SHARDS)
    assert os.listdir(tmp_path) == ["out"] and not (tmp_path / "out" / "left.txt").exists()
    assert_identical(read_folder(tmp_path / "out"), expected)


class CountingTensors(dict):
    """Counts the bytes of the tensors that were given out, as if each was read then, and are still there."""

    live = peak = 0

    def __getitem__(self, name):
        tensor = super().__getitem__(name).clone()
        self.live += tensor.nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(tensor, self._forget, tensor.nbytes)
        return tensor

    def _forget(self, num_bytes):
        self.live -= num_bytes


class CountingSource(Source):
    """A source whose tensors are counted."""

    given: ClassVar[list[CountingTensors]] = []

    @property
    def tensors(self):
        CountingSource.given.append(CountingTensors(super().tensors))
        return CountingSource.given[-1]


@pytest.mark.parametrize("num_files", ["one", "several"])
def test_one_shard_and_one_group_are_in_memory(tmp_path, num_files):
    model = random_source(12, hidden_size=64, intermediate_size=128)
    folder = save_source(tmp_path / "source", model, max_shard_size="100KB" if num_files == "several" else "5GB")
    found = Source.find(str(folder))
    source = CountingSource(found.checkpoint, found.config)
    layer_types = "0_3_3_3_6_6_6_9_9_9_10_11"
    config = converted_config(source.config, parse_layer_types(layer_types))
    shard_size = 100_000
    write_converted(source, config, "average", tmp_path / "out", max_shard_size=shard_size)
    largest = max(tensor.nbytes for tensor in model.state_dict().values())
    group = 3 * model.model.layers[0].self_attn.k_proj.weight.nbytes
    total = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert total > 10 * shard_size
    # The tensor behind a shard is looked at before the shard is written, though its numbers are not.
    assert CountingSource.given.pop().peak <= max(shard_size, largest) + largest + group
    tensors = read_folder(tmp_path / "out")
    values = [model.state_dict()[f"model.layers.{layer}.self_attn.v_proj.weight"] for layer in (7, 8, 9)]
    torch.testing.assert_close(tensors["model.layers.9.self_attn.v_proj.weight"], sum(values) / 3)


def test_progress_reaches_its_end(tmp_path):
    source = Source.find(str(save_source(tmp_path / "source", random_source(2))))
    calls = []
    config = converted_config(source.config, parse_layer_types("0_0"))
    write_converted(source, config, "average", tmp_path / "out", on_parameters=lambda *counts: calls.append(counts))
    tensors = read_folder(tmp_path / "out")
    total = sum(tensor.numel() for tensor in tensors.values())
    assert len(calls) == len(tensors) and calls[-1] == (total, total)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


class LatentModel(LCKVLlamaForCausalLM):
    """Layers read a latent, for which pretrained models have no projection."""

    config_class = LatentConfig

    def __init__(self, config):
        super().__init__(config)
        for layer_idx, layer in enumerate(self.model.layers):
            layer.self_attn = LatentAttention(config, layer_idx)


def to_latent(group):
    """The latent is the normalised input itself; the owner's projection of it has a type of its own."""
    hidden_size = group.config.hidden_size
    made = {group.name(group.owner, "down_proj.weight"): torch.eye(LATENT, hidden_size)}
    for reader in group.readers:
        for name in ("k_proj.weight", "v_proj.weight"):
            projection = group.tensors[group.name(reader, name)]
            latent = torch.zeros(len(projection), LATENT, dtype=group.dtype("lacking"))
            latent[:, :hidden_size] = projection
            made[group.name(reader, name)] = latent
    return made


@pytest.mark.parametrize("shard_size", [10**9, 9_000])
def test_methods_make_tensors_that_the_source_lacks(tmp_path, monkeypatch, shard_size):
    monkeypatch.setitem(METHODS._entries, "latent", to_latent)
    original = random_source(4).to(torch.bfloat16)
    source = Source.find(str(save_source(tmp_path / "source", original)))
    config = LatentConfig.from_dict(source.config.to_dict(), layer_types="0_0_2_3")
    write_converted(source, config, "latent", tmp_path / "out", model_class=LatentModel, max_shard_size=shard_size)
    written, before = read_folder(tmp_path / "out"), original.state_dict()
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1 or shard_size == 9_000
    assert written.keys() == LatentModel(config).state_dict().keys()
    for layer_idx in range(4):
        prefix = f"model.layers.{layer_idx}.self_attn."
        assert (prefix + "down_proj.weight" in written) == (layer_idx != 1)
        assert torch.equal(written[prefix + "k_proj.weight"][:, :32], before[prefix + "k_proj.weight"])
    changed = {name for name in written if name not in before or written[name].shape != before[name].shape}
    assert {name.split(".")[-2] for name in changed} == {"down_proj", "k_proj", "v_proj"}
    kept = written.keys() - changed
    assert_identical({name: written[name] for name in kept}, {name: before[name] for name in kept})
    types = {name: torch.float32 if "self_attn.down_proj" in name else torch.bfloat16 for name in written}
    assert {name: tensor.dtype for name, tensor in written.items()} == types
    loaded, info = LatentModel.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    assert_identical(loaded.state_dict(), {name: tensor.float() for name, tensor in written.items()})


@pytest.mark.parametrize(
    ("makes", "message"),
    [
        (
            ("k_proj.weight", "v_proj.weight"),
            "method=latent makes no model.layers.0.self_attn.down_proj.weight, which the source lacks",
        ),
        (("down_proj.weight",), r"k_proj.weight is \[16, 32\]: the model takes \[16, 96\]"),
    ],
)
def test_what_neither_source_nor_method_has_is_named(tmp_path, monkeypatch, makes, message):
    monkeypatch.setitem(
        METHODS._entries,
        "latent",
        lambda group: {name: each for name, each in to_latent(group).items() if name.endswith(makes)},
    )
    source = Source.find(str(save_source(tmp_path / "source", random_source(2))))
    config = LatentConfig.from_dict(source.config.to_dict())
    with pytest.raises(ValueError, match=message):
        write_converted(source, config, "latent", tmp_path / "out", model_class=LatentModel)
    assert not (tmp_path / "out").exists()


class AskedSource(Source):
    """A source that counts how often its folder is asked for, which may ask the Hub."""

    count = 0

    def _folder(self):
        AskedSource.count += 1
        return super()._folder()


def test_the_source_is_asked_once_for_what_lies_beside_its_weights(source, tmp_path):
    found = Source.find(str(source))
    AskedSource(found.checkpoint, found.config).copy_rest(tmp_path)
    assert AskedSource.count == 1
    assert (tmp_path / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_trained_models_are_written_in_the_types_of_their_source(tmp_path):
    source = save_source(tmp_path / "source", random_source(3, tie_word_embeddings=True).to(torch.bfloat16))
    run_convert(source, tmp_path / "init", "model.layer_types=0_0_2")
    model, tokenizer = load_model(str(tmp_path / "init"), device="cpu", dtype="float32")
    name = "model.layers.0.self_attn.k_proj.weight"
    with torch.no_grad():
        model.get_parameter(name).add_(1)
    model.save_pretrained(tmp_path / "trained")
    tokenizer.save_pretrained(tmp_path / "trained")
    assert {each.dtype for each in read_folder(tmp_path / "trained").values()} == {torch.float32}

    write_trained(tmp_path / "trained", tmp_path / "init", tmp_path / "out", max_shard_size=40_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    before, after = read_folder(tmp_path / "init"), read_folder(tmp_path / "out")
    assert_identical(after, before | {name: (before[name].float() + 1).to(torch.bfloat16)})
    loaded, _ = load_model(str(tmp_path / "out"), device="cpu")
    assert loaded.dtype == loaded.config.dtype == torch.bfloat16
    assert (tmp_path / "out" / RECORD).read_bytes() == (tmp_path / "init" / RECORD).read_bytes()
