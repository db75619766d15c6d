"""Run folders as `lckv.train` leaves them, made up: curves, results, evaluations, failures."""

import json
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import reduce
from pathlib import Path
from typing import Any

import yaml

from lckv.config import ModelConfig, TrainConfig
from lckv.config.model_arguments import model_arguments, resolve_layer_types
from lckv.config.run_names import default_run_name
from lckv.sharing.costs import ModelSizes, count_costs, llama_plan
from lckv.sharing.iteration import Iteration
from lckv.sharing.patterns import parse_layer_types

PENALTIES = {"llama": 0.0, "cla": 0.03, "yoco": 0.02, "lckv": 0.06, "sandwich_bottom": 0.08, "pizza_bottom": 0.15}
"""How much worse the loss of each family is made."""

TOKENS_PER_STEP = 4096
VERSIONS = {"lckv": "0.1.0", "torch": "2.13.0", "transformers": "5.17.0", "python": "3.11.2"}


def write_config(folder: Path, sharing: str, settings: dict[str, Any]) -> TrainConfig:
    """A run folder with nothing but its configuration, which is returned; `settings` has dotted keys."""
    cfg = TrainConfig(run_dir=str(folder), model=ModelConfig(num_hidden_layers=8, num_attention_heads=4))
    cfg.sharing.name = sharing
    for key, value in settings.items():
        *groups, name = key.split(".")
        setattr(reduce(getattr, groups, cfg), name, value)
    cfg.run_name = default_run_name(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(asdict(cfg))), sort_keys=False))
    return cfg


def write_run(
    folder: Path,
    sharing: str = "llama",
    seed: int = 0,
    *,
    settings: dict[str, Any] | None = None,
    steps: int = 400,
    stop_at: int | None = None,
    drop: tuple[str, ...] = (),
    **results: Any,
) -> Path:
    """A run that is finished, or that was stopped before; `results` replaces figures, `drop` leaves some out."""
    cfg = write_config(folder, sharing, {"seed": seed, "trainer.max_steps": steps} | (settings or {}))
    plan = parse_layer_types(resolve_layer_types(cfg))
    sizes = ModelSizes.from_config(model_arguments(cfg, cfg.tokenizer.vocab_size))
    iteration = Iteration.from_config(cfg.model)
    both = (count_costs(each, sizes, cfg.data.block_size, iteration=iteration) for each in (plan, llama_plan(plan)))
    costs, llama = both
    ratio = costs.flops_per_token.train / llama.flops_per_token.train
    lines = list(_lines(sharing, seed, steps, 9000 / ratio**0.8))
    written = [line for line in lines if stop_at is None or line["step"] <= stop_at]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))
    if stop_at is not None:
        return folder
    figures = {
        "run_name": cfg.run_name,
        "layer_types": plan.layer_types,
        "num_parameters": costs.num_parameters,
        "steps": steps,
        "tokens": steps * TOKENS_PER_STEP,
        "train_loss": lines[-2]["loss"],
        **{name: value for name, value in lines[-1].items() if name.startswith("eval_")},
        "kv_bytes_context_length": cfg.data.block_size,
        "kv_bytes": asdict(costs.kv_bytes),
        "kv_bytes_llama": asdict(llama.kv_bytes),
        "train_flops_per_token": costs.flops_per_token.train,
        "seconds": lines[-2]["seconds"],
        "tokens_per_second": 9000 / ratio**0.8,
        "data_fingerprint": "a1b2c3d4e5f6",
        "num_processes": 1,
        "versions": VERSIONS,
    }
    figures = {key: value for key, value in (figures | results).items() if key not in drop}
    (folder / "results.json").write_text(json.dumps(figures))
    return folder


def _lines(sharing: str, seed: int, steps: int, speed: float) -> Iterator[dict[str, Any]]:
    noise = random.Random(f"{sharing}{seed}")
    shift = PENALTIES.get(sharing, 0.1) + noise.gauss(0, 0.006)
    for step in range(10, steps + 1, 10):
        loss = 3.6 + shift + 4.7 * math.exp(-step / 45) + 0.9 * math.exp(-step / 300)
        tokens = step * TOKENS_PER_STEP
        trained = loss + noise.gauss(0, 0.04)
        yield {"step": step, "loss": trained, "tokens": tokens, "tokens_per_second": speed, "seconds": tokens / speed}
        if step % 50 == 0:
            yield {
                "step": step,
                "eval_loss": loss + 0.1,
                "eval_perplexity": math.exp(loss + 0.1),
                "eval_bits_per_byte": (loss + 0.1) / math.log(2) / 3.9,
                "tokens": tokens,
            }


def needle(quality: float) -> dict[str, Any]:
    """A needle's map that fades towards long contexts and the middle."""
    lengths, depths = [256, 512, 1024, 2048], [0.0, 0.25, 0.5, 0.75, 1.0]
    rows = [
        [round(max(0.0, min(1.0, quality - 0.12 * place - 0.5 * depth * (1 - depth))), 2) for place in range(4)]
        for depth in depths
    ]
    return {"lengths": lengths, "depths": depths, "accuracy": rows, "num_samples": 10}


def write_evaluations(run: Path, evaluations: dict[str, Any]) -> None:
    """What `lckv.evaluate` leaves in a run folder."""
    (run / "evaluation").mkdir(exist_ok=True)
    (run / "evaluation" / "results.json").write_text(json.dumps({"evaluations": evaluations}))


def write_failure(folder: Path, sharing: str = "lckv", error: str = "out of memory") -> Path:
    """A run that failed."""
    cfg = write_config(folder, sharing, {})
    failure = {"error": error, "type": "RuntimeError", "overrides": [f"sharing={sharing}"], "run_name": cfg.run_name}
    (folder / "failure.json").write_text(json.dumps({**failure, "layer_types": resolve_layer_types(cfg)}))
    return folder


def write_sweep(folder: Path, seeds: tuple[int, ...] = (0, 1), families: Iterable[str] = tuple(PENALTIES)) -> Path:
    """Several families by several seeds, with evaluations, a failure and an unfinished run."""
    for family in families:
        for seed in seeds:
            run = write_run(folder / f"sharing={family},seed={seed}", family, seed)
            quality = 1.05 - 3 * PENALTIES[family]
            tasks = {"arc_easy": {"acc": 0.42 - PENALTIES[family] + 0.004 * seed, "acc_stderr": 0.01}}
            recall = {"accuracy": quality - 0.1, "by_num_pairs": {"4": quality - 0.05, "8": quality - 0.15}}
            figures = {"needle": needle(quality), "harness": {"tasks": tasks}, "recall": recall}
            write_evaluations(run, figures)
    write_failure(folder / "sharing=lasagna_top,seed=0", "lasagna_top", "CUDA out of memory: tried to get 2 GiB")
    write_run(folder / "sharing=mix_attention,seed=0", "mix_attention", stop_at=230)
    return folder
