"""``python -m pdmem_lib chat``: through a pipe, twice, and line by line."""

import os
import subprocess
import sys

import pytest

import pdmem_lib as pdmem
from pdmem_lib import __main__ as command_line
from pdmem_lib import chat
from pdmem_lib.session import Session


def talk(*options, said):
    return subprocess.run([sys.executable, "-m", "pdmem_lib", "chat", *options], input=said, capture_output=True,
                          timeout=120, env=os.environ | {"PYTHONUTF8": "1"})


def test_the_second_run_knows_what_the_first_wrote(tmp_path):
    folder = str(tmp_path / "memory")
    said = b"I adopted a parrot.\nIts name is Kiki \xff.\nWho is Kiki?\n"  # with a byte that is no text
    first = talk("--memory", folder, "--backbone", "tiny-gpt2", said=said)
    assert first.returncode == 0 and first.stdout.decode().splitlines()[:2] == ["[0]", "[1]"]
    assert "untrained" in first.stderr.decode()
    second = talk("--memory", folder, said=b"/transcript\n/forget 0\n/quit\nnever read\n")
    lines = second.stdout.decode().splitlines()
    assert second.returncode == 0 and len(lines) == 4 and "You: I adopted a parrot." in lines[0]
    assert "You: Its name is Kiki \ufffd." in lines[1] and "Who is Kiki?" in lines[2]
    assert lines[3].startswith("forgotten, exactly")
    with Session.open(folder) as session:
        assert session.turns == 1 and "parrot" not in session.transcript().to_string()


@pytest.fixture
def session(model):
    return Session(model("slot", num_entries=8), keep_text=True)


def test_each_line_does_what_the_help_says(session, capsys):
    chat.chat(session, iter(["", "I adopted a cat.", "/snapshot cat", "  It sleeps.  ", "Who sleeps?", "/ask who", "/forget 1",
                             "/rollback cat", "/rollback", "/help", "/quit", "not read"]))
    out = capsys.readouterr().out.splitlines()
    assert out[:3] == ["[0]", "kept as cat", "[1]"] and out[5].startswith("forgotten, exactly")
    assert out[6:8] == ["back to cat: 1 turns", "back to start-of-run: 0 turns"] and "\n".join(out[8:]) == chat.HELP
    assert session.turns == 0


@pytest.mark.parametrize("line", ["/forget 9", "/forget", "/forget -1", "/forget ²", "/rollback nowhere", "/snapshot ../up", "/snapshot start-of-run",
                                  "/snapshot", "/delete", "/ask", "?" * 2000])
def test_a_mistake_is_one_line_and_the_chat_goes_on(session, capsys, line):
    chat.chat(session, iter([line, "I am here."]))
    out, err = capsys.readouterr()
    assert out == "[0]\n" and err.startswith("error: ") and err.count("\n") == 1


def test_what_could_steer_a_terminal_is_shown_as_an_escape(session, capsys):
    chat.chat(session, iter(["red \x1b[31m, back \u202e, bell \x07, line\x85end, é and 猫 stay", "/transcript"]))
    shown = capsys.readouterr().out
    assert r"red \x1b[31m, back \u202e, bell \x07, line\x85end, é and 猫 stay" in shown
    assert all(c.isprintable() for line in shown.splitlines() for c in line)


def test_without_texts_the_words_stay_off_the_disk(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(chat, "stdin_lines", lambda: iter(["My parrot is Kiki.", "/transcript", "/forget 0"]))
    options = ["chat", "--memory", str(tmp_path), "--backbone", "tiny-gpt2", "--no-text"]
    assert command_line.main(options) == 0
    out, err = capsys.readouterr()
    assert "text not kept, sha256" in out and "the text of turn 0 is not known" in err
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"Kiki" in path.read_bytes()]


def test_an_adapter_and_a_memory_that_do_not_belong_together_are_one_line(tmp_path, model, monkeypatch, capsys):
    monkeypatch.setattr(chat, "stdin_lines", lambda: iter([]))
    model("hebbian").save_pretrained(tmp_path / "adapter")
    Session(pdmem.MemoryModel(model("hebbian").backbone, "slot"), tmp_path / "memory").close()
    assert command_line.main(["chat", "--adapter", str(tmp_path / "adapter"), "--memory", str(tmp_path / "memory")]) == 1
    assert "method: 'slot' there, 'hebbian' here" in capsys.readouterr().err
    assert command_line.main(["chat", "--adapter", str(tmp_path / "none"), "--memory", str(tmp_path / "new")]) == 1
    assert "give a folder written by save_pretrained" in capsys.readouterr().err and not (tmp_path / "new").exists()
