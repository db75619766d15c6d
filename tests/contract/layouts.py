"""Layouts in which owners keep something else than a key and a value of equal width, and what reads them.

A case has a configuration whose `kv_layout` is its own, and a small attention that says what its streams are for.
Tests drive caches with random streams of these shapes; a model whose layers write and read them can take that place.
"""

from dataclasses import dataclass

import torch

from lckv.layout import Stream, StreamSource, build_layout
from lckv.models.configuration_lckv import LCKVLlamaConfig
from tests.reference import tiny_config

NUM_QUERY_HEADS = 4
KEYS, VALUES = Stream("keys", 2, 8, is_rotated=True), Stream("values", 2, 8)  # rotated as the tiny model rotates
LATENT, ROTATED_KEY = Stream("latent", 1, 96), Stream("rotated_key", 1, 8, is_rotated=True)
WIDE_VALUES = Stream("values", 4, 16)


@dataclass(frozen=True)
class Case:
    """What the owners of a pattern keep, and who reads what.

    Attributes:
        layer_types: the pattern, whose owners are those of `streams`.
        streams: by owner.
        sources: by layer, pairs of an owner and an index; by default all streams of the owner in the pattern.
    """

    layer_types: str
    streams: dict
    sources: tuple = ()

    def config(self, **kwargs):
        """A configuration of a tiny model with this layout."""
        case = self

        class Config(LCKVLlamaConfig):
            """The layout in place of that of plain attention."""

            @property
            def kv_layout(self):
                return case.layout(self.sharing_plan, self.sliding_window)

        return Config.from_dict(tiny_config(self.layer_types, **kwargs).to_dict())

    def layout(self, plan, sliding_window):
        """The layout."""
        sources = self.sources or [
            [(owner, index) for index in range(len(self.streams[owner]))] for owner in plan.kv_source
        ]
        return build_layout(
            self.streams,
            [[StreamSource(*source) for source in read] for read in sources],
            [layer.is_sliding for layer in plan.layers],
            sliding_window,
        )


CASES = {
    # one latent that is both key and value
    "latent": Case("0_1s_1s_0", {0: (LATENT,), 1: (LATENT,)}),
    # a latent, and what has to be rotated beside it
    "latent and key": Case("0s_1s_2_2", dict.fromkeys((0, 1, 2), (LATENT, ROTATED_KEY))),
    # keys and values of unequal heads and widths; layer 1 reads the keys of one owner and the values of another
    "crossed": Case(
        "0_0_2_2",
        {0: (KEYS, VALUES), 2: (KEYS, WIDE_VALUES)},
        (((0, 0), (0, 1)), ((0, 0), (2, 1)), ((2, 0), (2, 1)), ((2, 0), (2, 1))),
    ),
    # owners that keep only one of the two, with a window
    "split": Case("0s_1s_1s", {0: (KEYS,), 1: (WIDE_VALUES,)}, (((0, 0), (1, 0)),) * 3),
}


def attend(queries, streams, is_visible):
    """A plain attention over what a reader is given: the first stream but the last has keys, the last values.

    A single stream is both. Where there are two of one head each, both take part in the keys.

    Args:
        queries: `(batch, num_query_heads, q_len, width of all keys)`.
        streams: each `(batch, num_heads, kv_len, head_dim)`.
        is_visible: `(q_len, kv_len)`.

    Returns:
        `(batch, num_query_heads, q_len, head_dim of the values)`.
    """
    is_latent = streams[0].shape[1] == 1
    keys, values = (torch.cat(streams, dim=-1), streams[0]) if is_latent else streams
    keys, values = (
        states.repeat_interleave(NUM_QUERY_HEADS // states.shape[1], dim=1).float() for states in (keys, values)
    )
    scores = queries @ keys.transpose(2, 3) / keys.shape[-1] ** 0.5
    return scores.masked_fill(~is_visible, -torch.inf).softmax(dim=-1) @ values


def key_width(streams):
    """The width that `attend` needs of queries."""
    return sum(states.shape[-1] for states in streams) if streams[0].shape[1] == 1 else streams[0].shape[-1]
