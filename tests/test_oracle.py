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
    return encode_all(backbone, talks, progress=False, autocast=False)


@pytest.fixture
def model(backbone):
    """An M.3 that reads what is there."""
    model = MemoryModel(backbone, "kv_extension")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    return model


def of_several_turns(conversation):
    return next(one for one in oracle.answerable([conversation]) if len(one[2].evidence) > 1)


@pytest.mark.parametrize("method", ["kv_extension", "hebbian", "slot"])
def test_each_stage_writes_what_it_says(backbone, talks, states, method):
    model, talk = MemoryModel(backbone, method), talks[0]
    one = of_several_turns(talk)
    turns = oracle.evidence_turns(talk, one[2])
    assert turns == sorted(talk.turn(id).index for id in one[2].evidence)
    others = [turn for turn in range(turns[-1]) if turn not in turns]
    written = {"alone": turns, "after-1": sorted([*turns, others[-1]]), "after-4": sorted([*turns, *others[-4:]]),
               "after-16": sorted([*turns, *others[-16:]]), "after": range(turns[-1] + 1), "end": range(len(talk.turns))}
    for stage, those in written.items():
        model.reset()
        expected = model.write_hidden([states[talk.id][turn] for turn in those])
        found = oracle.Banks(model, states, stage).of(talk, one[2])
        assert {name: torch.equal(found[name], expected[name]) for name in expected} == dict.fromkeys(expected, True), stage
    assert torch.equal(*(bank[next(iter(expected))] for bank in (found, final_bank(model, talk, states[talk.id]))))


@pytest.mark.parametrize("stage", ["states", "alone", "after-4", "after", "end"])
def test_the_neighbours_evidence_stands_in_the_place_of_the_questions_own(backbone, talks, states, stage):
    """Written out: the same turns in the same order, one exchanged; so both banks are as old and as full."""
    model, talk = MemoryModel(backbone, "kv_extension"), talks[0]
    asked = [q for *_, q in oracle.answerable([talk]) if len(q.evidence) == 1]
    q = max(asked, key=lambda q: oracle.evidence_turns(talk, q)[0])
    instead = next(p for p in asked if p.evidence != q.evidence)
    (own,), (theirs,) = oracle.evidence_turns(talk, q), oracle.evidence_turns(talk, instead)
    found = oracle.Banks(model, states, stage).of(talk, q, instead)["P"]
    if stage == "states":
        assert torch.equal(found, oracle.Banks(model, states, stage).of(talk, instead)["P"])
        return
    turns = {"alone": [own], "after-4": range(own - 4, own + 1), "after": range(own + 1), "end": range(len(talk.turns))}[stage]
    expected = model.write_hidden([states[talk.id][theirs if turn == own else turn] for turn in turns])
    assert torch.equal(found, expected["P"]) and not torch.equal(found, oracle.Banks(model, states, stage).of(talk, q)["P"])


def test_evidence_is_exchanged_from_the_last_turn_on():
    """So that what is asked at once was written last, in both banks."""
    for own, theirs, expected in (([3], [7], [1, 2, 7, 4]), ([1, 3], [7, 8], [7, 2, 8, 4]), ([1, 3], [8], [2, 8, 4]),
                                  ([1, 3], [5, 6, 7, 8], [5, 6, 7, 2, 8, 4]), ([3], [5, 6], [1, 2, 5, 6, 4]), ([1, 2, 4], [9], [3, 9])):
        assert oracle.swapped([1, 2, 3, 4], own, theirs) == expected
        assert oracle.swapped([1, 2, 3, 4], own, own) == [1, 2, 3, 4]


def test_at_states_the_entries_are_the_token_states(backbone, talks, states):
    """Again and again until the bank is full; the last ones where it cannot hold them all."""
    talk = talks[0]
    one = of_several_turns(talk)
    H = torch.cat([states[talk.id][turn] for turn in oracle.evidence_turns(talk, one[2])])  # (T, d)
    for entries in (3 * len(H) - 1, len(H) - 2):
        model = MemoryModel(backbone, "kv_extension", num_entries=entries, top_k=2)
        found = oracle.Banks(model, states, "states").of(talk, one[2])["P"]
        assert torch.equal(found, torch.cat([H, H, H])[:entries] if entries > len(H) else H[-entries:])
        assert model.checked({"P": found})  # it is a state of this model


def test_a_method_is_trained_where_it_has_banks_of_its_own(backbone, states, talks):
    stages = {method: oracle.trained_at(MemoryModel(backbone, method)) for method in ("prefix", "gated", "hebbian", "slot", "baseline")}
    every = oracle.STAGES[1:-1]
    assert every[:3] == ("text", "states", "alone") and every[-1] == "after"
    narrow = tuple(stage for stage in every if stage != "states")
    assert stages == dict(prefix=every, gated=every, hebbian=narrow, slot=narrow[1:], baseline=())
    with pytest.raises(ValueError, match="slot has no banks at stage 'text': it has alone, "):
        oracle.Banks(MemoryModel(backbone, "slot"), states, "text")
    with pytest.raises(ValueError, match="hebbian has no banks at stage 'states': it has alone, after-1, after-4, after-16, after, end"):
        oracle.Banks(MemoryModel(backbone, "hebbian"), states, "states")
    with pytest.raises(ValueError, match="it has none, it keeps no memory"):
        oracle.Banks(MemoryModel(backbone, "baseline"), states, "alone")
    with pytest.raises(ValueError, match="slot is not trained at 'end': name one of alone, after-1"):
        oracle.train(MemoryModel(backbone, "slot"), talks, "end", progress=False)
    with pytest.raises(ValueError, match="baseline is not trained at 'text': name one of another method"):
        oracle.ask(MemoryModel(backbone, "baseline"), talks, "text", progress=False)
    with pytest.raises(ValueError, match="max_asked must be at least 1"):
        oracle.OracleSettings(max_asked=0)
    with pytest.raises(ValueError, match="synthetic-0-0"):
        oracle.ask(MemoryModel(backbone, "slot"), [talks[0], talks[0]], "alone", progress=False)


def test_only_questions_that_their_evidence_answers_are_asked(talks):
    asked = oracle.answerable(talks)
    assert asked == [(c, i, q) for c in talks for i, q in enumerate(c.questions) if q.evidence and q.category != 5]
    assert {q.category for c in talks for q in c.questions} > {q.category for *_, q in asked}
    some = oracle.answerable(talks, 5, seed=1)
    assert len(some) == 5 and some == [one for one in asked if one in some] and some != oracle.answerable(talks, 5, seed=2)
    blind = [replace(talks[0], questions=tuple(replace(q, evidence=()) for q in talks[0].questions))]
    with pytest.raises(ValueError, match="no question names its evidence"):
        oracle.answerable(blind)


def test_controls_are_as_alike_as_there_are_and_share_no_evidence(talks):
    asked = oracle.answerable(talks, 12)
    found = oracle.controls(asked, talks, 42)
    assert found == oracle.controls(asked, talks, 42) != oracle.controls(asked, talks, 43)
    assert found[3:7] == oracle.controls(asked[3:7], talks, 42)  # whoever else is asked
    for (c, _, q), others in zip(asked, found, strict=True):
        assert [name for name, _ in others] == ["neighbour", "other", "other"]
        assert others[0][1][0] is c and not set(others[0][1][2].evidence) & set(q.evidence)
        assert {other.id for name, (other, *_) in others if name == "other"} == {t.id for t in talks} - {c.id}

        def speakers(question):
            return {c.turn(id).speaker for id in question.evidence}
        for name, (other, _, theirs) in others:
            alike = [p for *_, p in oracle.answerable([other]) if p.category == q.category and
                     (other is not c or not set(p.evidence) & set(q.evidence))]
            assert (theirs.category == q.category) == bool(alike)
            if name == "neighbour" and any(speakers(p) == speakers(q) for p in alike):
                assert speakers(theirs) == speakers(q)
                alike = [p for p in alike if speakers(p) == speakers(q)]
            if alike:
                assert abs(len(theirs.evidence) - len(q.evidence)) == min(abs(len(p.evidence) - len(q.evidence)) for p in alike)


def test_answers_are_scored_under_the_banks_that_are_named(backbone, model, talks, states):
    asked = oracle.answerable(talks, 4)
    before = model.state["P"].clone()
    table = oracle.ask(model, talks, "after", max_asked=4, progress=False, autocast=False)
    assert torch.equal(model.state["P"], before) and table["evidence"].tolist() == [len(q.evidence) for *_, q in asked]
    banks = oracle.Banks(model, states, "after")
    for row, (c, number, q), others in zip(table.itertuples(), asked, oracle.controls(asked, talks, 42), strict=True):
        def logp(memory):
            found = model.score([q.question], [q.answer], memory)
            return (found.log_prob / found.tokens).item()
        assert row.conversation == c.id and row.number == number and c.questions[number] == q and row.lag == q.lag
        assert row.logp_own == pytest.approx(logp(banks.of(c, q)), abs=1e-4)
        assert row.logp_zero == pytest.approx(logp("zero"), abs=1e-4)
        others = [(name, one, question) for name, (one, _, question) in others]
        assert row.logp_neighbour == pytest.approx(logp(banks.of(c, q, others[0][2])), abs=1e-4)
        assert row.logp_other == pytest.approx(sum(logp(banks.of(*one)) for _, *one in others[1:]) / 2, abs=1e-4)
    end = oracle.ask(model, talks, "end", max_asked=4, progress=False, autocast=False, seed=43)
    assert end["number"].tolist() == table["number"].tolist()  # the sample does not depend on the run's seed


def test_banks_are_written_in_float32_whatever_the_reader_computes_in(backbone, talks, states):
    model = MemoryModel(backbone, "slot")
    one = oracle.answerable(talks)[0]
    with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
        seen = []
        write = model.adapter.write
        model.adapter.write = lambda state, H: seen.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled())) or write(state, H)
        oracle.Banks(model, states, "alone").of(one[0], one[2])
    assert set(seen) == {(False, False)}


def test_the_prompt_is_the_frozen_model_with_the_evidences_text(backbone, talks):
    bare = MemoryModel(backbone, "baseline")
    asked = oracle.answerable(talks, 3)
    table = oracle.ask(bare, talks, "prompt", max_asked=3, progress=False, autocast=False)
    for row, (c, _, q), others in zip(table.itertuples(), asked, oracle.controls(asked, talks, 42), strict=True):
        def logp(conversation, evidence):
            context = gold_turns(TurnIndex(backbone, conversation), replace(q, evidence=evidence)) if evidence else ""
            found = bare.score([q.question], [q.answer], contexts=[context])
            return (found.log_prob / found.tokens).item()
        assert row.method == "baseline" and row.logp_own == pytest.approx(logp(c, q.evidence), abs=1e-4)
        assert row.logp_zero == pytest.approx(logp(c, ()), abs=1e-4)
        of = [logp(one[0], one[2].evidence) for _, one in others]
        assert [row.logp_neighbour, row.logp_other] == pytest.approx([of[0], (of[1] + of[2]) / 2], abs=1e-4)


@pytest.mark.parametrize("method", ["kv_extension", "hebbian", "prefix"])
def test_at_text_the_adapter_stands_beside_the_evidences_text_and_its_bank_holds_nothing(backbone, talks, method):
    model, few = MemoryModel(backbone, method), dict(max_asked=3, progress=False, autocast=False)
    model.write(["nothing that any stage reads"])
    history = oracle.train(model, talks, "text", lr=0.01, warmup_steps=1, max_questions=8, batch_size=4, progress=False)
    assert len(history) == 2 * 2 and (history["grad_norm"] > 0).all()
    table, asked = oracle.ask(model, talks, "text", **few), oracle.answerable(talks, 3)
    for row, (c, _, q), others in zip(table.itertuples(), asked, oracle.controls(asked, talks, 42), strict=True):
        def logp(conversation, evidence):
            context = gold_turns(TurnIndex(backbone, conversation), replace(q, evidence=evidence)) if evidence else ""
            found = model.score([q.question], [q.answer], model.adapter.initial_state(), contexts=[context])
            return (found.log_prob / found.tokens).item()
        assert row.method == method and row.logp_own == pytest.approx(logp(c, q.evidence), abs=1e-4)
        assert row.logp_zero == pytest.approx(logp(c, ()), abs=1e-4)
        assert row.logp_neighbour == pytest.approx(logp(c, others[0][1][2].evidence), abs=1e-4)
    bare = oracle.ask(model, talks, "prompt", **few)
    assert (bare["logp_own"] - table["logp_own"]).abs().min() > 1e-3 and set(bare["method"]) == {"baseline"}


def test_training_goes_over_the_questions_and_repeats_itself(backbone, talks):
    few = dict(epochs=2, batch_size=4, lr=0.01, warmup_steps=1, max_questions=10, progress=False)
    weights = []
    for stage in ("alone", "alone", "after"):
        model = MemoryModel(backbone, "slot")
        start = [p.detach().clone() for p in model.parameters()]
        history = oracle.train(model, talks, stage, **few)
        assert len(history) == 2 * 3  # 10 questions are three batches
        assert any(not torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True))
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *weights[:2])) and not all(map(torch.equal, *weights[1:]))


def rows(stage, gains, method="slot"):
    """Questions of two conversations whose own evidence is worth ``gains`` more than another conversation's."""
    return pd.DataFrame([dict(method=method, capacity=1, stage=stage, seed=42, conversation=f"c{i % 2}", number=i // 2,
                              category=1, logp_own=-2 + gain, logp_other=-2.0, logp_zero=-3.0,
                              logp_neighbour=math.nan if stage == "end" else -2 + gain / 2) for i, gain in enumerate(gains)])


ALONE, END = [0.3, 0.1, 0.5, 0.3, 0.4, 0.2, 0.4, 0.2], [0.01, -0.01] * 4


def test_what_is_told_is_the_gain_over_each_control():
    found = oracle.told(pd.concat([rows("alone", ALONE), rows("end", END)])).set_index(["against", "stage"])
    assert len(found) == 3 and set(found["method"]) == {"slot"}  # no question has a neighbour at the end
    assert found.loc[("other", "alone"), "effect"] == pytest.approx((0.4 + 0.2) / 2)
    assert found.loc[("neighbour", "alone"), "effect"] == pytest.approx(0.15)
    assert found.loc[("other", "end"), "effect"] == pytest.approx(0, abs=1e-12)
    of_end, of_alone = found.loc[("other", "end")], found.loc[("other", "alone")]
    assert of_end["ahead"] == 0.5 and of_alone["ahead"] == 1 and abs(of_end["standardised"]) < 1e-9
    assert of_alone["standardised"] == pytest.approx(pd.Series(ALONE).mean() / pd.Series(ALONE).std())
    assert found.loc[("other", "alone"), "low"] > 0 and (found["p_holm"].dropna() >= found["p"].dropna()).all()


def test_what_is_lost_is_taken_question_by_question():
    table = pd.concat([rows("end", END), rows("alone", ALONE), rows("after", ALONE), rows("prompt", ALONE, "baseline")])
    found = oracle.lost(table).set_index(["against", "stage", "to"])
    assert set(found.index) == {("other", "alone", "after"), ("other", "after", "end"), ("neighbour", "alone", "after")}
    assert found.loc[("other", "alone", "after"), "effect"] == 0  # though both stages show much
    d = [a - e for a, e in zip(ALONE, END)]
    assert found.loc[("other", "after", "end"), "effect"] == pytest.approx(sum(d) / 8)
    few = oracle.lost(pd.concat([table, rows("after-4", END), rows("after-1", END, "hebbian")])).query("against == 'other'")
    assert set(map(tuple, few[["stage", "to"]].values)) == {("alone", "after"), ("after", "end"), ("alone", "after-4")}
    assert few.set_index("to").loc["after-4", "effect"] == pytest.approx(sum(d) / 8)
    assert len(oracle.lost(rows("alone", ALONE))) == 0 and "to" in oracle.lost(rows("alone", ALONE)).columns


def test_the_figure_has_a_row_a_stage_and_a_panel_a_control():
    found = oracle.told(pd.concat([rows("prompt", [0.9, 0.7] * 4, "baseline"), rows("alone", ALONE), rows("end", END)]))
    figure = figures.evidence_by_stage(found, "made up")
    assert [text.split("<br>")[0] for text in figure.layout.yaxis.ticktext] == [
        "the evidence in the prompt", "it is written, alone", "asked at the end of the"]
    drawn = {(trace.xaxis, round(trace.y[0])): (trace.x[0], trace.error_x.array[0], trace.error_x.arrayminus[0])
             for trace in figure.data if trace.x[0] is not None}
    panel, place = dict(neighbour="x", other="x2"), dict(prompt=0, alone=1, end=2)
    assert set(drawn) == {(panel[row.against], place[row.stage]) for row in found.itertuples()}
    for row in found.itertuples():
        assert drawn[panel[row.against], place[row.stage]] == pytest.approx((row.effect, row.high - row.effect, row.effect - row.low))
    assert [trace.name for trace in figure.data if trace.x[0] is None] == ["M.6 Slots, 1×"]
    far = found.assign(**{side: found[side] * 5 ** (found["method"] == "baseline") for side in ("effect", "low", "high")})
    beside = figures.evidence_by_stage(far, "made up")
    assert len(beside.data) == len(figure.data) - 2  # the prompt's two dots are written: nobody could tell the others apart
    assert [note.text[:13] for note in beside.layout.annotations if "→" in note.text] == ["<b>+2.000</b>", "<b>+4.000</b>"]
    text = found[found["method"] == "baseline"].assign(method="slot", stage="text")
    both = figures.evidence_by_stage(pd.concat([far, text.assign(effect=3.0, low=2.9, high=3.1)]), "made up")
    assert len(both.data) == len(beside.data) and len([note for note in both.layout.annotations if "→" in note.text]) == 4
    with pytest.raises(ValueError, match="one row a method"):
        figures.evidence_by_stage(pd.concat([found, found]), "made up")
    with pytest.raises(ValueError, match="unknown later"):
        figures.evidence_by_stage(found.assign(stage="later"), "made up")


def test_the_crowding_figure_has_a_line_a_method_and_the_share_of_the_evidence():
    half = [gain / 2 for gain in ALONE]
    found = pd.concat([rows("after", half), rows("alone", ALONE), rows("after-1", half), rows("alone", ALONE, "hebbian"),
                       rows("after-4", half, "hebbian")])
    table = oracle.told(found).query("against == 'other'")
    assert not [trace for trace in figures.crowding(table, "made up").data if trace.line.dash == "dash"]  # nothing says a share
    table = table.assign(share=[dict(alone=1, **{"after-4": 0.25})[row.stage] if row.method == "hebbian" else math.nan
                                for row in table.itertuples()])
    figure = figures.crowding(table, "made up", gamma=0.5)
    assert list(figure.layout.xaxis.ticktext) == ["0", "1", "4", "all"]
    solid = {trace.name: trace for trace in figure.data if trace.mode == "lines+markers"}
    assert {name: [round(x) for x in trace.x] for name, trace in solid.items()} == {
        "M.6 Slots, 1×": [0, 1, 3], "M.4 Hebbian, 1×": [0, 2]}
    assert list(solid["M.6 Slots, 1×"].y) == pytest.approx([0.3, 0.15, 0.15])
    dashed, = (trace for trace in figure.data if trace.line.dash == "dash" and trace.x[0] is not None)  # slots share no rows
    assert list(dashed.y) == pytest.approx([0.3, 0.075])
    with pytest.raises(ValueError, match="one row a method, capacity and stage"):
        figures.crowding(pd.concat([table, table]), "made up")
    with pytest.raises(ValueError, match="unknown end"):
        figures.crowding(table.assign(stage="end"), "made up")


def test_the_share_of_a_turn_is_that_of_the_writes(backbone, states, talks):
    """Of the weights by which a rule adds all turns up: 1 in all, and the newest of very many 1 - gamma."""
    ones = [1] * 30
    assert oracle.share(0.9, ones, range(30)) == pytest.approx(1) and oracle.share(0.95, [7], [0]) == 1
    assert oracle.share(0.95, [1] * 1000, [999]) == pytest.approx(0.05) and oracle.share(0, ones, [28]) == 0
    assert oracle.share(1, ones, [3, 7]) == pytest.approx(2 / 30)
    assert oracle.share(0.5, [4, 6], [0]) == pytest.approx(4 * 0.5 / (4 * 0.5 + 6))
    model, H = MemoryModel(backbone, "hebbian", gamma=0.8), states[talks[0].id][0]
    model.state["M"].zero_()
    once = model.write_hidden([H])["M"].clone()
    five = model.write_hidden([H] * 4)["M"]  # the same turn five times: the newest is its share of the sum
    torch.testing.assert_close(once, oracle.share(0.8, [1] * 5, [4]) * five)
    bank = MemoryModel(backbone, "kv_extension", gamma=0.8)  # rule 1 adds a turn's tokens up, evenly where it attends to all alike
    bank.adapter.write_Q.zero_()
    bank.state["P"].zero_()
    first, second = states[talks[0].id][0], states[talks[0].id][1]
    P = bank.write_hidden([first, second])["P"][0]
    means = torch.stack([H.mean(dim=0) @ bank.adapter.write_V for H in (first, second)])  # (2, d)
    found = torch.linalg.lstsq(means.T, P[:, None]).solution[:, 0]
    torch.testing.assert_close(found / found.sum(), torch.tensor([oracle.share(0.8, [len(first), len(second)], [i]) for i in (0, 1)]),
                               rtol=1e-3, atol=1e-4)


def test_the_shares_are_of_the_turns_that_a_stage_writes(talks):
    one = of_several_turns(talks[0])
    own, sizes = oracle.evidence_turns(talks[0], one[2]), {talks[0].id: [1 + i % 3 for i in range(len(talks[0].turns))]}
    size = sizes[talks[0].id]
    assert oracle.shares([one], sizes, "alone", 0.5) == pytest.approx([1.0])
    assert oracle.shares([one], sizes, "end", 1) == pytest.approx([sum(size[turn] for turn in own) / sum(size)])
    upto = size[: own[-1] + 1]
    assert oracle.shares([one], sizes, "after", 1) == pytest.approx([sum(size[turn] for turn in own) / sum(upto)])


def test_a_question_that_stands_twice_is_asked_twice(backbone, talks):
    """LoCoMo has some: each is a row of its own."""
    twice = [replace(c, questions=c.questions + c.questions[:2]) for c in talks]
    table = oracle.ask(MemoryModel(backbone, "slot"), twice, "alone", progress=False, autocast=False).assign(seed=42)
    assert not table.duplicated(["conversation", "number"]).any() and len(oracle.told(table)) == 2


def test_one_conversation_has_no_other_and_a_question_that_is_too_long_is_named(backbone, talks):
    table = oracle.ask(MemoryModel(backbone, "slot"), talks[:1], "alone", max_asked=3, progress=False, autocast=False)
    assert table["logp_other"].isna().all() and table["logp_other"].dtype == float and table["logp_neighbour"].notna().all()
    long = replace(oracle.answerable(talks[:1])[0][2], question="why? " * backbone.max_tokens)
    asked = [replace(talks[0], questions=(*talks[0].questions[1:], long))]
    for work in (oracle.train, oracle.ask):
        with pytest.raises(ValueError, match="fit"):
            work(MemoryModel(backbone, "slot"), asked, "alone", progress=False)
