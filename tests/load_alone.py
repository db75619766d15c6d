"""Loads exported models where this package cannot be imported, and compares: `python FILE.py FOLDER`.

FOLDER holds folders, each with a model and `expected.safetensors`: what goes in and what must come out. Where there is
a card, its code is run, too. This imports nothing but what whoever loads such a model has: torch, transformers and
safetensors.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

CHUNKS = [4, 1, 1, 3]
CLASSES: dict[bytes, Any] = {}


class _Absent:
    """Makes imports of this package, and of what only it needs, fail."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in ("lckv", "tests", "omegaconf", "hydra"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@torch.no_grad()
def check(folder: Path) -> None:
    """The same logits without a cache and with one, the same text either way, and no more kept than planned."""
    expected = load_file(folder / "expected.safetensors")
    model = load(folder)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    input_ids, logits = expected["input_ids"], expected["logits"]
    torch.testing.assert_close(model(input_ids, use_cache=False).logits, logits, atol=1e-5, rtol=1e-5)
    cache, pieces = None, []
    for piece in input_ids.split(CHUNKS, dim=1):
        outputs = model(piece, past_key_values=cache, use_cache=True)
        cache, pieces = outputs.past_key_values, [*pieces, outputs.logits]
    torch.testing.assert_close(torch.cat(pieces, dim=1), logits, atol=1e-4, rtol=1e-4)
    prompts = {name: expected[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    generated = model.generate(**prompts, **options, return_dict_in_generate=True)
    assert torch.equal(generated.sequences, expected["text"]), "another text"
    assert torch.equal(model.generate(**prompts, **options, use_cache=False), expected["text"]), (
        "another text uncached"
    )
    assert kept_bytes(generated.past_key_values) <= int(expected["kv_bytes"]), "more kept than planned"


def run_card(folder: Path) -> None:
    """What a model card says of how to load the model."""
    (program,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(program, names := {"print": str})
    assert type(names["model"]).__name__ == "LCKVLlamaForCausalLM"


def load(folder: Path) -> Any:
    """The model; its class is made only once of a text, since that takes longest."""
    code = next(folder.glob("*.py")).read_bytes()
    if code not in CLASSES:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
        CLASSES[code] = type(model)
    return CLASSES[code].from_pretrained(folder, local_files_only=True)


def kept_bytes(cache: object) -> int:
    """Bytes of all that a cache of transformers holds."""
    layers = (vars(layer) for layer in cache.layers)  # type: ignore[attr-defined]
    states = [layer[name] for layer in layers for name in ("keys", "values") if layer.get(name) is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in states)


if __name__ == "__main__":
    sys.meta_path.insert(0, _Absent())  # type: ignore[arg-type]
    torch.set_num_threads(1)
    failed = {}
    folders = sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir())
    for each in folders:
        try:
            check(each)
            if (each / "README.md").is_file():
                run_card(each)
        except Exception as error:
            failed[each.name] = f"{type(error).__name__}: {error}"
    ours = sorted(name for name in sys.modules if name.partition(".")[0] == "lckv")
    print(json.dumps({"checked": [each.name for each in folders], "failed": failed, "ours": ours}))
