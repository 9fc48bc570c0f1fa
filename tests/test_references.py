"""What stands beside a memory: texts in the prompt, what they give and cost, LoRA, and training without a bank."""

import copy
import dataclasses
import logging
import os
import random
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch

import pdmem_lib as pdmem
from pdmem_lib import metrics, references, training
from pdmem_lib import prompts
from pdmem_lib.evaluation import EvaluateSettings, frozen_answers, sample_questions
from pdmem_lib.locomo import Question, parse
from pdmem_lib.lora import LoRAModel
from pdmem_lib.references import (PromptReference, TurnIndex, ask_references, bm25_turns, gold_turns,
                                  last_turns, prompt_references)

QUIET = dict(progress=False, autocast=False)
FEW = EvaluateSettings(max_new_tokens=6, **QUIET)
QUESTIONS = ["What did Ada adopt?", "Who?", "What is the name of the cat that Ada adopted after the meeting?"]
ANSWERS = ["a cat", "Ada", "Pixel"]
CONTEXTS = ["Ada: I adopted a cat.\nBob: Oh {so}!", "", "Ada: We named her Pixel."]


def talk(*texts, qa=(), id="c"):
    """A conversation of one session: "Speaker: text" each; qa: (question, answer, numbers of its evidence turns)."""
    spoken = [text.split(": ", 1) for text in texts]
    turns = [dict(speaker=speaker, text=text, dia_id=f"D1:{i}") for i, (speaker, text) in enumerate(spoken)]
    rows = [dict(question=q, answer=a, category=4, evidence=[f"D1:{i}" for i in evidence]) for q, a, evidence in qa]
    return parse([{"sample_id": id, "conversation": {"session_1": turns}, "qa": rows}])[0]


def ask(text, answer="yes", evidence=()):
    return Question(text, answer, 4, tuple(evidence), 0)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PDMEM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def conversations():
    return pdmem.synthetic_conversations(2, 3, seed=1, turns_per_session=16)


# ---- a text in front of the prompt -----------------------------------------------------------------------------------


def test_a_context_is_the_literal_text_in_front_of_the_prompt(tiny, plain, model):
    m = model("baseline")
    answers = m.answer(QUESTIONS, 5, contexts=CONTEXTS)
    score = m.score(QUESTIONS, ANSWERS, contexts=CONTEXTS)
    for i, (question, answer, context) in enumerate(zip(QUESTIONS, ANSWERS, CONTEXTS, strict=True)):
        text = (f"{context}\n\n" if context else "") + f"Question: {question}\nShort answer:"
        ids = torch.tensor([tiny.token_ids(text)])
        out = plain.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=256)[0, ids.shape[1]:]
        assert answers[i] == tiny.tokenizer.decode(out, skip_special_tokens=True).strip().split("\n")[0].strip()
        target = tiny.token_ids(f" {answer}\n")
        logits = plain(torch.cat([ids, torch.tensor([target])], dim=1)).logits[0, ids.shape[1] - 1 : -1]
        wanted = logits.log_softmax(-1).gather(1, torch.tensor(target)[:, None]).sum()
        assert score.log_prob[i] == pytest.approx(float(wanted), abs=1e-3) and score.tokens[i] == len(target)
    bare = m.score(QUESTIONS, ANSWERS)
    assert (score.log_prob - bare.log_prob).abs()[[0, 2]].min() > 1e-3  # the text is read


@pytest.mark.parametrize("method", ["baseline", "slot", "hebbian"])
def test_an_empty_context_is_todays_prompt_token_for_token(tiny, model, method, monkeypatch):
    m = model(method, num_entries=16, d_h=16)
    m.write("Ada: I adopted a cat.")
    pad, rows = tiny.pad, []
    monkeypatch.setattr(tiny, "pad", lambda r, side: (rows.append([list(x) for x in r]), pad(r, side))[1])
    for memory in ("own", "off"):
        results, seen = [], []
        for contexts in (None, [""] * 3):
            rows.clear()
            answers = m.answer(QUESTIONS, 4, memory, contexts=contexts)
            results.append((answers, m.score(QUESTIONS, ANSWERS, memory, contexts).log_prob))
            seen.append([*rows])
        assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])
        assert seen[0] == seen[1]
        by_length = sorted(QUESTIONS, key=len)
        assert seen[0][0] == [tiny.token_ids(f"Question: {q}\nShort answer:") for q in by_length]


@pytest.mark.parametrize("method", ["baseline", "slot", "hebbian", "gated"])
def test_with_contexts_answers_do_not_depend_on_the_batch(model, method):
    m = model(method, num_entries=16, d_h=16)
    with torch.no_grad():
        for p in m.parameters():
            p += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    m.write("Ada: I adopted a cat.")
    together = m.answer(QUESTIONS, 6, contexts=CONTEXTS)
    score = m.score(QUESTIONS, ANSWERS, contexts=CONTEXTS).log_prob
    for i in range(3):
        assert m.answer(QUESTIONS[i : i + 1], 6, contexts=CONTEXTS[i : i + 1]) == together[i : i + 1]
        alone = m.score(QUESTIONS[i : i + 1], ANSWERS[i : i + 1], contexts=CONTEXTS[i : i + 1]).log_prob
        torch.testing.assert_close(alone[0], score[i], atol=1e-3, rtol=1e-4)
    assert m.answer(QUESTIONS[::-1], 6, contexts=CONTEXTS[::-1], batch_size=2) == together[::-1]


def test_contexts_that_do_not_fit_say_the_mend(tiny, model):
    m = model("baseline")
    for wrong in (["a"], "abc"):
        with pytest.raises(ValueError, match="one text a question: give 3"):
            m.answer(QUESTIONS, contexts=wrong)
        with pytest.raises(ValueError, match="one text a question: give 3"):
            m.score(QUESTIONS, ANSWERS, contexts=wrong)
    long = "x" * tiny.max_tokens
    with pytest.raises(ValueError, match="do not fit the context"):
        m.answer(["Who?"], contexts=[long])
    with pytest.raises(ValueError, match="do not fit the context"):
        m.score(["Who?"], ["Ada"], contexts=[long])


def test_frozen_is_the_bare_backbone(tiny, model):
    assert model("slot").frozen is tiny


# ---- the texts -------------------------------------------------------------------------------------------------------

PARTY = [f"{'Ada' if i % 2 else 'Bob'}: We talked of the weather, day {i}." for i in range(30)]
PARTY[7] = "Ada: My grandmother collects porcelain elephants."
PARTY[20] = "Bob: An elephant of porcelain is what she wants."


@pytest.fixture
def party(tiny):
    return TurnIndex(tiny, talk(*PARTY))


def test_bm25_finds_a_planted_turn_and_keeps_the_order_of_the_talk(tiny, party):
    question = ask("Which porcelain elephants does the grandmother collect?")
    scores = party.scores(question.question)
    assert scores.shape == (30,) and set(np.argsort(-scores)[:2]) == {7, 20} and scores[7] > scores[20] > 0 == scores[0]
    assert bm25_turns(party, question, budget=60) == PARTY[7]
    assert bm25_turns(party, question, budget=640) == f"{PARTY[7]}\n{PARTY[20]}"  # no turn without a shared word
    later = ask("Who wants an elephant of porcelain?")  # stems: elephant finds elephants
    assert party.scores(later.question).argmax() == 20
    assert bm25_turns(party, later, budget=640) == f"{PARTY[7]}\n{PARTY[20]}"  # not in the order of scores


def test_bm25_takes_the_earlier_of_equals_and_passes_over_what_does_not_fit(tiny):
    line, long = "Ada: A red kite.", "Bob: A red kite, in a sky so wide and blue, over a sea so calm and grey"
    index = TurnIndex(tiny, talk(line, long, line, line))
    assert bm25_turns(index, ask("Red kite?"), budget=len(line)) == line
    assert bm25_turns(index, ask("Red kite?"), budget=2 * len(line) + 1) == f"{line}\n{line}"
    assert bm25_turns(index, ask("Red kite?"), budget=len(line) - 1) == ""
    # the long turn alone knows the sea: best, too long, passed over
    assert index.scores("Red kite sea?").argmax() == 1
    assert bm25_turns(index, ask("Red kite sea?"), budget=40) == f"{line}\n{line}"
    equal = ["Ada: A red kite" + f"{i:07b}".replace("0", ".").replace("1", "!") for i in range(100)]
    assert bm25_turns(TurnIndex(tiny, talk(*equal)), ask("Red kite?"), budget=70) == "\n".join(equal[:3])


@pytest.mark.parametrize("question", ["the of and?", "???", "Xylophone?"])
def test_bm25_without_a_shared_word_gives_nothing(party, question):
    assert bm25_turns(party, ask(question), budget=640) == ""


def test_a_talk_without_words_can_be_indexed(tiny):
    index = TurnIndex(tiny, talk("?: !", "!: ??"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bm25_turns(index, ask("Who?"), budget=64) == ""
    assert last_turns(index, ask("Who?"), budget=64) == "?: !\n!: ??"


@pytest.mark.parametrize("budget", [1, 25, 64, 200, 640])
def test_budgets_are_kept_and_used(tiny, conversations, budget):
    for conversation in conversations:
        index = TurnIndex(tiny, conversation)
        lines = [str(turn) for turn in conversation.turns]
        for question in conversation.questions[:8]:
            for text in (last_turns(index, question, budget), bm25_turns(index, question, budget)):
                assert len(tiny.token_ids(text, special=False)) <= budget
                rest = iter(lines)
                assert all(line in rest for line in text.split("\n") if text)  # whole turns, in the talk's order
            text = last_turns(index, question, budget)
            number = text.count("\n") + 1 if text else 0
            assert text == "\n".join(lines[len(lines) - number :])
            one_more = "\n".join(lines[len(lines) - number - 1 :])
            assert number == len(lines) or len(one_more) > budget
            taken = set(bm25_turns(index, question, budget).split("\n"))
            scores, left = index.scores(question.question), budget - len(bm25_turns(index, question, budget))
            assert all(scores[i] == 0 or len(line) + 1 > left for i, line in enumerate(lines) if line not in taken)


def test_the_last_turns_fill_the_window_to_the_last_token(tiny):
    """Byte for byte: one letter more in the oldest turn that fits, and it is out."""
    question = ask("Who?", answer="Ada")
    room = tiny.max_tokens - 24 - len("Question: Who?\nShort answer:") - len("\n\n")
    rest = ["Bob: " + "b" * 300, "Ada: " + "a" * 301]
    fill = room - len("\n".join(rest)) - len("Cyd: \n")
    for extra, wanted in ((0, 3), (1, 2), (-1, 3)):
        oldest = "Cyd: " + "c" * (fill + extra)
        index = TurnIndex(tiny, talk("Dan: before", oldest, *rest))
        text = last_turns(index, question)
        assert text == "\n".join([oldest, *rest][-wanted:])
        tokens = len(tiny.token_ids(prompts.prompt_text("Who?", text))) + 24
        assert tokens == tiny.max_tokens if extra == 0 else tokens < tiny.max_tokens
    # a longer gold answer, or more to generate, takes its room from the text
    index = TurnIndex(tiny, talk("Cyd: " + "c" * fill, *rest))
    assert last_turns(index, question, max_new_tokens=25) == "\n".join(rest)
    assert last_turns(index, ask("Who?", answer="x" * 30)) == "\n".join(rest)
    # of several questions the longest decides
    assert last_turns(index, [question, ask("Who was it?", "Ada")]) == "\n".join(rest)
    m = pdmem.MemoryModel(tiny, "baseline")
    assert len(m.answer(["Who?"], 24, contexts=[last_turns(index, question)])) == 1  # and the model takes it


@pytest.mark.parametrize("off_by", [-3, 3])
def test_the_text_decides_where_the_lengths_of_its_lines_are_off(tiny, conversations, off_by):
    """A tokenizer may join letters across lines: lengths of lines are a first guess only."""
    index, question = TurnIndex(tiny, conversations[0]), conversations[0].questions[0]
    wanted = {budget: last_turns(index, question, budget) for budget in (64, 300, None)}
    index.lengths = [length + off_by for length in index.lengths]
    assert wanted == {budget: last_turns(index, question, budget) for budget in wanted}
    for budget in (40, 64, 300):
        assert len(tiny.token_ids(bm25_turns(index, question, budget), special=False)) <= budget


def test_where_not_even_the_last_turn_fits_there_is_no_text(tiny):
    index = TurnIndex(tiny, talk("Ada: hi", "Bob: " + "b" * tiny.max_tokens))
    assert last_turns(index, ask("Who?")) == ""
    assert bm25_turns(index, ask("b" * tiny.max_tokens), 640) == ""  # nor beside a question that is too long itself


@pytest.mark.parametrize("wrong", [dict(budget=0), dict(max_new_tokens=0), dict(questions=[])])
def test_impossible_rooms_are_refused(party, wrong):
    with pytest.raises(ValueError, match="at least"):
        last_turns(party, **dict(questions=ask("Who?")) | wrong)


def test_gold_holds_the_evidence_in_order(party):
    assert gold_turns(party, ask("Who?", evidence=["D1:20", "D1:7"])) == f"{PARTY[7]}\n{PARTY[20]}"
    assert gold_turns(party, ask("Who?")) == ""


def test_gold_that_overruns_is_cut_at_its_end(tiny):
    long = "Ada: " + "é" * 600  # two bytes, so two tokens, each
    index = TurnIndex(tiny, talk("Bob: So it began.", long, "Bob: End."))
    question = ask("Who?", evidence=["D1:0", "D1:1"])
    text = gold_turns(index, question)
    whole = f"Bob: So it began.\n{long}"
    assert whole.startswith(text) and len(text) < len(whole)
    room = tiny.max_tokens - 24 - len("Question: Who?\nShort answer:") - 2
    assert room - 1 <= len(text.encode()) <= room  # half a letter is not kept
    assert gold_turns(index, question, budget=10) == "Bob: So it"
    smiles = "Ada: " + 9 * "\N{GRINNING FACE}"  # four tokens each
    index = TurnIndex(tiny, talk(smiles))
    for budget in range(20, 28):
        assert gold_turns(index, ask("Who?", evidence=["D1:0"]), budget) == smiles[: 5 + (budget - 5) // 4]


# ---- asking with them ------------------------------------------------------------------------------------------------

COLUMNS = ["reference", "budget", "conversation", "number", "category", "lag", "answer_text", "f1", "locomo", "logp",
           "tokens", "seconds", "bytes"]


def test_the_references_are_named_and_sized_as_the_banks():
    assert [(r.name, r.kind, r.budget) for r in prompt_references()] == [
        ("gold evidence", "gold", None), ("BM25 64", "bm25", 64), ("BM25 640", "bm25", 640),
        ("last turns", "last", None)]
    assert [(r.name, r.budget) for r in prompt_references((5,), last=9)] == [
        ("gold evidence", None), ("BM25 5", 5), ("last turns 9", 9)]
    for wrong, message in ((dict(kind="bm52"), "known are none, gold, bm25, last"), (dict(name=3), "is a int"),
                           (dict(budget=0), "at least 1 token"), (dict(budget="64"), "is a str")):
        with pytest.raises(ValueError, match=message):
            PromptReference(**dict(name="a", kind="bm25") | wrong)


def test_every_row_is_what_its_text_gives(tiny, conversations, own_cache):
    asked = sample_questions(conversations, 4)
    table = ask_references(tiny, conversations, asked, prompt_references((64, 200)), FEW)
    assert list(table) == COLUMNS
    assert table["reference"].unique().tolist() == ["frozen", "gold evidence", "BM25 64", "BM25 200", "last turns"]
    assert table["budget"].dropna().unique().tolist() == [64, 200]
    m, by_id = pdmem.MemoryModel(tiny, "baseline"), {c.id: c for c in conversations}
    for name, rows in table.groupby("reference"):
        assert list(rows[["conversation", "number"]].itertuples(index=False, name=None)) == [a[:2] for a in asked]
        for (id, _, q), row in zip(asked, rows.itertuples(), strict=True):
            index = TurnIndex(tiny, by_id[id])
            whole = "\n".join(str(turn) for turn in by_id[id].turns)
            mine = [other for c, _, other in asked if c == id]
            text, kept = {"frozen": ("", ""), "gold evidence": (gold_turns(index, q), whole),
                          "BM25 64": (bm25_turns(index, q, 64, 6), whole),
                          "BM25 200": (bm25_turns(index, q, 200, 6), whole),
                          "last turns": (last_turns(index, mine, None, 6),) * 2}[name]
            assert row.answer_text == m.answer([q.question], 6, contexts=[text])[0]
            score = m.score([q.question], [q.answer], contexts=[text])
            assert row.logp == pytest.approx(float(score.log_prob / score.tokens), abs=1e-3)
            assert row.f1 == metrics.token_f1(row.answer_text, q.answer)
            assert row.locomo == metrics.locomo_f1(row.answer_text, q.answer, q.category)
            assert row.tokens == len(tiny.token_ids(prompts.prompt_text(q.question, text)))
            assert row.bytes == len(kept.encode()) and row.seconds > 0
            assert (row.category, row.lag) == (q.category, q.lag)
    frozen = table[table["reference"] == "frozen"]
    answers, logp = frozen_answers(tiny, [q for *_, q in asked], FEW)
    assert frozen["answer_text"].tolist() == answers and frozen["logp"].tolist() == pytest.approx(logp, abs=1e-3)


def test_a_shared_text_runs_once_and_changes_nothing(tiny, conversations, monkeypatch):
    questions, texts = [], []
    for conversation in conversations:
        mine = list(conversation.questions[:7])
        index = TurnIndex(tiny, conversation)
        questions += mine
        texts += [last_turns(index, mine, None, 6)] * 7
    questions.append(ask("Who stands alone?", "nobody"))
    texts.append("Ada: Only I read this.")
    runs = []
    once = references._keys_and_values
    monkeypatch.setattr(references, "_keys_and_values", lambda b, ids: (runs.append(len(ids)), once(b, ids))[1])
    lone = references._answers(tiny, questions, texts, FEW, lambda n: None, share=False)
    assert not runs
    counted = []
    shared = references._answers(tiny, questions, texts, dataclasses.replace(FEW, batch_size=4), counted.append)
    assert len(runs) == 2 and min(runs) >= min(map(len, texts[:14]))
    assert sum(counted) == 2 * len(questions)
    assert [(answer, tokens) for answer, _, tokens, _ in shared] == [(answer, tokens) for answer, _, tokens, _ in lone]
    assert [r[1] for r in shared] == pytest.approx([r[1] for r in lone], abs=1e-3)
    # the shared text is read: another one gives other numbers
    other = references._answers(tiny, questions, texts[7:14] + texts[:7] + texts[14:], FEW, lambda n: None)
    assert min(abs(a[1] - b[1]) for a, b in zip(other[:14], shared[:14], strict=True)) > 1e-5


def test_what_a_shared_text_takes_is_split_among_its_questions(tiny, monkeypatch):
    once = references._keys_and_values
    monkeypatch.setattr(references, "_keys_and_values", lambda b, ids: (time.sleep(2), once(b, ids))[1])
    questions = [ask(f"Who is number {i}?") for i in range(4)]
    rows = references._answers(tiny, questions, ["Ada: " + "la " * 100] * 4, FEW, lambda n: None)
    assert all(0.5 <= seconds < 1.9 for *_, seconds in rows)


def test_texts_that_end_alike_but_differ_are_not_shared(tiny, monkeypatch):
    monkeypatch.setattr(references, "SHARED", 1)
    texts = ["Ada: A cat.", "Ada: A cat.", "Ada: A dog.", "", ""]
    questions = [ask(q, "yes") for q in ("Who?", "Who?", "Who?", "What?", "Why?")]
    shared = references._answers(tiny, questions, texts, FEW, lambda n: None)
    lone = references._answers(tiny, questions, texts, FEW, lambda n: None, share=False)
    assert [r[0] for r in shared] == [r[0] for r in lone]
    assert [r[1] for r in shared] == pytest.approx([r[1] for r in lone], abs=1e-3)


@pytest.mark.parametrize("lengths", [[900, 3, 5, 800, 7], [10] * 50])
def test_batches_stay_within_tokens_and_questions(lengths):
    batches = list(references._batches(lengths, 1000, 8))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(b) <= 8 and len(b) * max(lengths[i] for i in b) <= 1000 for b in batches)


def test_answers_come_from_the_disk_the_second_time(tiny, conversations, own_cache, monkeypatch, caplog):
    asked = sample_questions(conversations, 2)
    chosen = prompt_references((64,))
    first = ask_references(tiny, conversations, asked, chosen, FEW)
    files = sorted((own_cache / "references").iterdir())
    assert len(files) == 4
    made = []
    answers = references._answers
    monkeypatch.setattr(references, "_answers", lambda *a, **k: (made.append(1), answers(*a, **k))[1])
    assert ask_references(tiny, conversations, asked, chosen, FEW).equals(first) and not made  # its seconds, too
    ask_references(tiny, conversations, asked[:-1], chosen, FEW)
    assert len(made) == 4  # other questions
    ask_references(tiny, conversations, asked, chosen[:1], dataclasses.replace(FEW, max_new_tokens=5))
    assert len(made) == 6  # another setting
    ask_references(tiny, conversations, asked, [PromptReference("again", "bm25", 64)], FEW)
    assert len(made) == 6  # another name alone is not another question
    monkeypatch.setattr(prompts, "CONTEXT", "{context}\n---\n")
    ask_references(tiny, conversations, asked, chosen[:1], FEW)
    assert len(made) == 7  # another prompt: gold is asked again, the bare question is not
    monkeypatch.undo()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"rows": 3}', '{"rows": [["a", -1.0, 3, 0.1]]}',
                                     '{"rows": [["a", null, 3, 1], ["a", -1.0, 3, 1]]}'])
def test_a_damaged_file_is_made_again_and_said(tiny, conversations, own_cache, caplog, content):
    asked = sample_questions(conversations, 1)[:2]
    wanted = ask_references(tiny, conversations, asked, (), FEW)
    (file,) = (own_cache / "references").iterdir()
    file.write_text(content)
    with caplog.at_level(logging.WARNING):
        again = ask_references(tiny, conversations, asked, (), FEW)
    assert "is damaged" in caplog.text and again.drop(columns="seconds").equals(wanted.drop(columns="seconds"))
    assert file.read_text() != content


def test_the_bar_ends_at_all_it_announced(tiny, conversations, own_cache, monkeypatch, capfd):
    asked = sample_questions(conversations, 2)
    ask_references(tiny, conversations, asked, prompt_references((64,)), FEW)
    assert capfd.readouterr() == ("", "")
    bars = []

    class Bar(references.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            bars.append(self)

    monkeypatch.setattr(references, "tqdm", Bar)
    for settings in (FEW, dataclasses.replace(FEW, progress=True)):  # the second: half of it from the disk
        ask_references(tiny, conversations, asked, prompt_references((32,)), settings)
    assert all(bar.n == bar.total == 2 * 4 * len(asked) for bar in bars if not bar.disable) and len(bars) == 2
    assert capfd.readouterr().out == ""


def test_what_cannot_be_asked_says_the_mend(tiny, conversations):
    asked = sample_questions(conversations, 1)
    for wrong in ((conversations, []), (conversations[:1], asked)):
        with pytest.raises(ValueError, match="give questions made by sample_questions"):
            ask_references(tiny, *wrong, (), FEW)
    with pytest.raises(ValueError, match="name them apart"):
        ask_references(tiny, conversations, asked, [PromptReference("a", "gold"), PromptReference("a", "last")], FEW)


def test_asking_leaves_the_backbone_and_the_generators_alone(tiny, conversations, own_cache):
    weights = {name: w.clone() for name, w in tiny.model.state_dict().items()}
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    ask_references(tiny, conversations, sample_questions(conversations, 1), prompt_references((64,)), FEW)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()
    assert all(torch.equal(w, weights[name]) for name, w in tiny.model.state_dict().items())


# ---- LoRA ------------------------------------------------------------------------------------------------------------


def turned(lora, scale=0.1):
    """``lora`` with every number pushed off its start, where it is the frozen model."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in lora.parameters():
            p += scale * torch.randn(p.shape, generator=generator)
    return lora


@pytest.mark.parametrize("wanted", [1, 5000, 20_000, 23_456, 100_000])
def test_the_rank_is_the_nearest_in_parameters(tiny, wanted):
    lora = LoRAModel(tiny, wanted)
    per_rank = LoRAModel(tiny, 1).num_trainable
    assert lora.num_trainable == lora.rank * per_rank == sum(p.numel() for p in lora.parameters())
    assert abs(lora.num_trainable - wanted) <= per_rank / 2 or lora.rank == 1
    assert f"{lora.num_trainable:,}" in repr(lora)


def test_every_linear_map_of_the_blocks_and_no_other_is_adapted(tiny):
    lora = LoRAModel(tiny, 5000)
    adapted = {name.split(".lora_")[0] for name, p in lora.backbone.model.named_parameters() if p.requires_grad}
    assert len(adapted) == tiny.num_layers * {"gpt2": 4, "llama": 7}[tiny.family]
    assert all(".h." in f".{name}" or ".layers." in name for name in adapted)
    assert len(lora.parameters()) == 2 * len(adapted) and not lora.state


def test_parameters_below_one_are_refused(tiny):
    with pytest.raises(ValueError, match="at least 1"):
        LoRAModel(tiny, 0)


def test_lora_starts_silent_and_off_is_frozen_bit_for_bit(tiny, plain, model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora = LoRAModel(tiny, 20_000)
    bare, text = model("baseline"), "Ada adopted a grey cat."
    wanted = plain(torch.tensor([tiny.token_ids(text)])).logits[0]
    assert torch.allclose(lora.logits(text), wanted, atol=1e-5)
    for m in (lora, turned(lora)):
        assert torch.equal(m.logits(text, memory="off"), wanted)
        assert torch.equal(m.score(QUESTIONS, ANSWERS, "off", CONTEXTS).log_prob,
                           bare.score(QUESTIONS, ANSWERS, contexts=CONTEXTS).log_prob)
        assert torch.equal(m.loss(QUESTIONS, ANSWERS, memory="off"), bare.loss(QUESTIONS, ANSWERS))
        assert m.answer(QUESTIONS, 6, "off", contexts=CONTEXTS) == bare.answer(QUESTIONS, 6, contexts=CONTEXTS)
        assert torch.equal(m.token_log_probs(QUESTIONS[0], ANSWERS[0], "off")[1],
                           bare.token_log_probs(QUESTIONS[0], ANSWERS[0])[1])
        assert torch.equal(m.scores_under(["off"], QUESTIONS, ANSWERS).log_prob[0], bare.score(QUESTIONS, ANSWERS).log_prob)
        assert m.answers_under(["off"], QUESTIONS, 6) == [bare.answer(QUESTIONS, 6)]
        with pytest.raises(ValueError, match="ask it alone"):
            m.scores_under(["off", "own"], QUESTIONS, ANSWERS)
        assert torch.equal(m.score_pairs(["off"], QUESTIONS[:1], ANSWERS[:1]).log_prob,
                           bare.score(QUESTIONS[:1], ANSWERS[:1]).log_prob)
    assert not torch.equal(lora.token_log_probs(QUESTIONS[0], ANSWERS[0])[1],
                           bare.token_log_probs(QUESTIONS[0], ANSWERS[0])[1])
    assert lora.openness(text) is None
    assert (lora.logits(text) - wanted).abs().max() > 1e-2
    assert all(torch.equal(lora.logits(text), lora.logits(text, memory)) for memory in ("zero", {}))
    assert (lora.score(QUESTIONS, ANSWERS).log_prob - bare.score(QUESTIONS, ANSWERS).log_prob).abs().min() > 1e-3
    assert lora.frozen is tiny and lora.backbone is not tiny
    assert lora.attention_to_memory(text) is None


def test_only_lora_gets_gradients_in_float32_and_bf16(tiny):
    lora = turned(LoRAModel(tiny, 20_000))
    for bf16 in (False, True):
        with lora.backbone.autocast(bf16):
            lora.loss(QUESTIONS, ANSWERS, memory={}).backward()
        for name, p in lora.backbone.model.named_parameters():
            assert (p.grad is not None and p.grad.abs().max() > 0) if "lora_" in name else (p.grad is None), name
        assert all(p.grad is None and not p.requires_grad for p in tiny.model.parameters())
        for p in lora.parameters():
            p.grad = None
    assert lora.loss(QUESTIONS, ANSWERS, memory="off").requires_grad is False


def test_the_seed_alone_decides_the_start_and_no_generator_moves(tiny):
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    first, other = LoRAModel(tiny, 20_000, seed=1), LoRAModel(tiny, 20_000, seed=2)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()
    torch.manual_seed(5)
    same = LoRAModel(tiny, 20_000, seed=1)
    torch.set_rng_state(before[0])
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), same.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_lora_trains_without_hidden_states_and_leaves_the_original_alone(tiny, conversations, monkeypatch):
    monkeypatch.setattr(training, "encode_all", lambda *a: pytest.fail("there is nothing to write"))
    weights = {name: w.clone() for name, w in tiny.model.state_dict().items()}
    lora = LoRAModel(tiny, 20_000)
    copied = {name: w.clone() for name, w in lora.backbone.model.state_dict().items() if "lora_" not in name}
    before, key = lora.backbone.fingerprint, lora.backbone.cache_key
    options = dict(epochs=4, batch_size=8, lr=1e-2, warmup_steps=0, progress=False, autocast=True)
    history = pdmem.train(lora, conversations[:1], **options)
    by_epoch = history.groupby("epoch")["loss"].mean()
    assert by_epoch.iloc[-1] < by_epoch.iloc[0] - 0.5
    assert all(torch.equal(w, weights[name]) for name, w in tiny.model.state_dict().items())
    now = lora.backbone.model.state_dict()
    assert all(torch.equal(now[name], w) for name, w in copied.items())
    assert lora.backbone.fingerprint != before and lora.frozen.fingerprint == tiny.fingerprint
    assert lora.backbone.cache_key != key and lora.frozen.cache_key == tiny.cache_key
    again = LoRAModel(tiny, 20_000)
    pdmem.train(again, conversations[:1], **options)
    assert all(torch.equal(a, b) for a, b in zip(lora.parameters(), again.parameters(), strict=True))


def test_lora_is_saved_without_the_backbone_and_read_by_us_and_by_peft(tiny, plain, tmp_path):
    import peft
    from safetensors.torch import load_file

    lora, text = turned(LoRAModel(tiny, 20_000)), "Ada adopted a grey cat."
    lora.save_pretrained(tmp_path / "lora")
    turned(lora, 0.01).save_pretrained(tmp_path / "lora")  # over the first: the last is kept
    saved = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert all("lora_" in name for name in saved) and sum(t.numel() for t in saved.values()) == lora.num_trainable
    ours = LoRAModel.from_pretrained(tmp_path / "lora", tiny)
    assert torch.equal(ours.logits(text), lora.logits(text)) and ours.rank == lora.rank
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "lora").eval()
    logits = theirs(torch.tensor([tiny.token_ids(text)])).logits[0]
    torch.testing.assert_close(logits, lora.logits(text), atol=1e-4, rtol=1e-4)
    by_name = LoRAModel.from_pretrained(tmp_path / "lora")
    assert torch.equal(by_name.logits(text), lora.logits(text))

    with pytest.raises(ValueError, match="load it with its own backbone"):
        LoRAModel.from_pretrained(tmp_path / "lora", pdmem.load_backbone(tiny.name, seed=7))
    (tmp_path / "lora" / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="save it again"):
        LoRAModel.from_pretrained(tmp_path / "lora", tiny)
    with pytest.raises(FileNotFoundError, match="holds no adapter_config.json"):
        LoRAModel.from_pretrained(tmp_path, tiny)


# ---- training on the format alone ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", pdmem.METHODS)
def test_initial_reads_p0_for_every_question_and_never_writes(model, conversations, monkeypatch, method):
    m = model(method, num_entries=16, d_h=16)
    start = {name: t.clone() for name, t in m.adapter.initial_state().items()}
    monkeypatch.setattr(training, "encode_all", lambda *a: pytest.fail("nothing is to be encoded"))
    monkeypatch.setattr(m.adapter, "write", lambda *a: pytest.fail("nothing is to be written"))
    loss, asked = m.loss, []

    def spy(questions, answers, memory):
        assert memory.keys() == start.keys() and all(torch.equal(memory[name], t) for name, t in start.items())
        asked.extend(questions)
        return loss(questions, answers, memory)

    monkeypatch.setattr(m, "loss", spy)
    before = [p.detach().clone() for p in m.parameters()]
    history = pdmem.train(m, conversations, memory="initial", epochs=1, lr=1e-2, warmup_steps=0, **QUIET)
    assert sorted(asked) == sorted(q.question for c in conversations for q in c.questions) and len(history) > 1
    assert any(not torch.equal(p, b) for p, b in zip(m.parameters(), before, strict=True))


def test_initial_learns_otherwise_than_own(model, conversations):
    options = dict(epochs=1, lr=1e-2, warmup_steps=0, max_questions=16, **QUIET)
    runs = {}
    for memory in ("own", "initial"):
        m = model("slot", num_entries=16)
        runs[memory] = pdmem.train(m, conversations, memory=memory, **options)["loss"].tolist(), m.parameters()
    default = model("slot", num_entries=16)
    assert pdmem.train(default, conversations, **options)["loss"].tolist() == runs["own"][0]
    assert all(torch.equal(a, b) for a, b in zip(default.parameters(), runs["own"][1], strict=True))
    assert runs["own"][0] != runs["initial"][0]
    with pytest.raises(ValueError, match="known are 'own'"):
        pdmem.train(default, conversations, memory="zero", **options)


def test_bm25_leaves_jax_alone(tmp_path):
    """bm25s runs JAX as soon as it can import it, and JAX takes most of a GPU's memory."""
    (tmp_path / "jax.py").write_text("import sys\nsys.exit('JAX was imported')\n")
    code = ("from pdmem_lib.references import _bm25s; _bm25s(); import sys; assert 'jax' not in sys.modules\n"
            "try: import jax\nexcept SystemExit: print('whole')")
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True,
                          text=True, check=False)
    assert done.stdout.strip() == "whole", done.stderr
