"""Drawings of what the library computes; no data goes in. They are offered through `figures` like every other figure.

Places are pixels of the plot, from its lower left corner, so that a circle is round and a line of text fits its box.
"""

import plotly.graph_objects as go

from ._plot import INK, WIDTH, finish, look_of

FAMILIES = {  # name in the title, norm, MLP, what else sets the family apart
    "gpt2": ("GPT-2", "LayerNorm", "GELU", "learnt positions are added to the embeddings"),
    "llama": ("Llama", "RMSNorm", "SwiGLU", "positions turn Q and K (RoPE), groups of heads share K and V"),
}
ENTRANCES = {  # letter: what enters, the methods, colour (of the palette of Okabe and Ito)
    "A": ("soft tokens in front<br>of the embeddings", ("prefix",), "#0072B2"),
    "B": ("extra keys and values<br>inside self-attention", ("kv_extension", "hebbian", "slot"), "#00795A"),
    "C": ("a branch beside attention,<br>on the residual stream", ("cross_attention", "gated"), "#C24E00"),
}
FROZEN, BLOCK = "#FFFFFF", "#F2F2F2"
STREAM = 130  # height of the residual stream
SIDE = 24


def block_diagram(family: str = "gpt2", entrances: str = "ABC", subtitle: str | None = None) -> go.Figure:
    """A frozen decoder-only model, one block in full, and where memory enters it [A in kind, D in detail].

    A: soft tokens in front of the embeddings (M.1). B: extra keys and values inside self-attention (M.3, M.4, M.6).
    C: a branch beside attention, on the residual stream (M.2, M.5). ``family`` is a backbone's: "gpt2" or "llama";
    ``entrances`` the letters that are drawn, "" for the frozen model alone. ``subtitle`` None says what is drawn. An
    unknown family or letter is a ValueError.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}: known are {', '.join(FAMILIES)}")
    if unknown := set(entrances) - set(ENTRANCES):
        raise ValueError(f"unknown entrance {', '.join(sorted(unknown))}: known are {', '.join(ENTRANCES)}")
    name, norm, mlp, others = FAMILIES[family]
    draw = _Drawing()
    _draw_frozen(draw, norm, mlp, memory=bool(entrances))
    if entrances:
        _draw_memory(draw)
    for letter in sorted(set(entrances)):
        _DRAW[letter](draw, letter)
    draw.text(0, 12, "white boxes: frozen, never trained" +
              (" · coloured boxes with a letter: where memory enters; a method uses one of them" if entrances else ""),
              anchor="left", colour="#555555")
    draw.figure.update_layout(showlegend=False)
    title = f"Where memory enters a frozen {name} block" if entrances else f"A frozen decoder-only model ({name})"
    finish(draw.figure, title, subtitle or f"{name} family: {norm}, {mlp}; {others}",
           height=820 if entrances else 600, left=SIDE, right=SIDE, foot=SIDE)
    margin = draw.figure.layout.margin
    draw.figure.update_xaxes(visible=False, range=[0, WIDTH - 2 * SIDE], fixedrange=True)
    draw.figure.update_yaxes(visible=False, range=[0, draw.figure.layout.height - margin.t - margin.b], fixedrange=True)
    return draw.figure


class _Drawing:
    """Boxes, lines, arrows and texts on an empty plot."""

    def __init__(self):
        self.figure = go.Figure(go.Scatter(x=[None], y=[None], hoverinfo="skip"))

    def box(self, x0: float, y0: float, x1: float, y1: float, text: str = "", fill: str = FROZEN, edge: str = INK,
            colour: str = INK, width: float = 2, r: float = 6, dash: str = "solid") -> None:
        path = (f"M{x0 + r},{y0} L{x1 - r},{y0} Q{x1},{y0} {x1},{y0 + r} L{x1},{y1 - r} Q{x1},{y1} {x1 - r},{y1} "
                f"L{x0 + r},{y1} Q{x0},{y1} {x0},{y1 - r} L{x0},{y0 + r} Q{x0},{y0} {x0 + r},{y0} Z")
        self.figure.add_shape(type="path", path=path, fillcolor=fill, line=dict(color=edge, width=width, dash=dash))
        if text:
            self.text((x0 + x1) / 2, (y0 + y1) / 2, text, colour=colour)

    def line(self, *points: tuple[float, float], colour: str = INK, width: float = 2, dash: str = "solid",
             arrow: bool = True) -> None:
        """Straight pieces through ``points``; the last ends in an arrow's head."""
        path = "M" + " L".join(f"{x},{y}" for x, y in points)
        self.figure.add_shape(type="path", path=path, line=dict(color=colour, width=width, dash=dash))
        if arrow:
            (x0, y0), (x1, y1) = points[-2:]
            length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
            u, v = (x1 - x0) / length, (y1 - y0) / length
            head, half = 9 + width, 5 + width / 2
            back = x1 - head * u, y1 - head * v
            corners = (x1, y1), (back[0] - half * v, back[1] + half * u), (back[0] + half * v, back[1] - half * u)
            self.figure.add_shape(type="path", path="M" + " L".join(f"{x},{y}" for x, y in corners) + " Z",
                                  fillcolor=colour, line=dict(color=colour, width=1))

    def text(self, x: float, y: float, text: str, anchor: str = "center", colour: str = INK) -> None:
        self.figure.add_annotation(x=x, y=y, text=text, showarrow=False, xanchor=anchor, yanchor="middle", align=anchor,
                                   font_color=colour)

    def plus(self, x: float, y: float, colour: str = INK) -> None:
        """A residual addition."""
        self.circle(x, y, "<b>+</b>", FROZEN, colour, colour)

    def circle(self, x: float, y: float, text: str, fill: str, edge: str, colour: str, r: float = 15) -> None:
        self.figure.add_shape(type="circle", x0=x - r, x1=x + r, y0=y - r, y1=y + r, fillcolor=fill,
                              line=dict(color=edge, width=2))
        self.text(x, y, text, colour=colour)

    def column(self, x: float, y: float, names: list[str], fill: str = FROZEN, edge: str = INK, colour: str = INK,
               width: float = 42, height: float = 28) -> None:
        """Cells upon each other, the first on top; (x, y) is the middle of the lowest edge."""
        for i, name in enumerate(reversed(names)):
            self.box(x - width / 2, y + i * height, x + width / 2, y + (i + 1) * height, name, fill, edge, colour, r=3)


def _draw_frozen(draw: _Drawing, norm: str, mlp: str, memory: bool) -> None:
    """The model itself: embeddings, one block, the last norm, the unembedding."""
    top = 480 if memory else 430  # of self-attention
    draw.box(130, 52, 930, top + 14, fill=BLOCK, edge="#8A8A8A", r=14)
    draw.text(146, 70, "<b>one of L blocks</b>", anchor="left")
    draw.line((72, STREAM), (948, STREAM), width=5)
    draw.text(620, 100, "residual stream h, one row of d numbers a token: (T, d)")
    draw.column(50, STREAM - 42, ["x<sub>1</sub>", "x<sub>2</sub>", "x<sub>3</sub>"])
    draw.text(0, 66, "embeddings", anchor="left")

    # self-attention: out of the stream at the left, back into it at the right
    draw.line((205, STREAM), (205, 185))
    draw.box(158, 185, 252, 220, norm)
    draw.line((205, 220), (205, 255))
    draw.box(150, 255, 480, top)
    draw.text(164, top - 20, "<b>causal self-attention</b>", anchor="left")
    for x, letter in ((205, "Q"), (370, "K"), (434, "V")):
        draw.column(x, 290, [f"{letter.lower()}<sub>{i}</sub>" for i in (1, 2, 3)])
        draw.text(x, 274, f"<b>{letter}</b>")
    draw.line((230, 332), (345, 332))
    draw.text(285, 350, "softmax(QK<sup>⊤</sup>)")
    draw.line((434, 255), (434, STREAM + 15))
    draw.plus(434, STREAM)

    # the MLP
    draw.line((745, STREAM), (745, 185))
    draw.box(698, 185, 792, 220, norm)
    draw.line((745, 220), (745, 255))
    draw.box(698, 255, 910, 345, f"<b>MLP</b><br>{mlp}, a token at a time")
    draw.line((880, 255), (880, STREAM + 15))
    draw.plus(880, STREAM)

    # behind the last block
    draw.box(950, STREAM - 18, 1046, STREAM + 18, norm)
    draw.line((1046, STREAM), (1068, STREAM))
    draw.column(1090, STREAM - 42, ["H<sub>1</sub>", "H<sub>2</sub>", "H<sub>3</sub>"])
    draw.text(1090, 66, "hidden states H, (T, d)")
    draw.line((1112, STREAM), (1126, STREAM))
    draw.box(1128, STREAM - 42, 1231, STREAM + 42, "un-<br>embedding")
    draw.line((1180, STREAM + 42), (1180, 230))
    draw.text(1231, 254, "next-token logits,<br>(T, vocabulary)", anchor="right")


MEMORY = 606, 662  # lower and upper edge


def _draw_memory(draw: _Drawing) -> None:
    """The state above the model, written from the hidden states."""
    low, high = MEMORY
    draw.box(16, low, 1230, high, fill="#FFF6D6", edge=INK, r=10)
    draw.text(36, (low + high) / 2, "<b>memory P</b>  a state that outlives the turn: M entries of d numbers "
              "(M.4: a matrix); it takes no positions", anchor="left")
    for i in range(8):
        draw.box(950 + 32 * i, low + 12, 982 + 32 * i, high - 12, fill="#FFE08A", r=2)
    draw.line((1090, STREAM + 42), (1090, low), dash="dot", width=3)
    draw.text(1104, 480, "write, after<br>each turn:<br>no gradient", anchor="left")


def _enter(draw: _Drawing, letter: str, x: float, to: float, mark_at: float) -> str:
    """An entrance's arrow from the memory down to height ``to``, its mark and its text; returns its colour."""
    what, methods, colour = ENTRANCES[letter]
    draw.line((x, MEMORY[0]), (x, to), colour=colour, width=4)
    draw.circle(x, mark_at, f"<b>{letter}</b>", colour, colour, "white", r=17)
    names = [look_of(method).label for method in methods]
    lines = ",<br>".join([names[0], ", ".join(names[1:])]) if names[1:] else names[0]
    draw.text(x + 24, 550, f"{what}<br><b>{lines}</b>", anchor="left", colour=colour)
    return colour


def _draw_soft_tokens(draw: _Drawing, letter: str) -> None:
    colour = _enter(draw, letter, 50, 238, 550)
    draw.column(50, 180, ["s<sub>1</sub>", "s<sub>2</sub>"], fill="#D6EAF8", edge=colour, colour=colour)


def _draw_key_values(draw: _Drawing, letter: str) -> None:
    colour = _enter(draw, letter, 402, 444, 550)
    for x in (370, 434):
        draw.column(x, 380, ["m<sub>1</sub>", "m<sub>2</sub>"], fill="#D5F0E6", edge=colour, colour=colour)
    draw.box(342, 376, 462, 441, fill="rgba(0,0,0,0)", edge=colour, width=3, r=5)


def _draw_branch(draw: _Drawing, letter: str) -> None:
    colour = _enter(draw, letter, 640, 345, 550)
    draw.line((530, STREAM), (530, 255), colour=colour, width=3)
    draw.box(505, 255, 675, 345, "<b>reads P</b>, asked<br>by h; scaled or<br>gated, then added", fill="#FDE8D9",
             edge=colour, colour=colour, width=3)
    draw.line((650, 255), (650, STREAM + 15), colour=colour, width=3)
    draw.plus(650, STREAM, colour)


_DRAW = {"A": _draw_soft_tokens, "B": _draw_key_values, "C": _draw_branch}
