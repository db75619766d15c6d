"""Exported folders on a machine without this package: in a process that cannot import it.

`LCKV_ALONE_PYTHON` names another interpreter for it, as `make test-hub` does.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lckv.cache import DynamicKVCache
from lckv.config import ExportConfig
from lckv.conversion.source import Source
from lckv.exporting.hub import HubFolder, write_model
from tests.layouts import LATENTS, layout_model
from tests.load_alone import CHUNKS
from tests.reference import PATTERNS, SHAPES, tiny_model, token_ids
from tests.tiny import byte_tokenizer

pytestmark = pytest.mark.timeout(240)

ITERATION = {"forward_passes": "converge", "converge_tolerance": 1e-9}
SETTINGS = {
    **SHAPES,
    "nodiag": {"force_nodiag": True},
    "biases": {"attention_bias": True, "attention_output_bias": False, "mlp_bias": True},
    "norms": {"use_qk_norm": True, "head_dim": 24},
    "eager": {"attn_implementation": "eager"},
}
"""What families add to Llama, in patterns of four layers."""

WITH_CARD = "with-card"
FOUR_LAYERS = [pattern for pattern in PATTERNS if pattern.count("_") == 3]
CASES = {
    **{pattern: (None, pattern, {}) for pattern in PATTERNS},
    WITH_CARD: (None, "0_3_3_3_4", {"vocab_size": 257}),
    **{
        f"{kind}-{pattern}": (kind, pattern, {})
        for number, pattern in enumerate(PATTERNS)
        for kind in ["separate" if ":" in pattern else list(LATENTS)[number % len(LATENTS)]]
    },
    **{
        f"{name}-{pattern}": (None, pattern, settings)
        for number, (name, settings) in enumerate(SETTINGS.items())
        for pattern in [FOUR_LAYERS[1 + number % (len(FOUR_LAYERS) - 1)]]
    },
}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the process says that loads the models of all cases."""
    folder, given = tmp_path_factory.mktemp("exported"), tmp_path_factory.mktemp("given")
    for name in CASES:
        export(name, given / name, folder / name)
    python = os.environ.get("LCKV_ALONE_PYTHON", sys.executable)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, str(Path(__file__).parents[2] / "load_alone.py"), str(folder)],
        cwd=folder,
        env=environment | {"HF_MODULES_CACHE": str(tmp_path_factory.mktemp("modules"))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def export(name: str, given: Path, folder: Path) -> None:
    """Writes the model of a case, always with its code, and what it computes here; one of them with its card."""
    kind, layer_types, settings = CASES[name]
    settings = settings | ITERATION
    model = layout_model(kind, layer_types, **settings) if kind else tiny_model(layer_types, **settings)
    model.save_pretrained(given)
    if name == WITH_CARD:
        byte_tokenizer().save_pretrained(given)
        HubFolder(ExportConfig(format="hub", model=str(given), out=str(folder))).write()
    else:
        folder.mkdir()
        write_model(folder, Source.find(str(given)), None, max_shard_size=2**30)
    input_ids = token_ids(2, sum(CHUNKS))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, :3] = 0
    cache = DynamicKVCache(model.config)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    text = model.generate(input_ids, attention_mask=attention_mask, past_key_values=cache, **options)
    expected = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "logits": model(input_ids, use_cache=False).logits,
        "text": text,
        "kv_bytes": torch.tensor(2 * model.config.kv_layout.num_bytes(text.shape[1] - 1, itemsize=4)),
    }
    save_file(expected, folder / "expected.safetensors")


def test_this_package_is_not_there(report: dict) -> None:
    assert report["ours"] == [] and report["checked"] == sorted(CASES)


@pytest.mark.parametrize("name", CASES)
def test_exported_model_computes_and_keeps_what_it_does_here(report: dict, name: str) -> None:
    reason = report["failed"].get(name, "")
    if "is required" in reason:  # by what an older version of transformers says
        pytest.skip(reason)
    assert not reason
