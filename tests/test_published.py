"""The published numbers stand as they were printed, method by method."""

import re

import pytest

from pdmem_lib import METHODS, metrics, published


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
