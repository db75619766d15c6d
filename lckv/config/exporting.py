"""What can be configured of exports."""

from __future__ import annotations

from dataclasses import dataclass

from lckv.config.keys import MODEL_REQUIRED, Group, key, literal, one_of
from lckv.config.names import DTYPES, FORMATS, GGUF, HUB
from lckv.utils.byte_sizes import parse_bytes

_GGUF, _HUB = {"format": (GGUF,)}, {"format": (HUB,)}


@dataclass
class ExportConfig(Group):
    """Everything that `python -m lckv.export` needs.

    Attributes:
        format: "gguf", a file for llama.cpp; "hub", a folder that transformers loads where this package is not.
        model: a run folder of `lckv.train`, a folder with a model and its tokenizer, a GGUF file, or a name on the
            Hub; the models are ours, or Llamas.
        revision: only for the Hub: branch, tag or commit.
        out: the file or folder to write; it must not be there yet.
        push: with "hub": the repository on the Hub, OWNER/NAME, to which the folder is uploaded once it is written.
        max_shard_size: with "hub": bytes of a file of weights, such as `5GB`.
        dtype: with "gguf": of matrices; "auto": as the model was saved.
        verify: with "gguf": whether llama.cpp runs the file and its logits are compared before the file appears; None:
            where it is installed.
        approximate_silu: with "gguf": whether MLPs become three times as wide, with GELUs in the place of SiLU, where
            llama.cpp shares keys and values with no other activation.
    """

    format: str | None = key(None, one_of(FORMATS), required="give one: format=gguf or format=hub")
    model: str | None = literal(required=MODEL_REQUIRED)
    revision: str | None = None
    out: str | None = literal(required="give one: out=FILE.gguf with format=gguf, out=FOLDER with format=hub")
    push: str | None = literal(only_with=_HUB)
    max_shard_size: str = key("5GB", lambda name, value: parse_bytes(value, name), only_with=_HUB)
    dtype: str = key("auto", one_of(("auto", *DTYPES)), only_with=_GGUF)
    verify: bool | None = key(None, only_with=_GGUF)
    approximate_silu: bool = key(False, only_with=_GGUF)
