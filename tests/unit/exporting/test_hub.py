"""What is in an exported folder, and what is refused."""

import errno
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

import lckv
from lckv.config import ExportConfig
from lckv.errors import UserError
from lckv.export import main
from lckv.exporting import bundle as bundling
from lckv.exporting.bundle import bundle
from lckv.exporting.hub import requirements_of
from lckv.exporting.provenance import public_name
from lckv.loading.models import find_checkpoint, load_model
from lckv.models import LCKVLlamaConfig
from tests.reference import SHAPES, tiny_config, tiny_model, token_ids
from tests.tiny import byte_tokenizer

CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture
def given(tmp_path: Path) -> Path:
    return save(tmp_path / "given", "0_0_2s_2s", vocab_size=257)


def save(folder: Path, layer_types: str, **settings) -> Path:
    """A model with a tokenizer that has a chat template."""
    model = tiny_model(layer_types, **settings)
    model.generation_config.update(temperature=0.7, do_sample=True)
    model.save_pretrained(folder)
    byte_tokenizer(chat_template=CHAT).save_pretrained(folder)
    return folder


def export(model: Path, out: Path, **options) -> Path:
    main(ExportConfig(format="hub", model=str(model), out=str(out), **options))
    return out


def front_matter(folder: Path) -> dict:
    return yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---")[1])


def test_folder_holds_all_that_is_needed(given: Path, tmp_path: Path) -> None:
    out = export(given, tmp_path / "out", max_shard_size="20kB")
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "generation_config.json", "modeling_lckv.py", "README.md", "pattern.png"} <= names
    assert {"tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"} <= names
    assert not [name for name in names if name.endswith(".bin")]
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1  # who may read one file may read all
    config = json.loads((out / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_lckv.LCKVLlamaForCausalLM"
    assert json.loads((out / "generation_config.json").read_text())["temperature"] == 0.7
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "so"}], tokenize=False) == "so"


@torch.no_grad()
def test_exported_model_is_a_model_here_too(given: Path, tmp_path: Path) -> None:
    out = export(given, tmp_path / "out")
    (before, _), (after, _) = load_model(str(given)), load_model(str(out))
    input_ids = token_ids(2, 9, vocab_size=257)
    assert torch.equal(before(input_ids).logits, after(input_ids).logits)
    assert getattr(after.config, "auto_map", None) is None  # who writes it once more may leave the code behind
    again = export(out, tmp_path / "again")
    for file in ("config.json", "modeling_lckv.py", "model.safetensors"):
        assert (again / file).read_bytes() == (out / file).read_bytes()


FAMILIES = {
    "llama": ("0_1_2_3", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral": ("0s_1s_2s_3s", {}),
    "qwen2": ("0_1s_2_3s", {"attention_bias": True, "attention_output_bias": False}),
    "qwen3": ("0_1s_2_3s", {"use_qk_norm": True, "head_dim": 24}),
    "granite": ("0_1_2_3", SHAPES["granite"]),
}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_unshared_models_need_no_code(family: str, tmp_path: Path) -> None:
    layer_types, settings = FAMILIES[family]
    given = save(tmp_path / "given", layer_types, vocab_size=257, **settings)
    out = export(given, tmp_path / "out")
    assert not list(out.glob("*.py")) and "trust_remote_code" not in (out / "README.md").read_text()
    theirs, info = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=False, output_loading_info=True)
    assert theirs.config.model_type == family and not any(info.values())
    ours, input_ids = load_model(str(given))[0], token_ids(2, 9, vocab_size=257)
    torch.testing.assert_close(theirs(input_ids).logits, ours(input_ids).logits, atol=1e-5, rtol=1e-5)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(theirs.generate(input_ids, **options), ours.generate(input_ids, **options))


@pytest.mark.parametrize(
    ("layer_types", "settings"),
    [
        ("0_1_2_3", {"force_nodiag": True}),
        ("0_1s_2_3", {}),
        ("0_1_2_3", SHAPES["gpt2"]),
        ("0_1_2_3", SHAPES["smollm3"]),
    ],
)
def test_what_no_family_says_keeps_its_code(layer_types: str, settings: dict, tmp_path: Path) -> None:
    out = export(save(tmp_path / "given", layer_types, vocab_size=257, **settings), tmp_path / "out")
    assert (out / "modeling_lckv.py").is_file()


def test_card_says_what_is_known(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (given / "conversion.json").write_text(
        json.dumps({"source": "some/model", "method": "average", "secret": "/home"})
    )
    fingerprint = find_checkpoint(str(given)).fingerprint()
    figures = {"perplexity": {"perplexity": 12.34, "settings": {"stride": 7}}}
    results = {"model": {"name": "x", "fingerprint": fingerprint}, "evaluations": figures}
    (given / "results.json").write_text(json.dumps(results))
    out = export(given, tmp_path / "out")
    card = (out / "README.md").read_text()
    assert "`0_0_2s_2s`" in card and "(pattern.png)" in card and "window of 3 tokens" in card
    assert "| written per new token | 128 | 256 | 2.00 |" in card  # 2 owners of 2 heads of 8, keys and values, 2 bytes
    assert "| perplexity | perplexity | 12.34 |" in card and "stride" not in card
    assert "| method | average |" in card and "/home" not in card and str(tmp_path) not in card
    said = ModelCard(card).data.to_dict()
    assert said == front_matter(out)
    assert said["library_name"] == "transformers" and said["license"] == "unknown"
    assert said["base_model"] == "some/model" and said["pipeline_tag"] == "text-generation"


def test_card_of_a_run_tells_settings_and_both_kinds_of_figures(tmp_path: Path) -> None:
    run = tmp_path / "run"
    save(run / "model", "0_0_2_2", vocab_size=257)
    settings = {"optim": {"learning_rate": 0.003}, "data": {"name": "files", "files": "/home/me/text"}, "seed": 5}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    (run / "metrics.jsonl").touch()
    (run / "results.json").write_text(json.dumps({"eval_perplexity": 9.25, "tokens": 4096}))
    (run / "evaluation").mkdir()
    identity = {"name": "run", "fingerprint": find_checkpoint(str(run)).fingerprint()}
    recall = {"accuracy": {"4": 0.75}}
    results = {"model": identity, "evaluations": {"recall": recall}}
    (run / "evaluation" / "results.json").write_text(json.dumps(results))
    card = (export(run, tmp_path / "out") / "README.md").read_text()
    for row in (
        "| held-out text | eval_perplexity | 9.25 |",
        "| recall | accuracy/4 | 0.75 |",
        "| optim.learning_rate | 0.003 |",
        "| data.name | files |",
        "| seed | 5 |",
        "| tokens | 4096 |",
    ):
        assert row in card
    assert "/home" not in card and "base_model" not in front_matter(tmp_path / "out")


def test_file_beside_the_model_that_cannot_be_read(given: Path, tmp_path: Path) -> None:
    (given / "conversion.json").write_text("{torn")
    with pytest.raises(UserError, match="conversion.json: cannot be read"):
        export(given, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pattern_of_other_weights_is_one_line(given: Path, tmp_path: Path) -> None:
    config = json.loads((given / "config.json").read_text()) | {"kv_sharing": "0_1_2_3"}
    (given / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"the weights do not fit config.json: there is no model.layers.1"):
        export(given, tmp_path / "out")


def test_figures_of_other_weights_are_left_out(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    results = {"model": {"name": "x", "fingerprint": "others"}, "evaluations": {"perplexity": {"perplexity": 12.34}}}
    (given / "results.json").write_text(json.dumps(results))
    assert "12.34" not in (export(given, tmp_path / "out") / "README.md").read_text()
    assert "other weights" in caplog.text


def test_names_of_this_machine_are_not_told(tmp_path: Path) -> None:
    assert public_name("owner/name") == "owner/name"
    assert public_name(str(tmp_path / "mine")) == "mine"
    assert public_name("runs/deep/mine") == "mine"


def test_other_families_are_left_to_transformers(tmp_path: Path) -> None:
    (tmp_path / "llama").mkdir()
    for name, text in ("config.json", '{"model_type": "llama"}'), ("model.safetensors", ""), ("tokenizer.json", ""):
        (tmp_path / "llama" / name).write_text(text)
    with pytest.raises(UserError, match="is of model_type 'llama', which transformers loads as it is"):
        export(tmp_path / "llama", tmp_path / "out")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])
def test_nothing_is_left_of_an_export_that_ends_early(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(LCKVLlamaConfig, "save_pretrained", fail)
    with pytest.raises(type(error)):
        export(given, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["given"]


def test_bundle_is_clean_code_that_stands_alone(tmp_path: Path) -> None:
    code = bundle("lckv.models.modeling_lckv", ("torch>=2.11",))
    assert not re.search(r"^\s*(from|import) lckv", code, re.MULTILINE)
    assert "Apache-2.0" in code and lckv.__version__ in code
    file = tmp_path / "modeling_lckv.py"
    file.write_text(code)
    checks = ["--isolated", "--select=E,F,W,B", "--ignore=E402,E501"]
    done = subprocess.run([sys.executable, "-m", "ruff", "check", *checks, str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    package = Path(lckv.__file__).parents[1]
    for source in (package / "lckv" / "models").rglob("*.py"):
        name = ".".join(source.relative_to(package).with_suffix("").parts)
        assert source.name == "__init__.py" or f"# {name}\n" in code


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("from lckv.errors import UserError\n\n\ndef first_line():\n    pass\n", "first_line: means several things"),
        ("from lckv.errors import UserError\nfrom os import near_miss\n", "near_miss: means several things"),
        ("def late():\n    from lckv.errors import UserError\n", "imports from lckv in a function"),
    ],
)
def test_bundle_refuses_what_would_mean_something_else(
    other: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = bundling._source
    monkeypatch.setattr(bundling, "_source", lambda name: other if name == "lckv.other" else read(name))
    with pytest.raises(ValueError, match=message):
        bundle("lckv.other")


def test_requirements_are_those_of_this_package() -> None:
    project = tomllib.loads((Path(lckv.__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    required = [line.partition(",")[0] for line in project["project"]["dependencies"]]
    assert set(requirements_of(tiny_config("0_0"))) <= set(required)
