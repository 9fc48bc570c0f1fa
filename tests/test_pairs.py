"""Banks asked a question each in one pass, and training on them."""

import random

import pandas
import pytest
import torch
from torch.testing import assert_close

import pdmem_lib as pdmem
from pdmem_lib import training
from pdmem_lib.training import train_pairs

QUESTIONS, ANSWERS = ["What did Ann adopt?", "And what did Ben, who lives far away, buy?"], ["a cat", "harps"]


@pytest.fixture
def open_model(model):
    """A model of a method, its adapter off the silent start, with two states."""
    def build(method):
        built = model(method)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in built.parameters():
                weight += 0.1 * torch.randn(weight.shape, generator=generator).to(weight.device)
        states = []
        for turn in ("Ann: I adopted a cat.", "Ben: I bought a harp."):
            built.reset()
            states.append(built.write(turn))
        return built, states
    return build


@pytest.mark.parametrize("method", pdmem.METHODS)
def test_pairs_score_as_each_alone(open_model, method):
    model, states = open_model(method)
    with torch.no_grad():
        together = model.score_pairs(states, QUESTIONS, ANSWERS)
        alone = [model.score([q], [a], memory=s) for s, q, a in zip(states, QUESTIONS, ANSWERS, strict=True)]
        exchanged = model.score_pairs(states[::-1], QUESTIONS, ANSWERS)
    assert_close(together.log_prob, torch.cat([score.log_prob for score in alone]), atol=1e-4, rtol=1e-4)
    assert together.tokens.tolist() == [int(score.tokens) for score in alone]
    with torch.no_grad():
        read = model.score_pairs(states, QUESTIONS, ANSWERS, ["", "Ben: I sold it."])
        alone = model.score(QUESTIONS[1:], ANSWERS[1:], states[1], ["Ben: I sold it."])
    assert_close(read.log_prob, torch.cat([together.log_prob[:1], alone.log_prob]), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together.log_prob, exchanged.log_prob, atol=1e-4), "each row reads its own memory"


def test_what_makes_no_pairs(model):
    model = model("slot")
    with pytest.raises(ValueError, match="1 memories, 2 questions"):
        model.score_pairs(["own"], QUESTIONS, ANSWERS)
    with pytest.raises(ValueError, match="ask it alone"):
        model.score_pairs(["off", "own"], QUESTIONS, ANSWERS)
    with pytest.raises(ValueError, match="one text a question"):
        model.score_pairs(["own"], QUESTIONS[:1], ANSWERS[:1], ["a", "b"])
    assert_close(model.score_pairs(["off"], QUESTIONS[:1], ANSWERS[:1]).log_prob,
                 model.score(QUESTIONS[:1], ANSWERS[:1], memory="off").log_prob)


@pytest.mark.parametrize("method", pdmem.METHODS)
def test_training_on_pairs_moves_the_adapter_alone_and_lowers_the_loss(open_model, method):
    model, states = open_model(method)
    frozen = [weight.clone() for weight in model.backbone.model.parameters()]
    before = [weight.detach().clone() for weight in model.parameters()]
    state, drawn = model.state, random.getstate()
    history = train_pairs(model, lambda step: (states, QUESTIONS, ANSWERS), steps=12, lr=0.01, progress=False)
    assert list(history.columns) == ["step", "loss", "lr", "grad_norm", "seconds"] and len(history) == 12
    assert history["loss"].iloc[-1] < history["loss"].iloc[0]
    assert any(not torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
    assert all(map(torch.equal, frozen, model.backbone.model.parameters()))
    assert model.state is state and random.getstate() == drawn


def test_a_step_of_long_texts_is_taken_in_parts(open_model, monkeypatch):
    """To the weights that it would have had; never more than so many tokens at a time, unless one row has them."""
    asked = [*QUESTIONS, *QUESTIONS], [*ANSWERS, *ANSWERS], ["", "Ben: " + "I said so. " * 9, "Ann: Yes.", "Ben: " + "I did. " * 4]
    weights, rows, score_pairs = [], [], pdmem.MemoryModel.score_pairs
    for tokens in (training.STEP_TOKENS, 60):
        model, states = open_model("slot")
        monkeypatch.setattr(training, "STEP_TOKENS", tokens)
        monkeypatch.setattr(pdmem.MemoryModel, "score_pairs", lambda self, memories, *rest: rows.append(len(memories)) or score_pairs(
            self, memories, *rest))
        history = train_pairs(model, lambda _, four=(*states, *states): (four, *asked), steps=2, lr=0.01, autocast=False,
                              progress=False)
        weights.append((torch.tensor(history["loss"]), [p.detach() for p in model.parameters()]))
    assert rows[:2] == [4, 4] and len(rows) > 4 and sum(rows[2:]) == 8
    (loss, plain), (other_loss, other) = weights
    assert_close(loss, other_loss, atol=1e-5, rtol=1e-5)
    for a, b in zip(plain, other, strict=True):
        assert (a - b).norm() <= 1e-3 * a.norm()


def test_answers_count_in_a_steps_length_and_what_is_drawn_may_be_any_sequence(open_model, monkeypatch):
    model, states = open_model("slot")
    rows, score_pairs = [], pdmem.MemoryModel.score_pairs
    monkeypatch.setattr(training, "STEP_TOKENS", 90)
    monkeypatch.setattr(pdmem.MemoryModel, "score_pairs", lambda self, memories, *rest: rows.append(len(memories)) or score_pairs(
        self, memories, *rest))
    long = ["She said so. " * 6] * 2
    for drawn in ((states, QUESTIONS, long), (states, iter(QUESTIONS), (one for one in long), None),
                  (states, pandas.Series(QUESTIONS, [7, 3]), pandas.Series(long, [3, 7]))):
        train_pairs(model, lambda step: drawn, steps=1, progress=False)  # noqa: B023
    assert rows == [1, 1] * 3
    for wrong, why in ((([*states, *states], QUESTIONS, ANSWERS), "4 memories, 2 questions"), ((states[:1], QUESTIONS, ANSWERS), "1 memories"),
                       ((states, QUESTIONS, ANSWERS[:1]), "1 answers"), ((states, "Wh", "ye"), r"wrap the one in \[ \]"),
                       (([], [], []), "0 questions"), ((states, QUESTIONS, ANSWERS, ["one"]), "one text a question")):
        with pytest.raises(ValueError, match=why):
            train_pairs(model, lambda step: wrong, steps=1, progress=False)  # noqa: B023


def test_what_cannot_be_trained(model):
    with pytest.raises(ValueError, match="trains nothing"):
        train_pairs(model("baseline"), lambda step: ([{}], QUESTIONS[:1], ANSWERS[:1]))
    with pytest.raises(ValueError, match="trains nothing"):
        train_pairs(model("slot"), lambda step: ([], [], []), steps=0)
