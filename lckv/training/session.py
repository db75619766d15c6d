"""One training session: from built parts to results, going on from the last whole checkpoint if there is one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainingArguments

from lckv.config import TrainConfig
from lckv.costs import ModelSizes
from lckv.data.dataset import TokenizedData, collate
from lckv.errors import UserError
from lckv.evaluation.model_costs import costs_of, sharing_plan_of
from lckv.model_arguments import model_arguments
from lckv.storage import write_json
from lckv.training import callbacks as ours
from lckv.training.acceleration import compile_layers, use_liger_kernels
from lckv.training.checkpoints import step_of
from lckv.training.distillation import DistillationTrainer, check_teacher_fits
from lckv.training.evaluation_callback import Evaluate, EvaluationsCallback
from lckv.training.loggers import build_loggers
from lckv.training.loss_plot import plot_loss
from lckv.training.optim import build_optimizer, freeze_all_but
from lckv.training.run_folder import RunFolder
from lckv.training.run_summary import build_results
from lckv.training.trainer import LCKVTrainer


def check_can_shard(cfg: TrainConfig, model: PreTrainedModel) -> None:
    """Checks what cannot be done while processes hold parts of one model.

    Raises:
        UserError: if each would pass over a cycle until its own batch has converged, and wait for the others' parts
            for ever; or if evaluations are to be made, of a model that no process has as a whole.
    """
    config = model.config
    iterates = getattr(config, "forward_passes", 0) == "converge" and not config.use_sequential
    if iterates and sharing_plan_of(model).has_cycles:
        raise UserError(
            "model.forward_passes=converge: processes would need different numbers of passes, which FSDP and "
            "DeepSpeed do not allow; give a number, such as model.forward_passes=7"
        )
    if cfg.evaluation.evals:
        raise UserError(
            f"evaluation.evals={cfg.evaluation.evals}: cannot be had while FSDP or DeepSpeed shards the model; leave "
            "it out, and run lckv.evaluate on the trained model"
        )


@dataclass(eq=False)
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

    cfg: TrainConfig
    args: TrainingArguments
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    data: TokenizedData
    folder: RunFolder
    console: Console
    teacher: PreTrainedModel | None = None
    evaluate: Evaluate | None = None

    def __post_init__(self) -> None:
        cfg, args, model, data, folder = self.cfg, self.args, self.model, self.data, self.folder
        self.checkpoint = folder.checkpoints.latest()
        self.first_step = step_of(self.checkpoint) if self.checkpoint else 0
        if args.should_save:
            folder.truncate_metrics(self.first_step)
        if cfg.trainer.use_liger_kernel:
            use_liger_kernels(model)
        if cfg.trainer.torch_compile:
            compile_layers(model, cfg.trainer.torch_compile_backend, cfg.trainer.torch_compile_mode)
        freeze_all_but(model, cfg.trainer.trainable)
        self.progress = ours.ProgressCallback(self.console)
        trainer_class: Callable[..., LCKVTrainer] = LCKVTrainer
        if self.teacher is not None:
            check_teacher_fits(self.teacher, model, cfg.teacher, data.train.block_size)
            trainer_class = partial(DistillationTrainer, teacher=self.teacher, distillation=cfg.teacher)
        self.trainer = trainer_class(
            model,
            args,
            data.train,
            data.validation,
            eval_num_bytes=data.validation_num_bytes,
            build_optimizer=partial(build_optimizer, cfg=cfg.optim),
            checkpoints=folder.checkpoints,
            periods=(cfg.trainer.sample_steps, cfg.trainer.evaluation_steps),
            data_collator=collate,
            tokenizer=self.tokenizer,
        )
        if args.fsdp and not self.trainer.is_fsdp_enabled:
            raise UserError("trainer.hf.fsdp: accelerate shards on accelerators only, in two or more processes")
        if self.trainer.is_sharded:
            check_can_shard(cfg, model)
        self.evaluations = self.evaluate and EvaluationsCallback(
            self.evaluate,
            cfg.trainer.evaluation_steps,
            self.trainer.accelerator.wait_for_everyone,
            self.progress.paused,
        )
        self.trainer.on_eval_batch = self.progress.on_eval_batch
        self.trainer.remove_callback(PrinterCallback)
        for callback in self._callbacks():
            self.trainer.add_callback(callback)

    def _callbacks(self) -> list[Any]:
        cfg, trainer, data = self.cfg.trainer, self.trainer, self.data
        seconds = [line["seconds"] for line in self.folder.read_metrics() if "seconds" in line]
        prompt, length = cfg.sample_prompt, cfg.sample_tokens
        sample = partial(ours.sample_text, tokenizer=self.tokenizer, prompt=prompt, num_tokens=length)
        # What takes long comes before the callback that starts the clock again.
        measuring = [
            ours.RhythmCallback(cfg.sample_steps, cfg.evaluation_steps),
            *([] if self.evaluations is None else [self.evaluations]),
            ours.SampleCallback(sample, cfg.sample_steps, trainer.is_sharded),
            ours.ThroughputCallback(
                tokens_per_step=trainer.global_batch_size * data.train.block_size,
                num_blocks=len(data.train),
                global_batch_size=trainer.global_batch_size,
                flops_per_token=costs_of(self.model, data.train.block_size).flops_per_token.train,
                precision=cfg.precision,
                seconds_before=seconds[-1] if seconds else 0.0,
            ),
            ours.FiguresCallback(data.validation_num_bytes / max(1, data.num_predicted_tokens)),
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
        plain = replace(self.cfg, iso=None)
        sizes = ModelSizes.from_config(model_arguments(plain, self.model.config.vocab_size))
        return None if self.cfg.iso is None else sizes

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
