"""The controls of the Memory Studio's page and where they stand; what they do is in `studio_view`.

    left        the conversation: play, step, scrub, write a turn, undo; how much each turn changed the memory
    middle      the memory: entries over time, who wrote what, change and decay, collisions or the matrix, attention
    right       ask: the answer under own, no and another's memory; token -> block and head -> entry -> turns
    below       the cause: what the answer loses without each turn, beside the attention to it; another method beside

Everything is a labelled button, list or slider, so that a keyboard reaches it.
"""

from html import escape
from pathlib import Path

import ipywidgets as w

from ._plot import look_of, times
from .methods import METHODS
from .pane import Pane
from .studio_model import Studio
from .studio_parts import LEFT, MIDDLE, RIGHT, STYLE, Work, beside, box, button, row

SPEEDS = {"slow": 0.5, "1 turn/s": 1.0, "2 turns/s": 2.0, "4 turns/s": 4.0}
ALL, ANY = -1, ("all", -1)  # a list's value and entry for all of them (ipywidgets shows None as nothing chosen)


class Controls(w.VBox):
    """All controls of the page for ``studio``, not yet connected; ``folder`` is where exports go."""

    def __init__(self, studio: Studio, folder: str | Path):
        self.studio = studio
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

    def tell(self, text: str, error: bool = False) -> None:
        """A sentence in the status line."""
        kind = "error" if error else "told"
        self.message.value = f"<span role='status' class='{kind}'>{escape(text)}</span>"

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
        self.left = box("Conversation", w.HBox([self.talks, self.speed]),
                         w.HBox([self.first, self.back, self.play, self.step],
                                layout=w.Layout(flex_flow="row wrap")), self.moment, self.turns, self.turn_told,
                         w.HBox([self.said, self.write, self.undo]), place=LEFT)

    def _make_memory(self) -> None:
        self.views = w.ToggleButtons(options=self.studio.views(), tooltip="What is shown of the memory")
        self.pane = Pane(280, first=True)
        self.memory_told = w.HTML()
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
        self.beside = box("Another memory of the same conversation", w.HBox(
            [self.other_method, self.other_capacity, self.compare]), self.compared, self.side_by_side)


def _methods(studio: Studio) -> list[str]:
    return list(dict.fromkeys([*METHODS, studio.choice[0]]))
