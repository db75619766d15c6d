"""`lckv.generate` from the configuration to what is printed, with a tiny model."""

import io
import json
import re
import sys
from itertools import islice

import pytest
import torch
from transformers import GenerationConfig

from lckv import generate
from lckv.cache import CACHES, build_cache
from lckv.engine.continuous import ContinuousBatcher
from lckv.errors import UserError
from lckv.generation.batch import PrefillOptions, StepWatch
from lckv.generation.batch import generate as generate_batch
from lckv.generation.decoding_options import DecodingOptions
from lckv.generation.prompts import encode_prompts, read_prompts
from lckv.generation.streaming import Sampling, stream_text
from tests.composing import compose
from tests.reference import tiny_model, token_ids
from tests.unit.loading.test_loading import byte_tokenizer

PATTERN = "0_3_3_3_4"
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}>"


def exact_model(layer_types=PATTERN, **config):
    """Decoding one token at a time and prefill agree, whatever the chunks."""
    settings = dict(vocab_size=300, forward_passes="converge", converge_tolerance=1e-9, bos_token_id=None)
    return tiny_model(layer_types, **(settings | config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    exact_model().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture
def run(folder, capsys):
    """Runs `main` as the command line would; returns what it printed to stdout and stderr."""

    def run(*arguments: str, model: str = folder) -> tuple[str, str]:
        generate.main(compose([f"model={model}", *arguments], "generate"))
        out = capsys.readouterr()
        return out.out, out.err

    return run


def message_of(run, *arguments: str, **options) -> str:
    with pytest.raises(UserError) as error:
        run(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def continuation(prompt: str, num_tokens: int, **options) -> str:
    """By transformers alone, without any cache."""
    tokenizer, model = byte_tokenizer(), exact_model()
    input_ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    config = GenerationConfig(max_new_tokens=num_tokens, use_cache=False, pad_token_id=0, eos_token_id=2, **options)
    output = model.generate(input_ids, generation_config=config)
    return tokenizer.decode(output[0, input_ids.shape[1] :], skip_special_tokens=True)


def test_text_goes_to_stdout_and_figures_to_stderr(run):
    out, err = run("prompt=Hello, {world}: a=b", "max_new_tokens=12")
    assert out == continuation("Hello, {world}: a=b", 12) + "\n"
    assert re.fullmatch(
        r"12 tokens · [\d,.]+ tok/s · first after [\d.]+ s · cache [\d,]+ bytes, 384 per token · "
        r"\d+ passes over the prompt( · KV residual [\d.e-]+)?\n",
        err,
    )
    assert run("prompt=Hello, {world}: a=b", "max_new_tokens=12", "stream=off")[0] == out


@pytest.mark.parametrize("cache", [name for name in CACHES if name != "quantized"])
def test_every_cache_gives_the_same_text(run, cache):
    assert run("prompt=In the beginning", "max_new_tokens=9", f"cache={cache}")[0].rstrip("\n") == continuation(
        "In the beginning", 9
    ).rstrip("\n")


def test_options_of_the_cache_arrive(run):
    figures = [
        json.loads(run("prompt=In the beginning of", "max_new_tokens=40", "json=true", *options)[0])["batches"][0]
        for options in (["cache=sink"], ["cache=sink", "cache.window=8", "cache.num_sinks=2"])
    ]
    assert figures[0]["cache_bytes"] / figures[1]["cache_bytes"] == figures[0]["cache_tokens"] / 10


def test_json_has_texts_and_measured_figures(run, folder):
    out, err = run("prompt=abc", "max_new_tokens=5", "json=true", "cache=static")
    result = json.loads(out)
    assert err == "" and result["model"] == folder and result["layer_types"] == PATTERN
    assert result["texts"] == [
        {"prompt": "abc", "text": continuation("abc", 5), "num_prompt_tokens": 3, "num_new_tokens": 5}
    ]
    (batch,) = result["batches"]
    cache = build_cache("static", exact_model().config, max_length=8)
    exact_model()(token_ids(1, 7), past_key_values=cache)
    assert (batch["cache_bytes"], batch["cache_tokens"]) == (cache.num_bytes(), 7)
    assert batch["first_token_seconds"] > 0 and batch["tokens_per_second"] > 0


def test_prompts_of_a_file_are_continued_in_batches(run, tmp_path):
    prompts = ["a", "In the beginning", "", "Be light, and"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    expected = [continuation(prompt, 6) for prompt in prompts if prompt]
    out, err = run(f"prompts_file={tmp_path}/prompts.txt", "max_new_tokens=6")
    assert out == "".join(f"==> {p} <==\n{t}\n\n" for p, t in zip(filter(None, prompts), expected, strict=True))
    assert err.count("tokens ·") == 1
    out, _ = run(f"prompts_file={tmp_path}/prompts.txt", "max_new_tokens=6", "batch_size=2", "json=true")
    result = json.loads(out)
    assert [text["text"] for text in result["texts"]] == expected and len(result["batches"]) == 2


PROMPTS = ["In the beginning", "a", "Be light, and", "abc", "In the beginning was"]


@pytest.fixture
def prompts_file(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return f"prompts_file={tmp_path}/prompts.txt"


def printed(prompts, texts):
    return "".join(f"==> {prompt} <==\n{text}\n\n" for prompt, text in zip(prompts, texts, strict=True))


@pytest.mark.parametrize("options", [[], ["batch_size=2", "prefill_chunk=7"], ["cache.num_pages=5", "batch_size=3"]])
def test_continuous_batches_print_what_static_ones_do(run, prompts_file, options):
    expected = printed(PROMPTS, [continuation(prompt, 9) for prompt in PROMPTS])
    arguments = [prompts_file, "max_new_tokens=9", "cache=paged"]
    out, err = run(*arguments, *options)
    assert out == expected
    assert re.fullmatch(
        r"\d+ tokens · [\d,.]+ tok/s · \d+ steps of up to \d texts · cache up to [\d,]+ bytes( · .+)?\n", err
    )
    if not options:
        assert run(*arguments, "batching=static")[0] == expected


def test_continuous_batches_as_json(run, prompts_file):
    arguments = [prompts_file, "max_new_tokens=9", "batch_size=2", "json=true"]
    result, static = (json.loads(run(*arguments, f"cache={cache}")[0]) for cache in ("paged", "dynamic"))
    assert result["texts"] == static["texts"] and [text["prompt"] for text in result["texts"]] == PROMPTS
    assert (result["batching"], static["batching"]) == ("continuous", "static")
    (figures,) = result["batches"]
    assert figures["num_new_tokens"] == sum(text["num_new_tokens"] for text in result["texts"])
    assert figures["peak_rows"] == 2 and figures["num_steps"] >= 9 and figures["peak_used_bytes"] > 0
    assert figures["tokens_per_second"] == figures["num_new_tokens"] / figures["seconds"]


def test_options_reach_the_continuous_batch(run, prompts_file):
    def figures(*options):
        return json.loads(run(prompts_file, "max_new_tokens=4", "cache=paged", "json=true", *options)[0])["batches"][0]

    num_prompt_tokens = sum(len(byte_tokenizer()(prompt)["input_ids"]) for prompt in PROMPTS)
    together, alone = figures(), figures("batch_size=1")
    assert together["peak_rows"] == len(PROMPTS) and together["num_steps"] == 4
    assert alone["peak_rows"] == 1 and alone["num_steps"] == 1 + 3 * len(PROMPTS)
    assert figures("prefill_chunk=5")["num_steps"] > num_prompt_tokens / 5
    exact = [continuation(prompt, 4) for prompt in PROMPTS]
    for options in (["prefill_passes=0"], ["prefill_passes=converge", "prefill_tolerance=0.9"]):
        result = json.loads(run(prompts_file, "max_new_tokens=4", "cache=paged", "json=true", *options)[0])
        assert [text["text"] for text in result["texts"]] != exact


def test_beams_are_searched_in_static_batches(run, prompts_file):
    result = json.loads(run(prompts_file, "max_new_tokens=3", "cache=paged", "num_beams=2", "json=true")[0])
    assert result["batching"] == "static"
    assert [text["text"] for text in result["texts"]] == [continuation(prompt, 3, num_beams=2) for prompt in PROMPTS]


def test_quantised_pages_are_batched_continuously(run, prompts_file):
    options = [prompts_file, "max_new_tokens=5", "cache=quantized", "json=true"]
    assert json.loads(run(*options)[0])["batching"] == "static"
    paged = json.loads(run(*options, "cache.layout=paged")[0])  # all tokens are recent, and exact
    assert paged["batching"] == "continuous"
    assert [text["text"] for text in paged["texts"]] == [continuation(prompt, 5) for prompt in PROMPTS]


def test_seeds_of_continuous_batches(run, prompts_file):
    """Each prompt has its own: what a text is does not depend on who runs beside it."""
    first, alone, other = (
        run(prompts_file, "max_new_tokens=9", "cache=paged", "temperature=2", f"seed={seed}", f"batch_size={size}")[0]
        for seed, size in ((1, 5), (1, 1), (2, 5))
    )
    assert first == alone != other


def test_no_batch_repeats_the_random_numbers_of_another(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("abc\nabc\nabc\n")
    options = [f"prompts_file={tmp_path}/prompts.txt", "max_new_tokens=20", "temperature=2", "seed=1", "json=true"]
    texts = [text["text"] for text in json.loads(run(*options, "batch_size=1")[0])["texts"]]
    assert len(set(texts)) == 3
    alone = json.loads(run("prompt=abc", "max_new_tokens=20", "temperature=2", "seed=1", "json=true")[0])
    assert alone["texts"][0]["text"] == texts[0]


def test_lines_of_a_prompts_file_end_where_editors_say(run, tmp_path):
    (tmp_path / "prompts.txt").write_bytes("\ufeffIn the\u2028beginning\r\nAnd\x0cGod\n\n".encode())
    result = json.loads(run(f"prompts_file={tmp_path}/prompts.txt", "max_new_tokens=1", "json=true")[0])
    assert [text["prompt"] for text in result["texts"]] == ["In the\u2028beginning", "And\x0cGod"]


@pytest.mark.parametrize("end", ["\r\n", "\r", "\n"])
def test_lines_end_in_a_prompt_as_in_training_text(tmp_path, end):
    (tmp_path / "prompt.txt").write_bytes(f"one{end}two{end}".encode())
    assert read_prompts(prompt_file=str(tmp_path / "prompt.txt")) == ["one\ntwo"]
    assert encode_prompts([f"one{end}two"], byte_tokenizer()) == encode_prompts(["one\ntwo"], byte_tokenizer())
    model, greedy = exact_model("0s_3_3_3_4"), Sampling(greedy=True)
    texts = set()
    for given in f"one{end}two", "one\ntwo":
        cache = build_cache("sink", model.config, window=5)
        texts.add("".join(islice(stream_text(model, byte_tokenizer(), given, cache, sampling=greedy), 5)))
    assert len(texts) == 1


def test_a_window_wider_than_the_model_is_told(run, caplog):
    run("prompt=abc", "max_new_tokens=9", "cache=sink", "cache.window=1000")
    run("prompt=abc", "max_new_tokens=130", "cache=sink", "cache.window=20")
    assert "cache.window" not in caplog.text  # the text does not get as long, or the window is narrow
    run("prompt=abc", "max_new_tokens=130", "cache=sink", "cache.window=1000")
    assert "cache.window=1000: with cache.num_sinks=4 that is more than the 128 positions" in caplog.text


def test_too_few_pages_are_told_before_the_text(run, caplog):
    run("prompt=abc", "max_new_tokens=5", "cache=paged", "cache.num_pages=1")
    assert "cache.num_pages" not in caplog.text
    with pytest.raises(UserError, match="out of pages"):
        run("prompt=abc", "max_new_tokens=40", "cache=paged", "cache.num_pages=1")
    assert "cache.num_pages=1: holds 0 texts of 43 tokens, and 1 may become as long; give more pages" in caplog.text


def test_too_little_memory_is_one_line(run):
    with pytest.raises(UserError, match="^out of memory: give a smaller batch_size, .*what the cache is made for"):
        run("prompt=abc", "cache=static", "cache.max_length=1000000000000")


def test_prompts_that_fail_alone_are_named_behind_the_others(run, tmp_path, capsys):
    prompts = ["abc", "x" * 50, "a"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    arguments = [f"prompts_file={tmp_path}/prompts.txt", "max_new_tokens=4", "cache=paged", "cache.num_pages=2"]
    assert message_of(run, *arguments).endswith("prompts.txt: 1 of 3 prompts have failed")
    out, err = capsys.readouterr()
    assert out == printed(prompts, [continuation("abc", 4), "", continuation("a", 4)])
    failure, summary = err.splitlines()
    assert failure.startswith("prompt 2: out of pages: sequence '2' has 0 tokens and takes 50 more")
    assert summary.startswith("8 tokens · ")
    message_of(run, *arguments, "json=true")
    out, err = capsys.readouterr()
    texts = json.loads(out)["texts"]
    assert [text["num_new_tokens"] for text in texts] == [4, 0, 4] and err == failure + "\n"
    assert f"prompt 2: {texts[1]['error']}" == failure and "error" not in texts[0] | texts[2]


def test_texts_are_printed_as_soon_as_those_before_them_are_done(run, prompts_file, monkeypatch, capsys):
    """Two prompts run at once; when the third has one token, the first two have been printed."""
    step, outputs = ContinuousBatcher.step, []

    def step_then_look(self):
        outputs.append(capsys.readouterr().out)
        if len(outputs) == 7:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(ContinuousBatcher, "step", step_then_look)
    with pytest.raises(KeyboardInterrupt):
        run(prompts_file, "max_new_tokens=5", "cache=paged", "batch_size=2")
    texts = [continuation(prompt, 5) for prompt in PROMPTS[:2]]
    assert outputs[:5] == [""] * 5 and "".join(outputs) == printed(PROMPTS[:2], texts)


def test_a_bar_on_a_terminal_leaves_texts_alone(run, prompts_file, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    out, err = run(prompts_file, "max_new_tokens=5", "cache=paged", "batch_size=2")
    assert out == printed(PROMPTS, [continuation(prompt, 5) for prompt in PROMPTS])
    assert "continuing the prompts" in err and err.count("\x1b[?25l") == err.count("\x1b[?25h") > 0


def interrupt_step(monkeypatch, batch: int, step: int) -> None:
    """Presses Ctrl-C before token `step` of batch `batch`, both counted from 0."""
    watch, batches = StepWatch.__call__, []

    def interrupt(self, input_ids, scores):
        if self.num_steps == 0:
            batches.append(self)
        if len(batches) == batch + 1 and self.num_steps == step:
            raise KeyboardInterrupt
        return watch(self, input_ids, scores)

    monkeypatch.setattr(StepWatch, "__call__", interrupt)


def test_batches_that_are_done_have_been_printed_when_one_breaks_off(run, tmp_path, monkeypatch, capsys):
    prompts = ["a", "In the beginning", "Be light, and"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    expected = "".join(f"==> {prompt} <==\n{continuation(prompt, 6)}\n\n" for prompt in prompts[:2])
    interrupt_step(monkeypatch, batch=2, step=3)
    with pytest.raises(KeyboardInterrupt):
        run(f"prompts_file={tmp_path}/prompts.txt", "max_new_tokens=6", "batch_size=1")
    out = capsys.readouterr()
    assert out.out == expected and out.err.count("tokens ·") == 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_batches_of_any_length_share_one_compiled_step(run, tmp_path):
    prompts = ["a", "In the beginning", "Be light, and", "abc", "To be or not to be"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    expected = [continuation(prompt, 6) for prompt in prompts]
    options = ["max_new_tokens=6", "batch_size=2", "cache=static", "compile=true", "json=true"]
    torch.compiler.reset()  # what other tests have compiled of the same functions is no recompilation
    with torch._dynamo.config.patch(error_on_recompile=True):
        result = json.loads(run(f"prompts_file={tmp_path}/prompts.txt", *options)[0])
    assert [text["text"] for text in result["texts"]] == expected
    assert [batch["num_new_tokens"] for batch in result["batches"]] == [12, 12, 6]


def test_columns_of_padding_change_nothing():
    model, prompts = exact_model(), [[5], [6]]
    expected, padded = (
        generate_batch(model, prompts, cache, DecodingOptions(), 4, num_columns=num_columns).new_tokens
        for cache, num_columns in (
            (build_cache("dynamic", model.config), None),
            (build_cache("static", model.config, max_length=7), 3),
        )
    )
    assert padded == expected


def test_chunks_change_nothing(run):
    out, _ = run("prompt=In the beginning was", "max_new_tokens=6", "prefill_chunk=4")
    assert out == continuation("In the beginning was", 6) + "\n"


def test_passes_over_the_prompt(run):
    def figures(*options: str) -> dict:
        return json.loads(run("prompt=In the beginning was", "json=true", "max_new_tokens=2", *options)[0])["batches"][
            0
        ]

    few, loose = figures("prefill_passes=1"), figures("prefill_passes=converge", "prefill_tolerance=0.5")
    assert few["num_passes"] == [3] and few["residual"] > 0
    assert loose["num_passes"][0] < figures()["num_passes"][0]
    assert len(figures("prefill_chunk=8")["num_passes"]) == 3


def test_sampling_is_repeatable_and_beams_are_searched(run):
    first, again, other = (
        run("prompt=abc", "max_new_tokens=20", "temperature=2", f"seed={seed}")[0] for seed in (1, 1, 2)
    )
    assert first == again != other
    assert run("prompt=abc", "max_new_tokens=8", "num_beams=3")[0] == continuation("abc", 8, num_beams=3) + "\n"
    penalized = continuation("abc", 8, repetition_penalty=5.0)
    assert run("prompt=abc", "max_new_tokens=8", "repetition_penalty=5")[0] == penalized + "\n"
    config = DecodingOptions(top_p=0.5).generation_config(7, 3)
    assert (config.do_sample, config.top_p, config.top_k, config.temperature) == (True, 0.5, 0, 1.0)
    assert not DecodingOptions().samples and DecodingOptions(greedy=False).samples and DecodingOptions(seed=1).samples


def test_endless_text_in_bounded_memory(run):
    out, err = run(
        "prompt=abc", "cache=sink", "cache.num_sinks=1", "cache.window=4", "stream=endless", "max_new_tokens=50"
    )
    assert len(out) > 20 and out.endswith("\n")
    assert err.startswith("52 tokens · ") and f"cache {5 * 384:,} bytes" in err


def test_greedy_text_that_repeats_itself_is_told(run, prompts_file, tmp_path):
    """Without logits that differ, the first token comes every time."""
    model = exact_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    for arguments, told in (
        (["prompt=abc"], "the text repeats itself"),
        (["prompt=abc", "cache=sink", "stream=endless"], "the text repeats itself"),
        ([prompts_file], "5 of 5 texts repeat themselves"),
        ([prompts_file, "cache=paged"], "5 of 5 texts repeat themselves"),
    ):
        err = run(*arguments, "max_new_tokens=30", model=str(tmp_path / "model"))[1]
        assert err.endswith(f" · {told}: try temperature=0.8\n"), err
    for settings in ["max_new_tokens=12"], ["max_new_tokens=30", "seed=1"]:
        assert "repeat" not in run("prompt=abc", *settings, model=str(tmp_path / "model"))[1]


def test_standard_input(run, monkeypatch, folder):
    def pipe(text: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))

    expected = continuation("ab\ncd", 4) + "\n"
    for options in ([], ["prompt_file=-"]):
        pipe(b"ab\ncd\n")
        assert run("max_new_tokens=4", *options)[0] == expected
    pipe(b"")
    assert "prompt=standard input: holds no text" in message_of(run)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert 'prompt: give one: prompt="..."' in message_of(run)


def test_chat(run, tmp_path, folder):
    exact_model().save_pretrained(tmp_path)
    byte_tokenizer(chat_template=TEMPLATE).save_pretrained(tmp_path)
    model = str(tmp_path)
    assert run("prompt=hi", "max_new_tokens=4", model=model)[0] == continuation("[user]hi>", 4) + "\n"
    with_system = continuation("[system]be, brief[user]hi>", 4) + "\n"
    assert run("prompt=hi", "system=be, brief", "max_new_tokens=4", model=model)[0] == with_system
    assert run("prompt=hi", "chat=false", "max_new_tokens=4", model=model)[0] == continuation("hi", 4) + "\n"
    assert "system: has no effect with chat=false" in message_of(
        run, "prompt=hi", "chat=false", "system=x", model=model
    )
    assert "its tokenizer has no chat template; give one: chat" in message_of(run, "prompt=hi", "chat=true")
    (tmp_path / "mine.jinja").write_text(TEMPLATE.replace(">", "?"))
    given = f"chat_template={tmp_path}/mine.jinja"
    assert run("prompt=hi", given, "max_new_tokens=4")[0] == continuation("[user]hi?", 4) + "\n"
    (tmp_path / "mine.jinja").write_text("{% if %}")
    (tmp_path / "model.safetensors").write_text("torn")  # which is not looked at before the template
    assert f"{given}: the chat template fails: " in message_of(run, "prompt=hi", given, model=model)
    assert "system: has no effect with a tokenizer that" in message_of(run, "prompt=hi", "system=x")
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    refusing = byte_tokenizer(chat_template=refusal)
    with pytest.raises(UserError, match="the chat template fails: no system"):
        encode_prompts(["hi"], refusing, system="be brief")


MISTAKES = [
    (["prompt=x", "prefill_passes=3", "prefill_tolerance=0.1"], "prefill_tolerance=0.1: has no effect without"),
    (
        ["prompt=abcdef", "cache=static", "cache.max_length=5"],
        "cache.max_length=5: the prompt has 6 tokens and max_new",
    ),
    (["prompt=x", "device=gpu"], "device='gpu'"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes(run, arguments, message):
    assert message in message_of(run, *arguments)


def test_files_that_are_no_prompt(run, tmp_path):
    (tmp_path / "text.txt").write_bytes(b"ab\xff")
    assert "is not UTF-8 text (byte 2)" in message_of(run, f"prompt_file={tmp_path}/text.txt")
    assert "did you mean 'text.txt'?" in message_of(run, f"prompts_file={tmp_path}/txt.txt")
    (tmp_path / "text.txt").write_text("\n \n")
    assert "text.txt: holds no text" in message_of(run, f"prompts_file={tmp_path}/text.txt")
    assert "Is a directory" in message_of(run, f"prompt_file={tmp_path}")


def test_passes_have_no_effect_where_nothing_iterates(run, tmp_path):
    exact_model("0_0_2").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    message = message_of(run, "prompt=x", "prefill_passes=3", model=str(tmp_path))
    assert "prefill_passes=3: has no effect on model=" in message and "none of its layers reads upward" in message


def test_text_beyond_the_models_positions_is_warned_of_in_a_line(run, tmp_path, caplog):
    run("prompt=abc", "max_new_tokens=5")
    assert "was made for" not in caplog.text
    exact_model(max_position_embeddings=7).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    run("prompt=abc", "max_new_tokens=5", model=str(tmp_path))
    assert "the prompt has 3 tokens and max_new_tokens=5 follow, but the model was made for 7" in caplog.text
    caplog.clear()
    run("prompt=abc", "max_new_tokens=5", "cache=sink", "cache.window=2", model=str(tmp_path))
    assert caplog.text == ""


def test_text_beyond_learned_positions_is_refused(run, tmp_path):
    exact_model("0_1", max_position_embeddings=7, learned_positions=True).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    run("prompt=abc", "max_new_tokens=4", model=str(tmp_path))
    message = message_of(run, "prompt=abc", "max_new_tokens=5", model=str(tmp_path))
    assert "max_new_tokens=5: with the 3 tokens of the prompt, that is more than the 7 positions that" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite(value):
    model = exact_model()
    with torch.no_grad():
        model.lm_head.weight[7] = value
    with pytest.raises(UserError, match="the logits of new token 1 are not finite"):
        generate_batch(model, [[3, 4, 5]], build_cache("dynamic", model.config), DecodingOptions(), 5)


def test_tokens_that_the_model_does_not_know():
    model = exact_model(vocab_size=10)
    with pytest.raises(UserError, match="the tokenizer has a token 10, but the model knows 10"):
        generate_batch(model, [[3, 10]], build_cache("dynamic", model.config), DecodingOptions(), 5)


@pytest.mark.parametrize("pad_token_id", [-1, 300])
def test_prompts_are_filled_up_with_a_token_that_the_model_knows(pad_token_id):
    model = exact_model()
    prompts = [token_ids(1, length, seed=length)[0].tolist() for length in (3, 9)]
    expected = [
        generate_batch(model, [prompt], build_cache("dynamic", model.config), DecodingOptions(), 4).new_tokens[0]
        for prompt in prompts
    ]
    model.generation_config.pad_token_id = pad_token_id
    generation = generate_batch(model, prompts, build_cache("dynamic", model.config), DecodingOptions(), 4)
    assert generation.new_tokens == expected


def test_what_follows_the_end_of_a_text_is_cut_off():
    model = exact_model()
    prompts = [token_ids(1, length, seed=length)[0].tolist() for length in (3, 9)]

    def new_tokens(eos_token_id: int | None) -> list[list[int]]:
        model.generation_config = GenerationConfig(eos_token_id=eos_token_id)
        cache = build_cache("dynamic", model.config)
        options = PrefillOptions(chunk_size=2)
        return generate_batch(model, prompts, cache, DecodingOptions(), 8, prefill_options=options).new_tokens

    free = new_tokens(None)
    stop = free[0][3]
    expected = [row[: row.index(stop) + 1] if stop in row else row for row in free]
    assert [len(row) for row in free] == [8, 8] and new_tokens(stop) == expected != free


def test_an_interrupted_text_stays_on_a_line_of_its_own(run, monkeypatch, capsys):
    interrupt_step(monkeypatch, batch=0, step=9)
    with pytest.raises(KeyboardInterrupt):
        run("prompt=In the beginning")
    assert capsys.readouterr().out == continuation("In the beginning", 9) + "\n"
