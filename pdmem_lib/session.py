"""A conversation that goes on: turns written, questions asked, and what was written undone, forgotten or merged [D].

    session = pdmem.Session(model, "ann")           # the folder is complete by itself; None keeps nothing on disk
    session.write("Ann: I adopted a parrot.")
    session.ask("Which animal did Ann adopt?")
    with pdmem.Session.open("ann") as session: ...  # another day: the same memory, bit for bit

The session has its own state, and ``model.state`` is left alone: many sessions may share a model. With a folder each
call that changes something is on disk when it returns, whole or not at all, and one process at a time may write
(`journal`). Texts are kept only with ``keep_text``: to be read in the transcript, and to forget a turn exactly.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import editing, journal, persistence
from .backbone import Backbone, slow_bar
from .journal import Journal, Point
from .locomo import texts_of
from .memory import MemoryModel, required_model
from .methods import State
from .persistence import LogEntry, SavedState, text_sha256, utc_now
from .prompts import list_of_texts

if TYPE_CHECKING:
    import pandas

NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
ROUNDING = 1e-3  # a state that is written again comes this near, relative to its norm, on another machine


@dataclass(frozen=True)
class Forgotten:
    """What `Session.forget` did."""

    exact: bool  # the state is, bit for bit, that of a memory which was never told these turns
    how: str  # in a sentence
    cost: "pandas.DataFrame"  # `editing.cost` of the facts that were given


class Session:
    """A conversation with ``model``; in ``folder``, where one is given, it goes on where it stopped.

    ``keep_text``: log the texts of turns, questions and answers from now on, not only hashes of the first two.
    ``read_only``: ask and look, beside another process that writes. A folder that is open elsewhere is a RuntimeError,
    one that was written with another backbone, method or other write maps a ValueError.
    """

    def __init__(self, model: MemoryModel, folder: str | Path | None = None, keep_text: bool = False,
                 read_only: bool = False):
        if not required_model(model).adapter.initial_state():
            raise ValueError(f"{model.method} has no memory to keep: use one of the methods that write")
        self.model, self.keep_text = model, keep_text
        self._now, self._log = Point(model.adapter.initial_state()), []
        self._snapshots: dict[str, Point] = {}
        self._merged: dict[str, State] = {}
        self._journal = Journal(folder, model, read_only) if folder is not None else None
        self._cut_off, self._next = False, 0  # cut off: the folder may hold something else than what is held here
        if self._journal:
            try:
                self._load()
            except BaseException:
                self.close()
                raise

    @classmethod
    def open(cls, folder: str | Path, backbone: Backbone | None = None, keep_text: bool = False,
             read_only: bool = False) -> "Session":
        """The session in ``folder`` with the adapter that it was last used with, which lies there too."""
        return cls(MemoryModel.from_pretrained(journal.adapter_of(folder), backbone), folder, keep_text, read_only)

    def close(self) -> None:
        """Let another process write. What was done is on disk already."""
        if self._journal:
            self._journal.close()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def __repr__(self) -> str:
        where = f" in {self._journal.folder}" if self._journal else ""
        return f"Session({self.model.method} on {self.model.backbone.name}, {self.turns} turns{where})"

    @property
    def state(self) -> State:
        """The memory as it is now."""
        self._settle()
        return self._now.state

    @property
    def turns(self) -> int:
        """How many turns were written here and not forgotten."""
        self._settle()
        return self._now.turns

    @property
    def snapshots(self) -> list[str]:
        """Their names, the oldest first."""
        self._settle()
        return sorted(self._snapshots, key=lambda name: self._snapshots[name].entries)

    # ---- talking ----
    def write(self, turns) -> list[int]:
        """Write one turn ("Speaker: text", or a `Turn`) or a list of turns; returns their numbers, from 0.

        Turns are encoded one by one, so that what a turn leaves does not depend on which others it came with, not even
        in the last bit: that is what makes forgetting exact.
        """
        self._require_writable()
        texts = texts_of(turns)
        state, entries = self.state, []
        with slow_bar("write", len(texts), "turn", show=True) as bar:
            for number, text in enumerate(texts, start=self._next):
                H = self._encode(text)
                state = self._written(state, H)
                entries.append(LogEntry("write", utc_now(), turn=number, tokens=len(H), sha256=text_sha256(text),
                                        text=text if self.keep_text else None))
                bar.update()
        now = self._now
        self._append(replace(now, state=state, turns=now.turns + len(texts), age=now.age + len(texts)), entries)
        self._next += len(texts)
        return [entry.turn for entry in entries]

    def ask(self, questions: str | Sequence[str], max_new_tokens: int = 24) -> str | list[str]:
        """The answer, or a list of them to a list of questions, noted in the transcript unless read-only."""
        asked = _questions(questions)
        answers = self.model.answer(asked, max_new_tokens, memory=self.state)
        if not (self._journal and self._journal.read_only):
            self._append(self._now, [
                LogEntry("ask", utc_now(), sha256=text_sha256(question), text=question if self.keep_text else None,
                         answer=answer if self.keep_text else None)
                for question, answer in zip(asked, answers, strict=True)])
        return answers[0] if isinstance(questions, str) else answers

    def peek(self, turns, questions: str | Sequence[str], max_new_tokens: int = 24) -> str | list[str]:
        """What `ask` would answer after `write` of these turns; nothing is written, and nothing noted."""
        state = self.state
        for text in texts_of(turns):
            state = self._written(state, self._encode(text))
        asked = _questions(questions)
        answers = self.model.answer(asked, max_new_tokens, memory=state)
        return answers[0] if isinstance(questions, str) else answers

    def transcript(self) -> "pandas.DataFrame":
        """What happened, a row an event: kind, time, turn, tokens, sha256, text, answer, state, age (`LogEntry`)."""
        import pandas as pd

        self._settle()
        table = pd.DataFrame([asdict(entry) for entry in self._log], columns=[field.name for field in fields(LogEntry)])
        return table.astype({"turn": "Int64", "tokens": "Int64", "age": "Int64"})

    def save_state(self, file: str | Path, keep_text: bool = False, log: bool = True) -> None:
        """The memory as one file with its log, for `MemoryModel.load_state`; texts only with ``keep_text``.

        ``log`` False leaves the log out, which in such a file is held to some hundred thousand entries.
        """
        self._settle()
        entries = self._log if log else ()
        persistence.save_state(self.state, persistence.identity(self.model), file, self.turns, entries, keep_text)

    # ---- going back ----
    def snapshot(self, name: str) -> None:
        """Keep this moment under ``name`` (letters, digits, dash, underscore, dots behind the first)."""
        self._require_writable()
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot name a snapshot: use up to 64 letters, digits, dashes, underscores, and "
                             "dots behind the first")
        with self._whole():
            if self._journal:
                self._journal.save_snapshot(name, self._now)
            self._snapshots[name] = self._now

    def rollback(self, name: str) -> None:
        """Back to a snapshot: what was written and asked since is gone, later snapshots too."""
        self._require_writable()
        point = self._snapshot(name)
        point = replace(point, state=self.model.checked(point.state))
        with self._whole():
            if self._journal:
                self._journal.rewind(point, self._log[: point.entries])
            self._now = point
            del self._log[point.entries :]
            self._drop_snapshots(after=point.entries)
            self._next = _next_turn(self._log)

    def diff(self, other: "Session | str") -> "pandas.DataFrame":
        """`editing.diff` from ``other``, a session or the name of a snapshot, to this memory as it is."""
        return editing.diff(other.state if isinstance(other, Session) else self._snapshot(other).state, self.state)

    # ---- editing ----
    def merge(self, other: "Session", facts: Sequence[tuple[str, str]] = ()) -> "pandas.DataFrame":
        """Take in another session's memory (`editing.merge`); returns what it costs, or brings, these facts.

        ``facts``: (question, answer). The table is `editing.cost` under own, other and merged; change is merged - own.
        The other's turns keep no numbers here: to forget one, forget it there and merge again. ValueError where the rule
        has no meaning, and for a memory that was written differently.
        """
        self._require_writable()
        if not isinstance(other, Session):
            raise ValueError(f"a {type(other).__name__} cannot be merged in: give another Session")
        theirs = persistence.identity(other.model)
        persistence.require_same_memory(self.model, SavedState(
            other.state, asdict(other.model.settings), theirs["backbone"], theirs["backbone_fingerprint"],
            theirs["write_fingerprint"]), "the other session")
        ages = self._now.age, other._now.age
        merged = editing.merge(self.model, self.state, other.state, ages)
        table = editing.cost(self.model, {"own": self.state, "other": other.state, "merged": merged}, facts)
        sha256 = persistence.fingerprint(other.state)
        if self._journal:
            self._journal.save_merged(sha256, other.state)
        self._merged[sha256] = other.state
        self._append(replace(self._now, state=merged, age=max(ages)),
                     [LogEntry("merge", utc_now(), state=sha256, age=other._now.age)])
        return table

    def forget(self, turns: int | Iterable[int], texts: Mapping[int, str] | None = None,
               facts: Sequence[tuple[str, str]] = ()) -> Forgotten:
        """Forget turns by their numbers: exactly, by writing all later ones again, where their texts are known.

        ``texts``: turns by number, where the log keeps none; each must have the hash that the log has. Without the
        others' texts the turn's own part is taken away (`editing.take_away`), which is approximate, or refused with the
        reason. Of the log, the turns' hashes and texts go too, the texts of all questions and answers since, and
        snapshots taken since. ``facts``: (question, answer) pairs, to measure the price for.
        """
        self._require_writable()
        gone = {int(turns)} if isinstance(turns, Integral) else set(turns)
        place = {entry.turn: i for i, entry in enumerate(self._log) if entry.kind == "write"}
        if unknown := sorted(gone - set(place)):
            raise ValueError(f"there is no turn {unknown[0]} to forget: see transcript() for their numbers")
        if not gone:
            unchanged = {"before": self.state, "after": self.state}
            return Forgotten(True, "there was nothing to forget", editing.cost(self.model, unchanged, facts))
        known = self._texts(texts or {})
        first = min(place[turn] for turn in gone)
        before = self.state
        now, exact, how = self._without(gone, known, first)
        cost = editing.cost(self.model, {"before": before, "after": now.state}, facts)
        log = [_stripped(entry, gone) if i >= first else entry for i, entry in enumerate(self._log)]
        with self._whole():
            if self._journal:
                self._journal.replace(now, log)
            self._now, self._log = now, log
            self._drop_snapshots(after=first)
        return Forgotten(exact, how, cost)

    def _without(self, gone: set[int], known: Mapping[int, str], first: int) -> tuple[Point, bool, str]:
        """(where the session stands without these turns, whether that is exact, how it was done)."""
        now = replace(self._now, turns=self.turns - len(gone))
        later = [entry.turn for entry in self._log[first:] if entry.kind == "write"]
        if replayed := self._replayed(gone, known, first):
            again, rest = replayed
            old = self.state
            away = max(float((again.state[name] - tensor).norm() / tensor.norm().clamp_min(1e-12))
                       for name, tensor in old.items())
            if all(torch.equal(again.state[name], tensor) for name, tensor in old.items()):
                return replace(now, state=rest.state, age=rest.age), True, "all later turns were written again"
            if away < ROUNDING:
                return replace(now, state=rest.state, age=rest.age), False, (
                    "all later turns were written again, but on this machine they come out differently in the last "
                    f"digits (by {away:.1e} of the state)")
        unknown = [turn for turn in sorted(gone) if turn not in known]
        if unknown:
            raise ValueError(f"the text of turn {unknown[0]} is not known, so what it left cannot be told: give it in "
                             "texts=, or keep texts from the start (keep_text=True)")
        hidden = [self._encode(known[turn]) for turn in sorted(gone)]
        since = [sum(turn > this for turn in later) for this in sorted(gone)]
        state = editing.take_away(self.model, self.state, hidden, since)
        return replace(now, state=state), False, ("the turns' own part was taken away, estimated from the present "
                                                  "memory, because the later turns cannot be written again")

    def _replayed(self, gone: set[int], known: Mapping[int, str], first: int) -> tuple[Point, Point] | None:
        """The log written again from the last snapshot before entry ``first``, or P_0: with and without these turns.

        None where a text is missing, or a memory that was merged in.
        """
        start = max((point for point in self._snapshots.values() if point.entries <= first),
                    key=lambda point: point.entries, default=Point(self.model.adapter.initial_state()))
        start = replace(start, state=self.model.checked(start.state))
        later = self._log[start.entries :]
        if any(entry.turn not in known if entry.kind == "write" else entry.state and entry.state not in self._merged
               for entry in later):
            return None
        both = [start, start]
        with slow_bar("write again", len(later), "entry", show=True) as bar:
            for entry in later:
                H = self._encode(known[entry.turn]) if entry.kind == "write" else None
                for i, point in enumerate(both):
                    if H is not None and not (i and entry.turn in gone):
                        both[i] = replace(point, state=self._written(point.state, H), age=point.age + 1)
                    elif entry.kind == "merge":
                        both[i] = replace(point, age=max(point.age, entry.age), state=editing.merge(
                            self.model, point.state, self._merged[entry.state], (point.age, entry.age)))
                bar.update()
        return both[0], both[1]

    # ---- within ----
    def _texts(self, given: Mapping[int, str]) -> dict[int, str]:
        """Turns' texts as far as they are known; a given one that does not have the log's hash is a ValueError."""
        known = {}
        for entry in self._log:
            if entry.kind == "write" and (text := given.get(entry.turn, entry.text)) is not None:
                if text_sha256(text) != entry.sha256:
                    raise ValueError(f"this is not the text that was written as turn {entry.turn}: its hash differs")
                known[entry.turn] = text
        return known

    def _encode(self, text: str) -> Tensor:
        return self.model.backbone.encode([text], progress=False)[0]

    @torch.no_grad()
    def _written(self, state: State, H: Tensor) -> State:
        return self.model.adapter.write(state, H)

    def _append(self, now: Point, new: Sequence[LogEntry]) -> None:
        now = replace(now, entries=self._now.entries + len(new))
        if self._journal:
            self._journal.append(now, new)
        self._log[self._now.entries :] = new
        self._now = now  # last: wherever an interrupt comes, this point and so much of the log belong together

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Around a change that may be cut off between the folder and this object: the next call then takes the folder's."""
        self._cut_off = self._journal is not None
        yield
        self._cut_off = False

    def _settle(self) -> None:
        if self._cut_off and self._journal.exists:  # a folder that is gone has nothing to take: what is held here is all
            self._load()
            self._cut_off = False

    def _load(self) -> None:
        now, log, snapshots, merged = self._journal.load()
        self._now, self._log = replace(now, state=self.model.checked(now.state)), log
        self._snapshots, self._merged, self._next = snapshots, merged, _next_turn(log)

    def _snapshot(self, name: str) -> Point:
        self._settle()
        if name not in self._snapshots:
            raise ValueError(f"there is no snapshot {name!r}: there are {', '.join(self.snapshots) or 'none'}")
        return self._snapshots[name]

    def _drop_snapshots(self, after: int) -> None:
        for name in [name for name, point in self._snapshots.items() if point.entries > after]:
            if self._journal:
                self._journal.drop_snapshot(name)
            del self._snapshots[name]

    def _require_writable(self) -> None:
        if self._journal and self._journal.read_only:
            raise RuntimeError(f"the session in {self._journal.folder} is closed, or open to read only: open it again to "
                               "change it")
        self._settle()


def _next_turn(log: Sequence[LogEntry]) -> int:
    return 1 + max((entry.turn for entry in log if entry.turn is not None), default=-1)


def _questions(asked: str | Sequence[str]) -> list[str]:
    return [asked] if isinstance(asked, str) else list_of_texts("questions", asked)


def _stripped(entry: LogEntry, gone: set[int]) -> LogEntry:
    """``entry`` as it stays in the log once these turns are forgotten."""
    if entry.kind == "write" and entry.turn in gone:
        return LogEntry("forgotten", utc_now(), turn=entry.turn)
    return replace(entry, text=None, answer=None) if entry.kind == "ask" else entry
