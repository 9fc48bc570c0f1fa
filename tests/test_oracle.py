"""Banks of a question's own evidence: what stands in them at each stage, the controls, and what is told of them."""

import math
from dataclasses import replace

import pandas as pd
import pytest
import torch

from pdmem_lib import MemoryModel, figures, load_backbone, oracle, synthetic_conversations
from pdmem_lib.references import TurnIndex, gold_turns
from pdmem_lib.states import encode_all, final_bank


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("tiny-gpt2")


@pytest.fixture(scope="module")
def talks():
    return synthetic_conversations(3, 3, seed=0)


@pytest.fixture(scope="module")
def states(backbone, talks):
    return encode_all(backbone, talks, progress=False)


def of_several_turns(conversation):
    return next(one for one in oracle.answerable([conversation]) if len(one[2].evidence) > 1)


def turns_of(conversation, number, question):
    return sorted(conversation.turn(id).index for id in question.evidence)


@pytest.mark.parametrize("method", ["kv_extension", "hebbian", "slot"])
def test_each_stage_writes_what_it_says(backbone, talks, states, method):
    model, talk = MemoryModel(backbone, method), talks[0]
    one = of_several_turns(talk)
    turns = turns_of(*one)
    written = {"alone": turns, "after": range(turns[-1] + 1), "end": range(len(talk.turns))}
    for stage, those in written.items():
        model.reset()
        expected = model.write_hidden([states[talk.id][turn] for turn in those])
        found = oracle.Banks(model, states, stage).of(*one)
        assert {name: torch.equal(found[name], expected[name]) for name in expected} == dict.fromkeys(expected, True), stage
    assert torch.equal(*(bank[next(iter(expected))] for bank in (found, final_bank(model, talk, states[talk.id]))))


def test_at_states_the_entries_are_the_token_states(backbone, talks, states):
    """Again and again until the bank is full; the last ones where it cannot hold them all."""
    talk = talks[0]
    one = of_several_turns(talk)
    H = torch.cat([states[talk.id][turn] for turn in turns_of(*one)])  # (T, d)
    for entries in (3 * len(H) - 1, len(H) - 2):
        model = MemoryModel(backbone, "slot", num_entries=entries, top_k=2)
        found = oracle.Banks(model, states, "states").of(*one)["P"]
        assert torch.equal(found, torch.cat([H, H, H])[:entries] if entries > len(H) else H[-entries:])
        assert model.checked({"P": found})  # it is a state of this model


def test_what_no_bank_can_be_made_of_is_named(backbone, states, talks):
    with pytest.raises(ValueError, match="hebbian keeps no entries as wide as a token's state"):
        oracle.Banks(MemoryModel(backbone, "hebbian"), states, "states")
    with pytest.raises(ValueError, match="no bank is made at stage 'prompt': known are states, alone, after, end"):
        oracle.Banks(MemoryModel(backbone, "slot"), states, "prompt")
    with pytest.raises(ValueError, match="baseline keeps no memory"):
        oracle.train(MemoryModel(backbone, "baseline"), talks, "alone", progress=False)
    with pytest.raises(ValueError, match="max_asked must be at least 1"):
        oracle.OracleSettings(max_asked=0)


def test_only_questions_with_evidence_are_asked(talks):
    asked = oracle.answerable(talks)
    assert asked == [(c, i, q) for c in talks for i, q in enumerate(c.questions) if q.evidence]
    some = oracle.answerable(talks, 5, seed=1)
    assert len(some) == 5 and some == [one for one in asked if one in some] and some != oracle.answerable(talks, 5, seed=2)
    blind = [replace(talks[0], questions=tuple(replace(q, evidence=()) for q in talks[0].questions))]
    with pytest.raises(ValueError, match="no question names its evidence"):
        oracle.answerable(blind)


def test_controls_share_no_evidence_and_are_the_same_at_every_stage(talks):
    asked = oracle.answerable(talks, 12)
    found = oracle._controls(asked, talks, 42)
    assert found == oracle._controls(asked, talks, 42) != oracle._controls(asked, talks, 43)
    assert found[3:7] == oracle._controls(asked[3:7], talks, 42)  # whoever else is asked
    for (c, _, q), others in zip(asked, found, strict=True):
        kinds = [name for name, _ in others]
        assert kinds == ["neighbour", "other", "other"]
        assert others[0][1][0] is c and not set(others[0][1][2].evidence) & set(q.evidence)
        assert {other.id for name, (other, *_) in others if name == "other"} == {t.id for t in talks} - {c.id}
        for _, (other, _, theirs) in others:  # the same kind of question, with as much evidence as there is of that kind
            kind = [one for one in oracle.answerable([other]) if one[2].category == q.category and
                    (other is not c or not set(one[2].evidence) & set(q.evidence))]
            least = min((abs(len(one[2].evidence) - len(q.evidence)) for one in kind), default=None)
            assert not kind or (theirs.category == q.category and abs(len(theirs.evidence) - len(q.evidence)) == least)


def test_answers_are_scored_under_the_banks_that_are_named(backbone, talks, states):
    model = MemoryModel(backbone, "kv_extension")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))  # it reads what is there
    asked = oracle.answerable(talks, 4, seed=42)
    before = model.state["P"].clone()
    table = oracle.ask(model, talks, "after", max_asked=4, progress=False, autocast=False)
    assert torch.equal(model.state["P"], before) and table["evidence"].tolist() == [len(q.evidence) for *_, q in asked]
    banks = oracle.Banks(model, states, "after")
    for row, (c, number, q), others in zip(table.itertuples(), asked, oracle._controls(asked, talks, 42), strict=True):
        def logp(memory):
            found = model.score([q.question], [q.answer], memory)
            return (found.log_prob / found.tokens).item()
        assert row.conversation == c.id and row.number == number and c.questions[number] == q and row.lag == q.lag
        assert row.logp_own == pytest.approx(logp(banks.of(c, number, q)), abs=1e-4)
        assert row.logp_zero == pytest.approx(logp("zero"), abs=1e-4)
        of = {name: [logp(banks.of(*one)) for kind, one in others if kind == name] for name in ("neighbour", "other")}
        assert row.logp_neighbour == pytest.approx(of["neighbour"][0], abs=1e-4)
        assert row.logp_other == pytest.approx(sum(of["other"]) / 2, abs=1e-4)
    end = oracle.ask(model, talks, "end", max_asked=4, progress=False, autocast=False)
    assert end["logp_neighbour"].isna().all() and end["logp_other"].notna().all()  # one bank a conversation


def test_the_prompt_is_the_frozen_model_with_the_evidences_text(backbone, talks):
    bare = MemoryModel(backbone, "baseline")
    table = oracle.ask(bare, talks, "prompt", max_asked=3, progress=False, autocast=False)
    for row, (c, _, q) in zip(table.itertuples(), oracle.answerable(talks, 3, seed=42), strict=True):
        for column, context in (("logp_own", gold_turns(TurnIndex(backbone, c), q)), ("logp_zero", "")):
            found = bare.score([q.question], [q.answer], contexts=[context])
            assert getattr(row, column) == pytest.approx((found.log_prob / found.tokens).item(), abs=1e-4)


def test_training_goes_over_the_questions_and_repeats_itself(backbone, talks):
    few = dict(epochs=2, batch_size=4, lr=0.01, warmup_steps=1, max_questions=10, progress=False)
    weights = []
    for _ in range(2):
        model = MemoryModel(backbone, "slot")
        start = [p.detach().clone() for p in model.parameters()]
        history = oracle.train(model, talks, "alone", **few)
        assert len(history) == 2 * 3  # 10 questions are three batches
        assert any(not torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True))
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *weights))
    other = MemoryModel(backbone, "slot")
    oracle.train(other, talks, "end", **few)
    assert not all(map(torch.equal, weights[0], other.parameters()))


def rows(stage, gains, method="slot"):
    """Questions of two conversations whose own evidence is worth ``gains`` more than anything else."""
    return pd.DataFrame([dict(method=method, capacity=1, stage=stage, seed=42, conversation=f"c{i % 2}", number=i // 2,
                              category=5 if i >= 8 else 1, logp_own=-2 + gain, logp_other=-2.0, logp_zero=-3.0,
                              logp_neighbour=math.nan if stage == "end" else -2 + gain / 2) for i, gain in enumerate(gains)])


def test_what_is_told_is_the_gain_over_each_control():
    table = pd.concat([rows("alone", [0.3, 0.1, 0.5, 0.3, 0.4, 0.2, 0.4, 0.2, 9.0, 9.0]), rows("end", [0.01, -0.01] * 5)])
    found = oracle.told(table).set_index(["questions", "against", "stage"])
    assert len(found) == 6 and set(found["method"]) == {"slot"}  # no neighbour at the end; one question of category 5 is too few
    assert found.loc[("without category 5", "other", "alone"), "effect"] == pytest.approx((0.4 + 0.2) / 2)
    assert found.loc[("without category 5", "neighbour", "alone"), "effect"] == pytest.approx(0.15)
    assert found.loc[("all", "other", "alone"), "effect"] == pytest.approx((10.6 / 5 + 9.8 / 5) / 2)
    assert found.loc[("all", "other", "end"), "effect"] == pytest.approx(0, abs=1e-12)
    assert found.loc[("without category 5", "other", "alone"), "low"] > 0
    assert (found["p_holm"].dropna() >= found["p"].dropna()).all()


def test_the_figure_has_a_row_a_stage_and_a_panel_a_control():
    table = pd.concat([rows("prompt", [0.9, 0.7] * 5, "baseline"), rows("alone", [0.3, 0.1] * 5), rows("end", [0.02, -0.01] * 5)])
    found = oracle.told(table).query("questions == 'all'")
    figure = figures.evidence_by_stage(found, "made up")
    assert [text.split("<br>")[0] for text in figure.layout.yaxis.ticktext] == [
        "the evidence in the prompt", "it is written, alone", "asked at the end of the"]
    points = [trace for trace in figure.data if trace.x[0] is not None]
    assert sorted(trace.x[0] for trace in points) == pytest.approx(sorted(found["effect"]))
    assert [trace.name for trace in figure.data if trace.x[0] is None] == ["M.6 Slots, 1×"]
    with pytest.raises(ValueError, match="choose the questions"):
        figures.evidence_by_stage(oracle.told(table), "made up")
    with pytest.raises(ValueError, match="unknown later"):
        figures.evidence_by_stage(found.assign(stage="later"), "made up")


def test_a_question_that_stands_twice_is_asked_twice(backbone, talks):
    """LoCoMo has some: each is a row of its own."""
    twice = [replace(c, questions=c.questions + c.questions[:2]) for c in talks]
    table = oracle.ask(MemoryModel(backbone, "slot"), twice, "alone", progress=False, autocast=False).assign(seed=42)
    assert not table.duplicated(["conversation", "number"]).any()
    assert len(oracle.told(table)) == 6


def test_one_conversation_has_no_other_and_a_question_that_is_too_long_is_named(backbone, talks):
    table = oracle.ask(MemoryModel(backbone, "slot"), talks[:1], "alone", max_asked=3, progress=False, autocast=False)
    assert table["logp_other"].isna().all() and table["logp_other"].dtype == float and table["logp_neighbour"].notna().all()
    long = replace(talks[0].questions[0], question="why? " * backbone.max_tokens)
    asked = [replace(talks[0], questions=(*talks[0].questions[1:], long))]
    for work in (oracle.train, oracle.ask):
        with pytest.raises(ValueError, match="fit"):
            work(MemoryModel(backbone, "slot"), asked, "alone", progress=False)
