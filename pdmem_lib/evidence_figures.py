"""Figures that weigh the evidence for a memory: effects with intervals, noise, where it comes from, the sanity task.

The rules of `figures`, which offers these functions too: tidy tables in, `plotly.graph_objects.Figure` out. Intervals,
p-values and chance levels are computed elsewhere and only drawn here; one that is NaN leaves its mark out. Unless a
function says otherwise a table has one row a method and capacity, and anything else is a ValueError.
"""

from textwrap import wrap

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import ArrayLike
from plotly.subplots import make_subplots

from ._plot import (FONT, GREY, INK, NEUTRAL, Fill, Look, add_to_panel, band, bar_style, dot_style, fill_of, finish, groups,
                    label_panels, legend_entry, literal, look_of, mark_rows, method_panels, panel_height, require,
                    row_margin, rows_of, signed, span, text_width, times)
from .locomo import CATEGORIES
from .metrics import LAG_BUCKETS

CLIPPED, UNCLIPPED = "#D55E00", "#0072B2"
SCORES = {"logp": ("log-probability per answer token", 3), "f1": ("F1", 1)}  # score: (name, digits printed)
KINDS = {"lag bucket": "lag (turns since the evidence)", "category": "question category",
         "session distance": "sessions since the evidence", "evidence count": "turns of evidence",
         "answer type": "kind of answer"}
RECALL_AXES = {"lag": "lag (turns since the fact)", "load": "load (facts in the memory)",
               "interference": "interference (like turns since)"}
RECALLED = {  # column: (name, line)
    "chance": ("chance", dict(width=2, dash="dashdot")),
    "trace_theory": ("trace in theory", dict(width=2, dash="dash")),
    "trace": ("trace left in the state", dict(width=0)),
    "probe": ("probe of the state", dict(width=2.5, dash="dot")),
    "accuracy": ("answered, 95 %", dict(width=3)),
}
KNOWN_ORDER = [*(bucket.label for bucket in LAG_BUCKETS), *CATEGORIES.values()]


# --- is there an effect -----------------------------------------------------------------------------------------------

def effect_intervals(table: pd.DataFrame, subtitle: str) -> go.Figure:
    """One contrast on one score: effect, its 95 % intervals, and what a sample of this size could have shown.

    Columns method, capacity, contrast ("own - other"), score ("logp", "f1"), unit, n, conversations, seeds, effect,
    low, high (by question), low_clustered, high_clustered (by conversation), p, smallest_effect, verdict (printed as it
    stands). ValueError for several contrasts or scores: one figure each.
    """
    require(table, "method", "capacity", "contrast", "score", "unit", "n", "conversations", "seeds", "effect", "low",
            "high", "low_clustered", "high_clustered", "p", "smallest_effect", "verdict")
    contrast, score, unit = (_single(table, column) for column in ("contrast", "score", "unit"))
    contrast, unit = literal(contrast).replace(" - ", " − "), literal(unit)
    name, digits = SCORES.get(score, (literal(score), 3))
    rows, figure = rows_of(table), go.Figure()
    hidden = dict(color="#D9D9D9", line=dict(color=GREY, width=1))
    whisker = dict(mode="lines+markers", line=dict(color=INK, width=2),
                   marker=dict(symbol="line-ns", size=14, line=dict(color=INK, width=2)))
    for y, label, look, fill, row in rows:
        quiet = dict(showlegend=False, hoverinfo="skip")
        if row["smallest_effect"] > 0:  # not where it is NaN
            figure.add_bar(x=[2 * row["smallest_effect"]], base=[-row["smallest_effect"]], y=[y], orientation="h",
                           width=0.8, marker=hidden, **quiet)
        figure.add_scatter(x=[row["low"], row["high"]], y=[y, y], mode="lines", line=dict(color=look.colour, width=11),
                           **quiet)
        figure.add_scatter(x=[row["low_clustered"], row["high_clustered"]], y=[y, y], **whisker, **quiet)
        figure.add_scatter(x=[row["effect"]], y=[y], mode="markers", name=label, showlegend=False,
                           marker=dict(symbol=look.symbol, size=13, color="white", line=dict(color=INK, width=2)),
                           hovertemplate=f"{label}: %{{x:.{digits}f}} {unit}<br>{row['n']:g} questions, "
                                         f"{row['conversations']:g} conversations, seeds: {row['seeds']:g}"
                                         "<extra></extra>")
    legend_entry(figure, "effect", marker=dict(symbol="circle", size=13, color="white", line=dict(color=INK, width=2)))
    legend_entry(figure, "95 % by question", mode="lines", line=dict(color=GREY, width=11))
    legend_entry(figure, "95 % by conversation", **whisker)
    figure.add_bar(x=[None], y=[None], name="too small for this sample", marker=hidden)
    figure.add_vline(x=0, line=dict(color=INK, width=2))
    mark_rows(figure, rows, {"effect": [signed(row.values["effect"], digits) for row in rows],
                             "p": [_p(row.values["p"]) for row in rows],
                             "verdict": [literal(row.values["verdict"]) for row in rows]}, [16, 104, 182])
    figure.update_xaxes(title=f"{contrast}, {name} ({unit})<br>{span(table['n'])} questions, "
                              f"{span(table['conversations'])} conversations, seeds: {span(table['seeds'])}")
    figure.update_layout(barmode="overlay")
    return finish(figure, f"What a memory adds: {contrast}", subtitle, 330 + 38 * len(rows), row_margin(rows),
                  right=330, foot=155)


def noise_floor_bars(table: pd.DataFrame, subtitle: str) -> go.Figure:
    """The published score beside what noise alone would score, and the difference before anything was clipped.

    Columns method, capacity, retained_mean (%), noise_mean, noise_high (%: mean and 95th percentile of a model that
    remembers nothing), delta_f1 (points).
    """
    require(table, "method", "capacity", "retained_mean", "noise_mean", "noise_high", "delta_f1")
    rows = rows_of(table)
    figure = make_subplots(rows=1, cols=2, shared_yaxes=True, column_widths=[0.62, 0.38], horizontal_spacing=0.04)
    floor = dict(color="rgba(60,60,60,0.3)", line=dict(color=INK, width=2))
    for y, label, look, fill, row in rows:
        left, right = (dict(row=1, col=column, y=[y], showlegend=False) for column in (1, 2))
        figure.add_bar(x=[row["retained_mean"]], width=0.5, orientation="h", marker=bar_style(look.colour, fill),
                       hovertemplate=f"{label}: %{{x:.2f}} %<extra></extra>", name=label, **left)
        figure.add_bar(x=[row["noise_high"] - row["noise_mean"]], base=[row["noise_mean"]], width=0.84, orientation="h",
                       marker=floor, hoverinfo="skip", **left)
        figure.add_bar(x=[row["delta_f1"]], width=0.12, orientation="h", marker=dict(color=look.colour),
                       hoverinfo="skip", **right)
        figure.add_scatter(x=[row["delta_f1"]], mode="markers", marker=dot_style(look, fill), name=label,
                           hovertemplate=f"{label}: %{{x:+.2f}} points<extra></extra>", **right)
    figure.add_bar(x=[None], y=[None], name="published score", marker=dict(color=GREY))
    figure.add_bar(x=[None], y=[None], name="what noise alone scores: mean to 95th percentile", marker=floor)
    figure.add_vline(x=0, line=dict(color=INK, width=2), row=1, col=2)
    mark_rows(figure, rows, {"score": [f"{row.values['retained_mean']:.1f}" for row in rows],
                             "noise": ["{noise_mean:.1f}–{noise_high:.1f}".format(**row.values) for row in rows],
                             "ΔF1": [signed(row.values["delta_f1"], 1) for row in rows]}, [16, 84, 172])
    figure.update_xaxes(title="retained memory, mean of the buckets (%)", rangemode="tozero", row=1, col=1)
    figure.update_xaxes(title="own − zero, unclipped ΔF1 (points)", row=1, col=2)
    figure.update_layout(barmode="overlay")
    return finish(figure, "Retained memory against the noise floor", subtitle, 300 + 38 * len(rows), row_margin(rows),
                  right=235)


def clipping(differences: ArrayLike, unclipped: ArrayLike, published: ArrayLike, subtitle: str,
             effect: float = 0.0) -> go.Figure:
    """What clipping makes of differences in F1: one study's questions, and the scores of many studies like it.

    ``differences`` (Q,) own - zero of one study, ``unclipped`` (R,) and ``published`` (R,) the two scores of R studies,
    that one first, ``effect`` the true mean: all fractions, drawn in points (`estimates.simulate_clipping`). ValueError
    for values that are not finite, or unequal numbers of scores.
    """
    d, plain, clipped = (100 * np.asarray(values, dtype=float).ravel() for values in (differences, unclipped, published))
    same = len(plain) == len(clipped)
    if not len(d) or not len(plain) or not same or not np.isfinite([*d, *plain, *clipped, effect]).all():
        raise ValueError("this figure needs differences and as many published scores as unclipped ones, all finite")
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.08, subplot_titles=[
        f"<b>one study: {len(d)} questions</b>", f"<b>{len(plain)} studies like it</b>"])
    lost = dict(color="white", line=dict(color=GREY, width=2))
    kept = dict(color=CLIPPED, line=dict(color="white", width=1))
    for x, count, width in _bars(d, np.ptp(d) / 24):
        figure.add_bar(x=[x], y=[count], width=[width], showlegend=False, marker=lost if x < 0 else kept, row=1, col=1,
                       hovertemplate="%{x:.1f} points: %{y} questions<extra></extra>")
    figure.add_bar(x=[None], y=[None], name="below zero: clipped away", marker=lost)
    figure.add_bar(x=[None], y=[None], name="zero and above: kept", marker=kept)
    step = np.ptp([*plain, *clipped]) / 30
    for name, values, look in (("unclipped mean", plain, dict(color=UNCLIPPED, dash="dash")),
                               ("published score", clipped, dict(color=CLIPPED, dash="solid"))):
        for x, count, width in _bars(values, step):
            figure.add_bar(x=[x], y=[count], width=[width], showlegend=False, opacity=0.5, row=1, col=2,
                           marker=dict(color=look["color"], line=dict(color="white", width=1)),
                           hovertemplate=f"{name} about %{{x:.2f}} points: %{{y}} studies<extra></extra>")
        for column in (1, 2):  # the study on the left, in both
            figure.add_vline(x=values[0], line=dict(width=4, **look), row=1, col=column)
        figure.add_scatter(x=[None], y=[None], mode="lines", name=f"{name} of the study: {signed(values[0], 1)}",
                           line=dict(width=4, **look))
    figure.add_vline(x=100 * effect, line=dict(color=INK, width=2, dash="dot"), row=1, col=2)
    legend_entry(figure, f"truth: {signed(100 * effect, 1)}", "lines", line=dict(color=INK, width=2, dash="dot"))
    figure.update_xaxes(title="difference in F1, own − zero (points)", row=1, col=1)
    figure.update_xaxes(title="score of a study (points)", row=1, col=2)
    figure.update_yaxes(title="questions", row=1, col=1)
    figure.update_yaxes(title="studies", row=1, col=2)
    figure.update_layout(barmode="overlay")
    return finish(figure, "What clipping does to noise", subtitle, 640, foot=150)


def _bars(values: np.ndarray, step: float) -> list[tuple[float, int, float]]:
    """Centre, count and width of bars ``step`` wide, none of which holds values on both sides of 0."""
    step = step or 0.1  # where all values are alike
    low = np.floor(values / step).astype(int)
    return [((k + 0.5) * step, int((low == k).sum()), step) for k in np.unique(low)]


def published_against_ours(table: pd.DataFrame, subtitle: str, theirs: str = "published",
                           ours: str = "ours") -> go.Figure:
    """What was printed elsewhere beside what was measured here, the retained-memory score by method and capacity.

    Columns method, capacity, published_low, published_high (%: a range; without low all below high, without both no
    number), printed (its wording), retained_mean (%: ours; NaN: not run), noise_high (%: what noise alone scores in our
    run, 95th percentile). ``theirs`` and ``ours`` name the two for the legend, backbones included: they differ.
    """
    require(table, "method", "capacity", "published_low", "published_high", "printed", "retained_mean", "noise_high")
    rows, figure = rows_of(table), go.Figure()
    said = dict(color="rgba(60,60,60,0.25)", line=dict(color=INK, width=1))
    noise = dict(symbol="line-ns", size=26, line=dict(color=INK, width=3))
    ours_text = []
    for y, label, look, fill, row in rows:
        quiet = dict(y=[y], showlegend=False)
        low = 0 if np.isnan(row["published_low"]) else row["published_low"]
        if not np.isnan(row["published_high"]):
            figure.add_bar(x=[row["published_high"] - low], base=[low], orientation="h", width=0.62, marker=said,
                           hovertemplate=f"{label}, {literal(theirs)}: {literal(row['printed'])}<extra></extra>",
                           **quiet)
        figure.add_scatter(x=[row["noise_high"]], mode="markers", marker=noise, hoverinfo="skip", **quiet)
        figure.add_scatter(x=[row["retained_mean"]], mode="markers", marker=dot_style(look, fill), name=label,
                           hovertemplate=f"{label}, {literal(ours)}: %{{x:.2f}} %<extra></extra>", **quiet)
        ours_text.append("not run" if np.isnan(row["retained_mean"]) else f"{row['retained_mean']:.1f} %")
    figure.add_bar(x=[None], y=[None], name=literal(theirs), marker=said)
    legend_entry(figure, literal(ours), marker=dot_style(NEUTRAL, fill_of(1)))
    legend_entry(figure, "noise alone would score less (95 %)", marker=noise)
    mark_rows(figure, rows, {"published": [literal(row.values["printed"]) for row in rows], "ours": ours_text},
              [16, 40 + max(90, *(int(text_width(row.values["printed"])) for row in rows))])
    figure.update_xaxes(title="retained memory (%)", rangemode="tozero")
    figure.update_layout(barmode="overlay")
    aside = 130 + max(90, *(int(text_width(row.values["printed"])) for row in rows))
    return finish(figure, "Published, and ours", subtitle, 330 + 34 * len(rows), row_margin(rows), right=aside)


def null_distribution(values: ArrayLike, observed: float, subtitle: str, title: str, x_title: str) -> go.Figure:
    """What was observed among the values simulated under the null, (S,), with the share of them at least as high.

    ValueError without any value, or for one that is not finite.
    """
    values = np.asarray(values, dtype=float).ravel()
    if not len(values) or not np.isfinite([*values, observed]).all():
        raise ValueError("this figure needs at least one simulated value, and all of them and the observed one finite")
    high = int((values >= observed).sum())
    counts, edges = np.histogram(values, bins=min(60, max(10, int(np.sqrt(len(values))))))
    figure = go.Figure(go.Bar(x=(edges[:-1] + edges[1:]) / 2, y=counts, width=np.diff(edges), showlegend=False,
                              marker=dict(color="#9DB8CC", line=dict(color="white", width=1)),
                              hovertemplate="%{x:.4g}: %{y}<extra></extra>"))
    figure.add_scatter(x=[observed, observed], y=[0, 1.12 * counts.max()], mode="lines", showlegend=False,
                       line=dict(color=INK, width=4), name="observed", hovertemplate="observed %{x:.4g}<extra></extra>")
    right = observed > (min(edges[0], observed) + max(edges[-1], observed)) / 2
    figure.add_annotation(x=observed, y=1.12 * counts.max(), xanchor="right" if right else "left", showarrow=False,
                          xshift=-10 if right else 10, yanchor="bottom", align="right" if right else "left",
                          bgcolor="white",
                          text=f"<b>observed {observed:.3g}</b><br>".replace("-", "−")
                               + f"{high:,} of {len(values):,} simulated at least as high")
    figure.update_yaxes(title="simulated values (count)", range=[0, 1.34 * counts.max()])
    figure.update_xaxes(title=literal(x_title))
    return finish(figure, literal(title), subtitle, foot=85)


# --- where it comes from ----------------------------------------------------------------------------------------------

def breakdown(table: pd.DataFrame, subtitle: str, unit: str = "nats per token") -> go.Figure:
    """own − other among questions of one kind, with 95 % intervals: a panel a kind, methods side by side.

    Columns method, capacity, kind (of `KINDS`, or another), value (its label), n, effect, low, high; one row each. Pass
    one kind alone where several methods and many values crowd a panel: it takes the whole width.
    """
    require(table, "method", "capacity", "kind", "value", "n", "effect", "low", "high")
    kinds = list(dict.fromkeys(table["kind"]))
    columns = min(2, len(kinds))
    lines = -(-len(kinds) // columns)
    figure = make_subplots(rows=lines, cols=columns, shared_yaxes="all", horizontal_spacing=0.03,
                           vertical_spacing=0.36 / lines,
                           subplot_titles=[f"<b>{literal(KINDS.get(kind, kind))}</b>" for kind in kinds])
    series = [key for key, _ in groups(table, "method", "capacity")]
    step = 0.84 / len(series)
    for number, kind in enumerate(kinds):
        place, part = dict(row=1 + number // columns, col=1 + number % columns), table[table["kind"] == kind]
        values = [*dict.fromkeys(part["value"])]
        values.sort(key=lambda value: KNOWN_ORDER.index(value) if value in KNOWN_ORDER else len(KNOWN_ORDER))
        for (method, capacity), rows in groups(part, "method", "capacity"):
            look = look_of(method)
            if rows["value"].duplicated().any():
                raise ValueError(f"this figure takes one row a method, capacity, kind and value; {method} at "
                                 f"{times(capacity)} has several for one {kind}")
            aside = step * (series.index((method, capacity)) - (len(series) - 1) / 2)
            figure.add_scatter(x=rows["value"].map(values.index) + aside, y=rows["effect"], mode="markers",
                               name=f"{look.label}, {times(capacity)}", showlegend=False,
                               marker=dot_style(look, fill_of(capacity), 8), customdata=rows["value"].map(literal),
                               error_y=dict(array=rows["high"] - rows["effect"], thickness=2, width=0,
                                            arrayminus=rows["effect"] - rows["low"], color=look.colour),
                               hovertemplate=f"{look.label}, {times(capacity)}, %{{customdata}}: %{{y:.3f}}"
                                             "<extra></extra>", **place)
        for edge in range(1, len(values)):
            figure.add_vline(x=edge - 0.5, line=dict(color="#CCCCCC", width=1), **place)
        letters = max(6, int(1100 / columns / len(values) / (0.54 * FONT)))  # that fit under one value
        counts = part.groupby("value")["n"]
        ticks = ["<br>".join([*map(literal, wrap(str(value), letters)), f"n={span(counts.get_group(value))}"])
                 for value in values]
        figure.update_xaxes(tickvals=list(range(len(values))), ticktext=ticks, tickangle=0, showgrid=False,
                            range=[-0.5, len(values) - 0.5], **place)
    figure.add_hline(y=0, line=dict(color=INK, width=2))
    for method in dict.fromkeys(method for method, _ in series):
        legend_entry(figure, look_of(method).label, marker=dot_style(look_of(method), fill_of(1), 11))
    for capacity in sorted(table["capacity"].unique()):
        legend_entry(figure, f"capacity {times(capacity)}", marker=dot_style(NEUTRAL, fill_of(capacity), 11))
    figure.update_yaxes(title=f"own − other<br>({literal(unit)})", col=1)
    return finish(figure, "own − other by kind of question", subtitle,
                  270 + (285 if lines > 1 else 380) * lines, foot=165)


def turn_finding(table: pd.DataFrame, subtitle: str) -> go.Figure:
    """Does the memory point at the turn that holds the evidence? Its mean reciprocal rank, beside two that do not know.

    Columns method, capacity, n, mrr, low, high (95 %), chance, others (the same evidence ranked by the attention of
    other questions); all ranks in [0, 1].
    """
    require(table, "method", "capacity", "n", "mrr", "low", "high", "chance", "others")
    rows, figure = rows_of(table), go.Figure()
    chance = dict(symbol="line-ns", size=24, line=dict(color=INK, width=3))
    for y, label, look, _, row in rows:
        figure.add_scatter(x=[row["low"], row["high"]], y=[y, y], mode="lines", showlegend=False, hoverinfo="skip",
                           line=dict(color=look.colour, width=4))
        for column, name, marker in (("chance", "chance", chance),
                                     ("others", "other questions' attention", _ring(look)),
                                     ("mrr", "its own attention", dot_style(look, fill_of(1), 10))):
            figure.add_scatter(x=[row[column]], y=[y], mode="markers", marker=marker, name=label, showlegend=False,
                               hovertemplate=f"{label}, {name}: %{{x:.3f}}<extra></extra>")
    legend_entry(figure, "the question's own attention, 95 %", mode="lines+markers", line=dict(color=INK, width=4),
                 marker=dot_style(NEUTRAL, fill_of(1), 10))
    legend_entry(figure, "other questions' attention", marker=_ring(NEUTRAL))
    legend_entry(figure, "chance", marker=chance)
    mark_rows(figure, rows, {"MRR": [f"{row.values['mrr']:.3f}" for row in rows],
                             "own − others": [signed(row.values["mrr"] - row.values["others"]) for row in rows],
                             "n": [f"{row.values['n']:g}" for row in rows]}, [16, 86, 226])
    figure.update_xaxes(title="mean reciprocal rank of the evidence turn (0 to 1; 1: always first)",
                     range=[0, 1.05 * np.nanmax(table[["mrr", "high", "chance", "others"]])])
    return finish(figure, "Does the memory find the turn?", subtitle, 300 + 38 * len(rows), row_margin(rows), right=290)


def recall_curves(table: pd.DataFrame, subtitle: str, axis: str = "lag") -> go.Figure:
    """The sanity task, a panel a method: what is recalled, what a probe finds in the memory, what trace is left.

    Columns method, capacity, axis (of `RECALL_AXES`), x, accuracy, low, high (95 %), chance, probe, trace,
    trace_theory; all scores in [0, 1]. ``axis`` picks the rows. Here the dash tells the quantity; a capacity keeps
    its marker.
    """
    require(table, "method", "capacity", "axis", "x", "accuracy", "low", "high", "chance", "probe", "trace",
            "trace_theory")
    table = table[table["axis"] == axis]
    if axis not in RECALL_AXES or table.empty:
        raise ValueError(f"axis is one of {', '.join(RECALL_AXES)} with rows in the table, got {axis!r}")
    figure, panels = method_panels(table)
    for (method, capacity), rows in groups(table, "method", "capacity"):
        look, fill, rows = look_of(method), fill_of(capacity), rows.sort_values("x")
        place, x = panels[method], np.log1p(rows["x"])
        add_to_panel(figure, place, look, capacity, **band(x, rows["low"], rows["high"], look.colour))
        for column, (name, line) in RECALLED.items():
            of_state = column.startswith("trace")  # computed from the state itself, no method's answer
            style = _quantity(column, line, look._replace(colour=INK, symbol="circle") if of_state else look, fill)
            add_to_panel(figure, place, look, capacity, x=x, y=rows[column], customdata=rows["x"], **style,
                         hovertemplate=f"{look.label}, {times(capacity)}, {name}, {axis} %{{customdata:g}}: %{{y:.3f}}"
                                       "<extra></extra>")
    ticks = _thinned(sorted(table["x"].unique()))
    figure.update_xaxes(tickvals=np.log1p(ticks), ticktext=[f"{tick:g}" for tick in ticks], tickangle=0)
    label_panels(figure, panels, RECALL_AXES[axis], "score (0 to 1)")
    figure.update_yaxes(range=[-0.03, 1.03])
    for column, (name, line) in RECALLED.items():
        legend_entry(figure, name, **_quantity(column, line, NEUTRAL, fill_of(1)))
    for capacity in sorted(table["capacity"].unique()):
        legend_entry(figure, f"capacity {times(capacity)}", marker=dot_style(NEUTRAL, fill_of(capacity), 10))
    figure.update_traces(legendgroup="")  # a group would stand in one column
    return finish(figure, f"Recall by {axis}, on made-up facts", subtitle, panel_height(panels) + 20, foot=155)


def _quantity(column: str, line: dict, look: Look, fill: Fill) -> dict:
    """How one quantity of `recall_curves` is drawn: a measured one with its points, the others as lines alone."""
    mode = {"accuracy": "lines+markers", "probe": "lines+markers", "trace": "markers"}.get(column, "lines")
    colour = GREY if column == "chance" else look.colour
    size = 10 if column == "accuracy" else 7
    return dict(mode=mode, line=dict(color=colour, **line), marker=dot_style(look, fill, size))


def _thinned(values: list[float]) -> list[float]:
    """Those values that keep a readable distance on a panel's log1p axis."""
    apart, kept = 0.07 * (np.log1p(values[-1]) - np.log1p(values[0])), values[:1]
    for value in values[1:]:
        if np.log1p(value) - np.log1p(kept[-1]) >= apart:
            kept.append(value)
    return kept


# --- shared parts -----------------------------------------------------------------------------------------------------

def _single(table: pd.DataFrame, column: str) -> str:
    values = list(dict.fromkeys(table[column]))
    if len(values) > 1:
        raise ValueError(f"this figure draws one {column}, the table mixes {', '.join(map(str, values))}: "
                         "draw each alone")
    return str(values[0])


def _p(value: float) -> str:
    return "" if np.isnan(value) else "&lt;0.001" if value < 0.001 else f"{value:.3f}"


def _ring(look: Look) -> dict:
    return dict(symbol=look.symbol, size=17, color="white", line=dict(color=look.colour, width=2))
