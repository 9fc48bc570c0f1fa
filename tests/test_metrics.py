"""Metrics against values worked by hand, and properties that hold for any input."""

import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdmem_lib import metrics

texts = st.text(alphabet="ab the,.;'-AND\n7é", max_size=30)
fractions = st.floats(0, 1)
questions = st.lists(st.tuples(st.integers(0, 600), fractions), max_size=60)


# --- token_f1 ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("prediction", "gold", "f1"), [
    ("A cat!", "the cat", 1.0),                      # articles, case and punctuation gone: [cat] = [cat]
    ("She adopted a black cat", "black cat", 2 / 3),  # [she adopted black cat], [black cat]: p = 2/4, r = 2/2
    ("cat cat", "cat", 2 / 3),                       # tokens count with multiplicity: p = 1/2, r = 1/1
    ("cats", "cat", 0.0),                            # no stemming here
    ("salt and pepper", "salt pepper", 0.8),         # "and" stays: p = 2/3, r = 2/2
    (2022, "2022", 1.0),                             # numbers are read as text
    ("the", "", 1.0),                                # both empty once the article is gone
    ("", "", 1.0),
    ("", "cat", 0.0),
    ("cat", "...", 0.0),
])
def test_token_f1_by_hand(prediction, gold, f1):
    assert metrics.token_f1(prediction, gold) == pytest.approx(f1)


@given(texts, texts)
def test_token_f1_is_a_symmetric_fraction(prediction, gold):
    f1 = metrics.token_f1(prediction, gold)
    assert 0 <= f1 <= 1
    assert f1 == metrics.token_f1(gold, prediction)


@given(texts)
def test_token_f1_of_a_text_with_itself_is_one(text):
    assert metrics.token_f1(text, text) == 1.0


# --- locomo_f1 --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("prediction", "gold", "category", "f1"), [
    ("running shoes", "the runs shoe", 4, 1.0),       # stems: run shoe on both sides
    ("salt and pepper", "salt, pepper", 2, 1.0),      # "and" and the comma dropped
    ("In 2022", 2022, 2, 2 / 3),                      # [in 2022], [2022]: p = 1/2, r = 1
    ("", "", 4, 0.0),                                 # nothing in common, even of two empty sides
    ("the", "a", 4, 0.0),
    # category 1: gold [dog, blue car]; best of [cat, dog, car] is 1 for dog and p = 1, r = 1/2, 2/3 for blue car
    ("cat, dog, car", "dog, blue car", 1, (1 + 2 / 3) / 2),
    ("dog car", "dog, blue car", 1, (2 / 3 + 1 / 2) / 2),  # one part against dog: p = 1/2, r = 1; blue car: 1/2, 1/2
    ("dog", "dog,", 1, 0.5),                          # the empty part behind the last comma counts, as 0
    ("2, 3", 2, 1, 1.0),
    # category 3: only "yes" of the gold counts; category 4 keeps it all: [yes], [yes she like it]: p = 1, r = 1/4
    ("yes", "Yes; she likes it", 3, 1.0),
    ("yes", "Yes; she likes it", 4, 0.4),
    ("likes", "Yes; she likes it", 3, 0.0),
    ("No information available.", "anything", 5, 1.0),
    ("That is NOT MENTIONED here", "anything", 5, 1.0),
    ("anything", "anything", 5, 0.0),                 # the gold answer itself earns nothing
    ("", "", 5, 0.0),
])
def test_locomo_f1_by_hand(prediction, gold, category, f1):
    assert metrics.locomo_f1(prediction, gold, category) == pytest.approx(f1)


@given(texts, texts, st.integers(1, 5))
def test_locomo_f1_is_a_fraction(prediction, gold, category):
    assert 0 <= metrics.locomo_f1(prediction, gold, category) <= 1


@pytest.mark.parametrize("category", [0, 6])
def test_locomo_f1_refuses_an_unknown_category(category):
    with pytest.raises(ValueError, match="categories 1 to 5"):
        metrics.locomo_f1("cat", "cat", category)


# --- buckets and the isotonic fit -------------------------------------------------------------------------------------

@pytest.mark.parametrize(("lag", "label"), [
    (0, "0–31"), (31, "0–31"), (32, "32–63"), (63, "32–63"), (64, "64–127"), (127, "64–127"),
    (128, "128–255"), (255, "128–255"), (256, "256+"), (10_000, "256+"),
])
def test_bucket_edges(lag, label):
    assert metrics.bucket_of(lag) == label


@pytest.mark.parametrize("lag", [-1, math.nan, math.inf])
def test_bucket_of_refuses_what_is_no_lag(lag):
    with pytest.raises(ValueError, match="lag"):
        metrics.bucket_of(lag)


@pytest.mark.parametrize(("values", "weights", "fit"), [
    ([5, 3, 1], [1, 1, 1], [5, 3, 1]),                # already falling
    ([1, 3], [1, 1], [2, 2]),
    ([1, 3], [3, 1], [1.5, 1.5]),                     # (3·1 + 1·3) / 4
    # 2 < 6 pool to (1·2 + 3·6) / 4 = 5; 5 > 4 stays; 1 < 3 pool to (2·1 + 2·3) / 4 = 2
    ([2, 6, 4, 1, 3], [1, 3, 1, 2, 2], [5, 5, 4, 2, 2]),
    # 4 < 6 pool to 5, then 5 < 8 pools all three to (4 + 6 + 8) / 3 = 6
    ([4, 6, 8], [1, 1, 1], [6, 6, 6]),
    ([math.nan, 1, math.nan, 3], [0, 1, 0, 1], [math.nan, 2, math.nan, 2]),  # empty buckets take no part
    ([9, 1], [0, 5], [math.nan, 1]),
    ([math.nan, math.nan], [0, 0], [math.nan, math.nan]),
    ([], [], []),
])
def test_isotonic_fit_by_hand(values, weights, fit):
    np.testing.assert_allclose(metrics.isotonic_non_increasing(values, weights), fit, equal_nan=True)


@given(st.lists(st.tuples(st.floats(-100, 100), st.integers(0, 400)), min_size=1, max_size=12))
def test_isotonic_fit_falls_keeps_the_weighted_mean_and_is_its_own_fit(pairs):
    values, weights = map(np.array, zip(*pairs))
    fit = metrics.isotonic_non_increasing(values, weights)
    used = weights > 0
    assert np.array_equal(np.isnan(fit), ~used)
    assert (np.diff(fit[used]) <= 1e-9).all()
    assert fit[used] @ weights[used] == pytest.approx(values[used] @ weights[used], abs=1e-6)
    np.testing.assert_allclose(metrics.isotonic_non_increasing(fit, weights), fit, atol=1e-9)


@pytest.mark.parametrize(("values", "weights", "message"), [
    ([1, 2], [1], "one length"),
    ([1, math.nan], [1, 1], "entry 1 is nan"),
    ([1, 2], [1, -1], "weights"),
    ([[1, 2]], [[1, 1]], "one-dimensional"),
])
def test_isotonic_fit_refuses(values, weights, message):
    with pytest.raises(ValueError, match=message):
        metrics.isotonic_non_increasing(values, weights)


# --- curves -----------------------------------------------------------------------------------------------------------

def test_retained_by_hand():
    np.testing.assert_allclose(metrics.retained([0.5, 0.2, 1, 0], [0.25, 0.6, 0, 0]), [0.25, 0, 1, 0])


@pytest.mark.parametrize(("own", "zero", "message"), [
    ([0.5], [0.5, 0.5], "one length"),
    ([math.nan], [0.5], "f1_own"),
    ([0.5], [50], "f1_zero"),
])
def test_retained_refuses(own, zero, message):
    with pytest.raises(ValueError, match=message):
        metrics.retained(own, zero)


def test_forgetting_curve_by_hand():
    # raw: 0–31 (0.1 + 0.3)/2 = 20 %; 32–63 50 %; 64–127 none; 128–255 10 %; 256+ (0.2 + 0.2 + 0.2)/3 = 20 %
    # fit: 20 (n = 2) < 50 (n = 1) pool to 90/3 = 30; 10 (n = 1) < 20 (n = 3) pool to 70/4 = 17.5
    curve = metrics.forgetting_curve([0, 31, 32, 255, 256, 300, 999], [0.1, 0.3, 0.5, 0.1, 0.2, 0.2, 0.2])
    assert list(curve.columns) == ["bucket", "lag_low", "lag_high", "n", "raw", "smoothed"]
    assert list(curve["bucket"]) == ["0–31", "32–63", "64–127", "128–255", "256+"]
    assert list(curve["lag_low"]) == [0, 32, 64, 128, 256]
    assert list(curve["lag_high"]) == [31, 63, 127, 255, math.inf]
    assert list(curve["n"]) == [2, 1, 0, 1, 3]
    np.testing.assert_allclose(curve["raw"], [20, 50, math.nan, 10, 20])
    np.testing.assert_allclose(curve["smoothed"], [30, 30, math.nan, 17.5, 17.5])
    assert metrics.printed_mean(curve) == pytest.approx((30 + 30 + 17.5 + 17.5) / 4)


def test_forgetting_curve_does_not_clip():
    curve = metrics.forgetting_curve([3, 4], [-0.4, 0.2])
    assert curve["raw"][0] == pytest.approx(-10)


def test_forgetting_curve_of_no_question_has_five_empty_rows():
    curve = metrics.forgetting_curve([], [])
    assert list(curve["n"]) == [0] * 5
    assert curve[["raw", "smoothed"]].isna().all(axis=None)
    assert math.isnan(metrics.printed_mean(curve))


@given(questions)
def test_forgetting_curve_counts_every_question_and_falls(pairs):
    lags, scores = [lag for lag, _ in pairs], [score for _, score in pairs]
    curve = metrics.forgetting_curve(lags, scores)
    filled = curve[curve["n"] > 0]
    assert len(curve) == 5
    assert curve["n"].sum() == len(pairs)
    assert (filled["smoothed"].diff().dropna() <= 1e-9).all()
    assert (filled["n"] * filled["smoothed"]).sum() == pytest.approx(100 * sum(scores), abs=1e-6)
    assert [metrics.bucket_of(lag) for lag in lags].count("256+") == curve["n"][4]


@pytest.mark.parametrize(("lags", "scores", "message"), [
    ([1, 2], [0.5], "one length"),
    ([1], [math.nan], "scores .* entry 0 is nan"),
    ([-1], [0.5], "lags"),
    ([1], [17.0], r"scores .*\[-1, 1\]"),  # a percentage where a fraction belongs
])
def test_forgetting_curve_refuses(lags, scores, message):
    with pytest.raises(ValueError, match=message):
        metrics.forgetting_curve(lags, scores)


def test_knowledge_curve_by_hand():
    # session 1: 0.1 -> 10 %; session 2: (0.1 + 0.4) / 2 = 25 %; session 5: (0.2 + 0.4 + 0.0) / 3 = 20 %; ΔK = 20 - 10
    table = pd.DataFrame({"session": [5, 1, 2, 2, 5, 5], "f1": [0.2, 0.1, 0.1, 0.4, 0.4, 0.0]})
    curve = metrics.knowledge_curve(table)
    assert list(curve.columns) == ["session", "n", "K"]
    assert list(curve["session"]) == [1, 2, 5]
    assert list(curve["n"]) == [1, 2, 3]
    np.testing.assert_allclose(curve["K"], [10, 25, 20])
    assert metrics.delta_k(curve) == pytest.approx(10)
    assert metrics.delta_k(curve[::-1]) == pytest.approx(10)  # whatever the order of its rows


@pytest.mark.parametrize(("table", "message"), [
    ({"session": [1]}, "f1 missing"),
    ({"session": [1], "f1": [math.nan]}, "f1"),
    ({"session": [math.nan], "f1": [0.5]}, "session"),
])
def test_knowledge_curve_refuses(table, message):
    with pytest.raises(ValueError, match=message):
        metrics.knowledge_curve(pd.DataFrame(table))


def test_delta_k_of_no_session_is_an_error():
    with pytest.raises(ValueError, match="no session"):
        metrics.delta_k(metrics.knowledge_curve(pd.DataFrame({"session": [], "f1": []})))


def test_importing_metrics_imports_nothing_slow():
    probe = ("import runpy, sys; runpy.run_path(sys.argv[1]); "
             "print(sorted({'pandas', 'scipy', 'sklearn', 'nltk', 'torch'} & set(sys.modules)))")
    shown = subprocess.run([sys.executable, "-c", probe, metrics.__file__], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
