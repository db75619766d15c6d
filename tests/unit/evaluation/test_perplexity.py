import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lckv.evaluation import perplexity
from lckv.evaluation.perplexity import Perplexity, evaluate_perplexity

BLOCK_SIZE, VOCAB_SIZE = 12, 40


@pytest.fixture
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_dropout=0.5,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config)


def make_blocks(num_blocks: int = 7) -> list[dict[str, torch.Tensor]]:
    """Blocks that predict 11, 10, 9, ... tokens."""
    generator = torch.Generator().manual_seed(0)
    blocks = []
    for number in range(num_blocks):
        input_ids = torch.randint(VOCAB_SIZE, (BLOCK_SIZE,), generator=generator)
        labels = input_ids.clone()
        labels[: number + 1] = -100
        blocks.append({"input_ids": input_ids, "position_ids": torch.arange(BLOCK_SIZE), "labels": labels})
    return blocks


def expected_loss(model: LlamaForCausalLM, blocks: list[dict[str, torch.Tensor]]) -> float:
    model.eval()
    total, count = 0.0, 0
    for block in blocks:
        logits = model(block["input_ids"][None]).logits[0].log_softmax(-1)
        for position in range(1, BLOCK_SIZE):
            if block["labels"][position] != -100:
                total -= logits[position - 1, block["labels"][position]].item()
                count += 1
    return total / count


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_every_token_counts_the_same_whatever_the_batch_size(model: LlamaForCausalLM, batch_size: int):
    blocks = make_blocks()
    result = evaluate_perplexity(model, blocks, batch_size=batch_size, num_bytes=300)
    assert result.loss == pytest.approx(expected_loss(model, blocks), rel=1e-6)
    assert result.num_tokens == sum(range(5, 12))
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert result.bits_per_byte == pytest.approx(result.loss * result.num_tokens / 300 / math.log(2))


@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 4), (3, 1), (5, 4)])
def test_processes_share_the_work_and_call_the_model_equally_often(model, world_size: int, batch_size: int):
    blocks = make_blocks()
    totals, calls = torch.zeros(2, dtype=torch.float64), []

    def collect(own: torch.Tensor) -> torch.Tensor:
        totals.add_(own)
        return own if own[1] else torch.ones(2)

    for rank in range(world_size):
        done: list[tuple[int, int]] = []
        evaluate_perplexity(
            model,
            blocks,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            reduce_sum=collect,
            on_batch=lambda *counts, done=done: done.append(counts),
        )
        calls.append(done)
    assert all(done == calls[0] for done in calls)
    assert calls[0][-1][0] == calls[0][-1][1] == len(calls[0])
    whole = evaluate_perplexity(model, blocks, batch_size=7)
    assert totals[1] == whole.num_tokens
    assert (totals[0] / totals[1]).item() == pytest.approx(whole.loss, rel=1e-6)


class WithoutFloat64(torch.Tensor):
    """A tensor as on a device that has no float64."""

    def double(self):
        raise TypeError("Cannot convert to float64")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_device_needs_no_float64(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch):
    expected = evaluate_perplexity(model, make_blocks(), batch_size=2)
    token_losses = perplexity.token_losses

    def on_device(*args) -> torch.Tensor:
        return token_losses(*args).as_subclass(WithoutFloat64)

    monkeypatch.setattr(perplexity, "token_losses", on_device)
    assert evaluate_perplexity(model, make_blocks(), batch_size=2) == expected


def test_mode_and_random_state_are_left_alone(model: LlamaForCausalLM):
    model.train()
    before = torch.get_rng_state()
    first = evaluate_perplexity(model, make_blocks(), batch_size=2)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert evaluate_perplexity(model, make_blocks(), batch_size=2) == first


def test_nothing_to_predict_is_an_error(model: LlamaForCausalLM):
    block = make_blocks(1)[0]
    block["labels"] = torch.full((BLOCK_SIZE,), -100)
    with pytest.raises(ValueError, match="nothing to predict"):
        evaluate_perplexity(model, [block], batch_size=1)


def test_figures_beyond_a_float_and_without_bytes():
    assert Perplexity(loss=1000.0, num_tokens=3).perplexity == math.inf
    assert Perplexity(loss=1.0, num_tokens=3).bits_per_byte is None
