"""Figures of what else would do as well: the answer under every other memory, and references beside it.

The rules of `figures`, which offers these functions too: tidy tables in, `plotly.graph_objects.Figure` out.
"""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ._plot import (FONT, GREY, INK, NEUTRAL, dot_style, fill_of, finish, legend_entry, literal, look_of, mark_rows,
                    place_labels, plot_size, require, row_margin, rows_of, side_by_side, signed, span, text_width, times)
from .oracle import AMONG, TEXT

MEMORIES = {  # memory: (name, marker, place across its row: what often scores the same must not hide each other)
    "own": ("own memory", "circle", 0),
    "other": ("another conversation's", "circle-open", 0),
    "random": ("random state", "triangle-up-open", -0.36),
    "initial": ("initial state", "diamond-open", -0.18),
    "shuffled": ("shuffled state", "star-open", 0.18),
    "zero": ("zero state", "x-thin-open", 0.27),
    "off": ("off (frozen model)", "line-ns-open", -0.27),
    "format": ("format only", "square-open", 0.36),
}
STAGES = {  # of `oracle`: stage: how it is named at its row
    "prompt": "the evidence in the prompt<br>(frozen model, no memory)",
    "text": "the same text, with an<br>adapter trained beside it",
    "states": "its token states are<br>the memory's entries",
    "alone": "it is written, alone",
    "after-1": "written after 1 of the turns<br>before it, asked at once",
    "after-4": "written after 4 of the turns<br>before it",
    "after-16": "written after 16 of the turns<br>before it",
    "after": "written after all turns<br>before it",
    "end": "asked at the end of the<br>conversation",
}
AGAINST = {"neighbour": "own − another question's in its place", "other": "own − another conversation's"}
REFERENCES = {"memory": "circle", "prompt": "square", "trained without memory": "diamond", "frozen": "cross"}


def controls_chart(table: pd.DataFrame, subtitle: str) -> go.Figure:
    """The answer under every memory, a row a method and capacity: log-probability left, F1 right.

    Columns method, capacity, memory (of `MEMORIES`), value (nats per answer token), f1 (%), seed if several (their mean
    is drawn). The bar from *other* to *own* is what a conversation's own memory adds; all else any memory brings.
    """
    require(table, "method", "capacity", "memory", "value", "f1")
    return _memory_dots(table, {"value": ("log-probability per answer token (nats)", "nats", 3),
                                "f1": ("F1 (%)", "points", 1)}, "The answer under every memory", subtitle, 48)


def log_probability_bars(summary: pd.DataFrame, subtitle: str) -> go.Figure:
    """Log-probability per answer token (nats) under four memories: the left half of `controls_chart`.

    Columns method, capacity, logp_own, logp_other, logp_zero, logp_off, seed if several (their mean is drawn).
    """
    columns = {f"logp_{memory}": memory for memory in ("own", "other", "zero", "off")}
    require(summary, "method", "capacity", *columns)
    table = summary[["method", "capacity", *columns]].rename(columns=columns)
    table = table.melt(["method", "capacity"], var_name="memory")
    axis = "log-probability per answer token (nats; further right is better)"
    return _memory_dots(table, {"value": (axis, "nats", 3)},
                        "What the answer gains from a memory, and from its own", subtitle, 38)


def _memory_dots(table: pd.DataFrame, scores: dict[str, tuple[str, str, int]], title: str, subtitle: str,
                 row_height: int) -> go.Figure:
    """A panel a score, {column: (name of the axis, unit, digits)}; a row a method and capacity; a marker a memory."""
    if unknown := set(table["memory"]) - set(MEMORIES):
        raise ValueError(f"unknown memory {', '.join(map(str, sorted(unknown)))}: known are {', '.join(MEMORIES)}")
    memories = [memory for memory in MEMORIES if memory in set(table["memory"])]
    means = table.groupby(["method", "capacity", "memory"])[list(scores)].mean().unstack().reset_index()
    rows, figure = rows_of(means), make_subplots(rows=1, cols=len(scores), shared_yaxes=True, horizontal_spacing=0.03)
    notes = {}
    for column, (score, (axis, unit, digits)) in enumerate(scores.items(), 1):
        points = pd.DataFrame([row.values[score] for row in rows], columns=list(MEMORIES)).reset_index(drop=True)
        place = dict(row=1, col=column, showlegend=False)
        for y, _, look, _, _ in rows:
            figure.add_scatter(x=points.loc[y, ["other", "own"]], y=[y, y], mode="lines", opacity=0.6, hoverinfo="skip",
                               line=dict(color=look.colour, width=6), **place)
        for memory in reversed(memories):  # own memory last, on top, inside the ring of the other where they are equal
            name, symbol, aside = MEMORIES[memory]
            colours = [row.look.colour if memory in ("own", "other") else INK for row in rows]
            figure.add_scatter(x=points[memory], y=[row.y + aside for row in rows], mode="markers", name=name,
                               marker=_memory_marker(memory, colours), customdata=[row.label for row in rows], **place,
                               hovertemplate=f"%{{customdata}}, {name}: %{{x:.{digits}f}} {unit}<extra></extra>")
        notes[f"own − other<br>({unit})"] = [signed(points.loc[row.y, "own"] - points.loc[row.y, "other"], digits)
                                             for row in rows]
        figure.update_xaxes(title=axis, row=1, col=column)
    for memory in memories:
        legend_entry(figure, MEMORIES[memory][0], marker=_memory_marker(memory, INK))
    mark_rows(figure, rows, notes, [16, 136][:len(notes)])
    lines = -(-len(memories) // 4)  # of the legend
    return finish(figure, title, subtitle, 300 + 30 * lines + row_height * len(rows), row_margin(rows),
                  right=20 + 120 * len(scores), foot=105 + 30 * lines)


def _memory_marker(memory: str, colour: str | list[str]) -> dict:
    size = {"own": 10, "other": 19}.get(memory, 11)
    return dict(symbol=MEMORIES[memory][1], size=size, color=colour, line=dict(color=colour, width=2.5))


def evidence_by_stage(table: pd.DataFrame, subtitle: str) -> go.Figure:
    """What a question's own evidence is worth, the nearer its memory is to the study's: a row a stage, from the prompt down.

    Columns method, capacity, stage (of `oracle.STAGES`), against ("other": another conversation's evidence, "neighbour": that
    of another question of the same conversation), effect, low and high (nats per answer token): rows of `oracle.told`.
    Text in the prompt, where it is worth more than thrice what any memory's interval reaches, is written at the axis' end instead
    of drawn, so that the others can be told apart. ValueError for two rows of one method and capacity.
    """
    require(table, "method", "capacity", "stage", "against", "effect", "low", "high")
    keys = ["method", "capacity", "stage", "against"]
    if unknown := set(table["stage"]) - set(STAGES) or set(table["against"]) - set(AGAINST):
        raise ValueError(f"unknown {', '.join(map(str, sorted(unknown)))}: known are {', '.join([*STAGES, *AGAINST])}")
    if table.duplicated(keys).any():
        raise ValueError("this figure takes one row a method, capacity, stage and control")
    stages = [stage for stage in STAGES if stage in set(table["stage"])]
    panels = [against for against in AGAINST if against in set(table["against"])]
    drawn = table[table["method"] != "baseline"]  # the frozen model, alone in its row
    lines = list(drawn.groupby(["method", "capacity"], sort=False).groups)
    figure = make_subplots(rows=1, cols=len(panels), shared_yaxes=True, horizontal_spacing=0.03,
                           subplot_titles=[f"<b>{AGAINST[against]}</b>" for against in panels])
    reach = drawn.loc[~drawn["stage"].isin(TEXT), ["low", "high"]].abs().max(axis=None)
    for row in table.itertuples():
        look = NEUTRAL if row.method == "baseline" else look_of(row.method)
        aside = 0.0 if row.method == "baseline" else 0.6 * ((lines.index((row.method, row.capacity)) + 0.5) / len(lines) - 0.5)
        y = stages.index(row.stage) + aside
        if row.stage in TEXT and row.effect > 3 * reach:
            figure.add_annotation(x=1.08 * reach, y=y, xanchor="right", showarrow=False, row=1, col=1 + panels.index(row.against),
                                  text=f"<b>{signed(row.effect)}</b> ({signed(row.low)} to {signed(row.high)}) →",
                                  font=dict(color=look.colour))
            continue
        figure.add_scatter(
            x=[row.effect], y=[y], mode="markers", showlegend=False, name=look.label,
            marker=dot_style(look, fill_of(row.capacity), 12), row=1, col=1 + panels.index(row.against),
            error_x=dict(array=[row.high - row.effect], arrayminus=[row.effect - row.low], thickness=2.5, width=5, color=look.colour),
            hovertemplate=f"{look.label or 'frozen model'}: {signed(row.effect)} ({signed(row.low)} to {signed(row.high)}) nats"
                          "<extra></extra>")
    for method, capacity in lines:
        legend_entry(figure, f"{look_of(method).label}, {times(capacity)}", marker=dot_style(look_of(method), fill_of(capacity), 12))
    for y in range(0, len(stages), 2):
        figure.add_hrect(y0=y - 0.5, y1=y + 0.5, fillcolor="#F3F3F3", line_width=0, layer="below", row=1, col="all")
    figure.add_vline(x=0, line=dict(color=INK, width=2))
    figure.update_xaxes(title="nats per answer token, 95 %", gridcolor="#DDDDDD", matches="x")
    figure.update_yaxes(tickvals=list(range(len(stages))), ticktext=[STAGES[stage] for stage in stages], showgrid=False,
                        zeroline=False, range=[len(stages) - 0.5, -0.5])
    return finish(figure, "Where the content is lost", subtitle, 300 + 84 * len(stages), left=260)


def crowding(table: pd.DataFrame, subtitle: str, gamma: float = 0.95, score: str = "nats per answer token") -> go.Figure:
    """What a question's own evidence is worth by how many other turns are written beside it: a line a method and capacity.

    Columns method, capacity, stage (of `oracle.AMONG`), effect, low, high (in ``score``): rows of `oracle.told` against one
    control, of questions whose evidence is one turn. Dashed, where a column share has numbers: the effect alone times the mean
    of `oracle.shares` under a rule of decay ``gamma``. ValueError for another stage, or two rows of one point.
    """
    require(table, "method", "capacity", "stage", "effect", "low", "high")
    if unknown := set(table["stage"]) - set(AMONG):
        raise ValueError(f"unknown {', '.join(map(str, sorted(unknown)))}: known are {', '.join(AMONG)}")
    if table.duplicated(["method", "capacity", "stage"]).any():
        raise ValueError("this figure takes one row a method, capacity and stage")
    stages = [stage for stage in AMONG if stage in set(table["stage"])]
    figure, lines = go.Figure(), list(table.groupby(["method", "capacity"], sort=False))
    for i, ((method, capacity), rows) in enumerate(lines):
        look, rows = look_of(method), rows.set_index("stage").loc[[stage for stage in stages if stage in set(rows["stage"])]]
        x = np.array([stages.index(stage) for stage in rows.index]) + 0.04 * (i - (len(lines) - 1) / 2)
        figure.add_scatter(
            x=x, y=rows["effect"], mode="lines+markers", name=f"{look.label}, {times(capacity)}",
            marker=dot_style(look, fill_of(capacity), 12), line=dict(color=look.colour, width=3), customdata=rows[["low", "high"]],
            error_y=dict(array=rows["high"] - rows["effect"], arrayminus=rows["effect"] - rows["low"], thickness=2.5, width=5),
            hovertemplate=f"{look.label}: %{{y:+.3f}} (%{{customdata[0]:+.3f}} to %{{customdata[1]:+.3f}}) {score}<extra></extra>")
        if "alone" in rows.index and "share" in rows and rows["share"].notna().all():
            figure.add_scatter(x=x, y=rows.loc["alone", "effect"] * rows["share"], mode="lines", hoverinfo="skip",
                               showlegend=False, line=dict(color=look.colour, width=2, dash="dash"))
    if len(figure.data) > len(lines):
        legend_entry(figure, f"alone × its share, γ {gamma:g}", mode="lines", line=dict(color=INK, width=2, dash="dash"))
    figure.add_hline(y=0, line=dict(color=INK, width=2))
    figure.update_xaxes(title="other turns written beside the evidence", tickvals=list(range(len(stages))), zeroline=False,
                        ticktext=["all" if AMONG[stage] is None else str(AMONG[stage]) for stage in stages],
                        range=[-0.4, len(stages) - 0.6])
    figure.update_yaxes(title=f"own − another question's evidence<br>({score}, 95 %)")
    return finish(figure, "How few other turns drown it", subtitle, 640, left=130)


def reference_points(table: pd.DataFrame, subtitle: str, y: str = "f1") -> go.Figure:
    """How good the answers are against the tokens read for each: memories beside prompts and what needs neither.

    One row a labelled point: reference (its label), group (of `REFERENCES`), method (or ""), capacity (or NaN), f1 (%),
    low, high (of F1), logp (nats), tokens, seconds (a question), bytes (kept a conversation). ``y``: "f1" or "logp".
    """
    require(table, "reference", "group", "method", "capacity", "f1", "low", "high", "logp", "tokens", "seconds",
            "bytes")
    titles = {"f1": "F1 (%), 95 % interval", "logp": "log-probability per answer token (nats)"}
    if y not in titles:
        raise ValueError(f"y is f1 or logp, got {y!r}")
    if unknown := set(table["group"]) - set(REFERENCES):
        raise ValueError(f"unknown group {', '.join(map(str, sorted(unknown)))}: known are {', '.join(REFERENCES)}")
    if not (table["tokens"] > 0).all():
        raise ValueError("tokens stand on a logarithmic axis: every reference must read at least one")
    figure = finish(go.Figure(), "How good the answers are, and how much is read for them", subtitle, 800)
    table = table.sort_values("tokens", kind="stable").reset_index(drop=True)
    low, high = (table[side].fillna(table[y]) if y == "f1" else table[y] for side in ("low", "high"))
    room = 0.1 * (high.max() - low.min() or 1)
    y_range, size = [low.min() - room, high.max() + room], plot_size(figure)
    x, ticks, crowds = _token_places(table["tokens"].to_numpy(float), size[0])
    close = np.split(np.arange(len(x)), np.flatnonzero(np.diff(x) > 36) + 1)
    upright = [i for near in close if len(near) > 2 for i in near]
    for i in upright:  # their labels stand on their intervals
        part = min(0.7, (text_width(table["reference"][i]) + 24) / size[1])
        y_range[1] = max(y_range[1], (high[i] - part * y_range[0]) / (1 - part))
    for i, row in table.iterrows():
        look = look_of(row["method"]) if isinstance(row["method"], str) and row["method"] else NEUTRAL
        fill, name = fill_of(1 if np.isnan(row["capacity"]) else row["capacity"]), literal(row["reference"])
        error = dict(array=[high[i] - row[y]], arrayminus=[row[y] - low[i]], thickness=2, width=4, color=look.colour)
        figure.add_scatter(x=[x[i]], y=[row[y]], mode="markers", name=name, showlegend=False, error_y=error,
                           marker=dot_style(look._replace(symbol=REFERENCES[row["group"]]), fill),
                           hovertemplate=f"{name}: %{{y:.3g}}<br>{row['tokens']:,.0f} tokens, {row['seconds']:.3g} s, "
                                         f"{row['bytes']:,.0f} bytes kept<extra></extra>")
    heights = np.stack([(y_range[1] - side) / (y_range[1] - y_range[0]) * size[1] for side in (high, table[y], low)])
    _label_points(figure, list(table["reference"]), x, heights, upright, size)
    for crowd in crowds:
        left, right = x[crowd[0]] - 16, x[crowd[-1]] + 16
        figure.add_shape(type="rect", x0=left, x1=right, yref="paper", y0=0, y1=1, fillcolor="#F0F0F0", line_width=0,
                         layer="below")
        ticks = {text: at for text, at in ticks.items() if not left - 20 < at < right + 20}
        ticks[f"{span(table['tokens'].iloc[crowd].round())} each"] = x[crowd].mean()
    for group, symbol in REFERENCES.items():
        if group in set(table["group"]):
            legend_entry(figure, group, marker=dict(color=INK, symbol=symbol, size=14))
    for capacity in sorted(table["capacity"].dropna().unique()):
        legend_entry(figure, f"capacity {times(capacity)}", marker=dot_style(NEUTRAL, fill_of(capacity)))
    title = "tokens read per question (logarithmic; those that read as many stand side by side)"
    figure.update_xaxes(range=[0, size[0]], tickvals=list(ticks.values()), ticktext=list(ticks),
                        title=dict(text=title, font_size=FONT))
    return figure.update_yaxes(title=dict(text=titles[y], font_size=FONT), range=y_range)


def _token_places(tokens: np.ndarray, width: float) -> tuple[np.ndarray, dict[str, float], list[np.ndarray]]:
    """Places on a logarithmic axis in pixels, set apart where marks would cover each other; ticks; who shares a place.

    ``tokens`` (P,) ascending -> (P,), {text: place}, the indices of each crowd.
    """
    decades, pads, apart = np.log10(tokens), np.array([40.0, 40.0]), 22
    for _ in range(3):  # room at both ends for what is set apart there
        scale = (width - pads.sum()) / (np.ptp(decades) or 1)
        exact = pads[0] + (decades - decades[0]) * scale
        x = side_by_side(exact, apart)
        pads = np.maximum(pads, 40 + np.array([exact[0] - x[0], x[-1] - exact[-1]]))
    steps = [step * 10.0 ** power for power in range(8) for step in (1, 2, 5)]
    places = {f"{step:,.0f}": exact[0] + (np.log10(step) - decades[0]) * scale for step in steps}
    ticks = {text: place for text, place in places.items() if 0 <= place <= width}
    crowds = np.split(np.arange(len(tokens)), np.flatnonzero(np.diff(decades) > 0.004) + 1)
    return x, ticks, [crowd for crowd in crowds if len(crowd) > 1]


def _label_points(figure: go.Figure, names: list[str], x: np.ndarray, heights: np.ndarray, upright: list[int],
                  size: np.ndarray) -> None:
    """Name every point: ``upright`` on its interval where many share a place, else level where there is room.

    ``x`` (P,) and ``heights`` (3, P) of the interval's top, the point and the interval's foot, in pixels from the top
    left of a plot of ``size``.
    """
    top, middle, foot = np.minimum(heights[0], heights[1] - 9), heights[1], heights[2]
    widths = np.array([text_width(name) for name in names])
    blocked = [*np.stack([x - 9, middle - 9, x + 9, middle + 9], -1), *np.stack([x - 3, top, x + 3, foot], -1)]
    for i in upright:
        blocked.append([x[i] - 11, top[i] - 10 - widths[i], x[i] + 11, top[i]])
        figure.add_annotation(x=x[i], y=1 - top[i] / size[1], yref="paper", text=literal(names[i]), textangle=-90,
                              yanchor="bottom", yshift=8, showarrow=False, font_size=FONT)
    free = [i for i in range(len(names)) if i not in upright]
    if not free:
        return
    points = np.stack([x, middle], -1)[free]
    moves = place_labels(points, widths[free], np.array(blocked), size) - points
    for i, (aside, down) in zip(free, moves):
        figure.add_annotation(x=x[i], y=1 - middle[i] / size[1], yref="paper", text=literal(names[i]), ax=aside,
                              ay=down, arrowwidth=1, arrowcolor=GREY, arrowhead=0, standoff=9, font_size=FONT)
