"""LoCoMo and synthetic conversations: untidy rows, refusals, where the file comes from, and the real file's counts."""

import ast
import copy
import hashlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdmem_lib import locomo
from pdmem_lib.synthetic import synthetic_conversations, synthetic_locomo

real_file = pytest.mark.skipif(not os.environ.get("PDMEM_LOCOMO"), reason="PDMEM_LOCOMO does not name a LoCoMo file")


def row(n, session=1, speaker="Ann", text="Hello.", **more):
    return {"speaker": speaker, "dia_id": f"D{session}:{n}", "text": text, **more}


def ask(evidence, category=4, **more):
    return {"question": "Where to?", "answer": "Oslo", "category": category, "evidence": evidence} | more


def record(*qa, **content):
    sessions = {"session_1": [row(1), row(2, speaker="Bob")], "session_2": [row(1, 2), row(2, 2), row(3, 2)]}
    return {"sample_id": "conv-1", "conversation": sessions | content, "qa": list(qa)}


def parse_one(*qa, **content):
    (conversation,) = locomo.parse([record(*qa, **content)])
    return conversation


# ---- the format ------------------------------------------------------------------------------------------------------


def test_sessions_may_be_numbered_with_zeros_and_each_once():
    plain = parse_one(session_1_date_time="May")
    content = {f"session_0{n}": record()["conversation"][f"session_{n}"] for n in (1, 2)} | {"session_01_date_time": "May"}
    padded = locomo.parse([record() | {"conversation": content}])[0]
    assert padded == plain and len(padded.turns) == 5
    for wrong, message in ((dict(session_01=[row(9)]), "session_1 and session_01 are one session"),
                           (dict(session_0=[row(9)]), "a session number is 0")):
        with pytest.raises(ValueError, match=message):
            parse_one(**wrong)


def test_turns_carry_session_index_and_utterance():
    conversation = parse_one(session_1_date_time="1:56 pm on 8 May, 2023")
    assert [(t.id, t.session, t.index) for t in conversation.turns] == [
        ("D1:1", 1, 0), ("D1:2", 1, 1), ("D2:1", 2, 2), ("D2:2", 2, 3), ("D2:3", 2, 4)]
    assert [len(session) for session in conversation.sessions] == [2, 3]
    assert conversation.turn("D1:2").utterance == str(conversation.turn("D1:2")) == "Bob: Hello."
    assert conversation.dates == {1: "1:56 pm on 8 May, 2023", 2: ""}


def test_sessions_are_ordered_by_number_and_keep_it():
    sessions = {"session_10": [row(1, 10)], "session_9": [row(1, 9)], "session_3": []}
    conversation = parse_one(**sessions, session_4_date_time="never held")
    assert [turn.session for turn in conversation.turns] == [1, 1, 2, 2, 2, 9, 10]
    assert [turn.index for turn in conversation.turns] == list(range(7))
    assert set(conversation.dates) == {1, 2, 9, 10}


def test_wordless_turn_is_kept_and_caption_stays_out_of_the_utterance():
    rows = [row(1, text=""), row(2, text="", blip_caption="a cat"), row(3, text="Look!", blip_caption="a dog")]
    conversation = parse_one(ask(["D1:3"]), session_1=rows)
    assert [turn.utterance for turn in conversation.turns[:3]] == ["Ann:", "Ann:", "Ann: Look!"]
    assert [turn.caption for turn in conversation.turns[:3]] == ["", "a cat", "a dog"]
    assert conversation.questions[0].lag == 3


def test_control_characters_and_right_to_left_text_pass_untouched():
    text = " \x00\x1b[31m\tשלום \u202eمرحبا\u202c 👩‍👩‍👧 \r\n"
    assert parse_one(session_1=[row(1, text=text)]).turns[0].utterance == f"Ann: {text}"


@pytest.mark.parametrize(("entries", "ids", "lag"), [
    (["D1:2"], ("D1:2",), 3),
    (["D2:3", "D1:1", "D2:3"], ("D2:3", "D1:1"), 4),  # the benchmark's order, no repeats, lag from the earliest
    (["D2:1; D1:2"], ("D2:1", "D1:2"), 3),
    (["D2:1 D2:2 D1:2"], ("D2:1", "D2:2", "D1:2"), 3),
    (["D:2:3"], ("D2:3",), 0),
    (["D2:1", "D", "D2:2"], ("D2:1", "D2:2"), 2),
    (["D2:03"], (), 5),  # names no turn: see _parse_evidence
    (["D9:9"], (), 5),
    (["D9:9", "D2:2"], ("D2:2",), 1),
    ([], (), 5),
])
def test_evidence_and_lag(entries, ids, lag):
    (question,) = parse_one(ask(entries)).questions
    assert (question.evidence, question.lag) == (ids, lag)


def test_ids_of_another_shape_are_evidence_too():
    rows = [row(1) | {"dia_id": "first turn"}, row(2)]
    assert parse_one(ask(["first turn"]), session_1=rows).questions[0].evidence == ("first turn",)


def test_evidence_sessions():
    conversation = parse_one(ask(["D2:3", "D1:1", "D2:1"]), ask([]))
    assert [conversation.evidence_sessions(question) for question in conversation.questions] == [(1, 2), ()]


@pytest.mark.parametrize(("more", "answer"), [
    ({"answer": 2022}, "2022"),
    ({"answer": 1.5}, "1.5"),
    ({"answer": 0}, "0"),
    ({"category": 5, "answer": None}, locomo.NOT_MENTIONED),
    ({"category": 5, "answer": "No", "adversarial_answer": "Yes"}, "No"),
])
def test_answers_are_text(more, answer):
    (question,) = parse_one(ask(["D1:1"], **more)).questions
    assert question.answer == answer
    assert question.adversarial_answer == more.get("adversarial_answer", "")


def test_category_5_without_an_answer():
    asked = ask(["D1:1"], 5, adversarial_answer="Rome")
    del asked["answer"]
    (question,) = parse_one(asked).questions
    assert (question.answer, question.adversarial_answer) == ("Not mentioned in the conversation", "Rome")


def test_conversation_without_questions_loads():
    without = record()
    del without["qa"]
    assert locomo.parse([without])[0].questions == ()


# ---- refusals --------------------------------------------------------------------------------------------------------


def without(key, of):
    return {k: v for k, v in of.items() if k != key}


@pytest.mark.parametrize(("records", "words"), [
    ({"sample_id": "x"}, "list of conversations, not dict"),
    (["x"], "conversation number 1 is str"),
    ([without("sample_id", record())], "conversation number 1: 'sample_id' is None"),
    ([without("conversation", record())], "conv-1, 'conversation' is NoneType"),
    ([record(session_1=[], session_2=[])], "conv-1 has no turns"),
    ([record(session_1={"D1:1": "hi"})], "conv-1, session 1 is dict"),
    ([record(session_1=["hi"])], "conv-1, session 1, turn 1 is str"),
    ([record(session_1=[row(1), without("speaker", row(2))])], "conv-1, session 1, turn 2: 'speaker' is None"),
    ([record(session_1=[without("dia_id", row(1))])], "conv-1, session 1, turn 1: 'dia_id' is None"),
    ([record(session_1=[without("text", row(1))])], "conv-1, session 1, turn 1: 'text' is None"),
    ([record(session_1=[row(1, text=["hi"])])], r"conv-1, session 1, turn 1: 'text' is \['hi'\]"),
    ([record(session_1=[row(1, text="half a \ud83d")])], "conv-1, session 1, turn 1: 'text' holds half a surrogate"),
    ([record(session_1=[row(1), row(1)])], "conv-1: dia_id 'D1:1' occurs more than once"),
    ([record(), record()], "sample_id 'conv-1' occurs more than once"),
    ([record(ask([]), ask([], 6))], "conv-1, question 2: category 6 is unknown"),
    ([record(ask([], True))], "conv-1, question 1: category True is unknown"),
    ([record(ask([], answer=None))], "conv-1, question 1: 'answer' is None"),
    ([record(ask([], question=""))], "conv-1, question 1: 'question' is ''"),
    ([record(ask("D1:1"))], "conv-1, question 1, 'evidence' is str"),
    ([record(ask([7]))], "conv-1, question 1, an entry of 'evidence' is int"),
    ([record("who?")], "conv-1, question 1 is str"),
])
def test_malformed_data_is_refused_by_place(records, words):
    with pytest.raises(ValueError, match=words):
        locomo.parse(records)
    assert locomo.parse([record()])  # and nothing but the one thing was wrong


def test_unknown_turn_is_refused():
    with pytest.raises(ValueError, match="conv-1 has no turn 'D7:1': its ids run from D1:1 to D2:3") as refusal:
        parse_one().turn("D7:1")
    assert not isinstance(refusal.value, KeyError)


# ---- where the file comes from ---------------------------------------------------------------------------------------

STAND_IN = json.dumps([record(ask(["D1:1"]))]).encode()


class Host(ThreadingHTTPServer):
    """A local stand-in for GitHub. `body` is what it sends, `promised` its Content-Length."""

    body, promised, status = STAND_IN, len(STAND_IN), 200
    stall = stall_in_body = 0.0
    requests = 0

    def handle_error(self, request, client_address):
        pass  # a client that hangs up on us is what some tests want


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests += 1
        time.sleep(self.server.stall)
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(self.server.promised))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(self.server.body[:9])
            self.wfile.flush()
            time.sleep(self.server.stall_in_body)
            self.wfile.write(self.server.body[9:])

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.delenv("PDMEM_LOCOMO", raising=False)
    monkeypatch.setenv("PDMEM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


@pytest.fixture
def official(monkeypatch):
    """Take STAND_IN for the official file."""
    monkeypatch.setattr(locomo, "LOCOMO_SHA256", hashlib.sha256(STAND_IN).hexdigest())
    monkeypatch.setattr(locomo, "LOCOMO_BYTES", len(STAND_IN))


@pytest.fixture
def host(monkeypatch, official):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Host(("127.0.0.1", 0), Handler)
    monkeypatch.setattr(locomo, "LOCOMO_URL", f"http://127.0.0.1:{server.server_port}/locomo10.json")
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_download_once_then_from_the_cache(cache, host):
    assert locomo.locomo_available() == (True, f"LoCoMo is not on this machine and {locomo.LOCOMO_URL} offers it.")
    assert locomo.load_locomo() == locomo.load_locomo() == locomo.parse(json.loads(STAND_IN))
    assert host.requests == 2  # the HEAD and one download
    assert [path.name for path in cache.iterdir()] == ["locomo10.json"]
    assert locomo.locomo_available() == (True, f"LoCoMo is at {cache / 'locomo10.json'}.")


def test_altered_download_is_refused_and_leaves_nothing(cache, host):
    host.body = STAND_IN.replace(b"Oslo", b"Rome")
    with pytest.raises(ValueError, match="sent an altered file.*PDMEM_LOCOMO.*synthetic"):
        locomo.load_locomo()
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("promised", [len(STAND_IN), len(STAND_IN) // 2])
def test_truncated_download_is_refused_and_leaves_nothing(cache, host, promised):
    host.body, host.promised = STAND_IN[: len(STAND_IN) // 2], promised
    with pytest.raises((RuntimeError, ValueError), match="PDMEM_LOCOMO"):
        locomo.load_locomo()
    assert list(cache.iterdir()) == []


def test_absent_from_the_host(cache, host):
    host.status = 404
    available, why = locomo.locomo_available()
    assert not available and "does not offer it" in why
    with pytest.raises(RuntimeError, match="HTTPError.*PDMEM_LOCOMO"):
        locomo.load_locomo()


@pytest.mark.parametrize("moment", ["stall", "stall_in_body"])
def test_hanging_host_fails_soon(cache, host, monkeypatch, moment):
    setattr(host, moment, 8.0)
    monkeypatch.setattr(locomo, "TIMEOUT", 0.2)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"\((ReadTimeout|ConnectionError)\): set PDMEM_LOCOMO .*synthetic"):
        locomo.load_locomo()
    assert time.monotonic() - start < 5
    assert list(cache.iterdir()) == []


def test_hanging_host_is_not_available(cache, host):
    host.stall = 8.0
    start = time.monotonic()
    available, why = locomo.locomo_available(timeout=0.1)
    assert time.monotonic() - start < 5
    assert not available and "cannot be reached (ReadTimeout)" in why


def test_unreachable_host(cache, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, not listening: refused at once
        monkeypatch.setattr(locomo, "LOCOMO_URL", f"http://127.0.0.1:{closed.getsockname()[1]}/locomo10.json")
        with pytest.raises(RuntimeError, match="ConnectionError.*PDMEM_LOCOMO.*synthetic"):
            locomo.load_locomo()
        assert locomo.locomo_available(timeout=0.5)[0] is False


def test_default_timeouts_are_seconds():
    assert 1 <= locomo.TIMEOUT <= 10


def test_unusable_cache_folder(tmp_path, monkeypatch, host):
    monkeypatch.delenv("PDMEM_LOCOMO", raising=False)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("PDMEM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(RuntimeError, match="not downloaded .*Not a directory"):
        locomo.load_locomo()
    assert host.requests == 0


@pytest.mark.parametrize("place", ["PDMEM_LOCOMO", "cache"])
@pytest.mark.parametrize(("content", "words"), [
    (STAND_IN[:-9], f"has {len(STAND_IN) - 9:,} bytes, locomo10.json has {len(STAND_IN):,}: "),
    (STAND_IN.replace(b"Oslo", b"Rome"), "has sha256 [0-9a-f]{64}, locomo10.json has [0-9a-f]{64}: "),
    (b"", "has 0 bytes"),
])
def test_local_copy_must_be_the_official_file(cache, host, tmp_path, monkeypatch, place, content, words):
    copy_ = cache / "locomo10.json" if place == "cache" else tmp_path / "mine.json"
    copy_.write_bytes(content)
    if place == "PDMEM_LOCOMO":
        monkeypatch.setenv("PDMEM_LOCOMO", str(copy_))
    with pytest.raises(ValueError, match=words) as refused:
        locomo.load_locomo()
    mend = {"PDMEM_LOCOMO": "give another by its path, load_locomo(path)", "cache": "delete it, and it is downloaded again"}
    assert mend[place] in str(refused.value)  # never to delete what is the user's own
    available, why = locomo.locomo_available()
    assert not available and re.search(words, why)
    assert host.requests == 0 and copy_.read_bytes() == content


def test_pdmem_locomo_goes_before_the_cache(cache, official, tmp_path, monkeypatch):
    (cache / "locomo10.json").write_bytes(b"not looked at")
    (tmp_path / "mine.json").write_bytes(STAND_IN)
    monkeypatch.setenv("PDMEM_LOCOMO", str(tmp_path / "mine.json"))
    assert locomo.load_locomo()[0].id == "conv-1"


def test_missing_files(cache, tmp_path, monkeypatch):
    for missing in (tmp_path / "no.json", tmp_path):  # a folder is no file either
        with pytest.raises(FileNotFoundError, match="correct the path"):
            locomo.load_locomo(missing)
    monkeypatch.setenv("PDMEM_LOCOMO", str(tmp_path / "no.json"))
    with pytest.raises(FileNotFoundError, match="PDMEM_LOCOMO"):
        locomo.load_locomo()
    assert locomo.locomo_available()[0] is False


def test_explicit_path_may_be_any_file_of_the_format(cache, tmp_path):
    records = synthetic_locomo(1, 2, seed=3)
    file = tmp_path / "own.json"
    file.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    assert locomo.load_locomo(file) == locomo.load_locomo(str(file)) == locomo.parse(records)


@pytest.mark.parametrize("content", [b"", b"[{", b"\xff\xfe\x00", b"<html>502</html>"])
def test_not_json(tmp_path, content):
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(ValueError, match="bad.json is not JSON .*LoCoMo's format") as refusal:
        locomo.load_locomo(tmp_path / "bad.json")
    assert refusal.value.__cause__ is not None


def test_import_is_light():
    code = "import sys, pdmem_lib.locomo, pdmem_lib.synthetic; print({'datasets', 'pooch'} & set(sys.modules))"
    root = Path(locomo.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ---- hash, split, tables ---------------------------------------------------------------------------------------------


def test_data_sha256_is_of_the_content():
    records = [record(ask(["D1:1"]))]
    digest = locomo.data_sha256(locomo.parse(records))
    assert digest == locomo.data_sha256(locomo.parse(json.loads(json.dumps(records))))
    changed = copy.deepcopy(records)
    changed[0]["conversation"]["session_2"][0]["text"] += "!"
    assert len(digest) == 64 and digest != locomo.data_sha256(locomo.parse(changed))


@pytest.mark.parametrize(("n", "train", "test"), [(10, 7, 3), (2, 1, 1), (3, 2, 1), (7, 5, 2), (20, 14, 6)])
def test_split(n, train, test):
    conversations = synthetic_conversations(n, 1, seed=0, turns_per_session=8)
    parts = locomo.split(conversations)
    assert [len(part) for part in parts] == [train, test]
    assert parts[0] + parts[1] == conversations


@pytest.mark.parametrize("n", [0, 1])
def test_split_of_too_few(n):
    with pytest.raises(ValueError, match=rf"{n} conversation\(s\).*at least two") as refusal:
        locomo.split([parse_one()] * n)
    assert refusal.type is ValueError


def test_dataset_dict():
    pytest.importorskip("datasets")
    first, second = synthetic_conversations(2, 2, seed=0)
    questions, turns = (locomo.to_dataset_dict([first, second], table) for table in ("questions", "turns"))
    assert list(questions) == list(turns) == ["train", "test"]
    assert questions["train"].features == questions["test"].features
    assert turns["test"]["text"][:] == [turn.text for turn in second.turns]
    assert questions["train"][0]["evidence"] == list(first.questions[0].evidence)
    assert {*questions["test"]["conversation"]} == {*turns["test"]["conversation"]} == {second.id}
    with pytest.raises(ValueError, match="'questions' or 'turns'"):
        locomo.to_dataset_dict([first, second], "sessions")


def test_dataset_dict_of_conversations_without_questions():
    pytest.importorskip("datasets")
    tables = locomo.to_dataset_dict([parse_one(), parse_one()])
    assert tables["train"].num_rows == 0 and "lag" in tables["train"].features


# ---- hostile text ----------------------------------------------------------------------------------------------------

hostile = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(texts=st.lists(hostile, min_size=1, max_size=5), speaker=hostile.filter(bool), answer=hostile.filter(bool))
def test_any_text_round_trips(texts, speaker, answer):
    rows = [row(n, text=text, speaker=speaker) for n, text in enumerate(texts, 1)]
    records = [record(ask(["D1:1"], answer=answer), session_1=rows, session_2=[])]
    (conversation,) = locomo.parse(json.loads(json.dumps(records)))
    assert [(turn.speaker, turn.text) for turn in conversation.turns] == [(speaker, text) for text in texts]
    assert [turn.utterance for turn in conversation.turns if turn.text] == [f"{speaker}: {t}" for t in texts if t]
    assert (conversation.questions[0].answer, conversation.questions[0].lag) == (answer, len(texts) - 1)
    assert len(locomo.data_sha256([conversation])) == 64


@settings(max_examples=60, deadline=None)
@given(entries=st.lists(st.one_of(st.text("D:; 0123", max_size=12), hostile), max_size=4))
def test_any_evidence_gives_turns_that_exist(entries):
    conversation = parse_one(ask(entries))
    (question,) = conversation.questions
    assert len(set(question.evidence)) == len(question.evidence)
    earliest = min((conversation.turn(id).index for id in question.evidence), default=-1)
    assert question.lag == 4 - earliest


# ---- the real file ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ten():
    return locomo.load_locomo()


@real_file
def test_real_counts(ten):
    assert [c.id for c in ten] == [f"conv-{n}" for n in (26, 30, 41, 42, 43, 44, 47, 48, 49, 50)]
    assert sum(len(c.sessions) for c in ten) == 272
    assert sum(len(c.turns) for c in ten) == 5882
    assert Counter(q.category for c in ten for q in c.questions) == {1: 282, 2: 321, 3: 96, 4: 841, 5: 446}
    assert sum(len(turn.caption) > 0 for c in ten for turn in c.turns) == 1226
    assert all(turn.id == f"D{turn.session}:{n}" for c in ten for s in c.sessions for n, turn in enumerate(s, 1))


@real_file
def test_real_lag_buckets(ten):
    train, test = locomo.split(ten)
    questions = [question for conversation in test for question in conversation.questions]
    buckets = Counter(sum(question.lag >= low for low in (32, 64, 128, 256)) for question in questions)
    assert (len(train), len(test)) == (7, 3)
    assert [buckets[b] for b in range(5)] == [27, 24, 60, 130, 398]
    assert sum(question.category != 5 for question in questions) == 505


@real_file
def test_real_untidy_rows(ten):
    at = {conversation.id: conversation for conversation in ten}
    assert at["conv-26"].questions[37].evidence == ("D8:6", "D9:17")
    assert at["conv-49"].questions[31].evidence == ("D9:1", "D4:4", "D4:6")
    assert "D11:26" in at["conv-43"].questions[18].evidence
    assert [(q.evidence, q.lag) for q in (at["conv-50"].questions[n] for n in (39, 42, 69))] == [((), 568)] * 3
    unusable = [(c.id, q.question) for c in ten for q in c.questions if not q.evidence]
    assert len(unusable) == 5
    fives = Counter(q.answer for c in ten for q in c.questions if q.category == 5)
    assert fives == {locomo.NOT_MENTIONED: 444, "No": 2}


# ---- synthetic -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long():
    return synthetic_conversations(2, 20, seed=5)


def test_synthetic_is_determined_by_its_seed():
    state = random.getstate()
    records = synthetic_locomo(2, 3, seed=1)
    assert records == synthetic_locomo(2, 3, seed=1)
    assert records == synthetic_locomo(4, 3, seed=1)[:2]  # conversation i does not depend on n
    assert records != synthetic_locomo(2, 3, seed=2)
    assert random.getstate() == state


def test_synthetic_is_the_same_on_every_machine():
    digest = locomo.data_sha256(synthetic_conversations(2, 3, seed=42))
    assert digest == "c55af669507fad350ec0d3b301a67f1fb0d43628ac72e53eec41e91c3b194e78"


def test_synthetic_format(long):
    (raw,) = synthetic_locomo(1, 2, seed=0)
    assert set(raw) == {"sample_id", "conversation", "qa"}
    assert set(raw["conversation"]["session_1"][0]) == {"speaker", "dia_id", "text"}
    for asked in raw["qa"]:
        assert ("adversarial_answer" in asked, "answer" in asked) == (asked["category"] == 5, asked["category"] != 5)
    for conversation in long:
        speakers = {turn.speaker for turn in conversation.turns}
        assert len(speakers) == 2 and len(conversation.sessions) == 20
        assert all(16 <= len(session) <= 24 for session in conversation.sessions)
        assert all(a.speaker != b.speaker for s in conversation.sessions for a, b in zip(s, s[1:]))
        assert all(re.fullmatch(r"\d+:\d\d pm on \d+ \w+, \d{4}", date) for date in conversation.dates.values())
        assert not any(re.search(r"[{}]", turn.text) for turn in conversation.turns)


def test_synthetic_asks_every_category_at_every_lag(long):
    for conversation in long:
        assert {question.category for question in conversation.questions} == set(locomo.CATEGORIES)
        assert {sum(q.lag >= low for low in (32, 64, 128, 256)) for q in conversation.questions} == set(range(5))
        assert len({question.question for question in conversation.questions}) == len(conversation.questions)


@pytest.mark.parametrize("seed", range(5))
def test_one_synthetic_session_asks_every_category(seed):
    (conversation,) = synthetic_conversations(1, 1, seed)
    assert {question.category for question in conversation.questions} == set(locomo.CATEGORIES)


def test_synthetic_evidence_holds_the_answer_and_nothing_else_does(long):
    for conversation in long:
        for question in conversation.questions:
            evidence = [conversation.turn(id) for id in question.evidence]
            parts = (question.adversarial_answer or question.answer).split(", ")
            assert len(parts) == len(evidence) and all(len(part.split()) <= 2 for part in parts)
            for part, turn in zip(parts, evidence):
                assert re.search(rf"\b{part}\b", turn.text)
                if question.category in (3, 4):  # two different events may fall on one day
                    assert [t.id for t in conversation.turns if re.search(rf"\b{part}\b", t.text)] == [turn.id]


def test_synthetic_facts_interfere(long):
    for conversation in long:
        multi_hop = [question for question in conversation.questions if question.category == 1]
        pairs = [[conversation.turn(id).speaker for id in question.evidence] for question in multi_hop]
        assert len(pairs) >= 10 and all(len(set(pair)) == 2 for pair in pairs)


def test_synthetic_adversarial_questions_are_of_the_other_speaker(long):
    for conversation in long:
        for question in (q for q in conversation.questions if q.category == 5):
            told = conversation.turn(question.evidence[0]).speaker
            assert question.answer == locomo.NOT_MENTIONED and told not in question.question


def test_synthetic_facts_run_out_gracefully():
    (conversation,) = synthetic_conversations(1, 60, seed=0)
    assert len(conversation.sessions) == 60 and len(conversation.questions) > 300


@pytest.mark.parametrize("sizes", [(0, 1, 8), (1, 0, 8), (1, 1, 7)])
def test_synthetic_of_nothing(sizes):
    n, sessions, turns = sizes
    with pytest.raises(ValueError, match="give at least 1, 1 and 8") as refusal:
        synthetic_conversations(n, sessions, 0, turns)
    assert f"n={n}" in str(refusal.value)


# ---- the tests themselves --------------------------------------------------------------------------------------------


def test_every_test_asserts():
    nodes = ast.parse(Path(__file__).read_text(encoding="utf-8")).body
    tests = [node for node in nodes if getattr(node, "name", "").startswith("test_")]
    silent = [test.name for test in tests if not any(isinstance(node, ast.Assert) for node in ast.walk(test))]
    assert len(tests) > 30 and silent == []
