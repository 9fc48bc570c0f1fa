"""The task with a known answer: a code is recalled from the bank alone, as far as the write rule allows.

`tiny-gpt2` has random weights; the adapter is trained to rank the four candidate codes, on new episodes at every step.
"""

import dataclasses
import functools
import math
import random

import pytest
import torch
from scipy.stats import binomtest

from pdmem_lib import recall as task
from pdmem_lib import write
from pdmem_lib.backbone import load_backbone
from pdmem_lib.methods import METHODS, MemorySettings
from pdmem_lib.recall import Point, RecallSettings, episode, key_blind, recall, retention, trace_theory

CHANCE = 1 / 4
QUICK = dict(loads=(), interference=(), rows=8, probe_rows=4, pairs=2, steps=2)  # one axis, hardly trained
SEEDS = 42, 43, 44, 45  # of the memory: for slots they differ in where turns go


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("tiny-gpt2", device="cpu")


def p_at_least(accuracy: float, n: int) -> float:
    """Probability of this accuracy or more by guessing: one-sided binomial."""
    return binomtest(round(accuracy * n), n, CHANCE, alternative="greater").pvalue


# ---- settings and episodes ----
@pytest.mark.parametrize("bad, named", [
    (dict(lags=(4, 0)), "ascending"), (dict(lags=(-1,)), "from 0 on"), (dict(lags=(1.5,)), "whole numbers"),
    (dict(loads=(0,)), "from 1 on"), (dict(loads=(99,)), "keys"), (dict(interference=(17,)), "16 turns"),
    (dict(lags=(), loads=(), interference=()), "at least one"), (dict(rows=12), "multiple of 8"),
    (dict(codes=("K", "K")), "different"), (dict(probe_rows=1), "at least 4"), (dict(steps=0), "at least 1"),
    (dict(before=-1), "negative"), (dict(lr=0.0), "above 0"), (dict(lags=3), "int, expected tuple"),
])
def test_bad_settings_are_refused_with_a_reason(bad, named):
    with pytest.raises(ValueError, match=named):
        RecallSettings(**bad)


def test_unfit_calls_are_refused(backbone):
    with pytest.raises(ValueError, match="unknown setting 'lag'"):
        recall(backbone, "slot", lag=3)
    with pytest.raises(ValueError, match="keeps no state"):
        recall(backbone, "baseline")
    with pytest.raises(ValueError, match="part at the same token"):
        recall(backbone, "slot", codes=("KV", "KZ", "QA", "ZB"), **QUICK, lags=(0,))
    with pytest.raises(ValueError, match="three write rules"):
        trace_theory(MemorySettings(method="baseline"), 1)
    with pytest.raises(ValueError, match="cannot be negative"):
        trace_theory(MemorySettings(), -1)


@pytest.mark.parametrize("point", [Point("lag", 5, lag=5), Point("load", 4, load=4), Point("interference", 6, 9, 1, 6)])
def test_episodes_differ_in_the_asked_code_alone(point):
    s = RecallSettings()
    position = point.load // 2
    told = {code: episode(random.Random(3), s, point, "lamp", position, code) for code in s.codes}
    K, V = told["K"], told["V"]
    differs = [i for i, (a, b) in enumerate(zip(K.turns, V.turns, strict=True)) if a != b]
    assert differs == [K.fact] == [V.fact] == [s.before + position]
    assert K.turns[K.fact] == task.fact("lamp", "K", s.repeats) and " K K K" in K.turns[K.fact]
    facts = [turn for turn in K.turns if "code of the" in turn]
    assert len(facts) == len({turn.split(" is ")[0] for turn in facts}) == point.load + point.interference
    assert len(K.turns) == s.before + point.load + point.lag
    assert all("code" not in turn for turn in K.turns[: s.before])


def test_key_blind_counts_the_commonest_code():
    assert key_blind(1, 4) == 1
    assert key_blind(2, 4) == pytest.approx(1 / 4 + 3 / 4 / 2)
    rng = random.Random(0)
    drawn = [[rng.randrange(4) for _ in range(8)] for _ in range(20_000)]
    assert key_blind(8, 4) == pytest.approx(sum(max(map(d.count, range(4))) for d in drawn) / 8 / len(drawn), abs=0.005)


# ---- theory ----
def test_the_theory_at_its_corners():
    def theory(method, lag, **settings):
        return trace_theory(MemorySettings(method=method, **settings), lag)

    for method in METHODS:
        assert theory(method, 0) == (1, 1)
        low, high = theory(method, 16)
        assert low <= high
        assert low == pytest.approx(0.95**16)
    assert theory("prefix", 16).high == pytest.approx(0.95**16)
    assert theory("slot", 16).high == pytest.approx((1 - 0.05 / 8) ** 16)
    assert theory("slot", 16, num_entries=8) == pytest.approx((0.95**16,) * 2)  # all slots win every turn
    assert theory("gated", 99, gamma=1.0) == (1, 1)
    assert theory("hebbian", 16, gamma=1.0) == pytest.approx((1.05**-16, 1))  # at its bound it forgets even so


@pytest.fixture
def rule():
    """Random hidden states in float64, and each write rule on them: rule[name](state, H)."""
    d, generator = 32, torch.Generator().manual_seed(7)
    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)
    W = [draw(d, d) / d**0.5 for _ in range(3)]
    return dict(
        draw=draw, d=d, W=W,
        attention_coupled=lambda P, H: write.attention_coupled(P, H, *W, gamma=0.9),
        hebbian=lambda M, H: write.hebbian(M, H, 0.005 * W[0], W[1], gamma=0.9),
        sparse_slots=lambda P, H: write.sparse_slots(P, H, W[0], W[1], gamma=0.9, top_k=4))


def test_the_hebbian_rule_forgets_by_gamma_and_by_its_bound(rule):
    one, other, lag = rule["draw"](32, 32) / 64, rule["draw"](32, 32) / 64, 12
    start = (one - other).norm()
    for _ in range(lag):
        H = rule["draw"](5, rule["d"])
        one, other = rule["hebbian"](one, H), rule["hebbian"](other, H)
    assert max(one.norm(), other.norm()) < 1
    assert float((one - other).norm() / start) == pytest.approx(0.9**lag, rel=1e-9)

    W_K, W_V = (0.05 * W for W in rule["W"][:2])  # gamma 1, the same turn again: at the bound the lower bound is met
    M = write.hebbian(torch.zeros_like(one), H, W_K, W_V, 1.0)
    settings, norm, M = MemorySettings(method="hebbian", gamma=1.0), float(M.norm()), M / M.norm()
    kept = math.prod(float(write.hebbian_decay(M, H, W_K, W_V, 1.0)) for _ in range(lag))
    assert kept < 0.9
    assert kept == pytest.approx(trace_theory(settings, lag, write_norm=norm).low, rel=1e-9)


def test_the_attention_rule_forgets_by_gamma_but_for_its_address(rule):
    """D <- gamma D + (A - A')^T H W_V: exact decay for equal addresses, and never further off than the second term."""
    (W_Q, W_K, W_V), d = rule["W"], rule["d"]
    P = rule["draw"](16, d)
    other = P + 0.01 * rule["draw"](16, d)
    start, addressed, lag = (P - other).norm(), torch.zeros((), dtype=torch.float64), 12
    same = P, other
    for _ in range(lag):
        H = rule["draw"](5, d)
        A, B = (write.attention_coupled_weights(bank, H, W_Q, W_K) for bank in (P, other))
        addressed = 0.9 * addressed + ((A - B).T @ (H @ W_V)).norm()
        P, other = rule["attention_coupled"](P, H), rule["attention_coupled"](other, H)
        same = tuple(write.attention_coupled(bank, H, 0 * W_Q, W_K, W_V, gamma=0.9) for bank in same)
    assert float((same[0] - same[1]).norm() / start) == pytest.approx(0.9**lag, rel=1e-9)
    assert addressed > 0
    assert abs(float((P - other).norm() - 0.9**lag * start)) <= float(addressed)


def test_the_slots_rule_forgets_between_its_bounds(rule):
    """Isotropic turns: a mark is left as by the even spread. One turn again and again: the same slots win."""
    S, top_k, lag, d = 32, 4, 24, rule["d"]
    even = (1 - 0.1 * top_k / S) ** lag
    left = []
    for _ in range(60):
        P, kept = 0.02 * rule["draw"](S, d), torch.ones(S, dtype=torch.float64)
        for _ in range(lag):
            H = rule["draw"](1, d)
            kept[write.sparse_slot_choice(P, H, rule["W"][0], top_k)] *= 0.9
            P = rule["sparse_slots"](P, H)
        assert kept.log().sum() / math.log(0.9) == pytest.approx(top_k * lag)  # k slots a turn, no more
        left.append(float(kept.mean()))
    assert sum(left) / len(left) == pytest.approx(even, abs=0.05)  # slots that once won win again: a little above
    P = 0.02 * rule["draw"](S, d)
    H = rule["draw"](1, d)
    P_same = [P := write.sparse_slots(P, H, rule["W"][0], rule["W"][0], 0.9, top_k) for _ in range(lag)]
    changed = (P_same[-1] - P_same[0]).ne(0).any(dim=1).sum()
    assert changed == top_k  # W_u = W_a: what is written attracts the next turn, the same slots win


RETENTION = dict(lags=(0, 1, 4, 16, 64), loads=(2, 12), interference=(8,), probe_rows=4)


@pytest.fixture(scope="module")
def kept(backbone):
    """kept(method, seed): the retention table, made once."""
    return functools.cache(lambda method, seed=42: retention(backbone, method, 1, seed, pairs=8, **RETENTION))


def test_hebbian_traces_are_the_theory(kept):
    table = kept("hebbian")
    assert table.trace.values == pytest.approx(table.trace_theory.values, rel=2e-3)
    assert table.distance.values == pytest.approx(table.trace_theory.values, rel=2e-3)
    assert table.trace_theory.values == pytest.approx(table.trace_low.values, rel=1e-6)  # the bound is never reached
    assert (table.rerouted == 0).all()


@pytest.mark.parametrize("method", ["prefix", "cross_attention", "kv_extension", "gated"])
def test_attention_coupled_traces_are_the_theory(kept, method):
    """To 0.02 of the mark; the whole difference is larger where the fact moves later turns to other rows."""
    table = kept(method)
    assert table.trace_theory.values == pytest.approx(table.trace_low.values) == table.trace_high.values
    near = table[(table.axis == "lag") & (table.x <= 16)]
    assert near.trace.values == pytest.approx(near.trace_theory.values, abs=0.02)
    assert (near.distance >= near.trace - 1e-6).all()


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_slot_traces_are_the_theory_where_the_fact_moves_no_turn(kept, seed):
    table = kept("slot", seed)
    still = table[table.rerouted == 0]
    assert len(still) > 0
    assert still.trace.values == pytest.approx(still.trace_theory.values, abs=1e-3)
    assert (table.trace_theory >= table.trace_low - 1e-6).all()
    if (table.slots_written == 8).all():  # the same slots win every turn
        assert (table.rerouted == 0).all()
        assert table.trace.values == pytest.approx(table.trace_low.values, abs=1e-3)


@pytest.mark.slow
def test_the_seed_decides_how_many_slots_are_ever_written(kept):
    """A written slot looks more like the next turn or less, as the maps were drawn: 8 slots or so for good, or 64."""
    written = [kept("slot", seed).slots_written.max() for seed in SEEDS]
    assert min(written) < 10
    assert max(written) > 60


# ---- recall ----
def test_the_same_seed_gives_the_same_recall(backbone):
    before = torch.get_rng_state(), random.getstate()
    one, again = (recall(backbone, "M.6", lags=(0, 2), **QUICK) for _ in range(2))
    other = recall(backbone, "M.6", seed=43, lags=(0, 2), **QUICK)
    assert one.table.equals(again.table)
    assert one.history.drop(columns="seconds").equals(again.history.drop(columns="seconds"))
    assert all(map(torch.equal, one.model.parameters(), again.model.parameters()))
    assert not one.history.loss.equals(other.history.loss)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()


@pytest.mark.parametrize("method", METHODS)
def test_banks_read_together_are_read_as_one_by_one(backbone, method):
    lab = task._Lab(backbone, method, 1, 42, dict(lags=(0,)))
    for parameter in lab.model.parameters():  # away from the silent start
        parameter.data += 0.1
    reader = task._Reader(lab)
    banks = lab.row(random.Random(0), [Point("lag", 0)], "lamp", 0)[0]
    keys = ["lamp", "door", "hall", "vase"]
    with torch.no_grad():
        together = reader(banks, keys)
        alone = torch.cat([reader([bank], [key]) for bank, key in zip(banks, keys, strict=True)])
    assert together.shape == (4, 4)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    if method != "hebbian":  # there `logits` would query with the answer's first token as well
        text = task.PROMPT.format(question=task.QUESTION.format(key="lamp")) + " "
        logits = lab.model.logits(text, memory=banks[0])[-1, reader.candidates]
        torch.testing.assert_close(together[0], logits.log_softmax(dim=0), rtol=1e-4, atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 1e-4  # the banks are read at all


@pytest.fixture(scope="module", params=METHODS)
def recalled(request, backbone):
    return recall(backbone, request.param, lags=(1,), loads=(), interference=(), steps=150, rows_a_step=1,
                  probe_rows=16, pairs=1)


@pytest.mark.slow
def test_a_fact_is_recalled_above_chance(recalled):
    (point,) = recalled.table.itertuples()
    assert point.n == 96
    assert p_at_least(point.accuracy, point.n) < 0.001
    assert point.accuracy > 0.5, "above chance, but hardly"
    assert point.low < point.accuracy < point.high or point.accuracy == 1
    assert point.probe > 0.5


@pytest.mark.slow
def test_without_the_right_bank_recall_is_at_chance(recalled):
    (point,) = recalled.table.itertuples()
    assert point.accuracy_zero == CHANCE  # the same answer whatever the episode was
    assert 0.001 < p_at_least(point.accuracy_other, point.n) < 0.999
    assert point.logp_own_minus_other > 0.1  # nats


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kv_extension", "hebbian"])
def test_recall_ends_where_theory_leaves_nothing(backbone, method):
    table = recall(backbone, method, gamma=0.5, lags=(0, 64), loads=(), interference=(), rows=16, steps=100,
                   rows_a_step=1, probe_rows=24, pairs=2).table
    early, late = table.itertuples()
    assert late.trace_high < 1e-18
    assert late.trace == pytest.approx(0, abs=1e-6)
    assert early.accuracy > 0.5
    assert 0.001 < p_at_least(late.accuracy, late.n) < 0.999
    assert 0.001 < p_at_least(late.probe, 24 * 4) < 0.999


@pytest.mark.slow
def test_what_does_not_decay_stays(backbone):
    """gamma = 1: the mark stays whole, and the code is in the bank after 64 turns; at 0.95 it no longer is."""
    points = dict(lags=(0, 64), loads=(), interference=(), pairs=4, probe_rows=48)
    (_, kept), (_, lost) = (
        retention(backbone, "kv_extension", gamma=gamma, **points).itertuples() for gamma in (1.0, 0.95))
    assert kept.trace == pytest.approx(1, abs=0.1) and lost.trace == pytest.approx(0.95**64, abs=0.02)
    assert kept.probe > 0.8 and lost.probe < 0.5


def test_slots_without_decay_are_never_written(backbone):
    bank = retention(backbone, "slot", gamma=1.0, lags=(0, 4), loads=(), interference=(), pairs=1, probe_rows=4)
    assert bank.trace.isna().all()
    assert (bank.slots_written == 0).all()
    assert bank.probe.tolist() == [CHANCE] * 2


def test_the_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RecallSettings().steps = 3
