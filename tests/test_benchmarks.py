"""The fast paths give what the plainest loop gives, and the benchmark's table is whole."""

import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

import pdmem_lib as pdmem

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import bench  # noqa: E402
import plain  # noqa: E402

TURNS = ["Ann: I adopted a grey cat.", "Bob: Oh!", "Ann: We named her Pixel, after a long family meeting."]
QUESTIONS = ["What did Ann adopt?", "Who?", "What is the name of the cat that Ann adopted after the meeting?"]
ANSWERS = ["a grey cat", "Ann", "Pixel"]


def loud(model):
    """``model`` with every trained number off its silent start."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("method", pdmem.METHODS)
def test_a_bank_is_that_of_the_plain_loop(model, method):
    m = model(method)
    expected = plain.bank_of(m, TURNS)
    for name, written in m.write(TURNS).items():
        torch.testing.assert_close(written, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", pdmem.METHODS)
def test_a_step_is_that_of_the_plain_loop(model, method):
    """Losses of a batch, gradients and all, against one example at a time padded to 384."""
    ours, theirs = loud(model(method)), loud(model(method))
    state = ours.write(TURNS)
    losses = [plain.loss_of(theirs, q, a, state) for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    with torch.no_grad():
        score = ours.score(QUESTIONS, ANSWERS)
    torch.testing.assert_close(-score.log_prob / score.tokens, torch.stack(losses).detach(), rtol=1e-3, atol=1e-4)
    for m, loss in ((ours, ours.loss(QUESTIONS[:1], ANSWERS[:1])), (theirs, losses[0])):
        loss.backward()
    for (name, a), b in zip(ours.adapter.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-2, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_answers_in_batches_are_those_of_one_at_a_time(model):
    m = loud(model("slot"))
    m.write(TURNS)
    assert m.answer(QUESTIONS, 6) == [m.answer([question], 6)[0] for question in QUESTIONS]


def test_a_text_beyond_the_plain_loops_length_is_refused(model):
    with pytest.raises(ValueError, match="384"):
        plain.encode_turn(model("slot").backbone, "word " * 400)


def test_a_ratio_is_above_one_where_ours_is_faster():
    class Two(bench.Bench):
        def __init__(self):
            self.rounds = 3

    work = torch.randn(300, 300)
    found = Two().ratio(lambda: work @ work, lambda: [work @ work for _ in range(40)])
    assert 1 < found["low"] <= found["ratio"] <= found["high"]


def test_a_measure_replaces_its_own_rows_alone(tmp_path, monkeypatch):
    out = tmp_path / "benchmark.csv"
    row = dict(method="", capacity="", ratio=1.0, low=1.0, high=1.0, at_least=0.5)
    monkeypatch.setattr(bench, "MEASURES", {"one": lambda _: iter([row]), "two": lambda _: iter([row, row])})
    for only in (["one", "two"], ["two"]):
        monkeypatch.setattr(sys, "argv", ["bench", "--backbone", "tiny-gpt2", "--data", "synthetic", "--out", str(out),
                                          "--only", *only])
        bench.main()
    table = pd.read_csv(out)
    assert table.columns.tolist() == bench.COLUMNS and table["measure"].tolist() == ["one", "two", "two"]
    assert set(table["backbone"]) == {"tiny-gpt2"}
