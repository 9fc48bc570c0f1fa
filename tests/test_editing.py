"""Editing a memory: differences, two memories as one, a turn forgotten; over every method of the registry."""

import pytest
import torch
from torch.testing import assert_close

import pdmem_lib as pdmem
from pdmem_lib import editing, methods

ONE = ["Ann: I adopted a parrot.", "Ann: It can sing."]
OTHER = ["Ben: I bought a flute.", "Ben: It was cheap.", "Ben: And it is old."]


def written(model, turns):
    model.reset()
    return model.write(turns)


def families(family):
    return [name for name in pdmem.METHODS if issubclass(pdmem.REGISTRY[name], family)]


SUMS = families((methods.AttentionCoupledBank, methods.HebbianMatrix))
SLOTS = families(methods.SparseSlots)


def test_every_method_belongs_to_a_family_that_is_tested():
    assert sorted(SUMS + SLOTS) == sorted(pdmem.METHODS)


# --- differences ---

@pytest.mark.parametrize("method", pdmem.METHODS)
def test_a_state_does_not_differ_from_itself_and_does_from_the_start(model, method):
    model = model(method)
    start, state = model.adapter.initial_state(), written(model, ONE)
    ((name, bank),) = state.items()
    same, table = editing.diff(state, state), editing.diff(start, state)
    assert same["change"].eq(0).all() and same["cosine"].sub(1).abs().max() < 1e-5
    assert list(table.columns) == ["tensor", "entry", "norm_a", "norm_b", "change", "cosine"]
    assert len(table) == len(bank) and set(table["tensor"]) == {name} and table["change"].max() > 0
    assert_close(torch.tensor(table["change"].to_numpy()), (bank - start[name]).norm(dim=1).cpu())


@pytest.mark.parametrize("method", SLOTS)
def test_slots_that_were_not_written_have_not_changed(model, method):
    model = model(method, top_k=3)
    table = editing.diff(model.adapter.initial_state(), written(model, ONE[:1]))
    assert (table["change"] > 0).sum() == 3


def test_what_cannot_be_compared(model):
    with pytest.raises(ValueError, match="one method and capacity"):
        editing.diff(model("slot").state, model("hebbian").state)
    assert editing.diff({}, {}).empty  # the baseline


# --- merging ---

@pytest.mark.parametrize("method", SUMS)
def test_merging_with_one_who_said_nothing_adds_nothing(model, method):
    model = model(method)
    state, start = written(model, ONE), model.adapter.initial_state()
    before = {name: t.clone() for name, t in model.state.items()}
    assert_close(editing.merge(model, state, start, (2, 0)), state)
    assert_close(editing.merge(model, start, state, (0, 2)), state)
    assert_close(model.state, before, rtol=0, atol=0)


@pytest.mark.parametrize("method", SUMS)
def test_the_order_of_two_does_not_matter_and_the_start_counts_once(model, method):
    model = model(method)
    a, b, gamma = written(model, ONE), written(model, OTHER), model.settings.gamma
    merged = editing.merge(model, a, b, (2, 3))
    assert_close(merged, editing.merge(model, b, a, (3, 2)))
    ((name, start),) = model.adapter.initial_state().items()
    left = a[name] - gamma**2 * start + b[name] - gamma**3 * start
    assert_close(merged[name], left + gamma**3 * start)


@pytest.mark.parametrize("method", SUMS)
def test_memories_that_went_on_from_a_shared_one(model, method):
    model = model(method)
    shared = written(model, ["Ann: Hello, Ben."])
    model.state = shared
    a = model.write(ONE)
    merged = editing.merge(model, a, shared, (2, 0), start=shared)
    assert_close(merged, a)


def test_the_hebbian_sum_is_that_of_one_conversation_but_for_the_decay(model):
    """Without decay the matrix of both conversations is the sum, in whatever order they took place."""
    model = model("hebbian", gamma=1.0)
    merged = editing.merge(model, written(model, ONE), written(model, OTHER), (2, 3))
    assert_close(merged, written(model, ONE + OTHER))
    assert_close(merged, written(model, OTHER + ONE))


def test_the_hebbian_sum_keeps_the_norm_bound(model):
    model = model("hebbian")
    full = {"M": torch.ones_like(model.state["M"]) / len(model.state["M"])}  # of norm 1
    merged = editing.merge(model, full, full, (500, 500))
    assert_close(merged["M"].norm(), torch.tensor(1.0))
    assert_close(merged, full, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", SLOTS)
def test_slots_that_one_wrote_are_taken_and_those_of_both_refused(model, method):
    model = model(method)
    start = model.adapter.initial_state()
    a, b = start["P"].clone(), start["P"].clone()
    a[3] += 1
    b[5] -= 1
    merged = editing.merge(model, {"P": a}, {"P": b}, (1, 1))["P"]
    assert_close(merged[3], a[3], rtol=0, atol=0)
    assert_close(merged[5], b[5], rtol=0, atol=0)
    assert_close(merged[[0, 63]], start["P"][[0, 63]], rtol=0, atol=0)
    b[3] -= 1
    with pytest.raises(ValueError, match=r"1 of the same slots \(3\).*write the turns of both"):
        editing.merge(model, {"P": a}, {"P": b}, (1, 1))


def test_what_cannot_be_merged(model):
    model = model("kv_extension")
    with pytest.raises(ValueError, match="two numbers"):
        editing.merge(model, model.state, model.state, (1, -1))
    with pytest.raises(ValueError, match="same method and capacity"):
        editing.merge(model, model.state, {"M": torch.zeros(2, 2)}, (1, 1))


def test_a_method_of_no_known_rule_is_not_merged(model):
    model = model("baseline")
    with pytest.raises(ValueError, match="no meaning is known"):
        editing.merge(model, {}, {}, (1, 1))


# --- forgetting ---

@pytest.mark.parametrize("method", pdmem.METHODS)
def test_a_forgotten_turn_was_never_told(model, method):
    model = model(method)
    hidden = model.backbone.encode(ONE + OTHER, progress=False)
    state = model.write_hidden(hidden)
    forgotten = editing.forget(model, hidden, [1])
    assert model.state is state, "forgetting leaves the model's own state alone"
    model.reset()
    never_told = model.write_hidden(hidden[:1] + hidden[2:])
    assert_close(forgotten, never_told, rtol=0, atol=0)
    assert editing.diff(state, forgotten)["change"].max() > 0
    assert_close(editing.forget(model, hidden, []), state, rtol=0, atol=0)
    assert_close(editing.forget(model, hidden, range(5)), model.reset(), rtol=0, atol=0)


@pytest.mark.parametrize("method", pdmem.METHODS)
def test_forgetting_from_a_later_start(model, method):
    model = model(method)
    hidden = model.backbone.encode(ONE + OTHER, progress=False)
    session = model.write_hidden(hidden[:2])
    assert_close(editing.forget(model, hidden[2:], [0], start=session), editing.forget(model, hidden, [2]),
                 rtol=0, atol=0)


@pytest.mark.parametrize("turn", [-1, 2])
def test_a_turn_that_there_is_not_cannot_be_forgotten(model, turn):
    model = model("slot")
    hidden = model.backbone.encode(ONE, progress=False)
    with pytest.raises(ValueError, match=f"there is no turn {turn}"):
        editing.forget(model, hidden, [turn])
