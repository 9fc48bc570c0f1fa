"""Figures of what a question reads of a memory: how much, from which entries and turns, with what gain; its gates.

The rules of `memory_figures`; axes carry the letters of the library too (``L`` blocks, ``h`` heads, ``T`` tokens, ``M``
entries, ``N`` turns).
"""

from collections.abc import Mapping, Sequence
from textwrap import wrap

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike
from plotly.subplots import make_subplots

from ._maps import (BLUE, DIVERGING, FRAME, ORANGE, PALE, SEQUENTIAL, SPARSE, array_of, attention_of, colour_bar,
                    framed, heat_map, known_mean, name_margin, named_axis, names_of, numbered, round_steps, shares_of,
                    short, significant, token_axis, token_text)
from ._plot import (FONT, INK, NEUTRAL, WIDTH, Fill, Look, Row, dot_style, fill_of, legend_entry, literal, mark_rows,
                    row_margin, signed)
from .control_figures import MEMORIES

READ_MOST = "read most (mean of the tokens), and the turn that holds most of each:"
QUANTITIES = {  # quantity of `attention_by_block`: (title, colour bar, unit in the hover text)
    "mass": ("How much each block reads of the memory", "attention<br>to memory<br>(%)", " %"),
    "entries": ("Over how many entries each block spreads its attention", "effective<br>number of<br>entries",
                " entries"),
}


# --- what a question reads --------------------------------------------------------------------------------------------

def attention_by_block(attention: ArrayLike, tokens: Sequence[str], subtitle: str, quantity: str = "mass") -> go.Figure:
    """What each block and token (mean over heads), and each block and head (mean over tokens), reads of the memory.

    ``attention`` (L, h, T, M) of `MemoryModel.attention_to_memory`. ``quantity``: "mass" is the attention on all
    entries together, "entries" the effective number of entries it spreads over (exp of the entropy; NaN where nothing
    is read). The mass of M.2 and M.5 is 100 % everywhere: ValueError, as "entries" alone tells something.
    """
    attention = attention_of(attention, tokens)
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
    by_token, by_head = known_mean(values, axis=1), known_mean(values, axis=2)  # (L, T), (L, h)
    blocks, heads = ([f"{what} {i}" for i in range(count)] for what, count in (("block", L), ("head", h)))
    columns = [f"token {i}: {token_text(token)}" for i, token in enumerate(tokens)]
    figure = make_subplots(rows=1, cols=2, shared_yaxes=True, column_widths=[0.74, 0.26], horizontal_spacing=0.03,
                           subplot_titles=["<b>tokens (mean over heads)</b>", "<b>heads (mean over tokens)</b>"])
    for column, (z, names) in enumerate(((by_token, columns), (by_head, heads)), 1):
        figure.add_trace(heat_map(z, names, blocks, f"%{{z:.3g}}{unit}", coloraxis="coloraxis", xgap=1, ygap=1), 1, column)
    top = np.nanmax([*by_token.flat, *by_head.flat, 0])
    figure.update_layout(coloraxis=dict(colorscale=SEQUENTIAL, cmin=0, cmax=top or 1, colorbar=colour_bar(bar)))
    foot = token_axis(figure, columns, tokens, 750, row=1, col=1)
    figure.update_xaxes(title="head", row=1, col=2, **named_axis(heads, numbered(h, 10)))
    figure.update_yaxes(autorange="reversed", **named_axis(blocks, numbered(L, 16)))
    figure.update_yaxes(title="block (0: the first)", col=1)
    return framed(figure, title, subtitle, 120 + foot + max(320, min(560, 24 * L)), foot=foot)


def attention_to_entries(attention: ArrayLike, tokens: Sequence[str], subtitle: str, block: int | None = None,
                         head: int | None = None, shares: ArrayLike | None = None,
                         labels: Sequence[str] | None = None) -> go.Figure:
    """Which entries each token reads, in one block and head, or the mean over all where one is None.

    ``attention`` (L, h, T, M). With ``shares`` (M, N) of turns in entries an entry names on hovering the turns that
    hold most of it (``labels``: the N turns' texts), and the three entries read most are told below the map.
    """
    attention = attention_of(attention, tokens)
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
        shares = shares_of(shares)
        if len(shares) != M:
            raise ValueError(f"shares are of {len(shares)} entries, attention of {M}: pass both of one memory")
        turns = names_of("turn", shares.shape[1], labels)
        behind = [[f"{100 * row[t]:.0f} % from {turns[t]}" for t in np.argsort(-row, kind="stable")[:3] if row[t] > 0]
                  for row in shares]
        most = [i for i in np.argsort(-z.mean(axis=0), kind="stable")[:3] if z[:, i].any()]
        notes = [f"<b>entry {i}</b>, read {significant(z[:, i].mean())} %: {(behind[i] or ['no turn'])[0]}"
                 for i in most]
        notes = [READ_MOST, *notes] if most else []
        entries = ["<br>".join([name, *held]) for name, held in zip(entries, behind, strict=True)]
    rows = [f"token {i}: {token_text(token)}" for i, token in enumerate(tokens)]
    figure = go.Figure(heat_map(z, entries, rows, "%{z:.3g} % of its attention", colorscale=SPARSE, zmin=0,
                                zmax=z.max() or 1, ygap=1, colorbar=colour_bar("attention<br>of the<br>token (%)")))
    figure.update_xaxes(title="entry", **named_axis(entries, numbered(M, 14)))
    every = round_steps(T, 30)
    figure.update_yaxes(autorange="reversed", **named_axis(rows, {i: token_text(tokens[i], 24) for i in every}))
    foot = 85 + 24 * len(notes) + (20 if notes else 0)
    framed(figure, f"Which entries each token reads: {where[block is None, head is None]}", subtitle,
           130 + foot + max(280, min(620, 22 * T)), name_margin(token_text(token, 24) for token in tokens), foot=foot)
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
    scores = array_of(scores, "scores", "N")
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
    names, full = names_of("turn", N, labels, letters=46), names_of("turn", N, labels, letters=200)
    hover = ["<br>".join(wrap(full[turn], 70)) for turn in shown]
    figure = go.Figure(go.Bar(
        x=values[shown], y=y, orientation="h", width=0.74, customdata=hover, showlegend=False,
        hovertemplate=f"%{{customdata}}<br>%{{x:.3g}}{unit}<extra></extra>",
        marker=dict(color=np.where(marked, "#FBE3D5", PALE), line=dict(color=np.where(marked, ORANGE, PALE),
                                                                       width=np.where(marked, 4, 0)))))
    for turn, at, known in zip(shown, y, marked, strict=True):
        text = significant(values[turn]) + unit
        figure.add_annotation(x=values[turn], y=at, xanchor="left", xshift=8, showarrow=False, bgcolor="white",
                              text=f"<b>{text}, evidence: rank {rank[turn]} of {N}</b>" if known else text)
    figure.add_vline(x=even, line=dict(color=INK, width=2, dash="dash"))
    legend_entry(figure, f"all turns alike ({significant(even)}{unit})", mode="lines",
                 line=dict(color=INK, width=2, dash="dash"))
    figure.add_bar(x=[None], y=[None], name="evidence", marker=dict(color="#FBE3D5", line=dict(color=ORANGE, width=4)))
    figure.update_layout(barmode="overlay")
    ticks = [f"<b>{names[turn]}</b>" if known else names[turn] for turn, known in zip(shown, marked, strict=True)]
    figure.update_yaxes(tickvals=y, ticktext=ticks, range=[max(y) + 0.6, -0.6], showgrid=False, zeroline=False)
    left = name_margin(names[turn] for turn in shown)
    inside = WIDTH - left - 40
    reach = max(values[turn] / (1 - (300 if known else 90) / inside)  # room for the texts behind the bars
                for turn, known in zip(shown, marked, strict=True))
    figure.update_xaxes(title=literal(axis or "part of the question's attention to turns (%)"), range=[0, reach])
    return framed(figure, "Which turns the question looks at", subtitle, 260 + 27 * max(6, max(y) + 1), left, foot=125)


def token_gain(tokens: Sequence[str], logp_own: ArrayLike, logp_off: ArrayLike, logp_other: ArrayLike,
               subtitle: str) -> go.Figure:
    """Memory on, off and another's, answer token by answer token: log-probabilities (T,) in nats, gains as numbers."""
    given = {"own": logp_own, "off": logp_off, "other": logp_other}
    points = {memory: array_of(values, f"logp_{memory}", "T") for memory, values in given.items()}
    if any(len(values) != len(tokens) for values in points.values()) or isinstance(tokens, str):
        raise ValueError(f"{len(tokens)} tokens, and log-probabilities of "
                         f"{', '.join(str(len(values)) for values in points.values())}: give one each a token")
    if any((values > 1e-6).any() for values in points.values()):
        raise ValueError("a log-probability is at most 0: pass log p, not p nor the loss")
    points = {memory: np.append(values, values.mean()) for memory, values in points.items()}
    labels = [*(token_text(token, 24) for token in tokens), "<b>mean</b>"]
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
    return framed(figure, "What the memory adds to each token of the answer", subtitle, 310 + 34 * len(rows),
                  row_margin(rows), right=260)


def answer_map(probabilities: ArrayLike, memories: Sequence[str], answers: Sequence[str], subtitle: str,
               right: Sequence[str | None] | None = None) -> go.Figure:
    """How likely each candidate answer is under each memory, (R, C): a row a memory, a column an answer.

    ``right`` names each row's right answer, None where there is none: its cell is framed.
    """
    z = array_of(probabilities, "probabilities", "R C")
    if z.shape != (len(memories), len(answers)) or isinstance(memories, str) or isinstance(answers, str):
        raise ValueError(f"probabilities are of {z.shape[0]} memories and {z.shape[1]} answers, got {len(memories)} "
                         f"and {len(answers)} names: give one each")
    if (z < 0).any() or (z > 1 + 1e-6).any():
        raise ValueError("probabilities lie between 0 and 1: pass p, not its logarithm")
    right = [None] * len(memories) if right is None else list(right)
    if len(right) != len(memories) or set(right) - {None, *answers}:
        raise ValueError("right names one of the answers for each memory, or None: give as many as memories")
    rows, columns = [f"{short(memory, 40)}" for memory in memories], [short(answer, 16) for answer in answers]
    figure = go.Figure(go.Heatmap(z=z.astype("float32"), colorscale=SEQUENTIAL, zmin=0, zmax=1, xgap=2, ygap=2,
                                  colorbar=colour_bar("probability"), hovertemplate="%{customdata}: %{z:.3f}<extra></extra>",
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
    return framed(figure, "How likely each answer is, by memory", subtitle, 290 + 38 * max(5, len(rows)),
                  name_margin(rows), foot=125)


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
    arrays = {short(label, 26): array_of(gate, "gates", axes) for label, gate in moments.items()}
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
        figure = go.Figure(heat_map(z, list(arrays), blocks, "%{z:.3g}", colorbar=colour_bar(kind), **sides, xgap=1, ygap=1))
        labels = list(arrays)
        ticks = {i: labels[i] for i in round_steps(len(labels), 12)}
        figure.update_xaxes(title="moment of training", **named_axis(labels, ticks))
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
        return framed(figure, title, subtitle, height=600)
    else:
        titles = [f"<b>{label}</b>{'<br>' if label else ''}mean |{name}| {abs(gate).mean():.3g}"
                  for label, gate in arrays.items()]
        figure = make_subplots(rows=1, cols=len(arrays), shared_yaxes=True, horizontal_spacing=0.03,
                               subplot_titles=titles)
        heads = [f"head {i}" for i in range(first.shape[1])]
        for column, gate in enumerate(arrays.values(), 1):
            figure.add_trace(heat_map(gate, heads, blocks, "%{z:.3g}", coloraxis="coloraxis", xgap=1, ygap=1), 1, column)
        figure.update_layout(coloraxis=dict(colorscale=DIVERGING, cmin=-reach, cmax=reach, colorbar=colour_bar(name)))
        figure.update_xaxes(title="head", **named_axis(heads, numbered(len(heads), 32 // len(arrays))))
    figure.update_yaxes(autorange="reversed", **named_axis(blocks, numbered(len(blocks), 16)))
    figure.update_yaxes(title="block (0: the first)", col=None if len(arrays) > 4 else 1)
    return framed(figure, title, subtitle, 240 + max(320, min(560, 24 * len(first))), foot=85)
