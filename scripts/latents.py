"""Perplexity of a model with latents of several kinds and sizes, untrained: the tables of docs/mla.md.

    python scripts/latents.py MODEL CALIBRATION.jsonl HELDOUT.jsonl --ratios 2 4 8

Both files hold a `text` in every line; what is used are the beginnings of the first texts that are long enough.
"""

import argparse
import itertools
import json
import math

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lckv.config.names import LATENTS
from lckv.conversion.latent_models import to_latents
from lckv.loading import load_model


def beginnings(path: str, tokenizer: PreTrainedTokenizerBase, count: int, length: int) -> list[torch.Tensor]:
    """The first tokens of the first texts of a file that have as many, `(1, length)` each."""
    with open(path, encoding="utf-8") as lines:
        ids = (tokenizer(json.loads(line)["text"], add_special_tokens=False).input_ids for line in lines)
        found = list(itertools.islice((each[:length] for each in ids if len(each) >= length), count))
    if len(found) < count:
        raise SystemExit(f"{path}: holds {len(found)} texts of {length} tokens or more; {count} are needed")
    return [torch.tensor([each]) for each in found]


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: list[torch.Tensor]) -> float:
    """Of the windows, `(1, length)` each, without their first tokens."""
    loss = sum(model(window, labels=window, use_cache=False).loss.double() for window in windows)
    return math.exp(loss / len(windows))


def main() -> None:
    """Converts, measures and prints, one line for each kind and ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("heldout")
    parser.add_argument("--kinds", nargs="+", default=LATENTS, choices=LATENTS)
    parser.add_argument("--ratios", nargs="+", type=float, default=[2, 4, 8])
    parser.add_argument("--layer-types", help="a sharing pattern on top")
    parser.add_argument("--length", type=int, default=512, help="tokens of a text")
    parser.add_argument("--num-calibration", type=int, default=12, help="texts to calibrate on")
    parser.add_argument("--num-heldout", type=int, default=6, help="texts to measure on")
    given = parser.parse_args()
    model, tokenizer = load_model(given.model, device="cpu")
    text = beginnings(given.calibration, tokenizer, given.num_calibration, given.length)
    windows = beginnings(given.heldout, tokenizer, given.num_heldout, given.length)
    original, size = perplexity(model, windows), sum(store.size for store in model.config.kv_layout.stores)
    print("| kind | ratio | numbers of a token | perplexity | to the original |\n|---|---|---|---|---|")
    print(f"| original | | {size:,} | {original:.2f} | 1.00 |", flush=True)
    for kind, ratio in itertools.product(given.kinds, given.ratios):
        made = to_latents(model, text, kind, ratio=ratio, layer_types=given.layer_types)
        kept, found = sum(store.size for store in made.config.kv_layout.stores), perplexity(made, windows)
        print(f"| {kind} | {ratio:g} | {kept:,} | {found:.2f} | {found / original:.2f} |", flush=True)


if __name__ == "__main__":
    main()
