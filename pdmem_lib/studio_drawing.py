"""What stands in the Memory Studio's controls: the studio's moment and reading, and what is chosen, as lists and figures.

Text from data is escaped wherever it becomes HTML.
"""

from html import escape
from pathlib import Path

import ipywidgets as w
import numpy as np

from . import figures
from ._maps import token_text
from ._plot import signed
from .causal_figures import told_agreement
from .studio_controls import ALL, ANY, Controls
from .studio_model import Choice, Studio
from .studio_parts import plain_token, sentence

BARS = " ▁▂▃▄▅▆▇█"
ENTRIES = 4  # that are offered as those read most
UNWRITTEN, UNREAD = "no turn: only its start is there", "nothing is read: is the adapter trained?"


class Drawn(Controls):
    """The controls, filled: ``turn``, ``token``, ``block``, ``head`` and ``entry`` are what is chosen, None where all are."""

    def __init__(self, studio: Studio, folder: str | Path):
        self.token: int | None = None
        self.entry: int | None = None
        self.block: int | None = None
        self.head: int | None = None
        self.turn: int | None = None
        self._setting = False
        super().__init__(studio, folder)

    def _set(self, *settings: tuple[w.Widget, dict]) -> None:
        """Change controls without their handlers taking it for the user's."""
        before, self._setting = self._setting, True
        try:
            for control, values in settings:
                for name, value in values.items():
                    setattr(control, name, value)
        finally:
            self._setting = before

    def _reading_gone(self) -> None:
        self.token = self.entry = self.block = self.head = None
        self.removed.value = ""

    # ---- what was found ----
    def _show_removal(self, found) -> None:
        total = float(found.effect.sum())
        by_token = " ".join(f"{token_text(token, 12)}&nbsp;{signed(-value, 2)}" for token, value in zip(
            self.studio.reading.tokens, found.effect.tolist(), strict=True))
        changed = "The answer changes." if found.before != found.after else "The answer stays."
        self.removed.value = (
            f"<b>Without {escape(found.what)}</b>: {changed}<br>{escape(repr(found.before))} → "
            f"<b>{escape(repr(found.after))}</b><br>Δ log p of {escape(repr(self.studio.reading.answer))}: "
            f"<b>{signed(-total, 2)}</b> nats<br><span class='told'>{by_token}</span>")
        self.tell(f"Without {found.what} the answer's log-probability changes by {signed(-total, 2)} nats.")
        self._draw_cause()

    def _show_comparison(self, found: tuple[Choice, Choice] | None) -> None:
        if found is None:
            return
        rows = {name: [] for name in ("", "Adapter", "Own memory answers", "Right answer", "Gain over none (nats)",
                                      "Gain over another's (nats)", "Turn that moved it most", "Does attention tell?")}
        for choice, pane in zip(found, self.panes, strict=True):
            with self.studio.looking_at(choice) as side:
                reading, effects = side.reading, self.studio.effects()
                known = self.studio.known(reading.question)
                most = int(np.nanargmax(effects))
                agreed = self.studio.agreement()
                told = [f"<b>{escape(side.name)}</b>", escape(self.studio.adapter_told),
                        f"<b>{escape(reading.answers['own'])}</b>", escape(known.answer if known else "not known"),
                        signed(float(reading.gains("off").sum()), 2), signed(float(reading.gains("other").sum()), 2),
                        f"{most}: {escape(self.studio.texts[most][:60])} ({signed(effects[most], 2)} nats)",
                        told_agreement(agreed)]
                for row, text in zip(rows.values(), told, strict=True):
                    row.append(text)
                pane.show(self.studio.cause_figure())
        cells = {name: "".join(f"<td>{text}</td>" for text in texts) for name, texts in rows.items()}
        table = "".join(f"<tr><th>{name}</th>{texts}</tr>" for name, texts in cells.items())
        self.compared.value = f"<table>{table}</table>"
        self.side_by_side.children = [w.VBox([pane], layout=w.Layout(flex="1 1 0", min_width="0")) for pane in self.panes]
        names = " and ".join(self.studio.sides[choice].name for choice in found)
        self.tell(f"{names}, on the same conversation and question.")
        self._draw_cause()

    # ---- drawing ----
    def _draw_all(self) -> None:
        self._draw_conversation()
        self._draw_reading()
        self._draw_memory()
        self._draw_cause()

    def _draw_conversation(self) -> None:
        studio = self.studio
        changes = np.asarray(studio.recording.changes)
        heights = np.ceil(8 * changes / changes.max()).astype(int) if len(changes) and changes.max() > 0 else changes
        options = [(f"{BARS[int(height)] if i < studio.moment else '·'} {i} {text}", i)
                   for i, (height, text) in enumerate(zip(heights, studio.texts))]  # while a talk is read, changes are ahead of texts
        chosen = self.turn if self.turn is not None and self.turn < len(options) else None
        self._set((self.moment, dict(max=max(1, len(studio.texts)), value=studio.moment)),
                  (self.turns, dict(options=options, value=chosen)))
        self._draw_turn()

    def _draw_turn(self) -> None:
        studio, turn = self.studio, self.turn
        if turn is None and studio.moment:
            turn = studio.moment - 1
        if turn is None or turn >= len(studio.texts):
            self.turn_told.value = f"After {studio.moment} of {len(studio.texts)} turns."
            return
        left = studio.recording.kept(studio.moment)[turn] if turn < studio.moment else None
        now = "not written yet" if left is None else f"{left:.0%} of it is left"
        self.turn_told.value = (f"<b>Turn {turn}</b> changed the memory by {studio.recording.changes[turn]:.3g}; {now}."
                                f"<br>{escape(studio.texts[turn][:120])}")

    def _draw_memory(self) -> None:
        try:
            figure = self.studio.figure(self.views.value, self.token, self.entry, self.block, self.head)
        except ValueError as error:
            self.memory_told.value = f"<span class='told'>{escape(sentence(error))}</span>"
            self.pane.layout.visibility = "hidden"
            return
        self.pane.layout.visibility = "visible"
        self._mark(figure)
        self.pane.show(figure)
        self.memory_told.value = f"<span class='told'>{self._caption()}</span>"

    def _mark(self, figure) -> None:
        """Frame the chosen entry and turn in a map of entries and turns."""
        view, n = self.views.value, self.studio.moment
        if view not in ("Entries", "Who wrote what"):
            return
        first = 1 if view == "Entries" else 0
        M = len(self.studio.recording.norms[0])
        frame = dict(type="rect", line=dict(color="#D55E00", width=2))
        if self.entry is not None and self.entry < M and not self.studio.model.adapter.needs_inputs:
            figure.add_shape(x0=-0.5, x1=n - 0.5 + first, y0=self.entry - 0.5, y1=self.entry + 0.5, **frame)
        if self.turn is not None and self.turn < n:
            figure.add_shape(x0=self.turn - 0.5 + first, x1=self.turn + 0.5 + first, y0=-0.5, y1=M - 0.5, **frame)

    def _caption(self) -> str:
        studio = self.studio
        texts = {
            "Entries": "Norm of each row after each turn; hover for the turn.",
            "Who wrote what": "Share of each turn in each row; hover for the turn. White: only its start is there.",
            "Decay": f"What each turn changed when written, and what later turns left of it; γ = "
                                f"{studio.model.settings.gamma:g}.",
            "Collisions": "How often each slot was written, and how often again by the next turns.",
            "Matrix": "Components and singular values: few strong ones answer every question alike.",
            "Attention": "Attention by block and head; choose one to follow it.",
            "Answer": "Log-probability of each token under own, no and another's memory.",
        }
        framed = self.entry is not None and self.views.value == "Who wrote what"
        return escape(texts[self.views.value] + (f" Entry {self.entry} is framed." if framed else ""))

    def _draw_reading(self) -> None:
        reading = self.studio.reading
        if reading is None:
            self.answers.value = ("<span class='told'>Ask, and the answer stands here under own, no and another's "
                                  "memory.</span>")
            self._set((self.tokens, dict(options=[ANY], value=ALL)))
        else:
            known, names = self.studio.known(reading.question), {"own": "own", "off": "none", "other": "another's"}
            rows = "".join(
                f"<tr><th>{name}</th><td><b>{escape(reading.answers[memory]) or '<i>nothing</i>'}</b></td>"
                f"<td class='n'>{signed(float(reading.log_probs[memory].sum()), 2)}</td></tr>"
                for memory, name in names.items())
            told = f" (right: {escape(known.answer)})" if known else ""
            self.answers.value = (f"<table><tr><th>Memory</th><th>answers{told}</th>"
                                  f"<th class='n'>log p of {escape(repr(reading.answer))}</th></tr>{rows}</table>")
            gains = reading.gains("off").tolist()
            self._set((self.tokens, dict(options=[ANY, *(
                (f"{plain_token(token)} {signed(gain, 1)}", i) for i, (token, gain) in enumerate(zip(
                    reading.tokens, gains, strict=True)))], value=one(self.token))))
        self._draw_chain()

    def _draw_chain(self) -> None:
        """Token, block and head, entries, turns, as they are chosen."""
        reading = self.studio.reading
        if reading is None or reading.attention is None:
            self._set((self.behind, dict(options=[], value=None)), *(
                (control, dict(options=[ANY], value=ALL)) for control in (self.entries, self.blocks, self.heads)))
            return
        L, h = reading.attention.shape[:2]
        scores = reading.entry_scores(self.token, self.block, self.head).numpy()
        most = [int(i) for i in np.argsort(-scores, kind="stable")[:ENTRIES] if scores[i] > 0]
        if self.entry is not None and self.entry not in most and self.entry < len(scores):
            most = [self.entry, *most[: ENTRIES - 1]]
        chosen = self.entry if self.entry in most else None
        total = scores.sum() or 1
        parts = [(f"{i}: {scores[i] / total:.0%}", i) for i in most]
        shares = reading.shares.numpy()
        behind = shares[chosen] if chosen is not None else scores @ shares / total
        turns = [int(t) for t in np.argsort(-behind, kind="stable")[:12] if behind[t] > 0]
        named = [(f"{behind[t]:.0%} turn {t} {self.studio.texts[t]}", t) for t in turns] or [
            (UNWRITTEN if scores.any() else UNREAD, None)]
        self._set(
            (self.blocks, dict(options=[ANY, *((str(i), i) for i in range(L))], value=one(self.block))),
            (self.heads, dict(options=[ANY, *((str(i), i) for i in range(h))], value=one(self.head))),
            (self.entries, dict(options=[ANY, *parts], value=one(chosen))),
            (self.behind, dict(options=named, value=self.turn if self.turn in turns else None)))

    def _draw_cause(self) -> None:
        studio = self.studio
        if studio.reading is None or not studio.reading.moment:
            self._set((self.ranking, dict(options=[], value=None)))
            self.agreed.value = ("<span class='told'>Ask first. Then every turn is taken out of memory once, by exact "
                                 "replay.</span>")
            self.removed.value = ""
            return
        effects = studio.effects()
        order = [t for t in np.argsort(-np.nan_to_num(effects, nan=-np.inf), kind="stable") if not np.isnan(effects[t])]
        self._set((self.ranking, dict(options=[(f"{signed(effects[t], 2)} nats · turn {t} {studio.texts[t]}", int(t))
                                               for t in order], value=None)))
        self.cause.show(studio.cause_figure())
        self.agreed.value = f"<span class='told'>{escape(studio.told_agreement())}</span>"

    # ---- without a kernel ----
    def _repr_mimebundle_(self, **kwargs):
        """The page, and its figure as a picture for where no kernel runs."""
        shown = super()._repr_mimebundle_(**kwargs)
        bundle = dict(shown[0] if isinstance(shown, tuple) else shown)
        bundle |= figures.picture(self.studio.cause_figure() if self.studio.reading else self.pane.figure)
        bundle |= {"text/plain": f"Memory Studio: {self.studio.subtitle}"}
        return (bundle, *shown[1:]) if isinstance(shown, tuple) else bundle


def one(chosen: int | None) -> int:
    """The list's value for what is chosen."""
    return ALL if chosen is None else chosen
