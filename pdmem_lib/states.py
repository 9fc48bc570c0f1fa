"""Hidden states of turns, computed once per backbone and conversation and kept on disk; and the banks made of them.

The states depend on neither method, capacity nor seed, and the bank at a conversation's end does not change between
epochs [C]: the first are cached for all runs, the second computed once a run.
"""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from .backbone import Backbone, use_bf16
from .files import cache_folder, load_tensors, save_tensors
from .locomo import Conversation
from .memory import MemoryModel
from .methods import State

log = logging.getLogger(__name__)
FORMAT = 2  # of the files


class TurnStates(Sequence):
    """The final hidden states (T_i, d) of a conversation's turns, float32, read turn by turn from a mapped file."""

    def __init__(self, file: Path):
        tensors, _ = load_tensors(file)
        if tensors.keys() != {"states", "ends"} or not len(tensors["ends"]):
            raise ValueError(f"{file} holds no hidden states of turns: delete it")
        self._rows, self._ends = tensors["states"], tensors["ends"].tolist()  # (sum of T_i, d), mapped

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, turn: int) -> Tensor:
        if not 0 <= turn < len(self):
            raise IndexError(turn)
        return self._rows[self._ends[turn - 1] if turn else 0 : self._ends[turn]].float()

    @property
    def num_tokens(self) -> int:
        """Σ T_i over the turns."""
        return self._ends[-1]


def turn_states(backbone: Backbone, conversation: Conversation, autocast: bool | str = "auto") -> TurnStates:
    """The conversation's hidden states, from the cache or computed now. A damaged file is made again, and said."""
    bf16 = use_bf16(autocast, backbone.device)
    texts = [str(turn) for turn in conversation.turns]
    if not texts:
        raise ValueError(f"conversation {conversation.id} has no turns: nothing can be written from it, leave it out")
    file = states_file(backbone, texts, bf16)
    try:
        return TurnStates(file)
    except FileNotFoundError:
        pass
    except (ValueError, OSError) as error:
        log.warning("%s is damaged (%s) and is made again", file, error)
    states = backbone.encode(texts, autocast=autocast, progress=False)
    ends = torch.tensor([len(H) for H in states], device="cpu").cumsum(0)
    save_tensors(file, {"states": torch.cat(states).cpu().to(torch.bfloat16 if bf16 else torch.float32), "ends": ends})
    return TurnStates(file)


def states_file(backbone: Backbone, texts: Sequence[str], bf16: bool) -> Path:
    """Where `turn_states` keeps the states of turns of these ``texts``."""
    digest = hashlib.sha256(f"{FORMAT} {backbone.cache_key} {'bf16' if bf16 else 'fp32'}".encode())
    for text in texts:
        digest.update(f"{len(text)} {text}".encode())
    return cache_folder("states", backbone.fingerprint[:16]) / f"{digest.hexdigest()[:32]}.safetensors"


def encode_all(backbone: Backbone, conversations: Iterable[Conversation], progress: bool = True,
               autocast: bool | str = "auto") -> dict[str, TurnStates]:
    """`turn_states` of every conversation, by its id, with a progress bar counted in turns."""
    conversations = list(conversations)
    states = {}
    with tqdm(total=sum(len(c.turns) for c in conversations), desc="hidden states", unit="turn",
              disable=not progress, mininterval=1.0) as bar:
        for conversation in conversations:
            states[conversation.id] = turn_states(backbone, conversation, autocast)
            bar.update(len(conversation.turns))
    return states


def banks_by_session(model: MemoryModel, conversation: Conversation, states: Sequence[Tensor]) -> Iterator[tuple[int, State]]:
    """Write the conversation from P_0; yields (session number, the state after it). ``model.state`` is left alone."""
    state = model.adapter.initial_state()
    for turns in conversation.sessions:
        for turn in turns:
            state = model.adapter.write(state, states[turn.index].to(model.backbone.device))
        yield turns[0].session, state


def final_bank(model: MemoryModel, conversation: Conversation, states: Sequence[Tensor]) -> State:
    """The state after the whole conversation."""
    *_, (_, state) = banks_by_session(model, conversation, states)
    return state
