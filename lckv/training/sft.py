"""Tuning: TRL's `SFTTrainer` or `DPOTrainer` with what a run asks of a trainer, and the session around it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainingArguments

from lckv.config import SFTConfig
from lckv.config.sft import DPO
from lckv.data.chat_templates import end_of_answer
from lckv.data.chat_tokens import ConversationCollator, ConversationData, pad_token_of
from lckv.errors import UserError
from lckv.training.adapters import build_lora_config, check_adapter_fits, read_adapter
from lckv.training.arguments import build_training_arguments
from lckv.training.callbacks import sample_text
from lckv.training.checkpoints import saving
from lckv.training.preferences import with_pairs
from lckv.training.run_folder import RunFolder
from lckv.training.session import BaseSession
from lckv.training.trainer import RunMixin
from lckv.utils.console import command
from lckv.utils.storage import new_folder


def build_sft_arguments(cfg: SFTConfig) -> TrainingArguments:
    """TRL's arguments for a run, to whose trainer conversations come as labelled rows of tokens.

    Raises:
        UserError: for the reasons of [`build_training_arguments`].
    """
    from trl import DPOConfig as DPOArguments
    from trl import SFTConfig as SFTArguments

    if cfg.loss == DPO:
        args = build_training_arguments(
            cfg,
            DPOArguments,
            left_open=("activation_offloading",),
            beta=cfg.beta,
            max_length=None,  # longer rows have been seen to
            disable_dropout=False,  # what is configured is done
            precompute_ref_log_probs=True,  # of the model as it is now, so that no copy of it is kept
        )
        if args.fsdp or args.deepspeed:
            raise UserError("loss=dpo: compares with the whole model, which no process has under FSDP or DeepSpeed")
        return args
    return build_training_arguments(
        cfg,
        SFTArguments,
        left_open=("loss_type", "activation_offloading"),
        dataset_kwargs={"skip_prepare_dataset": True},
    )


def build_trainer_class(loss: str) -> type[RunMixin]:
    """TRL's trainer with what a run asks for; a function, as TRL is not always installed."""
    from trl import DPOTrainer, SFTTrainer

    trls: Any = DPOTrainer if loss == DPO else SFTTrainer

    class ConversationTrainer(RunMixin, trls):
        """TRL's loss over rows of conversations, in a run of ours."""

        def compute_loss(
            self,
            model: nn.Module,
            inputs: dict[str, Any],
            return_outputs: bool = False,
            num_items_in_batch: Tensor | int | None = None,
        ) -> Any:
            """TRL's loss and metrics, without its count of tokens, which begins anew where a run goes on."""
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            self._metrics["train" if cast(nn.Module, self.model).training else "eval"].pop("num_tokens")
            return loss

        def save_final(self, path: Path) -> None:
            """Saves the model and its tokenizer; of adapters, the model with them merged in, and themselves.

            Raises:
                UserError: if writing fails.
            """
            if hasattr(self.model, "merge_and_unload"):
                if self.args.should_save:
                    remedy = "make room and run the same command: training is not repeated"
                    folder = RunFolder(path.parent).adapter
                    with saving("the adapter", folder.parent, remedy), new_folder(folder, replaces=True) as new:
                        cast(Any, self.model).save_pretrained(str(new))
                self.model = self.model_wrapped = cast(Any, self.model).merge_and_unload()
            super().save_final(path)

        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            """Writes none: `lckv.export` does, from what is known of the run."""

        def _send_telemetry(self) -> None:
            """Tells nobody of the run."""

    return with_pairs(ConversationTrainer) if loss == DPO else ConversationTrainer


@dataclass(eq=False)
class SFTSession(BaseSession):
    """Training on conversations; `model` is the model that is tuned, adapters are put into it here."""

    cfg: SFTConfig
    tokenizer: PreTrainedTokenizerFast
    data: ConversationData

    def build_trainer(self) -> RunMixin:
        """The trainer of the model, with adapters if they are asked for."""
        lora = self.cfg.lora
        model, peft_config = self.model, None
        if lora.adapter is not None:
            from peft import PeftModel

            shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
            check_adapter_fits(read_adapter(lora.adapter), shapes, f"lora.adapter={lora.adapter}")
            model = cast(Any, PeftModel.from_pretrained(model, lora.adapter, is_trainable=True))
        elif lora.rank is not None:
            peft_config = build_lora_config(lora, model)
        ends = {self.tokenizer.eos_token_id, end_of_answer(self.tokenizer).token} - {None}
        assert self.model.generation_config is not None
        self.model.generation_config.eos_token_id = sorted(ends) if len(ends) > 1 else ends.pop()
        own = self.common_arguments()
        if self.cfg.loss != DPO:  # else TRL's own collator does
            own["data_collator"] = ConversationCollator(pad_token_of(self.tokenizer))
        trainer = build_trainer_class(self.cfg.loss)(
            model, args=self.args, periods=(self.cfg.trainer.sample_steps,), peft_config=peft_config, **own
        )
        if self.cfg.loss == DPO and lora.adapter is not None:
            model.delete_adapter("ref")  # TRL's copy to compare with, which has been done
        return trainer

    def sample(self, model: PreTrainedModel) -> str:
        """The model's answer to `trainer.sample_prompt`."""
        inputs: Any = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": self.cfg.trainer.sample_prompt}],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        start = inputs["input_ids"].shape[1]
        answer = sample_text(model, self.tokenizer, inputs, self.cfg.trainer.sample_tokens, start=start)
        end = end_of_answer(self.tokenizer)
        mark = end.text if end.token is None else str(self.tokenizer.decode([end.token]))
        return answer.partition(mark or "\0")[0]


def next_commands(cfg: SFTConfig, folder: RunFolder) -> list[str]:
    """What to type next: ask the model something, measure it on text, and export it."""
    prompt = f"prompt={cfg.trainer.sample_prompt}"
    return [
        command("lckv.generate", [f"model={folder.path}", prompt]),
        command("lckv.chat", [f"model={folder.path}"]),
        command("lckv.evaluate", [f"model={folder.path}", "evals=[perplexity]"]),
        command("lckv.export", [f"model={folder.path}", "format=hub", f"out={folder.path.name}-hub"]),
    ]
