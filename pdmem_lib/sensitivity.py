"""One choice changed at a time, and what that does to recall [D]: a table of runs in, differences and a figure out."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ._plot import INK, WIDTH, finish, legend_entry, literal, look_of, require, signed, text_width

BASE = "as it is"


def differences(table: pd.DataFrame) -> pd.DataFrame:
    """Each setting's recall minus that of `BASE` with the same seeds, recall being the mean over the lags.

    ``table``: method, setting, seed, x (the lag in turns) and accuracy in [0, 1], as `recall.recall` measures it. A row
    a method and setting, in their order: method, setting, seeds, recall, difference, low and high (95 %, t over the
    seeds; NaN with fewer than two), and apart: whether that interval leaves 0 out. A seed draws the fixed maps, the
    adapter's start and the episodes, so the interval tells of all three. ValueError where `BASE` lacks a seed.
    """
    from scipy.stats import t

    require(table, "method", "setting", "seed", "x", "accuracy")
    rows = []
    for method, runs in table.groupby("method", sort=False):
        recall = runs.groupby(["setting", "seed"], sort=False)["accuracy"].mean()  # over the lags
        for setting, per_seed in recall.groupby("setting", sort=False):
            per_seed = per_seed.droplevel("setting")
            lacking = [seed for seed in per_seed.index if (BASE, seed) not in recall.index]
            if lacking:
                raise ValueError(f"{method}: {setting!r} has seed {lacking[0]}, {BASE!r} has not: a difference needs both")
            d = per_seed - recall[BASE][per_seed.index]
            reach = t.ppf(0.975, len(d) - 1) * d.std() / len(d) ** 0.5 if len(d) > 1 else np.nan
            low, high = d.mean() - reach, d.mean() + reach
            rows.append(dict(method=method, setting=setting, seeds=len(d), recall=per_seed.mean(), difference=d.mean(),
                             low=low, high=high, apart=bool(low > 0 or high < 0)))
    return pd.DataFrame(rows, columns=["method", "setting", "seeds", "recall", "difference", "low", "high", "apart"])


def recall_by_setting(table: pd.DataFrame, subtitle: str) -> go.Figure:
    """One method's recall under each setting, a panel a lag: a ring a seed, their mean filled, and what `BASE` recalls.

    Columns method, setting, seed, x, accuracy, chance. ValueError for several methods: one figure each.
    """
    require(table, "method", "setting", "seed", "x", "accuracy", "chance")
    methods, settings, lags = (list(dict.fromkeys(table[name])) for name in ("method", "setting", "x"))
    if len(methods) != 1:
        raise ValueError(f"this figure shows one method, the table holds {', '.join(map(str, methods)) or 'none'}")
    look, columns = look_of(methods[0]), len(lags)
    figure = make_subplots(rows=1, cols=columns, shared_yaxes=True, horizontal_spacing=0.02, subplot_titles=[
        f"<b>lag {lag:g}</b>" for lag in lags])
    ring = dict(symbol="circle-open", size=11, line=dict(width=2))
    whole = dict(symbol=look.symbol, size=13, color=look.colour)
    shade = dict(fillcolor="#F3F3F3", line_width=0, layer="below")
    for column, lag in enumerate(lags, start=1):
        place, here = dict(row=1, col=column), table[table["x"] == lag]
        for y in range(0, len(settings), 2):
            figure.add_shape(type="rect", x0=-0.04, x1=1.04, y0=y - 0.5, y1=y + 0.5, **shade, **place)
        figure.add_vline(x=here["chance"].iloc[0], line=dict(color=INK, width=1, dash="dot"), **place)
        figure.add_vline(x=here.loc[here["setting"] == BASE, "accuracy"].mean(), line=dict(color=look.colour, width=2,
                                                                                           dash="dash"), **place)
        for y, setting in enumerate(settings):
            runs = here[here["setting"] == setting]
            figure.add_scatter(x=runs["accuracy"], y=[y] * len(runs), mode="markers", showlegend=False,
                               marker=ring | dict(color=look.colour), customdata=runs["seed"],
                               hovertemplate=f"{literal(setting)}, lag {lag:g}, seed %{{customdata}}: %{{x:.2f}}<extra></extra>", **place)
            figure.add_scatter(x=[runs["accuracy"].mean()], y=[y], mode="markers", showlegend=False, marker=whole,
                               hovertemplate=f"{literal(setting)}, lag {lag:g}, mean: %{{x:.2f}}<extra></extra>", **place)
    legend_entry(figure, "mean of the seeds", marker=whole | dict(color=INK))
    legend_entry(figure, "one seed", marker=ring | dict(color=INK))
    legend_entry(figure, "mean as it is", mode="lines", line=dict(color=INK, width=2, dash="dash"))
    legend_entry(figure, "chance", mode="lines", line=dict(color=INK, width=1, dash="dot"))
    for heading, shift, texts in _notes(table, settings):
        for y, text in [*enumerate(texts), (-1, f"<b>{heading}</b>")]:
            figure.add_annotation(x=1, xref="paper", xanchor="left", xshift=shift, y=y, yref=f"y{columns}", text=text,
                                  showarrow=False)
    figure.update_xaxes(range=[-0.04, 1.04], tickvals=[0, 0.5, 1], gridcolor="#DDDDDD")
    figure.update_xaxes(title="recall (0 to 1)", col=(columns + 1) // 2)
    figure.update_yaxes(range=[len(settings) - 0.5, -1.5], showgrid=False, zeroline=False)
    figure.update_yaxes(tickvals=[*range(len(settings))], ticktext=[literal(setting) for setting in settings], col=1)
    margin = int(min(WIDTH / 3, max(text_width(setting) + 20 for setting in settings)))
    return finish(figure, f"{look.label}: one choice changed at a time", subtitle, 300 + 38 * len(settings), margin, right=250)


def _notes(table: pd.DataFrame, settings: list[str]) -> list[tuple[str, int, list[str]]]:
    """What stands at the right of the rows: heading, pixels from the plot, a text a row."""
    found = differences(table).set_index("setting").loc[settings]
    interval = ["" if low != low else f"{signed(low, 2)} … {signed(high, 2)}"
                for low, high in zip(found["low"], found["high"], strict=True)]
    own = [setting == BASE for setting in settings]
    return [("change", 16, ["" if base else signed(value, 2) for base, value in zip(own, found["difference"], strict=True)]),
            ("95 %", 100, ["" if base else text for base, text in zip(own, interval, strict=True)])]
