"""What every memory must do, whatever its method: small checks of one `MemoryModel`, and `check`, a table of them all.

    pdmem.conformance.check(pdmem.MemoryModel(backbone, "mine"))

A check takes a model and returns what it measured, or raises `Nonconformity`, an AssertionError that says in a sentence
what does not hold. It works on models that it builds anew from the given one's settings, so the given one stays as it
is, and what is checked is the method from its start on, not one training. Where memory must act to show anything, the
new model is first made *loud*: turns are written, and then state and trained numbers are pushed far away [D].
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import seam
from .backbone import Backbone
from .memory import MemoryModel
from .methods import REGISTRY, Method, State

if TYPE_CHECKING:
    import pandas

TEXT = "Ada adopted a grey cat, and then she moved to Bergen."
TURNS = ["Ada: I adopted a cat.", "Bob: Oh!", "Ada: We named her Pixel, after a long family meeting.",
         "Bob: A fine name."]
QUESTIONS = ["What did Ada adopt?", "Who?", "What is the name of the cat that Ada adopted after the meeting?"]
ANSWERS = ["a cat", "Ada", "Pixel"]
SILENT = 1e-4  # of a logit, in float32
TOLERANCE = 1e-4  # absolute and relative, where the same number is computed in another order


class Nonconformity(AssertionError):
    """What does not hold, in a sentence; ``measured`` is the number that says so."""

    def __init__(self, sentence: str, measured: float = math.nan):
        super().__init__(sentence)
        self.measured = float(measured)


# ---- the checks ------------------------------------------------------------------------------------------------------

def silent_start(model: MemoryModel) -> float:
    """Before training, memory moves no logit (by more than 1e-4): returns the largest move."""
    new, most = _written(model), 0.0
    for memory in ("own", "zero"):
        moved = _apart(new.logits(TEXT, memory=memory), new.logits(TEXT, memory="off"))
        _require(math.isfinite(moved), f"under the {memory} state logits are not finite: read() must take any state, one of "
                 "zeros too, since the published score asks under it", moved)
        _require(moved <= SILENT, f"an untrained memory moves a logit by {moved:.2g}: let a gate or an output projection "
                 "start at zero", moved)
        most = max(most, moved)
    return most


def off_is_frozen(model: MemoryModel) -> float:
    """With memory "off", logits are the frozen model's, bit for bit: returns the largest difference, 0."""
    loud = _loud(model)
    loud.logits(TEXT)  # whatever reading leaves behind, it leaves now
    backbone = model.backbone
    ids = torch.tensor([backbone.token_ids(TEXT)], device=backbone.device)
    with torch.no_grad():
        wanted = _without_our_code(backbone)(ids, use_cache=False).logits[0]
    differs = _apart(loud.logits(TEXT, memory="off"), wanted)
    _require(differs == 0, f"with memory off the logits are {differs:.2g} away from the frozen model's: whatever a "
             "read attaches to the model must be gone after it", differs)
    return differs


def only_theta_learns(model: MemoryModel) -> float:
    """Gradients reach all of θ_mem in two steps, and nothing else: returns the smallest group's gradient norm."""
    backbone = model.backbone
    weights = {name: weight.clone() for name, weight in backbone.model.state_dict().items()}
    new = _written(model)
    maps = {name: b.clone() for name, b in new.adapter.named_buffers()}
    _require(not any(t.requires_grad for t in new.state.values()), "the state carries a gradient: write under no_grad")
    smallest = math.nan
    if new.parameters():
        optimizer = torch.optim.Adam(new.parameters(), lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            new.loss(QUESTIONS, ANSWERS).backward()
            norms = _gradient_norms(new.adapter, backbone.num_layers)
            optimizer.step()
        stuck = [name for name, norm in norms.items() if not norm > 0]
        smallest = min(norms.values())
        _require(not stuck, f"{', '.join(stuck)} got no gradient in two steps: two factors of one product may both "
                 "start at zero, or read() does not use it", smallest)
    _require(not any(w.requires_grad or w.grad is not None for w in backbone.model.parameters()),
             "a weight of the frozen model asks for a gradient: leave the backbone's parameters alone")
    changed = [name for name, weight in backbone.model.state_dict().items() if not torch.equal(weight, weights[name])]
    _require(not changed, f"the frozen model's {', '.join(changed[:3])} changed: train parameters of the method alone")
    changed = [name for name, b in new.adapter.named_buffers() if not torch.equal(b, maps[name])]
    _require(not changed, f"the fixed map {', '.join(changed)} changed: maps of the write side are never trained")
    return smallest


def chunks_make_no_difference(model: MemoryModel) -> float:
    """Writing a conversation at once, in parts, or after a reset leaves the same state: returns the difference, 0."""
    hidden = model.backbone.encode(TURNS, progress=False)
    whole, begun, carried = (_fresh(model) for _ in range(3))
    start = _copy(whole.state)
    state = whole.write_hidden(hidden)
    begun.write_hidden(hidden[:3])
    carried.state = begun.state
    carried.write_hidden(hidden[3:])
    _same(carried.state, state, "a conversation written in two parts, by two models that share the state, differs from "
          "one written at once by {:.2g}: keep everything that a write needs in the state, nothing on the module")
    before = _copy(state)
    whole.adapter.write(state, hidden[0])
    _same(state, before, "write() changed the state that it was given, by {:.2g}: return a new one")
    _same(whole.reset(), start, "after a reset the state is {:.2g} away from P_0: draw it from the seed, every time")
    whole.write_hidden(hidden)
    return _same(whole.state, before, "the same turns after a reset leave a state that differs by {:.2g}: keep nothing "
                 "on the module")


def batch_makes_no_difference(model: MemoryModel) -> float:
    """Scores and answers are those of each question alone: returns the largest difference of a score (nats)."""
    loud = _loud(model)
    with torch.no_grad():
        batch = loud.score(QUESTIONS, ANSWERS).log_prob
        alone = torch.cat([loud.score([q], [a]).log_prob for q, a in zip(QUESTIONS, ANSWERS, strict=True)])
    differs = _apart(batch, alone)
    _require(torch.allclose(batch, alone, rtol=TOLERANCE, atol=TOLERANCE),
             f"an answer's score changes by {differs:.2g} nats with the questions beside it: mix no rows of a batch, "
             "and leave padding out", differs)
    together = loud.answer(QUESTIONS, max_new_tokens=4, on_batch=_quiet)
    single = [loud.answer([q], max_new_tokens=4, on_batch=_quiet)[0] for q in QUESTIONS]
    backwards = loud.answer(QUESTIONS[::-1], max_new_tokens=4, on_batch=_quiet)[::-1]
    _require(together == single == backwards, "an answer changes with the questions beside it or with their order",
             differs)
    return differs


def no_look_ahead(model: MemoryModel) -> float:
    """With memory, a later token changes no earlier logit: returns the largest difference."""
    loud = _loud(model)
    whole, ids = loud.logits(TEXT), model.backbone.token_ids(TEXT)
    begin = " ".join(TEXT.split()[:5])
    T = len(model.backbone.token_ids(begin))
    assert model.backbone.token_ids(begin) == ids[:T]
    first = loud.logits(begin)
    differs = _apart(first, whole[:T])
    _require(torch.allclose(first, whole[:T], rtol=TOLERANCE, atol=TOLERANCE),
             f"a later token moves an earlier logit by {differs:.2g}: what a token reads may depend on itself and on "
             "those before it only", differs)
    return differs


def state_survives_a_file(model: MemoryModel) -> float:
    """State and adapter come back from their files, and say the same: returns the difference, 0."""
    loud = _loud(model)
    with TemporaryDirectory() as folder:
        loud.save_pretrained(folder)
        loud.save_state(Path(folder) / "state.safetensors")
        back = MemoryModel.from_pretrained(folder, model.backbone)
        back.load_state(Path(folder) / "state.safetensors")
    _same(back.state, loud.state, "a state read from its file differs from the one that was saved by {:.2g}")
    differs = _apart(back.logits(TEXT), loud.logits(TEXT))
    _require(differs == 0, f"read back from its files, the model's logits differ by {differs:.2g}: make everything "
             "that read() uses a parameter or a buffer", differs)
    return differs


def memory_takes_no_positions(model: MemoryModel) -> float:
    """Real tokens stand at 0 ... T-1, with ten times the entries too: returns the largest shift, 0."""
    ids = model.backbone.token_ids(TEXT)
    shift = 0.0
    for factor in (1, 10):
        loud = _loud(model, num_entries=factor * model.settings.num_entries)
        for positions in _positions_of_real_tokens(loud):
            wanted = torch.arange(len(ids), device=positions.device)
            found = positions[..., : len(ids)]
            shift = max(shift, float((found - wanted).abs().max()) if found.shape[-1] == len(ids) else math.inf)
    _require(shift == 0, f"memory moves the positions of real tokens by up to {shift:g}: memory takes none", shift)
    return shift


CHECKS: dict[str, Callable[[MemoryModel], float]] = {check.__name__: check for check in (
    silent_start, off_is_frozen, only_theta_learns, chunks_make_no_difference, batch_makes_no_difference, no_look_ahead,
    state_survives_a_file, memory_takes_no_positions)}


def check(model: MemoryModel) -> "pandas.DataFrame":
    """Run all `CHECKS`: a row each with check, passed, measured and meaning (where it failed, what does not hold).

    An error that a method raises fails the check in which it does, and is told as its meaning.
    """
    import pandas as pd

    rows = []
    for name, function in CHECKS.items():
        passed, measured, meaning = False, math.nan, (function.__doc__ or "").split(": returns")[0]
        try:
            measured, passed = function(model), True
        except Nonconformity as failed:
            measured, meaning = failed.measured, str(failed)
        except Exception as error:  # of the method that is checked: whatever it is, it is the finding
            meaning = f"{type(error).__name__}: {error}"
        rows.append(dict(check=name, passed=passed, measured=measured, meaning=meaning))
    return pd.DataFrame(rows)


@contextmanager
def registered(method: type[Method], name: str = "mine") -> Iterator[str]:
    """Inside the block, ``method`` is one of the registry's under ``name``; afterwards the registry is as it was."""
    before = dict(REGISTRY)
    REGISTRY[name] = method
    try:
        yield name
    finally:
        REGISTRY.clear()
        REGISTRY.update(before)


# ---- shared parts ----------------------------------------------------------------------------------------------------

def _require(holds: bool, sentence: str, measured: float = math.nan) -> None:
    if not holds:
        raise Nonconformity(sentence, measured)


def _fresh(model: MemoryModel, **changes) -> MemoryModel:
    """A new model of the same backbone and settings."""
    return MemoryModel(model.backbone, **asdict(model.settings) | changes)


def _written(model: MemoryModel, **changes) -> MemoryModel:
    new = _fresh(model, **changes)
    new.write_hidden(model.backbone.encode(TURNS, progress=False))
    return new


def _loud(model: MemoryModel, scale: float = 0.3, **changes) -> MemoryModel:
    """A new model after its turns, its trained numbers pushed far from the start, so that memory really acts.

    Noise as large as the state sets the entries apart: the rows of a bank can be so alike that all read the same.
    """
    loud = _written(model, **changes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in loud.parameters():
            p += scale * torch.randn(p.shape, generator=generator).to(p)
    loud.state = {name: t + t.norm() / t.numel() ** 0.5 * torch.randn(t.shape, generator=generator).to(t)
                  for name, t in loud.state.items()}
    if loud.state:
        moved = _apart(loud.logits(TEXT), loud.logits(TEXT, memory="off"))
        _require(moved > SILENT, f"memory moves the logits by {moved:.2g} only, even with its trained numbers far from "
                 "the start: read() must use the state, and a trained number must open the way", moved)
    return loud


def _gradient_norms(adapter: nn.Module, L: int) -> dict[str, float]:
    """Of every trained tensor; block by block, where it has one part a block."""
    norms = {}
    for name, p in adapter.named_parameters():
        if p.grad is None:
            norms[name] = 0.0
        elif p.ndim and p.shape[0] == L:
            norms |= {f"{name}[{i}]": float(part.norm()) for i, part in enumerate(p.grad)}
        else:
            norms[name] = float(p.grad.norm())
    return norms


def _without_our_code(backbone: Backbone) -> nn.Module:
    """The backbone's weights in a transformers model without hooks, on transformers' own attention."""
    from transformers import AutoModelForCausalLM

    config = type(backbone.config).from_dict(backbone.config.to_dict())
    with torch.random.fork_rng(devices=[]):  # transformers initialises from the global generator; leave it as it was
        plain = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(backbone.device)
    plain.load_state_dict(backbone.model.state_dict(), assign=True)
    return plain.eval()


def _positions_of_real_tokens(model: MemoryModel) -> list[Tensor]:
    """The position ids under which the blocks see `TEXT` while ``model`` reads its state."""
    bare, seen = model.backbone.model, []
    place = bare.transformer.wpe if hasattr(bare, "transformer") else bare.model.rotary_emb
    inputs = torch.tensor([model.backbone.token_ids(TEXT)], device=model.backbone.device)

    def record(_module, args, kwargs):
        seen.append(kwargs["position_ids"] if "position_ids" in kwargs else args[-1])

    hidden = model._frozen_inputs(inputs, torch.ones_like(inputs, dtype=torch.bool))
    injection = model.injection("own", hidden)  # what it runs beforehand (M.1) is not of real tokens
    handle = place.register_forward_pre_hook(record, with_kwargs=True)
    try:
        with seam.inject(bare, injection), torch.no_grad():
            bare(inputs, use_cache=False)
    finally:
        handle.remove()
    return seen


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def _copy(state: State) -> State:
    return {name: t.clone() for name, t in state.items()}


def _same(found: State, wanted: State, sentence: str) -> float:
    """0, or a Nonconformity with the largest difference in its sentence; states must be equal bit for bit."""
    _require(found.keys() == wanted.keys(), f"the state's parts are {list(found)}, and were {list(wanted)}")
    differs = max((_apart(found[name], wanted[name]) for name in wanted), default=0.0)
    _require(all(torch.equal(found[name], wanted[name]) for name in wanted), sentence.format(differs), differs)
    return differs


def _quiet(n: int) -> None:
    """In place of a progress bar."""
