"""The fast paths beside the plain ones: greedy decoding whose finished rows leave, attention by matmuls, kept states."""

import pytest
import torch

import pdmem_lib as pdmem
from pdmem_lib import backbone as backbones
from pdmem_lib import seam
from pdmem_lib.decoding import greedy_lines, positions_of
from pdmem_lib.methods import Inputs

QUESTIONS = ["Who has a cat?", "Where did Caroline go on Sunday, and with whom?", "Why?", "What is it called? Say it.", "When?"]
TURNS = ["Ann: I adopted a cat.", "Ben: How lovely! What is its name?"]


def generated(backbone, ids, mask, injection, max_new_tokens: int) -> list[str]:
    """What transformers' own ``generate`` says, every row to the end, cut to its first line after leading line ends."""
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=backbone.tokenizer.pad_token_id,
                              eos_token_id=backbone.tokenizer.eos_token_id)
    with seam.inject(backbone.model, injection):
        output = backbone.model.generate(ids, attention_mask=mask, generation_config=config)
    texts = backbone.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return [text.strip().split("\n")[0].strip() for text in texts]


@pytest.fixture
def opened(model):
    """``opened(method)``: a model whose memory is read, its gates being open."""
    def build(method):
        m = model(method)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in m.parameters():
                p.add_(torch.randn(p.shape, generator=generator) * 0.3)
        m.write(TURNS)
        return m
    return build


@pytest.mark.parametrize("method", [*pdmem.METHODS, "baseline"])
@torch.no_grad()
def test_finished_rows_leave_and_nothing_else_changes(opened, method):
    m = opened(method)
    backbone = m.backbone
    ids, mask = backbone.pad([backbone.token_ids(text) for text in QUESTIONS], side="left")
    states = [m.state, m.adapter.initial_state(), {name: torch.zeros_like(t) for name, t in m.state.items()}]
    inputs = m._frozen_inputs(ids, mask) if m.adapter.needs_inputs else None
    injection = m.adapter.read_each(states, [inputs] * 3) if m.state else None
    ids, mask = (x.repeat(3, 1) for x in (ids, mask))
    wanted = generated(backbone, ids, mask, injection, 40)
    # random models seldom end a line: let the commonest of what they say end it, at a different step in each row
    said = torch.tensor([i for text in wanted for i in backbone.token_ids(text)[2:]])
    backbone.__dict__["newline_ids"] = [*backbone.newline_ids, int(said.mode().values)]
    try:
        end = backbone.tokenizer.decode([int(said.mode().values)])
        found = greedy_lines(backbone, ids, mask, injection, 40)
    finally:
        del backbone.__dict__["newline_ids"]
    lengths = {len(text) for text in found}
    assert len(lengths) > 1, "rows must end at different steps for this test to mean anything"
    for one, whole in zip(found, wanted, strict=True):
        assert whole.startswith(one) and (end in one + whole[len(one) :][:2] or one == whole)


@pytest.mark.parametrize("method", [*pdmem.METHODS, "baseline"])
@torch.no_grad()
def test_drafts_change_no_answer_and_right_ones_save_passes(opened, method, monkeypatch):
    m = opened(method)
    backbone, passes, limit = m.backbone, [], 40
    ids, mask = backbone.pad([backbone.token_ids(text) for text in QUESTIONS], side="left")
    states = [m.state, m.adapter.initial_state(), {name: -t for name, t in m.state.items()}]
    inputs = m._frozen_inputs(ids, mask) if m.adapter.needs_inputs else None
    injection = m.adapter.read_each(states, [inputs] * 3) if m.state else None
    ids, mask = (x.repeat(3, 1) for x in (ids, mask))
    written, forward = [], type(backbone.model.base_model).forward
    monkeypatch.setattr(backbone.tokenizer, "batch_decode", lambda lines, **_: (written.append(lines), [""] * len(lines))[1])
    monkeypatch.setattr(type(backbone.model.base_model), "forward", lambda *a, **k: (passes.append(1), forward(*a, **k))[1])
    greedy_lines(backbone, ids, mask, injection, limit)
    commonest = torch.tensor([i for line in written.pop() for i in line[2:]]).mode().values  # it ends a line, as above
    monkeypatch.setitem(backbone.__dict__, "newline_ids", [*backbone.newline_ids, int(commonest)])
    passes.clear()
    greedy_lines(backbone, ids, mask, injection, limit)
    plain, slow = written.pop(), len(passes)
    assert len({len(line) for line in plain}) > 2 and slow == max(map(len, plain))  # rows end at different steps
    for draft in (lambda line, i: line, lambda line, i: line[: i % 4], lambda line, i: line + line,
                  lambda line, i: [] if i % 3 else line, lambda line, i: [*line[: i % 5], 7, 7, 7],
                  lambda line, i: [7] * (i % 20)):
        passes.clear()
        greedy_lines(backbone, ids, mask, injection, limit, drafts=[draft(line, i) for i, line in enumerate(plain)])
        assert written.pop() == plain
        if draft(plain[0], 0) == plain[0] and draft(plain[1], 1) == plain[1]:
            assert len(passes) == 1  # all were right


@pytest.mark.parametrize("method", pdmem.METHODS)
def test_kept_rows_read_their_own_banks(opened, method):
    """Logits of rows that are left after others went, each under its bank, equal those of the whole batch."""
    m = opened(method)
    ids, mask = m.backbone.pad([m.backbone.token_ids(text) for text in QUESTIONS], side="right")
    states = [m.state, m.adapter.initial_state(), {name: t * -1 for name, t in m.state.items()}]
    inputs = m._frozen_inputs(ids, mask) if m.adapter.needs_inputs else None
    with torch.no_grad():
        injection = m.adapter.read_each(states, [inputs] * 3)
        rows = ids.repeat(3, 1)
        with seam.inject(m.backbone.model, injection):
            whole = m.backbone.model(rows, use_cache=False).logits
        kept = torch.ones(15, dtype=torch.bool)
        for gone in ([3], [0, 7], [5, 6, 8, 9], [1, 2, 4, 10], [12]):  # unequal runs; a run of one; one left; fewer of it
            new = kept.clone()
            new[gone] = False
            injection = seam.keep(injection, new[kept])
            kept = new
            with seam.inject(m.backbone.model, injection):
                part = m.backbone.model(rows[kept], use_cache=False).logits
            torch.testing.assert_close(part, whole[kept], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", pdmem.METHODS)
def test_the_gradient_by_matmuls_is_that_of_sdpa(opened, method, monkeypatch):
    m = opened(method)
    gradients = []
    for by_matmul in (True, False):
        if not by_matmul:
            monkeypatch.setattr(seam, "_cheap_backward", lambda query: False)
        m.adapter.zero_grad()
        loss = m.loss(QUESTIONS, ["Ann", "to the lake", "so", "Tom", "now"])
        loss.backward()
        gradients.append([loss.detach(), *(p.grad.clone() for p in m.parameters())])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("masked", [0, 5, 8], ids=["none", "some", "a whole row"])
def test_the_log_sum_of_exponentials_is_torchs(masked):
    x = 30 * torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
    x[1, :, :masked] = torch.finfo(torch.float32).min
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    one, other = seam._logsumexp(ours), theirs.logsumexp(dim=-1, keepdim=True)
    torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
    for y in (one, other):
        y.clamp_min(-1e3).square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_without_a_gradient_and_without_an_injection_stock_sdpa_runs(model, plain):
    m = model("slot")
    ids = torch.tensor([m.backbone.token_ids(QUESTIONS[1])])
    embedded = m.backbone.model.get_input_embeddings()(ids).detach().requires_grad_()
    with seam.inject(m.backbone.model, None):
        ours = m.backbone.model(inputs_embeds=embedded).logits
    theirs = plain(inputs_embeds=embedded).logits
    assert torch.equal(ours, theirs)


def test_a_questions_states_are_kept_and_depend_on_no_batch(tiny, monkeypatch):
    rows = [tiny.token_ids(text) for text in QUESTIONS]
    first = tiny.states_of(rows[0])
    assert tiny.states_of(rows[0]) is first
    torch.testing.assert_close(first, tiny.encode([QUESTIONS[0]])[0])
    with tiny.autocast(True):
        assert torch.equal(tiny.states_of(rows[1]), tiny.encode([QUESTIONS[1]])[0])  # in float32 all the same
    monkeypatch.setattr(backbones, "KEPT_BYTES", 1)
    for text in ("one", "another"):
        tiny.states_of(tiny.token_ids(text))
    assert [*tiny._kept_states] == [tuple(tiny.token_ids("another"))]


def test_hebbian_reads_the_question_alone(model):
    m = model("hebbian")
    ids, mask = m.backbone.pad([m.backbone.token_ids(text) for text in QUESTIONS], side="right")
    question = mask.bool() & (torch.arange(ids.shape[1]) < 5)
    inputs = m._frozen_inputs(ids, question)
    assert isinstance(inputs, Inputs) and not inputs.hidden[~question].any()
    torch.testing.assert_close(inputs.hidden[1, :5], m.backbone.encode([QUESTIONS[1]])[0][:5])


def test_positions_count_real_tokens():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    assert positions_of(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 2]]
