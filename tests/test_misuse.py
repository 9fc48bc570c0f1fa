"""What is asked wrongly is refused with a sentence that says the mend, and nothing is done by halves."""

import dataclasses
import json
import re
import subprocess
import sys
from collections import deque

import numpy as np
import pandas as pd
import pytest
import torch

import pdmem_lib as pdmem
from pdmem_lib.backbone import use_bf16
from pdmem_lib.lora import LoRAModel
from pdmem_lib.settings import whole_number

TURNS = ["Ann: hi", "Bob: ho"]


@pytest.fixture(scope="module")
def conversations():
    return pdmem.synthetic_conversations(2, 2, seed=3)


@pytest.mark.parametrize("kind", [pd.Series, np.array, deque, tuple, iter], ids=lambda kind: kind.__name__)
def test_any_list_of_turns_is_written_turn_by_turn(model, kind):
    m, wanted, session = (model("slot", num_entries=16) for _ in range(3))
    wanted.write(TURNS)
    assert torch.equal(m.write(kind(TURNS))["P"], wanted.state["P"])
    told = pdmem.Session(session)
    assert told.write(kind(TURNS)) == [0, 1] and torch.equal(told.state["P"], wanted.state["P"])
    assert pdmem.Session(model("slot", num_entries=16)).peek(kind(TURNS), "Who?", 3) == wanted.answer(["Who?"], 3)[0]


@pytest.mark.parametrize("turns", [None, 3, {"Ann": "hi"}, {"Ann: hi"}, [["Ann: hi"]], [None], b"Ann: hi", np.array("Ann: hi"),
                                   pd.DataFrame({"speaker": ["Ann"], "text": ["hi"]})], ids=lambda turns: type(turns).__name__)
def test_what_is_no_turn_is_not_written(model, conversations, turns):
    m = model("slot", num_entries=16)
    before = m.state["P"].clone()
    for wrong in (turns, conversations[0], conversations[0].sessions):
        with pytest.raises(ValueError, match="turn"):
            m.write(wrong)
        with pytest.raises(ValueError, match="turn"):
            pdmem.Session(m).write(wrong)
        with pytest.raises(ValueError, match="turn"):
            pdmem.Session(m).peek(wrong, "Who?")
    assert torch.equal(m.state["P"], before)


@pytest.mark.parametrize("method", ["slot", "prefix"])
def test_forgetting_nothing_changes_nothing(model, method):
    told = pdmem.Session(model(method))
    told.write(TURNS)
    before, log = dict(told.state), told.transcript()
    gone = told.forget([])
    assert gone.exact and told.turns == 2 and told.transcript().equals(log)
    assert all(torch.equal(t, told.state[name]) for name, t in before.items())


@pytest.mark.parametrize("number", [0, -1, 1.5, None, "3"])
def test_counts_are_whole_numbers_above_zero(model, number):
    m = model("slot", num_entries=16)
    with pytest.raises(ValueError, match="max_new_tokens must be a whole number of at least 1"):
        m.answer(["What?"], max_new_tokens=number)
    with pytest.raises(ValueError, match="batch_size must be a whole number of at least 1"):
        m.answer(["What?"], 3, batch_size=number)
    if number is not None:
        with pytest.raises(ValueError, match="batch_size must be a whole number of at least 1"):
            m.scores_under(["own"], ["What?"], ["a cat"], batch_size=number)


def test_questions_and_answers_are_lists_of_strings(model):
    m, table = model("slot", num_entries=16), pd.DataFrame({"question": ["Who?", "What?"], "answer": ["Ann", "a cat"]})
    wanted = m.loss(["Who?", "What?"], ["Ann", "a cat"])
    assert torch.equal(m.loss(table["question"], table["answer"]), wanted)
    assert m.answer(table["question"], 3) == m.answer(["Who?", "What?"], 3)
    for questions, answers in [("Who?", "Ann!"), (["Who?"], "A"), ("W", ["Ann"]), (["Who?"], [None]), (None, ["Ann"]),
                               ([3], ["Ann"])]:
        with pytest.raises(ValueError, match="list of strings"):
            m.loss(questions, answers)
        with pytest.raises(ValueError, match="list of strings"):
            m.score_pairs(["own"], questions, answers)
    for asked in ("Who?", None, [None]):
        with pytest.raises(ValueError, match="list of strings"):
            m.answer(asked)
    with pytest.raises(ValueError, match="list of strings"):
        m.answer(["Who?"], contexts=[None])
    with pytest.raises(ValueError, match="list of strings"):
        m.token_log_probs("Who?", None)
    with pytest.raises(ValueError, match="at least one"):
        m.answers_under([], ["Who?"])
    with pytest.raises(ValueError, match="at least one"):
        m.scores_under([], ["Who?"], ["Ann"])
    with pytest.raises(ValueError, match="a draft a question"):
        m.answers_under(["own"], ["Who?", "What?"], drafts=["Ann"])


def test_text_that_is_no_unicode_is_refused(model):
    m = model("slot", num_entries=16)
    for ask in (m.write, m.logits, lambda text: m.answer([text]), lambda text: m.loss(["Who?"], [text])):
        with pytest.raises(ValueError, match="lone surrogates"):
            ask("Ann: \ud800")


@pytest.mark.parametrize("state", [None, 3, {"P": [[0.0]]}, {"P": np.zeros((16, 64))}], ids=repr)
def test_a_state_is_a_dict_of_tensors(model, state):
    m = model("slot", num_entries=16)
    with pytest.raises(ValueError, match="give a dict of tensors"):
        m.state = state
    with pytest.raises(ValueError, match="give a dict of tensors"):
        m.logits("a cat", memory=state)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_state_that_is_not_finite_is_refused(model, number):
    m = model("slot", num_entries=16)
    bad = {"P": m.state["P"].clone().index_fill_(0, torch.tensor([3]), number)}
    with pytest.raises(ValueError, match="not finite"):
        m.state = bad
    with pytest.raises(ValueError, match="not finite"):
        m.answer(["Who?"], memory=bad)


def test_a_backbone_is_not_its_name(model, tmp_path):
    model("slot", num_entries=16).save_pretrained(tmp_path)
    for make in (lambda: pdmem.MemoryModel("tiny-gpt2", "slot"),
                 lambda: pdmem.MemoryModel.from_pretrained(tmp_path, "tiny-gpt2"),
                 lambda: LoRAModel("tiny-gpt2", 1000)):
        with pytest.raises(ValueError, match=r"give load_backbone\('tiny-gpt2'\)"):
            make()


@pytest.mark.parametrize("wrong", ["off", "false", "no", "Auto", None])
def test_autocast_is_true_false_or_auto(tiny, wrong):
    with pytest.raises(ValueError, match="unknown autocast"):
        use_bf16(wrong, tiny.device)
    with pytest.raises(ValueError, match="autocast"):
        tiny.encode(["a cat"], autocast=wrong)


@pytest.mark.parametrize("use", [pdmem.train, pdmem.evaluate])
def test_conversations_have_ids_of_their_own(model, conversations, use):
    m = model("slot", num_entries=16)
    twin = dataclasses.replace(conversations[1], id=conversations[0].id)
    with pytest.raises(ValueError, match=f"2 conversations have the id '{conversations[0].id}'"):
        use(m, [conversations[0], twin], progress=False)
    for wrong in (conversations[0], None, ["c"]):
        with pytest.raises(ValueError, match="give a list of conversations"):
            use(m, wrong, progress=False)


def test_conversations_may_come_one_by_one(model, conversations):
    few = dict(questions_per_bucket=1, max_new_tokens=2, progress=False)
    m = model("slot", num_entries=16)
    m.write(TURNS)
    listed, streamed = (pdmem.evaluate(m, c, **few).per_question for c in (conversations, iter(conversations)))
    same = [name for name in listed if name not in ("seconds",)]
    pd.testing.assert_frame_equal(listed[same], streamed[same])


def test_a_question_that_does_not_fit_is_named_before_anything_is_done(model, conversations, monkeypatch):
    m, (first, *others) = model("slot", num_entries=16), conversations
    long = dataclasses.replace(first.questions[-1], answer="word " * m.backbone.max_tokens)
    wide = dataclasses.replace(first, questions=(*first.questions[:-1], long))
    monkeypatch.setattr(m, "loss", lambda *a, **k: pytest.fail("a step was taken"))
    monkeypatch.setattr(m, "answers_under", lambda *a, **k: pytest.fail("a question was asked"))
    for use in (pdmem.train, pdmem.evaluate):
        what = re.escape(f"{long.question[:60]!r} of conversation {first.id!r} has ")
        with pytest.raises(ValueError, match=f"{what}.* shorten"):
            use(m, [wide, *others], progress=False)


def test_a_text_that_is_none_is_refused(model):
    for ask in (model("slot").logits, model("slot").attention_to_memory):
        with pytest.raises(ValueError, match="one of them is a int"):
            ask(5)


def test_a_conversation_without_turns_is_named(model, conversations):
    m = model("slot", num_entries=16)
    asked = [dataclasses.replace(q, evidence=()) for q in conversations[0].questions]
    mute = dataclasses.replace(conversations[0], turns=(), questions=tuple(asked))
    with pytest.raises(ValueError, match=f"{mute.id} has no turns"):
        pdmem.train(m, [mute], progress=False)


def test_training_that_does_not_converge_says_what_to_try(model, conversations):
    with pytest.raises(RuntimeError, match="try a lower learning rate"):
        pdmem.train(model("slot", num_entries=16), conversations, epochs=1, lr=1e30, warmup_steps=0, progress=False)


def test_settings_take_the_numbers_of_a_table(tiny):
    m = pdmem.MemoryModel(tiny, "slot", num_entries=np.int64(8), gamma=np.float32(0.5))
    with pytest.raises(ValueError, match="num_entries=.*expected int"):
        pdmem.MemoryModel(tiny, "slot", num_entries=np.array([8, 9]))
    assert m.settings.num_entries == 8 and type(m.settings.num_entries) is int and m.settings.gamma == 0.5


SHAPES = """
import torch
from pdmem_lib import write
d, H = 4, torch.ones(3, 4)
eye, flat, row = torch.eye(d), torch.ones(d, 1), torch.ones(1, d)
rules = [lambda P, Q, K, V: write.attention_coupled(P, H, Q, K, V, 0.9), lambda P, Q, K, V: write.hebbian(P, H, K, V, 0.9),
         lambda P, Q, K, V: write.sparse_slots(P, H, Q, V, 0.9, 1)]
for rule in rules:
    assert rule(eye, eye, eye, eye).shape == (d, d)
    for P, V in [(torch.ones(d), eye), (torch.ones(1, 1), eye), (eye[:, :3], eye), (eye, flat), (eye, row), (eye, torch.ones(d))]:
        try:
            rule(P, eye, eye, V)
        except ValueError as error:
            assert "shape" in str(error), error
        else:
            raise SystemExit(f"{tuple(P.shape)} and {tuple(V.shape)} went through")
"""


def test_a_write_broadcasts_nothing():
    """In a process without the annotations' checks, which only tests have."""
    subprocess.run([sys.executable, "-c", SHAPES], check=True)


@pytest.mark.parametrize("name, value", [("gamma", 0.91), ("seed", 43), ("num_entries", 17), ("method", "kv_extension")])
def test_a_config_that_the_weights_contradict_is_refused(model, tmp_path, name, value):
    model("slot", num_entries=16).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["settings"][name] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="save the adapter again"):
        pdmem.MemoryModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ['{"schema": 2, "backbone": "x", "backbone_fingerprint": "y", "settings": []}', "[" * 100_000,
                                  '{"schema": Infinity}', '{"schema": NaN}', "[]"])
def test_a_config_of_another_shape_is_damaged(model, tmp_path, text):
    model("slot", num_entries=16).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="is damaged"):
        pdmem.MemoryModel.from_pretrained(tmp_path)


def test_both_files_of_an_adapter_can_be_read_by_the_same_people(model, tmp_path):
    model("slot", num_entries=16).save_pretrained(tmp_path)
    modes = {file.name: file.stat().st_mode for file in tmp_path.iterdir()}
    assert modes["adapter.safetensors"] == modes["config.json"]


@pytest.mark.parametrize("name, layers", [("tiny-gpt2", "n_layer"), ("tiny-llama", "num_hidden_layers")])
def test_a_backbone_whose_weights_are_not_all_there_is_refused(tmp_path, name, layers):
    whole = pdmem.load_backbone(name, device="cpu")
    whole.model.save_pretrained(tmp_path)
    whole.tokenizer.save_pretrained(tmp_path)
    assert pdmem.load_backbone(str(tmp_path), device="cpu").fingerprint == whole.fingerprint
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {layers: 4}))
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="its weights lack"):
        pdmem.load_backbone(str(tmp_path), device="cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_copy_of_locomo_that_is_not_there_is_no_reason_to_make_talks_up(monkeypatch):
    monkeypatch.setenv("PDMEM_LOCOMO", "/no/such/file.json")
    with pytest.raises(FileNotFoundError, match="PDMEM_LOCOMO is set, but .*Unset it"):
        pdmem.load_data("auto")
    with pytest.raises(ValueError, match="unknown preset 'nope': known are"):
        pdmem.load_data("auto", preset="nope")


def test_the_command_line_names_the_option(capsys, tmp_path):
    from pdmem_lib.__main__ import main

    asked = ["--backbone", "tiny-gpt2", "--data", "synthetic", "--preset", "smoke"]
    for command, option, value in [("foretell", "--capacities", "x"), ("banks", "--seeds", "x"), ("banks", "--seeds", ","),
                                   ("banks", "--out", str(tmp_path / "no" / "table.csv"))]:
        assert main([command, *asked, option, value]) == 1
        assert option in capsys.readouterr().err


def test_few_entries_want_no_further_setting(tiny):
    for method in pdmem.METHODS:
        m = pdmem.MemoryModel(tiny, method, num_entries=4)
        assert all(t.isfinite().all() for t in m.write(TURNS).values())
    assert pdmem.MemoryModel(tiny, "slot", num_entries=4).settings.top_k == 4
    assert pdmem.MemoryModel(tiny, "slot").settings.top_k == 8
    with pytest.raises(ValueError, match="top_k must lie between 1 and num_entries=4, got 8: write fewer"):
        pdmem.MemoryModel(tiny, "slot", num_entries=4, top_k=8)


def test_attention_that_reads_no_memory_is_not_taken_for_a_memory_that_says_nothing():
    backbone = pdmem.load_backbone("tiny-gpt2", seed=9)
    m = pdmem.MemoryModel(backbone, "slot")
    m.write(TURNS)
    backbone.model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match="'eager', which reads no memory: .*set_attn_implementation.'pdmem'"):
        m.logits("hi")
    m.logits("hi", memory="off")
    backbone.model.set_attn_implementation("pdmem")
    m.logits("hi")


def test_another_tiny_backbone_is_named_with_its_seed(tmp_path):
    pdmem.MemoryModel(pdmem.load_backbone("tiny-gpt2", seed=5), "slot").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="load_backbone.'tiny-gpt2', seed=the one"):
        pdmem.MemoryModel.from_pretrained(tmp_path)
    pdmem.MemoryModel.from_pretrained(tmp_path, pdmem.load_backbone("tiny-gpt2", seed=5))


@pytest.mark.parametrize("hidden, message", [
    (None, "holds no hidden states"), ("hi", "holds no hidden states"), (["hi"], "is a str"),
    ([torch.full((2, 16), float("nan"))], "not finite")])
def test_hidden_states_are_finite_tensors(model, hidden, message):
    m = model("slot")
    before = m.state["P"].clone()
    with pytest.raises(ValueError, match=message):
        m.write_hidden(hidden)
    assert torch.equal(m.state["P"], before)


def test_a_state_of_other_things_names_them(model):
    with pytest.raises(ValueError, match="'P' is a ndarray"):
        model("slot").state = {"P": np.zeros((64, 16))}


WRITES = """
import torch
from pdmem_lib import write
H, W = torch.randn(3, 4), torch.eye(4)
for said, rule in {
    "square matrix": lambda: write.hebbian(torch.zeros(3, 4), H, W, W, 0.9),
    "equally wide": lambda: write.attention_coupled(torch.zeros(2, 5), H, W, W, W, 0.9),
    "one turn at a time": lambda: write.attention_coupled(torch.zeros(2, 4), H[None], W, W, W, 0.9),
    "H is a list": lambda: write.attention_coupled(torch.zeros(2, 4), [[1.0]], W, W, W, 0.9),
    "got -0.1": lambda: write.sparse_slots(torch.zeros(2, 4), H, W, W, -0.1, 1),
    "got 1.5": lambda: write.hebbian(W, H, W, W, 1.5),
    "got nan": lambda: write.attention_coupled(torch.zeros(2, 4), H, W, W, W, float("nan")),
    "got None": lambda: write.sparse_slots(torch.zeros(2, 4), H, W, W, None, 1),
    "whole number": lambda: write.sparse_slots(torch.zeros(2, 4), H, W, W, 0.9, 1.0),
}.items():
    try:
        rule()
    except ValueError as error:
        assert said in str(error), (said, error)
    else:
        raise SystemExit(f"nothing was refused: {said}")
"""


def test_pure_writes_say_what_does_not_fit():
    """In a process without the annotations' checks, which only tests have."""
    subprocess.run([sys.executable, "-c", WRITES], check=True)


def test_one_text_or_an_iterator_of_texts_is_encoded_and_nothing_else(tiny):
    [alone] = tiny.encode("Ann: hi")
    assert torch.equal(alone, tiny.encode(["Ann: hi"])[0])
    assert len(tiny.encode(iter(TURNS))) == 2
    with pytest.raises(ValueError, match="NoneType"):
        tiny.encode(None)


@pytest.mark.parametrize("path", [None, 5, b"file", ["file"]], ids=repr)
def test_a_path_is_a_string_or_a_path(model, path):
    m = model("slot", num_entries=16)
    uses = [m.load_state, m.save_state, m.save_pretrained, pdmem.MemoryModel.from_pretrained, LoRAModel.from_pretrained,
            pdmem.Session.open, pdmem.Session(m).save_state]
    if path is not None:  # which means none there
        uses += [pdmem.load_locomo, lambda path: pdmem.Session(m, path)]
    for use in uses:
        with pytest.raises(ValueError, match=f"a {type(path).__name__} is no path: give a string or a pathlib.Path"):
            use(path)


@pytest.mark.parametrize("use", [pdmem.train, pdmem.evaluate])
def test_a_checkpoint_is_a_path(model, conversations, use, monkeypatch):
    m = model("slot", num_entries=16)
    monkeypatch.setattr(m, "answers_under", lambda *a, **k: pytest.fail("a question was asked"))
    few = dict(max_questions=2, epochs=1) if use is pdmem.train else dict(questions_per_bucket=1, max_new_tokens=1)
    with pytest.raises(ValueError, match="a int is no path"):
        use(m, conversations, checkpoint=5, progress=False, **few)


@pytest.mark.parametrize("model", [None, "slot", pdmem.MemoryModel], ids=lambda model: type(model).__name__)
def test_what_is_no_model_is_named(model, conversations):
    for use in (lambda: pdmem.train(model, conversations), lambda: pdmem.evaluate(model, conversations),
                lambda: pdmem.Session(model)):
        with pytest.raises(ValueError, match="is no model with a memory: give MemoryModel"):
            use()


@pytest.mark.parametrize("number", ["2", 2.5, 2.0, None, True, np.array([2])], ids=repr)
def test_a_whole_number_is_one(number):
    for make in (lambda: pdmem.synthetic_conversations(number, 1, 0), lambda: pdmem.synthetic_conversations(1, number, 0),
                 lambda: pdmem.load_backbone("tiny-gpt2", seed=number), lambda: whole_number("seed", number)):
        with pytest.raises(ValueError, match="must be a whole number"):
            make()


def test_a_whole_number_of_a_table_is_one_too():
    assert pdmem.synthetic_conversations(np.int64(1), np.int32(1), 0) == pdmem.synthetic_conversations(1, 1, 0)
    assert type(whole_number("n", np.int64(3), 1, 3)) is int
    with pytest.raises(ValueError, match="n must be a whole number from 1 to 3, got 4"):
        whole_number("n", 4, 1, 3)


@pytest.mark.parametrize("seed", [2**70, -2**70])
def test_a_seed_beyond_what_a_generator_takes_is_refused(tiny, model, conversations, seed):
    for use in (lambda: pdmem.load_backbone("tiny-gpt2", seed=seed), lambda: pdmem.MemoryModel(tiny, "slot", seed=seed),
                lambda: pdmem.train(model("slot", num_entries=16), conversations, seed=seed)):
        with pytest.raises(ValueError, match="seed must be a whole number from -"):
            use()
    assert pdmem.load_backbone("tiny-gpt2", seed=2**64 - 1).fingerprint != pdmem.load_backbone("tiny-gpt2").fingerprint


@pytest.mark.parametrize("device", ["nonsense", "cpu:x", 1.5], ids=repr)
def test_a_device_that_is_none_is_refused(device):
    with pytest.raises(ValueError, match="unknown device .*: leave it out, or give 'cpu' or 'cuda'"):
        pdmem.load_backbone("tiny-gpt2", device=device)


def test_conversations_are_split_as_they_come(conversations):
    assert pdmem.split(iter(conversations)) == pdmem.split(conversations) == ([conversations[0]], [conversations[1]])
    for wrong in (None, conversations[0], ["a", "b"], 3):
        with pytest.raises(ValueError, match="give a list of conversations"):
            pdmem.split(wrong)


def test_a_conversation_without_turns_has_none_by_any_id():
    with pytest.raises(ValueError, match="x has no turn 'n': it has no turns at all"):
        pdmem.Conversation("x", (), ()).turn("n")


@pytest.mark.parametrize("name, value", [("lr", float("inf")), ("lr", float("nan")), ("weight_decay", float("inf")),
                                         ("weight_decay", float("nan"))])
def test_a_rate_is_finite(model, conversations, name, value):
    with pytest.raises(ValueError, match=f"{name}.* finite"):
        pdmem.train(model("slot", num_entries=16), conversations, **{name: value})


@pytest.mark.parametrize("change, said", [(dict(category=6), "has category 6: give it one of 1, 2, 3, 4, 5"),
                                          (dict(category=None), "has category None"), (dict(lag=float("nan")), "has lag nan"),
                                          (dict(lag=-1), "has lag -1"), (dict(lag=None), "has lag None")], ids=repr)
def test_a_question_that_no_table_takes_is_named_before_any_is_asked(model, conversations, monkeypatch, change, said):
    m, (first, *others) = model("slot", num_entries=16), conversations
    wrong = dataclasses.replace(first, questions=(*first.questions[:-1], dataclasses.replace(first.questions[-1], **change)))
    for step in ("answers_under", "scores_under"):
        monkeypatch.setattr(pdmem.MemoryModel, step, lambda *a, **k: pytest.fail("a question was asked"))
    where = f"question {len(first.questions) - 1} of conversation {first.id!r}"
    with pytest.raises(ValueError, match=f"{where} {re.escape(said)}"):
        pdmem.evaluate(m, [wrong, *others], progress=False)
