"""What can be configured of pretrained models: which one a training starts from, and which one it learns from."""

from __future__ import annotations

from dataclasses import dataclass

from lckv.config.keys import Group, above_zero, at_least, is_named, key, not_negative, one_of
from lckv.config.names import DTYPES, LOSS_PARTS, METHODS
from lckv.errors import UserError


@dataclass
class CalibrationConfig(Group):
    """What conversion methods that look at text do with it.

    Attributes:
        calibration_tokens: so many tokens of the training split; 0 with latents: none, which is far worse.
        ridge: the penalty on large weights, relative to the mean square of what they multiply.
    """

    calibration_tokens: int = key(32768, at_least(0))
    ridge: float = key(1e-2, above_zero)


@dataclass
class InitConfig(CalibrationConfig):
    """What a model's weights are before training; without a source, random.

    Attributes:
        source: a pretrained model that brings sizes, weights and tokenizer: a run folder, a folder, a GGUF file, or a
            name on the Hub.
        revision: only for the Hub: branch, tag or commit.
        method: how keys and values that layers are to share come from those that each computes in the source.
    """

    source: str | None = key(None, is_named)
    revision: str | None = None
    method: str = key("average", one_of(METHODS))


@dataclass
class TeacherConfig(Group):
    """A model to learn from. The loss is the weighted sum of four parts, each a mean over the predicted tokens.

    Attributes:
        source: a run folder of `lckv.train`, a folder with a model, a GGUF file, or a name on the Hub; its tokens must
            be the trained model's. None: no teacher, the usual loss.
        revision: only for the Hub: branch, tag or commit.
        logits_weight: of the divergence of the model's next-token distributions from the teacher's.
        attention_weight: of the squared distance of each layer's attention output (projection included) from that of
            the teacher's same layer, relative to its mean square and averaged over layers; needs as many layers of the
            same size, and leaves out those in which the teacher's attention writes nothing.
        reconstruction_weight: of the squared distance of the keys and values that layers make of latents from those
            that the teacher's projections make of the same inputs, relative to these and averaged over layers, keys
            and values; only for models that keep latents.
        labels_weight: of the usual loss, the cross entropy with the text.
        temperature: what both models' logits are divided by in the divergence, which is multiplied by its square.
        dtype: "float32", "bfloat16" or "float16"; "auto": as the teacher was saved.
    """

    source: str | None = key(None, is_named)
    revision: str | None = None
    logits_weight: float = key(1.0, not_negative)
    attention_weight: float = key(1.0, not_negative)
    reconstruction_weight: float = key(0.0, not_negative)
    labels_weight: float = key(0.0, not_negative)
    temperature: float = key(1.0, above_zero)
    dtype: str = key("auto", one_of(("auto", *DTYPES)))

    @property
    def weights(self) -> dict[str, float]:
        """The parts of the loss that have a weight, by name."""
        weights = {name: getattr(self, f"{name}_weight") for name in LOSS_PARTS}
        return {name: weight for name, weight in weights.items() if weight}

    def check(self, prefix: str) -> None:
        """Refuses a loss of which nothing is left."""
        if not self.weights:
            keys = ", ".join(f"{prefix}{name}_weight" for name in LOSS_PARTS)
            raise UserError(f"{keys}: are all 0, so there is nothing to train for")
