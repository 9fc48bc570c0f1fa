"""What the frozen model is asked, and how an answer is scored: the prompt's form, and teacher forcing.

The question alone is in the context window, never the history [C]; how it is put is ours [D], and `PROMPT` and `ANSWER` are the
one place to change it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import seam
from .backbone import Backbone
from .decoding import positions_of
from .locomo import Question

CONTEXT = "{context}\n\n"  # in front of the prompt, where a question comes with a text to read [D]
PROMPT = "Question: {question}\nShort answer:"  # [D]
ANSWER = " {answer}\n"  # the closing line feed is learnt with the answer: an answer is its first line [D]
SCORED = 4096  # tokens whose logits, (SCORED, vocab), are held at a time where nothing is trained


@dataclass
class AnswerScore:
    """Teacher-forced score of a batch of answers: ``log_prob`` (B,) summed over ``tokens`` (B,) answer tokens."""

    log_prob: Tensor
    tokens: Tensor


def prompt_text(question: str, context: str = "") -> str:
    """The whole prompt: the context, where there is one, and the question."""
    return (CONTEXT.format(context=context) if context else "") + PROMPT.format(question=question)


def prompt_texts(questions: Sequence[str], contexts: Sequence[str] | None) -> list[str]:
    """`prompt_text` of each question; ValueError where there are not as many contexts, "" for none."""
    if contexts is None:
        contexts = [""] * len(questions)
    if isinstance(contexts, str) or len(contexts := list_of_texts("contexts", contexts)) != len(questions):
        raise ValueError(f"contexts is a list with one text a question: give {len(questions)}, '' where there is none")
    return list(map(prompt_text, questions, contexts))


def target_ids(backbone: Backbone, answer: str) -> list[int]:
    """The tokens that are scored for ``answer``, closing line feed included."""
    return backbone.token_ids(ANSWER.format(answer=answer), special=False)


def require_fitting(backbone: Backbone, questions: Iterable[tuple[str, Question]], new_tokens: int = 0) -> None:
    """ValueError that names the first of these (conversation id, question) whose prompt does not leave the context room for
    its answer, or for so many new tokens."""
    for id, q in questions:
        prompt = prompt_text(q.question)
        size = len((prompt + ANSWER.format(answer=q.answer)).encode(errors="surrogatepass"))
        if size + max(new_tokens, 2) <= backbone.max_tokens:
            continue  # a token is a byte at least, and two may stand around a text
        asked, answer = len(backbone.token_ids(prompt)), len(target_ids(backbone, q.answer))
        if asked + max(answer, new_tokens) > backbone.max_tokens:
            raise ValueError(f"the question {q.question[:60]!r} of conversation {id!r} has {asked} tokens with its prompt, its "
                             f"answer {answer}: with {max(answer, new_tokens)} they do not fit the context of "
                             f"{backbone.max_tokens} tokens; shorten or leave it out")


def list_of_texts(what: str, texts: Iterable[str]) -> list[str]:
    """``texts`` as a list, or a ValueError: one string is no list of strings, though Python can walk through it."""
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise ValueError(f"{what} is a list of strings: wrap the one in [ ]")
    texts = list(texts)
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{what} is a list of strings, and one of them is a {type(text).__name__}: {text!r}")
    return texts


def score_targets(backbone: Backbone, ids: Tensor, mask: Tensor, question: Tensor, injection: seam.Injection,
                  start: int = 0) -> AnswerScore:
    """Score the tokens of right-padded rows, all (B, T), that ``question`` does not mark.

    A row begins with at least one that it marks, and its first token stands at position ``start``.
    """
    row, log_probs = target_log_probs(backbone, ids, mask, question, injection, start)
    zeros = log_probs.new_zeros(len(ids))
    return AnswerScore(zeros.index_add(0, row, log_probs), row.bincount(minlength=len(ids)))


def target_log_probs(backbone: Backbone, ids: Tensor, mask: Tensor, question: Tensor, injection: seam.Injection,
                     start: int = 0) -> tuple[Tensor, Tensor]:
    """The N tokens that `score_targets` sums over, row by row: the row of each and its log-probability, both (N,)."""
    is_target = mask.bool() & ~question
    positions = {"position_ids": start + positions_of(mask)} if start else {}
    with seam.inject(backbone.model, injection):  # right padding under a causal mask needs no mask of its own
        hidden = backbone.model.base_model(ids, use_cache=False, **positions).last_hidden_state  # (B, T, d)
    predicts = is_target.roll(-1, dims=1)  # the column before a target predicts it
    predicts[:, -1] = False
    head, wanted, said = backbone.model.get_output_embeddings(), hidden[predicts], ids[is_target]  # (N, d), (N,)
    size = len(wanted) if torch.is_grad_enabled() else SCORED
    log_probs = [-torch.nn.functional.cross_entropy(head(part).float(), tokens, reduction="none")  # of logits (size, vocab)
                 for part, tokens in zip(wanted.split(size), said.split(size), strict=True)]
    return is_target.nonzero()[:, 0], torch.cat(log_probs)
