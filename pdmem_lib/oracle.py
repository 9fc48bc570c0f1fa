"""Where the content is lost: a question's own evidence put where a memory would have to have it, step by step [D].

After a whole conversation no bank of the study is shown to hold anything of its own. What a memory needs lies in one to a
few turns, the question's evidence; here it is put ever nearer to where the study has it, each stage one step further:

    prompt   the evidence as text in front of the question, read by the bare frozen model: nothing is trained
    states   the evidence's token states are the entries: read by an adapter, no write rule
    alone    only the evidence is written, into P_0
    after    the evidence is written after all turns that stand before it, and asked about at once
    end      and all turns that follow it: the study's own bank

An adapter is trained at each stage, by one recipe, on banks made as those that it is asked under. Two controls: the bank
of other conversations' questions, as in the study, and of *another question of the same conversation*, which shares
speakers and topics; both of the same category and with as much evidence, so that neither the kind of question nor how full
a bank is makes a difference. The stage at which own minus another's falls to nothing is where the content is lost.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from .backbone import Backbone
from .comparisons import MATCHED, matched
from .locomo import Conversation, Question
from .memory import MemoryModel
from .methods import State
from .prompts import require_fitting
from .references import TurnIndex, gold_turns
from .settings import Settings
from .states import encode_all
from .training import epoch_batches, train_pairs

if TYPE_CHECKING:
    import pandas

STAGES = ("prompt", "states", "alone", "after", "end")
AGAINST = ("other", "neighbour")  # whose evidence own is held against: another conversation's, another question's
MEMORIES = ("own", *AGAINST, "zero")
Asked = tuple[Conversation, int, Question]  # the question's number in its conversation: a benchmark may ask one twice
Score = Callable[[Question, Sequence[Asked | None]], list[float]]  # nats per answer token with each one's evidence; None: none


@dataclass(frozen=True)
class OracleSettings(Settings):
    """How the adapter of a stage is trained and asked: two passes over the questions at ten times the published rate."""

    epochs: int = 2
    batch_size: int = 16  # questions a step, each with a bank of its own
    lr: float = 1e-3
    warmup_steps: int = 40
    clip: float = 1.0
    seed: int = 42  # of the data order, the samples and the controls
    max_questions: int | None = None  # train on a sample of this many
    max_asked: int | None = None  # ask a sample of this many
    autocast: bool | str = "auto"
    progress: bool = True

    def __post_init__(self):
        super().__post_init__()
        self.require(min(self.epochs, self.batch_size) >= 1, "epochs and batch_size must be at least 1")
        self.require(self.lr > 0 and self.clip > 0 and self.warmup_steps >= 0,
                     "lr and clip must be above 0, warmup_steps at least 0")
        for name in ("max_questions", "max_asked"):
            most = getattr(self, name)
            self.require(most is None or most >= 1, f"{name} must be at least 1, or None for all")


def answerable(conversations: Sequence[Conversation], most: int | None = None, seed: int = 0) -> list[Asked]:
    """The questions whose evidence is known, with conversation and number: all, or a sample of ``most``; in order."""
    asked = [(c, number, q) for c in conversations for number, q in enumerate(c.questions) if q.evidence]
    if not asked:
        raise ValueError("no question names its evidence: an oracle has nothing to put into a bank")
    if most is not None and most < len(asked):
        asked = [asked[i] for i in sorted(random.Random(seed).sample(range(len(asked)), most))]
    return asked


class Banks:
    """The bank of a question at a stage; ``states``: the turns' hidden states by conversation, as `encode_all` has them."""

    def __init__(self, model: MemoryModel, states: Mapping[str, Sequence[Tensor]], stage: str):
        if stage not in STAGES[1:]:
            raise ValueError(f"no bank is made at stage {stage!r}: known are {', '.join(STAGES[1:])}")
        self.model, self.states, self.stage = model, states, stage
        start = model.adapter.initial_state()
        if not start:
            raise ValueError(f"{model.method} keeps no memory: name a method that does")
        if stage == "states" and {name: t.shape[1:] for name, t in start.items()} != {"P": (model.backbone.hidden_size,)}:
            raise ValueError(f"{model.method} keeps no entries as wide as a token's state: 'states' is for those that do")
        self._known: dict[str, dict[int, State]] = {}

    def of(self, conversation: Conversation, number: int, question: Question) -> State:
        """What this question of ``conversation`` is to read."""
        turns = sorted(conversation.turn(id).index for id in question.evidence)
        if self.stage == "states":
            H = torch.cat([self._hidden(conversation.id, turn) for turn in turns])
            rows = len(self.model.adapter.initial_state()["P"])
            return {"P": H[-rows:][torch.arange(rows, device=H.device) % min(rows, len(H))]}  # again and again, to fill (M, d)
        if self.stage == "alone":
            return self._write(self.model.adapter.initial_state(), conversation.id, turns)
        last = turns[-1] if self.stage == "after" else len(conversation.turns) - 1
        if conversation.id not in self._known:
            self._known[conversation.id] = self._along(conversation)
        return self._known[conversation.id][last]

    def _along(self, conversation: Conversation) -> dict[int, State]:
        """The states after the turns that some question of the conversation is asked at."""
        wanted = {len(conversation.turns) - 1}
        if self.stage == "after":
            wanted = {max(conversation.turn(id).index for id in q.evidence) for q in conversation.questions if q.evidence}
        state, found = self.model.adapter.initial_state(), {}
        for turn in range(max(wanted) + 1):
            state = self._write(state, conversation.id, [turn])
            if turn in wanted:
                found[turn] = state
        return found

    def _write(self, state: State, id: str, turns: Sequence[int]) -> State:
        for turn in turns:
            state = self.model.adapter.write(state, self._hidden(id, turn))
        return state

    def _hidden(self, id: str, turn: int) -> Tensor:
        return self.states[id][turn].to(self.model.backbone.device, torch.float32)


def train(model: MemoryModel, conversations: Sequence[Conversation], stage: str, **settings) -> pandas.DataFrame:
    """Train ``model``'s adapter to answer from the banks of ``stage``; keywords as in `OracleSettings`.

    Returns `training.train_pairs`'s history. ``model.state`` is left alone.
    """
    s = OracleSettings.from_mapping(settings)
    asked = answerable(conversations, s.max_questions, s.seed)
    require_fitting(model.backbone, ((c.id, q) for c, _, q in asked))
    banks = Banks(model, encode_all(model.backbone, {c.id: c for c, *_ in asked}.values(), s.progress, s.autocast), stage)
    generator = torch.Generator().manual_seed(s.seed)
    lengths = [len(model.backbone.token_ids(f"{q.question} {q.answer}")) for *_, q in asked]
    batches = [batch for _ in range(s.epochs) for batch in epoch_batches([""] * len(asked), lengths, s.batch_size, generator)]

    def draw(step: int) -> tuple[list[State], list[str], list[str]]:
        chosen = [asked[i] for i in batches[step]]
        return [banks.of(*one) for one in chosen], [q.question for *_, q in chosen], [q.answer for *_, q in chosen]

    return train_pairs(model, draw, len(batches), s.lr, s.warmup_steps, s.clip, s.autocast, s.progress)


@torch.no_grad()
def ask(model: MemoryModel, conversations: Sequence[Conversation], stage: str, **settings) -> pandas.DataFrame:
    """How likely each right answer is under the question's own bank of ``stage`` and under the controls.

    A row a question: method, capacity, stage, conversation, number, category, lag, evidence (turns), and in nats per answer
    token logp_own, logp_neighbour (the bank of another question of the conversation that shares no evidence; NaN where there
    is none, and at stage "end", whose bank is the conversation's), logp_other (a question's of each other conversation, in
    the mean) and logp_zero. Which others they are follows from the seed alone, so that every stage has the same. At stage
    "prompt" the evidence's text stands in a prompt of the bare model ("baseline"), and zero is no text.
    """
    import pandas as pd

    s = OracleSettings.from_mapping(settings)
    asked = answerable(conversations, s.max_asked, s.seed)
    require_fitting(model.backbone, ((c.id, q) for c, _, q in asked))
    of = dict(method="baseline", capacity=1) if stage == "prompt" else dict(method=model.method, capacity=model.settings.capacity)
    if stage == "prompt":
        score = _prompts(model.backbone, conversations)
    else:
        states = encode_all(model.backbone, conversations, s.progress, s.autocast)
        score = _under(model, Banks(model, states, stage))
    rows = []
    with tqdm(total=len(asked), desc=f"ask at {stage}", unit="question", disable=not s.progress, mininterval=1.0) as bar:
        for (c, number, q), others in zip(asked, _controls(asked, conversations, s.seed), strict=True):
            if stage == "end":
                others = [(name, one) for name, one in others if name != "neighbour"]
            with model.backbone.autocast(s.autocast):
                found = score(q, [(c, number, q), *(one for _, one in others), None])
            logp = pd.Series(found, index=["own", *(name for name, _ in others), "zero"]).groupby(level=0).mean()
            rows.append(of | dict(stage=stage, conversation=c.id, number=number, category=q.category, lag=q.lag,
                                  evidence=len(q.evidence), **{f"logp_{name}": logp.get(name) for name in MEMORIES}))
            bar.update()
    return pd.DataFrame(rows).astype({f"logp_{name}": float for name in MEMORIES})


def _controls(asked: Sequence[Asked], conversations: Sequence[Conversation], seed: int) -> list[list[tuple[str, Asked]]]:
    """For each question: another of its conversation without common evidence, if there is one, and one of each other's.

    Of the same category, where there is one, and of those one with as many turns of evidence, or nearly: how much is in a bank
    tells what kind of question it was made for, and so the form of its answer, which is no content.
    """
    known = {c.id: answerable([c]) for c in conversations if any(q.evidence for q in c.questions)}
    found = []
    for c, number, q in asked:
        rng = random.Random(f"{seed} {c.id} {number}")

        def alike(candidates: Sequence[Asked]) -> Asked:
            def distance(one: Asked) -> tuple[bool, int]:
                return one[2].category != q.category, abs(len(one[2].evidence) - len(q.evidence))
            nearest = min(map(distance, candidates))
            return rng.choice([one for one in candidates if distance(one) == nearest])

        apart = [one for one in known[c.id] if not set(one[2].evidence) & set(q.evidence)]
        found.append([("neighbour", alike(apart))] * bool(apart)
                     + [("other", alike(theirs)) for id, theirs in known.items() if id != c.id])
    return found


def _under(model: MemoryModel, banks: Banks) -> Score:
    """Under the banks of ``whose`` evidence; zeros for none."""
    zero = model.resolve("zero")

    def score(q: Question, whose: Sequence[Asked | None]) -> list[float]:
        found = model.score_pairs([zero if one is None else banks.of(*one) for one in whose],
                                  [q.question] * len(whose), [q.answer] * len(whose))
        return (found.log_prob / found.tokens).tolist()
    return score


def _prompts(backbone: Backbone, conversations: Sequence[Conversation]) -> Score:
    """Of the bare model, with the evidence's text in its prompt."""
    bare, index = MemoryModel(backbone, "baseline"), {c.id: TurnIndex(backbone, c) for c in conversations}

    def score(q: Question, whose: Sequence[Asked | None]) -> list[float]:
        texts = ["" if one is None else gold_turns(index[one[0].id], replace(q, evidence=one[2].evidence)) for one in whose]
        found = bare.score([q.question] * len(whose), [q.answer] * len(whose), "off", contexts=texts)
        return (found.log_prob / found.tokens).tolist()
    return score


def told(table: pandas.DataFrame) -> pandas.DataFrame:
    """What the right evidence is worth at each stage, conversations weighing the same: rows of `comparisons.matched` with
    stage, against (of `AGAINST`) and questions ("all", "without category 5", "category 5") beside them; p_holm is over those of
    one control and choice of questions. ``table``: rows of `ask`, with seed.

    Category 5, whose right answer is one fixed sentence, is a control of the controls: no evidence makes it likelier than
    another's of that kind, so that what shows there is no content."""
    import pandas as pd

    found = []
    fifth = table["category"] == 5
    for questions, part in (("all", table), ("without category 5", table[~fifth]), ("category 5", table[fifth])):
        for name in AGAINST:
            asked = part[part[f"logp_{name}"].notna()]
            held = matched(asked.assign(method=asked["method"] + " " + asked["stage"], logp_other=asked[f"logp_{name}"]))
            held[["method", "stage"]] = held["method"].str.rsplit(" ", n=1).tolist() or pd.DataFrame(columns=["method", "stage"])
            found.append(held.assign(against=name, questions=questions))
    return pd.concat(found, ignore_index=True)[["method", "capacity", "stage", "against", "questions", *MATCHED[2:]]]
