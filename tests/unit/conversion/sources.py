"""Pretrained models to convert, tiny and random, and what conversions make of them."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from lckv import convert
from lckv.conversion.heads import Tensors
from lckv.conversion.methods import Group, make_tensors
from lckv.conversion.source import expected_shapes
from lckv.conversion.target import converted_tensors
from lckv.models import LCKVLlamaConfig, LCKVLlamaForCausalLM
from lckv.sharing.patterns import parse_layer_types
from tests.composing import compose
from tests.reference import tiny_config
from tests.tiny import byte_tokenizer

CHAT_TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}>"
KINDS = {
    "plain": {},
    "biases": {"attention_bias": True, "attention_output_bias": False},
    "norms": {"use_qk_norm": True},
}
"""What families add to Llama's attention, as settings of `tiny_config`."""


def identity(num_layers: int) -> str:
    """The pattern in which every layer reads itself."""
    return "_".join(map(str, range(num_layers)))


def random_source(num_layers: int = 4, seed: int = 0, **config: Any) -> LCKVLlamaForCausalLM:
    """A model of ours in which norms and biases matter; every layer reads itself unless `layer_types` says more."""
    torch.manual_seed(seed)
    settings = {"layer_types": identity(num_layers), "vocab_size": 300} | config
    model = LCKVLlamaForCausalLM(tiny_config(**settings)).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def save_source(folder: Path, model: PreTrainedModel, **options: Any) -> Path:
    """Writes a model with all that lies beside one."""
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.3, eos_token_id=[2, 5])
    model.save_pretrained(folder, **options)
    byte_tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(folder)
    return folder


def run_convert(source: Path, out: Path, *arguments: str) -> None:
    """What `python -m lckv.convert` does."""
    convert.main(compose([f"source={source}", f"out={out}", *arguments], "convert"))


def read_folder(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder, from one file or several."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        new = load_file(file)
        assert not tensors.keys() & new.keys()
        tensors |= new
    return tensors


def assert_identical(first: Tensors, second: Tensors) -> None:
    """The same names, types and bits."""
    assert first.keys() == second.keys()
    assert [name for name in first if first[name].dtype != second[name].dtype] == []
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def convert_tensors(
    tensors: Tensors, config: LCKVLlamaConfig, layer_types: str, method: str, **options: Any
) -> tuple[dict[str, Tensor], LCKVLlamaForCausalLM]:
    """The tensors of a converted model, without any file, and an empty model for them."""
    plan = parse_layer_types(layer_types)
    target = LCKVLlamaForCausalLM(LCKVLlamaConfig.from_dict(config.to_dict(), layer_types=layer_types)).eval()

    def make(owner: int) -> dict[str, Tensor]:
        return make_tensors(method, Group(owner, plan, tensors, config, **options))

    return dict(
        converted_tensors(tensors, config.sharing_plan, plan, expected_shapes(target.config), method, make)
    ), target


def convert_model(model: LCKVLlamaForCausalLM, layer_types: str, method: str, **options: Any) -> LCKVLlamaForCausalLM:
    """A converted model, without any file."""
    tensors, target = convert_tensors(model.state_dict(), model.config, layer_types, method, **options)
    target.load_state_dict(tensors)
    return target
