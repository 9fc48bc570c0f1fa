"""The drawing names what it shows, keeps inside its plot, and needs no colour to be read."""

import re

import pytest

pytest.importorskip("plotly", reason="the figures come with the notebooks extra")

from pdmem_lib import METHODS, REGISTRY, _plot, diagrams, figures  # noqa: E402


def texts(figure):
    return [annotation.text for annotation in figure.layout.annotations]


def numbers(path):
    return [tuple(map(float, pair.split(","))) for pair in re.findall(r"[-\d.]+,[-\d.]+", path)]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_method_stands_at_one_entrance(family):
    drawn = " ".join(texts(figures.block_diagram(family)))
    assert sorted(name for _, names, _ in diagrams.ENTRANCES.values() for name in names) == sorted(METHODS)
    for method in METHODS:
        assert drawn.count(f"{REGISTRY[method].alias} {REGISTRY[method].title}") == 1
    for part in ("Q", "K", "V", "MLP", "+", "embeddings", "un-<br>embedding", "one of L blocks"):
        assert part in drawn


def test_entrances_are_marked_by_letters_and_can_be_left_out():
    for entrances in ("", "A", "B", "C", "AC", "ABC"):
        drawn = texts(diagrams.block_diagram("gpt2", entrances))
        assert {letter for letter in "ABC" if f"<b>{letter}</b>" in drawn} == set(entrances)
        assert any("memory P" in text for text in drawn) == bool(entrances)
    frozen, full = diagrams.block_diagram("gpt2", ""), diagrams.block_diagram("gpt2")
    assert len(frozen.layout.shapes) < len(full.layout.shapes) and frozen.layout.height < full.layout.height


def test_a_family_is_drawn_with_its_own_parts():
    gpt2, llama = (" ".join([*texts(figure), figure.layout.title.text]) for figure in map(
        figures.block_diagram, ("gpt2", "llama")))
    assert gpt2.count("LayerNorm") == llama.count("RMSNorm") == 4  # three boxes and the subtitle
    assert "RMSNorm" not in gpt2 and "LayerNorm" not in llama and "RoPE" in llama and "GPT-2" in gpt2
    assert "my backbone" in figures.block_diagram("gpt2", subtitle="my backbone").layout.title.text


@pytest.mark.parametrize("entrances", ["", "ABC"])
def test_everything_lies_inside_the_plot_and_is_large_enough(entrances):
    figure = figures.block_diagram("llama", entrances)
    width, height = _plot.plot_size(figure)
    assert list(figure.layout.xaxis.range) == [0, width] and list(figure.layout.yaxis.range) == [0, height]  # pixels
    for shape in figure.layout.shapes:
        for x, y in numbers(shape.path) if shape.path else [(shape.x0, shape.y0), (shape.x1, shape.y1)]:
            assert 0 <= x <= width and 0 <= y <= height
    for annotation in figure.layout.annotations:
        assert 0 <= annotation.x <= width and 0 <= annotation.y <= height and annotation.font.size >= _plot.FONT


def test_unknown_families_and_entrances_are_refused():
    with pytest.raises(ValueError, match="unknown family 'mamba': known are gpt2, llama"):
        figures.block_diagram("mamba")
    with pytest.raises(ValueError, match="unknown entrance D, x: known are A, B, C"):
        figures.block_diagram("gpt2", "AxD")
