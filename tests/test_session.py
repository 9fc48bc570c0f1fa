"""A session across processes, kills, roll-backs, mergers and forgetting; every method of the registry where it counts."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import pdmem_lib as pdmem
from pdmem_lib import editing, methods, persistence
from pdmem_lib.journal import Journal
from pdmem_lib.session import Session

ONE = ["Ann: I adopted a parrot.", "Ann: It can sing.", "Ben: My flute is old.", "Ann: The parrot is called Kiki."]
FACTS = [("What did Ann adopt?", "a parrot"), ("What is old?", "the flute")]
SUMS = [name for name in pdmem.METHODS if not issubclass(pdmem.REGISTRY[name], methods.SparseSlots)]


@pytest.fixture(scope="module")
def tiny():
    """One family is enough here, on the processor: a process that forks must not have touched a GPU."""
    return pdmem.load_backbone("tiny-gpt2", device="cpu")


def same(a, b):
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def alone(model, turns):
    """The state of a memory that was told these turns and no others."""
    return editing.forget(model, [model.backbone.encode([turn], progress=False)[0] for turn in turns], [])


# ---- talking ----


@pytest.mark.parametrize("method", pdmem.METHODS)
def test_what_is_written_at_once_or_apart_or_reopened_is_one_state_bit_for_bit(model, method, tmp_path):
    model = model(method)
    at_once, before = Session(model), model.state
    assert at_once.write(ONE) == [0, 1, 2, 3]
    with Session(model, tmp_path / "ann") as session:
        assert session.write(ONE[0]) == [0] and session.write(ONE[1:3]) == [1, 2]
    with Session.open(tmp_path / "ann", model.backbone) as session:
        assert session.write(ONE[3]) == [3] and session.turns == 4
        assert same(session.state, at_once.state) and same(session.state, alone(model, ONE))
        assert session.ask(FACTS[0][0]) == model.answer([FACTS[0][0]], memory=session.state)[0]
    assert model.state is before, "the model's own state is left alone"


def test_a_peek_writes_nothing(model, tmp_path):
    session = Session(model("slot"), tmp_path)
    session.write(ONE[:2])
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    told = Session(session.model)
    told.write(ONE)
    assert session.peek(ONE[2:], "Who sings?") == told.ask("Who sings?")
    assert session.peek(ONE[2], [q for q, _ in FACTS]) == session.peek([ONE[2]], [q for q, _ in FACTS])
    assert session.turns == 2 and len(session.transcript()) == 2
    assert files == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize("keep_text", [False, True])
def test_texts_are_on_disk_only_where_they_were_asked_for(model, tmp_path, keep_text):
    with Session(model("gated"), tmp_path, keep_text) as session:
        session.write(ONE)
        session.ask("Where is Kiki?")
        session.snapshot("now")
        session.save_state(tmp_path / "one-file.safetensors", keep_text)
        table = session.transcript()
    assert list(table["kind"]) == ["write"] * 4 + ["ask"] and list(table["turn"][:4]) == [0, 1, 2, 3]
    assert table["text"].notna().all() == keep_text and table["sha256"].notna().all()
    assert table["tokens"][0] == len(session.model.backbone.token_ids(ONE[0]))
    found = [path for path in tmp_path.rglob("*") if path.is_file() and b"Kiki" in path.read_bytes()]
    assert bool(found) == keep_text
    saved = persistence.read_state(tmp_path / "one-file.safetensors")
    assert saved.turns == 4 and len(saved.log) == 5 and bool(saved.log[0].text) == keep_text


def test_an_untrained_or_trained_adapter_reads_the_same_session(model, tmp_path):
    with Session(model("kv_extension"), tmp_path) as session:
        session.write(ONE)
    trained = model("kv_extension")
    with torch.no_grad():
        trained.adapter.gate += 1
    with Session(trained, tmp_path) as later:
        assert same(later.state, session.state)
    with Session.open(tmp_path, trained.backbone) as kept:
        assert kept.model.adapter.gate.min() == 1, "the folder holds the adapter that was used last"
    assert len(list(tmp_path.glob("adapter-*"))) == 1


def test_another_memory_is_refused_by_name(model, tmp_path):
    Session(model("slot"), tmp_path).close()
    with pytest.raises(ValueError, match="gamma: 0.95 there, 0.5 here"):
        Session(model("slot", gamma=0.5), tmp_path)
    with pytest.raises(ValueError, match="baseline has no memory to keep"):
        Session(model("baseline"))
    with pytest.raises(FileNotFoundError, match="holds no session"):
        Session.open(tmp_path / "elsewhere")
    with Session(model("slot"), tmp_path):
        pass  # the refused one has let the lock go


def test_only_one_may_write_and_others_may_look(model, tmp_path):
    first = Session(model("slot"), tmp_path)
    first.write(ONE[:2])
    with pytest.raises(RuntimeError, match=f"open already .process {os.getpid()}.*read_only=True"):
        Session(first.model, tmp_path)
    reader = Session(first.model, tmp_path, read_only=True)
    assert same(reader.state, first.state) and isinstance(reader.ask("Who?"), str)
    for change in (lambda: reader.write("x"), lambda: reader.snapshot("x"), lambda: reader.forget(0)):
        with pytest.raises(RuntimeError, match="open to read only"):
            change()
    first.close()
    with pytest.raises(RuntimeError, match="is closed"):
        first.write("too late")
    with Session(first.model, tmp_path) as second:
        assert second.turns == 2


# ---- going back ----


@pytest.mark.parametrize("folder", [None, "ann"])
def test_a_rollback_leaves_nothing_of_what_came_after(model, tmp_path, folder):
    model, folder = model("slot"), folder and tmp_path / folder
    session = Session(model, folder, keep_text=True)
    session.write(ONE[:2])
    session.snapshot("two")
    kept = session.state
    session.write(ONE[2:])
    session.ask("Where is Kiki?")
    session.snapshot("four")
    assert session.snapshots == ["two", "four"] and session.diff("two")["change"].max() > 0
    session.rollback("two")
    assert same(session.state, kept) and session.turns == 2 and session.snapshots == ["two"]
    assert len(session.transcript()) == 2 and session.diff("two")["change"].eq(0).all()
    if folder:
        assert not [path for path in folder.rglob("*") if path.is_file() and b"Kiki" in path.read_bytes()]
    assert session.write(ONE[3]) == [2]
    assert same(session.state, alone(model, [*ONE[:2], ONE[3]]))
    with pytest.raises(ValueError, match="no snapshot 'four': there are two"):
        session.rollback("four")
    if folder:
        session.close()
        with Session(model, folder) as again:
            assert same(again.state, session.state) and again.snapshots == ["two"]
            again.rollback("two")
            assert same(again.state, kept)


def test_a_rollback_to_the_very_beginning(model, tmp_path):
    with Session(model("slot"), tmp_path) as session:
        session.snapshot("start")
        session.rollback("start")
        session.write(ONE)
        session.rollback("start")
    with Session(session.model, tmp_path) as again:
        assert again.turns == 0 and same(again.state, session.model.adapter.initial_state()) and again.snapshots == ["start"]


def test_an_interrupt_between_the_disk_and_the_session_leaves_them_in_step(model, tmp_path, monkeypatch):
    session = Session(model("slot"), tmp_path, keep_text=True)
    session.write(ONE[:2])
    journal, append = session._journal, session._journal.append

    def interrupted(*arguments):
        append(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(journal, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.write(ONE[2])
    monkeypatch.undo()
    session.snapshot("two")
    assert session.turns == 2 and session.write(ONE[3]) == [2]
    session.close()
    with Session(session.model, tmp_path) as again:
        assert again.turns == 3 and same(again.state, alone(again.model, [ONE[0], ONE[1], ONE[3]]))
        assert again.forget(2).exact
        again.rollback("two")
        assert again.turns == 2 and same(again.state, alone(again.model, ONE[:2]))


@pytest.mark.parametrize("change, step", [("forget", "_commit"), ("forget", "unlink"), ("forget", "drop_snapshot"),
                                          ("rollback", "_commit"), ("rollback", "_tidy"), ("rollback", "drop_snapshot")])
def test_what_is_interrupted_on_the_disk_is_taken_from_there(model, tmp_path, monkeypatch, change, step):
    session = Session(model("kv_extension"), tmp_path / "s", keep_text=True)
    session.write(ONE[:2])
    session.snapshot("two")
    session.write(ONE[2])
    session.snapshot("three")
    where, real = (Path, Path.unlink) if step == "unlink" else (Journal, getattr(Journal, step))

    def interrupted(self, *given, **named):
        if step != "unlink" or self.name.startswith("log-"):
            raise KeyboardInterrupt
        return real(self, *given, **named)

    monkeypatch.setattr(where, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.forget(1) if change == "forget" else session.rollback("two")
    monkeypatch.undo()
    session.save_state(tmp_path / "exported.safetensors", keep_text=True)
    if change == "forget" and step != "_commit":
        assert b"sing" not in (tmp_path / "exported.safetensors").read_bytes()
    left = {True: ONE[:3], False: [ONE[0], ONE[2]] if change == "forget" else ONE[:2]}[step == "_commit"]
    numbers = session.write(ONE[3])
    assert numbers == ([len(left)] if (change, step) in [("rollback", "_tidy"), ("rollback", "drop_snapshot")] else [3])
    left = [*left, ONE[3]]
    assert session.turns == len(left) and same(session.state, alone(session.model, left))
    session.close()
    with Session(session.model, tmp_path / "s", keep_text=True) as again:
        texts = again.transcript().query("kind == 'write'")["text"]
        assert again.turns == len(left) and list(texts) == left and same(again.state, alone(again.model, left))
        assert again.forget(numbers[0]).exact and same(again.state, alone(again.model, left[:-1]))


def test_a_forked_child_does_not_keep_a_closed_session_locked(model, tmp_path):
    session = Session(model("slot"), tmp_path)
    reads, writes = os.pipe()
    if not (child := os.fork()):
        os.close(writes)
        os.read(reads, 1)
        os._exit(0)
    session.close()
    with Session(session.model, tmp_path) as again:
        assert again.turns == 0
    os.close(writes)
    os.close(reads)
    os.waitpid(child, 0)


def test_a_child_that_closes_its_copy_leaves_the_session_locked(model, tmp_path):
    session = Session(model("slot"), tmp_path)
    if not (child := os.fork()):
        session.close()
        os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(RuntimeError, match="open already"):
        Session(session.model, tmp_path)
    assert session.write(ONE[0]) == [0]


def test_a_folder_that_is_gone_is_not_taken_for_an_empty_memory(model, tmp_path):
    session = Session(model("slot"), tmp_path / "s", keep_text=True)
    session.write(ONE[:2])
    session.snapshot("two")
    session.write(ONE[2])
    shutil.rmtree(tmp_path / "s")
    for change in (lambda: session.rollback("two"), lambda: session.write(ONE[3]), lambda: session.snapshot("x"),
                   lambda: session.forget(0)):
        with pytest.raises(OSError):
            change()
        assert session.turns == 3 and same(session.state, alone(session.model, ONE[:3]))
    assert not (tmp_path / "s" / "state.safetensors").exists()


def test_a_snapshot_that_was_interrupted_is_forgotten_too(model, tmp_path, monkeypatch):
    session = Session(model("slot"), tmp_path, keep_text=True)
    session.write(ONE[:2])
    save = Journal.save_snapshot

    def interrupted(*given):
        save(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "save_snapshot", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.snapshot("x")
    monkeypatch.undo()
    session.forget(1)
    assert not session.snapshots and not list((tmp_path / "snapshots").glob("*.safetensors"))


def test_a_damaged_adapter_in_the_folder_is_written_again(model, tmp_path):
    m = model("slot")
    Session(m, tmp_path).close()
    (weights,) = tmp_path.glob("adapter-*/adapter.safetensors")
    whole = weights.read_bytes()
    damaged = whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]
    for damage in (lambda: weights.write_bytes(damaged), lambda: shutil.rmtree(weights.parent)):
        damage()
        with pytest.raises((ValueError, FileNotFoundError)):
            Session.open(tmp_path, m.backbone)
        Session(m, tmp_path).close()
        with Session.open(tmp_path, m.backbone) as again:
            assert persistence.adapter_fingerprint(again.model) == persistence.adapter_fingerprint(m)


def test_what_a_table_or_a_mistake_gives_is_taken_or_refused_by_name(model):
    session, other = Session(model("kv_extension"), keep_text=True), Session(model("kv_extension"))
    session.write(ONE)
    assert session.forget(session.transcript()["turn"][0]).exact and session.forget(np.int64(1)).exact and session.turns == 2
    for wrong in (lambda: session.ask(5), lambda: session.peek("Ann: Hm.", 5), lambda: session.snapshot(5),
                  lambda: session.merge(5)):
        with pytest.raises(ValueError, match="list of strings|cannot name a snapshot|another Session"):
            wrong()
    session.merge(other)


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a\n", "ä", "x" * 65, "~", "a\\b"])
def test_a_name_never_becomes_a_path(model, tmp_path, name):
    session = Session(model("slot"), tmp_path / "s")
    with pytest.raises(ValueError, match="cannot name a snapshot"):
        session.snapshot(name)
    with pytest.raises(ValueError, match="no snapshot"):
        session.rollback(name)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


# ---- forgetting ----


@pytest.mark.parametrize("reopened", [False, True])
@pytest.mark.parametrize("method", pdmem.METHODS)
def test_with_texts_a_turn_is_forgotten_exactly(model, tmp_path, method, reopened):
    model = model(method)
    session = Session(model, tmp_path, keep_text=True)
    session.write(ONE)
    session.ask("Who has a parrot?")
    if reopened:
        session.close()
        session = Session.open(tmp_path, model.backbone, keep_text=True)
    done = session.forget([0, 3], facts=FACTS)
    assert done.exact and same(session.state, alone(session.model, ONE[1:3])) and session.turns == 2
    assert list(done.cost.columns) == ["question", "answer", "before", "after", "change"] and len(done.cost) == 2
    session.close()
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or not any(words in path.read_bytes() for words in (b"Kiki", b"Who has"))
    with Session.open(tmp_path, model.backbone) as later:
        assert same(later.state, session.state)
        assert list(later.transcript()["kind"]) == ["forgotten", "write", "write", "forgotten", "ask"]
        assert later.write("Ben: Hm.") == [4], "a number stands for one turn for ever"
        with pytest.raises(ValueError, match="no turn 0 to forget"):
            later.forget(0)


def test_forgetting_begins_at_the_last_snapshot_before_and_drops_those_after(model):
    session = Session(model("hebbian"), keep_text=True)
    session.write(ONE[:2])
    session.snapshot("before")
    session.write(ONE[2])
    session.snapshot("after")
    session.write(ONE[3])
    texts = session._log[0].text
    session._log[0] = persistence.LogEntry("write", "", turn=0, sha256=session._log[0].sha256)  # this text is lost
    assert session.forget(2).exact and session.snapshots == ["before"]
    assert same(session.state, alone(session.model, [ONE[0], ONE[1], ONE[3]]))
    with pytest.raises(ValueError, match="text of turn 0 is not known"):
        session.forget(0)
    assert session.forget(0, texts={0: texts}).exact
    assert same(session.state, alone(session.model, [ONE[1], ONE[3]])) and session.snapshots == []


@pytest.mark.parametrize("method", SUMS)
def test_with_the_turn_alone_it_is_forgotten_approximately_and_says_so(model, tmp_path, method):
    model = model(method)
    session = Session(model, tmp_path)
    session.write(ONE)
    whole = session.state
    with pytest.raises(ValueError, match="text of turn 1 is not known"):
        session.forget(1)
    with pytest.raises(ValueError, match="not the text that was written as turn 1"):
        session.forget(1, texts={1: "Ann: It can dance."})
    assert same(session.state, whole)
    done = session.forget(0, texts={0: ONE[0]})
    assert not done.exact and "estimated" in done.how
    ((name, never_told),) = alone(model, ONE[1:]).items()
    assert (session.state[name] - never_told).norm() < 0.1 * (whole[name] - never_told).norm()
    session.close()
    with Session(model, tmp_path) as again:
        assert same(again.state, session.state) and again.turns == 3
        assert not again.forget([1, 3], texts=dict(enumerate(ONE))).exact, "what was taken away is not written again"


def test_a_slot_memory_without_texts_forgets_nothing_and_says_why(model):
    session = Session(model("slot"))
    session.write(ONE)
    state = session.state
    with pytest.raises(ValueError, match="cannot be told from the turn alone: keep the texts"):
        session.forget(1, texts={1: ONE[1]})
    assert session.state is state and session.forget(1, texts=dict(enumerate(ONE))).exact


def test_the_cost_is_what_the_scores_say(model):
    model = model("kv_extension")
    with torch.no_grad():
        model.adapter.gate += 1
    a, b = alone(model, ONE), alone(model, ONE[:1])
    table = editing.cost(model, {"before": a, "after": b}, FACTS)
    for row, (question, answer) in zip(table.itertuples(), FACTS, strict=True):
        scores = [model.score([question], [answer], memory=state).log_prob.item() for state in (a, b)]
        assert_close([row.before, row.after], scores, rtol=1e-4, atol=1e-4)
        assert abs(row.change - (scores[1] - scores[0])) < 1e-3 and row.change != 0
    assert editing.cost(model, {"before": a, "after": b}, []).empty


# ---- merging ----


@pytest.mark.parametrize("method", SUMS)
def test_two_sessions_are_merged_and_one_turn_is_forgotten_later(model, tmp_path, method):
    model = model(method)
    ann, ben = Session(model, tmp_path / "ann", keep_text=True), Session(model, tmp_path / "ben")
    ann.write(ONE[:2])
    ben.write([ONE[2], "Ben: It was cheap.", "Ben: It is blue."])
    wanted = editing.merge(model, ann.state, ben.state, (2, 3))
    table = ann.merge(ben, facts=FACTS)
    assert same(ann.state, wanted) and ann.turns == 2
    assert list(table.columns) == ["question", "answer", "own", "other", "merged", "change"]
    ann.write(ONE[3])
    ann.close()
    with Session.open(tmp_path / "ann", model.backbone, keep_text=True) as ann:
        done = ann.forget(0)
        assert done.exact
        merged = editing.merge(model, alone(model, [ONE[1]]), ben.state, (1, 3))
        assert same(ann.state, model.adapter.write(merged, model.backbone.encode([ONE[3]])[0]))


def test_a_merger_without_a_meaning_is_refused_with_the_reason(model):
    ann, ben = Session(model("slot", num_entries=8)), Session(model("slot", num_entries=8))
    ann.write(ONE[:2])
    ben.write(ONE[2:])
    state = ann.state
    with pytest.raises(ValueError, match="sum of two averages means nothing"):
        ann.merge(ben)
    with pytest.raises(ValueError, match="the other session belongs to another memory .*seed: 7 there, 42 here"):
        ann.merge(Session(model("slot", num_entries=8, seed=7)))
    assert ann.state is state and len(ann.transcript()) == 2


# ---- what dies ----


STEPS = {
    "write": lambda s: s.write(ONE[2:]),
    "ask": lambda s: s.ask("Who?", max_new_tokens=1),
    "snapshot": lambda s: s.snapshot("new"),
    "rollback": lambda s: s.rollback("one"),
    "forget": lambda s: s.forget(1),
    "merge": lambda s: s.merge(_other(s.model)),
}


def _other(model):
    session = Session(model)
    session.write("Ben: I bought a harp.")
    return session


def killed_at(number, folder, model, step):
    """Whether a process that does ``step`` was killed at its ``number``-th touch of the folder; else it came to its end."""
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(60)
            torch.set_num_threads(1)
            session, touched = Session(model, folder, keep_text=True), 0

            def hook(event, arguments):
                nonlocal touched
                if (event in ("open", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree")
                        and any(str(folder) in str(a) for a in arguments)):
                    touched += 1
                    if touched == number:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
            STEPS[step](session)
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL), f"the child ended with {code}"
    return code != 0


@pytest.mark.parametrize("step", STEPS)
def test_a_kill_at_any_instant_leaves_the_session_before_or_after(model, step, tmp_path):
    model = model("kv_extension")
    with Session(model, tmp_path / "start", keep_text=True) as session:
        for number, name in enumerate(["one", "two"]):
            session.write(ONE[number])
            session.snapshot(name)
        before, table = session.state, session.transcript()
    shutil.copytree(tmp_path / "start", tmp_path / "end")
    with Session(model, tmp_path / "end", keep_text=True) as session:
        STEPS[step](session)
        after = session.state
    seen = set()
    for number in range(1, 100):
        folder = tmp_path / f"{step}-{number}"
        shutil.copytree(tmp_path / "start", folder)
        died = killed_at(number, folder, model, step)
        with Session(model, folder, keep_text=True) as session:
            states = {"before": same(session.state, before), "after": same(session.state, after)}
            assert any(states.values()), f"neither before nor after, when killed at touch {number}"
            seen |= {name for name, so in states.items() if so}
            log = session.transcript()
            assert session.turns == (log["kind"] == "write").sum()
            if not states["after"]:
                assert list(log["sha256"]) == list(table["sha256"])
            assert ("two" in session.snapshots) == (states["before"] or step not in ("rollback", "forget"))
            assert session.forget(0).exact, "log and state agree"
            assert not list(folder.rglob("*.partial")) and len(list(folder.glob("log-*.jsonl"))) == 1
        if not died:
            break
    assert not died and number > 4 and seen == {"before", "after"}


def test_a_torn_tail_of_the_log_is_cut_off(model, tmp_path):
    with Session(model("slot"), tmp_path) as session:
        session.write(ONE[:2])
    log = tmp_path / "log-0.jsonl"
    whole = log.read_bytes()
    for tail in (b'{"kind": "wri', whole.splitlines(keepends=True)[0], b"\0" * 100):
        log.write_bytes(whole + tail)
        with Session(session.model, tmp_path, read_only=True) as reader:
            assert reader.turns == 2 and len(reader.transcript()) == 2
        with Session(session.model, tmp_path) as again:
            assert same(again.state, session.state)
    with Session(session.model, tmp_path) as again:
        again.write(ONE[2])
    assert [json.loads(line)["turn"] for line in log.read_text().splitlines()] == [0, 1, 2]


def test_a_damaged_log_is_named_and_the_state_is_not_lost(model, tmp_path):
    with Session(model("slot"), tmp_path) as session:
        session.write(ONE[:2])
    log = tmp_path / "log-0.jsonl"
    whole = log.read_bytes()
    for damaged in (whole[:-1], whole[:40], whole.replace(b'"turn": 1', b'"turn": 7'), b""):
        log.write_bytes(damaged)
        with pytest.raises(ValueError, match="log-0.jsonl is damaged: put it back.*load_state"):
            Session(session.model, tmp_path)
    log.unlink()
    with pytest.raises(FileNotFoundError, match="holds no log-0.jsonl"):
        Session(session.model, tmp_path)
    assert same(session.model.load_state(tmp_path / "state.safetensors"), session.state)


def test_what_a_session_can_do_without_does_not_keep_it_shut(model, tmp_path, caplog):
    with Session(model("kv_extension"), tmp_path / "s", keep_text=True) as session:
        session.write(ONE[0])
        session.snapshot("whole"), session.snapshot("broken")
        session.merge(_other(session.model))
    (tmp_path / "s" / "snapshots" / "broken.safetensors").write_bytes(b"half")
    next((tmp_path / "s").glob("merged-*")).unlink()
    strangers = [tmp_path / "s" / name for name in ("adapter-mine", "log-book.jsonl", "notes.txt", ".hidden")]
    for path in strangers:
        path.write_text("mine")
    with Session(session.model, tmp_path / "s") as again:
        assert same(again.state, session.state) and again.snapshots == ["whole"]
        assert not again.forget(0).exact, "the memory that was merged in is missing"
    assert caplog.text.count("goes on without") == 2 and all(path.read_text() == "mine" for path in strangers)
    assert (tmp_path / "s").stat().st_mode & 0o077 == 0, "what was said is the user's own"


def test_a_log_cannot_name_a_file_elsewhere(model, tmp_path):
    with pytest.raises(ValueError, match="no sha256"):
        persistence.LogEntry.from_json({"kind": "merge", "time": "", "state": "../../elsewhere"})
    with Session(model("slot"), tmp_path) as session:
        session.write(ONE[0])
    for name in ("../log-0.jsonl", "log-0.jsonl/x", "lock", ""):
        persistence.save_state(session.state, persistence.identity(session.model), tmp_path / "state.safetensors",
                               session={"log": name, "entries": 1, "chain": "", "age": 1})
        with pytest.raises(ValueError, match="none of a session"):
            Session(session.model, tmp_path)


def test_a_full_disk_loses_neither_the_session_nor_what_was_there(model, tmp_path):
    import resource

    session = Session(model("slot"), tmp_path, keep_text=True)
    session.write(ONE[:2])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # the log's lines still fit, the state does not
        with pytest.raises(OSError, match="could not write .*state.safetensors.*free some space"):
            session.write(ONE[2])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert session.turns == 2 and session.write(ONE[3]) == [2]
    session.close()
    with Session(session.model, tmp_path) as again:
        assert again.turns == 3 and same(again.state, alone(again.model, [ONE[0], ONE[1], ONE[3]]))


def test_a_write_does_not_grow_with_the_log(model, tmp_path):
    """Bytes written for a turn are those of a line and a state, with thousands of turns behind it."""
    with Session(model("slot", num_entries=8), tmp_path) as session:
        session.write("Ann: Hello.")
        entries = [persistence.LogEntry("write", "", turn=i, tokens=1, sha256="0" * 64) for i in range(1, 5001)]
        now = session._now
        session._append(type(now)(now.state, turns=5001, age=5001), entries)
        session._next = 5001
        sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir() if path.is_file()}
        session.write("Ann: Hello.")
        log, state = (tmp_path / name for name in ("log-0.jsonl", "state.safetensors"))
        assert log.stat().st_size - sizes["log-0.jsonl"] < 300
        assert abs(state.stat().st_size - sizes["state.safetensors"]) < 64 and state.stat().st_size < 10_000
    with Session(session.model, tmp_path) as again:
        assert again.turns == 5002
