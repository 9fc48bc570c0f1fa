"""Figures of the study: tidy tables in, `plotly.graph_objects.Figure` out; nothing is shown and no file is read.

Tables carry one row a point with ``method`` (its name in code) and ``capacity`` (1, 10), and ``seed`` where there are
several: lines and bars are then means over the seeds, the seeds themselves dots. A method keeps one colour and one
marker in every figure, a capacity one dash, filling and hatch, so that no reading rests on colour alone. Text from data
is escaped. ``subtitle`` names what was measured: backbone, preset, data, seeds. A missing column or an empty table is a
ValueError that names it.
"""

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from html import escape
from numbers import Real
from pathlib import Path
from textwrap import wrap
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from .files import atomic_path
from .locomo import CATEGORIES
from .methods import REGISTRY
from .metrics import LAG_BUCKETS

WIDTH = 1280
FONT = 16  # the smallest size anywhere: read from the back of a room
INK = "#333333"


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
_SEED = dict(color="white", size=9, line=dict(color=INK, width=2))
MEMORIES = {  # column: (name, marker)
    "logp_own": ("own memory", "circle"),
    "logp_other": ("another conversation's", "circle"),
    "logp_zero": ("zero state", "x-thin"),
    "logp_off": ("off (frozen model)", "line-ns"),
}


def look_of(method: str) -> Look:
    """A method's look: its name is its class's; one that has no colour here, such as a reader's own, gets a grey hexagon."""
    known = REGISTRY.get(method)
    label = _text(method) if known is None else _text(f"{known.alias} {known.title}".removeprefix("baseline "))
    return Look(label, *_COLOURS.get(method, ("#6B6B6B", "hexagon")))


def fill_of(capacity: Real) -> Fill:
    return FILLS.get(capacity, Fill("dot", "-dot", "x"))


# --- the figures ------------------------------------------------------------------------------------------------------

def forgetting_curves(table: pd.DataFrame, subtitle: str) -> go.Figure:
    """Retained memory (%) by lag, a panel a method. Columns method, capacity, seed, bucket, n, raw, smoothed (%)."""
    _require(table, "method", "capacity", "seed", "bucket", "n", "raw", "smoothed")
    buckets = list(dict.fromkeys([*(bucket.label for bucket in LAG_BUCKETS), *table["bucket"]]))
    table = table.assign(x=table["bucket"].map(buckets.index))
    figure, panels = _panels(table)
    capacities = sorted(table["capacity"].unique())
    for (method, capacity), rows in _groups(table, "method", "capacity"):
        look, fill = look_of(method), fill_of(capacity)
        smoothed = rows.groupby("x")["smoothed"].mean()
        aside = 0.16 * (capacities.index(capacity) - (len(capacities) - 1) / 2)  # so that marks do not hide each other
        _add(figure, panels[method], look, capacity, x=smoothed.index, y=smoothed, mode="lines",
             line=dict(color=look.colour, width=3, dash=fill.dash))
        _add(figure, panels[method], look, capacity, x=rows["x"] + aside, y=rows["raw"], mode="markers", cliponaxis=False,
             marker=dict(color=look.colour, symbol=look.symbol + fill.marker, size=11,
                         line=dict(color=look.colour, width=2)),
             opacity=0.45 if rows["seed"].nunique() > 1 else 1)
    for method, (row, column) in panels.items():
        counts = table[table["method"] == method].groupby("x")["n"]
        ticks = [f"{_text(bucket)}<br>n={_span(counts.get_group(x))}" if x in counts.groups else _text(bucket)
                 for x, bucket in enumerate(buckets)]
        figure.update_xaxes(tickvals=list(range(len(buckets))), ticktext=ticks, tickangle=0,
                            range=[-0.5, len(buckets) - 0.5], row=row, col=column)
    _label_panels(figure, panels, "lag between evidence and question (turns)", "retained memory (%)")
    _capacity_legend(figure, table, "isotonic fit, marks raw", mode="lines+markers")
    return _finish(figure, "Forgetting curves", subtitle, height=_panel_height(panels))


def retained_bars(summary: pd.DataFrame, subtitle: str) -> go.Figure:
    """Retained memory by method and capacity: `metrics.printed_mean`, the mean of the buckets.

    Columns method, capacity, retained_mean (%), seed if several.
    """
    _require(summary, "method", "capacity", "retained_mean")
    figure, methods, capacities = go.Figure(), _ordered(summary), sorted(summary["capacity"].unique())
    width = 0.84 / len(capacities)
    for (method, capacity), rows in _groups(summary, "method", "capacity"):
        look, mean, top = look_of(method), rows["retained_mean"].mean(), rows["retained_mean"].max()
        x = methods.index(method) + width * (capacities.index(capacity) - (len(capacities) - 1) / 2)
        figure.add_bar(x=[x], y=[mean], width=0.9 * width, name=look.label, showlegend=False,
                       marker=_bar(look.colour, capacity),
                       hovertemplate=f"{look.label}, {_capacity(capacity)}: %{{y:.2f}} %<extra></extra>")
        if len(rows) > 1:
            figure.add_scatter(x=[x] * len(rows), y=rows["retained_mean"], mode="markers", marker=_SEED,
                               name="one seed", showlegend=False)
        figure.add_annotation(x=x, y=top, yshift=16, text=f"{mean:.1f}", showarrow=False)
    if len(summary) > summary.groupby(["method", "capacity"]).ngroups:
        figure.add_scatter(x=[None], y=[None], mode="markers", name="one seed", marker=_SEED)
    for capacity in capacities:
        figure.add_bar(x=[None], y=[None], name=f"capacity {_capacity(capacity)}", marker=_bar(INK, capacity))
    figure.update_xaxes(tickvals=list(range(len(methods))), showgrid=False,
                        ticktext=[look_of(method).label.replace(" ", "<br>", 1) for method in methods])
    figure.update_yaxes(title="retained memory, mean of the buckets (%)", rangemode="tozero")
    return _finish(figure, "Retained memory by method and capacity", subtitle)


def knowledge_curves(table: pd.DataFrame, subtitle: str) -> go.Figure:
    """K, the mean F1 (%) after each session, a panel a capacity. Columns method, capacity, seed, session, n, K (%)."""
    _require(table, "method", "capacity", "seed", "session", "n", "K")
    capacities = sorted(table["capacity"].unique())
    figure = make_subplots(rows=1, cols=len(capacities), shared_yaxes=True, horizontal_spacing=0.03,
                           subplot_titles=[f"<b>capacity {_capacity(capacity)}</b>" for capacity in capacities])
    named: set[str] = set()  # a method stands in the legend once
    for (method, capacity), rows in _groups(table, "method", "capacity"):
        look, place = look_of(method), dict(row=1, col=1 + capacities.index(capacity), legendgroup=method)
        means = rows.groupby("session")["K"].mean()
        if rows["seed"].nunique() > 1:
            figure.add_scatter(x=rows["session"], y=rows["K"], mode="markers", opacity=0.3, showlegend=False,
                               marker=dict(color=look.colour, symbol=look.symbol, size=6), hoverinfo="skip", **place)
        figure.add_scatter(x=means.index, y=means, mode="lines+markers", name=look.label,
                           showlegend=method not in named, line=dict(color=look.colour, width=2.5),
                           marker=dict(symbol=look.symbol, size=9),
                           hovertemplate=f"{look.label}, session %{{x}}: %{{y:.1f}} %<extra></extra>", **place)
        named.add(method)
    counts = table.groupby("session")["n"]
    sessions = np.array(sorted(counts.groups))
    shown = sessions[np.unique(np.linspace(0, len(sessions) - 1, min(5, len(sessions))).round().astype(int))]
    ticks = [f"{session:g}<br>n={_span(counts.get_group(session))}" for session in shown]
    figure.update_xaxes(tickvals=shown, ticktext=ticks, title="session (n questions asked by then)")
    figure.update_yaxes(title="K, mean F1 (%)", rangemode="tozero", col=1)
    return _finish(figure, "Knowledge curves", subtitle).update_layout(
        margin=dict(r=230, b=100), legend=dict(orientation="v", x=1.01, xref="paper", xanchor="left", y=1, yref="paper",
                                               yanchor="top", itemwidth=40))


def log_probability_bars(summary: pd.DataFrame, subtitle: str) -> go.Figure:
    """Log-probability per answer token (nats) under four memories, as dots on one axis, with own − other in figures.

    Columns method, capacity, logp_own, logp_other, logp_zero, logp_off, seed if several (their mean is drawn). The bar
    from *other* to *own* is what a conversation's own bank adds; all else any bank brings.
    """
    _require(summary, "method", "capacity", *MEMORIES)
    means = [(method, capacity, rows[list(MEMORIES)].mean()) for (method, capacity), rows in
             _groups(summary, "method", "capacity")]
    labels = [f"{look_of(method).label}, {_capacity(capacity)}" for method, capacity, _ in means]
    colours = [look_of(method).colour for method, _, _ in means]
    figure = go.Figure()
    for y, (_, _, logp) in enumerate(means):
        figure.add_scatter(x=[logp["logp_other"], logp["logp_own"]], y=[y, y], mode="lines", showlegend=False,
                           line=dict(color=colours[y], width=7), opacity=0.6, hoverinfo="skip")
        figure.add_annotation(x=1.01, xref="paper", xanchor="left", y=y, showarrow=False,
                              text=_signed(logp["logp_own"] - logp["logp_other"]))
    for memory, (name, symbol) in reversed(MEMORIES.items()):  # own memory last, on top
        edge = colours if memory in ("logp_own", "logp_other") else [INK] * len(means)
        fill = edge if memory == "logp_own" else ["white"] * len(means)
        figure.add_scatter(x=[logp[memory] for _, _, logp in means], y=list(range(len(means))), mode="markers",
                           marker=dict(symbol=symbol, size=14, color=fill, line=dict(width=3, color=edge)),
                           showlegend=False, customdata=labels,
                           hovertemplate=f"%{{customdata}}, {name}: %{{x:.3f}}<extra></extra>")
        figure.add_scatter(x=[None], y=[None], mode="markers", name=name,  # the legend names memories, not methods
                           marker=dict(symbol=symbol, size=14, color=INK if memory == "logp_own" else "white",
                                       line=dict(width=3, color=INK)))
    figure.add_annotation(x=1.01, xref="paper", xanchor="left", y=-1, text="<b>own − other</b>", showarrow=False)
    figure.update_yaxes(tickvals=list(range(len(means))), ticktext=labels, zeroline=False,
                        range=[len(means) - 0.4, -1.5])
    figure.update_xaxes(title="log-probability per answer token (nats; further right is better)")
    figure = _finish(figure, "What the answer gains from a memory, and from its own", subtitle,
                     height=280 + 34 * len(means), left=220)
    return figure.update_layout(margin_r=130, legend_traceorder="reversed")


def category_heatmap(table: pd.DataFrame, subtitle: str) -> go.Figure:
    """Retained memory (%) by question category. Columns method, capacity, category (1 to 5), n, value (%)."""
    _require(table, "method", "capacity", "category", "n", "value")
    categories = sorted(table["category"].unique())
    rows = [(method, capacity, group.groupby("category")["value"].mean().reindex(categories))
            for (method, capacity), group in _groups(table, "method", "capacity")]
    values = np.array([row for _, _, row in rows], dtype=float)
    columns = [f"{_text(CATEGORIES.get(category, category))}<br>n={_span(counts)}"
               for category, counts in table.groupby("category")["n"]]
    figure = go.Figure(go.Heatmap(
        z=values, x=list(range(len(columns))), y=list(range(len(rows))), xgap=2, ygap=2,
        colorscale=["#F7FBFF", "#6BAED6"], zmin=min(0.0, np.nanmin(values)),  # light enough for dark text throughout
        texttemplate="%{z:.1f}", textfont=dict(color=INK, size=FONT),
        colorbar=dict(title=dict(text="retained<br>memory (%)<br> ", font_size=FONT), outlinewidth=0)))
    figure.update_xaxes(tickvals=list(range(len(columns))), ticktext=columns, showgrid=False,
                     title="question category")
    figure.update_yaxes(tickvals=list(range(len(rows))), autorange="reversed", showgrid=False, zeroline=False,
                        ticktext=[f"{look_of(method).label}, {_capacity(capacity)}" for method, capacity, _ in rows])
    return _finish(figure, "Retained memory by question category", subtitle, height=260 + 38 * len(rows), left=220)


def loss_curves(history: pd.DataFrame, subtitle: str, window: int | None = None) -> go.Figure:
    """Training loss (nats per answer token), a panel a method: each step faint, the mean of ``window`` steps strong.

    Columns method, capacity, seed, step, loss. ``window`` None: a quarter of the steps, at most 20.
    """
    _require(history, "method", "capacity", "seed", "step", "loss")
    window = window or max(1, min(20, history["step"].nunique() // 4))
    figure, panels = _panels(history)
    for (method, capacity), rows in _groups(history, "method", "capacity"):
        look = look_of(method)
        for _, run in rows.sort_values("step").groupby("seed"):
            _add(figure, panels[method], look, capacity, x=run["step"], y=run["loss"], mode="lines", opacity=0.25,
                 line=dict(color=look.colour, width=1), hoverinfo="skip")
        smooth = rows.groupby("step")["loss"].mean().rolling(window, min_periods=1).mean()
        _add(figure, panels[method], look, capacity, x=smooth.index, y=smooth, mode="lines",
             line=dict(color=look.colour, width=3, dash=fill_of(capacity).dash))
    _label_panels(figure, panels, "optimiser step", "loss (nats per token)")
    _capacity_legend(figure, history, f"running mean of {window} steps", mode="lines")
    return _finish(figure, "Training loss", subtitle, height=_panel_height(panels))


# --- files ------------------------------------------------------------------------------------------------------------

def save(figure: go.Figure, folder: str | Path, stem: str) -> list[Path]:
    """Write one figure as `save_all` does, which is faster for several; the files written."""
    return save_all({stem: figure}, folder)


def save_all(figures: Mapping[str, go.Figure], folder: str | Path) -> list[Path]:
    """Write every figure as <stem>.html, .png and .svg, one browser drawing all the images; the files written.

    The pages share one ``plotly.min.js`` beside them (5 MB, worth a line in .gitignore) and ask for no network; in a
    folder without it a page shows its SVG. Where no browser can be started only the pages are written, with one
    warning that says the mend. Every file is whole or not there, and replaces that of an earlier call.
    """
    folder = Path(folder)
    pages = {folder / f"{stem}.html": _page(stem, figure) for stem, figure in figures.items()}
    for path, text in {folder / "plotly.min.js": get_plotlyjs(), **pages}.items():
        with atomic_path(path) as partial:
            partial.write_text(text, encoding="utf-8")
    images = {folder / f"{stem}.{kind}": figure for stem, figure in figures.items() for kind in ("png", "svg")}
    return [*pages, *images] if _draw(images) else [*pages]


def _page(stem: str, figure: go.Figure) -> str:
    drawing = figure.to_html(full_html=False, include_plotlyjs="directory", div_id=stem, config={"displaylogo": False})
    twin = f'<img src="{escape(stem)}.svg" alt="{escape(stem)}" style="max-width:100%">'
    return (f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{escape(stem)}</title>\n{drawing}\n'
            f"<script>window.Plotly || (document.getElementById({json.dumps(stem)}).outerHTML = {json.dumps(twin)})"
            f"</script><noscript>{twin}</noscript></html>\n")


def _draw(images: Mapping[Path, go.Figure]) -> bool:
    """Draw every image through kaleido; False, with one warning, where that cannot be."""
    try:
        import kaleido
        from kaleido.errors import BrowserClosedError, BrowserFailedError, ChromeNotFoundError
    except ImportError:
        return _no_images("kaleido is not installed; pip install kaleido")
    try:
        with ExitStack() as files:
            kaleido.write_fig_from_object_sync(
                [dict(fig=figure, path=files.enter_context(atomic_path(path)), opts=dict(scale=1.5))
                 for path, figure in images.items()],
                cancel_on_error=True, kopts=dict(mathjax=False))  # MathJax would come from the network
    except (ChromeNotFoundError, BrowserFailedError, BrowserClosedError) as error:
        return _no_images(f"no Chromium could be run ({type(error).__name__}); apt-get install chromium")
    return True


def _no_images(reason: str) -> bool:
    warnings.warn(f"the figures were written as HTML without PNG and SVG: {reason}, then draw them again", stacklevel=4)
    return False


# --- shared parts -----------------------------------------------------------------------------------------------------

def _require(table: pd.DataFrame, *columns: str) -> None:
    if missing := [column for column in columns if column not in table.columns]:
        raise ValueError(f"this figure needs the columns {', '.join(columns)}; missing: {', '.join(missing)}")
    if table.empty:
        raise ValueError("this figure's table is empty: pass at least one run")


def _ordered(table: pd.DataFrame) -> list[str]:
    """The methods of a table: the study's in its order, then any others as they come."""
    present = list(dict.fromkeys(table["method"]))
    return [method for method in REGISTRY if method in present] + [method for method in present if method not in REGISTRY]


def _groups(table: pd.DataFrame, *keys: str) -> Iterator[tuple[tuple, pd.DataFrame]]:
    methods = _ordered(table)
    return iter(sorted(table.groupby(list(keys)), key=lambda group: (methods.index(group[0][0]), *group[0][1:])))


def _panels(table: pd.DataFrame) -> tuple[go.Figure, dict[str, tuple[int, int]]]:
    """An empty figure with a panel a method, three in a row, and each method's (row, column)."""
    methods = _ordered(table)
    columns = min(3, len(methods))
    rows = -(-len(methods) // columns)
    figure = make_subplots(rows=rows, cols=columns, shared_yaxes="all", horizontal_spacing=0.03,
                           vertical_spacing=0.34 / rows if rows > 1 else 0,
                           subplot_titles=[f"<b>{look_of(method).label}</b>" for method in methods])
    return figure, {method: (1 + i // columns, 1 + i % columns) for i, method in enumerate(methods)}


def _panel_height(panels: dict[str, tuple[int, int]]) -> int:
    return 290 + 280 * max(row for row, _ in panels.values())


def _add(figure: go.Figure, place: tuple[int, int], look: Look, capacity: Real, **trace: Any) -> None:
    figure.add_scatter(name=f"{look.label}, {_capacity(capacity)}", legendgroup=f"{capacity}", showlegend=False,
                       row=place[0], col=place[1], **trace)


def _capacity_legend(figure: go.Figure, table: pd.DataFrame, note: str, mode: str) -> None:
    """One neutral legend entry a capacity: the panels' titles name the methods."""
    for capacity in sorted(table["capacity"].unique()):
        fill = fill_of(capacity)
        figure.add_scatter(x=[None], y=[None], mode=mode, legendgroup=f"{capacity}",
                           name=f"capacity {_capacity(capacity)} ({note})",
                           line=dict(color=INK, width=3, dash=fill.dash),
                           marker=dict(color=INK, symbol="circle" + fill.marker, size=11,
                                       line=dict(color=INK, width=2)))


def _label_panels(figure: go.Figure, panels: dict[str, tuple[int, int]], x_title: str, y_title: str) -> None:
    for row, column in panels.values():
        if (row + 1, column) not in panels.values():  # the lowest of its column
            figure.update_xaxes(title=x_title, row=row, col=column)
    figure.update_yaxes(title=y_title, rangemode="tozero", col=1)


def _bar(colour: str, capacity: Real) -> dict:
    return dict(color=colour, line=dict(color=colour, width=2),
                pattern=dict(shape=fill_of(capacity).hatch, fillmode="replace", fgcolor=colour, bgcolor="white", size=9,
                             solidity=0.4))


def _finish(figure: go.Figure, title: str, subtitle: str, height: int = 720, left: int = 90) -> go.Figure:
    """The common frame: title, what was measured under it, legend along the foot, sizes for a projector."""
    lines = [_text(line) for line in wrap(subtitle, 150)]
    head = f"<b>{title}</b>" + "".join(f"<br><span style='font-size:{FONT}px'>{line}</span>" for line in lines)
    figure.update_layout(
        template="plotly_white", width=WIDTH, height=height,
        font=dict(size=FONT, color=INK, family="Arial, sans-serif"),
        title=dict(text=head, font_size=24, x=24 / WIDTH, xref="container", xanchor="left", y=1 - 36 / height,
                   yref="container", yanchor="top"),
        margin=dict(l=left, r=30, t=85 + 31 * len(lines), b=135),
        legend=dict(orientation="h", x=0.5, xref="container", xanchor="center", y=16 / height, yref="container",
                    yanchor="bottom", itemwidth=50))
    figure.update_annotations(font_size=FONT)
    figure.update_xaxes(title_font_size=FONT, automargin=False, zeroline=False)
    figure.update_yaxes(title_font_size=FONT, ticklabelstandoff=6)
    return figure


def _text(value: Any) -> str:
    """Text from data as plotly shows it literally; plotly reads tags and these three entities, no quotes' entities."""
    return escape(str(value), quote=False)


def _capacity(capacity: Real) -> str:
    return f"{capacity:g}×"


def _span(counts: pd.Series) -> str:
    low, high = int(counts.min()), int(counts.max())
    return f"{low}" if low == high else f"{low}–{high}"


def _signed(value: float) -> str:
    return "n/a" if np.isnan(value) else f"{value:+.3f}".replace("-", "−")
