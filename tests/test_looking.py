"""Looking in: what a figure is made of agrees with what the model does, and looking changes nothing."""

import pytest
import torch

import pdmem_lib as pdmem
from pdmem_lib import provenance, recall
from pdmem_lib.seam import Branch

ALL = list(pdmem.REGISTRY)
QUESTION, ANSWER, TURNS = "Which animal?", "a grey cat", ["Ann: I have a grey cat.", "Bob: Mine is black.", "Ann: Oh."]
TINY = dict(lags=(0, 2), loads=(), interference=(), rows=8, probe_rows=4, pairs=1, steps=3)


def opened(model):
    """``model`` with a memory and with what lets it in ajar."""
    model.write(TURNS)
    for name, parameter in model.adapter.named_parameters():
        if name in ("gate", "beta"):
            torch.nn.init.constant_(parameter, 0.3)
        elif name == "read_O":
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    return model


def test_tokens_are_the_text(tiny):
    text = "Ann: I have  a cat.\nBob: Déjà vu?"
    tokens = tiny.tokens(text)
    assert len(tokens) == len(tiny.token_ids(text))
    ascii_only = "Ann: I have  a cat."
    assert "".join(tiny.tokens(ascii_only)) == ascii_only


@pytest.mark.parametrize("memory", ["own", "zero", "off"])
@pytest.mark.parametrize("method", ALL)
def test_the_answer_token_by_token_sums_to_its_score(model, method, memory):
    m = opened(model(method))
    tokens, log_probs = m.token_log_probs(QUESTION, ANSWER, memory)
    score = m.score([QUESTION], [ANSWER], memory)
    assert "".join(tokens).strip() == ANSWER and len(tokens) == len(log_probs) == int(score.tokens)
    torch.testing.assert_close(log_probs.sum(), score.log_prob[0])
    assert (log_probs <= 0).all() and not log_probs.requires_grad


@pytest.mark.parametrize("method", ALL)
def test_openness_is_what_multiplies_the_read(tiny, model, method):
    fresh, m = model(method), opened(model(method))
    before = m.logits(QUESTION)
    L, h = tiny.num_layers, tiny.num_heads
    found = m.openness(QUESTION)
    if method == "baseline":
        assert found is None
    elif not isinstance(m.injection("own") if not m.adapter.needs_inputs else None, Branch):
        torch.testing.assert_close(found, torch.full((L, h), 0.3).tanh())
        assert torch.equal(fresh.openness(QUESTION), torch.zeros(L, h))
        assert model(method, read_gate=False).openness(QUESTION) is None
    elif method == "cross_attention":
        torch.testing.assert_close(found, torch.full((L,), 0.3))
    else:
        assert found.shape == (L,) and ((0 < found) & (found < 1)).all()
        torch.testing.assert_close(fresh.openness(QUESTION), torch.full((L,), -2.0).sigmoid())
        with torch.no_grad():
            m.adapter.gate_W[0, 0] = 3.0  # what the gate sees now counts, and blocks see different things
        assert len(m.openness(QUESTION).unique()) == L
        with torch.no_grad():
            m.adapter.gate_W.zero_()
    assert m.openness(QUESTION, memory="off") is None
    assert torch.equal(m.logits(QUESTION), before)


@pytest.mark.parametrize("method", pdmem.METHODS)
def test_the_history_of_writes_stands_at_every_turn(tiny, model, method):
    m, hidden = model(method), tiny.encode(TURNS)
    history = list(provenance.write_history(m, hidden))
    assert len(history) == 1 + len(hidden)
    for n, (state, sizes) in enumerate(history):
        m.reset()
        expected = m.write_hidden(hidden[:n])
        assert all(torch.equal(state[name], expected[name]) for name in expected)
        assert sizes.shape[1] == 1 + n
        if n:
            torch.testing.assert_close(sizes, provenance.write_provenance(m, hidden[:n]))


@pytest.mark.parametrize("method", pdmem.METHODS)
def test_the_random_map_of_the_write_is_undone(tiny, model, method):
    """A bank that one turn of equal tokens wrote on zeros holds multiples of that token's state."""
    m = model(method, d_h=2 * tiny.hidden_size)
    state = {name: torch.zeros_like(t) for name, t in m.reset().items()}
    H = tiny.encode(["cat"])[0][:1].expand(3, -1)  # (T, d)
    rows = m.adapter.hidden_of(m.adapter.write(state, H))
    written = rows[rows.norm(dim=1) > 1e-6 * rows.norm()]
    assert rows.shape == (next(iter(state.values())).shape[0], tiny.hidden_size) and len(written)
    cosine = torch.nn.functional.cosine_similarity(written, H[:1])
    torch.testing.assert_close(cosine.abs(), torch.ones_like(cosine), rtol=0, atol=1e-3)


def test_a_family_that_does_not_undo_its_write_says_so(model):
    m = model("baseline")
    with pytest.raises(ValueError, match="hidden_of"):
        m.adapter.hidden_of(m.state)


def test_training_is_watched_without_a_trace(tiny, model):
    conversations, steps = pdmem.synthetic_conversations(1, 1, seed=0, turns_per_session=8), []
    settings = dict(epochs=1, batch_size=2, progress=False)
    watched, alone = model("slot"), model("slot")
    history = pdmem.train(watched, conversations, on_step=steps.append, **settings)
    pdmem.train(alone, conversations, **settings)
    assert steps == history["step"].tolist() and steps
    assert all(torch.equal(a, b) for a, b in zip(watched.parameters(), alone.parameters(), strict=True))


def test_recall_is_watched(tiny):
    seen = {}
    found = recall.recall(tiny, "kv_extension", on_step=lambda step, model: seen.update({step: model.openness("?")}), **TINY)
    assert list(seen) == [0, 1, 2] and not torch.equal(seen[0], seen[2])
    assert torch.equal(seen[2], found.model.openness("?"))


def test_the_lesson_is_a_setting():
    assert recall.RecallSettings.from_mapping(recall.LESSON).series()
