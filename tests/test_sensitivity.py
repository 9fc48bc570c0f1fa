"""One choice changed at a time: differences by hand, and the figure that shows them."""

import json
import math
import os
import subprocess
import sys

import pandas as pd
import pytest
import torch
from scipy.stats import t

from pdmem_lib import checkpoints, conformance, sensitivity, sources
from pdmem_lib.locomo import Conversation, Turn, data_sha256
from pdmem_lib.sensitivity import BASE
from pdmem_lib.states import encode_all
from pdmem_lib.synthetic import synthetic_conversations

RECALL = {(BASE, 42): (0.8, 0.4), (BASE, 43): (0.6, 0.2), ("no gate", 42): (0.9, 0.7), ("no gate", 43): (0.7, 0.9),
          ("γ 1", 43): (0.5, 0.1)}  # setting, seed: recall at two lags


@pytest.fixture
def table():
    return pd.DataFrame([dict(method="slot", setting=setting, seed=seed, x=x, accuracy=accuracy, chance=0.25)
                         for (setting, seed), recall in RECALL.items() for x, accuracy in zip((0, 16), recall, strict=True)])


def test_differences_are_taken_seed_by_seed_over_the_lags(table):
    found = sensitivity.differences(table).set_index("setting")
    assert list(found.index) == [BASE, "no gate", "γ 1"] and found["seeds"].tolist() == [2, 2, 1]
    assert found.loc[BASE, ["mean", "difference", "low", "high"]].tolist() == pytest.approx([0.5, 0, 0, 0])
    d = 0.2, 0.4  # 0.8 - 0.6 at seed 42, 0.8 - 0.4 at 43
    reach = t.ppf(0.975, 1) * math.sqrt(0.02) / math.sqrt(2)
    row = found.loc["no gate"]
    assert row[["mean", "difference", "low", "high"]].tolist() == pytest.approx([0.8, sum(d) / 2, 0.3 - reach, 0.3 + reach])
    assert not row["apart"] and math.isnan(found.loc["γ 1", "low"]) and not found.loc["γ 1", "apart"]
    assert found.loc["γ 1", "difference"] == pytest.approx(0.3 - 0.4)  # against seed 43 alone


def test_equal_differences_lie_apart(table):
    same = table[table["setting"] != "γ 1"].copy()
    same.loc[same["setting"] == "no gate", "accuracy"] = same.loc[same["setting"] == BASE, "accuracy"].to_numpy() + 0.1
    found = sensitivity.differences(same).set_index("setting")
    assert found.loc["no gate", "apart"] and not found.loc[BASE, "apart"]


def test_a_seed_without_its_base_is_named(table):
    with pytest.raises(ValueError, match="'γ 1' has seed 43, 'as it is' has not"):
        sensitivity.differences(table[(table["setting"] != BASE) | (table["seed"] == 42)].query("setting != 'no gate'"))


def test_the_figure_has_a_row_a_setting_and_a_panel_a_lag(table):
    figure = sensitivity.recall_by_setting(table, "made up")
    assert figure.layout.yaxis.ticktext == (BASE, "no gate", "γ 1")
    texts = [annotation.text for annotation in figure.layout.annotations]
    assert {"<b>lag 0</b>", "<b>lag 16</b>", "+0.30", "−0.10"} <= set(texts)
    rings = [trace for trace in figure.data if trace.marker.symbol == "circle-open" and trace.x[0] is not None]
    assert sorted(x for trace in rings for x in trace.x) == sorted(table["accuracy"])
    with pytest.raises(ValueError, match="shows one method"):
        sensitivity.recall_by_setting(pd.concat([table, table.assign(method="gated")]), "made up")


def test_the_figure_of_rates_rings_the_likeliest_of_each_method():
    rows = [("slot", 0.001, -2.0, 9.0), ("slot", 0.01, -1.5, 12.0), ("slot", 0.1, -3.0, 1.0), ("gated", 0.01, -1.9, 8.0)]
    table = pd.DataFrame(rows, columns=["method", "rate", "own", "f1_own"]).assign(zero=-4.0, epochs=2)
    figure = sensitivity.held_out_by_rate(table, "made up")
    rings = [(trace.x[0], trace.y[0]) for trace in figure.data if trace.marker.symbol == "circle-open" and trace.x[0] is not None]
    assert sorted(rings) == [(0.01, -1.9), (0.01, -1.5)]
    assert {annotation.text for annotation in figure.layout.annotations} == {
        "<b>M.5 Gated branch</b>", "<b>M.6 Slots</b>", "9.0", "12.0", "1.0", "8.0"}
    with pytest.raises(ValueError, match="rate"):
        sensitivity.held_out_by_rate(table.drop(columns="rate"), "made up")


def test_the_figure_of_rates_has_a_line_a_number_of_epochs():
    """And a method's likeliest trial alone, of whatever length, has the ring and its F1."""
    rows = [(2, 0.001, -2.0, 9.0), (2, 0.01, -1.5, 12.0), (10, 0.001, -1.4, 11.0), (10, 0.01, -3.0, 1.0)]
    table = pd.DataFrame(rows, columns=["epochs", "rate", "own", "f1_own"]).assign(method="slot", zero=-4.0)
    figure = sensitivity.held_out_by_rate(table, "made up")
    lines = [trace for trace in figure.data if trace.x[0] is not None and trace.mode == "lines+markers"]
    assert {trace.name: tuple(trace.y) for trace in lines} == {
        "M.6 Slots, 2 epochs": (-2.0, -1.5), "M.6 Slots, 10 epochs": (-1.4, -3.0)}
    assert len({trace.line.dash for trace in lines}) == 2
    [ring] = [trace for trace in figure.data if trace.marker.symbol == "circle-open" and trace.x[0] is not None]
    assert (ring.x[0], ring.y[0]) == (0.001, -1.4)
    assert {annotation.text for annotation in figure.layout.annotations} == {"<b>M.6 Slots</b>", "11.0", "2", "10"}
    many = sensitivity.held_out_by_rate(pd.concat([table[:2].assign(epochs=n) for n in range(1, 10)]), "made up")
    assert sum(trace.mode == "lines+markers" and trace.x[0] is not None for trace in many.data) == 9
    assert [annotation.text for annotation in many.layout.annotations].count("12.0") == 1  # rows of one index, too


def test_the_figure_of_locomo_has_a_panel_a_measure():
    rows = {(BASE, 42): (0.002, -2.5, 18.0), ("γ 1", 42): (0.012, -2.4, 17.0)}
    table = pd.DataFrame([dict(method="slot", setting=setting, seed=seed, **dict(zip(sensitivity.LOCOMO, row, strict=True)))
                          for (setting, seed), row in rows.items()])
    figure = sensitivity.locomo_by_setting(table, "made up")
    texts = [annotation.text for annotation in figure.layout.annotations]
    assert {*(f"<b>{title}</b>" for title in sensitivity.LOCOMO.values()), "+0.010"} <= set(texts)
    rings = [trace for trace in figure.data if trace.marker.symbol == "circle-open" and trace.x[0] is not None]
    assert sorted(trace.x[0] for trace in rings) == sorted(x for row in rows.values() for x in row)
    for axis, trace in [(figure.layout[trace.xaxis.replace("x", "xaxis")], trace) for trace in rings]:
        assert axis.range[0] < trace.x[0] < axis.range[1]


def test_turns_with_their_date_and_without_their_speaker():
    talk = Conversation("c", (Turn("D1:1", 1, 0, "Ann", "I have a cat."), Turn("D2:1", 2, 1, "Bob", ""),
                              Turn("D2:2", 2, 2, "Bob", "Oh!")), (), {1: "1 May 2023"})
    [with_date], [without] = sensitivity.dated([talk]), sensitivity.nameless([talk])
    assert [str(turn) for turn in with_date.turns] == ["Ann: I have a cat. (1 May 2023)", "Bob:", "Bob: Oh!"]
    assert [str(turn) for turn in without.turns] == ["I have a cat.", "Bob:", "Oh!"]
    assert without.turns[0].id == "D1:1" and without.turn("D2:2").index == 2 and talk.turns[0].text == "I have a cat."
    assert len({data_sha256([c]) for c in (talk, with_date, without)}) == 3  # a hash is of what is written


@pytest.mark.parametrize("method", ["prefix", "kv_extension", "hebbian", "slot"])
def test_memory_enters_the_last_third_alone(model, method):
    with conformance.registered(sensitivity.last_third(method), method):
        m = model(method)
    m.write(["Ann: I have a cat."])
    with torch.no_grad():
        m.adapter.gate.fill_(1.0)
    L = m.backbone.num_layers
    open_blocks = [bool(m.adapter.gate_of(block).abs().sum()) for block in range(L)]
    assert open_blocks == [block >= L - L // 3 for block in range(L)] and any(open_blocks)
    m.loss(["What?"], ["a cat"]).backward()
    touched = m.adapter.gate.grad.flatten(1).abs().sum(dim=1) > 0
    assert touched.tolist() == open_blocks


def test_a_method_without_such_a_gate_is_refused():
    assert sensitivity.last_third("M.3").__name__ == "LastThird"
    with pytest.raises(ValueError, match="no gate a block"):
        sensitivity.last_third("cross_attention")


def test_a_table_is_never_taken_for_that_of_another_record(tiny, tmp_path, monkeypatch):
    def made(lr):
        return sensitivity.kept(tmp_path / "run.csv", {"lr": lr}, tiny, lambda: pd.DataFrame([dict(lr=lr)]))["lr"].item()

    def killed(*_):
        raise KeyboardInterrupt

    assert made(1) == 1
    with monkeypatch.context() as patch:
        patch.setattr(sensitivity, "circumstances", killed)
        with pytest.raises(KeyboardInterrupt):
            made(2)
    assert made(1) == 1 and made(2) == 2


def kept(folder, backbone, **record):
    return sensitivity.kept(folder / "run.csv", record, backbone, lambda: pd.DataFrame([dict(made=len(list(folder.iterdir())))]))


def test_a_record_without_its_table_is_made_again(tiny, tmp_path):
    kept(tmp_path, tiny, lr=1)
    (tmp_path / "run.csv").unlink()
    assert not sensitivity.is_kept(tmp_path / "run.csv", {"lr": 1}, tiny)
    assert len(kept(tmp_path, tiny, lr=1)) == 1 and sensitivity.is_kept(tmp_path / "run.csv", {"lr": 1}, tiny)


def test_a_table_of_other_code_is_kept_and_said(tiny, tmp_path, monkeypatch, caplog):
    """And one whose record an earlier version wrote, which says nothing of the code and less of the run."""
    kept(tmp_path, tiny, lr=1)
    made = (tmp_path / "run.csv").stat().st_mtime_ns
    kept(tmp_path, tiny, lr=1)
    assert not caplog.records
    record = json.loads((tmp_path / "run.json").read_text())
    with monkeypatch.context() as patch:
        patch.setattr(sensitivity, "library_digest", lambda *_: "another")
        kept(tmp_path, tiny, lr=1)
    assert not sensitivity.is_kept(tmp_path / "run.csv", {"lr": 1, "more": 2}, tiny)
    del record["code"]
    (tmp_path / "run.json").write_text(json.dumps(record))
    kept(tmp_path, tiny, lr=1, more=2)
    assert (tmp_path / "run.csv").stat().st_mtime_ns == made and not sensitivity.is_kept(tmp_path / "run.csv", {"lr": 2}, tiny)
    said = [one.getMessage() for one in caplog.records]
    assert len(said) == 2 and all("run.csv was made by other code" in one and "delete it" in one for one in said)


def test_a_choice_is_recorded_by_what_it_changes():
    change = dict(kind=sensitivity.start_times("slot", 10), turns=sensitivity.dated, lr=0.1)
    assert sensitivity.as_recorded(change) == {"kind": "StartTimes10", "turns": "dated", "lr": 0.1}


def test_the_librarys_digest_leaves_out_what_no_number_rests_on():
    names = {path.stem for path in sources.modules()}
    assert sources.NEUTRAL <= names and not sources.NEUTRAL & {*checkpoints.CODE, *checkpoints.ASKING, "experiment", "metrics"}
    assert len(sources.library_parts(["recall"])) == len(sources.library_parts()) + 1 == len(names - sources.NEUTRAL) + 3
    assert sources.library_digest("recall") != sources.library_digest() == sources.digest(*sources.library_parts())


def test_comments_and_docstrings_are_no_code(tmp_path):
    files = {"one": "def f():\n    \"\"\"Gives 1.\"\"\"\n    return 1\n", "same": "def f():  # one\n    return  1",
             "other": "def f():\n    return 2"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    one, same, other = (sources.code_of(tmp_path / name) for name in files)
    assert one == same != other


def test_a_start_is_a_multiple(model):
    with conformance.registered(sensitivity.start_times("slot", 10), "slot"):
        large = model("slot").adapter.initial_state()
    for name, entries in model("slot").adapter.initial_state().items():
        torch.testing.assert_close(large[name], 10 * entries)


@pytest.mark.parametrize("method", ["kv_extension", "hebbian", "slot"])
def test_states_are_written_less_their_mean_at_their_size(model, method):
    talks, plain = synthetic_conversations(2, 2, seed=0), model(method)
    with conformance.registered(sensitivity.centred(method, plain.backbone, talks), method):
        centred = model(method)
    states = torch.cat([H for turns in encode_all(plain.backbone, talks, progress=False).values() for H in turns])
    less = states - states.mean(dim=0)
    less *= states.square().mean().sqrt() / less.square().mean().sqrt()
    start = plain.adapter.initial_state()
    for name, entries in centred.adapter.write(start, states[:9]).items():
        torch.testing.assert_close(entries, plain.adapter.write(start, less[:9])[name])
        assert not torch.allclose(entries, plain.adapter.write(start, states[:9])[name], rtol=0.01)
    torch.testing.assert_close(centred.adapter.decay(start, states[:9]), plain.adapter.decay(start, less[:9]))


def test_names_from_data_are_shown_literally(table):
    figure = sensitivity.recall_by_setting(table.replace({"setting": {"no gate": "<b>no</b> gate"}}), "made up")
    assert figure.layout.yaxis.ticktext[1] == "&lt;b&gt;no&lt;/b&gt; gate"


def test_a_registered_class_is_known_by_what_its_methods_do():
    from pdmem_lib.methods import REGISTRY

    def variant(body, above=""):
        space = {"Slot": REGISTRY["slot"], "__name__": "__main__"}
        exec(f"{above}class Mine(Slot):\n    {body}", space)  # defined somewhere, as in a cell of a notebook
        return sources.registered_code(space["Mine"], checkpoints.CODE)

    assert len({sources.registered_code(cls, checkpoints.CODE) for cls in REGISTRY.values()}) == 1  # they count as modules
    read = "def read(self, state, inputs=None): return super().read({'P': 2 * state['P']}, inputs)"
    assert variant(read) == variant(read, above="\n\n# elsewhere\n") == variant(f"'''Another text.'''\n    {read}")
    wrapped = "@torch.no_grad()\n    {}"
    bodies = ["pass", read, read.replace("2 *", "3 *"), read.replace("read", "write"), "top = 3", "top = [3]", "top = [4]", "top = None",
              "top = torch.tensor([3])", f"@property\n    {read}", read.replace("None", "()"), read.replace("None", "None, *, by=2"),
              read.replace("None", "None, *, by=3"), wrapped.format(read), wrapped.format(read.replace("2 *", "3 *")),
              "read = functools.partialmethod(Slot.read, 1)", "a = functools.cached_property(lambda self: 1)",
              "a = functools.cached_property(lambda self: 2)", *(f"read = scaled({by})" for by in (2, 3))]
    different = [variant(body, "import functools, torch\ndef scaled(by): return lambda self, state, inputs=None: by * state['P']\n")
                 for body in bodies]
    assert len(set(different)) == len(different)
    changed, slot = sensitivity.last_third("slot"), REGISTRY["slot"]
    assert sources.registered_code(changed, checkpoints.CODE) != sources.registered_code(slot, checkpoints.CODE)


def test_what_a_registered_class_does_is_said_alike_in_every_process():
    script = """
import torch.nn.functional as F
from pdmem_lib import REGISTRY, sources
def made():
    def walk(x): return walk(x[1:]) if x else late
    class Mine(REGISTRY["slot"]):
        def decay(self, state, H): return walk(H)
    before = sources.registered_code(Mine)
    late = 1
    return before
class Mine(REGISTRY["slot"]):
    acts, words = (F.relu, print), {"a", "b", "c", "d"}
    def read(self, state, inputs=None, act=F.relu, other=lambda x: x in {"a", "b", "c"}): return act(state)
print(made(), sources.registered_code(Mine))
"""
    said = [subprocess.run([sys.executable, "-c", script], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True,
                           check=True).stdout for seed in "12"]
    assert said[0] == said[1] != ""
