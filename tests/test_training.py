"""Training, evaluation and a run's parameters: columns, protocol, what is refused, and what is left alone."""

import dataclasses
import logging
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import pdmem_lib as pdmem
from pdmem_lib import evaluation as evaluations
from pdmem_lib import metrics
from pdmem_lib.files import load_json, save_json
from pdmem_lib.evaluation import EvaluateSettings, sample_questions
from pdmem_lib.experiment import PRESETS
from pdmem_lib.locomo import parse
from pdmem_lib.training import TrainSettings, epoch_batches, _schedule

QUIET = dict(progress=False, autocast=False)
FEW = dict(max_new_tokens=3, **QUIET)


@pytest.fixture(scope="module")
def tiny():
    """One family: the protocol knows none (that both train is tested in test_methods)."""
    return pdmem.load_backbone("tiny-gpt2")


@pytest.fixture(scope="module")
def conversations():
    return pdmem.synthetic_conversations(3, 3, seed=1, turns_per_session=8)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PDMEM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def small(model, method, **overrides):
    return model(method, **dict(num_entries=16, d_h=16) | overrides)


# ---- train -----------------------------------------------------------------------------------------------------------


def test_history_has_a_row_a_step(model, conversations):
    m = small(model, "slot")
    history = pdmem.train(m, conversations, epochs=2, batch_size=4, lr=1e-2, warmup_steps=2, **QUIET)
    assert list(history) == ["step", "epoch", "loss", "lr", "grad_norm", "seconds"]
    steps = 2 * sum(math.ceil(len(c.questions) / 4) for c in conversations)
    assert history["step"].tolist() == list(range(steps))
    assert history["epoch"].tolist() == [0] * (steps // 2) + [1] * (steps // 2)
    assert np.isfinite(history.drop(columns="step")).all(axis=None)
    assert history["seconds"].is_monotonic_increasing
    assert history["lr"].tolist() == pytest.approx([1e-2 * _schedule(step, 2, steps) for step in range(steps)])
    assert history["lr"].iloc[0] == pytest.approx(5e-3) and history["lr"].iloc[2] == pytest.approx(1e-2)


def test_schedule_by_hand():
    assert [_schedule(step, 4, 12) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert _schedule(4, 4, 12) == 1.0 and _schedule(8, 4, 12) == pytest.approx(0.5)
    assert _schedule(12, 4, 12) == pytest.approx(0) and _schedule(0, 0, 2) == 1.0
    assert _schedule(1, 200, 10) == 0.01  # a short run stays in its warm-up


@pytest.mark.parametrize("method", pdmem.METHODS)
def test_loss_falls_on_a_toy(model, conversations, method):
    history = pdmem.train(small(model, method), conversations[:1], epochs=6, batch_size=8, lr=3e-2, warmup_steps=0, **QUIET)
    by_epoch = history.groupby("epoch")["loss"].mean()
    # soft tokens pass through the frozen blocks, of random weights here: little that they say gets through
    assert by_epoch.iloc[-1] < by_epoch.iloc[0] - (0.05 if method == "prefix" else 0.5)
    assert by_epoch.iloc[0] < 1.5 * math.log(257) + 2  # nats a token, not a sum


def test_training_leaves_state_and_backbone_alone(tiny, model, conversations):
    m = small(model, "kv_extension")
    m.write("Ada: I adopted a cat.")
    state, kept = m.state, m.state["P"].clone()
    frozen = {name: weight.clone() for name, weight in tiny.model.state_dict().items()}
    before = [p.detach().clone() for p in m.parameters()]
    pdmem.train(m, conversations[:1], epochs=1, max_questions=8, lr=1e-2, warmup_steps=0, progress=False, autocast=True)
    assert m.state is state and torch.equal(m.state["P"], kept)
    assert all(torch.equal(weight, frozen[name]) for name, weight in tiny.model.state_dict().items())
    assert any(not torch.equal(p, b) for p, b in zip(m.parameters(), before, strict=True))
    assert all(p.dtype == torch.float32 for p in m.parameters())


def test_each_step_reads_the_bank_of_its_own_questions(model, conversations, monkeypatch):
    m = small(model, "slot")
    banks = {c.id: m.write([str(turn) for turn in c.turns]) for c in conversations if m.reset()}
    of = {(q.question, q.answer): c.id for c in conversations for q in c.questions}
    loss, asked = m.loss, []

    def spy(questions, answers, memory):
        (id,) = {of[pair] for pair in zip(questions, answers, strict=True)}
        torch.testing.assert_close(memory["P"], banks[id]["P"], rtol=1e-4, atol=1e-4)
        asked.extend(zip(questions, answers, strict=True))
        return loss(questions, answers, memory)

    monkeypatch.setattr(m, "loss", spy)
    pdmem.train(m, conversations, epochs=1, batch_size=4, **QUIET)
    assert sorted(asked) == sorted((q.question, q.answer) for c in conversations for q in c.questions)


def test_max_questions_trains_on_a_seeded_sample(model, conversations, monkeypatch):
    def asked(seed):
        m, questions = small(model, "slot"), []
        loss = m.loss
        monkeypatch.setattr(m, "loss", lambda q, a, memory: (questions.extend(q), loss(q, a, memory))[1])
        pdmem.train(m, conversations, epochs=2, max_questions=6, batch_size=2, seed=seed, **QUIET)
        return questions

    first = asked(1)
    assert len(first) == 12 and sorted(first[:6]) == sorted(first[6:])
    assert asked(1) == first and sorted(asked(2)) != sorted(first)


@pytest.mark.parametrize("generator", [None, 0])
def test_batches_hold_one_conversation_and_every_question_once(generator):
    generator = None if generator is None else torch.Generator().manual_seed(generator)
    ids = ["a"] * 37 + ["b"] * 5 + ["a"] * 3
    lengths = [(7 * i) % 23 for i in range(len(ids))]
    batches = epoch_batches(ids, lengths, 4, generator)
    assert sorted(i for batch in batches for i in batch) == list(range(len(ids)))
    assert all(len({ids[i] for i in batch}) == 1 and len(batch) <= 4 for batch in batches)
    assert len(batches) == len(epoch_batches(ids, lengths, 4, None))  # what the schedule counts on
    if generator is not None:
        assert epoch_batches(ids, lengths, 4, generator) != batches  # another epoch, another order
        spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches]
        assert np.mean(spread) < 6  # near-equal lengths, where 23 are possible


def test_the_gradient_is_clipped(model, conversations, monkeypatch):
    norms = []
    step = torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        norms.append(math.sqrt(sum(float(p.grad.square().sum()) for g in self.param_groups for p in g["params"])))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    history = pdmem.train(small(model, "gated"), conversations[:1], epochs=1, clip=1e-3, batch_size=8, **QUIET)
    assert history["grad_norm"].max() > 1e-3  # what is written down is the norm before clipping
    assert len(norms) == len(history) and max(norms) <= 1e-3 * 1.01


def test_the_baseline_trains_nothing(model, conversations):
    history = pdmem.train(model("baseline"), conversations, **QUIET)
    assert len(history) == 0 and list(history) == ["step", "epoch", "loss", "lr", "grad_norm", "seconds"]


def test_no_questions_is_an_error(model, conversations):
    silent = [dataclasses.replace(conversations[0], questions=())]
    for nothing in ([], silent):
        with pytest.raises(ValueError, match="no question to train on"):
            pdmem.train(model("slot"), nothing, **QUIET)
        with pytest.raises(ValueError, match="no question to ask"):
            pdmem.evaluate(model("slot"), nothing, **QUIET)


# ---- settings --------------------------------------------------------------------------------------------------------


def test_defaults_are_the_protocol():
    s = TrainSettings()
    assert (s.epochs, s.batch_size, s.lr, s.weight_decay, s.warmup_steps, s.clip, s.seed, s.max_questions) == (
        10, 16, 1e-4, 1e-2, 200, 1.0, 42, None)
    e = EvaluateSettings()
    assert (e.max_new_tokens, e.questions_per_bucket, e.knowledge_points) == (24, None, None)


@pytest.mark.parametrize("wrong, message", [
    (dict(epoch=3), "unknown setting 'epoch': known are epochs, batch_size"),
    (dict(epochs="3"), "epochs='3' is a str, expected int"),
    (dict(epochs=3.0), "epochs=3.0 is a float, expected int"),
    (dict(epochs=True), "epochs=True is a bool"),
    (dict(lr="1e-4"), "lr='1e-4' is a str, expected float"),
    (dict(lr=True), "lr=True is a bool"),
    (dict(max_questions=1.5), "max_questions=1.5 is a float, expected int or NoneType"),
    (dict(epochs=0), "epochs and batch_size must be at least 1"),
    (dict(lr=0), "lr and clip must be above 0"),
    (dict(lr=float("nan")), "lr and clip must be above 0"),
    (dict(warmup_steps=-1), "cannot be negative"),
    (dict(max_questions=0), "max_questions must be at least 1"),
    (dict(progress=1), "progress=1 is a int, expected bool"),
])
def test_bad_training_settings_say_the_mend(model, conversations, wrong, message):
    with pytest.raises(ValueError, match=message):
        pdmem.train(model("slot"), conversations, **wrong)


@pytest.mark.parametrize("wrong, message", [
    (dict(points=2), "unknown setting 'points'"), (dict(max_new_tokens="24"), "is a str, expected int"),
    (dict(max_new_tokens=0), "at least 1"), (dict(questions_per_bucket=0), "at least 1, or None"),
    (dict(knowledge_points=1), "at least 2"),
])
def test_bad_evaluation_settings_say_the_mend(model, conversations, wrong, message):
    with pytest.raises(ValueError, match=message):
        pdmem.evaluate(model("slot"), conversations, **wrong)


def test_settings_cannot_be_changed_and_an_int_passes_for_a_float():
    s = TrainSettings(lr=1)
    assert s.lr == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        s.lr = 2


# ---- evaluate --------------------------------------------------------------------------------------------------------

COLUMNS = {"conversation", "question", "answer", "category", "lag", "f1_own", "f1_zero", "f1_other", "f1_off", "logp_own",
           "logp_zero", "logp_other", "logp_off", "answer_own", "answer_zero"}


@pytest.mark.parametrize("method", pdmem.REGISTRY)
def test_columns_and_numbers_of_an_evaluation(model, conversations, method):
    m = small(model, method)
    pdmem.train(m, conversations[:1], epochs=1, max_questions=8, lr=3e-2, warmup_steps=0, **QUIET)
    m.write("Ada: this is nobody's conversation.")
    state, kept = m.state, {name: t.clone() for name, t in m.state.items()}
    result = pdmem.evaluate(m, conversations[:2], questions_per_bucket=6, **FEW)
    assert m.state is state and all(torch.equal(m.state[name], t) for name, t in kept.items())

    table = result.per_question
    assert COLUMNS <= set(table)
    assert set(table["conversation"]) == {c.id for c in conversations[:2]}
    asked = {(c.id, q.question, q.answer, q.category, q.lag) for c in conversations[:2] for q in c.questions}
    assert set(table[["conversation", "question", "answer", "category", "lag"]].itertuples(index=False, name=None)) <= asked
    assert not table[list(COLUMNS)].isna().any(axis=None)
    assert table.filter(like="f1_").dropna(axis="columns").stack().between(0, 1).all()
    assert (table.filter(like="logp_").dropna(axis="columns") < 0).all(axis=None)
    for memory in ("own", "zero", "off"):
        assert table[f"f1_{memory}"].tolist() == [
            metrics.token_f1(a, g) for a, g in zip(table[f"answer_{memory}"], table["answer"], strict=True)]
    assert table["retained"].tolist() == (table["f1_own"] - table["f1_zero"]).clip(lower=0).tolist()

    assert list(result.forgetting_curve()) == ["bucket", "lag_low", "lag_high", "n", "raw", "smoothed"]
    assert result.forgetting_curve()["n"].sum() == len(table)
    assert list(result.knowledge_curve()) == ["session", "n", "K"]
    assert result.by_category()["n"].sum() == len(table)
    (summary,) = result.summary().to_dict("records")
    assert summary["n"] == len(table)
    assert summary["adapter_tax"] == pytest.approx(summary["f1_off"] - summary["f1_zero"])
    assert summary["adapter_benefit"] == pytest.approx(summary["f1_own"] - summary["f1_off"])
    assert summary["delta_f1"] == pytest.approx(summary["f1_own"] - summary["f1_zero"])
    if method == "baseline":  # zero by construction
        assert (table["retained"] == 0).all() and (table["f1_own"] == table["f1_off"]).all()
        assert (result.forgetting_curve()["smoothed"].dropna() == 0).all()
        assert summary["delta_f1"] == summary["adapter_tax"] == summary["adapter_benefit"] == 0
        assert (table["logp_own"] == table["logp_off"]).all() and (table["answer_zero"] == table["answer_off"]).all()
    else:
        for other in ("zero", "other", "off"):
            assert (table["logp_own"] - table[f"logp_{other}"]).abs().max() > 1e-6


def test_each_column_is_the_memory_it_is_named_after(model, conversations, own_cache):
    """Every number of the table, recomputed question by question through the public calls."""
    m = small(model, "kv_extension")
    pdmem.train(m, conversations[:1], epochs=2, max_questions=16, lr=3e-2, warmup_steps=0, **QUIET)
    banks = {c.id: m.write([str(turn) for turn in c.turns]) for c in conversations if m.reset()}
    table = pdmem.evaluate(m, conversations, questions_per_bucket=3, batch_size=4, **FEW).per_question

    def logp(row, memory):
        score = m.score([row.question], [row.answer], memory)
        return float(score.log_prob.detach() / score.tokens)

    assert len(set(table["conversation"])) > 1
    by_id = {c.id: c for c in conversations}
    for row in table.itertuples():
        own, others = banks[row.conversation], [bank for id, bank in banks.items() if id != row.conversation]
        assert row.logp_own == pytest.approx(logp(row, own), abs=1e-3)
        assert row.logp_zero == pytest.approx(logp(row, "zero"), abs=1e-3)
        assert row.logp_off == pytest.approx(logp(row, "off"), abs=1e-3)
        assert row.logp_other == pytest.approx(np.mean([logp(row, bank) for bank in others]), abs=1e-3)
        for memory, state in (("own", own), ("zero", "zero"), ("off", "off")):
            assert getattr(row, f"answer_{memory}") == m.answer([row.question], 3, state)[0]
        assert row.locomo_own == metrics.locomo_f1(row.answer_own, row.answer, row.category)
        assert by_id[row.conversation].questions[row.number].question == row.question


def test_a_conversation_of_which_nothing_is_asked(model, conversations):
    """A sample may leave a conversation out: its bank is still another one to the rest."""
    (_, first, *_), quiet = conversations, dataclasses.replace(conversations[0], questions=())
    table = pdmem.evaluate(small(model, "slot"), [quiet, first], questions_per_bucket=2, **FEW).per_question
    assert set(table["conversation"]) == {first.id} and not table[list(COLUMNS)].isna().any(axis=None)


def test_one_conversation_has_no_other(model, conversations):
    table = pdmem.evaluate(small(model, "slot"), conversations[:1], questions_per_bucket=2, **FEW).per_question
    assert table["logp_other"].isna().all() and table["logp_own"].notna().all()


def test_a_question_without_evidence_and_a_number_for_an_answer(model, own_cache):
    turns = [{"speaker": "Ann", "dia_id": f"D1:{i}", "text": f"I have {i} cats."} for i in (1, 2)]
    record = {"sample_id": "c", "conversation": {"session_1": turns}, "qa": [
        {"question": "How many?", "answer": 2, "category": 4, "evidence": []},
        {"question": "And then?", "answer": 2022, "category": 2, "evidence": ["D1:2"]}]}
    result = pdmem.evaluate(small(model, "slot"), parse([record]), **FEW)
    assert result.per_question["lag"].tolist() == [2, 0] and result.per_question["answer"].tolist() == ["2", "2022"]
    assert result.checkpoints["question"].tolist() == [1]  # the first can never count as learnt
    assert len(pdmem.train(small(model, "slot"), parse([record]), epochs=1, **QUIET)) == 1


# ---- the sample ------------------------------------------------------------------------------------------------------


def test_the_sample_is_at_most_so_many_a_bucket_and_the_same_for_all(model, conversations):
    everything = sample_questions(conversations)
    assert len(everything) == sum(len(c.questions) for c in conversations)
    sample = sample_questions(conversations, 4)
    counts = {}
    for _, _, q in sample:
        counts[metrics.bucket_of(q.lag)] = counts.get(metrics.bucket_of(q.lag), 0) + 1
    available = {b.label: sum(metrics.bucket_of(q.lag) == b.label for *_, q in everything) for b in metrics.LAG_BUCKETS}
    assert counts == {label: min(4, n) for label, n in available.items() if n}
    assert all(item in everything for item in sample) and len(set(sample)) == len(sample)
    torch.manual_seed(1)  # of no influence
    asked = [pdmem.evaluate(m, conversations, questions_per_bucket=4, **FEW).per_question[["conversation", "number"]]
             for m in (small(model, "slot"), small(model, "gated", seed=3), model("baseline"))]
    assert all(table.equals(asked[0]) for table in asked)
    assert list(asked[0].itertuples(index=False, name=None)) == [(id, number) for id, number, _ in sample]


# ---- the knowledge curve ---------------------------------------------------------------------------------------------


def talk_of_four_sessions():
    """Sessions 1, 2, 4, 7; question i is answered by the turns it names."""
    conversation = {f"session_{s}": [{"speaker": "Ann", "dia_id": f"D{s}:{i}", "text": f"Fact {s} {i}."} for i in (1, 2)]
                    for s in (1, 2, 4, 7)}
    evidence = [["D1:1"], ["D2:2"], ["D1:2", "D4:1"], ["D7:1"], []]
    qa = [{"question": f"Question {i}?", "answer": f"right{i}", "category": 4, "evidence": e} for i, e in enumerate(evidence)]
    return parse([{"sample_id": "c", "conversation": conversation, "qa": qa}])


def knowing(model, monkeypatch, forgets=()):
    """A model that answers right whatever it is asked under a bank, except ``forgets`` = (session, question) pairs."""
    m = small(model, "slot")
    (conversation,) = talk_of_four_sessions()
    banks, asked = {}, []
    for turns in conversation.sessions:
        banks[turns[0].session] = {name: t.clone() for name, t in m.write([str(turn) for turn in turns]).items()}
    m.reset()

    def session_of(memory):
        return next((s for s, bank in banks.items() if torch.allclose(bank["P"], memory["P"], rtol=1e-4, atol=1e-5)), None)

    def answers_under(memories, questions, *_, **__):
        return [answer(questions, memory) for memory in memories]

    def answer(questions, memory):
        if not isinstance(memory, dict) or session_of(memory) is None:  # a control: zero, initial, random, shuffled
            return ["nothing"] * len(questions)
        numbers = [int(q[9]) for q in questions]
        asked.extend((session_of(memory), i) for i in numbers)
        return ["nothing" if (session_of(memory), i) in forgets else f"right{i}" for i in numbers]

    monkeypatch.setattr(m, "answers_under", answers_under)
    return m, asked


def test_knowledge_counts_only_what_was_said_so_far(model, monkeypatch, own_cache):
    m, asked = knowing(model, monkeypatch, forgets={(2, 0), (7, 1)})
    result = pdmem.evaluate(m, talk_of_four_sessions(), **FEW)
    points = result.checkpoints[["session", "question", "f1"]].itertuples(index=False, name=None)
    assert sorted(points) == [(1, 0, 1.0), (2, 0, 0.0), (2, 1, 1.0), (4, 0, 1.0), (4, 1, 1.0), (4, 2, 1.0),
                              (7, 0, 1.0), (7, 1, 0.0), (7, 2, 1.0), (7, 3, 1.0)]
    curve = result.knowledge_curve()
    assert curve["session"].tolist() == [1, 2, 4, 7] and curve["n"].tolist() == [1, 2, 3, 4]
    assert curve["K"].tolist() == [100, 50, 100, 75]
    assert result.summary()["delta_k"][0] == pytest.approx(-25)
    # at the end everything is asked once, the question without evidence too, and no checkpoint asks it again
    assert sorted(i for session, i in asked if session == 7) == [0, 1, 2, 3, 4]
    assert sorted(set(asked)) == sorted(asked)


def test_knowledge_points_are_spread_from_the_first_session_to_the_last(model, monkeypatch, own_cache):
    m, asked = knowing(model, monkeypatch)
    result = pdmem.evaluate(m, talk_of_four_sessions(), knowledge_points=2, **FEW)
    assert result.knowledge_curve()["session"].tolist() == [1, 7]
    assert {session for session, _ in asked} == {1, 7}


def test_a_shorter_conversation_keeps_its_last_bank_on_the_curve(model, own_cache):
    long, short = pdmem.synthetic_conversations(1, 3, seed=1, turns_per_session=8) + pdmem.synthetic_conversations(
        1, 2, seed=2, turns_per_session=8)
    result = pdmem.evaluate(small(model, "slot"), [long, short], **FEW)
    table, points = result.per_question.set_index(["conversation", "number"]), result.checkpoints
    at_the_end = points[(points["session"] == 3) & (points["conversation"] == short.id)]
    learnt = [number for number, q in enumerate(short.questions) if q.evidence]
    assert sorted(at_the_end["question"]) == learnt
    assert at_the_end["f1"].tolist() == [table.loc[(short.id, number), "f1_own"] for number in at_the_end["question"]]


# ---- the frozen model's part -----------------------------------------------------------------------------------------


def test_the_frozen_model_is_asked_once_for_all_methods(model, conversations, own_cache, monkeypatch, caplog):
    calls = []
    answers_under = pdmem.MemoryModel.answers_under
    monkeypatch.setattr(pdmem.MemoryModel, "answers_under", lambda self, memories, *rest, **more: (
        calls.extend(m if isinstance(m, str) else "bank" for m in memories), answers_under(self, memories, *rest, **more))[1])
    first = pdmem.evaluate(small(model, "slot"), conversations[:1], questions_per_bucket=3, **FEW).per_question
    assert calls.count("off") == 1
    for m in (small(model, "gated", seed=2), model("baseline")):
        again = pdmem.evaluate(m, conversations[:1], questions_per_bucket=3, **FEW).per_question
        assert again[["answer_off", "logp_off"]].equals(first[["answer_off", "logp_off"]])
    assert calls.count("off") == 1
    pdmem.evaluate(model("baseline"), conversations[:1], questions_per_bucket=3, **FEW | dict(max_new_tokens=2))
    assert calls.count("off") == 2  # another setting is another question

    for file in (own_cache / "frozen").iterdir():
        file.write_text(file.read_text()[:20])
    with caplog.at_level(logging.WARNING):
        mended = pdmem.evaluate(model("baseline"), conversations[:1], questions_per_bucket=3, **FEW).per_question
    assert "is damaged" in caplog.text and calls.count("off") == 3
    assert mended[["answer_off", "logp_off"]].equals(first[["answer_off", "logp_off"]])


@pytest.mark.parametrize("change", [lambda rows: rows[:-1], lambda rows: [*rows, rows[0]], lambda rows: [row[:1] for row in rows],
                                    lambda rows: [[*row, 1.0] for row in rows], lambda rows: [[row[1], row[0] + "a"] for row in rows],
                                    lambda rows: 1, lambda rows: None, lambda rows: "[]"])
def test_a_cached_file_of_another_make_is_made_again(model, conversations, own_cache, change):
    """Whole and with its checksum, or no object at all."""
    m = model("baseline")
    wanted = pdmem.evaluate(m, conversations[:1], questions_per_bucket=3, **FEW).per_question
    (file,) = (own_cache / "frozen").iterdir()
    rows = change(load_json(file)["rows"])
    file.write_text(rows) if isinstance(rows, str) else save_json(file, {"rows": rows})
    assert pdmem.evaluate(m, conversations[:1], questions_per_bucket=3, **FEW).per_question.equals(wanted)


def test_progress_goes_to_stderr_and_only_when_asked(model, conversations, own_cache, capfd):
    pdmem.train(small(model, "slot"), conversations[:1], epochs=1, max_questions=4, **QUIET)
    pdmem.evaluate(small(model, "slot"), conversations[:1], questions_per_bucket=1, **FEW)
    assert capfd.readouterr() == ("", "")
    pdmem.evaluate(small(model, "slot"), conversations[:1], questions_per_bucket=1, **FEW | dict(progress=True))
    printed = capfd.readouterr()
    assert printed.out == "" and "evaluate slot" in printed.err
    assert "100%" in printed.err


def test_progress_ends_at_all_it_announced(model, conversations, own_cache, monkeypatch):
    bars = []

    class Bar(evaluations.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs | dict(disable=False))
            bars.append(self)

    monkeypatch.setattr(evaluations, "tqdm", Bar)
    for m in (small(model, "slot"), model("baseline")):
        pdmem.evaluate(m, conversations[:2], questions_per_bucket=3, **FEW)
    assert len(bars) == 3 and all(bar.n == bar.total for bar in bars)


# ---- a run's parameters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong, message", [
    (dict(methd="slot"), "unknown setting 'methd': known are backbone, data, method"),
    (dict(capacity="1"), "capacity='1' is a str, expected int"),
    (dict(seed=1.0), "seed=1.0 is a float"),
    (dict(lr="fast"), "lr='fast' is a str, expected float or NoneType"),
    (dict(read_gate=1), "read_gate=1 is a int"),
    (dict(output_dir=None), "output_dir=None"),
    (dict(method="slots"), "unknown method 'slots'"),
    (dict(capacity=3), "unknown capacity 3"),
    (dict(preset="slow"), "unknown preset 'slow': known are smoke, quick, full"),
    (dict(epochs=0), "at least 1"),
    (dict(top_k=100), "top_k must lie between"),
    (dict(gamma=2.0), "gamma is a decay"),
    (dict(knowledge_points=1), "knowledge_points must be at least 2"),
])
def test_an_experiment_refuses_what_it_does_not_know(wrong, message):
    with pytest.raises(ValueError, match=message):
        pdmem.Experiment.from_mapping(wrong)


def test_an_experiments_settings_are_the_presets_unless_given():
    quick = PRESETS["quick"]
    plain = pdmem.Experiment(preset="quick", method="M.6")
    assert plain.method == "slot"
    assert plain.train_settings == TrainSettings(**quick.train) and plain.evaluate_settings == EvaluateSettings(**quick.evaluate)
    own = pdmem.Experiment(preset="quick", lr=0.5, knowledge_points=3, num_entries=9, seed=7, batch_size=5, read_gate=False)
    assert own.train_settings == dataclasses.replace(plain.train_settings, lr=0.5, seed=7, batch_size=5)
    assert own.evaluate_settings == dataclasses.replace(plain.evaluate_settings, knowledge_points=3)
    assert (own.memory_settings.num_entries, own.memory_settings.seed, own.memory_settings.read_gate) == (9, 7, False)
    assert pdmem.Experiment(preset="full").train_settings == TrainSettings()


def test_the_tuned_preset_is_the_full_one_but_for_what_was_chosen():
    full, tuned = PRESETS["full"], PRESETS["tuned"]
    assert (tuned.train, tuned.evaluate, tuned.budgets, tuned.last, tuned.train_conversations) == (
        full.train, full.evaluate, full.budgets, full.last, full.train_conversations)
    for method, chosen in tuned.chosen.items():
        for name in (method, f"{method}.format"):
            a, b = (pdmem.Experiment(method=name, preset=preset) for preset in ("full", "tuned"))
            assert b.train_settings == dataclasses.replace(a.train_settings, **chosen)
            assert (b.evaluate_settings, b.memory_settings) == (a.evaluate_settings, a.memory_settings)
        assert pdmem.Experiment(method=method, preset="tuned", lr=0.5).train_settings.lr == 0.5
    assert any(chosen["lr"] != TrainSettings().lr for chosen in tuned.chosen.values())
    with pytest.raises(ValueError, match="none for slot.lora: choose them first"):
        pdmem.Experiment(method="slot.lora", preset="tuned")


def test_the_tuned_settings_are_those_that_won_on_the_held_out_conversation():
    figures = Path(__file__).parent.parent / "figures"
    table = pd.concat([pd.read_csv(figures / f"rates-smollm2-135m-full-locomo{where}" / "rates.csv") for where in ("", "-h200")])
    for method, chosen in PRESETS["tuned"].chosen.items():
        tried = table[table["method"] == method]
        won = tried.loc[tried["own"] == tried["own"].max(), ["rate", "epochs"]].values.tolist()
        assert won == [[chosen["lr"], chosen["epochs"]]] and len(tried[["rate", "epochs"]].drop_duplicates()) >= 5
        assert chosen["warmup_steps"] / chosen["epochs"] == TrainSettings().warmup_steps / TrainSettings().epochs


def test_what_is_trained_beside_a_method(tiny):
    method, control, lora = (pdmem.Experiment(method=name) for name in ("M.6", "M.6.format", "slot.lora"))
    assert (control.method, lora.method) == ("slot.format", "slot.lora")
    for settings in ("train_settings", "evaluate_settings"):
        assert getattr(control, settings) == dataclasses.replace(getattr(method, settings), memory="initial")
        assert getattr(lora, settings) == getattr(method, settings)
    slot, same, other = (experiment.build(tiny) for experiment in (method, control, lora))
    assert (slot.method, same.method, other.method) == ("slot", "slot", "baseline") and other.state == {}
    assert slot.num_trainable == same.num_trainable == pytest.approx(other.num_trainable, rel=0.05)
    with pytest.raises(ValueError, match="the baseline has no adapter"):
        pdmem.Experiment(method="baseline.lora")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_hold_settings_that_exist(name):
    preset = PRESETS[name]
    TrainSettings.from_mapping(preset.train)
    EvaluateSettings.from_mapping(preset.evaluate)
    assert {*pdmem.METHODS, "baseline"} <= set(preset.methods) or preset.chosen
    assert [pdmem.Experiment(method=method, preset=name).method for method in preset.methods] == list(preset.methods)
