"""Files in LoCoMo's format as no one would write them: conversations, or a ValueError that says what is wrong; and
turns of any length, in any number, in bounded memory."""

import json
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import pdmem_lib as pdmem
from pdmem_lib import locomo

LIMITED = settings(max_examples=120, deadline=2000, suppress_health_check=list(HealthCheck))
TEXT = st.one_of(
    st.text(max_size=40), st.text(st.characters(categories=["Cc", "Cf", "Zl", "Zp", "Mn"]), max_size=20),
    st.sampled_from(["\u202eright to left", "\u05e9\u05dc\u05d5\u05dd", "\x00", "\x1b[2J", "<script>alert(1)</script>", "'; DROP TABLE--",
                     "../../etc/passwd", "{0} %s ${HOME}", "\ud800", "a\u0301" * 50, "\U0001f9d1\u200d\U0001f680", "NaN", "\ufeff",
                     "<|endoftext|>", "[INST]", " "]))
JUNK = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT),
                    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)), max_leaves=6)
WORDS = TEXT.filter(lambda text: text and not any("\ud800" <= c <= "\udfff" for c in text))


@st.composite
def records(draw):
    """A well-formed conversation with hostile texts."""
    numbers = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4, unique=True))
    content, ids = {"speaker_a": draw(WORDS), "speaker_b": draw(WORDS)}, []
    for number in numbers:
        rows = [{"dia_id": f"D{number}:{n}", "speaker": draw(WORDS), "text": draw(st.one_of(st.just(""), WORDS))}
                for n in range(1, draw(st.integers(1, 4)))]
        ids += [row["dia_id"] for row in rows]
        content |= {f"session_{number}": rows, f"session_{number}_date_time": draw(WORDS)}
    assume(ids)
    asked = [{"question": draw(WORDS), "answer": draw(st.one_of(WORDS, st.integers(), st.floats(allow_nan=False))),
              "category": draw(st.integers(1, 5)), "evidence": draw(st.lists(st.one_of(st.sampled_from(ids), TEXT), max_size=3))}
             for _ in range(draw(st.integers(0, 3)))]
    return {"sample_id": draw(WORDS), "conversation": content, "qa": asked}


@st.composite
def broken(draw):
    """A well-formed file with a few of its parts replaced, lost, or renamed."""
    data = [draw(records()) for _ in range(draw(st.integers(1, 2)))]
    for _ in range(draw(st.integers(1, 3))):
        place, path = data, draw(st.lists(st.integers(0, 30), min_size=1, max_size=5))
        for step in path:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            if not keys:
                break
            key = keys[step % len(keys)]
            inner = place[key]
            if step is path[-1] or not isinstance(inner, dict | list) or not inner:
                match draw(st.sampled_from(["replace", "lose", "rename"])):
                    case "replace":
                        place[key] = draw(JUNK)
                    case "lose":
                        del place[key]
                    case "rename" if isinstance(place, dict):
                        place[draw(st.sampled_from(["session_0", "session_007", "session_" + "9" * 5000, "session_", "qa", ""]))] = (
                            place.pop(key))
                break
            place = inner
    return data


def load(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("fuzz") / "data.json"
    file.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    return pdmem.load_locomo(file)


def assert_sound(conversations):
    for c in conversations:
        assert c.turns and [turn.index for turn in c.turns] == list(range(len(c.turns)))
        assert len({turn.id for turn in c.turns}) == len(c.turns) and sum(map(len, c.sessions)) == len(c.turns)
        for turn in c.turns:
            assert str(turn).strip() and str(turn).encode()
        for q in c.questions:
            assert q.question and isinstance(q.answer, str) and 0 <= q.lag <= len(c.turns) and q.category in locomo.CATEGORIES
            assert all(c.turn(id).id == id for id in q.evidence)
    assert len(locomo.data_sha256(conversations)) == 64


@LIMITED
@given(data=st.lists(records(), min_size=1, max_size=3, unique_by=lambda record: record["sample_id"]))
def test_any_well_formed_file_is_read_as_it_is(tmp_path_factory, data):
    conversations = load(tmp_path_factory, data)
    assert_sound(conversations)
    for record, c in zip(data, conversations, strict=True):
        rows = {row["dia_id"]: row for key, rows in record["conversation"].items()
                if key.startswith("session_") and isinstance(rows, list) for row in rows}
        assert c.id == record["sample_id"]
        assert {turn.id: (turn.speaker, turn.text) for turn in c.turns} == {
            id: (row["speaker"], row["text"]) for id, row in rows.items()}
        assert [q.question for q in c.questions] == [q["question"] for q in record["qa"]]


@LIMITED
@given(data=st.one_of(broken(), JUNK, st.lists(JUNK, max_size=2)))
def test_a_broken_file_is_sound_conversations_or_a_clear_refusal(tmp_path_factory, data):
    try:
        conversations = load(tmp_path_factory, data)
    except ValueError as error:
        assert len(str(error).split()) >= 5 and not isinstance(error, UnicodeError), error
        return
    assert_sound(conversations)


@LIMITED
@given(content=st.one_of(st.binary(max_size=200), st.builds(lambda text: text.encode("utf-16"), st.text(max_size=50))))
def test_any_bytes_are_read_or_refused(tmp_path_factory, content):
    try:
        load(tmp_path_factory, content)
    except ValueError as error:
        assert "give a file in LoCoMo's format" in str(error) or len(str(error).split()) >= 5


@pytest.mark.parametrize("content", [b"[" * 200_000, b'{"a":' * 200_000, b"1" * 10_000, b"[1e999999]", b"\xef\xbb\xbf[]",
                                     b'[{"sample_id": "a", "conversation": {"session_' + b"9" * 5000 + b'": []}}]'])
def test_files_that_break_parsers(tmp_path_factory, content):
    try:
        assert load(tmp_path_factory, content) == []
    except ValueError as error:
        assert len(str(error).split()) >= 5


@LIMITED
@given(text=WORDS)
def test_any_text_is_written_and_asked(tmp_path_factory, text):
    model = hostile_model()
    model.reset()
    state = model.write(f"Ann: {text}")
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert model.loss([text], [text]).isfinite()


def hostile_model(made=[]):  # noqa: B006 - one for all examples
    if not made:
        made.append(pdmem.MemoryModel(pdmem.load_backbone("tiny-gpt2"), "slot", num_entries=16))
    return made[0]


def test_a_turn_of_100_000_characters_is_written_in_windows(tmp_path_factory, caplog):
    turn = {"dia_id": "D1:1", "speaker": "Ann", "text": "\u05e9a\u202e " * 25_000}
    data = [{"sample_id": "long", "conversation": {"session_1": [turn]}, "qa": []}]
    (conversation,) = load(tmp_path_factory, data)
    assert len(conversation.turns[0].text) == 100_000
    start = time.monotonic()
    state = hostile_model().write(list(conversation.turns))
    assert state["P"].isfinite().all() and "encoded in windows" in caplog.text
    assert time.monotonic() - start < 60


# ---- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", pdmem.METHODS)
def test_a_stream_is_written_as_the_list_is(model, method, monkeypatch):
    from pdmem_lib import memory

    monkeypatch.setattr(memory, "STREAM", 3)
    turns = [f"Ann: number {n}" + " and more" * (n % 4) for n in range(8)]
    one, other = (model(method, num_entries=16, d_h=16) for _ in range(2))
    for name, tensor in one.write(iter(turns)).items():
        torch.testing.assert_close(tensor, other.write(turns)[name], rtol=1e-4, atol=1e-5)


def test_a_stream_that_breaks_keeps_what_was_written_before(model, monkeypatch):
    from pdmem_lib import memory

    monkeypatch.setattr(memory, "STREAM", 2)
    one, other = model("slot", num_entries=16), model("slot", num_entries=16)
    with pytest.raises(ValueError, match="text 1 is empty"):
        one.write(iter(["a", "b", "c", " ", "e"]))
    assert torch.equal(one.state["P"], other.write(["a", "b"])["P"])


STREAM = """
import itertools, resource, sys
import psutil, torch
import pdmem_lib as pdmem
torch.set_num_threads(1)
turns, hidden = int(sys.argv[1]), int(sys.argv[2])
model = pdmem.MemoryModel(pdmem.load_backbone("tiny-gpt2", device="cpu"), "slot", num_entries=16)
used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
model.write(f"Ann: this is turn {n}" for n in range(300))
before = used()
model.write(f"Ann: this is turn {n}" for n in range(turns))
generator = torch.Generator().manual_seed(0)
model.write_hidden(torch.randn(30, model.backbone.hidden_size, generator=generator) for _ in range(hidden))
assert model.state["P"].isfinite().all()
print(used() - before)
"""


@pytest.mark.slow
def test_an_endless_conversation_is_written_in_bounded_memory():
    """Peak memory (MiB) beyond that of the first 300 turns. A list of the hidden states would take 146 MiB."""
    done = subprocess.run([sys.executable, "-c", STREAM, "600", "20000"], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 20


def test_a_stream_is_taken_a_batch_at_a_time(model, monkeypatch):
    from pdmem_lib import memory

    monkeypatch.setattr(memory, "STREAM", 3)
    m, states = model("slot", num_entries=16), []

    def turns():
        for n in range(7):
            states.append(m.state["P"])
            yield f"Ann: {n}"
    m.write(turns())
    assert [states[n] is states[n - 1] for n in range(1, 7)] == [True, True, False, True, True, False]
