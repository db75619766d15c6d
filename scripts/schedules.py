"""What each schedule of passes learns in a given time, judged by exact evaluation.

    python scripts/schedules.py --output FIGURES.json [--text TRAIN.jsonl HELDOUT.jsonl]

Small models train on the same blocks from the same weights under every schedule, written as "7+2" for seven passes
over a cycle without gradient and two with, and "1+1x4" where tokens take turns in four groups. Their held-out loss is
that of decoding token by token: passes until nothing changes, which is checked against one token after another at the
end. Time is the CPU time of the training steps alone. A model that `--output` has is not trained again.
"""

from __future__ import annotations

import json
import math
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from bench import passes
from torch.utils.data import DataLoader, Subset
from transformers import get_cosine_schedule_with_warmup, set_seed
from ways import read_arguments, show

from lckv.config import DataConfig, TokenizerConfig
from lckv.data.dataset import BlockDataset, TokenizedData, build_dataset
from lckv.data.tokenizer import build_tokenizer
from lckv.evaluation.perplexity import Blocks, evaluate_perplexity
from lckv.models import LCKVLlamaConfig, LCKVLlamaForCausalLM
from lckv.sharing.patterns import build_layer_types
from lckv.utils.charts import new_chart, save_chart, tidy
from lckv.utils.console import track
from lckv.utils.storage import write_json

PATTERNS = (
    "0_6_6_6_6_6_6_7",
    build_layer_types("sandwich_middle", 8),
    build_layer_types("lasagna_middle", 8),
    build_layer_types("sandwich_middle", 12),
)
SCHEDULES = ("7+2", "1+1x4")
NUM_EVALUATIONS = 5
Row = dict[str, Any]


def prepare(arguments: Namespace) -> TokenizedData:
    """The embedded text, or files, in blocks."""
    train, heldout = arguments.text or (None, None)
    config = DataConfig(block_size=arguments.length)
    if train:
        config = DataConfig("files", files=train, validation_files=heldout, block_size=arguments.length)
    return build_dataset(config, build_tokenizer(TokenizerConfig(vocab_size=arguments.vocab_size), config))


def build_model(arguments: Namespace, layer_types: str, schedule: str, seed: int) -> LCKVLlamaForCausalLM:
    """A model whose weights depend on the pattern and the seed alone."""
    set_seed(seed)
    num_heads = arguments.hidden_size // 32
    config = LCKVLlamaConfig(
        layer_types=layer_types,
        vocab_size=arguments.vocab_size,
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.hidden_size * 11 // 4,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        tie_word_embeddings=True,
        **passes(schedule),
    )
    return LCKVLlamaForCausalLM(config)


def batches(blocks: BlockDataset, batch_size: int, steps: int, seed: int) -> Iterable[dict[str, torch.Tensor]]:
    """So many batches in an order that depends on the seed alone, as often through the text as it takes."""
    generator = torch.Generator().manual_seed(seed)
    num_blocks = steps * batch_size
    rounds = [torch.randperm(len(blocks), generator=generator) for _ in range(math.ceil(num_blocks / len(blocks)))]
    return DataLoader(Subset(blocks, torch.cat(rounds)[:num_blocks].tolist()), batch_size)


class Learner:
    """How a model learns from a batch; another way is a subclass."""

    def __init__(self, model: LCKVLlamaForCausalLM) -> None:
        self.model = model
        self.num_passes: list[int] = []

    def parameters(self) -> list[torch.nn.Parameter]:
        """What is trained."""
        return list(self.model.parameters())

    def backward(self, batch: dict[str, torch.Tensor], progress: float) -> None:
        """Adds to the gradients; `progress` is the part of all steps that is behind."""
        self.learn(batch)

    def learn(self, batch: dict[str, torch.Tensor], retain_graph: bool = False, **given: Any) -> None:
        """Adds the gradient of a batch, with other passes than the schedule's if they are given."""
        output = self.model(**batch, **given)
        self.num_passes.append(output.num_passes)
        output.loss.backward(retain_graph=retain_graph)


def train(
    arguments: Namespace,
    data: TokenizedData,
    layer_types: str,
    schedule: str,
    seed: int,
    new_learner: Callable[[LCKVLlamaForCausalLM], Learner] = Learner,
) -> Row:
    """Trains a model, and measures the exact loss again and again."""
    model, steps = build_model(arguments, layer_types, schedule, seed), arguments.steps
    learner = new_learner(model)
    optimizer = torch.optim.AdamW(
        learner.parameters(), arguments.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    scheduler = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    heldout = Subset(data.validation, range(arguments.num_heldout))
    curve, seconds = [], 0.0
    for step, batch in enumerate(batches(data.train, arguments.batch_size, steps, seed), 1):
        start = time.process_time()
        model.train()
        learner.backward(batch, step / steps)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        seconds += time.process_time() - start
        if step % (steps // NUM_EVALUATIONS) == 0:
            curve.append((seconds, loss(model, heldout, arguments)))
    return {
        "pattern": layer_types,
        "schedule": schedule,
        "seed": seed,
        "curve": curve,
        "exact": curve[-1][1],
        "passes": mean(learner.num_passes),
        "own": loss(model, heldout, arguments, forward_passes=None),
        "token_by_token": abs(_of_one_block(model, heldout, sequential=True) - _of_one_block(model, heldout)),
    }


def loss(model: LCKVLlamaForCausalLM, blocks: Blocks, arguments: Namespace, **given: Any) -> float:
    """Nats per token, of as many passes as it takes unless others are given."""
    return evaluate_perplexity(model, blocks, batch_size=arguments.batch_size, **given).loss


def _of_one_block(model: LCKVLlamaForCausalLM, blocks: Blocks, sequential: bool = False) -> float:
    model.config.use_sequential = sequential
    return evaluate_perplexity(model, Subset(blocks, [0]), batch_size=1).loss  # type: ignore[arg-type]


def table(rows: list[Row]) -> dict[str, Row]:
    """By pattern and schedule: time and exact loss beside those of the first schedule with the same seed."""
    found = {(row["pattern"], row["schedule"], row["seed"]): row for row in rows}
    grouped = defaultdict(list)
    for (pattern, schedule, seed), row in found.items():
        first = found[pattern, next(each for of, each, _ in found if of == pattern), seed]
        time_ratio = row["curve"][-1][0] / first["curve"][-1][0]
        grouped[f"{pattern} {schedule}"].append((row, row["exact"] - first["exact"], time_ratio))
    return {
        name: {
            "exact": mean(row["exact"] for row, _, _ in each),
            "beside the first": mean(difference for _, difference, _ in each),
            "by seed": ", ".join(f"{difference:+.3f}" for _, difference, _ in each),
            "own - exact": max((row["own"] - row["exact"] for row, _, _ in each), key=abs),
            "token by token": max(row["token_by_token"] for row, _, _ in each),
            "time": mean(ratio for _, _, ratio in each),
        }
        for name, each in grouped.items()
    }


def draw(rows: list[Row], path: Path) -> None:
    """A panel for every pattern: exact loss against time, thin by seed, thick in the mean."""
    patterns = list(dict.fromkeys(row["pattern"] for row in rows))
    schedules = list(dict.fromkeys(row["schedule"] for row in rows))
    figure, panels = new_chart((4.2 * len(patterns), 3.8), num_columns=len(patterns))
    for axes, pattern in zip(panels, patterns, strict=True):
        for number, schedule in enumerate(schedules):
            curves = [row["curve"] for row in rows if (row["pattern"], row["schedule"]) == (pattern, schedule)]
            for curve in curves:
                axes.plot(*zip(*curve[1:], strict=True), color=f"C{number}", linewidth=0.7, alpha=0.5)
            points = [tuple(map(mean, zip(*point, strict=True))) for point in zip(*curves, strict=True)]
            if points:
                axes.plot(*zip(*points[1:], strict=True), color=f"C{number}", marker="o", markersize=4, label=schedule)
        axes.set(title=pattern, xlabel="seconds of training, one thread")
        tidy(axes)
        axes.legend(frameon=False)
    panels[0].set_ylabel("exact held-out loss (nats per token)")
    save_chart(figure, path)


def main() -> None:
    """Trains what is missing, prints the table and draws the picture."""
    sizes = {"hidden_size": 128, "batch_size": 2, "length": 256, "vocab_size": 2048, "steps": 300, "num_heldout": 24}
    run = {"learning_rate": 3e-3, "seeds": (0, 1, 2), "schedules": SCHEDULES, "text": ("",)}
    arguments = read_arguments(__doc__, patterns=PATTERNS, **sizes, **run)
    arguments.text = [path for path in arguments.text if path]
    output = Path(arguments.output)
    rows: list[Row] = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else []
    done = {(row["pattern"], row["schedule"], row["seed"]) for row in rows}
    missing = [each for each in product(arguments.patterns, arguments.schedules, arguments.seeds) if each not in done]
    data = prepare(arguments)
    for pattern, schedule, seed in track(missing, "models", len(missing)):
        rows.append(train(arguments, data, pattern, schedule, seed))
        write_json(output, rows)  # after each model, as it takes long until the last
    show(table(rows))
    draw(rows, output.with_suffix(".png"))


if __name__ == "__main__":
    main()
