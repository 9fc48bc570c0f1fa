"""Training the adapter, "Type 1" [C]: write a conversation, then ask its questions.

Only θ_mem moves. The banks are fixed maps of frozen states, so they are computed once; each step reads one
conversation's bank for a batch of its questions.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from .backbone import length_sorted_batches
from .checkpoints import COLUMNS, Checkpoint, identity
from .locomo import Conversation, Question, require_own_ids
from .memory import MemoryModel, required_model
from .methods import State
from .prompts import list_of_texts, prompt_texts, require_fitting, target_ids
from .settings import SEEDS, Settings, whole_number
from .states import encode_all, final_bank

if TYPE_CHECKING:
    import pandas


STEP_TOKENS = 2048  # of the rows that are trained on at once, padding included: sixteen long texts on SmolLM2 had taken 20 GB


@dataclass(frozen=True)
class TrainSettings(Settings):
    """Defaults are the published protocol [C]; ``max_questions``, ``memory`` and ``autocast`` are ours [D]."""

    epochs: int = 10
    batch_size: int = 16  # questions a step
    lr: float = 1e-4
    weight_decay: float = 1e-2
    warmup_steps: int = 200  # linear, then cosine to zero over the remaining steps
    clip: float = 1.0  # largest gradient norm
    seed: int = 42  # of the data order
    max_questions: int | None = None  # train on a seeded sample of this many; None: all
    memory: str = "own"  # "initial": every question reads the untouched P_0, which teaches the answers' format alone
    autocast: bool | str = "auto"  # bf16 where the processor computes in it
    progress: bool = True

    def __post_init__(self):
        super().__post_init__()
        self.require(self.epochs >= 1 and self.batch_size >= 1, "epochs and batch_size must be at least 1")
        self.require(0 < self.lr < math.inf and self.clip > 0, "lr and clip must be above 0, and lr finite")
        self.require(self.warmup_steps >= 0 and 0 <= self.weight_decay < math.inf,
                     "warmup_steps and weight_decay must be finite and cannot be negative")
        whole_number("seed", self.seed, *SEEDS)
        self.require(self.max_questions is None or self.max_questions >= 1, "max_questions must be at least 1, or None")
        self.require(self.memory in ("own", "initial"), f"unknown memory {self.memory!r}: known are 'own' (the bank "
                     "that the conversation wrote) and 'initial' (P_0)")


@torch.inference_mode(False)
@torch.enable_grad()
def train(model: MemoryModel, conversations: Iterable[Conversation], on_step: Callable[[int], None] | None = None,
          checkpoint: str | Path | None = None, checkpoint_every: float = 60.0, **settings) -> "pandas.DataFrame":
    """Train ``model``'s adapter on the conversations' questions; keywords as in `TrainSettings`.

    ``on_step(step)`` is called after each step, from 0, to watch the adapter change. With ``checkpoint``, a file,
    training is kept there every ``checkpoint_every`` seconds (0: after every step) and at its end, and goes on from
    there if the file is there: to the weights and the history, but for its seconds, that it would have had. The file
    is the caller's to delete. A damaged one is said and training starts anew; one of another training is a ValueError.

    Returns the history, a row a step: step, epoch, loss (nats per answer token), lr, grad_norm (before clipping),
    seconds (since the start, killed processes' included; ``.attrs["earlier"]`` are theirs). ``model.state`` is left
    alone. The baseline has nothing to train: its history is empty.
    """
    import pandas as pd

    required_model(model)
    s = TrainSettings.from_mapping(settings)
    generator = torch.Generator().manual_seed(s.seed)
    questions = training_questions(require_own_ids(conversations), s, generator)
    require_fitting(model.backbone, ((c.id, q) for c, q in questions))
    rows: list[dict] = []
    earlier = 0.0
    parameters = model.parameters()
    if parameters:
        used = {c.id: c for c, _ in questions}
        banks = dict.fromkeys(used, model.adapter.initial_state())
        if s.memory == "own" and model.adapter.initial_state():  # else there is nothing to write
            states = encode_all(model.backbone, used.values(), s.progress, s.autocast)
            banks = {id: final_bank(model, c, states[id]) for id, c in used.items()}
        lengths = [len(model.backbone.token_ids(f"{q.question} {q.answer}")) for _, q in questions]
        ids = [c.id for c, _ in questions]

        total = num_steps(ids, s)
        optimizer = torch.optim.AdamW([dict(params=parameters, initial_lr=s.lr)], lr=s.lr, weight_decay=s.weight_decay,
                                      fused=True)
        kept = None
        if checkpoint is not None:
            run = identity(model, used.values(), banks, s)
            kept = Checkpoint(checkpoint, checkpoint_every, run, parameters, optimizer)
            rows = kept.restore()
            earlier = rows[-1]["seconds"] if rows else 0.0
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _schedule(step, s.warmup_steps, total),
                                                      last_epoch=len(rows) - 1)
        batches = ((epoch, batch) for epoch in range(s.epochs)
                   for batch in epoch_batches(ids, lengths, s.batch_size, generator))
        start = time.perf_counter() - earlier
        with tqdm(total=total, initial=len(rows), desc=f"train {model.method}", unit="step", disable=not s.progress,
                  mininterval=1.0) as bar:
            for epoch, batch in islice(batches, len(rows), None):
                lr = scheduler.get_last_lr()[0]
                loss, grad_norm = take_step(model, optimizer, [questions[i][1] for i in batch], banks[ids[batch[0]]], s)
                scheduler.step()
                rows.append(dict(step=len(rows), epoch=epoch, loss=loss, lr=lr, grad_norm=grad_norm,
                                 seconds=time.perf_counter() - start))
                if kept:
                    kept.keep(rows, now=len(rows) == total)
                if on_step:
                    on_step(rows[-1]["step"])
                bar.set_postfix(loss=f"{rows[-1]['loss']:.2f}", refresh=False)
                bar.update()
    history = pd.DataFrame(rows, columns=list(COLUMNS))
    history.attrs["earlier"] = earlier
    return history


def take_step(model: MemoryModel, optimizer: torch.optim.Optimizer, questions: Sequence[Question], bank: State,
              s: TrainSettings) -> tuple[float, float]:
    """One step on questions that read ``bank``: the loss (nats per answer token), and the gradient's norm before clipping."""
    with model.backbone.autocast(s.autocast):
        loss = model.loss([q.question for q in questions], [q.answer for q in questions], memory=bank)
    return descend([loss], optimizer, model.parameters(), s.clip)


def descend(losses: Iterable[Tensor], optimizer: torch.optim.Optimizer, parameters: Sequence[torch.nn.Parameter],
            clip: float) -> tuple[float, float]:
    """One step down the sum of ``losses``: that sum, and its gradient's norm before it is clipped to ``clip``.

    Of losses that are made as they are asked for, one at a time is held. RuntimeError where the norm is not finite. No
    gradient is left, and one that a look at it had left takes no part.
    """
    optimizer.zero_grad()
    total = 0.0
    for loss in losses:
        loss.backward()
        total += loss.item()
    grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, clip))
    if not math.isfinite(grad_norm):
        raise RuntimeError(f"the gradient's norm is {grad_norm}, training does not converge: try a lower learning rate")
    optimizer.step()
    optimizer.zero_grad()
    return total, grad_norm


def training_questions(conversations: Sequence[Conversation], s: TrainSettings,
                       generator: torch.Generator) -> list[tuple[Conversation, Question]]:
    """The questions that are trained on, all or a sample by ``generator``, each with its conversation."""
    questions = [(c, q) for c in conversations for q in c.questions]
    if not questions:
        raise ValueError("there is no question to train on: give conversations that have questions")
    if s.max_questions is not None:
        kept = torch.randperm(len(questions), generator=generator, device="cpu")[: s.max_questions].tolist()
        questions = [questions[i] for i in sorted(kept)]
    return questions


def num_steps(ids: list[str], s: TrainSettings) -> int:
    """Steps of a training on questions of the conversations ``ids``, one a question."""
    return s.epochs * len(epoch_batches(ids, [0] * len(ids), s.batch_size, generator=None))


@torch.inference_mode(False)
@torch.enable_grad()
def train_pairs(model: MemoryModel, draw: Callable[[int], tuple[Sequence, ...]],
                steps: int = 100, lr: float = 0.003, warmup_steps: int = 5, clip: float = 1.0,
                autocast: bool | str = "auto", progress: bool = True) -> "pandas.DataFrame":
    """Train on short episodes: ``draw(step)`` gives what `MemoryModel.score_pairs` takes, states, questions, answers and, where
    there are, contexts, as many of each [D].

    For a lesson that trains while one watches. Let every step hold each answer equally often: banks have most in
    common, and a step of one answer teaches that common part to give it. AdamW without weight decay; ``clip`` is the
    largest gradient norm. A step of long texts is taken in parts. Returns the history, a row a step: step, loss (nats per
    answer), lr, grad_norm, seconds. What ``draw`` does not touch, ``model.state`` included, is left alone. The baseline has
    nothing to train: ValueError.
    """
    import pandas as pd

    parameters, rows, start = model.parameters(), [], time.perf_counter()
    if not parameters or steps < 1:
        raise ValueError(f"{model.method} for {steps} steps trains nothing: give a method with parameters, and a step")
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _schedule(step, warmup_steps, steps))
    for step in tqdm(range(steps), desc=f"train {model.method}", unit="step", disable=not progress, mininterval=1.0,
                     leave=False):
        lr = scheduler.get_last_lr()[0]
        loss, grad_norm = descend(_pair_losses(model, draw(step), autocast), optimizer, parameters, clip)
        scheduler.step()
        rows.append(dict(step=step, loss=loss, lr=lr, grad_norm=grad_norm, seconds=time.perf_counter() - start))
    return pd.DataFrame(rows)


def _pair_losses(model: MemoryModel, drawn: tuple[Sequence, ...], autocast: bool | str) -> Iterator[Tensor]:
    """The step's loss (nats per answer) in parts that add up to it, of at most `STEP_TOKENS` each, or one row; mostly in one."""
    memories, questions, answers, *contexts = drawn
    memories, questions, answers = list(memories), list_of_texts("questions", questions), list_of_texts("answers", answers)
    texts = prompt_texts(questions, *contexts or [None])
    parts = [range(len(texts))]
    if len(memories) == len(texts) == len(answers):  # else the one part says what is wrong
        lengths = [len(model.backbone.token_ids(text)) + len(target_ids(model.backbone, answer))
                   for text, answer in zip(texts, answers, strict=True)]
        if len(lengths) * max(lengths, default=0) > STEP_TOKENS:
            parts = length_sorted_batches(lengths, STEP_TOKENS)
    columns = [memories, questions, answers, *(list(column) for column in contexts if column is not None)]
    for part in parts:
        with model.backbone.autocast(autocast):
            loss = -model.score_pairs(*([column[i] for i in part] if len(part) < len(texts) else column
                                        for column in columns)).log_prob.sum() / max(len(texts), 1)
        yield loss


def epoch_batches(ids: list[str], lengths: list[int], size: int, generator: torch.Generator | None) -> list[list[int]]:
    """Batches of one conversation's questions, of near-equal length, in random order (in order without a generator).

    Within a conversation questions are shuffled, sorted by length within pools of eight batches, and cut.
    """
    batches = []
    for id in dict.fromkeys(ids):
        mine = [i for i, other in enumerate(ids) if other == id]
        if generator is not None:
            mine = [mine[j] for j in torch.randperm(len(mine), generator=generator, device="cpu")]
        for pool in (mine[a : a + 8 * size] for a in range(0, len(mine), 8 * size)):
            pool.sort(key=lengths.__getitem__)
            batches += [pool[a : a + size] for a in range(0, len(pool), size)]
    if generator is not None:
        batches = [batches[j] for j in torch.randperm(len(batches), generator=generator, device="cpu")]
    return batches


def _schedule(step: int, warmup: int, total: int) -> float:
    """The learning rate's factor at ``step`` (from 0): linear over the warm-up, then half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))
