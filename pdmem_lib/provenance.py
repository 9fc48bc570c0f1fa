"""Provenance: which turn left what in which memory entry, and whether reading finds the turn that holds the answer [D].

Every write has the form ``new = decay * old + increment`` row by row, so the final state is exactly a sum: what P_0 and
each turn added, times the decays that followed. The size of a turn's part in a row is that part's norm, its share the
size over the sum of all sizes. (Sizes do not add up to the norm of the row, since parts may cancel.)

    turns --write_provenance--> shares (M, N)  }
    question --attention to memory--> (L, h, T, M)  } --turn_scores--> (N,) --find_turns--> rank of the evidence turn

`find_turns` compares each question with itself shuffled in two ways: ``chance`` puts the turns in random order, and
``reciprocal_rank_others`` asks for this question's evidence with the scores of the conversation's other questions. The
second holds fixed that recent and long turns weigh more for any question: own minus others is question-specific.
``relative=True`` takes that common part away before ranking.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from . import prompts, seam
from .locomo import Conversation, Question
from .memory import MemoryModel
from .methods import Inputs, Method, State

if TYPE_CHECKING:
    import pandas

log = logging.getLogger(__name__)
COLUMNS = ("conversation", "number", "category", "lag", "turns", "rank", "reciprocal_rank", "chance",
           "reciprocal_rank_others")
BATCH = 8  # questions read at once: their attention to memory is held, (L, 8, h, T, M)


# ---- what each turn left ---------------------------------------------------------------------------------------------


def write_provenance(model: MemoryModel, hidden: Sequence[Tensor]) -> Float[Tensor, "M 1+N"]:
    """Norm of what P_0 (column 0) and each turn t (column 1+t) left in each row of the state after all N turns.

    ``hidden`` are the turns' final hidden states, (T_i, d) each (`states.turn_states`), written from P_0;
    ``model.state`` is left alone. A row is a row of P, or of M for the Hebbian matrix. On the CPU; ValueError for a
    method without a state.

    It is bookkeeping on the writes as they took place. Writing again without turn t gives another bank than taking its
    part away: what came before decays once less, and later turns look for their rows in a changed bank, so that their
    attention weights or choice of slots differ.
    """
    return _trace(model, hidden, lambda rows: rows.norm(dim=-1))[1].cpu()


def write_history(model: MemoryModel, hidden: Sequence[Tensor]) -> Iterator[tuple[State, Float[Tensor, "M 1+n"]]]:
    """The state and `write_provenance` as they stand at the start and after each of the N turns: 1 + N pairs."""
    for state, sizes in _trace_turns(model, hidden, lambda rows: rows.norm(dim=-1)):
        yield state, sizes.cpu()


def entry_provenance(model: MemoryModel, hidden: Sequence[Tensor],
                     questions: Sequence[Tensor]) -> list[Float[Tensor, "T 1+N"]]:
    """`write_provenance` of the entries of a reader that makes them of the question (M.4): one table a question.

    ``questions`` are their frozen states, (T, d) each (``backbone.encode``): entry j is ``(h_j W_QH) M``, linear in M.
    All questions go through one pass over the turns, and one turn's matrix is held at a time. On the CPU;
    ValueError for a method whose entries are the rows of its state.
    """
    return [table.cpu() for table in _trace_entries(model, hidden, questions)[1]]


def shares(sizes: Float[Tensor, "M K"]) -> Float[Tensor, "M K"]:
    """Sizes as fractions of their row's sum, so that rows sum to 1; a row of zeros stays zero."""
    total = sizes.sum(dim=-1, keepdim=True)
    return sizes / torch.where(total > 0, total, 1)


@torch.no_grad()
def _trace_entries(model: MemoryModel, hidden: Sequence[Tensor],
                   questions: Sequence[Tensor]) -> tuple[State, list[Tensor]]:
    if not model.adapter.needs_inputs:
        raise ValueError(f"{model.method} reads the rows of its state, whatever the question: use write_provenance")
    asked = torch.cat(list(questions)).to(model.backbone.device, torch.float32)  # (sum of T, d)
    queries = model.adapter.queries(asked)  # (sum of T, d_h)
    state, sizes = _trace(model, hidden, lambda matrix: (queries @ matrix).norm(dim=-1))
    return state, list(sizes.split([len(H) for H in questions]))


def _trace(model: MemoryModel, hidden: Iterable[Tensor], size: Callable[[Tensor], Tensor]) -> tuple[State, Tensor]:
    """The state after all turns, and the ``size`` (K,) of what P_0 and each turn left in it, (K, 1+N)."""
    ((state, sizes),) = deque(_trace_turns(model, hidden, size), maxlen=1)
    return state, sizes


@torch.no_grad()
def _trace_turns(model: MemoryModel, hidden: Iterable[Tensor],
                 size: Callable[[Tensor], Tensor]) -> Iterator[tuple[State, Tensor]]:
    """`_trace` at the start and after each turn.

    ``size`` must scale with its argument: rows' decays are applied to sizes, so that no part is kept but its size.
    """
    start = model.adapter.initial_state()
    sizes = size(_only_tensor(model, start))[:, None]  # (K, 1)
    yield start, sizes
    for state, decay, added in write_parts(model, hidden):
        if model.adapter.needs_inputs and decay.ndim:
            raise RuntimeError(f"{model.method} mixes rows that decay differently: sizes of its entries cannot be decayed")
        sizes = torch.cat([sizes * decay[..., None], size(added)[:, None]], dim=1)
        yield state, sizes


@torch.no_grad()
def write_parts(model: MemoryModel, hidden: Iterable[Tensor],
                start: State | None = None) -> Iterator[tuple[State, Tensor, Tensor]]:
    """Every write taken apart: the state after each turn, what it kept of the old rows, (M,) or (), and what it added.

    ``new = decay * old + added`` row by row, with ``added`` of the state's own shape; from ``start`` (None: P_0).
    """
    adapter, state = model.adapter, model.adapter.initial_state() if start is None else model.checked(start)
    old = _only_tensor(model, state)
    for H in hidden:
        H = H.to(model.backbone.device, torch.float32)
        decay = adapter.decay(state, H)  # (M,) or ()
        state = adapter.write(state, H)
        new = _only_tensor(model, state)
        yield state, decay, new - decay[..., None] * old
        old = new


def _only_tensor(model: MemoryModel, state: State) -> Tensor:
    if len(state) != 1:
        raise ValueError(f"{model.method} keeps {len(state)} tensors, provenance is traced in exactly one: "
                         "use a method with a bank or a matrix")
    (tensor,) = state.values()
    return tensor


# ---- where a question looks ------------------------------------------------------------------------------------------


def turn_scores(attention: Float[Tensor, "L h T M"], turn_shares: Float[Tensor, "M N"]) -> Float[Tensor, "N"]:
    """How much a question looks at each turn: attention over blocks, heads and tokens, times the turns' shares.

    ``attention`` as `MemoryModel.attention_to_memory` reports it, gates included; ``turn_shares`` are `shares` without
    P_0's column. For M.1 a row's share stands for its soft token in every block, though from the second block on soft
    tokens have mixed. M.2 and M.5 report their branch's softmax, without beta or gate: all blocks count alike.
    """
    return attention.double().sum(dim=(0, 1, 2)) @ turn_shares.to(attention.device, torch.float64)  # (N,)


def find_turns(model: MemoryModel, conversations: Sequence[Conversation], asked: Sequence[tuple[str, int, Question]],
               states: Mapping[str, Sequence[Tensor]], progress: bool = True,
               autocast: bool | str = "auto", relative: bool = False) -> "pandas.DataFrame":
    """Where the evidence turn ranks among the turns that a question looks at: a row a question with usable evidence.

    ``asked`` as from `evaluation.sample_questions`, ``states`` hidden states by conversation id (`states.encode_all`).
    The prompt alone is read, with the conversation's final bank. Columns: conversation, number, category, lag, turns
    (N), and of the best-ranked evidence turn rank (1 = top), reciprocal_rank, chance (its expected value for turns in
    random order), reciprocal_rank_others (mean over the conversation's other questions, with their scores). Ties are
    taken in random order and averaged over, so that a constant score is exactly at chance.

    ``relative`` ranks `relative_scores` instead: where turns differ far more from each other than a turn does from
    question to question, every question ranks them alike, and only the relative scores show what a question adds.

    A question that reads nothing (a silent start) has NaN in rank and reciprocal_rank and takes no part in the others'
    means; without any other question these are NaN. A method that reports no attention to memory (the
    baseline) gives an empty table. Both are said in a warning and in ``.attrs["reason"]``.
    """
    import pandas as pd

    rows: list[dict] = []
    reason = ""
    with model.backbone.autocast(autocast):
        if model.attention_to_memory("?", memory=model.adapter.initial_state()) is None:
            reason = f"{model.method} reports no attention to memory, so it points at no turn"
    if not reason and type(model.adapter).decay is Method.decay:
        reason = f"{model.method} does not say what its write keeps (decay), so no turn can be traced"
    if not reason and len(model.adapter.initial_state()) != 1:
        reason = f"{model.method} keeps several tensors, and turns are traced in exactly one"
    known = {c.id: c for c in conversations}
    groups: dict[str, list[tuple[int, Question]]] = {}
    for id, number, question in asked:
        if id not in known or id not in states:
            raise ValueError(f"a question is of conversation {id!r}: give it and its hidden states too")
        if question.evidence and not reason:
            groups.setdefault(id, []).append((number, question))
    for id, group in groups.items():
        questions = [question for _, question in group]
        scores = _conversation_scores(model, questions, states[id], progress, autocast)  # (Q, N)
        scores = relative_scores(scores) if relative else scores
        evidence = [[known[id].turn(turn).index for turn in q.evidence] for q in questions]
        ranks, reciprocal = _rank_table(scores, evidence)  # (Q, Q): scores of one question, evidence of another
        elsewhere = np.where(np.eye(len(questions), dtype=bool), np.nan, reciprocal)
        counted = np.isfinite(elsewhere).sum(axis=0)  # (Q,)
        others = np.where(counted > 0, np.nansum(elsewhere, axis=0) / np.maximum(counted, 1), np.nan)
        for i, (number, q) in enumerate(group):
            rows.append(dict(conversation=id, number=number, category=q.category, lag=q.lag, turns=scores.shape[1],
                             rank=ranks[i, i], reciprocal_rank=reciprocal[i, i],
                             chance=chance(scores.shape[1], len(evidence[i])),
                             reciprocal_rank_others=others[i]))
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    if silent := int(table["rank"].isna().sum()):
        reason = f"{silent} of {len(table)} questions put no attention on the memory of {model.method}: is it trained?"
    if reason:
        log.warning(reason)
    table.attrs["reason"] = reason
    return table


def relative_scores(scores: np.ndarray) -> np.ndarray:
    """Each question's scores (Q, N), as fractions of its sum, over their mean for the other questions that read.

    1: the question looks at this turn as the others do, or no other looks at it. Differences below 1e-6 are rounding
    and become ties. A row of zeros stays zero.
    """
    total = scores.sum(axis=1, keepdims=True)
    reads = total[:, 0] > 0
    fractions = scores / np.where(total > 0, total, 1)
    others = (fractions.sum(axis=0) - fractions) / max(1, reads.sum() - 1)  # (Q, N)
    ratio = np.divide(fractions, others, out=np.ones_like(fractions), where=others > 0)
    return np.where(reads[:, None], ratio.round(6), 0)


@torch.no_grad()
def _conversation_scores(model: MemoryModel, questions: Sequence[Question], hidden: Sequence[Tensor], progress: bool,
                         autocast: bool | str) -> np.ndarray:
    """`turn_scores` of each question with the bank after all turns, (Q, N)."""
    texts = [prompts.prompt_text(q.question) for q in questions]
    turns = tqdm(hidden, desc="trace turns", unit="turn", disable=not progress, mininterval=1.0, leave=False)
    if model.adapter.needs_inputs:
        frozen = model.backbone.encode(texts, autocast=autocast, progress=False)
        state, sizes = _trace_entries(model, turns, frozen)
    else:
        frozen = []
        state, rows = _trace(model, turns, lambda rows: rows.norm(dim=-1))
        sizes = [rows] * len(texts)
    scores = np.zeros((len(texts), len(hidden)))
    with model.backbone.autocast(autocast):
        for i, attention in tqdm(_attention(model, texts, frozen, state), total=len(texts), desc="find turns",
                                 unit="question", disable=not progress, mininterval=1.0, leave=False):
            scores[i] = turn_scores(attention, shares(sizes[i])[:, 1:]).cpu().numpy()
    return scores


def _attention(model: MemoryModel, texts: Sequence[str], frozen: Sequence[Tensor],
               state: State) -> Iterator[tuple[int, Tensor]]:
    """(i, attention (L, h, T, M) of text i), as `attention_to_memory` gives it, in batches that share what they read.

    ``frozen`` are the texts' frozen states where the method needs inputs.
    """
    backbone, needs_inputs = model.backbone, model.adapter.needs_inputs
    rows = [backbone.token_ids(text) for text in texts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    injection = None if needs_inputs else model.injection(state)
    for batch in (order[a : a + BATCH] for a in range(0, len(order), BATCH)):
        ids, mask = backbone.pad([rows[i] for i in batch], side="right")  # causal: real tokens never see the padding
        if needs_inputs:
            hidden = pad_sequence([frozen[i] for i in batch], batch_first=True)  # (B, T, d)
            injection = model.injection(state, Inputs(hidden, mask.bool()))
        seen: list[Tensor] = []
        for part in [injection] if isinstance(injection, seam.Branch) else injection:
            part.seen = seen
        with seam.inject(backbone.model, injection):
            backbone.model.base_model(ids, use_cache=False)
        for i, attention in zip(batch, torch.stack(seen, dim=1), strict=True):  # (L, h, T, M)
            T = len(rows[i])
            yield i, attention[:, :, :T, :T] if needs_inputs else attention[:, :, :T]


# ---- ranks -----------------------------------------------------------------------------------------------------------


def chance(turns: int, evidence: int) -> float:
    """Expected reciprocal rank of the best of ``evidence`` turns when all ``turns`` stand in random order, exactly."""
    if not 1 <= evidence <= turns:
        raise ValueError(f"{evidence} evidence turns of {turns} turns: give at least one, and no more than there are")
    return _tied_reciprocal_rank(0, turns, evidence)


@cache
def _tied_reciprocal_rank(above: int, tied: int, evidence: int) -> float:
    """Mean of 1 / rank of the first of ``evidence`` among ``tied`` turns in random order, behind ``above`` others.

    The first stands at place j with probability ``P(none before j) * evidence / (tied - j + 1)``.
    """
    place = np.arange(1, tied - evidence + 2)
    left = tied - place + 1  # turns from this place on
    none_before = np.concatenate([[1.0], np.cumprod((left - evidence) / left)[:-1]])
    return float((none_before * evidence / left / (above + place)).sum())


def _rank_table(scores: np.ndarray, evidence: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Rank and reciprocal rank of the best evidence turn: row a the scores (Q, N) of a, column b the evidence of b.

    Means over the order of tied turns; NaN in the row of a question whose scores are all zero.
    """
    ranks, reciprocal = (np.full((len(scores), len(evidence)), np.nan) for _ in range(2))
    reads = np.flatnonzero(scores.any(axis=1))
    for b, turns in enumerate(evidence):
        best = scores[:, turns].max(axis=1, keepdims=True)  # (Q, 1)
        above, tied = (scores > best).sum(axis=1), (scores == best).sum(axis=1)
        marked = (scores[:, turns] == best).sum(axis=1)
        for a in reads:
            ranks[a, b] = above[a] + (tied[a] + 1) / (marked[a] + 1)
            reciprocal[a, b] = _tied_reciprocal_rank(int(above[a]), int(tied[a]), int(marked[a]))
    return ranks, reciprocal
