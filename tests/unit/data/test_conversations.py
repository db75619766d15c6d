"""Conversations: which are taken, what is said of those that are not, and how they are parted."""

import json
from pathlib import Path

import pytest

from lckv.config import ConversationsConfig
from lckv.data.conversations import build_conversations, check_conversations, check_messages
from lckv.errors import UserError

SYSTEM, USER, ASSISTANT = ({"role": role, "content": "x"} for role in ("system", "user", "assistant"))


def write(path: Path, *conversations: list[dict[str, str]]) -> ConversationsConfig:
    path.write_text("".join(json.dumps({"messages": each}) + "\n" for each in conversations))
    return ConversationsConfig(files=str(path))


def ask(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": f"answer {number}"}]


@pytest.mark.parametrize(
    "messages", [[USER, ASSISTANT], [SYSTEM, USER, ASSISTANT, USER, ASSISTANT], [USER, ASSISTANT, USER]]
)
def test_takes_conversations_in_which_user_and_assistant_take_turns(messages):
    assert check_messages([message | {"name": None} for message in messages], "here") == messages


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "must hold a list of messages"),
        ("hi", "must hold a list of messages"),
        ([{"role": "user"}], "message 1 must have text as role and content"),
        ([USER, {"role": "assistant", "content": None}], "message 2 must have text"),
        ([USER, {"role": "asistant", "content": "x"}], "'asistant': allowed .*did you mean 'assistant'"),
        ([ASSISTANT, USER], "message 1, of the assistant, stands first"),
        ([USER, USER, ASSISTANT], "message 2, of the user, stands behind one of the user"),
        ([USER, SYSTEM, ASSISTANT], "message 2, of the system, stands behind one of the user"),
        ([SYSTEM, SYSTEM, USER, ASSISTANT], "message 2, of the system, stands behind"),
        ([SYSTEM, ASSISTANT], "message 2, of the assistant, stands behind one of the system"),
    ],
)
def test_says_what_is_wrong_with_others(messages, said):
    with pytest.raises(UserError, match=f"^here: .*{said}"):
        check_messages(messages, "here")


def test_a_broken_line_is_named_by_its_number(tmp_path):
    config = write(tmp_path / "c.jsonl", ask(1), ask(2))
    with (tmp_path / "c.jsonl").open("a") as file:
        file.write('\n{"messages": [')
    with pytest.raises(UserError, match=r"c\.jsonl:4: is not a line of JSON"):
        check_conversations(config)


def test_files_that_hold_no_conversation_or_another_field(tmp_path):
    with pytest.raises(UserError, match=r"data.files=.*: holds no conversation$"):
        check_conversations(write(tmp_path / "empty.jsonl"))
    (tmp_path / "c.jsonl").write_text('{"mesages": []}\n')
    with pytest.raises(UserError, match="messages_field='messages': .*it has mesages; did you mean 'mesages'"):
        check_conversations(ConversationsConfig(files=str(tmp_path / "c.jsonl")))


def test_a_part_is_held_out_by_its_content_alone(tmp_path):
    conversations = [ask(number) for number in range(200)]
    held_out = []
    for name, order in ("a.jsonl", conversations), ("b.jsonl", conversations[::-1] + conversations[:9]):
        training, validation = build_conversations(write(tmp_path / name, *order)).splits()
        texts = [{json.dumps(each.messages) for each in read()} for read in (training, validation)]
        assert not texts[0] & texts[1]
        assert len(texts[0] | texts[1]) == 200
        held_out.append(texts[1])
    assert held_out[0] == held_out[1]
    assert 1 <= len(held_out[0]) <= 30


def test_of_two_conversations_one_is_held_out_and_of_one_none_can_be(tmp_path):
    training, validation = build_conversations(write(tmp_path / "c.jsonl", ask(1), ask(2))).splits()
    assert [len(list(read())) for read in (training, validation)] == [1, 1]
    with pytest.raises(UserError, match="holds no conversation to train on, and none that validation does not hold"):
        build_conversations(write(tmp_path / "c.jsonl", ask(1), ask(1))).splits()


def test_named_validation_conversations_are_left_out_of_the_training(tmp_path):
    config = write(tmp_path / "train.jsonl", ask(1), ask(2), ask(3))
    config.validation_files = write(tmp_path / "valid.jsonl", ask(2)).files
    training, validation = build_conversations(config).splits()
    assert [[each.messages for each in read()] for read in (training, validation)] == [[ask(1), ask(3)], [ask(2)]]


def test_the_embedded_text_asks_about_other_books_in_validation():
    training, validation = build_conversations(ConversationsConfig(name="bible", max_conversations=4)).splits()
    first, second = list(training())[:2]
    assert first.messages == [
        {"role": "user", "content": "What does Genesis 1:1 say?"},
        {"role": "assistant", "content": "In the beginning God created the heaven and the earth."},
    ]
    assert second.messages[0]["content"].startswith("How does this verse go on: And the earth was")
    assert second.where == "Genesis 1:2"
    assert {each.where.rpartition(" ")[0] for each in validation()} == {"Ruth"}
