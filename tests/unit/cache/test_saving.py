"""Saved caches: what lies in the file, and that nothing is lost when something goes wrong."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lckv.cache import DynamicKVCache, load_cache, save_cache
from lckv.errors import UserError
from tests.reference import tiny_model, token_ids


@pytest.fixture
def model():
    return tiny_model("0_2s_2_2s")


@pytest.fixture
def cache(model):
    cache = DynamicKVCache(model.config)
    with torch.no_grad():
        model(token_ids(2, 6), past_key_values=cache)
    return cache


def test_the_file_holds_owners_only_and_says_what_it_is(model, cache, tmp_path):
    path = tmp_path / "cache.safetensors"
    save_cache(cache, path)
    tensors = load_file(path)
    assert set(tensors) == {f"layers.{owner}.{name}" for owner in (0, 2) for name in ("keys", "values")}
    assert sum(tensor.nbytes for tensor in tensors.values()) == cache.num_bytes()
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["layer_types"]) == "0_2s_2_2s" and json.loads(metadata["name"]) == "dynamic"
    assert os.listdir(tmp_path) == ["cache.safetensors"]


def test_an_interrupted_save_leaves_the_old_file_and_no_other(cache, tmp_path, monkeypatch):
    path = tmp_path / "cache.safetensors"
    save_cache(cache, path)
    before = path.read_bytes()
    monkeypatch.setattr(type(cache), "state", lambda self: ({"layers.0.keys": torch.ones(2)}, {"bad": 1}))

    def fail(*paths):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_cache(cache, path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["cache.safetensors"]


def test_saving_replaces_an_older_file(model, cache, tmp_path):
    path = tmp_path / "cache.safetensors"
    save_cache(cache, path)
    with torch.no_grad():
        model(token_ids(2, 1), past_key_values=cache)
    save_cache(cache, path)
    assert load_cache(path, model.config).get_seq_length() == 7


@pytest.mark.parametrize("break_it", ["missing", "folder", "cut", "text", "other"])
def test_what_is_no_saved_cache_is_refused(model, cache, tmp_path, break_it):
    path = tmp_path / "cache.safetensors"
    if break_it == "folder":
        path.mkdir()
    if break_it == "cut":
        save_cache(cache, path)
        path.write_bytes(path.read_bytes()[:-10])
    if break_it == "text":
        path.write_text("hello")
    if break_it == "other":
        save_file({"keys": torch.ones(2)}, path)
    with pytest.raises(UserError, match="cannot load a cache from .*cache.safetensors"):
        load_cache(path, model.config)


@pytest.mark.parametrize("sizes", [{"num_key_value_heads": 4}, {"head_dim": 16}, {"sliding_window": 4}])
def test_other_sizes_are_refused(cache, tmp_path, sizes):
    save_cache(cache, tmp_path / "cache.safetensors")
    with pytest.raises(UserError, match=f"{next(iter(sizes))}=.*: the model has"):
        load_cache(tmp_path / "cache.safetensors", tiny_model("0_2s_2_2s", **sizes).config)


def test_a_missing_layer_is_refused(model, cache, tmp_path):
    path = tmp_path / "cache.safetensors"
    save_cache(cache, path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {name: tensor for name, tensor in load_file(path).items() if name.startswith("layers.0.")}
    scalars = json.loads(metadata["scalars"])
    del scalars["layers"]["2"]
    metadata |= {"tensors": json.dumps(sorted(tensors)), "scalars": json.dumps(scalars)}
    save_file(tensors, path, metadata)
    with pytest.raises(UserError, match="lacks layer 2, whose KV the model computes"):
        load_cache(path, model.config)


def test_a_missing_folder_is_refused(cache, tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        save_cache(cache, tmp_path / "nowhere" / "cache.safetensors")


def test_a_model_that_is_not_ours_is_refused(cache, tmp_path):
    from transformers import LlamaConfig

    save_cache(cache, tmp_path / "cache.safetensors")
    with pytest.raises(UserError, match="'llama'"):
        load_cache(tmp_path / "cache.safetensors", LlamaConfig())
