"""Greedy decoding of first lines, for many rows at once [D].

A row that has ended leaves the batch, so that a step costs what its unfinished rows cost: answers are a few tokens
long, and one that goes on to the limit would otherwise hold all others. `transformers`' own ``generate`` keeps every
row to the end; a test holds both to the same answers.
"""

import torch
from torch import Tensor

from . import seam
from .backbone import Backbone


def positions_of(mask: Tensor) -> Tensor:
    """Positions (B, T) under left or right padding: real tokens count from 0."""
    return (mask.cumsum(dim=1) - 1).clamp_min(0)


@torch.no_grad()
def greedy_lines(backbone: Backbone, ids: Tensor, mask: Tensor, injection: seam.Injection, max_new_tokens: int,
                 start: int = 0) -> list[str]:
    """The first line that follows each left-padded row, (B, T), greedily; a row's first token stands at ``start``.

    Leading line ends are skipped.
    """
    from transformers import DynamicCache

    model, tokenizer, device = backbone.model, backbone.tokenizer, ids.device.type
    head = model.get_output_embeddings().weight
    if torch.is_autocast_enabled(device):
        head = head.to(torch.get_autocast_dtype(device))  # once, and not once a step
    newlines, stop = torch.tensor(backbone.newline_ids, device=ids.device), tokenizer.eos_token_id
    cache, positions = DynamicCache(config=model.config), start + positions_of(mask)
    lines: list[list[int]] = [[] for _ in ids]
    going = list(range(len(ids)))  # which line each row of the batch writes
    begun = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)  # said something other than a line end
    for _ in range(max_new_tokens):
        with seam.inject(model, injection):
            hidden = model.base_model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
                                      use_cache=True).last_hidden_state[:, -1]
        ids = (hidden @ head.T).argmax(dim=-1)  # (B,)
        for row, token in zip(going, ids.tolist(), strict=True):
            lines[row].append(token)
        ends = torch.isin(ids, newlines)
        kept = ~((ends & begun) | (ids == stop))
        begun |= ~ends
        if not kept.any():
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = positions[:, -1:] + 1
        ids = ids[:, None]
        if not kept.all():
            cache.batch_select_indices(kept.nonzero()[:, 0])
            injection = seam.keep(injection, kept)
            going = [row for row, on in zip(going, kept.tolist(), strict=True) if on]
            ids, mask, positions, begun = ids[kept], mask[kept], positions[kept], begun[kept]
    texts = tokenizer.batch_decode(lines, skip_special_tokens=True)
    return [text.strip().split("\n")[0].strip() for text in texts]
