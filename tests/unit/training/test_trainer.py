"""The loop itself: the same curve however the batch is cut, and nothing lost or overwritten when it stops."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from lckv.errors import UserError
from lckv.training.callbacks import SampleCallback
from lckv.training.session import Session

MakeSession = Callable[..., Session]

LEARNED = ("loss", "grad_norm", "eval_loss", "eval_perplexity", "eval_bits_per_byte", "learning_rate")


def curve(session: Session) -> list[dict[str, float]]:
    """What a run has logged, without what the clock and the machine have to do with."""
    return [
        {name: line[name] for name in ("step", *LEARNED) if name in line} for line in session.folder.read_metrics()
    ]


def assert_same_curve(first: Session, second: Session, tolerance: float) -> None:
    assert [line["step"] for line in curve(first)] == [line["step"] for line in curve(second)]
    for one, other in zip(curve(first), curve(second), strict=True):
        assert other == pytest.approx(one, rel=tolerance)


def weights(session: Session) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in session.model.state_dict().items()}


def assert_equal_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.fixture
def reference(make_session: MakeSession) -> Session:
    session = make_session("reference")
    session.run()
    return session


def test_blocks_predict_different_numbers_of_tokens(corpus):
    counts = [int((corpus.data.train[index]["labels"] != -100).sum()) for index in range(len(corpus.data.train))]
    assert max(counts) > min(counts) + 5  # else the tests below could not tell token weighting from its absence


def test_accumulation_does_not_change_the_curve(make_session: MakeSession, reference: Session):
    accumulated = make_session("accumulated", trainer__micro_batch_size=1)
    assert accumulated.trainer.args.gradient_accumulation_steps == 4
    accumulated.run()
    assert_same_curve(reference, accumulated, 1e-5)


def test_loss_is_the_mean_over_all_predicted_tokens_of_the_step(make_session: MakeSession):
    session = make_session("first", trainer__max_steps=1, trainer__micro_batch_size=1)
    blocks = [session.data.train[index] for index in list(session.trainer.order)[:4]]
    losses, counts = [], []
    for block in blocks:
        batch = {name: value[None] for name, value in block.items()}
        counts.append(int((batch["labels"] != -100).sum()))
        losses.append(session.model(**batch, use_cache=False).loss.item() * counts[-1])
    session.run()
    assert session.folder.read_metrics()[0]["loss"] == pytest.approx(sum(losses) / sum(counts), rel=1e-5)


def test_gradient_checkpointing_does_not_change_the_curve(make_session: MakeSession, reference: Session):
    checkpointed = make_session("checkpointed", trainer__gradient_checkpointing=True)
    checkpointed.run()
    assert checkpointed.model.model.layers[0].gradient_checkpointing
    assert_same_curve(reference, checkpointed, 1e-5)


def test_mixed_precision_hardly_changes_the_curve(make_session: MakeSession, reference: Session):
    mixed = make_session("mixed", trainer__precision="bf16")
    mixed.run()
    assert mixed.model.dtype == torch.float32
    losses = [[line["loss"] for line in curve(session) if "loss" in line] for session in (reference, mixed)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


def test_compiling_does_not_change_the_curve(make_session: MakeSession):
    small = {"model__layer_types": "1_1", "trainer__max_steps": 2, "trainer__save_steps": None}
    plain = make_session("plain", **small)
    plain.run()
    # Traced and differentiated as by every backend, but without code generation, which takes a minute.
    torch._dynamo.reset()
    backend = {"trainer__torch_compile": True, "trainer__torch_compile_backend": "aot_eager"}
    compiled = make_session("compiled", **small, **backend)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled.run()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
    assert_same_curve(plain, compiled, 1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.timeout(600)
def test_compiling_with_inductor_does_not_change_the_curve(make_session: MakeSession, reference: Session):
    compiled = make_session("compiled", trainer__torch_compile=True)
    compiled.run()
    assert_same_curve(reference, compiled, 1e-4)


def test_sampling_and_evaluation_leave_no_trace_in_training(make_session: MakeSession):
    dropout = {"model__attention_dropout": 0.3}
    quiet = make_session("quiet", **dropout)
    quiet.run()
    busy = make_session("busy", **dropout, trainer__sample_steps=1, trainer__eval_steps=2)
    busy.run()
    assert_equal_weights(weights(quiet), weights(busy))
    assert [line["step"] for line in busy.folder.read_metrics() if "sample" in line] == [1, 2, 3, 4, 5, 6]
    losses = [line["loss"] for line in busy.folder.read_metrics() if "loss" in line]
    assert losses == [line["loss"] for line in quiet.folder.read_metrics() if "loss" in line]


@pytest.mark.parametrize(
    ("stop", "further"),
    [
        (2, {}),
        (5, {"optim__name": "muon"}),
        (4, {"trainer__trainable": "kv"}),  # readers then have nothing that the optimizer knows of
    ],
)
def test_interrupted_run_goes_on_bit_for_bit(
    make_session: MakeSession, interrupt: Callable[[Session, int], None], stop: int, further: dict[str, str]
):
    settings = {
        "model__attention_dropout": 0.3,
        **further,
        "trainer__logging_steps": 2,  # windows that do not end where checkpoints are
        "trainer__micro_batch_size": 2,
    }
    whole = make_session("whole", **settings)
    whole.run()
    interrupt(make_session("parts", **settings), stop)
    second = make_session("parts", **settings)
    assert second.first_step == (3 if stop >= 3 else 0)
    results = second.run()
    assert_equal_weights(weights(whole), weights(second))
    assert curve(second) == curve(whole)
    assert results is not None
    assert results["eval_loss"] == whole.folder.finished_results()["eval_loss"]


def test_other_random_numbers_in_another_number_of_processes_are_told(
    make_session: MakeSession, interrupt: Callable[[Session, int], None], caplog: pytest.LogCaptureFixture
):
    for dropout in (0.0, 0.3):
        name, settings = f"dropout{dropout}", {"model__attention_dropout": dropout}
        interrupt(make_session(name, **settings), 4)
        again = make_session(name, **settings)
        own = again.checkpoint / "rng_state.pth"
        for rank in range(2):  # as two processes would have left it
            shutil.copy(own, own.with_name(f"rng_state_{rank}.pth"))
        own.unlink()
        again.run()
        assert ("draws other random numbers" in caplog.text) == (dropout > 0)


def test_run_killed_between_its_last_checkpoint_and_its_results_needs_no_more_training(
    make_session: MakeSession, reference: Session
):
    reference.folder.results.unlink()
    shutil.rmtree(reference.folder.model)
    again = make_session("reference")
    assert again.first_step == 6
    again.run()
    assert curve(again) == curve(reference)
    assert_equal_weights(weights(again), weights(reference))
    assert (again.folder.model / "model.safetensors").is_file()


def test_residual_is_measured_at_logging_steps_only(make_session: MakeSession):
    session = make_session("residual", trainer__logging_steps=2)
    asked = []

    def hook(module: nn.Module, args, kwargs):
        if module.training:
            asked.append("output_kv_residual" in kwargs)

    session.model.register_forward_pre_hook(hook, with_kwargs=True)
    session.run()
    assert asked == [False, True, True, True, False, True]  # step 3 is logged because a checkpoint is saved
    train = [line for line in session.folder.read_metrics() if "loss" in line]
    assert all(line["kv_residual"] > 0 for line in train)


def test_pattern_without_cycles_has_no_residual(make_session: MakeSession):
    session = make_session("acyclic", model__layer_types="0_0_2_2", trainer__max_steps=1)
    session.run()
    assert "kv_residual" not in session.folder.read_metrics()[0]


def break_loss(session: Session, at_call: int) -> None:
    calls = []

    def hook(module: nn.Module, inputs, output):
        calls.append(1)
        return output * math.nan if len(calls) == at_call and module.training else output

    session.model.lm_head.register_forward_hook(hook)


def test_loss_that_is_not_a_number_stops_the_run(make_session: MakeSession):
    session = make_session("nan", trainer__save_steps=2, trainer__micro_batch_size=2)
    break_loss(session, at_call=6)  # step 3, second micro batch
    with pytest.raises(UserError) as raised:
        session.run()
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith("step 3: the loss is nan on training blocks ")
    for advice in ("optim.learning_rate", "trainer.max_grad_norm", "checkpoint-2"):
        assert advice in message
    dump = torch.load(session.folder.path / "nonfinite_step3_rank0.pt")
    assert dump["block_indices"] == list(session.trainer.order)[10:12]
    blocks = [session.data.train[index]["input_ids"] for index in dump["block_indices"]]
    assert torch.equal(dump["batch"]["input_ids"], torch.stack(blocks))
    assert [path.name for path in session.folder.checkpoints.path.iterdir()] == ["checkpoint-2"]


@pytest.mark.parametrize(("at_call", "step", "blocks"), [(5, 3, (8, 10)), (12, 6, (22, 24))])
def test_micro_batch_whose_loss_is_not_a_number_is_told_from_the_others_of_its_step(
    make_session: MakeSession, at_call: int, step: int, blocks: tuple[int, int]
):
    session = make_session("nan", trainer__save_steps=None, trainer__micro_batch_size=2)
    break_loss(session, at_call)
    steps = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            steps.append(state.global_step + 1)

    session.trainer.add_callback(Watch())
    with pytest.raises(UserError, match=f"^step {step}: the loss is nan"):
        session.run()
    assert steps == list(range(1, step))  # the optimizer has seen nothing of the step that failed
    assert not any(value.isnan().any() for value in weights(session).values())
    dump = torch.load(session.folder.path / f"nonfinite_step{step}_rank0.pt")
    assert dump["block_indices"] == list(session.trainer.order)[slice(*blocks)]
    ids = [session.data.train[index]["input_ids"] for index in dump["block_indices"]]
    assert torch.equal(dump["batch"]["input_ids"], torch.stack(ids))


def test_losses_are_looked_at_once_per_step(make_session: MakeSession, monkeypatch: pytest.MonkeyPatch):
    session = make_session("once", trainer__max_steps=2, trainer__micro_batch_size=1)
    sizes, check = [], session.trainer._check_losses

    def count() -> None:
        sizes.append(len(session.trainer._window))
        check()

    monkeypatch.setattr(session.trainer, "_check_losses", count)
    session.run()
    assert sizes == [4, 4]


def test_weights_that_are_not_numbers_are_not_saved(make_session: MakeSession):
    session = make_session("nan", trainer__save_steps=2)

    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                session.model.model.norm.weight.data[0] = math.inf

    session.trainer.add_callback(Break())
    session.trainer.remove_callback(SampleCallback)  # it would stumble over such weights first
    with pytest.raises(UserError, match=r"step 4: the weights of model\.norm\.weight are not finite"):
        session.run()
    assert session.folder.checkpoints.latest().name == "checkpoint-2"


def test_checkpoint_that_does_not_fit_on_the_disk_leaves_the_one_before(make_session: MakeSession):
    session = make_session("full", trainer__save_steps=2)

    class FillDisk(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                import resource

                hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
                resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))

    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    session.trainer.add_callback(FillDisk())
    try:
        with pytest.raises(UserError, match="could not save the checkpoint of step 4 .* checkpoint-2 is intact"):
            session.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in session.folder.checkpoints.path.iterdir()] == ["checkpoint-2"]
    again = make_session("full", trainer__save_steps=2)
    assert again.first_step == 2


def test_checkpoints_and_the_trained_model_load_with_auto_classes(reference: Session):
    folders: list[Path] = [reference.folder.model, reference.folder.checkpoints.path / "checkpoint-6"]
    for folder in folders:
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert_equal_weights(dict(loaded.state_dict()), weights(reference))
        assert AutoTokenizer.from_pretrained(folder).eos_token == reference.tokenizer.eos_token
    assert AutoModelForCausalLM.from_pretrained(reference.folder.model).config.use_cache


def test_metrics_of_a_run(reference: Session):
    lines = reference.folder.read_metrics()
    train = [line for line in lines if "loss" in line]
    assert [line["step"] for line in train] == [1, 2, 3, 4, 5, 6]
    assert [line["tokens"] for line in train] == [128 * step for step in range(1, 7)]
    assert train[-1]["loss"] < train[0]["loss"]
    for line in train:
        assert line["perplexity"] == pytest.approx(math.exp(line["loss"]))
        assert line["tokens_per_second"] > 0
        assert line["peak_memory_bytes"] > 2**20
        assert line["epoch"] == pytest.approx(line["step"] * 4 / len(reference.data.train), abs=1e-4)
    assert train[-1]["eta_seconds"] == 0
    evaluation = lines[-1]
    assert evaluation["step"] == 6
    validation = reference.data.validation.statistics
    bits = evaluation["eval_loss"] * validation.num_predicted_tokens / validation.num_bytes / math.log(2)
    assert evaluation["eval_bits_per_byte"] == pytest.approx(bits)


def test_results_of_a_run(reference: Session):
    results = reference.folder.finished_results()
    assert results["unigram_perplexity"] == pytest.approx(reference.data.unigram_perplexity)
    assert results["layer_types"] == "0_2_2_3"
    assert results["kv_bytes"]["written"] == 3 * 2 * 32 * 2
    assert results["num_parameters"] == sum(parameter.numel() for parameter in reference.model.parameters())
    assert results["sample"].startswith(reference.cfg.trainer.sample_prompt)
    assert results["eval_loss"] == reference.folder.read_metrics()[-1]["eval_loss"]
    assert reference.folder.loss_plot.is_file()
