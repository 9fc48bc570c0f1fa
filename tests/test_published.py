"""The published numbers stand as they were printed, method by method."""

import re
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest

from pdmem_lib import METHODS, collected, estimates, metrics, published

STUDY = Path(__file__).parent.parent / "figures" / "quick-smollm2-135m-locomo"


@pytest.fixture(scope="module")
def table():
    return published.table()


def find(table, **wanted):
    for column, value in wanted.items():
        table = table[table[column] == value]
    return table


def test_each_number_has_one_place(table):
    assert list(table.columns) == list(published.COLUMNS)
    assert not table.duplicated(["source", "backbone", "method", "capacity", "quantity", "lag"]).any()
    assert set(table["method"]) <= {*METHODS, "baseline", "off", "all six"}
    assert set(table["capacity"].dropna()) == {1, 10}
    assert set(table["lag"]) - {"", "short", "mean"} == {bucket.label for bucket in metrics.LAG_BUCKETS}


def test_low_and_high_are_the_numbers_that_are_printed(table):
    for row in table.itertuples():
        numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", row.printed)]
        given = [value for value in dict.fromkeys((row.low, row.high)) if value == value]
        assert given == numbers, row
        assert not row.low > row.high
    assert len(table[table["low"].isna() & table["high"].notna()]) == 3  # "below"


def test_the_dichotomy_of_the_abstract(table):
    said = find(table, source="A", quantity="retained", capacity=1).set_index("method")
    strong = said[said["low"].notna()]
    assert set(strong.index) == {"cross_attention", "hebbian", "slot"} and set(said.index) == set(METHODS)
    assert set(strong["low"]) == {7} and set(strong["high"]) == {18}
    assert set(said.drop(strong.index)["high"]) == {0.4}
    assert find(table, source="A", quantity="ΔK")[["low", "high"]].drop_duplicates().values.tolist() == [[7, 10]]
    ten = find(table, source="A", capacity=10)
    assert set(ten["method"]) == set(METHODS) and ten[["low", "high"]].isna().all(axis=None)


def test_some_of_the_companions(table):
    xl = find(table, backbone="flan-t5-xl", quantity="retained")
    assert find(xl, method="hebbian", capacity=1, lag="256+")["low"].item() == 9.23
    assert find(xl, method="kv_extension", capacity=10, lag="mean")["high"].item() == 12.05
    base = find(table, backbone="flan-t5-base", method="gated")
    assert base["low"].tolist() == [24.0, 6.1, 6.1, 5.8, 4.8]
    assert find(table, quantity="tax")[["low", "high"]].values.tolist() == [[2.38, 4.23]]
    assert all(group["backbone"].nunique() == 1 for _, group in table.groupby("source"))


@pytest.fixture(scope="module")
def beside():
    found = collected.collect("no such folder", STUDY)
    verdicts = estimates.estimates(estimates.with_memory(found.questions), resamples=200)
    return published.beside(found.questions, found.tables["knowledge"], verdicts, resamples=200), found


def test_every_number_has_its_place_beside_ours(beside, table):
    ours, _ = beside
    assert ours[list(published.COLUMNS)].equals(table)
    run = ours[(ours["quantity"] == "retained") & (ours["capacity"].fillna(1) == 1)]
    assert run["ours"].notna().all() and (run["ours_low"] <= run["ours"] + 1e-9).all() and set(run["verdict"]) == {"cannot be told"}
    assert ours[ours["capacity"] == 10][["ours", "ours_low", "n"]].isna().all(axis=None)  # not run at 10x


def test_what_was_tuned_has_columns_of_its_own(beside):
    """Read back from a file, as a report does; a range over one method is no range over six."""
    ours, _ = beside
    one = ours[ours["method"].isin(["prefix", "off", "all six"])].assign(ours=ours["ours"] + 1, verdict="remembers")
    both = published.with_tuned(ours, pd.read_csv(StringIO(one.to_csv(index=False))))
    assert both[list(ours.columns)].equals(ours)
    prefix = both["method"] == "prefix"
    assert (both.loc[prefix, "tuned_verdict"] == "remembers").all() and set(both.loc[~prefix, "tuned_verdict"]) == {""}
    run = prefix & both["ours"].notna()
    assert run.sum() >= 2 and both.loc[run, "tuned"].tolist() == pytest.approx((ours.loc[run, "ours"] + 1).tolist())
    assert both.loc[run, "tuned_n"].tolist() == both.loc[run, "n"].tolist()
    assert both.loc[~run, ["tuned", "tuned_low", "tuned_n"]].isna().all(axis=None)


def test_ours_are_the_numbers_of_the_summary(beside):
    ours, found = beside
    summary = found.tables["summary"].set_index("method")
    mean = find(ours, source="A", quantity="retained", capacity=1).set_index("method")["ours"]
    assert mean.to_dict() == pytest.approx(summary.loc[list(mean.index), "retained_mean"].to_dict(), rel=1e-4)
    grown = find(ours, source="A", quantity="ΔK").set_index("method")["ours"]
    assert grown.to_dict() == pytest.approx(summary.loc[list(grown.index), "delta_k"].to_dict(), rel=1e-4)
    assert find(ours, quantity="F1")["ours"].item() == pytest.approx(summary["f1_off"].iloc[0], rel=1e-4)
    tax = find(ours, quantity="tax")[["ours_low", "ours_high"]].values.tolist()[0]
    six = summary.loc[list(METHODS), "adapter_tax"]
    assert tax == pytest.approx([six.min(), six.max()], abs=1e-3)


def test_a_curve_of_several_seeds_has_the_seeds_interval(beside):
    """K after sessions 1 and 2 of three seeds: ΔK 1, 2 and 6, mean 3, deviation sqrt(7), t(2) 4.3027."""
    _, found = beside
    curve = pd.DataFrame([("hebbian", 1, seed, session, n, K) for seed, K_last in ((42, 6.0), (43, 7.0), (44, 11.0))
                          for session, n, K in ((1, 18, 5.0), (2, 636, K_last))],
                         columns=["method", "capacity", "seed", "session", "n", "K"])
    verdicts = estimates.estimates(estimates.with_memory(found.questions), resamples=200)
    ours = published.beside(found.questions, curve, verdicts, resamples=200).set_index(["source", "method", "quantity", "lag"])
    grown, last = ours.loc[("A", "hebbian", "ΔK", "")], ours.loc[("C", "hebbian", "K_30", "")]
    reach = 4.302653 * (7 / 3) ** 0.5
    assert grown[["ours", "ours_low", "ours_high", "n"]].tolist() == pytest.approx([3, 3 - reach, 3 + reach, 18], rel=1e-5)
    assert last[["ours", "ours_low", "ours_high", "n"]].tolist() == pytest.approx([8, 8 - reach, 8 + reach, 636], rel=1e-5)
    one = published.beside(found.questions, curve[curve["seed"] == 42], verdicts, resamples=200).set_index(["source", "method", "quantity", "lag"])
    assert one.loc[("A", "hebbian", "ΔK", ""), ["ours_low", "ours_high"]].isna().all()
