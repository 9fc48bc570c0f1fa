"""Figures with controls, for JupyterLab: move a slider or choose from a list, and the figure is drawn again.

They are optional by design: no cell needs what a control says, and each carries a picture of what it shows first, so
that a page without JavaScript or a kernel shows that. The figures are those of `figures`, with the same arrays;
anything else is `Explorer` with a function of one's own. Needs the notebook extras (ipywidgets, anywidget).
"""

from collections.abc import Callable, Sequence

import ipywidgets
import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike

from . import estimates, figures
from .pane import Pane

EVERY = "mean over all"


class Explorer(ipywidgets.VBox):
    """``draw(**values)`` -> figure, beside one control a value: any ipywidget that has one.

    ``figure`` is the figure shown now, ``controls`` the widgets by name, for code that moves them. What ``draw`` refuses
    with a ValueError is told above the figure, which stays.
    """

    def __init__(self, draw: Callable[..., go.Figure], **controls: ipywidgets.ValueWidget):
        self.draw, self.controls = draw, controls
        self.message = ipywidgets.Label()
        for name, control in controls.items():
            control.description = control.description or name
            control.style.description_width = "initial"
            control.observe(self._redraw, names="value")
        self.figure = draw(**self.values)
        self.pane = Pane(first=True)
        self.pane.show(self.figure)
        super().__init__([ipywidgets.HBox(list(controls.values())), self.message, self.pane])

    @property
    def values(self) -> dict:
        """What the controls say now, by name."""
        return {name: control.value for name, control in self.controls.items()}

    def _redraw(self, change=None) -> None:
        try:
            self.figure = self.draw(**self.values)
        except ValueError as error:
            self.message.value = str(error)
            return
        self.message.value = ""
        self.pane.show(self.figure)

    def _repr_mimebundle_(self, **kwargs):
        """The widget, and its first picture for where no kernel runs."""
        shown = super()._repr_mimebundle_(**kwargs)
        bundle = dict(shown[0] if isinstance(shown, tuple) else shown)
        bundle |= figures.picture(self.figure) | {"text/plain": f"a figure with controls: {', '.join(self.controls)}"}
        return (bundle, *shown[1:]) if isinstance(shown, tuple) else bundle


def explore_attention(attention: ArrayLike, tokens: Sequence[str], subtitle: str, shares: ArrayLike | None = None,
                      labels: Sequence[str] | None = None) -> Explorer:
    """`figures.attention_to_entries` for a block and head of one's choice. Arguments as there: attention (L, h, T, M),
    shares (M, N) of the turns in the entries, the turns' texts."""
    L, h = np.shape(attention)[:2]

    def draw(block: int | None, head: int | None) -> go.Figure:
        return figures.attention_to_entries(attention, tokens, subtitle, block, head, shares, labels)

    return Explorer(draw, block=_one_of(L), head=_one_of(h))


def explore_provenance(shares: Sequence[ArrayLike], subtitle: str, labels: Sequence[str] | None = None) -> Explorer:
    """`figures.provenance_map` after a turn of one's choice: which turns are in which entry, as the memory fills.

    ``shares`` (M, 1+n) after 0, 1, ... N turns, the column of P_0 first: `provenance.shares` of each table of
    `provenance.write_history`. ``labels`` are the N turns' texts.
    """
    N = np.shape(shares[-1])[1] - 1
    if N < 1 or [np.shape(table)[1] for table in shares] != list(range(1, N + 2)):
        raise ValueError("shares are tables (M, 1+n) for n = 0, 1, ... N, each one turn longer: take all of one "
                         "write_history")

    def draw(turn: int) -> go.Figure:
        table = np.asarray(shares[turn + 1])
        filled = np.concatenate([table[:, 1:], np.zeros((len(table), N - 1 - turn))], axis=1)  # (M, N)
        return figures.provenance_map(filled, f"{subtitle} · after turn {turn} of {N - 1}", labels)

    return Explorer(draw, turn=_slider(N - 1))


def explore_matrix(history: Sequence[ArrayLike], subtitle: str) -> Explorer:
    """`figures.hebbian_matrix` after a turn of one's choice; ``history`` holds (dh, dh) after 0, 1, ... N turns."""
    def draw(turns: int) -> go.Figure:
        return figures.hebbian_matrix(history[turns], f"{subtitle} · after {turns} turns")

    return Explorer(draw, turns=_slider(len(history) - 1))


def explore_clipping(subtitle: str = "simulated studies, no model", spread: float = 0.15, effect: float = 0.0,
                     questions: int = 80, seed: int = 0, repeats: int = 200) -> Explorer:
    """`figures.clipping` of `estimates.simulate_clipping`: set the spread of the F1 differences and the true effect
    (fractions, drawn in points), the number of questions and the seed; see what the published score makes of them."""
    def draw(spread: float, effect: float, questions: int, seed: int) -> go.Figure:
        found = estimates.simulate_clipping(spread, effect, questions, seed, repeats)
        told = f"spread {100 * spread:g} points, true effect {100 * effect:g}, {questions} questions, seed {seed}"
        return figures.clipping(found.differences, found.unclipped, found.published, f"{subtitle} · {told}", effect)

    def slider(kind: type, value: float, low: float, high: float, step: float) -> ipywidgets.ValueWidget:
        return kind(value=value, min=low, max=high, step=step, continuous_update=False, layout=dict(width="24%"))

    return Explorer(draw, spread=slider(ipywidgets.FloatSlider, spread, 0.0, 0.5, 0.01),
                    effect=slider(ipywidgets.FloatSlider, effect, -0.1, 0.1, 0.01),
                    questions=slider(ipywidgets.IntSlider, questions, 5, 640, 5),
                    seed=slider(ipywidgets.IntSlider, seed, 0, 20, 1))


def _one_of(count: int) -> ipywidgets.Dropdown:
    return ipywidgets.Dropdown(options=[(EVERY, None), *((str(i), i) for i in range(count))])


def _slider(last: int) -> ipywidgets.IntSlider:
    """From 0 to ``last``, where it stands first; drawn again when let go."""
    return ipywidgets.IntSlider(last, 0, last, continuous_update=False, layout=dict(width="60%"))
