"""Figures with which one looks into a memory: what its entries hold, who wrote it, what a question reads of it.

The rules of `figures`, which offers these functions too, but for plain arrays: axes carry the letters of the library
(``L`` blocks, ``h`` heads, ``T`` tokens, ``M`` entries, ``N`` turns); blocks, heads, entries and turns count from 0, as
in `provenance`; a tensor will do for an array. What an array's shape or numbers cannot mean is a ValueError. A turn's
text and an entry's turns appear on hovering. A heat map keeps every value it is given: one of 640 entries and 400 turns
makes a file of over 1 MB.
"""

from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import ArrayLike
from plotly.subplots import make_subplots

from ._plot import (FONT, INK, WIDTH, Fill, Look, Row, dot_style, fill_of, finish, legend_entry, literal, look_of,
                    mark_rows, plot_size, require, row_margin, side_by_side, signed, text_width)
from .evidence_figures import MEMORIES, NEUTRAL
from .methods import REGISTRY

SEQUENTIAL = ["#FFFFFF", "#C6DBEF", "#6BAED6", "#2171B5", "#08306B"]  # one hue, darker is more
# for shares: a few large, most of them small, which must show beside none
SPARSE = [[0, "#FFFFFF"], [0.01, "#DCE9F5"], [0.08, "#9CC8E3"], [0.3, "#4A98C9"], [0.65, "#2171B5"], [1, "#08306B"]]
DIVERGING = ["#0072B2", "#9CC9E3", "#FFFFFF", "#F2B48A", "#D55E00"]  # of Okabe and Ito, white at zero
FRAME = dict(showgrid=False, showline=True, mirror=True, linecolor="#BBBBBB")  # a map may be white at its edges
BLUE, ORANGE, PALE = "#0072B2", "#D55E00", "#9DB8CC"
READ_MOST = "read most (mean of the tokens), and the turn that holds most of each:"
CELLS = 128  # that a matrix is shown with, at most, along each side
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
QUANTITIES = {  # quantity of `attention_by_block`: (title, colour bar, unit in the hover text)
    "mass": ("How much each block reads of the memory", "attention<br>to memory<br>(%)", " %"),
    "entries": ("Over how many entries each block spreads its attention", "effective<br>number of<br>entries",
                " entries"),
}


# --- what the entries hold --------------------------------------------------------------------------------------------

def slot_map(history: ArrayLike, subtitle: str, labels: Sequence[str] | None = None, value: str = "norm of the entry",
             log: bool = False) -> go.Figure:
    """One number an entry after each turn, ``history`` (1+N, M): its row 0 is the start, row 1+t what turn t left.

    ``labels`` are the N turns' texts, ``value`` names the number, ``log`` colours its logarithm (zeros stay white).
    """
    history = _array(history, "history", "1+N M")
    if log and (history.min() < 0 or not history.any()):
        raise ValueError("a logarithmic colour needs values of at least 0, one of them above: draw with log=False")
    turns = len(history) - 1
    names = ["the start", *_names("after turn", turns, labels)]
    entries = [f"entry {i}" for i in range(history.shape[1])]
    z, bar, shown = history.T, _bar(literal(value)), "%{z:.4g}"
    more: dict[str, Any] = {}
    if log:
        z = np.log10(np.where(z > 0, z, np.nan))
        low, high = np.log10([history[history > 0].min(), history.max()])
        ticks = _log_ticks(low, high)
        bar |= dict(tickvals=np.log10(ticks), ticktext=[_round(tick) for tick in ticks])
        more, shown = dict(customdata=history.T.astype("float32")), "%{customdata:.4g}"
    figure = go.Figure(_heat(z, names, entries, f"{literal(value)} {shown}", colorscale=SEQUENTIAL, colorbar=bar,
                             zmin=low - 0.1 * (high - low) if log else min(0.0, history.min()),
                             zmax=high + 1e-9 if log else history.max() or 1, **more))
    steps = _steps(turns, 10)
    columns = {0: "start"} | {1 + turn: f"{turn}" for turn in steps if turn or len(steps) == turns}
    figure.update_xaxes(title="turn (what stands there after it)", **_axis(names, columns))
    figure.update_yaxes(title="entry", autorange="reversed", **_axis(entries, _numbers(len(entries), 14)))
    return _framed(figure, "What each entry holds, turn by turn", subtitle, foot=85)


def hebbian_matrix(M: ArrayLike, subtitle: str) -> go.Figure:
    """The matrix of M.4, (dh, dh), by the size of its components, and its singular values with the effective rank.

    A wide matrix is shown in 128 x 128 cells, each the mean of the absolute values in it.
    """
    M = _array(M, "M", "dh dh")
    if M.shape[0] != M.shape[1]:
        raise ValueError(f"M is a square matrix, (dh, dh), got {M.shape}")
    dh, cells = len(M), _block_means(abs(M), CELLS)
    values, rank = np.linalg.svd(M, compute_uv=False), effective_rank(M)
    figure = make_subplots(rows=1, cols=2, column_widths=[0.46, 0.54], horizontal_spacing=0.19,
                           subplot_titles=["<b>size of the components</b>", "<b>singular values</b>"])
    middles = (np.arange(len(cells)) + 0.5) * dh / len(cells) - 0.5
    figure.add_trace(go.Heatmap(
        z=cells.astype("float32"), x=middles, y=middles, colorscale=SEQUENTIAL, zmin=0, zmax=cells.max() or 1,
        hovertemplate="near row %{y:.0f}, column %{x:.0f}: %{z:.3g}<extra></extra>",
        colorbar=_bar("mean<br>|value|") | dict(x=0.385, xanchor="left", thickness=22)), 1, 1)
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
    ticks = _log_ticks(low, high)
    figure.update_yaxes(title="singular value (logarithmic)", type="log", range=[low, high], tickvals=ticks,
                        ticktext=[_round(tick) for tick in ticks], **place)
    return _framed(figure, f"What the matrix holds: effective rank {rank:.1f} of {dh}", subtitle, height=680, foot=85)


def effective_rank(matrix: ArrayLike) -> float:
    """exp of the entropy of the singular values as shares of their sum (Roy and Vetterli, 2007); 0 for only zeros.

    1 when all rows point along one line, the number of rows when they are orthogonal and of one length.
    """
    values = np.linalg.svd(_array(matrix, "matrix", "M d"), compute_uv=False)
    parts = values[values > 0] / (values.sum() or 1)
    return float(np.exp(-(parts * np.log(parts)).sum())) if len(parts) else 0.0


def bank_spread(history: Mapping[str, ArrayLike], subtitle: str,
                what: str = "effective rank of the rows (1: all alike)") -> go.Figure:
    """How alike the rows of a bank are after each turn, a line a method: {name: (1+N,)}, the start first.

    On a logarithmic axis, so above 0; NaN leaves a gap. ``what`` names the number and its unit: the `effective_rank`,
    or the rows' relative spread. Lines that coincide, as of methods with one write rule, show by their marks and names.
    """
    if not history:
        raise ValueError("history is empty: pass at least one method's values")
    lines = {name: _array(values, f"history of {name}", "1+N", gaps=True) for name, values in history.items()}
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
    ticks = _log_ticks(low, high)
    figure.update_yaxes(title=f"{literal(what)}, logarithmic", type="log", range=[low, high], tickvals=ticks,
                        ticktext=[_round(tick) for tick in ticks])
    texts = {name: f"{look.label}: {value:.3g}" for name, (look, _, value) in ends.items()}
    _framed(figure, "Do the rows of a bank stay apart?", subtitle, foot=85,
            right=int(60 + max(map(text_width, texts.values()))))
    height = plot_size(figure)[1]
    down = sorted(ends, key=lambda name: -ends[name][2])
    exact = np.array([(high - np.log10(ends[name][2])) / (high - low) * height for name in down])
    for name, at, to in zip(down, exact, _inside(side_by_side(exact, 24), height), strict=True):
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
    entries, table = _array(entries, "entries", "M d"), _array(unembedding, "unembedding", "V d", kind="float32")
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
    texts = [["" if np.isnan(s) else _token(t, letters) for t, s in zip(*row, strict=True)]
             for row in zip(tokens, scores, strict=True)]
    low = min(0.0, np.nanmin(scores)) if chance is None else chance
    scale = ["#FFFFFF", "#6BAED6"]  # light enough for dark text throughout
    figure = go.Figure(go.Heatmap(
        z=scores, x=list(range(len(ranks))), y=list(range(len(entries))), xgap=3, ygap=3, text=texts,
        texttemplate="%{text}", textfont=dict(color=INK, size=FONT), colorscale=scale, zmin=low,
        zmax=max(np.nanmax(scores), low + 1e-9), hovertemplate="%{y}, token %{text}: %{z:.3f}<extra></extra>",
        colorbar=_bar(literal(score)) | dict(nticks=5)))
    beyond = "" if chance is None else f"; white: no nearer than a random entry's nearest, {chance:.2f}"
    figure.update_xaxes(title=f"rank of the token by {literal(score)}{beyond}", showgrid=False,
                        tickvals=list(range(len(ranks))), ticktext=[literal(rank) for rank in ranks])
    figure.update_yaxes(tickvals=list(range(len(entries))), ticktext=names, autorange="reversed", showgrid=False,
                        zeroline=False)
    return _framed(figure, "The tokens nearest to each entry", subtitle, 230 + 36 * max(5, len(entries)), left, foot=85)


# --- who wrote it -----------------------------------------------------------------------------------------------------

def provenance_map(shares: ArrayLike, subtitle: str, labels: Sequence[str] | None = None, top: int | None = None,
                   sort: bool = False) -> go.Figure:
    """Which turns are in which entry: shares (M, N) of `provenance.shares`, without the column of P_0.

    ``labels`` are the N turns' texts. ``top`` keeps the turns with the largest shares over all entries, in order of
    time, as rows with their texts. ``sort`` orders the entries by their latest turn: the last that holds at least a
    tenth of what the entry's largest holds.
    """
    shares = _shares(shares)
    M, N = shares.shape
    if top is not None and top < 1:
        raise ValueError(f"top is a number of turns, at least 1, got {top}")
    large = (shares > 0) & (shares >= 0.1 * shares.max(axis=1, keepdims=True))
    latest = np.where(large, np.arange(N), -1).max(axis=1)  # (M,)
    order = np.argsort(latest, kind="stable") if sort else np.arange(M)
    turns, entries = _names("turn", N, labels), [f"entry {i}" for i in order]
    title, axis = "Which turns are in which entry", "entry, by its latest turn" if sort else "entry"
    look = dict(colorscale=SPARSE, zmin=0, zmax=100 * shares.max() or 1,
                colorbar=_bar("share of<br>the entry<br>(%)"))
    if top is None:
        figure = go.Figure(_heat(100 * shares[order], turns, entries, "%{z:.2g} %", **look))
        figure.update_xaxes(title="turn", **_axis(turns, _numbers(N, 10)))
        ticks = {i: f"{order[i]}" for i in _steps(M, 14)}
        figure.update_yaxes(title=axis, autorange="reversed", **_axis(entries, ticks))
        return _framed(figure, title, subtitle, foot=85)
    kept = np.sort(np.argsort(-shares.sum(axis=0), kind="stable")[:top])
    figure = go.Figure(_heat(100 * shares[np.ix_(order, kept)].T, entries, [turns[t] for t in kept], "%{z:.2g} %",
                             **look, ygap=1))
    part = shares[:, kept].sum() / (shares.sum() or 1)
    figure.update_xaxes(title=f"{axis} (the {len(kept)} strongest of {N} turns hold {part:.0%} of what turns left)",
                        **_axis(entries, {i: f"{order[i]}" for i in _steps(M, 14)}))
    rows = _names("turn", N, labels, letters=46)
    figure.update_yaxes(autorange="reversed", **_axis(turns, {i: rows[t] for i, t in enumerate(kept)}, len(kept)))
    return _framed(figure, title, subtitle, 230 + 26 * max(6, len(kept)), _margin(rows[t] for t in kept), foot=85)


def slot_usage(written: ArrayLike, subtitle: str) -> go.Figure:
    """Which slots the turns of M.6 wrote, ``written`` (N, S) of bool: how often each slot, and how often again.

    Left the turns that wrote each slot, most first. Right the part of each turn's slots that the turn before it, or any
    earlier turn, had written too, beside what choosing blindly would give.
    """
    written = _array(written, "written", "N S")
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
    return _framed(figure, "Where the turns are written", subtitle, height=640)


# --- what a question reads --------------------------------------------------------------------------------------------

def attention_by_block(attention: ArrayLike, tokens: Sequence[str], subtitle: str, quantity: str = "mass") -> go.Figure:
    """What each block and token (mean over heads), and each block and head (mean over tokens), reads of the memory.

    ``attention`` (L, h, T, M) of `MemoryModel.attention_to_memory`. ``quantity``: "mass" is the attention on all
    entries together, "entries" the effective number of entries it spreads over (exp of the entropy; NaN where nothing
    is read). The mass of M.2 and M.5 is 100 % everywhere: ValueError, as "entries" alone tells something.
    """
    attention = _attention(attention, tokens)
    L, h, T, _ = attention.shape
    if quantity not in QUANTITIES:
        raise ValueError(f"quantity is one of {', '.join(QUANTITIES)}, got {quantity!r}")
    title, bar, unit = QUANTITIES[quantity]
    mass = attention.sum(axis=-1)  # (L, h, T)
    if quantity == "mass":
        if (abs(mass - 1) < 1e-3).all():
            raise ValueError('every token spends all its attention on the memory, as the branches M.2 and M.5 always '
                             'do: ask for quantity="entries"')
        values = 100 * mass
    else:
        parts = attention / np.where(mass > 0, mass, np.nan)[..., None]
        values = np.exp(-(parts * np.log(np.where(parts > 0, parts, 1))).sum(axis=-1))  # (L, h, T)
    by_token, by_head = _mean(values, axis=1), _mean(values, axis=2)  # (L, T), (L, h)
    blocks, heads = ([f"{what} {i}" for i in range(count)] for what, count in (("block", L), ("head", h)))
    columns = [f"token {i}: {_token(token)}" for i, token in enumerate(tokens)]
    figure = make_subplots(rows=1, cols=2, shared_yaxes=True, column_widths=[0.74, 0.26], horizontal_spacing=0.03,
                           subplot_titles=["<b>tokens (mean over heads)</b>", "<b>heads (mean over tokens)</b>"])
    for column, (z, names) in enumerate(((by_token, columns), (by_head, heads)), 1):
        figure.add_trace(_heat(z, names, blocks, f"%{{z:.3g}}{unit}", coloraxis="coloraxis", xgap=1, ygap=1), 1, column)
    top = np.nanmax([*by_token.flat, *by_head.flat, 0])
    figure.update_layout(coloraxis=dict(colorscale=SEQUENTIAL, cmin=0, cmax=top or 1, colorbar=_bar(bar)))
    foot = _token_axis(figure, columns, tokens, 750, row=1, col=1)
    figure.update_xaxes(title="head", row=1, col=2, **_axis(heads, _numbers(h, 10)))
    figure.update_yaxes(autorange="reversed", **_axis(blocks, _numbers(L, 16)))
    figure.update_yaxes(title="block (0: the first)", col=1)
    return _framed(figure, title, subtitle, 120 + foot + max(320, min(560, 24 * L)), foot=foot)


def attention_to_entries(attention: ArrayLike, tokens: Sequence[str], subtitle: str, block: int | None = None,
                         head: int | None = None, shares: ArrayLike | None = None,
                         labels: Sequence[str] | None = None) -> go.Figure:
    """Which entries each token reads, in one block and head, or the mean over all where one is None.

    ``attention`` (L, h, T, M). With ``shares`` (M, N) of turns in entries an entry names on hovering the turns that
    hold most of it (``labels``: the N turns' texts), and the three entries read most are told below the map.
    """
    attention = _attention(attention, tokens)
    L, h, T, M = attention.shape
    for what, chosen, count in (("block", block, L), ("head", head, h)):
        if chosen is not None and not 0 <= chosen < count:
            raise ValueError(f"{what} {chosen} is not there: they go from 0 to {count - 1}")
    if labels is not None and shares is None:
        raise ValueError("labels are the texts of the turns in shares: pass shares too")
    picked = attention if block is None else attention[block : block + 1]
    picked = picked if head is None else picked[:, head : head + 1]
    z = 100 * picked.mean(axis=(0, 1))  # (T, M)
    where = {(True, True): "mean over blocks and heads", (False, True): f"block {block}, mean over its heads",
             (True, False): f"head {head}, mean over blocks", (False, False): f"block {block}, head {head}"}
    entries, notes = [f"entry {i}" for i in range(M)], []
    if shares is not None:
        shares = _shares(shares)
        if len(shares) != M:
            raise ValueError(f"shares are of {len(shares)} entries, attention of {M}: pass both of one memory")
        turns = _names("turn", shares.shape[1], labels)
        behind = [[f"{100 * row[t]:.0f} % from {turns[t]}" for t in np.argsort(-row, kind="stable")[:3] if row[t] > 0]
                  for row in shares]
        most = [i for i in np.argsort(-z.mean(axis=0), kind="stable")[:3] if z[:, i].any()]
        notes = [f"<b>entry {i}</b>, read {_significant(z[:, i].mean())} %: {(behind[i] or ['no turn'])[0]}"
                 for i in most]
        notes = [READ_MOST, *notes] if most else []
        entries = ["<br>".join([name, *held]) for name, held in zip(entries, behind, strict=True)]
    rows = [f"token {i}: {_token(token)}" for i, token in enumerate(tokens)]
    figure = go.Figure(_heat(z, entries, rows, "%{z:.3g} % of its attention", colorscale=SPARSE, zmin=0,
                             zmax=z.max() or 1, ygap=1, colorbar=_bar("attention<br>of the<br>token (%)")))
    figure.update_xaxes(title="entry", **_axis(entries, _numbers(M, 14)))
    every = _steps(T, 30)
    figure.update_yaxes(autorange="reversed", **_axis(rows, {i: _token(tokens[i], 24) for i in every}))
    foot = 85 + 24 * len(notes) + (20 if notes else 0)
    _framed(figure, f"Which entries each token reads: {where[block is None, head is None]}", subtitle,
            130 + foot + max(280, min(620, 22 * T)), _margin(_token(token, 24) for token in tokens), foot=foot)
    for line, note in enumerate(notes):
        figure.add_annotation(x=0, xref="paper", xanchor="left", y=0, yref="paper", yanchor="top", align="left",
                              yshift=-68 - 24 * line, text=note, showarrow=False, font_size=FONT)
    return figure


def turn_scores_bars(scores: ArrayLike, labels: Sequence[str], evidence: Sequence[int], subtitle: str, top: int = 20,
                     axis: str | None = None) -> go.Figure:
    """Which turns a question looks at: the ``top`` of N ``scores`` and the turns of ``evidence``, marked, wherever.

    ``scores`` of `provenance.turn_scores`, drawn as parts of their sum in %; of `relative_scores` where ``axis`` names
    what they are, drawn as they stand. ``labels`` are the N turns' texts, ``evidence`` indices of turns, perhaps none.
    """
    scores = _array(scores, "scores", "N")
    N, evidence = len(scores), sorted({int(turn) for turn in evidence})
    if (scores < 0).any() or not scores.any():
        raise ValueError("scores are at least 0 and not all 0: a question that reads nothing looks at no turn")
    if evidence and not 0 <= evidence[0] <= evidence[-1] < N:
        raise ValueError(f"evidence are turns from 0 to {N - 1}, got {', '.join(map(str, evidence))}")
    if top < 1:
        raise ValueError(f"top is a number of turns, at least 1, got {top}")
    values = scores / scores.sum() * 100 if axis is None else scores
    unit, even = (" %", 100 / N) if axis is None else ("", 1.0)
    order = np.argsort(-scores, kind="stable")
    rank = {turn: place for place, turn in enumerate(order, 1)}
    far = sorted((turn for turn in evidence if rank[turn] > top), key=rank.get)
    shown = [*order[:top], *far]
    y = [*range(min(top, N)), *(min(top, N) + 1 + i for i in range(len(far)))]  # a gap before what is far down
    marked = np.isin(shown, evidence)
    names, full = _names("turn", N, labels, letters=46), _names("turn", N, labels, letters=200)
    hover = ["<br>".join(wrap(full[turn], 70)) for turn in shown]
    figure = go.Figure(go.Bar(
        x=values[shown], y=y, orientation="h", width=0.74, customdata=hover, showlegend=False,
        hovertemplate=f"%{{customdata}}<br>%{{x:.3g}}{unit}<extra></extra>",
        marker=dict(color=np.where(marked, "#FBE3D5", PALE), line=dict(color=np.where(marked, ORANGE, PALE),
                                                                       width=np.where(marked, 4, 0)))))
    for turn, at, known in zip(shown, y, marked, strict=True):
        text = _significant(values[turn]) + unit
        figure.add_annotation(x=values[turn], y=at, xanchor="left", xshift=8, showarrow=False, bgcolor="white",
                              text=f"<b>{text}, evidence: rank {rank[turn]} of {N}</b>" if known else text)
    figure.add_vline(x=even, line=dict(color=INK, width=2, dash="dash"))
    legend_entry(figure, f"all turns alike ({_significant(even)}{unit})", mode="lines",
                 line=dict(color=INK, width=2, dash="dash"))
    figure.add_bar(x=[None], y=[None], name="evidence", marker=dict(color="#FBE3D5", line=dict(color=ORANGE, width=4)))
    figure.update_layout(barmode="overlay")
    ticks = [f"<b>{names[turn]}</b>" if known else names[turn] for turn, known in zip(shown, marked, strict=True)]
    figure.update_yaxes(tickvals=y, ticktext=ticks, range=[max(y) + 0.6, -0.6], showgrid=False, zeroline=False)
    left = _margin(names[turn] for turn in shown)
    inside = WIDTH - left - 40
    reach = max(values[turn] / (1 - (300 if known else 90) / inside)  # room for the texts behind the bars
                for turn, known in zip(shown, marked, strict=True))
    figure.update_xaxes(title=literal(axis or "part of the question's attention to turns (%)"), range=[0, reach])
    return _framed(figure, "Which turns the question looks at", subtitle, 260 + 27 * max(6, max(y) + 1), left, foot=125)


def token_gain(tokens: Sequence[str], logp_own: ArrayLike, logp_off: ArrayLike, logp_other: ArrayLike,
               subtitle: str) -> go.Figure:
    """Memory on, off and another's, answer token by answer token: log-probabilities (T,) in nats, gains as numbers."""
    given = {"own": logp_own, "off": logp_off, "other": logp_other}
    points = {memory: _array(values, f"logp_{memory}", "T") for memory, values in given.items()}
    if any(len(values) != len(tokens) for values in points.values()) or isinstance(tokens, str):
        raise ValueError(f"{len(tokens)} tokens, and log-probabilities of "
                         f"{', '.join(str(len(values)) for values in points.values())}: give one each a token")
    if any((values > 1e-6).any() for values in points.values()):
        raise ValueError("a log-probability is at most 0: pass log p, not p nor the loss")
    points = {memory: np.append(values, values.mean()) for memory, values in points.items()}
    labels = [*(_token(token, 24) for token in tokens), "<b>mean</b>"]
    rows = [Row(y, label, NEUTRAL, fill_of(1), None) for y, label in enumerate(labels)]
    figure, y = go.Figure(), np.arange(len(rows))
    for at in y:
        figure.add_scatter(x=[points["other"][at], points["own"][at]], y=[at, at], mode="lines", hoverinfo="skip",
                           line=dict(color=PALE, width=6), showlegend=False)
    markers = {"other": dict(symbol="circle-open", size=18, color=ORANGE, line=dict(color=ORANGE, width=3)),
               "off": dict(symbol="line-ns-open", size=18, color=INK, line=dict(color=INK, width=3)),
               "own": dict(symbol="circle", size=11, color=BLUE)}
    for memory, marker in markers.items():
        figure.add_scatter(x=points[memory], y=y, mode="markers", marker=marker, name=MEMORIES[memory][0],
                           customdata=labels, showlegend=False, cliponaxis=False,
                           hovertemplate=f"%{{customdata}}, {MEMORIES[memory][0]}: %{{x:.3f}} nats<extra></extra>")
    for memory in given:
        legend_entry(figure, MEMORIES[memory][0], marker=markers[memory])
    gains = {other: [signed(gain) for gain in points["own"] - points[other]] for other in ("off", "other")}
    mark_rows(figure, rows, {f"own − {other}<br>(nats)": texts for other, texts in gains.items()}, [16, 136])
    figure.add_hline(y=len(tokens) - 0.5, line=dict(color=INK, width=2))
    low = min(values.min() for values in points.values())
    figure.update_xaxes(title="log-probability of the answer's token (nats; further right is better)",
                        range=[1.05 * low if low < 0 else -1, max(-0.03 * low, 0.02)])
    return _framed(figure, "What the memory adds to each token of the answer", subtitle, 310 + 34 * len(rows),
                   row_margin(rows), right=260)


def answer_map(probabilities: ArrayLike, memories: Sequence[str], answers: Sequence[str], subtitle: str,
               right: Sequence[str | None] | None = None) -> go.Figure:
    """How likely each candidate answer is under each memory, (R, C): a row a memory, a column an answer.

    ``right`` names each row's right answer, None where there is none: its cell is framed.
    """
    z = _array(probabilities, "probabilities", "R C")
    if z.shape != (len(memories), len(answers)) or isinstance(memories, str) or isinstance(answers, str):
        raise ValueError(f"probabilities are of {z.shape[0]} memories and {z.shape[1]} answers, got {len(memories)} "
                         f"and {len(answers)} names: give one each")
    if (z < 0).any() or (z > 1 + 1e-6).any():
        raise ValueError("probabilities lie between 0 and 1: pass p, not its logarithm")
    right = [None] * len(memories) if right is None else list(right)
    if len(right) != len(memories) or set(right) - {None, *answers}:
        raise ValueError("right names one of the answers for each memory, or None: give as many as memories")
    rows, columns = [f"{_short(memory, 40)}" for memory in memories], [_short(answer, 16) for answer in answers]
    figure = go.Figure(go.Heatmap(z=z.astype("float32"), colorscale=SEQUENTIAL, zmin=0, zmax=1, xgap=2, ygap=2,
                                  colorbar=_bar("probability"), hovertemplate="%{customdata}: %{z:.3f}<extra></extra>",
                                  customdata=[[f"{row}, {column}" for column in columns] for row in rows]))
    for (y, x), value in np.ndenumerate(z):
        figure.add_annotation(x=x, y=y, text=f"{value:.2f}", showarrow=False,
                              font=dict(size=FONT, color="white" if value > 0.55 else INK))
    for y, answer in enumerate(right):
        if answer is not None:
            x = list(answers).index(answer)
            figure.add_shape(type="rect", x0=x - 0.47, x1=x + 0.47, y0=y - 0.45, y1=y + 0.45,
                             line=dict(color=ORANGE, width=4))
    if any(answer is not None for answer in right):
        figure.add_scatter(x=[None], y=[None], mode="markers", name="the right answer", marker=dict(
            symbol="square-open", size=18, color=ORANGE, line=dict(color=ORANGE, width=4)), showlegend=True)
    figure.update_xaxes(title="candidate answer", tickvals=list(range(len(columns))), ticktext=columns, **FRAME)
    figure.update_yaxes(autorange="reversed", tickvals=list(range(len(rows))), ticktext=rows, title=None, **FRAME)
    return _framed(figure, "How likely each answer is, by memory", subtitle, 290 + 38 * max(5, len(rows)),
                   _margin(rows), foot=125)


# --- how far it is open -----------------------------------------------------------------------------------------------

def gates(values: ArrayLike | Mapping[str, ArrayLike], subtitle: str, name: str = "tanh(gate)") -> go.Figure:
    """How far each block (and head) lets the memory in: (L, h), or (L,) for a beta a block, drawn as it stands.

    Or several moments, {"before": ..., "after": ...} or a step of training each: up to four side by side, more as a map
    of blocks against moments, (L, h) then by the mean over heads of its size. ``name`` says what the number is.
    """
    moments = values if isinstance(values, Mapping) else {"": values}
    if not moments:
        raise ValueError("values are empty: pass at least one moment's gates")
    axes = "L" if np.ndim(next(iter(moments.values()))) == 1 else "L h"
    arrays = {_short(label, 26): _array(gate, "gates", axes) for label, gate in moments.items()}
    if len({gate.shape for gate in arrays.values()}) > 1 or len(arrays) < len(moments):
        raise ValueError("moments must have gates of one shape and short names of their own: take all from one "
                         "model")
    name, first = literal(name), next(iter(arrays.values()))
    title, blocks = f"How far the blocks let the memory in: {name}", [f"block {i}" for i in range(len(first))]
    reach = max(abs(gate).max() for gate in arrays.values()) or 1
    if len(arrays) > 4:
        z = np.stack([gate if axes == "L" else abs(gate).mean(axis=1) for gate in arrays.values()], 1)  # (L, moments)
        kind = name if axes == "L" else f"|{name}|,<br>mean over<br>heads"
        sides = dict(colorscale=DIVERGING, zmin=-reach, zmax=reach) if z.min() < 0 else dict(
            colorscale=SEQUENTIAL, zmin=0, zmax=z.max() or 1)
        figure = go.Figure(_heat(z, list(arrays), blocks, "%{z:.3g}", colorbar=_bar(kind), **sides, xgap=1, ygap=1))
        labels = list(arrays)
        ticks = {i: labels[i] for i in _steps(len(labels), 12)}
        figure.update_xaxes(title="moment of training", **_axis(labels, ticks))
    elif axes == "L":
        figure = go.Figure()
        looks = [Look("", BLUE, "circle"), Look("", ORANGE, "square"), Look("", "#009E73", "diamond"),
                 Look("", "#CC79A7", "triangle-up")]
        for (label, gate), look, dash in zip(arrays.items(), looks, ("solid", "dash", "dot", "dashdot")):
            figure.add_scatter(x=np.arange(len(gate)), y=gate, mode="lines+markers", name=label, showlegend=bool(label),
                               line=dict(color=look.colour, width=3, dash=dash),
                               marker=dot_style(look, Fill("solid", "", ""), 11),
                               hovertemplate=f"{label} block %{{x}}: %{{y:.3g}}<extra></extra>")
        figure.add_hline(y=0, line=dict(color=INK, width=2))
        figure.update_xaxes(title="block (0: the first)", dtick=max(1, len(first) // 16),
                            range=[-0.5, len(first) - 0.5])
        figure.update_yaxes(title=f"{name} (0: closed)")
        return _framed(figure, title, subtitle, height=600)
    else:
        titles = [f"<b>{label}</b>{'<br>' if label else ''}mean |{name}| {abs(gate).mean():.3g}"
                  for label, gate in arrays.items()]
        figure = make_subplots(rows=1, cols=len(arrays), shared_yaxes=True, horizontal_spacing=0.03,
                               subplot_titles=titles)
        heads = [f"head {i}" for i in range(first.shape[1])]
        for column, gate in enumerate(arrays.values(), 1):
            figure.add_trace(_heat(gate, heads, blocks, "%{z:.3g}", coloraxis="coloraxis", xgap=1, ygap=1), 1, column)
        figure.update_layout(coloraxis=dict(colorscale=DIVERGING, cmin=-reach, cmax=reach, colorbar=_bar(name)))
        figure.update_xaxes(title="head", **_axis(heads, _numbers(len(heads), 32 // len(arrays))))
    figure.update_yaxes(autorange="reversed", **_axis(blocks, _numbers(len(blocks), 16)))
    figure.update_yaxes(title="block (0: the first)", col=None if len(arrays) > 4 else 1)
    return _framed(figure, title, subtitle, 240 + max(320, min(560, 24 * len(first))), foot=85)


# --- shared parts -----------------------------------------------------------------------------------------------------

def _array(values: Any, name: str, axes: str, gaps: bool = False, kind: str = "float64") -> np.ndarray:
    """Numbers of the named ``axes``, "L h T M", none of them empty; ``gaps`` allows NaN."""
    array = np.asarray(values.detach().float().cpu() if hasattr(values, "detach") else values)
    if array.ndim != len(axes.split()) or not array.size or array.dtype.kind not in "biuf":
        raise ValueError(f"{name} must be numbers with the axes ({', '.join(axes.split())}), none of them empty; got "
                         f"{array.dtype} of shape {array.shape}")
    if np.isinf(array).any() or not gaps and np.isnan(array).any():
        raise ValueError(f"{name} must be finite: it holds NaN or infinity")
    return array.astype(kind)


def _shares(shares: ArrayLike) -> np.ndarray:
    shares = _array(shares, "shares", "M N")
    if (shares < 0).any() or (shares.sum(axis=1) > 1.001).any():
        raise ValueError("shares (M, N) lie between 0 and 1 and sum to at most 1 in an entry: pass what "
                         "provenance.shares gives, without the column of P_0")
    return shares


def _attention(attention: ArrayLike, tokens: Sequence[str]) -> np.ndarray:
    attention = _array(attention, "attention", "L h T M")
    if (attention < 0).any() or (attention.sum(axis=-1) > 1.01).any():
        raise ValueError("attention is at least 0 and sums to at most 1 over the entries: pass what "
                         "attention_to_memory gives")
    if isinstance(tokens, str) or len(tokens) != attention.shape[2]:
        raise ValueError(f"attention is of {attention.shape[2]} tokens, got {len(tokens)}: pass a list with one text "
                         "a token")
    return attention


def _short(text: Any, letters: int) -> str:
    """Text from data in one line of so many letters, escaped."""
    line = " ".join(str(text).split())
    return literal(line if len(line) <= letters else line[: max(1, letters - 1)].rstrip() + "…")


def _token(text: Any, letters: int = 24) -> str:
    """A token as it is shown: a space, which tokenizers write as Ġ or ▁, is a dot, a line feed an arrow."""
    text = str(text).replace("\n", "↵").replace("Ċ", "↵")
    for space in " Ġ▁":
        text = text.replace(space, "·")
    return _short(text, letters)


def _names(what: str, count: int, labels: Sequence[str] | None, letters: int = 90) -> list[str]:
    """``count`` distinct names, "turn 3: its text", escaped and of about so many ``letters``."""
    if labels is None:
        return [f"{what} {i}" for i in range(count)]
    if isinstance(labels, str) or len(labels) != count:
        raise ValueError(f"labels are the texts of {count} turns, got {len(labels)}: pass a list with one text a turn")
    return [f"{head} {_short(label, letters - len(head))}"
            for head, label in ((f"{what} {i}:", label) for i, label in enumerate(labels))]


def _heat(z: np.ndarray, x: list[str], y: list[str], shown: str, **look: Any) -> go.Heatmap:
    """A map of named columns and rows, so that hovering tells their names, each kept once in the file."""
    return go.Heatmap(z=z.astype("float32"), x=x, y=y, hovertemplate=f"%{{x}}<br>%{{y}}<br>{shown}<extra></extra>",
                      **look)


def _axis(names: list[str], ticks: Mapping[int, str], count: int | None = None) -> dict:
    """The axis of such names, with its own text at some of them: a shade aside, else hovering would tell the tick's."""
    aside = 0.02 + (count or len(names)) / 5000
    return dict(type="category", tickvals=[place + aside for place in ticks], ticktext=list(ticks.values()),
                tickangle=0, **FRAME)


def _steps(count: int, most: int) -> list[int]:
    """0, 5, 10, ... below ``count``: at most so many, a round step apart."""
    step = next(size * 10**power for power in range(9) for size in (1, 2, 5) if count <= size * 10**power * most)
    return list(range(0, count, step))


def _numbers(count: int, most: int) -> dict[int, str]:
    return {i: f"{i}" for i in _steps(count, most)}


def _round(value: float) -> str:
    """A round number as a tick: 0.001 to 10000, powers of ten beyond."""
    power = int(np.floor(np.log10(value) + 1e-9))
    if -4 < power < 5:
        return f"{value:g}"
    digit, raised = f"{value / 10.0**power:.2g}", "10" + str(power).translate(SUPERSCRIPTS)
    return raised if digit == "1" else f"{digit}·{raised}"


def _log_ticks(low: float, high: float) -> list[float]:
    """Round values between two powers of ten: 1, 2, 5 a decade, or decades alone where there are many."""
    steps = (1, 2, 5) if high - low < 4 else (1,)
    ticks = [step * 10.0**power for power in range(int(np.floor(low)), int(np.ceil(high)) + 1) for step in steps]
    inside = [tick for tick in ticks if low <= np.log10(tick) <= high]
    return inside[:: -(-len(inside) // 12)] or [float(f"{10 ** ((low + high) / 2):.3g}")]


def _token_axis(figure: go.Figure, columns: list[str], tokens: Sequence[str], room: int, **place: int) -> int:
    """Tokens upright under a map ``room`` pixels wide; the pixels they take below it."""
    every = range(0, len(tokens), -(-24 * len(tokens) // room))
    texts = {i: _token(tokens[i], 16) for i in every}
    figure.update_xaxes(**_axis(columns, texts) | dict(tickangle=-90), **place)
    return int(30 + max(60, *(text_width(text) for text in texts.values())))


def _block_means(matrix: np.ndarray, most: int) -> np.ndarray:
    """Means of at most ``most`` blocks along each side, of sizes as equal as can be."""
    for axis, count in enumerate(matrix.shape):
        edges = np.linspace(0, count, min(count, most) + 1).round().astype(int)
        sums = np.add.reduceat(matrix, edges[:-1], axis=axis)
        matrix = sums / np.expand_dims(np.diff(edges), 1 - axis)
    return matrix


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """The mean of what is not NaN, NaN where nothing is."""
    known = ~np.isnan(values)
    return np.where(known, values, 0).sum(axis) / np.where(known.any(axis), known.sum(axis), np.nan)


def _inside(places: np.ndarray, height: float) -> np.ndarray:
    """Sorted places moved together as far as keeps the last above the foot and the first below the top."""
    return places - max(0, places[-1] - height + 8) + max(0, 8 - places[0])


def _bar(title: str) -> dict:
    room = "<br><span style='color:rgba(0,0,0,0)'>.</span>"  # between title and bar; a blank line would be cut
    return dict(title=dict(text=title + room, font_size=FONT), outlinewidth=0)


def _margin(names: Any) -> int:
    return int(min(480, max(90, *(text_width(name) + 24 for name in names), 0)))


def _significant(value: float) -> str:
    return f"{value:#.2g}".rstrip(".") if value < 10 else f"{value:.0f}"


def _framed(figure: go.Figure, title: str, subtitle: str, height: int = 720, left: int = 90, right: int = 30,
            foot: int = 135) -> go.Figure:
    figure.update_layout(hoverlabel=dict(font_size=FONT, align="left"))
    return finish(figure, title, subtitle, height, left, right, foot)
