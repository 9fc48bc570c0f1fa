"""Figures that look into a memory hold the numbers they are given, name what they show, and refuse what cannot be."""

import re

import numpy as np
import pandas as pd
import pytest
import torch

pytest.importorskip("plotly", reason="the figures come with the notebooks extra")

from pdmem_lib import _maps, figures, memory_figures  # noqa: E402
from pdmem_lib.causal import agreement  # noqa: E402

SUBTITLE = "SmolLM2-135M-Instruct · preset cpu · conversation conv-47"
STRANGER = "<script>alert(1)</script> & <b>co</b>"
ESCAPED = "&lt;script&gt;"
L, h, T, M, N = 3, 2, 4, 6, 5
LABELS = [f"Ann: {STRANGER}", "Bob: hello\nthere", "Ann: " + "long " * 40, "Bob: hello\nthere", "Ann: bye"]
TOKENS = ["ĠWhen", STRANGER[:8], "\n", "?"]
ANSWER = ["Ġ7", "ĠMay", STRANGER[:8]]
SHARES = np.array([[0, 0, 0.6, 0, 0.3], [0.5, 0, 0, 0.2, 0], [0] * 5, [0.1, 0.7, 0.1, 0.01, 0.01],
                   [0, 0, 0, 0.4, 0.02], [0.9, 0, 0, 0, 0]])
ATTENTION = np.arange(1, L * h * T * M + 1).reshape(L, h, T, M) / 1000  # a token's mass at most 0.849
WRITTEN = np.array([[1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 0, 0], [1, 0, 1, 0]], bool)
SCORES = np.array([1.0, 4, 0, 3, 2])
NEAREST = pd.DataFrame([dict(entry=entry, rank=rank, token=token, score=0.5 - 0.1 * rank + entry / 100)
                        for entry in (7, 2) for rank, token in ((2, "Ġthe"), (1, STRANGER[:8]))])
DRAWN = {
    "slot_map": lambda s: figures.slot_map(np.arange(1.0, 1 + (N + 1) * M).reshape(N + 1, M), s, LABELS),
    "slot_map, log": lambda s: figures.slot_map(10.0 ** np.arange(N + 1)[:, None] * [[1, 0]], s, LABELS, log=True),
    "provenance_map": lambda s: figures.provenance_map(SHARES, s, LABELS),
    "provenance_map, top": lambda s: figures.provenance_map(SHARES, s, LABELS, top=3),
    "attention_by_block": lambda s: figures.attention_by_block(ATTENTION, TOKENS, s),
    "attention_to_entries": lambda s: figures.attention_to_entries(ATTENTION, TOKENS, s, 1, 0, SHARES, LABELS),
    "turn_scores_bars": lambda s: figures.turn_scores_bars(SCORES, LABELS, [0, 2], s, top=2),
    "gates": lambda s: figures.gates({STRANGER: np.zeros((L, h)), "after": np.eye(L, h)}, s),
    "gates, beta": lambda s: figures.gates({STRANGER: np.zeros(L), "after": np.ones(L)}, s, "beta"),
    "gates, steps": lambda s: figures.gates({f"{i} {STRANGER}": i * np.eye(L, h) for i in range(5)}, s),
    "hebbian_matrix": lambda s: figures.hebbian_matrix(np.diag([4.0, 2, 1]), s),
    "slot_usage": lambda s: figures.slot_usage(WRITTEN, s),
    "token_gain": lambda s: figures.token_gain(ANSWER, [-1, -2, -0.5], [-2, -4, -0.5], [-1.5, -1, -1], s),
    "answer_map": lambda s: figures.answer_map([[0.9, 0.1], [0.4, 0.6]], [STRANGER, "off"], ["cat", "dog"], s,
                                               ["cat", None]),
    "nearest_tokens": lambda s: figures.nearest_tokens(NEAREST, s),
    "bank_spread": lambda s: figures.bank_spread({"slot": [4, 3, 3.5], STRANGER: [4, 2, 1], "prefix": [4, 2, 1]}, s),
    "turn_changes": lambda s: figures.turn_changes(SCORES, [0.2, 0.4, 0.6, 0.8, 1], s, LABELS, gamma=0.9),
    "attention_by_head": lambda s: figures.attention_by_head(ATTENTION[:, :, 0].sum(-1), s, STRANGER, 1, 0),
    "effect_bars": lambda s: figures.effect_bars([0.5, -1, np.nan, 2, 0], SCORES, LABELS, s, agreement(SCORES, SCORES)),
}
WITHOUT_TEXT = {"hebbian_matrix", "slot_usage"}


def strings(value):
    """Every string in a figure's plain form, arrays included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for part in value.values() for text in strings(part))
    elif isinstance(value, (list, tuple, np.ndarray)):
        yield from (text for part in value for text in strings(part))


def traces(figure, **wanted):
    plain = (trace.to_plotly_json() for trace in figure.data)
    return [trace for trace, has in zip(figure.data, plain, strict=True)
            if all(has.get(key) == value for key, value in wanted.items())]


def notes(figure):
    return [note.text for note in figure.layout.annotations]


# --- what every figure does -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", DRAWN)
def test_title_carries_the_subtitle_and_every_text_suits_a_projector(name):
    figure = DRAWN[name](SUBTITLE)
    assert SUBTITLE in figure.layout.title.text and figure.layout.width == figures.WIDTH
    sizes = [figure.layout.font.size, figure.layout.hoverlabel.font.size]
    sizes += [note.font.size for note in figure.layout.annotations]
    bars = [trace.colorbar for trace in traces(figure, type="heatmap")] + [figure.layout.coloraxis.colorbar]
    sizes += [bar.title.font.size for bar in bars if bar.title.text]
    sizes += [trace.textfont.size for trace in traces(figure, type="heatmap") if trace.texttemplate]
    sizes += [int(size) for text in strings(figure.to_plotly_json()) for size in re.findall(r"font-size:(\d+)px", text)]
    assert min(sizes) >= 16


@pytest.mark.parametrize("name", DRAWN)
def test_text_from_data_is_escaped(name):
    shown = list(strings(DRAWN[name]("data <i>x</i>").to_plotly_json()))
    assert not [text for text in shown if "<script" in text or "<b>co" in text or "<i>" in text]
    assert any("data &lt;i&gt;x&lt;/i&gt;" in text for text in shown)
    assert name in WITHOUT_TEXT or any(ESCAPED in text for text in shown)


@pytest.mark.parametrize("name", DRAWN)
def test_every_axis_says_what_it_shows(name):
    figure = DRAWN[name](SUBTITLE)
    named_by_ticks = {"answer_map", "turn_scores_bars", "provenance_map, top", "attention_to_entries", "token_gain",
                      "nearest_tokens"}
    by_panels = {"attention_by_block", "turn_changes"}  # the panels' titles name the tokens, the lower panel the turns
    assert figure.layout.xaxis.title.text or name in by_panels
    assert figure.layout.yaxis.title.text or name in named_by_ticks
    units = {"provenance_map": "(%)", "attention_by_block": "(%)", "attention_to_entries": "(%)",
             "turn_scores_bars": "(%)", "slot_usage": "(%)", "token_gain": "(nats", "bank_spread": "logarithmic",
             "hebbian_matrix": "logarithmic", "slot_map": "norm", "nearest_tokens": "cosine", "gates": "tanh(gate)",
             "turn_changes": "norm", "attention_by_head": "(%)", "effect_bars": "(nats)"}
    assert units.get(name, "") in " ".join(strings(figure.to_plotly_json()))


@pytest.mark.parametrize("name", DRAWN)
def test_hovering_a_map_tells_the_name_also_where_the_axis_has_a_tick(name):
    """plotly puts a tick's text in place of the name where the two coincide within a ten-thousandth of the range."""
    for axis in (axis for kind in "xy" for axis in getattr(DRAWN[name](SUBTITLE), f"select_{kind}axes")()):
        if axis.type == "category":
            aside = np.array(axis.tickvals) % 1
            assert (aside > M / 1e4).all() and (aside < 0.2).all()


@pytest.mark.parametrize("draw, told", [
    (lambda: figures.slot_map(np.ones(3), SUBTITLE), r"\(1\+N, M\).*shape \(3,\)"),
    (lambda: figures.slot_map(np.ones((0, 3)), SUBTITLE), "none of them empty"),
    (lambda: figures.slot_map([["a", "b"]], SUBTITLE), "must be numbers"),
    (lambda: figures.slot_map([[1, np.nan]], SUBTITLE), "finite"),
    (lambda: figures.slot_map(np.ones((3, 2)), SUBTITLE, ["one"]), "2 turns, got 1"),
    (lambda: figures.slot_map(np.ones((3, 2)), SUBTITLE, "ab"), "one text a turn"),
    (lambda: figures.slot_map(-np.ones((3, 2)), SUBTITLE, log=True), "log=False"),
    (lambda: figures.provenance_map(SHARES * 2, SUBTITLE), "sum to at most 1"),
    (lambda: figures.provenance_map(-SHARES, SUBTITLE), "between 0 and 1"),
    (lambda: figures.provenance_map(SHARES, SUBTITLE, top=0), "at least 1"),
    (lambda: figures.attention_by_block(ATTENTION[0], TOKENS, SUBTITLE), r"\(L, h, T, M\)"),
    (lambda: figures.attention_by_block(ATTENTION, TOKENS[:2], SUBTITLE), "4 tokens, got 2"),
    (lambda: figures.attention_by_block(ATTENTION * 2, TOKENS, SUBTITLE), "sums to at most 1"),
    (lambda: figures.attention_by_block(np.full((1, 1, 4, 2), 0.5), TOKENS, SUBTITLE), 'quantity="entries"'),
    (lambda: figures.attention_by_block(ATTENTION, TOKENS, SUBTITLE, "sum"), "one of mass, entries"),
    (lambda: figures.attention_to_entries(ATTENTION, TOKENS, SUBTITLE, block=L), "from 0 to 2"),
    (lambda: figures.attention_to_entries(ATTENTION, TOKENS, SUBTITLE, head=-1), "from 0 to 1"),
    (lambda: figures.attention_to_entries(ATTENTION, TOKENS, SUBTITLE, shares=SHARES[1:]), "5 entries.*of 6"),
    (lambda: figures.attention_to_entries(ATTENTION, TOKENS, SUBTITLE, labels=LABELS), "pass shares too"),
    (lambda: figures.turn_scores_bars(SCORES, LABELS[1:], [0], SUBTITLE), "5 turns, got 4"),
    (lambda: figures.turn_scores_bars(SCORES, LABELS, [5], SUBTITLE), "turns from 0 to 4, got 5"),
    (lambda: figures.turn_scores_bars(SCORES * 0, LABELS, [0], SUBTITLE), "reads nothing"),
    (lambda: figures.turn_scores_bars(SCORES, LABELS, [0], SUBTITLE, top=0), "at least 1"),
    (lambda: figures.gates({}, SUBTITLE), "at least one moment"),
    (lambda: figures.gates({"a": np.ones((2, 2)), "b": np.ones((3, 2))}, SUBTITLE), "one shape"),
    (lambda: figures.gates(np.ones((1, 2, 2)), SUBTITLE), r"\(L, h\)"),
    (lambda: figures.hebbian_matrix(np.ones((2, 3)), SUBTITLE), "square"),
    (lambda: figures.bank_spread({}, SUBTITLE), "at least one method"),
    (lambda: figures.bank_spread({"slot": [1, 0]}, SUBTITLE), "above 0"),
    (lambda: figures.bank_spread({"slot": [np.nan]}, SUBTITLE), "not all of them missing"),
    (lambda: figures.slot_usage(WRITTEN * 2, SUBTITLE), "only 0 and 1"),
    (lambda: figures.slot_usage(WRITTEN & False, SUBTITLE), "at least one slot a turn"),
    (lambda: figures.token_gain(["a"], [-1, -2], [-1], [-1], SUBTITLE), "1 tokens.*2, 1, 1"),
    (lambda: figures.answer_map([[0.5, 0.5]], ["own"], ["cat"], SUBTITLE), "1 memories and 2 answers, got 1 and 1"),
    (lambda: figures.answer_map([[-0.5]], ["own"], ["cat"], SUBTITLE), "not its logarithm"),
    (lambda: figures.answer_map([[0.5]], ["own"], ["cat"], SUBTITLE, ["dog"]), "right names one"),
    (lambda: figures.token_gain(["a"], [1], [-1], [-1], SUBTITLE), "at most 0"),
    (lambda: figures.nearest_tokens(NEAREST.drop(columns="token"), SUBTITLE), "missing: token"),
    (lambda: figures.nearest_tokens(pd.concat([NEAREST, NEAREST]), SUBTITLE), "one token an entry and rank"),
    (lambda: figures.nearest_tokens(pd.DataFrame(dict(entry=0, rank=range(13), token="a", score=1.0)), SUBTITLE),
     "at most 12"),
    (lambda: figures.nearest_tokens_of(np.ones((2, 3)), np.ones((5, 4)), 1), "width 3, the unembedding 4"),
    (lambda: figures.nearest_tokens_of(np.ones((2, 3)), np.ones((5, 3)), 6), "between 1 and the 5 tokens"),
])
def test_what_cannot_be_is_told_in_a_sentence(draw, told):
    with pytest.raises(ValueError, match=told):
        draw()


def test_tensors_do_for_arrays_even_parameters_of_half_precision():
    gate = torch.nn.Parameter(torch.tensor([[0.5, -0.25], [0, 1]], dtype=torch.bfloat16))
    np.testing.assert_array_equal(figures.gates(gate, SUBTITLE).data[0].z, [[0.5, -0.25], [0, 1]])


# --- what the entries hold --------------------------------------------------------------------------------------------

def test_slot_map_has_a_column_for_the_start_and_one_after_each_turn():
    figure = DRAWN["slot_map"](SUBTITLE)
    heat = figure.data[0]
    np.testing.assert_array_equal(heat.z, np.arange(1, 37).reshape(6, 6).T)  # entries x turns
    assert heat.x[0] == "the start" and heat.x[2] == "after turn 1: Bob: hello there"
    assert len(set(heat.x)) == N + 1  # though two turns say the same
    assert max(map(len, heat.x)) < 130 and heat.x[3].endswith("…")
    assert list(figure.layout.xaxis.ticktext) == ["start", "0", "1", "2", "3", "4"]
    assert "%{x}" in heat.hovertemplate and "%{y}" in heat.hovertemplate


def test_slot_map_keeps_a_turns_text_once():
    figure = figures.slot_map(np.ones((420, 64)), SUBTITLE, ["Ann: " + "x" * 60] * 419)
    assert len(figure.to_json()) < 250_000  # with a text in each of the 26,880 cells it would be over 2,000,000


def test_slot_map_on_a_logarithmic_colour_tells_the_values_themselves():
    heat = DRAWN["slot_map, log"](SUBTITLE).data[0]
    np.testing.assert_allclose(heat.z, [[0, 1, 2, 3, 4, 5], [np.nan] * 6])
    np.testing.assert_allclose(heat.customdata[0], 10.0 ** np.arange(6))
    assert "%{customdata" in heat.hovertemplate
    assert list(heat.colorbar.ticktext) == ["1", "10", "100", "1000", "10000", "10⁵"]
    assert heat.zmin < 0  # the smallest is not white, as zeros are


def test_hebbian_matrix_shows_block_means_and_the_spectrum():
    matrix = np.zeros((256, 256))
    matrix[:2, :2] = [[3, -1], [2, 2]]
    figure = figures.hebbian_matrix(matrix, SUBTITLE)
    heat, line = figure.data
    assert heat.z.shape == (128, 128) and heat.z[0, 0] == 2 and heat.z[1:].sum() == 0  # of absolute values
    np.testing.assert_allclose(heat.x[:2], [0.5, 2.5])  # the middles of columns 0, 1 and 2, 3
    np.testing.assert_allclose(line.y[:2], np.linalg.svd(matrix[:2, :2], compute_uv=False))
    assert np.isnan(line.y[2:]).all()  # zeros have no logarithm


def test_hebbian_matrix_states_its_effective_rank():
    figure = DRAWN["hebbian_matrix"](SUBTITLE)
    rank = (7 / 4) ** (4 / 7) * (7 / 2) ** (2 / 7) * 7 ** (1 / 7)  # exp of the entropy of 4/7, 2/7, 1/7
    assert f"effective rank {rank:.1f} of 3" in figure.layout.title.text
    line, = (shape for shape in figure.layout.shapes if shape.type == "line")
    assert line.x0 == pytest.approx(rank)
    assert "effective rank 0.0 of 2" in figures.hebbian_matrix(np.zeros((2, 2)), SUBTITLE).layout.title.text


def test_block_means_of_sides_that_do_not_divide():
    means = _maps.block_means(np.arange(15.0).reshape(3, 5), 2)
    np.testing.assert_allclose(means, [[3, 5.5], [10.5, 13]])  # rows 0-1 and 2, columns 0-1 and 2-4, unlike sizes


def test_effective_rank_counts_directions():
    assert figures.effective_rank(np.eye(5, 9)) == pytest.approx(5)
    assert figures.effective_rank(np.ones((5, 9))) == pytest.approx(1)
    assert figures.effective_rank(torch.zeros(3, 3)) == 0


def test_bank_spread_names_every_line_also_where_lines_coincide():
    figure = DRAWN["bank_spread"](SUBTITLE)
    lines = traces(figure, mode="lines")
    assert [line.name[:9] for line in lines] == ["M.1 Prefi", "M.6 Slots", "&lt;scrip"]
    np.testing.assert_array_equal(lines[1].y, [4, 3, 3.5])
    assert figure.layout.yaxis.type == "log"
    assert [note.rsplit(": ", 1)[1] for note in notes(figure)] == ["3.5", "1", "1"]
    ends = sorted(note.ay + at for note, at in zip(figure.layout.annotations, heights(figure), strict=True))
    assert min(np.diff(ends)) > 20  # pixels from one name to the next
    assert len({line.line.dash for line in lines if line.name != "M.6 Slots"}) == 2


def heights(figure):
    low, high = figure.layout.yaxis.range
    return [(high - note.y) / (high - low) * memory_figures.plot_size(figure)[1] for note in figure.layout.annotations]


def test_marks_of_lines_that_coincide_stand_at_turns_of_their_own():
    same = 1 + np.exp(-np.arange(50.0))
    figure = figures.bank_spread({name: same for name in ("prefix", "cross_attention", "kv_extension")}, SUBTITLE)
    marked = [set(trace.x) for trace in traces(figure, mode="markers")]
    assert len(marked) == 3 and not marked[0] & marked[1] and not marked[1] & marked[2] and all(marked)


def test_bank_spread_leaves_gaps_and_ends_at_the_last_value():
    figure = figures.bank_spread({"slot": [4, np.nan, 2, np.nan]}, SUBTITLE, "relative spread")
    note, = figure.layout.annotations
    assert (note.x, note.text) == (2, "M.6 Slots: 2") and "relative spread" in figure.layout.yaxis.title.text


def test_nearest_tokens_of_finds_the_smallest_angles():
    unembedding = np.array([[5.0, 0], [0, 0.1], [1, 1], [-1, 0], [0, 0]])
    indices, cosines = figures.nearest_tokens_of([[2, 0.1], [0, 3], [0, 0]], torch.tensor(unembedding), k=2)
    assert indices[:2].tolist() == [[0, 2], [1, 2]]  # by angle, not by length
    np.testing.assert_allclose(cosines[1], [1, 0.5 ** 0.5], rtol=1e-6)
    np.testing.assert_array_equal(cosines[2], [0, 0])


def test_nearest_tokens_stand_in_their_order_in_a_row_an_entry():
    figure = figures.nearest_tokens(NEAREST, SUBTITLE, chance=0.3)
    heat = figure.data[0]
    np.testing.assert_array_equal(heat.text, [[ESCAPED, "·the"], [ESCAPED, "·the"]])
    np.testing.assert_allclose(heat.z, [[0.47, 0.37], [0.42, 0.32]])
    assert list(figure.layout.yaxis.ticktext) == ["entry 7", "entry 2"]
    assert heat.zmin == 0.3 and "0.30" in figure.layout.xaxis.title.text


def test_nearest_tokens_may_be_fewer_for_an_entry():
    heat = figures.nearest_tokens(NEAREST[:3], SUBTITLE).data[0]
    assert np.isnan(heat.z[1, 0]) and heat.text[1][0] == "" and heat.text[1][1] == "·the"


# --- who wrote it -----------------------------------------------------------------------------------------------------

def test_provenance_map_names_the_turn_of_each_share():
    heat = DRAWN["provenance_map"](SUBTITLE).data[0]
    np.testing.assert_allclose(heat.z, 100 * SHARES, rtol=1e-6)
    assert heat.x[1] == "turn 1: Bob: hello there" and heat.y[3] == "entry 3"


def test_entries_stand_by_their_latest_turn_that_holds_a_tenth_of_the_largest_share():
    figure = figures.provenance_map(SHARES, SUBTITLE, sort=True)
    heat = figure.data[0]
    # latest: entry 0 turn 4, 1 turn 3, 2 none, 3 turn 2 (0.01 of 0.7 is too little), 4 turn 3 (0.02 of 0.4), 5 turn 0
    assert list(heat.y) == [f"entry {i}" for i in (2, 5, 3, 1, 4, 0)]
    np.testing.assert_allclose(heat.z[2], 100 * SHARES[3], rtol=1e-6)
    assert list(figure.layout.yaxis.ticktext) == ["2", "5", "3", "1", "4", "0"]


def test_the_strongest_turns_are_rows_with_their_texts_in_order_of_time():
    figure = figures.provenance_map(SHARES, SUBTITLE, LABELS, top=2)
    heat = figure.data[0]
    np.testing.assert_allclose(heat.z, 100 * SHARES[:, [0, 1]].T, rtol=1e-6)  # sums 1.5, 0.7, 0.7, 0.61, 0.33
    assert figure.layout.yaxis.ticktext[0].startswith(f"turn 0: Ann: {ESCAPED}")
    assert "2 strongest of 5 turns hold 57%" in figure.layout.xaxis.title.text  # 2.2 of 3.84


def test_slot_usage_counts_slots_and_what_was_written_before():
    figure = DRAWN["slot_usage"](SUBTITLE)
    bars = figure.data[0]
    assert list(bars.y) == [3, 3, 2, 0] and list(bars.customdata) == [0, 1, 2, 3]
    assert "3 of 4 slots were ever written" in notes(figure)[0]
    earlier, before = (list(trace.y) for trace in traces(figure, mode="markers"))
    assert earlier == [0, 50, 100, 100] and before == [0, 50, 50, 50]
    blind = [list(trace.y) for trace in traces(figure, mode="lines", showlegend=False) if len(trace.y) == len(WRITTEN)]
    assert blind == [[0, 50, 75, 87.5], [0, 50, 50, 50]]  # each turn takes half of the slots


# --- what a question reads --------------------------------------------------------------------------------------------

def test_attention_by_block_sums_over_entries_and_averages_heads_and_tokens():
    figure = DRAWN["attention_by_block"](SUBTITLE)
    tokens, heads = figure.data
    np.testing.assert_allclose(tokens.z, 100 * ATTENTION.sum(-1).mean(1), rtol=1e-6)
    np.testing.assert_allclose(heads.z, 100 * ATTENTION.sum(-1).mean(2), rtol=1e-6)
    assert list(figure.layout.xaxis.ticktext) == ["·When", ESCAPED, "↵", "?"]
    assert tokens.coloraxis == heads.coloraxis == "coloraxis"  # one scale for both panels


def test_attention_by_block_counts_the_entries_that_attention_spreads_over():
    attention = np.zeros((1, 2, 2, 4))
    attention[0, 0, 0] = 0.25  # all four, a branch's mass of 1
    attention[0, 1, 0, 2] = 0.1  # one, of little mass; token 1 reads nothing
    tokens, heads = figures.attention_by_block(attention, ["a", "b"], SUBTITLE, "entries").data
    np.testing.assert_allclose(tokens.z, [[2.5, np.nan]])
    np.testing.assert_allclose(heads.z, [[4, 1]])


@pytest.mark.parametrize("block, head, mean, where", [
    (1, 0, ATTENTION[1, 0], "block 1, head 0"), (None, None, ATTENTION.mean((0, 1)), "mean over blocks and heads"),
    (2, None, ATTENTION[2].mean(0), "block 2, mean over its heads"),
    (None, 1, ATTENTION[:, 1].mean(0), "head 1, mean over blocks")])
def test_attention_to_entries_is_of_the_chosen_block_and_head(block, head, mean, where):
    figure = figures.attention_to_entries(ATTENTION, TOKENS, SUBTITLE, block, head)
    np.testing.assert_allclose(figure.data[0].z, 100 * mean, rtol=1e-6)
    assert where in figure.layout.title.text and notes(figure) == []


def test_attention_to_entries_names_the_turns_behind_an_entry():
    figure = DRAWN["attention_to_entries"](SUBTITLE)
    behind = figure.data[0].x
    assert behind[0] == ("entry 0<br>60 % from " + _maps.names_of("turn", N, LABELS)[2]
                         + "<br>30 % from turn 4: Ann: bye")
    assert behind[2] == "entry 2"
    most = notes(figure)[1:]  # attention grows with the entry
    assert [note[:14] for note in most] == [f"<b>entry {i}</b>" for i in (5, 4, 3)]
    assert "70 % from turn 1: Bob: hello there" in most[2]


def test_turn_scores_show_the_evidence_however_far_down():
    figure = figures.turn_scores_bars(SCORES, LABELS, [0, 1], SUBTITLE, top=2)
    bars = figure.data[0]
    np.testing.assert_allclose(bars.x, [40, 30, 10])  # turns 1 and 3, then turn 0 in fourth place
    assert list(bars.y) == [0, 1, 3]  # a gap before what is not next
    assert list(bars.marker.line.width) == [4, 0, 4] and len(set(bars.marker.color)) == 2
    texts = notes(figure)
    assert texts == ["<b>40 %, evidence: rank 1 of 5</b>", "30 %", "<b>10 %, evidence: rank 4 of 5</b>"]
    assert [tick.startswith("<b>turn") for tick in figure.layout.yaxis.ticktext] == [True, False, True]
    even, = figure.layout.shapes
    assert even.x0 == 20  # a fifth each


def test_turn_scores_of_another_kind_are_drawn_as_they_stand():
    figure = figures.turn_scores_bars(SCORES, LABELS, [], SUBTITLE, axis="times the other questions'")
    np.testing.assert_array_equal(figure.data[0].x, [4, 3, 2, 1, 0])
    assert figure.layout.shapes[0].x0 == 1 and figure.layout.xaxis.title.text == "times the other questions'"


def test_token_gain_states_the_gains_and_their_mean():
    figure = DRAWN["token_gain"](SUBTITLE)
    texts = notes(figure)
    assert texts[:5] == ["+1.000", "+2.000", "0.000", "+1.000", "<b>own − off<br>(nats)</b>"]
    assert texts[5:] == ["+0.500", "−1.000", "+0.500", "0.000", "<b>own − other<br>(nats)</b>"]
    assert list(figure.layout.yaxis.ticktext) == ["·7", "·May", ESCAPED, "<b>mean</b>"]
    own, = (trace for trace in traces(figure, name="own memory", mode="markers") if trace.x[0] is not None)
    np.testing.assert_allclose(own.x, [-1, -2, -0.5, -3.5 / 3])
    assert len({trace.marker.symbol for trace in traces(figure, mode="markers")}) == 3


# --- how far it is open -----------------------------------------------------------------------------------------------

def test_gates_stand_side_by_side_on_one_scale_white_at_zero():
    figure = figures.gates({"before": np.zeros((L, h)), "after": -0.5 * np.eye(L, h)}, SUBTITLE)
    np.testing.assert_array_equal(figure.data[1].z, -0.5 * np.eye(L, h))
    scale = figure.layout.coloraxis
    assert (scale.cmin, scale.cmax) == (-0.5, 0.5) and scale.colorscale[2][1] == "#FFFFFF"
    assert notes(figure) == ["<b>before</b><br>mean |tanh(gate)| 0", "<b>after</b><br>mean |tanh(gate)| 0.167"]


def test_a_number_a_block_is_a_line_and_many_moments_are_a_map():
    lines = figures.gates({"before": [0, 0], "after": [0.1, -0.2]}, SUBTITLE, "beta")
    assert [list(line.y) for line in lines.data] == [[0, 0], [0.1, -0.2]]
    assert len({line.line.dash for line in lines.data}) == len({line.marker.symbol for line in lines.data}) == 2
    steps = {str(step): np.array([1, -1]) * step for step in range(5)}
    heat = figures.gates(steps, SUBTITLE, "beta").data[0]
    np.testing.assert_array_equal(heat.z, [[0, 1, 2, 3, 4], [0, -1, -2, -3, -4]])
    assert (heat.zmin, heat.zmax) == (-4, 4)
    heat = figures.gates({step: np.outer(gate, [1, 3]) for step, gate in steps.items()}, SUBTITLE).data[0]
    np.testing.assert_array_equal(heat.z, [[0, 2, 4, 6, 8]] * 2)  # the mean of 1 and 3, whatever the sign


# --- shared parts -----------------------------------------------------------------------------------------------------

def test_tokens_show_what_is_not_seen():
    assert [_maps.token_text(token) for token in ("Ġthe", "▁the", " the", "Ċ", "a\nb", "<s>")] == [
        "·the", "·the", "·the", "↵", "a↵b", "&lt;s&gt;"]
    assert _maps.token_text("x" * 30, 10) == "x" * 9 + "…"


def test_steps_are_round_and_no_more_than_asked_for():
    assert _maps.round_steps(64, 14) == list(range(0, 64, 5))
    assert _maps.round_steps(419, 10) == list(range(0, 419, 50))
    assert _maps.round_steps(3, 10) == [0, 1, 2] and _maps.round_steps(0, 10) == []


def test_ticks_of_a_logarithm_are_round_numbers():
    assert _maps.log_ticks(-0.1, 1.05) == [1, 2, 5, 10]
    assert [_maps.round_tick(value) for value in (0.001, 0.5, 20000, 1e5, 2e-6)] == [
        "0.001", "0.5", "20000", "10⁵", "2·10⁻⁶"]
    assert len(_maps.log_ticks(0.301, 0.302)) == 1  # even where no round number is near


# --- the studio's -----------------------------------------------------------------------------------------------------

def test_effects_stand_beside_the_attention_on_axes_with_one_zero():
    figure = DRAWN["effect_bars"](SUBTITLE)
    effects = np.nansum([[y if y is not None else np.nan for y in bar.y] for bar in traces(figure, type="bar")], axis=0)
    assert effects.tolist() == [0.5, -1, 0, 2, 0]
    (looked,) = traces(figure, type="scatter")
    assert list(looked.y) == (100 * SCORES / SCORES.sum()).tolist()
    left, right = figure.layout.yaxis.range, figure.layout.yaxis2.range
    assert left[0] / left[1] == pytest.approx(right[0] / right[1])
    assert notes(figure) == ["1", "2"]  # ranks of those that speak for the answer
    assert "Spearman's ρ = +1.00" in figure.layout.title.text and "n = 5" in figure.layout.title.text
    told = figures.effect_bars([1.0, 1], [1.0, 2], LABELS[:2], SUBTITLE, agreement([1, 2], [1, 1]))
    assert "no agreement can be told, n = 2" in told.layout.title.text


def test_changes_and_what_is_left_are_drawn_as_given():
    figure = DRAWN["turn_changes"](SUBTITLE)
    changes, left = traces(figure, type="bar")
    assert list(changes.y) == SCORES.tolist() and list(left.y) == pytest.approx([20, 40, 60, 80, 100])
    assert list(traces(figure, type="scatter")[0].y) == pytest.approx([65.61, 72.9, 81, 90, 100])


def test_the_chosen_block_and_head_are_framed():
    (frame,) = DRAWN["attention_by_head"](SUBTITLE).layout.shapes
    assert (frame.x0, frame.x1, frame.y0, frame.y1) == (-0.5, 0.5, 0.5, 1.5)
    assert not figures.attention_by_head(np.zeros((2, 2)), SUBTITLE).layout.shapes


@pytest.mark.parametrize(("draw", "words"), [
    (lambda: figures.turn_changes([1.0, 2], [1.0], SUBTITLE), "one each a turn"),
    (lambda: figures.turn_changes([1.0], [2.0], SUBTITLE), "parts of 0 to 1"),
    (lambda: figures.attention_by_head(np.full((2, 2), 2.0), SUBTITLE), "between 0 and 1"),
    (lambda: figures.effect_bars([1.0], [1.0, 2], LABELS[:1], SUBTITLE), "one effect and one score"),
])
def test_the_studios_figures_refuse_what_they_cannot_mean(draw, words):
    with pytest.raises(ValueError, match=words):
        draw()
