"""How much a trained memory retains, by the published protocol [A, C] and beside it by ours [D].

Every question is answered, greedily and from the question alone, and its gold answer scored, under its conversation's
own bank and under controls that a memory must beat: the state set to zero (the paper's control), the bare frozen model
("off"), the untouched initial state, every other test conversation's bank, a random bank of the same norms, and the own
bank with its entries shuffled where their order should not matter. The frozen model's part depends on no method: it is
computed once and cached.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from . import estimates, metrics, prompts, provenance
from .backbone import Backbone, use_bf16
from .checkpoints import Results, identity_of_asking
from .files import cache_file, cached_rows
from .locomo import CATEGORIES, Conversation, Question, require_own_ids
from .memory import Memory, MemoryModel, required_model
from .methods import State
from .settings import Settings
from .states import banks_by_session, encode_all

if TYPE_CHECKING:
    import pandas

SAMPLE_SEED = 0  # of the question sample: one for all runs, so that every method is asked the same questions
FORMAT = 4  # of the frozen model's cached answers
ROWS = 128  # at once on a CPU (`Backbone.at_once`), a question under one memory each
GUESSES = dict(zero="off", initial="off", random="off", other="own", shuffled="own")  # whose answer is likely a memory's too
MEMORIES = ("own", "zero", "off", "other", "initial", "random", "shuffled")


@dataclass(frozen=True)
class EvaluateSettings(Settings):
    """``None`` means all: every question [C], the knowledge curve after every session [C]."""

    max_new_tokens: int = 24
    batch_size: int = 32  # at most so many questions at once on a CPU
    questions_per_bucket: int | None = None  # ask a seeded sample of at most this many per lag bucket
    knowledge_points: int | None = None  # sessions at which K_s is measured, evenly spread, first and last included
    answered: tuple[str, ...] = MEMORIES  # under which questions are answered too; under all, answers are scored
    memory: str = "own"  # "initial": P_0 stands for every bank, for an adapter that was trained with no memory to read
    autocast: bool | str = "auto"  # bf16 for hidden states and log-probabilities; answers are decoded in float32
    progress: bool = True

    def __post_init__(self):
        super().__post_init__()
        self.require(self.memory in ("own", "initial"), f"memory must be 'own' or 'initial', got {self.memory!r}")
        self.require({"own", "zero", "off"} <= set(self.answered) <= set(MEMORIES),
                     f"answered must hold own, zero and off, and else names of {', '.join(MEMORIES)}; got {self.answered}")
        self.require(self.max_new_tokens >= 1 and self.batch_size >= 1, "max_new_tokens and batch_size must be at least 1")
        self.require(self.questions_per_bucket is None or self.questions_per_bucket >= 1,
                     "questions_per_bucket must be at least 1, or None for all")
        self.require(self.knowledge_points is None or self.knowledge_points >= 2,
                     "knowledge_points must be at least 2 (the first and the last session), or None for all")


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured. ``per_question``: a row a question; ``checkpoints``: its F1 after earlier sessions;
    ``turns``: how high attention to memory ranks its evidence (`provenance.find_turns`); ``earlier``: the seconds that
    killed processes took for what a checkpoint gave."""

    per_question: "pandas.DataFrame"
    checkpoints: "pandas.DataFrame"  # session, conversation, question, f1
    turns: "pandas.DataFrame"
    earlier: float = 0.0

    def forgetting_curve(self) -> "pandas.DataFrame":
        """Retained-memory score by lag bucket: bucket, lag_low, lag_high, n, raw, smoothed (%) [A, C]."""
        return metrics.forgetting_curve(self.per_question["lag"], self.per_question["retained"])

    def knowledge_curve(self) -> "pandas.DataFrame":
        """K_s after session s: session, n, K (%) [A, C]."""
        return metrics.knowledge_curve(self.checkpoints)

    def estimates(self) -> "pandas.DataFrame":
        """Own memory minus every other one, with intervals, p and, for the one that decides, the verdict
        (`estimates.estimates`): contrast, score, unit, effect, low, high, ..."""
        one_run = self.per_question.assign(method="", capacity=0, seed=0)
        return estimates.estimates(one_run).drop(columns=["method", "capacity"])

    def verdict(self) -> str:
        """"remembers", "cannot be told" or "worse", by `estimates.RULE`; "cannot be told" without another conversation."""
        told = self.estimates()["verdict"]
        return next(filter(None, told), estimates.UNTOLD)

    def by_category(self) -> "pandas.DataFrame":
        """Per official category: category, name, n, and in % retained, f1_own, f1_zero, f1_off, locomo_own."""
        columns = ["retained", "f1_own", "f1_zero", "f1_off", "locomo_own"]
        groups = self.per_question.groupby("category")
        table = (100 * groups[columns].mean()).assign(n=groups.size()).reset_index()
        table.insert(1, "name", table["category"].map(CATEGORIES))
        return table[["category", "name", "n", *columns]]

    def summary(self) -> "pandas.DataFrame":
        """One row. F1s, scores and differences in % or percentage points, log-probabilities in nats per token.

        retained_mean: unweighted mean of the smoothed buckets, the paper's printed Mean [C]; retained_weighted: mean
        over questions; retained_without_5: the same without category 5, whose gold is one fixed sentence [D];
        delta_f1: own - zero, unclipped [D]; adapter_tax: off - zero; adapter_benefit: own - off [C]; f1_* and logp_*
        under every memory; locomo_*: the benchmark's own score. The cost of a question: tokens read (prompt and
        memory entries), seconds; and bytes kept per conversation.
        """
        import pandas as pd

        table = self.per_question
        mean = {name: 100 * table[name].mean() for name in table if name.startswith(("f1_", "locomo_"))}
        curve = self.knowledge_curve()
        return pd.DataFrame([{
            "n": len(table),
            "retained_mean": metrics.printed_mean(self.forgetting_curve()),
            "retained_weighted": 100 * table["retained"].mean(),
            "retained_without_5": 100 * table.loc[table["category"] != 5, "retained"].mean(),
            **mean,
            "delta_f1": mean["f1_own"] - mean["f1_zero"],
            "adapter_tax": mean["f1_off"] - mean["f1_zero"],
            "adapter_benefit": mean["f1_own"] - mean["f1_off"],
            "delta_k": metrics.delta_k(curve) if len(curve) else float("nan"),
            **{name: table[name].mean() for name in (*(f"logp_{m}" for m in MEMORIES), "tokens", "seconds", "bytes")},
        }])


def evaluate(model: MemoryModel, conversations: Iterable[Conversation], checkpoint: str | Path | None = None,
             **settings) -> Evaluation:
    """Measure ``model`` on the conversations' questions; keywords as in `EvaluateSettings`.

    With ``checkpoint``, a file, answers and scores are kept there as they are made, texts of the data among them, and a
    killed evaluation of the same weights goes on from there. The file is the caller's to delete.

    ``per_question`` has conversation, number (in the conversation), question, answer, category, lag, session_distance
    (sessions between the earliest evidence and the end; NaN without evidence), evidence_count, answer_type; answer_own,
    answer_zero, answer_off; for every memory of `MEMORIES` f1_* and (own, zero, off) locomo_* in [0, 1] and logp_* in
    nats per answer token; retained; and what a question costs under its own memory: tokens, seconds, bytes. "other" is the mean over the
    other conversations' banks; NaN where there is none, as is "shuffled" where the order of entries counts, and the F1
    of a memory that ``answered`` leaves out.
    ``model.state`` is left alone.
    """
    import pandas as pd

    required_model(model)
    s = EvaluateSettings.from_mapping(settings)
    conversations = require_own_ids(conversations)
    asked = sample_questions(conversations, s.questions_per_bucket)
    if not asked:
        raise ValueError("there is no question to ask: give conversations that have questions")
    _require_scorable(asked)
    prompts.require_fitting(model.backbone, ((id, q) for id, _, q in asked), s.max_new_tokens)
    with_banks = s.memory == "own" and bool(model.adapter.initial_state())
    states = encode_all(model.backbone, conversations, s.progress, s.autocast) if with_banks else {}
    places, final = _write_banks(model, conversations, asked, states, s)
    table = _describe(model, conversations, asked)
    table["answer_off"], table["logp_off"] = frozen_answers(model.frozen, [q for *_, q in asked], s)
    table["f1_off"] = list(map(metrics.token_f1, table["answer_off"], table["answer"]))
    jobs = _jobs(model, asked, final)

    total = sum(len(rows) for _, state, rows in places if state is not None)
    total += sum(len(rows) * (1 + (name in s.answered)) for rows, memories in jobs for name, _ in memories)
    with tqdm(total=total, desc=f"evaluate {model.method}", unit="answer", disable=not s.progress, mininterval=1.0) as bar:
        kept = Results(checkpoint, checkpoint and identity_of_asking(model, conversations, _asked_under(model, places, final), s))
        ask = _Asker(model, asked, s, bar.update, kept)
        for rows, memories in jobs:
            ask.into(table, rows, memories)
        for memory in MEMORIES:
            if f"f1_{memory}" not in table:  # without banks all memories are alike; else this one does not apply
                like = "own" if "f1_own" in table else "off"
                for kind in ("answer", "f1", "logp"):
                    table[f"{kind}_{memory}"] = float("nan") if with_banks else table[f"{kind}_{like}"]
        said, curve = dict(enumerate(table["answer_own"])), []
        for session, state, rows in reversed(places):  # a bank answers mostly as the next session's does: the guess
            if state is not None:
                (answers,) = ask.answers(rows, [state], [said[i] for i in rows])
                said.update(zip(rows, answers, strict=True))
            f1 = map(metrics.token_f1, [said[i] for i in rows], table.loc[rows, "answer"])
            curve.append([dict(session=session, conversation=asked[i][0], question=asked[i][1], f1=value)
                          for i, value in zip(rows, f1, strict=True)])
        checkpoints = [row for place in reversed(curve) for row in place]
    table["retained"] = metrics.retained(table["f1_own"], table["f1_zero"])
    for memory in ("own", "zero", "off"):
        table[f"locomo_{memory}"] = list(map(metrics.locomo_f1, table[f"answer_{memory}"], table["answer"], table["category"]))
    turns = pd.DataFrame(columns=list(provenance.COLUMNS))
    if with_banks:
        turns = provenance.find_turns(model, conversations, asked, states, s.progress, s.autocast, relative=True)
    learnt = pd.DataFrame(checkpoints, columns=["session", "conversation", "question", "f1"])
    return Evaluation(table, learnt, turns, ask.earlier)


def _require_scorable(asked: Sequence[tuple[str, int, Question]]) -> None:
    """ValueError that names the first question whose category or lag has no place in a table, before any is asked."""
    for id, number, q in asked:
        where = f"question {number} of conversation {id!r}"
        if q.category not in CATEGORIES:
            raise ValueError(f"{where} has category {q.category!r}: give it one of {', '.join(map(str, CATEGORIES))}")
        try:
            metrics.bucket_of(q.lag)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where} has lag {q.lag!r}: give the number of turns that follow its evidence") from error


def sample_questions(conversations: Sequence[Conversation],
                     per_bucket: int | None = None) -> list[tuple[str, int, Question]]:
    """(conversation id, question number, question), all or a seeded sample of at most ``per_bucket`` per lag bucket."""
    asked = [(c.id, number, q) for c in conversations for number, q in enumerate(c.questions)]
    if per_bucket is None:
        return asked
    generator = torch.Generator().manual_seed(SAMPLE_SEED)
    kept: dict[str, int] = {}
    chosen = []
    for i in torch.randperm(len(asked), generator=generator, device="cpu").tolist():
        bucket = metrics.bucket_of(asked[i][2].lag)
        if kept.setdefault(bucket, 0) < per_bucket:
            kept[bucket] += 1
            chosen.append(i)
    return [asked[i] for i in sorted(chosen)]


def frozen_answers(backbone: Backbone, questions: Sequence[Question],
                   s: EvaluateSettings) -> tuple[list[str], list[float]]:
    """The bare frozen model's answers and log-probabilities (nats per token) of the gold ones; cached on disk."""
    def asked() -> list[tuple[str, float]]:
        with tqdm(total=2 * len(questions), desc="frozen model", unit="answer", disable=not s.progress,
                  mininterval=1.0) as bar:
            ask = _Asker(MemoryModel(backbone, "baseline"), [("", 0, q) for q in questions], s, bar.update)
            rows = list(range(len(questions)))
            (answers,), (logp,) = ask.answers(rows, ["off"]), ask.log_probs(rows, ["off"])
        return list(zip(answers, logp, strict=True))

    answers, logp = zip(*cached_rows(frozen_file(backbone, questions, s), len(questions), (str, float), asked), strict=True)
    return list(answers), list(logp)


def frozen_file(backbone: Backbone, questions: Sequence[Question], s: EvaluateSettings) -> Path:
    """Where `frozen_answers` keeps them."""
    return cache_file("frozen", [FORMAT, backbone.cache_key, prompts.PROMPT, prompts.ANSWER, s.max_new_tokens,
                                 use_bf16(s.autocast, backbone.device), [[q.question, q.answer] for q in questions]])


Job = tuple[list[int], list[tuple[str, Memory]]]  # rows, and the memories that each is asked under, by name


def _jobs(model: MemoryModel, asked: Sequence[tuple[str, int, Question]], final: dict[str, State]) -> list[Job]:
    """What is asked under which memory, "off" aside; a name that stands twice is measured by its mean.

    Without banks (``final`` is empty) own is P_0 where there is one (memory="initial"); LoRA has no state, and the
    baseline nothing but the frozen model.
    """
    everyone, start = list(range(len(asked))), model.adapter.initial_state()
    if not final:
        own = [("own", start), ("zero", "zero")] if start else [("own", "own")]
        return [(everyone, own)] if model.num_trainable else []
    jobs = []
    for id, own in final.items():
        memories = [("own", own), ("zero", "zero"), ("initial", start), ("random", random_bank(own, model.settings.seed))]
        memories += [("other", state) for other, state in final.items() if other != id]
        if model.adapter.entries_are_a_set:
            memories.append(("shuffled", shuffled_bank(own, model.settings.seed)))
        if rows := [i for i in everyone if asked[i][0] == id]:
            jobs.append((rows, memories))
    return jobs


def random_bank(state: State, seed: int) -> State:
    """Gaussian entries, each of the norm of the entry it stands for [D]; what is no table of entries stays."""
    generator = torch.Generator().manual_seed(seed)

    def like(entries: Tensor) -> Tensor:
        noise = torch.randn(entries.shape, generator=generator, dtype=torch.float32, device="cpu").to(entries.device)
        return noise * (entries.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))

    return {name: like(entries) if entries.ndim > 1 else entries for name, entries in state.items()}


def shuffled_bank(state: State, seed: int) -> State:
    """The same entries in another order [D], one for all tables of as many; what is no table of entries stays."""
    generator = torch.Generator().manual_seed(seed)
    rows = dict.fromkeys(len(t) for t in state.values() if t.ndim > 1)
    orders = {M: torch.randperm(M, generator=generator, device="cpu") for M in rows}
    return {name: t[orders[len(t)].to(t.device)] if t.ndim > 1 else t for name, t in state.items()}


def _describe(model: MemoryModel, conversations: Sequence[Conversation], asked) -> "pandas.DataFrame":
    """A row a question: what it is, and what reading the memory costs it."""
    import pandas as pd

    by_id = {c.id: c for c in conversations}
    state = model.adapter.initial_state()
    entries = 0 if model.adapter.needs_inputs else max((len(t) for t in state.values() if t.ndim > 1), default=0)
    rows = []
    for id, number, q in asked:
        sessions = by_id[id].evidence_sessions(q)
        prompt = len(model.backbone.token_ids(prompts.prompt_text(q.question)))
        rows.append(dict(
            conversation=id, number=number, question=q.question, answer=q.answer, category=q.category, lag=q.lag,
            session_distance=by_id[id].turns[-1].session - sessions[0] if sessions else float("nan"),
            evidence_count=len(q.evidence), answer_type=metrics.answer_type(q.answer),
            seconds=float("nan"), tokens=prompt + (prompt if model.adapter.needs_inputs else entries),  # M.4 reads one entry a prompt token
            bytes=sum(t.numel() * t.element_size() for t in state.values())))
    return pd.DataFrame(rows)


def rounds(names: Sequence[str]) -> Iterator[tuple[str | None, list[int]]]:
    """Which of the memories of these names are asked together, and whose answers theirs are guessed to be (None: no
    guess). Own's come first, as others are guessed from them."""
    for guess in (None, "off", "own"):
        if these := [k for k, name in enumerate(names) if GUESSES.get(name) == guess]:
            yield guess, these


class _Asker:
    """Asks rows of the question table in length-sorted batches, each under several memories at once."""

    def __init__(self, model: MemoryModel, asked: Sequence[tuple[str, int, Question]], s: EvaluateSettings,
                 on_batch: Callable[[int], object], kept: Results | None = None):
        self.model, self.asked, self.s, self.on_batch, self.kept = model, asked, s, on_batch, kept or Results()
        self.seconds = self.earlier = 0.0  # that the last call took, and those that were taken from ``kept``

    def into(self, table: "pandas.DataFrame", rows: list[int], memories: Sequence[tuple[str, Memory]]) -> None:
        """Fill answer_, f1_ and logp_<name> of these rows; a name that stands twice gets the mean (and one's answer)."""
        gold, said = [self.asked[i][2].answer for i in rows], self.said(memories)
        answers = [[]] * len(said)  # memories of rows
        for guess, these in rounds([name for name, _ in said]):
            found = self.answers(rows, [said[k][1] for k in these], guess and list(table.loc[rows, f"answer_{guess}"]))
            if guess is None:
                table.loc[rows, "seconds"] = self.seconds / (len(rows) * len(these))
            for k, each in reversed(list(zip(these, found, strict=True))):  # of two of a name, the first one's stays
                answers[k] = each
                table.loc[rows, f"answer_{said[k][0]}"] = each
        f1 = [list(map(metrics.token_f1, each, gold)) for each in answers]
        logp = self.log_probs(rows, [state for _, state in memories], [name for name, _ in memories])
        for kind, named, values in (("f1", said, f1), ("logp", memories, logp)):  # values: memories of rows
            for name in dict.fromkeys(name for name, _ in memories):
                these = [value for (other, _), value in zip(named, values, strict=True) if other == name]
                table.loc[rows, f"{kind}_{name}"] = np.mean(these, axis=0) if these else float("nan")
        table[[f"answer_{name}" for name, _ in memories if name not in self.s.answered]] = None

    def said(self, memories: Sequence[tuple[str, Memory]]) -> list[tuple[str, Memory]]:
        """Those under which questions are answered, and not only answers scored."""
        return [(name, state) for name, state in memories if name in self.s.answered]

    def _batch_size(self, memories: Sequence[Memory]) -> int:
        return self.model.backbone.at_once(max(1, min(self.s.batch_size, ROWS // len(memories))))

    def answers(self, rows: Sequence[int], memories: Sequence[Memory],
                drafts: Sequence[str] | None = None) -> list[list[str]]:
        """(memories, rows), in float32: in bfloat16 a greedy answer depends on which others are in its batch.

        ``drafts``: a guess a row, which changes no answer (`MemoryModel.answers_under`).
        """
        questions, size = [self.asked[i][2].question for i in rows], self._batch_size(memories)
        return self._once(len(rows), memories, lambda on_batch: self.model.answers_under(
            memories, questions, self.s.max_new_tokens, size, on_batch, drafts=drafts))

    @torch.no_grad()
    def log_probs(self, rows: Sequence[int], memories: Sequence[Memory], names: Sequence[str] = ()) -> list[list[float]]:
        """Log-probability of each gold answer, nats per token, (memories, rows); ValueError where one is not finite."""
        questions, gold = zip(*((self.asked[i][2].question, self.asked[i][2].answer) for i in rows), strict=True)

        def scored(on_batch: Callable[[int], object]) -> list[list[float]]:
            with self.model.backbone.autocast(self.s.autocast):
                score = self.model.scores_under(memories, questions, gold, batch_size=self._batch_size(memories),
                                                on_batch=on_batch)
            if bad := (~score.log_prob.isfinite()).any(dim=1).nonzero().flatten().tolist():  # before it is kept
                raise ValueError(f"under the memory {(names or memories)[bad[0]]!r} an answer's log-probability is not finite, so "
                                 f"what {self.model.method} reads there is not: see what its read makes of such a state "
                                 "(conformance.check)")
            return (score.log_prob / score.tokens).tolist()

        return self._once(len(rows), memories, scored)

    def _once(self, rows: int, memories: Sequence[Memory], make: Callable[[Callable[[int], object]], list]) -> list:
        """What ``make(on_batch)`` finds of so many rows, unless an evaluation that was killed has found it."""
        def on_batch(n: int) -> None:
            self.on_batch(n * len(memories))

        def made() -> tuple[list, float]:
            start = time.perf_counter()
            return make(on_batch), time.perf_counter() - start

        if known := self.kept.known:
            on_batch(rows)
        found, self.seconds = self.kept.of(made)
        self.earlier += self.seconds * known
        return found


def _write_banks(model: MemoryModel, conversations: Sequence[Conversation], asked, states, s: EvaluateSettings):
    """Banks of every conversation at the knowledge curve's checkpoints and at its end.

    Returns (places, final): places is a list of (session, state or None where it is the final one, rows asked there),
    final the last state of each conversation. Without ``states`` nothing is written, and the final one serves for all.
    """
    places = checkpoints(conversations, asked, s.knowledge_points)
    wanted = {(id, held) for id, _, held, _ in places}
    final: dict[str, State] = {}
    kept: dict[tuple[str, int | None], State] = {}
    for c in conversations if states else ():
        for session, state in banks_by_session(model, c, states[c.id]):
            if (c.id, session) in wanted:
                kept[c.id, session] = state
            final[c.id] = state
    return [(number, kept.get((id, held)), rows) for id, number, held, rows in places], final


def _asked_under(model: MemoryModel, places, final: dict[str, State]) -> dict[str, State]:
    """Every bank of `_write_banks` and P_0, which say how ``model`` writes: its write maps are no parameters."""
    earlier = {f"at {i}": state for i, (_, state, _) in enumerate(places) if state is not None}
    return {"initial": model.adapter.initial_state(), **earlier, **{f"of {id}": state for id, state in final.items()}}


def checkpoints(conversations: Sequence[Conversation], asked: Sequence[tuple[str, int, Question]],
                points: int | None = None) -> list[tuple[str, int, int | None, list[int]]]:
    """Where the knowledge curve is measured: (conversation id, session number, last session that its bank then holds,
    rows of ``asked`` whose evidence lies behind). None for that session is the conversation's last one.
    """
    numbers = sorted({turns[0].session for c in conversations for turns in c.sessions})
    if points is not None and points < len(numbers):
        spread = np.linspace(0, len(numbers) - 1, points).round().astype(int)
        numbers = [numbers[i] for i in spread]
    places = []
    for c in conversations:
        sessions = [turns[0].session for turns in c.sessions]
        learnt = {i: max(c.evidence_sessions(q), default=None) for i, (id, _, q) in enumerate(asked) if id == c.id}
        for number in numbers:
            held = max((session for session in sessions if session <= number), default=None)
            rows = [i for i, session in learnt.items() if session is not None and session <= number]
            if rows and held is not None:
                places.append((c.id, number, held if held != sessions[-1] else None, rows))
    return places
