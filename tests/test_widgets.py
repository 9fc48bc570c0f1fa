"""Figures with controls: a control that is moved redraws the figure, and each carries a picture of itself."""

import json

import numpy as np
import pytest

pytest.importorskip("anywidget", reason="the widgets come with the notebooks extra")

from pdmem_lib import estimates, widgets  # noqa: E402

SUBTITLE = "made up"
L, h, T, M, N = 2, 3, 4, 5, 2
ATTENTION = np.random.default_rng(0).dirichlet(np.ones(2 * M), size=(L, h, T))[..., :M]
SHARES = [np.ones((M, 1)), np.full((M, 2), 0.5), np.full((M, 3), 1 / 3)]
EXPLORERS = {
    "attention": lambda: widgets.explore_attention(ATTENTION, ["a", "b", "c", "?"], SUBTITLE),
    "provenance": lambda: widgets.explore_provenance(SHARES, SUBTITLE, ["Ann: hi", "Bob: hello"]),
    "matrix": lambda: widgets.explore_matrix([np.eye(3) * k for k in range(1, 4)], SUBTITLE),
    "clipping": lambda: widgets.explore_clipping(SUBTITLE, repeats=20),
}
MOVES = {"attention": ("block", 1), "provenance": ("turn", 0), "matrix": ("turns", 0), "clipping": ("effect", 0.05)}


@pytest.mark.parametrize("name", EXPLORERS)
def test_a_control_redraws_the_figure(name):
    explorer = EXPLORERS[name]()
    before, (control, value) = explorer.figure.to_json(), MOVES[name]
    explorer.controls[control].value = value
    after, shown = explorer.figure.to_json(), json.loads(explorer.pane.figure_json)
    assert SUBTITLE in explorer.figure.layout.title.text
    assert after != before and explorer.values[control] == value
    assert shown["layout"]["title"] == explorer.figure.to_plotly_json()["layout"]["title"]


@pytest.mark.parametrize("name", EXPLORERS)
def test_what_it_shows_without_a_kernel_names_its_controls(name):
    explorer = EXPLORERS[name]()
    shown = explorer._repr_mimebundle_()
    bundle = shown[0] if isinstance(shown, tuple) else shown
    assert all(control in bundle["text/plain"] for control in explorer.controls)


def test_what_cannot_be_drawn_is_told_and_the_figure_stays():
    def draw(turns):
        if turns > 1:
            raise ValueError("no such turn")
        return figure
    figure = widgets.figures.null_distribution([0.0, 1.0], 0.5, SUBTITLE, "title", "x")
    explorer = widgets.Explorer(draw, turns=widgets.ipywidgets.IntSlider(0, 0, 3))
    explorer.controls["turns"].value = 3
    assert explorer.message.value == "no such turn" and explorer.figure is figure
    explorer.controls["turns"].value = 1
    assert explorer.message.value == ""


def test_clipping_starts_and_moves_as_its_simulation_says():
    explorer = EXPLORERS["clipping"]()
    assert explorer.values == dict(spread=0.15, effect=0.0, questions=80, seed=0)
    for name, value in dict(spread=0.3, questions=40, seed=3).items():
        explorer.controls[name].value = value
    found = estimates.simulate_clipping(0.3, 0.0, 40, seed=3, repeats=20)
    title = f"published score of the study: +{100 * found.published[0]:.1f}"
    assert title in [trace.name for trace in explorer.figure.data]
    assert "40 questions, seed 3" in explorer.figure.layout.title.text
