"""The Memory Studio as a page: `studio_model.Studio` shown with ipywidgets and plotly, in JupyterLab or through Voilà.

`studio_controls` makes the controls and says where they stand, `studio_drawing` fills them, and here is what each does.
A click on a figure is only a short cut for one of them. Long work runs in a thread and can be cancelled, and what goes
wrong is told as a sentence.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path

import numpy as np

from . import lesson
from ._plot import look_of
from .backbone import load_backbone
from .causal_figures import told_agreement
from .lesson import Talk
from .memory import MemoryModel
from .methods import method_name
from .studio_controls import ALL
from .studio_drawing import Drawn
from .studio_model import Studio
from .studio_parts import sentence

METHOD = "kv_extension"  # learns the lesson surely, and its entries are rows that can be followed and emptied


def handler(method: Callable) -> Callable:
    """A reaction to a control: errors are told in the page, and nothing reacts to what the page itself sets."""
    @wraps(method)
    def react(self: "StudioView", *args) -> None:
        if self._setting:
            return
        start = time.perf_counter()
        try:
            self.work.require_free()
            method(self, *args)
        except Exception as error:
            self.tell(sentence(error), True)
        self.took = time.perf_counter() - start
    return react


class StudioView(Drawn):
    """The page for ``studio``; ``folder`` is where exports go. ``took`` holds the seconds of the last reaction."""

    def __init__(self, studio: Studio, folder: str | Path = "studio-export"):
        self.took = 0.0
        self._playing: asyncio.Task | None = None
        super().__init__(studio, folder)
        self._connect()
        if studio.side.recording is None:
            studio.open(studio.talk)
        self._opened(None)
        self.tell(studio.adapter_told, False)

    def _connect(self) -> None:
        for control in (self.method, self.capacity):
            control.observe(self._switched, names="value")
        self.train.on_click(self._train)
        self.save.on_click(self._save)
        self.export.on_click(self._export)
        self.talks.observe(self._chose_talk, names="value")
        self.first.on_click(lambda _: self._go(0))
        self.back.on_click(lambda _: self._go(self.studio.moment - 1))
        self.step.on_click(lambda _: self._go(self.studio.moment + 1))
        self.play.observe(self._play, names="value")
        self.moment.observe(lambda change: self._go(change["new"]), names="value")
        self.turns.observe(self._chose_turn, names="value")
        self.write.on_click(self._write)
        self.undo.on_click(self._undo)
        self.views.observe(self._chose_view, names="value")
        self.pane.on_click(self._clicked_memory)
        self.ask.on_click(self._ask)
        self.tokens.observe(self._chose_token, names="value")
        self.blocks.observe(self._chose_place, names="value")
        self.heads.observe(self._chose_place, names="value")
        self.entries.observe(self._chose_entry, names="value")
        self.behind.observe(self._chose_behind, names="value")
        self.measure.on_click(self._measure)
        self.remove.on_click(self._remove)
        self.empty.on_click(self._empty)
        self.ranking.observe(self._chose_ranked, names="value")
        self.cause.on_click(self._clicked_cause)
        self.compare.on_click(self._compare_sides)

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
        while self.play.value and self.studio.moment < len(self.studio.texts) and not self.work.holds:
            await asyncio.sleep(1 / self.speed.value)
            if self.play.value:
                self._go(self.studio.moment + 1)
        self._paused()

    def _paused(self) -> None:
        self._set((self.play, dict(value=False, description="▶ Play")))

    @handler
    def _chose_turn(self, change) -> None:
        self._point_at(change["new"])

    @handler
    def _clicked_cause(self, _, place: list[int]) -> None:
        self._point_at(place[0])

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
            *wanted, progress), self._compared, holds=True)

    def _compared(self, found) -> None:
        self._moved_on()
        self._show_comparison(found)

    def _moved_on(self) -> None:
        """Controls that were moved while a work held the page are set back to what it looks at."""
        self._set_choice()
        if self.studio.talk in self.studio.talks:  # a reader's own, opened from a cell, is none of the list
            self._set((self.talks, dict(value=self.studio.talks.index(self.studio.talk))))
        self._paused()
        self._draw_all()

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
            self._moved_on()
            if files is not None:
                self.tell(f"{len(files)} files are in {folder}: {', '.join(sorted({file.suffix for file in files}))}.")

        self.work.run("Exporting", lambda progress: self.studio.export(folder, progress), done, holds=True)


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
