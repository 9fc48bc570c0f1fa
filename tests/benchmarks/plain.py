"""The published loop's shape, as plainly as it can be written: what the library's speed is compared with.

One example at a time, everything padded to 384 tokens in float32, the frozen states of every turn computed anew in each
epoch, the bank rebuilt and read for each question. The write and the read are the library's own functions, so that
both do the same mathematics and a test can hold them to the same losses.
"""

import torch

from pdmem_lib import seam
from pdmem_lib.prompts import prompt_text, target_ids
from pdmem_lib.methods import Inputs

LENGTH = 384  # tokens, of every example


def padded(backbone, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (1, 384), right-padded, and their mask (1, 384)."""
    if len(ids) > LENGTH:
        raise ValueError(f"{len(ids)} tokens do not fit the {LENGTH} of the plain loop: give a shorter text")
    row = torch.full((1, LENGTH), backbone.tokenizer.pad_token_id)
    row[0, : len(ids)] = torch.tensor(ids)
    return row.to(backbone.device), (torch.arange(LENGTH) < len(ids))[None].long().to(backbone.device)


@torch.no_grad()
def encode_turn(backbone, text: str) -> torch.Tensor:
    """Final hidden states (T, d) of one turn, padded to 384 on the way."""
    ids = backbone.token_ids(text)
    row, mask = padded(backbone, ids)
    with seam.inject(backbone.model, None):
        hidden = backbone.model.base_model(row, attention_mask=mask, use_cache=False).last_hidden_state
    return hidden[0, : len(ids)].float()


def bank_of(model, turns: list[str]):
    """The state after ``turns``, each encoded anew."""
    state = model.adapter.initial_state()
    for turn in turns:
        state = model.adapter.write(state, encode_turn(model.backbone, turn))
    return state


def loss_of(model, question: str, answer: str, state) -> torch.Tensor:
    """Mean cross-entropy (nats) on one answer's tokens; logits of all 384 positions are computed."""
    backbone = model.backbone
    prompt = backbone.token_ids(prompt_text(question))
    ids = prompt + target_ids(backbone, answer)
    row, mask = padded(backbone, ids)
    inputs = None
    if model.adapter.needs_inputs:
        with torch.no_grad(), seam.inject(backbone.model, None):
            hidden = backbone.model.base_model(row, attention_mask=mask, use_cache=False).last_hidden_state
        inputs = Inputs(hidden.float(), (torch.arange(LENGTH) < len(prompt))[None].to(backbone.device))
    with seam.inject(backbone.model, model.adapter.read(state, inputs)):
        logits = backbone.model(row, attention_mask=mask, use_cache=False).logits[0]  # (384, vocab)
    targets = torch.tensor(ids, device=backbone.device)
    predicted = logits[len(prompt) - 1 : len(ids) - 1]
    return torch.nn.functional.cross_entropy(predicted.float(), targets[len(prompt) :])


def step(model, optimizer, questions: list[str], answers: list[str], state) -> float:
    """One optimiser step on a batch, gradients gathered example by example; its mean loss."""
    total = 0.0
    for question, answer in zip(questions, answers, strict=True):
        loss = loss_of(model, question, answer, state) / len(questions)
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return total
