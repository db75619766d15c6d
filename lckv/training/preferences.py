"""Learning from pairs of a better and a worse answer (DPO; Rafailov et al., NeurIPS 2023), by TRL's trainer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lckv.config.names import PREFERENCES
from lckv.data.packing import IGNORE_INDEX
from lckv.evaluation.perplexity import in_eval_mode, token_losses
from lckv.sharing.iteration import CONVERGE
from lckv.training.trainer import RunMixin
from lckv.utils.console import track


def with_pairs(trainer: Any) -> type[RunMixin]:
    """A trainer of rows of pairs of answers, which tells of the better ones' perplexity beside its own loss."""

    class PreferenceTrainer(trainer):
        """TRL's loss over pairs of answers."""

        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            """The rows are what TRL makes of texts."""
            return dataset

        def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            """TRL's loss, whose metrics get the loss of the better answers, in nats per token."""
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            metrics = self._metrics["train" if self.model.training else "eval"]
            is_better = inputs["completion_mask"].chunk(2)[0]
            num_tokens = self.accelerator.gather(is_better.sum(dim=1)).double().mean().item()
            metrics["loss_labels"].append(-metrics["logps/chosen"][-1] / num_tokens)
            return loss

        def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
            """Adds what the answers' log-probabilities are before training, so that no copy of the model is kept."""
            before = torch.zeros(2, len(dataset), dtype=torch.float64)
            passes: str | None = CONVERGE
            needed = [*range(len(dataset))]
            if name == "train":  # as they pass in training, and none that no step comes to
                passes, needed = None, sorted(set(self.order_of(len(dataset))))
            for places in self._shares(needed, batch_size, f"log-probabilities, {name}"):
                before[:, places] = self._log_probabilities([dataset[place] for place in places], passes)
            better, worse = self._sum_over_processes(before).tolist()
            return dataset.add_column("ref_chosen_logps", better).add_column("ref_rejected_logps", worse)

        def _shares(self, places: list[int], batch_size: int, what: str) -> Iterable[list[int]]:
            """Which of the rows this process looks at, batch by batch."""
            rank, world_size = self.args.process_index, self.args.world_size
            starts = range(rank * batch_size, len(places), world_size * batch_size)
            return track((places[start : start + batch_size] for start in starts), what, len(starts))

        def _log_probabilities(self, rows: list[dict[str, Any]], forward_passes: str | None) -> Tensor:
            """Of the better answers and of the worse ones, `(2, rows)`; `None` for the passes of training."""
            answers = self._prepare_inputs(self._collate_answers(rows))
            with in_eval_mode(self.model, forward_passes), torch.no_grad(), self.accelerator.autocast():
                losses = token_losses(self.model, answers)
            return -losses.double().sum(dim=1).cpu().view(2, -1)

        def _collate_answers(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
            """The better answers, then the worse ones, labelled behind what was asked."""
            batch = self.data_collator(rows)
            labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORE_INDEX)
            return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}

        def collate_eval(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
            """The better answers alone."""
            return {name: values.chunk(2)[0] for name, values in self._collate_answers(rows).items()}

        def further_eval_metrics(self) -> dict[str, float]:
            """The loss of the pairs, the part of them that are ranked right, and by how much, as decoding would."""
            totals, rows = torch.zeros(3, dtype=torch.float64), self.eval_dataset
            for places in self._shares([*range(len(rows))], self.args.per_device_eval_batch_size, "pairs"):
                pairs = [rows[place] for place in places]
                before = torch.tensor(
                    [[pair[f"ref_{name}_logps"] for pair in pairs] for name in ("chosen", "rejected")]
                )
                better, worse = self._log_probabilities(pairs, CONVERGE) - before
                margins = self.beta * (better - worse)
                totals += torch.stack([-F.logsigmoid(margins).sum(), (margins > 0).sum(), margins.sum()])
            means = (self._sum_over_processes(totals) / len(rows)).tolist()
            return dict(zip(PREFERENCES, means, strict=True))

    return PreferenceTrainer
