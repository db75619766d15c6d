"""What llama.cpp can say of layers that read each other's keys and values. No torch.

One of its architectures shares them as models here do: Gemma 4's, where the first layers compute keys and values and
all later ones read the last two of these, by a rule that is no setting. Its MLPs have GELU. Other architectures read
some sharing from a file and then compute something else; nothing is written for them.
"""

from __future__ import annotations

from dataclasses import dataclass

from lckv.errors import UserError
from lckv.sharing.patterns import LayerPlan, SharingPlan, describe_split

SILU = ("silu", "swish")
"""What transformers calls the activation of Llama's MLPs."""

GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
"""What it calls that of Gemma 4's: three ways to compute one function."""

_ALLOWED = (
    "llama.cpp shares keys and values only where the first layers, two or more, compute their own and every later one "
    "reads the last of these, or through a window the last but one"
)


@dataclass(frozen=True)
class Reuse:
    """Who reads whom, in llama.cpp's words.

    Attributes:
        num_owners: the first layers compute keys and values; later ones read them.
        is_sliding: for every layer, whether its window hides anything within the context.
    """

    num_owners: int
    is_sliding: tuple[bool, ...]

    @property
    def num_readers(self) -> int:
        """Layers without keys and values of their own."""
        return len(self.is_sliding) - self.num_owners

    @property
    def is_plain(self) -> bool:
        """Whether every layer reads itself, and all of the context."""
        return not self.num_readers and not any(self.is_sliding)


def find_reuse(plan: SharingPlan, window: int, context_length: int) -> Reuse:
    """How llama.cpp would say a pattern.

    Args:
        plan: the pattern.
        window: tokens that layers with an `s` see.
        context_length: tokens that a text has at most; a window that is no smaller is none.

    Raises:
        UserError: if it cannot, naming the first layer for which it cannot.
    """
    num_owners = next((layer.layer_idx for layer in plan.layers if not layer.reads_itself), None)
    num_owners = plan.num_hidden_layers if num_owners is None else num_owners
    sliding = tuple(layer.is_sliding and window < context_length for layer in plan.layers)
    for layer in plan.layers[num_owners:]:
        _check_reader(layer, num_owners, sliding)
    if num_owners < plan.num_hidden_layers and num_owners < 2:
        raise UserError(f"only layer 0 computes keys and values; {_ALLOWED}")
    return Reuse(num_owners, sliding)


def is_llama(plan: SharingPlan, reuse: Reuse, hidden_act: str, *, approximates_silu: bool) -> bool:
    """Whether llama.cpp's Llama computes what the layers do; else its Gemma 4.

    Args:
        plan: the pattern.
        reuse: the same in llama.cpp's words.
        hidden_act: the activation of the MLPs.
        approximates_silu: whether GELUs may stand for SiLU.

    Raises:
        UserError: if neither does, or the approximation would be for nothing.
    """
    if hidden_act not in SILU + GELU:
        raise UserError(
            f"hidden_act={hidden_act}: llama.cpp has no such MLP here; allowed are {', '.join(SILU + GELU)}"
        )
    has_silu = hidden_act in SILU
    if len(reuse.is_sliding) == 1 and not (has_silu and reuse.is_plain):
        raise UserError("num_hidden_layers=1: llama.cpp has windows and GELU only in models of two layers or more")
    if approximates_silu and not (has_silu and not reuse.is_plain):
        raise UserError("approximate_silu=true: has no effect: llama.cpp computes this model as it is")
    if has_silu and not reuse.is_plain and not approximates_silu:
        raise UserError(
            f"{_first_reason(plan, reuse)}, which llama.cpp has only with hidden_act={GELU[0]}, not {hidden_act}; "
            "approximate_silu=true makes the MLPs three times as wide, with GELUs that come near"
        )
    return has_silu and reuse.is_plain


def _first_reason(plan: SharingPlan, reuse: Reuse) -> str:
    """What the first layer does that a Llama's does not."""
    layer = next(layer for layer in plan.layers if reuse.is_sliding[layer.layer_idx] or not layer.reads_itself)
    return f"layer {layer.layer_idx} " + ("has a window" if layer.reads_itself else f"reads layer {layer.key_source}")


def _check_reader(layer: LayerPlan, num_owners: int, is_sliding: tuple[bool, ...]) -> None:
    """Refuses a layer behind the owners that does not read what llama.cpp would have it read."""
    if layer.is_split:
        raise UserError(f"{describe_split(layer)}, which llama.cpp cannot; {_ALLOWED}")
    source, reader = layer.key_source, f"layer {layer.layer_idx} reads layer {layer.key_source}"
    if layer.is_upward:
        raise UserError(f"{reader}, above it, which llama.cpp cannot; {_ALLOWED}")
    if source == layer.layer_idx:
        raise UserError(f"layer {source} computes keys and values behind a layer that does not; {_ALLOWED}")
    slides = is_sliding[layer.layer_idx]
    allowed = num_owners - 2 if slides else num_owners - 1
    how = "through a window" if slides else "without a window"
    if source != allowed and num_owners > 1:
        raise UserError(f"{reader} {how}, where only layer {allowed} can be read so; {_ALLOWED}")
    # llama.cpp keeps what layers with and without a window read in two caches, by the owner's own window.
    if is_sliding[source] != slides:
        raise UserError(
            f"{reader} {how}, which reads its own {'without' if slides else 'through'} one; "
            "llama.cpp has owners read as their readers do"
        )
