"""Banks stay finite, each under the bound that its rule has, over many writes, in float32 and bfloat16.

The rules' own code runs, at small sizes. `PDMEM_WRITES` sets how many writes (a million takes about a minute a case).
"""

import os

import pytest
import torch

from pdmem_lib import write

WRITES = int(os.environ.get("PDMEM_WRITES", 3000))
M, T, d = 4, 3, 8
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def maps(count, dtype, width=d):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(d, width, generator=generator) * d**-0.5).to(dtype) for _ in range(count)]


def turns(dtype, scale=1.0):
    """64 turns over and over, of one sign in part, so that what they leave adds up; (T, d) each."""
    generator = torch.Generator().manual_seed(1)
    return (scale * (0.5 + torch.randn(64, T, d, generator=generator))).to(dtype)


def rounding(dtype):
    """What one write may add to a relative bound by rounding: a few operations."""
    return 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("gamma", [0.95, 1.0])
def test_an_attention_coupled_bank_is_bounded_by_what_is_written(gamma, dtype):
    """A turn adds at most T max||h W_V|| to all rows together, so after n writes
    ``||P||_F <= gamma^n ||P_0||_F + T max||h W_V|| (1 - gamma^n) / (1 - gamma)``: bounded for gamma < 1, linear at 1."""
    Q, K, V = maps(3, dtype)
    H = turns(dtype)
    most = T * float((H @ V).float().norm(dim=-1).max())
    P = torch.full((M, d), 0.02, dtype=dtype)
    start = float(P.float().norm())
    for n in range(1, WRITES + 1):
        P = write.attention_coupled(P, H[n % 64], Q, K, V, gamma)
        if n % 1000 == 0 or n == WRITES or n < 10:
            writes = n if gamma == 1 else (1 - gamma**n) / (1 - gamma)
            slack = 1 + rounding(dtype) * writes  # each write's rounding is of the bank's size
            assert float(P.float().norm()) <= (gamma**n * start + most * writes) * slack
            assert P.isfinite().all()
    grown = float(P.float().norm()) / most
    assert grown <= 1 / (1 - gamma) * 1.5 if gamma < 1 else grown > 0.05 * WRITES or dtype == torch.bfloat16


def test_in_bfloat16_an_undecayed_bank_stops_growing_where_a_turn_is_below_its_rounding():
    """At gamma 1 a sum of n equal parts stands still near 2^8 parts: finite, and no longer a memory. The library keeps
    banks in float32, where that is near 2^24."""
    Q, K, V = maps(3, torch.bfloat16)
    P, H = torch.zeros(1, d, dtype=torch.bfloat16), torch.ones(1, d, dtype=torch.bfloat16)
    for _ in range(1000):
        P = write.attention_coupled(P, H, Q, K, V, 1.0)
    again = write.attention_coupled(P, H, Q, K, V, 1.0)
    assert torch.equal(again, P) and float(P.float().norm()) <= 1.1 * 512 * float((H @ V).float().norm())


@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("gamma", [0.95, 1.0])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_a_hebbian_matrix_never_passes_norm_one(gamma, dtype, scale):
    K, V = maps(2, dtype)
    H, matrix = turns(dtype, scale), torch.zeros(d, d, dtype=dtype)
    for n in range(WRITES):
        matrix = write.hebbian(matrix, H[n % 64], K, V, gamma)
        assert float(matrix.float().norm()) <= 1 + rounding(dtype)
    assert float(matrix.float().norm()) > 0.5


@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("gamma", [0.95, 1.0])
def test_slots_stay_within_what_was_written_to_them(gamma, dtype):
    """A slot is a convex combination of its start and of ``mean(H) W_u``: no norm passes the largest of these."""
    a, u = maps(2, dtype)
    H = turns(dtype)
    generator = torch.Generator().manual_seed(2)
    start = (0.02 * torch.randn(M, d, generator=generator)).to(dtype)
    most = max(float((H.mean(dim=1) @ u).float().norm(dim=-1).max()), float(start.float().norm(dim=-1).max()))
    P = start
    for n in range(WRITES):
        P = write.sparse_slots(P, H[n % 64], a, u, gamma, top_k=2)
    assert float(P.float().norm(dim=-1).max()) <= most * (1 + 20 * rounding(dtype))
    assert torch.equal(P, start) if gamma == 1 else not torch.equal(P, start)  # at 1 nothing is ever written


@pytest.mark.parametrize("method, gamma", [(method, gamma) for method in ("kv_extension", "hebbian", "slot")
                                           for gamma in (0.95, 1.0)])
def test_a_full_bank_is_still_read_as_finite_numbers(model, method, gamma):
    """Of a bank as large as a million writes leave it: the scaled readers see its direction."""
    m = model(method, num_entries=16, d_h=16, gamma=gamma)
    hidden = m.backbone.encode(["Ann: I adopted a cat.", "Bob: Well done!"])
    m.write_hidden(hidden * 20)
    if method == "kv_extension" and gamma == 1:
        m.state = {"P": m.state["P"] * (1_000_000 / 40)}
    with torch.no_grad():
        for parameter in m.parameters():
            parameter.add_(0.05)
    assert m.logits("What did Ann adopt?").isfinite().all()
    loss = m.loss(["What did Ann adopt?"], ["a cat"])
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in m.parameters() if p.grad is not None)
