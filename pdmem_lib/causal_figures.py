"""Figures of the Memory Studio: what turns changed and left, where a token looked, what the answer rested on.

The rules of `figures`, which offers these functions too, and of `memory_figures`: plain arrays in, text escaped.
"""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike
from plotly.subplots import make_subplots

from ._maps import (BLUE, ORANGE, PALE, SEQUENTIAL, array_of, colour_bar, framed, heat_map, named_axis, names_of,
                    numbered)
from ._plot import FONT, INK, literal, signed
from .causal import Agreement, ranked

RANKS = 3  # turns whose rank is written at their bar


def turn_changes(changes: ArrayLike, kept: ArrayLike, subtitle: str, labels: Sequence[str] | None = None,
                 gamma: float | None = None) -> go.Figure:
    """How much each turn changed the memory, (N,), and how much of what it wrote is left now, ``kept`` (N,) of 0 to 1.

    ``gamma`` draws what a decay of so much a turn would leave, beside it.
    """
    changes, kept = array_of(changes, "changes", "N"), array_of(kept, "kept", "N")
    if changes.shape != kept.shape or (changes < 0).any() or (kept < 0).any() or (kept > 1 + 1e-3).any():
        raise ValueError("changes are norms, kept are parts of 0 to 1, one each a turn; got "
                         f"{len(changes)} and {len(kept)}")
    N, names = len(changes), names_of("turn", len(changes), labels)
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.12)
    figure.add_bar(x=names, y=changes, marker_color=PALE, showlegend=False, row=1, col=1,
                   hovertemplate="%{x}<br>changed the memory by %{y:.3g}<extra></extra>")
    figure.add_bar(x=names, y=100 * kept, marker_color=BLUE, name="what is left of the turn", row=2, col=1,
                   hovertemplate="%{x}<br>%{y:.3g} % of it is left<extra></extra>")
    if gamma is not None:
        figure.add_scatter(x=names, y=100 * gamma ** np.arange(N - 1, -1, -1), mode="lines", row=2, col=1,
                           line=dict(color=INK, width=2, dash="dash"), hoverinfo="skip",
                           name=f"{gamma:g} to the number of later turns")
    ticks = named_axis(names, numbered(N, 14))
    figure.update_xaxes(**ticks)
    figure.update_xaxes(title="turn", row=2, col=1)
    figure.update_yaxes(title="change (norm)", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title="left now (%)", range=[0, 105], row=2, col=1)
    return framed(figure, "What each turn changed, and what is left of it", subtitle)


def attention_by_head(values: ArrayLike, subtitle: str, what: str = "attention to memory", block: int | None = None,
                      head: int | None = None) -> go.Figure:
    """How much one token reads in each block and head, (L, h), as parts of its attention; the chosen are framed."""
    z = 100 * array_of(values, "values", "L h")
    if (z < 0).any() or (z > 101).any():
        raise ValueError("attention lies between 0 and 1: pass what attention_of_answer gives, summed over entries")
    blocks, heads = ([f"{name} {i}" for i in range(count)] for name, count in zip(("block", "head"), z.shape))
    figure = go.Figure(heat_map(z, heads, blocks, "%{z:.3g} %", colorscale=SEQUENTIAL, zmin=0, zmax=z.max() or 1, xgap=1,
                                ygap=1, colorbar=colour_bar("attention<br>(%)")))
    if block is not None or head is not None:
        L, h = z.shape
        x = (-0.5, h - 0.5) if head is None else (head - 0.5, head + 0.5)
        y = (-0.5, L - 0.5) if block is None else (block - 0.5, block + 0.5)
        figure.add_shape(type="rect", x0=x[0], x1=x[1], y0=y[0], y1=y[1], line=dict(color=ORANGE, width=3))
    figure.update_xaxes(title="head", **named_axis(heads, numbered(z.shape[1], 16)))
    figure.update_yaxes(title="block (0: the first)", autorange="reversed", **named_axis(blocks, numbered(len(z), 16)))
    return framed(figure, f"Where the token looks: {literal(what)}", subtitle, 240 + max(320, min(560, 24 * len(z))),
                  foot=85)


def effect_bars(effects: ArrayLike, scores: ArrayLike, labels: Sequence[str], subtitle: str,
                agreement: Agreement | None = None, unit: str = "turn") -> go.Figure:
    """What the answer loses without each turn, (N,) in nats, beside how much it looks at it, ``scores`` (N,).

    The attention is drawn as parts of its sum, on an axis of its own whose zero is the effects' zero. NaN, for what was
    not measured, leaves a gap. ``agreement`` of the two is told below the title.
    """
    effects, scores = array_of(effects, "effects", "N", gaps=True), array_of(scores, "scores", "N")
    if effects.shape != scores.shape or (scores < 0).any():
        raise ValueError(f"one effect and one score of at least 0 a turn: got {len(effects)} and {len(scores)}")
    N, names = len(effects), names_of(unit, len(effects), labels)
    parts = 100 * scores / (scores.sum() or 1)
    known = np.where(np.isnan(effects), 0, effects)
    figure = make_subplots(specs=[[dict(secondary_y=True)]])
    for sign, colour, hatch, name in ((1, BLUE, "", "for the answer"), (-1, ORANGE, "/", "against it")):
        figure.add_bar(x=names, y=np.where(sign * known > 0, effects, np.nan), name=name,
                       marker=dict(color=colour, pattern=dict(shape=hatch, fgcolor=colour, bgcolor="white",
                                                              fillmode="replace"), line=dict(color=colour, width=1)),
                       hovertemplate="%{x}<br>without it the answer loses %{y:.3g} nats<extra></extra>")
    figure.add_scatter(x=names, y=parts, mode="markers", name="attention to it", secondary_y=True,
                       marker=dict(symbol="diamond-open", size=11, color=INK, line=dict(color=INK, width=2)),
                       hovertemplate="%{x}<br>%{y:.3g} % of the attention to turns<extra></extra>")
    for rank, place in enumerate(ranked(np.where(np.isnan(effects), -np.inf, effects))[:RANKS], 1):
        if known[place] > 0:
            figure.add_annotation(x=place, y=known[place], text=f"{rank}", showarrow=False, yanchor="bottom",
                                  font=dict(size=FONT, color=BLUE))
    low, high = min(known.min(), 0), max(known.max(), 0)
    reach = high - low or 1
    high, low = high + 0.12 * reach, low - 0.06 * reach * (low < 0)
    top = parts.max() * 1.15 or 1
    figure.update_yaxes(title="effect (nats)", range=[low, high], secondary_y=False, zeroline=True,
                        zerolinecolor=INK)
    figure.update_yaxes(title="attention (%)", range=[top * low / high, top], showgrid=False, secondary_y=True,
                        rangemode="nonnegative", nticks=4)
    figure.update_xaxes(title=unit, **named_axis(names, numbered(N, 14)))
    figure.update_layout(barmode="overlay")
    told = "" if agreement is None else f" · {told_agreement(agreement)}"
    return framed(figure, "What the answer rests on, and where it looks", f"{subtitle}{told}", right=90)


def told_agreement(found: Agreement) -> str:
    """Agreement in a line, for a title or a page."""
    if np.isnan(found.spearman):
        return f"attention and effect: no agreement can be told, n = {found.n}"
    return (f"attention and effect agree to Spearman's ρ = {signed(found.spearman, 2)} "
            f"(95 % {signed(found.low, 2)} to {signed(found.high, 2)}), Kendall's τ = {signed(found.kendall, 2)}, "
            f"n = {found.n}")

