"""What the figures that look into a memory share: colours, heat maps of named rows and columns, checks, text from data.

For plain arrays, as `_plot` is for tables; used within the library only.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike

from ._plot import FONT, finish, literal, text_width

SEQUENTIAL = ["#FFFFFF", "#C6DBEF", "#6BAED6", "#2171B5", "#08306B"]  # one hue, darker is more
# for shares: a few large, most of them small, which must show beside none
SPARSE = [[0, "#FFFFFF"], [0.01, "#DCE9F5"], [0.08, "#9CC8E3"], [0.3, "#4A98C9"], [0.65, "#2171B5"], [1, "#08306B"]]
DIVERGING = ["#0072B2", "#9CC9E3", "#FFFFFF", "#F2B48A", "#D55E00"]  # of Okabe and Ito, white at zero
FRAME = dict(showgrid=False, showline=True, mirror=True, linecolor="#BBBBBB")  # a map may be white at its edges
BLUE, ORANGE, PALE = "#0072B2", "#D55E00", "#9DB8CC"
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def array_of(values: Any, name: str, axes: str, gaps: bool = False, kind: str = "float64") -> np.ndarray:
    """Numbers of the named ``axes``, "L h T M", none of them empty; ``gaps`` allows NaN."""
    array = np.asarray(values.detach().float().cpu() if hasattr(values, "detach") else values)
    if array.ndim != len(axes.split()) or not array.size or array.dtype.kind not in "biuf":
        raise ValueError(f"{name} must be numbers with the axes ({', '.join(axes.split())}), none of them empty; got "
                         f"{array.dtype} of shape {array.shape}")
    if np.isinf(array).any() or not gaps and np.isnan(array).any():
        raise ValueError(f"{name} must be finite: it holds NaN or infinity")
    return array.astype(kind)


def shares_of(shares: ArrayLike) -> np.ndarray:
    shares = array_of(shares, "shares", "M N")
    if (shares < 0).any() or (shares.sum(axis=1) > 1.001).any():
        raise ValueError("shares (M, N) lie between 0 and 1 and sum to at most 1 in an entry: pass what "
                         "provenance.shares gives, without the column of P_0")
    return shares


def attention_of(attention: ArrayLike, tokens: Sequence[str]) -> np.ndarray:
    attention = array_of(attention, "attention", "L h T M")
    if (attention < 0).any() or (attention.sum(axis=-1) > 1.01).any():
        raise ValueError("attention is at least 0 and sums to at most 1 over the entries: pass what "
                         "attention_to_memory gives")
    if isinstance(tokens, str) or len(tokens) != attention.shape[2]:
        raise ValueError(f"attention is of {attention.shape[2]} tokens, got {len(tokens)}: pass a list with one text "
                         "a token")
    return attention


def short(text: Any, letters: int) -> str:
    """Text from data in one line of so many letters, escaped."""
    line = " ".join(str(text).split())
    return literal(line if len(line) <= letters else line[: max(1, letters - 1)].rstrip() + "…")


def token_text(text: Any, letters: int = 24) -> str:
    """A token as it is shown: a space, which tokenizers write as Ġ or ▁, is a dot, a line feed an arrow."""
    text = str(text).replace("\n", "↵").replace("Ċ", "↵")
    for space in " Ġ▁":
        text = text.replace(space, "·")
    return short(text, letters)


def names_of(what: str, count: int, labels: Sequence[str] | None, letters: int = 90) -> list[str]:
    """``count`` distinct names, "turn 3: its text", escaped and of about so many ``letters``."""
    if labels is None:
        return [f"{what} {i}" for i in range(count)]
    if isinstance(labels, str) or len(labels) != count:
        raise ValueError(f"labels are the texts of {count} turns, got {len(labels)}: pass a list with one text a turn")
    return [f"{head} {short(label, letters - len(head))}"
            for head, label in ((f"{what} {i}:", label) for i, label in enumerate(labels))]


def heat_map(z: np.ndarray, x: list[str], y: list[str], shown: str, **look: Any) -> go.Heatmap:
    """A map of named columns and rows, so that hovering tells their names, each kept once in the file."""
    return go.Heatmap(z=z.astype("float32"), x=x, y=y, hovertemplate=f"%{{x}}<br>%{{y}}<br>{shown}<extra></extra>",
                      **look)


def named_axis(names: list[str], ticks: Mapping[int, str], count: int | None = None) -> dict:
    """The axis of such names, with its own text at some of them: a shade aside, else hovering would tell the tick's."""
    aside = 0.02 + (count or len(names)) / 5000
    return dict(type="category", tickvals=[place + aside for place in ticks], ticktext=list(ticks.values()),
                tickangle=0, **FRAME)


def round_steps(count: int, most: int) -> list[int]:
    """0, 5, 10, ... below ``count``: at most so many, a round step apart."""
    step = next(size * 10**power for power in range(9) for size in (1, 2, 5) if count <= size * 10**power * most)
    return list(range(0, count, step))


def numbered(count: int, most: int) -> dict[int, str]:
    return {i: f"{i}" for i in round_steps(count, most)}


def round_tick(value: float) -> str:
    """A round number as a tick: 0.001 to 10000, powers of ten beyond."""
    power = int(np.floor(np.log10(value) + 1e-9))
    if -4 < power < 5:
        return f"{value:g}"
    digit, raised = f"{value / 10.0**power:.2g}", "10" + str(power).translate(SUPERSCRIPTS)
    return raised if digit == "1" else f"{digit}·{raised}"


def log_ticks(low: float, high: float) -> list[float]:
    """Round values between two powers of ten: 1, 2, 5 a decade, or decades alone where there are many."""
    steps = (1, 2, 5) if high - low < 4 else (1,)
    ticks = [step * 10.0**power for power in range(int(np.floor(low)), int(np.ceil(high)) + 1) for step in steps]
    inside = [tick for tick in ticks if low <= np.log10(tick) <= high]
    return inside[:: -(-len(inside) // 12)] or [float(f"{10 ** ((low + high) / 2):.3g}")]


def token_axis(figure: go.Figure, columns: list[str], tokens: Sequence[str], room: int, **place: int) -> int:
    """Tokens upright under a map ``room`` pixels wide; the pixels they take below it."""
    every = range(0, len(tokens), -(-24 * len(tokens) // room))
    texts = {i: token_text(tokens[i], 16) for i in every}
    figure.update_xaxes(**named_axis(columns, texts) | dict(tickangle=-90), **place)
    return int(30 + max(60, *(text_width(text) for text in texts.values())))


def block_means(matrix: np.ndarray, most: int) -> np.ndarray:
    """Means of at most ``most`` blocks along each side, of sizes as equal as can be."""
    for axis, count in enumerate(matrix.shape):
        edges = np.linspace(0, count, min(count, most) + 1).round().astype(int)
        sums = np.add.reduceat(matrix, edges[:-1], axis=axis)
        matrix = sums / np.expand_dims(np.diff(edges), 1 - axis)
    return matrix


def known_mean(values: np.ndarray, axis: int) -> np.ndarray:
    """The mean of what is not NaN, NaN where nothing is."""
    known = ~np.isnan(values)
    return np.where(known, values, 0).sum(axis) / np.where(known.any(axis), known.sum(axis), np.nan)


def moved_inside(places: np.ndarray, height: float) -> np.ndarray:
    """Sorted places moved together as far as keeps the last above the foot and the first below the top."""
    return places - max(0, places[-1] - height + 8) + max(0, 8 - places[0])


def colour_bar(title: str) -> dict:
    room = "<br><span style='color:rgba(0,0,0,0)'>.</span>"  # between title and bar; a blank line would be cut
    return dict(title=dict(text=title + room, font_size=FONT), outlinewidth=0)


def name_margin(names: Any) -> int:
    return int(min(480, max(90, *(text_width(name) + 24 for name in names), 0)))


def significant(value: float) -> str:
    return f"{value:#.2g}".rstrip(".") if value < 10 else f"{value:.0f}"


def framed(figure: go.Figure, title: str, subtitle: str, height: int = 720, left: int = 90, right: int = 30,
           foot: int = 135) -> go.Figure:
    figure.update_layout(hoverlabel=dict(font_size=FONT, align="left"))
    return finish(figure, title, subtitle, height, left, right, foot)
