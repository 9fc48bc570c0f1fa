"""Greedy decoding of first lines, for many rows at once [D].

A row that has ended leaves the batch, so that a step costs what its unfinished rows cost: answers are a few tokens
long, and one that goes on to the limit would otherwise hold all others. `transformers`' own ``generate`` keeps every
row to the end; a test holds both to the same answers.

Where an answer can be guessed (it is often the same under the bank of another session), the guess runs through the
blocks with the prompt, in one pass, and as much of it is kept as greedy decoding would have said: speculative decoding
(Leviathan et al., 2023) with a text for a draft. A right guess costs one pass in place of one a token, a wrong one a few
columns more, and neither changes the answer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import seam
from .backbone import Backbone


CHUNK = 512  # positions whose logits, (CHUNK, vocab), are held at once


def positions_of(mask: Tensor) -> Tensor:
    """Positions (B, T) under left or right padding: real tokens count from 0."""
    return (mask.cumsum(dim=1) - 1).clamp_min(0)


@torch.no_grad()
def greedy_lines(backbone: Backbone, ids: Tensor, mask: Tensor, injection: seam.Injection, max_new_tokens: int,
                 start: int = 0, drafts: Sequence[Sequence[int]] | None = None) -> list[str]:
    """The first line that follows each left-padded row, (B, T), greedily; a row's first token stands at ``start``.

    Leading line ends are skipped. ``drafts``: the tokens that each row is guessed to say; the answers do not depend on
    them.
    """
    from transformers import DynamicCache

    model, tokenizer, head = backbone.model, backbone.tokenizer, backbone.model.get_output_embeddings()
    cache = DynamicCache(config=model.config)
    draft = _padded([draft[: max_new_tokens - 1] for draft in drafts or [()] * len(ids)], ids.device)  # (B, D)
    ids, mask, first = _behind(ids, mask, draft, fixed=seam.stands_at_columns(injection))
    positions = start + positions_of(mask)
    newlines, lines = set(backbone.newline_ids), [[] for _ in ids]
    going = list(range(len(ids)))  # which line each row of the batch writes

    def goes_on(line: list[int], tokens: list[int]) -> bool:
        for token in tokens:
            ends = token in newlines and not newlines.issuperset(line)
            line.append(token)
            if ends or token == tokenizer.eos_token_id or len(line) == max_new_tokens:
                return False
        return True

    while True:
        with seam.inject(model, injection):
            hidden = model.base_model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
                                      use_cache=True).last_hidden_state
        said = _said(head, hidden, first, (draft >= 0).sum(dim=1))  # (B, D + 1): behind the prompt, and behind each token of the draft
        right = (said[:, :-1] == draft).cumprod(dim=1).sum(dim=1)  # (B,): tokens of the draft that are what was said
        kept = torch.tensor([goes_on(lines[row], tokens[: n + 1]) for row, tokens, n in
                             zip(going, said.tolist(), right.tolist(), strict=True)], device=ids.device)
        if not kept.any():
            break
        if draft.shape[1]:
            mask = mask.masked_fill(_columns(mask) >= (first + right)[:, None], 0)  # what of the draft was never said
        ids, positions = said.gather(1, right[:, None]), start + mask.sum(dim=1, keepdim=True)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        draft, first = draft[:, :0], torch.ones_like(right)
        if not kept.all():
            cache.batch_select_indices(kept.nonzero()[:, 0])
            injection = seam.keep(injection, kept)
            going = [row for row, on in zip(going, kept.tolist(), strict=True) if on]
            ids, mask, positions, draft, first = (x[kept] for x in (ids, mask, positions, draft, first))
    texts = tokenizer.batch_decode(lines, skip_special_tokens=True)
    return [text.strip().split("\n")[0].strip() for text in texts]


def _behind(ids: Tensor, mask: Tensor, draft: Tensor, fixed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Left-padded rows (B, T) with their ``draft`` (B, D) behind, the mask of both, and the column (B,) where it begins.

    All padding goes to the left, so that rows of unequal prompts and drafts are as wide as the longest of both; with
    ``fixed`` a prompt stays in its columns, and a shorter draft is padded behind.
    """
    real = torch.cat([mask, (draft >= 0).to(mask.dtype)], dim=1)  # (B, T + D)
    both, first = torch.cat([ids, draft.clamp_min(0)], dim=1), ids.new_full((len(ids),), ids.shape[1])
    if fixed or not draft.shape[1]:
        return both, real, first
    order = real.argsort(dim=1, stable=True)[:, -int(real.sum(dim=1).max()) :]  # padding first
    return both.gather(1, order), real.gather(1, order), order.shape[1] - (draft >= 0).sum(dim=1)


def _columns(like: Tensor) -> Tensor:
    return torch.arange(like.shape[1], device=like.device)


def _said(head, hidden: Tensor, first: Tensor, drafted: Tensor) -> Tensor:
    """The likeliest token behind the column before ``first`` and behind each of the ``drafted`` (both (B,)) from there on:
    (B, D + 1), filled with 0. Only those columns of ``hidden`` (B, T, d) pass through the head."""
    ahead = _columns(hidden) - first[:, None] + 1  # (B, T)
    wanted = hidden[(ahead >= 0) & (ahead <= drafted[:, None])]  # (N, d), row by row
    tokens = torch.cat([head(part).argmax(dim=-1) for part in wanted.split(CHUNK)])
    said = tokens.new_zeros(len(hidden), int(drafted.max()) + 1)
    said[_columns(said) <= drafted[:, None]] = tokens
    return said


def _padded(rows: Sequence[Sequence[int]], device) -> Tensor:
    """Rows of token ids as one tensor, -1 behind each."""
    longest = max(map(len, rows), default=0)
    return torch.tensor([[*row, *[-1] * (longest - len(row))] for row in rows], dtype=torch.long, device=device)
