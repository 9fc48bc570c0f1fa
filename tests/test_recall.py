"""A toy task that needs memory: a fact that the frozen model cannot know is recalled from the bank alone.

An episode is three turns, the middle one telling a random code. The question is asked with the bank in place of the
turns, so nothing but the bank can answer it. The turns around the fact are drawn at random, so that every bank of the
test is new to the adapter. `tiny-gpt2` has random weights and would spend its steps learning what an answer looks like;
so the adapter is trained to rank the four candidate answers (cross-entropy over their log-probabilities). Each step
holds one episode of every code: nearly all of a bank is common to all banks, and a step with more episodes of one code
would teach that common part to answer it.
"""

import math
import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from pdmem_lib.backbone import load_backbone
from pdmem_lib.memory import MemoryModel
from pdmem_lib.methods import METHODS, State

pytestmark = pytest.mark.slow

CODES = "KVZQ"
CHANCE = 1 / len(CODES)
NAMES = ("Ann", "Bob", "Cleo", "Dan")
THINGS = "rain tea bus song train soup lamp park cake shoe bird film road snow milk".split()
PER_CODE = 24  # test episodes a code
LR, MAX_STEPS, WARMUP = 0.03, 130, 5
LEARNT = 0.3  # training stops when the mean loss of the last ten steps is below this (chance: ln 4 = 1.39)


def banks(model: MemoryModel, per_code: int, seed: int) -> list[list[State]]:
    """``per_code`` rows of banks, one bank a code in each row, every one of another random episode."""
    rng = random.Random(seed)

    def small_talk() -> str:
        return f"{rng.choice(NAMES)}: I like {rng.choice(THINGS)}."

    def episode(code: str) -> State:
        model.reset()
        return model.write([small_talk(), f"Ann: The code is {code * 8}.", small_talk()])

    return [[episode(code) for code in CODES] for _ in range(per_code)]


def log_probs(model: MemoryModel, memory: State | str) -> Tensor:
    """Log-probability (codes,) of each code as the answer."""
    return model.score(["What is the code?"] * len(CODES), list(CODES), memory=memory).log_prob


def train(model: MemoryModel) -> None:
    rng = random.Random(0)
    rows = banks(model, per_code=30, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    losses: list[float] = []
    for step in range(MAX_STEPS):
        if len(losses) >= 10 and sum(losses[-10:]) / 10 < LEARNT:
            break
        for group in optimizer.param_groups:
            group["lr"] = LR * min((step + 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * step / MAX_STEPS)))
        losses.append(0.0)
        for code in range(len(CODES)):
            loss = -log_probs(model, rng.choice(rows)[code]).log_softmax(dim=0)[code] / len(CODES)
            loss.backward()
            losses[-1] += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()


@dataclass
class Recalled:
    """Log-probabilities (n, codes) of the candidates after training, on n unseen episodes; ``code`` (n,) is the truth."""

    code: Tensor
    own: Tensor  # reading the episode's own bank
    zero: Tensor  # reading a zero state

    def hits(self, log_probs: Tensor) -> int:
        return int((log_probs.argmax(dim=1) == self.code).sum())

    def log_prob(self, log_probs: Tensor) -> Tensor:
        """Of the right answer, (n,)."""
        return log_probs.gather(1, self.code[:, None])[:, 0]


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("tiny-gpt2", device="cpu")


@pytest.fixture(scope="module", params=METHODS)
def recalled(request, backbone) -> Recalled:
    model = MemoryModel(backbone, request.param)
    train(model)
    test = [bank for row in banks(model, PER_CODE, seed=2) for bank in row]
    with torch.no_grad():
        own = torch.stack([log_probs(model, bank) for bank in test])
        zero = log_probs(model, "zero").expand_as(own)
    return Recalled(torch.arange(len(CODES)).repeat(PER_CODE), own, zero)


def at_least(hits: int, n: int) -> float:
    """Probability of ``hits`` or more among n guesses at chance: one-sided binomial."""
    return sum(math.comb(n, k) * CHANCE**k * (1 - CHANCE) ** (n - k) for k in range(hits, n + 1))


def test_a_fact_is_recalled_above_chance(recalled):
    n, hits = len(recalled.code), recalled.hits(recalled.own)
    assert at_least(hits, n) < 0.001
    assert hits / n > 0.5, f"recall {hits}/{n}: above chance, but hardly"


def test_without_the_right_bank_recall_is_at_chance(recalled):
    n = len(recalled.code)
    assert recalled.hits(recalled.zero) == n * CHANCE  # the same answer whatever the episode was
    row, code = torch.arange(n) // len(CODES), recalled.code
    strangers = (row + 1) * len(CODES) % n + (code + row) % len(CODES)  # another episode; every code meets all alike
    hits = recalled.hits(recalled.own[strangers])
    assert 0.001 < at_least(hits, n) < 0.999, f"recall {hits}/{n} from banks of other episodes"


def test_own_bank_lowers_the_answers_loss(recalled):
    """A bank written from conversation A changes the answer's loss on A after training: by more than another bank does."""
    other = recalled.own.roll(-1, dims=0)  # the next episode's bank, of another code; all ask the same question
    gain = recalled.log_prob(recalled.own) - recalled.log_prob(other)  # nats, paired
    assert gain.mean() - 1.96 * gain.std() / len(gain) ** 0.5 > 0
