"""How long runs will take, told before they begin.

The work of a run is counted from its settings (`count`), in units; a unit's seconds are taken from short calls of the
library's own code (`look`), for each method and capacity. A run's time is their product, and runs are laid on the cores
in the order in which they are made. As many looks go on side by side as runs will, with as many threads each, so that
they feel the same contention.

What cannot be known before is how long trained answers will be. The gold ones are the measure [D]: trained for one
epoch on SmolLM2-135M, five of six methods answered in 1.05 to 1.4 times as many tokens, and what was not trained on
(the zero state) runs on longer; so 1.2 is foretold, and the range goes from 1 to 2 times, and a tenth further either
way for what a machine drifts [D].
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from heapq import heapreplace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from . import prompts, provenance, references
from .backbone import TINY_NAMES, Backbone, load_backbone, use_bf16
from .checkpoints import steps_done
from .estimates import FORMAT
from .evaluation import EvaluateSettings, _Asker, _jobs, checkpoints, frozen_file, rounds, sample_questions
from .experiment import PRESETS, Data, Experiment, load_data, resolve, runs_per_gpu
from .memory import MemoryModel
from .states import states_file
from .training import num_steps, take_step, training_questions

if TYPE_CHECKING:
    import pandas

LENGTHS = {"low": 1.0, "seconds": 1.2, "high": 2.0}  # of answers, times the gold ones'
SAME = 0.88  # of guessed answers, the share that is the guess word for word: under the controls of SmolLM2-135M's full
# runs of M.2 and M.4 to M.6 at 1x, seed 42, 0.58 to 1.0; a knowledge curve's are taken to be as good [D]
DRIFT = {"low": 0.9, "seconds": 1.0, "high": 1.1}
PAPERMILL = 10.0  # seconds of a run beside its work and one loading of all: interpreters, first calls, files [D]
TURNS = 60  # that a look writes and traces
MORE = 4  # times that a look writes them again, for a bank as full as a whole conversation leaves it
BATCHES = 3  # of a training, of near-equal length each, that a look takes a step on
LOOK = {True: 3, False: 30}  # seconds of one look, about: whether the backbone is a tiny one
BEGIN = 15  # seconds until the looks begin, about
BUSY = 20  # % of the processors that other work may take before it is spoken of [D]


# ---- counting --------------------------------------------------------------------------------------------------------


def count(model: MemoryModel, data: Data, experiment: Experiment, lengths: float = 1.0) -> Counter:
    """The units of work in a run that ``model`` was built for, answers ``lengths`` times as long as the gold ones."""
    s, work = experiment.evaluate_settings, Counter(start=1)
    start = model.adapter.initial_state()
    banks = bool(start) and s.memory == "own"
    if model.num_trainable:
        t = experiment.train_settings
        trained = [c for c, _ in training_questions(data.train, t, torch.Generator().manual_seed(t.seed))]
        work["step"] = num_steps([c.id for c in trained], t)
        if banks:
            work["turn"] = sum(len(c.turns) for c in {c.id: c for c in trained}.values())
    asked = sample_questions(data.test, s.questions_per_bucket)
    if banks:
        work["turn"] += sum(len(c.turns) for c in data.test)
        sought = [id for id, _, q in asked if q.evidence]
        work["turn traced"] = sum(len(c.turns) for c in data.test if c.id in sought)
        work["question traced"] = len(sought)
    for rows, memories in _jobs(model, asked, dict.fromkeys([c.id for c in data.test], start) if banks else {}):
        for guess, together in rounds([name for name, _ in memories if name in s.answered]):
            work += _answering(model, asked, s, rows, len(together), lengths, guessed=guess and SAME)
        work += _scoring(model, asked, s, rows, len(memories))
    for _, _, held, rows in checkpoints(data.test, asked, s.knowledge_points) if banks else ():
        if held is not None:  # at the end it is what was asked above
            work += _answering(model, asked, s, rows, 1, lengths, guessed=SAME)
    return work


def _answering(model: MemoryModel, asked, s: EvaluateSettings, rows: Sequence[int], memories: int,
               lengths: float = 1.0, guessed: float | None = None) -> Counter:
    """Of `_Asker.answers`: memories read, tokens of prompts (padded), steps of decoding, and rows in them.

    ``guessed``: the share of answers that come with a right draft, where all come with one.
    """
    backbone, work = model.backbone, Counter()
    prompt = {i: len(backbone.token_ids(prompts.prompt_text(asked[i][2].question))) for i in rows}
    answer = {i: min(s.max_new_tokens, round(lengths * len(prompts.target_ids(backbone, asked[i][2].answer))))
              for i in rows}
    draft = dict.fromkeys(rows, 0) if guessed is None else answer
    size = _Asker(model, asked, s, _nothing)._batch_size([""] * memories)
    batches = list(_cut(sorted(rows, key=lambda i: prompt[i] + draft[i]), size))
    wrong = 1 - (guessed or 0)
    for batch in batches:
        if model.adapter.needs_inputs:  # entries stand at the prompts' columns, behind which drafts begin
            longest = max(prompt[i] for i in batch) + max(draft[i] for i in batch)
        else:
            longest = max(prompt[i] + draft[i] for i in batch)
        work["answer: token"] += memories * len(batch) * longest
        work["answer: step"] += max(answer[i] for i in batch)
        work["answer: row and step"] += memories * sum((1 - wrong) + wrong * answer[i] for i in batch)
    work["answer: memory"] += memories * (len(batches) if model.adapter.needs_inputs else 1)
    return work


def _scoring(model: MemoryModel, asked, s: EvaluateSettings, rows: Sequence[int], memories: int) -> Counter:
    """Of `_Asker.log_probs`: memories read, and tokens of prompts and answers (padded)."""
    backbone, work = model.backbone, Counter()
    length = {i: len(backbone.token_ids(prompts.prompt_text(asked[i][2].question)))
              + len(prompts.target_ids(backbone, asked[i][2].answer)) for i in rows}
    batches = list(_cut(sorted(rows, key=length.__getitem__), _Asker(model, asked, s, _nothing)._batch_size([""] * memories)))
    work["score: token"] = memories * sum(len(batch) * max(length[i] for i in batch) for batch in batches)
    work["score: memory"] = memories * (len(batches) if model.adapter.needs_inputs else 1)
    return work


def _cut(order: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (order[a : a + size] for a in range(0, len(order), size))


# ---- timing ----------------------------------------------------------------------------------------------------------


def look(model: MemoryModel, data: Data, experiment: Experiment, hidden: Sequence[torch.Tensor]) -> dict[str, float]:
    """Seconds of each unit that `count` finds in runs of this method and capacity; ``hidden``: states of some turns."""
    seconds: dict[str, float] = {}
    if not model.num_trainable:
        return seconds
    s = experiment.evaluate_settings
    asked = sample_questions(data.test, s.questions_per_bucket)
    if model.adapter.initial_state():
        model.reset()
        model.write_hidden(hidden[:2])  # warm up
        seconds["turn"] = _time(lambda: model.write_hidden(hidden)) / len(hidden)
        model.write_hidden([*hidden] * MORE)
        texts = [q for *_, q in asked if q.evidence]
        if texts:
            frozen = model.backbone.encode([prompts.prompt_text(q.question) for q in texts[:8]], s.autocast,
                                           progress=False)
            each = -(-len(texts) // len(data.test))  # questions of a conversation
            seconds["turn traced"] = _time(lambda: _trace(model, hidden, frozen, each)) / len(hidden)
            few = texts[: provenance.BATCH]
            seconds["question traced"] = _time(
                lambda: provenance._conversation_scores(model, few, hidden[:2], False, s.autocast)) / len(few)
    seconds["step"] = _step_seconds(model, data, experiment)
    (_, memories), *_ = _jobs(model, asked, {asked[0][0]: model.state} if model.state else {})
    return seconds | _reading_seconds(model, asked, s, [memory for _, memory in memories])


def _step_seconds(model: MemoryModel, data: Data, experiment: Experiment) -> float:
    """Of a training step: the mean over batches of near-equal length, of which each stands for as many."""
    t = experiment.train_settings
    chosen = training_questions(data.train, t, torch.Generator().manual_seed(t.seed))
    chosen = sorted((q for _, q in chosen), key=lambda q: len(q.question) + len(q.answer))
    parts = np.array_split(np.arange(len(chosen)), min(BATCHES, -(-len(chosen) // t.batch_size)))
    batches = [[chosen[i] for i in part[max(0, len(part) - t.batch_size) // 2 :][: t.batch_size]] for part in parts]
    bank = model.state if t.memory == "own" else model.adapter.initial_state()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    take_step(model, optimizer, batches[0][:2], bank, t)  # warm up
    return _time(lambda: [take_step(model, optimizer, batch, bank, t) for batch in batches]) / len(batches)


def _trace(model: MemoryModel, hidden: Sequence[torch.Tensor], frozen: Sequence[torch.Tensor], questions: int) -> None:
    if model.adapter.needs_inputs:
        provenance.entry_provenance(model, hidden, [frozen[i % len(frozen)] for i in range(questions)])
    else:
        provenance.write_provenance(model, hidden)


def _reading_seconds(model: MemoryModel, asked, s: EvaluateSettings, memories: list) -> dict[str, float]:
    """Of answering and scoring: small calls and larger ones, short and long, solved for the units they are made of.

    Answers are asked under two memories, in the 32 rows of a batch of the knowledge curve, which asks most; scores are
    taken under all, since more rows at once take longer each.
    """
    prompt = [len(q.question) for *_, q in asked]
    order = np.argsort(prompt, kind="stable")
    middle = order[max(0, len(order) - 16) // 2 :][:16].tolist()  # questions of median length
    few, two = middle[: max(1, len(middle) // 8)], memories[:2]
    steps = max(1, min(6, s.max_new_tokens))
    rows, seconds = [], []
    _Asker(model, asked, replace(s, max_new_tokens=1), _nothing).answers(few, two)  # warm up
    for these, tokens in ((few, 1), (few, steps), (middle, 1), (middle, steps)):
        ask = _Asker(model, asked, replace(s, max_new_tokens=tokens), _nothing)
        said: list[list[str]] = []
        seconds.append(_time(lambda: said.extend(ask.answers(these, two))))  # noqa: B023
        work = _answering(model, asked, ask.s, these, len(two), lengths=1e9)  # none is known to end before
        lengths = (1 + len(model.backbone.token_ids(answer)) for each in said for answer in each)
        work["answer: row and step"] = sum(min(tokens, length) for length in lengths)
        rows.append(work)
    found = solve(rows, seconds)
    rows, seconds = [], []
    ask = _Asker(model, asked, s, _nothing)
    for these, under in ((few, two), (middle, memories)):
        rows.append(_scoring(model, asked, s, these, len(under)))
        seconds.append(_time(lambda: ask.log_probs(these, under)))  # noqa: B023
    return found | solve(rows, seconds)


def solve(rows: Sequence[Counter], seconds: Sequence[float]) -> dict[str, float]:
    """The seconds of each unit, none below 0, that explain best (relatively) what calls of such units took."""
    from scipy.optimize import nnls

    names = sorted(set().union(*rows))
    A = np.array([[row[name] for name in names] for row in rows], dtype=float) / np.array(seconds)[:, None]
    size = A.max(axis=0)
    return dict(zip(names, (nnls(A / size, np.ones(len(seconds)))[0] / size).tolist(), strict=True))


def shared_seconds(backbone: Backbone, data: Data, experiment: Experiment) -> tuple[float, float]:
    """Of what runs share and find in the cache, as far as it is not there: (before the first run, in the first
    baseline's run). Hidden states and the frozen model's answers; answers with pieces of the conversation.
    """
    s = experiment.evaluate_settings
    asked, bf16 = sample_questions(data.test, s.questions_per_bucket), use_bf16(s.autocast, backbone.device)
    new = [texts for c in data.conversations
           if not states_file(backbone, texts := [str(turn) for turn in c.turns], bf16).is_file()]
    before = 0.0
    if new:
        some = new[0][:TURNS]
        tokens = sum(len(backbone.token_ids(text)) for texts in new for text in texts)
        before += tokens * _time(lambda: backbone.encode(some, s.autocast, progress=False)) / sum(
            len(backbone.token_ids(text)) for text in some)
    if not frozen_file(backbone, [q for *_, q in asked], s).is_file():
        bare = MemoryModel(backbone, "baseline")
        everyone = list(range(len(asked)))
        before += total(_answering(bare, asked, s, everyone, 1, 2.0) + _scoring(bare, asked, s, everyone, 1),
                        _reading_seconds(bare, asked, s, ["off"]))
    first = _reference_seconds(backbone, data, experiment, asked) if experiment.method == "baseline" else 0.0
    return before, first


def _reference_seconds(backbone: Backbone, data: Data, experiment: Experiment, asked) -> float:
    """Of `experiment.reference_points`, roughly: a few questions of median length stand for all."""
    s, preset, seconds = experiment.evaluate_settings, PRESETS[experiment.preset], 0.0
    indices = {c.id: references.TurnIndex(backbone, c) for c in data.test if c.id in {id for id, *_ in asked}}
    for point in (references.FROZEN, *references.prompt_references(preset.budgets, preset.last)):
        texts = references._texts(indices, asked, point, s.max_new_tokens)
        if references._answers_file(backbone, asked, texts, s).is_file():
            continue
        if point.kind == "last":
            seconds += _last_turns_seconds(backbone, indices, asked, texts, s)
            continue
        order = sorted(range(len(asked)), key=lambda i: len(texts[i]) + len(asked[i][2].question))
        some = order[max(0, len(order) - 4) // 2 :][:4]
        def length(which: Sequence[int]) -> int:
            return sum(len(texts[i]) + len(asked[i][2].question) for i in which)  # noqa: B023
        took = _time(lambda: references._answers(
            backbone, [asked[i][2] for i in some], [texts[i] for i in some], s, _nothing))  # noqa: B023
        seconds += took * length(order) / length(some)
    return seconds


def _last_turns_seconds(backbone: Backbone, indices, asked, texts: Sequence[str], s: EvaluateSettings) -> float:
    """Of the last turns in front of every question: that text runs once a conversation, in time that grows with its
    square; what is asked behind it grows with its length."""
    def work(length: int, questions: int) -> Counter:
        return Counter({"text": length, "square": length**2, "asked": length * questions, "question": questions})

    length = {id: len(backbone.token_ids(text)) for (id, *_), text in zip(asked, texts, strict=True)}
    first = next(iter(indices))
    questions = [q for id, _, q in asked if id == first]
    rows, seconds = [], []
    for budget, n in ((512, 2), (1024, 2), (1536, 2), (1536, 10)):
        text = references.last_turns(indices[first], questions, min(budget, max(1, length[first])), s.max_new_tokens)
        some = questions[:n]
        rows.append(work(max(1, len(backbone.token_ids(text))), len(some)))
        alike = [text] * len(some)
        seconds.append(_time(lambda: references._answers(backbone, some, alike, s, _nothing)))  # noqa: B023
    unit = solve(rows, seconds)
    return sum(total(work(length[id], sum(other == id for other, *_ in asked)), unit) for id in indices)


def total(work: Counter, unit: dict[str, float]) -> float:
    """Seconds of ``work``, a unit's seconds as in ``unit``."""
    return sum(amount * unit[name] for name, amount in work.items())


def _nothing(_: int) -> None:
    pass


def _time(call: Callable[[], object]) -> float:
    wait = torch.cuda.synchronize if torch.cuda.is_available() else nullcontext
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


# ---- side by side ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Foretold:
    """``runs``: a row a run in its order: method, capacity, seed, seconds, low, high. ``before``: seconds until the
    first begins. ``wall``: from the first line to the last run's record, by seconds, low and high."""

    runs: "pandas.DataFrame"
    before: float
    wall: dict[str, float]


def foretell(runs: Sequence[tuple[str, int, int]], backbone: str = "auto", data: str = "auto", preset: str = "full",
             cores: int = 2, threads: int = 1, say: Callable[[str], object] = print,
             folder: str | Path | None = None) -> Foretold:
    """How long ``runs`` (method, capacity, seed) of a preset will take on ``cores``, ``threads`` each.

    ``folder``: where they are made; what a killed one has trained already, by its checkpoint there, is left out. Takes
    about `LOOK` seconds for each method and capacity, shared by the cores, and says so to ``say`` before; other work on
    this machine (above `BUSY`) is said as well, since slow looks foretell slow runs.
    """
    import pandas as pd

    if not runs or cores < 1 or threads < 1:
        raise ValueError("give at least one run, and at least 1 for cores and threads")
    backbone, data, _ = resolve(backbone, data, preset)
    began = time.perf_counter()
    groups: dict[tuple[str, int], list[str]] = {}  # one look serves a method and what reads no bank beside it
    for method, capacity, _ in runs:
        Experiment(method=method, capacity=capacity, preset=preset)  # refuse an unknown one now
        names = groups.setdefault((method.removesuffix(FORMAT), capacity), [])
        names += [method] if method not in names else []
    side_by_side = max(1, min(cores // threads, len(runs), runs_per_gpu() or len(runs)))
    tasks = [(names, capacity) for (_, capacity), names in groups.items()]
    tasks += (tasks * side_by_side)[: -len(tasks) % side_by_side]  # so that none is looked at alone
    say(f"foretelling {len(runs)} runs: {len(tasks)} looks, {side_by_side} at a time, about "
        f"{_clock(BEGIN + LOOK[backbone in TINY_NAMES] * -(-len(tasks) // side_by_side))}")
    _say_if_busy(say)
    found: dict[tuple[str, int], list[dict]] = {}
    with ProcessPoolExecutor(side_by_side, get_context("spawn"), _begin, (backbone, data, preset, threads)) as pool:
        for task, result in zip(tasks, pool.map(_look_at, *zip(*tasks, strict=True)), strict=True):
            for method, told in result.items():
                found.setdefault((method, task[1]), []).append(told)
    means = {kind: dict(pd.DataFrame(several).mean()) for kind, several in found.items()}  # over repeated looks
    before = max(told["before"] for told in means.values()) / side_by_side  # it has all the cores
    rows = []
    for method, capacity, seed in runs:
        told = means[method, capacity]
        once, told["first"] = told["first"], 0.0  # only the first run of its kind makes what others find
        if folder is not None:
            run = Experiment(output_dir=str(Path(folder) / f"{method}-{capacity}x-seed{seed}"))
            once -= told["step"] * steps_done(run.checkpoint)
        rows.append(dict(method=method, capacity=capacity, seed=seed,
                         **{name: DRIFT[name] * (told[name] + once) for name in LENGTHS}))
    table = pd.DataFrame(rows)
    wall = {name: DRIFT[name] * before + lay_out(table[name], side_by_side) for name in LENGTHS}
    say(f"looked for {_clock(time.perf_counter() - began)}")
    return Foretold(table, before, wall)


def _say_if_busy(say: Callable[[str], object]) -> None:
    import psutil

    if (busy := psutil.cpu_percent(interval=1.0)) > BUSY:
        say(f"other work takes {busy:.0f} % of the processors now: the looks, and what they foretell, are slower for it")


def lay_out(seconds: Sequence[float], workers: int) -> float:
    """When the last of these is done, if each goes in order to the worker that is free first."""
    free = [0.0] * workers
    for one in seconds:
        heapreplace(free, free[0] + one)
    return max(free)


def lines(told: Foretold, now: float | None = None) -> list[str]:
    """What is printed: a line a method and capacity, the total with its range, and when it would end."""
    text = []
    for (method, capacity), rows in told.runs.groupby(["method", "capacity"], sort=False):
        each = "" if len(rows) == 1 else f"{len(rows)} runs of "
        text.append(f"{method:>22} {capacity:>2}x  {each}{_clock(rows['seconds'].mean())}")
    end = time.localtime((time.time() if now is None else now) + told.wall["seconds"])
    if told.before:
        text.append(f"before the first run: {_clock(told.before)}")
    text.append(f"in all {_clock(told.wall['seconds'])} ({_clock(told.wall['low'])} to {_clock(told.wall['high'])}), "
                f"the report aside; begun now it would end at {time.strftime('%H:%M on %d %B', end)}")
    return text


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


_here: dict = {}  # a looking process' own: what all its looks share


def _begin(backbone: str, data: str, preset: str, threads: int) -> None:
    torch.set_num_threads(threads)
    import psutil

    loaded = load_backbone(backbone)
    conversations = load_data(data, preset)
    loaded.fingerprint, loaded.newline_ids  # noqa: B018 - once a run, too
    age = time.time() - psutil.Process().create_time()
    hidden = loaded.encode([str(turn) for turn in conversations.test[0].turns[:TURNS]], "auto", progress=False)
    _here.update(backbone=loaded, data=conversations, preset=preset, start=age + PAPERMILL, hidden=hidden)


def _look_at(methods: Sequence[str], capacity: int) -> dict[str, dict[str, float]]:
    """For each of these names, which one look serves: seconds, low, high of a run, and of a step; before, first
    (`shared_seconds`)."""
    backbone, data, found, unit = _here["backbone"], _here["data"], {}, {}
    for method in methods:
        experiment = Experiment(method=method, capacity=capacity, preset=_here["preset"])
        model = experiment.build(backbone)
        if not unit:
            unit = {"start": _here["start"], **look(model, data, experiment, _here["hidden"])}
        elif model.num_trainable:  # the same work, but for what its steps read
            unit["step"] = _step_seconds(model, data, experiment)
        before, first = shared_seconds(backbone, data, experiment)
        found[method] = dict(before=before, first=first, step=unit.get("step", 0.0), **{
            name: total(count(model, data, experiment, lengths), unit) for name, lengths in LENGTHS.items()})
    return found


