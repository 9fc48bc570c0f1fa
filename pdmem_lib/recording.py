"""A conversation as a memory took it, turn by turn, kept so that one can go back, ask at any moment, and ask why [D].

    turns --Recording--> states, changes, shares of turns in entries
    Recording.read(question) -> Reading: the answer under own, no and another's memory, what each token gained, what it
                                looked at; Recording.turn_effects(...) -> what it rested on (`causal`)

No widget is made here: `studio_view` shows what these objects hold.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from . import causal, provenance, write
from .memory import MemoryModel
from .prompts import prompt_text
from .methods import SparseSlots, State

CHUNK = 8  # turns that are encoded between two looks at the clock
ROOM = 256_000_000  # bytes of states that are kept; beyond it some are written again when they are asked for
MEMORIES = "own", "off", "other"  # under which a question is asked


class States(Sequence):
    """The state before the first turn and after each: 1 + N of them, of which every k-th is kept."""

    def __init__(self, model: MemoryModel, hidden: Sequence[Tensor]):
        self.model, self.hidden = model, hidden
        start = model.adapter.initial_state()
        self._size = sum(t.nbytes for t in start.values())
        self._kept: dict[int, State] = {0: start}
        self._step, self._count = 1, 1

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, moment: int) -> State:
        moment = range(len(self))[moment]
        at = moment - moment % self._step
        state = self._kept[at]
        for H in self.hidden[at:moment]:
            state = self.model.adapter.write(state, H)
        return state

    def append(self, state: State) -> None:
        """The state after one more turn; beyond `ROOM` every other kept one is let go."""
        if self._count % self._step == 0:
            self._kept[self._count] = state
        self._count += 1
        if len(self._kept) * self._size > ROOM and len(self._kept) > 2:
            self._step *= 2
            self._kept = {at: kept for at, kept in self._kept.items() if at % self._step == 0}

    def pop(self) -> None:
        """Take the last state away."""
        self._count -= 1
        self._kept.pop(self._count, None)


@dataclass
class Reading:
    """A question asked at one moment. Arrays are on the CPU; axes as everywhere: L blocks, h heads, T tokens of the
    answer, M entries, N turns."""

    question: str
    moment: int  # how many turns were written
    answers: dict[str, str]  # memory -> its greedy answer
    answer: str  # the one that is looked at: own memory's, or the one that was given
    tokens: list[str]  # of ``answer``, the closing line feed last
    log_probs: dict[str, Tensor]  # memory -> (T,), nats
    attention: Tensor | None  # (L, h, T, M), None where nothing is read
    shares: Tensor  # (M, N), of the turns in the entries
    entries: list[str] = field(default_factory=list)  # what each entry is

    def gains(self, against: str = "off") -> Tensor:
        """What each token gained by the own memory, (T,), in nats."""
        return self.log_probs["own"] - self.log_probs[against]

    def of_token(self, token: int | None) -> Tensor:
        """The attention behind one token of the answer, or the sum over all for None: (L, h, 1, M)."""
        attention = self._looked()
        return attention.sum(dim=2, keepdim=True) if token is None else attention[:, :, token : token + 1]

    def entry_scores(self, token: int | None, block: int | None = None, head: int | None = None) -> Tensor:
        """How much is read of each entry, (M,): mean over the blocks and heads that are not named."""
        attention = self.of_token(token)[:, :, 0]  # (L, h, M)
        attention = attention if block is None else attention[block : block + 1]
        attention = attention if head is None else attention[:, head : head + 1]
        return attention.mean(dim=(0, 1))

    def by_block_and_head(self, token: int | None, entry: int | None = None) -> Tensor:
        """The attention to all entries together, or to one, (L, h)."""
        attention = self.of_token(token)[:, :, 0]
        return attention.sum(dim=-1) if entry is None else attention[..., entry]

    def turn_scores(self, token: int | None = None) -> Tensor:
        """How much the answer, or one token, looks at each turn (`provenance.turn_scores`), (N,)."""
        return provenance.turn_scores(self.of_token(token), self.shares)

    def _looked(self) -> Tensor:
        if self.attention is None:
            raise ValueError("nothing was read for this answer, so it looked at no entry: use a method with a memory")
        return self.attention


class Recording:
    """``turns`` ("Speaker: text") written into a memory of ``model`` one by one; ``model.state`` is left alone.

    ``hidden``: their final hidden states where they are at hand, (T_i, d) each. ``texts`` and ``hidden`` grow together
    by `extend`; `undo` takes the last turn away again, exactly.
    """

    def __init__(self, model: MemoryModel, turns: Sequence[str] = (), hidden: Sequence[Tensor] | None = None):
        if not model.adapter.initial_state():
            raise ValueError(f"{model.method} has no memory to look into: use one of the methods that write")
        self.model = model
        self.texts: list[str] = []
        self.hidden: list[Tensor] = []
        self.states = States(model, self.hidden)
        self.changes: list[float] = []  # norm of what each turn changed
        self.norms = [_rows(self.states[0]).norm(dim=1).cpu()]  # (M,) at the start and after each turn
        self._sizes: list[Tensor] = [self.norms[0]]  # of what P_0 and each turn added, (M,)
        self._decays: list[Tensor] = []  # what each turn left of the rows, (M,)
        self._written: list[Tensor] = []  # (M,) bool
        if hidden is not None:
            self.take(turns, hidden)
        else:
            for _ in self.extend(turns):
                pass

    def __len__(self) -> int:
        return len(self.texts)

    def extend(self, turns: Sequence[str]) -> Iterator[int]:
        """Encode and write ``turns``, `CHUNK` at a time; yields how many are written, so that one may stop between."""
        turns = [str(turn) for turn in turns]
        for at in range(0, len(turns), CHUNK):
            chunk = turns[at : at + CHUNK]
            self.take(chunk, self.model.backbone.encode(chunk, autocast="auto", progress=False))
            yield at + len(chunk)

    def undo(self) -> str:
        """Take the last turn away, exactly; its text. ValueError where nothing is written."""
        if not self.texts:
            raise ValueError("nothing is written yet: there is no turn to undo")
        for kept in (self.hidden, self.states, self.changes, self.norms, self._sizes, self._decays, self._written):
            kept.pop()
        return self.texts.pop()

    def take(self, turns: Sequence[str], hidden: Sequence[Tensor]) -> None:
        """Write turns whose final hidden states are at hand, (T_i, d) each."""
        start = self.states[-1]
        old = _rows(start)
        for text, H, (state, decay, added) in zip(turns, hidden, provenance.write_parts(self.model, hidden, start),
                                                  strict=True):
            new = _rows(state)
            self._written.append(self._choice(old, H, added).cpu())
            self.changes.append(float((new - old).norm()))
            self.norms.append(new.norm(dim=1).cpu())
            self._sizes.append(added.norm(dim=1).cpu())
            self._decays.append(decay.expand(len(new)).cpu())
            self.texts.append(text)
            self.hidden.append(H)
            self.states.append(state)
            old = new

    def _choice(self, old: Tensor, H: Tensor, added: Tensor) -> Tensor:
        """Which rows the turn wrote, (M,) bool."""
        adapter = self.model.adapter
        if not isinstance(adapter, SparseSlots):
            return added.ne(0).any(dim=1)
        slots = write.sparse_slot_choice(old, H.to(old.device, torch.float32), adapter.write_a, adapter.settings.top_k)
        return torch.zeros(len(old), dtype=torch.bool, device=old.device).index_fill(0, slots, True)

    # ---- what the memory holds ----
    def _until(self, moment: int | None) -> int:
        moment = len(self) if moment is None else moment
        if not 0 <= moment <= len(self):
            raise ValueError(f"there is no moment {moment}: {len(self)} turns are written")
        return moment

    def norm_history(self, moment: int | None = None) -> np.ndarray:
        """The norm of each entry at the start and after each turn, (1+n, M)."""
        return torch.stack(self.norms[: self._until(moment) + 1]).numpy()

    def written(self, moment: int | None = None) -> np.ndarray:
        """Which rows each turn wrote, (n, M) of bool; for slots the chosen ones, else all that changed."""
        rows = self._written[: self._until(moment)]
        return torch.stack(rows).numpy() if rows else np.zeros((0, len(self.norms[0])), bool)

    def left(self, moment: int | None = None) -> Tensor:
        """What the later turns left of what P_0 and each turn added to each row, (M, 1+n), a factor of 0 to 1."""
        n = self._until(moment)
        decays = torch.stack([*self._decays[:n], torch.ones(len(self.norms[0]))], dim=1)  # (M, n+1)
        return decays.flip(1).cumprod(1).flip(1)

    def sizes(self, moment: int | None = None) -> Tensor:
        """`provenance.write_provenance` as it stands after so many turns, (M, 1+n)."""
        n = self._until(moment)
        return torch.stack(self._sizes[: n + 1], dim=1) * self.left(n)

    def shares(self, moment: int | None = None) -> Tensor:
        """The turns' shares in the rows, without P_0's column, (M, n)."""
        return provenance.shares(self.sizes(moment))[:, 1:]

    def kept(self, moment: int | None = None) -> np.ndarray:
        """What is left of each turn, (n,): the norm of its part now over the norm when it was written."""
        n = self._until(moment)
        added = torch.stack(self._sizes[1 : n + 1], dim=1) if n else torch.zeros(len(self.norms[0]), 0)  # (M, n)
        now = self.sizes(n)[:, 1:]
        return (now.norm(dim=0) / added.norm(dim=0).clamp_min(1e-30)).numpy()

    # ---- what a question reads ----
    @torch.no_grad()
    def read(self, question: str, other: State, answer: str | None = None, moment: int | None = None,
             expected: str = "", max_new_tokens: int = 8) -> Reading:
        """Ask at a moment under the own memory, none, and ``other``'s; ``answer`` None looks at the own answer, or at
        the ``expected`` one where the own memory says nothing.

        ValueError for an empty question, and where there is no answer to look at.
        """
        model, n = self.model, self._until(moment)
        if not question.strip():
            raise ValueError("the question is empty: type one, or choose one from the list")
        state = self.states[n]
        (own,), (others,) = model.answers_under([state, other], [question], max_new_tokens)
        (off,) = model.answer([question], max_new_tokens, memory="off")
        looked_at = answer or own or expected
        if not looked_at.strip():
            raise ValueError("the own memory's answer is empty, so there is no token to look at: give an answer")
        tokens, both = model.token_log_probs_under([state, other], question, looked_at)
        _, bare = model.token_log_probs(question, looked_at, "off")
        attention = model.attention_of_answer(question, looked_at, state)
        return Reading(question, n, {"own": own, "off": off, "other": others}, looked_at, tokens,
                       {"own": both[0].float().cpu(), "off": bare.float().cpu(), "other": both[1].float().cpu()},
                       None if attention is None else attention.float(), *self._entries(question, n))

    def _entries(self, question: str, moment: int) -> tuple[Tensor, list[str]]:
        """The turns' shares in the entries that the question reads, (M, N), and what each entry is."""
        backbone, text = self.model.backbone, prompt_text(question)
        if not self.model.adapter.needs_inputs:
            shares = self.shares(moment)
            return shares, [f"entry {i}" for i in range(len(shares))]
        asked = backbone.states_of(backbone.token_ids(text))
        (sizes,) = provenance.entry_provenance(self.model, self.hidden[:moment], [asked])
        return provenance.shares(sizes)[:, 1:], [f"entry {i}, asked with {token!r}"
                                                 for i, token in enumerate(backbone.tokens(text))]

    # ---- what it rests on ----
    def turn_effects(self, reading: Reading, turns: Sequence[int] | None = None, batch: int = causal.BATCH,
                     on_replay: Callable[[], None] = lambda: None) -> Iterator[Tensor]:
        """`causal.effects` of each turn before the reading's moment, (T,) each, by exact replay.

        ``on_replay`` is called after each replay: of a long conversation a batch of them takes seconds.
        """
        def replayed() -> Iterator[State]:
            for state in causal.without_turns(self.model, self.hidden[: reading.moment], turns, self.states):
                on_replay()
                yield state

        return self._effects(reading, replayed(), batch)

    def entry_effects(self, reading: Reading, entries: Sequence[int] | None = None, stands: str = "initial",
                      batch: int = causal.BATCH) -> Iterator[Tensor]:
        """`causal.effects` of each row of the state, (T,) each."""
        without = causal.without_entries(self.model, self.states[reading.moment], entries, stands)
        return self._effects(reading, without, batch)

    def _effects(self, reading: Reading, without: Iterator[State], batch: int) -> Iterator[Tensor]:
        return causal.effects(self.model, reading.question, reading.answer, self.states[reading.moment], without, batch)

    def answer_without(self, reading: Reading, state: State, max_new_tokens: int = 8) -> str:
        """The greedy answer to the same question under another state."""
        return self.model.answer([reading.question], max_new_tokens, memory=state)[0]


def _rows(state: Mapping[str, Tensor]) -> Tensor:
    (rows,) = state.values()
    return rows
