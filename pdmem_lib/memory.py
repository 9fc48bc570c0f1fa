"""`MemoryModel`: a frozen backbone with a persistent latent memory.

The state is an explicit value (``model.state``), written turn by turn without gradients and read by the adapter, whose
parameters are the only thing trained. The question alone is in the context window, never the history [C].
"""

import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from . import methods, persistence, seam
from .backbone import TINY_NAMES, Backbone, load_backbone, required, slow_bar
from .decoding import greedy_lines
from .locomo import Turn, texts_of
from .methods import Inputs, MemorySettings, State
from .prompts import AnswerScore, list_of_texts, prompt_text, prompt_texts, score_targets, target_ids, target_log_probs
from .settings import whole_number

log = logging.getLogger(__name__)

STREAM = 256  # turns of an iterator that are held at a time
Memory = str | State  # "own" | "zero" | "off" | a state


class MemoryModel:
    """A frozen ``backbone`` with memory ``method`` at ``capacity`` (1 or 10) and the random maps of ``seed``.

    Further keywords as in `MemorySettings`: num_entries, d_h, top_k, gamma, read_gate, read_norm; one that is unknown or
    does not fit is a ValueError. Wherever a ``memory`` is asked for, "own" is the state as it stands, "zero" zeros in its
    place, "off" the frozen model, and a dict of tensors such as ``model.state`` is another one's.
    """

    def __init__(self, backbone: Backbone, method: str = "slot", capacity: int = 1, seed: int = 42, **overrides):
        self.backbone = required(backbone)
        self.settings = MemorySettings.from_mapping(dict(method=method, capacity=capacity, seed=seed, **overrides))
        self.adapter = methods.build(backbone, self.settings)  # an nn.Module: trained parameters, fixed maps
        self.reset()

    def __repr__(self) -> str:
        return (f"MemoryModel({self.backbone.name}, {self.method!r}, capacity={self.settings.capacity}, "
                f"{self.num_trainable:,} trainable parameters)")

    @property
    def method(self) -> str:
        """The method's name in `METHODS`, or "baseline"."""
        return self.settings.method

    @property
    def frozen(self) -> Backbone:
        """The bare frozen model, which memory="off" asks."""
        return self.backbone

    @property
    def num_trainable(self) -> int:
        """Number of parameters of θ_mem."""
        return sum(p.numel() for p in self.parameters())

    def parameters(self) -> list[torch.nn.Parameter]:
        """θ_mem, the only parameters that are ever trained."""
        return list(self.adapter.parameters())

    # ---- state ----
    @torch.inference_mode(False)
    def reset(self) -> State:
        """Set the state back to P_0 of the seed [C]."""
        self._state = self.adapter.initial_state()
        return self._state

    @property
    def state(self) -> State:
        """{"P": (M, d)} or {"M": (d_h, d_h)}; {} for the baseline. Assign to replace it."""
        return self._state

    @state.setter
    @torch.inference_mode(False)
    def state(self, state: State) -> None:
        self._state = {name: t.clone() for name, t in self.checked(state).items()}  # another model's stays its own

    @torch.inference_mode(False)  # a state made in inference mode can be trained on later
    def checked(self, state: State) -> State:
        """``state`` on this model's device, or a ValueError that names what does not fit."""
        if not isinstance(state, Mapping):
            raise ValueError(f"this state is a {type(state).__name__}: give a dict of tensors, as model.state is")
        if other := [f"{name!r} is a {type(t).__name__}" for name, t in state.items() if not isinstance(t, Tensor)]:
            raise ValueError(f"in this state {', '.join(other)}: give a dict of tensors, as model.state is")
        expected = {name: tuple(t.shape) for name, t in self.adapter.initial_state().items()}
        given = {name: tuple(t.shape) for name, t in state.items()}
        if given != expected:
            raise ValueError(f"this state holds {given}, but {self.method} at capacity {self.settings.capacity} keeps "
                             f"{expected}: use a state written by the same method and capacity")
        persistence.require_finite(state)
        state = {name: t.detach().to(self.backbone.device, torch.float32) for name, t in state.items()}
        return {name: t.clone() if t.is_inference() else t for name, t in state.items()}

    def write(self, turns: str | Turn | Iterable[str | Turn], autocast: bool | str = False) -> State:
        """Write one turn ("Speaker: text", or a `Turn`) or a list of turns, in order; returns the new state.

        Turns are encoded one by one, so that a list leaves what its turns would leave one after the other, bit for bit.
        An iterator of turns may be endless or larger than the memory: `STREAM` of them are encoded and written at a
        time, and where one cannot be, those before its batch stay written.
        """
        if isinstance(turns, Iterator):
            while batch := list(islice(turns, STREAM)):
                self.write(batch, autocast)
            return self._state
        return self.write_hidden(self.backbone.encode(texts_of(turns), autocast=autocast, batch_tokens=1))

    @torch.inference_mode(False)
    @torch.no_grad()
    def write_hidden(self, hidden: Sequence[Tensor]) -> State:
        """Write turns given by their final hidden states, (T_i, d) each; returns the new state.

        ValueError for what is no such list, or not finite; the turns before it stay written.
        """
        if not isinstance(hidden, Iterable) or isinstance(hidden, (Mapping, str)):
            raise ValueError(f"a {type(hidden).__name__} holds no hidden states: give a list of them, as backbone.encode does")
        for H in hidden:
            if not isinstance(H, Tensor) or not H.isfinite().all():
                what = "holds numbers that are not finite" if isinstance(H, Tensor) else f"is a {type(H).__name__}"
                raise ValueError(f"a turn's hidden states are a tensor (T, d), this one {what}")
            self._state = self.adapter.write(self._state, H.to(self.backbone.device, torch.float32))
        return self._state

    # ---- reading ----
    def resolve(self, memory: Memory) -> State | None:
        """What ``memory`` stands for: "own" the state, "zero" zeros in its place, "off" None, or a state itself."""
        if not isinstance(memory, str):
            return self.checked(memory)
        if memory == "own":
            return self._state
        if memory == "zero":
            return {name: torch.zeros_like(t) for name, t in self._state.items()}
        if memory == "off":
            return None
        raise ValueError(f"unknown memory {memory!r}: known are 'own', 'zero', 'off', or a state")

    def injection(self, memory: Memory, inputs: Inputs | None = None) -> seam.Injection:
        """The keys and values or the branch by which the blocks read ``memory``; None for "off"."""
        state = self.resolve(memory)
        return None if state is None else self.adapter.read(state, inputs)

    def _injections(self, memories: Sequence[Memory], inputs: Sequence[Inputs | None]) -> seam.Injection:
        """`injection` of several memories as one, run i of the batch reading memory i; None for "off", asked alone."""
        states = [self.resolve(memory) for memory in memories]
        return None if None in states else self.adapter.read_each(states, inputs)

    def _injection_for(self, memories: Sequence[Memory], ids: Tensor, question: Tensor) -> seam.Injection:
        """For an input, all (B, T), repeated under each memory; ``question`` marks the tokens that M.4 may query with."""
        if "off" in memories and len(memories) > 1:
            raise ValueError("memory 'off' reads nothing and cannot be asked together with others: ask it alone")
        needed = self.adapter.needs_inputs and memories[0] != "off"
        inputs = self._frozen_inputs(ids, question) if needed else None
        return self._injections(memories, [inputs] * len(memories))

    def _frozen_inputs(self, ids: Tensor, question: Tensor) -> Inputs:
        """The frozen states of the tokens that ``question`` marks in each row, zero elsewhere."""
        hidden = torch.zeros(*ids.shape, self.backbone.hidden_size, dtype=torch.float32, device=ids.device)
        for row, (tokens, marked) in enumerate(zip(ids, question.bool(), strict=True)):
            hidden[row, marked] = self.backbone.states_of(tokens[marked].tolist())
        return Inputs(hidden, question.bool())

    @torch.no_grad()
    def logits(self, text: str, memory: Memory = "own") -> Tensor:
        """Next-token logits (T, vocab) of ``text`` as it stands, float32."""
        return self._forward(text, memory)[0][0]

    @torch.no_grad()
    def openness(self, text: str, memory: Memory = "own") -> Tensor | None:
        """How far each block lets the memory in, on the CPU: tanh(gate) (L, h) for readers of keys and values, beta
        (L,) for M.2, the mean of its gate over the tokens of ``text`` and the components (L,) for M.5. 0 is closed.

        None where nothing is read, or no gate stands before it (``read_gate=False``).
        """
        injection = self._forward(text, memory, opened=(opened := []))[1]
        if not isinstance(injection, seam.Branch):
            opened = [torch.tanh(part.gate) for part in injection or [] if part.gate is not None]
        return torch.stack(opened).float().cpu() if opened else None

    def _forward(self, text: str, memory: Memory, **collected: list[Tensor]) -> tuple[Tensor, seam.Injection]:
        (text,) = list_of_texts("the text", [text])
        ids, mask = self.backbone.pad([self._fitting(self.backbone.token_ids(text))], side="right")
        injection = self._injection_for([memory], ids, question=mask)
        for part in [injection] if isinstance(injection, seam.Branch) else injection or []:
            for what, into in collected.items():
                setattr(part, what, into)
        with seam.inject(self.backbone.model, injection):
            return self.backbone.model(ids, use_cache=False).logits, injection

    @torch.no_grad()
    def attention_to_memory(self, text: str, memory: Memory = "own") -> Tensor | None:
        """How much each token of ``text`` reads each entry, (L, h, T, M), on the CPU.

        Readers of keys and values: the softmax mass on memory times |tanh(gate)|, so a row sums to at most 1 and to 0
        at the silent start. M.2, M.5: the branch's own softmax, whose rows sum to 1. Baseline: None, it reads nothing;
        whatever gives None, the reason is said in a warning of the log.
        """
        seen: list[Tensor] = []
        injection = self._forward(text, memory, seen=seen)[1]
        if not seen:
            under = f"memory {memory!r}" if isinstance(memory, str) else "this memory"
            why = "reads nothing" if injection is None else "has a branch that keeps no softmax (Branch.seen)"
            log.warning("%s with %s %s: there is no attention to memory", self.method, under, why)
            return None
        return torch.cat(seen).cpu()  # (L, h, T, M): B is 1

    def _fitting(self, ids: list[int], room: int = 0) -> list[int]:
        if not ids:
            raise ValueError("the text is empty: give at least one token")
        if len(ids) + room > self.backbone.max_tokens:
            raise ValueError(f"{len(ids)} tokens (and {room} to generate) do not fit the context of "
                             f"{self.backbone.max_tokens} tokens: shorten the question or answer")
        return ids

    # ---- training and scoring ----
    def loss(self, questions: Sequence[str], answers: Sequence[str], memory: Memory = "own") -> Tensor:
        """Mean cross-entropy (nats per token) on the answers' tokens only; differentiable in θ_mem."""
        score = self.score(questions, answers, memory)
        return -score.log_prob.sum() / score.tokens.sum()

    def score(self, questions: Sequence[str], answers: Sequence[str], memory: Memory = "own",
              contexts: Sequence[str] | None = None) -> AnswerScore:
        """Log-probability (nats) of each answer given its question, teacher-forced, closing line feed included.

        ``contexts``: a text in front of each prompt, "" for none.
        """
        score = self.scores_under([memory], questions, answers, contexts)
        return AnswerScore(score.log_prob[0], score.tokens[0])

    def scores_under(self, memories: Sequence[Memory], questions: Sequence[str], answers: Sequence[str],
                     contexts: Sequence[str] | None = None, batch_size: int | None = None, on_batch=None) -> AnswerScore:
        """`score` under each of several memories, asked together: log_prob and tokens are (memories, B).

        With ``batch_size`` so many questions a pass, of near-equal length, and what is read of the memories is made once
        for all passes. ``on_batch(n)`` is called after each of n questions.
        """
        questions, answers = list_of_texts("questions", questions), list_of_texts("answers", answers)
        if len(questions) != len(answers) or not questions or not memories:
            raise ValueError(f"{len(questions)} questions, {len(answers)} answers and {len(memories)} memories: give as many "
                             "answers as questions, and at least one of each")
        _require_counts(batch_size=len(questions) if batch_size is None else batch_size)
        prompts = [self.backbone.token_ids(text) for text in prompt_texts(questions, contexts)]
        targets = [target_ids(self.backbone, answer) for answer in answers]
        lengths = [len(self._fitting(p + t)) for p, t in zip(prompts, targets, strict=True)]
        size = batch_size or len(lengths)
        order = list(range(len(lengths)))
        if batch_size:
            order.sort(key=lengths.__getitem__)
        log_probs, tokens = [], []
        for a in range(0, len(order), size):
            batch = order[a : a + size]
            ids, mask, question = self._rows([prompts[i] for i in batch], [targets[i] for i in batch])
            if a == 0 or self.adapter.needs_inputs:  # else all batches share what was read first
                injection = self._injection_for(memories, ids, question)
            rows = (x.repeat(len(memories), 1) for x in (ids, mask, question))  # (memories * B, T)
            score = score_targets(self.backbone, *rows, injection)
            log_probs.append(score.log_prob.view(len(memories), -1))
            tokens.append(score.tokens.view(len(memories), -1))
            if on_batch:
                on_batch(len(batch))
        place = torch.tensor(order, device=self.backbone.device).argsort()
        return AnswerScore(*(torch.cat(each, dim=1).index_select(1, place) for each in (log_probs, tokens)))  # (memories, B)

    def score_pairs(self, memories: Sequence[Memory], questions: Sequence[str], answers: Sequence[str],
                    contexts: Sequence[str] | None = None) -> AnswerScore:
        """`score` of answer i to question i under memory i, in one pass, to train on several banks [D]."""
        questions, answers = list_of_texts("questions", questions), list_of_texts("answers", answers)
        if not len(memories) == len(questions) == len(answers) or not questions:
            raise ValueError(f"{len(memories)} memories, {len(questions)} questions and {len(answers)} answers: give "
                             "as many of each, and at least one")
        if "off" in [memory for memory in memories if isinstance(memory, str)] and len(memories) > 1:
            raise ValueError("memory 'off' reads nothing and cannot be asked together with others: ask it alone")
        prompts = [self.backbone.token_ids(text) for text in prompt_texts(questions, contexts)]
        targets = [target_ids(self.backbone, answer) for answer in answers]
        for p, t in zip(prompts, targets, strict=True):
            self._fitting(p + t)
        ids, mask, question = self._rows(prompts, targets)
        inputs: list[Inputs | None] = [None] * len(memories)
        if self.adapter.needs_inputs and memories[0] != "off":
            whole = self._frozen_inputs(ids, question)
            inputs = [Inputs(*one) for one in zip(whole.hidden.split(1), whole.valid.split(1), strict=True)]
        injection = self._injections(memories, inputs)
        return score_targets(self.backbone, ids, mask, question, injection)

    def token_log_probs(self, question: str, answer: str, memory: Memory = "own") -> tuple[list[str], Tensor]:
        """The answer token by token: their texts, and the log-probability (nats) of each, (T,), whose sum is `score`'s.

        The last is the closing line feed.
        """
        tokens, log_probs = self.token_log_probs_under([memory], question, answer)
        return tokens, log_probs[0]

    @torch.no_grad()
    def token_log_probs_under(self, memories: Sequence[Memory], question: str,
                              answer: str) -> tuple[list[str], Tensor]:
        """`token_log_probs` under each of several memories in one pass: the tokens' texts, and (memories, T)."""
        prompts, targets = self._one_row(question, answer)
        _, log_probs = target_log_probs(self.backbone, *self._rows_under(memories, prompts, targets))
        return [self.backbone.tokenizer.decode([i]) for i in targets[0]], log_probs.view(len(memories), -1)

    @torch.no_grad()
    def attention_of_answer(self, question: str, answer: str, memory: Memory = "own") -> Tensor | None:
        """What is read of each entry where each of the answer's T tokens is foretold, (L, h, T, M), on the CPU.

        As `attention_to_memory`, at the token before each of those that `token_log_probs` scores; M.4 asks with the
        question alone, so its entries are the prompt's tokens. None where nothing is read.
        """
        prompts, targets = self._one_row(question, answer)
        ids, _, _, injection = self._rows_under([memory], prompts, targets)
        seen: list[Tensor] = []
        for part in [injection] if isinstance(injection, seam.Branch) else injection or []:
            part.seen = seen
        with seam.inject(self.backbone.model, injection):
            self.backbone.model.base_model(ids, use_cache=False)
        if not seen:
            return None
        asked = len(prompts[0])
        attention = torch.cat(seen).cpu()[:, :, asked - 1 : -1]  # (L, h, T, M): B is 1
        return attention[..., :asked] if self.adapter.needs_inputs else attention

    def _one_row(self, question: str, answer: str) -> tuple[list[list[int]], list[list[int]]]:
        """The ids of one prompt and its answer, each as a list of one row."""
        (question,), (answer,) = list_of_texts("the question", [question]), list_of_texts("the answer", [answer])
        prompt, target = self.backbone.token_ids(prompt_text(question)), target_ids(self.backbone, answer)
        self._fitting(prompt + target)
        return [prompt], [target]

    def _rows_under(self, memories: Sequence[Memory], prompts: list[list[int]],
                    targets: list[list[int]]) -> tuple[Tensor, Tensor, Tensor, seam.Injection]:
        """Right-padded ids, mask, question marks, all (memories * B, T), and what the blocks read."""
        ids, mask, question = self._rows(prompts, targets)
        injection = self._injection_for(memories, ids, question)
        return *(x.repeat(len(memories), 1) for x in (ids, mask, question)), injection

    def _rows(self, prompts: list[list[int]], targets: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Right-padded ids, mask and question marks, all (B, T)."""
        ids, mask = self.backbone.pad([p + t for p, t in zip(prompts, targets, strict=True)], side="right")
        column = torch.arange(ids.shape[1], device=ids.device)[None]
        return ids, mask, column < torch.tensor([[len(p)] for p in prompts], device=ids.device)

    def answer(self, questions: Sequence[str], max_new_tokens: int = 24, memory: Memory = "own", batch_size: int = 32,
               on_batch=None, contexts: Sequence[str] | None = None) -> list[str]:
        """Greedy answers, first line only, in the questions' order; batches of near-equal length share one bank.

        ``on_batch(n)`` is called after each batch of n questions (for progress bars). ``contexts``: a text in front of
        each prompt, "" for none.
        """
        return self.answers_under([memory], questions, max_new_tokens, batch_size, on_batch, contexts)[0]

    @torch.no_grad()
    def answers_under(self, memories: Sequence[Memory], questions: Sequence[str], max_new_tokens: int = 24,
                      batch_size: int = 32, on_batch=None, contexts: Sequence[str] | None = None,
                      drafts: Sequence[str] | None = None) -> list[list[str]]:
        """`answer` under each of several memories, a list each: asked together, they share the passes of the model.

        ``drafts``: what each question is guessed to be answered, "" for no guess. The answers do not depend on them;
        right ones make them faster (`decoding`).
        """
        questions = list_of_texts("questions", questions)
        if not memories or len(questions if drafts is None else drafts) != len(questions):
            raise ValueError("give at least one memory, and a draft a question, '' where there is none")
        _require_counts(max_new_tokens=max_new_tokens, batch_size=batch_size)
        rows = [self._fitting(self.backbone.token_ids(text), max_new_tokens) for text in prompt_texts(questions, contexts)]
        guessed = [target_ids(self.backbone, draft) if draft else [] for draft in drafts or [""] * len(rows)]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]) + len(guessed[i]))
        answers = [[""] * len(rows) for _ in memories]
        injection = None
        with slow_bar("answer", len(rows), "question", show=on_batch is None) as bar:
            for batch in (order[a : a + batch_size] for a in range(0, len(order), batch_size)):
                ids, mask = self.backbone.pad([rows[i] for i in batch], side="left")
                if injection is None or self.adapter.needs_inputs:  # else all batches share what was read first
                    injection = self._injection_for(memories, ids, question=mask)
                ids, mask = (x.repeat(len(memories), 1) for x in (ids, mask))  # (memories * B, T)
                lines = iter(greedy_lines(self.backbone, ids, mask, injection, max_new_tokens,
                                          drafts=[guessed[i] for i in batch] * len(memories)))
                for under in answers:
                    for i in batch:
                        under[i] = next(lines)
                (on_batch or bar.update)(len(batch))
        return answers

    # ---- files: their formats stand in `persistence` ----
    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``adapter.safetensors`` (θ_mem and the fixed maps, no backbone weight) and ``config.json``."""
        persistence.save_adapter(self, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path, backbone: Backbone | None = None,
                        revision: str | None = None) -> "MemoryModel":
        """The saved model, its state at P_0; ``backbone`` None loads the one it was trained on by its name.

        ``folder`` may be a repository of the model hub, "user/name", and ``revision`` its branch, tag or commit.
        """
        folder = persistence.adapter_folder(folder, revision)
        config, tensors = persistence.read_adapter(folder)
        backbone = load_backbone(config.backbone) if backbone is None else required(backbone)
        if backbone.fingerprint != config.backbone_fingerprint:
            seed = ", seed=the one it was made with" if config.backbone in TINY_NAMES else ""
            raise ValueError(f"{folder} was trained on {config.backbone} (fingerprint "
                             f"{config.backbone_fingerprint[:12]}), not on this {backbone.name} "
                             f"({backbone.fingerprint[:12]}): load it with its own backbone, from_pretrained(folder, "
                             f"load_backbone({config.backbone!r}{seed}))")
        model = cls(backbone, **asdict(config.settings))
        persistence.load_weights(model, folder, config, tensors)
        return model

    def push_to_hub(self, repo_id: str, card: str | None = None, **options) -> str:
        """Upload what `save_pretrained` writes and a model card; returns the commit's address.

        ``card`` is its Markdown, as `cards.run_card` makes it of a finished run; None: one that says that nothing was
        measured. Options as in `persistence.push_folder`: private, token, commit_message, timeout.
        """
        from .cards import model_card, unmeasured

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            Path(folder, "README.md").write_text(card or model_card(unmeasured(self)), encoding="utf-8")
            return persistence.push_folder(folder, repo_id, **options)

    def save_state(self, file: str | Path, turns: int | None = None, log: Iterable[persistence.LogEntry] = (),
                   keep_text: bool = False) -> None:
        """Write the state to one safetensors file, bit for bit, with what it belongs to in the metadata.

        ``turns`` and ``log`` say what was written, where somebody kept count (`session.Session` does); texts of the log
        are left out unless ``keep_text``.
        """
        persistence.save_state(self._state, persistence.identity(self), file, turns, log, keep_text)

    def load_state(self, file: str | Path) -> State:
        """Read a state written by `save_state` of the same method, capacity, seed and backbone; adapters that were
        trained differently read each other's states, since nothing that is trained takes part in writing."""
        saved = persistence.read_state(file)
        persistence.require_same_memory(self, saved, file)
        self.state = saved.state
        return self._state


def required_model(model: MemoryModel) -> MemoryModel:
    """``model`` where it is one, else a ValueError."""
    if isinstance(model, MemoryModel):
        return model
    raise ValueError(f"a {type(model).__name__} is no model with a memory: give MemoryModel(backbone, method), or what "
                     "MemoryModel.from_pretrained returns")


def _require_counts(**numbers: int) -> None:
    for name, number in numbers.items():
        whole_number(name, number, 1)
