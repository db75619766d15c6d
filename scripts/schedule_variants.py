"""Other ways to make the passes of training cheap, judged by exact evaluation as in `schedules.py`.

    python scripts/schedule_variants.py --output FIGURES.json [--variants NAME ...]

Each is a schedule and what is changed of it; `scripts/schedules.py` says how schedules are written and what is
measured. A model that `--output` has is not trained again.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
from schedules import Learner, Row, prepare, table, train
from ways import read_arguments, show

from lckv.models import LCKVLlamaForCausalLM
from lckv.models.stack import Stack, States, Turn
from lckv.sharing.patterns import Segment
from lckv.utils.console import track
from lckv.utils.storage import write_json

Batch = dict[str, torch.Tensor]


class Scheduled(Learner):
    """The passes depend on the step."""

    def __init__(self, model: LCKVLlamaForCausalLM, choose: Callable[[float], dict[str, Any]]) -> None:
        super().__init__(model)
        self.choose = choose

    def backward(self, batch: Batch, progress: float) -> None:
        """As the choice says."""
        self.learn(batch, **self.choose(progress))


class Weighted(Learner):
    """The loss of fewer passes has a part in it, a third of that of all."""

    def backward(self, batch: Batch, progress: float) -> None:
        """Both one after the other, which costs as much as it takes."""
        super().backward(batch, progress)
        (self.model(**batch, forward_passes=0).loss / 3).backward()  # which `num_passes` does not count


class WithStack(Learner):
    """The layers are run otherwise while training; exact evaluation runs them as ever."""

    stack_class: type[Stack]

    def backward(self, batch: Batch, progress: float) -> None:
        """Through a stack of this class."""
        with self.training_stack():
            super().backward(batch, progress)

    @contextmanager
    def training_stack(self) -> Iterator[None]:
        """Exchanges the model's stack for a while."""
        self.model.model.stack_class = self.stack_class
        try:
            yield
        finally:
            del self.model.model.stack_class


class LowTypeStack(Stack):
    """Passes without gradient compute in bfloat16."""

    def _run_pass(self, cycle: Segment, hidden_states: torch.Tensor, states: States, *others: Any) -> States:
        before, is_first, *turns = others
        if torch.is_grad_enabled():
            return super()._run_pass(cycle, hidden_states, states, before, is_first, *turns)
        low, dtype = torch.bfloat16, hidden_states.dtype
        with torch.autocast(hidden_states.device.type, low):
            drafts = super()._run_pass(cycle, hidden_states.to(low), cast(states, low), cast(before, low), is_first)
        return cast(drafts, dtype)


class LowType(WithStack):
    """Passes without gradient compute in bfloat16."""

    stack_class = LowTypeStack


class GuessedStack(Stack):
    """In the first pass, readers find the owners' projections of what enters the cycle, in the place of nothing."""

    def guess(self, owner: int, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What an owner might write."""
        layer: Any = self.layers[owner]
        embeddings = self.position_embeddings[layer.key_label]
        return layer.write(layer.input_layernorm(hidden_states), embeddings, None)

    def _run_pass(self, cycle: Segment, hidden_states: torch.Tensor, states: States, *others: Any) -> States:
        before, is_first, *turns = others
        if is_first:
            before = {owner: self.guess(owner, hidden_states) for owner in before}
        return super()._run_pass(cycle, hidden_states, states, before, False, *turns)


class Guessed(WithStack):
    """The first pass reads a guess."""

    stack_class = GuessedStack


class LearnedGuess(WithStack):
    """The first pass reads a linear guess, fitted to what the last pass writes, and thrown away at the end."""

    def __init__(self, model: LCKVLlamaForCausalLM) -> None:
        super().__init__(model)
        config, plan = model.config, model.config.sharing_plan
        owners = {layer.key_source for layer in plan.layers if layer.key_source > layer.layer_idx}
        sizes = {owner: sum(stream.size for stream in config.kv_layout.streams[owner]) for owner in owners}
        self.guesses = {owner: torch.nn.Linear(config.hidden_size, size) for owner, size in sizes.items()}
        for guess in self.guesses.values():
            torch.nn.init.zeros_(guess.weight)
        learner = self

        class LearnedStack(GuessedStack):
            def guess(self, owner: int, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
                layer: Any = self.layers[owner]
                made = learner.guesses[owner](layer.input_layernorm(hidden_states).detach())
                by_head = made.unflatten(-1, (2, config.num_key_value_heads, -1)).movedim(-3, 0).transpose(2, 3)
                learner.made[owner] = tuple(by_head)
                return tuple(by_head.detach())

            def _leave(
                self, cycle: Segment, turns: list[Turn], states: States, drafts: States
            ) -> tuple[torch.Tensor, States]:
                learner.written = drafts
                return super()._leave(cycle, turns, states, drafts)

        self.stack_class = LearnedStack
        self.made: States = {}
        self.written: States = {}

    def parameters(self) -> list[torch.nn.Parameter]:
        """The guesses' too."""
        return super().parameters() + [weight for guess in self.guesses.values() for weight in guess.parameters()]

    def backward(self, batch: Batch, progress: float) -> None:
        """The guesses learn what has been written, relative to its size; no gradient of theirs reaches the model."""
        super().backward(batch, progress)
        for owner, made in self.made.items():
            for part, target in zip(made, self.written[owner], strict=True):
                target = target.detach()
                ((part - target).square().mean() / target.square().mean()).backward(retain_graph=True)


class Implicit(WithStack):
    """One graded pass in the place of two: the gradient of what it reads goes through it once more.

    At the fixed point, the pass that reads `z` is the one that has written it, so that the gradient with respect to
    `z` may enter the same graph where `z` came out of it: two terms of the Neumann series, as two graded passes have,
    with the activations of one.
    """

    def __init__(self, model: LCKVLlamaForCausalLM) -> None:
        super().__init__(model)
        model.config.backward_passes, learner = 1, self

        class ImplicitStack(Stack):
            def _run_pass(self, cycle: Segment, hidden_states: torch.Tensor, states: States, *others: Any) -> States:
                before, is_first, *turns = others
                if torch.is_grad_enabled():
                    before = {
                        owner: tuple(stream.detach().requires_grad_() for stream in streams)
                        for owner, streams in before.items()
                    }
                drafts = super()._run_pass(cycle, hidden_states, states, before, is_first, *turns)
                if torch.is_grad_enabled():
                    learner.read, learner.written = before, drafts
                return drafts

        self.stack_class = ImplicitStack
        self.read: States = {}
        self.written: States = {}

    def backward(self, batch: Batch, progress: float) -> None:
        """Through the graph, and once more from what was read."""
        with self.training_stack():
            self.learn(batch, retain_graph=True)
        for owner, streams in self.read.items():
            written = self.written[owner]
            torch.autograd.backward(written, [read.grad for read in streams], retain_graph=True)
        self.read, self.written = {}, {}


def cast(states: States, dtype: torch.dtype) -> States:
    """The same streams in another type."""
    return {owner: tuple(stream.to(dtype) for stream in streams) for owner, streams in states.items()}


def at_random(most: int) -> Callable[[float], dict[str, Any]]:
    """So many ungraded passes at most, drawn anew for each step."""
    draw = random.Random(0)
    return lambda progress: {"forward_passes": draw.randint(0, most)}


VARIANTS: dict[str, tuple[str, Callable[[LCKVLlamaForCausalLM], Learner]]] = {
    "1+1x4": ("1+1x4", Learner),
    "0+1x4": ("0+1x4", Learner),
    "0+1x4, guess": ("0+1x4", Guessed),
    "0+1x4, learned guess": ("0+1x4", LearnedGuess),
    "1+1x4, bf16": ("1+1x4", LowType),
    "1+1x4, 0 to 2 at random": ("1+1x4", lambda model: Scheduled(model, at_random(2))),
    "1+1x4, none in the first half": (
        "1+1x4",
        lambda model: Scheduled(model, lambda progress: {"forward_passes": int(progress > 0.5)}),
    ),
    "1+1x4, by need": (
        "1+1x4",
        lambda model: Scheduled(model, lambda _: {"forward_passes": "converge", "converge_tolerance": 0.02}),
    ),
    "1+1x4, weighted": ("1+1x4", Weighted),
    "7+2": ("7+2", Learner),
    "8+1, implicit": ("8+2", Implicit),
}


def main() -> None:
    """Trains what is missing, and prints the table."""
    sizes = {"hidden_size": 128, "batch_size": 2, "length": 256, "vocab_size": 2048, "steps": 300, "num_heldout": 24}
    run = {"learning_rate": 3e-3, "seeds": (0, 1, 2), "variants": tuple(VARIANTS), "pattern": "0_6_6_6_6_6_6_7"}
    arguments = read_arguments(__doc__, **sizes, **run, text=("",))
    arguments.text = [path for path in arguments.text if path]
    output = Path(arguments.output)
    rows: list[Row] = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else []
    done = {(row["schedule"], row["seed"]) for row in rows}
    missing = [each for each in product(arguments.seeds, arguments.variants) if each[::-1] not in done]
    data = prepare(arguments)
    for seed, name in track(missing, "models", len(missing)):
        schedule, new_learner = VARIANTS[name]
        rows.append(train(arguments, data, arguments.pattern, schedule, seed, new_learner) | {"schedule": name})
        write_json(output, rows)
    show(table(rows))


if __name__ == "__main__":
    main()
