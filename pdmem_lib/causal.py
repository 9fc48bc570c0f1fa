"""Cause, beside attention: what an answer loses when a turn or an entry is taken out of the memory [D].

Attention says where a reader looked, not what its answer rests on. Here a turn is removed as if it had never been said,
by writing the others again (`editing.forget`), an entry by putting zeros or its start in its place, and the same answer
is scored anew:

    effect = log p(answer | the whole memory) - log p(answer | the memory without it)      (nats, answer token by token)

Above 0: it spoke for the answer. Below: against. Effects of turns need not add up, since what is left is read
differently. How far attention tells the same is a number, `agreement`, with its interval.

All that is long comes as an iterator, so that a caller can show how far it is, and stop by asking for no more.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from . import editing
from .memory import MemoryModel
from .methods import State

BATCH = 16  # memories that an answer is scored under at once
STOOD_FOR = ("initial", "zero")  # what may stand in an entry's place


# ---- memories without something --------------------------------------------------------------------------------------


def without_turns(model: MemoryModel, hidden: Sequence[Tensor], turns: Iterable[int] | None = None,
                  before: Sequence[State] | None = None) -> Iterator[State]:
    """The memory without each of ``turns`` (None: all, in order), exactly: the others are written again.

    ``hidden`` (T_i, d) are the turns' final hidden states. ``before``, the state before each turn where it is at hand,
    saves writing again what came earlier and changes no bit. ValueError for a turn that there is not.
    """
    for turn in range(len(hidden)) if turns is None else turns:
        if before is None or not 0 <= turn < len(hidden):
            yield editing.forget(model, hidden, [turn])
        else:
            yield editing.forget(model, hidden[turn + 1 :], (), start=before[turn])


def without_entries(model: MemoryModel, state: State, entries: Iterable[int] | None = None,
                    stands: str = "initial") -> Iterator[State]:
    """``state`` with each of ``entries`` (None: all, in order) emptied: its row of P_0 in its place, or zeros.

    An entry is a row of the state's tensor, of the matrix too. Zeros are not nothing: a key of zeros still takes
    attention, and only P_0's row is what a reader meets in a memory that was never written there. ValueError for an
    entry that there is not, and for anything else to stand in its place.
    """
    if stands not in STOOD_FOR:
        raise ValueError(f"in an entry's place can stand {' or '.join(map(repr, STOOD_FOR))}, got {stands!r}")
    ((name, rows),) = model.checked(state).items()  # (M, width)
    start = model.adapter.initial_state()[name]
    for entry in range(len(rows)) if entries is None else entries:
        if not 0 <= entry < len(rows):
            raise ValueError(f"there is no entry {entry}: the {len(rows)} entries count from 0")
        emptied = rows.clone()
        emptied[entry] = start[entry] if stands == "initial" else 0
        yield {name: emptied}


# ---- effects ---------------------------------------------------------------------------------------------------------


def effects(model: MemoryModel, question: str, answer: str, whole: State, without: Iterable[State],
            batch: int = BATCH) -> Iterator[Tensor]:
    """What each token of ``answer`` loses under each memory of ``without``, one (T,) each, in nats, on the CPU.

    The tokens are those of `MemoryModel.token_log_probs`, the closing line feed the last; their sum is the effect.
    ``without`` is taken ``batch`` at a time and scored in one pass, in float32: effects may be small.
    """
    if batch < 1:
        raise ValueError(f"batch is a number of memories, at least 1, got {batch}")
    _, (base,) = model.token_log_probs_under([whole], question, answer)
    rest = iter(without)
    while states := list(islice(rest, batch)):
        _, log_probs = model.token_log_probs_under(states, question, answer)  # (batch, T)
        yield from (base - log_probs).float().cpu()


def ranked(values: ArrayLike) -> list[int]:
    """Places of ``values`` (N,), largest first, ties in order."""
    return np.argsort(-np.asarray(values, dtype=float), kind="stable").tolist()


# ---- attention against effect ----------------------------------------------------------------------------------------


class Agreement(NamedTuple):
    """How alike two rankings of ``n`` things are: 1 the same, -1 reversed, NaN where one ranks nothing."""

    spearman: float
    low: float  # 95 % interval of ``spearman``; the whole of [-1, 1] where n says nothing
    high: float
    kendall: float
    n: int


def agreement(scores: ArrayLike, found: ArrayLike) -> Agreement:
    """Rank correlation of two numbers a turn (or an entry), attention (N,) and effect (N,), say.

    Spearman's rho with the interval of Bonett and Wright (2000), ``tanh(atanh rho ± 1.96 sqrt((1 + rho²/2)/(n-3)))``,
    and Kendall's tau-b. Attention is never negative, an effect may be: compare with its size, ``abs(found)``, too.
    """
    from scipy.stats import kendalltau, spearmanr

    scores, found = (np.asarray(values, dtype=float) for values in (scores, found))
    if scores.ndim != 1 or scores.shape != found.shape:
        raise ValueError(f"one number each a turn: got shapes {scores.shape} and {found.shape}")
    n = len(scores)
    if n < 2 or np.ptp(scores) == 0 or np.ptp(found) == 0:
        return Agreement(math.nan, -1.0, 1.0, math.nan, n)
    rho, tau = float(spearmanr(scores, found).statistic), float(kendalltau(scores, found).statistic)
    if n < 4:
        return Agreement(rho, -1.0, 1.0, tau, n)
    nearest = 1 - 12 / (n * (n * n - 1))  # of all rankings that differ; at 1 itself the interval would have no width
    middle, half = math.atanh(min(max(rho, -nearest), nearest)), 1.96 * math.sqrt((1 + rho**2 / 2) / (n - 3))
    return Agreement(rho, min(rho, math.tanh(middle - half)), max(rho, math.tanh(middle + half)), tau, n)
