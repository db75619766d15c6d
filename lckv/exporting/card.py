"""The model card of a folder for the Hub: `README.md`, with what the Hub reads of it in front."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from huggingface_hub import ModelCardData

from lckv.exporting.provenance import Provenance
from lckv.models import LCKVLlamaConfig
from lckv.sharing.costs import ModelSizes, count_kv_bytes, llama_plan

DRAWING = "pattern.png"
"""The picture of who reads whose keys and values, beside the card."""

_KV_DTYPE = "bfloat16"


def model_card(
    name: str, config: LCKVLlamaConfig, provenance: Provenance, plain_family: str | None, requirements: Iterable[str]
) -> str:
    """The text of a card.

    Args:
        name: of the model, on the Hub if it is to be there.
        config: the model's.
        provenance: where it comes from.
        plain_family: the family of transformers' own that it is written as; `None`: it brings its code.
        requirements: of the code.
    """
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license="unknown",
        base_model=provenance.base_model,
        tags=["kv-cache", *(["custom_code"] if plain_family is None else [])],
    )
    sections = [
        _about(name, config),
        _how_to_load(name, plain_family, requirements),
        _kv_bytes(config),
        *_table("Evaluation", ("evaluation", "figure", "value"), provenance.figures),
        *_table("Training", ("setting", "value"), provenance.training.items()),
        *_table("Conversion", ("setting", "value"), provenance.conversion.items()),
        "## Licence\n\nNone is chosen yet: say here, and as `license` above, under which one the weights may be used.",
    ]
    return f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def _about(name: str, config: LCKVLlamaConfig) -> str:
    plan = config.sharing_plan
    owners, layers = len(plan.kv_owners), plan.num_hidden_layers
    kept = "latents in the place of keys and values" if config.kv_latents else "keys and values"
    lines = [f"# {name.rpartition('/')[2]}", "", f"A decoder of {layers} layers, of which {owners} compute {kept}:"]
    lines += ["", f"`{plan.layer_types}`", "", "Each entry is the layer whose keys and values a layer attends to"]
    if plan.first_split is not None:
        lines[-1] += "; of two, keys are the first one's, and values the second one's"
    if plan.has_windows:
        lines[-1] += f"; with an `s`, through a window of {config.sliding_window} tokens"
    return "\n".join([*lines[:-1], f"{lines[-1]}.", "", f"![who reads whose keys and values]({DRAWING})"])


def _how_to_load(name: str, plain_family: str | None, requirements: Iterable[str]) -> str:
    trust = ", trust_remote_code=True" if plain_family is None else ""
    needs = (
        f"The code of the model is in this folder. It needs `{'` and `'.join(requirements)}`."
        if plain_family is None
        else f"transformers knows such models as `{plain_family}`: no code comes with this one."
    )
    return (
        "## How to load it\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})\n'
        f'model = AutoModelForCausalLM.from_pretrained("{name}"{trust})\n'
        'inputs = tokenizer("In the beginning", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))\n```\n\n"
        f"{needs} `generate` keeps nothing of layers that only read."
    )


def _kv_bytes(config: LCKVLlamaConfig) -> str:
    """What is kept of a text, beside a model whose layers share nothing."""
    plan, sizes, length = config.sharing_plan, ModelSizes.from_config(config), config.max_position_embeddings
    ours = count_kv_bytes(plan, sizes, length, _KV_DTYPE)
    plain = count_kv_bytes(llama_plan(plan), sizes.of_llama, length, _KV_DTYPE)
    what = {
        "written": "written per new token",
        "resident": f"kept per token of a context of {length:,}",
        "read": "read to decode a token at its end",
    }
    rows = []
    for attribute, words in what.items():
        mine, theirs = getattr(ours, attribute), getattr(plain, attribute)
        rows.append((words, f"{mine:,.0f}", f"{theirs:,.0f}", f"{theirs / mine:.2f}"))
    heading = ("bytes, of numbers of 16 bits", "this model", "nothing shared", "factor")
    return "\n".join(_table("The cache", heading, rows))


def _table(title: str, heading: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    """A section with a table, if there is anything to stand in it."""
    lines = [_line(row) for row in rows]
    if lines:
        yield "\n".join([f"## {title}", "", _line(heading), _line(["---"] * len(heading)), *lines])


def _line(cells: Sequence[Any]) -> str:
    shown = (f"{cell:,.4g}" if isinstance(cell, float) else str(cell) for cell in cells)
    return f"| {' | '.join(each.replace('|', chr(92) + '|') for each in shown)} |"
