"""A task with a known answer: how much of a told fact a bank keeps, and how much of that its reader uses [D].

An episode is small talk, facts ("Ann: The code of the lamp is K K K K K K K K."), and more turns; the question asks for
one of the codes with the bank in place of the turns, so nothing but the bank can answer it. Three axes are varied:
``lag`` (turns since the fact), ``load`` (facts in the bank, any of which may be asked) and ``interference`` (how many
of the turns since the fact tell another thing's code).

What the bank keeps needs no training (`retention`). The *trace*: of the difference that another code makes to the bank
in the fact's own turn, the share still there at the question. The write rule fixes it (`trace_theory`) as long as the
fact does not change where later turns are written. The *probe*: a linear classifier from banks to codes. What the
reader uses needs a trained adapter (`recall`). Where the trace is gone no reader can help; where the probe finds the
code and the reader does not, the reader is at fault.

The adapter is trained to rank the candidate codes, and each step holds one episode of every code: nearly all of a bank
is common to all banks, and a step with more episodes of one code would teach that common part to answer it.
"""

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import seam, write
from .backbone import Backbone
from .memory import MemoryModel
from .prompts import ANSWER, PROMPT
from .methods import REGISTRY, AttentionCoupledBank, HebbianMatrix, Inputs, MemorySettings, Method, SparseSlots, State
from .settings import Settings
from .sources import settings_sha256
from .training import descend

if TYPE_CHECKING:
    import pandas

NAMES = "Ann", "Bob", "Cleo", "Dan"
TOPICS = "rain tea bus song train soup news park cake shoe bird film road snow milk jazz".split()
KEYS = "lamp door safe bike desk gate shed boat tent case tool barn cart loft crib hall sofa oven sink vase".split()
SMALL_TALK = [f"{name}: I like {topic}." for name in NAMES for topic in TOPICS]
FACT = "Ann: The code of the {key} is {code}."
QUESTION = "What is the code of the {key}?"
PROBE_ALPHAS = [10.0**k for k in range(-8, 3)]  # ridge, in units of the banks' variance
PROBE_FOLDS = 4
TINY = 1e-12  # keeps weights that underflow from all being zero


# For a pretrained backbone: a tenth of the learning rate, and as few points as an hour on two cores allows.
PRETRAINED = dict(lags=(0, 4, 16, 32, 64, 128), loads=(1, 2, 4, 8), interference=(0, 4, 16), rows=16, probe_rows=12,
                  steps=240, rows_a_step=1, lr=0.003, autocast="auto")

# For a lesson: one axis, trained while one watches, about a minute on two cores with SmolLM2-135M.
LESSON = dict(lags=(0, 4, 16, 64), loads=(), interference=(), rows=8, probe_rows=8, pairs=4, steps=120, lr=0.003,
              autocast="auto")


@dataclass(frozen=True)
class RecallSettings(Settings):
    """The points that are measured, and how the adapter is trained for them. The defaults suit a tiny backbone."""

    lags: tuple[int, ...] = (0, 4, 8, 16, 32, 64, 128)  # turns since the only fact
    loads: tuple[int, ...] = (1, 2, 4, 8, 16)  # facts told one after the other, one of them asked at once
    interference: tuple[int, ...] = (0, 4, 8, 16)  # of the ``interference_lag`` turns since the fact
    interference_lag: int = 16
    codes: tuple[str, ...] = ("K", "V", "Z", "Q")  # the candidate answers
    repeats: int = 8  # how often a fact says its code
    before: int = 4  # turns of small talk before the first fact
    rows: int = 24  # test episodes per code and point
    probe_rows: int = 32  # probe episodes per code and point; there the first key is asked
    pairs: int = 8  # pairs of episodes a point, for the trace; at a load rounded up to a multiple of it
    steps: int = 350
    rows_a_step: int = 1  # each of one episode per code
    lr: float = 0.03  # AdamW without weight decay, cosine
    warmup_steps: int = 5
    clip: float = 1.0
    autocast: bool | str = False  # for the reader; banks are float32

    def __post_init__(self):
        super().__post_init__()
        for name, lowest, highest in (("lags", 0, None), ("loads", 1, len(KEYS)),
                                      ("interference", 0, min(len(KEYS) - 1, self.interference_lag))):
            values = getattr(self, name)
            whole = all(isinstance(x, int) and not isinstance(x, bool) for x in values)
            self.require(whole and list(values) == sorted(set(values)) and all(x >= lowest for x in values),
                         f"{name} must be whole numbers from {lowest} on, in ascending order, got {values}")
            self.require(highest is None or all(x <= highest for x in values),
                         f"{name} can be {highest} at most (there are {len(KEYS)} keys and {self.interference_lag} "
                         f"turns to interfere in), got {values}")
        self.require(any((self.lags, self.loads, self.interference)), "give at least one lag, load or interference")
        self.require(len(self.codes) >= 2 and len(set(self.codes)) == len(self.codes) and all(self.codes),
                     f"codes must be two or more different words, got {self.codes}")
        self.require(self.rows >= 1 and self.rows % (2 * len(self.codes)) == 0,
                     f"rows must be a multiple of {2 * len(self.codes)}, twice the codes, for banks of other episodes "
                     f"to hold every code alike; got {self.rows}")
        self.require(self.probe_rows >= PROBE_FOLDS, f"probe_rows must be at least {PROBE_FOLDS}, one a fold")
        self.require(min(self.repeats, self.pairs, self.steps, self.rows_a_step) >= 1,
                     "repeats, pairs, steps and rows_a_step must be at least 1")
        self.require(min(self.before, self.warmup_steps) >= 0, "before and warmup_steps cannot be negative")
        self.require(self.lr > 0 and self.clip > 0, "lr and clip must be above 0")

    def series(self) -> list[list["Point"]]:
        """The points; those of one list lie on the same episodes, asked at different times."""
        return [[Point("lag", x, lag=x) for x in self.lags]] * bool(self.lags) + [
            [Point("load", x, load=x)] for x in self.loads] + [
            [Point("interference", x, lag=self.interference_lag, interference=x)] for x in self.interference]


class Point(NamedTuple):
    """Where recall is measured: ``x`` is the value on ``axis``; ``lag`` counts the turns after the last fact."""

    axis: str
    x: int
    lag: int = 0
    load: int = 1
    interference: int = 0


class Episode(NamedTuple):
    """Turns, and which of them tells the code that is asked."""

    turns: list[str]
    fact: int


class Bounds(NamedTuple):
    """A closed interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Recall:
    """``table``: a row a point, see `recall`; ``history``: a row a training step; ``model`` has the trained adapter."""

    table: "pandas.DataFrame"
    history: "pandas.DataFrame"
    model: MemoryModel
    settings: RecallSettings


# ---- what theory allows ----
def data_sha256(settings: RecallSettings) -> str:
    """SHA-256 of what the test episodes are drawn by: the settings without those of training. A run's seed comes to it."""
    training = ("steps", "rows_a_step", "lr", "warmup_steps", "clip", "autocast")
    return settings_sha256({name: value for name, value in asdict(settings).items() if name not in training})


def trace_theory(settings: MemorySettings, lag: int, write_norm: float = HebbianMatrix.WRITE_NORM) -> Bounds:
    """The share of a fact's mark that the write rule leaves after ``lag`` more turns, if addresses do not depend on it.

    Attention-coupled: gamma^lag. Hebbian: gamma^lag, less where turns of norm ``write_norm`` keep the matrix at its
    norm bound. Slots: from gamma^lag, the same ``top_k`` slots winning every turn, to (1 - (1 - gamma) top_k / S)^lag,
    turns spread evenly over the S slots. The baseline keeps nothing: ValueError.
    """
    if lag < 0:
        raise ValueError(f"a lag is a number of turns since the fact and cannot be negative, got {lag}")
    family, gamma = REGISTRY[settings.method], settings.gamma
    low = high = gamma**lag
    if issubclass(family, HebbianMatrix):
        low = (gamma / max(1.0, gamma + write_norm)) ** lag
    elif issubclass(family, SparseSlots):
        high = (1 - (1 - gamma) * settings.top_k / settings.num_entries) ** lag
    elif not issubclass(family, AttentionCoupledBank):
        raise ValueError(f"{settings.method!r} follows none of the three write rules: no trace is known for it")
    return Bounds(low, high)


def key_blind(load: int, num_codes: int) -> float:
    """The best accuracy of a reader that knows the codes told in ``load`` facts, but not which belongs to which key.

    It answers the commonest code: E[max count] / load, for codes drawn evenly. 1 at load 1.
    """
    import numpy as np

    expected, ways = 0.0, num_codes**load / math.factorial(load)
    for most in range(load):  # E[max] is the sum over m >= 0 of P(max > m)
        counts = np.array([1 / math.factorial(j) for j in range(most + 1)])
        coefficients = np.array([1.0])
        for _ in range(num_codes):
            coefficients = np.convolve(coefficients, counts)[: load + 1]
        at_most = coefficients[load] / ways if len(coefficients) > load else 0.0
        expected += 1 - at_most
    return expected / load


# ---- episodes ----
def fact(key: str, code: str, repeats: int) -> str:
    """The turn that tells ``code``."""
    return FACT.format(key=key, code=" ".join([code] * repeats))


def episode(rng: random.Random, settings: RecallSettings, point: Point, key: str, position: int, code: str) -> Episode:
    """``before`` small talk, ``load`` facts with the asked one at ``position``, ``lag`` turns of small talk and facts.

    The draws do not depend on ``code``: the same ``rng`` gives episodes that differ in the asked code alone.
    """
    small_talk = partial(rng.choice, SMALL_TALK)
    others = rng.sample([k for k in KEYS if k != key], point.load - 1 + point.interference)
    told = [fact(other, rng.choice(settings.codes), settings.repeats) for other in others]
    facts, later = told[: point.load - 1], told[point.load - 1 :]
    facts.insert(position, fact(key, code, settings.repeats))
    later += [small_talk() for _ in range(point.lag - point.interference)]
    rng.shuffle(later)
    return Episode([small_talk() for _ in range(settings.before)] + facts + later, settings.before + position)


class _Lab:
    """A model, its settings and the hidden states of every turn that can occur, each encoded once."""

    def __init__(self, backbone: Backbone, method: str, capacity: int, seed: int, settings: dict):
        memory = {f.name for f in fields(MemorySettings)} - {"method", "capacity", "seed"}
        overrides = {name: settings[name] for name in settings if name in memory}
        self.settings = RecallSettings.from_mapping({k: v for k, v in settings.items() if k not in overrides})
        self.model = MemoryModel(backbone, method, capacity, seed, **overrides)
        if not self.model.reset():
            raise ValueError(f"{method!r} keeps no state, so nothing can be recalled from it: choose another method")
        self.adapter: Method = self.model.adapter
        self.seed = seed
        texts = SMALL_TALK + [fact(key, code, self.settings.repeats) for key in KEYS for code in self.settings.codes]
        self.hidden = dict(zip(texts, backbone.encode(texts), strict=True))

    def rng(self, *what) -> random.Random:
        """A generator of its own for this seed and purpose."""
        return random.Random("/".join(map(str, (self.seed, *what))))

    def write(self, state: State, turn: str) -> State:
        return self.adapter.write(state, self.hidden[turn])

    def banks(self, series: Sequence[Point], written: Episode) -> list[State]:
        """The bank at each point of a series, whose episode is the last point's."""
        stops = _stops(series, written)
        state, at = self.adapter.initial_state(), {}
        for i, turn in enumerate(written.turns):
            state = self.write(state, turn)
            if i in stops:
                at[i] = state
        return [at[i] for i in stops]

    def row(self, rng: random.Random, series: Sequence[Point], key: str, position: int) -> list[list[State]]:
        """One episode per code, everything else drawn anew for each -> banks[point][code]."""
        episodes = [episode(rng, self.settings, series[-1], key, position, code) for code in self.settings.codes]
        return [list(banks) for banks in zip(*(self.banks(series, e) for e in episodes), strict=True)]


def _stops(series: Sequence[Point], written: Episode) -> list[int]:
    """The last turn before the question, at each point."""
    return [len(written.turns) - 1 - (series[-1].lag - point.lag) for point in series]


# ---- what the bank keeps ----
def retention(backbone: Backbone, method: str, capacity: int = 1, seed: int = 42, **settings) -> "pandas.DataFrame":
    """What banks keep of a fact, whatever reads them; nothing is trained. Keywords as in `recall`.

    A row a point: axis, x; then

    * ``trace``: <D, D_0> / <D_0, D_0>, D the difference between the banks of two episodes that differ in the asked code
      alone, D_0 the same right after the fact; ``distance``: |D| / |D_0|. Means over ``pairs``; NaN if D_0 is zero.
    * ``trace_theory``: the trace if the code changes no address, from which slots were written and when the norm bound
      divided. ``trace_low``, ``trace_high``: without that knowledge (`trace_theory`). At a load: means over positions.
    * ``rerouted``: the share of the later turns' write weight that goes to other entries in the one episode than in the
      other. Where it is not 0, the difference feeds on itself: ``distance`` may exceed 1 and ``trace`` leave theory.
    * ``slots_written``: distinct slots written in an episode; NaN without slots.
    * ``probe``: accuracy of a cross-validated linear classifier from banks to codes.
    """
    return _retention(_Lab(backbone, method, capacity, seed, settings))


def _retention(lab: _Lab) -> "pandas.DataFrame":
    import pandas as pd

    rows = []
    for series in lab.settings.series():
        traces = _mean_traces(lab, series)
        rng = lab.rng("probe", *series[-1])
        drawn = [lab.row(rng, series, KEYS[0], rng.randrange(series[-1].load)) for _ in range(lab.settings.probe_rows)]
        for i, point in enumerate(series):
            low, high = _mean_bounds(lab, point)
            rows.append(dict(axis=point.axis, x=point.x, **traces[i], trace_low=low, trace_high=high,
                             probe=_probe([row[i] for row in drawn], seed=lab.seed)))
    return pd.DataFrame(rows)


def _mean_bounds(lab: _Lab, point: Point) -> Bounds:
    """`trace_theory`, averaged over the positions that the fact can have."""
    bounds = [trace_theory(lab.model.settings, point.lag + age) for age in range(point.load)]
    return Bounds(*(sum(side) / point.load for side in zip(*bounds, strict=True)))


def _mean_traces(lab: _Lab, series: Sequence[Point]) -> list[dict[str, float]]:
    """`_traces` at each point, averaged over pairs: at a load, over as many more as every position takes part alike."""
    rng, codes = lab.rng("pairs", *series[-1]), lab.settings.codes
    measured, load = [], series[-1].load
    for pair in range(math.ceil(lab.settings.pairs / load) * load):
        key, (one, other), draws = rng.choice(KEYS), rng.sample(codes, 2), rng.random()
        two = [episode(random.Random(draws), lab.settings, series[-1], key, pair % load, code)
               for code in (one, other)]
        measured.append(list(_traces(lab, series, *two)))
    return [{name: sum(m[i][name] for m in measured) / len(measured) for name in measured[0][i]}
            for i in range(len(series))]


def _traces(lab: _Lab, series: Sequence[Point], one: Episode, other: Episode) -> Iterator[dict[str, float]]:
    """The trace at each point, measured on one pair of episodes; all its sums in float64."""
    adapter, stops = lab.adapter, _stops(series, one)
    states = [adapter.initial_state()] * 2
    kept, rerouted, used = [torch.ones((), dtype=torch.float64)] * 2, 0.0, torch.tensor(False)
    for i, turns in enumerate(zip(one.turns, other.turns, strict=True)):
        if i > one.fact:
            H = lab.hidden[turns[0]]
            rerouted += _rerouted(adapter, states, H)
            kept = [k * adapter.decay(state, H).double() for k, state in zip(kept, states, strict=True)]
        before = states[0]
        states = [lab.write(state, turn) for state, turn in zip(states, turns, strict=True)]
        used = used | _entries(before).ne(_entries(states[0])).any(dim=1)  # (M,)
        difference = (_entries(states[0]) - _entries(states[1])).double()  # (M, width)
        if i == one.fact:
            first, weight = difference, difference.square().sum(dim=1)  # (M,)
        if i in stops:
            total = float(weight.sum()) or math.nan
            slots = isinstance(adapter, SparseSlots)
            yield dict(trace=float((difference * first).sum()) / total,
                       distance=float(difference.norm()) / total**0.5,
                       trace_theory=float((weight * (kept[0] + kept[1]) / 2).sum()) / total,
                       rerouted=rerouted / max(1, i - one.fact),
                       slots_written=float(used.sum()) if slots else math.nan)


def _entries(state: State) -> Tensor:
    (bank,) = state.values()
    return bank


def _rerouted(adapter: Method, states: Sequence[State], H: Tensor) -> float:
    """The share of H's write weight that goes to other entries in the one state than in the other."""
    if isinstance(adapter, HebbianMatrix):
        return 0.0  # every turn is added to the whole matrix
    one, other = (_address(adapter, state, H) for state in states)
    return float((one - other).abs().sum(dim=1).mean() / 2)


def _address(adapter: Method, state: State, H: Tensor) -> Tensor:
    """How a write spreads over the entries; every row sums to 1: (T, M), or for slots (1, S)."""
    if isinstance(adapter, SparseSlots):
        written = write.sparse_slot_choice(state["P"], H, adapter.write_a, adapter.settings.top_k)
        return H.new_zeros(1, len(state["P"])).index_fill(1, written, 1 / len(written))
    return write.attention_coupled_weights(state["P"], H, adapter.write_Q, adapter.write_K)


def _probe(rows: Sequence[Sequence[State]], seed: int) -> float:
    """Cross-validated accuracy of a linear classifier from banks[row][code] to the code.

    Ridge regression knows banks by their inner products alone, so it is given the coordinates of the n banks in the
    space that they span, (n, n), in place of their up to 656,100 numbers each. A small n makes it a lower bound: at
    gamma = 1 it needs more banks than there are texts of small talk.
    """
    import numpy as np
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    X = torch.stack([_entries(bank).flatten() for row in rows for bank in row]).double()  # (n, width)
    X = X - X.mean(dim=0)
    values, vectors = torch.linalg.eigh(X @ X.T)
    if not values[-1] > 0:
        return 1 / len(rows[0])  # all banks are the same
    coordinates = vectors * (values / values.mean()).clamp_min(0).sqrt()  # (n, n)
    folds = StratifiedKFold(PROBE_FOLDS, shuffle=True, random_state=seed)
    codes = np.tile(np.arange(len(rows[0])), len(rows))
    return float(cross_val_score(RidgeClassifierCV(PROBE_ALPHAS), coordinates.cpu().numpy(), codes, cv=folds).mean())


# ---- what the reader uses ----
def recall(backbone: Backbone, method: str, capacity: int = 1, seed: int = 42,
           on_step: Callable[[int, MemoryModel], None] | None = None, **settings) -> Recall:
    """Train one adapter on episodes of all points and measure its recall at each, on new episodes.

    ``on_step(step, model)`` is called after each training step, from 0, to watch the adapter change.

    Keywords as in `RecallSettings`, and ``gamma``, ``top_k``, ``num_entries`` ... as in `MemorySettings`; ``seed`` sets
    the memory and the episodes. The table has a row a point: axis, x, n (episodes), accuracy with its Wilson 95 %
    interval low to high, chance, key_blind (the best without telling keys apart: `key_blind`), accuracy_other (reading
    another episode's bank), accuracy_zero (a zero state), logp_own_minus_other (nats, of the right code among the
    candidates), and the columns of `retention`. The history has step, loss (nats; chance is ln of the number of codes),
    lr, grad_norm (before clipping) and seconds. ValueError for the baseline, which has no memory.
    """
    import pandas as pd

    lab = _Lab(backbone, method, capacity, seed, settings)
    reader = _Reader(lab)
    history = _train(lab, reader, on_step)
    table = pd.DataFrame([row for series in lab.settings.series() for row in _measure(lab, reader, series)])
    return Recall(table.merge(_retention(lab), on=["axis", "x"], validate="1:1"), history, lab.model, lab.settings)


class _Reader:
    """Ranks the candidate codes, from many banks at once: (B, codes) log-probabilities among the candidates."""

    def __init__(self, lab: _Lab):
        self.model, self.autocast = lab.model, lab.settings.autocast
        backbone, codes = self.model.backbone, lab.settings.codes
        answers = [backbone.token_ids(ANSWER.format(answer=code), special=False) for code in codes]
        shared = next((i for i, tokens in enumerate(zip(*answers)) if len(set(tokens)) > 1), 0)
        self.candidates = [answer[shared] for answer in answers]  # the token at which they part
        if len(set(self.candidates)) < len(codes):
            raise ValueError(f"codes {codes} do not all part at the same token of {backbone.name}: choose codes whose "
                             "first tokens differ")
        prompts = {key: PROMPT.format(question=QUESTION.format(key=key)) for key in KEYS}
        self.ids = {key: backbone.token_ids(prompt) + answers[0][:shared] for key, prompt in prompts.items()}
        self.hidden = dict(zip(KEYS, backbone.encode(list(prompts.values())), strict=True))

    def __call__(self, banks: Sequence[State], keys: Sequence[str]) -> Tensor:
        backbone = self.model.backbone
        ids, mask = backbone.pad([self.ids[key] for key in keys], side="right")  # (B, T)
        with backbone.autocast(self.autocast):
            injection = self.model.adapter.read_each(banks, [self.inputs(key, ids.shape[1]) for key in keys])
            with seam.inject(backbone.model, injection):  # right padding under a causal mask needs no mask
                hidden = backbone.model.base_model(ids, use_cache=False).last_hidden_state  # (B, T, d)
        last = hidden[torch.arange(len(banks), device=ids.device), mask.sum(dim=1) - 1]  # (B, d)
        to_candidates = backbone.model.get_output_embeddings().weight[self.candidates]  # (codes, d)
        return (last.float() @ to_candidates.float().T).log_softmax(dim=-1)

    def inputs(self, key: str, T: int) -> Inputs:
        """The question's frozen states, padded to T: (1, T, d)."""
        H = self.hidden[key]
        valid = torch.arange(T, device=H.device) < len(H)
        return Inputs(F.pad(H, (0, 0, 0, T - len(H)))[None], valid[None])


@torch.inference_mode(False)
@torch.enable_grad()
def _train(lab: _Lab, reader: _Reader,
           on_step: Callable[[int, MemoryModel], None] | None = None) -> "pandas.DataFrame":
    """Cross-entropy over the candidates, on new episodes at every step.

    Axes are drawn alike, an axis' points in proportion to the trace that theory leaves at most: a bank that keeps
    nothing teaches nothing.
    """
    import pandas as pd

    s, parameters, rng = lab.settings, lab.model.parameters(), lab.rng("train")
    points = [point for series in s.series() for point in series]
    axes = [[point for point in points if point.axis == axis] for axis in dict.fromkeys(p.axis for p in points)]
    weight = {point: _mean_bounds(lab, point).high for point in points}
    codes = torch.arange(len(s.codes), device=lab.model.backbone.device).repeat(s.rows_a_step)
    optimizer = torch.optim.AdamW(parameters, lr=s.lr, weight_decay=0.0)
    rows, start = [], time.perf_counter()
    for step in range(s.steps):
        banks, keys = [], []
        for _ in range(s.rows_a_step):
            axis, key = rng.choice(axes), rng.choice(KEYS)
            (point,) = rng.choices(axis, [weight[p] + TINY for p in axis])
            banks += lab.row(rng, [point], key, rng.randrange(point.load))[0]
            keys += [key] * len(s.codes)
        lr = s.lr * min((step + 1) / max(1, s.warmup_steps), 0.5 * (1 + math.cos(math.pi * step / s.steps)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss, grad_norm = descend([F.nll_loss(reader(banks, keys), codes)], optimizer, parameters, s.clip)
        rows.append(dict(step=step, loss=loss, lr=lr, grad_norm=grad_norm, seconds=time.perf_counter() - start))
        if on_step:
            on_step(step, lab.model)
    return pd.DataFrame(rows)


@torch.no_grad()
def _measure(lab: _Lab, reader: _Reader, series: Sequence[Point]) -> Iterator[dict[str, float]]:
    """A row a point. Rows 2i and 2i + 1 ask the same question, so that each can read the other's banks."""
    from scipy.stats import binomtest

    s, rng = lab.settings, lab.rng("test", *series[-1])
    C, load = len(s.codes), series[-1].load
    own: list[list[Tensor]] = [[] for _ in series]
    zero = []
    empty = lab.model.resolve("zero")
    for _ in range(s.rows // 2):
        key, position = rng.choice(KEYS), rng.randrange(load)
        two = [lab.row(rng, series, key, position) for _ in range(2)]
        for i in range(len(series)):
            own[i].append(reader([bank for row in two for bank in row[i]], [key] * 2 * C))  # (2 C, C)
        zero.append(reader([empty], [key]).argmax(dim=1))  # (1,)
    code = torch.arange(C).expand(s.rows, C)  # (rows, C)
    row = torch.arange(s.rows)[:, None]
    strangers = row ^ 1, (code + row // 2) % C  # the partner row; every code meets all codes alike
    guesses = torch.cat(zero).cpu().repeat_interleave(2)[:, None]  # (rows, 1)
    for point, log_probs in zip(series, own, strict=True):
        mine = torch.cat(log_probs).view(s.rows, C, C).cpu()  # row, told, candidate
        theirs = mine[strangers]  # row, right answer, candidate
        hits = mine.argmax(dim=-1) == code
        interval = binomtest(int(hits.sum()), hits.numel()).proportion_ci(method="wilson")
        gain = (mine - theirs).gather(2, code[..., None])  # (rows, C, 1)
        yield dict(axis=point.axis, x=point.x, n=hits.numel(), accuracy=float(hits.double().mean()),
                   low=interval.low, high=interval.high, chance=1 / C, key_blind=key_blind(load, C),
                   accuracy_other=float((theirs.argmax(dim=-1) == code).double().mean()),
                   accuracy_zero=float((guesses == code).double().mean()), logp_own_minus_other=float(gain.mean()))
