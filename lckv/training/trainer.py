"""transformers' `Trainer` with a data order of its own, whole checkpoints, and a loss that must be finite."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from lckv.errors import UserError
from lckv.evaluation.perplexity import Blocks, evaluate_perplexity
from lckv.sharing.iteration import CONVERGE
from lckv.sharing.patterns import parse_layer_types
from lckv.sharing.random_sharing import RandomSharing
from lckv.training.checkpoints import CheckpointFolder, saving
from lckv.training.optim import metrics_of
from lckv.utils.storage import new_file, new_folder


@dataclass(eq=False)
class TrainingOrder(Sampler[int]):
    """Yields the block indices of a whole run, epoch after epoch, each epoch in an order of its own.

    One sequence for the run, in place of one per epoch, leaves no short batch where an epoch ends. So the blocks of
    optimizer step *n* are always number `n * global_batch_size` to `(n + 1) * global_batch_size - 1`, however many
    processes and accumulation steps share them and wherever the run was interrupted.

    Args:
        num_blocks: number of blocks in the training data.
        num_samples: number of indices to yield, steps times global batch size.
        seed: seed of the shuffling.
    """

    num_blocks: int
    num_samples: int
    seed: int

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        for epoch, start in enumerate(range(0, self.num_samples, self.num_blocks)):
            # A generator of its own: the order neither depends on nor moves the global random state (dropout). The
            # factor is beyond any number of epochs, so that no seed's epoch is another seed's later one.
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            yield from torch.randperm(self.num_blocks, generator=generator).tolist()[: self.num_samples - start]


if TYPE_CHECKING:
    _AnyTrainer = Trainer
else:
    _AnyTrainer = object


class RunMixin(_AnyTrainer):
    """What a run asks of a trainer, be it transformers' own or one of another library that derives from it.

    The blocks of a step depend on the seed alone, not on how processes and accumulation share them; a checkpoint is
    whole or absent; a loss that is not finite stops the run; evaluation weights every token alike; and how far the
    keys and values of a cycle still move is measured at logging steps.

    Args:
        model: the model.
        args: built by [`build_training_arguments`].
        eval_num_bytes: UTF-8 bytes of the text that the blocks of `eval_dataset` predict.
        build_optimizer: makes the optimizer for a model.
        checkpoints: where checkpoints go.
        periods: log every so many steps, beside what `args` says about logging.
        random_sharing: draws for every step whom the model's layers read; `None`: as they do in the model.
        **kwargs: further arguments of `Trainer`: `train_dataset` and `eval_dataset`, blocks each; `processing_class`,
            the tokenizer, which is saved with the model; and `data_collator`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        eval_num_bytes: int | None,
        build_optimizer: Callable[[nn.Module], Optimizer],
        checkpoints: CheckpointFolder,
        periods: Sequence[int | None] = (),
        random_sharing: RandomSharing | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args=args, **kwargs)
        self.order = self.order_of(len(cast(Blocks, self.train_dataset)))
        self.on_eval_batch: Callable[[int, int], None] | None = None
        self._eval_num_bytes = eval_num_bytes
        self._build_optimizer = build_optimizer
        self._checkpoints = checkpoints
        self._periods = periods
        self._optimizer_metrics: Callable[[], dict[str, float]] = dict
        self._random_sharing = random_sharing
        self._num_owners: list[int] = []
        self._residuals: list[Tensor] = []
        self._window: list[tuple[dict[str, Any], Tensor]] = []  # micro batches of this step and their losses
        self._config = model.config
        plan = getattr(model.config, "sharing_plan", None)  # models of other families have none
        self._has_residual = plan is not None and plan.has_cycles
        if self._has_residual:
            # At the decoder: not every trainer hands on all that it returns. Adapters stand around the whole model.
            own = cast(PreTrainedModel, getattr(model, "get_base_model", lambda: model)())
            own.base_model.register_forward_hook(lambda module, args, outputs: self._keep_residual(outputs))

    @property
    def global_batch_size(self) -> int:
        """Blocks per optimizer step."""
        args = self.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size

    def order_of(self, num_blocks: int) -> TrainingOrder:
        """In which order a run trains on so many blocks."""
        return TrainingOrder(num_blocks, self.args.max_steps * self.global_batch_size, self.args.seed)

    @property
    def is_sharded(self) -> bool:
        """Whether no process has the whole model."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    @property
    def eval_forward_passes(self) -> int | str | None:
        """Passes over cycles in evaluation: as many as make it exact, where processes need not pass equally often."""
        return getattr(self._config, "forward_passes", None) if self.is_sharded else CONVERGE

    # What transformers' loop asks for.

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        return self.order

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Builds the optimizer once."""
        if self.optimizer is None:
            self.optimizer = self._build_optimizer(cast(nn.Module, self.model if model is None else model))
            self._optimizer_metrics = partial(metrics_of, self.optimizer)
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Computes loss and gradients of one micro batch; with the last one of a step, looks at the losses of all.

        Raises:
            UserError: if a loss is not finite; the optimizer has not used its gradients.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        # Looking at each loss at once would make the host wait for the device at every micro batch.
        self._window.append((inputs, loss.detach()))
        if self.accelerator.sync_gradients:
            self._check_losses()
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Computes the loss; the model is told the step's pattern, and to tell the residual where it is logged."""
        inputs = inputs | self.step_arguments(model)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def step_arguments(self, model: nn.Module) -> dict[str, Any]:
        """What the model is told beside the batch: the step's pattern, and to return the residual where it is wanted.

        All micro batches of a step, in all processes, are told the same.
        """
        step, state = self.state.global_step + 1, self.state
        arguments: dict[str, Any] = {}
        if self._random_sharing is not None:
            arguments["layer_types"] = self._random_sharing.layer_types(step)
            self._num_owners.append(len(parse_layer_types(arguments["layer_types"]).kv_owners))
        every = (state.logging_steps, state.save_steps, state.eval_steps, *self._periods)
        is_logged = step >= state.max_steps or any(steps and step % steps == 0 for steps in every)
        if self._has_residual and model.training and is_logged:
            arguments["output_kv_residual"] = True
        return arguments

    def _keep_residual(self, outputs: Any) -> None:
        if outputs.kv_residual is not None:
            self._residuals.append(outputs.kv_residual.detach().float())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the residual, and what there is to say of pattern and optimizer, to the training metrics."""
        if "loss" in logs:
            logs |= self._optimizer_metrics()
        if "loss" in logs and self._residuals:
            residual = torch.stack(self._residuals).mean()
            logs["kv_residual"] = self.accelerator.reduce(residual, "mean").item()
        if "loss" in logs and self._num_owners:
            logs["kv_owners"] = sum(self._num_owners) / len(self._num_owners)
        self._residuals.clear()
        self._num_owners.clear()
        super().log(logs, start_time)

    def evaluate(self, ignore_keys: list[str] | None = None) -> dict[str, float]:  # type: ignore[override]
        """Measures loss, perplexity and bits per byte, every token weighted alike, and logs them."""
        result = evaluate_perplexity(
            # Sharded models can only be called through their wrapper, by all processes together.
            cast(nn.Module, self.model_wrapped if self.is_sharded else self.model),
            cast(Blocks, self.eval_dataset),
            batch_size=self.args.per_device_eval_batch_size,
            num_bytes=self._eval_num_bytes,
            collate=self.collate_eval,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            reduce_sum=self._sum_over_processes,
            on_batch=self.on_eval_batch,
            forward_passes=self.eval_forward_passes,
        )
        metrics = {"eval_loss": result.loss, "eval_perplexity": result.perplexity}
        if result.bits_per_byte is not None:
            metrics["eval_bits_per_byte"] = result.bits_per_byte
        metrics |= self.further_eval_metrics()
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def collate_eval(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Makes a batch of rows of `eval_dataset`, whose `labels` are what perplexity is measured on."""
        return self.data_collator(rows)

    def further_eval_metrics(self) -> dict[str, float]:
        """What is measured in an evaluation beside perplexity."""
        return {}

    def _sum_over_processes(self, totals: Tensor) -> Tensor:
        if self.args.world_size == 1:
            return totals
        return self.accelerator.reduce(totals.to(self.args.device), "sum").cpu()

    # Checkpoints.

    def _get_output_dir(self, trial: Any) -> str:
        # Where `_save_checkpoint` puts `checkpoint-<step>`, and where it would rotate.
        return str(self._checkpoints.staging(self.state.global_step))

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Saves a checkpoint aside, and puts it in its place when every process has written its part.

        Raises:
            UserError: if the weights are not finite, or writing fails; earlier checkpoints stay as they are.
        """
        step = self.state.global_step
        for name, parameter in model.named_parameters():
            if not torch.isfinite(parameter.detach()).all():
                raise UserError(
                    f"step {step}: the weights of {name} are not finite although the loss was, so nothing was saved; "
                    f"{self._advice()}"
                )
        staging = self._checkpoints.staging(step)
        latest = self._checkpoints.latest()
        kept = f"{latest.name} is intact" if latest else "there is no earlier checkpoint"
        again = "go on from it" if latest else "start again"
        remedy = f"{kept}: make room and run the same command to {again}"
        with saving(f"the checkpoint of step {step}", staging.parent, remedy):
            try:
                if self.args.should_save:
                    shutil.rmtree(staging, ignore_errors=True)
                    staging.mkdir(parents=True)
                self.accelerator.wait_for_everyone()
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    self._checkpoints.publish(step, staging / f"checkpoint-{step}")
            except Exception:
                shutil.rmtree(staging, ignore_errors=True)
                raise
        self.accelerator.wait_for_everyone()

    def save_final(self, path: Path) -> None:
        """Saves the model and its tokenizer for `from_pretrained`, whole or not at all.

        Raises:
            UserError: if writing fails.
        """
        state_dict = self.accelerator.get_state_dict(self.model_wrapped)  # gathered, if processes have parts of it
        if not self.args.should_save:
            return
        model = self.accelerator.unwrap_model(self.model)
        model.config.use_cache = True  # off in training; whoever loads the model wants to generate
        remedy = "make room and run the same command: training is not repeated"
        with saving("the trained model", path.parent, remedy), new_folder(path, replaces=True) as folder:
            model.save_pretrained(folder, state_dict=state_dict)
            cast(PreTrainedTokenizerBase, self.processing_class).save_pretrained(folder)

    # What must not happen.

    def _check_losses(self) -> None:
        """Stops at the first loss of the step that is not finite; the one wait for the device per step."""
        window, self._window = self._window, []
        is_finite = torch.isfinite(torch.stack([loss for _, loss in window])).tolist()
        if not all(is_finite):
            number = is_finite.index(False)
            inputs, loss = window[number]
            self._stop_at(number, inputs, loss.item())

    def _stop_at(self, number: int, inputs: dict[str, Any], loss: float) -> None:
        """Writes the batch of a loss that is not finite, the step's micro batch `number`, to a file, and stops."""
        step = self.state.global_step + 1
        size = self.args.per_device_train_batch_size
        start = self.state.global_step * self.global_batch_size
        start += (number * self.args.world_size + self.args.process_index) * size
        indices = list(islice(self.order, start, start + size))
        dump = self._checkpoints.path.parent / f"nonfinite_step{step}_rank{self.args.process_index}.pt"
        tensors = {name: value.cpu() for name, value in inputs.items() if torch.is_tensor(value)}
        with new_file(dump) as file:
            torch.save({"step": step, "loss": loss, "block_indices": indices, "batch": tensors}, file)
        tokenizer = cast(PreTrainedTokenizerBase, self.processing_class)
        text = str(tokenizer.decode(tensors["input_ids"][0, :24], skip_special_tokens=True))
        shown = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
        raise UserError(
            f"step {step}: the loss is {loss} on training blocks {shown}, the first beginning "
            f"{' '.join(text.split())[:60]!r}; the batch is in {dump}, and the "
            f"checkpoints are untouched; {self._advice()}"
        )

    def _advice(self) -> str:
        latest = self._checkpoints.latest()
        tries = [f"a lower optim.learning_rate (now {self.args.learning_rate:g})", "a longer optim.warmup_steps"]
        if self.args.fp16:
            tries.insert(0, "trainer.precision=bf16 in place of fp16")
        elif self.args.bf16:
            tries.append("trainer.precision=fp32")
        norm = self.args.max_grad_norm
        tries.append(f"a smaller trainer.max_grad_norm (now {norm:g})" if norm else "trainer.max_grad_norm=1")
        return f"try {', '.join(tries)}, with another run_dir=... (last whole checkpoint: {latest or 'none'})"


class LCKVTrainer(RunMixin, Trainer):
    """Trains a causal language model on blocks of tokens by transformers' own loop."""
