"""Learning from pairs of answers by TRL's trainer: the loss is that of each pair alone, beside the model before."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from lckv.config import ConversationsConfig, LoraConfig, OptimConfig, SFTConfig, TrainerConfig
from lckv.data.chat_templates import read_chat_template, render_chat, set_chat_template
from lckv.data.chat_tokens import build_conversation_data
from lckv.data.conversations import build_conversations, check_conversations
from lckv.errors import UserError
from lckv.sharing.iteration import EXACT
from lckv.training.run_folder import RunFolder
from tests.tiny import merging_tokenizer
from tests.unit.training.test_sft import PATTERNS, build_model

pytest.importorskip("trl", reason="needs the extra 'sft'")
pytest.importorskip("peft", reason="needs the extra 'sft'")

from lckv.training.sft import SFTSession, build_sft_arguments  # noqa: E402

BETA = 0.3
ASK, YES, NO = (
    {"role": role, "content": text} for role, text in (("user", "?"), ("assistant", "y"), ("assistant", "n"))
)


def pair(number: int) -> dict[str, Any]:
    """Answers of several lengths, which begin alike."""
    good, bad = "the sea was near " * (1 + number % 5), "the sea is far and wide " * (1 + number % 3)
    return {"prompt": f"{number}?" * (1 + number % 7), "chosen": good, "rejected": bad}


@pytest.fixture
def make_session(tmp_path: Path) -> Callable[..., SFTSession]:
    tokenizer = merging_tokenizer()
    set_chat_template(tokenizer, read_chat_template("chatml"), "test")
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair(number)) + "\n" for number in range(16)))

    def make(name: str = "run", pattern: str = "upward", **settings: Any) -> SFTSession:
        trainer = {"max_steps": 3, "global_batch_size": 4, "eval_steps": None, "save_steps": 2, "logging_steps": 1}
        trainer |= {"sample_steps": None, "sample_tokens": 4, "sample_prompt": "the sea?"}
        trainer |= {key: settings.pop(key) for key in list(settings) if key in TrainerConfig.__dataclass_fields__}
        cfg = SFTConfig(
            data=ConversationsConfig(files=str(file), validation_fraction=0.3),
            trainer=TrainerConfig(**trainer),
            optim=OptimConfig(learning_rate=1e-2),
            loss="dpo",
            beta=BETA,
            run_dir=str(tmp_path / name),
            run_name=name,
            **settings,
        )
        model = build_model(pattern)
        data = build_conversation_data(cfg, tokenizer, max_length=160, multiple_of=model.config.cyclic_groups)
        folder = RunFolder(str(cfg.run_dir), cfg.trainer.save_total_limit)
        folder.claim({"seed": cfg.seed})
        return SFTSession(cfg, build_sft_arguments(cfg), model, tokenizer, data, folder, Console(quiet=True))

    return make


def log_probability(model: Any, asked: list[int], answer: list[int], **passes: Any) -> float:
    """Of an answer alone, without padding and by the model's plain logits."""
    ids = torch.tensor([asked + answer])
    with torch.no_grad():
        logits = model.eval()(ids, use_cache=False, **passes).logits[0, len(asked) - 1 : -1]
    return -F.cross_entropy(logits.double(), ids[0, len(asked) :], reduction="sum").item()


def margins(rows: Any, model: Any, reference: Any, **passes: Any) -> list[float]:
    """By how much the better answers are preferred, as Rafailov et al. define it."""
    found = []
    for row in rows:
        better, worse = (
            log_probability(model, row["prompt_ids"], row[name], **passes)
            - log_probability(reference, row["prompt_ids"], row[name], **passes)
            for name in ("chosen_ids", "rejected_ids")
        )
        found.append(BETA * (better - worse))
    return found


@pytest.mark.parametrize(
    ("pattern", "lora"),
    [*((each, False) for each in PATTERNS if each not in ("windows", "upward")), ("upward-groups", True)],
)
def test_the_loss_is_that_of_each_pair_alone_against_the_model_at_the_start(make_session, pattern, lora):
    session = make_session(pattern=pattern, lora=LoraConfig(rank=2) if lora else LoraConfig())
    start = build_model(pattern)
    results = session.run()
    trainer, rows = session.trainer, list(session.data.train)
    first, *_, evaluation = session.folder.read_metrics()
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)  # nothing has been learnt yet
    held_out = margins(session.data.validation, trainer.model, start, **EXACT)
    assert any(abs(margin) > 1e-2 for margin in held_out)
    assert evaluation["eval_preference_margin"] == pytest.approx(sum(held_out) / len(held_out), abs=1e-4)
    loss = sum(math.log1p(math.exp(-margin)) for margin in held_out) / len(held_out)
    assert evaluation["eval_preference_loss"] == pytest.approx(loss, abs=1e-4)
    accuracy = sum(margin > 0 for margin in held_out) / len(held_out)
    assert evaluation["eval_preference_accuracy"] == results["eval_preference_accuracy"] == accuracy
    # What is trained on, in a padded batch.
    batch = trainer.data_collator(list(trainer.train_dataset)[:5])
    loss = trainer.compute_loss(trainer.model.train(), batch).item()
    alone = margins(rows[:5], trainer.model, start)
    assert loss == pytest.approx(sum(math.log1p(math.exp(-margin)) for margin in alone) / 5, abs=1e-4)


def test_the_better_answers_come_to_be_preferred(make_session):
    session = make_session(max_steps=24, eval_steps=8)
    results = session.run()
    evaluations = [line for line in session.folder.read_metrics() if "eval_loss" in line]
    assert results["eval_preference_accuracy"] == 1.0
    assert evaluations[-1]["eval_preference_margin"] > evaluations[0]["eval_preference_margin"] > 0
    assert "pairs" not in results["layer_types"] and results["train_loss"] < 0.3
    model = AutoModelForCausalLM.from_pretrained(session.folder.model)
    rows, losses, count = session.data.validation, 0.0, 0
    for row in rows:  # the perplexity is that of the better answers, as decoding gives it
        ids = torch.tensor([row["prompt_ids"] + row["chosen_ids"]])
        with torch.no_grad():
            logits = model.eval()(ids, use_cache=False, **EXACT).logits[0, len(row["prompt_ids"]) - 1 : -1]
        losses += F.cross_entropy(logits, ids[0, len(row["prompt_ids"]) :], reduction="sum").item()
        count += len(row["chosen_ids"])
    assert results["eval_loss"] == pytest.approx(losses / count, abs=1e-4)


def test_rows_are_what_the_template_makes_of_the_answers(make_session):
    session = make_session()
    tokenizer, rows = session.tokenizer, [*session.data.train, *session.data.validation]
    texts = {
        tuple(tokenizer.decode(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")) for row in rows
    }
    expected = set()
    for each in map(pair, range(16)):
        asked = render_chat(tokenizer, [{"role": "user", "content": each["prompt"]}], add_generation_prompt=True)
        expected.add((asked, *(f"{each[name]}<|im_end|><eos>" for name in ("chosen", "rejected"))))
    assert texts == expected


def test_gone_on_with_it_is_the_undisturbed_run_bit_for_bit(make_session, interrupt):
    lora = LoraConfig(rank=2, dropout=0.1)
    whole = make_session("whole", lora=lora, max_steps=4)
    whole.run()
    interrupt(make_session("broken", lora=lora, max_steps=4), 3)
    resumed = make_session("broken", lora=lora, max_steps=4)
    assert resumed.first_step == 2
    resumed.run()
    kept = ("step", "loss", "grad_norm", "eval_loss", "eval_preference_margin", "rewards/margins")
    curves = [[{n: line.get(n) for n in kept} for line in each.folder.read_metrics()] for each in (whole, resumed)]
    assert curves[0] == curves[1]


def test_neither_accumulation_nor_recomputing_changes_the_curve(make_session):
    curves = []
    for number, settings in enumerate(({}, {"micro_batch_size": 1}, {"gradient_checkpointing": True})):
        session = make_session(str(number), **settings)
        session.run()
        kept = ("loss", "grad_norm", "eval_loss", "eval_preference_margin")
        curves.append([{n: line[n] for n in kept if n in line} for line in session.folder.read_metrics()])
    for other in curves[1:]:
        for mine, theirs in zip(curves[0], other, strict=True):
            assert theirs == pytest.approx(mine, rel=1e-4, abs=1e-6)


def test_an_adapter_that_is_gone_on_with_is_what_it_is_compared_with(make_session):
    from peft import PeftModel

    make_session("first", lora=LoraConfig(rank=2)).run()
    adapter = make_session("further").folder.path.parent / "first" / "adapter"
    further = make_session("second", lora=LoraConfig(adapter=str(adapter)))
    start = PeftModel.from_pretrained(build_model("upward"), adapter)
    further.run()
    evaluation = further.folder.read_metrics()[-1]
    held_out = margins(further.data.validation, further.trainer.model, start, **EXACT)
    assert evaluation["eval_preference_margin"] == pytest.approx(sum(held_out) / len(held_out), abs=1e-4)
    assert not (further.folder.adapter / "ref").exists()


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "?", "chosen": "y", "rejected": "n"},
        {"prompt": [ASK], "chosen": [YES], "rejected": [NO]},
        {"chosen": [ASK, YES], "rejected": [ASK, NO]},
        {"prompt": "?", "chosen": [ASK, YES], "rejected": [ASK, NO]},
        {"prompt": [ASK], "chosen": [ASK, YES], "rejected": "n"},
    ],
)
def test_all_forms_of_pairs_are_read_alike(tmp_path, row):
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    config = ConversationsConfig(files=str(tmp_path / "p.jsonl"))
    found = next(iter(build_conversations(config, is_paired=True).read_training()))
    assert (found.messages, found.worse) == ([ASK, YES], NO)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"chosen": [ASK, YES]}, "has no rejected; a pair has chosen and rejected"),
        ({"messages": [ASK, YES]}, "has no chosen and no rejected; .*; here are messages"),
        ({"prompt": "?", "chosen": "y", "rejected": "y"}, "are the same"),
        ({"prompt": "?", "chosen": "y", "rejected": " "}, "rejected does not end with something"),
        ({"prompt": "?", "chosen": [ASK], "rejected": [ASK, NO]}, "chosen does not end with something"),
        ({"chosen": [ASK, YES, ASK, YES], "rejected": [ASK, NO, ASK, NO]}, "part before the last message"),
        ({"chosen": "y", "rejected": "n", "question": "?"}, "has no prompt, .* here are chosen, rejected, question"),
        ({"prompt": "other", "chosen": [ASK, YES], "rejected": [ASK, NO]}, "chosen: message 2, of the user, stands"),
        ({"prompt": 3, "chosen": "y", "rejected": "n"}, "chosen: message 1 must have text as role and content"),
    ],
)
def test_other_rows_are_refused_with_their_line(tmp_path, row, said):
    (tmp_path / "p.jsonl").write_text(
        json.dumps({"prompt": "?", "chosen": "y", "rejected": "n"}) + "\n" + json.dumps(row)
    )
    with pytest.raises(UserError, match=rf"p\.jsonl:2: .*{said}"):
        check_conversations(ConversationsConfig(files=str(tmp_path / "p.jsonl")), is_paired=True)


def test_answers_that_the_template_makes_alike_are_left_out(make_session, tmp_path, caplog):
    session = make_session()
    file = tmp_path / "trimmed.jsonl"
    rows = [{"prompt": f"{number}?", "chosen": "y", "rejected": "y " if number == 3 else "n"} for number in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    session.cfg.data.files = str(file)
    template = str(read_chat_template("chatml")).replace("message['content'] +", "(message['content'] | trim) +")
    set_chat_template(session.tokenizer, template, "test")
    data = build_conversation_data(session.cfg, session.tokenizer, max_length=160, multiple_of=1)
    assert sum(counts.num_left_out for counts in data.counts.values()) == 1
    assert len(data.train) + len(data.validation) == 19
    assert "nothing was left to learn of 1" in caplog.text


def test_pairs_that_are_too_long_and_answers_to_one_question_in_both_splits(make_session, tmp_path):
    session = make_session()
    cfg = session.cfg
    with pytest.raises(UserError, match=r"pairs\.jsonl:\d+: is \d+ tokens long, more than max_length=40, as are"):
        build_conversation_data(cfg, session.tokenizer, max_length=40, multiple_of=1)
    cfg.too_long = "drop"
    counts = build_conversation_data(cfg, session.tokenizer, max_length=105, multiple_of=1).counts["train"]
    assert 0 < counts.num_left_out == counts.num_too_long < counts.num_conversations
    file = tmp_path / "same.jsonl"
    rows = [{"prompt": f"{number // 4}", "chosen": "y", "rejected": f"n{number}"} for number in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = build_conversations(
        ConversationsConfig(files=str(file), validation_fraction=0.4), is_paired=True
    ).splits()
    training, validation = ({each.messages[0]["content"] for each in read()} for read in splits)
    assert training and validation and not training & validation
