"""The Memory Studio without a browser: what it records, asks and measures, and that its page says so, in escaped text."""

import json
import re
import subprocess
import sys
from html import escape
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import pdmem_lib as pdmem
from pdmem_lib import editing, lesson, provenance, recording, studio_model
from pdmem_lib.lesson import Known, Schedule, Talk
from pdmem_lib.persistence import adapter_fingerprint
from pdmem_lib.recording import Recording
from pdmem_lib.studio_model import Cancelled, Studio

PAGE = Path(__file__).parents[1] / "notebooks" / "page" / "memory_studio.ipynb"
HOSTILE = "Eve: <script>alert(1)</script> & <b>bold</b> <img src=x onerror=alert(2)>"
TURNS = ("Ann: I adopted a parrot.", "Ben: I bought a flute.", HOSTILE, "Cleo: I like rain.")
TALK = Talk("<i>Talk</i>", TURNS, (Known("Which animal did Ann adopt?", "parrot", (0,)),
                                   Known("Who is <u>Eve</u>?", "<s>nobody</s>", (2,))),
            ("Ann: I adopted a dog.", "Ben: I bought a piano."), "made up")
OTHER = Talk("Another", TURNS[:2], TALK.known[:1], TALK.others)
QUICK = {method: Schedule(2, 0.01) for method in pdmem.METHODS}


@pytest.fixture
def studio(opened):
    """``studio(method)``: with the talk open."""
    def build(method="slot", **settings):
        made = Studio(opened(method, **settings), [TALK, OTHER], QUICK)
        made.open(TALK)
        return made
    return build


# --- recording ---

@pytest.mark.parametrize("method", pdmem.METHODS)
def test_a_recording_holds_what_the_writes_did(opened, method):
    m = opened(method)
    made = Recording(m, TURNS)
    m.reset()
    for moment in range(len(TURNS) + 1):
        state = m.state if not moment else m.write_hidden([made.hidden[moment - 1]])
        ((name, rows),) = state.items()
        assert torch.equal(made.states[moment][name], rows)
        assert_close(torch.tensor(made.norm_history()[moment]), rows.norm(dim=1))
        assert_close(made.sizes(moment), provenance.write_provenance(m, made.hidden[:moment]), rtol=1e-4, atol=1e-7)
    assert made.changes == pytest.approx([float((made.states[t + 1][name] - made.states[t][name]).norm())
                                          for t in range(len(TURNS))], rel=1e-4)
    assert made.written().shape == (len(TURNS), len(rows))
    if method == "slot":
        assert made.written().sum(axis=1).tolist() == [m.settings.top_k] * len(TURNS)
    kept = made.kept()
    assert kept[-1] == pytest.approx(1) and (kept <= 1 + 1e-6).all() and (kept > 0).all()
    if method not in ("slot", "hebbian"):
        assert kept == pytest.approx(m.settings.gamma ** np.arange(len(TURNS) - 1, -1, -1), rel=1e-5)


def test_states_that_are_not_kept_are_written_again_bit_for_bit(opened, monkeypatch):
    m = opened("kv_extension")
    whole = Recording(m, TURNS * 4)
    monkeypatch.setattr(recording, "ROOM", 4 * m.state["P"].nbytes)
    thin = Recording(m, TURNS * 4, whole.hidden)
    assert len(thin.states._kept) <= 5 < len(whole.states._kept) == len(whole.states) == len(thin.states) == 17
    for moment in (0, 1, 5, 15, 16, -1):
        assert torch.equal(thin.states[moment]["P"], whole.states[moment]["P"])
    for _ in range(3):
        thin.undo()
    thin.take(TURNS[:1], whole.hidden[:1])
    assert torch.equal(thin.states[-1]["P"], editing.forget(m, [*whole.hidden[:13], whole.hidden[0]], ())["P"])


@pytest.mark.parametrize("method", pdmem.METHODS)
def test_undo_leaves_no_trace(opened, method):
    m = opened(method)
    made = Recording(m, TURNS[:2])
    before = made.states[-1]
    list(made.extend(TURNS[2:3]))
    assert made.undo() == TURNS[2]
    assert all(torch.equal(made.states[-1][name], t) for name, t in before.items())
    again = Recording(m, TURNS[:2], made.hidden)
    assert_close(made.sizes(), again.sizes(), rtol=0, atol=0)
    assert made.changes == again.changes and len(made) == 2 and made.written().shape == again.written().shape
    with pytest.raises(ValueError, match="nothing is written yet"):
        Recording(m).undo()


@pytest.mark.parametrize("method", pdmem.METHODS)
def test_a_reading_tells_tokens_gains_and_where_they_look(opened, method):
    m = opened(method)
    made = Recording(m, TURNS)
    other = editing.forget(m, made.hidden[:1], ())
    reading = made.read(TALK.known[0].question, other, "parrot")
    assert reading.answers["off"] == m.answer([reading.question], 8, memory="off")[0]
    for memory, state in (("own", made.states[-1]), ("off", "off"), ("other", other)):
        tokens, log_probs = m.token_log_probs(reading.question, "parrot", state)
        assert reading.tokens == tokens
        assert_close(reading.log_probs[memory], log_probs, rtol=1e-3, atol=2e-5)
    assert_close(reading.gains("other"), reading.log_probs["own"] - reading.log_probs["other"])
    L, h, T, M = reading.attention.shape
    assert (T, M) == (len(reading.tokens), len(reading.shares)) and reading.shares.shape[1] == len(TURNS)
    assert reading.entry_scores(0, block=1, head=0).tolist() == pytest.approx(reading.attention[1, 0, 0].tolist())
    assert_close(reading.by_block_and_head(None), reading.attention.sum(dim=(2, 3)))
    assert_close(reading.turn_scores().float(), sum(reading.turn_scores(t) for t in range(T)).float())
    assert len(reading.entries) == M


def test_a_reading_refuses_what_it_cannot_ask(opened):
    made = Recording(opened("slot"), TURNS[:1])
    with pytest.raises(ValueError, match="question is empty"):
        made.read("  ", made.states[0])
    with pytest.raises(ValueError, match="no moment 3: 1 turns are written"):
        made.read("Who?", made.states[0], moment=3)
    with pytest.raises(ValueError, match="no memory to look into"):
        Recording(opened("baseline"))


# --- the lesson ---

def test_a_lesson_is_learnt_kept_and_found_again(tiny):
    steps = []
    model, learnt = lesson.learn(tiny, "kv_extension", schedule=QUICK["kv_extension"],
                                 on_step=lambda step, of: steps.append((step, of)))
    assert steps == [(0, 2), (1, 2)] and learnt.asked == 2 * lesson.CHECKS and 0 <= learnt.right <= learnt.asked
    again, told = lesson.find(tiny, "kv_extension", schedule=QUICK["kv_extension"])
    assert told == learnt
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert lesson.find(tiny, "kv_extension", schedule=Schedule(3, 0.01)) is None
    file = lesson.folder_of(tiny, "kv_extension", 1, 42, QUICK["kv_extension"]) / "lesson.json"
    file.write_text("{")
    assert lesson.find(tiny, "kv_extension", schedule=QUICK["kv_extension"]) is None  # damaged: as if there were none
    lesson.learn(tiny, "M.3", schedule=QUICK["kv_extension"])
    assert lesson.find(tiny, "M.3", schedule=QUICK["kv_extension"]) is not None


def test_every_method_has_a_schedule_and_every_talk_its_answers(monkeypatch):
    assert set(lesson.SCHEDULES) == set(pdmem.METHODS)
    monkeypatch.delenv("PDMEM_LOCOMO", raising=False)
    talks = lesson.talks()
    assert len({talk.name for talk in talks}) == len(talks) >= 4
    for talk in talks[:2]:
        for known in talk.known:
            assert all(known.answer in talk.turns[turn] for turn in known.evidence)
            assert not any(known.answer in turn for turn in talk.others)
    assert any("synthetic, not LoCoMo" in talk.note for talk in talks)
    monkeypatch.setenv("PDMEM_LOCOMO", "/no/such/file")
    assert any("synthetic, not LoCoMo (There is no" in talk.note for talk in lesson.talks())


# --- the studio ---

@pytest.mark.parametrize("method", pdmem.METHODS)
def test_from_a_question_to_its_cause(studio, method):
    made = studio(method)
    reading = made.ask(TALK.known[0].question, "parrot")
    assert reading.moment == 4 and made.known(reading.question).answer == "parrot"
    effects, seen = made.measure(batch=3), []
    assert effects.shape == (4,) and not np.isnan(effects).any()
    without = editing.forget(made.model, made.recording.hidden, [0])
    wanted = reading.log_probs["own"].sum() - made.model.token_log_probs(reading.question, "parrot", without)[1].sum()
    assert effects[0] == pytest.approx(float(wanted), abs=2e-4)
    removal = made.remove_turn(0)
    assert removal.after == made.model.answer([reading.question], 8, memory=without)[0]
    assert float(removal.effect.sum()) == pytest.approx(effects[0], abs=2e-4)
    assert made.agreement().n == 4 and "n = 4" in made.told_agreement()
    assert made.measure(lambda *at: seen.append(at)) == pytest.approx(effects) and not seen  # nothing is measured twice
    if method == "hebbian":
        with pytest.raises(ValueError, match="out of one matrix"):
            made.empty_entry(0)
    else:
        assert made.empty_entry(3).what == "entry 3"


def test_measuring_can_be_stopped_and_goes_on(studio):
    made = studio()
    made.ask(TALK.known[0].question, "parrot")

    def stop(done, of, what):
        if done == 2:
            raise Cancelled
    with pytest.raises(Cancelled):
        made.measure(stop, batch=1)
    assert np.isnan(made.effects()).tolist() == [False, False, True, True]
    assert made.cause_figure().data  # what there is can be drawn
    assert not np.isnan(made.measure()).any()


def test_opening_can_be_stopped_and_keeps_what_was_read(studio, monkeypatch):
    made = studio()
    monkeypatch.setattr("pdmem_lib.studio_model.CHUNK", 1)

    def stop(done, of, what):
        if done == 4:  # two turns of the other conversation, two of this
            raise Cancelled
    with pytest.raises(Cancelled):
        made.open(TALK, stop)
    assert made.texts == list(TURNS[:2]) and made.moment == 2 and len(made.recording) == 2
    assert made.ask(TALK.known[0].question, "parrot").moment == 2


def test_turns_are_written_taken_back_and_looked_at_in_any_moment(studio):
    made = studio()
    assert made.write("  Ann:  it   can sing ") == 4 and made.texts[-1] == "Ann: it can sing"
    assert made.write("no one said this") == 5 and made.texts[-1] == "You: no one said this"
    made.seek(2)
    assert made.ask("Who?", "Ann").moment == 2
    made.use("hebbian", 1)
    assert len(made.recording) == 6 and made.reading.moment == 2 and made.moment == 2
    assert made.undo() == "You: no one said this"
    made.use("slot", 1)
    assert len(made.recording) == 5 and made.reading is None
    for text, words in (("", "the turn is empty"), ("x" * 401, "more than 400")):
        with pytest.raises(ValueError, match=words):
            made.write(text)
    with pytest.raises(ValueError, match="no moment 9"):
        made.seek(9)
    with pytest.raises(ValueError, match="nothing was asked yet"):
        made.measure()


def test_an_empty_page_is_written_on(opened):
    made = Studio(opened(), [Talk("empty", (), (), TURNS)])
    made.open(made.talks[0])
    with pytest.raises(ValueError, match="nothing is written at this moment"):
        made.figure("Who wrote what")
    with pytest.raises(ValueError, match="no turn to undo"):
        made.undo()
    made.write("Ann: hello")
    assert made.figure("Who wrote what").data and made.ask("Who?", "Ann").moment == 1


def test_methods_and_capacities_take_the_same_conversation(studio):
    made = studio()
    made.ask(TALK.known[0].question, "parrot")
    here, there = made.compare("hebbian", 10)
    assert (here, there) == (("slot", 1), ("hebbian", 10)) and made.choice == here
    assert made.schedule("M.4") == made.schedule("hebbian") and lesson.SCHEDULES["slot"] != lesson.SCHEDULES["kv_extension"]
    assert Studio(made.model, [TALK]).schedule("M.6") == lesson.SCHEDULES["slot"]
    assert Studio(made.model, [TALK], {"M.3": Schedule(7, 0.5)}).schedule("kv_extension") == Schedule(7, 0.5)
    for choice in (here, there):
        side = made.sides[choice]
        assert side.reading.answer == "parrot" and len(side.effects) == 4 and side.recording.texts == list(TURNS)
    assert made.sides[there].recording.states[-1]["M"].shape == (810, 810)
    with pytest.raises(ValueError, match="these two are the same"):
        made.compare("slot", 1)


def test_training_replaces_the_adapter_and_says_what_it_learnt(studio):
    made = studio()
    made.use("hebbian", 1)
    assert made.side.is_silent and "reads nothing yet" in made.adapter_told
    made.ask(TALK.known[0].question, "parrot")
    seen = []
    learnt = made.learn(lambda *at: seen.append(at))
    assert [at[:2] for at in seen[1:]] == [(0, 2), (1, 2)] and str(learnt) in made.adapter_told
    assert made.reading is not None and not made.side.is_silent
    found = Studio(pdmem.MemoryModel(made.backbone, "slot"), [TALK], QUICK)
    found.open(TALK)
    found.use("hebbian", 1)
    assert found.side.learnt == learnt  # kept
    with pytest.raises(Cancelled):
        made.learn(cancel)
    assert made.side.learnt == learnt


def cancel(*at):
    raise Cancelled


@pytest.mark.parametrize("method", pdmem.METHODS)
def test_every_view_draws_at_every_moment(studio, method):
    made = studio(method)
    made.ask(TALK.known[1].question, "<s>nobody</s>")
    for moment in (1, 4):
        made.seek(moment)
        for view in made.views():
            figure = made.figure(view, token=0, entry=2, block=0, head=1)
            assert figure.data and "<script" not in figure.to_json(), view
    assert ("Collisions" in made.views(), "Matrix" in made.views()) == (method == "slot", method == "hebbian")
    with pytest.raises(ValueError, match="has no view 'nonsense'"):
        made.figure("nonsense")


def test_a_state_is_saved_as_it_was_at_the_moment(studio, tmp_path):
    made = studio()
    made.seek(2)
    file = made.save_state(tmp_path / "memory.safetensors")
    fresh = pdmem.MemoryModel(made.backbone, "slot")
    assert torch.equal(fresh.load_state(file)["P"], made.recording.states[2]["P"])
    assert "parrot" not in file.read_bytes().decode("latin1")  # hashes, no texts


# --- the page ---

pytest.importorskip("anywidget", reason="the page comes with the notebooks extra")


@pytest.fixture
def page(opened, tmp_path):
    def build(method="slot"):
        from pdmem_lib.studio_view import StudioView
        return StudioView(Studio(opened(method), [TALK, OTHER], QUICK), tmp_path / "out")
    return build


def told(view):
    return re.sub("<[^>]*>", "", view.message.value)


@pytest.mark.parametrize("method", pdmem.METHODS)
def test_a_walk_through_the_page(page, method):
    view = page(method)
    assert view.moment.value == view.moment.max == 4 and len(view.turns.options) == 4
    view.first.click()
    assert view.studio.moment == 0 and "After 0 of 4 turns" in view.turn_told.value
    view.views.value = "Who wrote what"
    assert "Nothing is written at this moment" in view.memory_told.value and view.pane.layout.visibility == "hidden"
    view.views.value = "Entries"
    assert view.pane.layout.visibility == "visible"
    view.step.click()
    view.moment.value = 3
    view.back.click()
    assert view.studio.moment == view.moment.value == 2
    view.moment.value = 4
    view.look_at.value = "parrot"
    view.ask.click()
    assert view.views.value == "Answer" and "Asked after 4 turns" in told(view)
    assert [option[1] for option in view.tokens.options] == [-1, *range(len(view.studio.reading.tokens))]
    view.tokens.value = 0
    assert view.views.value == "Attention" and view.token == 0
    view.blocks.value, view.heads.value = 1, 0
    assert view.pane.figure.layout.shapes[0].y0 == 0.5
    for _, entry in view.entries.options[1:]:  # a slot may hold no turn at all, and says so
        view.entries.value = entry
        assert view.entry == entry and (view.behind.options[0][1] is not None or "no turn" in view.behind.options[0][0])
    view.entries.value = -1
    view.behind.value = view.behind.options[0][1]
    assert view.turn == view.turns.value == view.behind.value and f"Turn {view.turn}" in view.turn_told.value
    view.remove.click()
    assert f"Without turn {view.turn}" in view.removed.value and "nats" in told(view)
    view.entries.value = view.entries.options[1][1]
    view.empty.click()
    assert ("out of one matrix" if method == "hebbian" else f"Without entry {view.entry}") in told(view)
    view.measure.click()
    assert len(view.ranking.options) == 4 and "n = 4" in view.agreed.value and "4 exact replays" in told(view)
    view.ranking.value = view.ranking.options[-1][1]
    assert view.turn == view.ranking.options[-1][1] or view.turn == view.turns.value


def test_the_page_switches_compares_trains_and_opens(page):
    view = page()
    view.compare.click()
    assert "Nothing was asked yet" in told(view)
    view.look_at.value = "parrot"
    view.ask.click()
    view.compare.click()
    assert "Collisions" in view.views.options and view.compared.value.count("<td>") == 16
    view.method.value = "hebbian"
    assert view.studio.choice == ("hebbian", 1) and "Matrix" in view.views.options and view.studio.reading is not None
    view.capacity.value = 10
    assert view.studio.choice == ("hebbian", 10)
    view.capacity.value = 1
    view.train.click()
    assert "trained 2 steps" in told(view)
    view.talks.value = 1
    assert view.studio.talk is OTHER and len(view.turns.options) == 2 and "made up" not in told(view)


def test_the_page_draws_while_a_talk_is_being_read(page, monkeypatch):
    """Its turns are in the recording a moment before they are among the texts."""
    view, plain = page(), Recording.take
    drawn = []

    def take(recording, turns, hidden):
        plain(recording, turns, hidden)
        if 0 < len(view.studio.texts) < len(recording.changes):
            view.studio.seek(0)
            view.step.click()
            drawn.append((len(view.turns.options), told(view)))

    monkeypatch.setattr(Recording, "take", take)
    monkeypatch.setattr(studio_model, "CHUNK", 2)
    view.studio.open(TALK)
    [(turns, said)] = drawn
    assert turns == 2 and "class='error'" not in view.message.value and "did not work" not in said
    view.step.click()
    view.back.click()
    assert len(view.turns.options) == 4


def test_text_from_data_stays_text(page):
    view = page()
    view.turns.value = 2
    view.look_at.value = "<s>nobody</s>"
    view.question.value = TALK.known[1].question
    view.ask.click()
    view.turns.value = 2
    view.remove.click()
    view.compare.click()
    view.said.value = "<script>alert(3)</script>"
    view.write.click()
    shown = "".join(getattr(view, name).value for name in (
        "message", "turn_told", "answers", "removed", "agreed", "memory_told", "compared"))
    assert "<script" not in shown and "<img" not in shown and "<s>" not in shown and "<u>" not in shown
    assert escape("<script>alert(3)</script>") in shown
    for pane in (view.pane, view.cause):
        assert "<script" not in pane.figure_json and "<img" not in pane.figure_json


def test_what_goes_wrong_is_a_sentence_and_the_page_goes_on(page, monkeypatch):
    view = page()
    for act, words in ((view.measure.click, "Nothing was asked yet: ask a question first."),
                       (view.remove.click, "No turn is chosen"), (view.empty.click, "No entry is chosen"),
                       (view.write.click, "The turn is empty")):
        act()
        assert words in told(view) and "class='error'" in view.message.value
    view.question.value = ""
    view.ask.click()
    assert "The question is empty" in told(view)
    view.question.value = "Who?"
    monkeypatch.setattr(view.studio, "ask", lambda *a: {}["nothing"])
    view.ask.click()
    assert "This did not work (KeyError" in told(view) and "Traceback" not in view.message.value
    monkeypatch.undo()
    view.look_at.value = "Ann"
    view.ask.click()
    assert "Asked after 4 turns" in told(view)


def test_a_page_may_begin_empty(opened, tmp_path):
    from pdmem_lib.studio_view import StudioView

    view = StudioView(Studio(opened(), [Talk("empty", (), (), TURNS[:1])], QUICK), tmp_path)
    assert "After 0 of 0 turns" in view.turn_told.value and view.pane.figure.data
    view.ask.click()
    assert "memory is empty: write a turn first" in told(view)
    view.step.click()
    view.said.value = "Ann: hello"
    view.write.click()
    assert "Turn 0 is written" in told(view) and len(view.turns.options) == 1


def test_no_two_things_run_at_once(page):
    view = page()
    view.work.running = "Training"
    for act in (view.ask.click, view.measure.click, view.write.click, view.train.click):
        act()
        assert "Still at work (Training): wait for it, or press Cancel." in told(view)
    view.method.value = "hebbian"
    assert view.method.value == "slot" and view.studio.choice[0] == "slot"
    view.step.click()  # looking needs no model
    assert view.studio.moment


def test_long_work_in_a_thread_shows_how_far_it_is_and_stops(page):
    import asyncio

    view = page()

    async def act(stop):
        moments, ended = [], asyncio.Event()

        def work(progress):
            for i in range(400):
                progress(i, 400, "counting")
                moments.append(view.work.bar.value)
                __import__("time").sleep(0.005)
            return "done"

        view.work.run("Counting", work, lambda value: ended.set())
        assert view.work.running and view.work.cancel.layout.visibility == "visible"
        await asyncio.sleep(0.5)
        if stop:
            view.work.cancel.click()
        await asyncio.wait_for(ended.wait(), 20)
        return moments

    moments = asyncio.run(act(stop=True))
    assert len(moments) < 400 and max(moments) > 0 and "Counting: cancelled" in told(view)
    assert not view.work.running and view.work.cancel.layout.visibility == "hidden"


def test_what_is_compared_stands_still_meanwhile(page, monkeypatch):
    import asyncio

    view = page()
    view.ask.click()
    view.other_method.value = "hebbian"
    seen, compare = [], view.studio.compare

    def slowly(*given):
        __import__("time").sleep(1)
        return compare(*given)

    monkeypatch.setattr(view.studio, "compare", slowly)

    async def act():
        view.compare.click()
        assert view.work.running
        view.first.click()
        view.talks.value, view.method.value, view.play.value = 1, "gated", True
        seen.append((view.studio.moment, view.studio.talk, view.studio.choice))
        assert "Still at work" in told(view)
        while view.work.running:
            await asyncio.sleep(0.05)

    asyncio.run(act())
    assert seen == [(4, TALK, ("slot", 1))] == [(view.studio.moment, view.studio.talk, view.studio.choice)]
    assert (view.talks.value, view.method.value, view.play.value, view.moment.value) == (0, "slot", False, 4)
    view.first.click()
    assert view.studio.moment == 0


def test_playing_writes_turn_after_turn(page):
    import asyncio

    view = page()

    async def play():
        view.first.click()
        view.speed.value = 4.0
        view.play.value = True
        seen = {view.studio.moment}
        while view.play.value:
            await asyncio.sleep(0.05)
            seen.add(view.studio.moment)
        return seen

    assert asyncio.run(asyncio.wait_for(play(), 20)) == {0, 1, 2, 3, 4}
    assert view.play.description == "▶ Play"


def test_every_control_has_a_name_for_those_who_do_not_see_it(page):
    import ipywidgets

    def walk(widget):
        yield widget
        for child in getattr(widget, "children", ()):
            yield from walk(child)

    controls = [x for x in walk(page()) if isinstance(x, ipywidgets.Button | ipywidgets.Select | ipywidgets.Dropdown |
                                                      ipywidgets.Text | ipywidgets.IntSlider | ipywidgets.ToggleButton)]
    assert len(controls) > 25
    for control in controls:
        assert control.tooltip, control
    assert all(x.description for x in controls if isinstance(x, ipywidgets.Button))


def test_only_one_pane_carries_plotly_and_a_pane_draws_small(page):
    view = page()
    panes = [view.pane, view.cause, *view.panes]
    assert [len(pane.library) > 1_000_000 for pane in panes] == [True, False, False, False]
    layout = json.loads(view.pane.figure_json)["layout"]
    assert layout["height"] == view.pane.height and "width" not in layout and not layout.get("title", {}).get("text")
    assert view.pane.figure.layout.width == 1280 and view.pane.label


def test_the_page_without_a_kernel_says_what_it_is(page):
    shown = page()._repr_mimebundle_()
    bundle = shown[0] if isinstance(shown, tuple) else shown
    assert bundle["text/plain"].startswith("Memory Studio: backbone")


def test_the_page_opens_with_an_adapter_that_is_named(opened, tmp_path, monkeypatch):
    source = "".join(json.loads(PAGE.read_text())["cells"][0]["source"])

    def run_page(adapter):
        monkeypatch.setenv("PDMEM_STUDIO_ADAPTER", str(adapter))
        exec(source, names := {})
        return names["page"]

    m = opened("gated")
    m.save_pretrained(tmp_path / "mine")
    shown = run_page(tmp_path / "mine").studio.model
    assert shown.method == "gated" and adapter_fingerprint(shown) == adapter_fingerprint(m)
    assert "role='alert'" in run_page(tmp_path / "nothing").value


@pytest.mark.slow
def test_export_writes_every_view_and_the_state(page):
    view = page()
    view.look_at.value = "parrot"
    view.ask.click()
    view.export.click()
    folder = view.studio and __import__("pathlib").Path(view.folder.value)
    pages = {file.stem for file in folder.glob("*.html")}
    assert pages == {"entries", "who_wrote_what", "decay", "collisions", "attention", "answer",
                     "cause"}
    assert (folder / "memory.safetensors").is_file() and "files are in" in told(view)
    for file in folder.glob("*.html"):
        assert "<script>alert" not in file.read_text() and "https://cdn" not in file.read_text().split("<body>")[0]
    if list(folder.glob("*.png")):  # where there is a Chromium
        assert {file.stem for file in folder.glob("*.png")} == pages


def test_importing_the_library_does_not_import_the_page(tmp_path):
    code = ("import sys, pdmem_lib as pdmem; assert callable(pdmem.studio); "
            "assert not {'ipywidgets', 'plotly', 'anywidget'} & set(sys.modules); "
            "sys.modules['anywidget'] = None\n"
            "try: pdmem.studio()\n"
            "except RuntimeError as error: print(error)")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "needs the notebook extras, and anywidget is missing" in out and "make setup" in out


def test_the_page_takes_no_name_that_widgets_use_themselves(page):
    """A handler called ``_compare`` once replaced ipywidgets' own, which some messages alone call."""
    import inspect

    import ipywidgets

    view = page()
    inherited = {name for kind in ipywidgets.VBox.__mro__ for name in vars(kind)} | vars(ipywidgets.VBox()).keys()
    ours = type(view).__mro__[: type(view).__mro__.index(ipywidgets.VBox)]
    functions = {name for kind in ours for name, value in vars(kind).items() if inspect.isfunction(value)}
    parts = {name for name, value in vars(view).items() if isinstance(value, ipywidgets.Widget)}
    assert (functions | parts) & inherited == {"__init__", "_repr_mimebundle_"}
