"""Scores of answers and what becomes of them with distance.

Pure functions on plain numbers, strings and arrays. F1 is a fraction in [0, 1]; curves are in %. pandas, scipy
and nltk are imported on use, so that importing the library stays fast. [C] marks the companion paper, [D] our decision.
"""

from __future__ import annotations

import random
import re
import string
from collections import Counter
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    import pandas

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_REFUSALS = ("no information available", "not mentioned")


class Bucket(NamedTuple):
    """A range of lags in turns, both ends included."""

    label: str
    low: int
    high: float


LAG_BUCKETS = (  # [C]
    Bucket("0–31", 0, 31),
    Bucket("32–63", 32, 63),
    Bucket("64–127", 64, 127),
    Bucket("128–255", 128, 255),
    Bucket("256+", 256, float("inf")),
)


# --- one answer -------------------------------------------------------------------------------------------------------

def token_f1(prediction: str | int | float, gold: str | int | float) -> float:
    """SQuAD token F1 in [0, 1]: lower case, no punctuation, no articles [C]. Both empty: 1; one empty: 0."""
    predicted, wanted = _tokens(prediction, "a|an|the"), _tokens(gold, "a|an|the")
    if not predicted or not wanted:
        return float(predicted == wanted)
    return _overlap_f1(predicted, wanted)


def locomo_f1(prediction: str | int | float, gold: str | int | float, category: int) -> float:
    """The benchmark's own score in [0, 1] for a question of ``category`` 1 to 5; numbers are read as text.

    Token F1 over Porter stems, *and* dropped with the articles; nothing in common, even nothing at all, is 0.
    Category 1 (multi-hop) averages over the gold's comma-separated parts the best match of any predicted part;
    3 (open-domain) keeps the gold up to its first semicolon; 5 (adversarial) asks only whether the output declines.
    ValueError for any other category.
    """
    prediction, gold = str(prediction), str(gold)
    if category == 1:
        parts = prediction.split(",")
        return float(np.mean([max(_stem_f1(part, wanted) for part in parts) for wanted in gold.split(",")]))
    if category == 3:
        return _stem_f1(prediction, gold.split(";")[0])
    if category in (2, 4):
        return _stem_f1(prediction, gold)
    if category == 5:
        return float(any(refusal in prediction.lower() for refusal in _REFUSALS))
    raise ValueError(f"LoCoMo has question categories 1 to 5, got {category!r}")


def _tokens(text: str | int | float, dropped: str) -> list[str]:
    plain = str(text).lower().translate(_NO_PUNCTUATION)
    return re.sub(rf"\b({dropped})\b", " ", plain).split()


def _overlap_f1(predicted: list[str], wanted: list[str]) -> float:
    common = (Counter(predicted) & Counter(wanted)).total()
    return 2 * common / (len(predicted) + len(wanted)) if common else 0.0


def _stem_f1(prediction: str, gold: str) -> float:
    stem = _stemmer().stem
    predicted, wanted = ([stem(word) for word in _tokens(text, "a|an|the|and")] for text in (prediction, gold))
    return _overlap_f1(predicted, wanted)


@cache
def _stemmer():
    state = random.getstate()
    from nltk.stem import PorterStemmer  # on its first import it draws from the global generator

    random.setstate(state)
    return PorterStemmer()


ANSWER_TYPES = ("date or time", "number", "yes or no", "not mentioned", "list", "one or two words", "phrase")
_DATED = re.compile(
    r"\b(january|february|march|april|may|june|july|august|september|october|november|december|monday|tuesday|wednesday|"
    r"thursday|friday|saturday|sunday|yesterday|today|tomorrow|(1[89]|20)\d\d|\d+(st|nd|rd|th)|(day|week|weekend|month|year|"
    r"hour|minute|summer|winter|spring|autumn)s?)\b")
_NUMBERS = frozenset("zero one two three four five six seven eight nine ten eleven twelve once twice thrice".split())


def answer_type(gold: str | int | float) -> str:
    """What kind of thing a gold answer is, one of `ANSWER_TYPES`, by its words alone: the first that fits [D]."""
    text = str(gold).lower()
    words = _tokens(text, "a|an|the")
    if _DATED.search(text):
        return "date or time"
    if words and all(word.isdigit() or word in _NUMBERS for word in words[:1]) and len(words) <= 2:
        return "number"
    if words and words[0] in ("yes", "no", "likely", "probably"):
        return "yes or no"
    if any(refusal in text for refusal in _REFUSALS):
        return "not mentioned"
    if "," in text or " and " in text:
        return "list"
    return "one or two words" if len(words) <= 2 else "phrase"


# --- many answers -----------------------------------------------------------------------------------------------------

def retained(f1_own: ArrayLike, f1_zero: ArrayLike) -> np.ndarray:
    """Retained-memory score per question, (Q,) in [0, 1]: what the answer loses with a zeroed state, at least 0 [C].

    ValueError where the two differ in length or hold anything but fractions in [0, 1].
    """
    own, zero = _column("f1_own", f1_own, 0, 1), _column("f1_zero", f1_zero, 0, 1)
    _same_length("f1_own", own, "f1_zero", zero)
    return np.maximum(0.0, own - zero)


def bucket_of(lag: int | float) -> str:
    """The label of the bucket that a lag of so many turns falls into; ValueError below 0."""
    return LAG_BUCKETS[_bucket_indices(_column("lag", [lag]))[0]].label


def isotonic_non_increasing(values: ArrayLike, weights: ArrayLike) -> np.ndarray:
    """The non-increasing sequence nearest to ``values`` in weighted squares [C]; the weighted mean stays the same.

    An entry of weight 0 (an empty bucket) takes no part and comes back NaN, whatever its value [D].
    """
    from scipy.optimize import isotonic_regression

    weights = _column("weights", weights)
    values = np.asarray(values, dtype=float)
    _same_length("values", values, "weights", weights)
    used = weights > 0
    fit = np.full(len(values), np.nan)
    if used.any():
        observed = _column("values of positive weight", values[used], -np.inf, np.inf)
        fit[used] = isotonic_regression(observed, weights=weights[used], increasing=False).x
    return fit


def forgetting_curve(lags: ArrayLike, scores: ArrayLike) -> pandas.DataFrame:
    """Mean score by lag, always the five rows of `LAG_BUCKETS`: bucket, lag_low, lag_high, n, raw, smoothed.

    ``lags`` (Q,) in turns, ``scores`` (Q,) one fraction a question: `retained` for the headline, or an unclipped
    difference in [-1, 1]; nothing is clipped here. ``raw`` is the bucket's mean and ``smoothed`` the non-increasing fit
    weighted by ``n`` [C], both in %, NaN where n = 0. ValueError for unequal lengths, NaN, or values out of range.
    """
    import pandas as pd

    lags, scores = _column("lags", lags), _column("scores", scores, -1, 1)
    _same_length("lags", lags, "scores", scores)
    index = _bucket_indices(lags)
    n = np.bincount(index, minlength=len(LAG_BUCKETS))
    totals = np.bincount(index, weights=scores, minlength=len(LAG_BUCKETS))
    raw = np.divide(100 * totals, n, out=np.full(len(LAG_BUCKETS), np.nan), where=n > 0)
    curve = pd.DataFrame(LAG_BUCKETS).set_axis(["bucket", "lag_low", "lag_high"], axis="columns")
    return curve.assign(n=n, raw=raw, smoothed=isotonic_non_increasing(raw, n))


def printed_mean(curve: pandas.DataFrame) -> float:
    """The paper's Mean of a forgetting curve, in %: every non-empty bucket's smoothed value counts once [C].

    NaN for a curve without any question. The question-weighted mean beside it is simply the mean of the scores.
    """
    return float(curve["smoothed"].mean())


def knowledge_curve(table: pandas.DataFrame) -> pandas.DataFrame:
    """K_s, mean F1 in % after session s: session, n, K, one row a session in order [C].

    ``table`` has one row per question per checkpoint: ``session`` is the checkpoint s, ``f1`` in [0, 1] the answer's
    score then. Choosing the rows (only questions whose evidence lies in sessions <= s) is the caller's part.
    """
    import pandas as pd

    if missing := {"session", "f1"} - set(table.columns):
        raise ValueError(f"a knowledge curve needs the columns session and f1; {', '.join(sorted(missing))} missing")
    tidy = pd.DataFrame({"session": _column("session", table["session"]).astype(int),
                         "f1": _column("f1", table["f1"], 0, 1)})
    curve = tidy.groupby("session", as_index=False)["f1"].agg(n="size", K="mean")
    return curve.assign(K=100 * curve["K"])


def delta_k(curve: pandas.DataFrame) -> float:
    """ΔK = K_last − K_1 in percentage points [A, C], over the sessions with questions; ValueError where none has."""
    if curve.empty:
        raise ValueError("this knowledge curve has no session: pass at least one question's F1 at one checkpoint")
    in_order = curve.sort_values("session")["K"]
    return float(in_order.iloc[-1] - in_order.iloc[0])


def _bucket_indices(lags: np.ndarray) -> np.ndarray:
    return np.searchsorted([bucket.low for bucket in LAG_BUCKETS], lags, side="right") - 1


def _column(name: str, values: ArrayLike, low: int | float = 0, high: int | float = np.inf) -> np.ndarray:
    """``values`` as a float vector, every entry finite and in [low, high]; else a sentence that says which is not."""
    column = np.asarray(values, dtype=float)
    if column.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {column.shape}")
    wrong = ~(np.isfinite(column) & (column >= low) & (column <= high))
    if wrong.any():
        first = int(np.argmax(wrong))
        raise ValueError(f"{name} must be finite numbers in [{low:g}, {high:g}]; entry {first} is {column[first]}")
    return column


def _same_length(name: str, values: np.ndarray, other_name: str, others: np.ndarray) -> None:
    if len(values) != len(others):
        raise ValueError(f"{name} and {other_name} must be of one length, one entry a question or bucket; "
                         f"got {len(values)} and {len(others)}")
