"""Families that nobody registered: what computes as Llama does is read, all else is refused, and how to add one."""

import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from lckv.errors import UserError
from lckv.families import FAMILIES, TENSORS, read_model
from lckv.families.unregistered import read_unregistered
from lckv.loading.models import load_model
from tests.tiny import byte_tokenizer
from tests.unit.conversion.sources import run_convert, save_source
from tests.unit.families.test_registered import LLAMA3_ROPE, SIZES, random_model, read_in_memory

PROVEN = {
    "arcee": {"mlp_bias": True},
    "cwm": {"sliding_window": 5, "head_dim": 16, "rope_parameters": LLAMA3_ROPE},
    "ernie4_5": {},
    "glm": {"head_dim": 16, "partial_rotary_factor": 0.5, "pad_token_id": 0},
    "helium": {"head_dim": 8},
    "jais2": {},
    "ministral": {"head_dim": 16, "sliding_window": 5},
    "phi3": {"pad_token_id": 0, "tie_word_embeddings": True},
    "seed_oss": {"head_dim": 16},
    "starcoder2": {"sliding_window": 5},
}
REFUSED = {
    "gemma": (r"the logits of a tiny model differ by \d", {}),
    "ministral3": (r"the logits of a tiny model differ by \d", {}),  # at the first positions they do not
    "olmo2": ("model.layers.0.input_layernorm.weight is missing", {}),
    "diffllama": ("model.layers.0.self_attn.lambda_k1 is a tensor that ours has not", {}),
    "mamba": ("its configuration does not say num_attention_heads, ", {"num_attention_heads": None}),
    "gema": ("transformers has no such family, did you mean 'gemma3_text'", {}),
}
DOCS = Path(__file__).parents[3] / "docs" / "conversion.md"


def tiny(model_type, **settings):
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    return AutoConfig.for_model(model_type, **(SIZES | ids | settings))


@pytest.mark.parametrize("model_type", PROVEN)
@torch.no_grad()
def test_what_computes_as_llama_does_is_read(model_type):
    original = random_model(tiny(model_type, **PROVEN[model_type]))
    input_ids = torch.randint(3, 300, (2, 14))
    expected = original(input_ids).logits
    torch.testing.assert_close(read_in_memory(original)(input_ids).logits, expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_computes_something_else_is_refused(model_type):
    reason, settings = REFUSED[model_type]
    values = {"model_type": model_type} if settings or model_type == "gema" else tiny(model_type).to_dict()
    expected = f"is of model_type '{model_type}'; allowed are lckv-llama, .*which this does not: {reason}.*register"
    with pytest.raises(UserError, match=expected) as error:
        read_model(values)
    assert "\n" not in str(error.value)


@torch.no_grad()
def test_their_folders_are_loaded_and_converted(tmp_path):
    original = random_model(tiny("phi3", **PROVEN["phi3"]))
    source = save_source(tmp_path / "source", original)
    byte_tokenizer().save_pretrained(source)
    model, _ = load_model(str(source), device="cpu")
    input_ids = torch.randint(3, 300, (1, 9))
    expected = original(input_ids).logits
    torch.testing.assert_close(model(input_ids).logits, expected, atol=2e-5, rtol=0)
    run_convert(source, tmp_path / "out")
    converted, _ = load_model(str(tmp_path / "out"), device="cpu")
    torch.testing.assert_close(converted(input_ids).logits, expected, atol=2e-5, rtol=0)


def test_a_proof_leaves_random_numbers_as_they_are():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    read_unregistered(tiny("arcee", hidden_size=64))
    assert torch.equal(torch.rand(2), expected)


@pytest.fixture
def forgotten():
    """Takes back what a test registers."""
    yield
    for registry in (FAMILIES, TENSORS):
        registry._entries.pop("gemma", None)


def example():
    """The one in the documentation."""
    return re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)[0]


@torch.no_grad()
def assert_gemma_is_read():
    original = random_model(tiny("gemma", head_dim=16))
    input_ids = torch.randint(3, 300, (2, 9))
    expected = original(input_ids).logits
    torch.testing.assert_close(read_in_memory(original)(input_ids).logits, expected, atol=2e-5, rtol=0)


def test_the_example_of_the_documentation_registers_a_family(forgotten):
    exec(example(), {})
    assert_gemma_is_read()


@pytest.fixture
def its_package(tmp_path, monkeypatch, forgotten):
    """The module of an installed package that has an entry point for a family."""
    metadata = tmp_path / "its_package-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: its-package\nVersion: 1.0\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text("[lckv.families]\ngemma = its_family\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    read_model.__globals__["_load_entry_point"].cache_clear()
    yield tmp_path / "its_family.py"
    sys.modules.pop("its_family", None)


def test_installed_packages_register_families(its_package):
    its_package.write_text(example(), encoding="utf-8")
    assert_gemma_is_read()


def test_an_entry_point_that_cannot_be_imported_is_named(its_package):
    its_package.write_text("import nothing_of_this_name", encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_model(tiny("gemma").to_dict())
    assert str(error.value) == (
        "the entry point gemma = its_family of the group lckv.families cannot be imported: "
        "ModuleNotFoundError: No module named 'nothing_of_this_name'"
    )
