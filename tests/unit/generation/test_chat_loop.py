"""What people see of a chat: commands and their mistakes, files, lines that come in, and words that wrap."""

import io
import json
import re
import sys

import pytest
from rich.console import Console

from lckv.errors import UserError
from lckv.generation.chat import ChatSession
from lckv.generation.chat_files import load_conversation, save_conversation
from lckv.generation.chat_loop import COMMANDS, ChatLoop, _Writer, piped_lines
from tests.unit.generation.test_chat import chat_model, make_session

TALK = [{"role": "user", "content": "Who\nis é?"}, {"role": "assistant", "content": " Me."}]


@pytest.fixture
def session() -> ChatSession:
    return make_session(chat_model("0_0_2_2"))


@pytest.fixture
def chat(session, capsys, tmp_path, monkeypatch):
    """Types lines; returns what was printed to stdout and noted."""
    monkeypatch.chdir(tmp_path)
    notes = io.StringIO()
    loop = ChatLoop(session, Console(file=notes, width=80, markup=False, highlight=False), is_interactive=True)

    def run(*lines: str) -> tuple[str, str]:
        notes.seek(0)
        notes.truncate()
        loop.run(iter(lines))
        return capsys.readouterr().out, " ".join(notes.getvalue().split())

    return run


def test_answers_are_printed_and_commands_are_not_answered(chat, session):
    out, notes = chat("  Why?  ", "", "/cache", "/help")
    assert out == session.messages[-1]["content"].rstrip("\n") + "\n"
    assert session.messages[0] == {"role": "user", "content": "Why?"} and session.num_turns == 1
    assert "cache=dynamic" in notes and "2 of 4 layers keep something: 0_0_2_2" in notes
    assert all(f"{name} " in notes for name in COMMANDS)
    out, notes = chat("/exit", "Why?")
    assert (out, notes) == ("", "") and session.num_turns == 1
    out, _ = chat(" /cache")
    assert session.messages[2]["content"] == "/cache" and out


def test_stats(chat, session):
    assert chat("/stats")[1] == "(no answer yet) context: 0 of 512 tokens · KV 0 bytes · 0 turns"
    chat("Why?", "And?")
    turn, num_held = session.last, len(session.held_tokens)
    _, notes = chat("/stats")
    assert re.search(rf"answer: {turn.num_new_tokens} tokens · [\d,.]+ tok/s · first after [\d.]+ s", notes)
    assert f"tokens: {turn.num_read} read · {turn.num_kept} kept from earlier turns context: {num_held} of" in notes
    assert f"KV {session.cache.num_bytes():,} bytes · 2 turns" in notes
    session.last.num_dropped = 3
    assert "3 rendered otherwise, and taken back" in chat("/stats")[1]
    session.last.is_refilled = True
    assert "3 rendered otherwise, which this cache cannot take back: read again" in chat("/stats")[1]


def test_system_and_reset(chat, session):
    assert chat("/system")[1] == "(no system message)"
    assert chat("/system Be brief.", "Why?", "/system")[1].endswith("(system message: Be brief.)")
    assert "the system message stays" in chat("/reset")[1]
    assert session.messages == [{"role": "system", "content": "Be brief."}] and session.held_tokens == []
    assert chat("/system off")[1] == "(no system message)" and session.messages == []
    chat("/system\nTwo\nlines")
    assert session.system == "Two\nlines"


def test_a_conversation_is_saved_and_loaded(chat, session, tmp_path):
    _, notes = chat("/system Be é.", "Why?", "/save talk.jsonl")
    assert notes.endswith("(saved 3 messages to talk.jsonl)")
    saved = list(session.messages)
    assert json.loads((tmp_path / "talk.jsonl").read_text()) == {"messages": saved}
    chat("And?", "/save talk.jsonl")
    assert len(load_conversation(tmp_path / "talk.jsonl")) == 5
    _, notes = chat("/reset", "/system off", "/load talk.jsonl")
    assert notes.endswith("(loaded 5 messages from talk.jsonl)") and session.num_turns == 2
    save_conversation(tmp_path / "of others", saved)
    assert "/save of others: is there already; name a file that is not there yet" in chat("/save of others")[1]
    assert load_conversation(tmp_path / "of others") == saved


MISTAKES = [
    ("/rest", "unknown command /rest; did you mean '/reset'? (a space in front makes it a message)"),
    ("/usr/bin is what?", "unknown command /usr/bin; allowed are /reset, "),
    ("/reset now", "/reset now: has nothing behind its name; write /reset"),
    ("/save", "/save: needs something behind its name; write /save FILE"),
    ("/save a.jsonl", "/save a.jsonl: there is no answer to save yet"),
    ("/load nowhere", "/load nowhere: No such file or directory"),
    ("/load .", "/load .: Is a directory"),
    ("/load ~nobody_of_that_name/x", "/load ~nobody_of_that_name/x: No such file or directory"),
]


@pytest.mark.parametrize(("line", "message"), MISTAKES)
def test_mistakes_are_noted_by_one_line(chat, line, message):
    out, notes = chat(line)
    assert out == "" and notes.startswith(message)


def test_places_where_nothing_can_be_saved(chat):
    chat("Why?")
    assert "/save nowhere/a: there is no folder nowhere" in chat("/save nowhere/a")[1]
    assert "/save .: is there already" in chat("/save .")[1]


LINES = json.dumps({"messages": TALK, "source": "x"}, ensure_ascii=False)
BROKEN = [
    ("", "f: holds no conversation"),
    (f"{LINES}\n\n{LINES}\n", "f: holds 2 conversations; say which: the number of its line behind the name"),
    (f'{LINES[:-1]}\n"', "f, line 1: is no JSON: "),
    ("[" * 3000, "f, line 1: is no JSON: "),
    ("1" * 5000, "f, line 1: is no JSON: "),
    ("[]", "f, line 1: must hold a list of messages, each with a role and a content, but is None"),
    ('\n{"messages": []}', "f, line 2: must hold a list of messages, each with a role and a"),
    ('{"messages": [3]}', "f, line 1: message 1 must have text as role and content, but is 3"),
    (
        '{"messages": [{"role": "usr", "content": ""}]}',
        "f, line 1: message 1 has the role 'usr': allowed are system, ",
    ),
    ('{"messages": [{"role": "user", "content": 3}]}', "f, line 1: message 1 must have text as role"),
    ('{"messages": [{"role": "user", "content": ""}]}', "f, line 1: message 1 is the user's, and has no answer"),
    (LINES.replace("assistant", "system"), "f, line 1: message 2, of the system, stands behind one of the "),
    (LINES.encode() + b"\n\xe9", "f, line 2: is not UTF-8 text"),
]


@pytest.mark.parametrize(("content", "message"), BROKEN)
def test_broken_files_are_named_with_the_line(content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = type(tmp_path)("f")
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    lines = 1 if "line 1" in message and "\n" in str(content) else None
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        load_conversation(path, lines)


def test_one_of_several_conversations(chat, session, tmp_path):
    (tmp_path / "two talks").write_text(f'\n{json.dumps({"messages": TALK})}\n{{"messages": 3}}\n')
    chat("/load two talks 2")
    assert session.messages == TALK
    assert "/load two talks, line 3: must hold a list of messages" in chat("/load two talks 3")[1]
    assert "/load two talks: has no conversation in line 1" in chat("/load two talks 1")[1]
    assert session.messages == TALK


def test_half_a_surrogate_pair_is_no_text(chat, session, tmp_path):
    (tmp_path / "half").write_text(json.dumps({"messages": [*TALK[:-1], TALK[-1] | {"content": "so \ud83d"}]}))
    out, _ = chat("/load half", "Why?")
    assert out and session.messages[len(TALK) - 1]["content"] == "so \ufffd"


def test_a_full_context_says_what_to_do(chat, session):
    session.limit = 20
    _, notes = chat("Why is that?")
    assert notes.startswith("the context is full: 30 tokens with this message, of 20; /reset begins anew; to go on")
    assert "start again with cache=sink cache.window=508, /load FILE" in notes
    session.limit = 33
    assert "(the context is full: /reset begins anew" in chat("Why is that?")[1]


def test_other_notes_on_answers(chat, session, monkeypatch):
    def interrupt(text):
        raise KeyboardInterrupt

    assert "(cut at max_new_tokens=12)" in chat("Why?")[1]
    with monkeypatch.context() as patch:
        patch.setattr(_Writer, "write", lambda self, text: interrupt(text))
        assert chat("Why?")[1] == "(stopped)"
    session.max_new_tokens = 60
    session.model.lm_head.weight.data.zero_()
    assert "(the answer repeats itself: try temperature=0.8)" in chat("Why?")[1]


def test_lines_of_standard_input(monkeypatch):
    def lines(data: bytes) -> list[str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        return list(piped_lines())

    assert lines("\ufeffété\r\n\n/stats".encode()) == ["été", "", "/stats"]
    with pytest.raises(UserError, match="^line 2 of standard input: is not UTF-8 text$"):
        lines(b"a\n\xff\n")


@pytest.mark.parametrize("size", [1, 3, 100])
def test_words_wrap_where_they_would_not_fit(size, capsys):
    text = "one two three\n  four fives sixes sevens eight\n\ntoolongforaline nine\n日本 ten "
    writer = _Writer(10)
    for start in range(0, len(text), size):
        writer.write(text[start : start + size])
    writer.end()
    assert capsys.readouterr().out.splitlines() == [
        "one two",
        "three",
        "  four",
        "fives",
        "sixes",
        "sevens",
        "eight",
        "",
        "toolongforaline",
        "nine",
        "日本 ten ",
    ]
