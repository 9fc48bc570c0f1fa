"""What must not depend on what goes on around: other threads, gradients left over, autocast, torch's defaults."""

import threading

import pytest
import torch

import pdmem_lib as pdmem

METHODS = list(pdmem.METHODS)
QUESTIONS, ANSWERS = ["What did Ann adopt?", "Who?"], ["a cat", "Ann Bee"]
TURNS = ["Ann: I adopted a cat.", "Bob: Oh, how lovely it must be to have one!", "Ann: It is."]
FEW = dict(epochs=1, max_questions=8, batch_size=2, lr=1e-2, warmup_steps=1, progress=False, autocast=False)


@pytest.fixture(scope="module")
def conversations():
    return pdmem.synthetic_conversations(2, 2, seed=3)


@pytest.mark.parametrize("method", METHODS)
def test_another_threads_memory_is_not_read_here(opened, method):
    other, here = opened(method), opened("slot")
    other.write(TURNS)
    here.write(TURNS)
    wanted = {memory: here.logits("Ann has a cat", memory=memory) for memory in ("off", "own")}
    theirs, failed, done = other.logits("Bob"), [], threading.Event()

    def ask():
        try:
            for _ in range(60):
                assert torch.equal(other.logits("Bob"), theirs)
        except Exception as error:
            failed.append(error)
        done.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    asked = 0
    while not done.is_set() or not asked:
        for memory, logits in wanted.items():
            assert torch.equal(here.logits("Ann has a cat", memory=memory), logits)
        asked += 1
    thread.join()
    assert not failed


@pytest.mark.parametrize("method", ["cross_attention", "gated"])
def test_a_branch_of_one_model_is_not_read_within_a_pass_of_another(tiny, opened, method):
    """M.4 asks for frozen states in the middle of another's block."""
    from pdmem_lib import seam

    m = opened(method)
    m.write(TURNS)
    wanted = tiny.encode(["a cat"])[0]
    with seam.inject(tiny.model, m.injection("own")):
        assert torch.equal(tiny.encode(["a cat"])[0], wanted)


@pytest.mark.parametrize("method", METHODS)
def test_another_models_pass_within_a_pass_leaves_this_ones_memory(tiny, opened, method):
    from pdmem_lib import seam

    m, other = opened(method), pdmem.load_backbone(tiny.name, seed=7, device="cpu")
    m.write(TURNS)
    wanted, ids = m.logits("a cat"), torch.tensor([tiny.token_ids("a cat")])
    with torch.no_grad(), seam.inject(tiny.model, m._injection_for(["own"], ids, torch.ones_like(ids))):
        with seam.inject(other.model, None):
            assert torch.equal(tiny.model(ids, use_cache=False).logits[0], wanted)


def test_questions_states_are_kept_by_threads_side_by_side(tiny):
    import sys

    rows, failed, before = [[i % 250, i // 250] for i in range(400)], [], sys.getswitchinterval()

    def ask():
        try:
            for row in rows:
                tiny.states_of(row)
        except Exception as error:
            failed.append(error)

    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=ask, daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not failed


def test_installing_twice_adds_a_branch_once(opened):
    m = opened("gated")
    wanted = m.logits("a cat")
    pdmem.Backbone(m.backbone.name, m.backbone.family, m.backbone.model, m.backbone.tokenizer)
    assert torch.equal(m.logits("a cat"), wanted)


@pytest.mark.parametrize("train", ["train", "train_pairs"])
def test_a_gradient_left_over_does_not_enter_training(model, conversations, train):
    def trained(look):
        m = model("slot")
        if look:
            m.loss(QUESTIONS, ANSWERS).backward()
        if train == "train":
            pdmem.train(m, conversations, **FEW)
        else:
            def draw(step):
                if look:
                    m.loss(QUESTIONS, ANSWERS).backward()
                return [m.state, m.state], QUESTIONS, ANSWERS

            pdmem.training.train_pairs(m, draw, steps=2, progress=False)
        return m.adapter.state_dict()

    plain, looked = trained(False), trained(True)
    assert all(torch.equal(plain[name], looked[name]) for name in plain)


@pytest.mark.parametrize("method", METHODS)
def test_a_write_is_not_rounded_by_the_callers_autocast(model, method):
    plain, rounded, told = model(method), model(method), pdmem.Session(model(method))
    plain.write(TURNS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded.write(TURNS)
        told.write(TURNS)
    for state in (rounded.state, told.state):
        assert all(torch.equal(t, state[name]) for name, t in plain.state.items())


def test_a_rule_is_called_by_name_too(model):
    m = model("slot")
    H, a, u = torch.randn(3, m.backbone.hidden_size), m.adapter.write_a, m.adapter.write_u
    one = pdmem.write.sparse_slots(m.state["P"], H, a, u, 0.9, 2)
    assert torch.equal(pdmem.write.sparse_slots(P=m.state["P"], H=H, W_a=a, W_u=u, gamma=0.9, top_k=2), one)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backbone", ["tiny-gpt2", "tiny-llama"])
def test_a_list_leaves_what_its_turns_leave_one_by_one(method, backbone):
    backbone = pdmem.load_backbone(backbone, device="cpu")
    whole, single = (pdmem.MemoryModel(backbone, method) for _ in range(2))
    whole.write(TURNS)
    for turn in TURNS:
        single.write(turn)
    assert all(torch.equal(t, single.state[name]) for name, t in whole.state.items())


@pytest.fixture
def defaults():
    """Torch's defaults, put back."""
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, "meta"], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_torchs_defaults_change_nothing(defaults, method, default):
    def made():
        backbone = pdmem.load_backbone("tiny-gpt2", device="cpu")
        m = pdmem.MemoryModel(backbone, method)
        m.write(TURNS)
        m.loss(QUESTIONS, ANSWERS).backward()
        return backbone.fingerprint, {**m.adapter.state_dict(), **m.state, "logits": m.logits("a cat")}, m.answer(QUESTIONS, 3)

    fingerprint, tensors, answers = made()
    if default == "meta":
        torch.set_default_device(default)
    else:
        torch.set_default_dtype(default)
    again = made()
    assert again[0] == fingerprint and again[2] == answers
    for name, tensor in tensors.items():
        assert again[1][name].dtype == tensor.dtype and torch.equal(again[1][name], tensor), name


@pytest.mark.parametrize("method", METHODS)
def test_a_state_made_in_inference_mode_can_be_trained_on(model, method):
    m, other = model(method), model(method)
    with torch.inference_mode():
        m.write(TURNS)
        other.state = {name: t + 0.0 for name, t in m.state.items()}
    for one in (m, other):
        one.loss(QUESTIONS, ANSWERS).backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in one.parameters())


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_training_asks_for_its_own_gradients(model, conversations, around):
    plain, within = model("slot"), model("slot")
    wanted = pdmem.train(plain, conversations, **FEW)
    with around():
        found = pdmem.train(within, conversations, **FEW)
    assert found["loss"].tolist() == wanted["loss"].tolist()


def test_a_state_given_is_the_models_own(model):
    one, other = model("slot"), model("slot")
    one.write(TURNS)
    other.state = one.state
    kept = other.state["P"].clone()
    one.state["P"].zero_()
    assert torch.equal(other.state["P"], kept)
