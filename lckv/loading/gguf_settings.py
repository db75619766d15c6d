"""What a GGUF file says about positions and attention, and transformers' reader leaves out.

transformers reads the sizes and the base of the rotary embedding, and passes over all else. A model that is missing a
scaling or a window computes something else than the file means, without a word. So every setting of the file is either
read there, read here, or refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lckv.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderField

_READ_BY_TRANSFORMERS = frozenset(
    {
        "context_length",
        "block_count",
        "feed_forward_length",
        "embedding_length",
        "vocab_size",
        "rope.freq_base",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.layer_norm_rms_epsilon",
    }
)
_READ_HERE = frozenset(
    {
        "rope.dimension_count",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.attn_factor",
        "rope.scaling.original_context_length",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
        "rope.scaling.yarn_ext_factor",
        "rope.scale_linear",  # what the factor was called once
        "attention.key_length",
        "attention.value_length",
        "attention.sliding_window",
    }
)
BIASES = ("attention_bias", "attention_output_bias", "mlp_bias")
"""What a completed configuration says in our words, whatever its family declares."""

_WITHOUT_EFFECT = frozenset({"rope.scaling.finetuned", "tensor_data_layout"})
_AS_HERE = {"attention.causal": True, "rope.scaling.yarn_attn_factor": 1.0}
_FREQUENCIES = "rope_freqs.weight"
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_LENGTH = 1.0, 4.0, 8192


def open_gguf(path: Path) -> GGUFReader:
    """Reads what a file says of itself and where its tensors are, all of which must be there.

    Raises:
        UserError: if it is damaged, or `gguf` is not installed.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError("is a GGUF file, which needs gguf; pip install 'lckv[gguf]'") from error
    try:
        return GGUFReader(path)
    except Exception as error:  # whatever reading a torn file may end in
        raise UserError("is damaged or cut off; get it once more") from error


def complete_config(reader: GGUFReader, values: Mapping[str, Any]) -> dict[str, Any]:
    """Adds what transformers has not read to what it has.

    Args:
        reader: of the file.
        values: a configuration as transformers reads it from there.

    Returns:
        The same with the scaling of the rotary embedding, the window of attention, and which projections have a bias.

    Raises:
        UserError: for a setting that the models here do not have.
    """
    architecture = architecture_of(reader)
    settings = {
        name.removeprefix(f"{architecture}."): _value(field)
        for name, field in reader.fields.items()
        if name.startswith(f"{architecture}.")
    }
    for name, value in settings.items():
        # Files say of what their architecture might have, and they have not, that it is 0 or "none".
        absent = (_AS_HERE[name],) if name in _AS_HERE else (0, "", "none")
        if name not in _READ_BY_TRANSFORMERS | _READ_HERE | _WITHOUT_EFFECT and value not in absent:
            raise UserError(f"says {architecture}.{name}={value}, which the models here do not have")
    head_dim = _head_dim(settings, architecture)
    completed = {**values, **_biases(reader), "head_dim": head_dim}
    theta = float(settings.get("rope.freq_base", 10000.0))
    completed["rope_parameters"] = {"rope_theta": theta, **_scaling(reader, settings, theta, head_dim)}
    completed.pop("rope_theta", None)
    if window := settings.get("attention.sliding_window"):
        if architecture not in ("llama", "mistral"):
            raise UserError(f"says {architecture}.attention.sliding_window={window}, but not of which layers")
        completed |= {"model_type": "mistral", "sliding_window": int(window)}
    return completed


def architecture_of(reader: GGUFReader) -> str:
    """The family of models, in GGUF's words."""
    return str(_value(reader.fields["general.architecture"]))


def _biases(reader: GGUFReader) -> dict[str, bool]:
    """Which projections have one, of which GGUF has no setting."""
    biases = {tensor.name.split(".")[-2] for tensor in reader.tensors if tensor.name.endswith(".bias")}
    return {
        "attention_bias": not biases.isdisjoint(("attn_q", "attn_k", "attn_v")),
        "attention_output_bias": "attn_output" in biases,
        "mlp_bias": not biases.isdisjoint(("ffn_gate", "ffn_up", "ffn_down")),
    }


def _head_dim(settings: Mapping[str, Any], architecture: str) -> int:
    """The width of a head, all of which is to be rotated, and which keys and values are to share."""
    head_dim = int(settings["embedding_length"]) // int(settings["attention.head_count"])
    head_dim = int(settings.get("attention.key_length", head_dim))
    for name in ("rope.dimension_count", "attention.value_length"):
        if settings.get(name, head_dim) != head_dim:
            raise UserError(f"says {architecture}.{name}={settings[name]}; allowed is the width of a head, {head_dim}")
    return head_dim


def _scaling(reader: GGUFReader, settings: Mapping[str, Any], theta: float, head_dim: int) -> dict[str, Any]:
    """How the rotary embedding is stretched, in transformers' words."""
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    factor, extrapolates = _stretch(settings)
    if extrapolates and _FREQUENCIES in tensors:
        raise UserError(f"says rope.scaling.type=yarn and holds {_FREQUENCIES}; allowed is one of them")
    if extrapolates:
        return _yarn(settings, factor)
    divisors = np.ones(head_dim // 2)
    if _FREQUENCIES in tensors:
        divisors = np.array(tensors[_FREQUENCIES].data, dtype=np.float64).flatten()
    return _scaling_by_frequency(divisors * factor, settings, theta)


def _yarn(settings: Mapping[str, Any], factor: float) -> dict[str, Any]:
    betas = {
        name: float(settings[f"rope.scaling.yarn_{name}"])
        for name in ("beta_fast", "beta_slow")
        if f"rope.scaling.yarn_{name}" in settings
    }
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": _original_length(settings),
        # Beyond what the factor implies, which transformers works out by itself.
        "attention_factor": _attention_factor(settings) * (0.1 * math.log(factor) + 1.0),
        **betas,
    }


def _original_length(settings: Mapping[str, Any]) -> int:
    return int(settings.get("rope.scaling.original_context_length") or settings["context_length"])


def _attention_factor(settings: Mapping[str, Any]) -> float:
    return float(settings.get("rope.scaling.attn_factor", 1.0))


def _stretch(settings: Mapping[str, Any]) -> tuple[float, bool]:
    """By what all positions are divided, and whether fast frequencies are left as they are, as in YaRN."""
    kind = settings.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise UserError(f"says rope.scaling.type={kind}; allowed are none, linear, yarn and a tensor {_FREQUENCIES}")
    factor = float(settings.get("rope.scaling.factor", settings.get("rope.scale_linear", 1.0))) or 1.0  # 0: not given
    extrapolation = settings.get("rope.scaling.yarn_ext_factor", -1.0)
    if kind == "none" or factor == 1.0:
        return 1.0, False
    if extrapolation < 0:  # not given
        extrapolation = kind == "yarn"
    if extrapolation not in (0, 1):
        raise UserError(f"says rope.scaling.yarn_ext_factor={extrapolation}; allowed are 0 and 1")
    return factor, bool(extrapolation)


def _scaling_by_frequency(divisors: np.ndarray, settings: Mapping[str, Any], theta: float) -> dict[str, Any]:
    """What divides each of the `(head_dim / 2,)` frequencies: by a formula if it is one's, else as a list."""
    attention = _attention_factor(settings)
    if attention == 1.0 and (formula := _formula(divisors, theta, _original_length(settings))):
        return formula
    return {
        "rope_type": "longrope",
        "short_factor": divisors.tolist(),
        "long_factor": divisors.tolist(),
        "attention_factor": attention,
        "original_max_position_embeddings": int(settings["context_length"]),
    }


def _formula(divisors: np.ndarray, theta: float, length: int) -> dict[str, Any] | None:
    """The scaling that divides the `(head_dim / 2,)` frequencies so, or `None`."""
    factor = float(divisors.max())
    if np.ptp(divisors) == 0:
        return {"rope_type": "default"} if factor == 1.0 else {"rope_type": "linear", "factor": factor}
    for original in {length, _LLAMA3_LENGTH}:
        expected = llama3_divisors(theta, 2 * len(divisors), factor, original)
        if factor > 1 and np.allclose(divisors, expected, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": _LLAMA3_LOW,
                "high_freq_factor": _LLAMA3_HIGH,
                "original_max_position_embeddings": original,
            }
    return None


def llama3_divisors(theta: float, head_dim: int, factor: float, original_length: int) -> np.ndarray:
    """What Llama 3.1's scaling divides each frequency by, `(head_dim / 2,)`.

    Fast frequencies stay, slow ones are divided by `factor`; between a fourth and all of the original length, counted
    in turns, the frequency is a mixture of both.
    """
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = original_length * frequencies / (2 * math.pi)
    kept = np.clip((turns - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW), 0.0, 1.0)
    return 1.0 / ((1.0 - kept) / factor + kept)


def _value(field: ReaderField) -> Any:
    """A number or a text; for a list, that it is one."""
    from gguf import GGUFValueType

    if field.types[0] == GGUFValueType.STRING:
        return bytes(field.parts[-1]).decode()
    return field.parts[-1][0].item() if field.types[0] != GGUFValueType.ARRAY else "a list"
