"""Figures hold the numbers they are given, say what they are, and reach the disk with or without a browser."""

import re
import sys

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("plotly", reason="the figures come with the notebooks extra")

from pdmem_lib import REGISTRY, figures, metrics  # noqa: E402

SUBTITLE = "SmolLM2-135M-Instruct · preset cpu · seeds 42, 43"
STRANGER = "my <b>own</b> & method"
STRANGER_ESCAPED = "my &lt;b&gt;own&lt;/b&gt; &amp; method"


@pytest.fixture
def runs():
    """Two methods of the study and a reader's own, two capacities, two seeds; the baseline comes first on purpose."""
    return pd.DataFrame([dict(method=method, capacity=capacity, seed=seed)
                         for method in ("baseline", "slot", STRANGER) for capacity in (10, 1) for seed in (42, 43)])


def tables(runs):
    """A table for every figure function, values told apart by method, capacity and seed."""
    level = runs.groupby("method").ngroup() + runs["capacity"] / 10 + (runs["seed"] - 42)  # seeds lie 1 % apart
    buckets = pd.DataFrame(dict(bucket=[bucket.label for bucket in metrics.LAG_BUCKETS], n=[27, 24, 60, 130, 398],
                                drop=[0, 1, 2, 3, 4]))
    points = runs.assign(level=level)
    return {
        "forgetting_curves": points.merge(buckets, how="cross").eval("smoothed = level + 4 - drop\nraw = smoothed"),
        "retained_bars": points.assign(retained_mean=level),
        "knowledge_curves": points.merge(pd.DataFrame(dict(session=[1, 2, 3], n=[5, 9, 20])), how="cross").eval(
            "K = level + session"),
        "log_probability_bars": points.assign(logp_own=-3, logp_other=-3.5 + level / 10, logp_zero=-4, logp_off=-4.3),
        "category_heatmap": points.merge(pd.DataFrame(dict(category=[1, 5], n=[96, 121])), how="cross").eval(
            "value = level * category"),
        "loss_curves": points.merge(pd.DataFrame(dict(step=[0, 1, 2])), how="cross").eval("loss = 4 + level - step"),
    }


ALL = ["forgetting_curves", "retained_bars", "knowledge_curves", "log_probability_bars", "category_heatmap",
       "loss_curves"]


def draw(name, runs):
    return getattr(figures, name)(tables(runs)[name], SUBTITLE)


def drawn(figure, **wanted):
    """The traces with data whose attributes match."""
    return [trace for trace in figure.data
            if trace.x is not None and trace.x[0] is not None and all(trace[key] == wanted[key] for key in wanted)]


# --- what every figure does -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ALL)
def test_title_carries_the_subtitle_and_sizes_suit_a_projector(name, runs):
    figure = draw(name, runs)
    assert SUBTITLE in figure.layout.title.text
    assert figure.layout.font.size >= 16
    assert all(note.font.size >= 16 for note in figure.layout.annotations)


@pytest.mark.parametrize("name", ALL)
def test_text_from_data_is_escaped(name, runs):
    table = tables(runs)[name]
    shown = getattr(figures, name)(table, "data <i>x</i>").to_plotly_json()
    visible = repr(shown["layout"]) + repr([(trace.get("name"), trace.get("hovertemplate")) for trace in shown["data"]])
    assert "&lt;b&gt;own&lt;/b&gt; &amp; method" in visible and "<b>own</b>" not in visible
    assert "data &lt;i&gt;x&lt;/i&gt;" in visible and "<i>" not in visible


@pytest.mark.parametrize("name", ALL)
def test_missing_columns_and_empty_tables_are_told(name, runs):
    table, function = tables(runs)[name], getattr(figures, name)
    with pytest.raises(ValueError, match="missing: capacity"):
        function(table.drop(columns="capacity"), SUBTITLE)
    with pytest.raises(ValueError, match="empty"):
        function(table[:0], SUBTITLE)


@pytest.mark.parametrize("name", ["forgetting_curves", "knowledge_curves", "loss_curves"])
def test_axes_name_their_units(name, runs):
    figure = draw(name, runs)
    titles = {axis.title.text for axis in [*figure.select_xaxes(), *figure.select_yaxes()]}
    wanted = {"forgetting_curves": ("(turns)", "(%)"), "knowledge_curves": ("session", "(%)"),
              "loss_curves": ("step", "(nats per token)")}[name]
    assert all(any(unit in (title or "") for title in titles) for unit in wanted)


def test_methods_are_told_apart_by_colour_and_by_marker():
    looks = [figures.look_of(method) for method in (*REGISTRY, "other")]
    assert len({look.colour for look in looks}) == len({look.symbol for look in looks}) == len(looks) == 8
    assert len({(fill.dash, fill.marker, fill.hatch) for fill in map(figures.fill_of, (1, 10, 3))}) == 3
    assert figures.look_of("slot").label == "M.6 Slots"
    assert figures.look_of(STRANGER).label == STRANGER_ESCAPED


# --- one by one -------------------------------------------------------------------------------------------------------

def test_forgetting_curves_have_a_panel_a_method_and_means_over_seeds(runs):
    figure = draw("forgetting_curves", runs)
    panels = [note.text for note in figure.layout.annotations]
    assert panels == ["<b>M.6 Slots</b>", "<b>Stateless baseline</b>", f"<b>{STRANGER_ESCAPED}</b>"]
    assert list(figure.layout.xaxis.ticktext)[0] == "0–31<br>n=27"
    assert list(figure.layout.xaxis.ticktext)[-1] == "256+<br>n=398"
    table = tables(runs)["forgetting_curves"]
    line, = drawn(figure, name="M.6 Slots, 10×", mode="lines")
    dots, = drawn(figure, name="M.6 Slots, 10×", mode="markers")
    rows = table[(table["method"] == "slot") & (table["capacity"] == 10)]
    wanted = rows.groupby("bucket", sort=False)["smoothed"].mean()
    np.testing.assert_allclose(line.y, wanted)
    assert line.line.dash == "dash" and dots.marker.symbol == "star-open"
    assert len(dots.y) == 2 * 5 and dots.opacity < 0.5
    assert {axis.matches for axis in figure.select_yaxes()} == {None, "y"}  # one scale for all panels


def test_forgetting_curves_keep_the_order_of_lags_and_leave_a_gap_where_a_bucket_is_empty(runs):
    curve = metrics.forgetting_curve([300, 5], [0.1, 0.4]).assign(method="slot", capacity=1, seed=42)
    figure = figures.forgetting_curves(curve[::-1], SUBTITLE)
    line, = drawn(figure, mode="lines")
    np.testing.assert_allclose(line.y, [40, np.nan, np.nan, np.nan, 10])
    assert figure.layout.xaxis.ticktext[1] == "32–63<br>n=0"
    assert drawn(figure, mode="markers")[0].opacity == 1  # one seed is no cloud


def test_counts_that_differ_show_as_a_range(runs):
    table = tables(runs)["category_heatmap"]
    table.loc[table.index[0], "n"] = 90
    assert "multi-hop<br>n=90–96" in figures.category_heatmap(table, SUBTITLE).layout.xaxis.ticktext


def test_retained_bars_are_means_with_their_seeds(runs):
    figure = draw("retained_bars", runs)
    bars = drawn(figure, type="bar", name="M.6 Slots")
    # slot is the third of baseline, my..., slot: level 2 + capacity/10 + seed 0 or 1, hence means 2.6 and 3.5
    np.testing.assert_allclose([bar.y[0] for bar in bars], [2.6, 3.5])
    assert [bar.marker.pattern.shape for bar in bars] == ["", "/"]
    assert [list(dots.y) for dots in drawn(figure, type="scatter")][:2] == [[2.1, 3.1], [3.0, 4.0]]
    assert [note.text for note in figure.layout.annotations][:2] == ["2.6", "3.5"]
    alone = figures.retained_bars(tables(runs)["retained_bars"].query("seed == 42"), SUBTITLE)
    assert drawn(alone, type="scatter") == []


def test_knowledge_curves_have_a_panel_a_capacity_and_each_method_once_in_the_legend(runs):
    figure = draw("knowledge_curves", runs)
    assert [note.text for note in figure.layout.annotations] == ["<b>capacity 1×</b>", "<b>capacity 10×</b>"]
    legend = [trace.name for trace in figure.data if trace.showlegend]
    assert legend == ["M.6 Slots", "Stateless baseline", STRANGER_ESCAPED]
    line = drawn(figure, name="M.6 Slots", mode="lines+markers")[0]
    np.testing.assert_allclose(line.y, [3.6, 4.6, 5.6])
    assert list(figure.layout.xaxis.ticktext) == ["1<br>n=5", "2<br>n=9", "3<br>n=20"]


def test_log_probabilities_state_own_minus_other(runs):
    figure = draw("log_probability_bars", runs)
    # own - other = 0.5 - level / 10; slot levels 2.6 and 3.5 as above: +0.240, +0.150
    notes = [note.text for note in figure.layout.annotations]
    assert notes[:2] == ["+0.240", "+0.150"] and notes[-1] == "<b>own − other</b>"
    assert list(figure.layout.yaxis.ticktext)[:2] == ["M.6 Slots, 1×", "M.6 Slots, 10×"]
    assert {trace.name for trace in figure.data if trace.name} == {name for name, _ in figures.MEMORIES.values()}
    assert "nats" in figure.layout.xaxis.title.text


def test_log_probabilities_show_a_loss_with_a_minus_sign_and_say_what_was_not_measured():
    table = pd.DataFrame(dict(method=["slot", "gated"], capacity=1, logp_own=[-3.2, -3.0], logp_other=[-3.1, np.nan],
                              logp_zero=-4.0, logp_off=-4.3))
    notes = [note.text for note in figures.log_probability_bars(table, SUBTITLE).layout.annotations]
    assert notes[:2] == ["n/a", "−0.100"]  # gated comes before slot


def test_category_heatmap_names_categories(runs):
    figure = draw("category_heatmap", runs)
    assert list(figure.layout.xaxis.ticktext) == ["multi-hop<br>n=96", "adversarial<br>n=121"]
    np.testing.assert_allclose(figure.data[0].z[:2], [[2.6, 13], [3.5, 17.5]])


def test_loss_curves_draw_the_running_mean_of_the_seeds(runs):
    figure = figures.loss_curves(tables(runs)["loss_curves"], SUBTITLE, window=2)
    smooth = drawn(figure, name="M.6 Slots, 1×")[-1]
    np.testing.assert_allclose(smooth.y, [6.6, 6.1, 5.1])  # seeds' mean 6.6 5.6 4.6, then pairs
    assert len(drawn(figure, name="M.6 Slots, 1×", opacity=0.25)) == 2
    assert any("running mean of 2 steps" in trace.name for trace in figure.data)


# --- files ------------------------------------------------------------------------------------------------------------

def test_save_without_a_browser_writes_the_page_and_one_warning(runs, tmp_path, monkeypatch):
    kaleido = pytest.importorskip("kaleido")
    from kaleido.errors import ChromeNotFoundError

    def no_browser(*_, **__):
        raise ChromeNotFoundError("none")

    monkeypatch.setattr(kaleido, "write_fig_from_object_sync", no_browser)
    with pytest.warns(UserWarning, match="apt-get install chromium") as told:
        written = figures.save_all({"retained": draw("retained_bars", runs)}, tmp_path)
    assert len(told) == 1
    assert written == [tmp_path / "retained.html"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plotly.min.js", "retained.html"]


def test_save_without_kaleido_names_the_mend(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "kaleido", None)
    with pytest.warns(UserWarning, match="pip install kaleido"):
        assert figures.save(draw("retained_bars", runs), tmp_path, "retained") == [tmp_path / "retained.html"]


def test_pages_are_small_need_no_network_and_fall_back_to_the_svg(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "_draw", lambda images: False)
    page, = figures.save(draw("forgetting_curves", runs), tmp_path, "forgetting")
    text = page.read_text(encoding="utf-8")
    assert len(text) < 100_000
    assert 'src="plotly.min.js"' in text and (tmp_path / "plotly.min.js").stat().st_size > 1_000_000
    assert not re.search(r'(src|href)="(https?:)?//', text)
    assert '<img src="forgetting.svg"' in text


def test_a_figure_that_fails_to_draw_leaves_the_earlier_images_alone(runs, tmp_path, monkeypatch):
    kaleido = pytest.importorskip("kaleido")

    def half_written(specs, **_):
        specs[0]["path"].write_bytes(b"half")
        raise OSError("the disk is full")

    (tmp_path / "retained.png").write_bytes(b"earlier")
    monkeypatch.setattr(kaleido, "write_fig_from_object_sync", half_written)
    with pytest.raises(OSError, match="disk is full"):
        figures.save(draw("retained_bars", runs), tmp_path, "retained")
    assert (tmp_path / "retained.png").read_bytes() == b"earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plotly.min.js", "retained.html", "retained.png"]


def test_save_all_draws_every_image_with_one_browser(runs, tmp_path):
    pytest.importorskip("kaleido")
    from choreographer.browsers.chromium import Chromium

    if not Chromium.find_browser(skip_local=False):
        pytest.skip("no Chromium here: apt-get install chromium")
    stems = {"retained": "retained_bars", "logp": "log_probability_bars"}
    written = figures.save_all({stem: draw(name, runs) for stem, name in stems.items()}, tmp_path / "new" / "folder")
    assert [path.name for path in written] == ["retained.html", "logp.html", "retained.png", "retained.svg", "logp.png",
                                               "logp.svg"]
    for stem in stems:
        png = (tmp_path / "new" / "folder" / f"{stem}.png").read_bytes()
        svg = (tmp_path / "new" / "folder" / f"{stem}.svg").read_text(encoding="utf-8")
        assert png.startswith(b"\x89PNG") and int.from_bytes(png[16:20]) == 1.5 * figures.WIDTH
        assert "<svg" in svg and "Slots" in svg
