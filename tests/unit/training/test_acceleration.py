"""Liger's kernels in place of the model's modules: the same names and weights, and on a GPU the same losses."""

from copy import deepcopy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lckv.models import LCKVLlamaConfig, LCKVLlamaForCausalLM
from lckv.training.acceleration import use_liger_kernels

pytest.importorskip("liger_kernel", reason="needs the extra 'gpu'")

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 32,
}


def build_model(**settings) -> LCKVLlamaForCausalLM:
    return LCKVLlamaForCausalLM(LCKVLlamaConfig(layer_types="0_2_2_3", forward_passes=1, **{**SIZES, **settings}))


def num_fused(model: torch.nn.Module) -> int:
    use_liger_kernels(model)
    return sum(type(module).__name__.startswith("Liger") for module in model.modules())


def test_every_norm_and_mlp_is_exchanged_and_every_name_stays():
    model = build_model()
    fused = deepcopy(model)
    assert num_fused(fused) == 4 * 3 + 1
    assert not {"LlamaRMSNorm", "LlamaMLP"} & {type(module).__name__ for module in fused.modules()}
    before, after = model.state_dict(), fused.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_mlp_that_liger_does_not_have_stays():
    assert num_fused(build_model(hidden_act="gelu")) == 4 * 2 + 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("divisor", [None, 7])
def test_losses_and_gradients_are_the_same(divisor: int | None):
    model = build_model().cuda()
    fused = deepcopy(model)
    use_liger_kernels(fused)
    ids = torch.randint(64, (2, 16), device="cuda")
    labels = ids.clone()
    labels[:, :3] = -100
    kwargs = {} if divisor is None else {"num_items_in_batch": torch.tensor(divisor, device="cuda")}
    losses = [each(ids, labels=labels, **kwargs).loss for each in (model, fused)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
    for loss in losses:
        loss.backward()
    for mine, other in zip(model.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-4)


def test_llama_of_transformers_is_exchanged_too():
    assert num_fused(LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **SIZES))) == 2 * 3 + 1
