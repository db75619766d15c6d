"""`python -m lckv.convert` and `lckv.train init.source=...` from the command line to what loads."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors.torch import load_file
from transformers import GenerationConfig

from lckv.errors import UserError
from lckv.loading.models import load_model
from tests import commands
from tests.e2e import training
from tests.e2e.conftest import write_corpus
from tests.e2e.test_resume import kill_when
from tests.tiny import byte_tokenizer
from tests.unit.conversion.sources import assert_identical, random_source, read_folder, run_convert, save_source

pytestmark = pytest.mark.timeout(150)

SHARED = "model.layer_types=0_1_2_2"
SHARDS = "max_shard_size=40KB"

# The method of this process waits, half-way through writing, until it is killed.
SLOW = """
import sys, time
from pathlib import Path
from lckv.commands import cli
from lckv import convert
from lckv.config import names
from lckv.conversion.methods import METHODS

@METHODS.register("slow")
def slow(group):
    Path("is_slow").touch()
    time.sleep(100)

names.METHODS.append("slow")
cli.run(convert.main, "convert")
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_source(tmp_path / "source", random_source(4))


def kill_half_way(signal_number: int, folder: Path) -> subprocess.CompletedProcess[str]:
    """Starts a conversion in `folder` and kills it when some shards are written."""
    (folder / "slow.py").write_text(SLOW)
    command = [sys.executable, str(folder / "slow.py"), "source=source", "out=out", "method=slow", SHARED, SHARDS]
    process = commands.Command(command, folder)
    deadline = time.monotonic() + 60
    while not (folder / "is_slow").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.finish(0)
        time.sleep(0.05)
    (folder / "slow.py").unlink()
    assert list(folder.glob(".out.partial-*/model-00001.safetensors"))
    process.send_signal(signal_number)
    return process.finish(30)


def test_converted_models_generate(run_module, source, tmp_path):
    process = run_module("lckv.convert", "source=source", "out=made/out", SHARED, SHARDS)
    assert process.returncode == 0, process.stderr
    assert process.stdout == "" and process.stderr == "made/out: 0_1_2_2 from source by average\n"
    assert os.listdir(tmp_path / "made") == ["out"]
    process = run_module("lckv.generate", "model=made/out", "prompt=abc", "max_new_tokens=5")
    assert process.returncode == 0 and process.stdout


def test_mistakes_are_one_line(run_module, source, tmp_path):
    process = run_module("lckv.convert", "source=source", "out=out", "model.layer_types=0_0")
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr.startswith("lckv.convert: error: model.layer_types='0_0': has 2 entries")
    assert process.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["source"]


def test_names_on_the_hub_are_found_in_its_cache(run_module, source, tmp_path):
    """As the Hub's client lays it out, with the weights once more under a name of the maker's own."""
    cached = Path(HF_HUB_CACHE, "models--owner--model")
    commit = "0123456789" * 4
    shutil.copytree(source, cached / "snapshots" / commit)
    (cached / "snapshots" / commit / "consolidated.safetensors").write_text("not read")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    process = run_module("lckv.convert", "source=owner/model", "out=out")
    assert process.returncode == 0, process.stderr
    assert_identical(read_folder(tmp_path / "out"), read_folder(source))
    process = run_module("lckv.convert", "source=owner/other", "out=other")
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert "source=owner/other: there is no such folder, the configuration was never downloaded" in process.stderr


def test_a_killed_conversion_leaves_nothing_that_loads_and_can_be_run_again(source, tmp_path):
    assert kill_half_way(signal.SIGKILL, tmp_path).returncode == -signal.SIGKILL
    partial, *others = sorted(os.listdir(tmp_path))
    assert partial.startswith(".out.partial-") and others == ["is_slow", "source"]
    with pytest.raises(UserError, match="holds no config.json"):
        load_model(str(tmp_path / partial))
    run_convert(source, tmp_path / "out", SHARED, SHARDS)
    assert sorted(os.listdir(tmp_path)) == ["is_slow", "out", "source"]
    run_convert(source, tmp_path / "undisturbed", SHARED, SHARDS)
    assert_identical(read_folder(tmp_path / "out"), read_folder(tmp_path / "undisturbed"))


def test_ctrl_c_leaves_nothing(source, tmp_path):
    process = kill_half_way(signal.SIGINT, tmp_path)
    assert process.returncode == 130 and "Traceback" not in process.stderr
    assert sorted(os.listdir(tmp_path)) == ["is_slow", "source"]


def train_command(*settings: str) -> list[str]:
    """Training of the source with shared keys and values, in the folder that it is run in."""
    return training.command(Path("corpus/*.txt"), Path("run"), "init.source=source", SHARED, *settings)


def test_training_starts_from_a_converted_model(source, tmp_path):
    write_corpus(tmp_path / "corpus")
    command = train_command("init.method=average", "trainer.max_steps=2", "optim.learning_rate=1e-12")
    process = training.run(command, cwd=tmp_path)
    assert process.returncode == 0, process.stdout + process.stderr
    run = tmp_path / "run"
    assert json.loads((run / "results.json").read_text())["steps"] == 2
    assert json.loads((run / "init" / "conversion.json").read_text())["method"] == "average"
    run_convert(source, tmp_path / "converted", SHARED)
    converted = read_folder(tmp_path / "converted")
    assert_identical(read_folder(run / "init"), converted)
    trained = load_file(run / "model" / "model.safetensors")  # by next to nothing, so this is what it began with
    assert trained.keys() == converted.keys()
    assert all((trained[name] - converted[name]).abs().max() < 1e-6 for name in trained)
    model, tokenizer = load_model(str(run), device="cpu")
    assert model.config.kv_sharing == "0_1_2_2"
    assert tokenizer("abc")["input_ids"] == byte_tokenizer()("abc")["input_ids"]

    other = training.run([*command, "init.method=inherit"], cwd=tmp_path)
    assert other.returncode == 2 and "init.method=inherit (there: average)" in other.stderr


@pytest.mark.timeout(250)
def test_training_goes_on_from_its_checkpoint_and_converts_only_once(source, tmp_path):
    write_corpus(tmp_path / "corpus")
    run = tmp_path / "run"
    command = train_command()
    kill_when((run / "checkpoints" / "checkpoint-6").exists, command, tmp_path)
    written = {path: path.stat().st_mtime_ns for path in (run / "init").iterdir()}
    process = training.run(command, cwd=tmp_path)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "going on from run/checkpoints/checkpoint-" in process.stdout
    assert json.loads((run / "results.json").read_text())["steps"] == 60
    assert {path: path.stat().st_mtime_ns for path in (run / "init").iterdir()} == written


@pytest.mark.timeout(250)
def test_distilled_models_have_the_type_of_their_source(run_module, tmp_path):
    source = save_source(tmp_path / "source", random_source(3).to(torch.bfloat16))
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    write_corpus(tmp_path / "corpus")
    settings = ["method=distill", "sharing=cla", "trainer.max_steps=1", "data=files", "data.files=corpus/*.txt"]
    settings += ["data.block_size=32", "trainer.global_batch_size=2", "trainer.num_threads=1"]
    (tmp_path / "made").mkdir()
    process = run_module("lckv.convert", "source=source", "out=made/new/..", *settings)
    assert process.returncode == 0, process.stderr
    assert process.stderr.splitlines()[-1] == "made/new/..: cla from source by distill"
    assert {each.dtype for each in read_folder(tmp_path / "made").values()} == {torch.bfloat16}
    assert (tmp_path / "made-training" / "results.json").is_file()
    for name in ("generation_config.json", "tokenizer_config.json", "additional_chat_templates/tools.jinja"):
        assert (tmp_path / "made" / name).read_bytes() == (source / name).read_bytes()
    trained = GenerationConfig.from_pretrained(tmp_path / "made-training" / "model")
    assert {2, 5} <= set(trained.eos_token_id)

    (tmp_path / "made-training").rename(tmp_path / "again-training")
    process = run_module("lckv.convert", "source=source", "out=again", *settings, "trainer.max_steps=2")
    assert process.returncode == 2
    assert f"give another out=..., or remove {tmp_path / 'again-training'}" in process.stderr
    model, _ = load_model(str(tmp_path / "made"), device="cpu")
    assert model.dtype == torch.bfloat16 and model.config.kv_sharing == "0_0_2"
