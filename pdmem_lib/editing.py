"""Editing a memory: what differs between two states, two users' memories as one, a turn forgotten, and the price [D].

A state is the sum of what its start and every turn left in it (`provenance`), so what was written apart can be added;
a turn is forgotten exactly by writing the others again, and approximately by taking its part away. `cost` measures what
an edit does to what else is known. Nothing here is trained, and ``model.state`` is left alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .memory import MemoryModel
from .methods import AttentionCoupledBank, HebbianMatrix, SparseSlots, State

if TYPE_CHECKING:
    import pandas


def diff(a: State, b: State) -> "pandas.DataFrame":
    """What changed from ``a`` to ``b``, a row an entry (a row of P or M).

    Columns: tensor, entry, norm_a, norm_b, change (norm of the difference), cosine of the two (NaN for a zero entry).
    Entries that nothing has touched have change 0. ValueError for states of different shapes.
    """
    import pandas as pd

    shapes = [{name: tuple(t.shape) for name, t in state.items()} for state in (a, b)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"one state holds {shapes[0]}, the other {shapes[1]}: compare states of one method and "
                         "capacity")
    tables = []
    for name in a:
        one, other = (state[name].detach().float().cpu().flatten(1) for state in (a, b))  # (M, width)
        norms = one.norm(dim=1), other.norm(dim=1)
        tables.append(pd.DataFrame(dict(tensor=name, entry=range(len(one)), norm_a=norms[0], norm_b=norms[1],
                                        change=(other - one).norm(dim=1),
                                        cosine=(one * other).sum(dim=1) / (norms[0] * norms[1]))))
    columns = ["tensor", "entry", "norm_a", "norm_b", "change", "cosine"]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)


@torch.no_grad()
def merge(model: MemoryModel, a: State, b: State, turns: tuple[int, int], start: State | None = None) -> State:
    """One memory of two that were written apart, by ``turns`` turns each, from one ``start`` (None: P_0) [D].

    Attention-coupled: ``(a - gamma^n_a start) + (b - gamma^n_b start) + gamma^max(n) start``: what either's turns left,
    and the start once. It is the memory of two conversations that ended at the same moment, so that the last turn of
    either is the youngest. It is not the state of one conversation with all turns in it: there the turns of the one
    would have aged those of the other, and would have moved the rows that the other's tokens were sent to.

    Hebbian: the same sum, put back under the norm bound ``M / max(||M||_F, 1)``. Writes do not look at the matrix, so
    below the bound that sum is the only difference to one conversation. Where a conversation reached the bound, its
    start had faded more than gamma^n says: by at most ``gamma^n ||start||``, 0.02 gamma^n for P_0.

    Slots: a slot is an average of the turns sent to it, and of two averages the sum means nothing. Slots that one of
    the two wrote are taken from it. Where both wrote the same slot: ValueError, as for a method of no known write rule,
    for numbers of turns that are negative, and for states that do not fit the model.
    """
    a, b = model.checked(a), model.checked(b)
    start = model.adapter.initial_state() if start is None else model.checked(start)
    if len(turns) != 2 or min(turns) < 0:
        raise ValueError("turns are how many were written to either from the start, two numbers of at least 0; got "
                         f"{turns}")
    family, gamma = model.adapter, model.settings.gamma
    if isinstance(family, SparseSlots) and len(start) == 1:
        return {"P": _merged_slots(a["P"], b["P"], start["P"])}
    if not isinstance(family, AttentionCoupledBank | HebbianMatrix) or len(start) != 1:
        raise ValueError(f"no meaning is known for the sum of two states of {model.method}: write all turns into one "
                         "memory, or say what merging means for its write family here")
    ((name, old),) = start.items()
    merged = a[name] + b[name] + (gamma ** max(turns) - gamma ** turns[0] - gamma ** turns[1]) * old
    if isinstance(family, HebbianMatrix):
        merged = merged / merged.norm().clamp_min(1.0)
    return {name: merged}


def _merged_slots(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    """Each slot (S, d) from the one that wrote it; a slot is written where it differs from the start."""
    by_a, by_b = ((P != start).any(dim=1) for P in (a, b))  # (S,)
    if both := (by_a & by_b).nonzero().flatten().tolist():
        shown = ", ".join(map(str, both[:8])) + (" ..." if len(both) > 8 else "")
        raise ValueError(f"both wrote {len(both)} of the same slots ({shown}), and the sum of two averages means "
                         "nothing: write the turns of both into one memory (write_hidden), or merge memories of "
                         "another method")
    return torch.where(by_b[:, None], b, a)  # (S, d)


@torch.no_grad()
def forget(model: MemoryModel, hidden: Sequence[Tensor], turns: Iterable[int], start: State | None = None) -> State:
    """The state after the conversation without ``turns`` (numbers from 0): exact, by writing the others again [D].

    ``hidden`` are the final hidden states of all turns, (T_i, d) each, written from ``start`` (None: P_0). Exact means
    that the state is, bit for bit, that of a memory which was never told these turns: no trace of them is left to find.
    It is not the old state less their part (`provenance.write_provenance`). What came before them has decayed once less
    a turn, and later turns may go to other rows or slots, as these look for their place in another bank. The price is
    one pass over the turns and keeping their hidden states. ValueError for a turn that there is not.
    """
    gone = set(turns)
    if unknown := sorted(gone - set(range(len(hidden)))):
        raise ValueError(f"there is no turn {unknown[0]}: the {len(hidden)} turns count from 0")
    state = model.adapter.initial_state() if start is None else model.checked(start)
    for i, H in enumerate(hidden):
        if i not in gone:
            state = model.adapter.write(state, H.to(model.backbone.device, torch.float32))
    return state


@torch.no_grad()
def take_away(model: MemoryModel, state: State, hidden: Sequence[Tensor], since: Sequence[int]) -> State:
    """``state`` less the parts of turns, ``hidden`` (T_i, d) each, where the other turns are not at hand [D].

    ``since``: how many turns were written after each. Approximate, in three ways: what came before a turn stays faded
    once too often; the part is what the turn would add to the present bank, not to that of its time; at the Hebbian
    norm bound parts have faded more than gamma says. ValueError for slots, where the rows that a turn went to can only
    be told from the bank of its time, and for a method of no known write rule.
    """
    family, gamma = model.adapter, model.settings.gamma
    if not isinstance(family, AttentionCoupledBank | HebbianMatrix) or len(state) != 1:
        raise ValueError(f"what a turn left in a memory of {model.method} cannot be told from the turn alone: keep the "
                         "texts of all turns, which forgets exactly")
    ((name, present),) = model.checked(state).items()
    left = present.clone()
    for H, later in zip(hidden, since, strict=True):
        H = H.to(present.device, torch.float32)
        added = family.write({name: present}, H)[name] - family.decay({name: present}, H) * present
        left -= gamma**later * added
    return {name: left}


@torch.no_grad()
def cost(model: MemoryModel, memories: Mapping[str, State], facts: Sequence[tuple[str, str]]) -> "pandas.DataFrame":
    """What an edit costs: how likely each fact's answer is under each of several memories, a row a fact.

    ``facts`` are (question, answer). Columns: question, answer, for each memory the answer's log-probability (nats,
    closing line feed included), and change, that of the last memory minus that of the first.
    """
    import pandas as pd

    table = pd.DataFrame(list(facts), columns=["question", "answer"])
    if len(table) and memories:
        scores = model.scores_under(list(memories.values()), *(table[name].tolist() for name in table)).log_prob
        table = table.assign(**dict(zip(memories, scores.float().cpu().numpy(), strict=True)))
        names = list(memories)
        table["change"] = table[names[-1]] - table[names[0]]
    return table
