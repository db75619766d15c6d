"""Attention to earlier tokens alone, for layers that are asked before their own token's key exists."""

from __future__ import annotations

import functools
from typing import Any

from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata, subclass_attention_backend


@functools.lru_cache  # vLLM builds metadata once for all layers of one class
def strict_past_backend(backend: type[AttentionBackend]) -> type[AttentionBackend]:
    """A backend as `backend`, whose queries see the keys before their own token's and not that one.

    Kernels align the last query with the last key. Told of one key less than there are, they show each query what the
    one before it would see. For the first token of a text, which sees nothing, what they give is undefined.
    """
    builder: Any = backend.get_builder_cls()

    class StrictPastBuilder(builder):
        """Builds metadata for one key less."""

        def build(
            self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
        ) -> Any:
            shorter = common_attn_metadata.replace(
                seq_lens=common_attn_metadata.seq_lens - 1,
                _num_computed_tokens_cache=None,  # it is of the true lengths
            )
            return super().build(common_prefix_len, shorter, fast_build)

    return subclass_attention_backend("StrictPast", backend, StrictPastBuilder)


class StrictPastAttention(Attention):
    """Attention that keeps nothing, and sees what another one keeps of earlier tokens.

    Args:
        args: of vLLM's attention.
        kv_sharing_target_layer_name: the other one, which may belong to a layer above.
        per_layer_sliding_window: tokens that are seen, if there is a bound, and the token that is not.
        kwargs: of vLLM's attention.
    """

    def __init__(
        self,
        *args: Any,
        kv_sharing_target_layer_name: str | None,
        per_layer_sliding_window: int | None,
        **kwargs: Any,
    ) -> None:
        window = None if per_layer_sliding_window is None else per_layer_sliding_window - 1
        super().__init__(*args, per_layer_sliding_window=window, **kwargs)
        # vLLM's constructor takes layers that are there already. When it plans its memory, all of them are.
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name

    def get_attn_backend(self) -> type[AttentionBackend]:
        """The class that tells the kernel of a batch."""
        return strict_past_backend(self.attn_backend)
