"""How much a trained memory retains, by the published protocol [A, C] and beside it by ours [D].

Every question is answered, greedily and from the question alone, with the conversation's own bank, with its state set
to zero (the paper's control), and by the bare frozen model; and its gold answer is scored under these and under the
banks of the other test conversations [D]. The frozen model's part depends on no method: it is computed once and cached.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from . import memory as prompts
from . import metrics
from .backbone import Backbone, use_bf16
from .files import atomic_path, cache_folder
from .locomo import CATEGORIES, Conversation, Question
from .memory import Memory, MemoryModel
from .methods import State
from .settings import Settings
from .states import banks_by_session, encode_all

if TYPE_CHECKING:
    import pandas

log = logging.getLogger(__name__)
SAMPLE_SEED = 0  # of the question sample: one for all runs, so that every method is asked the same questions


@dataclass(frozen=True)
class EvaluateSettings(Settings):
    """``None`` means all: every question [C], the knowledge curve after every session [C]."""

    max_new_tokens: int = 24
    batch_size: int = 32
    questions_per_bucket: int | None = None  # ask a seeded sample of at most this many per lag bucket
    knowledge_points: int | None = None  # sessions at which K_s is measured, evenly spread, first and last included
    autocast: bool | str = "auto"
    progress: bool = True

    def __post_init__(self):
        super().__post_init__()
        self.require(self.max_new_tokens >= 1 and self.batch_size >= 1, "max_new_tokens and batch_size must be at least 1")
        self.require(self.questions_per_bucket is None or self.questions_per_bucket >= 1,
                     "questions_per_bucket must be at least 1, or None for all")
        self.require(self.knowledge_points is None or self.knowledge_points >= 2,
                     "knowledge_points must be at least 2 (the first and the last session), or None for all")


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured. ``per_question``: a row a question; ``checkpoints``: its F1 after earlier sessions."""

    per_question: "pandas.DataFrame"
    checkpoints: "pandas.DataFrame"  # session, conversation, question, f1

    def forgetting_curve(self) -> "pandas.DataFrame":
        """Retained-memory score by lag bucket: bucket, lag_low, lag_high, n, raw, smoothed (%) [A, C]."""
        return metrics.forgetting_curve(self.per_question["lag"], self.per_question["retained"])

    def knowledge_curve(self) -> "pandas.DataFrame":
        """K_s after session s: session, n, K (%) [A, C]."""
        return metrics.knowledge_curve(self.checkpoints)

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
        delta_f1: own - zero, unclipped [D]; adapter_tax: off - zero; adapter_benefit: own - off [C].
        """
        import pandas as pd

        table = self.per_question
        mean = {name: 100 * table[name].mean() for name in ("f1_own", "f1_zero", "f1_off", "locomo_own")}
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
            **{name: table[name].mean() for name in ("logp_own", "logp_other", "logp_zero", "logp_off")},
        }])


def evaluate(model: MemoryModel, conversations: Sequence[Conversation], **settings) -> Evaluation:
    """Measure ``model`` on the conversations' questions; keywords as in `EvaluateSettings`.

    ``per_question`` has conversation, number (in the conversation), question, answer, category, lag, answer_own,
    answer_zero, answer_off, f1_* in [0, 1], retained, locomo_own, logp_own, logp_zero, logp_off and logp_other (mean
    over the other conversations' banks; NaN where there is no other), in nats per answer token. ``model.state`` is
    left alone.
    """
    import pandas as pd

    s = EvaluateSettings.from_mapping(settings)
    asked = sample_questions(conversations, s.questions_per_bucket)
    if not asked:
        raise ValueError("there is no question to ask: give conversations that have questions")
    places, banks = _write_banks(model, conversations, asked, s)
    final = {c.id: banks[c.id][-1][1] for c in conversations}
    stateless = not model.adapter.initial_state()
    others = [] if stateless else [(c.id, o.id) for c in conversations for o in conversations if c.id != o.id]
    own = {c.id: [i for i, (id, _, _) in enumerate(asked) if id == c.id] for c in conversations}
    later = [] if stateless else [place for place in places if place[1] is not None]  # these need answers of their own
    total = sum(len(rows) for _, _, rows in later) + sum(len(own[id]) for id, _ in others) + (
        0 if stateless else 4 * len(asked))
    with tqdm(total=total, desc=f"evaluate {model.method}", unit="answer", disable=not s.progress, mininterval=1.0) as bar:
        ask = _Asker(model, asked, s, bar.update)
        table = pd.DataFrame([dict(conversation=id, number=number, question=q.question, answer=q.answer,
                                   category=q.category, lag=q.lag) for id, number, q in asked])
        table["answer_off"], table["logp_off"] = frozen_answers(model.backbone, [q for *_, q in asked], s)
        for memory in ("own", "zero"):
            if stateless:
                table[f"answer_{memory}"], table[f"logp_{memory}"] = table["answer_off"], table["logp_off"]
                continue
            jobs = [(rows, final[id]) for id, rows in own.items() if rows]
            if memory == "zero":  # one state for all conversations
                jobs = [(list(range(len(asked))), "zero")]
            for rows, state in jobs:
                table.loc[rows, f"answer_{memory}"] = ask.answers(rows, state)
                table.loc[rows, f"logp_{memory}"] = ask.log_probs(rows, state)
        logp_other = {id: [ask.log_probs(own[id], final[o]) for c, o in others if c == id] for id in final}
        table["logp_other"] = table["logp_off"] if stateless else float("nan")
        for id, each in logp_other.items():
            if each:
                table.loc[own[id], "logp_other"] = np.mean(each, axis=0)
        for memory in ("own", "zero", "off"):
            table[f"f1_{memory}"] = list(map(metrics.token_f1, table[f"answer_{memory}"], table["answer"]))
        table["retained"] = metrics.retained(table["f1_own"], table["f1_zero"])
        table["locomo_own"] = list(map(metrics.locomo_f1, table["answer_own"], table["answer"], table["category"]))

        checkpoints = []
        for session, state, rows in places:
            f1 = table.loc[rows, "f1_own"]
            if state is not None and not stateless:
                f1 = list(map(metrics.token_f1, ask.answers(rows, state), table.loc[rows, "answer"]))
            checkpoints += [dict(session=session, conversation=asked[i][0], question=asked[i][1], f1=value)
                            for i, value in zip(rows, f1, strict=True)]
    return Evaluation(table, pd.DataFrame(checkpoints, columns=["session", "conversation", "question", "f1"]))


def sample_questions(conversations: Sequence[Conversation],
                     per_bucket: int | None = None) -> list[tuple[str, int, Question]]:
    """(conversation id, question number, question), all or a seeded sample of at most ``per_bucket`` per lag bucket."""
    asked = [(c.id, number, q) for c in conversations for number, q in enumerate(c.questions)]
    if per_bucket is None:
        return asked
    generator = torch.Generator().manual_seed(SAMPLE_SEED)
    kept: dict[str, int] = {}
    chosen = []
    for i in torch.randperm(len(asked), generator=generator).tolist():
        bucket = metrics.bucket_of(asked[i][2].lag)
        if kept.setdefault(bucket, 0) < per_bucket:
            kept[bucket] += 1
            chosen.append(i)
    return [asked[i] for i in sorted(chosen)]


def frozen_answers(backbone: Backbone, questions: Sequence[Question],
                   s: EvaluateSettings) -> tuple[list[str], list[float]]:
    """The bare frozen model's answers and log-probabilities (nats per token) of the gold ones; cached on disk."""
    key = json.dumps([backbone.fingerprint, prompts.PROMPT, prompts.ANSWER, s.max_new_tokens,
                      use_bf16(s.autocast, backbone.device), [[q.question, q.answer] for q in questions]])
    file = cache_folder("frozen") / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    try:
        known = json.loads(file.read_text())
        if not len(known["answers"]) == len(known["logp"]) == len(questions):
            raise ValueError("it holds another number of answers")
        return known["answers"], known["logp"]
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged (%s) and is made again", file, error)
    with tqdm(total=2 * len(questions), desc="frozen model", unit="answer", disable=not s.progress,
              mininterval=1.0) as bar:
        ask = _Asker(MemoryModel(backbone, "baseline"), [("", 0, q) for q in questions], s, bar.update)
        rows = list(range(len(questions)))
        answers, logp = ask.answers(rows, "off"), ask.log_probs(rows, "off")
    with atomic_path(file) as partial:
        partial.write_text(json.dumps({"answers": answers, "logp": logp}))
    return answers, logp


class _Asker:
    """Asks rows of the question table in length-sorted batches that share one memory."""

    def __init__(self, model: MemoryModel, asked: Sequence[tuple[str, int, Question]], s: EvaluateSettings,
                 on_batch: Callable[[int], object]):
        self.model, self.asked, self.s, self.on_batch = model, asked, s, on_batch

    def answers(self, rows: Sequence[int], memory: Memory) -> list[str]:
        with self.model.backbone.autocast(self.s.autocast):
            return self.model.answer([self.asked[i][2].question for i in rows], self.s.max_new_tokens, memory,
                                     self.s.batch_size, self.on_batch)

    @torch.no_grad()
    def log_probs(self, rows: Sequence[int], memory: Memory) -> list[float]:
        """Log-probability of each gold answer, nats per token."""
        order = sorted(rows, key=lambda i: len(self.asked[i][2].question) + len(self.asked[i][2].answer))
        value: dict[int, float] = {}
        with self.model.backbone.autocast(self.s.autocast):
            for batch in (order[a : a + self.s.batch_size] for a in range(0, len(order), self.s.batch_size)):
                score = self.model.score([self.asked[i][2].question for i in batch],
                                         [self.asked[i][2].answer for i in batch], memory)
                value.update(zip(batch, (score.log_prob / score.tokens).tolist(), strict=True))
                self.on_batch(len(batch))
        return [value[i] for i in rows]


def _write_banks(model: MemoryModel, conversations: Sequence[Conversation], asked, s: EvaluateSettings):
    """Banks of every conversation at the knowledge curve's checkpoints and at its end.

    Returns (places, banks): places is a list of (session, state or None for the final one, rows asked there), banks
    the kept (session, state) of each conversation, the final one last.
    """
    stateless = not model.adapter.initial_state()
    states = {} if stateless else encode_all(model.backbone, conversations, s.progress, s.autocast)
    numbers = sorted({turns[0].session for c in conversations for turns in c.sessions})
    if s.knowledge_points is not None and s.knowledge_points < len(numbers):
        spread = np.linspace(0, len(numbers) - 1, s.knowledge_points).round().astype(int)
        numbers = [numbers[i] for i in spread]
    banks: dict[str, list[tuple[int, State]]] = {}
    places: list[tuple[int, State | None, list[int]]] = []
    for c in conversations:
        if stateless:
            after = [(turns[0].session, {}) for turns in c.sessions]
        else:
            after = list(banks_by_session(model, c, states[c.id]))
        last = after[-1][0]
        held = {number: max((session for session, _ in after if session <= number), default=None) for number in numbers}
        banks[c.id] = [(session, state) for session, state in after if session in held.values() or session == last]
        by_session = dict(banks[c.id])
        learnt = {i: max(c.evidence_sessions(q), default=None) for i, (id, _, q) in enumerate(asked) if id == c.id}
        for number in numbers:
            rows = [i for i, session in learnt.items() if session is not None and session <= number]
            if rows and held[number] is not None:
                places.append((number, None if held[number] == last else by_session[held[number]], rows))
    return places, banks
