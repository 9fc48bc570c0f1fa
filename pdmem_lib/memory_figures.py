"""Figures with which one looks into a memory: what its entries hold, and who wrote it.

The rules of `figures`, which offers these functions too, but for plain arrays: axes carry the letters of the library
(``M`` entries, ``N`` turns); blocks, entries and turns count from 0, as in `provenance`; a tensor will do for an array.
What an array's shape or numbers cannot mean is a ValueError. A turn's text and an entry's turns appear on hovering. A
heat map keeps every value it is given: one of 640 entries and 400 turns makes a file of over 1 MB. What a question
reads of a memory is drawn by `reading_figures`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from numpy.typing import ArrayLike
from plotly.subplots import make_subplots

from . import banks
from ._maps import (BLUE, ORANGE, PALE, SEQUENTIAL, SPARSE, array_of, block_means, colour_bar, framed, heat_map,
                    log_ticks, moved_inside, name_margin, named_axis, names_of, numbered, round_steps, round_tick,
                    shares_of, token_text)
from ._plot import (FONT, INK, WIDTH, dot_style, fill_of, legend_entry, literal, look_of, plot_size, require,
                    side_by_side, text_width)
from .methods import REGISTRY

CELLS = 128  # that a matrix is shown with, at most, along each side


# --- what the entries hold --------------------------------------------------------------------------------------------

def slot_map(history: ArrayLike, subtitle: str, labels: Sequence[str] | None = None, value: str = "norm of the entry",
             log: bool = False) -> go.Figure:
    """One number an entry after each turn, ``history`` (1+N, M): its row 0 is the start, row 1+t what turn t left.

    ``labels`` are the N turns' texts, ``value`` names the number, ``log`` colours its logarithm (zeros stay white).
    """
    history = array_of(history, "history", "1+N M")
    if log and (history.min() < 0 or not history.any()):
        raise ValueError("a logarithmic colour needs values of at least 0, one of them above: draw with log=False")
    turns = len(history) - 1
    names = ["the start", *names_of("after turn", turns, labels)]
    entries = [f"entry {i}" for i in range(history.shape[1])]
    z, bar, shown = history.T, colour_bar(literal(value)), "%{z:.4g}"
    more: dict[str, Any] = {}
    if log:
        z = np.log10(np.where(z > 0, z, np.nan))
        low, high = np.log10([history[history > 0].min(), history.max()])
        ticks = log_ticks(low, high)
        bar |= dict(tickvals=np.log10(ticks), ticktext=[round_tick(tick) for tick in ticks])
        more, shown = dict(customdata=history.T.astype("float32")), "%{customdata:.4g}"
    figure = go.Figure(heat_map(z, names, entries, f"{literal(value)} {shown}", colorscale=SEQUENTIAL, colorbar=bar,
                                zmin=low - 0.1 * (high - low) if log else min(0.0, history.min()),
                                zmax=high + 1e-9 if log else history.max() or 1, **more))
    steps = round_steps(turns, 10)
    columns = {0: "start"} | {1 + turn: f"{turn}" for turn in steps if turn or len(steps) == turns}
    figure.update_xaxes(title="turn (what stands there after it)", **named_axis(names, columns))
    figure.update_yaxes(title="entry", autorange="reversed", **named_axis(entries, numbered(len(entries), 14)))
    return framed(figure, "What each entry holds, turn by turn", subtitle, foot=85)


def hebbian_matrix(M: ArrayLike, subtitle: str) -> go.Figure:
    """The matrix of M.4, (dh, dh), by the size of its components, and its singular values with the effective rank.

    A wide matrix is shown in 128 x 128 cells, each the mean of the absolute values in it.
    """
    M = array_of(M, "M", "dh dh")
    if M.shape[0] != M.shape[1]:
        raise ValueError(f"M is a square matrix, (dh, dh), got {M.shape}")
    dh, cells = len(M), block_means(abs(M), CELLS)
    values, rank = np.linalg.svd(M, compute_uv=False), effective_rank(M)
    figure = make_subplots(rows=1, cols=2, column_widths=[0.46, 0.54], horizontal_spacing=0.19,
                           subplot_titles=["<b>size of the components</b>", "<b>singular values</b>"])
    middles = (np.arange(len(cells)) + 0.5) * dh / len(cells) - 0.5
    figure.add_trace(go.Heatmap(
        z=cells.astype("float32"), x=middles, y=middles, colorscale=SEQUENTIAL, zmin=0, zmax=cells.max() or 1,
        hovertemplate="near row %{y:.0f}, column %{x:.0f}: %{z:.3g}<extra></extra>",
        colorbar=colour_bar("mean<br>|value|") | dict(x=0.385, xanchor="left", thickness=22)), 1, 1)
    figure.update_xaxes(title="column (what a reader is given)", showgrid=False, row=1, col=1)
    figure.update_yaxes(title="row (what a query meets)", autorange="reversed", showgrid=False, row=1, col=1)
    place, end = dict(row=1, col=2), values[0] or 1
    seen = np.where(values > 1e-7 * end, values, np.nan)  # below that it is rounding
    figure.add_scatter(x=np.arange(1, dh + 1), y=seen, mode="lines", line=dict(color=BLUE, width=4), showlegend=False,
                       hovertemplate="singular value %{x}: %{y:.3g}<extra></extra>", **place)
    if rank:
        figure.add_vline(x=rank, line=dict(color=INK, width=2, dash="dash"), **place)
        right = rank < dh / 2
        figure.add_annotation(x=rank, y=1, yref="y2 domain", text=f"effective rank {rank:.1f}", showarrow=False,
                              xanchor="left" if right else "right", xshift=8 if right else -8, yanchor="top", **place)
    figure.update_xaxes(title="number, largest first", range=[0, dh + 1], **place)
    low, high = np.log10([np.nanmin(seen), end]) + [-0.1, 0.3] if rank else (-1, 1)
    ticks = log_ticks(low, high)
    figure.update_yaxes(title="singular value (logarithmic)", type="log", range=[low, high], tickvals=ticks,
                        ticktext=[round_tick(tick) for tick in ticks], **place)
    return framed(figure, f"What the matrix holds: effective rank {rank:.1f} of {dh}", subtitle, height=680, foot=85)


def effective_rank(matrix: ArrayLike) -> float:
    """`banks.effective_rank` of an array: 1 when all rows point along one line, the number of rows when they are
    orthogonal and of one length."""
    return banks.effective_rank(torch.from_numpy(array_of(matrix, "matrix", "M d")))


def bank_spread(history: Mapping[str, ArrayLike], subtitle: str,
                what: str = "effective rank of the rows (1: all alike)") -> go.Figure:
    """How alike the rows of a bank are after each turn, a line a method: {name: (1+N,)}, the start first.

    On a logarithmic axis, so above 0; NaN leaves a gap. ``what`` names the number and its unit: the `effective_rank`,
    or the rows' relative spread. Lines that coincide, as of methods with one write rule, show by their marks and names.
    """
    if not history:
        raise ValueError("history is empty: pass at least one method's values")
    lines = {name: array_of(values, f"history of {name}", "1+N", gaps=True) for name, values in history.items()}
    if not all((values[~np.isnan(values)] > 0).all() and np.isfinite(values).any() for values in lines.values()):
        raise ValueError("history stands on a logarithmic axis: values must be above 0, and not all of them missing")
    order = [name for name in REGISTRY if name in lines] + [name for name in lines if name not in REGISTRY]
    known = np.concatenate([np.log10(values[~np.isnan(values)]) for values in lines.values()])
    pad = max(0.08 * np.ptp(known), 0.05)
    low, high, longest = known.min() - pad, known.max() + pad, max(map(len, lines.values()))
    figure, ends = go.Figure(), {}
    for number, name in enumerate(order):
        look, values = look_of(name), lines[name]
        dash = "solid" if name in REGISTRY else ("dash", "dot", "dashdot", "longdash")[number % 4]
        marked = np.arange(len(values))[int((0.5 + number) / len(order) * len(values) / 6)::-(-len(values) // 6)]
        figure.add_scatter(x=np.arange(len(values)), y=values, mode="lines", name=look.label, showlegend=False,
                           line=dict(color=look.colour, width=3, dash=dash),
                           hovertemplate=f"{look.label}, after %{{x}} turns: %{{y:.3g}}<extra></extra>")
        figure.add_scatter(x=marked, y=values[marked], mode="markers", marker=dot_style(look, fill_of(1), 12),
                           name=look.label, showlegend=False, hoverinfo="skip")
        last = np.flatnonzero(~np.isnan(values))[-1]
        ends[name] = (look, last, values[last])
    figure.update_xaxes(title="turns written", range=[-0.01 * longest, longest - 1 + 0.01 * longest])
    ticks = log_ticks(low, high)
    figure.update_yaxes(title=f"{literal(what)}, logarithmic", type="log", range=[low, high], tickvals=ticks,
                        ticktext=[round_tick(tick) for tick in ticks])
    texts = {name: f"{look.label}: {value:.3g}" for name, (look, _, value) in ends.items()}
    framed(figure, "Do the rows of a bank stay apart?", subtitle, foot=85,
           right=int(60 + max(map(text_width, texts.values()))))
    height = plot_size(figure)[1]
    down = sorted(ends, key=lambda name: -ends[name][2])
    exact = np.array([(high - np.log10(ends[name][2])) / (high - low) * height for name in down])
    for name, at, to in zip(down, exact, moved_inside(side_by_side(exact, 24), height), strict=True):
        look, last, value = ends[name]
        figure.add_annotation(x=last, y=np.log10(value), text=texts[name], ax=40, ay=to - at, xanchor="left",
                              bgcolor="white", arrowhead=0, arrowwidth=2, arrowcolor=look.colour, standoff=4,
                              font_size=FONT)
    return figure


def nearest_tokens_of(entries: ArrayLike, unembedding: ArrayLike, k: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """The ``k`` tokens whose rows of ``unembedding`` (V, d) make the smallest angle with each entry (M, d), best first.

    Tokens' ids (M, k) and cosines (M, k). Entries must lie in the model's own space: a bank holds ``H W`` with a random
    W of the write side, near no token until W is undone. Of V random directions the best has a cosine of about
    ``sqrt(2 ln V / d)``: what stays below that says nothing.
    """
    entries, table = array_of(entries, "entries", "M d"), array_of(unembedding, "unembedding", "V d", kind="float32")
    if entries.shape[1] != table.shape[1]:
        raise ValueError(f"entries have width {entries.shape[1]}, the unembedding {table.shape[1]}: take both from "
                         "one model")
    if not 1 <= k <= len(table):
        raise ValueError(f"k must lie between 1 and the {len(table)} tokens, got {k}")
    lengths = np.linalg.norm(table, axis=1)  # (V,)
    indices, cosines = np.empty((len(entries), k), int), np.empty((len(entries), k))
    for i, entry in enumerate(entries):  # one row of V at a time
        cosine = table @ entry.astype("float32") / np.maximum(lengths * np.linalg.norm(entry), 1e-30)  # (V,)
        best = np.argpartition(-cosine, k - 1)[:k]
        indices[i] = best[np.argsort(-cosine[best], kind="stable")]
        cosines[i] = cosine[indices[i]]
    return indices, cosines


def nearest_tokens(table: pd.DataFrame, subtitle: str, score: str = "cosine",
                   chance: float | None = None) -> go.Figure:
    """The tokens nearest to each entry as text, coloured by score. Columns entry, rank (at most 12), token, score.

    ``chance`` is the score of a random entry's nearest token: colour begins there.
    """
    require(table, "entry", "rank", "token", "score")
    if table.duplicated(["entry", "rank"]).any():
        raise ValueError("this figure takes one token an entry and rank: pass one list of tokens an entry")
    entries, ranks = (list(dict.fromkeys(table[column])) for column in ("entry", "rank"))
    ranks = sorted(ranks)
    if len(ranks) > 12:
        raise ValueError(f"{len(ranks)} tokens an entry are too many to be read: pass at most 12 ranks")
    cells = table.set_index(["entry", "rank"]).unstack().reindex(index=entries)
    scores, tokens = (cells[column][ranks].to_numpy() for column in ("score", "token"))
    scores, names = scores.astype(float), [literal(f"entry {entry}") for entry in entries]
    left = int(min(400, 40 + max(text_width(name) for name in names)))
    letters = int((WIDTH - left - 150) / len(ranks) / (0.56 * FONT)) - 1
    texts = [["" if np.isnan(s) else token_text(t, letters) for t, s in zip(*row, strict=True)]
             for row in zip(tokens, scores, strict=True)]
    low = min(0.0, np.nanmin(scores)) if chance is None else chance
    scale = ["#FFFFFF", "#6BAED6"]  # light enough for dark text throughout
    figure = go.Figure(go.Heatmap(
        z=scores, x=list(range(len(ranks))), y=list(range(len(entries))), xgap=3, ygap=3, text=texts,
        texttemplate="%{text}", textfont=dict(color=INK, size=FONT), colorscale=scale, zmin=low,
        zmax=max(np.nanmax(scores), low + 1e-9), hovertemplate="%{y}, token %{text}: %{z:.3f}<extra></extra>",
        colorbar=colour_bar(literal(score)) | dict(nticks=5)))
    beyond = "" if chance is None else f"; white: no nearer than a random entry's nearest, {chance:.2f}"
    figure.update_xaxes(title=f"rank of the token by {literal(score)}{beyond}", showgrid=False,
                        tickvals=list(range(len(ranks))), ticktext=[literal(rank) for rank in ranks])
    figure.update_yaxes(tickvals=list(range(len(entries))), ticktext=names, autorange="reversed", showgrid=False,
                        zeroline=False)
    return framed(figure, "The tokens nearest to each entry", subtitle, 230 + 36 * max(5, len(entries)), left, foot=85)


# --- who wrote it -----------------------------------------------------------------------------------------------------

def provenance_map(shares: ArrayLike, subtitle: str, labels: Sequence[str] | None = None, top: int | None = None,
                   sort: bool = False) -> go.Figure:
    """Which turns are in which entry: shares (M, N) of `provenance.shares`, without the column of P_0.

    ``labels`` are the N turns' texts. ``top`` keeps the turns with the largest shares over all entries, in order of
    time, as rows with their texts. ``sort`` orders the entries by their latest turn: the last that holds at least a
    tenth of what the entry's largest holds.
    """
    shares = shares_of(shares)
    M, N = shares.shape
    if top is not None and top < 1:
        raise ValueError(f"top is a number of turns, at least 1, got {top}")
    large = (shares > 0) & (shares >= 0.1 * shares.max(axis=1, keepdims=True))
    latest = np.where(large, np.arange(N), -1).max(axis=1)  # (M,)
    order = np.argsort(latest, kind="stable") if sort else np.arange(M)
    turns, entries = names_of("turn", N, labels), [f"entry {i}" for i in order]
    title, axis = "Which turns are in which entry", "entry, by its latest turn" if sort else "entry"
    look = dict(colorscale=SPARSE, zmin=0, zmax=100 * shares.max() or 1,
                colorbar=colour_bar("share of<br>the entry<br>(%)"))
    if top is None:
        figure = go.Figure(heat_map(100 * shares[order], turns, entries, "%{z:.2g} %", **look))
        figure.update_xaxes(title="turn", **named_axis(turns, numbered(N, 10)))
        ticks = {i: f"{order[i]}" for i in round_steps(M, 14)}
        figure.update_yaxes(title=axis, autorange="reversed", **named_axis(entries, ticks))
        return framed(figure, title, subtitle, foot=85)
    kept = np.sort(np.argsort(-shares.sum(axis=0), kind="stable")[:top])
    figure = go.Figure(heat_map(100 * shares[np.ix_(order, kept)].T, entries, [turns[t] for t in kept], "%{z:.2g} %",
                                **look, ygap=1))
    part = shares[:, kept].sum() / (shares.sum() or 1)
    figure.update_xaxes(title=f"{axis} (the {len(kept)} strongest of {N} turns hold {part:.0%} of what turns left)",
                        **named_axis(entries, {i: f"{order[i]}" for i in round_steps(M, 14)}))
    rows = names_of("turn", N, labels, letters=46)
    figure.update_yaxes(autorange="reversed", **named_axis(turns, {i: rows[t] for i, t in enumerate(kept)}, len(kept)))
    return framed(figure, title, subtitle, 230 + 26 * max(6, len(kept)), name_margin(rows[t] for t in kept), foot=85)


def slot_usage(written: ArrayLike, subtitle: str) -> go.Figure:
    """Which slots the turns of M.6 wrote, ``written`` (N, S) of bool: how often each slot, and how often again.

    Left the turns that wrote each slot, most first. Right the part of each turn's slots that the turn before it, or any
    earlier turn, had written too, beside what choosing blindly would give.
    """
    written = array_of(written, "written", "N S")
    if not np.isin(written, (0, 1)).all() or not written.any(axis=1).all():
        raise ValueError("written says of every turn which slots it wrote: only 0 and 1 or bool, at least one slot a "
                         "turn; leave out turns that write nothing")
    N, S = written.shape
    order = np.argsort(-written.sum(axis=0), kind="stable")
    counts, width = written.sum(axis=0)[order], written.sum(axis=1)  # (S,), (N,)
    earlier = np.concatenate([np.zeros((1, S)), written.cumsum(axis=0)[:-1] > 0])  # (N, S)
    before = np.concatenate([np.zeros((1, S)), written[:-1]])
    blind = 1 - np.concatenate([[1], np.cumprod(1 - width / S)[:-1]])  # of a turn's slots, written earlier by chance
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.09, subplot_titles=[
        f"<b>{(counts > 0).sum()} of {S} slots were ever written</b>",
        "<b>a turn's slots that were written before</b>"])
    figure.add_bar(x=np.arange(S), y=counts, width=1, marker=dict(color=PALE, line=dict(color="white", width=S < 200)),
                   customdata=order, showlegend=False, hovertemplate="slot %{customdata}: %{y} turns<extra></extra>",
                   row=1, col=1)
    even = counts.sum() / S
    figure.add_scatter(x=[-0.5, S - 0.5], y=[even, even], mode="lines", showlegend=False, row=1, col=1,
                       line=dict(color=INK, width=2, dash="dash"),
                       hovertemplate="all slots alike: %{y:.3g} turns<extra></extra>")
    figure.update_xaxes(title="slot, most written first", range=[-0.5, S - 0.5], row=1, col=1)
    figure.update_yaxes(title="turns that wrote it", rangemode="tozero", row=1, col=1)
    window, place = max(1, min(20, N // 10)), dict(row=1, col=2)
    for name, seen, chance, colour, symbol in (
            ("by any earlier turn", earlier, blind, BLUE, "circle"),
            ("by the turn just before", before, np.concatenate([[0], width[:-1] / S]), ORANGE, "diamond")):
        part = 100 * (written * seen).sum(axis=1) / width  # (N,)
        smooth = pd.Series(part).rolling(window, min_periods=1).mean()
        figure.add_scatter(x=np.arange(N), y=part, mode="markers", showlegend=False, opacity=0.3, cliponaxis=False,
                           marker=dict(color=colour, size=6, symbol=symbol),
                           hovertemplate=f"turn %{{x}}, {name}: %{{y:.0f}} %<extra></extra>", **place)
        figure.add_scatter(x=np.arange(N), y=smooth, mode="lines", name=f"{name} (mean of {window} turns)",
                           line=dict(color=colour, width=4, dash="solid" if symbol == "circle" else "dot"),
                           hoverinfo="skip", **place)
        figure.add_scatter(x=np.arange(N), y=100 * chance, mode="lines", hoverinfo="skip", showlegend=False,
                           line=dict(color=INK, width=2, dash="dash"), **place)
    legend_entry(figure, "slots chosen blindly", mode="lines", line=dict(color=INK, width=2, dash="dash"))
    figure.update_xaxes(title="turn", range=[-0.5 - 0.01 * N, 1.01 * N - 0.5], **place)
    figure.update_yaxes(title="slots of the turn (%)", range=[-3, 103], **place)
    return framed(figure, "Where the turns are written", subtitle, height=640)
