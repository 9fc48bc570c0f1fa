"""Figures of the data: when the sessions took place, how far back the questions reach, what a decaying bank keeps.

The rules of `figures`, which offers these functions too: tidy tables and arrays in, `plotly.graph_objects.Figure` out.
They show counts, dates and lags, never what was said, so that figures of LoCoMo may be published.
"""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import ArrayLike

from ._plot import INK, finish, legend_entry, literal, require, text_width
from .locomo import CATEGORIES
from .metrics import LAG_BUCKETS, bucket_of

PARTS = {"train": ("#0072B2", "circle"), "test": ("#D55E00", "diamond")}  # part of the data: (colour, marker)
PLAIN = "#0072B2", "circle"
REACH = dict(color=INK, width=3)
SEED = 0  # of the places of dots that would lie on each other


def session_timeline(sessions: pd.DataFrame, subtitle: str, reach: pd.DataFrame | None = None) -> go.Figure:
    """A row a conversation, a dot a session at its date, the larger the more turns it has.

    Columns conversation, session, date (datetime), turns; ``part`` ("train", "test") gives a colour and a marker each.
    ``reach`` draws a bar under a conversation, from a question's earliest evidence to the end, where all questions are
    asked: columns conversation, date (of the evidence's session), lag (turns), one row a conversation. ValueError for
    conversations that are not among the sessions', for several bars in a row, or for an unknown part.
    """
    require(sessions, "conversation", "session", "date", "turns")
    names = list(dict.fromkeys(sessions["conversation"]))
    part = sessions.get("part", pd.Series("", index=sessions.index))
    if unknown := set(part) - {"", *PARTS}:
        raise ValueError(f"unknown part {', '.join(map(str, sorted(unknown)))}: known are {', '.join(PARTS)}")
    figure, lags = go.Figure(), {}
    ends = sessions.groupby("conversation")["date"].agg(["min", "max"])
    for y, name in enumerate(names):
        figure.add_scatter(x=ends.loc[name], y=[y, y], mode="lines", line=dict(color="#BBBBBB", width=2),
                           showlegend=False, hoverinfo="skip")
    if reach is not None:
        require(reach, "conversation", "date", "lag")
        if reach["conversation"].duplicated().any() or not set(reach["conversation"]) <= set(names):
            raise ValueError("reach has one row a conversation, each of a conversation among the sessions': choose one "
                             "question each")
        for _, row in reach.iterrows():
            y, name = names.index(row["conversation"]) + 0.33, literal(row["conversation"])
            lags[row["conversation"]] = f"{row['lag']:g}"
            figure.add_scatter(x=[row["date"], ends.loc[row["conversation"], "max"]], y=[y, y], mode="lines+markers",
                               line=REACH, marker=dict(symbol=["line-ns-open", "triangle-right"], size=12, color=INK,
                                                       line=dict(color=INK, width=2)),
                               showlegend=False, hovertemplate=f"{name}: a lag of {row['lag']:g} turns<extra></extra>")
    scale = 20 / np.sqrt(sessions["turns"].max())
    for kind in dict.fromkeys(part):
        colour, symbol = PARTS.get(kind, PLAIN)
        rows = sessions[part == kind]
        figure.add_scatter(
            x=rows["date"], y=rows["conversation"].map(names.index), mode="markers", name=kind or "session",
            showlegend=False, customdata=rows[["session", "turns"]], cliponaxis=False,
            marker=dict(color=colour, symbol=symbol, size=np.maximum(4, scale * np.sqrt(rows["turns"])), opacity=0.75,
                        line=dict(color="white", width=1)),
            hovertemplate="session %{customdata[0]}, %{x|%d %B %Y}: %{customdata[1]} turns<extra></extra>")
        legend_entry(figure, f"session ({kind})" if kind else "session",
                     marker=dict(color=colour, symbol=symbol, size=14))
    if reach is not None:
        legend_entry(figure, "from one question's evidence to where it is asked", "lines", line=REACH)
    counts = sessions.groupby("conversation").agg(sessions=("turns", "size"), turns=("turns", "sum"))
    columns = {"sessions": counts["sessions"].astype(str), "turns": counts["turns"].map("{:,}".format)}
    if lags:
        columns["lag"] = pd.Series(lags)
    for place, (heading, texts) in enumerate(columns.items()):
        for y, text in [(-0.85, f"<b>{heading}</b>"), *((names.index(name), text) for name, text in texts.items())]:
            figure.add_annotation(x=1, xref="paper", xanchor="right", xshift=90 + 75 * place, y=y, text=text,
                                  showarrow=False)
    figure.update_yaxes(tickvals=list(range(len(names))), ticktext=[literal(name) for name in names], showgrid=False,
                        zeroline=False, range=[len(names) - 0.4, -1.1])
    figure.update_xaxes(title="date of the session (the larger, the more turns)", showgrid=True, gridcolor="#DDDDDD")
    left = int(min(400, 40 + max(text_width(name) for name in names)))
    return finish(figure, "Conversations on their time line", subtitle, 290 + 46 * len(names), left,
                  right=30 + 80 * len(columns))


def lags_by_category(questions: pd.DataFrame, subtitle: str) -> go.Figure:
    """A dot a question, at its lag (turns) in the row of its category; how many there are in each bucket.

    Columns category (1 to 5), lag. A bucket takes a column of the figure, linear inside, the last up to the largest
    lag. ValueError for a lag below 0.
    """
    require(questions, "category", "lag")
    labels = [bucket.label for bucket in LAG_BUCKETS]
    place = questions["lag"].map(bucket_of).map(labels.index)
    most = max(questions["lag"].max(), LAG_BUCKETS[-1].low)
    edges = np.array([*(bucket.low for bucket in LAG_BUCKETS), most + 1])
    x = place + (questions["lag"] - edges[place]) / (edges[place + 1] - edges[place])
    categories = sorted(questions["category"].unique())
    figure, rng = go.Figure(), np.random.default_rng(SEED)
    for bucket in range(0, len(labels), 2):
        figure.add_shape(type="rect", x0=bucket, x1=bucket + 1, y0=0, y1=1, yref="paper", fillcolor="#F3F3F3",
                         line_width=0, layer="below")
    for y, category in enumerate(categories):
        name, mine = literal(CATEGORIES.get(category, category)), questions["category"] == category
        figure.add_scatter(x=x[mine], y=y + 0.1 + rng.uniform(-0.27, 0.27, mine.sum()), mode="markers", name=name,
                           showlegend=False, customdata=questions.loc[mine, "lag"],
                           marker=dict(color=PLAIN[0], size=6, opacity=0.55),
                           hovertemplate=f"{name}: a lag of %{{customdata}} turns<extra></extra>")
        for bucket in range(len(labels)):
            figure.add_annotation(x=bucket + 0.5, y=y - 0.33, text=f"<b>{(place[mine] == bucket).sum()}</b>",
                                  showarrow=False)
    counts = [(place == bucket).sum() for bucket in range(len(labels))]
    for bucket, (label, n) in enumerate(zip(labels, counts)):
        figure.add_annotation(x=bucket + 0.5, y=1, yref="paper", yanchor="bottom", showarrow=False,
                              text=f"<b>{label}</b><br>n={n} ({n / len(questions):.0%})")
    names = [f"{literal(CATEGORIES.get(c, c))}<br>n={(questions['category'] == c).sum()}" for c in categories]
    figure.update_yaxes(tickvals=list(range(len(categories))), ticktext=names, showgrid=False, zeroline=False,
                        range=[len(categories) - 0.5, -0.6])
    figure.update_xaxes(title="lag between evidence and question (turns; each bucket as wide as the next)",
                        tickvals=list(range(len(edges))), ticktext=[*map(str, edges[:-1]), f"{most:g}"],
                        range=[-0.02, len(labels) + 0.02], showgrid=True, gridcolor="#BBBBBB")
    figure = finish(figure, "How far back the questions reach", subtitle, 275 + 95 * len(categories), left=150, foot=80)
    return figure.update_layout(margin_t=figure.layout.margin.t + 45)


def how_far_back(lags: ArrayLike, subtitle: str, gamma: float = 0.95, window: float | None = None) -> go.Figure:
    """Which part of the questions a memory of so many turns can answer, and what a decaying bank keeps after so many.

    ``lags`` (Q,) in turns: the cumulative share of the questions, beside ``gamma`` to the lag, both in %. ``window`` is
    the number of turns that a prompt holds. ValueError without a question, for a lag below 0, or for a gamma outside
    (0, 1].
    """
    lags = np.sort(np.asarray(lags, dtype=float).ravel())
    if not len(lags) or not (lags >= 0).all():
        raise ValueError("lags are numbers of turns, at least one of them and none below 0")
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma is the share that a write leaves, above 0 and at most 1, got {gamma}")
    x = np.arange(int(max(lags[-1], LAG_BUCKETS[-1].low)) + 2)
    reached = 100 * np.searchsorted(lags, x, side="right") / len(lags)
    figure = go.Figure()
    figure.add_scatter(x=x, y=reached, mode="lines", name="questions with at most this lag",
                       line=dict(color=PLAIN[0], width=4, shape="hv"),
                       hovertemplate="%{y:.1f} % reach back at most %{x} turns<extra></extra>")
    figure.add_scatter(x=x, y=100 * gamma**x, mode="lines", name=f"what {gamma:g} a turn leaves of a turn",
                       line=dict(color=PARTS["test"][0], width=4, dash="dash"),
                       hovertemplate="after %{x} turns: %{y:.3g} %<extra></extra>")
    far = LAG_BUCKETS[-1].low
    marks = [(far, f"{(lags >= far).mean():.0%} of the questions reach<br>{far} turns back or more,<br>where "
                   f"{gamma**far:.0e} of a turn is left".replace("e-0", "e-"), 0.2)]
    if window is not None:
        marks.append((window, f"the prompt holds {window:.0f} turns:<br>{(lags < window).mean():.0%} of the questions",
                      0.92))
    for at, text, height in marks:
        figure.add_vline(x=at, line=dict(color=INK, width=2, dash="dot"))
        figure.add_annotation(x=at, y=height, yref="paper", xanchor="left", xshift=8, align="left", text=text,
                              showarrow=False, bgcolor="rgba(255,255,255,0.85)")
    figure.update_xaxes(title="lag between evidence and question (turns)", range=[0, x[-1]])
    figure.update_yaxes(title="share (%)", range=[-2, 104])
    return finish(figure, "How far back a memory must reach, and what decay leaves", subtitle, 640)
