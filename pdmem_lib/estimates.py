"""Is it memory? Paired differences with intervals, the floor of noise, and the verdict, by rules stated here [D].

A *contrast* is the answer under a conversation's own memory minus the same question's answer under another one, by the
same trained adapter. The one that decides is own - other in log-probability: a bank also teaches the form of an answer,
and so does another conversation's; what the right bank brings beyond that is memory, or a bank that is better for any
question, which `comparisons.matched` cancels. Everything here is a pure function of tables; randomness comes from a seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from . import metrics

if TYPE_CHECKING:
    import pandas

ALPHA = 0.05  # every interval holds 95 %
POWER = 0.8  # with which `Estimate.smallest_effect` would have been seen
RESAMPLES = 2000
FEW = 10  # questions, below which no interval of a part is shown
AGAINST = ("other", "zero", "off", "initial", "random", "shuffled")  # own memory minus each of these
SCORES = {"logp": "nats per token", "f1": "points"}
FORMAT = ".format"  # ends the name of a method whose adapter is trained and measured with no memory to read
LORA = ".lora"  # ends the name of a method in whose place LoRA of as many parameters is trained
PRIMARY = ("own - other", "logp")  # the one contrast that gives a verdict
REMEMBERS, UNTOLD, WORSE = "remembers", "cannot be told", "worse"
RULE = (
    "The verdict rests on one quantity, fixed beforehand: the log-probability per answer token under the conversation's "
    "own memory minus that under the other test conversations' memories, by the same adapter. 'remembers': both 95 % "
    "intervals (over questions, over conversations) lie above 0 and the permutation p is below 0.05. 'worse': both lie "
    "below 0 and p is below 0.05. 'cannot be told': anything else, that is, at this sample size the memory cannot be "
    "told apart from a memory of something else."
)


@dataclass(frozen=True)
class Estimate:
    """A mean paired difference. Both intervals are 95 % and take in the spread over seeds where there are several."""

    effect: float
    low: float  # over questions
    high: float
    low_clustered: float  # over conversations; NaN with fewer than two
    high_clustered: float
    p: float  # two-sided, by exchanging the two memories question by question
    smallest_effect: float  # that this sample would have shown in 80 % of cases, by both intervals
    n: int  # questions
    conversations: int
    seeds: int

    @property
    def verdict(self) -> str:
        """`RULE` applied to this estimate."""
        if self.p < ALPHA and self.low > 0 and self.low_clustered > 0:
            return REMEMBERS
        if self.p < ALPHA and self.high < 0 and self.high_clustered < 0:
            return WORSE
        return UNTOLD  # as is whatever holds a NaN

    def scaled(self, scale: float) -> dict[str, float]:
        """The fields, those that have the differences' unit times ``scale``."""
        return {k: v if k in ("p", "n", "conversations", "seeds") else scale * v for k, v in asdict(self).items()}

    def within(self, least: float, most: float) -> Estimate:
        """Of what cannot leave [``least``, ``most``], as a mean score: the intervals, which few seeds make wide, end there."""
        ends = ("low", "high", "low_clustered", "high_clustered")
        return replace(self, **{end: float(np.clip(getattr(self, end), least, most)) for end in ends})


def estimate(differences: ArrayLike, conversations: Sequence, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """The mean of ``differences`` (seeds, Q), a question of ``conversations`` (Q,) a column, with its uncertainty.

    Over questions: the percentile bootstrap. Over conversations: whole conversations are drawn; since G of them are few,
    the interval is t_{G-1} times the bootstrap's standard error, itself times sqrt(G/(G-1)), which is the t interval of
    the conversations' means when they weigh the same. With one seed all of it is conditional on that seed. With S, which
    are few too, the variance of the seeds' means (over S) is added to both and the intervals are t intervals, with
    Satterthwaite's degrees of freedom. p: signs flipped question by question, seeds averaged. ValueError for other shapes
    or values that are not finite.
    """
    from scipy.stats import norm, t

    d = np.atleast_2d(np.asarray(differences, dtype=float))  # (S, Q)
    groups, index = np.unique(np.asarray(conversations), return_inverse=True)
    (S, Q), G = d.shape, len(groups)
    if d.ndim != 2 or Q == 0 or len(index) != Q:
        raise ValueError(f"differences must be (seeds, questions) with a conversation a question, got {d.shape} and "
                         f"{len(index)} conversations")
    if not np.isfinite(d).all():
        raise ValueError("every difference must be finite: leave out questions that were not measured under both memories")
    rng = np.random.default_rng(seed)
    effect, nan = float(d.mean()), float("nan")

    upper, mean = 1 - ALPHA / 2, d.mean(axis=0)  # (Q,)
    among_seeds = [(float(d.mean(axis=1).var(ddof=1)) / S, S - 1)] if S > 1 else []
    means = _draws(rng, Q, resamples) @ mean / Q  # (R,)
    error, freedom = combined([(means.var(), Q - 1), *among_seeds])
    low, high = effect + np.array([-1, 1]) * t.ppf(upper, freedom) * error if S > 1 else np.quantile(means, [1 - upper, upper])
    smallest = ((t.ppf(upper, freedom) + t.ppf(POWER, freedom)) if S > 1 else (norm.ppf(upper) + norm.ppf(POWER))) * error

    low_clustered = high_clustered = nan
    if G > 1:
        drawn = _draws(rng, G, resamples)  # (R, G)
        means = drawn @ np.bincount(index, mean) / (drawn @ np.bincount(index))  # (R,)
        error, freedom = combined([(means.var() * G / (G - 1), G - 1), *among_seeds])
        reach = t.ppf(upper, freedom) * error
        low_clustered, high_clustered = effect - reach, effect + reach
        smallest = max(smallest, (t.ppf(upper, freedom) + t.ppf(POWER, freedom)) * error)
    return Estimate(effect, float(low), float(high), float(low_clustered), float(high_clustered),
                    permutation_p(mean, resamples, seed), float(smallest), Q, G, S)


def combined(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The standard error of a sum of independent estimates, given as (variance, degrees of freedom) each, and its own
    degrees of freedom (Satterthwaite 1946); (0, 1) where nothing varies."""
    total = sum(variance for variance, _ in parts)
    spread = sum(variance**2 / freedom for variance, freedom in parts if variance > 0)
    return total**0.5, total**2 / spread if spread > 0 else 1.0


def permutation_p(differences: ArrayLike, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """Two-sided p of a mean paired difference (Q,) when each question's two memories may be exchanged; never 0."""
    d = np.asarray(differences, dtype=float)
    signs = np.random.default_rng([seed, 1]).choice([-1.0, 1.0], size=(resamples, len(d)))
    as_far = np.abs(signs @ d) >= abs(d.sum()) * (1 - 1e-12)
    return float((1 + as_far.sum()) / (1 + resamples))


def null_retained(lags: ArrayLike, f1_own: ArrayLike, f1_zero: ArrayLike, resamples: int = 1000,
                  seed: int = 0) -> np.ndarray:
    """What noise scores under the published metric: printed means (%) of ``resamples`` simulations, (resamples,).

    Each simulation exchanges own and zero at random question by question, which keeps the questions, the lags and the
    size of every difference and takes all memory away; then clips, averages by bucket and smooths as the metric does.
    ``f1_own`` and ``f1_zero``: (Q,), or (S, Q) of several seeds, whose scores are averaged: a question is exchanged in all
    of them at once, since other trainings differ on the same questions.
    """
    own, zero = (np.atleast_2d(np.asarray(f1, dtype=float)) for f1 in (f1_own, f1_zero))  # (S, Q)
    metrics.retained(own.ravel(), zero.ravel())  # refuses what is not a fraction
    flip = np.random.default_rng(seed).random((resamples, own.shape[1])) < 0.5
    curves = [_clipped_curves(np.where(flip, -d, d), lags) for d in own - zero]  # (R, buckets) each
    return np.mean([np.nanmean(curve, axis=1) for curve in curves], axis=0)


def bucket_intervals(lags: ArrayLike, scores: ArrayLike, resamples: int = RESAMPLES, seed: int = 0) -> pandas.DataFrame:
    """`metrics.forgetting_curve` with the 95 % interval of each bucket's raw mean, in %: columns low and high beside.

    The percentile bootstrap over the bucket's questions; NaN below two of them. It knows no other answers than those it
    draws from: where all score alike the interval has no width, and that of a clipped score never reaches below 0, so
    that lying above 0 proves nothing there. ``lags`` and ``scores`` (Q,) as in `metrics.forgetting_curve`.
    """
    curve = metrics.forgetting_curve(lags, scores)
    labels, scores = np.array([metrics.bucket_of(lag) for lag in lags]), np.asarray(scores, dtype=float)
    low, high = np.full((2, len(curve)), np.nan)
    rng = np.random.default_rng(seed)
    for i, bucket in enumerate(curve["bucket"]):
        inside = scores[labels == bucket]
        if len(inside) > 1:
            means = 100 * _draws(rng, len(inside), resamples) @ inside / len(inside)  # (R,)
            low[i], high[i] = np.quantile(means, [ALPHA / 2, 1 - ALPHA / 2])
    return curve.assign(low=low, high=high)


@dataclass(frozen=True)
class Clipping:
    """What `simulate_clipping` drew: fractions, not %. The first sample is one study, the rest are its repetitions."""

    differences: np.ndarray  # (Q,) of the first sample, own - zero
    unclipped: np.ndarray  # (R,) mean difference of each sample
    published: np.ndarray  # (R,) printed mean of each: clipped, by bucket, smoothed


def simulate_clipping(spread: float, effect: float = 0.0, questions: int = 80, seed: int = 0, repeats: int = 200,
                      lags: ArrayLike | None = None) -> Clipping:
    """Studies of a memory whose true effect is known: normal F1 differences, scored as they are and as published [D].

    ``spread`` is the standard deviation of the differences and ``effect`` their mean, as fractions; what falls outside
    [-1, 1] is put at its end. ``lags`` (questions,) in turns; without them the questions lie evenly over the buckets.
    ValueError for a negative spread, an effect outside [-1, 1], or fewer than one question or repeat.
    """
    if spread < 0 or not -1 <= effect <= 1 or questions < 1 or repeats < 1:
        raise ValueError(f"spread {spread:g}, effect {effect:g}, {questions} questions, {repeats} repeats: the spread "
                         "must be at least 0, the effect lie in [-1, 1], and there must be a question and a repeat")
    if lags is None:
        lags = np.resize([bucket.low for bucket in metrics.LAG_BUCKETS], questions)
    if len(lags) != questions:
        raise ValueError(f"{len(lags)} lags for {questions} questions: give one each")
    d = np.random.default_rng(seed).normal(effect, spread, size=(repeats, questions)).clip(-1, 1)  # (R, Q)
    curves = _clipped_curves(d, lags)
    return Clipping(d[0], d.mean(axis=1), np.nanmean(curves, axis=1) / 100)


def _clipped_curves(differences: np.ndarray, lags: ArrayLike) -> np.ndarray:
    """Smoothed buckets (%) of the clipped differences (R, Q) of R samples with the same lags: (R, buckets)."""
    member = _membership(lags)
    sums = 100 * np.maximum(0.0, differences) @ member  # (R, buckets)
    return _smoothed(sums, np.broadcast_to(member.sum(axis=0), sums.shape))


def _membership(lags: ArrayLike) -> np.ndarray:
    """Which bucket each question lies in, (Q, buckets), 0 or 1."""
    labels = [bucket.label for bucket in metrics.LAG_BUCKETS]
    return np.eye(len(labels))[[labels.index(metrics.bucket_of(lag)) for lag in lags]]


def _smoothed(sums: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Non-increasing fits to the means ``sums / n`` of R samples' buckets, (R, buckets); NaN where a bucket is empty."""
    raw = np.divide(sums, n, out=np.full(sums.shape, np.nan), where=n > 0)
    return np.array([metrics.isotonic_non_increasing(*pair) for pair in zip(raw, n, strict=True)])


# --- from the table of all runs ---------------------------------------------------------------------------------------

def differences(table: pandas.DataFrame, column: str, minus: str) -> tuple[np.ndarray, np.ndarray]:
    """``column - minus`` of one method and capacity: (seeds, Q), and the conversation of each question (Q,).

    ``table`` holds seed, conversation and number beside the two columns, the same questions for every seed, else
    ValueError. Questions not measured under both memories are left out.
    """
    wide = table.assign(value=table[column] - table[minus]).pivot(
        index="seed", columns=["conversation", "number"], values="value")
    measured = wide.notna()
    if (measured.any() != measured.all()).any():
        raise ValueError("the seeds were asked different questions: compare runs of one evaluation setting")
    wide = wide.loc[:, measured.all()]
    return wide.to_numpy(), wide.columns.get_level_values("conversation").to_numpy()


def estimates(table: pandas.DataFrame, resamples: int = RESAMPLES) -> pandas.DataFrame:
    """Every contrast of every method and capacity, from the questions of all their seeds.

    ``table``: method, capacity, seed, conversation, number and logp_<memory>, f1_<memory> for own and any of `AGAINST`
    (and ``format``: the adapter trained with no memory to read). Rows: method, capacity, contrast, score, unit, the
    fields of `Estimate` (nats per token, or points of F1), and verdict, which only `PRIMARY` has. A contrast is over the
    seeds that have it: a grid that is made in pieces has no format run of some yet.
    """
    import pandas as pd

    rows = []
    for (method, capacity), group in _by_method(table):
        for against in (*AGAINST, "format"):
            for score, unit in SCORES.items():
                if f"{score}_{against}" not in group or group[f"{score}_{against}"].isna().all():
                    continue
                with_it = group.groupby("seed")[f"{score}_{against}"].transform(lambda values: values.notna().any())
                found = estimate(*differences(group[with_it], f"{score}_own", f"{score}_{against}"), resamples)
                contrast = f"own - {against}"
                rows.append(dict(method=method, capacity=capacity, contrast=contrast, score=score, unit=unit,
                                 **found.scaled(100 if score == "f1" else 1),
                                 verdict=found.verdict if (contrast, score) == PRIMARY else ""))
    columns = ["method", "capacity", "contrast", "score", "unit", *Estimate.__dataclass_fields__, "verdict"]
    return pd.DataFrame(rows, columns=columns)


def with_memory(table: pandas.DataFrame) -> pandas.DataFrame:
    """The rows of methods that have a memory, with ``logp_format`` and ``f1_format``: the same question, seed and
    capacity, answered by the same adapter trained and read with no memory ("<method>.format"); NaN without that run."""
    keys = ["method", "capacity", "seed", "conversation", "number"]
    trained = table[table["method"].str.endswith(FORMAT)].assign(method=lambda t: t["method"].str.removesuffix(FORMAT))
    trained = trained[[*keys, "logp_own", "f1_own"]].rename(columns={"logp_own": "logp_format", "f1_own": "f1_format"})
    beside = table["method"].str.endswith((FORMAT, LORA)) | (table["method"] == "baseline")
    return table[~beside].merge(trained, on=keys, how="left")


def breakdown(table: pandas.DataFrame, resamples: int = RESAMPLES) -> pandas.DataFrame:
    """own - other (nats per token) by kind of question: method, capacity, kind, value, n, effect, low, high.

    ``table`` as in `estimates`, with lag, category, session_distance, evidence_count and answer_type. Intervals are
    over questions (and seeds); a kind with fewer than `FEW` gets none, since a bootstrap of so few is too short. Many
    intervals are shown at once: one in twenty misses by chance, so a kind alone is never a verdict.
    """
    import pandas as pd

    table, rows = table.reset_index(drop=True), []
    kinds = question_kinds(table)
    for (method, capacity), group in _by_method(table):
        if group["logp_other"].isna().all():
            continue
        for kind, values in kinds.items():
            for value, part in group.groupby(values.loc[group.index], observed=True, sort=True):
                d, conversations = differences(part, "logp_own", "logp_other")
                if d.shape[1] == 0:
                    continue
                found = estimate(d, conversations, resamples)
                low, high = (found.low, found.high) if found.n >= FEW else (float("nan"), float("nan"))
                rows.append(dict(method=method, capacity=capacity, kind=kind, value=str(value), n=found.n,
                                 effect=found.effect, low=low, high=high))
    return pd.DataFrame(rows, columns=["method", "capacity", "kind", "value", "n", "effect", "low", "high"])


def question_kinds(table: pandas.DataFrame) -> dict[str, pandas.Series]:
    """The five ways in which questions are told apart, each an ordered categorical over ``table``'s rows."""
    import pandas as pd

    from .locomo import CATEGORIES

    def ordered(values, order):
        return pd.Series(pd.Categorical(values, categories=order, ordered=True), index=table.index)

    sessions = ["same session", "1–4", "5–9", "10–19", "20+", "no evidence"]
    distance = pd.cut(table["session_distance"], [-1, 0, 4, 9, 19, np.inf], labels=sessions[:5]).astype(object)
    evidence = table["evidence_count"].clip(upper=3).map({0: "none", 1: "1", 2: "2", 3: "3+"})
    return {
        "lag bucket": ordered(table["lag"].map(metrics.bucket_of), [b.label for b in metrics.LAG_BUCKETS]),
        "category": ordered(table["category"].map(CATEGORIES), list(CATEGORIES.values())),
        "session distance": ordered(distance.where(table["session_distance"].notna(), "no evidence"), sessions),
        "evidence count": ordered(evidence, ["none", "1", "2", "3+"]),
        "answer type": ordered(table["answer_type"], metrics.ANSWER_TYPES),
    }


def noise_floor(table: pandas.DataFrame, resamples: int = 1000) -> pandas.DataFrame:
    """The published score beside what noise alone scores: method, capacity, seeds, n, retained_mean, noise_mean,
    noise_high (95 % of simulations stay below), all in %, delta_f1 (points, unclipped), and retained_without_5 with its own
    noise_high_without_5: the mean over questions that have an answer in the conversation.

    Means over the seeds, of the scores as of the simulations, each of which exchanges a question in all seeds at once
    (`null_retained`). ``table`` as in `estimates`, with lag and category.
    """
    import pandas as pd

    rows = []
    for (method, capacity), group in _by_method(table):
        own, zero = (differences(group.assign(none=0.0), score, "none")[0] for score in ("f1_own", "f1_zero"))  # (S, Q)
        asked = group.sort_values(["conversation", "number"]).drop_duplicates(["conversation", "number"])  # in their order
        scores = [metrics.printed_mean(metrics.forgetting_curve(asked["lag"], metrics.retained(*pair)))
                  for pair in zip(own, zero, strict=True)]
        null = null_retained(asked["lag"], own, zero, resamples)
        answered = (own - zero)[:, asked["category"] != 5]
        signs = np.random.default_rng([0, 5]).choice([-1, 1], (resamples, answered.shape[1]))
        null_answered = np.mean([(signs * d).clip(0).mean(axis=1) for d in answered], axis=0)
        rows.append(dict(method=method, capacity=capacity, seeds=len(own), n=len(asked), retained_mean=np.mean(scores),
                         noise_mean=null.mean(), noise_high=np.quantile(null, 1 - ALPHA),
                         delta_f1=100 * (group["f1_own"] - group["f1_zero"]).mean(),
                         retained_without_5=100 * answered.clip(0).mean(),
                         noise_high_without_5=100 * np.quantile(null_answered, 1 - ALPHA)))
    return pd.DataFrame(rows, columns=["method", "capacity", "seeds", "n", "retained_mean", "noise_mean", "noise_high",
                                       "delta_f1", "retained_without_5", "noise_high_without_5"])


def controls(table: pandas.DataFrame) -> pandas.DataFrame:
    """The answer under every memory: method, capacity, memory, value (nats per token), f1 (%). Means over questions and
    seeds; a memory that was not measured has no row. ``table`` as in `estimates`."""
    import pandas as pd

    rows = [dict(method=method, capacity=capacity, memory=memory, value=group[f"logp_{memory}"].mean(),
                 f1=100 * group[f"f1_{memory}"].mean())
            for (method, capacity), group in _by_method(table) for memory in ("own", *AGAINST, "format")
            if f"logp_{memory}" in group and group[f"logp_{memory}"].notna().any()]
    return pd.DataFrame(rows, columns=["method", "capacity", "memory", "value", "f1"])


def turn_finding(turns: pandas.DataFrame, resamples: int = RESAMPLES) -> pandas.DataFrame:
    """Does attention to memory point at the evidence? method, capacity, mrr with low and high, chance, others (the mean
    reciprocal rank of the same evidence under other questions' attention), and the `Estimate` of mrr - others.

    ``turns`` as `provenance.find_turns` gives them, with method, capacity, seed. Only what is beyond ``others`` belongs
    to the question: the rest is recency and length.
    """
    import pandas as pd

    ranks, rows = ["reciprocal_rank", "reciprocal_rank_others"], []
    for (method, capacity), group in _by_method(turns.dropna(subset=ranks).astype(dict.fromkeys(ranks, float))):
        beside = group["reciprocal_rank_others"]
        alike = np.isclose(beside, group["reciprocal_rank"], rtol=0, atol=1e-12)  # the same but for the order of a sum
        group = group.assign(none=0.0, reciprocal_rank_others=beside.where(~alike, group["reciprocal_rank"]))
        mrr = estimate(*differences(group, "reciprocal_rank", "none"), resamples).within(0, 1)
        beyond = estimate(*differences(group, "reciprocal_rank", "reciprocal_rank_others"), resamples)
        rows.append(dict(method=method, capacity=capacity, mrr=mrr.effect, mrr_low=mrr.low, mrr_high=mrr.high,
                         chance=group["chance"].mean(), others=group["reciprocal_rank_others"].mean(), **asdict(beyond)))
    columns = ["method", "capacity", "mrr", "mrr_low", "mrr_high", "chance", "others", *Estimate.__dataclass_fields__]
    return pd.DataFrame(rows, columns=columns)


def retained_intervals(table: pandas.DataFrame, resamples: int = 1000, seed: int = 0) -> pandas.DataFrame:
    """The published score with 95 % intervals over questions: method, capacity, lag (a bucket, or "mean" of the smoothed
    buckets), n, value, low, high, in %, means over the seeds.

    The percentile bootstrap draws questions, the same for all seeds, and does all that the metric does with each draw:
    clip, average by bucket, smooth. A clipped score's interval hardly reaches 0: read it beside `noise_floor`. ``table``
    as there.
    """
    import pandas as pd

    labels, rows = [bucket.label for bucket in metrics.LAG_BUCKETS], []
    for (method, capacity), group in _by_method(table):
        curves: list[np.ndarray] = []
        for _, run in group.groupby("seed"):
            Q, member = len(run), _membership(run["lag"])
            scores = 100 * np.asarray(metrics.retained(run["f1_own"], run["f1_zero"]))
            drawn = np.concatenate([np.ones((1, Q)), _draws(np.random.default_rng(seed), Q, resamples)])  # (1+R, Q)
            curves.append(_smoothed(drawn @ (scores[:, None] * member), drawn @ member))
        counts, mean = member.sum(axis=0).astype(int), np.mean(curves, axis=0)  # (1+R, buckets)
        for lag, count, values in (*zip(labels, counts, mean.T, strict=True), ("mean", Q, np.nanmean(mean, axis=1))):
            low, high = np.nanquantile(values[1:], [ALPHA / 2, 1 - ALPHA / 2]) if count > 1 else (np.nan, np.nan)
            rows.append(dict(method=method, capacity=capacity, lag=lag, n=count, value=values[0], low=low, high=high))
    return pd.DataFrame(rows, columns=["method", "capacity", "lag", "n", "value", "low", "high"])


def reference_points(questions: pandas.DataFrame, references: pandas.DataFrame,
                     resamples: int = RESAMPLES) -> pandas.DataFrame:
    """Quality against cost: a row for the frozen model, each text in its prompt, what was trained without memory, and
    each memory: reference, group, method, capacity, n, f1 (%) with low and high (over questions), locomo (%), logp (nats
    per token), tokens (read per question), seconds (per question), bytes (kept per conversation), and f1_without_5 with
    low_without_5 and high_without_5, of the questions that have an answer in the conversation.

    ``questions``: the runs' tables of questions, ``references`` those of `references.ask_references`.
    """
    import pandas as pd

    def row(label, group, method, capacity, part, f1, locomo):
        part = part.assign(none=0.0)
        found, answered = (estimate(*differences(rows, f1, "none"), resamples).within(0, 1) if len(rows) else None
                           for rows in (part, part[part["category"] != 5]))
        without_5 = [100 * getattr(answered, name, float("nan")) for name in ("effect", "low", "high")]
        return dict(reference=label, group=group, method=method, capacity=capacity, n=found.n, f1=100 * found.effect,
                    low=100 * found.low, high=100 * found.high, locomo=100 * part[locomo].mean(),
                    **{name: part[name].mean() for name in ("logp", "tokens", "seconds", "bytes")},
                    **dict(zip(("f1_without_5", "low_without_5", "high_without_5"), without_5)))

    rows, sizes = [], questions["capacity"].nunique()
    once = references.drop_duplicates(["reference", "conversation", "number"])  # no seed changes them
    for label, part in once.groupby("reference", sort=False):
        part = part.assign(seed=0)
        rows.append(row(label, "frozen" if label == "frozen" else "prompt", "", float("nan"), part, "f1", "locomo"))
    for (method, capacity), part in _by_method(questions[questions["method"] != "baseline"]):
        part = part.assign(logp=part["logp_own"])
        name, kind = next(((method.removesuffix(s), s) for s in (FORMAT, LORA) if method.endswith(s)), (method, ""))
        size = f" {capacity}×" if sizes > 1 and kind != LORA else ""
        label = {FORMAT: f"{name}{size}, no memory to read", LORA: f"LoRA, as large as {name}"}.get(kind, f"{name}{size}")
        rows.append(row(label, "trained without memory" if kind else "memory", method, capacity, part, "f1_own", "locomo_own"))
    return pd.DataFrame(rows)


def _by_method(table: pandas.DataFrame) -> Iterator[tuple[tuple[str, int], pandas.DataFrame]]:
    return iter(table.groupby(["method", "capacity"], sort=False))


def _draws(rng: np.random.Generator, n: int, resamples: int) -> np.ndarray:
    """How often each of n units is drawn in n draws with replacement, (resamples, n)."""
    return rng.multinomial(n, np.full(n, 1 / n), size=resamples).astype(float)
