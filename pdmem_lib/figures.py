"""Figures of the study: tidy tables in, `plotly.graph_objects.Figure` out; nothing is shown and no file is read.

Tables carry one row a point with ``method`` (its name in code) and ``capacity`` (1, 10), and ``seed`` where there are
several: lines and bars are then means over the seeds, the seeds themselves dots. A method keeps one colour and one
marker in every figure, a capacity one dash, filling and hatch, so that no reading rests on colour alone. Text from data
is escaped. ``subtitle`` names what was measured: backbone, preset, data, seeds. A missing column or an empty table is a
ValueError that names it. Those that weigh the evidence are written in `evidence_figures` and `control_figures`, those of
the data in `data_figures`, and offered here too. Those of a single memory are in `memory_figures`, `reading_figures` and
`causal_figures`.
"""

import json
import warnings
from base64 import b64encode
from collections.abc import Mapping
from html import escape
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from ._plot import (FONT, INK, SEED, WIDTH, add_to_panel, bar_style, capacity_legend, fill_of, finish, groups,
                    label_panels, literal, look_of, lower_labels, method_panels, ordered, panel_height, require, span,
                    times)
from .causal_figures import attention_by_head, effect_bars, turn_changes
from .control_figures import (MEMORIES, controls_chart, crowding, evidence_by_stage, log_probability_bars,
                              reference_points)
from .data_figures import how_far_back, lags_by_category, session_timeline
from .diagrams import block_diagram
from .evidence_figures import (breakdown, clipping, effect_intervals, noise_floor_bars, null_distribution,
                               published_against_ours, recall_curves, turn_finding)
from .files import atomic_path
from .images import Drawer, NoImages
from .locomo import CATEGORIES
from .memory_figures import (bank_spread, effective_rank, hebbian_matrix, nearest_tokens, nearest_tokens_of,
                             provenance_map, slot_map, slot_usage)
from .metrics import LAG_BUCKETS
from .reading_figures import (answer_map, attention_by_block, attention_to_entries, gates, token_gain,
                              turn_scores_bars)

__all__ = ["MEMORIES", "WIDTH", "answer_map", "attention_by_block", "attention_by_head", "attention_to_entries",
           "bank_spread", "block_diagram", "breakdown", "category_heatmap", "clipping", "controls_chart", "crowding",
           "effect_bars", "effect_intervals", "effective_rank", "evidence_by_stage", "fill_of", "forgetting_curves", "gates",
           "hebbian_matrix", "how_far_back", "knowledge_curves", "lags_by_category", "log_probability_bars", "look_of",
           "loss_curves", "nearest_tokens", "nearest_tokens_of", "noise_floor_bars", "null_distribution", "picture",
           "provenance_map", "published_against_ours", "recall_curves", "reference_points", "retained_bars", "save",
           "save_all", "session_timeline", "slot_map", "slot_usage", "token_gain", "turn_changes", "turn_finding",
           "turn_scores_bars"]

# --- the figures ------------------------------------------------------------------------------------------------------

def forgetting_curves(table: pd.DataFrame, subtitle: str, score: str = "retained memory (%)") -> go.Figure:
    """Retained memory (%) by lag, a panel a method. Columns method, capacity, seed, bucket, n, raw, smoothed (%).

    Columns low and high, where there are any, give the raw values 95 % intervals (`estimates.bucket_intervals`).
    ``score`` names what was averaged, where that is another difference.
    """
    require(table, "method", "capacity", "seed", "bucket", "n", "raw", "smoothed")
    buckets = list(dict.fromkeys([*(bucket.label for bucket in LAG_BUCKETS), *table["bucket"]]))
    table = table.assign(x=table["bucket"].map(buckets.index))
    figure, panels = method_panels(table)
    capacities = sorted(table["capacity"].unique())
    for (method, capacity), rows in groups(table, "method", "capacity"):
        look, fill = look_of(method), fill_of(capacity)
        smoothed = rows.groupby("x")["smoothed"].mean()
        aside = 0.16 * (capacities.index(capacity) - (len(capacities) - 1) / 2)  # so that marks do not hide each other
        add_to_panel(figure, panels[method], look, capacity, x=smoothed.index, y=smoothed, mode="lines",
                     line=dict(color=look.colour, width=3, dash=fill.dash))
        add_to_panel(figure, panels[method], look, capacity, x=rows["x"] + aside, y=rows["raw"], mode="markers",
                     marker=dict(color=look.colour, symbol=look.symbol + fill.marker, size=11,
                                 line=dict(color=look.colour, width=2)), error_y=_interval(rows),
                     cliponaxis=False, opacity=0.45 if rows["seed"].nunique() > 1 else 1)
    for method, (row, column) in panels.items():
        counts = table[table["method"] == method].groupby("x")["n"]
        ticks = [f"{literal(bucket)}<br>n={span(counts.get_group(x))}" if x in counts.groups else literal(bucket)
                 for x, bucket in enumerate(buckets)]
        figure.update_xaxes(tickvals=list(range(len(buckets))), ticktext=ticks, tickangle=0,
                            range=[-0.5, len(buckets) - 0.5], row=row, col=column)
    label_panels(figure, panels, "lag between evidence and question (turns)", literal(score))
    if (table[["raw", "smoothed"]] < 0).any(axis=None):
        figure.add_hline(y=0, line=dict(color=INK, width=1.5))
    marks = "marks raw, bars 95 %" if {"low", "high"} <= set(table) else "marks raw"
    capacity_legend(figure, table, f"isotonic fit, {marks}", mode="lines+markers")
    return finish(figure, "Forgetting curves", subtitle, height=panel_height(panels))


def _interval(rows: pd.DataFrame) -> dict | None:
    """Error bars from the columns low to high about raw; None without them."""
    if not {"low", "high"} <= set(rows):
        return None
    return dict(type="data", symmetric=False, array=rows["high"] - rows["raw"], arrayminus=rows["raw"] - rows["low"],
                thickness=2, width=5)


def retained_bars(summary: pd.DataFrame, subtitle: str) -> go.Figure:
    """Retained memory by method and capacity: `metrics.printed_mean`, the mean of the buckets.

    Columns method, capacity, retained_mean (%), seed if several.
    """
    require(summary, "method", "capacity", "retained_mean")
    figure, methods, capacities = go.Figure(), ordered(summary), sorted(summary["capacity"].unique())
    width = 0.84 / len(capacities)
    for (method, capacity), rows in groups(summary, "method", "capacity"):
        look, mean, top = look_of(method), rows["retained_mean"].mean(), rows["retained_mean"].max()
        x = methods.index(method) + width * (capacities.index(capacity) - (len(capacities) - 1) / 2)
        figure.add_bar(x=[x], y=[mean], width=0.9 * width, name=look.label, showlegend=False,
                       marker=bar_style(look.colour, fill_of(capacity)),
                       hovertemplate=f"{look.label}, {times(capacity)}: %{{y:.2f}} %<extra></extra>")
        if len(rows) > 1:
            figure.add_scatter(x=[x] * len(rows), y=rows["retained_mean"], mode="markers", marker=SEED,
                               name="one seed", showlegend=False)
        figure.add_annotation(x=x, y=top, yshift=16, text=f"{mean:.1f}", showarrow=False)
    if len(summary) > summary.groupby(["method", "capacity"]).ngroups:
        figure.add_scatter(x=[None], y=[None], mode="markers", name="one seed", marker=SEED)
    for capacity in capacities:
        figure.add_bar(x=[None], y=[None], name=f"capacity {times(capacity)}", marker=bar_style(INK, fill_of(capacity)))
    figure.update_xaxes(tickvals=list(range(len(methods))), showgrid=False,
                        ticktext=[look_of(method).label.replace(" ", "<br>", 1) for method in methods])
    figure.update_yaxes(title="retained memory, mean of the buckets (%)", rangemode="tozero")
    return finish(figure, "Retained memory by method and capacity", subtitle)


def knowledge_curves(table: pd.DataFrame, subtitle: str) -> go.Figure:
    """K, the mean F1 (%) after each session, a panel a capacity. Columns method, capacity, seed, session, n, K (%)."""
    require(table, "method", "capacity", "seed", "session", "n", "K")
    capacities = sorted(table["capacity"].unique())
    figure = make_subplots(rows=1, cols=len(capacities), shared_yaxes=True, horizontal_spacing=0.03,
                           subplot_titles=[f"<b>capacity {times(capacity)}</b>" for capacity in capacities])
    named: set[str] = set()  # a method stands in the legend once
    for (method, capacity), rows in groups(table, "method", "capacity"):
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
    ticks = [f"{session:g}<br>n={span(counts.get_group(session))}" for session in shown]
    figure.update_xaxes(tickvals=shown, ticktext=ticks, title="session (n questions asked by then)")
    lower_labels(figure)
    figure.update_yaxes(title="K, mean F1 (%)", rangemode="tozero", col=1)
    return finish(figure, "Knowledge curves", subtitle).update_layout(
        margin=dict(r=230, b=100), legend=dict(orientation="v", x=1.01, xref="paper", xanchor="left", y=1, yref="paper",
                                               yanchor="top", itemwidth=40))


def category_heatmap(table: pd.DataFrame, subtitle: str) -> go.Figure:
    """Retained memory (%) by question category. Columns method, capacity, category (1 to 5), n, value (%)."""
    require(table, "method", "capacity", "category", "n", "value")
    categories = sorted(table["category"].unique())
    rows = [(method, capacity, group.groupby("category")["value"].mean().reindex(categories))
            for (method, capacity), group in groups(table, "method", "capacity")]
    values = np.array([row for _, _, row in rows], dtype=float)
    columns = [f"{literal(CATEGORIES.get(category, category))}<br>n={span(counts)}"
               for category, counts in table.groupby("category")["n"]]
    figure = go.Figure(go.Heatmap(
        z=values, x=list(range(len(columns))), y=list(range(len(rows))), xgap=2, ygap=2,
        colorscale=["#F7FBFF", "#6BAED6"], zmin=min(0.0, np.nanmin(values)),  # light enough for dark text throughout
        texttemplate="%{z:.1f}", textfont=dict(color=INK, size=FONT),
        colorbar=dict(title=dict(text="retained<br>memory (%)<br> ", font_size=FONT), outlinewidth=0, nticks=5,
                      lenmode="pixels", len=max(200, 38 * len(rows)), y=1, yanchor="top")))  # longer than two rows are high
    figure.update_xaxes(tickvals=list(range(len(columns))), ticktext=columns, showgrid=False,
                     title="question category")
    figure.update_yaxes(tickvals=list(range(len(rows))), autorange="reversed", showgrid=False, zeroline=False,
                        ticktext=[f"{look_of(method).label}, {times(capacity)}" for method, capacity, _ in rows])
    return finish(figure, "Retained memory by question category", subtitle, height=max(336, 260 + 38 * len(rows)), left=220)


def loss_curves(history: pd.DataFrame, subtitle: str, window: int | None = None,
                unit: str = "nats per token") -> go.Figure:
    """Training loss in ``unit``, a panel a method: each step faint, the mean of ``window`` steps strong.

    Columns method, capacity, seed, step, loss. ``window`` None: a quarter of the steps, at most 20.
    """
    require(history, "method", "capacity", "seed", "step", "loss")
    window = window or max(1, min(20, history["step"].nunique() // 4))
    figure, panels = method_panels(history)
    for (method, capacity), rows in groups(history, "method", "capacity"):
        look = look_of(method)
        for _, run in rows.sort_values("step").groupby("seed"):
            add_to_panel(figure, panels[method], look, capacity, x=run["step"], y=run["loss"], mode="lines",
                         line=dict(color=look.colour, width=1), opacity=0.25, hoverinfo="skip")
        smooth = rows.groupby("step")["loss"].mean().rolling(window, min_periods=1).mean()
        add_to_panel(figure, panels[method], look, capacity, x=smooth.index, y=smooth, mode="lines",
                     line=dict(color=look.colour, width=3, dash=fill_of(capacity).dash))
    label_panels(figure, panels, "optimiser step", f"loss ({unit})")
    capacity_legend(figure, history, f"running mean of {window} steps", mode="lines")
    return finish(figure, "Training loss", subtitle, height=panel_height(panels))


# --- notebooks --------------------------------------------------------------------------------------------------------

def show_everywhere(colours: int = 64) -> None:
    """Let notebooks show figures as plotly's own and, where a Chromium is found, as a PNG beside, for pages without
    JavaScript. The PNG has so many ``colours``, which makes it five times smaller: a notebook may hold many figures.
    Plotly's own takes the width that the page has (`fluid`), the PNG shrinks with it."""
    import plotly.io
    from choreographer.browsers.chromium import Chromium
    from plotly.io.base_renderers import MimetypeRenderer, PlotlyRenderer

    class Fluid(PlotlyRenderer):
        def to_mimebundle(self, fig_dict: dict) -> dict:
            return super().to_mimebundle({**fig_dict, "layout": fluid(fig_dict["layout"])})

    class SmallPng(MimetypeRenderer):
        def __init__(self):
            self.drawer = Drawer()  # one browser for all figures

        def to_mimebundle(self, fig_dict: dict) -> dict[str, str]:
            from PIL import Image

            try:
                image = Image.open(BytesIO(self.drawer.draw(fig_dict)))
            except NoImages as error:
                plotly.io.renderers.default = "fluid"
                self.drawer.close()
                warnings.warn(f"no more figures are shown as PNG: {error}", stacklevel=2)
                return {}
            small = BytesIO()
            palette = image.convert("RGB").quantize(colours, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
            palette.save(small, "PNG", optimize=True)  # MAXCOVERAGE keeps the text's colour beside large areas
            return {"image/png": b64encode(small.getvalue()).decode()}

    plotly.io.renderers["fluid"] = Fluid()
    plotly.io.renderers.default = "fluid"
    if "small_png" in plotly.io.renderers:  # called before
        plotly.io.renderers["small_png"].drawer.close()
    if Chromium.find_browser(skip_local=False):
        plotly.io.renderers["small_png"] = SmallPng()
        plotly.io.renderers.default = "fluid+small_png"


def fluid(layout: dict) -> dict:
    """A figure's layout, as a dict, with the width left to the page: a notebook's column may be narrower than a slide."""
    return {key: value for key, value in layout.items() if key != "width"} | {"autosize": True}


def picture(figure: go.Figure) -> dict[str, str]:
    """{"image/png": base64} as `show_everywhere` puts it beside a figure; {} where it was not called or has no browser."""
    import plotly.io

    on = "small_png" in str(plotly.io.renderers.default)
    return plotly.io.renderers["small_png"].to_mimebundle(figure.to_dict()) if on else {}


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
    """Draw every image; False, with one warning, where that cannot be."""
    try:
        with Drawer() as drawer:
            drawn = {path: drawer.draw(figure, path.suffix[1:], scale=1.5) for path, figure in images.items()}
    except NoImages as error:
        warnings.warn(f"the figures were written as HTML without PNG and SVG: {error}, then draw them again", stacklevel=3)
        return False
    for path, image in drawn.items():
        with atomic_path(path) as partial:
            partial.write_bytes(image)
    return True
