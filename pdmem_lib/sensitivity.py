"""One choice changed at a time, and what that does to a result [D]: the choices that no setting offers, differences, a figure."""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from ._plot import (INK, WIDTH, finish, label_panels, legend_entry, literal, look_of, method_panels, panel_height, require,
                    signed, text_width)
from .backbone import Backbone
from .experiment import circumstances
from .files import atomic_path
from .locomo import Conversation, Turn
from .methods import REGISTRY, method_name
from .sources import library_digest
from .states import encode_all

log = logging.getLogger(__name__)
BASE = "as it is"
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")  # of the lines of a figure, in turn
STUDIES = ("oracle", "recall", "sensitivity")  # beside what runs depend on, kept tables depend on these
LOCOMO = {"gain": "own − other (nats)", "own": "own (nats)", "retained": "retained (%)"}  # what is compared there


# ---- choices that no setting offers ----------------------------------------------------------------------------------


def last_third(method: str) -> type:
    """The method, its memory entering the last third of the blocks only: elsewhere the gate is shut for good [D].

    ValueError for one without a gate of keys and values (M.2, M.5).
    """
    known = REGISTRY[method_name(method)]
    if not hasattr(known, "gate_of"):
        raise ValueError(f"{method} has no gate a block to shut: name one of M.1, M.3, M.4 and M.6")

    class LastThird(known):
        def gate_of(self, block):
            return self.gate[block] if block >= self.L - self.L // 3 else 0 * self.gate[block]
    return LastThird


def start_times(method: str, factor: float) -> type:
    """The method with a P_0 ``factor`` times as large."""
    class Start(REGISTRY[method_name(method)]):
        def initial_state(self):
            return {name: factor * entries for name, entries in super().initial_state().items()}
    Start.__name__ = f"StartTimes{factor:g}"  # `as_recorded` says it
    return Start


def centred(method: str, backbone: Backbone, conversations: Sequence[Conversation]) -> type:
    """The method, which writes each hidden state less the mean state of ``conversations``, at the size of states [D].

    States of all tokens point nearly the same way, and so do banks of them (`banks.bank_table`).
    """
    states = torch.cat([H for turns in encode_all(backbone, conversations, progress=False).values() for H in turns])  # (T, d)
    mean = states.mean(dim=0)
    size = states.norm() / (states - mean).norm()

    class Centred(REGISTRY[method_name(method)]):
        def write(self, state, H):
            return super().write(state, size * (H - mean.to(H.device)))

        def decay(self, state, H):
            return super().decay(state, size * (H - mean.to(H.device)))
    return Centred


def dated(conversations: Sequence[Conversation]) -> list[Conversation]:
    """The conversations, each turn's text followed by its session's date, as LoCoMo gives it."""
    def after(text: str, date: str | None) -> str:
        return f"{text} ({date})".strip() if date else text

    return [replace(c, turns=tuple(replace(turn, text=after(turn.text, c.dates.get(turn.session))) for turn in c.turns))
            for c in conversations]


def nameless(conversations: Sequence[Conversation]) -> list[Conversation]:
    """The conversations, written without the speaker's name; with it where nothing was said."""
    return [replace(c, turns=tuple(_Nameless(**vars(turn)) for turn in c.turns)) for c in conversations]


@dataclass(frozen=True)
class _Nameless(Turn):
    @property
    def utterance(self) -> str:
        return self.text or super().utterance


# ---- runs and what they do -------------------------------------------------------------------------------------------


def kept(file: Path, record: dict, backbone: Backbone, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """The table that ``make()`` gives, from ``file`` (csv) where it was made under the same ``record``, else made now and
    kept, with a record of the circumstances and of the library's code beside it (json).

    One that other code made is kept too, since it took hours, perhaps, and said in a warning.
    """
    beside, code = file.with_suffix(".json"), library_digest(*STUDIES)
    if not is_kept(file, record, backbone):
        start = time.perf_counter()
        table = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        beside.unlink(missing_ok=True)  # it speaks of another table than the next one
        with atomic_path(file) as partial:
            table.to_csv(partial, index=False, float_format="%.6g")
        with atomic_path(beside) as partial:
            told = record | {"code": code} | circumstances(backbone, time.perf_counter() - start)
            partial.write_text(json.dumps(told, indent=2) + "\n")
    elif (found := json.loads(beside.read_text())).get("code") != code:
        log.warning("%s was made by other code or versions (at commit %s) and is kept: delete it to make it anew", file,
                    found.get("commit"))
    return pd.read_csv(file)


def is_kept(file: Path, record: dict, backbone: Backbone) -> bool:
    """Whether ``file`` holds a table that was made under ``record`` with this backbone.

    An earlier version's record says less (and nothing of the code): of it, what it says is compared.
    """
    beside = file.with_suffix(".json")
    if not (file.exists() and beside.exists()):
        return False
    found = json.loads(beside.read_text())
    wanted = json.loads(json.dumps(record | {"backbone_fingerprint": backbone.fingerprint}))
    return found.items() >= {key: value for key, value in wanted.items() if key in found or "code" in found}.items()


def as_recorded(change: Mapping[str, Any]) -> dict[str, Any]:
    """What a choice changes, as a record says it: classes and functions by their names."""
    return {name: getattr(value, "__name__", value) for name, value in change.items()}


def differences(table: pd.DataFrame, value: str = "accuracy") -> pd.DataFrame:
    """Each setting's ``value`` minus that of `BASE` with the same seeds; a seed's value is the mean over its rows.

    ``table``: method, setting, seed and ``value``, a row a lag (recall) or a row a run. A row a method and setting, in
    their order: method, setting, seeds, mean, difference, low and high (95 %, t over the seeds; NaN with fewer than two),
    and apart: whether that interval leaves 0 out. A seed draws the fixed maps, the adapter's start and the order or the
    episodes, so the interval tells of all three. ValueError where `BASE` lacks a seed.
    """
    from scipy.stats import t

    require(table, "method", "setting", "seed", value)
    rows = []
    for method, runs in table.groupby("method", sort=False):
        means = runs.groupby(["setting", "seed"], sort=False)[value].mean()
        for setting, per_seed in means.groupby("setting", sort=False):
            per_seed = per_seed.droplevel("setting")
            lacking = [seed for seed in per_seed.index if (BASE, seed) not in means.index]
            if lacking:
                raise ValueError(f"{method}: {setting!r} has seed {lacking[0]}, {BASE!r} has not: a difference needs both")
            d = per_seed - means[BASE][per_seed.index]
            reach = t.ppf(0.975, len(d) - 1) * d.std() / len(d) ** 0.5 if len(d) > 1 else np.nan
            low, high = d.mean() - reach, d.mean() + reach
            rows.append(dict(method=method, setting=setting, seeds=len(d), mean=per_seed.mean(), difference=d.mean(),
                             low=low, high=high, apart=bool(low > 0 or high < 0)))
    return pd.DataFrame(rows, columns=["method", "setting", "seeds", "mean", "difference", "low", "high", "apart"])


def held_out_by_rate(table: pd.DataFrame, subtitle: str) -> go.Figure:
    """How likely the held-out conversation's answers are (nats an answer token) by learning rate: a panel a method, a line
    a number of epochs, which stands beside its points where there are several.

    Columns method, rate, epochs, own, zero, f1_own (%), a row a trial; the likeliest of a method has a ring around it.
    """
    require(table, "method", "rate", "epochs", "own", "zero", "f1_own")
    table = table.reset_index(drop=True)
    figure, panels = method_panels(table)
    lengths = sorted(set(table["epochs"]))
    styles = dict(zip(lengths, cycle(DASHES)))
    for method, of_method in table.groupby("method", sort=False):
        look, best, (row, column) = look_of(method), of_method.iloc[of_method["own"].argmax()], panels[method]
        place = dict(row=row, col=column)
        for length, rows in of_method.sort_values("rate").groupby("epochs"):
            figure.add_scatter(x=rows["rate"], y=rows["own"], mode="lines+markers", name=f"{look.label}, {length} epochs",
                               line=dict(color=look.colour, width=3, dash=styles[length]), showlegend=False, **place,
                               marker=dict(symbol=look.symbol, size=11, color=look.colour), customdata=rows["f1_own"],
                               hovertemplate=f"{look.label}, {length} epochs, %{{x:g}}: %{{y:.3f}} nats, "
                                             "F1 %{customdata:.1f} %<extra></extra>")
        for trial in of_method.itertuples():
            here = dict(x=np.log10(trial.rate), y=trial.own, showarrow=False, **place)
            if len(lengths) == 1 or trial.Index == best.name:
                figure.add_annotation(text=f"{trial.f1_own:.1f}", yshift=24, **here)
            if len(lengths) > 1:
                figure.add_annotation(text=f"{trial.epochs}", xshift=22, **here)
        zero = of_method.groupby("rate", as_index=False)["zero"].mean()
        figure.add_scatter(x=zero["rate"], y=zero["zero"], mode="lines", name=f"{look.label}, zero state", showlegend=False,
                           line=dict(color="#888888", width=2), hoverinfo="skip", **place)
        figure.add_scatter(x=[best["rate"]], y=[best["own"]], mode="markers", showlegend=False, hoverinfo="skip",
                           marker=dict(symbol="circle-open", size=22, color=INK, line_width=2), **place)
    for length, dash in styles.items():
        legend_entry(figure, f"own memory, {length} epoch{'s' * (length != 1)}", mode="lines+markers",
                     line=dict(color=INK, width=3, dash=dash))
    legend_entry(figure, "zero state, mean", mode="lines", line=dict(color="#888888", width=2))
    legend_entry(figure, "chosen, with its F1 (%)", marker=dict(symbol="circle-open", size=18, color=INK, line_width=2))
    rates = sorted(set(table["rate"]))
    tens = [rate for rate in rates if np.log10(rate).is_integer()]
    shown = tens if tens and len(panels) > 1 else rates  # a panel of several has no room for all
    label_panels(figure, panels, "learning rate", "log-probability<br>(nats per token)")
    figure.update_xaxes(type="log", tickvals=shown, ticktext=[f"{rate:g}" for rate in shown],
                        range=[np.log10(rates[0]) - 0.3, np.log10(rates[-1]) + 0.3])
    seen = table[["own", "zero"]].to_numpy()
    reach = np.nanmax(seen) - np.nanmin(seen)
    figure.update_yaxes(range=[np.nanmin(seen) - 0.08 * reach, np.nanmax(seen) + 0.2 * reach])  # room for labels above a point
    return finish(figure, "Learning rate and epochs, chosen on a conversation kept from training", subtitle,
                  height=panel_height(panels), left=130)


@dataclass(frozen=True)
class _Panel:
    title: str
    rows: pd.DataFrame  # setting, seed, value
    range: tuple[float, float]
    line: float | None  # chance, or nothing gained
    tick: str = ".3g"


def recall_by_setting(table: pd.DataFrame, subtitle: str) -> go.Figure:
    """One method's recall under each setting, a panel a lag: a ring a seed, their mean filled, and what `BASE` recalls.

    Columns method, setting, seed, x (the lag in turns), accuracy and chance in [0, 1]. ValueError for several methods:
    one figure each.
    """
    require(table, "method", "setting", "seed", "x", "accuracy", "chance")
    panels = [_Panel(f"lag {lag:g}", rows.rename(columns={"accuracy": "value"}), (-0.04, 1.04), rows["chance"].iloc[0], ".2f")
              for lag, rows in table.groupby("x", sort=False)]
    return _by_setting(table, panels, subtitle, "recall (0 to 1)", "chance", "change", differences(table), 2)


def locomo_by_setting(table: pd.DataFrame, subtitle: str) -> go.Figure:
    """One method on LoCoMo under each setting: own minus another's memory, own (nats an answer token), and retained (%).

    Columns method, setting, seed, gain, own, retained, a row a run. The changes beside the rows are those of own minus
    other. ValueError for several methods: one figure each.
    """
    require(table, "method", "setting", "seed", *LOCOMO)
    panels = []
    for name, title in LOCOMO.items():
        values = [*table[name], *([] if name == "own" else [0])]
        room = 0.08 * (max(values) - min(values)) or 0.01
        panels.append(_Panel(title, table.rename(columns={name: "value"}), (min(values) - room, max(values) + room),
                             None if name == "own" else 0))
    return _by_setting(table, panels, subtitle, None, "nothing gained", "change of<br>own − other",
                       differences(table, "gain"), 3)


def _by_setting(table: pd.DataFrame, panels: Sequence[_Panel], subtitle: str, unit: str | None, line: str,
                heading: str, found: pd.DataFrame, decimals: int) -> go.Figure:
    methods, settings = (list(dict.fromkeys(table[name])) for name in ("method", "setting"))
    if len(methods) != 1:
        raise ValueError(f"this figure shows one method, the table holds {', '.join(map(str, methods)) or 'none'}")
    look, columns = look_of(methods[0]), len(panels)
    figure = make_subplots(rows=1, cols=columns, shared_yaxes=True, horizontal_spacing=0.02, subplot_titles=[
        f"<b>{panel.title}</b>" for panel in panels])
    ring = dict(symbol="circle-open", size=11, line=dict(width=2))
    whole = dict(symbol=look.symbol, size=13, color=look.colour)
    shade = dict(fillcolor="#F3F3F3", line_width=0, layer="below")
    for column, panel in enumerate(panels, start=1):
        place, here = dict(row=1, col=column), panel.rows
        for y in range(0, len(settings), 2):
            figure.add_shape(type="rect", x0=panel.range[0], x1=panel.range[1], y0=y - 0.5, y1=y + 0.5, **shade, **place)
        if panel.line is not None:
            figure.add_vline(x=panel.line, line=dict(color=INK, width=1, dash="dot"), **place)
        figure.add_vline(x=here.loc[here["setting"] == BASE, "value"].mean(),
                         line=dict(color=look.colour, width=2, dash="dash"), **place)
        for y, setting in enumerate(settings):
            runs, name = here[here["setting"] == setting], f"{literal(setting)}, {panel.title}"
            figure.add_scatter(x=runs["value"], y=[y] * len(runs), mode="markers", showlegend=False,
                               marker=ring | dict(color=look.colour), customdata=runs["seed"],
                               hovertemplate=f"{name}, seed %{{customdata}}: %{{x:{panel.tick}}}<extra></extra>", **place)
            figure.add_scatter(x=[runs["value"].mean()], y=[y], mode="markers", showlegend=False, marker=whole,
                               hovertemplate=f"{name}, mean: %{{x:{panel.tick}}}<extra></extra>", **place)
        figure.update_xaxes(range=panel.range, gridcolor="#DDDDDD", **place)
    legend_entry(figure, "mean of the seeds", marker=whole | dict(color=INK))
    legend_entry(figure, "one seed", marker=ring | dict(color=INK))
    legend_entry(figure, "mean as it is", mode="lines", line=dict(color=INK, width=2, dash="dash"))
    legend_entry(figure, line, mode="lines", line=dict(color=INK, width=1, dash="dot"))
    for above, shift, texts in _notes(found.set_index("setting").loc[settings], heading, decimals):
        for y, text in [*enumerate(texts), (-1, f"<b>{above}</b>")]:
            figure.add_annotation(x=1, xref="paper", xanchor="left", xshift=shift, y=y, yref=f"y{columns}", text=text,
                                  align="left", showarrow=False)
    if unit:
        figure.update_xaxes(tickvals=[0, 0.5, 1])
        figure.update_xaxes(title=unit, col=(columns + 1) // 2)
    else:
        figure.update_xaxes(nticks=4)
    figure.update_yaxes(range=[len(settings) - 0.5, -1.5], showgrid=False, zeroline=False)
    figure.update_yaxes(tickvals=[*range(len(settings))], ticktext=[literal(setting) for setting in settings], col=1)
    margin = int(min(WIDTH / 3, max(text_width(setting) + 20 for setting in settings)))
    return finish(figure, f"{look.label}: one choice changed at a time", subtitle, 300 + 38 * len(settings), margin, right=290)


def _notes(found: pd.DataFrame, heading: str, decimals: int) -> list[tuple[str, int, list[str]]]:
    """What stands at the right of the rows: heading, pixels from the plot, a text a row."""
    interval = ["" if low != low else f"{signed(low, decimals)} … {signed(high, decimals)}"
                for low, high in zip(found["low"], found["high"], strict=True)]
    own = [setting == BASE for setting in found.index]
    change = ["" if base else signed(value, decimals) for base, value in zip(own, found["difference"], strict=True)]
    return [(heading, 16, change),
            ("95 %", 140, ["" if base else text for base, text in zip(own, interval, strict=True)])]
