"""Bytes that generation takes: those that go into a cache, out of it and into attention, and the most at once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from lckv.cache import KVCache
from lckv.cache.quantization import GroupCodec, Quantized
from lckv.models.attention import LCKVAttention
from lckv.models.parts.sharing_cache import Streams

_WORK = "lckv: work"  # in the trace


class MeteredCodec(GroupCodec):
    """A codec that counts the bytes of what it encodes to and decodes from, and the tokens that it encodes.

    Args:
        codec: what it does.
    """

    encoded_bytes = encoded_tokens = decoded_bytes = 0

    def __init__(self, codec: GroupCodec) -> None:
        super().__init__(codec.bits, codec.group_tokens, codec.group_channels)

    def encode(self, states: torch.Tensor) -> Quantized:
        """Encodes `states` `(batch, num_heads, num_tokens, head_dim)`, and counts."""
        encoded = super().encode(states)
        self.encoded_bytes += sum(tensor.nbytes for tensor in encoded)
        self.encoded_tokens += states.shape[0] * states.shape[2]
        return encoded

    def decode(self, quantized: Quantized, dtype: torch.dtype) -> torch.Tensor:
        """Counts, and decodes to `(batch, num_heads, kv_len, head_dim)`."""
        self.decoded_bytes += sum(tensor.nbytes for tensor in quantized)
        return super().decode(quantized, dtype)

    @property
    def encoded_bytes_per_token(self) -> float:
        """How much a token of all groups so far takes; 0 if there were none."""
        return self.encoded_bytes / max(1, self.encoded_tokens)


class RecordsTraffic(KVCache):
    """To be mixed into a cache class: counts what one sequence's tokens bring into storage, and what is read from it.

    Attributes:
        given_bytes: of the states that `write` was given since `start_step`.
        exact_bytes: of the tokens that a quantising cache returned without decoding them, since `start_step`.
    """

    given_bytes = exact_bytes = 0

    def record_codecs(self) -> None:
        """Lets the layers of a quantising cache count too; before anything is stored."""
        layers: list[Any] = list(self.owners().values())
        for layer in layers:
            if self.quantises:
                layer.codecs = tuple(MeteredCodec(codec) for codec in layer.codecs)

    @property
    def quantises(self) -> bool:
        """Whether old tokens are encoded."""
        return hasattr(self, "quantization")

    def start_step(self) -> None:
        """Counts a new step's bytes from here on."""
        self.given_bytes = self.exact_bytes = 0
        for codec in self._codecs():
            codec.decoded_bytes = 0

    @property
    def written_bytes(self) -> int:
        """Of the step's one token: as it is at first, and as it is once encoded, with its part of the group's.

        A layer that has not encoded anything so far, and may never do so, counts with the former only.
        """
        return self.given_bytes + round(sum(codec.encoded_bytes_per_token for codec in self._codecs()))

    @property
    def stored_bytes_read(self) -> int:
        """Of a quantising cache: what the step's reading decoded, as it is stored, and the tokens kept as they are."""
        return self.exact_bytes + sum(codec.decoded_bytes for codec in self._codecs())

    def write(self, streams: Streams, layer_idx: int) -> Streams:
        """Writes `streams`, each `(batch, num_heads, q_len, head_dim)`, and counts."""
        self.given_bytes += sum(stream.nbytes for stream in streams)
        write = partial(super().write, streams, layer_idx)
        return self._counted(write, layer_idx) if self.quantises else write()

    def peek(self, streams: Streams, layer_idx: int) -> Streams:
        """Peeks, each `(batch, num_heads, kv_len, head_dim)`, and counts all but the new tokens."""
        peek = partial(super().peek, streams, layer_idx)
        return self._counted(peek, layer_idx, num_unstored=streams[0].shape[2]) if self.quantises else peek()

    def _counted(self, read: Callable[[], Streams], layer_idx: int, num_unstored: int = 0) -> Streams:
        """Counts which of the returned tokens were stored as they are: those behind the last group that is old."""
        layer, options = self.owners()[layer_idx], cast(Any, self).quantization
        num_old = (layer.get_seq_length() - options.residual_length) // options.group_size * options.group_size
        _, first = layer.get_mask_sizes(0)
        streams = read()
        num_tokens = streams[0].shape[2]
        # A window may have dropped the first tokens; of the old ones only those behind `first` were decoded.
        num_exact = num_tokens - max(0, num_old - first) - num_unstored
        self.exact_bytes += sum(stream.nbytes for stream in streams) * num_exact // num_tokens
        return streams

    def _codecs(self) -> list[MeteredCodec]:
        layers: list[Any] = list(self.owners().values())
        return [codec for layer in layers for codec in layer.codecs] if self.quantises else []


@contextmanager
def record_reads(model: nn.Module) -> Iterator[Counter[int]]:
    """Counts, by layer, the bytes of keys and values that attention is given inside the `with` block."""
    reads: Counter[int] = Counter()
    layers = [module for module in model.modules() if isinstance(module, LCKVAttention)]
    handles = [layer.register_forward_pre_hook(partial(_count_reads, reads), with_kwargs=True) for layer in layers]
    try:
        yield reads
    finally:
        for handle in handles:
            handle.remove()


def _count_reads(reads: Counter[int], module: LCKVAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook of an attention layer.

    A layer that hides each query's own token by shifting keys against queries leaves out the last key, so that one
    does not count. Keys that only a mask hides do: they are read.
    """
    _, streams, visible_keys, *_ = args
    if streams is not None:
        num_keys = streams[0].shape[2]
        num_bytes = sum(stream.nbytes for stream in streams)
        reads[module.layer_idx] += num_bytes * (num_keys - visible_keys.drop_own_token) // num_keys


def peak_bytes(work: Callable[[Any], Any], device: torch.device, prepare: Callable[[], Any] = lambda: None) -> int:
    """The most bytes that torch's allocator had handed out at once during `work`, beyond those before `prepare`.

    On a GPU it is what CUDA's caching allocator counts. On a CPU torch's profiler records every allocation of tensors,
    those inside kernels among them, but not the scratch memory of BLAS libraries. Unlike the resident size of the
    process, which never shrinks, it belongs to `work` alone, and is nearly always the same.

    Args:
        work: gets what `prepare` returns.
        device: where it runs.
        prepare: makes what `work` begins with; counts as long as it lives, but its own peak does not.
    """
    if device.type == "cuda":
        return _peak_on_gpu(work, device, prepare)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        prepared = prepare()
        with record_function(_WORK):
            work(prepared)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return _peak_of_trace(json.loads(path.read_text(encoding="utf-8"))["traceEvents"])


def _peak_on_gpu(work: Callable[[Any], Any], device: torch.device, prepare: Callable[[], Any]) -> int:
    before = torch.cuda.memory_allocated(device)
    prepared = prepare()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    work(prepared)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_of_trace(events: list[dict[str, Any]]) -> int:
    """The highest sum of the bytes taken and given back so far, from the beginning of the work on."""
    start = min(event["ts"] for event in events if event.get("name") == _WORK)
    memory = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    total = peak = 0
    for event in memory:
        before, total = total, total + event["args"]["Bytes"]
        if event["ts"] >= start:
            peak = max(peak, before, total)
    return peak
