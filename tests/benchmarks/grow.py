"""How costs grow: with what was written before, with the entries of a bank, with the users whose banks are kept.

`grow` measures on one machine in seconds, not in ratios: they show how a cost grows, and what the pieces of a service
are (`pdmem_lib.cost_figures.growth` draws them, `cost_figures.serving` reckons with them).
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import pdmem_lib as pdmem
from pdmem_lib.backbone import Backbone
from pdmem_lib.cost_figures import COLUMNS
from pdmem_lib.decoding import greedy_lines
from pdmem_lib.prompts import prompt_text

WRITERS = ("kv_extension", "hebbian", "slot")  # one a write rule
TURNS, ENTRIES, USERS = (10, 1_000, 100_000), (64, 640, 6_400), (1, 10, 100, 1_000)
BATCH, TOKENS = 16, 8  # questions asked at once, tokens of an answer


def grow(backbone: Backbone, rounds: int, turns: Sequence[int] = TURNS, entries: Sequence[int] = ENTRIES,
         users: Sequence[int] = USERS) -> pd.DataFrame:
    """What each step costs as it grows, medians over ``rounds``: columns `COLUMNS`.

    "turn written": x turns before it, bytes of the state. "training step": of 16 questions, x entries, bytes of
    the bank. "question answered": x users' banks kept on disk, 16 users at random asked at once, each bank read from
    its file (1: one user's for all), bytes of all those files; "bank read and checked" is its part of that. "state
    saved" and "state loaded": x the capacity, bytes of the file.
    """
    (talk,) = pdmem.synthetic_conversations(1, 8, seed=0)
    hidden = backbone.encode([str(turn) for turn in talk.turns[:50]], autocast="auto", progress=False)
    questions = [talk.questions[i % len(talk.questions)] for i in range(BATCH)]
    rows = [*written(backbone, hidden, turns, rounds), *trained(backbone, hidden, questions, entries, rounds),
            *answered(backbone, hidden, questions, users, rounds), *kept(backbone, hidden, rounds)]
    return pd.DataFrame(rows).assign(backbone=backbone.name)[list(COLUMNS)]


def median(call: Callable[[], object], rounds: int, prepare: Callable[[], object] = lambda: None) -> float:
    """Seconds of ``call``, after one to warm up."""
    seconds = []
    for _ in range(rounds + 1):
        prepare()
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:]))


def size(state: pdmem.methods.State) -> int:
    return sum(t.numel() * t.element_size() for t in state.values())


def written(backbone: Backbone, hidden: Sequence[torch.Tensor], turns: Sequence[int], rounds: int) -> Iterator[dict]:
    for method in WRITERS:
        model, before = pdmem.MemoryModel(backbone, method), 0
        for n in turns:
            for i in range(before, n):
                model.write_hidden([hidden[i % len(hidden)]])
            before, state = n, model.state

            def back() -> None:
                model.state = state  # noqa: B023

            seconds = median(lambda: model.write_hidden(hidden), max(5, rounds), back) / len(hidden)  # noqa: B023
            back()
            yield dict(what="turn written", method=method, x=n, seconds=seconds, bytes=size(state))


def trained(backbone: Backbone, hidden: Sequence[torch.Tensor], questions: Sequence[pdmem.Question],
            entries: Sequence[int], rounds: int) -> Iterator[dict]:
    texts, answers = [q.question for q in questions], [q.answer for q in questions]
    for n in entries:
        model = pdmem.MemoryModel(backbone, "kv_extension", num_entries=n)
        model.write_hidden(hidden[:10])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def step() -> None:
            with backbone.autocast("auto"):
                model.loss(texts, answers).backward()  # noqa: B023
            optimizer.step()  # noqa: B023
            optimizer.zero_grad()  # noqa: B023

        yield dict(what="training step", method=model.method, x=n, bytes=size(model.state),
                   seconds=median(step, rounds))


def answered(backbone: Backbone, hidden: Sequence[torch.Tensor], questions: Sequence[pdmem.Question],
             users: Sequence[int], rounds: int) -> Iterator[dict]:
    model, random = pdmem.MemoryModel(backbone, "slot"), np.random.default_rng(0)
    prompts = [backbone.token_ids(prompt_text(q.question)) for q in questions]
    ids, mask = backbone.pad(prompts, side="left")
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{user:06d}.safetensors" for user in range(max(users))]
        for user, file in enumerate(files):  # each user's turns in an order of their own
            model.reset()
            model.write_hidden([hidden[i] for i in random.permutation(len(hidden))[:4]])
            model.save_state(file)
        for n in users:
            asking: list[Path] = []

            def choose() -> None:
                drawn = random.choice(n, BATCH, replace=n < BATCH) if n > 1 else [0]  # noqa: B023
                asking[:] = [files[i] for i in drawn]  # noqa: B023

            def read() -> list[pdmem.methods.State]:
                return [model.load_state(file) for file in asking]  # noqa: B023

            def answer() -> None:
                with torch.no_grad():  # one bank for all rows, or a bank a row
                    injection = model.adapter.read_each(states := read(), [None] * len(states))  # noqa: B023
                greedy_lines(backbone, ids, mask, injection, TOKENS)

            held = n * files[0].stat().st_size
            yield dict(what="question answered", method=model.method, x=n, bytes=held,
                       seconds=median(answer, rounds, choose) / BATCH)
            yield dict(what="bank read and checked", method=model.method, x=n, bytes=held,
                       seconds=median(read, rounds, choose) / (1 if n == 1 else BATCH))


def kept(backbone: Backbone, hidden: Sequence[torch.Tensor], rounds: int) -> Iterator[dict]:
    with tempfile.TemporaryDirectory() as folder:
        for method in pdmem.METHODS:
            for capacity in (1, 10):
                model, file = pdmem.MemoryModel(backbone, method, capacity), Path(folder) / "state.safetensors"
                model.write_hidden(hidden[:4])
                seconds = {"saved": median(lambda: model.save_state(file), max(9, rounds)),  # noqa: B023
                           "loaded": median(lambda: model.load_state(file), max(9, rounds))}  # noqa: B023
                for what, value in seconds.items():
                    yield dict(what=f"state {what}", method=method, x=capacity, seconds=value,
                               bytes=file.stat().st_size)
