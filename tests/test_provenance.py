"""Provenance over the registry: against contributions kept in full, and rankings against planted readers."""

import math

import numpy as np
import pytest
import torch

import pdmem_lib as pdmem
from pdmem_lib import provenance, write
from pdmem_lib.evaluation import sample_questions
from pdmem_lib.methods import AttentionCoupledBank, HebbianMatrix, Method, SparseSlots
from pdmem_lib.provenance import chance, entry_provenance, find_turns, shares, turn_scores, write_provenance
from pdmem_lib.seam import Branch
from pdmem_lib.states import encode_all, final_bank

READERS = list(pdmem.METHODS)
FAMILIES = {"attention-coupled": "kv_extension", "slots": "slot", "hebbian": "hebbian"}
QUESTIONS = ["What did Ada adopt?", "Who?", "Where does Bob live, and since when?"]


@pytest.fixture(scope="module")
def conversations():
    return pdmem.synthetic_conversations(2, 2, seed=3, turns_per_session=15)


@pytest.fixture(scope="module")
def hidden(tiny, conversations):
    return tiny.encode([str(turn) for turn in conversations[0].turns])


def open_gates(model):
    """``model`` with its gates open, so that it puts attention on memory."""
    if getattr(model.adapter, "gate", None) is not None:
        torch.nn.init.constant_(model.adapter.gate, 0.5)
    return model


def only(state):
    ((_, tensor),) = state.items()
    return tensor


def full_parts(model, hidden):
    """What P_0 and each turn left in the final state, in full (1+N, M, width), and that state: the naive way."""
    state = model.adapter.initial_state()
    parts = [only(state)]
    for H in hidden:
        decay = model.adapter.decay(state, H)[..., None]
        new = model.adapter.write(state, H)
        parts = [decay * part for part in parts] + [only(new) - decay * only(state)]
        state = new
    return torch.stack(parts), only(state)


def increment(adapter, state, H):
    """What a turn adds, straight from its rule; it does not contain the old rows."""
    if isinstance(adapter, AttentionCoupledBank):
        A = write.attention_coupled_weights(state["P"], H, adapter.write_Q, adapter.write_K)
        return A.T @ (H @ adapter.write_V)
    if isinstance(adapter, SparseSlots):
        rows = write.sparse_slot_choice(state["P"], H, adapter.write_a, adapter.settings.top_k)
        added = torch.zeros_like(state["P"])
        added[rows] = (1 - adapter.settings.gamma) * (H.mean(dim=0) @ adapter.write_u)
        return added
    assert isinstance(adapter, HebbianMatrix), "a new write family: add its increment here"
    outer = (H @ adapter.write_K).T @ (H @ adapter.write_V) / len(H)
    return outer / (adapter.settings.gamma * state["M"] + outer).norm().clamp_min(1)


# ---- parts of the state ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loudness", [1, 10])  # at 10 the Hebbian matrix reaches its bound and is divided
@pytest.mark.parametrize("method", READERS)
def test_a_write_is_decay_times_old_plus_an_increment(model, hidden, method, loudness):
    m = model(method)
    state, divided = m.adapter.initial_state(), False
    for H in hidden:
        H = loudness * H
        decay = m.adapter.decay(state, H)
        assert decay.shape in ((), (len(only(state)),)) and (decay >= 0).all() and (decay <= 1).all()
        divided |= decay.ndim == 0 and bool(decay < m.settings.gamma)
        new = m.adapter.write(state, H)
        added = increment(m.adapter, state, H)
        torch.testing.assert_close(only(new), decay[..., None] * only(state) + added, rtol=1e-5, atol=1e-6)
        state = new
    assert divided == (method == "hebbian" and loudness == 10)


@pytest.mark.parametrize("method", READERS)
def test_provenance_equals_contributions_kept_in_full(model, conversations, hidden, method):
    m = model(method)
    parts, state = full_parts(m, hidden)
    torch.testing.assert_close(parts.sum(dim=0), state, rtol=1e-4, atol=1e-5)
    assert torch.equal(state, only(final_bank(m, conversations[0], hidden)))
    before = only(m.state).clone()
    sizes = write_provenance(m, hidden)
    assert sizes.shape == (len(state), 1 + len(hidden)) and torch.equal(only(m.state), before)
    torch.testing.assert_close(sizes, parts.norm(dim=-1).T, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(shares(sizes).sum(dim=1), torch.ones(len(state)))
    torch.testing.assert_close(write_provenance(m, hidden[:1]), full_parts(m, hidden[:1])[0].norm(dim=-1).T)
    assert write_provenance(m, []).shape == (len(state), 1)


def test_slots_hold_nothing_of_turns_that_did_not_write_them(model, hidden):
    m = model("slot", top_k=2)
    sizes = write_provenance(m, hidden)
    state = m.adapter.initial_state()
    for t, H in enumerate(hidden):
        written = write.sparse_slot_choice(state["P"], H, m.adapter.write_a, 2)
        assert sorted(written.tolist()) == (sizes[:, 1 + t] > 0).nonzero()[:, 0].tolist()
        state = m.adapter.write(state, H)
    untouched = sizes[:, 1:].sum(dim=1) == 0
    assert untouched.any() and torch.equal(sizes[untouched, 0], state["P"][untouched].norm(dim=-1))


@pytest.mark.parametrize("method", READERS)
def test_without_a_past_only_the_last_turn_that_wrote_an_entry_is_left(model, hidden, method):
    sizes = write_provenance(model(method, gamma=0.0), hidden)
    assert ((sizes > 0).sum(dim=1) == 1).all()
    if method != "slot":
        assert (sizes[:, -1] > 0).all()


@pytest.mark.parametrize("loudness", [1, 10])
def test_entries_of_a_question_are_traced_through_the_matrix(tiny, model, hidden, loudness):
    m = model("hebbian")
    turns, asked = [loudness * H for H in hidden], tiny.encode(QUESTIONS)
    parts, _ = full_parts(m, turns)
    for sizes, H in zip(entry_provenance(m, turns, asked), asked, strict=True):
        wanted = torch.stack([(m.adapter.queries(H) @ part).norm(dim=-1) for part in parts], dim=1)  # (T, 1+N)
        torch.testing.assert_close(sizes, wanted, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("method", READERS)
def test_a_write_is_what_it_kept_and_what_it_added(model, hidden, method):
    m = model(method)
    states = [m.adapter.initial_state()]
    for H in hidden:
        states.append(m.adapter.write(states[-1], H))
    for begin in (0, 2):
        for t, (state, decay, added) in enumerate(provenance.write_parts(m, hidden[begin:], states[begin]), begin):
            assert torch.equal(only(state), only(states[t + 1])) and added.shape == only(state).shape
            torch.testing.assert_close(decay[..., None] * only(states[t]) + added, only(state), rtol=1e-5, atol=1e-5)
    assert torch.equal(only(next(provenance.write_parts(m, hidden))[0]), only(states[1]))  # from P_0 by itself


def test_methods_that_cannot_be_traced_say_why(model, hidden, monkeypatch):
    with pytest.raises(ValueError, match="baseline keeps 0 tensors"):
        write_provenance(model("baseline"), hidden)
    with pytest.raises(ValueError, match="use write_provenance"):
        entry_provenance(model("slot"), hidden, hidden[:1])
    monkeypatch.setattr(AttentionCoupledBank, "decay", Method.decay)
    with pytest.raises(ValueError, match=r"KV extension does not say .* a decay\(\)"):
        write_provenance(model("kv_extension"), hidden)
    monkeypatch.setattr(HebbianMatrix, "decay", lambda self, state, H: torch.ones(len(state["M"])))
    with pytest.raises(RuntimeError, match="decay differently"):
        entry_provenance(model("hebbian"), hidden, hidden[:1])


# median over turns of |rerun - (state - part)| / |part|: tiny-gpt2 0.12, 0.56, 3e-6; tiny-llama 0.32, 0.89, 2e-6
@pytest.mark.parametrize(("family", "low", "high"),
                         [("attention-coupled", 0.05, 0.5), ("slots", 0.3, 1.2), ("hebbian", 0, 1e-4)])
def test_leaving_a_turn_out_differs_by_how_later_turns_find_their_rows(model, hidden, family, low, high):
    """Writing again with one increment left out (its decay kept) against taking that turn's part away."""
    m = model(FAMILIES[family])
    parts, state = full_parts(m, hidden)
    differences = []
    for left_out in range(len(hidden)):
        rerun = m.adapter.initial_state()
        for t, H in enumerate(hidden):
            kept = {name: m.adapter.decay(rerun, H)[..., None] * old for name, old in rerun.items()}
            rerun = kept if t == left_out else m.adapter.write(rerun, H)
        part = parts[1 + left_out]
        differences.append(float((only(rerun) - (state - part)).norm() / part.norm()))
    assert differences[-1] < 1e-4  # no turn comes after the last one
    assert low <= np.median(differences) <= high


# ---- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [name for name in READERS if name != "hebbian"])
def test_attention_on_an_entry_points_at_the_turn_that_wrote_it(tiny, model, hidden, method):
    sizes = write_provenance(model(method), hidden[:4])
    turn_shares = shares(sizes)[:, 1:]
    wrote = (sizes[:, 1:] > 0).sum(dim=1)
    for entry in (wrote == wrote[wrote > 0].min()).nonzero()[:, 0].tolist():
        attention = torch.zeros(tiny.num_layers, tiny.num_heads, 5, len(sizes))
        attention[1, 2, 3, entry] = 0.25
        scores = turn_scores(attention, turn_shares)
        torch.testing.assert_close(scores, 0.25 * turn_shares[entry].double())
        assert scores.argmax() == sizes[entry, 1:].argmax()
    if method == "slot":  # there are slots that one turn alone wrote
        assert wrote.unique().tolist()[:2] == [0, 1]


def test_scores_by_loops():
    generator = torch.Generator().manual_seed(0)
    attention, turn_shares = (torch.rand(*shape, generator=generator) for shape in ((2, 3, 4, 5), (5, 6)))
    wanted = torch.zeros(6, dtype=torch.float64)
    for l, h, t, m in np.ndindex(2, 3, 4, 5):
        wanted += attention[l, h, t, m].double() * turn_shares[m].double()
    torch.testing.assert_close(turn_scores(attention, turn_shares), wanted)


@pytest.mark.parametrize("method", READERS)
def test_batched_attention_is_the_reported_one(tiny, model, hidden, method):
    m = open_gates(model(method))
    m.write_hidden(hidden)
    texts = [f"{q} {n}" for n in range(4) for q in QUESTIONS]  # more than a batch, of different lengths
    frozen = tiny.encode(texts)
    found = dict(provenance._attention(m, texts, frozen, m.state))
    assert sorted(found) == list(range(len(texts)))
    for i, text in enumerate(texts):
        torch.testing.assert_close(found[i], m.attention_to_memory(text), rtol=1e-3, atol=1e-6)


# ---- ranks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("turns", "evidence"), [(1, 1), (2, 1), (30, 1), (30, 3), (30, 29), (30, 30)])
def test_chance_is_what_random_orders_give(turns, evidence):
    generator = np.random.default_rng(0)
    order = generator.permuted(np.tile(np.arange(1, turns + 1), (20_000, 1)), axis=1)
    simulated = 1 / order[:, :evidence].min(axis=1)
    assert chance(turns, evidence) == pytest.approx(simulated.mean(), abs=4 * simulated.std() / 20_000**0.5 + 1e-12)


def test_chance_by_hand():
    assert chance(3, 1) == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert chance(3, 2) == pytest.approx(2 / 3 * 1 + 1 / 3 * 1 / 2)
    assert chance(680, 1) == pytest.approx(sum(1 / r for r in range(1, 681)) / 680)
    for turns, evidence in ((3, 0), (3, 4)):
        with pytest.raises(ValueError, match="at least one, and no more"):
            chance(turns, evidence)


def test_ranks_by_hand_and_constant_scores_are_at_chance():
    scores = np.array([[9, 5, 5, 5, 1], [2, 2, 2, 2, 2], [0, 0, 0, 0, 0], [1, 2, 3, 4, 5]], dtype=float)
    ranks, reciprocal = provenance._rank_table(scores, [[0], [1], [2, 4], [1, 3]])
    # turn 1 is tied with 2 and 3 behind turn 0: rank 2, 3 or 4; [1, 3] holds two of those three: first is 2 or 3
    assert ranks[0].tolist() == pytest.approx([1, 3, 3, 2 + 1 / 3])
    assert reciprocal[0].tolist() == pytest.approx([1, (1 / 2 + 1 / 3 + 1 / 4) / 3, (1 / 2 + 1 / 3 + 1 / 4) / 3,
                                                    2 / 3 * 1 / 2 + 1 / 3 * 1 / 3])
    assert reciprocal[1].tolist() == pytest.approx([chance(5, 1), chance(5, 1), chance(5, 2), chance(5, 2)], rel=1e-12)
    assert ranks[1].tolist() == pytest.approx([3, 3, 2, 2])
    assert np.isnan(ranks[2]).all() and np.isnan(reciprocal[2]).all()
    assert ranks[3].tolist() == [5, 4, 1, 2]


# ---- does it find the turn -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked(conversations):
    asked = sample_questions(conversations)
    assert len(asked) > 8
    return asked


@pytest.fixture(scope="module")
def states(tiny, conversations):
    return encode_all(tiny, conversations, progress=False, autocast=False)


def find(model, conversations, asked, states):
    return find_turns(model, conversations, asked, states, progress=False, autocast=False)


@pytest.mark.parametrize("method", READERS)
def test_find_turns_by_brute_force(tiny, model, conversations, asked, states, method):
    m = open_gates(model(method))
    table = find(m, conversations, asked, states)
    assert tuple(table.columns) == provenance.COLUMNS and table.attrs["reason"] == ""
    usable = [(id, number, q) for id, number, q in asked if q.evidence]
    assert list(zip(table["conversation"], table["number"], strict=True)) == [(id, number) for id, number, _ in usable]
    for c in conversations:
        parts, bank = full_parts(m, states[c.id])
        mine = [q for id, _, q in usable if id == c.id]
        scores = []
        for q in mine:
            text = pdmem.prompts.PROMPT.format(question=q.question)
            attention = m.attention_to_memory(text, memory={name: bank for name in m.state})
            entries = m.adapter.queries(tiny.encode([text])[0]) @ parts if m.adapter.needs_inputs else parts
            sizes = entries.norm(dim=-1)  # (1+N, M)
            scores.append((attention.sum(dim=(0, 1, 2)) @ (sizes / sizes.sum(dim=0)).T)[1:])
        rows = table[table["conversation"] == c.id].reset_index(drop=True)
        assert (rows["turns"] == len(c.turns)).all() and rows["lag"].tolist() == [q.lag for q in mine]
        for i, q in enumerate(mine):
            turns = [c.turn(id).index for id in q.evidence]
            rank = [1 + int((s > s[turns].max()).sum()) for s in scores]  # no ties between real scores
            assert rows["rank"][i] == pytest.approx(rank[i], abs=1)  # float32 here: neighbours may change places
            assert rows["reciprocal_rank"][i] == pytest.approx(1 / rows["rank"][i])
            assert rows["chance"][i] == pytest.approx(chance(len(c.turns), len(turns)))
            others = np.mean([1 / r for j, r in enumerate(rank) if j != i])
            assert rows["reciprocal_rank_others"][i] == pytest.approx(others, abs=0.05)


def plant(monkeypatch, scores):
    monkeypatch.setattr(provenance, "_conversation_scores", lambda model, questions, *rest: np.array(scores(questions)))


def test_a_reader_that_points_at_the_evidence_is_found_and_constant_ones_are_at_chance(
        model, conversations, asked, states, monkeypatch):
    by_question = {q.question: [c.turn(id).index for id in q.evidence] for c in conversations for q in c.questions}
    N = len(conversations[0].turns)
    plant(monkeypatch, lambda questions: [np.isin(np.arange(N), by_question[q.question]) * 1.0 for q in questions])
    table = find(model(), conversations, asked, states)
    assert (table["rank"] == 1).mean() > 0.5 and table["reciprocal_rank"].mean() == pytest.approx(1)
    assert table["chance"].mean() < 0.4
    by_hand = []  # of this question's evidence under planted scores of another: nearly all turns are tied at zero
    for i, row in table.iterrows():
        c = next(c for c in conversations if c.id == row["conversation"])
        mine = set(by_question[c.questions[row["number"]].question])
        values = []
        for number in table.loc[(table["conversation"] == c.id) & (table.index != i), "number"]:
            theirs = set(by_question[c.questions[number].question])
            shared, above = len(mine & theirs), len(theirs)
            if shared:
                values.append(chance(len(theirs), shared))
            else:
                behind, hits = N - above, len(mine)
                p = [math.comb(behind - j, hits - 1) / math.comb(behind, hits) for j in range(1, behind - hits + 2)]
                values.append(sum(x / (above + j) for j, x in enumerate(p, 1)))
        by_hand.append(np.mean(values))
    np.testing.assert_allclose(table["reciprocal_rank_others"], by_hand)
    assert abs(table["reciprocal_rank_others"].mean() - table["chance"].mean()) < 0.1

    plant(monkeypatch, lambda questions: np.full((len(questions), N), 0.3))
    table = find(model(), conversations, asked, states)
    np.testing.assert_allclose(table["reciprocal_rank"], table["chance"])
    np.testing.assert_allclose(table["reciprocal_rank_others"], table["chance"])


def test_methods_that_read_nothing_say_so(model, conversations, asked, states, monkeypatch, caplog):
    table = find(model("baseline"), conversations, asked, states)
    assert len(table) == 0 and tuple(table.columns) == provenance.COLUMNS
    assert "reports no attention" in table.attrs["reason"] and "reports no attention" in caplog.text

    table = find(model("slot"), conversations, asked, states)  # silent start
    assert len(table) and table[["rank", "reciprocal_rank", "reciprocal_rank_others"]].isna().all(axis=None)
    assert table["chance"].notna().all() and "is it trained?" in table.attrs["reason"]

    monkeypatch.setattr(pdmem.REGISTRY["cross_attention"], "read",
                        lambda self, state, inputs=None: Branch(lambda h, layer: torch.zeros_like(h)))
    assert "reports no attention" in find(model("cross_attention"), conversations, asked, states).attrs["reason"]


def test_only_questions_with_evidence_of_known_conversations(model, conversations, asked, states):
    id, number, q = asked[0]
    lone = find(open_gates(model()), conversations, [(id, number, q)], states)
    assert len(lone) == 1 and lone["rank"].notna().all() and lone["reciprocal_rank_others"].isna().all()
    without = pdmem.Question(q.question, q.answer, q.category, (), q.lag)
    assert len(find(open_gates(model()), conversations, [(id, number, without)], states)) == 0
    for known, encoded in ((conversations[1:], states), (conversations, {})):
        with pytest.raises(ValueError, match="give it and its hidden states"):
            find(model(), known, [(id, number, q)], encoded)


def test_relative_scores_by_hand():
    scores = np.array([[6, 3, 1, 0], [4, 4, 2, 0], [0, 0, 0, 0], [10, 8, 2, 0]], dtype=float)
    # question 2 reads nothing; the others' fractions are [.6 .3 .1 0], [.4 .4 .2 0], [.5 .4 .1 0]
    # so that question 0 is compared with [.45 .4 .15 0] and question 1 with [.55 .35 .1 0]
    relative = provenance.relative_scores(scores)
    np.testing.assert_allclose(relative[0], [0.6 / 0.45, 0.3 / 0.4, 0.1 / 0.15, 1], atol=1e-6)
    np.testing.assert_allclose(relative[1], [0.4 / 0.55, 0.4 / 0.35, 0.2 / 0.1, 1], atol=1e-6)
    assert (relative[2] == 0).all()
    alike = np.outer([1, 2, 3], [5, 1, 1e-6]) * (1 + 1e-9 * np.arange(3))
    assert (provenance.relative_scores(alike) == 1).all() and (provenance.relative_scores(alike[:1]) == 1).all()


def test_relative_ranks_see_past_what_every_question_looks_at(model, conversations, asked, states, monkeypatch):
    """A hundredth more attention on the evidence, under turns that grow in weight a hundredfold towards the end."""
    by_question = {q.question: [c.turn(id).index for id in q.evidence] for c in conversations for q in c.questions}
    N = len(conversations[0].turns)
    turns, common = np.arange(N), np.geomspace(1, 100, N)
    plant(monkeypatch, lambda asked: [common * (1 + 0.01 * np.isin(turns, by_question[q.question])) for q in asked])
    raw = find(model(), conversations, asked, states)
    relative = find_turns(model(), conversations, asked, states, progress=False, autocast=False, relative=True)
    assert (raw["reciprocal_rank"] - raw["reciprocal_rank_others"]).abs().max() < 0.01
    assert relative["reciprocal_rank"].mean() > 0.9 > 0.5 > relative["reciprocal_rank_others"].mean()


def test_a_write_family_that_says_nothing_of_decay_is_measured_all_the_same(model, conversations, monkeypatch):
    """A reader's own write rule: only the tracing of turns is left out, with its reason."""
    m = open_gates(model("slot", num_entries=8, top_k=2))
    monkeypatch.setattr(SparseSlots, "decay", Method.decay)
    states = encode_all(m.backbone, conversations, progress=False)
    table = find_turns(m, conversations, sample_questions(conversations, 1), states, progress=False)
    assert table.empty and "does not say what its write keeps" in table.attrs["reason"]
    with pytest.raises(ValueError, match="give its write family a decay"):
        write_provenance(m, states[conversations[0].id])
    result = pdmem.evaluate(m, conversations, questions_per_bucket=1, knowledge_points=2, max_new_tokens=2, progress=False)
    assert result.turns.empty and result.per_question["logp_other"].notna().all()
