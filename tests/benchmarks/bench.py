"""How fast the library is, as ratios: `make bench`, or ``python tests/benchmarks/bench.py --only train --rounds 3``.

Every figure compares two ways of doing the same work, run in turns in one process, round by round, and gives the median
of the rounds' ratios with their quartiles (low, high). Times on a shared machine drift; such ratios hardly do. The table
is printed and written to figures/benchmark.csv: measure, method, capacity, ratio, low, high, at_least, backbone. Its
rows are replaced one measure at a time, so a part can be measured again. Where there is a GPU, that is what is measured,
and the table is figures/benchmark-gpu.csv, with the chip's name in one more column.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch

import pdmem_lib as pdmem
from pdmem_lib import cost_figures, figures, states
from pdmem_lib.backbone import GPU_TOKENS, length_sorted_batches
from pdmem_lib.prompts import prompt_text, target_ids

sys.path.insert(0, str(Path(__file__).parent))
import grow  # noqa: E402
import plain  # noqa: E402

ROOT = Path(__file__).parent.parent.parent
COLUMNS = ["measure", "method", "capacity", "ratio", "low", "high", "at_least", "backbone"]
TRAIN_AT_LEAST = {1: 0.8, 10: 0.6}
PREFIX_AT_LEAST = {1: 0.7, 10: 0.45}  # its soft tokens pass through every block
BATCH = 32


class Bench:
    """A backbone, data, and the number of rounds."""

    def __init__(self, backbone: str, rounds: int, data: str):
        self.backbone, self.rounds = pdmem.load_backbone(backbone), rounds
        self.data = pdmem.load_data(data, preset="full")
        pairs = [(q.question, q.answer) for c in self.data.train for q in c.questions]
        lengths = [len(self.backbone.token_ids(f"{q} {a}")) for q, a in pairs]
        middle = len(pairs) // 2 - BATCH // 2  # questions of median length, as a step of training has them
        batch = [pairs[i] for i in np.argsort(lengths, kind="stable")[middle : middle + BATCH]]
        self.questions, self.answers = map(list, zip(*batch, strict=True))
        self.turns = [str(turn) for turn in self.data.train[0].turns[:200]]

    def written(self, method: str, capacity: int) -> pdmem.MemoryModel:
        model = pdmem.MemoryModel(self.backbone, method, capacity)
        model.write_hidden(self.hidden)
        return model

    @property
    def hidden(self) -> list[torch.Tensor]:
        if not hasattr(self, "_hidden"):
            self._hidden = self.backbone.encode(self.turns, autocast="auto", progress=False)
        return self._hidden

    def ratio(self, ours: Callable[[], object], theirs: Callable[[], object], rounds: int | None = None) -> dict:
        """theirs / ours in seconds, so that above 1 ours is the faster: median and quartiles over the rounds."""
        ours(), theirs()  # warm up
        found = []
        for i in range(rounds or self.rounds):
            pair = {}
            for one in (ours, theirs) if i % 2 else (theirs, ours):
                pair[one] = seconds(one)
            found.append(pair[theirs] / pair[ours])
        low, middle, high = np.quantile(found, [0.25, 0.5, 0.75])
        return dict(ratio=middle, low=low, high=high)

    # ---- the bare model's own passes ----
    @cached_property
    def bare(self) -> torch.nn.Module:
        """The same weights in a model of transformers that the library never touched, on stock sdpa."""
        from transformers import AutoModelForCausalLM

        frozen = self.backbone.model
        config = type(frozen.config).from_dict(frozen.config.to_dict())
        bare = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(self.backbone.device)
        bare.load_state_dict(frozen.state_dict())
        return bare.requires_grad_(False).eval()

    def bare_step(self) -> Callable[[], None]:
        """The bare model's forward and backward to its inputs on the batch: what no adapter can do without."""
        backbone, model = self.backbone, self.bare
        rows = [backbone.token_ids(prompt_text(q)) + target_ids(backbone, a)
                for q, a in zip(self.questions, self.answers, strict=True)]
        prompts = [len(backbone.token_ids(prompt_text(q))) for q in self.questions]
        ids, mask = backbone.pad(rows, side="right")
        column = torch.arange(ids.shape[1], device=ids.device)
        target = mask.bool() & (column >= torch.tensor(prompts, device=ids.device)[:, None])  # (B, T)
        predicts = target.roll(-1, dims=1)
        predicts[:, -1] = False

        def step() -> None:
            inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
            with backbone.autocast("auto"):
                hidden = model.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
                logits = model.get_output_embeddings()(hidden[predicts])
                torch.nn.functional.cross_entropy(logits.float(), ids[target]).backward()

        return step

    def our_step(self, model: pdmem.MemoryModel, questions: int = BATCH) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        asked, answers = self.questions[:questions], self.answers[:questions]

        def step() -> None:
            with self.backbone.autocast("auto"):
                model.loss(asked, answers).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return step


def seconds(work: Callable[[], object]) -> float:
    """How long ``work`` takes, what it leaves to the GPU included."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


@contextmanager
def empty_cache() -> Iterator[None]:
    """A cache folder of its own, so that nothing is found in it."""
    before, folder = os.environ.get("PDMEM_CACHE"), tempfile.mkdtemp()
    os.environ["PDMEM_CACHE"] = folder
    try:
        yield
    finally:
        os.environ.pop("PDMEM_CACHE") if before is None else os.environ.update(PDMEM_CACHE=before)
        shutil.rmtree(folder)


# ---- the measures ----
def encode(bench: Bench) -> Iterator[dict]:
    """All conversations' turns, cache cold, tokenised and saved, against ideal length-sorted batches: a round each."""
    backbone, model, found = bench.backbone, bench.bare, []
    batch_tokens = 1024 if backbone.device.type == "cpu" else GPU_TOKENS  # as ours
    for i, conversation in enumerate(bench.data.conversations):
        rows = [backbone.token_ids(str(turn)) for turn in conversation.turns]
        batches = [backbone.pad([rows[j] for j in batch], side="right")[0]
                   for batch in length_sorted_batches([len(row) for row in rows], batch_tokens)]

        def theirs() -> None:
            with torch.no_grad(), backbone.autocast("auto"):
                for ids in batches:  # noqa: B023
                    model.base_model(ids, use_cache=False)

        def ours() -> None:
            with empty_cache():
                states.turn_states(backbone, conversation)  # noqa: B023

        times = {}
        for one in (ours, theirs) if i % 2 else (theirs, ours):
            times[one.__name__] = seconds(one)
        found.append(times["theirs"] / times["ours"])
    low, middle, high = np.quantile(found, [0.25, 0.5, 0.75])
    yield dict(method="", capacity="", ratio=middle, low=low, high=high, at_least=0.9)


def peak(bench: Bench) -> Iterator[dict]:
    """The share of the chip's bf16 peak that encoding reaches: multiplications and additions a second of the blocks'
    linear maps and of attention, against those of one large matrix product. "forward": the bare model's passes alone, on
    batches of 1,024 tokens and of 32 times as many; "encode": ours, tokenised, no file written.
    """
    backbone, config = bench.backbone, bench.backbone.config
    turns = [str(turn) for c in bench.data.conversations[:4] for turn in c.turns]
    rows = sorted(map(backbone.token_ids, turns), key=len)
    weights = sum(p.numel() for p in backbone.model.base_model.parameters() if p.ndim == 2) - sum(
        m.weight.numel() for m in backbone.model.base_model.modules() if isinstance(m, torch.nn.Embedding))
    arithmetic = sum(2 * len(row) * (weights + len(row) * config.num_hidden_layers * backbone.num_heads * backbone.head_dim)
                     for row in rows)  # a causal token reads half of its row, in two products
    n = 8192 if backbone.device.type == "cuda" else 2048
    left, right = (torch.randn(n, n, device=backbone.device).bfloat16() for _ in range(2))
    times = 10

    def product() -> None:
        for _ in range(times):
            left @ right

    def passes(batch_tokens: int) -> Callable[[], None]:
        batches = [backbone.pad([rows[i] for i in batch], side="right")[0]
                   for batch in length_sorted_batches(list(map(len, rows)), batch_tokens)]

        def work() -> None:
            with torch.no_grad(), backbone.autocast("auto"):
                for ids in batches:
                    bench.bare.base_model(ids, use_cache=False)
        return work

    wide = 32 * 1024
    works = {"forward, 1,024 tokens": passes(1024), "forward, 32,768 tokens": passes(wide),
             "encode, 4,096 tokens": lambda: backbone.encode(turns, "auto", 4096, progress=False),
             "encode, 32,768 tokens": lambda: backbone.encode(turns, "auto", wide, progress=False)}
    for name, work in works.items():
        share = bench.ratio(work, product, 3)  # seconds of one over the other's: times the arithmetic, its share
        yield dict(method=name, capacity="", at_least=float("nan"),
                   **{key: value * arithmetic / (2 * n**3 * times) for key, value in share.items()})


def train(bench: Bench) -> Iterator[dict]:
    """A training step with memory, 32 questions, against the bare model's forward and backward on the same batch.

    The banks hold 200 turns; M.1's at 10x once more those of a whole conversation, where its rows are copies by then.
    """
    bare = bench.bare_step()
    for capacity in (1, 10):
        for method in pdmem.METHODS:
            floor = (PREFIX_AT_LEAST if method == "prefix" else TRAIN_AT_LEAST)[capacity]
            model = bench.written(method, capacity)
            yield dict(method=method, capacity=capacity, **bench.ratio(bench.our_step(model), bare), at_least=floor)
    whole = pdmem.MemoryModel(bench.backbone, "prefix", 10)
    whole.write_hidden(list(states.turn_states(bench.backbone, bench.data.train[0])))
    with torch.no_grad():
        copies = whole.adapter.read(whole.state)[0].distinct()[2]
    if copies > 1:  # as the study trains on LoCoMo: one row runs for all
        yield dict(method="prefix, a whole conversation", capacity=10, **bench.ratio(bench.our_step(whole), bare),
                   at_least=PREFIX_AT_LEAST[10])


def plain_step(bench: Bench) -> Iterator[dict]:
    """An optimiser step on 16 questions: the published loop's shape against ours."""
    model = bench.written("slot", 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def theirs() -> None:
        plain.step(model, optimizer, bench.questions[:16], bench.answers[:16], model.state)

    yield dict(method="slot", capacity=1, **bench.ratio(bench.our_step(model, 16), theirs, rounds=3), at_least=15)


def plain_encode(bench: Bench) -> Iterator[dict]:
    """Turns encoded per second: one at a time, padded to 384, float32, against ours."""
    turns = bench.turns[:48]
    yield dict(method="", capacity="", at_least=12, **bench.ratio(
        lambda: bench.backbone.encode(turns, autocast="auto", progress=False),
        lambda: [plain.encode_turn(bench.backbone, turn) for turn in turns], rounds=3))


def plain_grid(bench: Bench) -> Iterator[dict]:
    """The six methods at 1x by the protocol, one seed, reckoned from pieces that are measured in turns: too long to run.

    Plain: each of 10 epochs encodes the training conversations anew and takes its questions one at a time; answers, under
    the own and the zero state, one at a time. Ours: every turn encoded once for all methods, 16 questions a step, 32
    answers at once, those under the zero state guessed to be the bare model's, which are kept. Banks, optimiser,
    knowledge curve, controls and reports are left out of both.
    """
    model = bench.written("slot", 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    questions, answers, turns = bench.questions[:16], bench.answers[:16], bench.turns[:32]
    step, asked = bench.our_step(model, 16), bench.questions
    bare = model.answer(asked, memory="off")

    pieces = {  # (seconds of, divided by)
        "plain turn": (lambda: [plain.encode_turn(bench.backbone, turn) for turn in turns[::8]], 4),
        "turn": (lambda: bench.backbone.encode(turns, autocast="auto", progress=False), 32),
        "plain question": (lambda: plain.step(model, optimizer, questions[:4], answers[:4], model.state), 4),
        "question": (step, 16),
        "plain answer": (lambda: [model.answer([question]) for question in asked[::8]], 4),
        "answer": (lambda: (model.answer(asked), model.answers_under(["zero"], asked, drafts=bare)), 2 * len(asked)),
    }
    train, test = bench.data.train, bench.data.test
    n = dict(train=sum(len(c.turns) for c in train), test=sum(len(c.turns) for c in test),
             trained=10 * sum(len(c.questions) for c in train), asked=2 * sum(len(c.questions) for c in test))
    found = []
    for i in range(1 + max(3, bench.rounds)):
        cost = {}
        for name, (work, times) in pieces.items():
            cost[name] = seconds(work) / times
        slow = 6 * ((10 * n["train"] + n["test"]) * cost["plain turn"] + n["trained"] * cost["plain question"]
                    + n["asked"] * cost["plain answer"])
        fast = (n["train"] + n["test"]) * cost["turn"] + 6 * (n["trained"] * cost["question"] + n["asked"] * cost["answer"])
        found += [slow / fast] if i else []  # the first is to warm up
    low, middle, high = np.quantile(found, [0.25, 0.5, 0.75])
    yield dict(method="all", capacity=1, ratio=middle, low=low, high=high, at_least=100)


def answer(bench: Bench) -> Iterator[dict]:
    """Answering in batches of 32 against one question at a time."""
    model = bench.written("slot", 1)
    yield dict(method="slot", capacity=1, at_least=5, **bench.ratio(
        lambda: model.answer(bench.questions, 16),
        lambda: [model.answer([question], 16) for question in bench.questions], rounds=3))


def generate(bench: Bench) -> Iterator[dict]:
    """Greedy answers to 32 questions, of at most the protocol's 24 tokens, with a bank at 10x against the bare model; the
    bank is read anew for each call, M.1's prefix run through the blocks included."""
    for method in pdmem.METHODS:
        model = bench.written(method, 10)
        with bench.backbone.autocast("auto"):
            yield dict(method=method, capacity=10, at_least=0.7, **bench.ratio(
                lambda: model.answers_under(["own"], bench.questions, 24),  # noqa: B023
                lambda: model.answers_under(["off"], bench.questions, 24)))  # noqa: B023


def growth(bench: Bench) -> Iterator[dict]:
    """A turn written when 100,000 are in memory against when 10 are, and the process' memory then against then."""
    process = psutil.Process()
    for method in ("kv_extension", "hebbian", "slot"):  # one a write rule
        model = pdmem.MemoryModel(bench.backbone, method, 1)
        hidden = bench.hidden[:50]
        model.write_hidden(hidden[:10])
        early, seconds, sizes = model.state, {}, {}

        def some(state, count: int = 200) -> float:
            model.state = state  # noqa: B023
            start = time.perf_counter()
            for i in range(count):
                model.write_hidden([hidden[i % len(hidden)]])  # noqa: B023
            return time.perf_counter() - start

        some(early)
        sizes["early"] = process.memory_info().rss
        for i in range(100_000):
            model.write_hidden([hidden[i % len(hidden)]])
        sizes["late"] = process.memory_info().rss
        late = model.state
        found = []
        for _ in range(max(5, bench.rounds)):
            seconds = {"early": some(early), "late": some(late)}
            found.append(seconds["early"] / seconds["late"])
        low, middle, high = np.quantile(found, [0.25, 0.5, 0.75])
        yield dict(method=method, capacity=1, ratio=middle, low=low, high=high, at_least=0.95)
        grown = sizes["late"] / sizes["early"]
        yield dict(measure="growth: memory (at most)", method=method, capacity=1, ratio=grown, low=grown, high=grown,
                   at_least=1.02)


def entries(bench: Bench) -> Iterator[dict]:
    """A training step at n_P of 64, 640 and 6,400 against 64: how its cost grows (64 against 64 is 1)."""
    base = bench.our_step(bench.written("kv_extension", 1))
    for n in (64, 640, 6400):
        model = pdmem.MemoryModel(bench.backbone, "kv_extension", num_entries=n)
        model.write_hidden(bench.hidden[:10])
        yield dict(method="kv_extension", capacity=n / 64, at_least=float("nan"),
                   **bench.ratio(base, bench.our_step(model)))


def grow_tables(bench: Bench, folder: Path) -> None:
    """growth.csv with its figure, and serving.csv: what a million users' banks would take, from its pieces."""
    table = grow.grow(bench.backbone, bench.rounds)
    table.to_csv(folder / "growth.csv", index=False, float_format="%.4g")
    cost_figures.serving(table).to_csv(folder / "serving.csv", index=False, float_format="%.4g")
    figures.save(cost_figures.growth(table, "What a memory costs as it grows"), folder, "growth")


def profile_tables(bench: Bench, folder: Path) -> None:
    """profile.csv: where the time of a step, an answer and an encoding pass goes, by operator of torch."""
    model = bench.written("slot", 1)
    bare = bench.bare_step()
    works = {"bare step": bare, "step, slot 1x": bench.our_step(model), "step, gated 1x": bench.our_step(bench.written("gated", 1)),
             "step, prefix 10x": bench.our_step(bench.written("prefix", 10)),
             "answers, slot 1x": lambda: model.answer(bench.questions, 16),
             "encoding": lambda: bench.backbone.encode(bench.turns, autocast="auto", progress=False)}
    rows = []
    for name, work in works.items():
        work()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            work()
        table = pd.DataFrame([dict(work=name, operator=event.key, calls=event.count, seconds=event.self_cpu_time_total / 1e6)
                              for event in profiler.key_averages()])
        table["share"] = table["seconds"] / table["seconds"].sum()
        table = table.sort_values("share", ascending=False)
        rest = table.iloc[12:].drop(columns=["work", "operator"]).sum().to_dict()
        rows += [table.iloc[:12], pd.DataFrame([dict(work=name, operator="all others", **rest)])]
    table = pd.concat(rows).assign(backbone=bench.backbone.name)
    table.to_csv(folder / "profile.csv", index=False, float_format="%.4g")


TABLES = {"grow": grow_tables, "profile": profile_tables}  # beside the table of ratios, in files of their own
MEASURES = {"encode": encode, "share of bf16 peak": peak, "train": train, "plain loop: step": plain_step,
            "plain loop: encode": plain_encode, "plain loop: grid, reckoned": plain_grid,
            "answer in batches": answer, "generate": generate, "growth": growth, "entries": entries}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="auto")
    parser.add_argument("--data", default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="*", choices=[*MEASURES, *TABLES], help="measure these alone")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    parser.add_argument("--out", type=Path, default=ROOT / "figures" / f"benchmark{'-gpu' * (gpu is not None)}.csv")
    options = parser.parse_args()
    columns = [*COLUMNS, "device"] if gpu else COLUMNS
    bench = Bench(options.backbone, options.rounds, options.data)
    table = pd.read_csv(options.out, dtype={"capacity": "Int64"}) if options.out.is_file() else pd.DataFrame(columns=columns)
    for name in options.only or [*MEASURES, *TABLES]:
        if name in TABLES:
            TABLES[name](bench, options.out.parent)
            continue
        rows = []
        for row in MEASURES[name](bench):
            rows.append({"measure": name, "backbone": bench.backbone.name, "device": gpu} | row)
            print("{measure:24} {method:16} {capacity!s:>4} {ratio:8.2f}  {low:.2f} to {high:.2f}  at least {at_least}".format(
                **rows[-1]), flush=True)
        keep = ~(table["measure"].str.split(":").str[0].eq(name) | table["measure"].eq(name))
        table = pd.concat([table[keep | (table["backbone"] != bench.backbone.name)], pd.DataFrame(rows)])
        table[columns].to_csv(options.out, index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
