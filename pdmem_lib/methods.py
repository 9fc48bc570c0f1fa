"""The six methods: how each writes (three families) and how each is read.

To add a method: write one class with ``read`` under the family whose write rule it uses, and add it to `REGISTRY`.
Everything trained is an ``nn.Parameter`` of the class; the fixed maps of the write side are buffers, saved with it [C].

Decided by us [D] for all readers: entries are scaled to unit root mean square before they are projected
(``read_norm``), because a bank's norm grows from 0.02 to thousands over a conversation; the readers of keys and values
carry one gate per head and block, 0 at the start (``read_gate``), which makes the start exactly silent.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import write
from .backbone import Backbone
from .seam import Branch, Injection, KeyValues, join
from .settings import SEEDS, Settings, whole_number

State = dict[str, Tensor]  # the memory: an explicit value, passed in and returned


@dataclass(frozen=True)
class MemorySettings(Settings):
    """What defines a memory beside its backbone. ``None`` stands for the capacity's own value [C]."""

    method: str = "slot"
    capacity: int = 1  # 1: 64 entries, d_h 256; 10: 640 entries, d_h 810
    seed: int = 42
    num_entries: int | None = None  # n_P or S
    d_h: int | None = None  # width of the Hebbian matrix
    top_k: int | None = None  # slots written per turn; 8, or all where there are fewer
    gamma: float = 0.95  # decay per write
    read_gate: bool = True
    read_norm: bool = True

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "method", method_name(self.method))
        whole_number("seed", self.seed, *SEEDS)
        if self.capacity not in (1, 10):
            raise ValueError(f"unknown capacity {self.capacity!r}: known are 1 and 10; other sizes by num_entries or d_h")
        if self.num_entries is None:
            object.__setattr__(self, "num_entries", 64 * self.capacity)
        if self.d_h is None:
            object.__setattr__(self, "d_h", {1: 256, 10: 810}[self.capacity])
        if min(self.num_entries, self.d_h) < 1:
            raise ValueError("num_entries and d_h must be at least 1")
        if self.top_k is None:
            object.__setattr__(self, "top_k", min(8, self.num_entries))
        if not 0.0 <= self.gamma <= 1.0:
            raise ValueError(f"gamma is a decay and must lie in [0, 1], got {self.gamma}")
        if self.method == "slot" and not 1 <= self.top_k <= self.num_entries:
            raise ValueError(f"top_k must lie between 1 and num_entries={self.num_entries}, got {self.top_k}: write fewer "
                             "slots a turn, or keep more")


@dataclass(frozen=True)
class Inputs:
    """The current input's frozen states, for a reader that queries with them (M.4)."""

    hidden: Tensor  # (B, T, d)
    valid: Tensor  # (B, T) bool: question tokens, neither padding nor answer


class Method(nn.Module, ABC):
    """A memory: ``initial_state``, ``write`` and ``read``. The state is never kept on the module."""

    title: ClassVar[str]
    alias: ClassVar[str]
    needs_inputs: ClassVar[bool] = False  # whether read() wants the input's frozen states: then it has queries() (M.4)
    entries_are_a_set: ClassVar[bool] = False  # whether reading the entries in another order changes nothing

    def __init__(self, backbone: Backbone, settings: MemorySettings):
        super().__init__()
        self.settings = settings
        self.L, self.h, self.h_kv = backbone.num_layers, backbone.num_heads, backbone.num_key_value_heads
        self.d, self.dk = backbone.hidden_size, backbone.head_dim
        self.state_rms = backbone.state_rms

    @property
    def _called(self) -> str:
        return getattr(self, "title", type(self).__name__)  # a reader's own may have none

    def draw(self, what: str, *shape: int, std: float) -> Tensor:
        """N(0, std^2) from a generator of its own for this seed and name: no draw moves another, no global is touched."""
        key = hashlib.sha256(f"{self.settings.seed}/{what}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu") * std

    def fixed_map(self, name: str, width: int, rms: float = 1.0) -> None:
        """A random map (d, width) of the write side: fixed [C], scaled so that ``H W`` has components of ``rms`` [D]."""
        self.register_buffer(name, self.draw(name, self.d, width, std=rms * self.d**-0.5 / self.state_rms))

    def trained(self, name: str, *shape: int, std: float = 0.02) -> None:
        """A parameter of θ_mem of this ``shape``, drawn from the seed: N(0, ``std``²)."""
        self.register_parameter(name, nn.Parameter(self.draw(name, *shape, std=std)))

    def scaled(self, entries: Tensor) -> Tensor:
        """Entries (..., M, d) at unit root mean square; a zero entry stays zero."""
        return F.rms_norm(entries, entries.shape[-1:], eps=1e-6) if self.settings.read_norm else entries

    @abstractmethod
    def initial_state(self) -> State:
        """P_0, drawn from the seed, on the backbone's device."""

    @abstractmethod
    def write(self, state: State, H: Tensor) -> State:
        """The state after a turn of final hidden states H (T, d); ``state`` itself is left alone."""

    def decay(self, state: State, H: Tensor) -> Tensor:
        """What ``write(state, H)`` multiplies the old rows by, (M,), or () where it is one number for all of them.

        The rest of the new state is what this turn adds. It belongs to the write family, and `provenance` needs it;
        ValueError in a family that does not say. Nothing else asks for it.
        """
        raise ValueError(f"{self._called} does not say what its write keeps: give its write family a decay()")

    def hidden_of(self, state: State) -> Tensor:
        """The state's rows as mixtures of hidden states, (M, d), the random map of the write undone [D].

        So they can be compared with what the model knows, its unembedding say (`figures.nearest_tokens_of`). It belongs
        to the write family; ValueError in one that does not say.
        """
        raise ValueError(f"{self._called} does not say how to undo its write: give its write family a hidden_of()")

    @abstractmethod
    def read(self, state: State, inputs: Inputs | None = None) -> Injection:
        """What the frozen blocks read of ``state``: a list of `KeyValues`, a block each, a `Branch`, or None."""

    def read_each(self, states: Sequence[State], inputs: Sequence[Inputs | None]) -> Injection:
        """`read` of several states as one: the batch is as many equal runs of rows, and run i reads state i."""
        return join([self.read(*one) for one in zip(states, inputs, strict=True)])


# ---- write families: what the state is and how a turn changes it ----
class AttentionCoupledBank(Method):
    """``{"P": (M, d)}``, every token spread over the rows by attention."""

    def __init__(self, backbone: Backbone, settings: MemorySettings):
        super().__init__(backbone, settings)
        for name in ("write_Q", "write_K", "write_V"):
            self.fixed_map(name, self.d)

    def initial_state(self) -> State:
        return {"P": self.draw("P_0", self.settings.num_entries, self.d, std=0.02).to(self.write_Q.device)}

    def write(self, state: State, H: Tensor) -> State:
        P = write.attention_coupled(state["P"], H, self.write_Q, self.write_K, self.write_V, self.settings.gamma)
        return {"P": P}

    def decay(self, state: State, H: Tensor) -> Tensor:
        return state["P"].new_tensor(self.settings.gamma)  # ()

    def hidden_of(self, state: State) -> Tensor:
        return state["P"] @ torch.linalg.pinv(self.write_V)  # (M, d)


class HebbianMatrix(Method):
    """``{"M": (d_h, d_h)}``, one matrix of associations.

    The rule divides by ``max(||M||_F, 1)``. With maps of unit scale a turn adds a matrix of norm ~ d_h and that division
    would erase all earlier turns at once; so the maps are scaled for a turn to add a norm of about `WRITE_NORM` [D].
    For the same reason the random start has norm 0.02 as a whole: N(0, 0.02^2) in each component would have norm
    0.02 d_h, beyond the bound, and drown the first hundred turns [D].
    """

    WRITE_NORM: ClassVar[float] = 0.05

    def __init__(self, backbone: Backbone, settings: MemorySettings):
        super().__init__(backbone, settings)
        for name in ("write_K", "write_V"):
            self.fixed_map(name, settings.d_h, rms=(self.WRITE_NORM / settings.d_h) ** 0.5)

    def initial_state(self) -> State:
        d_h = self.settings.d_h
        return {"M": self.draw("P_0", d_h, d_h, std=0.02 / d_h).to(self.write_K.device)}

    def write(self, state: State, H: Tensor) -> State:
        return {"M": write.hebbian(state["M"], H, self.write_K, self.write_V, self.settings.gamma)}

    def decay(self, state: State, H: Tensor) -> Tensor:
        return write.hebbian_decay(state["M"], H, self.write_K, self.write_V, self.settings.gamma)  # ()

    def hidden_of(self, state: State) -> Tensor:
        return state["M"] @ torch.linalg.pinv(self.write_V)  # (d_h, d): the nearest, where d_h < d


class SparseSlots(Method):
    """``{"P": (S, d)}``, each turn written to its top-k slots only."""

    def __init__(self, backbone: Backbone, settings: MemorySettings):
        super().__init__(backbone, settings)
        for name in ("write_a", "write_u"):
            self.fixed_map(name, self.d)

    def initial_state(self) -> State:
        return {"P": self.draw("P_0", self.settings.num_entries, self.d, std=0.02).to(self.write_a.device)}

    def write(self, state: State, H: Tensor) -> State:
        s = self.settings
        return {"P": write.sparse_slots(state["P"], H, self.write_a, self.write_u, s.gamma, s.top_k)}

    def decay(self, state: State, H: Tensor) -> Tensor:
        P = state["P"]
        written = write.sparse_slot_choice(P, H, self.write_a, self.settings.top_k)  # (top_k,)
        return P.new_ones(P.shape[0]).index_fill(0, written, self.settings.gamma)  # (M,)

    def hidden_of(self, state: State) -> Tensor:
        return state["P"] @ torch.linalg.pinv(self.write_u)  # (S, d)


# ---- readers of extra keys and values ----
class KeyValueReader(Method):
    """Shared by the readers that project entries to each block's keys and values: projections and gates per block."""

    def make_projections(self, width: int) -> None:
        """Each block's read_K and read_V, (L, width, h_kv · dk), and the gates."""
        self.trained("read_K", self.L, width, self.h_kv * self.dk)
        self.trained("read_V", self.L, width, self.h_kv * self.dk)
        self.make_gate()

    def make_gate(self) -> None:
        """One gate a head and block, (L, h), closed at the start [D]; None without ``read_gate``."""
        self.gate = nn.Parameter(torch.zeros(self.L, self.h)) if self.settings.read_gate else None

    def gate_of(self, block: int) -> Tensor | None:
        """The gates of a block's heads, (h,), before tanh."""
        return None if self.gate is None else self.gate[block]

    def key_values(self, entries: Tensor, **extra) -> list[KeyValues]:
        """Entries (Bm, M, width) -> keys and values of every block, (Bm, h_kv, M, dk) each."""
        Bm, M, _ = entries.shape
        entries = self.scaled(entries)

        def project(W: Tensor) -> Tensor:
            flat = torch.einsum("bmw,lwk->lbmk", entries, W)
            return flat.view(self.L, Bm, M, self.h_kv, self.dk).transpose(2, 3)  # (L, Bm, h_kv, M, dk)

        K, V = project(self.read_K), project(self.read_V)
        return [KeyValues(k, v, gate=self.gate_of(i), **extra) for i, (k, v) in enumerate(zip(K, V, strict=True))]


class Prefix(AttentionCoupledBank, KeyValueReader):
    """M.1: soft tokens ``S = P W_P`` in front of the input, through every frozen block [A, C].

    Under a causal mask what the soft tokens compute does not depend on the question: they pass through the blocks once
    a batch, and every question reads their keys and values. They all stand at position 0, so the input keeps its own;
    and where they are copies, as rule 1 makes them after some hundred turns at 10x, one passes for all.
    """

    title, alias = "Prefix", "M.1"
    COPIES: ClassVar[float] = 1e-6  # rows so near to each other, relative to the largest component, are one [D]

    def __init__(self, backbone: Backbone, settings: MemorySettings):
        super().__init__(backbone, settings)
        embedding = backbone.model.get_input_embeddings().weight
        self.trained("read_P", self.d, self.d, std=float(embedding.square().mean().sqrt()) * self.d**-0.5)
        self.make_gate()
        self.run_blocks = backbone.prefill

    def read(self, state: State, inputs: Inputs | None = None) -> Injection:
        return self.read_each([state], [inputs])

    def read_each(self, states: Sequence[State], inputs: Sequence[Inputs | None]) -> Injection:
        banks = torch.stack([state["P"] for state in states])  # (Bm, M, d)
        M, spread = banks.shape[1], (banks - banks[:, :1]).abs().amax(dim=(1, 2))  # spread: (Bm,)
        if bool((spread <= self.COPIES * banks.abs().amax(dim=(1, 2))).all()):
            banks = banks[:, :1]  # (Bm, 1, d)
        soft = self.scaled(banks) @ self.read_P  # (Bm, M or 1, d)
        return [KeyValues(k.expand(-1, -1, M, -1), v.expand(-1, -1, M, -1), gate=self.gate_of(i))
                for i, (k, v) in enumerate(self.run_blocks(soft))]


class KVExtension(AttentionCoupledBank, KeyValueReader):
    """M.3: ``K = [P W_K,mem ; K_input]``, ``V = [P W_V,mem ; V_input]`` in every block [A, C]."""

    title, alias = "KV extension", "M.3"
    entries_are_a_set = True

    def __init__(self, backbone: Backbone, settings: MemorySettings):
        super().__init__(backbone, settings)
        self.make_projections(self.d)

    def read(self, state: State, inputs: Inputs | None = None) -> Injection:
        return self.key_values(state["P"][None])


class Hebbian(HebbianMatrix, KeyValueReader):
    """M.4: ``R = (H_q W_QH) M``, one entry per question token, projected to keys and values in front [A, C].

    H_q are the frozen states of the question alone, never of the answer; entry j is seen from position j on, so the
    model stays causal [D]. ``W_QH ~ N(0, 0.02^2)`` [C].
    """

    title, alias = "Hebbian", "M.4"
    needs_inputs = True

    def __init__(self, backbone: Backbone, settings: MemorySettings):
        super().__init__(backbone, settings)
        self.trained("read_Q", self.d, settings.d_h)
        self.make_projections(settings.d_h)

    def queries(self, hidden: Tensor) -> Tensor:
        """Frozen states (..., T, d) -> what entry j takes of each row of M, (..., T, d_h): the entries are this @ M."""
        return hidden @ self.read_Q

    def read(self, state: State, inputs: Inputs | None = None) -> Injection:
        R = self.queries(inputs.hidden) @ state["M"]  # (B, T, d_h)
        return self.key_values(R, valid=inputs.valid, causal=True)


class Slot(SparseSlots, KeyValueReader):
    """M.6: the S slots as keys and values, as in M.3 [A, C]."""

    title, alias = "Slots", "M.6"
    entries_are_a_set = True

    def __init__(self, backbone: Backbone, settings: MemorySettings):
        super().__init__(backbone, settings)
        self.make_projections(self.d)

    read = KVExtension.read


# ---- readers beside the residual stream ----
class BranchReader(AttentionCoupledBank):
    """Shared by the branches: ``CrossAttn(h, P)`` with projections shared by all blocks, multi-head as the backbone, which
    queries with h at unit root mean square [D]."""

    entries_are_a_set = True

    def __init__(self, backbone: Backbone, settings: MemorySettings):
        super().__init__(backbone, settings)
        for name in ("read_Q", "read_K", "read_V", "read_O"):
            self.trained(name, self.d, self.d)

    def heads(self, x: Tensor) -> Tensor:
        """(..., T, d) -> (..., h, T, d/h)."""
        return x.unflatten(-1, (self.h, -1)).transpose(-2, -3)  # (..., h, T, d/h)

    def read(self, state: State, inputs: Inputs | None = None) -> Injection:
        P = self.scaled(state["P"])
        K, V = self.heads(P @ self.read_K), self.heads(P @ self.read_V)  # (h, M, d/h)

        def delta(h: Tensor, layer: int) -> Tensor:
            h = F.rms_norm(h, h.shape[-1:], eps=1e-6)  # (B, T, d)
            c = self.cross_attention(h, K, V, branch.seen)
            opened = self.opening(h, c, layer)
            if branch.opened is not None:
                branch.opened.append(opened.detach().float().mean())
            return opened * c  # (B, T, d)

        branch = Branch(delta)
        return branch

    def cross_attention(self, h: Tensor, K: Tensor, V: Tensor, seen: list[Tensor] | None) -> Tensor:
        """Residual stream h (B, T, d), at unit root mean square, reads the bank's K, V (h, M, d/h) -> (B, T, d).

        All tokens of the batch are queries of one attention, so that the bank is not copied for each row.
        """
        Q = self.heads(h.flatten(0, 1) @ self.read_Q)  # (h, B T, d/h)
        K, V = K.to(Q.dtype), V.to(Q.dtype)
        if seen is not None or torch.is_grad_enabled() and not h.is_cuda:  # on a CPU cheaper than sdpa with its backward pass
            A = (Q @ K.mT / Q.shape[-1] ** 0.5).softmax(dim=-1)  # (h, B T, M)
            read = A.to(V.dtype) @ V  # (h, B T, d/h)
        else:
            read = F.scaled_dot_product_attention(Q[None], K[None], V[None])[0]
        if seen is not None:
            seen.append(A.detach().float().unflatten(1, h.shape[:2]).transpose(0, 1))  # (B, h, T, M)
        return (read.transpose(0, 1).flatten(1) @ self.read_O).view(h.shape)

    @abstractmethod
    def opening(self, h: Tensor, c: Tensor, layer: int) -> Tensor:
        """By what block ``layer`` multiplies the branch's output c before it is added, () or (B, T, d) as h and c are; h is the
        residual stream at unit root mean square."""


class CrossAttention(BranchReader):
    """M.2: ``h += beta_l CrossAttn(h, P)``, one beta a block, 0 at the start [A, C]."""

    title, alias = "Cross-attention", "M.2"

    def __init__(self, backbone: Backbone, settings: MemorySettings):
        super().__init__(backbone, settings)
        self.beta = nn.Parameter(torch.zeros(self.L))

    def opening(self, h: Tensor, c: Tensor, layer: int) -> Tensor:
        return self.beta[layer].to(c.dtype)


class Gated(BranchReader):
    """M.5: ``h += sigmoid(W_g [h ; c] + b_g) * c``, ``b_g = -2`` [C]; the output projection starts at zero [D]."""

    title, alias = "Gated branch", "M.5"

    def __init__(self, backbone: Backbone, settings: MemorySettings):
        super().__init__(backbone, settings)
        nn.init.zeros_(self.read_O)
        self.gate_W = nn.Parameter(torch.zeros(2 * self.d, self.d))
        self.gate_b = nn.Parameter(torch.full((self.d,), -2.0))

    def opening(self, h: Tensor, c: Tensor, layer: int) -> Tensor:
        return torch.sigmoid(torch.cat([h.to(c.dtype), c], dim=-1) @ self.gate_W + self.gate_b)  # (B, T, d)


class Baseline(Method):
    """The stateless control: the same input, no state, nothing read, nothing trained [C]."""

    title, alias = "Stateless baseline", "baseline"

    def initial_state(self) -> State:
        return {}

    def write(self, state: State, H: Tensor) -> State:
        return {}

    def read(self, state: State, inputs: Inputs | None = None) -> Injection:
        return None


REGISTRY: dict[str, type[Method]] = {
    "prefix": Prefix,
    "cross_attention": CrossAttention,
    "kv_extension": KVExtension,
    "hebbian": Hebbian,
    "gated": Gated,
    "slot": Slot,
    "baseline": Baseline,
}
METHODS: tuple[str, ...] = tuple(name for name in REGISTRY if name != "baseline")


def aliases() -> dict[str, str]:
    """Alias ("M.1" ... "M.6") -> registered name, the first one's who has it: a subclass inherits its parent's."""
    found: dict[str, str] = {}
    for name, method in REGISTRY.items():
        if alias := getattr(method, "alias", None):
            found.setdefault(alias, name)
    return found


def method_name(name: str) -> str:
    """A registered name or an alias -> the registered name."""
    of_alias = aliases()
    known = of_alias.get(name, name)
    if known not in REGISTRY:
        alias_of = {known: alias for alias, known in of_alias.items()}
        names = (f"{known} ({alias_of[known]})" if known in alias_of else known for known in REGISTRY)
        raise ValueError(f"unknown method {name!r}: known are {', '.join(names)}")
    return known


def build(backbone: Backbone, settings: MemorySettings) -> Method:
    """The method of ``settings`` for this backbone, on its device."""
    with torch.device("cpu"):  # whatever the defaults are
        method = REGISTRY[settings.method](backbone, settings)
    return method.to(backbone.device, torch.float32)
