"""The linear probe: that it tells tokens from states, and finds words where they were written and not elsewhere."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from pdmem_lib import MemoryModel, load_backbone, oracle, probe, synthetic_conversations
from pdmem_lib.states import encode_all

QUIET = dict(progress=False, autocast=False)


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("tiny-gpt2")


@pytest.fixture(scope="module")
def talks():
    return synthetic_conversations(3, 3, seed=0)


@pytest.fixture(scope="module")
def states(backbone, talks):
    return encode_all(backbone, talks, **QUIET)


@pytest.fixture(scope="module")
def reader(backbone, talks):
    return probe.fit(backbone, talks[1:], **QUIET)


def test_the_probe_is_the_ridge_regression_that_it_says(backbone, talks, states, reader):
    """Against the normal equations of the whole, written out."""
    X = torch.cat([H for c in talks[1:] for H in states[c.id]]).double()
    tokens = torch.tensor([token for c in talks[1:] for turn in c.turns for token in backbone.token_ids(str(turn))])
    known, counts = tokens.unique(return_counts=True)
    assert [reader.places[token].item() for token in known] == list(range(len(known))) and torch.equal(reader.counts, counts)
    assert (reader.places >= 0).sum() == len(known)
    Y = (tokens[:, None] == known).double()  # (N, V)
    X = X - X.mean(dim=0)
    maps = torch.linalg.solve(X.T @ X + probe.RIDGE * X.square().mean() * torch.eye(X.shape[1]), X.T @ Y) / counts.sqrt()
    torch.testing.assert_close(reader.maps.double(), maps, rtol=1e-3, atol=1e-6)


def test_it_tells_unseen_tokens_by_their_states(backbone, talks, states, reader):
    """Of a talk that it was not fitted on, far above chance."""
    tokens = torch.tensor([token for turn in talks[0].turns for token in backbone.token_ids(str(turn))])
    places = reader.places[tokens]
    scores = reader.scores(torch.cat(list(states[talks[0].id])))[places >= 0]
    right = (scores.argmax(dim=-1) == places[places >= 0]).float().mean()
    assert right > 10 / len(reader.counts) and right > 0.5


def test_words_are_found_by_the_state_that_fits_best(reader):
    """Each by its own row; a rare word alone is content."""
    directions = reader.mean + 50 * reader.maps.T[:3] / reader.maps.T[:3].norm(dim=1, keepdim=True)
    best = reader.scores(directions).amax(dim=0)
    expected = [int((best > best[place]).sum()) < probe.FIRST for place in range(3)]
    assert reader.found(directions, [0, 1, 2]) == sum(expected) / 3
    few = replace(reader, counts=torch.full_like(reader.counts, probe.RARE).index_fill(0, torch.tensor([4]), 2))
    tokens = [int((reader.places == place).nonzero()) for place in (3, 4)]
    unknown = int((reader.places == -1).nonzero()[0]) if (reader.places == -1).any() else tokens[0]
    assert few.content([*tokens, *tokens, unknown]) == [4] and reader.content([unknown, *tokens[1:]])[-1:] == [4]


@pytest.mark.parametrize("stage", ["alone", "after-4", "after", "end"])
def test_what_is_kept_is_the_mean_that_rule_1_adds_up(backbone, talks, states, stage):
    """The direction of M.3's bank, when its rows share a turn's tokens equally and it starts from nothing."""
    model = MemoryModel(backbone, "kv_extension", gamma=0.8)
    model.adapter.write_Q.zero_()  # so that attention spreads every token evenly
    model.adapter.draw = lambda what, *shape, std: torch.zeros(*shape)
    c, _, q = oracle.answerable(talks[:1])[3]
    instead = next(p for *_, p in oracle.answerable(talks[:1]) if not set(p.evidence) & set(q.evidence))
    kept = probe.Kept(states, stage, 0.8).of(c, q, instead)["mean"]
    bank = oracle.Banks(model, states, stage).of(c, q, instead)["P"]
    assert torch.cosine_similarity(bank[0], (kept @ model.adapter.write_V)[0], dim=0) > 0.999999
    bank = oracle.Banks(model, states, stage).of(c, q)["P"]
    kept = probe.Kept(states, stage, 0.8).of(c, q)["mean"]
    assert kept.shape == (1, backbone.hidden_size)
    assert torch.cosine_similarity(bank[0], (kept @ model.adapter.write_V)[0], dim=0) > 0.999999


def test_at_states_the_rows_are_the_token_states(talks, states):
    c, _, q = oracle.answerable(talks[:1])[3]
    H = torch.cat([states[c.id][turn] for turn in oracle.evidence_turns(c, q)])
    assert torch.equal(probe.Kept(states, "states", 0.5).of(c, q)["mean"], H)


def test_the_table_asks_for_the_words_of_the_answer_that_the_evidence_has(backbone, talks, reader):
    table = probe.words_found(reader, backbone, talks, "after-1", most=20, **QUIET)
    assert 0 < len(table) <= 20 and table[["found_own", "found_neighbour", "found_other"]].stack().between(0, 1).all()
    of = {c.id: c for c in talks}
    for row in table.itertuples():
        q = of[row.conversation].questions[row.number]
        told = {token for id in q.evidence for token in backbone.token_ids(str(of[row.conversation].turn(id)))}
        answer = set(backbone.token_ids(f" {q.answer}"))
        assert row.words == len(reader.content(told & answer)) > 0 and row.of_answer == len(reader.content(answer)) >= row.words
        assert row.category == q.category != 5 and row.lag == q.lag and row.evidence == len(q.evidence)
    end = probe.words_found(reader, backbone, talks, "end", gamma=1, most=20, **QUIET)
    assert end[["found_neighbour", "found_other"]].notna().all().all() and (end["gamma"] == 1).all()
    told = oracle.told(pd.concat([table, end]).assign(seed=42), "found", "share of words")
    assert set(map(tuple, told[["stage", "against"]].values)) == {(stage, name) for stage in ("after-1", "end") for name in oracle.AGAINST}
    assert set(told["unit"]) == {"share of words"} and oracle.told(end.assign(seed=42), "found")["effect"].dtype == float
    for stage in oracle.TEXT:
        with pytest.raises(ValueError, match=f"nothing is written at stage '{stage}': name one of states, alone"):
            probe.words_found(reader, backbone, talks, stage, **QUIET)
