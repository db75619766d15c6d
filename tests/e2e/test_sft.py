"""Tuning in processes of its own: killed and gone on with, and by two of them; what comes out is a model like any."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from lckv import evaluate, export, sft
from lckv.commands import cli
from lckv.errors import UserError
from tests import commands
from tests.e2e import training
from tests.e2e.conftest import FinishedRun
from tests.e2e.test_distributed import assert_same_curve
from tests.e2e.test_resume import kill_when

pytest.importorskip("trl", reason="needs the extra 'sft'")

SETTINGS = [
    "chat_template=chatml",
    "max_length=128",
    "data.validation_fraction=0.2",
    "trainer.max_steps=12",
    "trainer.global_batch_size=4",
    "trainer.eval_steps=6",
    "trainer.save_steps=3",
    "trainer.logging_steps=1",
    "trainer.sample_steps=null",
    "trainer.sample_tokens=4",
    "optim.learning_rate=0.01",
]


@pytest.fixture
def conversations(tmp_path: Path) -> Path:
    file = tmp_path / "conversations.jsonl"
    words = "in the beginning was the word and the light".split()
    rows = (
        [
            {"role": "user", "content": f"{n} {words[n % 9]}"},
            {"role": "assistant", "content": " ".join(words[n % 9 :])},
        ]
        for n in range(60)
    )
    lines = [json.dumps({"messages": row}) + "\n" for row in rows]
    file.write_text("".join(f'{line[:-2]}, "number": {n}}}\n' for n, line in enumerate(lines)))
    return file


def arguments(model: Path, conversations: Path, run_dir: Path, *settings: str) -> list[str]:
    given = [f"model={model}", f"data.files={conversations}", f"run_dir={run_dir}"]
    return [sys.executable, "-m", "lckv.sft", *given, *SETTINGS, *settings]


@pytest.mark.timeout(250)
def test_killed_and_gone_on_with_and_used(finished_run: FinishedRun, conversations: Path, tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    sft.main(cli.compose(arguments(finished_run.folder, conversations, whole, "lora.rank=2")[3:], "sft"))
    command = arguments(finished_run.folder, conversations, folder, "lora.rank=2")
    kill_when(lambda: any(folder.glob("checkpoints/checkpoint-[369]")), command, tmp_path)
    process = commands.run(command, tmp_path, timeout=100)
    assert process.returncode == 0, process.stdout + process.stderr
    assert f"going on from {folder}/checkpoints/checkpoint-" in process.stdout
    assert training.learned(folder) == training.learned(whole)
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()

    # What comes out is a model like any other, which asks for no template any more.
    asked = [sys.executable, "-m", "lckv.generate", f"model={folder}", "prompt=light", "chat=true", "json=true"]
    answer = commands.run(asked, tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)
    text = ["data=files", f"data.files={finished_run.corpus}"]
    evaluate.main(cli.compose([f"model={folder}", "evals=[perplexity]", *text], "evaluate"))
    assert (folder / "evaluation" / "results.json").is_file()
    export.main(cli.compose([f"model={folder}", "format=hub", f"out={tmp_path / 'hub'}"], "export"))
    assert "chat_template.jinja" in {path.name for path in (tmp_path / "hub").iterdir()}


def test_conversations_that_are_refused_leave_no_folder(
    finished_run: FinishedRun, conversations: Path, tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"messages": [{"role": "assistant", "content": "I."}]}\n')
    for file, settings, said in (
        (wrong, [], "wrong.jsonl:1: message 1, of the assistant, stands first"),
        (conversations, ["max_length=20"], "max_length=20, as are"),  # found once there are tokens
    ):
        run_dir = tmp_path / "run"
        given = arguments(finished_run.folder, file, run_dir, *settings)[3:]
        with pytest.raises(UserError, match=said):
            sft.main(cli.compose(given, "sft"))
        assert not run_dir.exists()


def test_a_finished_job_of_a_sweep_is_skipped_unread(
    finished_run: FinishedRun, conversations: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    cfg = cli.compose(
        arguments(finished_run.folder, conversations, tmp_path / "run", "trainer.max_steps=1")[3:], "sft"
    )
    loss = sft.main(cfg)
    monkeypatch.setattr(cli, "is_in_a_sweep", lambda: True)
    conversations.unlink()
    assert sft.main(cfg) == loss
    assert f"finished: skipped {tmp_path / 'run'}" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(250)
@pytest.mark.parametrize("given", [[], ["lora.rank=2"], ["loss=dpo"]], ids=["all", "lora", "dpo"])
def test_two_processes_give_the_curve_of_one(
    finished_run: FinishedRun, conversations: Path, tmp_path: Path, given: list[str]
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    if "loss=dpo" in given:
        pairs = ({"prompt": f"{n}?", "chosen": "the light " * (1 + n % 4), "rejected": "word"} for n in range(61))
        conversations.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    model = shutil.copytree(finished_run.folder / "model", tmp_path / "model")
    settings = json.loads((model / "config.json").read_text())
    # Dropout draws other random numbers in every process.
    (model / "config.json").write_text(json.dumps(settings | {"attention_dropout": 0.0}))
    loss = sft.main(cli.compose(arguments(model, conversations, one, *given)[3:], "sft"))
    command = arguments(model, conversations, two, *given, "trainer.micro_batch_size=1")
    process = commands.run(command, tmp_path, timeout=200, num_processes=2)
    assert process.returncode == 0, process.stdout + process.stderr
    assert_same_curve(one, two)
    sought = "eval_preference_loss" if "loss=dpo" in given else "eval_loss"  # what a sweeper looks for
    assert loss == training.read_metrics(one)[-1][sought]
    accuracies = [
        json.loads((each / "results.json").read_text()).get("eval_preference_accuracy") for each in (one, two)
    ]
    assert accuracies[0] == accuracies[1]
