"""One training session: from built parts to results, going on from the last whole checkpoint if there is one."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainingArguments

from lckv.config import RunConfig, SFTConfig, TrainConfig
from lckv.config.model_arguments import random_sharing
from lckv.config.names import PREFERENCES, RIEMANNIAN
from lckv.data.dataset import RunData, TokenizedData, collate
from lckv.data.readers import join_line_ends
from lckv.errors import UserError
from lckv.evaluation.model_costs import costs_of, sharing_plan_of
from lckv.sharing.patterns import advice_on
from lckv.training import callbacks as ours
from lckv.training.acceleration import compile_layers, use_liger_kernels
from lckv.training.checkpoints import num_processes_of, step_of
from lckv.training.distillation import DistillationTrainer, check_teacher_fits
from lckv.training.loggers import LOGGERS
from lckv.training.loss_plot import plot_loss
from lckv.training.optim import build_optimizer, freeze_all_but, trainable_parameters
from lckv.training.run_folder import RunFolder
from lckv.training.run_summary import build_results
from lckv.training.stiefel import orthonormalize
from lckv.training.trainer import LCKVTrainer, RunMixin
from lckv.utils.storage import write_json

logger = logging.getLogger(__name__)


def check_can_shard(cfg: RunConfig, model: PreTrainedModel) -> None:
    """Checks what cannot be done while processes hold parts of one model.

    Raises:
        UserError: if each would pass over a cycle until its own batch has converged, and wait for the others' parts
            for ever; if projections are looked at outside of the model's calls; or if evaluations are to be made, of
            a model that no process has as a whole.
    """
    config = model.config
    iterates = getattr(config, "forward_passes", 0) == "converge" and not config.use_sequential
    if iterates and sharing_plan_of(model).has_cycles:
        raise UserError(
            "model.forward_passes=converge: processes would need different numbers of passes, which FSDP and "
            "DeepSpeed do not allow; give a number, such as model.forward_passes=7"
        )
    needs_projections = {f"optim.name={cfg.optim.name}": cfg.optim.name == RIEMANNIAN}
    if isinstance(cfg, SFTConfig):
        needs_projections["lora"] = cfg.lora.is_used
    if isinstance(cfg, TrainConfig):
        weight = cfg.teacher.reconstruction_weight
        needs_projections[f"teacher.reconstruction_weight={weight}"] = cfg.has_teacher and bool(weight)
    for given, is_given in needs_projections.items():
        if is_given:
            raise UserError(f"{given}: needs whole projections, which no process has under FSDP or DeepSpeed")
    if isinstance(cfg, TrainConfig) and cfg.evaluation.evals:
        raise UserError(
            f"evaluation.evals={cfg.evaluation.evals}: cannot be had while FSDP or DeepSpeed shards the model; leave "
            "it out, and run lckv.evaluate on the trained model"
        )


@dataclass(eq=False)
class BaseSession(ABC):
    """A trainer with everything around it: the parts that `cfg` asks for, built, and the run folder, claimed.

    What is trained on, and by which trainer, is for the classes that derive from this to say.
    """

    cfg: RunConfig
    args: TrainingArguments
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    data: RunData
    folder: RunFolder
    console: Console

    def __post_init__(self) -> None:
        cfg, args, model, folder = self.cfg, self.args, self.model, self.folder
        self.checkpoint = folder.checkpoints.latest()
        self.first_step = step_of(self.checkpoint) if self.checkpoint else 0
        if args.should_save:
            folder.truncate_metrics(self.first_step)
        if cfg.trainer.use_liger_kernel:
            use_liger_kernels(model)
        if cfg.trainer.torch_compile:
            compile_layers(model, cfg.trainer.torch_compile_backend, cfg.trainer.torch_compile_mode)
        if cfg.optim.name == RIEMANNIAN:
            orthonormalize(model)  # before a checkpoint's weights are loaded, which are so
        freeze_all_but(model, cfg.trainer.trainable)
        self.progress = ours.ProgressCallback(self.console)
        self.trainer = self.build_trainer()
        self.evaluations = self.build_evaluations()
        self.num_trained = sum(parameter.numel() for _, parameter in trainable_parameters(model))
        if args.fsdp and not self.trainer.is_fsdp_enabled:
            raise UserError("trainer.hf.fsdp: accelerate shards on accelerators only, in two or more processes")
        if self.trainer.is_sharded:
            check_can_shard(cfg, model)
        self.trainer.on_eval_batch = self.progress.on_eval_batch
        self.trainer.remove_callback(PrinterCallback)
        for callback in self._callbacks():
            self.trainer.add_callback(callback)

    @abstractmethod
    def build_trainer(self) -> RunMixin:
        """The trainer of the model."""

    def build_evaluations(self) -> ours.EvaluationsCallback | None:
        """What evaluates the model beside the validation loss; `None`: nothing does."""
        return None

    @abstractmethod
    def sample(self, model: PreTrainedModel) -> str:
        """What the model makes of `trainer.sample_prompt`."""

    def common_arguments(self) -> dict[str, Any]:
        """What every trainer is given beside the model and its arguments."""
        return {
            "train_dataset": self.data.train,
            "eval_dataset": self.data.validation,
            "eval_num_bytes": self.data.validation_num_bytes or None,
            "build_optimizer": partial(build_optimizer, cfg=self.cfg.optim),
            "checkpoints": self.folder.checkpoints,
            "processing_class": self.tokenizer,
        }

    def _callbacks(self) -> list[Any]:
        cfg, trainer, data = self.cfg.trainer, self.trainer, self.data
        seconds = [line["seconds"] for line in self.folder.read_metrics() if "seconds" in line]
        # What takes long comes before the callback that starts the clock again.
        measuring = [
            ours.RhythmCallback(cfg.sample_steps, cfg.evaluation_steps),
            *([] if self.evaluations is None else [self.evaluations]),
            ours.SampleCallback(self.sample, cfg.sample_steps, trainer.is_sharded),
            ours.FiguresCallback(
                tokens_per_step=round(trainer.global_batch_size * data.tokens_per_block),
                num_blocks=len(data.train),
                global_batch_size=trainer.global_batch_size,
                flops_per_token=costs_of(self.model, data.block_size).flops_per_token.train,
                precision=cfg.precision,
                bytes_per_token=data.validation_num_bytes / max(1, data.num_predicted_tokens),
                seconds_before=seconds[-1] if seconds else 0.0,
            ),
        ]
        writing = [ours.MetricsFileCallback(self.folder), self.progress]
        if trainer.is_world_process_zero():
            writing += [LOGGERS[name](self.cfg, self.folder, self.first_step) for name in self.cfg.logger.names]
        return measuring + writing

    def run(self) -> dict[str, Any] | None:
        """Trains to the end and writes model, picture and results.

        Returns:
            The results; `None` in every process but the first.
        """
        if advice := advice_on(sharing_plan_of(self.model)):
            self.console.print(f"note: {advice}")
        if self.checkpoint:
            self.console.print(f"going on from {self.checkpoint}")
            self._tell_of_other_random_numbers(num_processes_of(self.checkpoint))
        try:
            self.trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
        except KeyboardInterrupt:
            latest = self.folder.checkpoints.latest() or "the start"
            self.console.print(f"interrupted; the same command goes on from {latest}")
            raise
        finally:
            self.progress.close()
        self.trainer.save_final(self.folder.model)
        results = self._write_results() if self.trainer.is_world_process_zero() else None
        self.trainer.accelerator.wait_for_everyone()
        return results

    def _tell_of_other_random_numbers(self, num_before: int) -> None:
        """The blocks of each step are the same in any number of processes, but each draws a dropout of its own."""
        dropout = getattr(self.model.config, "attention_dropout", 0.0)
        if num_before != self.args.world_size and dropout:
            logger.warning(
                "model.attention_dropout=%s: draws other random numbers from here on: the checkpoint was saved by %d "
                "processes, and this is going on with %d",
                *(dropout, num_before, self.args.world_size),
            )

    def _write_results(self) -> dict[str, Any]:
        results = build_results(self.cfg, self.model, self.data, self.folder, self.trainer, self.num_trained)
        if self.evaluations is not None:
            # A run that goes on from its last step has evaluated in an earlier session.
            figures = self.evaluations.figures or self.evaluations.run()
            results["evaluations"] = dict(figures)
        title = f"{results['run_name']}   {results['layer_types']}"
        if PREFERENCES[0] in results:
            title += "   (the better answers)"
        plot_loss(self.folder.read_metrics(), self.folder.loss_plot, title=title, unigram_loss=results["unigram_loss"])
        write_json(self.folder.results, results)
        return results


@dataclass(eq=False)
class Session(BaseSession):
    """Training on blocks of text, by [`LCKVTrainer`]; with a teacher, by [`DistillationTrainer`]."""

    data: TokenizedData
    teacher: PreTrainedModel | None = None
    evaluate: ours.Evaluate | None = None

    def build_trainer(self) -> RunMixin:
        """The trainer of the model."""
        cfg = cast(TrainConfig, self.cfg)
        trainer_class: Callable[..., LCKVTrainer] = LCKVTrainer
        if self.teacher is not None:
            check_teacher_fits(self.teacher, self.model, cfg.teacher, self.data.block_size)
            trainer_class = partial(DistillationTrainer, teacher=self.teacher, distillation=cfg.teacher)
        return trainer_class(
            self.model,
            self.args,
            periods=(cfg.trainer.sample_steps, cfg.trainer.evaluation_steps),
            random_sharing=random_sharing(cfg, sharing_plan_of(self.model)),
            data_collator=collate,
            **self.common_arguments(),
        )

    def build_evaluations(self) -> ours.EvaluationsCallback | None:
        """What evaluates the model while it is trained, if anything is to."""
        wait, every = self.trainer.accelerator.wait_for_everyone, self.cfg.trainer.evaluation_steps
        return self.evaluate and ours.EvaluationsCallback(self.evaluate, every, wait, self.progress.paused)

    def sample(self, model: PreTrainedModel) -> str:
        """A text that begins with `trainer.sample_prompt`."""
        cfg = self.cfg.trainer
        inputs = self.tokenizer(join_line_ends(cfg.sample_prompt), return_tensors="pt", return_token_type_ids=False)
        return ours.sample_text(model, self.tokenizer, inputs, cfg.sample_tokens)
