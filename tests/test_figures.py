"""Figures hold the numbers they are given, say what they are, and reach the disk with or without a browser."""

import re
import sys

import numpy as np
import pandas as pd
import pytest

go = pytest.importorskip("plotly.graph_objects", reason="the figures come with the notebooks extra")

from pdmem_lib import REGISTRY, _plot, figures, images, metrics  # noqa: E402

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
        **evidence_tables(points),
    }


def evidence_tables(points):
    """A table for each of the figures that take one row a method and capacity."""
    pairs = points[points["seed"] == 42].drop(columns="seed").rename(columns=dict(level="effect"))
    interval = pairs.eval("low = effect - 1\nhigh = effect + 1")
    memories = pd.DataFrame(dict(memory=["own", "other", "random", "initial", "shuffled", "zero", "off", "format"],
                                 step=range(8)))
    kinds = pd.DataFrame(dict(kind=["lag bucket", "lag bucket", "answer type"], value=["256+", "0–31", "a <i>date</i>"],
                              n=[398, 27, 60]))
    return {
        "effect_intervals": interval.assign(
            contrast="own - other", score="logp", unit="nats per token", n=668, conversations=4, seeds=2,
            low_clustered=np.nan, high_clustered=np.nan, p=0.0004, smallest_effect=0.25, verdict="cannot be told"),
        "controls_chart": points.merge(memories, how="cross").eval("value = -3 - step * level / 10\nf1 = 20 - step"),
        "noise_floor_bars": pairs.eval("retained_mean = effect\nnoise_mean = 3\nnoise_high = 4.5\ndelta_f1 = -effect"),
        "published_against_ours": pairs.assign(
            published_low=np.nan, published_high=0.4, printed="< 0.4 %", noise_high=4.5).rename(
                columns=dict(effect="retained_mean")),
        "reference_points": interval.assign(
            reference=pairs["method"], group="memory", f1=pairs["effect"], logp=-3 + pairs["effect"], tokens=24,
            seconds=0.5, bytes=1000),
        "breakdown": interval.merge(kinds, how="cross"),
        "turn_finding": interval.eval("n = 620\nmrr = effect / 10\nlow = low / 10\nhigh = high / 10\nchance = 0.01\n"
                                      "others = mrr - 0.05"),
        "recall_curves": pairs.merge(pd.DataFrame(dict(axis=["lag", "lag", "load"], x=[8, 0, 1])), how="cross").eval(
            "accuracy = 1 / (1 + x)\nlow = accuracy - 0.1\nhigh = accuracy + 0.1\nchance = 0.05\n"
            "probe = accuracy + 0.05\ntrace = accuracy\ntrace_theory = accuracy"),
    }


EVIDENCE = ["effect_intervals", "controls_chart", "noise_floor_bars", "published_against_ours",
            "reference_points", "breakdown", "turn_finding",
            "recall_curves"]
ALL = ["forgetting_curves", "retained_bars", "knowledge_curves", "log_probability_bars", "category_heatmap",
       "loss_curves", *EVIDENCE]


def draw(name, runs):
    return getattr(figures, name)(tables(runs)[name], SUBTITLE)


def drawn(figure, **wanted):
    """The traces with data whose attributes match."""
    return [trace for trace in figure.data
            if trace.x is not None and trace.x[0] is not None and wanted.items() <= plain(trace).items()]


def plain(trace):
    return {key: value for key, value in trace.to_plotly_json().items() if isinstance(value, (str, int, float))}


# --- what every figure does -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ALL)
def test_title_carries_the_subtitle_and_sizes_suit_a_projector(name, runs):
    figure = draw(name, runs)
    assert SUBTITLE in figure.layout.title.text
    assert figure.layout.font.size >= 16
    assert all(note.font.size >= 16 for note in figure.layout.annotations)


@pytest.mark.parametrize("name", EVIDENCE)
def test_every_column_that_a_docstring_names_is_asked_for(name, runs):
    table, function = tables(runs)[name], getattr(figures, name)
    asked = str(pytest.raises(ValueError, function, table[["method"]], SUBTITLE).value)
    columns = asked.split("columns ")[1].split(";")[0].split(", ")
    assert all(re.search(rf"\b{column}\b", function.__doc__) for column in columns)
    for column in columns:
        with pytest.raises(ValueError, match=f"missing: {column}$"):
            function(table.drop(columns=column), SUBTITLE)


@pytest.mark.parametrize("name", ["effect_intervals", "noise_floor_bars", "turn_finding", "breakdown"])
def test_two_rows_for_one_place_are_refused(name, runs):
    table = tables(runs)[name]
    with pytest.raises(ValueError, match="one row a method"):
        getattr(figures, name)(pd.concat([table, table[:1]]), SUBTITLE)


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


@pytest.mark.parametrize("name", ["forgetting_curves", "knowledge_curves", "loss_curves", *EVIDENCE])
def test_axes_name_their_units(name, runs):
    figure = draw(name, runs)
    titles = {axis.title.text for axis in [*figure.select_xaxes(), *figure.select_yaxes()]}
    wanted = {"forgetting_curves": ("(turns)", "(%)"), "knowledge_curves": ("session", "(%)"),
              "loss_curves": ("step", "(nats per token)"), "effect_intervals": ("(nats per token)",),
              "controls_chart": ("(nats)", "(%)"), "noise_floor_bars": ("(%)", "(points)"),
              "published_against_ours": ("(%)",),
              "reference_points": ("tokens", "(%)"), "breakdown": ("(nats per token)",),
              "turn_finding": ("(0 to 1",), "recall_curves": ("(turns since the fact)", "(0 to 1)")}[name]
    assert all(any(unit in (title or "") for title in titles) for unit in wanted)


def test_methods_are_told_apart_by_colour_and_by_marker():
    looks = [figures.look_of(method) for method in (*REGISTRY, "other")]
    assert len({look.colour for look in looks}) == len({look.symbol for look in looks}) == len(looks) == 8
    assert len({(fill.dash, fill.marker, fill.hatch) for fill in map(figures.fill_of, (1, 10, 3))}) == 3
    assert figures.look_of("slot").label == "M.6 Slots"
    assert figures.look_of("M.6") == figures.look_of("slot") and figures.look_of("M.6.lora") == figures.look_of("slot.lora")
    assert figures.look_of("M.61").colour == figures.look_of("other").colour
    assert figures.look_of(STRANGER).label == STRANGER_ESCAPED


def test_a_readers_own_method_is_called_by_its_title_or_its_name(monkeypatch):
    class Mine(REGISTRY["slot"]):
        pass

    class Titled(REGISTRY["slot"]):
        title = "Hashed"

    for name, method in (("mine", Mine), ("titled", Titled), ("seventh", type("Seventh", (Titled,), {"alias": "M.7"}))):
        monkeypatch.setitem(REGISTRY, name, method)
    assert [figures.look_of(name).label for name in ("mine", "titled", "seventh", "slot", "baseline")] == [
        "mine", "Hashed", "M.7 Hashed", "M.6 Slots", "Stateless baseline"]


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


def test_forgetting_curves_draw_intervals_where_the_table_has_them(runs):
    plain = tables(runs)["forgetting_curves"]
    assert all(trace.error_y.array is None for trace in figures.forgetting_curves(plain, SUBTITLE).data)
    figure = figures.forgetting_curves(plain.eval("low = raw - 1\nhigh = raw + 2"), SUBTITLE, "own - <i>zero</i> (%)")
    dots, = drawn(figure, name="M.6 Slots, 10×", mode="markers")
    line, = drawn(figure, name="M.6 Slots, 10×", mode="lines")
    np.testing.assert_allclose([*dots.error_y.array], 2)
    np.testing.assert_allclose([*dots.error_y.arrayminus], 1)
    assert line.error_y.array is None
    assert any("95 %" in (trace.name or "") for trace in figure.data)
    assert figure.layout.yaxis.title.text == "own - &lt;i&gt;zero&lt;/i&gt; (%)"
    assert not figure.layout.shapes  # the zero line, a panel each, only where something lies below it
    below = figures.forgetting_curves(plain.assign(raw=-plain["raw"]), SUBTITLE)
    assert [(line.y0, line.y1) for line in below.layout.shapes] == [(0, 0)] * 3


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
    assert notes[:2] == ["+0.240", "+0.150"] and notes[-1] == "<b>own − other<br>(nats)</b>"
    assert list(figure.layout.yaxis.ticktext)[:2] == ["M.6 Slots, 1×", "M.6 Slots, 10×"]
    shown = {figures.MEMORIES[memory][0] for memory in ("own", "other", "zero", "off")}
    assert {trace.name for trace in figure.data if trace.name} == shown
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


# --- the evidence -----------------------------------------------------------------------------------------------------

def bars(figure, **wanted):
    return drawn(figure, type="bar", **wanted)


def test_effects_have_intervals_by_question_and_by_conversation_and_the_reach_of_the_sample(runs):
    table = tables(runs)["effect_intervals"]
    chosen = (table["method"] == "slot") & (table["capacity"] == 10)
    table.loc[chosen, ["low_clustered", "high_clustered", "verdict", "p"]] = [-2.0, 7.0, "remembers", 0.04]
    table.loc[table["method"] == "baseline", "smallest_effect"] = np.nan
    figure = figures.effect_intervals(table, SUBTITLE)
    assert list(figure.layout.yaxis.ticktext)[:3] == ["M.6 Slots, 1×", "M.6 Slots, 10×", "Stateless baseline, 1×"]
    # slot at 10×: level 2 + 10 / 10 + seed 0; its row is the second, y = 1
    wide, = (trace for trace in drawn(figure, mode="lines") if list(trace.y) == [1, 1])
    thin, = (trace for trace in drawn(figure, mode="lines+markers") if list(trace.y) == [1, 1])
    dot, = drawn(figure, name="M.6 Slots, 10×")
    assert (list(wide.x), list(thin.x), list(dot.x)) == ([2, 4], [-2, 7], [3])
    assert wide.line.width > 3 * thin.line.width
    assert [(bar.base[0], bar.x[0], bar.y[0]) for bar in bars(figure)] == [(-0.25, 0.5, y) for y in (0, 1, 4, 5)]
    zero, = (shape for shape in figure.layout.shapes if shape.type == "line")
    assert (zero.x0, zero.x1) == (0, 0)
    row = [note.text for note in figure.layout.annotations if note.y == 1]
    assert row == ["+3.000", "0.040", "remembers"]
    assert [note.text for note in figure.layout.annotations if note.y == 0] == ["+2.100", "&lt;0.001", "cannot be told"]
    assert figure.layout.xaxis.title.text.endswith("<br>668 questions, 4 conversations, seeds: 2")


@pytest.mark.parametrize("column, other", [("contrast", "own - zero"), ("score", "f1"), ("unit", "points")])
def test_effects_of_several_comparisons_are_refused(column, other, runs):
    table = tables(runs)["effect_intervals"]
    table.loc[table.index[0], column] = other
    with pytest.raises(ValueError, match=f"one {column}, the table mixes .*{other}"):
        figures.effect_intervals(table, SUBTITLE)


def test_effects_on_f1_are_printed_in_points_and_a_zero_has_no_sign(runs):
    table = tables(runs)["effect_intervals"].assign(score="f1", unit="points", effect=-0.04)
    figure = figures.effect_intervals(table, SUBTITLE)
    assert [note.text for note in figure.layout.annotations][0] == "0.0"
    assert figure.layout.xaxis.title.text.startswith("own − other, F1 (points)")


def test_controls_show_every_memory_with_its_own_marker_on_both_scores(runs):
    figure = draw("controls_chart", runs)
    for name, symbol, _ in figures.MEMORIES.values():
        left, right = drawn(figure, name=name)
        assert left.marker.symbol == right.marker.symbol == symbol
        assert (left.xaxis, right.xaxis) == ("x", "x2")
    assert len({symbol for _, symbol, _ in figures.MEMORIES.values()}) == len(figures.MEMORIES) == 8
    # slot at 1×, mean over the seeds: level 2.6; random is the third memory, -3 - 2 * 2.6 / 10
    random, _ = drawn(figure, name="random state")
    assert random.x[0] == pytest.approx(-3.52)
    notes = [note.text for note in figure.layout.annotations]
    assert notes[0] == "+0.260" and "+1.0" in notes  # own - other: level / 10 nats, 1 point


def test_controls_that_were_not_run_are_left_out_and_unknown_ones_named(runs):
    table = tables(runs)["controls_chart"]
    few = figures.controls_chart(table[table["memory"].isin(["own", "off"])], SUBTITLE)
    assert [trace.name for trace in few.data if trace.showlegend is None] == ["own memory", "off (frozen model)"]
    assert few.layout.annotations[0].text == "n/a"
    with pytest.raises(ValueError, match="unknown memory dream: known are own, other"):
        figures.controls_chart(table.replace(dict(memory=dict(zero="dream"))), SUBTITLE)


def test_own_memory_is_seen_inside_the_ring_of_the_other_where_they_are_equal(runs):
    figure = draw("controls_chart", runs)
    names = [trace.name for trace in figure.data]
    own, other = drawn(figure, name="own memory")[0], drawn(figure, name="another conversation's")[0]
    assert names.index("another conversation's") < names.index("own memory")  # drawn later, on top
    assert own.marker.size < other.marker.size - 5 and other.marker.symbol == "circle-open"


def test_noise_floors_stand_beside_the_score_and_the_unclipped_difference(runs):
    figure = draw("noise_floor_bars", runs)
    score, = bars(figure, name="M.6 Slots, 10×")
    floors = [bar for bar in bars(figure) if bar.base is not None]
    dot, = drawn(figure, name="M.6 Slots, 10×", type="scatter")
    assert score.x[0] == 3 and score.marker.pattern.shape == "/"
    assert {(bar.base[0], bar.x[0]) for bar in floors} == {(3, 1.5)} and len(floors) == 6
    assert dot.x[0] == -3 and dot.xaxis == "x2"  # below zero, unclipped
    assert [note.text for note in figure.layout.annotations if note.y == 1] == ["3.0", "3.0–4.5", "−3.0"]


def test_clipping_counts_differences_on_each_side_of_zero_and_marks_the_study():
    d = np.array([-0.3, -0.1, 0.0, 0.0, 0.2, 0.4])
    figure = figures.clipping(d, [0.05, -0.02, 0.01], [0.1, 0.08, 0.12], SUBTITLE, effect=0.01)
    left = [bar for bar in bars(figure) if bar.xaxis == "x"]
    assert sum(bar.y[0] for bar in left if bar.x[0] < 0) == 2 and sum(bar.y[0] for bar in left if bar.x[0] > 0) == 4
    assert {bar.marker.color for bar in left if bar.x[0] < 0} == {"white"}
    right = [bar for bar in bars(figure) if bar.xaxis == "x2"]
    assert sum(bar.y[0] for bar in right) == 6 and len({bar.width[0] for bar in right}) == 1
    names = [trace.name for trace in figure.data if trace.name]
    assert "unclipped mean of the study: +5.0" in names and "published score of the study: +10.0" in names
    assert [shape.x0 for shape in figure.layout.shapes] == pytest.approx([5, 5, 10, 10, 1])  # the truth at the right only
    assert "points" in figure.layout.xaxis.title.text and SUBTITLE in figure.layout.title.text


@pytest.mark.parametrize("d, plain, clipped", [([], [0], [0]), ([0], [], []), ([0], [0, 0], [0]), ([np.nan], [0], [0])])
def test_clipping_refuses_what_is_not_there(d, plain, clipped):
    with pytest.raises(ValueError, match="all finite"):
        figures.clipping(d, plain, clipped, SUBTITLE)


def test_clipping_of_a_study_without_spread_has_one_bar_a_score():
    figure = figures.clipping([0.1, 0.1], [0.1], [0.1], SUBTITLE)
    assert [bar.y[0] for bar in bars(figure)] == [2, 1, 1]


def references(**columns):
    return pd.DataFrame(dict(reference=["slots 1×", "slots 10×", "frozen", "cut to 8k"],
                             method=["slot", "slot", "", ""],
                             group=["memory", "memory", "frozen", "prompt"], capacity=[1, 10, np.nan, np.nan],
                             f1=[8, 9, 4, 20], low=[7, 8, 3, 18], high=[9, 10, 5, 23], logp=[-3, -3.1, -4, -2],
                             tokens=[24, 24, 24, 8000], seconds=1.0, bytes=0) | columns)


def test_reference_points_keep_shapes_by_group_and_intervals():
    figure = figures.reference_points(references(), SUBTITLE)
    one, ten, frozen, prompt = (drawn(figure, name=name)[0] for name in references()["reference"])
    assert [trace.marker.symbol for trace in (one, ten, frozen, prompt)] == ["circle", "circle", "cross", "square"]
    assert (one.marker.color, ten.marker.color) == (figures.look_of("slot").colour, "white")  # a capacity each
    assert (prompt.y[0], prompt.error_y.array[0], prompt.error_y.arrayminus[0]) == (20, 3, 2)
    logp = figures.reference_points(references(), SUBTITLE, y="logp")
    assert drawn(logp, name="frozen")[0].y[0] == -4 and drawn(logp, name="frozen")[0].error_y.array[0] == 0


def test_reference_points_that_read_as_much_stand_side_by_side_under_one_tick():
    figure = figures.reference_points(references(), SUBTITLE)
    x = [drawn(figure, name=name)[0].x[0] for name in references()["reference"]]
    assert np.diff(x).min() >= 21.9 and x[3] - x[2] > 500  # pixels
    ticks = dict(zip(figure.layout.xaxis.ticktext, figure.layout.xaxis.tickvals))
    assert ticks["24 each"] == pytest.approx(np.mean(x[:3]))
    assert ticks["5,000"] < x[3] and "20" not in ticks
    step = ticks["1,000"] - ticks["100"]
    assert x[3] == pytest.approx(ticks["1,000"] + np.log10(8) * step)


def test_reference_labels_do_not_overlap():
    rng = np.random.default_rng(0)
    points, widths = rng.uniform([300, 200], [800, 400], (12, 2)), [120.0] * 12
    size = np.array([1100, 600])
    centres = _plot.place_labels(points, widths, np.concatenate([points - 9, points + 9], -1), size)
    for i in range(12):
        assert (np.abs(centres[i] - size / 2) <= size / 2).all()
        clear = (np.abs(centres - centres[i]) >= [120, 18]).any(-1)
        assert clear.sum() == 11  # all but itself
        assert (np.abs(points - centres[i]) >= [60 + 9, 9 + 8]).any(-1).all()


def test_reference_points_say_what_they_cannot_draw():
    with pytest.raises(ValueError, match="at least one"):
        figures.reference_points(references(tokens=[24, 0, 24, 8000]), SUBTITLE)
    with pytest.raises(ValueError, match="unknown group magic: known are memory"):
        figures.reference_points(references(group=["magic"] * 4), SUBTITLE)
    with pytest.raises(ValueError, match="y is f1 or logp"):
        figures.reference_points(references(), SUBTITLE, y="speed")


def test_breakdowns_have_a_panel_a_kind_and_lags_in_order(runs):
    figure = draw("breakdown", runs)
    assert [note.text for note in figure.layout.annotations] == ["<b>lag (turns since the evidence)</b>",
                                                                 "<b>kind of answer</b>"]
    assert list(figure.layout.xaxis.ticktext) == ["0–31<br>n=27", "256+<br>n=398"]
    assert list(figure.layout.xaxis2.ticktext) == ["a &lt;i&gt;date&lt;/i&gt;<br>n=60"]
    dots, alone = drawn(figure, name="M.6 Slots, 10×")
    first, *_ = drawn(figure, name="M.6 Slots, 1×")
    assert list(dots.y) == [3, 3] and list(dots.error_y.array) == list(dots.error_y.arrayminus) == [1, 1]
    assert [round(x) for x in dots.x] == [1, 0] and dots.x[0] > first.x[0]  # 256+ came first; no dot on another
    assert any(shape.y0 == shape.y1 == 0 for shape in figure.layout.shapes)
    assert "(points)" in figures.breakdown(tables(runs)["breakdown"], SUBTITLE, "points").layout.yaxis.title.text


def test_turn_finding_sets_the_rank_beside_other_questions_and_chance(runs):
    figure = draw("turn_finding", runs)
    chance, others, own = drawn(figure, name="M.6 Slots, 10×")
    assert (chance.x[0], own.x[0]) == (0.01, pytest.approx(0.3)) and others.x[0] == pytest.approx(0.25)
    assert others.marker.color == "white" and own.marker.color == figures.look_of("slot").colour
    interval = [trace for trace in drawn(figure, mode="lines") if trace.y[0] == 1]
    assert list(interval[0].x) == pytest.approx([0.2, 0.4])
    assert [note.text for note in figure.layout.annotations if note.y == 1] == ["0.300", "+0.050", "620"]
    assert figure.layout.xaxis.range[1] > 0.4


def test_recall_curves_draw_one_axis_in_order_and_tell_quantities_by_dash(runs):
    figure = draw("recall_curves", runs)
    band, chance, theory, trace, probe, accuracy = drawn(figure, name="M.6 Slots, 10×")
    np.testing.assert_allclose(accuracy.x, np.log1p([0, 8]))
    np.testing.assert_allclose(accuracy.y, [1, 1 / 9])
    np.testing.assert_allclose(band.y, [1.1, 1 / 9 + 0.1, 1 / 9 - 0.1, 0.9])
    assert (theory.line.dash, probe.line.dash, accuracy.line.dash) == ("dash", "dot", None)
    assert trace.mode == "markers" and list(chance.y) == [0.05, 0.05]
    assert list(figure.layout.xaxis.ticktext) == ["0", "8"]
    load = figures.recall_curves(tables(runs)["recall_curves"], SUBTITLE, axis="load")
    assert load.layout.xaxis.title.text == "load (facts in the memory)" and list(load.layout.xaxis.ticktext) == ["1"]
    with pytest.raises(ValueError, match="axis is one of lag, load, interference with rows in the table, got 'age'"):
        figures.recall_curves(tables(runs)["recall_curves"], SUBTITLE, axis="age")


def test_null_distributions_count_what_is_at_least_as_high():
    values = [*range(100)]
    figure = figures.null_distribution(values, 95, "data <i>x</i>", "<i>noise</i>", "score (%)")
    assert sum(figure.data[0].y) == 100 and list(figure.data[1].x) == [95, 95]
    note, = figure.layout.annotations
    assert note.text == "<b>observed 95</b><br>5 of 100 simulated at least as high"
    assert note.xanchor == "right" and note.font.size >= 16  # written over the values, not past the edge
    assert figures.null_distribution(values, -4, SUBTITLE, "t", "x").layout.annotations[0].text.startswith(
        "<b>observed −4</b><br>100 of 100")
    assert "<i>" not in figure.layout.title.text and figure.layout.xaxis.title.text == "score (%)"
    assert "data &lt;i&gt;x&lt;/i&gt;" in figure.layout.title.text


@pytest.mark.parametrize("values, observed", [([], 1), ([1, np.nan], 1), ([1, 2], np.inf)])
def test_null_distributions_ask_for_finite_values(values, observed):
    with pytest.raises(ValueError, match="at least one simulated value"):
        figures.null_distribution(values, observed, SUBTITLE, "t", "x")


# --- files ------------------------------------------------------------------------------------------------------------

def test_save_without_a_browser_writes_the_page_and_one_warning(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(images.Drawer, "draw", none_found)
    with pytest.warns(UserWarning, match="apt-get install chromium") as told:
        written = figures.save_all({"retained": draw("retained_bars", runs)}, tmp_path)
    assert len(told) == 1
    assert written == [tmp_path / "retained.html"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plotly.min.js", "retained.html"]


def none_found(*_, **__):
    raise images.NoImages("no Chromium is found; apt-get install chromium")


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
    def drawn(self, figure, kind, scale):
        if kind == "svg":
            raise ValueError("no such colour")
        return b"new"

    (tmp_path / "retained.png").write_bytes(b"earlier")
    monkeypatch.setattr(images.Drawer, "draw", drawn)
    with pytest.raises(ValueError, match="no such colour"):
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


def test_notebooks_show_a_png_beside_the_figure_where_a_browser_is(monkeypatch):
    import plotly.io
    from choreographer.browsers.chromium import Chromium

    made, closed = [], []
    monkeypatch.setattr(images.Drawer, "__init__", lambda self: made.append(self))
    monkeypatch.setattr(images.Drawer, "close", lambda self: closed.append(self))
    for browser, renderers in ((None, "fluid"), *2 * [("/somewhere/chromium", "fluid+small_png")]):
        monkeypatch.setattr(Chromium, "find_browser", lambda **_: browser)  # noqa: B023
        figures.show_everywhere()
        assert plotly.io.renderers.default == renderers
    assert len(made) == 2 and closed == made[:1]  # a second call leaves one browser, not two

    monkeypatch.setattr(images.Drawer, "draw", none_found)
    with pytest.warns(UserWarning, match="no more figures are shown as PNG: no Chromium is found"):
        assert figures.picture(go.Figure()) == {}
    assert plotly.io.renderers.default == "fluid" and closed == made
    assert figures.picture(go.Figure()) == {}  # and says it once


def test_published_ranges_stand_beside_ours_and_gaps_are_said():
    nan = np.nan
    table = pd.DataFrame([("slot", 1, 7.0, 18.0, "7–18 %", 2.4, 4.0), ("prefix", 1, nan, 0.4, "< 0.4 %", 0.1, 0.3),
                          ("slot", 10, nan, nan, "converge", nan, nan)],
                         columns=["method", "capacity", "published_low", "published_high", "printed", "retained_mean",
                                  "noise_high"])
    figure = figures.published_against_ours(table, SUBTITLE, "GPT-2 [A]", "ours, tiny")
    ranges = {(bar.base[0], bar.base[0] + bar.x[0]) for bar in drawn(figure, type="bar")}
    assert ranges == {(7, 18), (0, 0.4)}
    notes = [note.text for note in figure.layout.annotations]
    assert {"7–18 %", "&lt; 0.4 %", "converge", "2.4 %", "0.1 %", "not run"} <= set(notes)
    assert {"GPT-2 [A]", "ours, tiny"} <= {trace.name for trace in figure.data}
