"""Where the content is lost: a question's own evidence put where a memory would have to have it, step by step [D].

After a whole conversation no bank of the study is shown to hold anything of its own. What a memory needs lies in one to a
few turns, the question's evidence; here it is put ever nearer to where the study has it, each stage one step further:

    prompt   the evidence as text in front of the question, read by the bare frozen model: nothing is trained
    text     the same text, with an adapter trained beside it, whose memory is P_0 and holds nothing
    states   the evidence's token states are the entries: read by an adapter, no write rule
    alone    only the evidence is written, into P_0
    after-1  and one of the other turns, the one that stands before the last of the evidence; asked about at once
    after-4  and four of them
    after-16 and sixteen of them
    after    and all turns that stand before the last of the evidence
    end      and all turns that follow it: the study's own bank, read by the adapter trained at "after"

An adapter is trained at each stage but the first and the last, by one recipe, on texts or banks made as those that it is
asked under. (At "end" a training has one bank a conversation, seven of LoCoMo: it cannot learn from that to tell banks apart,
whatever they hold. That training is the study itself.) Two controls: the same bank, in which the evidence of another
question of the *same conversation* stands in the place of the question's own, evidence by the same speakers, of the same
category and as many turns where there is one; and the banks of other conversations' questions, as in the study, whose
speakers have other names: own minus that has the names in it. Category 5 is left out: its evidence does not answer it, and
"Not mentioned" can be learnt from whose evidence lies in a bank.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from .backbone import Backbone
from .comparisons import MATCHED, matched
from .locomo import Conversation, Question, require_own_ids
from .memory import MemoryModel
from .methods import SparseSlots, State
from .prompts import require_fitting
from .references import TurnIndex, gold_turns
from .settings import Settings
from .states import encode_all
from .training import epoch_batches, train_pairs

if TYPE_CHECKING:
    import pandas

AMONG = {"alone": 0, "after-1": 1, "after-4": 4, "after-16": 16, "after": None}  # how many other turns are written; None: all
TEXT = ("prompt", "text")  # where the evidence is text, and no bank holds it
STAGES = (*TEXT, "states", *AMONG, "end")
ENTRIES = 256  # of a bank at stage "states", whatever the capacity: as many token states as nearly all evidence has
AGAINST = ("neighbour", "other")  # whose evidence own is held against: another question's in its place, another conversation's
MEMORIES = ("own", *AGAINST, "zero")
SAMPLE_SEED = 0  # of the questions asked, for all runs
Asked = tuple[Conversation, int, Question]  # the question's number in its conversation: a benchmark may ask one twice


@dataclass(frozen=True)
class OracleSettings(Settings):
    """How the adapter of a stage is trained and asked.

    Of the trials on a held-out training conversation (`95_learning_rates`, on the study's own banks) rate and epochs were the
    second best for M.4, 0.04 nats from the best for M.6; the loss is that of `training.train_pairs`, per answer.
    """

    epochs: int = 2
    batch_size: int = 16  # questions a step, each with a bank of its own
    lr: float = 1e-3
    warmup_steps: int = 40
    clip: float = 1.0
    seed: int = 42  # of the data order, the sample to train on and the controls
    max_questions: int | None = None  # train on a sample of this many
    max_asked: int | None = None  # ask a sample of this many, the same for all seeds
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


def answerable(conversations: Iterable[Conversation], most: int | None = None, seed: int = SAMPLE_SEED) -> list[Asked]:
    """The questions whose evidence is known and answers them (categories 1 to 4): all, or a sample of ``most``; in order."""
    asked = [(c, i, q) for c in conversations for i, q in enumerate(c.questions) if q.evidence and q.category != 5]
    if not asked:
        raise ValueError("no question names its evidence: an oracle has nothing to put into a bank")
    if most is not None and most < len(asked):
        asked = [asked[i] for i in sorted(random.Random(seed).sample(range(len(asked)), most))]
    return asked


def trained_at(model: MemoryModel) -> tuple[str, ...]:
    """The stages that an adapter of this method is trained at.

    "states" is for entries as wide as a token's state. M.6 reads those and P_0 as M.3 does: with it the runs at "text" and
    "states" are made, and not again.
    """
    start = model.adapter.initial_state()
    wide = {name: t.shape[1:] for name, t in start.items()} == {"P": (model.backbone.hidden_size,)}
    again = isinstance(model.adapter, SparseSlots)
    return tuple(stage for stage in STAGES[1:-1] if not (stage == "text" and again or stage == "states" and (again or not wide))
                 ) if start else ()


class Written:
    """What ``write`` makes, of ``start``, of the turns that a question's stage has written: (state, H (T, d)) -> state.

    ``states``: the turns' hidden states by conversation, as `encode_all` has them. At "after" the states at all questions'
    evidence are kept: 0.2 GB for LoCoMo at 1x, 2 to 4 GB at 10x.
    """

    def __init__(self, write: Callable[[State, Tensor], State], start: State, states: Mapping[str, Sequence[Tensor]], stage: str):
        self.write, self.start, self.states, self.stage = write, start, states, stage
        self._known: dict[str, dict[int, State]] = {}

    def of(self, conversation: Conversation, question: Question, instead: Question | None = None) -> State:
        """At this ``question`` of ``conversation``; with the evidence of ``instead``, another of it, in the place of its own.

        Turns of ``instead``'s that are written anyway stay in their own place, too.
        """
        own, turns = evidence_turns(conversation, question), turns_written(conversation, question, self.stage)
        theirs = own if instead is None else evidence_turns(conversation, instead)
        if AMONG.get(self.stage) is not None:  # a few turns, nothing that another question could share
            return self._after(self.start, conversation.id, swapped(turns, own, theirs))
        if conversation.id not in self._known:
            self._known[conversation.id] = self._along(conversation)
        known = self._known[conversation.id]
        if instead is None:
            return known[turns[-1]]
        return self._after(known[own[0] - 1], conversation.id, swapped(turns[own[0] :], own, theirs))

    def _along(self, conversation: Conversation) -> dict[int, State]:
        """The states before and after the evidence of the conversation's questions, and at its end."""
        evidence = [evidence_turns(conversation, q) for q in conversation.questions if q.evidence]
        wanted = {turns[0] - 1 for turns in evidence}
        wanted |= {turns[-1] for turns in evidence} if self.stage == "after" else {len(conversation.turns) - 1}
        state, found = self.start, {-1: self.start}
        for turn in range(max(wanted) + 1):
            state = self._after(state, conversation.id, [turn])
            if turn in wanted:
                found[turn] = state
        return found

    def _after(self, state: State, id: str, turns: Iterable[int]) -> State:
        for turn in turns:
            state = self.write(state, self.states[id][turn])
        return state


class Banks(Written):
    """The bank that a question reads at a stage: a state of ``model``, which is left alone.

    Written in float32, whatever the reader computes in. ValueError for a stage that the method does not have.
    """

    def __init__(self, model: MemoryModel, states: Mapping[str, Sequence[Tensor]], stage: str):
        known = (*(one for one in trained_at(model) if one not in TEXT), "end") if model.state else ()
        if stage not in known:
            raise ValueError(f"{model.method} has no banks at stage {stage!r}: it has {', '.join(known) or 'none, it keeps no memory'}")
        self.model = model
        super().__init__(lambda state, H: model.adapter.write(state, self._here(H)), model.adapter.initial_state(), states, stage)

    @torch.no_grad()
    def of(self, conversation: Conversation, question: Question, instead: Question | None = None) -> State:
        with self.model.backbone.autocast(False):
            if self.stage != "states":
                return super().of(conversation, question, instead)
            H = torch.cat([self._here(self.states[conversation.id][turn])
                           for turn in evidence_turns(conversation, instead or question)])  # (T, d)
            rows = len(self.model.state["P"])
            return {"P": H[-rows:][torch.arange(rows, device=H.device) % min(rows, len(H))]}  # again and again: (M, d)

    def _here(self, H: Tensor) -> Tensor:
        return H.to(self.model.backbone.device, torch.float32)


def evidence_turns(conversation: Conversation, question: Question) -> list[int]:
    """The places of the question's evidence in its conversation, each once, ascending."""
    return sorted({conversation.turn(id).index for id in question.evidence})


def among(turns: Sequence[int], others: int) -> list[int]:
    """The turns of evidence, and the ``others`` that stand before the last of them, or as many as there are; ascending."""
    before = sorted(set(range(turns[-1])) - set(turns))
    return sorted([*turns, *before[max(len(before) - others, 0):]])


def turns_written(conversation: Conversation, question: Question, stage: str) -> Sequence[int]:
    """The places of the turns that are written at a ``stage`` of `AMONG`, or at "end"; ascending."""
    own = evidence_turns(conversation, question)
    if (others := AMONG.get(stage)) is not None:
        return among(own, others)
    return range(own[-1] + 1 if stage == "after" else len(conversation.turns))


def swapped(turns: Iterable[int], own: Sequence[int], theirs: Sequence[int]) -> list[int]:
    """``turns`` with those of ``theirs`` in the places of ``own``: the last in the last one's, and where they are more, the
    first of them together in the first one's; where they are fewer, the first places stay empty."""
    more = len(theirs) - len(own)
    places = {turn: theirs[i + more : i + more + 1] if i + more >= 0 else () for i, turn in enumerate(own)}
    places[own[0]] = theirs[: max(more + 1, 0)]
    return [one for turn in turns for one in places.get(turn, (turn,))]


def share(gamma: float, sizes: Sequence[float], which: Iterable[int]) -> float:
    """Of all that turns have added to the same rows, what those at the places ``which`` are, under a rule of decay ``gamma``.

    ``sizes``: what each turn, the newest last, adds before it fades: rule 1 adds up a turn's tokens (M.1, M.2, M.3, M.5), and
    its size is their number; M.4's rule takes their mean, and it is 1 (short of the rule's norm bound)."""
    left = [size * gamma ** (len(sizes) - 1 - place) for place, size in enumerate(sizes)]
    return sum(left[place] for place in which) / sum(left)


def shares(asked: Iterable[Asked], sizes: Mapping[str, Sequence[float]], stage: str, gamma: float) -> list[float]:
    """What each question's evidence is of all that its ``stage`` writes (`share`); ``sizes`` of the turns by conversation."""
    found = []
    for c, _, q in asked:
        turns, own = turns_written(c, q, stage), set(evidence_turns(c, q))
        found.append(share(gamma, [sizes[c.id][turn] for turn in turns], [place for place, turn in enumerate(turns) if turn in own]))
    return found


def train(model: MemoryModel, conversations: Iterable[Conversation], stage: str, **settings) -> pandas.DataFrame:
    """Train ``model``'s adapter to answer at ``stage``, from its banks or its texts; keywords as in `OracleSettings`.

    Returns `training.train_pairs`'s history. ``model.state`` is left alone. ValueError for a stage that is not trained at.
    """
    s, conversations = OracleSettings.from_mapping(settings), require_own_ids(conversations)
    _require_trained_at(model, stage)
    asked = answerable(conversations, s.max_questions, s.seed)
    require_fitting(model.backbone, ((c.id, q) for c, _, q in asked))
    memory_of, text_of = _readings(model, list({c.id: c for c, *_ in asked}.values()), stage, s)
    texts = [text_of(one, one) for one in asked]
    generator = torch.Generator().manual_seed(s.seed)
    lengths = [len(model.backbone.token_ids(f"{text}{q.question} {q.answer}"))
               for text, (*_, q) in zip(texts, asked, strict=True)]
    batches = [batch for _ in range(s.epochs) for batch in epoch_batches([""] * len(asked), lengths, s.batch_size, generator)]

    def draw(step: int) -> tuple[list[State], list[str], list[str], list[str]]:
        chosen = [asked[i] for i in batches[step]]
        return ([memory_of(one, one) for one in chosen], [q.question for *_, q in chosen], [q.answer for *_, q in chosen],
                [texts[i] for i in batches[step]])

    return train_pairs(model, draw, len(batches), s.lr, s.warmup_steps, s.clip, s.autocast, s.progress)


def _require_trained_at(model: MemoryModel, stage: str) -> None:
    if stage not in trained_at(model):
        raise ValueError(f"{model.method} is not trained at {stage!r}: name one of {', '.join(trained_at(model)) or 'another method'}")


@torch.no_grad()
def ask(model: MemoryModel, conversations: Iterable[Conversation], stage: str, **settings) -> pandas.DataFrame:
    """How likely each right answer is under the question's own bank of ``stage`` and under the controls.

    A row a question: method, capacity, stage, conversation, number, category, lag, evidence (turns), and in nats per answer
    token logp_own, logp_neighbour (the evidence of another question of the conversation, which shares none, in its place;
    NaN where there is none), logp_other (the bank of a question of each other conversation, in the mean) and logp_zero. Which
    others they are follows from the seed alone, so that every stage has the same. At "prompt" and "text" the evidence's text
    stands in the prompt, of the bare model ("baseline") and of ``model`` with P_0, and zero is no text.
    """
    import pandas as pd

    s, conversations = OracleSettings.from_mapping(settings), require_own_ids(conversations)
    asked = answerable(conversations, s.max_asked)
    require_fitting(model.backbone, ((c.id, q) for c, _, q in asked))
    if stage == "text":
        _require_trained_at(model, stage)
    model = MemoryModel(model.backbone, "baseline") if stage == "prompt" else model
    memory_of, text_of = _readings(model, conversations, stage, s)
    rows = []
    with tqdm(total=len(asked), desc=f"ask at {stage}", unit="question", disable=not s.progress, mininterval=1.0) as bar:
        for own, others in zip(asked, controls(asked, conversations, s.seed), strict=True):
            c, number, q = own
            whose = [own, *(one for _, one in others), None]
            with model.backbone.autocast(s.autocast):
                found = model.score_pairs([memory_of(own, one) for one in whose], [q.question] * len(whose), [q.answer] * len(whose),
                                          [text_of(own, one) for one in whose])
            under = ["own", *(name for name, _ in others), "zero"]
            logp = pd.Series((found.log_prob / found.tokens).tolist(), index=under).groupby(level=0).mean()
            rows.append(dict(method=model.method, capacity=model.settings.capacity, stage=stage, conversation=c.id, number=number,
                             category=q.category, lag=q.lag, evidence=len(q.evidence),
                             **{f"logp_{name}": logp.get(name) for name in MEMORIES}))
            bar.update()
    return pd.DataFrame(rows).astype({f"logp_{name}": float for name in MEMORIES})


def controls(asked: Sequence[Asked], conversations: Sequence[Conversation], seed: int) -> list[list[tuple[str, Asked]]]:
    """For each question whose evidence stands in for its own: ("neighbour", another of its conversation without common
    evidence), if there is one, and ("other", one) of each other conversation.

    The nearest in this order, by lot among equals: of the same category, by the same speakers (a neighbour) and with as many
    turns of evidence. How much lies in a bank, and whose words, tell what kind of answer is wanted, which is no content.
    """
    known = {c.id: answerable([c]) for c in conversations if any(q.evidence and q.category != 5 for q in c.questions)}
    found = []
    for c, number, q in asked:
        rng, own = random.Random(f"{seed} {c.id} {number}"), evidence_turns(c, q)

        def alike(candidates: Sequence[Asked]) -> Asked:
            def distance(one: Asked) -> tuple[bool, bool, int]:
                turns = evidence_turns(one[0], one[2])
                return (one[2].category != q.category, one[0].id == c.id and _speakers(one[0], turns) != _speakers(c, own),
                        abs(len(turns) - len(own)))
            nearest = min(map(distance, candidates))
            return rng.choice([one for one in candidates if distance(one) == nearest])

        apart = [one for one in known[c.id] if not set(one[2].evidence) & set(q.evidence)]
        found.append([("neighbour", alike(apart))] * bool(apart)
                     + [("other", alike(theirs)) for id, theirs in known.items() if id != c.id])
    return found


def _speakers(conversation: Conversation, turns: Sequence[int]) -> set[str]:
    return {conversation.turns[turn].speaker for turn in turns}


def bank_of(banks: Written, own: Asked, whose: Asked) -> State:
    """What ``own`` reads when the evidence is ``whose``: its bank, that with another's evidence, or another conversation's."""
    if whose[0].id != own[0].id:
        return banks.of(whose[0], whose[2])
    return banks.of(own[0], own[2], None if whose[2] is own[2] else whose[2])


def _readings(model: MemoryModel, conversations: Sequence[Conversation], stage: str,
              s: OracleSettings) -> tuple[Callable[[Asked, Asked | None], State], Callable[[Asked, Asked | None], str]]:
    """What an asked question is answered from when the evidence is another's: its memory, zeros where there is no evidence
    (None), and the text in its prompt. One of the two holds the evidence, by the ``stage``."""
    start, zero = model.adapter.initial_state(), model.resolve("zero")
    if stage in TEXT:
        index = {c.id: TurnIndex(model.backbone, c) for c in conversations}

        def text(own: Asked, whose: Asked | None) -> str:
            return "" if whose is None else gold_turns(index[whose[0].id], replace(own[2], evidence=whose[2].evidence))
        return lambda own, whose: start, text

    banks = Banks(model, encode_all(model.backbone, conversations, s.progress, s.autocast), stage)
    return lambda own, whose: zero if whose is None else bank_of(banks, own, whose), lambda own, whose: ""


def told(table: pandas.DataFrame, score: str = "logp", unit: str = "nats per token") -> pandas.DataFrame:
    """What the right evidence is worth, conversations weighing the same: rows of `comparisons.matched` with stage and against
    (of `AGAINST`) beside them, p_holm over those of one control; ahead, the share of questions that the right evidence serves
    better (equally: a half), and standardised, the mean difference by its standard deviation, over questions: adapters that give
    their answers more extreme probabilities show larger effects, but not larger ones of these. ``table``: rows of `ask`, with
    seed. A control that no question has, or two conversations are too few for, has no row. ``score``: of what, own minus the
    control's: the columns ``score``_own, ``score``_neighbour and ``score``_other, in ``unit``."""
    import pandas as pd

    found = []
    for name in AGAINST:
        asked = table[table[f"{score}_{name}"].notna()]
        asked = asked.assign(method=asked["method"] + " " + asked["stage"], logp_own=asked[f"{score}_own"],
                             logp_other=asked[f"{score}_{name}"])
        d = (asked["logp_own"] - asked["logp_other"]).groupby([asked["method"], asked["capacity"]])
        size = pd.DataFrame({"ahead": d.apply(lambda d: ((d > 0) + (d == 0) / 2).mean()), "standardised": d.mean() / d.std()})
        rows = matched(asked).join(size, on=["method", "capacity"])
        found.append(_split(rows, "method", "stage").assign(against=name, unit=unit))
    found = [rows for rows in found if len(rows)] or found[:1]  # an empty one has no numbers, and would make the others objects
    columns = ["method", "capacity", "stage", "against", *MATCHED[2:], "ahead", "standardised"]
    return pd.concat(found, ignore_index=True)[columns]


def lost(table: pandas.DataFrame) -> pandas.DataFrame:
    """What is lost from one stage to the next, question by question: `told`'s effect at the one minus at the other, columns
    method, capacity, stage, to, against and those of `comparisons.matched`. Stages that both have the control, in `STAGES`'
    order, and from "alone" to each number of other turns; "significant here and not there" alone would be no difference."""
    import pandas as pd

    keys, found = ["method", "capacity", "seed", "conversation", "number"], []
    for name in AGAINST:
        gains = table.assign(gain=table["logp_own"] - table[f"logp_{name}"]).dropna(subset="gain")
        pairs = []
        for (method, capacity), rows in gains.groupby(["method", "capacity"], sort=False):
            stages = [stage for stage in STAGES if stage in set(rows["stage"])]
            few = [stage for stage in stages if AMONG.get(stage)]
            whole = [stage for stage in stages if stage not in few]
            for one, to in [*zip(whole, whole[1:]), *(("alone", stage) for stage in few if "alone" in stages)]:
                both = rows[rows["stage"] == one][[*keys, "gain"]].merge(rows[rows["stage"] == to][[*keys, "gain"]], on=keys)
                pairs.append(both.assign(method=f"{method} {one} {to}", logp_own=both["gain_x"], logp_other=both["gain_y"]))
        if pairs:
            found.append(_split(matched(pd.concat(pairs)), "method", "stage", "to").assign(against=name))
    columns = ["method", "capacity", "stage", "to", "against", *MATCHED[2:]]
    return pd.concat(found, ignore_index=True)[columns] if found else pd.DataFrame(columns=columns)


def _split(table: pandas.DataFrame, *columns: str) -> pandas.DataFrame:
    """``table`` with its column method, several words, as columns of a word each."""
    words = table["method"].str.rsplit(" ", n=len(columns) - 1)
    return table.assign(**{column: words.str[i] for i, column in enumerate(columns)})
