"""A minute's lesson for an adapter that remembers, and conversations whose answers are known [D].

Ann adopts one of four animals, Ben buys one of four instruments, among turns of small talk; asked with the memory in
place of the turns, only the memory can answer. An adapter is trained on such talks (`training.train_pairs`), checked on
talks it has not met, and kept in the cache folder: about a minute on two cores with SmolLM2-135M, once a method.

What it has learnt is to read these facts out of a memory. Of other conversations (LoCoMo's, one's own) it will mostly
show what the memory holds, and that it cannot answer from it.
"""

import random
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from . import locomo
from .backbone import Backbone
from .files import atomic_path, cache_folder, load_json, save_json
from .locomo import Conversation
from .memory import MemoryModel
from .methods import State, method_name
from .recall import SMALL_TALK
from .synthetic import synthetic_conversations
from .training import train_pairs


class Fact(NamedTuple):
    """What can be told in one turn, and asked."""

    said: str
    asked: str
    words: tuple[str, ...]

    def turn(self, word: str) -> str:
        """The turn that tells ``word``."""
        return self.said.format(word=word)


ANIMAL = Fact("Ann: I adopted a {word}. A {word}! My own {word}.", "Which animal did Ann adopt?",
              ("cat", "dog", "horse", "parrot"))
INSTRUMENT = Fact("Ben: I bought a {word}. A {word}! My own {word}.", "Which instrument did Ben buy?",
                  ("piano", "drum", "flute", "harp"))
FACTS = ANIMAL, INSTRUMENT
SMALL = range(2, 7)  # turns of small talk among the facts
CHECKS = 16  # talks that an adapter is checked on, two questions each
SHOWN = 60  # turns of another conversation whose memory stands beside a long one's


@dataclass(frozen=True)
class Schedule:
    """How long and how fast an adapter learns."""

    steps: int
    lr: float


SCHEDULES = {  # those of the chapters 04 to 09; slots, which are hard to read, slower and longer
    "prefix": Schedule(100, 0.01), "cross_attention": Schedule(260, 0.003), "kv_extension": Schedule(120, 0.003),
    "hebbian": Schedule(120, 0.003), "gated": Schedule(120, 0.003), "slot": Schedule(200, 0.01),
}


@dataclass(frozen=True)
class Learnt:
    """What an adapter was taught, and of so many questions on talks it had not met how many it answered rightly."""

    steps: int
    lr: float
    right: int
    asked: int
    seconds: float

    def __str__(self) -> str:
        return (f"trained {self.steps} steps on the studio's lesson; on new talks it answers {self.right} of "
                f"{self.asked} rightly (guessing: {self.asked // 4})")


# ---- the lesson ------------------------------------------------------------------------------------------------------


def small_talk(rng: random.Random, *told: str, turns: int) -> list[str]:
    """``told`` among so many turns of small talk, all in random order."""
    talk = [*told, *rng.sample(SMALL_TALK, turns)]
    rng.shuffle(talk)
    return talk


class Course:
    """The lesson for one backbone: every turn that can occur is encoded once."""

    def __init__(self, backbone: Backbone):
        self.backbone = backbone
        texts = [*SMALL_TALK, *(fact.turn(word) for fact in FACTS for word in fact.words)]
        self.hidden = dict(zip(texts, backbone.encode(texts, progress=False), strict=True))

    def bank(self, model: MemoryModel, turns: Iterable[str]) -> State:
        """The memory after these turns; ``model.state`` is left alone."""
        state = model.adapter.initial_state()
        for turn in turns:
            state = model.adapter.write(state, self.hidden[turn])
        return state

    def teach(self, model: MemoryModel, schedule: Schedule, on_step: Callable[[int], None] | None = None,
              seed: int = 42) -> float:
        """Train the adapter; returns the seconds. ``on_step(step)`` comes before each, from 0; what it raises ends it.

        Every step asks for each animal and each instrument once, so that no answer is taught for all banks.
        """
        rng = random.Random(f"studio/{seed}")

        def draw(step: int):
            if on_step:
                on_step(step)
            bought = rng.sample(range(4), 4)
            told = [(ANIMAL.turn(ANIMAL.words[i]), INSTRUMENT.turn(INSTRUMENT.words[j])) for i, j in enumerate(bought)]
            banks = [self.bank(model, small_talk(rng, *facts, turns=rng.choice(SMALL))) for facts in told]
            answers = [*ANIMAL.words, *(INSTRUMENT.words[j] for j in bought)]
            return banks * 2, [ANIMAL.asked] * 4 + [INSTRUMENT.asked] * 4, answers

        history = train_pairs(model, draw, schedule.steps, schedule.lr, progress=False)
        return float(history["seconds"].iloc[-1])

    def check(self, model: MemoryModel, talks: int = CHECKS, seed: int = 42) -> tuple[int, int]:
        """(right, asked): how often the greedy answer is the told word, on new talks, two questions each."""
        rng, told, banks = random.Random(f"studio/check/{seed}"), [], []
        for _ in range(talks):
            words = [rng.choice(fact.words) for fact in FACTS]
            told.append(words)
            turns = small_talk(rng, *map(Fact.turn, FACTS, words), turns=rng.choice(SMALL))
            banks.append(self.bank(model, turns))
        answers = [model.answers_under(banks, [fact.asked], max_new_tokens=4) for fact in FACTS]
        right = sum(answer == [words[i]] for i, given in enumerate(answers)
                    for answer, words in zip(given, told, strict=True))
        return right, talks * len(FACTS)


# ---- adapters that are kept ------------------------------------------------------------------------------------------


def folder_of(backbone: Backbone, method: str, capacity: int, seed: int, schedule: Schedule) -> Path:
    """Where the adapter of this lesson is kept: another lesson, backbone or schedule has another folder."""
    digest = sha256(repr((FACTS, SMALL_TALK, SMALL, schedule)).encode()).hexdigest()[:8]
    return cache_folder("studio", backbone.fingerprint[:16]) / f"{method}-{capacity}x-seed{seed}-{digest}"


def find(backbone: Backbone, method: str, capacity: int = 1, seed: int = 42,
         schedule: Schedule | None = None) -> tuple[MemoryModel, Learnt] | None:
    """The trained adapter where one is kept, and what it learnt; None where there is none, or a damaged one."""
    method = method_name(method)
    folder = folder_of(backbone, method, capacity, seed, schedule or SCHEDULES[method])
    try:
        return MemoryModel.from_pretrained(folder, backbone), Learnt(**load_json(folder / "lesson.json"))
    except (OSError, ValueError, TypeError):
        return None


def learn(backbone: Backbone, method: str, capacity: int = 1, seed: int = 42, schedule: Schedule | None = None,
          on_step: Callable[[int, int], None] | None = None,
          course: Course | None = None) -> tuple[MemoryModel, Learnt]:
    """Train an adapter on the lesson, check it and keep it. ``on_step(step, of)`` comes before each step."""
    method = method_name(method)
    schedule = schedule or SCHEDULES[method]
    course, model = course or Course(backbone), MemoryModel(backbone, method, capacity, seed)
    seconds = course.teach(model, schedule, on_step and (lambda step: on_step(step, schedule.steps)), seed)
    learnt = Learnt(schedule.steps, schedule.lr, *course.check(model, seed=seed), seconds)
    folder = folder_of(backbone, method, capacity, seed, schedule)
    with atomic_path(folder) as partial:
        model.save_pretrained(partial)
        save_json(partial / "lesson.json", asdict(learnt))
        if find(backbone, method, capacity, seed, schedule) is None:
            shutil.rmtree(folder, ignore_errors=True)  # a damaged one, which would stay
    return model, learnt


# ---- conversations to look at ----------------------------------------------------------------------------------------


class Known(NamedTuple):
    """A question with its answer and the turns that tell it, by number."""

    question: str
    answer: str
    evidence: tuple[int, ...] = ()


@dataclass(frozen=True)
class Talk:
    """A conversation for the studio: its turns, what may be asked, and another whose memory stands beside."""

    name: str
    turns: tuple[str, ...]
    known: tuple[Known, ...]
    others: tuple[str, ...]
    note: str = ""


def lesson_talk(name: str, words: Sequence[str], others: Sequence[str], turns: int, seed: int) -> Talk:
    """One of the lesson's talks, with ``turns`` of small talk; the other tells ``others``."""
    rng = random.Random(f"studio/talk/{seed}")
    told, different = ([fact.turn(word) for fact, word in zip(FACTS, given, strict=True)] for given in (words, others))
    talk = small_talk(rng, *told, turns=turns)
    known = tuple(Known(fact.asked, word, (talk.index(turn),))
                  for fact, word, turn in zip(FACTS, words, told, strict=True))
    return Talk(name, tuple(talk), known, tuple(small_talk(rng, *different, turns=turns)),
                "a talk of the lesson: the adapter was trained on others of this kind")


def of_conversation(conversation: Conversation, other: Conversation, name: str, note: str) -> Talk:
    """A conversation of LoCoMo's type as a talk; another's first `SHOWN` turns make the memory beside it."""
    known = tuple(Known(q.question, q.answer, tuple(conversation.turn(id).index for id in q.evidence))
                  for q in conversation.questions if q.evidence)
    return Talk(name, tuple(map(str, conversation.turns)), known, tuple(map(str, other.turns[:SHOWN])), note)


def talks() -> list[Talk]:
    """The lesson's talks, then LoCoMo's test conversations where a copy is on this machine, else synthetic ones.

    Nothing is downloaded. What stands behind a conversation is in its ``note``.
    """
    found = [lesson_talk("A short talk", ("parrot", "flute"), ("dog", "piano"), 6, seed=1),
             lesson_talk("A longer talk", ("horse", "harp"), ("cat", "drum"), 22, seed=2)]
    source, name, note = locomo.local_copy(), "LoCoMo", "LoCoMo: the adapter was not trained on it"
    if source is not None:
        try:
            conversations = locomo.split(locomo.load_locomo())[1]
        except (OSError, ValueError) as error:
            source, note = None, f"synthetic, not LoCoMo ({error})"
    else:
        note = "synthetic, not LoCoMo, which is not on this machine (PDMEM_LOCOMO names a copy)"
    if source is None:
        name, conversations = "Synthetic", synthetic_conversations(2, sessions=2, seed=42)
    pairs = zip(conversations, [*conversations[1:], conversations[0]], strict=True)
    found += [of_conversation(one, other, f"{name} {one.id}", note) for one, other in pairs]
    return [*found, Talk("An empty page", (), (), found[0].others, "write turns of your own")]
