"""A plotly figure in a page that is drawn again in place, from the plotly.js that comes with the package [D].

plotly's own ``FigureWidget`` carries all of plotly.js (5 MB) in every figure, and cannot change what kind of figure it
is. A page of many panes carries it once, in the pane that was made ``first``, and a new figure costs its own numbers.
Nothing is asked of a network.
"""

from collections.abc import Callable
from textwrap import wrap
from typing import Any

import anywidget
import plotly.graph_objects as go
import traitlets
from plotly.io.json import to_json_plotly
from plotly.offline import get_plotlyjs

from .figures import fluid

FONT = 13  # of a pane, which is a third of a page wide
SCRIPT = """
const shared = globalThis.__pdmem_plotly ??= (() => {
  const one = {};
  one.ready = new Promise((resolve) => { one.resolve = resolve; });
  return one;
})();
const whenIdle = globalThis.requestIdleCallback ?? setTimeout;

// anywidget takes a model for dead that has not initialised within two seconds. Reading plotly.js keeps a busy
// machine for as long, so it waits until a pane is shown and the page has nothing else to do.
function load() {
  if (shared.loading || !shared.source || !shared.shown) return;
  shared.loading = true;
  whenIdle(() => {
    const module = { exports: {} };  // neither a module loader of the page nor its globals take part
    new Function("module", "exports", "define", shared.source)(module, module.exports, undefined);
    shared.resolve(module.exports.react ? module.exports : globalThis.Plotly);
  }, { timeout: 1000 });
}

export default {
  initialize({ model }) {
    shared.source ||= model.get("library");
    load();
  },
  async render({ model, el }) {
    const box = document.createElement("div");
    box.className = "pdmem-pane";
    el.appendChild(box);
    shared.shown = true;
    load();
    const plotly = await shared.ready;
    let clicks = 0, bound = false;
    async function draw() {
      const text = model.get("figure_json");
      if (!text) return;
      const figure = JSON.parse(text);
      box.setAttribute("role", "img");
      box.setAttribute("aria-label", model.get("label"));
      await plotly.react(box, figure.data, figure.layout, { displayModeBar: false, responsive: true });
      box.dataset.drawn = String(model.get("drawn"));
      if (!bound) {
        bound = true;
        box.on("plotly_click", (event) => {
          const point = event.points[0];
          const place = [point.pointIndex ?? point.pointNumber].flat();
          model.set("clicked", { trace: point.curveNumber, place, clicks: ++clicks });
          model.save_changes();
        });
      }
    }
    model.on("change:figure_json", draw);
    await draw();
    const fit = new ResizeObserver(() => { if (bound && box.offsetWidth) plotly.Plots.resize(box); });
    fit.observe(el);
    return () => { fit.disconnect(); model.off("change:figure_json", draw); plotly.purge(box); };
  },
};
"""


class Pane(anywidget.AnyWidget):
    """One figure of a page; ``first`` brings plotly.js along, which one pane of a page must.

    With a ``height`` in pixels a figure is made smaller for a column of that page; without, it is drawn as it is.
    """

    _esm = SCRIPT
    library = traitlets.Unicode("").tag(sync=True)
    figure_json = traitlets.Unicode("").tag(sync=True)
    label = traitlets.Unicode("").tag(sync=True)
    drawn = traitlets.Int(0).tag(sync=True)
    clicked = traitlets.Dict().tag(sync=True)

    def __init__(self, height: int | None = None, first: bool = False):
        super().__init__(library=get_plotlyjs() if first else "")
        self.height = height
        self.figure = go.Figure()

    def show(self, figure: go.Figure) -> None:
        """Draw ``figure`` in place of the one that is shown."""
        self.figure = figure
        self.label = str(figure.layout.title.text or "").split("<br>")[0].replace("<b>", "").replace("</b>", "")
        with self.hold_sync():
            self.drawn += 1
            self.figure_json = to_json_plotly(compact(figure, self.height) if self.height else whole(figure))

    def on_click(self, callback: Callable[[int, list[int]], Any]) -> None:
        """Call ``callback(trace, place)`` on a click: the trace's number, and the point's index, or row and column."""
        self.observe(lambda change: callback(change["new"]["trace"], change["new"]["place"]), names="clicked")


def whole(figure: go.Figure) -> dict[str, Any]:
    """A figure as it was made, as wide as the page leaves it."""
    made = figure.to_dict()
    return dict(data=made["data"], layout=fluid(made["layout"]))


def compact(figure: go.Figure, height: int) -> dict[str, Any]:
    """A figure made for a slide as a pane shows it: no title, which the page tells, narrow margins, smaller text.

    On the figure's plain numbers: plotly's own checks, made once already, would take longer than the drawing.
    """
    small = figure.to_dict()
    layout = fluid(small["layout"])
    layout.pop("title", None)
    notes = layout.get("annotations", ())
    headed = any(note.get("yref") == "paper" and note.get("y", 0) >= 1 for note in notes)
    legend = any(trace.get("name") and trace.get("showlegend", trace["type"] != "heatmap") for trace in small["data"])
    layout |= dict(height=height, font={**layout.get("font", {}), "size": FONT}, hoverlabel=dict(font_size=FONT),
                   margin=dict(l=8, r=8, t=36 if headed or legend else 10, b=8, autoexpand=True),
                   legend=dict(orientation="h", x=0, xref="paper", xanchor="left", y=1.01, yref="paper",
                               yanchor="bottom", font=dict(size=FONT), itemwidth=30))
    beside = [note for note in notes if (note.get("xref"), note.get("x")) == ("paper", 1) and note.get("xshift", 0) > 0]
    for note in beside:  # columns of numbers at the right
        note["xshift"] *= FONT / 20
    if beside:
        layout["margin"]["r"] = 90 + max(note["xshift"] for note in beside)
    for note in notes:
        note["font"] = {**note.get("font", {}), "size": FONT}
    for name, axis in layout.items():
        if name.startswith(("xaxis", "yaxis")):
            _small(axis, standoff=4)
            if "title" in axis:
                axis["title"]["text"] = _narrow(axis["title"].get("text", ""), 46 if name[0] == "x" else 24)
            axis |= dict(automargin=True, tickfont=dict(size=FONT))
    for trace in small["data"]:
        if "x" in trace.get("colorbar", {}):  # a bar between two panels: there is no room, and hovering tells
            trace["showscale"] = False
    bars = [trace["colorbar"] for trace in small["data"] if "colorbar" in trace]
    for bar in [*bars, *(axis["colorbar"] for name, axis in layout.items() if name.startswith("coloraxis"))]:
        _small(bar)
        if "title" in bar:
            bar["title"]["text"] = _narrow(bar["title"].get("text", ""))
        bar |= dict(thickness=12, tickfont=dict(size=FONT))
    return dict(data=small["data"], layout=layout)


def _narrow(text: str, letters: int = 12) -> str:
    """A title in lines of about so many letters."""
    return "<br>".join("<br>".join(wrap(line, letters, break_long_words=False)) if "<" not in line else line
                       for line in text.split("<br>"))


def _small(part: dict[str, Any], **more: Any) -> None:
    """Give the title of an axis or a colour bar the pane's size."""
    if "title" in part:
        part["title"] = {**part["title"], "font": dict(size=FONT), **more}
