"""Chat templates: where they come from, and what they make of a conversation."""

import re

import pytest

from lckv.data.chat_templates import CHATML, read_chat_template, render_chat, set_chat_template, turn_end
from lckv.errors import UserError
from tests.tiny import byte_tokenizer

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who?\n"},
    {"role": "assistant", "content": " Me."},
    {"role": "user", "content": "Why?"},
]
EXPECTED = """\
<|im_start|>system
Be brief.<|im_end|>
<|im_start|>user
Who?
<|im_end|>
<|im_start|>assistant
 Me.<|im_end|>
<|im_start|>user
Why?<|im_end|>
"""


@pytest.fixture
def tokenizer():
    tokenizer = byte_tokenizer()
    set_chat_template(tokenizer, CHATML, "chat_template=chatml")
    return tokenizer


def test_chatml(tokenizer):
    assert render_chat(tokenizer, CONVERSATION) == EXPECTED
    assert render_chat(tokenizer, CONVERSATION, add_generation_prompt=True) == EXPECTED + "<|im_start|>assistant\n"
    assert turn_end(tokenizer) == "<|im_end|>"


def test_chatml_marks_what_the_assistant_says(tokenizer):
    encoded = tokenizer.apply_chat_template(CONVERSATION, return_dict=True, return_assistant_tokens_mask=True)
    marked = [
        token for token, is_marked in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if is_marked
    ]
    assert tokenizer.decode(marked) == " Me.<|im_end|>"


def test_a_template_is_a_name_or_a_file_or_the_tokenizers(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}")
    assert read_chat_template(None) is None
    assert read_chat_template("chatml") == CHATML
    tokenizer = byte_tokenizer(chat_template="{{ messages[-1].content }}.")
    set_chat_template(tokenizer, None, "model=x")
    assert turn_end(tokenizer) == "."
    set_chat_template(tokenizer, read_chat_template(str(file)), f"chat_template={file}")
    assert render_chat(tokenizer, CONVERSATION[1:3]) == "user:Who?\n;assistant: Me.;"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("chatlm", None, "there is no such file; allowed are chatml and files; did you mean 'chatml'?"),
        ("latin.jinja", b"\xe9", "is not UTF-8 text (byte 0)"),
        ("empty.jinja", b" \n", "holds no text; give a Jinja template"),
        ("", None, "Is a directory"),
    ],
)
def test_what_is_no_template(name, content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"chat_template={name}: {message}")):
        read_chat_template(name)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template; give one: chat_template=chatml, or chat_template=FILE"),
        ("{% if %}", "the chat template fails: "),
        ("{{ raise_exception('not so') }}", "the chat template fails: not so"),
        ("{{ messages[0].content }}", "the chat template leaves the assistant's messages out"),
    ],
)
def test_templates_that_are_of_no_use(template, message):
    with pytest.raises(UserError, match=f"^model=x: .*{re.escape(message)}"):
        set_chat_template(byte_tokenizer(), template, "model=x")
