"""The three write rules: worked by hand, against loops, and what must hold for any numbers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from pdmem_lib import write

D = 4


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def randn(*shape, seed, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


EYE = torch.eye(D)
ZERO = torch.zeros(D, D)
P = tensor([1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0])  # (3, 4)
H = tensor([2, 0, 0, 0], [0, 0, 0, 6])  # (2, 4)

# each rule as f(state, H, maps, gamma), with the shapes it needs: (state, maps)
RULES = {
    "attention_coupled": (lambda S, H, W, g: write.attention_coupled(S, H, *W[:3], g), lambda M, d: ((M, d), (d, d))),
    "hebbian": (lambda S, H, W, g: write.hebbian(S, H, *W[:2], g), lambda M, d: ((M, M), (d, M))),
    "sparse_slots": (lambda S, H, W, g: write.sparse_slots(S, H, *W[:2], g, 2), lambda M, d: ((M, d), (d, d))),
}


# ---- by hand ---------------------------------------------------------------------------------------------------------


def test_attention_coupled_with_a_blind_query_spreads_every_token_evenly():
    # W_Q = 0: every score is 0, so each of the 3 rows takes a third of H W_V summed over tokens = [2, 0, 0, 6] / 3
    new = write.attention_coupled(P, H, ZERO, EYE, EYE, 0.5)
    share = tensor([2 / 3, 0, 0, 2])
    torch.testing.assert_close(new, 0.5 * P + share)


def test_attention_coupled_by_hand():
    # token 0 = [2,0,0,0]: scores with rows [1,0,0], times 2 / sqrt(4) = 1 -> weights e/(e+2), 1/(e+2), 1/(e+2)
    # token 1 = [0,0,0,6]: orthogonal to every row -> 1/3 each; W_V doubles
    e = math.e
    new = write.attention_coupled(P, H, EYE, EYE, 2 * EYE, 0.5)
    wanted = tensor([0.5 + 4 * e / (e + 2), 0, 0, 4], [4 / (e + 2), 0.5, 0, 4], [4 / (e + 2), 0, 0.5, 4])
    torch.testing.assert_close(new, wanted)


def test_attention_coupled_uses_its_maps_on_the_right_sides():
    # row vectors: H W_Q; W_Q sends axis 3 to axis 2, W_K sends axis 2 to axis 0 and W_V axis 3 to axis 1
    W_Q, W_K, W_V = torch.zeros(3, D, D)
    W_Q[3, 0] = W_K[2, 0] = W_V[3, 1] = 1
    # token 1 = [0,0,0,6]: query 6 on axis 0, only row 2 has a key there: score 6/2 = 3; token 0: all scores 0, value 0
    z = math.exp(3) + 2
    new = write.attention_coupled(P, H, W_Q, W_K, W_V, 1.0)
    torch.testing.assert_close(new - P, tensor([0, 6 / z, 0, 0], [0, 6 / z, 0, 0], [0, 6 * math.exp(3) / z, 0, 0]))


def test_hebbian_by_hand():
    # H W_K = [[2,0],[0,0]], H W_V = [[0,2],[6,0]] -> (H W_K)^T (H W_V) / 2 = [[0,4],[0,0]] / 2 = [[0,2],[0,0]]
    W_K = tensor([1, 0], [0, 0], [0, 0], [0, 0])
    W_V = tensor([0, 1], [0, 0], [0, 0], [1, 0])
    M = tensor([0, 0], [3, 0])
    # 0.5 M + that = [[0,2],[1.5,0]], of norm 2.5: divided by it
    torch.testing.assert_close(write.hebbian(M, H, W_K, W_V, 0.5), tensor([0, 0.8], [0.6, 0]))
    # a tenth of it is of norm 0.25 <= 1 and stays
    torch.testing.assert_close(write.hebbian(M / 10, H, W_K, W_V / 10, 0.5), tensor([0, 0.2], [0.15, 0]))


def test_sparse_slots_by_hand():
    # z = mean = [1, 0, 0, 3]; W_a = 1: matches slot 0 (score 1/2) above slots 1, 2 (0); W_u triples; gamma 0.75
    new = write.sparse_slots(P, H, EYE, 3 * EYE, 0.75, 1)
    torch.testing.assert_close(new, tensor([0.75 + 0.75, 0, 0, 2.25], [0, 1, 0, 0], [0, 0, 1, 0]))


def test_weights_by_hand():
    e = math.e
    A = write.attention_coupled_weights(P, H, EYE, EYE)
    torch.testing.assert_close(A, tensor([e / (e + 2), 1 / (e + 2), 1 / (e + 2)], [1 / 3, 1 / 3, 1 / 3]))
    a = write.sparse_slot_weights(P, H.mean(dim=0), 2 * EYE)  # score 2 * 1 / sqrt(4) = 1 for slot 0
    torch.testing.assert_close(a, torch.tensor([e, 1, 1]) / (e + 2))


# ---- against loops ---------------------------------------------------------------------------------------------------


def naive_attention_coupled(P, H, W_Q, W_K, W_V, gamma):
    new = [[gamma * x for x in row] for row in P.tolist()]
    for token in H:
        scores = [float(token @ W_Q @ (row @ W_K)) / math.sqrt(P.shape[1]) for row in P]
        total = sum(math.exp(s) for s in scores)
        for m, score in enumerate(scores):
            for i, value in enumerate((token @ W_V).tolist()):
                new[m][i] += math.exp(score) / total * value
    return torch.tensor(new)


def naive_hebbian(M, H, W_K, W_V, gamma):
    new = gamma * M
    for token in H:
        new = new + torch.outer(token @ W_K, token @ W_V) / len(H)
    norm = math.sqrt(sum(x * x for x in new.flatten().tolist()))
    return new / norm if norm > 1 else new


def naive_sparse_slots(P, H, W_a, W_u, gamma, top_k):
    z = sum(H) / len(H)
    scores = [float(z @ W_a @ row) for row in P]  # the softmax keeps their order
    best = sorted(range(len(P)), key=scores.__getitem__, reverse=True)[:top_k]
    return torch.stack([gamma * row + (1 - gamma) * (z @ W_u) if s in best else row for s, row in enumerate(P)])


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("name", RULES)
def test_equals_a_loop(name, T):
    state_shape, map_shape = RULES[name][1](7, 6)
    S, H, W = randn(*state_shape, seed=1), randn(T, 6, seed=2), randn(3, *map_shape, seed=3, scale=0.5)
    naive = {
        "attention_coupled": lambda: naive_attention_coupled(S, H, *W, 0.95),
        "hebbian": lambda: naive_hebbian(S, H, *W[:2], 0.95),
        "sparse_slots": lambda: naive_sparse_slots(S, H, *W[:2], 0.95, 2),
    }
    torch.testing.assert_close(RULES[name][0](S, H, W, 0.95), naive[name]())


# ---- promises --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
def test_arguments_stay_as_they_are_and_no_gradient_is_asked_for(name):
    state_shape, map_shape = RULES[name][1](5, 6)
    S, H = randn(*state_shape, seed=1).requires_grad_(), randn(3, 6, seed=2).requires_grad_()
    W = randn(3, *map_shape, seed=3).requires_grad_()
    before = [x.detach().clone() for x in (S, H, W)]
    new = RULES[name][0](S, H, W, 0.9)
    assert not new.requires_grad
    assert not torch.equal(new, before[0])
    assert new.data_ptr() != S.data_ptr()
    assert all(torch.equal(x, y) for x, y in zip((S, H, W), before, strict=True))


@pytest.mark.parametrize("name", RULES)
def test_no_tokens_is_an_error_that_says_what_to_do(name):
    state_shape, map_shape = RULES[name][1](5, 6)
    with pytest.raises(ValueError, match=r"T >= 1.*skip empty turns"):
        RULES[name][0](torch.zeros(state_shape), torch.zeros(0, 6), torch.zeros(3, *map_shape), 0.9)


@pytest.mark.parametrize("top_k", [0, 4, -1])
def test_top_k_outside_the_slots_is_an_error(top_k):
    with pytest.raises(ValueError, match="between 1 and the 3 slots"):
        write.sparse_slots(P, H, EYE, EYE, 0.9, top_k)


def test_shapes_are_checked_at_run_time_in_tests():
    with pytest.raises(TypeCheckError):
        write.attention_coupled(P, H, torch.zeros(D, 3), EYE, EYE, 0.9)
    with pytest.raises(TypeCheckError):
        write.hebbian(torch.zeros(3, 2), H, torch.zeros(D, 3), torch.zeros(D, 3), 0.9)
    with pytest.raises(TypeCheckError):
        write.sparse_slots(P, H[None], EYE, EYE, 0.9, 1)


sizes = dict(M=st.integers(2, 12), T=st.integers(1, 9), d=st.integers(1, 10), seed=st.integers(0, 2**31),
             scale=st.sampled_from([1e-4, 1.0, 1e3]), gamma=st.floats(0, 1))


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=60, deadline=None)
@given(**sizes)
def test_any_sizes_and_scales_give_a_finite_state_of_the_same_shape(name, M, T, d, seed, scale, gamma):
    state_shape, map_shape = RULES[name][1](M, d)
    S = randn(*state_shape, seed=seed, scale=scale)
    new = RULES[name][0](S, randn(T, d, seed=seed + 1, scale=scale), randn(3, *map_shape, seed=seed + 2), gamma)
    assert new.shape == S.shape and new.dtype == torch.float32
    assert new.isfinite().all()


@settings(max_examples=60, deadline=None)
@given(**sizes)
def test_hebbian_norm_stays_within_one_and_is_left_alone_below(M, T, d, seed, scale, gamma):
    S, H = randn(M, M, seed=seed, scale=scale), randn(T, d, seed=seed + 1, scale=scale)
    W_K, W_V = randn(2, d, M, seed=seed + 2)
    new = write.hebbian(S, H, W_K, W_V, gamma)
    assert new.norm() <= 1 + 1e-5
    free = gamma * S + (H @ W_K).T @ (H @ W_V) / T
    if free.norm() < 0.99:
        torch.testing.assert_close(new, free)


@settings(max_examples=60, deadline=None)
@given(**sizes, data=st.data())
def test_sparse_slots_changes_the_top_k_rows_and_no_other_bit(M, T, d, seed, scale, gamma, data):
    top_k = data.draw(st.integers(1, M))
    S, H = randn(M, d, seed=seed), randn(T, d, seed=seed + 1, scale=scale)
    W_a, W_u = randn(2, d, d, seed=seed + 2)
    new = write.sparse_slots(S, H, W_a, W_u, 0.5, top_k)
    changed = (new != S).any(dim=1)
    assert changed.sum() == top_k
    weights = write.sparse_slot_weights(S, H.mean(dim=0), W_a)
    assert top_k == M or weights[changed].min() >= weights[~changed].max()


@settings(max_examples=40, deadline=None)
@given(**sizes)
def test_write_weights_are_distributions(M, T, d, seed, scale, gamma):
    S, H, W = randn(M, d, seed=seed), randn(T, d, seed=seed + 1, scale=scale), randn(2, d, d, seed=seed + 2)
    A, a = write.attention_coupled_weights(S, H, *W), write.sparse_slot_weights(S, H[0], W[0])
    assert A.shape == (T, M) and a.shape == (M,)
    torch.testing.assert_close(A.sum(dim=1), torch.ones(T))
    torch.testing.assert_close(a.sum(), torch.tensor(1.0))
    assert (A >= 0).all() and (a >= 0).all()
