"""Rows of conversations: what is learnt is what the assistant says, packed or not, and nothing is lost unsaid."""

import json
import logging
from pathlib import Path

import pytest
import torch

from lckv.config import ConversationsConfig, SFTConfig
from lckv.data.chat_templates import end_of_answer, read_chat_template, set_chat_template
from lckv.data.chat_tokens import ConversationCollator, build_conversation_data, build_encoder
from lckv.errors import UserError
from lckv.models import LCKVLlamaForCausalLM
from tests.reference import tiny_config
from tests.tiny import byte_tokenizer, merging_tokenizer

pytest.importorskip("trl", reason="needs the extra 'sft'")

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "the sea?"},
    {"role": "assistant", "content": "near 😀"},
    {"role": "user", "content": "and the other?"},
    {"role": "assistant", "content": "they had seen it é"},
]


def with_chatml(tokenizer):
    set_chat_template(tokenizer, read_chat_template("chatml"), "test")
    return tokenizer


def learnt_runs(tokenizer, ids, labels):
    """The texts of the stretches that are learnt, and of those between them."""
    runs = [[], []]
    was_learnt = None
    for token, label in zip(ids, labels, strict=True):
        is_learnt = label != -100
        assert not is_learnt or label == token
        if is_learnt != was_learnt:
            runs[is_learnt].append([])
        runs[is_learnt][-1].append(token)
        was_learnt = is_learnt
    return [[tokenizer.decode(run) for run in kind] for kind in runs]


def test_with_a_token_per_byte_exactly_the_bytes_of_answers_and_their_ends_are_learnt():
    tokenizer = with_chatml(byte_tokenizer())
    encoder = build_encoder(tokenizer, SFTConfig(), max_length=500, multiple_of=1)
    ids, labels = encoder.encode(TALK)
    expected_ids, expected_labels = [], []
    for message in TALK:
        head = tokenizer(f"<|im_start|>{message['role']}\n")["input_ids"]
        said = tokenizer(f"{message['content']}<|im_end|>")["input_ids"]
        is_learnt = message["role"] == "assistant"
        expected_ids += [*head, *said, *tokenizer("\n")["input_ids"]]
        expected_labels += [*[-100] * len(head), *(said if is_learnt else [-100] * len(said)), -100]
    end = tokenizer.eos_token_id  # in the place of the last line end: ChatML's own ends are several tokens here
    assert ids == [*expected_ids[:-1], end]
    assert labels == [*expected_labels[:-1], end]


def test_an_answer_that_ends_in_several_bytes_of_a_character_is_learnt_to_its_end():
    tokenizer = byte_tokenizer(
        chat_template="{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}U:{{ m.content }} {% endif %}{% endfor %}"
    )
    for answer in ("yes 😀", "é", "no"):
        ids, labels = build_encoder(tokenizer, SFTConfig(), 500, 1).encode([TALK[1], TALK[2] | {"content": answer}])
        said = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
        assert [label for label in labels if label != -100] == said == ids[-len(said) :]


@pytest.mark.parametrize("has_own_end", [False, True])
def test_with_merged_tokens_what_is_learnt_reads_as_the_answers(has_own_end):
    tokenizer = merging_tokenizer()
    if has_own_end:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer = with_chatml(tokenizer)
    assert (end_of_answer(tokenizer).token is not None) == has_own_end
    ids, labels = build_encoder(tokenizer, SFTConfig(), 500, 1).encode(TALK)
    others, answers = learnt_runs(tokenizer, ids, labels)
    end = "" if has_own_end else "<eos>"
    assert answers == ["near 😀<|im_end|>", f"they had seen it é<|im_end|>{end}"]
    assert "Be brief." in others[0] and "and the other?" in others[1]
    everything, all_labels = build_encoder(tokenizer, SFTConfig(loss="all"), 500, 1).encode(TALK)
    assert all_labels == [-100, *everything[1:]]  # but the first token, which nothing stands before


def test_a_template_that_trl_knows_is_marked_as_trl_marks_it(tmp_path):
    """The labels are those that TRL's own trainer makes of the same conversation."""
    from datasets import Dataset
    from trl import SFTConfig as SFTArguments
    from trl import SFTTrainer
    from trl.chat_template_utils import qwen2_5_chat_template

    tokenizer = merging_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = qwen2_5_chat_template
    ids, labels = build_encoder(tokenizer, SFTConfig(), 500, 1).encode(TALK)
    assert tokenizer.chat_template == qwen2_5_chat_template  # what is saved with the model has no marks
    assert [text.strip() for text in learnt_runs(tokenizer, ids, labels)[1]] == [
        "near 😀<|im_end|>",
        "they had seen it é<|im_end|>",
    ]
    args = SFTArguments(str(tmp_path), assistant_only_loss=True, bf16=False, use_cpu=True, report_to="none")
    model = LCKVLlamaForCausalLM(tiny_config("0_1", vocab_size=len(tokenizer)))
    trainer = SFTTrainer(
        model, args, train_dataset=Dataset.from_list([{"messages": TALK}]), processing_class=tokenizer
    )
    assert trainer.train_dataset[0]["input_ids"] == ids
    assert trainer.train_dataset[0]["labels"] == labels


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "does not mark what the assistant says"),
        (
            "{% for m in messages %}{{ m['content'] }}"
            "{% if not m %}{% generation %}{{ m }}{% endgeneration %}{% endif %}{% endfor %}",
            "marks nothing that the assistant says",
        ),
    ],
)
def test_a_template_without_marks_is_refused_unless_all_is_learnt(template, said):
    tokenizer = merging_tokenizer()
    set_chat_template(tokenizer, template, "test")
    with pytest.raises(UserError, match=f"^chat_template=null: {said}"):
        build_encoder(tokenizer, SFTConfig(), 500, 1)
    assert build_encoder(tokenizer, SFTConfig(loss="all"), 500, 1).encode(TALK)


def test_an_end_that_is_not_learnt_is_warned_of(caplog):
    tokenizer = merging_tokenizer()
    answer = "{% generation %}{{ m['content'] }}{% endgeneration %}<eos>"
    text = f"{{% for m in messages %}}{{% if m['role'] == 'user' %}}?{{% else %}}{answer}{{% endif %}}{{% endfor %}}"
    set_chat_template(tokenizer, text, "test")
    build_encoder(tokenizer, SFTConfig(), 500, 1)
    assert "may not stop" in caplog.text


def write(path: Path, lengths: list[int]) -> str:
    rows = (
        [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "the sea " * length}]
        for n, length in enumerate(lengths)
    )
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return str(path)


LENGTHS = [1, 5, 2, 9, 3, 3, 30, 1, 4, 7, 2, 2]


@pytest.mark.parametrize("packing", [True, False])
def test_rows_hold_every_conversation_once_filled_up_to_the_models_groups(tmp_path, packing):
    files = write(tmp_path / "c.jsonl", LENGTHS)
    cfg = SFTConfig(data=ConversationsConfig(files=files, validation_fraction=0.2), packing=packing)
    tokenizer = with_chatml(merging_tokenizer())
    data = build_conversation_data(cfg, tokenizer, max_length=200, multiple_of=4)
    assert (len(data.train) < data.counts["train"].num_conversations) == packing
    encoder = build_encoder(tokenizer, cfg, 200, 4)
    found = []
    for rows in data.train, data.validation:
        for row in rows:
            assert len(row["input_ids"]) == sum(row["seq_lengths"]) <= 200
            start = 0
            for length in row["seq_lengths"]:
                assert length % 4 == 0
                found.append((row["input_ids"][start : start + length], row["labels"][start : start + length]))
                start += length
    lines = [json.loads(line)["messages"] for line in Path(files).read_text().splitlines()]
    assert sorted(found) == sorted(encoder.fill_up(*encoder.encode(messages)) for messages in lines)
    predicted = sum(label != -100 for row in data.train for label in row["labels"])
    assert data.counts["train"].num_predicted_tokens == predicted
    assert data.unigram_loss > 0


@pytest.mark.parametrize("packing", [True, False])
def test_what_is_too_long_is_refused_or_counted(tmp_path, packing, caplog):
    data = ConversationsConfig(files=write(tmp_path / "c.jsonl", LENGTHS), validation_fraction=0.2)
    tokenizer = with_chatml(merging_tokenizer())
    with pytest.raises(UserError, match=r"c.jsonl:7: is \d+ tokens long, more than max_length=80, as are 1 of"):
        build_conversation_data(SFTConfig(data=data, packing=packing), tokenizer, 80, 1)
    counts = {}
    for too_long in ("truncate", "drop"):
        with caplog.at_level(logging.WARNING):
            cfg = SFTConfig(data=data, packing=packing, too_long=too_long)
            counts[too_long] = build_conversation_data(cfg, tokenizer, 80, 1).counts["train"]
        assert "1 of" in caplog.text and "longer than max_length=80" in caplog.text
        caplog.clear()
    assert (counts["truncate"].num_left_out, counts["drop"].num_left_out) == (0, 1)
    assert counts["truncate"].num_tokens == counts["drop"].num_tokens + 80


def test_rows_of_a_batch_are_filled_up_with_what_no_one_sees_or_learns():
    rows = [
        {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8], "seq_lengths": [2, 2]},
        {"input_ids": [9, 9], "labels": [-100, 9], "seq_lengths": [2]},
    ]
    batch = ConversationCollator(pad_token_id=1)(rows)
    assert torch.equal(batch["input_ids"], torch.tensor([[5, 6, 7, 8], [9, 9, 1, 1]]))
    assert torch.equal(batch["position_ids"], torch.tensor([[0, 1, 0, 1], [0, 1, 0, 0]]))
    assert torch.equal(batch["labels"], torch.tensor([[-100, 6, -100, 8], [-100, 9, -100, -100]]))
