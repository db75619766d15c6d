import json
import logging
import os
import random
import re
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from importlib import resources
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from transformers import LlamaConfig, LlamaForCausalLM

from lckv.cache import build_cache
from lckv.config import DataConfig, EvaluationConfig, HarnessConfig
from lckv.data.sources import build_source
from lckv.data.tokenizer import frame_texts
from lckv.errors import UserError
from lckv.evaluation import harness_tasks, held_out_tasks
from lckv.evaluation.evaluations import Subject, run_evaluations
from lckv.evaluation.harness import harness, make_language_model, num_rows_that_fit, score
from lckv.evaluation.harness_tasks import load_tasks
from lckv.generation.prompts import encode_prompts
from tests.reference import tiny_model, token_ids
from tests.tiny import byte_tokenizer

# One process, since importing lm-eval and reading its index of tasks take longer than most tests.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SIZES = {"vocab_size": 257, "max_position_embeddings": 320, "eos_token_id": 256, "bos_token_id": None}
BOTH = ["lckv_last_word", "lckv_cloze"]


def make_model(layer_types="0_1", **config):
    return tiny_model(layer_types, **(SIZES | {"initializer_range": 0.3} | config))


def plain_llama(model):
    """transformers' own Llama of the same weights."""
    names = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
        *("num_hidden_layers", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "eos_token_id"),
    )
    options = {name: getattr(model.config, name) for name in names}
    llama = LlamaForCausalLM(LlamaConfig(**options, bos_token_id=None, attn_implementation="sdpa")).eval()
    llama.load_state_dict(model.state_dict())
    return llama


def make_subject(model=None, cache=None, **options):
    model = make_model() if model is None else model
    new_cache = None if cache is None else lambda: build_cache(cache, model.config, **options)
    return Subject(model, byte_tokenizer(), DataConfig(), new_cache)


def run(subject=None, **options):
    options = {"tasks": BOTH, "limit": 8, "batch_size": 8, "bootstrap_iters": 0} | options
    config = EvaluationConfig(harness=HarnessConfig(**options))
    return harness(subject or make_subject(), config)


def write_task(folder, name, **config):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **config}))
    return str(folder)


def generation_task(folder, **config):
    """Continues three texts by a few tokens; what is right, a model of random weights does not know."""
    rows = [{"text": text, "answer": "a"} for text in ("In the beginning", "And God", "Now it came to pass")]
    folder.mkdir(exist_ok=True)
    (folder / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    return write_task(
        folder,
        "continued",
        dataset_path="json",
        dataset_kwargs={"data_files": {"test": str(folder / "rows.json")}, "cache_dir": str(folder / "cache")},
        output_type="generate_until",
        test_split="test",
        doc_to_text="{{text}}",
        doc_to_target="{{answer}}",
        **{"generation_kwargs": {"max_gen_toks": 8, "until": ["\n\n"]}} | config,
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )


def missing_task(folder, name, dataset_path):
    return write_task(
        folder,
        name,
        dataset_path=dataset_path,
        output_type="multiple_choice",
        test_split="test",
        doc_to_text="{{text}}",
        doc_to_target="{{label}}",
        doc_to_choice=["no", "yes"],
    )


def by_lm_eval(model, tasks, batch_size, folder=None, **options):
    """What lm-eval's own `hf` model gives, task by task, and its answers."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folders = [harness_tasks.TASKS, *([folder] if folder else [])]
    results = simple_evaluate(
        HFLM(model, tokenizer=byte_tokenizer(), batch_size=batch_size),
        tasks=tasks,
        task_manager=TaskManager(include_path=folders, include_defaults=False),
        limit=8,
        bootstrap_iters=10,
        **dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), 0) | options,
    )
    metrics = {
        task: {key.removesuffix(",none"): value for key, value in results["results"][task].items() if "," in key}
        for task in tasks
    }
    return metrics, {task: [row["filtered_resps"] for row in rows] for task, rows in results["samples"].items()}


def read_samples(folder):
    rows = {}
    for path in folder.rglob("samples_*.jsonl"):
        task = path.name.removeprefix("samples_").rsplit("_", 1)[0]
        rows[task] = [json.loads(line) for line in path.read_text().splitlines()]
    return rows


# The same as lm-eval alone.


@pytest.mark.parametrize("batch_size", [4, "auto"])
def test_the_identity_pattern_gives_what_lm_evals_own_model_gives(batch_size, tmp_path):
    model = make_model()
    expected, answers = by_lm_eval(plain_llama(model), BOTH, batch_size)
    actual = run(
        make_subject(model), batch_size=batch_size, log_samples=True, output_path=str(tmp_path), bootstrap_iters=10
    )
    assert actual["tasks"] == expected
    assert actual["num_samples"] == dict.fromkeys(BOTH, 8) and actual["errors"] == {}
    # The figures could agree by chance, the likelihoods not.
    assert {task: [row["filtered_resps"] for row in rows] for task, rows in read_samples(tmp_path).items()} == {
        task: [[[str(number) for number in answer] for answer in row] for row in rows]
        for task, rows in answers.items()
    }


def test_the_beginning_of_a_text_is_not_scored():
    """By hand: the likelihood of the text's tokens behind bos, which lm-eval and the tokenizer both would add."""
    model = make_model()
    subject = make_subject(model)
    subject.tokenizer.bos_token = "Z"
    frame_texts(subject.tokenizer)
    text = "in the beginning"
    tokens = torch.tensor([subject.tokenizer(text)["input_ids"]])
    assert tokens[0, 0] == subject.tokenizer.bos_token_id
    with torch.no_grad():
        likelihoods = model(tokens[:, :-1]).logits.log_softmax(-1).gather(2, tokens[:, 1:, None])
    language_model = make_language_model(subject, HarnessConfig())
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0)]
    assert language_model.loglikelihood_rolling(requests)[0] == pytest.approx(likelihoods.sum().item(), abs=1e-4)
    continued = [Instance("loglikelihood", {}, (text[:6], text[6:]), 0)]
    assert language_model.loglikelihood(continued)[0][0] == pytest.approx(likelihoods[0, 6:].sum().item(), abs=1e-4)


@pytest.mark.parametrize(
    ("cache", "layer_types"),
    [("dynamic", "0_1"), ("paged", "0_0_2_2"), ("static", "0_2_2_3"), ("sink", "0_0_2_2"), ("paged", "0_2_2_3")],
)
def test_an_exact_cache_changes_no_likelihood(cache, layer_types):
    model = make_model(layer_types)
    options = {"static": {"max_length": 64}}.get(cache, {})
    input_ids = token_ids(3, 40, vocab_size=257)
    plain = score(model, input_ids, None)
    through_cache = score(model, input_ids, lambda: build_cache(cache, model.config, **options))
    torch.testing.assert_close(through_cache, plain, rtol=0, atol=1e-5)


def test_figures_are_the_same_through_any_exact_cache():
    model = make_model("0_0_2_2")
    plain, paged = (run(make_subject(model, cache), limit=2)["tasks"] for cache in (None, "paged"))
    assert paged == plain


def test_a_cache_that_rounds_is_measured():
    model = make_model()
    input_ids = token_ids(2, 200, vocab_size=257)
    exact = score(model, input_ids, None)
    options = {"group_size": 16, "residual_length": 16}
    error = {
        bits: (score(model, input_ids, lambda bits=bits: build_cache("quantized", model.config, bits=bits, **options)))
        .sub(exact)
        .norm()
        for bits in (8, 2)
    }
    assert error[2] > 10 * error[8] > 0
    assert torch.equal(
        score(model, input_ids[:, :16], lambda: build_cache("quantized", model.config, **options)),
        score(model, input_ids[:, :16], None),
    )


@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_is_what_lm_evals_own_model_generates(cache, tmp_path):
    model = make_model()
    folder = generation_task(tmp_path / "tasks")
    _, answers = by_lm_eval(plain_llama(model), ["continued"], 2, folder)
    subject = make_subject(model, cache, **({"max_length": 64} if cache == "static" else {}))
    out = tmp_path / "out"
    figures = run(
        subject, tasks=["continued"], include_path=folder, batch_size=2, log_samples=True, output_path=str(out)
    )
    assert figures["tasks"]["continued"]["exact_match"] == 0
    texts = [row["filtered_resps"] for row in read_samples(out)["continued"]]
    assert texts == answers["continued"] and all(text != [""] for text in texts)


def test_generation_goes_through_the_given_cache(tmp_path):
    model, caches = make_model("0_0_2_2"), []

    def new_cache():
        caches.append(build_cache("dynamic", model.config))
        return caches[-1]

    subject = Subject(model, byte_tokenizer(), DataConfig(), new_cache)
    run(subject, tasks=["continued"], include_path=generation_task(tmp_path), batch_size=3)
    assert [cache.get_seq_length() for cache in caches] == [len("Now it came to pass") + 7]


# What is returned, and left as it was.


def test_groups_figures_are_numbers_that_json_can_hold():
    figures = run(tasks=["lckv_local"], limit=4, bootstrap_iters=10)
    assert json.loads(json.dumps(figures)) == figures
    assert set(figures["tasks"]) == set(BOTH)
    assert set(figures["tasks"]["lckv_last_word"]) == {"perplexity", "perplexity_stderr", "acc", "acc_stderr"}
    mean = sum(figures["tasks"][task]["acc"] for task in BOTH) / 2
    assert figures["groups"]["lckv_local"]["acc"] == pytest.approx(mean)
    assert figures["limit"] == 4 and figures["lm_eval_version"]
    assert figures["num_fewshot"] == dict.fromkeys(BOTH, 0)


def test_the_process_is_left_as_it_was(tmp_path, capfd, caplog, monkeypatch):
    monkeypatch.delenv("SET_BY_A_TASK", raising=False)
    (tmp_path / "noisy.py").write_text(
        "import logging, os\n"
        "from lckv.evaluation.held_out_tasks import last_word\n"
        "def load(**options):\n"
        "    os.environ['SET_BY_A_TASK'] = '1'\n"
        "    print('noise')\n"
        "    logging.getLogger('lm_eval.tasks').warning('noise')\n"
        "    return last_word()\n"
    )
    own = (harness_tasks.TASKS / "lckv_last_word.yaml").read_text()
    own = own.replace("task: lckv_last_word", "task: noisy").replace(
        "lckv.evaluation.held_out_tasks.last_word", "noisy.load"
    )
    (tmp_path / "noisy.yaml").write_text(own)
    subject = make_subject(make_model().train())
    expected = _draw_after_seeds()
    _seed_all()
    level = logging.getLogger("lm_eval").level
    options = {"tasks": ["noisy"], "include_path": str(tmp_path), "limit": 2, "batch_size": "auto"}
    cfg = EvaluationConfig(["harness"], harness=HarnessConfig(**options, bootstrap_iters=0))
    ((_, figures),) = run_evaluations(subject, cfg, {})
    assert set(figures["tasks"]) == {"noisy"}
    assert _draw() == expected
    assert "SET_BY_A_TASK" not in os.environ and logging.getLogger("lm_eval").level == level
    assert subject.model.training and subject.tokenizer.pad_token is None
    assert capfd.readouterr().out == ""
    assert not [record for record in caplog.records if record.name.startswith("lm_eval")]


def _seed_all():
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(7)


def _draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


def _draw_after_seeds():
    _seed_all()
    return _draw()


def test_options_have_an_effect():
    subject = make_subject(make_model(max_position_embeddings=4096))
    last_words = partial(run, tasks=["lckv_last_word"], limit=2)
    plain = last_words(subject)
    assert plain["num_fewshot"] == {"lckv_last_word": 0}
    assert last_words(subject, max_length=64)["tasks"] != plain["tasks"]
    part = last_words(subject, limit=0.01, bootstrap_iters=10)
    assert part["num_samples"] == {"lckv_last_word": 5}
    assert plain["tasks"]["lckv_last_word"]["acc_stderr"] is None
    assert part["tasks"]["lckv_last_word"]["acc_stderr"] is not None
    few = last_words(subject, num_fewshot=1)
    assert few["num_fewshot"] == {"lckv_last_word": 1} and few["tasks"] != plain["tasks"]


def test_answers_of_broken_weights_are_refused(tmp_path):
    subject = make_subject()
    subject.model.lm_head.weight.data[0] = torch.nan
    for options in {"tasks": BOTH}, {"tasks": ["continued"], "include_path": generation_task(tmp_path)}:
        with pytest.raises(UserError, match="none can be done; .*: the model's logits are not finite"):
            run(subject, **options)


def test_the_chat_template_is_applied():
    subject = make_subject()
    plain = run(subject, tasks=["lckv_last_word"], limit=2)
    subject.tokenizer.chat_template = "{% for m in messages %}user: {{ m['content'] }}\nyou:{% endfor %}"
    chat = run(subject, tasks=["lckv_last_word"], limit=2, apply_chat_template=True)
    assert chat["tasks"] != plain["tasks"]


@pytest.mark.parametrize("beginning", ["", "{{ bos_token }}"])
def test_a_chat_begins_as_its_template_says_and_as_in_generation(beginning):
    subject = make_subject()
    subject.tokenizer.bos_token = "Z"
    frame_texts(subject.tokenizer)
    subject.tokenizer.chat_template = (
        f"{beginning}{{% for m in messages %}}user: {{{{ m.content }}}}\nyou:{{% endfor %}}"
    )
    language_model = make_language_model(subject, HarnessConfig(apply_chat_template=True))
    text = language_model.apply_chat_template([{"role": "user", "content": "hello"}])
    (expected,) = encode_prompts(["hello"], subject.tokenizer)
    assert (expected[0] == subject.tokenizer.bos_token_id) == bool(beginning)
    assert language_model.tok_encode(text) == language_model.tok_batch_encode([text])[0][0].tolist() == expected
    assert language_model._encode_pair(text, " yes")[0] == expected


def test_files_are_written(tmp_path):
    run(limit=2, output_path=str(tmp_path / "a"))
    assert len([*(tmp_path / "a").rglob("results_*.json")]) == 1 and read_samples(tmp_path / "a") == {}
    run(limit=2, output_path=str(tmp_path / "b" / "it.json"), log_samples=True)
    assert len([*(tmp_path / "b").glob("it_*.json")]) == 1
    samples = read_samples(tmp_path / "b")
    assert {task: len(rows) for task, rows in samples.items()} == dict.fromkeys(BOTH, 2)


def test_samples_go_beside_the_results_by_default(tmp_path):
    run(replace(make_subject(), folder=tmp_path), limit=2, log_samples=True)
    assert set(read_samples(tmp_path / "harness")) == set(BOTH)
    assert [path.name for path in tmp_path.iterdir()] == ["harness"]


def test_a_number_of_examples_that_a_task_does_not_take_is_told(tmp_path, caplog):
    figures = run(
        tasks=["continued"], include_path=generation_task(tmp_path, num_fewshot=0), batch_size=3, num_fewshot=2
    )
    assert figures["num_fewshot"] == {"continued": 0}
    assert "harness.num_fewshot=2: not so for continued" in caplog.text


# What goes wrong.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"apply_chat_template": True}, "harness.apply_chat_template=True: the tokenizer has no chat template"),
        ({"log_samples": True}, "harness.log_samples=True: needs harness.output_path"),
        ({"include_path": "/no/where"}, "harness.include_path='/no/where': is no folder"),
        ({"tasks": ["lckv_local", "lckv_cloze"]}, "Duplicate task 'lckv_cloze'"),
    ],
)
def test_settings_that_cannot_be(options, message):
    with pytest.raises(UserError) as error:
        run(make_subject(_broken_model()), **options)
    assert message in str(error.value) and "\n" not in str(error.value)


def _broken_model():
    """Says so when it is called: mistakes have to be found before."""
    model = make_model()
    model.forward = None
    return model


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"harness.output_path='.*file/out': .*file is a file"):
        run(make_subject(_broken_model()), output_path=str(tmp_path / "file" / "out"))


def test_an_unknown_task_and_what_was_meant():
    with pytest.raises(UserError) as error:
        run(make_subject(_broken_model()), tasks=["lckv_local", "helaswag"])
    assert str(error.value).startswith("harness.tasks='helaswag': no task, group or YAML file of this name")
    assert str(error.value).endswith("did you mean 'hellaswag'?")


def load(tasks, folder=None):
    """Loads without running."""
    options = HarnessConfig(tasks=tasks, include_path=None if folder is None else str(folder))
    return load_tasks(options, 320, "harness.")


def test_what_is_not_there_does_not_stop_the_others():
    """The machine is offline, as in all tests."""
    figures = run(tasks=["lckv_papers", "lckv_cloze"], limit=2)
    assert set(figures["tasks"]) == {"lckv_cloze"} and figures["groups"] == {}
    seven = {"hellaswag", "openbookqa", "winogrande", "arc_challenge", "arc_easy", "boolq", "piqa"}
    assert set(figures["errors"]) == seven
    assert figures["errors"]["hellaswag"] == (
        "the data set 'Rowan/hellaswag' cannot be reached: is this machine offline (or HF_HUB_OFFLINE set), "
        "or the name misspelt?"
    )


PAPERS = {
    "hellaswag": ("Swimming: A pool is shown. men", "are", "Swimming: A pool is shown. men", " are"),
    "openbookqa": ("Predators eat", "grass", "Predators eat", " grass"),
    "arc_challenge": ("Why?", "So.", "Question: Why?\nAnswer:", " So."),
    "arc_easy": ("Why?", "So.", "Question: Why?\nAnswer:", " So."),
    "piqa": ("To dry", "wring", "Question: To dry\nAnswer:", " wring"),
    "boolq": ("Passage: No.\nQuestion: is it?", "no", "No.\nQuestion: is it?\nAnswer:", " no"),
}
"""Of each of the papers' tasks a question and an answer, and what lm-eval's own task makes of them."""


def test_the_papers_tasks_from_local_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = {
        name: {"query": query, "choices": [answer, "?"], "gold": 0} for name, (query, answer, *_) in PAPERS.items()
    }
    rows["winogrande"] = {"context_options": ["So Sarah", "So Maria"], "continuation": "won.", "gold": 1}
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    folder, out = str(Path(__file__).parents[3] / "scripts" / "tasks"), tmp_path / "out"
    figures = run(tasks=["lckv_papers"], include_path=folder, log_samples=True, output_path=str(out))
    assert figures["errors"] == {} and set(figures["tasks"]) == set(rows) and figures["groups"]["lckv_papers"]
    asked = {name: samples[0]["arguments"] for name, samples in read_samples(out).items()}
    first = {name: (*arguments["gen_args_0"].values(),) for name, arguments in asked.items()}
    assert first == {name: tuple(expected) for name, (_, _, *expected) in PAPERS.items()} | {
        "winogrande": ("So Sarah", " won.")
    }
    assert (*asked["winogrande"]["gen_args_1"].values(),) == ("So Maria", " won.")


def test_a_data_set_and_what_was_meant(tmp_path):
    errors = load(["misspelt", "lckv_cloze"], missing_task(tmp_path, "misspelt", "Rowan/helaswag")).errors
    assert set(errors) == {"misspelt"}
    assert errors["misspelt"].endswith("or the name misspelt; did you mean 'Rowan/hellaswag'?")


def test_an_answer_that_is_longer_than_what_the_model_sees():
    with pytest.raises(UserError, match=r"an answer of \d+ tokens does not fit the 20 that the model sees at once"):
        run(tasks=["lckv_cloze"], max_length=20, limit=2)


def test_a_task_that_fails_in_the_midst_costs_itself_alone(tmp_path):
    folder = generation_task(tmp_path)
    broken = yaml.safe_load((tmp_path / "continued.yaml").read_text())
    write_task(
        tmp_path,
        **broken | {"name": "broken", "task": "broken", "doc_to_text": "{{text if text[0] == 'I' else 1 / 0}}"},
    )
    whole = run(tasks=["continued"], include_path=folder)
    figures = run(tasks=["continued", "broken", "lckv_cloze"], include_path=folder, max_length=40)
    assert figures["tasks"] == whole["tasks"] and figures["groups"] == {}
    assert set(figures["errors"]) == {"broken", "lckv_cloze"}
    assert figures["errors"]["broken"] == "ZeroDivisionError: division by zero"
    assert figures["errors"]["lckv_cloze"].startswith("an answer of ")
    with pytest.raises(UserError, match=r"^harness.tasks=\['broken'\]: none can be done; broken: ZeroDiv"):
        run(tasks=["broken"], include_path=folder)


def test_examples_read_as_the_question_does(tmp_path):
    run(tasks=["lckv_last_word"], limit=2, num_fewshot=2, log_samples=True, output_path=str(tmp_path))
    for row in read_samples(tmp_path)["lckv_last_word"]:
        example = row["arguments"]["gen_args_0"]["arg_0"].split("\n\n")[0]
        assert re.search(r"\S \w+$", example), example


def test_nothing_that_can_be_loaded(tmp_path):
    folder = missing_task(tmp_path, "gone", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"harness.tasks=\['gone'\]: none can be loaded; gone: ") as error:
        load(["gone"], folder)
    assert "\n" not in str(error.value)


def test_a_group_with_a_gap_has_no_mean(tmp_path):
    missing_task(tmp_path, "gone", "nobody/nothing")
    group = "group: mine\ntask: [lckv_cloze, {}]\naggregate_metric_list: [{{metric: acc}}]\n"
    (tmp_path / "mine.yaml").write_text(group.format("gone"))
    loaded = load(["mine"], tmp_path)
    assert list(loaded.tasks) == ["lckv_cloze"] and set(loaded.errors) == {"gone"}
    assert [getattr(spec, "task_name", None) for spec in loaded.specs] == ["lckv_cloze"]
    (tmp_path / "mine.yaml").write_text(group.format("{task: gone, num_fewshot: 1}"))
    with pytest.raises(UserError, match=r"none can be loaded; mine: "):  # alone, its task would be another one
        load(["mine"], tmp_path)


def test_a_task_may_be_given_as_a_pattern_or_file():
    # It fits the group lckv_local, too, with which both would be there twice.
    assert set(load(["lckv_[lc]*"]).tasks) == set(BOTH)
    assert load([str(harness_tasks.TASKS / "lckv_cloze.yaml")]).tasks.keys() == {"lckv_cloze"}


def test_the_hub_is_asked_once_and_not_for_what_is_at_hand(tmp_path, monkeypatch):
    questions = []
    monkeypatch.setattr(harness_tasks, "hub_answers", lambda: questions.append("?"))
    for name in ("one", "two"):
        missing_task(tmp_path, name, f"nobody/{name}")
    assert set(load(["one", "two", "lckv_cloze"], tmp_path).errors) == {"one", "two"} and questions == ["?"]
    load(["lckv_cloze"], tmp_path)
    assert questions == ["?"]


def test_what_was_downloaded_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = missing_task(tmp_path, "kept", "nobody/SomeTexts")
    assert "the data set" in load(["kept", "lckv_cloze"], folder).errors["kept"]
    (tmp_path / "cache" / "nobody___some_texts").mkdir(parents=True)
    assert "Couldn't reach" in load(["kept", "lckv_cloze"], folder).errors["kept"]  # says datasets itself


@pytest.mark.parametrize("name", ["max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"])
def test_a_task_that_the_model_is_too_short_for(tmp_path, name):
    folder = generation_task(tmp_path, generation_kwargs={name: 400})
    errors = load(["continued", "lckv_cloze"], folder).errors
    assert errors == {"continued": "it generates 400 tokens, but the model sees 320 at once"}
    folder = generation_task(tmp_path, generation_kwargs={name: 8})
    assert load(["continued"], folder).errors == {}


def test_lm_eval_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in [name for name in sys.modules if name.startswith("lm_eval.")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"^needs lm-eval \(.*\); pip install lckv\[eval\]"):
        run()


# Tasks of our own.


def test_task_files_are_in_the_package():
    names = {entry.name for entry in resources.files("lckv").joinpath("evaluation/tasks").iterdir()}
    assert {"lckv_papers.yaml", "lckv_local.yaml", "lckv_last_word.yaml", "lckv_cloze.yaml"} <= names


@pytest.fixture(scope="module")
def held_out_text():
    return [document for document, is_held_out in build_source(DataConfig()).documents() if is_held_out]


def test_last_words_are_held_out_text_and_can_be_known(held_out_text):
    documents = held_out_tasks.last_word()["test"].to_list()
    assert len(documents) == 500 == len({document["context"] for document in documents})
    for document in documents:
        text, word = f"{document['context']} {document['word']}", document["word"]
        assert any(text in chapter for chapter in held_out_text)
        assert len(word) >= 4 and word.lower() in document["context"].lower()


def test_clozes_have_one_right_answer_at_every_place_alike(held_out_text):
    documents = held_out_tasks.cloze()["test"].to_list()
    assert Counter(document["gold"] for document in documents) == dict.fromkeys(range(4), 125)
    for document in documents:
        texts = [f"{document['context']} {choice}" for choice in document["choices"]]
        assert len({*document["choices"]}) == 4
        right = [any(text in chapter for chapter in held_out_text) for text in texts]
        assert right == [number == document["gold"] for number in range(4)]


def test_no_cloze_is_given_away_by_the_words_alone(held_out_text):
    documents = held_out_tasks.cloze()["test"].to_list()
    counts = Counter(word for text in held_out_text for word in re.findall("[A-Za-z]+", text))
    first_words = [[re.match("[A-Za-z]+", choice).group() for choice in row["choices"]] for row in documents]
    for clue in (len, counts.__getitem__, lambda word: word.lower()):
        for best in (min, max):
            guesses = [words.index(best(words, key=clue)) for words in first_words]
            right = sum(guess == row["gold"] for guess, row in zip(guesses, documents, strict=True))
            assert 0.18 < right / 500 < 0.32  # by chance 0.25, give or take 0.02


def test_documents_are_always_the_same():
    random.seed(1)
    first = held_out_tasks.cloze()
    random.seed(2)
    assert first["test"].to_list() == held_out_tasks.cloze()["test"].to_list()
    examples = {row["context"] for row in first["fewshot"].to_list()}
    assert len(examples) == 16 and not examples & {row["context"] for row in first["test"].to_list()}


def test_a_batch_that_fits_into_memory():
    model = make_model()
    assert num_rows_that_fit(model, 10, 64) == 64
    assert num_rows_that_fit(model, 10**15, 64) == 1
    assert make_language_model(make_subject(model), HarnessConfig(batch_size="auto")).batch_size == "auto"
