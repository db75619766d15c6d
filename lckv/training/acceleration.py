"""What makes the same training faster: torch.compile, and Liger's fused kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

# Layers of one shape share their graphs, but a cycle calls them in some ten ways: with and without gradient, with
# nothing to read yet, only to write. torch gives up at eight.
_NUM_VARIANTS = 24


def compile_layers(model: nn.Module, backend: str, mode: str | None) -> None:
    """Compiles every decoder layer of a transformers model for itself, in place; parameters and their names stay.

    As one graph, a cycle would be compiled as many times over as it has passes: minutes for a model of five layers.
    """
    limit: Any = torch._dynamo.config
    limit.recompile_limit = max(limit.recompile_limit, _NUM_VARIANTS)
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.compile(backend=backend, mode=mode)


def use_liger_kernels(model: PreTrainedModel) -> None:
    """Exchanges every norm, gated SiLU MLP and the loss of a Llama-shaped model for Liger's; names and weights stay.

    transformers' own switch knows models by their type and leaves others as they are without a word.
    """
    from liger_kernel.transformers import LigerRMSNorm, LigerSwiGLUMLP

    for name, module in list(model.named_modules()):
        fused: nn.Module | None = None
        if type(module) is LlamaRMSNorm:
            fused = LigerRMSNorm(module.weight.shape[0], eps=module.variance_epsilon, in_place=False)
        elif type(module) is LlamaMLP and module.config.hidden_act in ("silu", "swish") and not module.config.mlp_bias:
            fused = LigerSwiGLUMLP(module.config)
        if fused is not None:
            fused.to(next(module.parameters()))
            fused.load_state_dict(module.state_dict())
            model.set_submodule(name, fused)
    model.loss_function = liger_causal_lm_loss


def liger_causal_lm_loss(
    logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Tensor | int | None = None, **kwargs: Any
) -> Tensor:
    """The usual loss of causal language models by Liger's cross entropy, which needs no copy of the logits.

    Of `labels`, `(batch, q_len)`, the one at *i* is predicted from *i - 1*, and -100 is not scored; `logits` are
    `(batch, q_len, vocab_size)`. The sum is divided by `num_items_in_batch`, or else by the number of scored labels.
    """
    from liger_kernel.transformers.functional import liger_cross_entropy

    targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100).reshape(-1)  # (batch * q_len)
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = liger_cross_entropy(logits.reshape(-1, vocab_size), targets, ignore_index=-100, reduction=reduction)
    return loss if num_items_in_batch is None else loss / num_items_in_batch
