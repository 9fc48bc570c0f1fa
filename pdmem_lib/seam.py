"""The injection seam: the one place where memory enters a frozen decoder-only model.

Two primitives, both on transformers' public extension points, both gone when the ``with`` block ends:

* `KeyValues`: extra keys and values in front of a block's own (M.1 M.3 M.4 M.6), through an attention function
  registered with `AttentionInterface`. Where a block carries none, the stock ``sdpa`` runs: "off" is the frozen model.
* `Branch`: a residual branch beside a block's self-attention (M.2 M.5), through two forward hooks.

Memory takes no positions: entries are seen by every real token, and real tokens keep positions 0 ... T-1 [D].
Everything that knows an architecture is in `blocks`, `attention_of` and `final_norm`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn

IMPLEMENTATION = "pdmem"  # the name under which transformers finds the attention function below


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
    """Extra keys and values of one block. ``Bm`` divides B: the batch is Bm equal runs of rows, and all rows of a run
    read one bank, which is never copied. 1: one bank for the whole batch; B: every row has its own."""

    keys: Tensor  # (Bm, h_kv, M, dk)
    values: Tensor  # (Bm, h_kv, M, dk)
    gate: Tensor | None = None  # (h,): output = plain + tanh(gate) (joint - plain); None: plain concatenation
    valid: Tensor | None = None  # (Bm, M) bool: entries that exist; None: all
    causal: bool = False  # entry j belongs to input column j and is seen from column j on (M.4)
    seen: list[Tensor] | None = None  # where attention to memory is collected, (B, h, T, M) a call


@dataclass
class Branch:
    """``delta(h, layer) -> (B, T, d)`` is added to a block's residual stream h (B, T, d) after its self-attention."""

    delta: Callable[[Tensor, int], Tensor]
    seen: list[Tensor] | None = None  # where attention to memory is collected, (B, h, T, M) a call
    opened: list[Tensor] | None = None  # where the mean of what it is multiplied by is collected, () a call


Injection = Sequence[KeyValues] | Branch | None

_ACTIVE: ContextVar[dict[nn.Module, KeyValues]] = ContextVar("pdmem_active_key_values", default={})


@contextmanager
def inject(model: nn.Module, injection: Injection) -> Iterator[None]:
    """Inside the block, ``model`` reads ``injection``; other models, and this one outside the block, are untouched."""
    handles, per_block = [], {}
    if isinstance(injection, Branch):
        handles = list(_attach_branch(model, injection))
    elif injection is not None:
        per_block = dict(zip(map(attention_of, blocks(model)), injection, strict=True))
    token = _ACTIVE.set(per_block)
    try:
        yield
    finally:
        _ACTIVE.reset(token)
        for handle in handles:
            handle.remove()


def join(injections: Sequence[Injection]) -> Injection:
    """Several injections as one: the batch is as many equal runs of rows, and run i reads injection i."""
    first = injections[0]
    if len(injections) == 1 or first is None:  # None: all are, since one model reads all of them
        return first
    if isinstance(first, Branch):
        return Branch(lambda h, layer: torch.cat(
            [one.delta(rows, layer) for one, rows in zip(injections, h.chunk(len(injections)), strict=True)]))

    def cat(parts: Sequence[Tensor | None]) -> Tensor | None:
        return None if parts[0] is None else torch.cat(list(parts))

    return [KeyValues(cat([kv.keys for kv in block]), cat([kv.values for kv in block]), block[0].gate,
                      cat([kv.valid for kv in block]), block[0].causal)
            for block in zip(*injections, strict=True)]


def _attach_branch(model: nn.Module, branch: Branch) -> Iterator:
    residual: dict[int, Tensor] = {}

    def keep_residual(layer):
        def hook(_module, args, kwargs):
            residual[layer] = args[0] if args else kwargs["hidden_states"]
        return hook

    def add_branch(layer):
        def hook(_module, _args, output):
            return (output[0] + branch.delta(residual.pop(layer) + output[0], layer), *output[1:])
        return hook

    for layer, block in enumerate(blocks(model)):
        yield block.register_forward_pre_hook(keep_residual(layer), with_kwargs=True)
        yield attention_of(block).register_forward_hook(add_branch(layer))


def memory_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Attention over ``[memory; input]`` for a block that carries `KeyValues`; stock sdpa for one that does not.

    query (B, h, T, dk), key and value (B, h_kv, S, dk) -> (B, T, h, dk). S > T while generating from a cache.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward  # here: importing pdmem stays fast

    plain, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
    )  # (B, T, h, dk)
    memory = _ACTIVE.get().get(module)
    if memory is None:
        return plain, None
    B, h, T, dk = query.shape
    h_kv, S, M = key.shape[1], key.shape[2], memory.keys.shape[2]
    grouped = (query * (dk**-0.5 if scaling is None else scaling)).view(B, h_kv, h // h_kv, T, dk)

    runs = (memory.keys.shape[0], -1)  # of rows that read one bank
    to_memory = torch.einsum("gbhrtd,ghmd->gbhrtm", grouped.unflatten(0, runs), memory.keys.to(query.dtype))
    to_memory = to_memory.flatten(0, 1)  # (B, h_kv, r, T, M)
    to_input = torch.einsum("bhrtd,bhsd->bhrts", grouped, key)  # (B, h_kv, r, T, S)
    visible = _visible_entries(memory, B, T, S, M, query.device)
    if visible is not None:
        to_memory = to_memory.masked_fill(~visible, torch.finfo(to_memory.dtype).min)
    if attention_mask is None:  # transformers leaves the mask out where it is plainly causal
        attention_mask = torch.ones(T, S, dtype=torch.bool, device=query.device).tril(S - T)[None, None]
    to_input = to_input.masked_fill(~attention_mask[:, :, None], torch.finfo(to_input.dtype).min)

    weights = torch.cat([to_memory, to_input], dim=-1).softmax(dim=-1, dtype=torch.float32)[..., :M]
    mass = weights.sum(dim=-1).flatten(1, 2).transpose(1, 2)[..., None]  # (B, T, h, 1): softmax mass on memory
    read = torch.einsum("gbhrtm,ghmd->gbhrtd", weights.to(value.dtype).unflatten(0, runs), memory.values.to(value.dtype))
    read = read.flatten(0, 1).flatten(1, 2).transpose(1, 2)  # (B, T, h, dk)
    # joint = read + (1 - mass) plain; with a gate: plain + tanh(gate) (joint - plain), which is plain itself at gate 0
    change = read - mass.to(value.dtype) * plain
    if memory.gate is not None:
        gate = torch.tanh(memory.gate)  # (h,)
        change = gate[:, None].to(value.dtype) * change
        weights = gate.abs().view(h_kv, -1, 1, 1) * weights
    if memory.seen is not None:
        memory.seen.append(weights.detach().flatten(1, 2))  # (B, h, T, M)
    return plain + change, None


def _visible_entries(memory: KeyValues, B: int, T: int, S: int, M: int, device) -> Tensor | None:
    """Which entries each input column may read, broadcastable to (B, h_kv, r, T, M); None where all are."""
    visible = None
    if memory.valid is not None:
        visible = memory.valid.repeat_interleave(B // memory.valid.shape[0], dim=0)[:, None, None, None, :]
    if memory.causal:
        column = torch.arange(S - T, S, device=device)[:, None]  # (T, 1)
        reached = torch.arange(M, device=device)[None, :] <= column  # (T, M)
        visible = reached if visible is None else visible & reached
    return visible


def install(model: nn.Module) -> None:
    """Let ``model`` find `memory_attention`; without an injection it computes what stock sdpa computes, bit for bit."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(IMPLEMENTATION, memory_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    model.set_attn_implementation(IMPLEMENTATION)
