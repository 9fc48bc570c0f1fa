"""What a bank holds once a whole conversation is written: how many directions, and how much of them is its own [D].

Nothing that is trained takes part in writing, so these are facts of a write rule, a seed and a backbone, known before any
training: a bank whose rows all lie along one line holds one vector, whatever its capacity, and a bank that points where
every other conversation's does can tell a reader little of its own.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .backbone import Backbone
from .locomo import Conversation
from .memory import MemoryModel
from .methods import method_name
from .states import encode_all, final_bank

if TYPE_CHECKING:
    import pandas

WRITERS = ("kv_extension", "hebbian", "slot")  # one method a write rule: M.1, M.2, M.3 and M.5 share the first


def effective_rank(bank: Tensor) -> float:
    """exp of the entropy of the singular values of (M, d) as shares of their sum (Roy and Vetterli, 2007).

    1 where all rows lie along one line, M where they are orthogonal and of one length; 0 for only zeros.
    """
    values = torch.linalg.svdvals(bank.detach().double().cpu())
    parts = values[values > 0] / values.sum().clamp_min(1e-300)
    return float(torch.exp(-(parts * parts.log()).sum())) if len(parts) else 0.0


def row_spread(bank: Tensor) -> float:
    """Mean distance of the rows of (M, d) from their mean row, over the mean length of a row: 0 where all are copies."""
    bank = bank.detach().double()
    return float((bank - bank.mean(dim=0)).norm(dim=1).mean() / bank.norm(dim=1).mean().clamp_min(1e-300))


def bank_table(backbone: Backbone, conversations: Sequence[Conversation], methods: Iterable[str] = WRITERS,
               capacities: Iterable[int] = (1, 10), seeds: Iterable[int] = (42,), centred: bool = False,
               progress: bool = True) -> "pandas.DataFrame":
    """The banks after whole conversations: a row a method, capacity, seed and conversation.

    rows (M), effective_rank and row_spread as above, and cosine: between this bank and another conversation's, as a
    reader has them (rows at unit length; M.4's matrix as it is), mean over the others, NaN without one. ``centred``: what
    is written is each hidden state less the mean state of the other conversations, to see what that mean does; no method
    of the study writes so, and a single conversation has no such mean (ValueError).
    """
    import pandas as pd

    states: Mapping[str, Sequence[Tensor]] = encode_all(backbone, conversations, progress)
    if centred:
        states = _centred(states)
    table = []
    for method in map(method_name, methods):
        for capacity in capacities:
            for seed in seeds:
                model = MemoryModel(backbone, method, capacity, seed)
                banks = {}
                for c in conversations:
                    (banks[c.id],) = final_bank(model, c, states[c.id]).values()
                read = {id: bank if model.adapter.needs_inputs else torch.nn.functional.normalize(bank, dim=1)
                        for id, bank in banks.items()}
                for id, bank in banks.items():
                    others = [torch.cosine_similarity(read[id].flatten(), read[other].flatten(), dim=0).item()
                              for other in read if other != id]
                    table.append(dict(method=method, capacity=capacity, seed=seed, centred=centred, conversation=id, rows=len(bank),
                                      effective_rank=effective_rank(bank), row_spread=row_spread(bank),
                                      cosine=sum(others) / len(others) if others else float("nan")))
    return pd.DataFrame(table)


def _centred(states: Mapping[str, Sequence[Tensor]]) -> dict[str, list[Tensor]]:
    """Every hidden state less the mean over the tokens of all other conversations."""
    if len(states) < 2:
        raise ValueError("one conversation has no others whose mean state could be taken away: give two or more")
    sums = {id: torch.stack([H.sum(dim=0) for H in turns]).sum(dim=0) for id, turns in states.items()}  # (d,)
    tokens = {id: sum(len(H) for H in turns) for id, turns in states.items()}
    total, count = sum(sums.values()), sum(tokens.values())
    return {id: [H - (total - sums[id]) / (count - tokens[id]) for H in turns] for id, turns in states.items()}
