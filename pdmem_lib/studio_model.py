"""What the Memory Studio knows and does, without a widget: a talk, its memory, a question, what the answer rests on.

`studio_view` shows it in a page. What is long takes ``progress(done, of, what)``, which is called between its steps and
may raise `Cancelled`: what was reached until then stays. What cannot be done is a ValueError with a sentence.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import torch
from torch import Tensor

from . import causal, editing, figures, lesson, persistence
from ._plot import look_of, times
from .causal_figures import told_agreement
from .lesson import Known, Learnt, Talk
from .memory import MemoryModel
from .methods import HebbianMatrix, SparseSlots, State, method_name
from .persistence import LogEntry, text_sha256, utc_now
from .recording import CHUNK, Reading, Recording

Progress = Callable[[int, int, str], None]
Choice = tuple[str, int]  # method and capacity
TOKENS = 8  # of an answer, at most: the lesson's are one word
LONGEST = 400  # letters of a typed turn or question


class Cancelled(Exception):
    """The user asked to stop."""


def quiet(done: int, of: int, what: str) -> None:
    """A progress that shows nothing."""


@dataclass(frozen=True)
class Removal:
    """What an answer becomes without a turn or an entry."""

    what: str
    before: str  # the greedy answer, then and now
    after: str
    effect: Tensor  # (T,), what each token of the answer that is looked at loses, nats


@dataclass
class Side:
    """One method at one capacity: its model, what its adapter learnt (None: not known), the talk as it took it."""

    model: MemoryModel
    learnt: Learnt | None = None
    recording: Recording | None = None
    other: State | None = None  # another conversation's memory
    reading: Reading | None = None
    effects: dict[int, Tensor] | None = None  # turn -> (T,), as far as measured

    @property
    def name(self) -> str:
        """Method and capacity, as the page calls them."""
        return f"{look_of(self.model.method).label}, {times(self.model.settings.capacity)}"

    @property
    def is_silent(self) -> bool:
        """Whether the adapter reads nothing yet, as at its start."""
        gate = getattr(self.model.adapter, "gate", getattr(self.model.adapter, "beta", None))
        opened = gate if gate is not None else getattr(self.model.adapter, "read_O", None)
        return opened is not None and not bool(opened.detach().any())


class Studio:
    """A session at the studio with ``model``; ``talks`` (None: `lesson.talks`) may be looked at.

    ``schedules`` replaces how adapters of other methods learn (`lesson.SCHEDULES`).
    """

    def __init__(self, model: MemoryModel, talks: Sequence[Talk] | None = None,
                 schedules: dict[str, lesson.Schedule] | None = None):
        if not model.adapter.initial_state():
            raise ValueError(f"{model.method} has no memory to look into: use one of the methods that write")
        self.backbone, self.seed = model.backbone, model.settings.seed
        self.talks = list(lesson.talks() if talks is None else talks)
        if not self.talks:
            raise ValueError("there is no talk to look at: give at least one, or none for the studio's own")
        self.schedules = lesson.SCHEDULES | {method_name(name): its for name, its in (schedules or {}).items()}
        self.choice: Choice = (model.method, model.settings.capacity)
        self.sides: dict[Choice, Side] = {self.choice: Side(model, self._known_learnt(model))}
        self.talk, self.texts, self.hidden = self.talks[0], [], []
        self._others: list[Tensor] = []
        self._course: lesson.Course | None = None
        self.moment = 0

    def _known_learnt(self, model: MemoryModel) -> Learnt | None:
        kept = lesson.find(self.backbone, model.method, model.settings.capacity, self.seed, self.schedule(model.method))
        same = kept is not None and all(torch.equal(a, b.to(a.device)) for a, b in zip(
            model.adapter.state_dict().values(), kept[0].adapter.state_dict().values(), strict=True))
        return kept[1] if same else None

    def schedule(self, method: str) -> lesson.Schedule:
        """How the adapter of ``method``, a name or an alias, would be trained; a method of one's own as M.3 is."""
        return self.schedules.get(method_name(method), lesson.SCHEDULES["kv_extension"])

    # ---- the side that is looked at ----
    @property
    def side(self) -> Side:
        """The side that is looked at."""
        return self.sides[self.choice]

    @property
    def model(self) -> MemoryModel:
        """Its model."""
        return self.side.model

    @property
    def recording(self) -> Recording:
        """The talk as its memory took it."""
        if self.side.recording is None:
            raise ValueError("no conversation is open yet: choose one")
        return self.side.recording

    @property
    def reading(self) -> Reading | None:
        """What was asked last, None before."""
        return self.side.reading

    @property
    def subtitle(self) -> str:
        """What a figure was made of."""
        return (f"backbone {self.backbone.name} · {self.side.name} · {self.talk.name} · after {self.moment} of "
                f"{len(self.texts)} turns")

    @property
    def adapter_told(self) -> str:
        """What is known of the adapter, in a line."""
        if self.side.learnt is not None:
            return f"Adapter {self.side.learnt}."
        if self.side.is_silent:
            return "Adapter untrained: it reads nothing yet, and own memory answers as no memory does. Train it."
        return "Adapter as it was given; what it was trained on is not known here."

    # ---- the conversation ----
    def open(self, talk: Talk, progress: Progress = quiet) -> None:
        """Read ``talk`` into memory, turn by turn; cancelled, the turns read so far are there."""
        self.talk, self.texts, self.hidden, self._others, self.moment = talk, [], [], [], 0
        for side in self.sides.values():
            side.recording = side.other = side.reading = side.effects = None
        self._record()
        of = len(talk.turns) + len(talk.others)
        for turns, hidden in self._encoded(talk.others):  # first, so that a talk cut short has one to compare with
            self._others += hidden
            progress(len(self._others), of, "reading another conversation")
        for turns, hidden in self._encoded(talk.turns):
            self._take(turns, hidden)
            progress(len(self._others) + len(self.texts), of, "reading the conversation")

    def _encoded(self, turns: Sequence[str]) -> Iterator[tuple[list[str], list[Tensor]]]:
        for at in range(0, len(turns), CHUNK):
            chunk = list(turns[at : at + CHUNK])
            yield chunk, self.backbone.encode(chunk, autocast="auto", progress=False)

    def _take(self, turns: list[str], hidden: list[Tensor]) -> None:
        for side in self._recorded():
            side.recording.take(turns, hidden)
        self.texts += turns
        self.hidden += hidden
        self.moment = len(self.texts)

    def _recorded(self) -> list[Side]:
        return [side for side in self.sides.values() if side.recording is not None]

    def _record(self) -> None:
        """Let the side that is looked at have the talk as it stands: hidden states serve every method."""
        if self.side.recording is None:
            self.side.recording = Recording(self.model, self.texts, self.hidden)

    def _other(self) -> State:
        """The memory of the other conversation."""
        if self.side.other is None:
            self.side.other = editing.forget(self.model, self._others, ())
        return self.side.other

    def seek(self, moment: int) -> None:
        """Look at the memory after so many turns."""
        if not 0 <= moment <= len(self.texts):
            raise ValueError(f"there is no moment {moment}: {len(self.texts)} turns are written")
        self.moment = moment

    def write(self, text: str) -> int:
        """Write a turn of one's own at the end ("Speaker: text"; "You" where nobody is named); its number."""
        text = " ".join(text.split())
        if not text:
            raise ValueError("the turn is empty: type what is said, as in Ann: I adopted a parrot.")
        if len(text) > LONGEST:
            raise ValueError(f"the turn has {len(text)} letters, more than {LONGEST}: say it in several turns")
        speaker, colon, said = text.partition(":")
        turn = text if colon and said.strip() and len(speaker.split()) <= 3 else f"You: {text}"
        self._take([turn], self.backbone.encode([turn], progress=False))
        self._forget_reading()
        return len(self.texts) - 1

    def undo(self) -> str:
        """Take the last turn away again, exactly; its text."""
        if not self.texts:
            raise ValueError("nothing is written yet: there is no turn to undo")
        for side in self._recorded():
            side.recording.undo()
        text, _ = self.texts.pop(), self.hidden.pop()
        self._forget_reading()
        self.moment = min(self.moment, len(self.texts))
        return text

    def _forget_reading(self) -> None:
        for side in self.sides.values():
            side.reading = side.effects = None

    # ---- asking ----
    def known(self, question: str) -> Known | None:
        """What the talk says of a question: its answer, and the turns that tell it."""
        return next((known for known in self.talk.known if known.question == question.strip()), None)

    def ask(self, question: str, answer: str | None = None) -> Reading:
        """Ask at the moment shown; ``answer`` is looked at in place of the own memory's."""
        for what, text in (("question", question), ("answer", answer or "")):
            if len(text) > LONGEST:
                raise ValueError(f"the {what} has {len(text)} letters, more than {LONGEST}: give a shorter one")
        self._record()
        side, known = self.side, self.known(question)
        side.reading = self.recording.read(question.strip(), self._other(), (answer or "").strip(), self.moment,
                                           known.answer if known else "", TOKENS)
        side.effects = {}
        return side.reading

    def _asked(self) -> Reading:
        if self.reading is None:
            raise ValueError("nothing was asked yet: ask a question first")
        return self.reading

    # ---- what the answer rests on ----
    def measure(self, progress: Progress = quiet, batch: int = causal.BATCH) -> np.ndarray:
        """The effect of every turn on the answer, (n,) in nats, by exact replay; cancelled, what is measured stays."""
        reading, effects = self._asked(), self.side.effects
        missing = [turn for turn in range(reading.moment) if turn not in effects]

        def told() -> None:
            progress(len(effects), reading.moment, "replaying without each turn")

        for turn, effect in zip(missing, self.recording.turn_effects(reading, missing, batch, told), strict=True):
            effects[turn] = effect
            told()
        return self.effects()

    def effects(self) -> np.ndarray:
        """Effects as far as they are measured, (n,) in nats, NaN elsewhere."""
        reading = self._asked()
        found = np.full(reading.moment, np.nan)
        for turn, effect in self.side.effects.items():
            found[turn] = float(effect.sum())
        return found

    def agreement(self, of_size: bool = False) -> causal.Agreement:
        """Of attention and effect (or its size) over the turns that are measured."""
        effects, scores = self.effects(), self._asked().turn_scores().numpy()
        known = ~np.isnan(effects)
        return causal.agreement(scores[known], abs(effects[known]) if of_size else effects[known])

    @torch.no_grad()
    def remove_turn(self, turn: int) -> Removal:
        """The answer without a turn, exactly: the others are written again."""
        reading = self._asked()
        if not 0 <= turn < reading.moment:
            raise ValueError(f"turn {turn} was not written when the question was asked: choose one of 0 to "
                             f"{reading.moment - 1}")
        hidden = self.recording.hidden[: reading.moment]
        (state,) = causal.without_turns(self.model, hidden, [turn], self.recording.states)
        (effect,) = self.recording.turn_effects(reading, [turn])
        self.side.effects[turn] = effect
        return self._removal(f"turn {turn}", state, effect)

    @torch.no_grad()
    def empty_entry(self, entry: int, stands: str = "initial") -> Removal:
        """The answer with an entry at its start, or at zero."""
        if self.model.adapter.needs_inputs:
            raise ValueError(f"{self.side.name} makes its entries of the question, out of one matrix, so no entry can be "
                             "emptied by itself: remove a turn instead")
        (state,) = causal.without_entries(self.model, self.recording.states[self._asked().moment], [entry], stands)
        (effect,) = self.recording.entry_effects(self._asked(), [entry], stands)
        return self._removal(f"entry {entry}", state, effect)

    def _removal(self, what: str, state: State, effect: Tensor) -> Removal:
        after = self.recording.answer_without(self._asked(), state, TOKENS)
        return Removal(what, self._asked().answers["own"], after, effect)

    # ---- methods and capacities ----
    def use(self, method: str, capacity: int) -> None:
        """Look at the same conversation with another memory: with the adapter that is kept, else an untrained one.

        The question that was asked is asked again.
        """
        asked = self.reading
        self.choice = self._side_of(method, capacity)
        self._record()
        if asked is not None:
            self._ask_again(asked)

    def _side_of(self, method: str, capacity: int) -> Choice:
        choice = (method := method_name(method), capacity)
        if choice not in self.sides:
            kept = lesson.find(self.backbone, method, capacity, self.seed, self.schedule(method))
            model, learnt = kept or (MemoryModel(self.backbone, method, capacity, self.seed), None)
            self.sides[choice] = Side(model, learnt)
        return choice

    def _ask_again(self, asked: Reading) -> None:
        """The question of another side's reading, at its moment: looked at is the answer that was given there."""
        given = asked.answer if asked.answer != asked.answers["own"] else ""
        side = self.side
        side.reading = self.recording.read(asked.question, self._other(), given, asked.moment, asked.answer, TOKENS)
        side.effects = {}

    def learn(self, progress: Progress = quiet) -> Learnt:
        """Train the adapter that is looked at on the lesson, and keep it; cancelled, the old one stays."""
        method, capacity = self.choice
        progress(0, 1, "reading the lesson")
        self._course = self._course or lesson.Course(self.backbone)
        model, learnt = lesson.learn(self.backbone, method, capacity, self.seed, self.schedule(method), lambda step, of:
                                     progress(step, of, f"training {self.side.name}"), self._course)
        asked = self.reading
        self.sides[self.choice] = Side(model, learnt)
        self._record()
        if asked is not None:
            self._ask_again(asked)
        return learnt

    @contextmanager
    def looking_at(self, choice: Choice) -> Iterator[Side]:
        """Meanwhile another of the sides is the one that is looked at."""
        here, self.choice = self.choice, choice
        try:
            yield self.side
        finally:
            self.choice = here

    def compare(self, method: str, capacity: int, progress: Progress = quiet) -> tuple[Choice, Choice]:
        """Ask the same question of the same conversation under another method or capacity, and measure both.

        Returns the two choices, that which is looked at first; `sides` holds what was found.
        """
        asked, here = self._asked(), self.choice
        there = self._side_of(method, capacity)
        if there == here:
            raise ValueError("these two are the same: choose another method or capacity to compare with")
        self.measure(progress)
        with self.looking_at(there):
            self._record()
            self._ask_again(asked)
            self.measure(progress)
        return here, there

    # ---- figures and files ----
    def views(self) -> list[str]:
        """The names of the views of this memory, in order."""
        own = ["Collisions"] if isinstance(self.model.adapter, SparseSlots) else []
        own += ["Matrix"] if isinstance(self.model.adapter, HebbianMatrix) else []
        return ["Entries", "Who wrote what", "Decay", *own, "Attention", "Answer"]

    def figure(self, view: str, token: int | None = None, entry: int | None = None, block: int | None = None,
               head: int | None = None) -> go.Figure:
        """A view of the memory at the moment shown, or of the answer; ValueError where there is nothing to show."""
        n, recording, subtitle = self.moment, self.recording, self.subtitle
        labels = self.texts[:n]
        if view in ("Attention", "Answer"):
            return self._of_answer(view, token, entry, block, head)
        if not n and view not in ("Entries", "Matrix"):
            raise ValueError("nothing is written at this moment: step on, or write a turn")
        if view == "Entries":
            return figures.slot_map(recording.norm_history(n), subtitle, labels, "norm of the row")
        if view == "Who wrote what":
            return figures.provenance_map(recording.shares(n), subtitle, labels)
        if view == "Decay":
            return figures.turn_changes(recording.changes[:n], recording.kept(n), subtitle, labels,
                                        self.model.settings.gamma)
        if view == "Collisions" and view in self.views():
            return figures.slot_usage(recording.written(n), subtitle)
        if view == "Matrix" and view in self.views():
            return figures.hebbian_matrix(recording.states[n]["M"], subtitle)
        raise ValueError(f"{self.side.name} has no view {view!r}: its views are {', '.join(self.views())}")

    def _of_answer(self, view: str, token: int | None, entry: int | None, block: int | None,
                   head: int | None) -> go.Figure:
        reading = self._asked()
        about = f"{self.subtitle} · asked after {reading.moment}: {reading.question} · answer {reading.answer!r}"
        if view == "Answer":
            return figures.token_gain(reading.tokens, *(reading.log_probs[m] for m in ("own", "off", "other")), about)
        where = "to all entries" if entry is None else f"to entry {entry}"
        which = "mean of the answer's tokens" if token is None else f"token {token}, {reading.tokens[token]!r}"
        values = reading.by_block_and_head(token, entry) / (len(reading.tokens) if token is None else 1)
        return figures.attention_by_head(values, f"{about} · {which}", f"attention {where}", block, head)

    def cause_figure(self) -> go.Figure:
        """Effects of the turns beside the attention to them."""
        reading, effects = self._asked(), self.effects()
        measured = int((~np.isnan(effects)).sum())
        told = self.agreement() if measured > 1 else None
        return figures.effect_bars(effects, reading.turn_scores(), self.texts[: reading.moment],
                                   f"{self.subtitle} · {reading.question} · answer {reading.answer!r}", told)

    def told_agreement(self) -> str:
        """How far attention and effect agree, in a line."""
        measured = int((~np.isnan(self.effects())).sum())
        if measured < 2:
            return "Measure the turns to see how far attention agrees with effect."
        of_size = self.agreement(of_size=True)
        return f"{told_agreement(self.agreement())}. With the effect's size: ρ = {of_size.spearman:+.2f}."

    def save_state(self, file: str | Path) -> Path:
        """The memory at the moment shown as a state file, with the log of its turns (hashes, no texts)."""
        recording, n = self.recording, self.moment
        entries = [LogEntry("write", utc_now(), turn=i, tokens=len(recording.hidden[i]), sha256=text_sha256(text))
                   for i, text in enumerate(self.texts[:n])]
        persistence.save_state(recording.states[n], persistence.identity(self.model), file, n, entries)
        return Path(file)

    def export(self, folder: str | Path, progress: Progress = quiet) -> list[Path]:
        """Every view as PNG, SVG and HTML (`figures.save_all`), and the state file; the files written."""
        folder, drawn = Path(folder), {}
        names = [*self.views(), "Cause"]
        for done, view in enumerate(names):
            progress(done, len(names) + 1, f"drawing {view}")
            try:
                drawn[view.lower().replace(" ", "_")] = self.cause_figure() if view == "Cause" else self.figure(view)
            except ValueError:
                continue  # nothing to show there: nothing asked yet, say
        progress(len(names), len(names) + 1, "writing the files")
        return [*figures.save_all(drawn, folder), self.save_state(folder / "memory.safetensors")]
