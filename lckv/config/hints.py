"""What can be configured of sharing hints: which layers share, for which agents, of which model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lckv.config.keys import Group, at_least, key, literal, once, one_of
from lckv.errors import UserError, check_choice
from lckv.sharing.costs import DTYPE_BYTES

UPPER, LOWER = DIRECTIONS = ("upper", "lower")
"""Whose keys and values a group of layers reads: its highest layer's, or its lowest's."""

_GROUPS = {"layer_types": (None,)}


@dataclass
class GroupConfig(Group):
    """Which layers of a model share, and for which agents.

    Attributes:
        group_size: so many neighbouring layers share the keys and values of one of them; the last group may be less.
        direction: "upper": of the highest layer of a group; "lower": of the lowest.
        min_layer: the lowest layer that shares.
        max_layer: the highest one; None: that of the model.
        layer_types: a pattern in the place of groups, such as `0_0_2_2`.
        thinking_bypass: whether agents that think are to have the model as it is.
        non_thinking_roles: agents whose layers may share.
        thinking_roles: agents that always have the model as it is.
    """

    group_size: int = key(2, at_least(), only_with=_GROUPS)
    direction: str = key(LOWER, one_of(DIRECTIONS), only_with=_GROUPS)
    min_layer: int = key(0, at_least(0), only_with=_GROUPS)
    max_layer: int | None = key(None, at_least(0), only_with=_GROUPS)
    # Not `str | None`: OmegaConf would silently turn YAML's number 222 into the text "222"; see `overrides`.
    layer_types: Any = None
    thinking_bypass: bool = True
    non_thinking_roles: list[str] = key(
        ["retriever", "router", "classifier", "extractor", "summarizer", "formatter"], once
    )
    thinking_roles: list[str] = key(["planner", "reasoner", "coder", "critic", "judge"], once)

    def check(self, prefix: str) -> None:
        """Refuses a range without layers, and roles that are of both kinds."""
        if self.max_layer is not None and self.max_layer < self.min_layer:
            raise UserError(
                f"{prefix}max_layer={self.max_layer}: is below {prefix}min_layer={self.min_layer}; raise the one, or "
                "lower the other"
            )
        if both := [role for role in self.non_thinking_roles if role in self.thinking_roles]:
            raise UserError(
                f"{prefix}thinking_roles: {both[0]!r} is among {prefix}non_thinking_roles, too; leave it out of one"
            )

    def why_ignored(self, role: str, thinking: bool) -> str | None:
        """Why an agent is to have the model as it is; `None` if layers may share.

        Raises:
            UserError: if there is no such role.
        """
        check_choice("role", role, (*self.non_thinking_roles, *self.thinking_roles))
        if role in self.thinking_roles:
            return f"role={role} is one of thinking_roles"
        return "thinking=true, and thinking_bypass=true" if thinking and self.thinking_bypass else None


@dataclass
class HintsConfig(GroupConfig):
    """Everything that `python -m lckv.hints` needs.

    Attributes:
        role: what the agent does.
        thinking: whether it thinks before it answers.
        model: a run folder, a folder with a model or its `config.json`, a GGUF file, or a name on the Hub.
        revision: only for the Hub: branch, tag or commit.
        num_layers: in the place of a model: how many layers it has.
        context_length: tokens for which bytes are counted; None: as many as the model allows.
        kv_dtype: type of the cache whose bytes are counted; None: the model's.
        sliding_window: tokens of the windows in `layer_types`; None: the model's.
        experimental: whether the vLLM plugin runs with its option of that name, with which it serves layers that read
            upward.
        out: a JSON file for the hint.
    """

    role: str | None = key(None, required="give one, such as role=retriever")
    thinking: bool = False
    model: str | None = literal()
    revision: str | None = None
    num_layers: int | None = key(None, at_least())
    context_length: int | None = key(None, at_least())
    kv_dtype: str | None = key(None, one_of(DTYPE_BYTES))
    sliding_window: int | None = key(None, at_least())
    experimental: bool = False
    out: str | None = literal()

    def check(self, prefix: str) -> None:
        """Refuses a hint for nobody, or for no model."""
        super().check(prefix)
        assert self.role is not None  # checked
        self.why_ignored(self.role, self.thinking)
        if self.model is None and self.num_layers is None and self.layer_types is None:
            raise UserError("model: give one, a folder or a name on the Hub, or num_layers=...")
