"""What a memory costs as it grows, and what serving very many users would take, from measured pieces.

Both take the table of ``tests/benchmarks/grow.py``: what, method, x, seconds, bytes, backbone.
"""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ._plot import INK, finish, legend_entry, literal, look_of, ordered, require

COLUMNS = ("what", "method", "x", "seconds", "bytes", "backbone")
PANELS = {  # what is measured: heading, title of the x axis, title of the y axis
    "turn written": ("Length of the conversation", "turns written before", "seconds a turn written"),
    "training step": ("Size of the bank", "entries in the bank", "seconds a training step, 16 questions"),
    "question answered": ("Number of users", "users whose banks are kept on disk", "seconds a question, 16 at once"),
}
FILES = ("Files of the banks", "bytes of a bank's file", "seconds to save or load it")
DAY = 86_400  # seconds


def growth(table: pd.DataFrame, title: str) -> go.Figure:
    """Four panels, logarithmic both ways: cost against turns written, entries of a bank, users kept, and bytes.

    ``title`` is the figure's; backbones are named under it.
    """
    require(table, *COLUMNS)
    headings = [*(heading for heading, *_ in PANELS.values()), FILES[0]]
    figure = make_subplots(rows=2, cols=2, horizontal_spacing=0.1, vertical_spacing=0.2,
                           subplot_titles=[f"<b>{heading}</b>" for heading in headings])
    for i, (what, (_, x_title, y_title)) in enumerate(PANELS.items()):
        place = dict(row=1 + i // 2, col=1 + i % 2)
        rows = table[table["what"] == what]
        for method in ordered(rows):
            _add(figure, rows[rows["method"] == method].sort_values("x"), "x", "solid", "", place)
        _axes(figure, place, x_title, y_title, rows["x"], rows["seconds"])
    files = table[table["what"].isin(["state saved", "state loaded"])]
    place = dict(row=2, col=2)
    for what, dash, suffix in (("state loaded", "solid", ""), ("state saved", "dot", "-open")):
        rows = files[files["what"] == what]
        for method in ordered(rows):
            _add(figure, rows[rows["method"] == method].sort_values("bytes"), "bytes", dash, suffix, place)
    _axes(figure, place, FILES[1], FILES[2], files["bytes"], files["seconds"])
    for method in ordered(table):
        look = look_of(method)
        legend_entry(figure, look.label, mode="lines+markers", line=dict(color=look.colour, width=3),
                     marker=dict(color=look.colour, symbol=look.symbol, size=11))
    for name, dash, symbol in (("file loaded", "solid", "circle"), ("file saved", "dot", "circle-open")):
        legend_entry(figure, name, mode="lines+markers", line=dict(color=INK, width=3, dash=dash),
                     marker=dict(color=INK, symbol=symbol, size=11, line_width=2))
    subtitle = "backbone " + ", ".join(map(str, dict.fromkeys(table["backbone"])))
    return finish(figure, literal(title), subtitle, height=980, left=110, foot=190)


def _add(figure: go.Figure, rows: pd.DataFrame, x: str, dash: str, suffix: str, place: dict) -> None:
    look = look_of(rows["method"].iloc[0])
    figure.add_scatter(x=rows[x], y=rows["seconds"], mode="lines+markers", name=look.label, showlegend=False,
                       cliponaxis=False, line=dict(color=look.colour, width=3, dash=dash),
                       marker=dict(color=look.colour, symbol=look.symbol + suffix, size=11,
                                   line=dict(color=look.colour, width=2)),
                       hovertemplate=f"{look.label}: %{{y:.3g}} s at %{{x:,}}<extra></extra>", **place)


def _axes(figure: go.Figure, place: dict, x_title: str, y_title: str, x: pd.Series, y: pd.Series) -> None:
    """Logarithmic, whole decades of seconds, two at the least, so that flat looks flat."""
    low, high = (np.floor(np.log10(y.min())), np.ceil(np.log10(y.max()))) if len(y) else (-3, 0)
    if high - low < 2:
        low, high = low - 1, max(high, low + 1)
    figure.update_yaxes(type="log", title=y_title, range=[low, high], dtick=1, exponentformat="power", **place)
    wide = np.log10([x.min(), x.max()]) if len(x) else np.array([0, 1])
    wide = wide + np.array([-1, 1]) * max(0.06 * (wide[1] - wide[0]), 0.1)
    figure.update_xaxes(type="log", title=x_title, range=wide.tolist(), dtick=1, exponentformat="power", **place)


def serving(table: pd.DataFrame, users: int = 1_000_000, questions_a_day: float = 10.0) -> pd.DataFrame:
    """What ``users`` banks would take, on paper, from measured pieces; a row a method and capacity.

    file_bytes: of one bank. total_gigabytes: of all (1e9 bytes). loads_per_second, saves_per_second: of one core, files
    in the system's cache. read_megabytes_per_second: what one core loading without a break asks of the disk. Where the
    answering of mixed users was measured (with most users kept), questions_per_second: of the measured process, load
    included; load_share: its part for reading the bank; busy_cores: processes like it that ``questions_a_day`` of every
    user keep busy, evenly spread over the day; disk_reads_per_second: what these ask, no bank kept in memory. NaN
    elsewhere.
    """
    require(table, *COLUMNS)
    load, save = (table[table["what"] == f"state {what}"].set_index(["method", "x"]) for what in ("loaded", "saved"))
    if load.empty or not load.index.equals(save.index):
        raise ValueError("serving needs 'state loaded' and 'state saved' of the same methods and capacities: measure "
                         "both")
    asked = table[table["what"] == "question answered"].sort_values("x").groupby("method").last()
    read = table[table["what"] == "bank read and checked"].sort_values("x").groupby("method").last()
    rows = []
    for (method, capacity), one in load.iterrows():
        known = method in asked.index and capacity == 1
        seconds = asked.loc[method, "seconds"] if known else np.nan
        wanted = users * questions_a_day / DAY if known else np.nan  # questions a second
        rows.append(dict(
            method=method, capacity=capacity, users=users, questions_a_day=questions_a_day,
            file_bytes=int(one["bytes"]), total_gigabytes=users * one["bytes"] / 1e9,
            loads_per_second=1 / one["seconds"],
            saves_per_second=1 / save.loc[(method, capacity), "seconds"],
            read_megabytes_per_second=one["bytes"] / one["seconds"] / 1e6, questions_per_second=1 / seconds,
            load_share=read.loc[method, "seconds"] / seconds if known and method in read.index else np.nan,
            disk_reads_per_second=wanted, busy_cores=wanted * seconds, backbone=one["backbone"]))
    return pd.DataFrame(rows)
