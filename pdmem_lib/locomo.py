"""LoCoMo: long two-speaker conversations with questions whose evidence lies many turns back.

Source: Maharana et al., "Evaluating Very Long-Term Conversational Memory of LLM Agents", ACL 2024; repository
snap-research/LoCoMo, file `data/locomo10.json` (CC BY-NC 4.0: downloaded and checked, never shipped with this library).
Split and lag follow the companion paper [C]; each reading of an untidy row is our own [D] and stands where it is made.

    file --load_locomo--> LoCoMo's own dicts --parse--> list[Conversation] --split--> train, test
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import StorageError, as_path, cache_folder, is_file, read_bytes, reading

if TYPE_CHECKING:
    import datasets

LOCOMO_URL = "https://raw.githubusercontent.com/snap-research/locomo/main/data/locomo10.json"
LOCOMO_SHA256 = "79fa87e90f04081343b8c8debecb80a9a6842b76a7aa537dc9fdf651ea698ff4"
LOCOMO_BYTES = 2_805_274
FILE_NAME = "locomo10.json"
TIMEOUT = 5.0  # seconds the download waits for the host, and then for each next piece
CATEGORIES = {1: "multi-hop", 2: "temporal", 3: "open-domain", 4: "single-hop", 5: "adversarial"}
NOT_MENTIONED = "Not mentioned in the conversation"  # the benchmark's own right reply to category 5 [D]


@dataclass(frozen=True)
class Turn:
    """One utterance; `session` is LoCoMo's own number, from 1, and `index` the place in the conversation, from 0."""

    id: str
    session: int
    index: int
    speaker: str
    text: str
    caption: str = ""  # of an attached image; kept beside the text, not part of what is written into memory [D]

    @property
    def utterance(self) -> str:
        """What is written into memory: "Speaker: text", or "Speaker:" when nothing was said."""
        return f"{self.speaker}: {self.text}" if self.text else f"{self.speaker}:"

    def __str__(self) -> str:
        return self.utterance


@dataclass(frozen=True)
class Question:
    """A question, its gold answer and where the answer was said.

    `evidence` holds ids of existing turns as the benchmark lists them, without repeats. `lag` is the number of turns
    that follow the earliest evidence, (T-1) - min(index), and T when no evidence is usable [C].
    """

    question: str
    answer: str
    category: int
    evidence: tuple[str, ...]
    lag: int
    adversarial_answer: str = ""  # category 5: the tempting wrong reply


@dataclass(frozen=True)
class Conversation:
    """One conversation of T turns with its questions; `dates` maps a session's number to LoCoMo's date text."""

    id: str
    turns: tuple[Turn, ...]
    questions: tuple[Question, ...]
    dates: dict[int, str] = field(default_factory=dict, hash=False)

    @cached_property
    def sessions(self) -> list[tuple[Turn, ...]]:
        """The turns grouped by session, in order; sessions without turns do not appear."""
        return [tuple(turns) for _, turns in groupby(self.turns, key=lambda turn: turn.session)]

    @cached_property
    def _turn_by_id(self) -> dict[str, Turn]:
        return {turn.id: turn for turn in self.turns}

    def turn(self, id: str) -> Turn:
        """The turn with this id; ValueError when there is none."""
        if id not in self._turn_by_id:
            if not self.turns:
                raise ValueError(f"{self.id} has no turn {id!r}: it has no turns at all, give it some.")
            first, last = self.turns[0].id, self.turns[-1].id
            raise ValueError(f"{self.id} has no turn {id!r}: its ids run from {first} to {last}.")
        return self._turn_by_id[id]

    def evidence_sessions(self, question: Question) -> tuple[int, ...]:
        """Numbers of the sessions the question's evidence lies in, ascending; empty without usable evidence."""
        return tuple(sorted({self.turn(id).session for id in question.evidence}))


# ---- where the file comes from ---------------------------------------------------------------------------------------


def texts_of(turns: str | Turn | Iterable[str | Turn]) -> list[str]:
    """The text of one turn, or of each of several in their order; a ValueError for what is neither a text nor a `Turn`."""
    listed = isinstance(turns, Iterable) and not isinstance(turns, (Mapping, Set)) and getattr(turns, "ndim", 1) == 1
    if not listed and not isinstance(turns, Turn):
        raise ValueError(f"a {type(turns).__name__} is neither a turn nor a list of turns: give \"Speaker: text\", a Turn, "
                         "or a list of them (a conversation's are conversation.turns)")
    turns = [turns] if isinstance(turns, (str, Turn)) else list(turns)
    for turn in turns:
        if not isinstance(turn, (str, Turn)):
            raise ValueError(f"a {type(turn).__name__} is no turn: give \"Speaker: text\" or a Turn")
    return list(map(str, turns))


def as_conversations(conversations: Iterable[Conversation]) -> list[Conversation]:
    """The conversations as a list; ValueError for one alone, and for what is none."""
    given = list(conversations) if isinstance(conversations, Iterable) else [conversations]
    if isinstance(conversations, Conversation) or not all(isinstance(c, Conversation) for c in given):
        raise ValueError("give a list of conversations, as load_locomo and synthetic_conversations make it")
    return given


def require_own_ids(conversations: Iterable[Conversation]) -> list[Conversation]:
    """The conversations, each with an id of its own; else a ValueError: banks are kept by id, one would stand for two."""
    given = as_conversations(conversations)
    counts = Counter(c.id for c in given)
    if len(counts) < len(given):
        id, times = counts.most_common(1)[0]
        raise ValueError(f"{times} conversations have the id {id!r}: give each its own (dataclasses.replace(c, id=...))")
    return given


def load_locomo(path: str | os.PathLike | None = None) -> list[Conversation]:
    """The ten LoCoMo conversations, or those of any file in LoCoMo's format, which is read into memory as a whole.

    `path` may be any such JSON and is read as it is. Without it the official file is taken from PDMEM_LOCOMO, else from
    the cache folder (PDMEM_CACHE moves it), else from GitHub into that folder; its size and sha256 must be the known
    ones. Raises FileNotFoundError for a missing file, ValueError for an altered or malformed one, RuntimeError when the
    download fails or the system does not let us read (`files.ReadError`).
    """
    source = as_path(path) if path is not None else local_copy() or _download()
    content = _read(source) if path is not None else _read_official(source)
    try:
        records = json.loads(content)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError; brackets within brackets
        raise ValueError(f"{source} is not JSON ({error}): give a file in LoCoMo's format.") from error
    return parse(records)


def locomo_available(timeout: float = 3.0) -> tuple[bool, str]:
    """Whether `load_locomo()` can be expected to work, and one line that says why.

    Only without a local copy is the host asked, and it gets `timeout` seconds to answer.
    """
    import pooch

    if source := local_copy():
        try:
            _read_official(source)
        except (OSError, ValueError) as error:
            return False, str(error)
        return True, f"LoCoMo is at {source}."
    try:
        offered = pooch.HTTPDownloader(timeout=timeout)(LOCOMO_URL, None, None, check_only=True)
    except OSError as error:  # what requests raises is an OSError
        return False, f"LoCoMo is not on this machine and {LOCOMO_URL} cannot be reached ({type(error).__name__})."
    return offered, f"LoCoMo is not on this machine and {LOCOMO_URL} {'offers' if offered else 'does not offer'} it."


def local_copy() -> Path | None:
    """Where a copy of LoCoMo is on this machine, None where there is none; nothing is downloaded."""
    if named := os.environ.get("PDMEM_LOCOMO"):
        return Path(named)  # taken at its word: where it is wrong that is an error, there is no falling back
    try:
        cached = cache_folder() / FILE_NAME
    except OSError:  # no such folder can be made: _download says so
        return None
    with reading(cached):
        return cached if cached.exists() else None


def _download() -> Path:
    """Fetch the official file; pooch checks it under a temporary name and only then moves it into place."""
    import pooch

    downloader = pooch.HTTPDownloader(progressbar=True, timeout=TIMEOUT)
    mend = "set PDMEM_LOCOMO to a copy of locomo10.json, or use pdmem_lib.synthetic_conversations instead"
    try:
        hash = f"sha256:{LOCOMO_SHA256}"
        return Path(pooch.retrieve(LOCOMO_URL, hash, FILE_NAME, cache_folder(), downloader=downloader))
    except OSError as error:  # the host does not answer, the line breaks, the cache folder cannot be written
        reason = error if isinstance(error, StorageError) else type(error).__name__
        raise RuntimeError(f"LoCoMo was not downloaded from {LOCOMO_URL} ({reason}): {mend}.") from error
    except ValueError as error:
        raise ValueError(f"{LOCOMO_URL} sent an altered file, which was thrown away: retry, or {mend}.") from error


def _read(path: Path) -> bytes:
    if not is_file(path):
        raise FileNotFoundError(f"There is no LoCoMo file at {path}: correct the path, or PDMEM_LOCOMO if it is set.")
    return read_bytes(path)


def _read_official(path: Path) -> bytes:
    content = _read(path)
    mend = ("PDMEM_LOCOMO stands for the official file alone; give another by its path, load_locomo(path) or DATA=path"
            if os.environ.get("PDMEM_LOCOMO") else "delete it, and it is downloaded again")
    if len(content) != LOCOMO_BYTES:
        raise ValueError(f"{path} has {len(content):,} bytes, locomo10.json has {LOCOMO_BYTES:,}: {mend}.")
    if (found := hashlib.sha256(content).hexdigest()) != LOCOMO_SHA256:
        raise ValueError(f"{path} has sha256 {found}, locomo10.json has {LOCOMO_SHA256}: {mend}.")
    return content


# ---- from LoCoMo's format to conversations ---------------------------------------------------------------------------


def parse(records: list[dict]) -> list[Conversation]:
    """Conversations from LoCoMo-format dicts; ValueError names the conversation and the turn or question at fault."""
    if not isinstance(records, list):
        raise ValueError(f"LoCoMo data is a list of conversations, not {type(records).__name__}: put it into a list.")
    if not records:
        raise ValueError("this LoCoMo data holds no conversation: give at least one.")
    conversations = [_parse_conversation(record, f"conversation number {n}") for n, record in enumerate(records, 1)]
    _refuse_repeats([conversation.id for conversation in conversations], "the data", "sample_id")
    return conversations


def _parse_conversation(record: dict, where: str) -> Conversation:
    id = _text(_typed(record, dict, where), "sample_id", where)
    content = _typed(record.get("conversation"), dict, f"{id}, 'conversation'")
    turns: list[Turn] = []
    dates: dict[int, str] = {}
    keys = _session_keys(content, id)
    for session, key in sorted(keys.items()):
        rows = _typed(content[key], list, f"{id}, session {session}")
        for n, row in enumerate(rows, 1):
            turns.append(_parse_turn(row, session, len(turns), f"{id}, session {session}, turn {n}"))
        if rows:  # a session with a date and no turns never took place [D]
            dates[session] = _text(content, f"{key}_date_time", id, default="")
    if not turns:
        raise ValueError(f"{id} has no turns: give it at least one session_1 with a turn.")
    index = {turn.id: turn.index for turn in turns}
    _refuse_repeats([turn.id for turn in turns], id, "dia_id")
    rows = _typed(record.get("qa") or [], list, f"{id}, 'qa'")
    questions = [_parse_question(row, index, f"{id}, question {n}") for n, row in enumerate(rows, 1)]
    return Conversation(id, tuple(turns), tuple(questions), dates)


def _session_keys(content: dict, id: str) -> dict[int, str]:
    """The key of each session by its number; "session_01" is session 1."""
    keys: dict[int, str] = {}
    for key in content:
        if not re.fullmatch("session_[0-9]+", key):
            continue
        digits = key[8:].lstrip("0")
        if not 1 <= len(digits) <= 9:
            what = f"of {len(digits)} digits is too long" if digits else "is 0"
            raise ValueError(f"{id}: a session number {what}, number the sessions from 1.")
        if int(digits) in keys:
            raise ValueError(f"{id}: {keys[int(digits)]} and {key} are one session: give it one key.")
        keys[int(digits)] = key
    return keys


def _parse_turn(row: dict, session: int, index: int, where: str) -> Turn:
    id, speaker = (_text(_typed(row, dict, where), key, where) for key in ("dia_id", "speaker"))
    text = _text(row, "text", where, default="" if "text" in row else None)  # without words it still counts as a turn
    return Turn(id, session, index, speaker, text, caption=_text(row, "blip_caption", where, default=""))


def _parse_question(row: dict, index: dict[str, int], where: str) -> Question:
    question = _text(_typed(row, dict, where), "question", where)
    category = row.get("category")
    if type(category) is not int or category not in CATEGORIES:
        raise ValueError(f"{where}: category {category!r} is unknown, use a number from 1 to 5.")
    answer = _text(row, "answer", where, default=NOT_MENTIONED if category == 5 else None)
    evidence = _parse_evidence(row.get("evidence") or [], index, where)
    lag = len(index) - 1 - min(index[id] for id in evidence) if evidence else len(index)
    return Question(question, answer, category, evidence, lag, _text(row, "adversarial_answer", where, default=""))


def _parse_evidence(entries: list[str], index: dict[str, int], where: str) -> tuple[str, ...]:
    """Existing turns' ids: run-together entries are taken apart; a stray colon and what names no turn are dropped [D].

    'D8:6; D9:17' is two ids and 'D:11:26' is D11:26; 'D' and the zero-padded 'D30:05' name no turn. This is the reading
    that counts 27/24/60/130/398 test questions by lag [D].
    """
    ids: list[str] = []
    for entry in _typed(entries, list, f"{where}, 'evidence'"):
        _typed(entry, str, f"{where}, an entry of 'evidence'")
        ids += [entry] if entry in index else [f"D{place}" for place in re.findall("D:?([0-9]+:[0-9]+)", entry)]
    return tuple(dict.fromkeys(id for id in ids if id in index))


def _typed(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{where} is {type(value).__name__}, LoCoMo's format has a {kind.__name__} there.")
    return value


def _text(row: dict, key: str, where: str, default: str | None = None) -> str:
    """The string under `key`, whatever its script or control characters; a number becomes text.

    `default` stands in for an absent or empty one, which is an error where there is no default.
    """
    value = row.get(key)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if value is None or value == "":
        value = default
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key!r} is {row.get(key)!r}, give it a non-empty string.")
    if re.search("[\ud800-\udfff]", value):
        raise ValueError(f"{where}: {key!r} holds half a surrogate pair, which no tokenizer reads: repair the text.")
    return value


def _refuse_repeats(ids: list[str], where: str, what: str) -> None:
    if repeated := [id for id, count in Counter(ids).items() if count > 1]:
        raise ValueError(f"{where}: {what} {repeated[0]!r} occurs more than once, give each its own.")


# ---- what is done with conversations ---------------------------------------------------------------------------------


def data_sha256(conversations: list[Conversation]) -> str:
    """Hex sha256 of the content as canonical JSON: the same conversations give it on every machine.

    A turn of a class of its own counts by what is written of it too, where that is another text than a `Turn`'s.
    """
    conversations = list(conversations)
    contents = [asdict(c) for c in conversations]
    for content, c in zip(contents, conversations, strict=True):
        for row, turn in zip(content["turns"], c.turns, strict=True):
            if str(turn) != Turn.utterance.fget(turn):
                row["written"] = str(turn)
    canonical = json.dumps(contents, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def split(conversations: Iterable[Conversation]) -> tuple[list[Conversation], list[Conversation]]:
    """(train, test): of LoCoMo's ten the last three are the test [C], of any n the last max(1, round(0.3 n)) [D].

    ValueError for fewer than two, and for what are no conversations.
    """
    conversations = as_conversations(conversations)
    n = len(conversations)
    if n < 2:
        raise ValueError(f"{n} conversation(s) cannot be split into train and test: give at least two.")
    first_test = n - max(1, round(0.3 * n))
    return conversations[:first_test], conversations[first_test:]


def to_dataset_dict(conversations: list[Conversation], table: str = "questions") -> datasets.DatasetDict:
    """A Hugging Face DatasetDict with the splits "train" and "test" of `split`, both with the same columns.

    `table="questions"`, a row a question: conversation, question, answer, category, evidence (list of turn ids), lag
    (in turns), adversarial_answer. `table="turns"`, a row a turn: conversation, id, session, index, speaker, text,
    caption. `conversation` is the key between the two.
    """
    import datasets

    string, number = datasets.Value("string"), datasets.Value("int64")
    if table == "questions":
        columns = dict(question=string, answer=string, category=number, evidence=datasets.List(string), lag=number,
                       adversarial_answer=string)
    elif table == "turns":
        columns = dict(id=string, session=number, index=number, speaker=string, text=string, caption=string)
    else:
        raise ValueError(f"There is no table {table!r}: ask for 'questions' or 'turns'.")

    features = datasets.Features(conversation=string, **columns)

    def dataset(part: list[Conversation]) -> datasets.Dataset:
        rows = [{"conversation": c.id, **asdict(row)} for c in part for row in getattr(c, table)]
        return datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=features)

    train, test = split(conversations)
    return datasets.DatasetDict(train=dataset(train), test=dataset(test))
