"""The commands of the README and of the site's pages run, beside small things of the names that they have.

`runs/demo_llama`, `MODEL` and names of the Hub are models of 4 layers that have seen four batches, texts are short,
and what trains or looks at text is told to make do with little. So this shows that commands do what they say with
the files that they say, not what they come to. What is not run says why in its page (`tests/docs.py`).
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lckv.config.names import CALIBRATED
from lckv.data.chat_templates import CHATML
from tests import commands
from tests.docs import BLOCKS, Block, entry_point
from tests.e2e.conftest import write_corpus

RUN = [
    block
    for block in BLOCKS
    if block.language == "sh" and any(block.reason(each) is None and entry_point(each) for each in block.commands)
]
TEXTS = ["data=files", "data.files=texts/*.txt"]
BRIEF = ["num_threads=1", "prompt_length=20", "new_tokens=3", "rounds=1", "kv_budget=100kB"]
SHORT = ["trainer.max_steps=2", "trainer.eval_steps=null", "trainer.sample_steps=null", "trainer.num_threads=1"]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands name."""
    folder = tmp_path_factory.mktemp("stand_ins")
    write_corpus(folder / "texts")
    texts = [path.read_text() for path in sorted((folder / "texts").iterdir())]
    for name in ("TRAIN.jsonl", "HELDOUT.jsonl"):
        (folder / name).write_text("".join(json.dumps({"text": f"{name} {text}"}) + "\n" for text in texts))
    for name in ("a.txt", "chapter.txt"):
        shutil.copyfile(folder / "texts" / "00.txt", folder / name)
    (folder / "prompts.txt").write_text("In the beginning\nAnd the light\n")
    for pattern in ("llama", "lckv"):
        name = f"runs/demo_{pattern}"
        run(folder, "train", [f"sharing={pattern}", "debug=cpu_smoke", *TEXTS, f"run_dir={name}"])
        shutil.copytree(folder / name, folder / "runs" / "sweep" / pattern)
    for name in ("MODEL", "FOLDER", "HuggingFaceTB/SmolLM2-135M"):
        shutil.copytree(folder / "runs" / "demo_llama" / "model", folder / name)
    (folder / "FOLDER" / "chat_template.jinja").write_text(CHATML)
    talk = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]
    rows = ({"messages": [talk[0] | {"content": f"Who, {number}?"}, talk[1]]} for number in range(20))
    (folder / "conversations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(folder, "convert", ["source=MODEL", "latent=joint", "latent.ratio=2", "out=CONVERTED", *TEXTS])
    return folder


def run(folder: Path, module: str, arguments: list[str], num_processes: int = 1) -> str:
    """Runs a command, which must not fail, and returns what it printed."""
    command = [sys.executable, "-m", f"lckv.{module}", *arguments]
    if any(argument.startswith("hydra/launcher=") for argument in arguments):  # whose workers a fork keeps waiting
        process = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    else:
        process = commands.run(command, folder, timeout=300, num_processes=num_processes)
    assert process.returncode == 0, f"{arguments}\n{process.stderr[-2000:]}"
    return process.stdout


def with_little(module: str, arguments: list[str]) -> list[str]:
    """What is added to a command so that it takes seconds, of what it does not say itself."""
    given = {argument.partition("=")[0] for argument in arguments}
    if "--help" in given:
        return []
    looks_at_text = "latent" in given or any(f"method={method}" in arguments for method in CALIBRATED)
    little = {
        "train": [*TEXTS, *(SHORT if "init.source" in given else ["debug=cpu_smoke"])],
        "sft": [
            *SHORT,
            "too_long=truncate",
            "data.max_conversations=20",
            # Each is a run of its own.
            *([] if "experiment" in given else [f"run_name={'-'.join(arguments[2:]) or 'plain'}"]),
        ],
        "convert": [
            *([*TEXTS, "init.calibration_tokens=1024"] if looks_at_text else []),
            *(SHORT if "method=distill" in arguments else []),
        ],
        "search": [*TEXTS, "calibration_tokens=1024"],
        "benchmark": [*([] if "checkpoints" in given else ["model=nano"]), *BRIEF],
        "evaluate": [
            *(["speed.prompt_length=32"] if "evals=[perplexity,speed]" in arguments else []),
            *(["harness.limit=2"] if "evals=[harness]" in arguments else []),
        ],
    }
    if "hydra/sweeper" in given:
        little[module].append("hydra.sweeper.n_trials=2")
    return [argument for argument in little.get(module, []) if argument.partition("=")[0] not in given]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("block", RUN, ids=str)
def test_commands_run(block: Block, stand_ins: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(stand_ins, folder)
    for command in block.commands:
        entry = entry_point(command)
        if entry is None or block.reason(command) is not None:
            continue
        module, arguments = entry
        for argument in arguments:
            if argument.startswith("out=") and (folder / argument[4:]).is_dir():  # that of the command before
                shutil.rmtree(folder / argument[4:])
        run(folder, module, [*arguments, *with_little(module, arguments)], 2 if command.startswith("torchrun") else 1)
