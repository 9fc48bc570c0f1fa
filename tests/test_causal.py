"""What an answer rests on, against brute force: every memory written out, every score taken alone."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import pdmem_lib as pdmem
from pdmem_lib import causal, editing

TURNS = ["Ann: I adopted a parrot.", "Ben: I bought a flute.", "Cleo: I like rain.", "Ann: It can sing.", "Bob: Good."]
QUESTION, ANSWER = "Which animal did Ann adopt?", "parrot"


@pytest.fixture(scope="session")
def hidden(tiny):
    return tiny.encode(TURNS)


def states_of(m, hidden):
    states = [m.adapter.initial_state()]
    for H in hidden:
        states.append(m.adapter.write(states[-1], H))
    return states


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in b)


# --- memories without something ---

@pytest.mark.parametrize("method", pdmem.METHODS)
def test_without_a_turn_is_the_memory_that_was_never_told_it_bit_for_bit(opened, hidden, method):
    m = opened(method)
    never_told = [states_of(m, hidden[:t] + hidden[t + 1 :])[-1] for t in range(len(hidden))]
    for before in (None, states_of(m, hidden)):
        found = list(causal.without_turns(m, hidden, before=before))
        assert len(found) == len(hidden) and all(map(same, found, never_told))
    (only,) = causal.without_turns(m, hidden, [2])
    assert same(only, never_told[2])


def test_without_a_turn_that_there_is_not(opened, hidden):
    for turn in (-1, len(hidden)):
        with pytest.raises(ValueError, match=f"no turn {turn}: the 5 turns count from 0"):
            list(causal.without_turns(opened("slot"), hidden, [turn], states_of(opened("slot"), hidden)))


@pytest.mark.parametrize("stands", causal.STOOD_FOR)
@pytest.mark.parametrize("method", pdmem.METHODS)
def test_without_an_entry_only_its_row_is_another(opened, hidden, method, stands):
    m = opened(method)
    state, start = states_of(m, hidden)[-1], m.adapter.initial_state()
    ((name, rows),) = state.items()
    kept = rows.clone()
    for entry, found in zip((0, 5), causal.without_entries(m, state, (0, 5), stands), strict=True):
        changed = (found[name] != rows).any(dim=1).nonzero().flatten().tolist()
        wanted = start[name][entry] if stands == "initial" else torch.zeros_like(rows[entry])
        assert torch.equal(found[name][entry], wanted)
        assert changed == ([entry] if not torch.equal(wanted, rows[entry]) else [])
    assert torch.equal(state[name], kept)
    assert len(list(causal.without_entries(m, state))) == len(rows)


def test_without_entries_refuses_what_it_cannot_mean(opened, hidden):
    m = opened("slot")
    with pytest.raises(ValueError, match="no entry 64: the 64 entries count from 0"):
        list(causal.without_entries(m, m.state, [64]))
    with pytest.raises(ValueError, match="can stand 'initial' or 'zero', got 'one'"):
        list(causal.without_entries(m, m.state, [0], "one"))


# --- effects ---

@pytest.mark.parametrize("method", pdmem.METHODS)
def test_effects_are_what_brute_force_finds_token_by_token(opened, hidden, method):
    m = opened(method)
    whole = states_of(m, hidden)[-1]
    tokens, base = m.token_log_probs(QUESTION, ANSWER, whole)
    wanted = []
    for turn in range(len(hidden)):
        m.reset()
        m.write_hidden(hidden[:turn] + hidden[turn + 1 :])
        wanted.append(base - m.token_log_probs(QUESTION, ANSWER)[1])
    found = list(causal.effects(m, QUESTION, ANSWER, whole, causal.without_turns(m, hidden), batch=2))
    assert len(found) == len(hidden) and all(effect.shape == (len(tokens),) for effect in found)
    assert_close(torch.stack(found), torch.stack(wanted), rtol=1e-3, atol=2e-5)
    assert max(abs(effect).max() for effect in wanted) > 1e-3  # the memory moves something
    total = m.score([QUESTION], [ANSWER], whole).log_prob - m.score([QUESTION], [ANSWER]).log_prob  # without the last
    assert_close(found[-1].sum(), total[0], rtol=1e-3, atol=2e-5)


def test_a_memory_that_is_whole_has_no_effect_and_a_silent_reader_finds_none(model, opened, hidden):
    for m in (opened("slot"), model("slot")):
        whole = states_of(m, hidden)[-1]
        (nothing,) = causal.effects(m, QUESTION, ANSWER, whole, [whole])
        assert nothing.abs().max() < 1e-5
    silent = causal.effects(m, QUESTION, ANSWER, whole, causal.without_turns(m, hidden))
    assert max(float(effect.abs().max()) for effect in silent) < 1e-4


def test_effects_come_a_batch_at_a_time_so_that_one_may_stop(opened, hidden):
    m, taken = opened("slot"), []

    def without():
        for turn, state in enumerate(causal.without_turns(m, hidden)):
            taken.append(turn)
            yield state

    found = causal.effects(m, QUESTION, ANSWER, states_of(m, hidden)[-1], without(), batch=2)
    next(found), next(found)
    assert taken == [0, 1]
    next(found)
    assert taken == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="batch is a number of memories"):
        next(causal.effects(m, QUESTION, ANSWER, m.state, [], batch=0))


def test_many_memories_score_as_each_alone(opened, hidden):
    for method in pdmem.METHODS:
        m = opened(method)
        states = states_of(m, hidden)
        tokens, together = m.token_log_probs_under(states, QUESTION, ANSWER)
        assert together.shape == (len(states), len(tokens))
        for state, row in zip(states, together, strict=True):
            assert_close(row, m.token_log_probs(QUESTION, ANSWER, state)[1], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("method", pdmem.METHODS)
def test_attention_behind_an_answer_is_that_of_its_prompt(opened, hidden, method):
    """The first token is foretold by the prompt alone, so what is looked at there is `attention_to_memory`'s last row."""
    from pdmem_lib.prompts import prompt_text

    m = opened(method)
    state = states_of(m, hidden)[-1]
    attention = m.attention_of_answer(QUESTION, ANSWER, state)
    prompt = m.attention_to_memory(prompt_text(QUESTION), state)  # (L, h, T, M)
    assert attention.shape[2] == len(m.token_log_probs(QUESTION, ANSWER)[0])
    assert_close(attention[:, :, 0], prompt[:, :, -1], rtol=1e-3, atol=1e-6)
    assert m.attention_of_answer(QUESTION, ANSWER, "off") is None


# --- agreement ---

def test_agreement_by_hand():
    same = causal.agreement([1, 2, 3, 4, 5], [10, 20, 30, 40, 50])
    assert same == pytest.approx((1, same.low, 1, 1, 5)) and same.low < 0.999
    turned = causal.agreement([1, 2, 3, 4, 5], [5, 4, 3, 2, 1])
    assert turned == pytest.approx((-1, -1, turned.high, -1, 5)) and turned.high > -0.999
    # ranks 1 2 3 4 against 1 3 2 4: d² = 2, rho = 1 - 6 * 2 / (4 * 15) = 0.8; five pairs of six agree: tau = 4 / 6
    some = causal.agreement([1, 2, 3, 4], [1, 3, 2, 4])
    assert some.spearman == pytest.approx(0.8) and some.kendall == pytest.approx(4 / 6)
    half = 1.96 * math.sqrt((1 + 0.8**2 / 2) / 1)
    assert (some.low, some.high) == pytest.approx((math.tanh(math.atanh(0.8) - half), math.tanh(math.atanh(0.8) + half)))


def test_agreement_where_nothing_can_be_told():
    for scores, found in (([1, 1, 1, 1], [1, 2, 3, 4]), ([1, 2, 3, 4], [0, 0, 0, 0]), ([1], [1]), ([], [])):
        told = causal.agreement(scores, found)
        assert math.isnan(told.spearman) and math.isnan(told.kendall) and (told.low, told.high) == (-1, 1)
    assert causal.agreement([1, 2, 3], [1, 2, 3])[1:3] == (-1, 1)  # three things agree by chance one time in six
    with pytest.raises(ValueError, match="one number each a turn"):
        causal.agreement([1, 2], [1, 2, 3])


def test_the_interval_covers_what_it_says():
    rng, rho, covered = np.random.default_rng(0), 0.5, 0
    for _ in range(400):
        x, y = rng.multivariate_normal([0, 0], [[1, rho], [rho, 1]], 30).T
        told = causal.agreement(x, y)
        covered += told.low <= 6 / math.pi * math.asin(rho / 2) <= told.high  # Spearman's rho of a normal pair
    assert 0.92 <= covered / 400 <= 0.98


def test_ranked_puts_the_largest_first_and_ties_in_order():
    assert causal.ranked([1, 3, 3, -2]) == [1, 2, 0, 3]


def test_forgetting_from_a_given_start_is_the_same_memory(opened, hidden):
    """What `without_turns` builds on: a replay from a middle state."""
    m = opened("slot")
    states = states_of(m, hidden)
    assert same(editing.forget(m, hidden[2:], (), start=states[2]), states[-1])
