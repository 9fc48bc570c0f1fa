"""What the estimates of one grid say of each other: banks, sizes and groups of methods compared [D].

`matched` asks whether a bank serves its own conversation best, with what it is worth to any question cancelled. A bank may
be better for every question, whoever asks: own - other gains by it in its own conversation and loses as much, in all, in
the others, where it is "another's". Over conversations of different length that does not cancel, and between conversations
it looks like spread. Where all conversations weigh the same it cancels: what is left belongs to the match of bank and
conversation. It is said of these conversations; `estimates.estimate` has the interval for others like them.
"""

from __future__ import annotations

from dataclasses import asdict
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from .estimates import ALPHA, POWER, REMEMBERS, RESAMPLES, UNTOLD, WORSE, Estimate, combined, differences, estimate
from .methods import aliases

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas

MATCHED = ["method", "capacity", "unit", "effect", "low", "high", "p", "p_holm", "smallest_effect", "n", "conversations", "seeds"]


def matched(table: pandas.DataFrame) -> pandas.DataFrame:
    """The mean over conversations of own - other, each weighing the same: a row a method and capacity, columns `MATCHED`.

    In nats per answer token, where "other" is the mean under the banks of all other conversations of the table. The 95 %
    interval is over the questions within each conversation, Welch's t; with several seeds their variance is added as in
    `estimates.estimate`. p: two-sided; p_holm: the same after Holm's correction for all rows; smallest_effect: what would
    have been seen in 80 % of cases. ``table`` as in `estimates.estimates`. A method not asked under other banks, or with
    fewer than two conversations of two questions each, has no row.
    """
    import pandas as pd
    from scipy.stats import t

    rows = []
    for (method, capacity), group in table.groupby(["method", "capacity"], sort=False):
        if group["logp_other"].isna().all():
            continue
        d, conversations = differences(group, "logp_own", "logp_other")  # (S, Q)
        S, inside = len(d), [np.flatnonzero(conversations == name) for name in np.unique(conversations)]
        if len(inside) < 2 or min(map(len, inside)) < 2:
            continue
        by_seed = np.mean([d[:, at].mean(axis=1) for at in inside], axis=0)  # (S,)
        mean, G = d.mean(axis=0), len(inside)
        parts = [(mean[at].var(ddof=1) / len(at) / G**2, len(at) - 1) for at in inside]
        error, freedom = combined(parts + ([(by_seed.var(ddof=1) / S, S - 1)] if S > 1 else []))
        effect, reach = float(by_seed.mean()), t.ppf(1 - ALPHA / 2, freedom)
        p = 2 * t.sf(abs(effect) / error, freedom) if error > 0 else float("nan")
        rows.append((method, capacity, "nats per token", effect, effect - reach * error, effect + reach * error, p, p,
                     (reach + t.ppf(POWER, freedom)) * error, len(mean), G, S))
    found = pd.DataFrame(rows, columns=MATCHED)
    return found.assign(p_holm=holm(found["p"]))


def holm(p: pandas.Series) -> pandas.Series:
    """p-values corrected for their number (Holm 1979): the chance of one so small among all of them. NaN stays NaN."""
    ordered = p.dropna().sort_values()
    steps = range(len(ordered), 0, -1)
    return (ordered * list(steps)).cummax().clip(upper=1).reindex(p.index)


def between_capacities(table: pandas.DataFrame) -> pandas.DataFrame:
    """What a larger memory changes, question by question: a row a method and quantity, for methods asked at two sizes.

    Columns method, quantity ("logp own", "logp own - other", "f1 own"), unit, and the fields of `estimates.Estimate` of the
    larger capacity minus the smaller. Seeds that both have. ``table`` as in `estimates.estimates`.
    """
    import pandas as pd

    rows, keys = [], ["seed", "conversation", "number"]
    for method, group in table.groupby("method", sort=False):
        sizes = sorted(group["capacity"].unique())
        if len(sizes) < 2:
            continue
        small, large = (group[group["capacity"] == size] for size in (sizes[0], sizes[-1]))
        both = large.merge(small, on=keys, suffixes=("_large", "_small"))
        gain = {score: both[f"{score}_large"] - both[f"{score}_small"] for score in ("logp_own", "logp_other", "f1_own")}
        for quantity, value, unit in (("logp own", gain["logp_own"], "nats per token"),
                                      ("logp own - other", gain["logp_own"] - gain["logp_other"], "nats per token"),
                                      ("f1 own", 100 * gain["f1_own"], "points")):
            if value.notna().any():
                found = estimate(*differences(both[keys].assign(value=value, none=0.0), "value", "none"))
                rows.append(dict(method=method, quantity=quantity, unit=unit, **asdict(found)))
    return pd.DataFrame(rows, columns=["method", "quantity", "unit", *Estimate.__dataclass_fields__])


def dichotomy(table: pandas.DataFrame, strong: Sequence[str], weak: Sequence[str],
              resamples: int = RESAMPLES) -> pandas.DataFrame:
    """Do the ``strong`` methods keep more than the ``weak``? Question by question, the mean over the ones minus the mean
    over the others: capacity, score, unit, the fields of `estimates.Estimate`, p_groups and told: "yes", "the reverse", either
    "of the means alone", or `UNTOLD`.

    Intervals and p are over questions, with these methods as they are. p_groups is over methods: the share of all ways to
    split them into groups of these sizes that lie as far apart in this direction; "of the means alone" where another split
    lies farther apart, one method carrying the difference, say. Of F1 own - zero clipped at 0, as the published score has it
    before buckets and smoothing; of F1 own - zero; and of the log-probability own - other. "yes" by the same rule as
    `estimates.RULE`: both intervals above 0, p below 0.05. A capacity at which one of the methods was not run has no rows;
    only seeds that all of them were run with count. ``table`` as in `estimates.estimates`.
    """
    import pandas as pd

    scores = {"retained": ("points", 100, lambda t: (t["f1_own"] - t["f1_zero"]).clip(lower=0)),
              "f1 own - zero": ("points", 100, lambda t: t["f1_own"] - t["f1_zero"]),
              "logp own - other": ("nats per token", 1, lambda t: t["logp_own"] - t["logp_other"])}
    strong, weak = ([aliases().get(name, name) for name in group] for group in (strong, weak))
    sign = {**dict.fromkeys(strong, 1 / len(strong)), **dict.fromkeys(weak, -1 / len(weak))}
    table, rows = table[table["method"].isin(sign)], []
    for capacity, group in table.groupby("capacity"):
        runs = group.groupby("seed")["method"].nunique()
        group = group[group["seed"].isin(runs.index[runs == len(sign)])]
        if group.empty:
            continue
        for score, (unit, scale, value) in scores.items():
            part = group.assign(value=value(group) * group["method"].map(sign))
            summed = part.groupby(["seed", "conversation", "number"], as_index=False)["value"].sum(min_count=len(sign))
            found = estimate(*differences(summed.assign(none=0.0), "value", "none"), resamples)
            told = {REMEMBERS: "yes", WORSE: "the reverse", UNTOLD: UNTOLD}[found.verdict]
            means = part.groupby("method")["value"].mean() / pd.Series(sign)
            here, *apart = (np.sign(found.effect) * (means[list(one)].mean() - means.drop(list(one)).mean())
                            for one in (strong, *combinations(means.index, len(strong))))
            told += " of the means alone" if told != UNTOLD and max(apart) > here + 1e-12 else ""
            p_groups = np.mean(np.array(apart) >= here - 1e-12)
            rows.append(dict(capacity=capacity, score=score, unit=unit, **found.scaled(scale), p_groups=p_groups, told=told))
    return pd.DataFrame(rows, columns=["capacity", "score", "unit", *Estimate.__dataclass_fields__, "p_groups", "told"])
