"""Write rules: how a turn's hidden states change the memory [A, C].

Pure functions on an explicit state, unbatched, row vectors (``H @ W``). They never change their arguments, never ask
for a gradient, and compute in the precision of what they are given, under autocast too. States without a token (T = 0)
are a ValueError. The maps ``W_*`` are fixed: drawn once from the seed, never trained [C].

Each rule has the form ``new = decay * old + increment`` row by row, so that a state is exactly the sum of what its
start and every turn left in it (`pdmem_lib.provenance`): decay is gamma in `attention_coupled`, gamma in the written rows of
`sparse_slots` and 1 in the others, `hebbian_decay` in `hebbian`.

Axis letters of the whole library: ``B`` batch, ``T`` tokens of input, ``M`` memory entries, ``L`` blocks, ``h`` heads,
``d`` model width, ``dk`` head width, ``dh`` width of the Hebbian matrix.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from numbers import Integral, Real

import torch
from jaxtyping import Float, Int
from torch import Tensor


def _as_it_stands(rule: Callable) -> Callable:
    """``rule`` without gradients and in the precision of what it is given, whatever autocast is on around it."""
    @wraps(rule)
    def run(*given, **named):
        device = next((x.device.type for x in (*given, *named.values()) if isinstance(x, Tensor)), "cpu")
        rounded = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        with torch.no_grad(), torch.autocast(device, enabled=False) if rounded else nullcontext():
            return rule(*given, **named)
    return run


def _require_shapes(H: Tensor, state: Tensor, width: int | None = None, **maps: Tensor) -> None:
    """H (T, d), the state two-dimensional and, with ``width`` None, as wide as H; each map (d, width), width None: d."""
    for name, given in {"the state": state, "H": H, **maps}.items():
        if not isinstance(given, Tensor):
            raise ValueError(f"{name} is a {type(given).__name__}: a write takes tensors")
    if H.ndim != 2 or H.shape[0] == 0:
        mend = "skip empty turns" if H.ndim == 2 else "write one turn at a time"
        raise ValueError(f"a write needs hidden states of shape (T, d) with T >= 1, got {tuple(H.shape)}: {mend}")
    if width is not None and (state.ndim != 2 or state.shape[0] != state.shape[1]):
        raise ValueError(f"a Hebbian state is a square matrix (dh, dh), this one has shape {tuple(state.shape)}")
    d = H.shape[1]
    wide = d if width is None else width
    if state.ndim != 2 or state.shape[1] != wide:
        raise ValueError(f"hidden states of shape {tuple(H.shape)} cannot be written into a state of shape "
                         f"{tuple(state.shape)}: the two must be equally wide")
    for name, W in maps.items():
        if W.shape != (d, wide):
            raise ValueError(f"{name} has shape {tuple(W.shape)}, and hidden states of shape {tuple(H.shape)} need {(d, wide)}")


def _require_decay(gamma: float) -> None:
    if not isinstance(gamma, Real) or not 0 <= gamma <= 1:
        raise ValueError(f"gamma must be a number from 0 (all is forgotten) to 1 (nothing is), got {gamma!r}")


@_as_it_stands
def attention_coupled(
    P: Float[Tensor, "M d"], H: Float[Tensor, "T d"],
    W_Q: Float[Tensor, "d d"], W_K: Float[Tensor, "d d"], W_V: Float[Tensor, "d d"], gamma: float,
) -> Float[Tensor, "M d"]:
    """``A = softmax(H W_Q (P W_K)^T / sqrt(d))`` over the M rows; ``P <- gamma P + A^T (H W_V)`` (M.1 M.2 M.3 M.5 [C])."""
    _require_shapes(H, P, W_Q=W_Q, W_K=W_K, W_V=W_V)
    _require_decay(gamma)
    return gamma * P + attention_coupled_weights(P, H, W_Q, W_K).T @ (H @ W_V)  # (M, d)


@_as_it_stands
def attention_coupled_weights(
    P: Float[Tensor, "M d"], H: Float[Tensor, "T d"], W_Q: Float[Tensor, "d d"], W_K: Float[Tensor, "d d"],
) -> Float[Tensor, "T M"]:
    """The write weights ``A`` of `attention_coupled`: which row each token goes to; each row of A sums to 1."""
    return torch.softmax((H @ W_Q) @ (P @ W_K).T / P.shape[-1] ** 0.5, dim=-1)  # (T, M)


@_as_it_stands
def hebbian(
    M: Float[Tensor, "dh dh"], H: Float[Tensor, "T d"],
    W_K: Float[Tensor, "d dh"], W_V: Float[Tensor, "d dh"], gamma: float,
) -> Float[Tensor, "dh dh"]:
    """``M <- gamma M + (H W_K)^T (H W_V) / T``, then ``M / max(||M||_F, 1)``, so that ``||M||_F <= 1`` (M.4 [C])."""
    M = _hebbian_unbounded(M, H, W_K, W_V, gamma)
    return M / M.norm().clamp_min(1.0)


@_as_it_stands
def hebbian_decay(
    M: Float[Tensor, "dh dh"], H: Float[Tensor, "T d"],
    W_K: Float[Tensor, "d dh"], W_V: Float[Tensor, "d dh"], gamma: float,
) -> Float[Tensor, ""]:
    """What `hebbian` multiplies the old matrix by: gamma, over the norm where the bound was reached."""
    return gamma / _hebbian_unbounded(M, H, W_K, W_V, gamma).norm().clamp_min(1.0)


def _hebbian_unbounded(M: Tensor, H: Tensor, W_K: Tensor, W_V: Tensor, gamma: float) -> Tensor:
    _require_shapes(H, M, M.shape[-1] if isinstance(M, Tensor) and M.ndim else 0, W_K=W_K, W_V=W_V)
    _require_decay(gamma)
    return gamma * M + (H @ W_K).T @ (H @ W_V) / H.shape[0]  # (dh, dh)


@_as_it_stands
def sparse_slots(
    P: Float[Tensor, "S d"], H: Float[Tensor, "T d"],
    W_a: Float[Tensor, "d d"], W_u: Float[Tensor, "d d"], gamma: float, top_k: int,
) -> Float[Tensor, "S d"]:
    """``z = mean(H)``, ``a = softmax(z W_a P^T / sqrt(d))``; only the ``top_k`` slots of largest ``a`` change, to
    ``gamma P[s] + (1 - gamma) z W_u`` (M.6 [C]). ``top_k`` above S is an error."""
    _require_shapes(H, P, W_a=W_a, W_u=W_u)
    _require_decay(gamma)
    slots = sparse_slot_choice(P, H, W_a, top_k)  # (top_k,)
    new = P.clone()
    new[slots] = gamma * P[slots] + (1 - gamma) * (H.mean(dim=0) @ W_u)
    return new  # (S, d)


@_as_it_stands
def sparse_slot_choice(
    P: Float[Tensor, "S d"], H: Float[Tensor, "T d"], W_a: Float[Tensor, "d d"], top_k: int,
) -> Int[Tensor, "top_k"]:
    """The slots that `sparse_slots` changes: those of largest address weight, best first."""
    _require_shapes(H, P, W_a=W_a)
    if not isinstance(top_k, Integral) or not 1 <= top_k <= P.shape[0]:
        raise ValueError(f"top_k must be a whole number between 1 and the {P.shape[0]} slots, got {top_k!r}")
    return sparse_slot_weights(P, H.mean(dim=0), W_a).topk(top_k).indices  # (top_k,)


@_as_it_stands
def sparse_slot_weights(P: Float[Tensor, "S d"], z: Float[Tensor, "d"], W_a: Float[Tensor, "d d"]) -> Float[Tensor, "S"]:
    """The address weights ``a`` of `sparse_slots`: how well each slot matches the turn; they sum to 1."""
    return torch.softmax((z @ W_a) @ P.T / P.shape[-1] ** 0.5, dim=-1)  # (S,)
