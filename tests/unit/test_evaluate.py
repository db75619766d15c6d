"""`lckv.evaluate` from the configuration to the results, with a tiny model."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from lckv import evaluate
from lckv.config import DataConfig
from lckv.data.sources import build_source
from lckv.errors import UserError
from lckv.evaluation import evaluations
from lckv.evaluation.model_costs import llama_sizes_of
from lckv.evaluation.text import choose_text, validation_documents
from lckv.training.run_folder import RunFolder
from tests.composing import compose
from tests.reference import tiny_model
from tests.tiny import byte_tokenizer

PATTERN = "0_3_3_3_4"


def save_model(path: Path, **config) -> str:
    settings = dict(vocab_size=300, forward_passes="converge", converge_tolerance=1e-9, bos_token_id=None)
    tiny_model(PATTERN, **(settings | config)).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("models") / "mine")


@pytest.fixture
def run(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs `main` as the command line would, in an empty folder; returns what it printed to stdout."""
    (tmp_path / "validation.txt").write_text("In the beginning was the Word, and the Word was with God.")
    (tmp_path / "training.txt").write_text("Something else.")
    monkeypatch.chdir(tmp_path)
    text = ["data=files", "data.files=training.txt", "data.validation_files=validation.txt"]

    def run(*arguments: str, model: str = folder) -> str:
        evaluate.main(compose([f"model={model}", *text, *arguments], "evaluate"))
        return capsys.readouterr().out

    return run


def read(path: str) -> dict:
    return json.loads(Path(path, "results.json").read_text())


def test_quality_and_costs_are_in_one_file(run, folder: str):
    printed = run("perplexity.context_length=32")
    results = read("runs/evaluation/mine")
    assert list(results) == ["model", "evaluations", "layer_types", "costs", "settings", "hardware", "versions"]
    assert results["model"]["name"] == folder and results["layer_types"] == PATTERN
    costs, figures = results["costs"], results["evaluations"]["perplexity"]
    assert costs["kv_bytes_context_length"] == figures["context_length"] == 32
    assert costs["kv_bytes"]["written"] == costs["kv_bytes_llama"]["written"] * 3 // 5
    assert costs["num_parameters"] == tiny_model(PATTERN, vocab_size=300).num_parameters()
    assert costs["train_tokens_per_second"] is None
    assert results["settings"]["perplexity"]["context_length"] == 32
    for shown in "word_perplexity", f"{figures['loss']:,.4f}", "KV bytes read to decode a token", "written: runs/":
        assert shown in printed


def test_caches_and_attention_change_nothing_and_json_is_alone(run):
    plain = json.loads(run("json=true"))
    assert plain == read("runs/evaluation/mine")
    for arguments in ["cache=paged", "perplexity.cache_chunk=7"], ["attn_implementation=eager"], ["batch_size=1"]:
        figures = json.loads(run("json=true", *arguments, "out=there"))["evaluations"]["perplexity"]
        assert figures["loss"] == pytest.approx(plain["evaluations"]["perplexity"]["loss"], rel=1e-5)
    assert figures["settings"]["cache"] == {"name": "none"}


def test_every_evaluation_is_written_when_it_is_done(run, monkeypatch: pytest.MonkeyPatch):
    def interrupt(subject, config):
        assert set(read("there")["evaluations"]) == {"recall"}
        raise KeyboardInterrupt

    def fail(subject, config):
        raise UserError("cannot be done")

    found = {"recall": lambda *_: {"accuracy": 0.5}, "needle": fail, "speed": interrupt}
    monkeypatch.setattr(evaluations, "find_evaluation", found.get)
    with pytest.raises(KeyboardInterrupt):
        run("evals=[needle,recall,speed]", "out=there")
    assert read("there")["evaluations"]["recall"]["accuracy"] == 0.5
    with pytest.raises(UserError, match="^needle: cannot be done$"):
        run("evals=[needle]", "out=there")
    assert set(read("there")["evaluations"]) == {"recall"}


def test_what_an_evaluation_could_not_do_is_told_behind_its_figures(run, monkeypatch: pytest.MonkeyPatch):
    figures = {"tasks": {"a": {"acc": 0.5}}, "errors": {"b": "is not there"}}
    monkeypatch.setattr(evaluations, "find_evaluation", lambda name: lambda subject, config: figures)
    with pytest.raises(UserError, match="^harness: b: is not there$"):
        run("evals=[harness]", "out=there")
    assert read("there")["evaluations"]["harness"]["tasks"] == {"a": {"acc": 0.5}}


def test_a_checkpoint_belongs_to_its_run(run, tmp_path: Path):
    for number in (2, 4):
        save_model(tmp_path / "runs" / "mine" / "checkpoints" / f"checkpoint-{number}", initializer_range=number / 100)
    folder = RunFolder(tmp_path / "runs" / "mine")
    folder.config.write_text(yaml.safe_dump({"data": {"block_size": 48}}))
    folder.append_metrics({"step": 4, "loss": 1.0, "tokens_per_second": 7})
    for number in (2, 4):
        run(model=f"runs/mine/checkpoints/checkpoint-{number}")
        results = read(f"runs/mine/evaluation/checkpoint-{number}")
        assert results["evaluations"]["perplexity"]["context_length"] == 48
        assert results["costs"]["train_tokens_per_second"] == 7


@pytest.fixture
def trained_run(run, tmp_path: Path) -> RunFolder:
    """A run that was trained on `corpus.txt`, a single document."""
    (tmp_path / "corpus.txt").write_text("\n".join(f"This is line {index}." for index in range(200)))
    folder = RunFolder(tmp_path / "trained")
    save_model(folder.model)
    data = {"name": "files", "files": "corpus.txt", "block_size": 32, "validation_fraction": 0.05}
    folder.config.write_text(yaml.safe_dump({"data": data}))
    folder.append_metrics({"step": 4, "loss": 1.0})
    return folder


@pytest.mark.parametrize(
    ("arguments", "num_words", "told"),
    [
        ([], 40, "only what the training run held out of its own"),
        (["data=files", "data.files=corpus.txt"], 40, "only what the training run held out"),
        (["data=files", "data.files=copy.jsonl"], 802, "is in part what the model was trained on"),
        (["data=files", "data.files=[corpus.txt,other.txt]"], 802, "is in part what the model was trained on"),
        (["data=files", "data.validation_files=corpus.txt"], 800, "is in part what the model was trained on"),
        (["data=files", "data.files=other.txt"], 2, ""),
        (["data=files", "data.validation_files=other.txt"], 2, ""),
    ],
)
def test_all_of_a_text_is_scored_but_of_the_training_text_what_was_held_out(
    trained_run: RunFolder, capsys, caplog, arguments: list[str], num_words: int, told: str
):
    (trained_run.path.parent / "other.txt").write_text("Something else.")
    texts = "Something else.", (trained_run.path.parent / "corpus.txt").read_text()
    (trained_run.path.parent / "copy.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with caplog.at_level("INFO"):
        evaluate.main(compose(["model=trained", "json=true", *arguments], "evaluate"))
    assert json.loads(capsys.readouterr().out)["evaluations"]["perplexity"]["num_words"] == num_words
    assert told in caplog.text


def lines_of(name: str, **settings) -> DataConfig:
    return DataConfig(name="files", files=name, document_separator="\n", **settings)


@pytest.mark.parametrize("name", [None, "lines.txt"])
@pytest.mark.parametrize("setting", [{"max_documents": 3}, {"max_documents": 300}, {"validation_fraction": 0.5}])
def test_what_was_held_out_is_not_moved(tmp_path: Path, monkeypatch, name: str | None, setting: dict):
    monkeypatch.chdir(tmp_path)
    Path("lines.txt").write_text("\n".join(f"Line {index}" for index in range(100)))
    own = lines_of("lines.txt", validation_fraction=0.1)
    stored, is_named = asdict(own), name is not None
    given = replace(lines_of(name) if name else DataConfig(), **({"validation_fraction": 1.0} | setting))
    with pytest.raises(UserError, match=r"^data\.\w+=[\d.]+: this is the text of the model's training"):
        choose_text(given, is_named=is_named, stored=stored)
    same = {key: getattr(own, key) for key in setting}
    given = replace(given, **({"validation_fraction": 1.0} | same))
    chosen = choose_text(given, is_named=is_named, stored=stored)
    assert [*validation_documents(chosen)] == [*build_source(own).validation_documents()]


def test_how_much_of_named_validation_text_is_scored_is_free(tmp_path: Path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    lines = [f"Line {index}" for index in range(20)]
    Path("lines.txt").write_text("\n".join(lines))
    Path("reversed.txt").write_text("\n".join(reversed(lines)))
    own = lines_of("lines.txt", validation_files="reversed.txt", max_documents=5)
    for limit, is_told in (2, False), (15, False), (16, True):
        given = replace(DataConfig(validation_fraction=1.0), max_documents=limit)
        chosen = choose_text(given, is_named=False, stored=asdict(own))
        assert [*validation_documents(chosen)] == lines[::-1][:limit]
        assert ("is in part what the model was trained on" in caplog.text) == is_told


def test_results_of_other_weights_are_refused(run, tmp_path: Path):
    run("out=there")
    before = Path("there/results.json").read_text()
    with pytest.raises(UserError, match="there/results.json: holds the results of other weights .*give another out="):
        run("out=there", model=save_model(tmp_path / "other", initializer_range=0.1))
    assert Path("there/results.json").read_text() == before
    run("out=there", model=save_model(tmp_path / "renamed"))


def test_mistakes_are_named(run):
    with pytest.raises(UserError, match="^perplexity.context_length=1000: allowed is 128 or less"):
        run("perplexity.context_length=1000")


@pytest.mark.parametrize("name", ["perplexity", "recall"])
@pytest.mark.parametrize("cache", ["none", "dynamic"])
def test_figures_of_broken_weights_are_refused(run, tmp_path, name, cache):
    folder, model = save_model(tmp_path / "broken"), tiny_model(PATTERN, vocab_size=300, bos_token_id=None)
    model.lm_head.weight.data[0] = float("nan")
    model.save_pretrained(folder)
    with pytest.raises(UserError, match=f"^{name}: the model's logits are not finite .*: the weights are broken"):
        run(f"evals=[{name}]", f"cache={cache}", model=folder)
    assert read("runs/evaluation/broken")["evaluations"] == {}


@pytest.mark.parametrize(("iso", "expected"), [("kv", 1), (None, None)])
def test_kv_bytes_are_compared_with_those_that_iso_matched(iso: str | None, expected: int | None):
    config = {"iso": iso, "model": {"num_key_value_heads": 1, "num_attention_heads": 4}}
    model = tiny_model("0_0_2_2", num_attention_heads=4, num_key_value_heads=2)
    sizes = llama_sizes_of(model, config)
    assert (sizes and sizes.num_key_value_heads) == expected
    assert llama_sizes_of(model, {}) is None
