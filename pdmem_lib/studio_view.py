"""The Memory Studio as a page: `studio_model.Studio` shown with ipywidgets and plotly, in JupyterLab or through Voilà.

    left        the conversation: play, step, scrub, write a turn, undo; how much each turn changed the memory
    middle      the memory: entries over time, who wrote what, change and decay, collisions or the matrix, attention
    right       ask: the answer under own, no and another's memory; token -> block and head -> entry -> turns
    below       the cause: what the answer loses without each turn, beside the attention to it; another method beside

Everything is a labelled button, list or slider, so that a keyboard reaches it; a click on a figure is only a short cut.
Text from data is escaped wherever it becomes HTML. Long work runs in a thread and can be cancelled, and what goes wrong
is told as a sentence.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import wraps
from html import escape
from pathlib import Path

import ipywidgets as w
import numpy as np

from . import figures, lesson
from ._maps import token_text
from ._plot import look_of, signed, times
from .backbone import load_backbone
from .causal_figures import told_agreement
from .lesson import Talk
from .memory import MemoryModel
from .methods import METHODS, method_name
from .pane import Pane
from .studio_model import Choice, Studio
from .studio_parts import LEFT, MIDDLE, RIGHT, STYLE, Work, beside, box, button, plain_token, row, sentence

METHOD = "kv_extension"  # learns the lesson surely, and its entries are rows that can be followed and emptied
BARS = " ▁▂▃▄▅▆▇█"
SPEEDS = {"slow": 0.5, "1 turn/s": 1.0, "2 turns/s": 2.0, "4 turns/s": 4.0}
ENTRIES = 4  # that are offered as those read most
ALL, ANY = -1, ("all", -1)  # a list's value and entry for all of them (ipywidgets shows None as nothing chosen)
UNWRITTEN, UNREAD = "no turn: only its start is there", "nothing is read: is the adapter trained?"


def handler(method: Callable) -> Callable:
    """A reaction to a control: errors are told in the page, and nothing reacts to what the page itself sets."""
    @wraps(method)
    def react(self: "StudioView", *args) -> None:
        if self._setting:
            return
        start = time.perf_counter()
        try:
            method(self, *args)
        except Exception as error:
            self.tell(sentence(error), True)
        self.took = time.perf_counter() - start
    return react


class StudioView(w.VBox):
    """The page for ``studio``; ``folder`` is where exports go. ``took`` holds the seconds of the last reaction."""

    def __init__(self, studio: Studio, folder: str | Path = "studio-export"):
        self.studio = studio
        self.took = 0.0
        self.token: int | None = None
        self.entry: int | None = None
        self.block: int | None = None
        self.head: int | None = None
        self.turn: int | None = None
        self._setting = False
        self._playing: asyncio.Task | None = None
        self.message = w.HTML(layout=w.Layout(flex="1 1 auto", margin="0 8px"))
        self.work = Work(self.tell)
        self._make_head(folder)
        self._make_conversation()
        self._make_memory()
        self._make_question()
        self._make_cause()
        self._make_comparison()
        super().__init__([w.HTML(STYLE), self.head_row, self.status_row, row(self.left, self.middle, self.right),
                          self.below, self.beside])
        self.add_class("pdmem-studio")
        if studio.side.recording is None:
            studio.open(studio.talk)
        self._opened(None)
        self.tell(studio.adapter_told, False)

    # ---- parts of the page ----
    def _make_head(self, folder: str | Path) -> None:
        studio = self.studio
        self.method = w.Dropdown(options=[(look_of(m).label, m) for m in _methods(studio)], value=studio.choice[0],
                                 description="Method", tooltip="How the memory is written and read",
                                 layout=w.Layout(width="215px"), style=dict(description_width="58px"))
        self.capacity = w.Dropdown(options=[(times(c), c) for c in (1, 10)], value=studio.choice[1],
                                   description="Size", tooltip="Capacity: 64 entries, or ten times as many",
                                   layout=w.Layout(width="105px"), style=dict(description_width="36px"))
        self.train = button("Train adapter", "Train this method's adapter on the lesson: about a minute")
        self.save = button("Save state", "Write the memory at this moment as a state file")
        self.export = button("Export", "Every view as PNG and HTML, and the state file")
        self.folder = w.Text(str(folder), description="to", tooltip="Folder for the exported files",
                             layout=w.Layout(width="170px"), style=dict(description_width="18px"))
        for control in (self.method, self.capacity):
            control.observe(self._switched, names="value")
        self.train.on_click(self._train)
        self.save.on_click(self._save)
        self.export.on_click(self._export)
        title = w.HTML(f"<h2>Memory Studio <small class='told'>{escape(studio.backbone.name)}</small></h2>",
                       layout=w.Layout(flex="1 1 auto"))
        self.head_row = w.HBox([title, self.method, self.capacity, self.train, self.save, self.export, self.folder],
                               layout=w.Layout(align_items="center", flex_flow="row wrap"))
        self.status_row = w.HBox([self.message, self.work.bar, self.work.cancel],
                                 layout=w.Layout(align_items="center", min_height="32px"))

    def _make_conversation(self) -> None:
        self.talks = w.Dropdown(options=[(talk.name, i) for i, talk in enumerate(self.studio.talks)], value=0,
                                description="Talk", tooltip="Which conversation is read into memory",
                                layout=w.Layout(flex="1 1 0", width="auto", min_width="0"),
                                style=dict(description_width="34px"))
        self.first = button("Start", "Go to the moment before the first turn")
        self.back = button("◀ Back", "One turn back")
        self.step = button("Step ▶", "One turn on")
        self.play = w.ToggleButton(description="▶ Play", tooltip="Write turn after turn")
        self.speed = w.Dropdown(options=SPEEDS, value=1.0, tooltip="Speed of playing", layout=w.Layout(width="92px"))
        self.moment = w.IntSlider(0, 0, 1, description="After", tooltip="How many turns are written",
                                  layout=w.Layout(width="99%"), style=dict(description_width="38px"))
        self.turns = w.Select(rows=8, tooltip="Turns; the bar tells how much each changed the memory",
                              layout=w.Layout(width="99%", height="160px"))
        self.turn_told = w.HTML()
        self.said = w.Text(placeholder="Ann: say something", tooltip="A turn of your own",
                           layout=w.Layout(flex="1 1 0", width="auto", min_width="0"))
        self.write = button("Write", "Write this turn into memory")
        self.undo = button("Undo", "Take the last turn back, exactly")
        self.talks.observe(self._chose_talk, names="value")
        self.first.on_click(lambda _: self._go(0))
        self.back.on_click(lambda _: self._go(self.studio.moment - 1))
        self.step.on_click(lambda _: self._go(self.studio.moment + 1))
        self.play.observe(self._play, names="value")
        self.moment.observe(lambda change: self._go(change["new"]), names="value")
        self.turns.observe(self._chose_turn, names="value")
        self.write.on_click(self._write)
        self.undo.on_click(self._undo)
        self.left = box("Conversation", w.HBox([self.talks, self.speed]),
                         w.HBox([self.first, self.back, self.play, self.step],
                                layout=w.Layout(flex_flow="row wrap")), self.moment, self.turns, self.turn_told,
                         w.HBox([self.said, self.write, self.undo]), place=LEFT)

    def _make_memory(self) -> None:
        self.views = w.ToggleButtons(options=self.studio.views(), tooltip="What is shown of the memory")
        self.pane = Pane(280, first=True)
        self.memory_told = w.HTML()
        self.views.observe(self._chose_view, names="value")
        self.pane.on_click(self._clicked_memory)
        self.middle = box("Memory", self.views, self.pane, self.memory_told, place=MIDDLE)

    def _make_question(self) -> None:
        self.question = w.Combobox(placeholder="Ask the memory", tooltip="A question; known ones are offered",
                                   layout=w.Layout(flex="1 1 auto", width="auto"))
        self.ask = button("Ask", "Answer under own, no and another's memory", "primary")
        self.look_at = w.Text(placeholder="own memory's answer, or one you type", description="Score",
                              tooltip="The answer whose tokens are looked at; empty: own memory's",
                              layout=w.Layout(width="99%"), style=dict(description_width="40px"))
        self.answers = w.HTML()
        self.tokens = w.ToggleButtons(options=[ANY], tooltip="A token of the answer")
        options = dict(layout=w.Layout(width="49%"), style=dict(description_width="42px"))
        self.blocks = w.Dropdown(options=[ANY], description="Block", tooltip="Block of the model", **options)
        self.heads = w.Dropdown(options=[ANY], description="Head", tooltip="Head of the block", **options)
        self.entries = w.ToggleButtons(options=[ANY], tooltip="Entries read most by this token")
        self.behind = w.Select(rows=3, tooltip="Turns behind the entry; choose one",
                               layout=w.Layout(width="99%", height="54px"))
        self.ask.on_click(self._ask)
        self.tokens.observe(self._chose_token, names="value")
        self.blocks.observe(self._chose_place, names="value")
        self.heads.observe(self._chose_place, names="value")
        self.entries.observe(self._chose_entry, names="value")
        self.behind.observe(self._chose_behind, names="value")
        self.right = box(
            "Question", w.HBox([self.question, self.ask]), self.look_at, self.answers,
            w.HTML("<b>1. Token</b>, and its gain over no memory (nats)"), self.tokens,
            w.HBox([self.blocks, self.heads]), beside("<b>2. Entry</b><br>it reads", self.entries),
            beside("<b>3. Turns</b><br>behind it", self.behind), place=RIGHT)

    def _make_cause(self) -> None:
        self.measure = button("Measure every turn", "Replay the talk without each turn and score the answer anew",
                               "primary")
        self.remove = button("Remove turn", "Replay without the chosen turn, exactly, and ask again")
        self.empty = button("Empty entry", "Put its start in the chosen entry's place, and ask again")
        self.removed, self.agreed = w.HTML(), w.HTML()
        self.cause = Pane(190)
        self.ranking = w.Select(rows=8, tooltip="Turns by what the answer loses without them",
                                layout=w.Layout(width="99%", height="186px"))
        self.measure.on_click(self._measure)
        self.remove.on_click(self._remove)
        self.empty.on_click(self._empty)
        self.ranking.observe(self._chose_ranked, names="value")
        self.cause.on_click(lambda _, place: self._point_at(place[0]))
        self.below = row(
            box("Cause", self.measure, w.HBox([self.remove, self.empty]), self.removed, place=LEFT),
            box("Which turn moved the answer", self.cause, self.agreed, place=MIDDLE),
            box("Turns by effect", self.ranking, place=RIGHT))

    def _make_comparison(self) -> None:
        other = next(method for _, method in self.method.options if method != self.studio.choice[0])
        self.other_method = w.Dropdown(options=self.method.options, value=other,
                                       description="Compare with", tooltip="Another method on the same conversation",
                                       layout=w.Layout(width="270px"), style=dict(description_width="98px"))
        self.other_capacity = w.Dropdown(options=self.capacity.options, value=1, tooltip="Its capacity",
                                         layout=w.Layout(width="70px"))
        self.compare = button("Compare side by side", "Ask the same question of both, and measure both")
        self.compared = w.HTML()
        self.panes = Pane(240), Pane(240)
        self.side_by_side = w.HBox([], layout=w.Layout(width="100%"))
        self.compare.on_click(self._compare_sides)
        self.beside = box("Another memory of the same conversation", w.HBox(
            [self.other_method, self.other_capacity, self.compare]), self.compared, self.side_by_side)

    # ---- telling ----
    def tell(self, text: str, error: bool = False) -> None:
        """A sentence in the status line."""
        kind = "error" if error else "told"
        self.message.value = f"<span role='status' class='{kind}'>{escape(text)}</span>"

    def _set(self, *settings: tuple[w.Widget, dict]) -> None:
        """Change controls without their handlers taking it for the user's."""
        before, self._setting = self._setting, True
        try:
            for control, values in settings:
                for name, value in values.items():
                    setattr(control, name, value)
        finally:
            self._setting = before

    # ---- the conversation ----
    @handler
    def _chose_talk(self, change) -> None:
        talk: Talk = self.studio.talks[change["new"]]
        try:
            self.work.run(f"Reading {talk.name}", lambda progress: self.studio.open(talk, progress), self._opened)
        except RuntimeError:
            self._set((self.talks, dict(value=change["old"])))
            raise

    def _opened(self, _) -> None:
        self._reading_gone()
        self.turn = None
        known = self.studio.talk.known
        self._set((self.question, dict(options=tuple(one.question for one in known[:200]),
                                       value=known[0].question if known else "")),
                  (self.look_at, dict(value="")))
        note = f" ({self.studio.talk.note})" if self.studio.talk.note else ""
        self.tell(f"{len(self.studio.texts)} turns in memory{note}. {self.studio.adapter_told}")
        self._draw_all()

    @handler
    def _go(self, moment: int) -> None:
        if not 0 <= moment <= len(self.studio.texts):
            return
        self.studio.seek(moment)
        self._draw_conversation()
        self._draw_memory()

    @handler
    def _play(self, change) -> None:
        self.play.description = "⏸ Pause" if change["new"] else "▶ Play"
        if not change["new"]:
            return
        if self.studio.moment >= len(self.studio.texts):
            self._go(0)
        self._playing = asyncio.get_running_loop().create_task(self._play_on())

    async def _play_on(self) -> None:
        while self.play.value and self.studio.moment < len(self.studio.texts):
            await asyncio.sleep(1 / self.speed.value)
            if self.play.value:
                self._go(self.studio.moment + 1)
        self.play.value = False

    @handler
    def _chose_turn(self, change) -> None:
        self._point_at(change["new"])

    def _point_at(self, turn: int | None) -> None:
        """Make ``turn`` the chosen one everywhere."""
        self.turn = turn if turn is not None and 0 <= turn < len(self.studio.texts) else None
        self._set((self.turns, dict(value=self.turn)))
        self._draw_turn()
        self._draw_memory()

    @handler
    def _write(self, _) -> None:
        self.work.require_idle()
        number = self.studio.write(self.said.value)
        self._set((self.said, dict(value="")))
        self.turn = number
        self._reading_gone()
        self.tell(f"Turn {number} is written: it changed the memory by {self.studio.recording.changes[number]:.3g}.")
        self._draw_all()

    @handler
    def _undo(self, _) -> None:
        self.work.require_idle()
        text = self.studio.undo()
        self._reading_gone()
        self.turn = None
        self.tell(f"Taken back, exactly: {text}")
        self._draw_all()

    def _reading_gone(self) -> None:
        self.token = self.entry = self.block = self.head = None
        self.removed.value = ""

    # ---- the memory ----
    @handler
    def _chose_view(self, _) -> None:
        self._draw_memory()

    @handler
    def _clicked_memory(self, _, place: list[int]) -> None:
        view = self.views.value
        if view == "Entries":
            self.entry, turn = place[0], place[1] - 1
        elif view == "Who wrote what":
            self.entry, turn = place
        elif view == "Attention":
            self.block, self.head = place
            self._set((self.blocks, dict(value=self.block)), (self.heads, dict(value=self.head)))
            self._draw_chain()
            self._draw_memory()
            return
        elif view == "Decay":
            turn = place[0]
        else:
            return
        self._draw_chain()
        self._point_at(turn)

    # ---- the question ----
    @handler
    def _ask(self, _) -> None:
        self.work.require_idle()
        if not self.studio.texts:
            raise ValueError("the memory is empty: write a turn first")
        start = time.perf_counter()
        self.tell("Asking …")
        reading = self.studio.ask(self.question.value, self.look_at.value)
        self._reading_gone()
        self._set((self.views, dict(value="Answer")))
        seconds = time.perf_counter() - start
        self.tell(f"Asked after {reading.moment} turns, in {seconds:.1f} s. {self.studio.adapter_told}")
        self._draw_all()

    @handler
    def _chose_token(self, change) -> None:
        self.token = only(change["new"])
        self.entry = None
        self._set((self.views, dict(value="Attention")))
        self._draw_chain()
        self._draw_memory()

    @handler
    def _chose_place(self, _) -> None:
        self.block, self.head, self.entry = only(self.blocks.value), only(self.heads.value), None
        self._draw_chain()
        self._draw_memory()

    @handler
    def _chose_entry(self, change) -> None:
        self.entry = only(change["new"])
        view = "Who wrote what" if not self.studio.model.adapter.needs_inputs else "Attention"
        self._set((self.views, dict(value=view)))
        self._draw_chain()
        self._draw_memory()

    @handler
    def _chose_behind(self, change) -> None:
        if change["new"] is not None:
            self._point_at(change["new"])

    # ---- the cause ----
    @handler
    def _measure(self, _) -> None:
        self.work.require_idle()
        if self.studio.reading is None:
            raise ValueError("nothing was asked yet: ask a question first")
        start = time.perf_counter()

        def done(found: np.ndarray | None) -> None:
            if found is not None:
                agreed = told_agreement(self.studio.agreement())
                self.tell(f"{len(found)} exact replays in {time.perf_counter() - start:.1f} s; {agreed}.")
            self._draw_cause()

        self.work.run("Replaying without each turn", self.studio.measure, done)

    @handler
    def _remove(self, _) -> None:
        self.work.require_idle()
        if self.turn is None:
            raise ValueError("no turn is chosen: choose one in the conversation, or among those behind an entry")
        self._show_removal(self.studio.remove_turn(self.turn))

    @handler
    def _empty(self, _) -> None:
        self.work.require_idle()
        if self.entry is None:
            raise ValueError("no entry is chosen: choose one that a token reads, or click on the memory")
        self._show_removal(self.studio.empty_entry(self.entry))

    def _show_removal(self, found) -> None:
        total = float(found.effect.sum())
        by_token = " ".join(f"{token_text(token, 12)}&nbsp;{signed(-value, 2)}" for token, value in zip(
            self.studio.reading.tokens, found.effect.tolist(), strict=True))
        changed = "The answer changes." if found.before != found.after else "The answer stays."
        self.removed.value = (
            f"<b>Without {escape(found.what)}</b>: {changed}<br>{escape(repr(found.before))} → "
            f"<b>{escape(repr(found.after))}</b><br>Δ log p of {escape(repr(self.studio.reading.answer))}: "
            f"<b>{signed(-total, 2)}</b> nats<br><span class='told'>{by_token}</span>")
        self.tell(f"Without {found.what} the answer's log-probability changes by {signed(-total, 2)} nats.")
        self._draw_cause()

    @handler
    def _chose_ranked(self, change) -> None:
        if change["new"] is not None:
            self._point_at(change["new"])

    # ---- methods ----
    @handler
    def _switched(self, _) -> None:
        wanted = self.method.value, self.capacity.value
        try:
            self.work.require_idle()
            self.work.run(f"Switching to {look_of(wanted[0]).label}", lambda progress: self.studio.use(*wanted),
                          self._switched_to)
        except RuntimeError:
            self._set_choice()
            raise

    def _set_choice(self) -> None:
        method, capacity = self.studio.choice
        self._set((self.method, dict(value=method)), (self.capacity, dict(value=capacity)))

    def _switched_to(self, _) -> None:
        self._reading_gone()
        view, views = self.views.value, self.studio.views()
        self._set_choice()
        self._set((self.views, dict(options=views, value=view if view in views else views[0])))
        self.tell(f"{self.studio.side.name}. {self.studio.adapter_told}")
        self._draw_all()

    @handler
    def _train(self, _) -> None:
        self.begin_training()

    def begin_training(self) -> None:
        """Train the adapter that is looked at; RuntimeError while something else runs."""
        self.work.run(f"Training {self.studio.side.name}", self.studio.learn, self._switched_to)

    @handler
    def _compare_sides(self, _) -> None:
        if self.studio.reading is None:
            raise ValueError("nothing was asked yet: ask a question first")
        wanted = self.other_method.value, self.other_capacity.value
        self.work.run(f"Comparing with {look_of(wanted[0]).label}", lambda progress: self.studio.compare(
            *wanted, progress), self._show_comparison)

    def _show_comparison(self, found: tuple[Choice, Choice] | None) -> None:
        if found is None:
            return
        rows = {name: [] for name in ("", "Adapter", "Own memory answers", "Right answer", "Gain over none (nats)",
                                      "Gain over another's (nats)", "Turn that moved it most", "Does attention tell?")}
        for choice, pane in zip(found, self.panes, strict=True):
            with self.studio.looking_at(choice) as side:
                reading, effects = side.reading, self.studio.effects()
                known = self.studio.known(reading.question)
                most = int(np.nanargmax(effects))
                agreed = self.studio.agreement()
                told = [f"<b>{escape(side.name)}</b>", escape(self.studio.adapter_told),
                        f"<b>{escape(reading.answers['own'])}</b>", escape(known.answer if known else "not known"),
                        signed(float(reading.gains("off").sum()), 2), signed(float(reading.gains("other").sum()), 2),
                        f"{most}: {escape(self.studio.texts[most][:60])} ({signed(effects[most], 2)} nats)",
                        told_agreement(agreed)]
                for row, text in zip(rows.values(), told, strict=True):
                    row.append(text)
                pane.show(self.studio.cause_figure())
        cells = {name: "".join(f"<td>{text}</td>" for text in texts) for name, texts in rows.items()}
        table = "".join(f"<tr><th>{name}</th>{texts}</tr>" for name, texts in cells.items())
        self.compared.value = f"<table>{table}</table>"
        self.side_by_side.children = [w.VBox([pane], layout=w.Layout(flex="1 1 0", min_width="0")) for pane in self.panes]
        names = " and ".join(self.studio.sides[choice].name for choice in found)
        self.tell(f"{names}, on the same conversation and question.")
        self._draw_cause()

    # ---- files ----
    @handler
    def _save(self, _) -> None:
        self.work.require_idle()
        file = self.studio.save_state(Path(self.folder.value or ".") / "memory.safetensors")
        self.tell(f"The memory after {self.studio.moment} turns is in {file}.")

    @handler
    def _export(self, _) -> None:
        folder = self.folder.value.strip()
        if not folder:
            raise ValueError("no folder is named: type one beside Export")

        def done(files: Sequence[Path] | None) -> None:
            if files is not None:
                self.tell(f"{len(files)} files are in {folder}: {', '.join(sorted({file.suffix for file in files}))}.")

        self.work.run("Exporting", lambda progress: self.studio.export(folder, progress), done)

    # ---- drawing ----
    def _draw_all(self) -> None:
        self._draw_conversation()
        self._draw_reading()
        self._draw_memory()
        self._draw_cause()

    def _draw_conversation(self) -> None:
        studio = self.studio
        changes = np.asarray(studio.recording.changes)
        heights = np.ceil(8 * changes / changes.max()).astype(int) if len(changes) and changes.max() > 0 else changes
        options = [(f"{BARS[int(height)] if i < studio.moment else '·'} {i} {text}", i)
                   for i, (height, text) in enumerate(zip(heights, studio.texts, strict=True))]
        chosen = self.turn if self.turn is not None and self.turn < len(options) else None
        self._set((self.moment, dict(max=max(1, len(studio.texts)), value=studio.moment)),
                  (self.turns, dict(options=options, value=chosen)))
        self._draw_turn()

    def _draw_turn(self) -> None:
        studio, turn = self.studio, self.turn
        if turn is None and studio.moment:
            turn = studio.moment - 1
        if turn is None or turn >= len(studio.texts):
            self.turn_told.value = f"After {studio.moment} of {len(studio.texts)} turns."
            return
        left = studio.recording.kept(studio.moment)[turn] if turn < studio.moment else None
        now = "not written yet" if left is None else f"{left:.0%} of it is left"
        self.turn_told.value = (f"<b>Turn {turn}</b> changed the memory by {studio.recording.changes[turn]:.3g}; {now}."
                                f"<br>{escape(studio.texts[turn][:120])}")

    def _draw_memory(self) -> None:
        try:
            figure = self.studio.figure(self.views.value, self.token, self.entry, self.block, self.head)
        except ValueError as error:
            self.memory_told.value = f"<span class='told'>{escape(sentence(error))}</span>"
            self.pane.layout.visibility = "hidden"
            return
        self.pane.layout.visibility = "visible"
        self._mark(figure)
        self.pane.show(figure)
        self.memory_told.value = f"<span class='told'>{self._caption()}</span>"

    def _mark(self, figure) -> None:
        """Frame the chosen entry and turn in a map of entries and turns."""
        view, n = self.views.value, self.studio.moment
        if view not in ("Entries", "Who wrote what"):
            return
        first = 1 if view == "Entries" else 0
        M = len(self.studio.recording.norms[0])
        frame = dict(type="rect", line=dict(color="#D55E00", width=2))
        if self.entry is not None and self.entry < M and not self.studio.model.adapter.needs_inputs:
            figure.add_shape(x0=-0.5, x1=n - 0.5 + first, y0=self.entry - 0.5, y1=self.entry + 0.5, **frame)
        if self.turn is not None and self.turn < n:
            figure.add_shape(x0=self.turn - 0.5 + first, x1=self.turn + 0.5 + first, y0=-0.5, y1=M - 0.5, **frame)

    def _caption(self) -> str:
        studio = self.studio
        texts = {
            "Entries": "Norm of each row after each turn; hover for the turn.",
            "Who wrote what": "Share of each turn in each row; hover for the turn. White: only its start is there.",
            "Decay": f"What each turn changed when written, and what later turns left of it; γ = "
                                f"{studio.model.settings.gamma:g}.",
            "Collisions": "How often each slot was written, and how often again by the next turns.",
            "Matrix": "Components and singular values: few strong ones answer every question alike.",
            "Attention": "Attention by block and head; choose one to follow it.",
            "Answer": "Log-probability of each token under own, no and another's memory.",
        }
        framed = self.entry is not None and self.views.value == "Who wrote what"
        return escape(texts[self.views.value] + (f" Entry {self.entry} is framed." if framed else ""))

    def _draw_reading(self) -> None:
        reading = self.studio.reading
        if reading is None:
            self.answers.value = ("<span class='told'>Ask, and the answer stands here under own, no and another's "
                                  "memory.</span>")
            self._set((self.tokens, dict(options=[ANY], value=ALL)))
        else:
            known, names = self.studio.known(reading.question), {"own": "own", "off": "none", "other": "another's"}
            rows = "".join(
                f"<tr><th>{name}</th><td><b>{escape(reading.answers[memory]) or '<i>nothing</i>'}</b></td>"
                f"<td class='n'>{signed(float(reading.log_probs[memory].sum()), 2)}</td></tr>"
                for memory, name in names.items())
            told = f" (right: {escape(known.answer)})" if known else ""
            self.answers.value = (f"<table><tr><th>Memory</th><th>answers{told}</th>"
                                  f"<th class='n'>log p of {escape(repr(reading.answer))}</th></tr>{rows}</table>")
            gains = reading.gains("off").tolist()
            self._set((self.tokens, dict(options=[ANY, *(
                (f"{plain_token(token)} {signed(gain, 1)}", i) for i, (token, gain) in enumerate(zip(
                    reading.tokens, gains, strict=True)))], value=one(self.token))))
        self._draw_chain()

    def _draw_chain(self) -> None:
        """Token, block and head, entries, turns, as they are chosen."""
        reading = self.studio.reading
        if reading is None or reading.attention is None:
            self._set((self.behind, dict(options=[], value=None)), *(
                (control, dict(options=[ANY], value=ALL)) for control in (self.entries, self.blocks, self.heads)))
            return
        L, h = reading.attention.shape[:2]
        scores = reading.entry_scores(self.token, self.block, self.head).numpy()
        most = [int(i) for i in np.argsort(-scores, kind="stable")[:ENTRIES] if scores[i] > 0]
        if self.entry is not None and self.entry not in most and self.entry < len(scores):
            most = [self.entry, *most[: ENTRIES - 1]]
        chosen = self.entry if self.entry in most else None
        total = scores.sum() or 1
        parts = [(f"{i}: {scores[i] / total:.0%}", i) for i in most]
        shares = reading.shares.numpy()
        behind = shares[chosen] if chosen is not None else scores @ shares / total
        turns = [int(t) for t in np.argsort(-behind, kind="stable")[:12] if behind[t] > 0]
        named = [(f"{behind[t]:.0%} turn {t} {self.studio.texts[t]}", t) for t in turns] or [
            (UNWRITTEN if scores.any() else UNREAD, None)]
        self._set(
            (self.blocks, dict(options=[ANY, *((str(i), i) for i in range(L))], value=one(self.block))),
            (self.heads, dict(options=[ANY, *((str(i), i) for i in range(h))], value=one(self.head))),
            (self.entries, dict(options=[ANY, *parts], value=one(chosen))),
            (self.behind, dict(options=named, value=self.turn if self.turn in turns else None)))

    def _draw_cause(self) -> None:
        studio = self.studio
        if studio.reading is None or not studio.reading.moment:
            self._set((self.ranking, dict(options=[], value=None)))
            self.agreed.value = ("<span class='told'>Ask first. Then every turn is taken out of memory once, by exact "
                                 "replay.</span>")
            self.removed.value = ""
            return
        effects = studio.effects()
        order = [t for t in np.argsort(-np.nan_to_num(effects, nan=-np.inf), kind="stable") if not np.isnan(effects[t])]
        self._set((self.ranking, dict(options=[(f"{signed(effects[t], 2)} nats · turn {t} {studio.texts[t]}", int(t))
                                               for t in order], value=None)))
        self.cause.show(studio.cause_figure())
        self.agreed.value = f"<span class='told'>{escape(studio.told_agreement())}</span>"

    # ---- without a kernel ----
    def _repr_mimebundle_(self, **kwargs):
        """The page, and its figure as a picture for where no kernel runs."""
        shown = super()._repr_mimebundle_(**kwargs)
        bundle = dict(shown[0] if isinstance(shown, tuple) else shown)
        bundle |= figures.picture(self.studio.cause_figure() if self.studio.reading else self.pane.figure)
        bundle |= {"text/plain": f"Memory Studio: {self.studio.subtitle}"}
        return (bundle, *shown[1:]) if isinstance(shown, tuple) else bundle


def open_studio(model: MemoryModel | None = None, talks: Sequence[Talk] | None = None,
                folder: str | Path = "studio-export", method: str = METHOD, backbone: str = "auto",
                schedules: dict[str, lesson.Schedule] | None = None) -> StudioView:
    """`pdmem_lib.studio`. Without a ``model``, ``method`` on ``backbone``: the adapter that is kept, else one that is
    trained while the page stands, with a bar and a way to stop it."""
    if model is not None:
        return StudioView(Studio(model, talks, schedules), folder)
    method, loaded = method_name(method), load_backbone(backbone)
    kept = lesson.find(loaded, method, schedule=(schedules or {}).get(method))
    studio = Studio(kept[0] if kept else MemoryModel(loaded, method), talks, schedules)
    view = StudioView(studio, folder)
    if kept is None:
        view.begin_training()
    return view


def only(value: int) -> int | None:
    """What is chosen in a list that offers all; None for all."""
    return None if value == ALL else value


def one(chosen: int | None) -> int:
    """The list's value for what is chosen."""
    return ALL if chosen is None else chosen


def _methods(studio: Studio) -> list[str]:
    return list(dict.fromkeys([*METHODS, studio.choice[0]]))
