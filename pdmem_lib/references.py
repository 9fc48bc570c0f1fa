"""What stands beside a memory: texts in the prompt [D].

The bare frozen model, the gold evidence (the ceiling of any memory), the best turns by BM25 in as many tokens as a bank
has entries, and the last turns that fit the window; same prompt, same decoding, each with what it costs. Adapters that
have no memory to read stand beside it too: the same one trained on P_0 alone (``train(..., memory="initial")``: what
the answers' format brings), and `lora.LoRAModel`, as many parameters in the weights of the blocks.
"""

import os.path
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from . import metrics, prompts, seam
from .backbone import Backbone, length_sorted_batches, use_bf16
from .decoding import greedy_lines
from .evaluation import EvaluateSettings
from .files import cache_file, cached_rows
from .locomo import Conversation, Question
from .memory import MemoryModel
from .settings import Settings

if TYPE_CHECKING:
    import numpy
    import pandas

FORMAT = 3  # of the cached answers
KINDS = ("none", "gold", "bm25", "last")
SHARED = 256  # tokens that prompts must have in common for these to be run once for all of them
BATCH_TOKENS = 4096  # of a batch of prompts, on a CPU (`Backbone.at_once`)
SHARED_BATCH_TOKENS = 512  # of a batch that reads a shared text: its attention weights span that text as well


# ---- texts in front of a question ------------------------------------------------------------------------------------


class TurnIndex:
    """A conversation's turns as lines, their lengths in tokens and their BM25 index: made once, asked often."""

    def __init__(self, backbone: Backbone, conversation: Conversation):
        self.backbone, self.conversation = backbone, conversation
        self.lines = [str(turn) for turn in conversation.turns]
        self.lengths = [len(backbone.token_ids(f"{line}\n", special=False)) for line in self.lines]

    def text(self, turns: Iterable[int]) -> str:
        """The turns of these numbers in the conversation's order, a line each."""
        return "\n".join(self.lines[i] for i in sorted(turns))

    @cached_property
    def _bm25(self):
        terms = self._terms(self.lines)
        if not any(terms):
            return None
        retriever = _bm25s().BM25()  # Lucene's variant, k1 1.5, b 0.75
        retriever.index(terms, show_progress=False)
        return retriever

    @staticmethod
    def _terms(texts: Sequence[str]) -> list[list[str]]:
        """Porter stems without English stop words, of the speakers' names too."""
        stem = metrics._stemmer().stem
        return _bm25s().tokenize(list(texts), stopwords="en", stemmer=lambda words: [stem(word) for word in words],
                                 return_ids=False, show_progress=False)

    def scores(self, question: str) -> "numpy.ndarray":
        """BM25 score of every turn, (turns,); 0 where it shares no word with the question."""
        import numpy as np

        (terms,) = self._terms([question])
        return self._bm25.get_scores(terms) if terms and self._bm25 else np.zeros(len(self.lines))


@cache
def _bm25s():
    """The package, imported where it finds no JAX: it would run JAX at once, for a selection that is not used here, and
    JAX then takes three quarters of a GPU's memory for this process."""
    seen = sys.modules.get("jax")
    sys.modules["jax"] = None
    try:
        import bm25s
    finally:
        del sys.modules["jax"]
        if seen is not None:
            sys.modules["jax"] = seen
    return bm25s


def last_turns(index: TurnIndex, questions: Question | Sequence[Question], budget: int | None = None,
               max_new_tokens: int = 24) -> str:
    """The last turns that fit ``budget`` tokens, or (None) the window beside the question and its answer.

    Of several questions the longest decides, so that all of them stand behind the same text.
    """
    room = _Room(index.backbone, questions, budget, max_new_tokens)
    first, used = len(index.lines), 0
    while first and (used := used + index.lengths[first - 1]) <= room.tokens:
        first -= 1
    # the lengths of lines may differ by a token or so from that of the text they make: the text decides
    while first and room.holds(index.text(range(first - 1, len(index.lines)))):
        first -= 1
    while first < len(index.lines) and not room.holds(index.text(range(first, len(index.lines)))):
        first += 1
    return index.text(range(first, len(index.lines)))


def bm25_turns(index: TurnIndex, question: Question, budget: int | None = None, max_new_tokens: int = 24) -> str:
    """The turns of the best BM25 scores that fit ``budget`` tokens (None: the window), in the conversation's order.

    Best first, of equal ones the earlier; a turn that does not fit what is left is passed over, and one that shares no
    word with the question is never taken.
    """
    import numpy as np

    room = _Room(index.backbone, question, budget, max_new_tokens)
    scores = index.scores(question.question)
    chosen, used = [], 0
    for i in np.argsort(-scores, kind="stable").tolist():
        if scores[i] > 0 and used + index.lengths[i] - 1 <= room.tokens:  # no line feed after the last line
            chosen.append(i)
            used += index.lengths[i]
    while chosen and not room.holds(index.text(chosen)):
        chosen.pop()
    return index.text(chosen)


def gold_turns(index: TurnIndex, question: Question, budget: int | None = None, max_new_tokens: int = 24) -> str:
    """The turns of the question's evidence in order, "" where there is none.

    What overruns ``budget`` tokens, or (None) the window, is cut off the text's end, whatever turn it lies in.
    """
    room = _Room(index.backbone, question, budget, max_new_tokens)
    text = index.text({index.conversation.turn(id).index for id in question.evidence})
    ids = index.backbone.token_ids(text, special=False)
    kept = min(len(ids), room.tokens + 8)  # the room is known to a few tokens only, the loop finds it
    while text and not room.holds(text):
        text = index.backbone.tokenizer.decode(ids[:kept]).rstrip("\ufffd") if kept > 0 else ""
        kept -= 1
    return text


class _Room:
    """What a text may take in front of the longest of ``questions``, with room left for an answer of that question.

    That answer is ``max_new_tokens`` long or as long as the gold one, whichever is longer.
    """

    def __init__(self, backbone: Backbone, questions: Question | Sequence[Question], budget: int | None,
                 max_new_tokens: int):
        questions = [questions] if isinstance(questions, Question) else questions
        if not questions or (budget is not None and budget < 1) or max_new_tokens < 1:
            raise ValueError("give at least one question, and a budget (or None) and max_new_tokens of at least 1")

        def answer_tokens(q: Question) -> int:
            return max(max_new_tokens, len(prompts.target_ids(backbone, q.answer)))

        self.backbone, self.budget = backbone, budget
        lengths = [len(backbone.token_ids(prompts.prompt_text(q.question))) + answer_tokens(q) for q in questions]
        longest = max(range(len(questions)), key=lengths.__getitem__)
        self.question, self.reserved = questions[longest].question, answer_tokens(questions[longest])
        room = max(0, backbone.max_tokens - lengths[longest])
        self.tokens = room if budget is None else min(room, budget)  # to a few tokens; `holds` is exact

    def holds(self, text: str) -> bool:
        """Whether ``text`` fits, counted in the tokens of the text and of the prompt it makes."""
        count = self.backbone.token_ids
        if self.budget is not None and len(count(text, special=False)) > self.budget:
            return False
        return len(count(prompts.prompt_text(self.question, text))) + self.reserved <= self.backbone.max_tokens


# ---- asking with them ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptReference(Settings):
    """A text in front of each question: of ``kind`` "none", "gold", "bm25" or "last", at most ``budget`` tokens.

    ``budget`` None: what fits the window.
    """

    name: str
    kind: str
    budget: int | None = None

    def __post_init__(self):
        super().__post_init__()
        self.require(self.kind in KINDS, f"unknown kind {self.kind!r}: known are {', '.join(KINDS)}")
        self.require(self.budget is None or self.budget >= 1, "budget must be at least 1 token, or None for the window")


FROZEN = PromptReference("frozen", "none")


def prompt_references(budgets: Sequence[int] = (64, 640), last: int | None = None) -> tuple[PromptReference, ...]:
    """Gold evidence, BM25 at each budget, and the last turns that fit ``last`` tokens (None: the window).

    An equal budget is as many tokens as a bank has entries: 64 at 1x, 640 at 10x [D].
    """
    bm25 = [PromptReference(f"BM25 {budget}", "bm25", budget) for budget in budgets]
    turns = PromptReference("last turns" if last is None else f"last turns {last}", "last", last)
    return PromptReference("gold evidence", "gold"), *bm25, turns


def ask_references(backbone: Backbone, conversations: Sequence[Conversation],
                   asked: Sequence[tuple[str, int, Question]],
                   references: Sequence[PromptReference] = prompt_references(),
                   settings: EvaluateSettings = EvaluateSettings()) -> "pandas.DataFrame":
    """Ask the frozen model the questions ``asked`` (see `sample_questions`) behind the text of each reference.

    A row a question and reference, the bare model ("frozen") first: reference, budget, conversation, number, category,
    lag, answer_text, f1 and locomo (fractions), logp (nats per token of the gold answer), tokens (read per question:
    the whole prompt), seconds (per question: its batch's time to answer over the batch's size, with its part of what a
    shared text took), bytes (UTF-8, of the text that is kept per conversation: all of it for "gold" and "bm25", what
    fits for "last"). Answers are cached on disk, with the seconds of the time they were made.
    """
    import pandas as pd

    by_id = {c.id: c for c in conversations}
    if not asked or not {id for id, *_ in asked} <= set(by_id):
        raise ValueError("there is no question to ask, or one of a conversation that is not given: give questions made "
                         "by sample_questions of these conversations")
    references = [FROZEN, *(r for r in references if r != FROZEN)]
    if len({r.name for r in references}) < len(references):
        raise ValueError(f"two references have one name among {', '.join(r.name for r in references)}: name them apart")
    indices = {id: TurnIndex(backbone, by_id[id]) for id in dict.fromkeys(id for id, *_ in asked)}
    tables = []
    with tqdm(total=2 * len(asked) * len(references), desc="references", unit="answer", disable=not settings.progress,
              mininterval=1.0) as bar:
        for reference in references:
            bar.set_postfix_str(reference.name, refresh=False)
            texts = _texts(indices, asked, reference, settings.max_new_tokens)
            known = _cached_answers(backbone, asked, texts, settings, bar.update)
            tables.append(pd.DataFrame([dict(
                reference=reference.name, budget=reference.budget, conversation=id, number=number, category=q.category,
                lag=q.lag, answer_text=answer, f1=metrics.token_f1(answer, q.answer),
                locomo=metrics.locomo_f1(answer, q.answer, q.category), logp=logp, tokens=tokens, seconds=seconds,
                bytes=_bytes_kept(indices[id], reference, text),
            ) for (id, number, q), text, (answer, logp, tokens, seconds) in zip(asked, texts, known, strict=True)]))
    return pd.concat(tables, ignore_index=True).astype({"budget": "Int64"})


def _texts(indices: dict[str, TurnIndex], asked, reference: PromptReference, max_new_tokens: int) -> list[str]:
    """The reference's text for every question."""
    if reference.kind == "none":
        return [""] * len(asked)
    if reference.kind == "last":  # one text for all questions of a conversation
        text = {id: last_turns(index, [q for other, _, q in asked if other == id], reference.budget, max_new_tokens)
                for id, index in indices.items()}
        return [text[id] for id, *_ in asked]
    turns = gold_turns if reference.kind == "gold" else bm25_turns
    return [turns(indices[id], q, reference.budget, max_new_tokens) for id, _, q in asked]


def _bytes_kept(index: TurnIndex, reference: PromptReference, text: str) -> int:
    kept = {"none": "", "last": text}.get(reference.kind)
    return len((index.text(range(len(index.lines))) if kept is None else kept).encode())


def _cached_answers(backbone: Backbone, asked, texts: Sequence[str], s: EvaluateSettings,
                    on_batch: Callable[[int], object]) -> list[tuple[str, float, int, float]]:
    """(answer, logp, tokens, seconds) of every question, from the disk or computed now."""
    made = 0

    def counted(n: int) -> None:
        nonlocal made
        made += n
        on_batch(n)

    rows = cached_rows(_answers_file(backbone, asked, texts, s), len(asked), (str, float, int, float),
                       lambda: _answers(backbone, [q for *_, q in asked], texts, s, counted))
    on_batch(2 * len(asked) - made)
    return rows


def _answers_file(backbone: Backbone, asked, texts: Sequence[str], s: EvaluateSettings) -> Path:
    wanted = [[prompts.prompt_text(q.question, text), q.answer] for (*_, q), text in zip(asked, texts, strict=True)]
    return cache_file("references", [FORMAT, backbone.cache_key, prompts.ANSWER, s.max_new_tokens, s.batch_size,
                                     use_bf16(s.autocast, backbone.device), str(backbone.device), wanted])


def _answers(backbone: Backbone, questions: Sequence[Question], texts: Sequence[str], s: EvaluateSettings,
             on_batch: Callable[[int], object], share: bool = True) -> list[tuple[str, float, int, float]]:
    """(answer, logp, tokens, seconds) of every question behind its text.

    Questions behind one long text share a run of it, with ``share``; the others are asked in batches of near-equal
    length. Answers are decoded in float32, as in `evaluate`.
    """
    rows = [backbone.token_ids(prompts.prompt_text(q.question, text)) for q, text in zip(questions, texts, strict=True)]
    targets = [prompts.target_ids(backbone, q.answer) for q in questions]
    groups: dict[str, list[int]] = {}
    for i, text in enumerate(texts):
        groups.setdefault(text, []).append(i)
    alone: list[int] = []
    found: dict[int, tuple[str, float, int, float]] = {}
    with torch.no_grad():
        for group in groups.values():
            # the ids decide what is shared: a tokenizer may join a text's last characters to the question's first
            common = min(len(os.path.commonprefix([rows[i] for i in group])), min(len(rows[i]) for i in group) - 1)
            if not share or len(group) < 2 or common < SHARED:
                alone += group
                continue
            for i, answer, logp, seconds in _ask_shared(backbone, group, rows, targets, common, s, on_batch):
                found[i] = (answer, logp, len(rows[i]), seconds)
        model = MemoryModel(backbone, "baseline")
        lengths = [len(rows[i]) + max(s.max_new_tokens, len(targets[i])) for i in alone]
        for batch in _batches(lengths, *map(backbone.at_once, (BATCH_TOKENS, s.batch_size))):
            batch = [alone[j] for j in batch]
            asked, contexts = [questions[i].question for i in batch], [texts[i] for i in batch]
            start = time.perf_counter()
            answers = model.answer(asked, s.max_new_tokens, "off", len(batch), on_batch, contexts)
            seconds = (time.perf_counter() - start) / len(batch)
            with backbone.autocast(s.autocast):
                score = model.score(asked, [questions[i].answer for i in batch], "off", contexts)
            on_batch(len(batch))
            for i, answer, logp in zip(batch, answers, (score.log_prob / score.tokens).tolist(), strict=True):
                found[i] = (answer, logp, len(rows[i]), seconds)
    return [found[i] for i in range(len(questions))]


def _batches(lengths: Sequence[int], batch_tokens: int, batch_size: int) -> Iterator[list[int]]:
    for batch in length_sorted_batches(lengths, batch_tokens):
        yield from (batch[a : a + batch_size] for a in range(0, len(batch), batch_size))


def _ask_shared(backbone: Backbone, group: Sequence[int], rows: Sequence[list[int]], targets: Sequence[list[int]],
                common: int, s: EvaluateSettings, on_batch) -> Iterator[tuple[int, str, float, float]]:
    """(row, answer, logp, seconds) of rows that begin with the same ``common`` tokens, which run once."""
    start = time.perf_counter()
    shared = _keys_and_values(backbone, rows[group[0]][:common])
    part = (time.perf_counter() - start) / len(group)
    lengths = [len(rows[i]) - common + max(s.max_new_tokens, len(targets[i])) for i in group]
    for batch in _batches(lengths, *map(backbone.at_once, (SHARED_BATCH_TOKENS, s.batch_size))):
        batch = [group[j] for j in batch]
        ends = [rows[i][common:] for i in batch]
        start = time.perf_counter()
        ids, mask = backbone.pad(ends, side="left")
        answers = greedy_lines(backbone, ids, mask, shared, s.max_new_tokens, start=common)
        seconds = part + (time.perf_counter() - start) / len(batch)
        on_batch(len(batch))
        ids, mask = backbone.pad([end + targets[i] for end, i in zip(ends, batch, strict=True)], side="right")
        column = torch.arange(ids.shape[1], device=ids.device)[None]
        question = column < torch.tensor([[len(end)] for end in ends], device=ids.device)  # (B, T)
        with backbone.autocast(s.autocast):
            score = prompts.score_targets(backbone, ids, mask, question, shared, start=common)
        on_batch(len(batch))
        for i, answer, logp in zip(batch, answers, (score.log_prob / score.tokens).tolist(), strict=True):
            yield i, answer, logp, seconds


def _keys_and_values(backbone: Backbone, ids: Sequence[int]) -> list[seam.KeyValues]:
    """Each block's keys and values of a text, at its own positions, for what follows to read."""
    from transformers import DynamicCache

    cache = DynamicCache(config=backbone.config)
    with seam.inject(backbone.model, None):
        backbone.model.base_model(torch.tensor([ids], device=backbone.device), past_key_values=cache, use_cache=True)
    return [seam.KeyValues(layer.keys, layer.values) for layer in cache.layers]  # (1, h_kv, T, dk) each
