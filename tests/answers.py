"""What entry points answer to mistakes on their command lines, all in one process: `python -m tests.answers`."""

import io
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from lckv.commands import cli
from lckv.errors import UserError
from tests.composing import compose

FILE = Path(__file__).with_name("mistakes.txt")


class Mistake(NamedTuple):
    """A command line that is answered in one line."""

    command: str
    arguments: str
    answer: str

    def __str__(self) -> str:
        return f"{self.command} {self.arguments} => {self.answer}"


def read_mistakes() -> Iterator[Mistake]:
    """The table: a line each, `COMMAND ARGUMENTS... => ANSWER`."""
    for line in FILE.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            given, _, answer = line.partition(" => ")
            command, _, arguments = given.partition(" ")
            yield Mistake(command, arguments, answer)


def answer_to(command: str, arguments: str) -> str:
    """The line that `python -m lckv.COMMAND ARGUMENTS` would print."""
    main, given = import_module(f"lckv.{command}").main, shlex.split(arguments)
    if any(argument.startswith("-") for argument in given):  # Hydra's own flags
        return _answer_of_the_command_line(command, given)
    try:
        main(compose(given, command))
    except UserError as error:
        return " ".join(str(error).split()).replace(f"{Path.cwd()}/", "")
    return ""


def _answer_of_the_command_line(command: str, given: Sequence[str]) -> str:
    stderr = io.StringIO()
    sys.argv = [f"lckv.{command}", *given]
    try:
        with redirect_stderr(stderr):
            cli.run(lambda cfg: None, command)
    except SystemExit:
        pass
    begin = f"lckv.{command}: error: "
    return next((line[len(begin) :] for line in stderr.getvalue().splitlines() if line.startswith(begin)), "")


class _Absent:
    """Makes the import of what is slow fail."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name in ("torch", "transformers"):
            raise ImportError(f"{name} is imported")


def _answer_at_once(mistake: Mistake) -> Mistake:
    """The line with what is answered, or with what was imported before."""
    try:
        return mistake._replace(answer=answer_to(mistake.command, mistake.arguments))
    except ImportError as error:
        return mistake._replace(answer=f"(not at once: {error})")


def make_files(folder: Path) -> None:
    """Models that are broken or of another kind, and one that is whole as far as can be seen without reading it."""
    sizes = {"num_hidden_layers": 4, "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 64, "sliding_window": 8}
    configs: dict[str, object] = {
        "mla": {"model_type": "deepseek_v3", "kv_lora_rank": 16},
        "experts": {"model_type": "mixtral", "num_local_experts": 8},
        "stablelm": {"model_type": "stablelm", "use_parallel_residual": True},
        "llama": {"model_type": "llama", **sizes},
        "shared": {"model_type": "lckv-llama", "layer_types": "0_0_2_2", **sizes},
        "sliding": {
            "model_type": "lckv-llama",
            "layer_types": "0_1s_1_1",
            **sizes,
            "hidden_act": "silu",
            "sliding_window": 32,
            "max_position_embeddings": 64,
        },
        "silu": {
            "model_type": "lckv-llama",
            "layer_types": "0_1s_1_1",
            **sizes,
            "hidden_act": "silu",
            "sliding_window": 64,
            "max_position_embeddings": 64,
        },
        "single": {
            "model_type": "lckv-llama",
            "layer_types": "0s",
            **sizes,
            "num_hidden_layers": 1,
            "hidden_act": "silu",
        },
        "latent": {"model_type": "lckv-llama", "layer_types": None, **sizes, "kv_latents": [{"latent": 8}] * 4},
        "wrong": {"model_type": "lckv-llama", "layer_types": "0_0_9", **sizes, "num_hidden_layers": 3},
        "odd": {"model_type": "llama", **sizes, "num_attention_heads": 4, "num_key_value_heads": 3},
        "ahead": {"model_type": "llama", "is_causal": False},
        "packed": {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}},
        "list": [],
        "weightless": {"model_type": "llama", **sizes},
        "mute": {"model_type": "llama", **sizes},
    }
    for name, config in configs.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
        lacking = {"weightless": ["model.safetensors"], "mute": ["tokenizer.json"]}.get(name, [])
        for file in {"model.safetensors", "tokenizer.json"}.difference(lacking):
            (folder / name / file).touch()
    (folder / "empty").mkdir()
    (folder / "full").mkdir()
    for file in ("log", "fake.gguf", "full/file"):
        (folder / file).write_text("a note", encoding="utf-8")
    for file, text in ("text.md", "a note"), ("blank.md", " \n"):
        (folder / file).write_text(text, encoding="utf-8")
    _make_conversations(folder)
    _make_adapters(folder)


def _make_conversations(folder: Path) -> None:
    """Files of conversations, each with something wrong in its second line; `talk.jsonl` is whole."""
    user, assistant = ({"role": role, "content": "a"} for role in ("user", "assistant"))
    second = {
        "talk": {"messages": [user, assistant]},
        "field": {"conversations": []},
        "silent": {"messages": [user]},
        "order": {"messages": [user, assistant, assistant]},
        "role": {"messages": [user, {"role": "bot", "content": "a"}]},
        "number": {"messages": [user, {"role": "assistant", "content": 3}]},
    }
    for name, row in second.items():
        lines = [{"messages": [user, assistant]}, row]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    pairs = {"pairs": ("a", "b"), "alike": ("a", "a"), "half": ("a", None)}
    for name, answers in pairs.items():
        row = {"prompt": "?"} | {
            field: text for field, text in zip(("chosen", "rejected"), answers, strict=True) if text
        }
        (folder / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n", encoding="utf-8")
    (folder / "torn.jsonl").write_text('\n{"messages": [', encoding="utf-8")
    (folder / "nothing.jsonl").touch()


def _make_adapters(folder: Path) -> None:
    """Adapters as far as a look at their headers tells: of values that every layer computes, and another kind."""
    header = {
        f"base_model.model.model.layers.{layer}.self_attn.v_proj.lora_A.weight": {
            "dtype": "F32",
            "shape": [2, 32],
            "data_offsets": [0, 0],
        }
        for layer in range(4)
    }
    for name, kind in ("lora", "LORA"), ("prefix", "PREFIX_TUNING"):
        (folder / name).mkdir()
        text = json.dumps(header).encode()
        (folder / name / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
        (folder / name / "adapter_config.json").write_text(json.dumps({"peft_type": kind}), encoding="utf-8")


if __name__ == "__main__":
    sys.meta_path.insert(0, _Absent())  # type: ignore[arg-type]
    os.chdir(tempfile.mkdtemp())
    make_files(Path())
    print(json.dumps([str(_answer_at_once(each)) for each in read_mistakes()]))
