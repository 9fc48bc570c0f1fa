"""The injection seam: the one place where memory enters a frozen decoder-only model.

Two primitives, both on transformers' public extension points, both gone when the ``with`` block ends:

* `KeyValues`: extra keys and values in front of a block's own (M.1 M.3 M.4 M.6), through an attention function
  registered with `AttentionInterface`. Where a block carries none, the stock ``sdpa`` runs: "off" is the frozen model.
* `Branch`: a residual branch beside a block's self-attention (M.2 M.5), through two forward hooks, which do nothing where
  there is none.

Memory takes no positions: entries are seen by every real token, and real tokens keep positions 0 ... T-1 [D].
Everything that knows an architecture is in `blocks`, `attention_of` and `final_norm`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

IMPLEMENTATION = "pdmem"  # the name under which transformers finds the attention function below
JOINED = {"cuda": 1024}  # where a bank of at most so many entries, copies counted once, and the input are read as one


# ---- what knows an architecture: add a family here (and its model_type in backbone.FAMILIES) ----
def blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks of a GPT-2 (``transformer.h``) or Llama (``model.layers``) type model."""
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def attention_of(block: nn.Module) -> nn.Module:
    """A block's self-attention module."""
    return block.attn if hasattr(block, "attn") else block.self_attn


def final_norm(model: nn.Module) -> nn.Module:
    """The norm after the last block."""
    return model.transformer.ln_f if hasattr(model, "transformer") else model.model.norm


# ---- the two primitives ----
@dataclass
class KeyValues:
    """Extra keys and values of one block. The batch is Bm runs of rows, and all rows of a run read one bank, which is not
    copied (on a GPU a short one is, `JOINED`). Bm 1: one bank for the whole batch; B: every row has its own."""

    keys: Tensor  # (Bm, h_kv, M, dk)
    values: Tensor  # (Bm, h_kv, M, dk)
    gate: Tensor | None = None  # (h,): output = plain + tanh(gate) (joint - plain); None: plain concatenation
    valid: Tensor | None = None  # (Bm, M) bool: entries that exist; None: all
    causal: bool = False  # entry j belongs to input column j and is seen from column j on (M.4)
    seen: list[Tensor] | None = None  # where attention to memory is collected, (B, h, T, M) a call
    rows: tuple[int, ...] | None = None  # how many rows each run has, (Bm,); None: all equally many
    _with_input: dict = field(default_factory=dict, init=False, repr=False)

    def distinct(self) -> tuple[Tensor, Tensor, int]:
        """Keys, values, (Bm, h_kv, M, dk), and how often each stands there: (Bm, h_kv, 1, dk) and M where they are one entry
        that `Tensor.expand` repeats."""
        M = self.keys.shape[2]
        one = M > 1 and self.keys.stride(2) == self.values.stride(2) == 0 and self.valid is None and not self.causal
        return (self.keys[:, :, :1], self.values[:, :, :1], M) if one else (self.keys, self.values, 1)

    def with_input(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values (Bm, h_kv, M + 1, dk + n): the last entry stands for all of the input (`_fused_change`).

        Made once for all tokens that a GPU generates.
        """
        made = dtype, torch.is_grad_enabled()
        if made not in self._with_input:
            dk = self.keys.shape[-1]
            n = 16 - dk % 16 if dk % 16 < 15 else 17  # at least two, and a width that the kernels like
            keys, values = (pad(x.to(dtype), (0, n, 0, 1)) for x in (self.keys, self.values))
            of_input = torch.zeros(2, *keys.shape[-2:], dtype=dtype, device=keys.device)
            of_input[0, -1, dk : dk + 2] = 1  # the score is what stands in the query's two further places
            of_input[1, -1, dk] = 1  # the value is its own weight
            self._with_input[made] = keys + of_input[0], values + of_input[1]
        return self._with_input[made]


@dataclass
class Branch:
    """``delta(h, layer) -> (B, T, d)`` is added to a block's residual stream h (B, T, d) after its self-attention."""

    delta: Callable[[Tensor, int], Tensor]
    seen: list[Tensor] | None = None  # where attention to memory is collected, (B, h, T, M) a call
    opened: list[Tensor] | None = None  # where the mean of what it is multiplied by is collected, () a call
    parts: "Sequence[Branch]" = ()  # where it was joined of several: which, and how many rows each has
    rows: tuple[int, ...] | None = None


Injection = Sequence[KeyValues] | Branch | None


@dataclass
class _Beside:
    """The branch of one block, while a pass runs."""

    branch: Branch
    layer: int
    residual: Tensor | None = None  # (B, T, d), from the block's start to its attention's end


_ACTIVE: ContextVar[dict[nn.Module, KeyValues]] = ContextVar("pdmem_active_key_values", default={})
_BESIDE: ContextVar[dict[nn.Module, _Beside]] = ContextVar("pdmem_active_branches", default={})
_TRAINS: ContextVar[bool] = ContextVar("pdmem_trains", default=False)


@contextmanager
def inject(model: nn.Module, injection: Injection, trains: bool | None = None) -> Iterator[None]:
    """Inside the block, ``model`` reads ``injection``; other models, other threads, and this one outside the block, are
    untouched.

    ``trains``: whether gradients of an adapter may pass through the blocks; None: where something is read.
    """
    per_block, beside = {}, {}
    if isinstance(injection, Branch):
        for layer, block in enumerate(blocks(model)):
            beside[block] = beside[attention_of(block)] = _Beside(injection, layer)
    elif injection is not None:
        found = getattr(getattr(model, "config", None), "_attn_implementation", IMPLEMENTATION)
        if found != IMPLEMENTATION:  # transformers would call another function, and nothing would be read
            raise RuntimeError(f"the backbone's attention was set to {found!r}, which reads no memory: set it back with "
                               f"model.set_attn_implementation({IMPLEMENTATION!r})")
        per_block = dict(zip(map(attention_of, blocks(model)), injection, strict=True))
    active, branches = _set_for(_ACTIVE, model, per_block), _set_for(_BESIDE, model, beside)
    trained = _TRAINS.set(injection is not None if trains is None else trains)
    try:
        yield
    finally:
        _ACTIVE.reset(active)
        _BESIDE.reset(branches)
        _TRAINS.reset(trained)


def _set_for(variable: ContextVar[dict], model: nn.Module, here: dict) -> Token:
    """Set what the blocks of ``model`` carry to ``here``, and leave what other models carry."""
    if others := variable.get():
        mine = {*blocks(model), *map(attention_of, blocks(model))}
        here = {module: carried for module, carried in others.items() if module not in mine} | here
    return variable.set(here)


def join(injections: Sequence[Injection], rows: tuple[int, ...] | None = None) -> Injection:
    """Several injections as one: the batch is as many runs of rows, of ``rows`` each (None: equal), run i reading i."""
    first = injections[0]
    if len(injections) == 1 or first is None:  # None: all are, since one model reads all of them
        return first
    if isinstance(first, Branch):
        def delta(h: Tensor, layer: int) -> Tensor:
            runs = h.split(rows) if rows else h.chunk(len(injections))
            return torch.cat([one.delta(run, layer) for one, run in zip(injections, runs, strict=True)])

        return Branch(delta, parts=injections, rows=rows)

    def cat(parts: Sequence[Tensor | None]) -> Tensor | None:
        return None if parts[0] is None else torch.cat(list(parts))

    valid = _once_each(lambda *parts: cat(parts))  # the blocks share it, and go on sharing it
    return [KeyValues(cat([kv.keys for kv in block]), cat([kv.values for kv in block]), block[0].gate,
                      valid(*(kv.valid for kv in block)), block[0].causal, rows=rows)
            for block in zip(*injections, strict=True)]


def _once_each(make: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    """``make``, called once for the same objects."""
    made: dict[tuple[int, ...], Tensor | None] = {}

    def once(*of: Tensor | None) -> Tensor | None:
        key = tuple(map(id, of))
        if key not in made:
            made[key] = make(*of)
        return made[key]
    return once


def stands_at_columns(injection: Injection) -> bool:
    """Whether what is read belongs to columns of the input, which may then not be moved."""
    return isinstance(injection, Sequence) and any(kv.causal for kv in injection)


def keep(injection: Injection, kept: Tensor) -> Injection:
    """``injection`` for those rows of its batch that ``kept`` (B,) bool marks."""
    def left(runs: int, rows: tuple[int, ...] | None) -> list[int]:  # of each run
        return [int(run.sum()) for run in (kept.split(rows) if rows else kept.chunk(runs))]

    if injection is None or isinstance(injection, Branch) and not injection.parts:
        return injection
    if isinstance(injection, Branch):
        numbers = left(len(injection.parts), injection.rows)
        parts = [part for part, number in zip(injection.parts, numbers, strict=True) if number]
        return join(parts, tuple(filter(None, numbers)))
    Bm = injection[0].keys.shape[0]
    if Bm == 1:
        return injection
    numbers = left(Bm, injection[0].rows)
    left_over = tuple(filter(None, numbers))
    rows = left_over if len(set(left_over)) > 1 else None  # None: all equally many, as one run always has
    if len(left_over) == Bm:
        return [replace(kv, rows=rows) for kv in injection]
    runs = torch.tensor([i for i, number in enumerate(numbers) if number], device=kept.device)  # that still have rows
    valid = _once_each(lambda one: None if one is None else one[runs])
    return [replace(kv, keys=kv.keys[runs], values=kv.values[runs], rows=rows, valid=valid(kv.valid)) for kv in injection]


def _keep_residual(block: nn.Module, args: tuple, kwargs: dict) -> None:
    if (here := _BESIDE.get().get(block)) is not None:
        here.residual = args[0] if args else kwargs["hidden_states"]


def _add_branch(attention: nn.Module, _args: tuple, output: tuple) -> tuple | None:
    here = _BESIDE.get().get(attention)
    if here is None:
        return None
    residual, here.residual = here.residual, None
    return (output[0] + here.branch.delta(residual + output[0], here.layer), *output[1:])


def memory_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Attention over ``[memory; input]`` for a block that carries `KeyValues`; stock sdpa for one that does not.

    query (B, h, T, dk), key and value (B, h_kv, S, dk) -> (B, T, h, dk). S > T while generating from a cache.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward  # here: importing pdmem stays fast

    memory, by_matmul = _ACTIVE.get().get(module), _TRAINS.get() and _cheap_backward(query)
    stock = dict(scaling=scaling, dropout=dropout, **kwargs)
    if memory is None and not by_matmul:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **stock)[0], None
    B, h, T, dk = query.shape
    h_kv, S = key.shape[1], key.shape[2]
    scaling = dk**-0.5 if scaling is None else scaling
    if memory is not None and _joins(query, memory, attention_mask, dropout):
        query, key, value = _as_multiplied(query, key, value)
        joint = _attend_jointly(query, key, value, attention_mask, scaling, memory)  # (B, T, h, dk)
        if memory.gate is None:
            return joint, None
        plain, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **stock)
        return plain + torch.tanh(memory.gate)[:, None].to(plain.dtype) * (joint - plain), None
    grouped = (query * scaling).view(B, h_kv, h // h_kv, T, dk)
    if _tells_its_mass(query, key, attention_mask, dropout):
        plain, lse_input = _attend_with_mass(query, key, value, attention_mask, scaling)
    else:
        # (B or 1, 1, T, S) bool; transformers leaves the mask out where it is plainly causal
        hidden = _ahead(T, S, query.device) if attention_mask is None else ~attention_mask
        to_input = _shared(grouped, key.mT)  # (B, h_kv, r, T, S)
        to_input = to_input.masked_fill(hidden[:, :, None], torch.finfo(to_input.dtype).min)
        if by_matmul:
            plain = _by_head(_shared(to_input.softmax(dim=-1), value))
        else:
            plain, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **stock)  # (B, T, h, dk)
        if memory is None:
            return plain, None
        lse_input = _logsumexp(to_input.float())  # (B, h_kv, r, T, 1): the softmax mass on all of the input
    gate = None if memory.gate is None else torch.tanh(memory.gate)  # (h,)
    keys, values, copies = memory.distinct()
    M = keys.shape[2]
    if _fused_reads(memory, M):
        change = (_fused_change(grouped, lse_input, plain, memory) if torch.is_grad_enabled() or query.device.type != "cpu"
                  else _change_by_mass(grouped, lse_input, plain, keys, values, copies))
        return plain + (change if gate is None else gate[:, None].to(value.dtype) * change), None
    to_memory = _by_run("bhrtd,hmd->bhrtm", grouped, keys, memory.rows)  # (B, h_kv, r, T, M)
    if copies > 1:
        to_memory = to_memory + math.log(copies)
    visible = _visible_entries(memory.valid, memory.causal, B, T, S, M, query.device, memory.rows)
    if visible is not None:
        to_memory = to_memory.masked_fill(~visible, torch.finfo(to_memory.dtype).min)

    # the input is one more column, whose weight is the softmax mass on all of it and whose value is the plain output
    weights = torch.cat([to_memory, lse_input], dim=-1).softmax(dim=-1)  # (B, h_kv, r, T, M + 1), float32
    values = pad(values, (0, 0, 0, 1))  # the last column is added below
    joint = _by_run("bhrtm,hmd->bhrtd", weights.to(value.dtype), values, memory.rows)
    joint = _by_head(joint) + _by_head(weights[..., -1:]).to(value.dtype) * plain
    change = joint - plain
    if gate is not None:  # plain + tanh(gate) (joint - plain), which is plain itself at gate 0
        change = gate[:, None].to(value.dtype) * change
    if memory.seen is not None:
        let_in = 1 if gate is None else gate.abs().view(h_kv, -1, 1, 1)
        each = (let_in / copies * weights[..., :-1]).repeat_interleave(copies, dim=-1)
        memory.seen.append(each.detach().flatten(1, 2))  # (B, h, T, M)
    return plain + change, None


@lru_cache(maxsize=2)  # a pass asks for one, block after block; a long one is large
def _ahead(T: int, S: int, device: torch.device) -> Tensor:
    """(1, 1, T, S) bool: which of S columns lie ahead of each of the last T; one for all blocks of a pass."""
    with torch.inference_mode(False):  # a pass with gradients may use it later
        return torch.ones(T, S, dtype=torch.bool, device=device).triu(S - T + 1)[None, None]


def _joins(query: Tensor, memory: KeyValues, attention_mask: Tensor | None, dropout: float) -> bool:
    """Whether bank and input are read as one: a GPU waits for its next kernel, so that fewer kernels are worth a copy of a bank for
    each row, while it is short."""
    return (0 < memory.distinct()[0].shape[2] <= JOINED.get(query.device.type, 0) and memory.seen is None and memory.rows is None
            and not dropout and (attention_mask is None or attention_mask.dtype == torch.bool))


def _attend_jointly(query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float,
                    memory: KeyValues) -> Tensor:
    """One fused attention over ``[memory; input]``, (B, T, h, dk)."""
    B, h, T, dk = query.shape
    h_kv, S = key.shape[1], key.shape[2]
    keys, values, copies = memory.distinct()
    bias = _bias_of_both(attention_mask, memory.valid, memory.causal, (B, h // h_kv, T, keys.shape[2], S), copies, query.dtype,
                         query.device, tuple(0 if x is None or x.is_inference() else x._version for x in (attention_mask, memory.valid)))
    keys, values = (torch.cat([bank.to(own.dtype)[:, None].expand(-1, B // len(bank), -1, -1, -1).flatten(0, 1), own], dim=2)
                    for bank, own in ((keys, key), (values, value)))  # (B, h_kv, M + S, dk)
    rows = query.reshape(B, h_kv, -1, dk)  # heads that share a key are queries of one: (B, h_kv, r T, dk)
    return scaled_dot_product_attention(rows, keys, values, bias, scale=scaling).reshape(B, h, T, -1).transpose(1, 2)


@lru_cache(maxsize=2)  # a pass asks for one, block after block
def _bias_of_both(attention_mask: Tensor | None, valid: Tensor | None, causal: bool, shape: tuple[int, int, int, int, int],
                  copies: int, dtype: torch.dtype, device: torch.device, versions: tuple[int, int]) -> Tensor:
    """What is added to the scores of ``[memory; input]``, (B or 1, 1, r T, M + S): far below any score where nothing is to be
    seen, and yet finite, for a row that sees nothing at all. ``versions`` of mask and valid: those changed in place are others."""
    B, r, T, M, S = shape
    with torch.inference_mode(False):  # a pass with gradients may use it later
        hidden = _ahead(T, S, device) if attention_mask is None else ~attention_mask  # (B or 1, 1, T, S)
        visible = _visible_entries(valid, causal, B, T, S, M, device)
        rows = B if visible is not None and visible.ndim == 5 else len(hidden)
        bias = torch.zeros(rows, 1, T, (M + S + 7) // 8 * 8, dtype=dtype, device=device)  # rows as wide as the kernels like them
        bias[..., :M] = math.log(copies)
        if visible is not None:
            bias[..., :M].masked_fill_(~visible.reshape(-1, 1, visible.shape[-2], M), torch.finfo(dtype).min / 2)
        bias[..., M : M + S].masked_fill_(hidden, torch.finfo(dtype).min / 2)
        return bias.repeat(1, 1, r, 1)[..., : M + S]


def _fused_reads(memory: KeyValues, M: int) -> bool:
    """Whether torch's fused attention can read the bank's ``M`` entries (no weights to look at, no mask, runs of equally many
    rows), and is the faster way: its backward pass pays from some hundred entries on."""
    return (memory.seen is None and memory.valid is None and not memory.causal and memory.rows is None
            and (M >= 256 or M > 0 and not torch.is_grad_enabled()))


def _fused_change(grouped: Tensor, lse_input: Tensor, plain: Tensor, memory: KeyValues) -> Tensor:
    """What the memory changes of ``plain`` (B, T, h, dk), without keeping a weight an entry: joint - plain.

    One fused attention over the bank and one more entry that stands for all of the input: its score, ``lse_input``, is
    carried in two further places of the query (in halves, so that bf16 keeps it), and its weight comes back as a value.
    """
    B, h_kv, r, T, dk = grouped.shape
    keys, values = memory.with_input(grouped.dtype)
    Bm, _, _, width = keys.shape
    high = lse_input.to(grouped.dtype)
    query = pad(torch.cat([grouped, high, (lse_input - high).to(grouped.dtype)], dim=-1), (0, width - dk - 2))
    rows = query.reshape(Bm, B // Bm, h_kv, r * T, width).transpose(1, 2).flatten(2, 3)  # (Bm, h_kv, rows, width)
    parts = 2 if rows.requires_grad and rows.device.type == "cpu" and rows.shape[2] % 2 == 0 else 1
    rows = rows.unflatten(2, (parts, -1)).transpose(1, 2).flatten(0, 1)  # a core takes a head: more heads than cores
    keys, values = (x[:, None].expand(-1, parts, -1, -1, -1).flatten(0, 1) for x in (keys, values))
    read = scaled_dot_product_attention(rows, keys, values, scale=1.0)  # (Bm parts, h_kv, rows / parts, width)
    read = read.unflatten(0, (Bm, parts)).transpose(1, 2).flatten(2, 3)
    read = _by_head(read.unflatten(2, (B // Bm, r, T)).transpose(1, 2).flatten(0, 1))  # (B, T, h, width)
    return read[..., :dk] + (read[..., dk : dk + 1] - 1) * plain


def _tells_its_mass(query: Tensor, key: Tensor, attention_mask: Tensor | None, dropout: float) -> bool:
    """Whether `_attend_with_mass` serves: on a CPU, without a gradient, under a mask or plainly causal over its own columns, and
    where stock sdpa takes this kernel too (`torch.nn.attention.sdpa_kernel` may forbid it)."""
    T, S = query.shape[2], key.shape[2]
    return (query.device.type == "cpu" and not torch.is_grad_enabled() and not dropout and torch.backends.cuda.flash_sdp_enabled()
            and (T in (1, S) if attention_mask is None else attention_mask.dtype == torch.bool))


def _attend_with_mass(query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                      scaling: float) -> tuple[Tensor, Tensor]:
    """What stock sdpa computes, bit for bit, (B, T, h, dk), and the log-sum-exp of its scores, (B, h_kv, r, T, 1)."""
    B, h, T, _ = query.shape
    h_kv = key.shape[1]
    bias = None
    if attention_mask is not None:
        bias = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill_(~attention_mask, -torch.inf)
        if T == 1:
            query = query.reshape(B, h_kv, h // h_kv, -1)  # as stock sdpa has it: heads that share a key are queries of one
    plain, lse = _flash(query, key, value, T > 1 and bias is None, bias, scaling)
    return plain.reshape(B, h, T, -1).transpose(1, 2), lse.reshape(B, h_kv, h // h_kv, T, 1)


def _change_by_mass(grouped: Tensor, lse_input: Tensor, plain: Tensor, keys: Tensor, values: Tensor, copies: int) -> Tensor:
    """`_fused_change` where no gradient is wanted: input and memory, ``copies`` of keys and values (Bm, h_kv, M, dk), are read
    apart and weighed by their softmax mass."""
    B, h_kv, r, T, dk = grouped.shape
    Bm = len(keys)
    rows = grouped.reshape(Bm, B // Bm, h_kv, r * T, dk).transpose(1, 2).flatten(2, 3)  # (Bm, h_kv, rows, dk)
    read, lse = _flash(rows, keys.to(rows.dtype), values.to(rows.dtype))
    read, lse = (x.unflatten(2, (B // Bm, r, T)).transpose(1, 2).flatten(0, 1) for x in (read, lse[..., None]))
    ahead = lse - lse_input if copies == 1 else lse - lse_input + math.log(copies)
    return _by_head(ahead.sigmoid()).to(plain.dtype) * (_by_head(read) - plain)


def _flash(query: Tensor, key: Tensor, value: Tensor, causal: bool = False, bias: Tensor | None = None,
           scaling: float = 1.0) -> tuple[Tensor, Tensor]:
    """torch's attention kernel of the CPU, called for the log-sum-exp that `scaled_dot_product_attention` drops.

    It takes what it is given: that all are of one type, and each row lies in one piece, is seen to here.
    """
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in _as_multiplied(query, key, value))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=bias if bias is None else bias.to(query.dtype), scale=scaling)


def _as_multiplied(query: Tensor, *others: Tensor) -> list[Tensor]:
    """All in the type that attention multiplies in: autocast's, else the query's."""
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    return [x.to(dtype) for x in (query, *others)]


def _cheap_backward(query: Tensor) -> bool:
    """Whether attention by matmuls has the faster backward pass: on a CPU and over short inputs it takes a third of the
    time of sdpa's. The forward pass rounds in another order, so only a pass with a gradient uses it."""
    return query.requires_grad and query.device.type == "cpu" and query.shape[2] <= 200


def _shared(x: Tensor, y: Tensor) -> Tensor:
    """x (B, h_kv, r, T, n) @ y (B, h_kv, n, m) -> (B, h_kv, r, T, m); y is not copied for the r heads that share it."""
    return (x.flatten(2, 3) @ y).unflatten(2, x.shape[2:4])


def _logsumexp(x: Tensor) -> Tensor:
    """torch's, over the last dimension, which is kept, in a third of its time where much is masked: what is e^80 below
    the largest adds nothing to a float32 sum, and exp is slow where its result is not a normal number."""
    largest = x.detach().amax(dim=-1, keepdim=True)
    return (x - largest).clamp_min(-80).exp().sum(dim=-1, keepdim=True).log() + largest


def _by_head(x: Tensor) -> Tensor:
    """(B, h_kv, r, T, dk) -> (B, T, h, dk)."""
    return x.flatten(1, 2).transpose(1, 2)


def _by_run(equation: str, rows: Tensor, banks: Tensor, sizes: tuple[int, ...] | None) -> Tensor:
    """The einsum of each run of ``rows`` (B, ...) with its bank of ``banks`` (Bm, ...), which is not copied."""
    banks = banks.to(rows.dtype)
    if sizes is not None:
        return torch.cat([torch.einsum(equation, run, bank) for run, bank in zip(rows.split(sizes), banks, strict=True)])
    x, y, z = equation.replace("->", ",").split(",")
    return torch.einsum(f"g{x},g{y}->g{z}", rows.unflatten(0, (len(banks), -1)), banks).flatten(0, 1)


def _visible_entries(valid: Tensor | None, causal: bool, B: int, T: int, S: int, M: int, device,
                     runs: tuple[int, ...] | None = None) -> Tensor | None:
    """Which entries each input column may read, broadcastable to (B, h_kv, r, T, M); None where all are."""
    visible = None
    if valid is not None:
        if len(valid) < B:
            valid = valid.repeat_interleave(torch.tensor(runs or [B // len(valid)] * len(valid), device=device), dim=0)
        visible = valid[:, None, None, None, :]
    if causal:
        column = torch.arange(S - T, S, device=device)[:, None]  # (T, 1)
        reached = torch.arange(M, device=device)[None, :] <= column  # (T, M)
        visible = reached if visible is None else visible & reached
    return visible


def install(model: nn.Module) -> None:
    """Let ``model`` find `memory_attention` and branches; without an injection it computes what stock sdpa computes, bit
    for bit."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(IMPLEMENTATION, memory_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    model.set_attn_implementation(IMPLEMENTATION)
    for block in blocks(model):
        if _keep_residual not in block._forward_pre_hooks.values():  # else it was installed before
            block.register_forward_pre_hook(_keep_residual, with_kwargs=True)
            attention_of(block).register_forward_hook(_add_branch)
