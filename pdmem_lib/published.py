"""Numbers that others printed, to stand beside ours; nothing here was measured by this project.

[A] is the abstract of the study (arXiv:2603.22329), on frozen GPT-2; [C] its companion on encoder-decoders
(arXiv:2603.16413), the final version on Flan-T5-XL and the first on Flan-T5-base (239 questions of one conversation).
They are other backbones, and [C] another kind of model: beside ours they are a comparison of claims, not of runs.
"""

from typing import TYPE_CHECKING

from . import estimates

if TYPE_CHECKING:
    import pandas

STRONG, WEAK = ("cross_attention", "hebbian", "slot"), ("prefix", "kv_extension", "gated")  # at 1x [A]
COLUMNS = ("source", "backbone", "method", "capacity", "quantity", "lag", "low", "high", "printed")
GPT2, XL, BASE = ("A", "gpt2"), ("C", "flan-t5-xl"), ("C, first version", "flan-t5-base")
BUCKETS = ("0–31", "32–63", "64–127", "128–255", "256+")

# methods, capacity (None: not said), quantity, lag, low, high, as printed. A single number is low and high; what is
# printed as "below" has no low, what is said without a number has neither.
_A = [
    (STRONG, 1, "retained", "", 7, 18, "7–18 %"),
    (STRONG, 1, "ΔK", "", 7, 10, "7–10"),
    (WEAK, 1, "retained", "", None, 0.4, "< 0.4 %"),
    (("prefix", "cross_attention", "kv_extension", "hebbian", "gated", "slot"), 10, "retained", "", None, None,
     "all six converge"),
]
_XL = [
    (("cross_attention",), 1, "retained", "short", 17.85, 17.85, "17.85 %"),
    (("cross_attention",), 1, "retained", "256+", 9.02, 9.02, "9.02 %"),
    (("slot",), 1, "retained", "short", 17.21, 17.21, "17.21"),
    (("slot",), 1, "retained", "256+", 7.08, 7.08, "7.08"),
    (("hebbian",), 1, "retained", "short", 9.51, 9.51, "9.51"),
    (("hebbian",), 1, "retained", "256+", 9.23, 9.23, "9.23"),
    (("hebbian",), 10, "retained", "short", 15.86, 15.86, "15.86"),
    (("hebbian",), 10, "retained", "256+", 10.32, 10.32, "10.32"),
    (("hebbian",), 10, "retained", "mean", 11.60, 11.60, "11.60"),
    (("kv_extension",), 10, "retained", "short", 15.58, 15.58, "15.58"),
    (("kv_extension",), 10, "retained", "mean", 12.05, 12.05, "12.05"),
    (("cross_attention",), None, "K_30", "", 11.04, 11.04, "11.04"),
    (("hebbian",), None, "K_30", "", 10.62, 10.62, "10.62"),
    (("slot",), None, "K_30", "", 9.71, 9.71, "9.71"),
    (("slot",), None, "ΔK", "", 9.71, 9.71, "9.71"),
    (("baseline",), None, "K_30", "", 5.57, 5.57, "5.57"),
    (("off",), None, "F1", "", 6.44, 6.44, "6.44"),
    (("all six",), None, "tax", "", 2.38, 4.23, "2.38–4.23"),
    (("all six",), 10, "benefit", "", 1.83, 6.26, "+1.83 to +6.26"),
]
_BASE = [
    *((("gated",), None, "retained", bucket, value, value, f"{value}")
      for bucket, value in zip(BUCKETS, (24.0, 6.1, 6.1, 5.8, 4.8), strict=True)),
    *((("slot",), None, "retained", bucket, value, value, f"{value}")
      for bucket, value in zip(BUCKETS, (3.2, 3.2, 3.2, 3.1, 3.1), strict=True)),
    *((("cross_attention", "hebbian"), None, "retained", bucket, 0.7, 0.7, "0.7 flat") for bucket in BUCKETS),
    (("prefix", "kv_extension"), None, "retained", "", 0.3, 0.3, "0.3"),
]


def table() -> "pandas.DataFrame":
    """All of them, a row a method and number: source, backbone, method, capacity, quantity, lag, low, high, printed.

    ``method`` is the name in code, "off" the bare frozen model, "all six" a range over the methods. ``quantity``:
    "retained" (the retained-memory score, %), "ΔK" and "K_30" (knowledge curve, points of F1), "F1" (%), "tax" and
    "benefit" (points of F1). ``lag`` is a bucket of lags in turns, "short", "mean" (of the buckets), or "" where none
    is named. ``printed`` is what stands there, ``low`` and ``high`` its numbers, NaN where it has none. ``capacity`` is
    missing where it is not said.
    """
    import pandas as pd

    rows = [(*source, method, capacity, *rest) for source, block in ((GPT2, _A), (XL, _XL), (BASE, _BASE))
            for methods, capacity, *rest in block for method in methods]
    found = pd.DataFrame(rows, columns=list(COLUMNS))
    return found.astype({"capacity": "Int64", "low": float, "high": float})


def beside(questions: "pandas.DataFrame", knowledge: "pandas.DataFrame", verdicts: "pandas.DataFrame",
           resamples: int = 1000) -> "pandas.DataFrame":
    """`table` with what these runs measured beside each number: ours, ours_low and ours_high (95 % over questions and seeds;
    NaN where none is known), n (questions) and verdict (`estimates.RULE`); ours is NaN where it was not run.

    ``questions``: the runs' tables of questions, ``knowledge`` their knowledge curves (method, capacity, seed, session,
    n, K), ``verdicts`` method, capacity and verdict as `estimates.estimates` gives them. Where no capacity is printed,
    ours is that at 1x. "all six" is the range over the methods run at that capacity, in ours_low and ours_high, without
    a value. ΔK and K_30 (after the last session) are means over seeds, and their interval is that of the seeds alone, t,
    NaN with fewer than two: of a knowledge curve the questions' own scores are not kept.
    """
    import pandas as pd

    kept = estimates.with_memory(questions)
    scores = estimates.retained_intervals(kept, resamples).set_index(["method", "capacity", "lag"])
    decided = verdicts.query("verdict != ''").set_index(["method", "capacity"])["verdict"]
    rows = []
    for row in table().itertuples():
        capacity = 1 if pd.isna(row.capacity) else int(row.capacity)
        found = _ours(row, capacity, kept, questions, knowledge, scores)
        rows.append(found | dict(verdict=decided.get((row.method, capacity), "")))
    return pd.concat([table(), pd.DataFrame(rows)], axis=1).astype({"n": "Int64"})


def with_tuned(beside: "pandas.DataFrame", tuned: "pandas.DataFrame") -> "pandas.DataFrame":
    """The table of `beside` and, in columns of their own, what runs at chosen settings measured: tuned, tuned_low,
    tuned_high, tuned_n, tuned_verdict. ``tuned``: those runs' own table of `beside`; of it, only what is of one method."""
    keys = list(COLUMNS[:6])  # what is printed and where, without the numbers
    names = {"ours": "tuned", "ours_low": "tuned_low", "ours_high": "tuned_high", "n": "tuned_n", "verdict": "tuned_verdict"}
    of_one = tuned[~tuned["method"].isin(["off", "all six"])].astype({"lag": object, "verdict": object})
    of_one = of_one.fillna({"lag": "", "verdict": ""})  # a file gives back an empty text as NaN
    of_one = of_one.astype(beside.dtypes[[*keys, "verdict"]].to_dict())
    found = beside.merge(of_one[[*keys, *names]].rename(columns=names), on=keys, how="left", validate="one_to_one")
    return found.fillna({"tuned_verdict": ""}).astype({"tuned_n": "Int64"})


def _ours(row, capacity: int, kept: "pandas.DataFrame", questions: "pandas.DataFrame", knowledge: "pandas.DataFrame",
          scores: "pandas.DataFrame") -> dict:
    """ours, ours_low, ours_high and n for one printed number."""
    import pandas as pd
    from scipy.stats import t

    nan = float("nan")
    missing = dict(ours=nan, ours_low=nan, ours_high=nan, n=None)
    if row.quantity == "retained":
        lag = {"": "mean", "short": BUCKETS[0]}.get(row.lag, row.lag)
        if (row.method, capacity, lag) not in scores.index:
            return missing
        found = scores.loc[(row.method, capacity, lag)]
        return dict(ours=found["value"], ours_low=found["low"], ours_high=found["high"], n=found["n"])
    if row.quantity in ("ΔK", "K_30"):
        mine = knowledge[(knowledge["method"] == row.method) & (knowledge["capacity"] == capacity)]
        if mine.empty:
            return missing
        curves = [run.sort_values("session") for _, run in mine.groupby("seed")]
        gained = pd.Series([run["K"].iloc[-1] - (run["K"].iloc[0] if row.quantity == "ΔK" else 0.0) for run in curves])
        reach = t.ppf(0.975, len(gained) - 1) * gained.std() / len(gained) ** 0.5 if len(gained) > 1 else nan
        return dict(ours=gained.mean(), ours_low=gained.mean() - reach, ours_high=gained.mean() + reach,
                    n=curves[0]["n"].iloc[0 if row.quantity == "ΔK" else -1])
    if row.quantity == "F1":
        one = questions.drop_duplicates(["conversation", "number"]).assign(none=0.0, seed=0)
        found = estimates.estimate(*estimates.differences(one, "f1_off", "none"))
        return dict(ours=100 * found.effect, ours_low=100 * found.low, ours_high=100 * found.high, n=found.n)
    sides = {"tax": ("f1_off", "f1_zero"), "benefit": ("f1_own", "f1_off")}[row.quantity]
    mine = kept[kept["capacity"] == capacity]
    means = [100 * (run[sides[0]] - run[sides[1]]).mean() for _, run in mine.groupby("method")]
    return missing | dict(ours_low=min(means), ours_high=max(means)) if means else missing
