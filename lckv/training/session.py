"""One training session: from built parts to results, going on from the last whole checkpoint if there is one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainingArguments

from lckv.config import TrainConfig
from lckv.costs import ModelSizes
from lckv.data import TokenizedData, collate
from lckv.errors import UserError
from lckv.evaluation.model_costs import costs_of, sharing_plan_of
from lckv.model_arguments import model_arguments
from lckv.storage import write_json
from lckv.training import callbacks as ours
from lckv.training.checkpoints import step_of
from lckv.training.compilation import compile_layers
from lckv.training.distillation import DistillationTrainer
from lckv.training.evaluation_callback import Evaluate, EvaluationsCallback, check_not_sharded
from lckv.training.liger import use_liger_kernels
from lckv.training.loggers import build_loggers
from lckv.training.loss_plot import plot_loss
from lckv.training.optim import build_optimizer
from lckv.training.run_folder import RunFolder
from lckv.training.run_summary import build_results
from lckv.training.teacher import check_teacher_fits
from lckv.training.trainable import freeze_all_but
from lckv.training.trainer import LCKVTrainer


def check_passes(model: PreTrainedModel, *, is_sharded: bool) -> None:
    """Checks that processes which hold parts of one model pass over its layers equally often.

    Raises:
        UserError: if each would stop where its own batch has converged, and wait for the others' parts for ever.
    """
    config = model.config
    iterates = getattr(config, "forward_passes", 0) == "converge" and not config.use_sequential
    if is_sharded and iterates and sharing_plan_of(model).has_cycles:
        raise UserError(
            "model.forward_passes=converge: processes would need different numbers of passes, which FSDP and "
            "DeepSpeed do not allow; give a number, such as model.forward_passes=7"
        )


class Session:
    """A trainer with everything around it.

    Args:
        cfg: the configuration.
        args: transformers' arguments, built from it.
        model: the model to train, initialised.
        tokenizer: what made the data, saved with the model and used for samples.
        data: training and validation blocks.
        folder: the run folder, claimed.
        console: where to show progress.
        teacher: a model to learn from, as `cfg.teacher` says.
        evaluate: runs the evaluations of the model that `cfg.evaluation` names, if it names any.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        args: TrainingArguments,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        data: TokenizedData,
        folder: RunFolder,
        console: Console,
        teacher: PreTrainedModel | None = None,
        evaluate: Evaluate | None = None,
    ) -> None:
        self.cfg = cfg
        self.model = model
        self.tokenizer = tokenizer
        self.data = data
        self.folder = folder
        self.console = console
        self.checkpoint = folder.checkpoints.latest()
        self.first_step = step_of(self.checkpoint) if self.checkpoint else 0
        if args.should_save:
            folder.truncate_metrics(self.first_step)
        if cfg.trainer.use_liger_kernel:
            use_liger_kernels(model)
        if cfg.trainer.torch_compile:
            compile_layers(model, cfg.trainer.torch_compile_backend, cfg.trainer.torch_compile_mode)
        freeze_all_but(model, cfg.trainer.trainable)
        self.progress = ours.ProgressCallback(console)
        self.trainer = self._trainer_class(teacher)(
            model,
            args,
            data.train,
            data.validation,
            eval_num_bytes=data.validation_num_bytes,
            build_optimizer=partial(build_optimizer, cfg=cfg.optim),
            checkpoints=folder.checkpoints,
            periods=(cfg.trainer.sample_steps, cfg.trainer.evaluation_steps),
            data_collator=collate,
            tokenizer=tokenizer,
        )
        if args.fsdp and not self.trainer.is_fsdp_enabled:
            raise UserError("trainer.hf.fsdp: accelerate shards on accelerators only, in two or more processes")
        is_sharded = self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled
        check_passes(model, is_sharded=is_sharded)
        check_not_sharded(cfg, is_sharded=is_sharded)
        self.evaluations = self._evaluations_callback(evaluate)
        self.trainer.on_eval_batch = self.progress.on_eval_batch
        self.trainer.remove_callback(PrinterCallback)
        for callback in self._callbacks():
            self.trainer.add_callback(callback)

    def _trainer_class(self, teacher: PreTrainedModel | None) -> Callable[..., LCKVTrainer]:
        if teacher is None:
            return LCKVTrainer
        check_teacher_fits(teacher, self.model, self.cfg.teacher, self.data.train.block_size)
        return partial(DistillationTrainer, teacher=teacher, distillation=self.cfg.teacher)

    def _evaluations_callback(self, evaluate: Evaluate | None) -> EvaluationsCallback | None:
        if evaluate is None:
            return None
        every, wait = self.cfg.trainer.evaluation_steps, self.trainer.accelerator.wait_for_everyone
        return EvaluationsCallback(evaluate, every, wait, self.progress.paused)

    def _callbacks(self) -> list[Any]:
        cfg, trainer, data = self.cfg.trainer, self.trainer, self.data
        seconds = [line["seconds"] for line in self.folder.read_metrics() if "seconds" in line]
        sample = partial(
            ours.sample_text,
            tokenizer=self.tokenizer,
            prompt=cfg.sample_prompt,
            num_tokens=cfg.sample_tokens,
        )
        # What takes long comes before the callback that starts the clock again.
        measuring = [
            ours.RhythmCallback(cfg.sample_steps, cfg.evaluation_steps),
            *([] if self.evaluations is None else [self.evaluations]),
            ours.SampleCallback(sample, cfg.sample_steps, trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled),
            ours.ThroughputCallback(
                tokens_per_step=trainer.global_batch_size * data.train.block_size,
                num_blocks=len(data.train),
                global_batch_size=trainer.global_batch_size,
                flops_per_token=costs_of(self.model, data.train.block_size).flops_per_token.train,
                precision=cfg.precision,
                seconds_before=seconds[-1] if seconds else 0.0,
            ),
            ours.PerplexityCallback(data.validation_num_bytes / max(1, data.num_predicted_tokens)),
            ours.MemoryCallback(),
        ]
        writing = [ours.MetricsFileCallback(self.folder), self.progress]
        if trainer.is_world_process_zero():
            run_name = self.cfg.run_name or self.folder.path.name
            writing += build_loggers(self.cfg.logger, self.folder, run_name, asdict(self.cfg), self.first_step)
        return measuring + writing

    def run(self) -> dict[str, Any] | None:
        """Trains to the end and writes model, picture and results.

        Returns:
            The results; `None` in every process but the first.
        """
        if self.checkpoint:
            self._print(f"going on from {self.checkpoint}")
        try:
            self.trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
        except KeyboardInterrupt:
            self._print(
                f"interrupted; the same command goes on from {self.folder.checkpoints.latest() or 'the start'}"
            )
            raise
        finally:
            self.progress.close()
        self.trainer.save_final(self.folder.model)
        results = self._write_results() if self.trainer.is_world_process_zero() else None
        self.trainer.accelerator.wait_for_everyone()
        return results

    def _print(self, text: str) -> None:
        if self.trainer.is_world_process_zero():
            self.console.print(text)

    def _llama_sizes(self) -> ModelSizes | None:
        """What `iso` keeps something equal to."""
        if self.cfg.iso is None:
            return None
        cfg = replace(self.cfg, iso=None)
        return ModelSizes.from_config(model_arguments(cfg, self.model.config.vocab_size))

    def _write_results(self) -> dict[str, Any]:
        lines = self.folder.read_metrics()
        results = build_results(
            self.model,
            self.data,
            lines,
            run_name=self.cfg.run_name or self.folder.path.name,
            num_processes=self.trainer.args.world_size,
            sample_prompt=self.cfg.trainer.sample_prompt,
            llama_sizes=self._llama_sizes(),
        )
        if self.evaluations is not None:
            # A run that goes on from its last step has evaluated in an earlier session.
            figures = self.evaluations.figures or self.evaluations.run()
            results["evaluations"] = dict(figures)
        title = f"{results['run_name']}   {results['layer_types']}"
        plot_loss(lines, self.folder.loss_plot, title=title, unigram_loss=results["unigram_loss"])
        write_json(self.folder.results, results)
        return results
