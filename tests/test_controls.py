"""The controls of an evaluation, with fake models whose memory is known: recall, style and noise are told apart."""

import dataclasses
import hashlib

import numpy as np
import pandas as pd
import pytest
import torch

import pdmem_lib as pdmem
from pdmem_lib import estimates
from pdmem_lib.evaluation import MEMORIES, random_bank, shuffled_bank
from pdmem_lib.memory import MemoryModel
from pdmem_lib.prompts import AnswerScore
from pdmem_lib.methods import METHODS
from pdmem_lib.states import encode_all, final_bank


@pytest.fixture(scope="module")
def conversations():
    """Three talks whose questions name their conversation, so that a fake model knows where it is."""
    talks = pdmem.synthetic_conversations(3, 6, seed=5)
    return [dataclasses.replace(c, questions=tuple(
        dataclasses.replace(q, question=f"{c.id}: {q.question}") for q in c.questions)) for c in talks]


class Planted(MemoryModel):
    """Knows a fraction ``recall`` of the answers from the right bank and none from any other; any bank brings ``style``
    nats; every question under every memory gets noise of its own."""

    def __init__(self, backbone, conversations, recall=0.0, style=0.0, noise=0.3, seed=0):
        super().__init__(backbone, "slot", num_entries=8, top_k=2)
        self.recall, self.style, self.noise, self.noise_seed = recall, style, noise, seed
        states = encode_all(backbone, conversations, progress=False)
        self.owner = {self.key(final_bank(self, c, states[c.id])): c.id for c in conversations}
        self.gold = {q.question: q.answer for c in conversations for q in c.questions}

    @staticmethod
    def key(state) -> bytes:
        return state["P"].numpy().tobytes()

    def draw(self, *what) -> np.random.Generator:
        return np.random.default_rng(int.from_bytes(hashlib.sha256(repr((self.noise_seed, *what)).encode()).digest()[:8]))

    def knows(self, question, memory) -> bool:
        own = isinstance(memory, dict) and question.startswith(f"{self.owner.get(self.key(memory))}: ")
        return own and self.draw("knows", question).random() < self.recall

    def answers_under(self, memories, questions, max_new_tokens=24, batch_size=32, on_batch=None, contexts=None, drafts=None):
        return [[self.gold[q] if self.knows(q, memory) else "zzz" for q in questions] for memory in memories]

    def scores_under(self, memories, questions, answers, contexts=None, batch_size=None, on_batch=None):
        values = [[self.log_prob(q, memory) for q in questions] for memory in memories]
        return AnswerScore(torch.tensor(values), torch.ones(len(memories), len(questions)))

    def log_prob(self, question, memory) -> float:
        # noise by the bank's signs, not its bytes: those differ in the last bits from one processor to another, and one
        # draw in twenty lies outside its interval
        bank = np.packbits(memory["P"].numpy() > 0).tobytes() if isinstance(memory, dict) else memory.encode()
        return (-4 + self.noise * self.draw(bank, question).normal() + 2.0 * self.knows(question, memory)
                + self.style * isinstance(memory, dict))


def measured(model, conversations):
    result = pdmem.evaluate(model, conversations, knowledge_points=2, progress=False)
    table = result.per_question.assign(method="slot", capacity=1, seed=42)
    return result, estimates.estimates(table, resamples=500).set_index(["contrast", "score"])


@pytest.fixture(autouse=True)
def no_turns(monkeypatch):
    """Fake models have no attention; where it points is tested elsewhere, with real ones."""
    monkeypatch.setattr("pdmem_lib.provenance.find_turns", lambda *_, **__: pd.DataFrame())


@pytest.mark.parametrize("recall", [0.2, 0.6])
def test_known_recall_is_measured_within_its_interval(tiny, conversations, recall):
    model = Planted(tiny, conversations, recall=recall)
    result, found = measured(model, conversations)
    truth = np.mean([model.draw("knows", q).random() < recall for q in model.gold])  # of these questions
    assert len(model.gold) == len(result.per_question) > 60
    for score, value in (("f1", 100 * truth), ("logp", 2 * truth)):
        row = found.loc[("own - other", score)]
        assert row["low"] < value < row["high"] and row["low"] > 0
        assert row["effect"] == pytest.approx(value, abs=1e-9 if score == "f1" else 0.15)
    assert found.loc[estimates.PRIMARY, "verdict"] == result.verdict() == estimates.REMEMBERS
    assert result.estimates()["effect"].tolist() == found["effect"].tolist()


def test_style_alone_is_not_memory(tiny, conversations):
    result, found = measured(Planted(tiny, conversations, style=1.5), conversations)
    assert found.loc[("own - zero", "logp"), "low"] > 1.3  # the published control takes the style away as well
    for control in ("other", "random", "initial"):
        row = found.loc[(f"own - {control}", "logp")]
        assert row["low"] < 0 < row["high"] and abs(row["effect"]) < 0.1
    assert found.loc[estimates.PRIMARY, "verdict"] == result.verdict() == estimates.UNTOLD


def test_one_conversation_cannot_tell(tiny, conversations):
    result = pdmem.evaluate(Planted(tiny, conversations, recall=0.5), conversations[:1], knowledge_points=2, progress=False)
    assert result.verdict() == estimates.UNTOLD and result.per_question["f1_other"].isna().all()


def test_noise_alone_cannot_be_told(tiny, conversations):
    verdicts = [measured(Planted(tiny, conversations, noise=1.0, seed=seed), conversations)[1]
                .loc[estimates.PRIMARY, "verdict"] for seed in range(10)]
    assert verdicts.count(estimates.UNTOLD) >= 9


@pytest.mark.parametrize("method", [*METHODS, "baseline"])
def test_every_memory_is_what_it_is_called(tiny, model, conversations, method):
    """Each column again, question by question, with a state made here; the shuffled bank is the own one to a set."""
    m = model(method)
    with torch.no_grad():
        for number, p in enumerate(m.parameters()):  # away from the silent start
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number)))
    table = pdmem.evaluate(m, conversations, questions_per_bucket=1, progress=False, autocast=False).per_question
    for memory in MEMORIES:
        assert table[f"f1_{memory}"].isna().all() == table[f"logp_{memory}"].isna().all()
    if method == "baseline":
        assert all((table[f"logp_{memory}"] == table["logp_off"]).all() for memory in MEMORIES)
        return
    states = encode_all(tiny, conversations, progress=False, autocast=False)
    final = {c.id: final_bank(m, c, states[c.id]) for c in conversations}
    for row in table.itertuples():
        def logp(memory, q=row):
            score = m.score([q.question], [q.answer], memory)
            return (score.log_prob / score.tokens).item()

        strangers = [state for id, state in final.items() if id != row.conversation]
        own, p0 = final[row.conversation], m.adapter.initial_state()
        assert row.logp_own == pytest.approx(logp(own), abs=1e-4)
        assert row.logp_zero == pytest.approx(logp("zero"), abs=1e-4)
        assert row.logp_off == pytest.approx(logp("off"), abs=1e-4)
        assert row.logp_initial == pytest.approx(logp(p0), abs=1e-4)
        assert row.logp_other == pytest.approx(np.mean([logp(state) for state in strangers]), abs=1e-4)
        assert row.logp_random == pytest.approx(logp(random_bank(own, 42)), abs=1e-4)
        if m.adapter.entries_are_a_set:
            assert row.logp_shuffled == pytest.approx(row.logp_own, abs=1e-4)
    assert table["logp_shuffled"].isna().all() != m.adapter.entries_are_a_set
    spread = table[["logp_own", "logp_zero", "logp_off", "logp_other"]].std(axis=1)
    assert (spread > 1e-3).any()  # the adapter does read: the columns differ


@pytest.mark.parametrize("capacity", [1, 10])
@pytest.mark.parametrize("method", METHODS)
def test_asked_together_is_asked_alone(model, method, capacity):
    """Several memories in one pass give each the answers and log-probabilities that it gives alone."""
    m = model(method, capacity)
    with torch.no_grad():
        for number, p in enumerate(m.parameters()):
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number)))
    questions = ["Who sings?", "What did Ann buy at the market on Friday?", "When?"]
    gold = ["Bob", "three apples", "on Friday"]
    memories = [m.write(f"Ann: I bought {what}.") for what in ("apples", "a very old car")] + ["zero"]
    together = m.answers_under(memories, questions, max_new_tokens=5)
    score = m.scores_under(memories, questions, gold)
    assert score.log_prob.shape == (3, 3) and len({tuple(log_prob.tolist()) for log_prob in score.log_prob}) == 3
    for memory, answers, log_prob in zip(memories, together, score.log_prob, strict=True):
        assert answers == m.answer(questions, 5, memory)
        torch.testing.assert_close(log_prob, m.score(questions, gold, memory).log_prob, rtol=1e-4, atol=1e-4)
    reads, read = m.adapter.read_each, []
    m.adapter.read_each = lambda *given: read.append(given) or reads(*given)
    seen = []
    few = m.scores_under(memories, questions, gold, batch_size=2, on_batch=seen.append)
    torch.testing.assert_close(few.log_prob, score.log_prob, rtol=1e-4, atol=1e-4)
    assert torch.equal(few.tokens, score.tokens) and seen == [2, 1]
    assert len(read) == (2 if m.adapter.needs_inputs else 1)  # else both passes share what the first one read
    with pytest.raises(ValueError, match="ask it alone"):
        m.answers_under(["own", "off"], questions)


@pytest.mark.parametrize("method", METHODS)
def test_a_random_bank_keeps_the_norms_and_a_shuffled_one_the_entries(model, method):
    ((name, own),) = model(method).state.items()
    random, shuffled = random_bank({name: own}, 1)[name], shuffled_bank({name: own}, 1)[name]
    torch.testing.assert_close(random.norm(dim=1), own.norm(dim=1))
    assert torch.nn.functional.cosine_similarity(random.flatten(), own.flatten(), dim=0).abs() < 0.1
    assert not torch.equal(shuffled, own)
    torch.testing.assert_close(shuffled.sort(dim=0).values, own.sort(dim=0).values, rtol=0, atol=0)
    assert torch.equal(random, random_bank({name: own}, 1)[name])


def test_an_adapter_without_memory_to_read_is_measured_on_its_initial_state(model, conversations):
    m = model("kv_extension")
    with torch.no_grad():
        m.adapter.gate.fill_(0.5)
    result = pdmem.evaluate(m, conversations, questions_per_bucket=2, memory="initial", progress=False, autocast=False)
    table = result.per_question
    score = m.score([table["question"][0]], [table["answer"][0]], m.adapter.initial_state())
    assert table["logp_own"][0] == pytest.approx((score.log_prob / score.tokens).item(), abs=1e-4)
    assert (table["logp_other"] == table["logp_own"]).all() and (table["logp_zero"] != table["logp_own"]).any()
    assert result.turns.empty and result.summary()["logp_other"].notna().all()


def test_what_a_question_costs(model, conversations):
    def cost(method, **overrides):
        table = pdmem.evaluate(model(method, **overrides), conversations[:1], questions_per_bucket=1, knowledge_points=2,
                               max_new_tokens=2, progress=False)
        return table.per_question[["tokens", "seconds", "bytes"]].mean()

    small, large, none = cost("slot", num_entries=8), cost("slot", num_entries=40), cost("baseline")
    assert large["tokens"] - small["tokens"] == 32 and small["tokens"] - none["tokens"] == 8
    assert large["bytes"] == 5 * small["bytes"] > 0 == none["bytes"]
    assert small["seconds"] > 0
    assert cost("hebbian", d_h=16)["tokens"] == 2 * none["tokens"] and cost("hebbian", d_h=16)["bytes"] == 4 * 16 * 16


@pytest.mark.parametrize("method", ["slot", "hebbian"])
def test_what_is_not_answered_is_scored_all_the_same(model, conversations, method):
    m = model(method)
    with torch.no_grad():
        for number, p in enumerate(m.parameters()):
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number)))
    settings = dict(questions_per_bucket=2, knowledge_points=2, progress=False, autocast=False)
    whole = pdmem.evaluate(m, conversations, **settings)
    part = pdmem.evaluate(m, conversations, answered=("own", "zero", "off"), **settings)
    for memory in MEMORIES:
        for kind in ("f1", "logp", "answer"):
            ours, theirs = part.per_question[f"{kind}_{memory}"], whole.per_question[f"{kind}_{memory}"]
            if kind == "logp" or memory in ("own", "zero", "off"):
                assert ours.equals(theirs)
            else:
                assert ours.isna().all()
    assert part.verdict() == whole.verdict() and len(part.estimates()) <= len(whole.estimates())
    with pytest.raises(ValueError, match="answered"):
        pdmem.evaluate(m, conversations, answered=("own",))
