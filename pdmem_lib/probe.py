"""Which words a linear reader finds in what a rule of decay keeps, whatever an adapter has learnt to read [D].

A linear probe (Alain and Bengio 2016): a ridge regression from a token's final hidden state to the token, in closed form, over
the turns of the training conversations. Rule 1 leaves one vector, the decayed sum of all token states (M.1, M.2, M.3, M.5; its
fixed maps can be undone and hide nothing from a linear reader; P_0 is left out). The probe is held against the mean that this
sum is, as against one state, at the stages of `pdmem_lib.oracle`, and a word of the answer is found where few tokens of the
vocabulary score higher. The same words are looked for where they were not written: after the evidence of another question, and
in other conversations. What is found lies there for a linear map to read; what is not, another reader may still find.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .backbone import Backbone
from .locomo import Conversation, Question, require_own_ids
from .methods import State
from .oracle import AGAINST, STAGES, TEXT, Written, answerable, bank_of, controls, evidence_turns
from .states import encode_all

if TYPE_CHECKING:
    import pandas

RIDGE = 30.0  # at states of unit scale; from 1 to 300 LoCoMo's tokens are told as well, to 0.2 points
RARE = 300  # a token that the training turns have so often is no content: names, "the"
FIRST = 100  # a word is found where fewer tokens than this score higher: 2 % of LoCoMo's 5,556


@dataclass(frozen=True)
class Probe:
    """What tells a token from its final state, among the V tokens that it was fitted on."""

    mean: Tensor  # (d,), of the states it was made from
    maps: Tensor  # (d, V)
    places: Tensor  # (tokens of the backbone,): a token's place among the V, or -1
    counts: Tensor  # (V,)

    def scores(self, states: Tensor) -> Tensor:
        """States, or means of them, (..., d) -> how well each token fits, (..., V): to rank them, no probabilities."""
        return (states - self.mean) @ self.maps

    def content(self, tokens: Iterable[int]) -> list[int]:
        """The places of those ``tokens`` that are known and rarer than `RARE`, each once, ascending."""
        known = {int(self.places[token]) for token in tokens} - {-1}
        return sorted(place for place in known if self.counts[place] < RARE)

    def found(self, states: Tensor, places: Sequence[int]) -> float:
        """The share of ``places`` that fewer than `FIRST` others beat, each token by the state that fits it best; (rows, d)."""
        best = self.scores(states).amax(dim=0)  # (V,)
        return sum(int((best > best[place]).sum()) < FIRST for place in places) / len(places)


@torch.no_grad()
def fit(backbone: Backbone, conversations: Iterable[Conversation], progress: bool = True, autocast: bool | str = "auto") -> Probe:
    """The probe of these conversations' turns, in float32, on the CPU."""
    conversations = require_own_ids(conversations)
    states = encode_all(backbone, conversations, progress, autocast)
    X = torch.cat([H.cpu() for c in conversations for H in states[c.id]])  # (N, d)
    tokens = torch.tensor([token for c in conversations for turn in c.turns for token in backbone.token_ids(str(turn))])
    known, place, counts = tokens.unique(return_inverse=True, return_counts=True)
    places = torch.full((backbone.model.get_input_embeddings().num_embeddings,), -1)
    places[known] = torch.arange(len(known))
    mean = X.mean(dim=0)
    X -= mean
    ridge = RIDGE * X.square().mean() * torch.eye(X.shape[1])
    sums = torch.zeros(len(known), X.shape[1]).index_add_(0, place, X)  # (V, d)
    return Probe(mean, torch.linalg.solve(X.T @ X + ridge, sums.T) / counts.sqrt(), places, counts)


@torch.no_grad()
def words_found(probe: Probe, backbone: Backbone, conversations: Iterable[Conversation], stage: str, gamma: float = 0.95,
                seed: int = 42, most: int | None = None, progress: bool = True, autocast: bool | str = "auto") -> pandas.DataFrame:
    """The share of an answer's words that the probe finds at ``stage``: a row a question whose evidence has a rare one of them.

    method ("linear probe"), capacity (1), stage, gamma, conversation, number, category, lag, evidence (turns), words (how many are
    looked for), of_answer (how many rarer words the answer has, said by the evidence or not), found_own, found_neighbour and
    found_other: the same words, elsewhere, as `oracle.ask` has them. At stage "states" each token's state is a row of its own;
    later there is one row. ValueError for a stage at which the evidence is text.
    """
    import pandas as pd

    if stage not in (written := STAGES[len(TEXT):]):
        raise ValueError(f"nothing is written at stage {stage!r}: name one of {', '.join(written)}")
    conversations = require_own_ids(conversations)
    kept = Kept(encode_all(backbone, conversations, progress, autocast), stage, gamma)
    asked, rows = answerable(conversations, most), []
    for own, others in zip(asked, controls(asked, conversations, seed), strict=True):
        c, number, q = own
        told, answer = {token for id in q.evidence for token in backbone.token_ids(str(c.turn(id)))}, backbone.token_ids(f" {q.answer}")
        places = probe.content(told.intersection(answer))
        if not places:
            continue
        found = pd.DataFrame([(name, probe.found(bank_of(kept, own, one)["mean"], places)) for name, one in [("own", own), *others]])
        mean = found.groupby(0)[1].mean()
        rows.append(dict(method="linear probe", capacity=1, stage=stage, gamma=gamma, conversation=c.id, number=number,
                         category=q.category, lag=q.lag, evidence=len(q.evidence), words=len(places),
                         of_answer=len(probe.content(answer)), **{f"found_{name}": mean.get(name) for name in ("own", *AGAINST)}))
    return pd.DataFrame(rows)


class Kept(Written):
    """What a rule of decay ``gamma`` keeps for a question at ``stage``: {"mean": rows to look into, "tokens"}.

    The rows: one, the mean of the states added up, but at "states" one a token, (rows, d). ``states`` as `encode_all` has them.
    """

    def __init__(self, states: Mapping[str, Sequence[Tensor]], stage: str, gamma: float):
        def write(kept: State, H: Tensor) -> State:
            H, faded = H.cpu(), gamma * kept["tokens"]
            tokens = faded + len(H)
            return {"mean": (faded * kept["mean"] + H.sum(dim=0)) / tokens, "tokens": tokens}  # (1, d), (1, 1)

        super().__init__(write, {"mean": torch.zeros(1, 1), "tokens": torch.zeros(1, 1)}, states, stage)

    def of(self, conversation: Conversation, question: Question, instead: Question | None = None) -> State:
        if self.stage != "states":
            return super().of(conversation, question, instead)
        states, turns = self.states[conversation.id], evidence_turns(conversation, instead or question)
        return {"mean": torch.cat([states[turn].cpu() for turn in turns])}
