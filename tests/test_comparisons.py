"""Banks, sizes and groups of methods compared: what is planted is told, and what only looks like it is not."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from pdmem_lib import comparisons, estimates
from pdmem_lib.estimates import UNTOLD
from pdmem_lib.methods import METHODS
from test_estimates import SIX, six_methods

SIZES = dict(zip("abc", (160, 60, 40), strict=True))  # conversations differ in length


def banks(content=0.0, quality=0.0, seeds=1, across=0.0, seed=0, capacity=1):
    """Questions asked under every bank: a bank helps any question by its ``quality`` (sd), its own by ``content`` too."""
    rng, rows = np.random.default_rng(seed), []
    for run in range(seeds):
        better = dict(zip(SIZES, quality * rng.normal(size=len(SIZES)), strict=True))
        shift = across * rng.normal()
        for name, n in SIZES.items():
            base = rng.normal(-3, 1, n)
            under = {bank: base + worth + (content + shift) * (bank == name) + 0.03 * rng.normal(size=n)
                     for bank, worth in better.items()}
            own, others = under[name], [under[bank] for bank in SIZES if bank != name]
            rows.append(pd.DataFrame(dict(method="slot", capacity=capacity, seed=run, conversation=name, number=range(n),
                                          logp_own=own, logp_other=np.mean(others, axis=0), f1_own=0.2 + 0.1 * (capacity > 1))))
    return pd.concat(rows, ignore_index=True)


def test_matched_by_hand():
    own, other = [1.0, 3.0, 2.0, 2.0, 8.0], [0.0, 0.0, 0.0, 1.0, 1.0]
    table = pd.DataFrame(dict(method="slot", capacity=1, seed=0, conversation=list("aabbb"), number=range(5),
                              logp_own=own, logp_other=other))
    [row] = comparisons.matched(table).to_dict("records")
    assert row["effect"] == pytest.approx((2 + 10 / 3) / 2)  # conversations weigh the same, not questions
    welch = stats.ttest_ind([1.0, 3.0], [-2.0, -1.0, -7.0], equal_var=False)  # a's mean minus that of minus b's
    assert row["p"] == pytest.approx(welch.pvalue) == row["p_holm"]
    assert (row["low"], row["high"]) == pytest.approx(tuple(bound / 2 for bound in welch.confidence_interval()))
    assert (row["n"], row["conversations"], row["seeds"]) == (5, 2, 1)
    assert comparisons.matched(table[table["conversation"] == "a"]).empty
    assert comparisons.matched(table.assign(logp_other=np.nan)).empty


def test_a_bank_that_is_better_for_all_is_not_taken_for_memory_nor_hides_it():
    quiet = [comparisons.matched(banks(quality=0.1, seed=i)).iloc[0] for i in range(100)]
    assert sum(row["p"] < 0.05 for row in quiet) <= 11  # 5 expected
    assert np.mean([row["effect"] for row in quiet]) == pytest.approx(0, abs=0.002)
    loud = [banks(quality=0.1, content=0.02, seed=i) for i in range(30)]
    found = [comparisons.matched(table).iloc[0] for table in loud]
    assert sum(row["p"] < 0.05 for row in found) >= 28
    assert sum(row["low"] <= 0.02 <= row["high"] for row in found) >= 26
    verdicts = [estimates.estimates(table.drop(columns="f1_own").assign(f1_own=0.0, f1_other=0.0), 200) for table in loud[:10]]
    assert {table["verdict"].iloc[0] for table in verdicts} == {UNTOLD}  # its interval over conversations is full of quality


def test_seeds_widen_the_matched_interval():
    many = [comparisons.matched(banks(seeds=3, across=0.02, seed=i)).iloc[0] for i in range(60)]
    assert sum(row["low"] <= 0 <= row["high"] for row in many) >= 52 and all(row["seeds"] == 3 for row in many)


def test_holm_by_hand():
    p = pd.Series([0.01, 0.04, np.nan, 0.03, 0.5], index=list("abcde"))
    assert comparisons.holm(p).to_dict() == pytest.approx(dict(a=0.04, b=0.09, c=np.nan, d=0.09, e=0.5), nan_ok=True)


def test_a_larger_memory_is_compared_question_by_question():
    small, large = banks(seed=1), banks(seed=1, capacity=10)
    large["logp_own"] += 0.05
    found = comparisons.between_capacities(pd.concat([small, large])).set_index("quantity")
    assert found.loc[["logp own", "logp own - other"], "effect"].tolist() == pytest.approx([0.05, 0.05])
    assert found.loc["f1 own", ["effect", "unit"]].tolist() == [pytest.approx(10), "points"]
    assert (found["method"] == "slot").all() and (found["n"] == 260).all()
    assert comparisons.between_capacities(small).empty


@pytest.mark.parametrize("gain, told", [(0.15, "yes"), (0.0, UNTOLD), (-0.15, "the reverse")])
def test_the_dichotomy_is_told_where_it_is(gain, told):
    found = comparisons.dichotomy(six_methods(gain), SIX[:3], SIX[3:]).set_index("score")
    assert found.loc["f1 own - zero", "told"] == found.loc["logp own - other", "told"] == told
    assert found.loc["f1 own - zero", "effect"] == pytest.approx(100 * gain, abs=2.5)
    assert found.loc["logp own - other", "effect"] == pytest.approx(gain, abs=0.025)
    assert found.loc["retained", "effect"] > 10 if gain > 0 else found.loc["retained", "effect"] <= 1  # it is clipped


def test_a_dichotomy_wants_all_six_of_a_seed():
    whole = six_methods(0.15, seeds=(42, 43))
    part = whole[(whole["method"] != "slot") | (whole["seed"] == 42)]
    assert set(comparisons.dichotomy(whole, SIX[:3], SIX[3:])["seeds"]) == {2}
    assert set(comparisons.dichotomy(part, SIX[:3], SIX[3:])["seeds"]) == {1}
    by_alias = comparisons.dichotomy(whole, *([f"M.{1 + METHODS.index(name)}" for name in group] for group in (SIX[:3], SIX[3:])))
    assert len(comparisons.dichotomy(whole.replace({"method": {"slot": "mine"}}), ["mine"], ["M.1"])) == 3
    pd.testing.assert_frame_equal(by_alias, comparisons.dichotomy(whole, SIX[:3], SIX[3:]))
    assert comparisons.dichotomy(whole[whole["method"] != "slot"], SIX[:3], SIX[3:]).empty


def test_a_difference_that_one_method_makes_is_of_the_means_alone():
    table = six_methods(0.0)
    table.loc[table["method"] == SIX[0], ["f1_own", "logp_own"]] += 0.3
    found = comparisons.dichotomy(table, SIX[:3], SIX[3:]).set_index("score").loc["f1 own - zero"]
    assert found["low"] > 0 and found["told"] == "yes of the means alone"
    assert found["p_groups"] > 0.05  # half of all groups with that method lie as far apart
    assert comparisons.dichotomy(six_methods(0.15), SIX[:3], SIX[3:])["p_groups"].iloc[-1] == 1 / 20
