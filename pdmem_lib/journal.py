"""The folder of a session (`session.Session`): a state, its log, and nothing that a kill can tear apart [D].

    state.safetensors          the memory, and in its metadata how much of which log belongs to it
    log-<n>.jsonl              a `LogEntry` a line, only ever appended to; forgetting writes another one
    snapshots/<name>.safetensors, merged-<hash>.safetensors    states to go back to, and states that were merged in
    adapter-<hash>/            the adapter, so that the folder is complete
    lock                       held by the one process that may write

Each change is one renaming of ``state.safetensors``, which names the log, the number of its lines and a hash chained over
them. What stands behind these lines was being written when the process died and is cut off. So a write costs a line
and a state, however long the log has grown.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from . import persistence
from .files import ReadError, StorageError, as_path, atomic_path, is_file, reading
from .methods import State
from .persistence import LogEntry, SavedState

if TYPE_CHECKING:
    from .memory import MemoryModel

log = logging.getLogger(__name__)
STATE = "state.safetensors"
OURS = re.compile(r"\..+\.partial|adapter-[0-9a-f]{12}|log-[0-9]+\.jsonl|merged-[0-9a-f]{64}\.safetensors")  # may go


@dataclass(frozen=True)
class Point:
    """A moment of a session."""

    state: State
    entries: int = 0  # of the log so far
    turns: int = 0  # that the session wrote and has not forgotten
    age: int = 0  # how many writes the start has faded by


@dataclass(frozen=True)
class End:
    """Where the log's valid part ends, as the state file names it (all but the bytes)."""

    log: str = "log-0.jsonl"
    entries: int = 0
    bytes: int = 0
    chain: str = ""  # sha256 (hex) of the chain before and the last line

    def after(self, line: bytes) -> "End":
        """The end once ``line`` stands behind it."""
        chain = hashlib.sha256(self.chain.encode() + line).hexdigest()
        return End(self.log, self.entries + 1, self.bytes + len(line), chain)


class Journal:
    """A session's folder, open for writing unless ``read_only``. The session decides what happens, this writes it down."""

    def __init__(self, folder: str | Path, model: "MemoryModel", read_only: bool = False):
        self.folder, self.read_only = as_path(folder), read_only
        self.model, self._belongs_to = model, persistence.identity(model)
        self._end = End()
        self._lock = None if read_only else _lock(self.folder)
        self._process = os.getpid()

    def close(self) -> None:
        """Let go of the folder; what is open stays readable."""
        if self._lock:
            import fcntl

            if self._process == os.getpid():  # a forked child shares the lock: closing would not end it, a child must not
                fcntl.flock(self._lock, fcntl.LOCK_UN)
            self._lock.close()
        self._lock, self.read_only = None, True

    # ---- reading ----
    @property
    def exists(self) -> bool:
        """Whether the folder holds a session."""
        return is_file(self.folder / STATE)

    def load(self) -> tuple[Point, list[LogEntry], dict[str, Point], dict[str, State]]:
        """(where the session stands, its log, snapshots by name, merged states by hash); a new folder is set up."""
        if not self.exists:
            if self.read_only:
                raise FileNotFoundError(f"{self.folder} holds no session: write to one there first")
            now = Point(self.model.adapter.initial_state())
            self._save_adapter()
            self._commit(now, self._end)
            return now, [], {}, {}
        for attempt in range(3):
            try:
                saved = persistence.read_state(self.folder / STATE)
                persistence.require_same_memory(self.model, saved, self.folder)
                now, entries, chains = self._read(saved)
                if not self.read_only:
                    self._tidy(entries, saved.adapter_fingerprint)
                found = now, entries, self._snapshots(chains), self._merged(entries)
                break
            except (FileNotFoundError, ValueError):
                if not self.read_only or attempt == 2:  # a reader may come between a writer's new state and its new log
                    raise
        if not self.read_only:
            self._save_adapter()
        if not self.read_only and saved.adapter_fingerprint != self._belongs_to["adapter_fingerprint"]:
            self._commit(now, self._end)
            self._tidy(entries, self._belongs_to["adapter_fingerprint"])
        return found

    def _read(self, saved: SavedState) -> tuple[Point, list[LogEntry], list[str]]:
        """The point, its log, and the chain after each line; ValueError for a log that is not the state's."""
        now, name, chain = _point(saved)
        if not is_file(self.folder / name) and now.entries:
            raise FileNotFoundError(f"{self.folder} holds no {name}, the log of its state: put it back from a copy")
        entries: list[LogEntry] = []
        end, chains = End(name), [""]
        for line in self._lines(name, now.entries):
            end = end.after(line)
            chains.append(end.chain)
            try:
                entries.append(LogEntry.from_json(json.loads(line)))
            except (ValueError, TypeError):
                break
        if len(entries) < now.entries or end.chain != chain:
            raise ValueError(f"{self.folder / name} is damaged: put it back from a copy, or go on without it by "
                             f"load_state({str(self.folder / STATE)!r})")
        self._end = end
        return now, entries, chains

    def _lines(self, name: str, entries: int) -> Iterable[bytes]:
        if entries:
            with reading(self.folder / name), open(self.folder / name, "rb") as file:
                yield from (line for _, line in zip(range(entries), file, strict=False))

    def _end_after(self, entries: int) -> End:
        """Where the log ends with so many entries: here, unless it goes back, or was interrupted before it took note."""
        if self._end.entries == entries:
            return self._end
        end = End(self._end.log)
        for line in self._lines(end.log, entries):
            end = end.after(line)
        return end

    def _snapshots(self, chains: Sequence[str]) -> dict[str, Point]:
        """Those of this log's course; one that a dying process left behind is removed."""
        found: dict[str, Point] = {}
        for file in sorted((self.folder / "snapshots").glob("*.safetensors")):
            if saved := _readable(file):
                point, _, chain = _point(saved)
                if point.entries < len(chains) and chains[point.entries] == chain:
                    found[file.stem] = point
                elif not self.read_only:
                    file.unlink()
        return found

    def _merged(self, entries: Sequence[LogEntry]) -> dict[str, State]:
        files = {e.state: _readable(self.folder / f"merged-{e.state}.safetensors") for e in entries if e.state}
        return {sha256: saved.state for sha256, saved in files.items() if saved}

    # ---- writing ----
    def append(self, now: Point, new: Sequence[LogEntry]) -> None:
        """``new`` entries, after which the session stands at ``now``."""
        start = self._end_after(now.entries - len(new))
        lines, end = _lines_of(new, start)
        try:
            with open(self.folder / start.log, "ab") as file:
                file.truncate(start.bytes)
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(self.folder / start.log, error) from error
        self._commit(now, end)

    def rewind(self, now: Point, entries: Sequence[LogEntry]) -> None:
        """Back to a point that the log has passed, when it had these entries; what came after is cut off."""
        self._commit(now, self._end_after(now.entries))
        if (file := self.folder / self._end.log).is_file():
            os.truncate(file, self._end.bytes)
        self._tidy(entries, self._belongs_to["adapter_fingerprint"])

    def replace(self, now: Point, entries: Sequence[LogEntry]) -> None:
        """Another log in place of this one, of which nothing is left."""
        self.require_folder()
        old = self.folder / self._end.log
        lines, end = _lines_of(entries, End(f"log-{int(old.stem[4:]) + 1}.jsonl"))
        with atomic_path(self.folder / end.log) as partial:
            partial.write_bytes(lines)
        self._commit(now, end)
        old.unlink(missing_ok=True)

    def save_snapshot(self, name: str, now: Point) -> None:
        """Keep this point as ``snapshots/name``; one of that name is replaced."""
        self.require_folder()
        self._save(self.folder / "snapshots" / f"{name}.safetensors", now, self._end_after(now.entries))

    def drop_snapshot(self, name: str) -> None:
        """Remove a snapshot, if it is there."""
        (self.folder / "snapshots" / f"{name}.safetensors").unlink(missing_ok=True)

    def save_merged(self, sha256: str, state: State) -> None:
        """Keep a state that was merged in, under the hash that the log names it by."""
        persistence.save_state(state, self._belongs_to, self.folder / f"merged-{sha256}.safetensors")

    def require_folder(self) -> None:
        """StorageError where the folder is gone: what is written now would be a session without a past."""
        if not (self.folder / "lock").is_file():
            raise StorageError(self.folder, FileNotFoundError(errno.ENOENT, "the session's folder is gone"))

    def _commit(self, now: Point, end: End) -> None:
        self._save(self.folder / STATE, now, end)
        self._end = end

    def _save(self, file: Path, now: Point, end: End) -> None:
        persistence.save_state(now.state, self._belongs_to, file, turns=now.turns, session={
            "log": end.log, "entries": end.entries, "chain": end.chain, "age": now.age})

    def _save_adapter(self) -> None:
        fingerprint = self._belongs_to["adapter_fingerprint"]
        folder = self.folder / _adapter_name(fingerprint)
        if not persistence.holds_adapter(folder, fingerprint):
            with atomic_path(folder) as partial:
                self.model.save_pretrained(partial)
                shutil.rmtree(folder, ignore_errors=True)  # a damaged one

    def _tidy(self, entries: Sequence[LogEntry], adapter_fingerprint: str | None) -> None:
        """Remove what belongs to no log of these entries: what a dying process left behind, or a rollback cut off."""
        needed = {self._end.log, _adapter_name(adapter_fingerprint), *(f"merged-{e.state}.safetensors" for e in entries)}
        for path in [*self.folder.iterdir(), *self.folder.glob("snapshots/.*.partial")]:
            if OURS.fullmatch(path.name) and path.name not in needed:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _readable(file: Path) -> SavedState | None:
    """A state that the session can go on without."""
    try:
        return persistence.read_state(file)
    except (FileNotFoundError, ValueError, ReadError) as error:
        log.warning("the session goes on without %s: %s", file.name, error)
        return None


def adapter_of(folder: str | Path) -> Path:
    """Where a session's folder keeps its adapter."""
    folder = as_path(folder)
    if not is_file(folder / STATE):
        raise FileNotFoundError(f"{folder} holds no session: make one with Session(model, folder)")
    return folder / _adapter_name(persistence.read_state(folder / STATE).adapter_fingerprint)


def _adapter_name(fingerprint: str | None) -> str:
    return f"adapter-{str(fingerprint)[:12]}"


def _point(saved: SavedState) -> tuple[Point, str, str]:
    """(the moment, the log's name, its chained hash) of a session's state file."""
    try:
        told = saved.session
        name, entries = str(told["log"]), int(told["entries"])
        if not (name.startswith("log-") and OURS.fullmatch(name)):
            raise ValueError(f"{name!r} is no log")
        return Point(saved.state, entries, int(saved.turns or 0), int(told["age"])), name, str(told["chain"])
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"this state file is none of a session ({error}): read it with load_state") from error


def _lines_of(entries: Iterable[LogEntry], end: End) -> tuple[bytes, End]:
    """The entries as lines, and where the log ends with them."""
    lines = [json.dumps(entry.as_json()).encode() + b"\n" for entry in entries]
    for line in lines:
        end = end.after(line)
    return b"".join(lines), end


def _lock(folder: Path) -> BinaryIO:
    """The folder's lock, held until it is closed or the process ends, however it ends."""
    import fcntl

    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # what was said is the user's own
        file = open(folder / "lock", "a+b")
    except OSError as error:
        raise StorageError(folder / "lock", error) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read(20).decode(errors="replace").strip()
        file.close()
        raise RuntimeError(f"the session in {folder} is open already (process {holder or 'unknown'}): close it there, or "
                           "open it with read_only=True") from None
    file.truncate(0)
    file.write(str(os.getpid()).encode())
    file.flush()
    return file
