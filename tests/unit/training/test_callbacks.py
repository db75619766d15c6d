import io
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from tokenizers import processors
from transformers import TrainerControl, TrainerState

from lckv.errors import UserError
from lckv.training import callbacks
from lckv.training.callbacks import (
    FiguresCallback,
    ProgressCallback,
    RhythmCallback,
    check_sample_prompt,
    format_duration,
    sample_text,
)
from lckv.utils import environment
from lckv.utils.console import new_console


class Clock:
    """A clock that moves when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(callbacks, "time", clock)
    return clock


def throughput(**settings) -> FiguresCallback:
    defaults = {
        "tokens_per_step": 1000,
        "num_blocks": 40,
        "global_batch_size": 10,
        "flops_per_token": 1e9,
        "precision": "bf16",
        "bytes_per_token": 4.0,
    }
    return FiguresCallback(**{**defaults, **settings})


ARGS = SimpleNamespace(device=torch.device("cpu"), world_size=2)


def take_steps(callback: FiguresCallback, state: TrainerState, clock: Clock, seconds: list[float]) -> None:
    for second in seconds:
        clock.now += second
        state.global_step += 1
        callback.on_step_end(ARGS, state, TrainerControl())


def log(callback, state: TrainerState, **logs) -> dict:
    callback.on_log(ARGS, state, TrainerControl(), logs=logs)
    return logs


def test_throughput_leaves_out_what_is_not_training(clock: Clock):
    callback, state = throughput(seconds_before=50.0), TrainerState(max_steps=10)
    callback.on_train_begin(ARGS, state, TrainerControl())
    take_steps(callback, state, clock, [1.0, 1.0])
    clock.now += 3.0  # a sample
    logs = log(callback, state, loss=1.0)
    assert logs["tokens"] == 2000
    assert logs["tokens_per_second"] == 1000
    assert logs["epoch"] == 0.5
    assert logs["seconds"] == 55
    assert logs["eta_seconds"] == 20  # 2.5 seconds per step so far, all told
    clock.now += 7.0  # an evaluation and a checkpoint
    callback.on_evaluate(ARGS, state, TrainerControl())
    callback.on_save(ARGS, state, TrainerControl())
    take_steps(callback, state, clock, [0.5])
    assert log(callback, state, loss=1.0)["tokens_per_second"] == 2000
    assert log(callback, state, eval_loss=1.0) == {"eval_loss": 1.0, "tokens": 3000, "epoch": 0.75}


def test_mfu_only_where_the_peak_is_known(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    callback, state = throughput(), TrainerState(max_steps=10)
    callback.on_train_begin(ARGS, state, TrainerControl())
    take_steps(callback, state, clock, [1.0])
    assert "mfu" not in log(callback, state, loss=1.0)
    monkeypatch.setattr(callbacks, "peak_flops", lambda device, precision: 1e13)
    take_steps(callback, state, clock, [1.0])
    assert log(callback, state, loss=1.0)["mfu"] == pytest.approx(1000 * 1e9 / (2 * 1e13))


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA A100-SXM4-80GB", "fp16", 312e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("NVIDIA L4", "bf16", 121e12),
        ("NVIDIA H100 80GB HBM3", "fp32", None),
        ("Something else", "bf16", None),
    ],
)
def test_peak_flops(monkeypatch: pytest.MonkeyPatch, name: str, precision: str, peak: float | None):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert environment.peak_flops(torch.device("cuda", 0), precision) == peak
    assert environment.peak_flops(torch.device("cpu"), precision) is None


def test_hardware_has_a_name(monkeypatch: pytest.MonkeyPatch):
    described = environment.describe_hardware(torch.device("cpu"))
    assert described["device"] and described["num_cores"] >= 1
    assert described["num_threads"] == torch.get_num_threads()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert environment.describe_hardware(torch.device("cuda", 0))["device"] == "NVIDIA H200"


def test_prompt_without_a_token_is_refused(corpus):
    check_sample_prompt(corpus.tokenizer, "")  # starts with bos
    without_bos = deepcopy(corpus.tokenizer)
    without_bos.backend_tokenizer.post_processor = processors.ByteLevel()
    check_sample_prompt(without_bos, "In")
    with pytest.raises(UserError, match="^trainer.sample_prompt='': encodes to no token with this tokenizer"):
        check_sample_prompt(without_bos, "")


@pytest.mark.parametrize(("bytes_per_token", "bits"), [(4.0, 3 / 4), (None, None)])
def test_perplexity_and_bits_per_byte(clock: Clock, bytes_per_token: float | None, bits: float | None):
    callback, state = throughput(bytes_per_token=bytes_per_token), TrainerState(max_steps=10)
    callback.on_train_begin(ARGS, state, TrainerControl())
    take_steps(callback, state, clock, [1.0])
    logs = log(callback, state, loss=2.0794415416798357)
    assert logs["perplexity"] == pytest.approx(8.0)
    assert logs.get("bits_per_byte") == (bits and pytest.approx(bits))


@pytest.mark.parametrize(
    ("step", "sample_steps", "saves", "logs"),
    [(3, None, False, False), (4, 2, False, True), (3, 2, True, True), (9, None, False, True)],
)
def test_a_checkpoint_or_sample_is_logged_and_the_last_step_does_everything(step, sample_steps, saves, logs):
    control = TrainerControl(should_save=saves)
    RhythmCallback(sample_steps).on_step_end(ARGS, TrainerState(global_step=step, max_steps=9), control)
    assert control.should_log == logs
    assert (control.should_evaluate, control.should_save) == ((True, True) if step == 9 else (False, saves))


def test_progress_without_a_terminal_is_a_line_per_log():
    output = io.StringIO()
    console = new_console()
    console.file, console.width = output, 200
    progress = ProgressCallback(console)
    state = TrainerState(global_step=3, max_steps=9, is_world_process_zero=True)
    progress.on_train_begin(ARGS, state, TrainerControl())
    train = {"loss": 2.0, "perplexity": 7.39, "tokens_per_second": 1234.5, "eta_seconds": 83.0, "sample": "a\n[b] c"}
    log(progress, state, **train)
    log(progress, state, eval_loss=1.5, eval_perplexity=4.48, eval_bits_per_byte=0.9)
    progress.close()
    assert output.getvalue().splitlines() == [
        "step 3/9  loss 2.000  ppl 7.4  1,234 tok/s  ETA 1:23",
        "step 3/9  sample: a [b] c",
        "step 3/9  validation: loss 1.500  perplexity 4.48  bits per byte 0.900",
    ]


def test_progress_on_a_terminal_is_a_bar():
    output = io.StringIO()
    progress = ProgressCallback(Console(file=output, width=120, force_terminal=True))
    state = TrainerState(global_step=0, max_steps=9, is_world_process_zero=True)
    progress.on_train_begin(ARGS, state, TrainerControl())
    state.global_step = 3
    progress.on_step_end(ARGS, state, TrainerControl())
    log(progress, state, loss=2.0, perplexity=7.39, tokens_per_second=1234.5, eta_seconds=83.0, mfu=0.4)
    progress._progress.refresh()
    progress.close()
    shown = output.getvalue()
    for part in ("training", "3/9", "loss 2.000", "1,234 tok/s", "MFU 40.0%", "ETA 1:23"):
        assert part in shown


@pytest.mark.parametrize(("seconds", "shown"), [(0.4, "0:00"), (62, "1:02"), (3725, "1:02:05")])
def test_duration(seconds: float, shown: str):
    assert format_duration(seconds) == shown


def test_sample_is_the_same_each_time_and_leaves_mode_and_random_state(make_session):
    session = make_session()
    session.model.train()
    before = torch.get_rng_state()
    texts = set()
    for end in ("\n", "\n", "\r\n", "\r"):
        session.cfg.trainer.sample_prompt = f"in{end}the"
        texts.add(session.sample(session.model))
    assert len(texts) == 1
    assert texts.pop().startswith("in\nthe")
    assert session.model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_sample_never_outgrows_the_model(make_session):
    session = make_session(model__max_position_embeddings=40)
    lengths = []
    generate = session.model.generate

    def recording(**options):
        output = generate(**options)
        lengths.append(output.shape[1])
        return output

    session.model.generate = recording
    sample_text(session.model, session.tokenizer, session.tokenizer("in", return_tensors="pt"), 1000)
    assert lengths == [40]


def test_progress_makes_room_for_other_bars():
    progress = ProgressCallback(Console(file=io.StringIO(), force_terminal=True))
    with progress.paused():  # before the training, there is none
        pass
    assert not progress._progress.live.is_started
    progress.on_train_begin(ARGS, TrainerState(max_steps=9, is_world_process_zero=True), TrainerControl())
    with progress.paused():
        assert not progress._progress.live.is_started
    assert progress._progress.live.is_started
    progress.close()
