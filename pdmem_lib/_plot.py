"""What the figures share: how methods and capacities look, panels, rows, legends, the frame, labels kept apart."""

from collections.abc import Iterator
from html import escape, unescape
from numbers import Real
from textwrap import wrap
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from .methods import REGISTRY, aliases

WIDTH = 1280
FONT = 16  # the smallest size anywhere: read from the back of a room
INK = "#333333"
GREY = "#7A7A7A"


class Look(NamedTuple):
    """How a method is drawn in every figure."""

    label: str
    colour: str
    symbol: str


class Fill(NamedTuple):
    """How a capacity is drawn in every figure: line dash, suffix of the marker's symbol, hatch of a bar."""

    dash: str
    marker: str
    hatch: str


_COLOURS = {  # the palette of Okabe and Ito, safe for the colour-blind, and markers that differ in shape
    "prefix": ("#0072B2", "circle"),
    "cross_attention": ("#D55E00", "square"),
    "kv_extension": ("#009E73", "diamond"),
    "hebbian": ("#CC79A7", "triangle-up"),
    "gated": ("#E69F00", "triangle-down"),
    "slot": ("#56B4E9", "star"),
    "baseline": ("#000000", "x"),
}
FILLS = {1: Fill("solid", "", ""), 10: Fill("dash", "-open", "/")}
SEED = dict(color="white", size=9, line=dict(color=INK, width=2))
NEUTRAL = Look("", INK, "circle")  # for the legend, which names no method, and points of no method


def look_of(method: str) -> Look:
    """A method's look, by name or alias: its name is its class's; one without a colour here, as a reader's own, is a
    grey hexagon.

    So is what was trained beside a method: "slot.format" is labelled "M.6 Slots, format".
    """
    of_alias = aliases()
    if given := next((alias for alias in of_alias if f"{method}.".startswith(f"{alias}.")), None):
        method = of_alias[given] + method.removeprefix(given)
    name, _, beside = method.partition(".")
    known = REGISTRY.get(name)
    alias = next((alias for alias, its in of_alias.items() if its == name), None)  # a reader's own may inherit one, or none
    title = getattr(known, "title", name) if alias or "title" in vars(known or object) else method
    label = f"{alias} {title}" if alias not in (None, name) else title
    label = f"{label}, {beside}" if beside and known else label
    return Look(literal(label), *_COLOURS.get(method, ("#6B6B6B", "hexagon")))


def fill_of(capacity: Real) -> Fill:
    return FILLS.get(capacity, Fill("dot", "-dot", "x"))


# --- shared parts -----------------------------------------------------------------------------------------------------

def require(table: pd.DataFrame, *columns: str) -> None:
    if missing := [column for column in columns if column not in table.columns]:
        raise ValueError(f"this figure needs the columns {', '.join(columns)}; missing: {', '.join(missing)}")
    if table.empty:
        raise ValueError("this figure's table is empty: pass at least one run")


def ordered(table: pd.DataFrame) -> list[str]:
    """The methods of a table: the study's in its order, then any others as they come."""
    present = list(dict.fromkeys(table["method"]))
    return [method for method in REGISTRY if method in present] + [name for name in present if name not in REGISTRY]


def groups(table: pd.DataFrame, *keys: str) -> Iterator[tuple[tuple, pd.DataFrame]]:
    methods = ordered(table)
    return iter(sorted(table.groupby(list(keys)), key=lambda group: (methods.index(group[0][0]), *group[0][1:])))


def method_panels(table: pd.DataFrame) -> tuple[go.Figure, dict[str, tuple[int, int]]]:
    """An empty figure with a panel a method, three in a row, and each method's (row, column)."""
    methods = ordered(table)
    columns = min(3, len(methods))
    rows = -(-len(methods) // columns)
    figure = make_subplots(rows=rows, cols=columns, shared_yaxes="all", horizontal_spacing=0.03,
                           vertical_spacing=0.34 / rows if rows > 1 else 0,
                           subplot_titles=[f"<b>{look_of(method).label}</b>" for method in methods])
    return figure, {method: (1 + i // columns, 1 + i % columns) for i, method in enumerate(methods)}


def panel_height(panels: dict[str, tuple[int, int]]) -> int:
    return 290 + 280 * max(row for row, _ in panels.values())


def add_to_panel(figure: go.Figure, place: tuple[int, int], look: Look, capacity: Real, **trace: Any) -> None:
    figure.add_scatter(name=f"{look.label}, {times(capacity)}", legendgroup=f"{capacity}", showlegend=False,
                       row=place[0], col=place[1], **trace)


def capacity_legend(figure: go.Figure, table: pd.DataFrame, note: str, mode: str) -> None:
    """One neutral legend entry a capacity: the panels' titles name the methods."""
    for capacity in sorted(table["capacity"].unique()):
        fill = fill_of(capacity)
        figure.add_scatter(x=[None], y=[None], mode=mode, legendgroup=f"{capacity}",
                           name=f"capacity {times(capacity)} ({note})",
                           line=dict(color=INK, width=3, dash=fill.dash),
                           marker=dict(color=INK, symbol="circle" + fill.marker, size=11,
                                       line=dict(color=INK, width=2)))


def label_panels(figure: go.Figure, panels: dict[str, tuple[int, int]], x_title: str, y_title: str) -> None:
    for row, column in panels.values():
        if (row + 1, column) not in panels.values():  # the lowest of its column
            figure.update_xaxes(title=x_title, row=row, col=column)
    lower_labels(figure)
    figure.update_yaxes(title=y_title, rangemode="tozero", col=1)


def lower_labels(figure: go.Figure) -> None:
    """Room between an axis and its labels, for marks that stand on the axis."""
    figure.update_xaxes(ticks="outside", ticklen=8, tickcolor="rgba(0,0,0,0)")


def bar_style(colour: str, fill: Fill) -> dict:
    return dict(color=colour, line=dict(color=colour, width=2),
                pattern=dict(shape=fill.hatch, fillmode="replace", fgcolor=colour, bgcolor="white", size=9,
                             solidity=0.4))


class Row(NamedTuple):
    """One method at one capacity: its place in the figure, its name, its looks, its numbers."""

    y: int
    label: str
    look: Look
    fill: Fill
    values: pd.Series


def rows_of(table: pd.DataFrame) -> list[Row]:
    """The rows of a table with one a method and capacity, from the top; ValueError where there are several."""
    found = []
    for y, ((method, capacity), rows) in enumerate(groups(table, "method", "capacity")):
        look = look_of(method)
        if len(rows) > 1:
            raise ValueError(f"this figure takes one row a method and capacity; {method} at {times(capacity)} has "
                             f"{len(rows)}: pass one comparison at a time")
        found.append(Row(y, f"{look.label}, {times(capacity)}", look, fill_of(capacity), rows.iloc[0]))
    return found


def mark_rows(figure: go.Figure, rows: list[Row], notes: dict[str, list[str]], at: list[int]) -> None:
    """Name the rows at the left, shade every other one, and print columns of notes.

    ``notes`` holds a text a row under each heading, ``at`` the pixels from the plot's right edge to each column.
    """
    figure.update_yaxes(tickvals=[row.y for row in rows], ticktext=[row.label for row in rows], showgrid=False,
                        zeroline=False, range=[len(rows) - 0.5, -1.5])
    figure.update_xaxes(showgrid=True, gridcolor="#DDDDDD")
    shapes = [dict(type="rect", xref="paper", x0=0, x1=1, y0=row.y - 0.5, y1=row.y + 0.5, fillcolor="#F3F3F3", line_width=0,
                   layer="below") for row in rows[::2]]
    texts = [dict(x=1, xref="paper", xanchor="left", xshift=shift, y=y, text=text, align="left", showarrow=False)
             for (heading, column), shift in zip(notes.items(), at, strict=True)
             for y, text in [*enumerate(column), (-1, f"<b>{heading}</b>")]]
    figure.update_layout(shapes=[*figure.layout.shapes, *shapes], annotations=[*figure.layout.annotations, *texts])  # at once


def row_margin(rows: list[Row]) -> int:
    """Pixels for the longest of the rows' names."""
    return int(min(400, max(220, *(text_width(row.label) + 20 for row in rows))))


def legend_entry(figure: go.Figure, name: str, mode: str = "markers", **look: Any) -> None:
    """A neutral entry of the legend, with no data of its own."""
    figure.add_scatter(x=[None], y=[None], mode=mode, name=name, **look)


def band(x: pd.Series, low: pd.Series, high: pd.Series, colour: str) -> dict:
    """A faint area from ``low`` to ``high``, as a trace's keywords."""
    red, green, blue = (int(colour[i:i + 2], 16) for i in (1, 3, 5))
    return dict(x=[*x, *x[::-1]], y=[*high, *low[::-1]], mode="lines", line_width=0, fill="toself", hoverinfo="skip",
                fillcolor=f"rgba({red},{green},{blue},0.18)")


def plot_size(figure: go.Figure) -> np.ndarray:
    """Width and height of the area inside the margins of a finished figure, in pixels."""
    margin = figure.layout.margin
    return np.array([WIDTH - margin.l - margin.r, figure.layout.height - margin.t - margin.b])


def text_width(text: Any) -> float:
    """About the pixels that a text takes in a line; letters differ, so a little too many."""
    return 0.54 * FONT * len(unescape(str(text))) + 6


def side_by_side(places: np.ndarray, apart: float) -> np.ndarray:
    """Sorted ``places``, (P,) in pixels, moved as little as keeps them ``apart`` (least squares)."""
    from scipy.optimize import isotonic_regression

    steps = apart * np.arange(len(places))
    return isotonic_regression(places - steps).x + steps


def place_labels(points: np.ndarray, widths: list[float], blocked: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Centres of labels near their points that overlap neither each other nor ``blocked``, (P, 2) in pixels.

    ``points`` (P, 2), ``widths`` one a label, ``blocked`` (R, 4) rectangles left, top, right, bottom; all lie in a plot
    of ``size``. Each label takes in turn the place that costs least beside those already there, three times over.
    """
    half = np.stack([np.array(widths) / 2 + 3, np.full(len(points), FONT * 0.65)], -1)  # (P, 2)
    taken = np.full((len(points), 4), np.nan)
    for i in [*range(len(points))] * 3:
        aside = half[i, 0] + np.arange(12, 253, 20)
        moves = np.stack(np.meshgrid([0, *aside, *-aside], np.arange(-240, 241, 10)), -1).reshape(-1, 2)
        boxes = np.concatenate([points[i] + moves - half[i], points[i] + moves + half[i]], -1)  # (K, 4)
        inside = (boxes[:, :2] >= 0).all(-1) & (boxes[:, 2:] <= size).all(-1)
        moves, boxes = moves[inside], boxes[inside]
        others = np.concatenate([blocked, np.delete(taken, i, 0)])
        others = others[~np.isnan(others).any(-1)]
        start, end = np.maximum(boxes[:, None, :2], others[:, :2]), np.minimum(boxes[:, None, 2:], others[:, 2:])
        covered = (end - start).clip(0).prod(-1).sum(-1)  # (K,) square pixels
        taken[i] = boxes[np.argmin(np.linalg.norm(moves, axis=-1) + 10 * covered)]
    return (taken[:, :2] + taken[:, 2:]) / 2


def dot_style(look: Look, fill: Fill, size: int = 14) -> dict:
    hollow = fill.marker == "-open"  # and white, so that no line shows through
    symbol = look.symbol if hollow else look.symbol + fill.marker
    inside = "white" if hollow else look.colour
    return dict(color=inside, symbol=symbol, size=size, line=dict(color=look.colour, width=2))


def finish(figure: go.Figure, title: str, subtitle: str, height: int = 720, left: int = 90, right: int = 30,
           foot: int = 135) -> go.Figure:
    """The common frame: title, what was measured under it, legend along the foot, sizes for a projector."""
    lines = [literal(line) for line in wrap(subtitle, 150)]
    head = f"<b>{title}</b>" + "".join(f"<br><span style='font-size:{FONT}px'>{line}</span>" for line in lines)
    figure.update_layout(
        template="plotly_white", width=WIDTH, height=height,
        font=dict(size=FONT, color=INK, family="Arial, sans-serif"),
        title=dict(text=head, font_size=24, x=24 / WIDTH, xref="container", xanchor="left", y=1 - 36 / height,
                   yref="container", yanchor="top"),
        margin=dict(l=left, r=right, t=85 + 31 * len(lines), b=foot),
        legend=dict(orientation="h", x=0.5, xref="container", xanchor="center", y=16 / height, yref="container",
                    yanchor="bottom", itemwidth=50))
    figure.update_annotations(font_size=FONT)
    figure.update_xaxes(title_font_size=FONT, automargin=False, zeroline=False)
    figure.update_yaxes(title_font_size=FONT, ticklabelstandoff=6)
    return figure


def literal(value: Any) -> str:
    """Text from data as plotly shows it literally; plotly reads tags and these three entities, no quotes' entities."""
    return escape(str(value), quote=False)


def times(capacity: Real) -> str:
    return f"{capacity:g}×"


def span(counts: pd.Series) -> str:
    low, high = int(counts.min()), int(counts.max())
    return f"{low}" if low == high else f"{low}–{high}"


def signed(value: float, digits: int = 3) -> str:
    sign = "" if round(value, digits) == 0 else "+"  # a zero has no sign
    return "n/a" if np.isnan(value) else f"{round(value, digits) + 0.0:{sign}.{digits}f}".replace("-", "−")
