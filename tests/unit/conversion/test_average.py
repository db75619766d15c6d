"""The mean of the readers' keys and values, number by number."""

import json

import pytest
import torch

from lckv.conversion.methods import METHODS, changed_owners
from lckv.sharing.patterns import parse_layer_types
from tests.unit.conversion.sources import (
    KINDS,
    assert_identical,
    convert_tensors,
    random_source,
    read_folder,
    run_convert,
    save_source,
)

KV_NAMES = ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias", "k_norm.weight")


def expected_average(tensors, groups):
    """What the owners' keys and values become; `groups` maps each owner to the layers whose mean it gets."""
    expected = {}
    for owner, readers in groups.items():
        for name in KV_NAMES:
            full_names = [f"model.layers.{reader}.self_attn.{name}" for reader in readers]
            if full_names[0] in tensors:
                mean = sum(tensors[full_name].double() for full_name in full_names) / len(readers)
                expected[f"model.layers.{owner}.self_attn.{name}"] = mean
    return expected


def assert_average(source, converted, groups):
    expected = expected_average(source, groups)
    assert expected
    for name, mean in expected.items():
        torch.testing.assert_close(converted[name].double(), mean, atol=1e-7, rtol=1e-6)
    assert_identical(
        {name: tensor for name, tensor in converted.items() if name not in expected},
        {name: source[name] for name in converted if name not in expected},
    )


def test_the_example_of_the_method(tmp_path):
    """Layer 6 gets the mean of layers 1 to 6; every other tensor is the source's."""
    source = save_source(tmp_path / "source", random_source(8))
    run_convert(source, tmp_path / "out", "model.layer_types=0_6_6_6_6_6_6_7")
    tensors, converted = read_folder(source), read_folder(tmp_path / "out")
    assert_average(tensors, converted, {6: range(1, 7)})
    gone = {f"model.layers.{layer}.self_attn.{kind}_proj.weight" for layer in range(1, 6) for kind in "kv"}
    assert tensors.keys() - converted.keys() == gone and converted.keys() <= tensors.keys()
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert record["source"] == str(source) and record["method"] == "average"
    assert record["layer_types"] == "0_6_6_6_6_6_6_7"
    assert record["hardware"]["num_threads"] == 1 and "spin_count" in record["hardware"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("layer_types", "groups"),
    [
        ("0_0_2_2", {0: (0, 1), 2: (2, 3)}),
        ("3_3_3_3", {3: (0, 1, 2, 3)}),
        ("2_0_0_0", {2: (0,), 0: (1, 2, 3)}),  # neither owner reads itself
        ("0_3s_3_3s", {3: (1, 2, 3)}),
    ],
)
def test_biases_norms_and_owners_that_do_not_read_themselves(kind, layer_types, groups):
    model = random_source(4, **KINDS[kind])
    tensors = model.state_dict()
    converted, _ = convert_tensors(tensors, model.config, layer_types, "average")
    assert_average(tensors, converted, groups)
    has = {"biases": "k_proj.bias", "norms": "k_norm.weight", "plain": "k_proj.weight"}[kind]
    assert f"model.layers.{max(groups)}.self_attn.{has}" in converted


def test_bfloat16_stays_and_is_averaged_in_float32():
    model = random_source(7).to(torch.bfloat16)
    tensors = model.state_dict()
    converted, _ = convert_tensors(tensors, model.config, "6_6_6_6_6_6_6", "average")
    name = "model.layers.{}.self_attn.k_proj.weight".format
    sources = [tensors[name(layer)] for layer in range(7)]
    assert {tensor.dtype for tensor in converted.values()} == {torch.bfloat16}
    assert torch.equal(converted[name(6)], torch.stack([tensor.float() for tensor in sources]).mean(0).bfloat16())
    assert not torch.equal(converted[name(6)], torch.stack(sources).sum(0) / 7)  # which rounds twice


def test_inherit_keeps_what_the_owner_had():
    model = random_source(4, **KINDS["biases"])
    tensors = model.state_dict()
    converted, target = convert_tensors(tensors, model.config, "2_0_0_3", "inherit")
    assert_identical(converted, {name: tensors[name] for name in target.state_dict()})


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_leaves_a_layer_alone_that_only_it_reads(method):
    assert changed_owners(parse_layer_types("0_1_2"), parse_layer_types("0_1_2")) == []
    assert changed_owners(parse_layer_types("2_0_0_3"), parse_layer_types("0_1_2_3")) == [0, 2]
    model = random_source(3)
    converted, _ = convert_tensors(model.state_dict(), model.config, "0_1_2", method)
    assert_identical(converted, model.state_dict())
