"""What entry points answer to mistakes on their command lines, all in one process: `python -m tests.answers`.

Hydra takes a quarter of a second to compose a configuration from its groups, so that is done once for each choice of
groups; single values are then set by the function with which Hydra sets them.
"""

import copy
import io
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, flag_override

from lckv import cli, config_errors, hydra_store, overrides
from lckv.errors import UserError

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
    schema = hydra_store.SCHEMAS[command]
    try:
        main(_prepared(command, schema, given))
    except UserError as error:
        return " ".join(str(error).split()).replace(f"{Path.cwd()}/", "")
    except config_errors.CONFIG_ERRORS as error:
        return config_errors.describe(error, schema)
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


def _prepared(command: str, schema: type, given: Sequence[str]):
    others, literals = overrides.take_literals(given, cli.literal_keys(schema))
    quoted = overrides.quote_overrides(others, cli.open_keys(schema))
    parsed = OverridesParser.create().parse_overrides(quoted)
    groups = [each.input_line for each in parsed if _is_group(each.key_or_group)]
    values = [each for each in parsed if each.input_line not in groups]
    composed = copy.deepcopy(_composed(command, tuple(map(str, groups))))
    for key, text in literals.items():
        OmegaConf.update(composed, key, overrides.escape(text))
    ConfigLoaderImpl._apply_overrides_to_config(values, composed)
    hydra_cfg = composed.hydra
    with flag_override(composed, ["struct", "readonly"], False):
        del composed["hydra"]
    with flag_override(hydra_cfg, ["struct", "readonly"], False):
        hydra_cfg.overrides.task = quoted
    return cli.prepare(composed, hydra_cfg)


def _is_group(key: str) -> bool:
    return key in hydra_store.NAMED_OPTIONS or (hydra_store.config_dir() / key).is_dir()


@cache
def _composed(command: str, groups: tuple[str, ...]) -> DictConfig:
    hydra_store.register_schema(command)
    with initialize_config_dir(str(hydra_store.config_dir()), version_base="1.3"):
        return compose(command, list(groups), return_hydra_config=True)


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
