"""Figures of the data count what they are given, place it where it belongs, and refuse what cannot be."""

import re

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("plotly", reason="the figures come with the notebooks extra")

from pdmem_lib import data_figures, figures  # noqa: E402

SUBTITLE = "made up · <i>two</i> conversations"
STRANGER = "conv <b>1</b> & more"
SESSIONS = pd.DataFrame(dict(
    conversation=[STRANGER, STRANGER, STRANGER, "conv-2"], session=[1, 2, 4, 1], turns=[10, 40, 20, 30],
    date=pd.to_datetime(["2023-01-09", "2023-02-01", "2023-03-05", "2022-06-01"]), part=["train"] * 3 + ["test"]))
REACH = pd.DataFrame(dict(conversation=[STRANGER], date=pd.to_datetime(["2023-02-01"]), lag=[41]))
QUESTIONS = pd.DataFrame(dict(category=[4, 4, 1, 5, 5], lag=[0, 31, 48, 300, 400]))
DRAWN = {
    "session_timeline": lambda: figures.session_timeline(SESSIONS, SUBTITLE, REACH),
    "lags_by_category": lambda: figures.lags_by_category(QUESTIONS, SUBTITLE),
    "how_far_back": lambda: figures.how_far_back(QUESTIONS["lag"], SUBTITLE, window=33),
}


def traces(figure, **wanted):
    return [trace for trace in figure.data if trace.x is not None and trace.x[0] is not None
            and all(getattr(trace, key) == value for key, value in wanted.items())]


def notes(figure):
    return [note.text for note in figure.layout.annotations]


@pytest.mark.parametrize("name", DRAWN)
def test_title_carries_the_subtitle_escaped_and_sizes_suit_a_projector(name):
    figure = DRAWN[name]()
    assert "&lt;i&gt;two&lt;/i&gt;" in figure.layout.title.text
    assert figure.layout.font.size >= 16 and all(note.font.size >= 16 for note in figure.layout.annotations)
    titles = [axis.title.text or "" for axis in [*figure.select_xaxes(), *figure.select_yaxes()]]
    assert any("turns" in title for title in titles)
    assert getattr(figures, name) is getattr(data_figures, name) and name in figures.__all__


@pytest.mark.parametrize("name, table", [("session_timeline", SESSIONS), ("lags_by_category", QUESTIONS)])
def test_every_column_that_a_docstring_names_is_asked_for(name, table):
    function = getattr(figures, name)
    for column in table.columns.drop("part", errors="ignore"):
        assert re.search(rf"\b{column}\b", function.__doc__)
        with pytest.raises(ValueError, match=f"missing: {column}$"):
            function(table.drop(columns=column), SUBTITLE)
    with pytest.raises(ValueError, match="empty"):
        function(table[:0], SUBTITLE)


def test_sessions_lie_at_their_dates_and_grow_with_their_turns():
    figure = DRAWN["session_timeline"]()
    train, test = traces(figure, name="train")[0], traces(figure, name="test")[0]
    assert list(pd.to_datetime(train.x)) == list(SESSIONS["date"][:3]) and list(train.y) == [0, 0, 0]
    assert list(test.y) == [1] and train.marker.symbol != test.marker.symbol
    assert train.marker.size[1] == pytest.approx(2 * train.marker.size[0])  # area: four times the turns
    assert list(figure.layout.yaxis.ticktext) == ["conv &lt;b&gt;1&lt;/b&gt; &amp; more", "conv-2"]
    assert notes(figure) == ["<b>sessions</b>", "3", "1", "<b>turns</b>", "70", "30", "<b>lag</b>", "41"]


def test_reach_runs_from_the_evidence_to_the_last_session():
    bar, = traces(DRAWN["session_timeline"](), mode="lines+markers")
    assert list(pd.to_datetime(bar.x)) == [pd.Timestamp("2023-02-01"), pd.Timestamp("2023-03-05")]
    assert 0 < bar.y[0] < 0.5  # under its row
    plain = figures.session_timeline(SESSIONS.drop(columns="part"), SUBTITLE)
    assert not traces(plain, mode="lines+markers") and "<b>lag</b>" not in notes(plain)
    for wrong in (pd.concat([REACH, REACH]), REACH.assign(conversation="nobody")):
        with pytest.raises(ValueError, match="one row a conversation"):
            figures.session_timeline(SESSIONS, SUBTITLE, wrong)
    with pytest.raises(ValueError, match="unknown part dev: known are train, test"):
        figures.session_timeline(SESSIONS.assign(part="dev"), SUBTITLE)


def test_lags_stand_in_their_bucket_and_are_counted():
    figure = DRAWN["lags_by_category"]()
    by_name = {trace.name: trace for trace in figure.data}
    np.testing.assert_allclose(by_name["single-hop"].x, [0, 31 / 32])
    np.testing.assert_allclose(by_name["multi-hop"].x, [1.5])  # 48 is the middle of 32 to 63
    np.testing.assert_allclose(by_name["adversarial"].x, [4 + 44 / 145, 4 + 144 / 145])
    cells = np.array([int(note[3:-4]) for note in notes(figure) if re.fullmatch("<b>[0-9]+</b>", note)]).reshape(3, 5)
    assert cells.tolist() == [[0, 1, 0, 0, 0], [2, 0, 0, 0, 0], [0, 0, 0, 0, 2]]  # in the categories' order
    assert [note for note in notes(figure) if "n=" in note] == [
        "<b>0–31</b><br>n=2 (40%)", "<b>32–63</b><br>n=1 (20%)", "<b>64–127</b><br>n=0 (0%)",
        "<b>128–255</b><br>n=0 (0%)", "<b>256+</b><br>n=2 (40%)"]
    assert list(figure.layout.yaxis.ticktext)[0] == "multi-hop<br>n=1"
    with pytest.raises(ValueError, match="lag"):
        figures.lags_by_category(QUESTIONS.assign(lag=-1), SUBTITLE)


def test_questions_are_counted_up_to_a_lag_beside_what_decay_leaves():
    share, decay = traces(DRAWN["how_far_back"]())
    np.testing.assert_allclose([share.y[lag] for lag in (0, 30, 31, 47, 48, 299, 300, 400)],
                               [20, 20, 40, 40, 60, 60, 80, 100])
    np.testing.assert_allclose([decay.y[lag] for lag in (0, 1, 256)], [100, 95, 100 * 0.95**256])
    far, window = notes(DRAWN["how_far_back"]())
    assert far.startswith("40% of the questions") and "2e-6 of a turn" in far
    assert "holds 33 turns:<br>40%" in window
    assert len(notes(figures.how_far_back([1, 2], SUBTITLE))) == 1
    for wrong, gamma in (([], 0.95), ([-1], 0.95), ([3], 0.0), ([3], 1.5), ([np.nan], 0.5)):
        with pytest.raises(ValueError):
            figures.how_far_back(wrong, SUBTITLE, gamma)
