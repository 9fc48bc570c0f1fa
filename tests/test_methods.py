"""What every method must hold, over the whole registry and both families: a new method is tested by being there."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pdmem_lib as pdmem
from pdmem_lib import evaluation as evaluation_of
from pdmem_lib import metrics, seam
from pdmem_lib.lora import LoRAModel
from pdmem_lib.methods import AttentionCoupledBank, Baseline, Inputs, KeyValueReader, Method
from pdmem_lib.seam import Branch, KeyValues

ALL = list(pdmem.REGISTRY)
READERS = list(pdmem.METHODS)  # all but the stateless baseline
TEXT = "Ada adopted a grey cat, and then she moved to Bergen."
TURNS = ["Ada: I adopted a cat.", "Bob: Oh!", "Ada: We named her Pixel, after a very long family meeting.", "Bob: A fine name."]
QUESTIONS = ["What did Ada adopt?", "Who?", "What is the name of the cat that Ada adopted after the meeting?", "Is Bob glad?",
             "Where does Ada live now?"]
ANSWERS = ["a cat", "Ada", "Pixel", "yes, he is quite glad", "Bergen"]


def steps(model, n, lr=1e-2):
    """A few training steps on a toy batch (none for the baseline, which has nothing to train)."""
    if not model.parameters():
        return
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(n):
        model.loss(QUESTIONS, ANSWERS).backward()
        optimizer.step()
        optimizer.zero_grad()


def loud(model, scale=0.3):
    """``model`` after its turns, with every trained number pushed far from the start, so that memory really acts."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += scale * torch.randn(p.shape, generator=generator).to(p)
    model.write(TURNS)
    if model.state:
        moved = (model.logits(TEXT) - model.logits(TEXT, memory="off")).abs().max()
        assert moved > 0.1, f"memory moves the logits by {moved} only: the test would show nothing"
    return model


def inputs_of(model, text):
    hidden = model.backbone.encode([text])[0][None]  # (1, T, d)
    return Inputs(hidden, torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device))


def ids_of(backbone, text):
    return torch.tensor([backbone.token_ids(text)], device=backbone.device)


def same_state(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- off, on, off, on ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ALL)
def test_off_is_the_frozen_model_bit_for_bit(tiny, plain, model, method):
    wanted = plain(ids_of(tiny, TEXT)).logits[0]

    def assert_frozen(m):
        assert torch.equal(m.logits(TEXT, memory="off"), wanted)
        assert torch.equal(tiny.model(ids_of(tiny, TEXT)).logits[0], wanted)

    first, others = model(method), [model("cross_attention"), model("slot")]
    assert first.logits(TEXT).shape == wanted.shape
    assert_frozen(first)
    loud(first)
    steps(first, 2)
    on = first.logits(TEXT)
    assert_frozen(first)
    for other in map(loud, others):  # attached and used in between
        other.answer(QUESTIONS[:2], max_new_tokens=2)
        steps(other, 1)
        assert_frozen(first)
        assert torch.equal(first.logits(TEXT), on)


@pytest.mark.parametrize("method", READERS)
def test_off_stays_off_inside_another_memory_and_after_an_error_in_one(tiny, plain, model, method):
    noisy, frozen = loud(model(method)), model(method)
    wanted = plain(ids_of(tiny, TEXT)).logits[0]
    inputs = inputs_of(noisy, TEXT)
    if isinstance(noisy.injection("own", inputs), Branch):
        with pytest.raises(RuntimeError, match="on purpose"):
            with seam.inject(tiny.model, Branch(lambda h, layer: (_ for _ in ()).throw(RuntimeError("on purpose")))):
                tiny.model(ids_of(tiny, TEXT))
    else:
        with seam.inject(tiny.model, noisy.injection("own", inputs)):
            assert not torch.equal(tiny.model(ids_of(tiny, TEXT)).logits[0], wanted)
            assert torch.equal(frozen.logits(TEXT, memory="off"), wanted)
        with pytest.raises(RuntimeError, match="on purpose"), seam.inject(tiny.model, noisy.injection("own", inputs)):
            raise RuntimeError("on purpose")
    assert torch.equal(tiny.model(ids_of(tiny, TEXT)).logits[0], wanted)


def test_off_generates_what_the_frozen_model_generates(tiny, plain, model):
    m = loud(model("kv_extension"))
    ids, mask = tiny.pad([tiny.token_ids(q) for q in QUESTIONS], side="left")
    options = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True,
                   pad_token_id=tiny.tokenizer.pad_token_id)
    wanted = plain.generate(ids, **options)
    with seam.inject(tiny.model, m.injection("off")):
        found = tiny.model.generate(ids, **options)
    assert torch.equal(found.sequences, wanted.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, wanted.logits, strict=True))


@pytest.mark.parametrize("method", READERS)
def test_three_states_on_off_on(tiny, plain, model, method):
    m = model(method)
    m.write(TURNS)
    before = m.logits(TEXT, memory="off")
    steps(m, 5)
    on, off, again = m.logits(TEXT), m.logits(TEXT, memory="off"), m.logits(TEXT)
    assert (on - off).abs().max() > 1e-3, "after training, memory changes nothing"
    assert torch.equal(off, before) and torch.equal(off, plain(ids_of(tiny, TEXT)).logits[0])
    assert torch.equal(on, again)
    zero = {name: torch.zeros_like(t) for name, t in m.state.items()}
    assert torch.equal(m.logits(TEXT, memory="zero"), m.logits(TEXT, memory=zero))
    assert not torch.equal(m.logits(TEXT, memory="zero"), on)


# ---- the start -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [1, 10])
@pytest.mark.parametrize("method", ALL)
def test_silent_start(model, method, capacity):
    m = model(method, capacity)
    m.write(TURNS)
    if method == "gated":  # nearly closed is enough [API.md]; what follows is asked of all others
        assert abs(m.loss(QUESTIONS, ANSWERS) - m.loss(QUESTIONS, ANSWERS, memory="off")) < 0.05
        return
    assert (m.logits(TEXT) - m.logits(TEXT, memory="off")).abs().max() <= 1e-4
    assert m.answer(QUESTIONS, max_new_tokens=6) == m.answer(QUESTIONS, max_new_tokens=6, memory="off")
    ids, mask = m.backbone.pad([m.backbone.token_ids(q) for q in QUESTIONS], side="left")
    inputs = Inputs(m.backbone.model.base_model(ids, attention_mask=mask).last_hidden_state, mask.bool())
    frozen = m.backbone.model(ids, attention_mask=mask).logits
    with seam.inject(m.backbone.model, m.injection("own", inputs)):
        read = m.backbone.model(ids, attention_mask=mask).logits
    assert (read - frozen)[mask.bool()].abs().max() <= 1e-4


@pytest.mark.parametrize("method", ["prefix", "kv_extension", "hebbian", "slot"])
def test_without_the_gate_memory_speaks_from_the_start(model, method):
    m = model(method, read_gate=False)
    m.write(TURNS)
    assert not any("gate" in name for name, _ in m.adapter.named_parameters())
    assert (m.logits(TEXT) - m.logits(TEXT, memory="off")).abs().max() > 1e-2


@pytest.mark.parametrize("method", ALL)
def test_gradients_reach_all_of_theta_mem_and_nothing_else(tiny, model, method):
    m = model(method)
    m.write(TURNS)
    frozen = {name: weight.clone() for name, weight in tiny.model.state_dict().items()}
    maps = {name: b.clone() for name, b in m.adapter.named_buffers()}
    steps(m, 1)
    loss = m.loss(QUESTIONS, ANSWERS)
    assert loss.requires_grad == bool(m.parameters())
    if m.parameters():
        loss.backward()
    for name, p in m.adapter.named_parameters():
        parts = p.grad if p.shape[0] == tiny.num_layers else p.grad[None]  # block by block, where there is one a block
        assert all(part.abs().sum() > 0 for part in parts), f"{name} is stuck at zero gradient in the second step"
        assert p.grad.isfinite().all()
    assert m.num_trainable == sum(p.numel() for p in m.parameters())
    assert not any(w.requires_grad or w.grad is not None for w in tiny.model.parameters())
    assert not tiny.model.training
    assert all(torch.equal(weight, frozen[name]) for name, weight in tiny.model.state_dict().items())
    assert all(torch.equal(b, maps[name]) for name, b in m.adapter.named_buffers())
    assert not any(t.requires_grad for t in m.state.values())


def test_the_baseline_has_nothing_to_read_or_train(model):
    m = model("baseline")
    m.write(TURNS)
    assert m.state == {} and m.num_trainable == 0 and m.injection("own") is None
    assert torch.equal(m.logits(TEXT), m.logits(TEXT, memory="off"))
    assert m.answer(QUESTIONS, max_new_tokens=4, memory="zero") == m.answer(QUESTIONS, max_new_tokens=4, memory="off")


# ---- writes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ALL)
def test_a_whole_conversation_equals_chunks_and_one_by_one(tiny, model, method, tmp_path):
    hidden = tiny.encode(TURNS)
    whole, chunks, single = model(method), model(method), model(method)
    whole.write_hidden(hidden)
    for H in hidden:
        single.write_hidden([H])
    chunks.write_hidden(hidden[:3])  # carried over through a file into a new model
    chunks.save_state(tmp_path / "state.safetensors")
    chunks = model(method)
    chunks.load_state(tmp_path / "state.safetensors")
    chunks.write_hidden(hidden[3:])
    assert same_state(whole.state, single.state) and same_state(whole.state, chunks.state)  # bit for bit

    # through texts the encoder batches differently, and the last bits of a batch are not those of one row
    texts = model(method)
    texts.write(TURNS[:1])
    texts.write(TURNS[1])
    returned = texts.write(TURNS[2:])
    assert same_state(returned, texts.state)
    for name in whole.state:
        torch.testing.assert_close(texts.state[name], whole.state[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", READERS)
def test_writes_are_in_order_and_reset_goes_back(model, method):
    m, backwards = model(method), model(method)
    start = m.state
    m.write(TURNS)
    backwards.write(TURNS[::-1])
    assert not same_state(m.state, start)
    name = next(iter(m.state))
    assert (m.state[name] - backwards.state[name]).abs().max() > 1e-4
    m.reset()
    assert same_state(m.state, start)


def test_write_takes_turns_of_a_conversation(model):
    (conversation,) = pdmem.synthetic_conversations(1, 1, seed=0)
    a, b = model("slot"), model("slot")
    a.write(conversation.turns[:4])
    b.write([f"{turn.speaker}: {turn.text}" for turn in conversation.turns[:4]])
    assert same_state(a.state, b.state)


# ---- padding, batches, positions, order of time ----------------------------------------------------------------------


def test_hidden_states_of_a_batch_equal_one_by_one(tiny):
    batch = tiny.encode(TURNS)
    for text, H in zip(TURNS, batch, strict=True):
        torch.testing.assert_close(H, tiny.encode([text])[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ALL)
def test_scores_of_a_batch_equal_one_by_one(model, method):
    m = loud(model(method))
    score = m.score(QUESTIONS, ANSWERS)
    alone = [m.score([q], [a]) for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    torch.testing.assert_close(score.log_prob, torch.cat([s.log_prob for s in alone]), rtol=1e-4, atol=1e-4)
    assert torch.equal(score.tokens, torch.cat([s.tokens for s in alone]))
    assert score.tokens.tolist() == [len(m.backbone.token_ids(f" {a}\n", special=False)) for a in ANSWERS]
    torch.testing.assert_close(m.loss(QUESTIONS, ANSWERS), -score.log_prob.sum() / score.tokens.sum())
    if m.state:  # the comparison would show nothing if memory did not act on the answers
        assert (score.log_prob - m.score(QUESTIONS, ANSWERS, memory="off").log_prob).abs().min() > 1e-3


@pytest.mark.parametrize("method", ALL)
def test_score_is_the_log_probability_of_the_answer(model, method):
    """Against one plain forward pass over prompt and answer, token by token."""
    m = loud(model(method))
    prompt, answer = f"Question: {QUESTIONS[0]}\nShort answer:", f" {ANSWERS[0]}\n"
    ids = ids_of(m.backbone, prompt + answer)
    T = len(m.backbone.token_ids(prompt))
    hidden = m.backbone.encode([prompt + answer])[0][None]
    question = torch.arange(ids.shape[1], device=ids.device)[None] < T  # no reader may look at the answer
    with seam.inject(m.backbone.model, m.injection("own", Inputs(hidden, question))):
        log_probs = m.backbone.model(ids).logits[0].log_softmax(dim=-1)
    wanted = sum(log_probs[t - 1, ids[0, t]] for t in range(T, ids.shape[1]))
    torch.testing.assert_close(m.score(QUESTIONS[:1], ANSWERS[:1]).log_prob[0], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ALL)
def test_answers_do_not_depend_on_batch_or_order(model, method):
    m = model(method)
    steps(m, 3)
    loud(m, scale=0.13)  # louder, a random model says one token only
    asked = [*QUESTIONS, *ANSWERS[:1]]
    batch = m.answer(asked, max_new_tokens=6)
    if m.state:
        assert batch != m.answer(asked, max_new_tokens=6, memory="off")
        assert len(set(batch)) > 1
    assert [m.answer([q], max_new_tokens=6)[0] for q in asked] == batch
    order = random.Random(0).sample(range(len(asked)), len(asked))
    assert m.answer([asked[i] for i in order], max_new_tokens=6, batch_size=4) == [batch[i] for i in order]


@pytest.mark.parametrize("method", ALL)
def test_training_and_generation_read_the_same(model, method):
    """Each token of a left-padded, cached generation is the likeliest one under the teacher-forced pass, same margin."""
    m = loud(model(method))
    backbone, rows = m.backbone, [m.backbone.token_ids(q) for q in QUESTIONS]
    ids, mask = backbone.pad(rows, side="left")
    base = backbone.model.base_model
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    hidden = base(ids, attention_mask=mask, position_ids=positions).last_hidden_state
    with seam.inject(backbone.model, m.injection("own", Inputs(hidden, mask.bool()))):
        out = backbone.model.generate(ids, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False,
                                      output_logits=True, return_dict_in_generate=True,
                                      pad_token_id=backbone.tokenizer.pad_token_id)
    for b, row in enumerate(rows):
        full = torch.tensor([row + out.sequences[b, ids.shape[1] :].tolist()], device=ids.device)
        hidden = base(full).last_hidden_state
        question = torch.arange(full.shape[1], device=ids.device)[None] < len(row)
        with seam.inject(backbone.model, m.injection("own", Inputs(hidden, question))):
            forced = backbone.model(full).logits[0, len(row) - 1 : -1]  # (5, vocab)
        generated = torch.stack([step[b] for step in out.logits])
        torch.testing.assert_close(forced, generated, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["prefix", "kv_extension", "slot"])
@pytest.mark.parametrize("runs", [1, 2])
def test_a_large_bank_is_read_alike_by_fused_attention_and_by_matmuls(model, method, runs, monkeypatch):
    """The same losses and gradients, for one bank of a whole batch and for a bank a run of rows."""
    m = model(method, num_entries=300)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in m.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    m.write(["Ann: I have a cat.", "Bob: Mine is black."])
    other = m.state
    m.write("Ann: Oh.")
    asked = ["Who has a cat?", "What colour is it, and whose?"], ["Ann", "black, Bob's"]
    fused, uses, found = seam._fused_reads, [], []
    for allowed in (True, False):
        monkeypatch.setattr(seam, "_fused_reads", lambda *of: uses.append(allowed and fused(*of)) or uses[-1])  # noqa: B023
        m.adapter.zero_grad()
        banks = [m.state, other][:runs]
        loss = -m.score_pairs([bank for bank in banks for _ in asked[0]], asked[0] * runs, asked[1] * runs).log_prob.sum()
        loss.backward()
        found.append((loss.detach(), [parameter.grad.clone() for parameter in m.parameters()]))
    assert uses[0] is True and uses[-1] is False
    (loss, gradients), (plain_loss, plain_gradients) = found
    torch.testing.assert_close(loss, plain_loss, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients, plain_gradients, strict=True):
        assert b.norm() > 0 and (a - b).norm() < 1e-3 * b.norm()


@pytest.mark.parametrize("method", ["prefix", "kv_extension", "hebbian", "slot"])
@pytest.mark.parametrize("autocast", [False, True])
def test_without_a_gradient_a_bank_is_read_alike_however_its_mass_is_found(model, method, autocast, monkeypatch):
    """By the kernel that tells it, by fused attention with one more entry, and by matmuls; a bank a run of rows, and masked rows."""
    m, found, calls = loud(model(method, num_entries=300)), [], Counter()
    banks = [m.state, m.write("Ann: Oh.")]
    for name in ("_attend_with_mass", "_change_by_mass"):
        monkeypatch.setattr(seam, name, lambda *args, name=name, known=getattr(seam, name): calls.update([name]) or known(*args))
    with m.backbone.autocast(autocast), torch.no_grad():
        for told, fused in ((True, True), (True, False), (False, False)):
            with monkeypatch.context() as patch:
                if not told:
                    patch.setattr(seam, "_tells_its_mass", lambda *_: False)
                if not fused:
                    patch.setattr(seam, "_fused_reads", lambda *_: False)
                found.append((m.scores_under(banks, QUESTIONS, ANSWERS).log_prob, m.answers_under(banks, QUESTIONS, 6), calls.copy()))
    for score, answers, _ in found[1:]:
        torch.testing.assert_close(score, found[0][0], rtol=1e-5 if not autocast else 2e-2, atol=1e-4 if not autocast else 0.1)
        assert autocast or answers == found[0][1]
    assert not torch.allclose(found[0][0][0], found[0][0][1], atol=1e-3)
    with_mass, by_mass = ([done[name] for *_, done in found] for name in ("_attend_with_mass", "_change_by_mass"))
    assert 0 < with_mass[0] < with_mass[1] == with_mass[2]
    assert by_mass[0] == by_mass[1] == by_mass[2] and (by_mass[0] > 0) == (method != "hebbian")


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("method", "copies"), [("prefix", False), ("prefix", True), ("kv_extension", False), ("hebbian", False), ("slot", False)])
def test_bank_and_input_are_read_as_one_as_they_are_read_apart(model, method, copies, gated, monkeypatch):
    """As a GPU reads them: losses, gradients, scores under a bank a run of rows, and answers to left-padded questions."""
    m, found, calls = loud(model(method, read_gate=gated)), [], Counter()
    banks = [m.state, m.write("Ann: Oh.")]
    if copies:
        banks = [{"P": bank["P"][:1].repeat(64, 1)} for bank in banks]
    known = seam._attend_jointly
    monkeypatch.setattr(seam, "_attend_jointly", lambda *args: calls.update(["joined"]) or known(*args))
    for entries in (1024, 0):
        monkeypatch.setitem(seam.JOINED, "cpu", entries)
        m.adapter.zero_grad()
        loss = -m.score_pairs([bank for bank in banks for _ in QUESTIONS], QUESTIONS * 2, ANSWERS * 2).log_prob.sum()
        loss.backward()
        with torch.no_grad():
            scores, answers = m.scores_under(banks, QUESTIONS, ANSWERS).log_prob, m.answers_under(banks, QUESTIONS, 6)
        found.append((loss.detach(), [p.grad.clone() for p in m.parameters()], scores, answers, calls["joined"]))
    (loss, gradients, scores, answers, before), (of_parts, gradients_of_parts, scores_of_parts, answers_of_parts, after) = found
    assert before == after > 0
    torch.testing.assert_close(loss, of_parts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores, scores_of_parts, rtol=1e-4, atol=1e-4)
    assert answers == answers_of_parts
    for a, b in zip(gradients, gradients_of_parts, strict=True):
        assert b.norm() > 0 and (a - b).norm() < 1e-3 * b.norm()


@pytest.mark.parametrize(("entries", "copied", "dropout", "joined"), [
    (0, False, 0.0, False), (1, False, 0.0, True), (8, False, 0.0, True), (9, False, 0.0, False), (9, True, 0.0, True), (8, False, 0.1, False)])
def test_a_short_bank_is_read_as_one_with_the_input_copies_counted_once(entries, copied, dropout, joined, monkeypatch):
    monkeypatch.setitem(seam.JOINED, "cpu", 8)
    query, K = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 1, 4).expand(-1, -1, entries, -1) if copied else torch.randn(1, 2, entries, 4)
    assert seam._joins(query, KeyValues(K, K), None, dropout) == joined
    assert not seam._joins(query, KeyValues(K, K, seen=[]), None, dropout)
    assert not seam._joins(query, KeyValues(K, K), torch.zeros(1, 1, 3, 3), dropout)  # a mask that is added


def test_all_blocks_read_under_one_bias_and_none_under_an_old_one(model, monkeypatch):
    """M.4's, whose entries are seen row by row: several banks, rows that leave, and marks changed in place."""
    monkeypatch.setitem(seam.JOINED, "cpu", 1024)
    m, made = loud(model("hebbian")), seam._bias_of_both
    banks = [m.state, m.write("Ann: Oh.")]
    made.cache_clear()
    with torch.inference_mode():
        m.scores_under(banks, QUESTIONS, ANSWERS)
    assert (made.cache_info().misses, made.cache_info().hits) == (1, m.backbone.num_layers - 1)
    made.cache_clear()
    m.answers_under(banks, QUESTIONS, 6)
    assert made.cache_info().misses <= 6 and made.cache_info().hits == (m.backbone.num_layers - 1) * made.cache_info().misses

    valid, query = torch.ones(2, 5, dtype=torch.bool), torch.randn(2, 2, 4, 8)
    bank = KeyValues(*torch.randn(2, 2, 2, 5, 8), valid=valid)
    seam._attend_jointly(query, query, query, None, 1.0, bank)
    valid[0, 3] = False
    wanted = seam._attend_jointly(query, query, query, None, 1.0, KeyValues(bank.keys, bank.values, valid=valid.clone()))
    torch.testing.assert_close(seam._attend_jointly(query, query, query, None, 1.0, bank), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_not_to_be_seen_is_far_below_any_score_and_finite(dtype):
    """Times log2(e), as kernels have it, too: a row that sees nothing would make what it is kept with not a number."""
    none = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    with torch.inference_mode():  # a pass with gradients may find it later
        bias = seam._bias_of_both(none, torch.zeros(1, 3, dtype=torch.bool), False, (1, 2, 2, 3, 2), 1, dtype, none.device, (0, 0))
    assert not bias.is_inference()
    assert bias.shape == (1, 1, 4, 5) and (bias < -30_000).all() and (bias * 1.4427).isfinite().all()


@pytest.mark.parametrize("copied", [False, True])
def test_keys_and_values_are_read_alike_however_they_lie_in_memory(tiny, copied, monkeypatch):
    """Rows in pieces, as an einsum leaves them, and one entry that stands for all, as M.1's copies: with and without a gradient."""
    backbone, (ids, _) = tiny, tiny.pad([tiny.token_ids(q) for q in QUESTIONS], side="right")
    config, draw = backbone.config, torch.Generator().manual_seed(0)
    h, L = config.num_attention_heads, config.num_hidden_layers
    h_kv, dk = getattr(config, "num_key_value_heads", h), backbone.hidden_size // h
    whole = torch.randn(2, L, 1, h_kv, 1 if copied else 300, dk, generator=draw)
    lying = whole.expand(-1, -1, -1, -1, 300, -1) if copied else whole.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert lying.stride(-2) == 0 or lying.stride(-1) != 1
    found, gate = [], torch.full((h,), 0.7)
    for keys, values in (lying, lying.contiguous()):
        seen = []
        for collected, grad in ((None, False), (None, True), (seen, False)):
            with torch.set_grad_enabled(grad), seam.inject(backbone.model, [
                    seam.KeyValues(k, v, gate, seen=collected) for k, v in zip(keys, values, strict=True)]):
                found.append(backbone.model.base_model(ids, use_cache=False).last_hidden_state.detach())
        found.append(torch.stack(seen))
    for states in found[1:3] + found[4:7]:
        torch.testing.assert_close(states, found[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[3], found[7], rtol=1e-4, atol=1e-6)
    assert found[3].shape[-1] == 300
    with seam.inject(backbone.model, [seam.KeyValues(k[:, :, :0], v[:, :, :0], gate) for k, v in zip(*lying, strict=True)]), torch.no_grad():
        none = backbone.model.base_model(ids, use_cache=False).last_hidden_state
    with torch.no_grad():
        torch.testing.assert_close(none, backbone.model.base_model(ids, use_cache=False).last_hidden_state, rtol=1e-4, atol=1e-5)


def test_where_stock_attention_may_not_take_its_kernel_none_is_called(tiny):
    m = pdmem.MemoryModel(tiny, "slot")
    m.write(TURNS)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), torch.no_grad():
        assert torch.equal(m.logits(TEXT), m.logits(TEXT, "off"))  # the gates are closed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("B, T, S, masked", [(4, 1, 13, False), (4, 1, 13, True), (4, 9, 9, False), (4, 9, 9, True), (3, 5, 12, True),
                                             (2, 40, 40, True)])
@pytest.mark.parametrize("h, h_kv", [(9, 3), (4, 4)])
def test_attention_that_tells_its_mass_is_stock_attention_bit_for_bit(B, T, S, masked, h, h_kv, dtype):
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = h // h_kv, True
    draw = torch.Generator().manual_seed(T)
    query, key, value = (torch.randn(B, heads, n, 64, generator=draw).to(dtype) for heads, n in ((h, T), (h_kv, S), (h_kv, S)))
    mask = torch.ones(B, 1, T, S, dtype=torch.bool).tril(S - T) if masked else None
    if masked:
        mask[0, :, :, :3] = False  # padding on the left, whose own rows see nothing where they lie in the input
    with torch.no_grad():
        assert seam._tells_its_mass(query, key, mask, 0.0)
        plain, mass = seam._attend_with_mass(query, key, value, mask, 0.125)
        assert torch.equal(plain, seam.memory_attention(module, query, key, value, mask, scaling=0.125)[0])
    visible = mask if masked else torch.ones(1, 1, T, S, dtype=torch.bool).tril(S - T)
    scores = (0.125 * query.float() @ key.float().repeat_interleave(h // h_kv, dim=1).mT).masked_fill(~visible, -torch.inf)
    expected, seen = scores.logsumexp(dim=-1), visible.any(dim=-1).expand(B, h, T)
    assert mass.shape == (B, h_kv, h // h_kv, T, 1) and mass.isfinite().all()
    torch.testing.assert_close(mass.reshape(B, h, T)[seen], expected[seen], rtol=1e-4, atol=1e-4)
    assert not seam._tells_its_mass(query, key, mask, 0.0)  # a gradient may be wanted, and that of the mass is not known


@pytest.mark.parametrize("method", ALL)
def test_memory_takes_no_positions(tiny, model, method):
    """At 10x, real tokens stand at 0 ... T-1 in scoring, logits and left-padded generation; soft tokens all at 0."""
    m = loud(model(method, 10))
    seen, kinds = [], []  # (position ids, whether they are of real tokens)
    place = tiny.model.transformer.wpe if tiny.family == "gpt2" else tiny.model.model.rotary_emb

    def begin(_module, args, kwargs):
        kinds.append(bool(args) or kwargs.get("input_ids") is not None)

    def record(_module, args, kwargs):
        seen.append((args[-1] if "position_ids" not in kwargs else kwargs["position_ids"], kinds[-1]))

    handles = [tiny.model.base_model.register_forward_pre_hook(begin, with_kwargs=True),
               place.register_forward_pre_hook(record, with_kwargs=True)]
    try:
        m.logits(TEXT)
        T = len(tiny.token_ids(TEXT))
        m.score(QUESTIONS, ANSWERS)
        scoring = len(seen)
        m.answer(QUESTIONS, max_new_tokens=3)
    finally:
        for handle in handles:
            handle.remove()
    real = [positions for positions, is_real in seen[:scoring] if is_real]
    assert real[0].flatten().tolist() == list(range(T))
    for positions in real:  # right padding: every row counts 0, 1, 2, ... (padding behind a row's end is read by nobody)
        lengths = [len(tiny.token_ids(f"Question: {q}\nShort answer: {a}\n")) for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
        for row, n in zip(positions, lengths if len(positions) > 1 else [positions.shape[1]] * len(positions), strict=True):
            n = min(n, len(row))
            assert row[:n].tolist() == list(range(n))
    prompts = sorted(len(tiny.token_ids(f"Question: {q}\nShort answer:")) for q in QUESTIONS)
    real = [positions for positions, is_real in seen[scoring:] if is_real]
    whole = [p for p in real if p.shape[1] > 1]
    assert whole
    for positions in whole:  # left padding
        lengths = (positions.max(dim=1).values + 1).tolist()  # in whatever order the rows are asked
        assert sorted(lengths) == prompts
        assert all(row[-n:].tolist() == list(range(n)) for row, n in zip(positions, lengths, strict=True))
    later = [sorted(p.flatten().tolist()) for p in real if p.shape[1] == 1]
    assert later == [[n + step for n in prompts] for step in range(len(later))] and later
    assert all((positions == 0).all() for positions, is_real in seen if not is_real)


@pytest.mark.parametrize("method", READERS)
def test_a_bank_of_640_leaves_the_whole_context_window(tiny, model, method):
    m = loud(model(method, 10))
    text = "a cat " * tiny.max_tokens
    while len(tiny.token_ids(text)) > tiny.max_tokens:
        text = text[: -max(1, len(tiny.token_ids(text)) - tiny.max_tokens)]
    assert m.logits(text).shape[0] == len(tiny.token_ids(text)) > 0.99 * tiny.max_tokens
    with pytest.raises(ValueError, match=f"context of {tiny.max_tokens} tokens: shorten"):
        m.logits(text + " and one more cat")
    with pytest.raises(ValueError, match="shorten"):
        m.answer([text])
    with pytest.raises(ValueError, match="shorten"):
        m.loss([text], ["a cat"])


@pytest.mark.parametrize("method", READERS)
def test_no_token_sees_a_later_one(model, method):
    m = loud(model(method))
    whole = m.logits(TEXT)
    for words in (1, 4, 8):
        begin = " ".join(TEXT.split()[:words])
        T = len(m.backbone.token_ids(begin))
        assert m.backbone.token_ids(TEXT)[:T] == m.backbone.token_ids(begin)
        torch.testing.assert_close(m.logits(begin), whole[:T], rtol=1e-4, atol=1e-4)


# ---- against a naive reading, through an untouched transformers model ------------------------------------------------


@pytest.mark.parametrize("method", ["kv_extension", "slot"])
def test_ungated_keys_and_values_equal_a_cache_in_front(tiny, plain, model, method):
    from transformers import DynamicCache

    m = loud(model(method, read_gate=False))
    ids = ids_of(tiny, TEXT)
    cache = DynamicCache(config=plain.config)
    for layer, kv in enumerate(m.injection("own")):
        cache.update(kv.keys.detach(), kv.values.detach(), layer)
    M, T = cache.get_seq_length(), ids.shape[1]
    assert M == m.settings.num_entries
    naive = plain(ids, past_key_values=cache, position_ids=torch.arange(T)[None], attention_mask=torch.ones(1, M + T)).logits
    torch.testing.assert_close(m.logits(TEXT), naive[0], rtol=1e-3, atol=1e-3)


def test_ungated_prefix_equals_soft_tokens_in_front(tiny, plain, model):
    m = loud(model("prefix", read_gate=False))
    ids = ids_of(tiny, TEXT)
    soft = F.rms_norm(m.state["P"], m.state["P"].shape[-1:], eps=1e-6) @ m.adapter.read_P.detach()  # (M, d)
    M, T = len(soft), ids.shape[1]
    joint = torch.cat([soft[None], plain.get_input_embeddings()(ids)], dim=1)
    positions = torch.cat([torch.zeros(M, dtype=torch.long), torch.arange(T)])[None]
    mask = torch.ones(1, 1, M + T, M + T, dtype=torch.bool).tril()  # equal positions must not be taken for equal times
    naive = plain(inputs_embeds=joint, position_ids=positions, attention_mask=mask).logits[0, M:]
    torch.testing.assert_close(m.logits(TEXT), naive, rtol=1e-3, atol=1e-3)


def test_soft_tokens_that_are_copies_pass_the_blocks_once(model, monkeypatch):
    """Which changes nothing: a loss, its gradient and the attention are those of all copies; others all pass."""
    m, widths = loud(model("prefix", capacity=10)), []
    row = m.state["P"][:1]
    noise = torch.randn(m.state["P"].shape, generator=torch.Generator().manual_seed(1)).to(row)
    copies, alike = ({"P": row * (1 + size * noise)} for size in (1e-7, 1e-4))
    run = m.adapter.run_blocks
    monkeypatch.setattr(m.adapter, "run_blocks", lambda soft: widths.append(soft.shape[1]) or run(soft))

    def read(state):
        loss = m.loss(QUESTIONS, ANSWERS, memory=state)
        return [loss.detach(), *torch.autograd.grad(loss, m.parameters()), m.attention_to_memory(TEXT, memory=state)]

    once = read(copies)
    read(alike)
    m.scores_under([copies, "own"], QUESTIONS, ANSWERS)
    monkeypatch.setattr(type(m.adapter), "COPIES", -1)
    torch.testing.assert_close(once, read(copies), rtol=1e-4, atol=1e-5)
    assert once[-1].shape[-1] == 640 and widths == [1, 1, 640, 640, 640, 640, 640]


@pytest.mark.parametrize("method", ["cross_attention", "gated"])
def test_branches_equal_a_loop_over_heads(model, method):
    m = loud(model(method))
    a, d = m.adapter, m.backbone.hidden_size
    h = torch.randn(2, 3, d, generator=torch.Generator().manual_seed(0))

    def unit(x):
        return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()

    P, heads, w = unit(m.state["P"]), m.backbone.num_heads, d // m.backbone.num_heads
    c = torch.zeros(2, 3, d)
    for i in range(heads):
        part = slice(i * w, (i + 1) * w)
        scores = (unit(h) @ a.read_Q)[..., part] @ (P @ a.read_K)[:, part].T / w**0.5
        c[..., part] = scores.softmax(dim=-1) @ (P @ a.read_V)[:, part]
    c = c @ a.read_O
    for layer in range(m.backbone.num_layers):
        gate = a.beta[layer] if method == "cross_attention" else torch.sigmoid(
            unit(h) @ a.gate_W[:d] + c @ a.gate_W[d:] + a.gate_b)
        torch.testing.assert_close(m.injection("own").delta(h, layer), gate * c, rtol=1e-3, atol=1e-4)


class OneBlock(nn.Module):
    """The least that the seam takes for a model: one block with one attention."""

    def __init__(self, groups):
        super().__init__()
        self.attention = nn.Module()
        self.attention.is_causal, self.attention.num_key_value_groups = True, groups
        block = nn.Module()
        block.attn = self.attention
        self.transformer = nn.Module()
        self.transformer.h = nn.ModuleList([block])


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_attention_over_memory_equals_a_loop(gated, causal, shared, cached, joined, monkeypatch):
    """Read apart, its weights kept, and as one with the input."""
    B, h, h_kv, T, S, M, dk = 2, 4, 2, 3 if cached else 5, 5, 6, 8
    rng = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(B, n, length, dk, generator=rng) for n, length in ((h, T), (h_kv, S), (h_kv, S)))
    K, V = torch.randn(2, 1 if shared else B, h_kv, M, dk, generator=rng)
    gate = torch.randn(h, generator=rng) if gated else None
    valid = None if shared else torch.tensor([[0, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]], dtype=torch.bool)
    mask = torch.ones(T, S, dtype=torch.bool).tril(S - T).repeat(B, 1, 1, 1)
    mask[1, ..., 0] = False  # left padding of the second row
    model = OneBlock(h // h_kv)
    seen, calls, known = None if joined else [], Counter(), seam._attend_jointly
    monkeypatch.setitem(seam.JOINED, "cpu", 1024)
    monkeypatch.setattr(seam, "_attend_jointly", lambda *args: calls.update(["joined"]) or known(*args))
    with seam.inject(model, [KeyValues(K, V, gate, valid, causal, seen)]):
        found, _ = seam.memory_attention(model.attention, q, k, v, mask, scaling=0.3)
    assert calls["joined"] == joined and found.isfinite().all()

    wanted, weights = torch.zeros(B, T, h, dk), torch.zeros(B, h, T, M)
    for b in range(B):
        bank = 0 if shared else b
        for i in range(h):
            for t in range(T):
                column = S - T + t
                entries = [m for m in range(M) if (valid is None or valid[b, m]) and (not causal or m <= column)]
                tokens = [s for s in range(S) if mask[b, 0, t, s]]
                keys = [K[bank, i // 2, m] for m in entries] + [k[b, i // 2, s] for s in tokens]
                values = [V[bank, i // 2, m] for m in entries] + [v[b, i // 2, s] for s in tokens]
                own = torch.stack([q[b, i, t] @ x for x in keys]).mul(0.3).softmax(0)
                joint = own @ torch.stack(values)
                plain = torch.stack([q[b, i, t] @ x for x in keys[len(entries) :]]).mul(0.3).softmax(0) @ torch.stack(
                    values[len(entries) :]) if tokens else torch.zeros(dk)
                strength = 1.0 if gate is None else torch.tanh(gate[i])
                wanted[b, t, i] = plain + strength * (joint - plain)
                weights[b, i, t, entries] = abs(strength) * own[: len(entries)]
    padded = ~mask.any(dim=-1)[:, 0]  # a padding column sees no token: whatever it computes is read by nobody
    torch.testing.assert_close(found[~padded], wanted[~padded], rtol=1e-4, atol=1e-5)
    if not joined:
        torch.testing.assert_close(seen[0].transpose(1, 2)[~padded], weights.transpose(1, 2)[~padded], rtol=1e-4, atol=1e-5)


# ---- other states, and what is read of them --------------------------------------------------------------------------


@pytest.mark.parametrize("method", READERS)
def test_another_state_is_read_as_if_it_were_the_own_one(model, method):
    m = loud(model(method))
    own = m.state
    other_model = model(method)
    other_model.write(["Cleo: The weather in Turku is dreadful.", "Dan: Come to Cork then."])
    other = other_model.state

    def gradients():
        grads = [p.grad.clone() for p in m.parameters()]
        m.adapter.zero_grad()
        return grads

    m.loss(QUESTIONS, ANSWERS, memory=other).backward()
    given = gradients()
    assert m.state is own
    logits, answers = m.logits(TEXT, memory=other), m.answer(QUESTIONS, max_new_tokens=4, memory=other)
    assert not torch.equal(logits, m.logits(TEXT))
    m.state = other
    m.loss(QUESTIONS, ANSWERS).backward()
    assert all(torch.equal(a, b) for a, b in zip(given, gradients(), strict=True))
    assert torch.equal(m.logits(TEXT), logits) and m.answer(QUESTIONS, max_new_tokens=4) == answers
    assert all(t.data_ptr() == other_model.state[name].data_ptr() or torch.equal(t, other[name]) for name, t in m.state.items())


@pytest.mark.parametrize("method", ALL)
def test_attention_to_memory(tiny, model, method, caplog):
    fresh, m = model(method), loud(model(method))
    T, kind = len(tiny.token_ids(TEXT)), m.injection("own", inputs_of(m, TEXT))
    attention = m.attention_to_memory(TEXT)
    if kind is None:
        assert attention is None and "baseline with memory 'own' reads nothing" in caplog.text
        return
    M = T if m.adapter.needs_inputs else m.settings.num_entries
    assert attention.shape == (tiny.num_layers, tiny.num_heads, T, M)
    assert (attention >= 0).all() and attention.isfinite().all()
    mass = attention.sum(dim=-1)
    if isinstance(kind, Branch):
        torch.testing.assert_close(mass, torch.ones_like(mass))
    else:
        assert mass.max() <= 1 + 1e-5 and mass.mean() > 1e-3
        assert fresh.attention_to_memory(TEXT).max() == 0  # gates at 0: silent, and said so
    assert m.attention_to_memory(TEXT, memory="off") is None and "with memory 'off' reads nothing" in caplog.text
    assert not torch.equal(attention, m.attention_to_memory(TEXT, memory="zero"))
    assert m.state and torch.equal(m.logits(TEXT), m.logits(TEXT))  # looking leaves nothing behind


def test_hebbian_entries_are_seen_from_their_own_token_on(model):
    attention = loud(model("hebbian")).attention_to_memory(TEXT)
    T = attention.shape[-1]
    assert attention[..., ~torch.ones(T, T, dtype=torch.bool).tril()].max() == 0
    assert attention[..., torch.ones(T, T, dtype=torch.bool).tril()].min() > 0


@pytest.mark.parametrize("method", ALL)
def test_a_state_that_does_not_fit_is_refused(model, method):
    m = model(method)
    kept = m.state
    wrong = [{"Q": torch.zeros(3, 3)}]
    wrong += [{name: t[1:] for name, t in kept.items()}, {name: t[..., 1:] for name, t in kept.items()}, {}] if kept else []
    for state in wrong:
        with pytest.raises(ValueError, match="same method and capacity"):
            m.state = state
        with pytest.raises(ValueError, match="same method and capacity"):
            m.loss(QUESTIONS, ANSWERS, memory=state)
    with pytest.raises(ValueError, match="'own', 'zero', 'off', or a state"):
        m.answer(QUESTIONS, memory="on")
    assert m.state is kept


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ALL)
def test_save_and_load_round_trip_bit_for_bit(tiny, model, method, tmp_path):
    from safetensors import safe_open

    m = loud(model(method, seed=7))
    m.save_pretrained(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["adapter.safetensors", "config.json"]
    assert json.loads((tmp_path / "saved/config.json").read_text())["settings"]["seed"] == 7
    with safe_open(tmp_path / "saved/adapter.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert names == set(m.adapter.state_dict())
    assert not names & set(tiny.model.state_dict())
    frozen = {w.data_ptr() for w in tiny.model.parameters()}
    assert not frozen & {t.data_ptr() for t in m.adapter.state_dict().values()}
    back = pdmem.MemoryModel.from_pretrained(tmp_path / "saved", backbone=tiny)
    assert back.settings == m.settings
    for name, t in m.adapter.state_dict().items():
        assert torch.equal(back.adapter.state_dict()[name], t)
    assert same_state(back.state, m.reset())  # the state is saved apart
    assert torch.equal(back.logits(TEXT), m.logits(TEXT))
    m.write(TURNS)
    m.save_state(tmp_path / "deep/state.safetensors")
    assert same_state(back.load_state(tmp_path / "deep/state.safetensors"), m.state)
    assert same_state(back.state, m.state) and torch.equal(back.logits(TEXT), m.logits(TEXT))


def test_from_pretrained_finds_the_backbone_by_its_name(tiny, model, tmp_path):
    model("slot").save_pretrained(tmp_path)
    back = pdmem.MemoryModel.from_pretrained(str(tmp_path))
    assert back.backbone.name == tiny.name and back.backbone.fingerprint == tiny.fingerprint


@pytest.fixture
def saved(model, tmp_path):
    m = model("slot", num_entries=16)
    m.write(TURNS[:1])
    m.save_pretrained(tmp_path)
    m.save_state(tmp_path / "state.safetensors")
    return tmp_path


def test_another_backbone_is_refused(tiny, model, saved):
    other = pdmem.load_backbone("tiny-llama" if tiny.family == "gpt2" else "tiny-gpt2")
    same_shape = pdmem.load_backbone("tiny-gpt2", seed=1)
    for backbone in (other, same_shape):
        with pytest.raises(ValueError, match="load it with its own backbone"):
            pdmem.MemoryModel.from_pretrained(saved, backbone=backbone)
        with pytest.raises(ValueError, match="another backbone"):
            pdmem.MemoryModel(backbone, "slot", num_entries=16).load_state(saved / "state.safetensors")


def test_a_state_of_another_memory_is_refused(model, saved):
    for different in (dict(seed=1), dict(gamma=0.5), dict(capacity=10), dict(top_k=4)):
        with pytest.raises(ValueError, match=f"{next(iter(different))}: .* there, .* here"):
            model("slot", **{"num_entries": 16} | different).load_state(saved / "state.safetensors")
    with pytest.raises(ValueError, match="method: 'slot' there, 'kv_extension' here"):
        model("kv_extension", num_entries=16).load_state(saved / "state.safetensors")


def test_an_adapter_of_another_method_is_refused(tiny, model, saved):
    other = saved / "other"
    model("gated").save_pretrained(other)
    (other / "adapter.safetensors").replace(saved / "adapter.safetensors")
    with pytest.raises(ValueError, match="of another method"):
        pdmem.MemoryModel.from_pretrained(saved, backbone=tiny)


@pytest.mark.parametrize("file", ["config.json", "adapter.safetensors", "state.safetensors"])
def test_a_missing_file_is_named(tiny, model, saved, file):
    (saved / file).unlink()
    with pytest.raises(FileNotFoundError, match=file):
        load(tiny, model, saved, file)


def load(tiny, model, folder, file):
    if file == "state.safetensors":
        return model("slot", num_entries=16).load_state(folder / file)
    return pdmem.MemoryModel.from_pretrained(folder, backbone=tiny)


@pytest.mark.parametrize("keep", [0.0, 0.02, 0.5, 0.999])
@pytest.mark.parametrize("file", ["config.json", "adapter.safetensors", "state.safetensors"])
def test_a_truncated_file_is_refused(tiny, model, saved, file, keep):
    whole = (saved / file).read_bytes()
    (saved / file).write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(ValueError, match=f"{file} is damaged"):
        load(tiny, model, saved, file)


@pytest.mark.parametrize("file", ["config.json", "adapter.safetensors", "state.safetensors"])
def test_flipped_bits_are_refused_or_harmless(tiny, model, saved, file):
    """A bit of the header or of the JSON: a clear error, or (as in a backbone's name) something that still loads."""
    whole = (saved / file).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little") if file.endswith("safetensors") else len(whole)
    rng, refused = random.Random(0), 0
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[rng.randrange(header)] ^= 1 << rng.randrange(8)
        (saved / file).write_bytes(damaged)
        try:
            load(tiny, model, saved, file)
        except (ValueError, RuntimeError) as error:
            refused += 1
            assert len(str(error)) > 30, f"not a sentence: {error!r}"
    assert refused > 30


@pytest.mark.parametrize("content", ["[]", "null", '{"schema": "1"}', '{"schema": 1, "settings": 3}',
                                     '{"schema": 1, "settings": {"method": "slot", "colour": 1}}'])
def test_a_config_of_another_make_is_refused(tiny, saved, content):
    (saved / "config.json").write_text(content)
    with pytest.raises(ValueError, match="config.json is damaged"):
        pdmem.MemoryModel.from_pretrained(saved, backbone=tiny)


def test_a_config_from_the_future_is_refused(tiny, saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"schema": 99, "settings": {"not known": "today"}}))
    with pytest.raises(ValueError, match="schema 99.*update pdmem"):
        pdmem.MemoryModel.from_pretrained(saved, backbone=tiny)


# ---- names and sizes -------------------------------------------------------------------------------------------------


def test_unknown_method_or_capacity_lists_the_known_ones(model):
    with pytest.raises(ValueError, match="unknown method 'slots'") as error:
        model("slots")
    assert all(f"{name} ({method.alias})" in str(error.value) for name, method in pdmem.REGISTRY.items())
    for capacity in (2, 0, -10):
        with pytest.raises(ValueError, match="unknown capacity.*known are 1 and 10"):
            model("slot", capacity)
    for capacity in ("1", None, 1.0, True):
        with pytest.raises(ValueError, match="capacity=.*expected int"):
            model("slot", capacity)


@pytest.mark.parametrize("wrong", [dict(num_entries=0), dict(d_h=-1), dict(gamma=1.5), dict(gamma=float("nan")),
                                   dict(top_k=65), dict(top_k=0), dict(num_entries="64"), dict(num_entries=6.5),
                                   dict(seed="x"), dict(colour="red")])
def test_a_bad_override_is_named(model, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        model("slot", **wrong)


def test_aliases_are_the_registry_in_the_papers_order(model):
    assert pdmem.METHODS == ("prefix", "cross_attention", "kv_extension", "hebbian", "gated", "slot")
    assert [model(f"M.{n}").method for n in range(1, 7)] == list(pdmem.METHODS)
    assert model("baseline").method == "baseline"


@pytest.mark.parametrize("method", READERS)
def test_capacity_sets_the_state_and_overrides_it(model, method):
    shapes = {"P": [(64, 64), (640, 64), (5, 64)], "M": [(256, 256), (810, 810), (5, 5)]}
    for i, m in enumerate([model(method, 1), model(method, 10), model(method, num_entries=5, d_h=5, top_k=2)]):
        d = m.backbone.hidden_size
        assert {name: tuple(t.shape) for name, t in m.state.items()} == {
            name: (shapes[name][i][0], d if name == "P" else shapes[name][i][1]) for name in m.state}


@pytest.mark.parametrize("call", [lambda m: m.logits(""), lambda m: m.loss([], []), lambda m: m.loss(["What?"], []),
                                  lambda m: m.answer("What?"), lambda m: m.write(""), lambda m: m.write(["Ada: hi", " "])])
def test_empty_or_misshapen_questions_and_turns_are_refused(model, call):
    m = model("slot")
    kept = m.state
    with pytest.raises(ValueError):
        call(m)
    assert m.state is kept


def test_no_question_gives_no_answer(model):
    assert model("slot").answer([]) == []


# ---- the seed, and nobody else's generator ---------------------------------------------------------------------------


def generators():
    kind, keys, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), (kind, keys.tolist(), *rest), random.getstate()


TRAINING = dict(epochs=1, batch_size=4, lr=1e-2, warmup_steps=0, max_questions=8, progress=False, autocast=False)


@pytest.mark.parametrize("method", ALL)
def test_one_seed_one_result_and_no_global_generator_is_touched(tiny, model, method):
    conversations = pdmem.synthetic_conversations(2, 1, seed=3, turns_per_session=8)
    before = generators()

    def run(seed, global_seed):
        torch.manual_seed(global_seed)  # must not matter
        mine = generators()
        m = model(method, seed=seed, num_entries=16, d_h=16)
        start = {name: t.clone() for name, t in m.adapter.state_dict().items()}
        P_0 = m.state
        history = pdmem.train(m, conversations, seed=seed, **TRAINING)
        m.write(TURNS)
        answers = m.answer(QUESTIONS, max_new_tokens=4)
        assert generators() == mine
        return start, P_0, history["loss"].tolist(), m.adapter.state_dict(), m.state, answers

    rng = torch.get_rng_state()
    a, b, c = run(5, 0), run(5, 1), run(6, 0)
    torch.set_rng_state(rng)
    assert generators() == before
    for x, y in zip(a, b, strict=True):
        assert same_state(x, y) if isinstance(x, dict) else x == y
    if method != "baseline":
        assert not any(torch.equal(c[0][name], t) for name, t in a[0].items() if t.numel() > 100 and t.std() > 0)
        assert not same_state(a[1], c[1]) and a[2] != c[2]
        assert any(not torch.equal(a[0][name], t) for name, t in a[3].items())  # and it did train


def test_loading_and_evaluating_touch_no_global_generator(model):
    metrics.locomo_f1("cat", "cat", 4)  # the first import of nltk brings in `rich`, which draws a number for itself
    before = generators()
    pdmem.load_backbone("tiny-gpt2")
    pdmem.load_backbone("tiny-llama")
    conversations = pdmem.synthetic_conversations(2, 1, seed=3, turns_per_session=8)
    pdmem.evaluate(model("slot", num_entries=16), conversations, questions_per_bucket=2, max_new_tokens=2, progress=False,
                   autocast=False)
    assert generators() == before


def test_no_other_devices_generator_is_seeded(tiny, monkeypatch):
    def refuse(seed):
        raise AssertionError("torch.manual_seed reseeds the generators of CUDA, MPS and XPU too")

    monkeypatch.setattr(torch, "manual_seed", refuse)
    assert pdmem.load_backbone(tiny.name).fingerprint == tiny.fingerprint
    one, other = LoRAModel(tiny, 2000, seed=1), LoRAModel(tiny, 2000, seed=2)
    assert not all(map(torch.equal, one.parameters(), other.parameters()))


def test_tiny_backbones_come_from_their_seed(tiny):
    assert pdmem.load_backbone(tiny.name, seed=42).fingerprint == tiny.fingerprint
    assert pdmem.load_backbone(tiny.name, seed=43).fingerprint != tiny.fingerprint


@pytest.mark.parametrize("method", READERS)
def test_start_is_drawn_as_the_method_says(model, method):
    """P_0 ~ N(0, 0.02^2), a Hebbian matrix of norm 0.02; and different draws for different things of one seed."""
    m = model(method, 10)
    ((name, P_0),) = m.state.items()
    std = {"P": 0.02, "M": 0.02 / m.settings.d_h}[name]
    assert abs(P_0.std() / std - 1) < 0.02 and abs(P_0.mean()) < 0.02 * std
    maps = [b for _, b in m.adapter.named_buffers() if b.shape == (m.backbone.hidden_size,) * 2]
    assert not any(torch.equal(a, b) for i, a in enumerate(maps) for b in maps[:i])


# ---- a seventh method ------------------------------------------------------------------------------------------------


class Average(Method):
    """The least a method can be: the running mean of all turns, added to every block through one map."""

    title, alias = "Average", "M.7"

    def __init__(self, backbone, settings):
        super().__init__(backbone, settings)
        self.trained("read_O", self.d, self.d)
        self.strength = nn.Parameter(torch.zeros(()))

    def initial_state(self):
        return {"mean": torch.zeros(self.d)}

    def write(self, state, H):
        return {"mean": self.settings.gamma * state["mean"] + (1 - self.settings.gamma) * H.mean(dim=0)}

    def read(self, state, inputs=None):
        return Branch(lambda h, layer: (self.strength * state["mean"] @ self.read_O).expand_as(h))


def test_a_new_method_is_one_class_and_one_registry_line(tiny, model, monkeypatch, tmp_path):
    monkeypatch.setitem(pdmem.REGISTRY, "average", Average)
    conversations = pdmem.synthetic_conversations(2, 1, seed=3, turns_per_session=8)
    m = model("M.7")
    assert m.method == "average"
    history = pdmem.train(m, conversations, **TRAINING)
    assert len(history) and m.adapter.strength != 0
    m.write(TURNS)
    assert not torch.equal(m.logits(TEXT), m.logits(TEXT, memory="off"))
    assert m.attention_to_memory(TEXT) is None
    evaluation = pdmem.evaluate(m, conversations, questions_per_bucket=3, max_new_tokens=2, progress=False, autocast=False)
    assert len(evaluation.summary()) == 1 and (evaluation.per_question["logp_own"] != evaluation.per_question["logp_off"]).all()
    m.save_pretrained(tmp_path)
    assert torch.equal(pdmem.MemoryModel.from_pretrained(tmp_path, tiny).adapter.read_O, m.adapter.read_O)
    assert pdmem.Experiment(method="average").method == "average"
    with pytest.raises(ValueError, match=r"average \(M.7\)"):
        model("mean")


def test_a_new_method_takes_no_alias_away_and_needs_none(model, monkeypatch):
    class Mine(pdmem.REGISTRY["slot"]):
        pass

    class Nameless(AttentionCoupledBank, KeyValueReader):
        pass

    monkeypatch.setitem(pdmem.REGISTRY, "mine", Mine)
    monkeypatch.setitem(pdmem.REGISTRY, "nameless", Nameless)
    assert [model(name).method for name in ("M.6", "mine", "slot")] == ["slot", "mine", "slot"]
    with pytest.raises(ValueError, match=r"slot \(M.6\).*, mine, nameless$"):
        model("mime")


class Counted(pdmem.REGISTRY["kv_extension"]):
    """Keeps the number of its turns, and a copy of its rows, in tensors of their own."""

    alias, title = "M.8", "Counted"

    def initial_state(self):
        return {"n": torch.tensor(0.0), **super().initial_state(), "copy": 2 * super().initial_state()["P"]}

    def write(self, state, H):
        new = super().write(state, H)
        return {"n": state["n"] + 1, **new, "copy": 2 * new["P"]}


def test_a_method_of_two_tensors_is_evaluated_and_forgets(tiny, model, monkeypatch, caplog):
    monkeypatch.setitem(pdmem.REGISTRY, "counted", Counted)
    m, conversations = model("counted", num_entries=8), pdmem.synthetic_conversations(2, 1, seed=3, turns_per_session=8)
    evaluation = pdmem.evaluate(m, conversations, questions_per_bucket=2, max_new_tokens=2, progress=False, autocast=False)
    assert len(evaluation.per_question) and evaluation.turns.empty and "several tensors" in caplog.text
    session = pdmem.Session(m, keep_text=True)
    session.write(TURNS)
    assert session.forget(0).exact and session.state["n"] == len(TURNS) - 1
    shuffled, random = (of(session.state, seed=1) for of in (evaluation_of.shuffled_bank, evaluation_of.random_bank))
    assert torch.equal(shuffled["copy"], 2 * shuffled["P"]) and not torch.equal(shuffled["P"], session.state["P"])
    assert shuffled["n"] == random["n"] == session.state["n"]
    asked = evaluation.per_question["question"].map(lambda q: len(tiny.token_ids(pdmem.prompts.prompt_text(q))))
    assert (evaluation.per_question["tokens"] == asked + 8).all()  # the prompt and eight entries
    with pytest.raises(ValueError, match="no meaning is known"):
        session.merge(pdmem.Session(m))


def test_registry_holds_classes_that_name_themselves():
    assert {m.alias for m in pdmem.REGISTRY.values()} == {*(f"M.{n}" for n in range(1, 7)), "baseline"}
    assert len({m.title for m in pdmem.REGISTRY.values()}) == len(pdmem.REGISTRY)
    assert pdmem.REGISTRY["baseline"] is Baseline
    assert not [path for path in Path(pdmem.__file__).parent.glob("*.py") if "trust_remote_code=True" in path.read_text()]
