"""Run by `test_fsdp.py` in every process: a sharded model against the same model whole.

torchrun --nproc_per_node 2 -m tests.e2e.fsdp_worker
"""

import os

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.reference import tiny_model, token_ids


def check(layer_types: str, *, use_checkpointing: bool, pattern: str | None = None) -> None:
    whole, sharded = tiny_model(layer_types).train(), tiny_model(layer_types).train()
    if use_checkpointing:
        sharded.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in sharded.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    for seed in (0, 1):  # the second step would show anything that the first left behind
        input_ids = token_ids(2, 9, seed=seed)
        for model in (whole, sharded):
            model.zero_grad()
            model(input_ids, labels=input_ids, use_cache=False, layer_types=pattern).loss.backward()
        for (name, expected), parameter in zip(whole.named_parameters(), sharded.parameters(), strict=True):
            gradient = parameter.grad
            if expected.grad is None:  # nobody reads what the projection makes
                assert gradient is None or not gradient.full_tensor().any(), name
                continue
            assert isinstance(gradient, DTensor), name
            torch.testing.assert_close(gradient.full_tensor(), expected.grad, atol=1e-5, rtol=1e-4)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    cases = [("0_0_2_2", None), ("0_3_3_3_4", None), ("1s_1s_3s_3s", None), ("0_1_2_3", "0_0_2_2")]
    for layer_types, pattern in cases:
        for use_checkpointing in (False, True):
            check(layer_types, use_checkpointing=use_checkpointing, pattern=pattern)
            if dist.get_rank() == 0:
                print(f"{layer_types} {'checkpointed ' * use_checkpointing}agrees", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    assert "RANK" in os.environ, "start this with torchrun"
    main()
