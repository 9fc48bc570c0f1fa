"""Planted truths: what is known beforehand must come out, and noise must not be called memory."""

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from pdmem_lib import estimates, metrics
from pdmem_lib.estimates import REMEMBERS, UNTOLD, WORSE, Estimate, estimate

LAGS = np.repeat([0, 40, 100, 200, 400], [27, 24, 60, 130, 398])  # LoCoMo's 639 test questions


def sample(rng, seeds=1, conversations=3, each=27, effect=0.0, questions=0.5, between=0.0, across=0.0, heavy=False):
    """Differences (seeds, Q) with known spread over questions, conversations and seeds; and each question's group."""
    groups = np.repeat(np.arange(conversations), each)
    noise = rng.standard_t(3, len(groups)) if heavy else rng.normal(size=len(groups))
    d = effect + questions * noise + between * rng.normal(size=conversations)[groups]
    return d + 0.3 * questions * rng.normal(size=(seeds, len(groups))) + across * rng.normal(size=(seeds, 1)), groups


# ---- one estimate ----

def test_by_hand():
    e = estimate([[1.0, 2.0, 3.0, 6.0]], ["a", "a", "b", "b"])
    assert (e.effect, e.n, e.conversations, e.seeds) == (3.0, 4, 2, 1)
    assert 1.0 <= e.low < 3.0 < e.high <= 6.0
    assert e.p == pytest.approx(2 / 16, abs=0.03)  # only all plus and all minus are as far from 0
    half = stats.t.ppf(0.975, 1) * np.std([1.5, 4.5], ddof=1) / 2**0.5  # the t interval of the conversations' means
    assert e.high_clustered - e.effect == pytest.approx(half, rel=0.1)
    assert e.effect - e.low_clustered == pytest.approx(half, rel=0.1)


def test_intervals_agree_with_theory():
    d, groups = sample(np.random.default_rng(0), conversations=30, each=20, effect=0.2)
    e, error = estimate(d, groups, resamples=4000), d.std() / d.size**0.5
    assert (e.high - e.low) / 2 == pytest.approx(1.96 * error, rel=0.06)
    assert (e.high_clustered - e.low_clustered) / 2 == pytest.approx(stats.t.ppf(0.975, 29) * error, rel=0.35)
    assert e.p == pytest.approx(stats.ttest_1samp(d[0], 0).pvalue, abs=0.01)
    power = stats.norm.sf(1.96 - e.smallest_effect / error)
    assert 0.75 < power < 0.97  # the effect that would have been seen in 80 % of cases, by the wider interval


def test_one_conversation_has_no_spread_between_conversations():
    e = estimate(np.full((1, 50), 0.5) + np.linspace(-0.1, 0.1, 50), ["only"] * 50)
    assert np.isnan(e.low_clustered) and np.isnan(e.high_clustered)
    assert e.low > 0 and e.p < 0.01 and e.verdict == UNTOLD  # one conversation cannot settle it


def test_it_is_reproducible_and_seeds_widen_it():
    rng = np.random.default_rng(3)
    d, groups = sample(rng, seeds=3, across=0.5, each=100)
    assert estimate(d, groups) == estimate(d, groups)
    one, all_three = estimate(d.mean(axis=0), groups), estimate(d, groups)
    assert one.effect == pytest.approx(all_three.effect)
    assert all_three.high - all_three.low > 2 * (one.high - one.low)


@pytest.mark.parametrize("seeds", [3, 5])
def test_intervals_over_few_seeds_hold_the_truth_as_often_as_they_say(seeds):
    """Seeds that move the result far more than questions do; drawing seeds with replacement held it in 79 % with three."""
    rng = np.random.default_rng(6)
    kind = dict(seeds=seeds, conversations=3, each=60, questions=0.03, across=0.01)
    found = [estimate(*sample(rng, **kind), resamples=200, seed=i) for i in range(200)]
    assert sum(e.low <= 0 <= e.high for e in found) >= 174
    assert sum(e.low_clustered <= 0 <= e.high_clustered for e in found) >= 174


@pytest.mark.parametrize("d, groups, message", [
    ([[1.0, np.nan]], ["a", "b"], "finite"), ([[1.0, 2.0]], ["a"], "conversation a question"), ([[]], [], "questions")])
def test_what_cannot_be_estimated_is_told(d, groups, message):
    with pytest.raises(ValueError, match=message):
        estimate(d, groups)


# ---- the verdict ----

@pytest.mark.parametrize("low, low_c, high, high_c, p, verdict", [
    (0.1, 0.01, 0.3, 0.4, 0.001, REMEMBERS),
    (0.1, -0.01, 0.3, 0.4, 0.001, UNTOLD),  # not beyond these conversations
    (-0.1, 0.01, 0.3, 0.4, 0.001, UNTOLD),
    (0.1, 0.01, 0.3, 0.4, 0.05, UNTOLD),
    (0.1, float("nan"), 0.3, float("nan"), 0.001, UNTOLD),
    (-0.3, -0.4, -0.1, -0.01, 0.001, WORSE),
    (-0.3, -0.4, -0.1, 0.01, 0.001, UNTOLD),
    (float("nan"),) * 5 + (UNTOLD,)])
def test_the_rule(low, low_c, high, high_c, p, verdict):
    assert Estimate(0.2, low, high, low_c, high_c, p, 0.1, 80, 3, 1).verdict == verdict


@pytest.mark.parametrize("kind", [
    dict(), dict(seeds=3), dict(heavy=True), dict(between=0.3), dict(seeds=3, between=0.3, across=0.3),
    dict(conversations=10, between=0.3, heavy=True)])
def test_noise_is_not_called_memory(kind):
    """Whatever its shape and wherever it comes from: at least 95 % of 300 sets of noise 'cannot be told'."""
    rng = np.random.default_rng(1)
    verdicts = [estimate(*sample(rng, **kind), resamples=500, seed=i).verdict for i in range(300)]
    false = 300 - verdicts.count(UNTOLD)
    assert stats.binomtest(false, 300, 0.05, alternative="greater").pvalue > 0.05, f"{false} of 300"
    if not kind:
        assert false <= 15  # and 95 % as counted, where the rule's assumptions hold


@pytest.mark.parametrize("effect, verdict", [(0.25, REMEMBERS), (-0.25, WORSE)])
def test_a_planted_effect_is_found(effect, verdict):
    rng = np.random.default_rng(2)
    found = [estimate(*sample(rng, seeds=3, each=213, effect=effect, between=0.02, across=0.02), resamples=500, seed=i)
             for i in range(60)]
    assert sum(e.verdict == verdict for e in found) >= 51
    assert not any(e.verdict == {REMEMBERS: WORSE, WORSE: REMEMBERS}[verdict] for e in found)
    assert sum(e.low <= effect <= e.high for e in found) >= 53  # measured within its interval
    assert sum(e.low_clustered <= effect <= e.high_clustered for e in found) >= 53


def test_the_smallest_effect_is_what_would_have_been_found():
    rng = np.random.default_rng(4)
    smallest = np.mean([estimate(*sample(rng, conversations=8, each=60), resamples=500).smallest_effect for _ in range(20)])
    found = [estimate(*sample(rng, conversations=8, each=60, effect=smallest), resamples=500, seed=i).verdict
             for i in range(200)]
    assert 0.65 < found.count(REMEMBERS) / 200 < 0.95


# ---- the floor of noise under the published metric ----

def test_noise_scores_above_zero_and_the_simulation_says_how_much():
    rng = np.random.default_rng(5)
    base = rng.beta(0.3, 4, size=len(LAGS))
    pairs = [np.clip(base[:, None] + rng.normal(0, 0.05, (len(base), 2)), 0, 1) for _ in range(40)]
    scores = [metrics.printed_mean(metrics.forgetting_curve(LAGS, metrics.retained(*pair.T))) for pair in pairs]
    null = estimates.null_retained(LAGS, *pairs[0].T)
    assert min(scores) > 0.5 and len(null) == 1000
    assert null.mean() == pytest.approx(np.mean(scores), rel=0.1)
    low, high = np.quantile(null, [0.025, 0.975])
    assert sum(low <= score <= high for score in scores) >= 34  # one set's floor holds for the others


def test_simulated_scores_are_the_metrics_own():
    rng = np.random.default_rng(6)
    own, zero, lags = rng.random(20), np.zeros(20), rng.integers(0, 300, 20)
    null = estimates.null_retained(lags, own, zero, resamples=3, seed=9)
    flip = np.random.default_rng(9).random((3, 20)) < 0.5
    by_hand = sorted(metrics.printed_mean(metrics.forgetting_curve(lags, np.where(f, 0, own))) for f in flip)
    np.testing.assert_allclose(np.sort(null), by_hand)


def test_seeds_that_score_alike_are_no_further_evidence():
    """The same differences with three seeds: the floor of one. With independent exchanges it would shrink."""
    rng = np.random.default_rng(7)
    own, zero, lags = rng.random(60), rng.random(60), rng.integers(0, 300, 60)
    one = estimates.null_retained(lags, own, zero)
    np.testing.assert_allclose(estimates.null_retained(lags, [own] * 3, [zero] * 3), one)
    apart = estimates.null_retained(lags, [own, zero], [zero, own])  # what one wins, the other loses
    assert apart.std() < 0.5 * one.std()
    table = pd.DataFrame([dict(method="slot", capacity=1, seed=seed, conversation="c", number=i, lag=lags[i], category=1,
                               f1_own=own[i], f1_zero=zero[i]) for seed in (42, 43, 44) for i in rng.permutation(60)])
    floors = [estimates.noise_floor(of).iloc[0] for of in (table[table["seed"] == 42], table)]
    for column in ("retained_mean", "noise_mean", "noise_high", "noise_high_without_5", "retained_without_5"):
        assert floors[0][column] == pytest.approx(floors[1][column]), column


# ---- from the table of all runs ----

@pytest.fixture(scope="module")
def table():
    """Two methods, two seeds: one remembers (own > other), one only has style (own = other > zero)."""
    rng, rows = np.random.default_rng(7), []
    for method, gain in (("slot", 0.3), ("gated", 0.0)):
        for seed, (conversation, number) in itertools.product((42, 43), itertools.product("abc", range(60))):
            style = -3 + rng.normal(0, 0.1)
            rows.append(dict(
                method=method, capacity=1, seed=seed, conversation=conversation, number=number, lag=7 * number,
                category=1 + number % 5, session_distance=number % 25 if number else np.nan,
                evidence_count=number % 5, answer_type=metrics.ANSWER_TYPES[number % 7],
                logp_own=style + gain + rng.normal(0, 0.1), logp_other=style, logp_zero=style - 1.2, logp_off=style - 1.2,
                f1_own=0.2, f1_other=0.2, f1_zero=0.1, f1_off=0.1, logp_shuffled=np.nan, f1_shuffled=np.nan))
    return pd.DataFrame(rows)


def test_style_is_not_memory(table):
    found = estimates.estimates(table, resamples=500).set_index(["method", "contrast", "score"])
    remembers, style = (found.loc[(method, *estimates.PRIMARY)] for method in ("slot", "gated"))
    assert (remembers["verdict"], style["verdict"]) == (REMEMBERS, UNTOLD)
    assert abs(style["effect"]) < 0.02 and remembers["low"] < 0.3 < remembers["high"]
    assert found.loc[("gated", "own - zero", "logp"), "low"] > 1  # what the published control would have called memory
    assert found.loc[("gated", "own - zero", "f1"), "effect"] == pytest.approx(10) and "points" in set(found["unit"])
    assert set(found["verdict"]) == {REMEMBERS, UNTOLD, ""} and (found["seeds"] == 2).all() and (found["n"] == 180).all()
    assert not any("shuffled" in contrast for _, contrast, _ in found.index)  # not measured: not shown


def test_the_format_control_is_paired_with_its_method(table):
    control = table[table["method"] == "slot"].assign(method="slot.format", logp_own=-3.0, f1_own=0.05)
    both = estimates.with_memory(pd.concat([table, control, table.assign(method="slot.lora"), table.assign(method="baseline")]))
    assert set(both["method"]) == {"slot", "gated"} and len(both) == len(table)
    assert (both.loc[both["method"] == "slot", "logp_format"] == -3.0).all()
    assert both.loc[both["method"] == "gated", "logp_format"].isna().all()
    found = estimates.estimates(both, resamples=200).set_index(["method", "contrast", "score"])
    assert found.loc[("slot", "own - format", "f1"), "effect"] == pytest.approx(15)
    assert ("gated", "own - format", "f1") not in found.index


def test_seeds_that_were_asked_different_questions_are_refused(table):
    with pytest.raises(ValueError, match="different questions"):
        estimates.estimates(table.drop(index=table.index[:1]), resamples=50)


def test_breakdown_holds_every_question_once_a_kind(table):
    parts = estimates.breakdown(table, resamples=200)
    assert set(parts["kind"]) == {"lag bucket", "category", "session distance", "evidence count", "answer type"}
    assert (parts.groupby(["method", "kind"])["n"].sum() == 180).all()
    few = parts["n"] < estimates.FEW
    assert few.any() and parts.loc[few, ["low", "high"]].isna().all(axis=None)
    assert parts[~few].eval("low <= effect <= high").all()
    slot = parts[(parts["method"] == "slot") & (parts["kind"] == "lag bucket")]
    assert list(slot["value"]) == [b.label for b in metrics.LAG_BUCKETS]
    assert slot["effect"].between(0.2, 0.4).all()
    distance = parts[(parts["method"] == "slot") & (parts["kind"] == "session distance")].set_index("value")["n"]
    assert distance["no evidence"] == 3 and distance["same session"] == 6  # number 0; numbers 25 and 50 (three talks)


@pytest.mark.parametrize("gold, kind", [
    ("7 May 2023", "date or time"), ("two weeks ago", "date or time"), ("Thursday", "date or time"), (2022, "date or time"),
    ("three", "number"), (3, "number"), ("two times", "number"), ("Yes, she does", "yes or no"),
    ("Not mentioned in the conversation", "not mentioned"), ("tea, coffee", "list"), ("cats and dogs", "list"),
    ("Boston", "one or two words"), ("the red car", "one or two words"), ("a gold necklace with a diamond", "phrase"),
    ("", "one or two words")])
def test_answer_types(gold, kind):
    assert metrics.answer_type(gold) == kind


def test_noise_floor_of_the_table(table):
    table = table.assign(f1_own=lambda t: np.where(t["number"] % 2, 0.3, 0.1), f1_zero=0.2)  # half win, half lose
    floor = estimates.noise_floor(table, resamples=200).set_index("method")
    assert floor["delta_f1"].abs().max() < 1e-9 < floor["retained_mean"].min()
    assert ((floor["noise_mean"] < floor["noise_high"]) & (floor["retained_mean"] < floor["noise_high"])).all()
    assert floor.loc["slot", ["seeds", "n"]].tolist() == [2, 180]
    winning = estimates.noise_floor(table.assign(f1_own=0.3), resamples=200)
    fifth = table.assign(f1_own=lambda t: np.where(t["category"] == 5, 1.0, 0.2), f1_zero=0.2)  # right there alone
    fifth = estimates.noise_floor(fifth, resamples=200)
    assert (fifth["retained_mean"] > fifth["noise_high"]).all() and (fifth["retained_without_5"] == 0).all()
    assert (winning["retained_without_5"] > winning["noise_high_without_5"]).all()
    assert (winning["retained_mean"] > winning["noise_high"]).all()


def test_no_run_with_a_memory_gives_tables_without_rows(table):
    none = table[:0]
    for of in (estimates.estimates, estimates.noise_floor, estimates.controls, estimates.breakdown, estimates.retained_intervals):
        assert len(of(none)) == 0 and {"method", "capacity"} <= set(of(none).columns)
    turns = table.assign(reciprocal_rank=0.1, reciprocal_rank_others=0.1, chance=0.1)
    assert "method" in estimates.turn_finding(turns[:0]).columns
    of_objects = turns.astype({"reciprocal_rank": object, "reciprocal_rank_others": object})  # as a table with None in it is
    assert (estimates.turn_finding(of_objects)["effect"] == 0).all()


def test_controls_are_means_of_what_was_measured(table):
    rows = estimates.controls(table.assign(logp_random=-5.0, f1_random=0.25)).set_index(["method", "memory"])
    assert rows.loc[("slot", "random")].tolist() == [1, -5.0, 25.0]
    assert rows.loc[("slot", "own"), "value"] == table.loc[table["method"] == "slot", "logp_own"].mean()
    assert ("slot", "shuffled") not in rows.index and ("slot", "initial") not in rows.index


def test_turns_are_found_beyond_what_others_find():
    rng, rows = np.random.default_rng(8), []
    for method, gain in (("slot", 0.3), ("hebbian", 0.0)):
        for conversation, number in itertools.product("abc", range(40)):
            others = rng.uniform(0.1, 0.3)
            found = np.nan if number == 0 else others + gain + rng.normal(0, 0.05)  # a question that reads nothing
            rows.append(dict(method=method, capacity=1, seed=42, conversation=conversation, number=number, chance=0.01,
                             reciprocal_rank=found, reciprocal_rank_others=others))
    slot, hebbian = estimates.turn_finding(pd.DataFrame(rows), resamples=500).to_dict("records")
    assert slot["n"] == hebbian["n"] == 117 and slot["chance"] == pytest.approx(0.01)
    assert slot["low"] > 0.25 and slot["p"] < 0.01 and slot["mrr"] == pytest.approx(slot["others"] + slot["effect"])
    assert hebbian["low"] < 0 < hebbian["high"] and hebbian["mrr_low"] > 0.15  # far above chance, and not the question's


def test_reference_points_stand_beside_memories(table):
    cost = dict(tokens=80.0, seconds=0.1, bytes=1000.0, locomo_own=0.1)
    runs = pd.concat([table.assign(**cost), table[table["method"] == "slot"].assign(method="slot.lora", **cost),
                      table[table["method"] == "slot"].assign(method="baseline", **cost)])
    asked = [dict(reference=name, conversation=c, number=i, category=1 + i % 5, f1=f1 or float(i % 5 == 4), locomo=f1,
                  logp=-3.0, tokens=tokens, seconds=1.0, bytes=9.0)
             for name, f1, tokens in (("frozen", 0.0, 20), ("gold evidence", 0.5, 90)) for c in "abc" for i in range(10)]
    points = estimates.reference_points(runs, pd.concat([pd.DataFrame(asked)] * 2), resamples=200)  # one copy a seed
    points = points.set_index("reference")
    assert points["group"].to_dict() == {"frozen": "frozen", "gold evidence": "prompt", "slot": "memory",
                                         "gated": "memory", "LoRA, as large as slot": "trained without memory"}
    assert points.loc["gold evidence", ["n", "f1", "tokens"]].tolist() == [30, 50, 90]
    assert points.loc["frozen", ["f1", "f1_without_5", "high_without_5"]].tolist() == [20, 0, 0]  # right on category 5 alone
    assert points.loc["slot", ["n", "f1", "tokens", "bytes"]].tolist() == [180, pytest.approx(20), 80, 1000]


def test_where_all_questions_are_of_category_5_the_others_have_no_score(table):
    runs = table[table["method"] == "slot"].assign(tokens=80.0, seconds=0.1, bytes=1000.0, locomo_own=0.1, category=5)
    asked = [dict(reference="frozen", conversation=c, number=i, category=5, f1=0.5, locomo=0.5, logp=-3.0, tokens=9, seconds=1.0,
                  bytes=9.0) for c in "abc" for i in range(10)]
    points = estimates.reference_points(runs, pd.DataFrame(asked), resamples=200)
    assert points["f1"].notna().all() and points[["f1_without_5", "low_without_5", "high_without_5"]].isna().all(axis=None)


def test_the_interval_of_a_score_ends_where_scores_do(table):
    """Two seeds that lie apart make a t interval of one degree of freedom, which would reach beyond 0 and 100 %."""
    cost = dict(tokens=80.0, seconds=0.1, bytes=1000.0, locomo_own=0.1, capacity=1)
    slot = table[table["method"] == "slot"].assign(**cost)
    first = slot[slot["seed"] == slot["seed"].min()]
    runs = pd.concat([first.assign(seed=1, f1_own=0.1), first.assign(seed=2, f1_own=0.5)])
    asked = [dict(reference="frozen", conversation="a", number=i, category=1 + i % 5, f1=0.5, locomo=0.5, logp=-3.0, tokens=9,
                  seconds=1.0, bytes=9.0) for i in range(10)]
    points = estimates.reference_points(runs, pd.DataFrame(asked), resamples=200).set_index("reference")
    ends = ["low", "high", "low_without_5", "high_without_5"]
    assert points.loc["slot", ["f1", *ends]].tolist() == [pytest.approx(30), 0, 100, 0, 100]
    bare = estimate([[0.1] * 10, [0.5] * 10], ["a", "b"] * 5)
    inside = bare.within(0, 1)
    assert bare.low < 0 < 1 < bare.high and (inside.low_clustered, inside.high_clustered, inside.p) == (0, 1, bare.p)
    assert np.isnan(estimate([[0.1] * 10, [0.5] * 10], ["a"] * 10).within(0, 1).low_clustered)


# ---- intervals of buckets, and what clipping does ----

def test_bucket_intervals_agree_with_theory_and_leave_the_curve_alone():
    rng = np.random.default_rng(0)
    scores = rng.normal(0.2, 0.1, len(LAGS)).clip(-1, 1)
    table = estimates.bucket_intervals(LAGS, scores, resamples=4000)
    pd.testing.assert_frame_equal(table.drop(columns=["low", "high"]), metrics.forgetting_curve(LAGS, scores))
    for lag, row in zip((0, 40, 100, 200, 400), table.itertuples()):
        inside = 100 * scores[LAGS == lag]
        half = 1.96 * inside.std() / len(inside) ** 0.5
        np.testing.assert_allclose([row.raw - row.low, row.high - row.raw], half, rtol=0.15)
    pd.testing.assert_frame_equal(table, estimates.bucket_intervals(LAGS, scores, resamples=4000))
    assert not table.equals(estimates.bucket_intervals(LAGS, scores, resamples=4000, seed=1))


def test_bucket_intervals_need_two_questions_and_stay_above_zero_when_clipped():
    table = estimates.bucket_intervals([0, 1, 2, 40, 300, 301], [0.5, 0, 0, 0.2, 0.3, 0.3]).set_index("bucket")
    assert np.isnan(table.loc[["32–63", "64–127"], ["low", "high"]]).all(axis=None)
    assert table.loc["0–31", "low"] == 0 < table.loc["0–31", "high"] <= 50  # clipped scores: never below 0
    assert table.loc["256+", "low"] == pytest.approx(30) == table.loc["256+", "high"]  # all alike: no width
    with pytest.raises(ValueError, match="one length"):
        estimates.bucket_intervals([0], [0.1, 0.2])


def test_clipping_of_noise_is_what_theory_says():
    found = estimates.simulate_clipping(0.1, 0.0, questions=100, repeats=400)
    assert found.differences.shape == (100,) and found.unclipped.shape == found.published.shape == (400,)
    assert found.unclipped[0] == pytest.approx(found.differences.mean())
    assert found.unclipped.mean() == pytest.approx(0, abs=0.002)
    assert found.published.mean() == pytest.approx(0.1 / (2 * np.pi) ** 0.5, abs=0.002)  # E max(0, d)
    assert (found.published > 0).all()
    lags = np.resize([b.low for b in metrics.LAG_BUCKETS], 100)
    curve = metrics.forgetting_curve(lags, found.differences.clip(min=0))
    assert found.published[0] == pytest.approx(metrics.printed_mean(curve) / 100)


def test_clipping_without_noise_is_the_effect_and_what_cannot_be_is_refused():
    for effect, published in ((0.05, 0.05), (-0.05, 0.0)):
        found = estimates.simulate_clipping(0.0, effect, questions=7, repeats=3, lags=[400] * 7)
        np.testing.assert_allclose(found.unclipped, effect)
        np.testing.assert_allclose(found.published, published, atol=1e-12)
    one, two = (estimates.simulate_clipping(0.1, seed=seed).published for seed in (1, 2))
    assert (one != two).any()
    for wrong in (dict(spread=-1), dict(effect=2), dict(questions=0), dict(repeats=0)):
        with pytest.raises(ValueError, match="must"):
            estimates.simulate_clipping(**dict(spread=0.1) | wrong)
    with pytest.raises(ValueError, match="2 lags for 80 questions"):
        estimates.simulate_clipping(0.1, lags=[1, 2])


# ---- all six beside each other ---------------------------------------------------------------------------------------

SIX = ("cross_attention", "hebbian", "slot", "prefix", "kv_extension", "gated")


def six_methods(gain, seeds=(42,), capacity=1, n=90):
    """Six methods asked the same questions; the first three score ``gain`` higher under their own memory."""
    rows = []
    for seed in seeds:
        for i, method in enumerate(SIX):
            rng = np.random.default_rng([seed, i])
            zero = rng.uniform(0.2, 0.5, n)
            own = zero + rng.normal(0, 0.05, n) + gain * (method in SIX[:3])
            rows.append(pd.DataFrame(dict(method=method, capacity=capacity, seed=seed, number=range(n),
                                          conversation=np.repeat(["a", "b", "c"], n // 3), lag=np.resize([1, 40, 300], n),
                                          f1_own=own, f1_zero=zero, logp_own=own, logp_other=zero)))
    return pd.concat(rows, ignore_index=True)


def test_retained_intervals_are_about_the_metrics_own_score():
    table = six_methods(0.05, seeds=(42, 43))
    found = estimates.retained_intervals(table, resamples=400).set_index(["method", "capacity", "lag"])
    for method, group in table.groupby("method"):
        curves = [metrics.forgetting_curve(run["lag"], metrics.retained(run["f1_own"], run["f1_zero"]))
                  for _, run in group.groupby("seed")]
        for bucket in ("0–31", "32–63", "256+"):
            expected = np.mean([curve.set_index("bucket")["smoothed"][bucket] for curve in curves])
            assert found.loc[(method, 1, bucket), "value"] == pytest.approx(expected)
        mean = found.loc[(method, 1, "mean")]
        assert mean["value"] == pytest.approx(np.mean([metrics.printed_mean(curve) for curve in curves]))
        assert mean["low"] < mean["value"] < mean["high"] and mean["n"] == 90
    assert np.isnan(found.loc[("slot", 1, "64–127"), "value"]) and found.loc[("slot", 1, "64–127"), "n"] == 0


def test_retained_intervals_hold_what_they_promise():
    """Of 100 studies of a known clipped score, 95 % intervals hold its true value in about 95."""
    truth = 100 * stats.norm.expect(lambda x: max(0.0, x), loc=0.1, scale=0.1)
    rng, held = np.random.default_rng(0), 0
    for i in range(100):
        n, zero = 60, np.full(60, 0.4)
        own = (zero + rng.normal(0.1, 0.1, n)).clip(0, 1)
        table = pd.DataFrame(dict(method="slot", capacity=1, seed=42, lag=1, f1_own=own, f1_zero=zero))
        mean = estimates.retained_intervals(table, resamples=200, seed=i).set_index("lag").loc["0–31"]
        held += mean["low"] <= truth <= mean["high"]
    assert 88 <= held <= 99


def test_a_contrast_is_over_the_seeds_that_have_it(table):
    """As in a grid that is made in pieces: of one seed the run without memory is there, of the other not yet."""
    part = table[table["method"] == "slot"].assign(f1_format=0.15, logp_format=lambda t: t["logp_other"])
    part.loc[part["seed"] == 43, ["f1_format", "logp_format"]] = np.nan
    found = estimates.estimates(part, resamples=100).set_index(["contrast", "score"])
    assert found.loc[("own - format", "logp"), "seeds"] == 1 and found.loc[("own - other", "logp"), "seeds"] == 2
    alone = estimates.estimates(part[part["seed"] == 42], resamples=100).set_index(["contrast", "score"])
    assert found.loc[("own - format", "logp"), "effect"] == alone.loc[("own - format", "logp"), "effect"]
