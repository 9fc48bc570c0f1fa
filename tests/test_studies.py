"""The notebooks of a question each, as `make recall`, `make sensitivity` and `make rates` run them: every trial once."""

import json
from pathlib import Path

import pandas
import papermill
import plotly.io
import pytest
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from pdmem_lib.experiment import load_data
from pdmem_lib.methods import REGISTRY, Slot

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
COMMITTED = sorted((NOTEBOOKS.parent / "figures").glob("*/records.json"))
SAID = {"backbone", "backbone_fingerprint", "data", "data_sha256", "preset", "method", "capacity", "seed", "settings", "versions", "commit",
        "hardware", "seconds", "peak_memory_bytes"}  # by every record of a run


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder to work in; the user's caches, the methods known and how figures are shown stay untouched."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plotly.io.renderers, "default", plotly.io.renderers.default)
    monkeypatch.setenv("PDMEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(REGISTRY, "queue", Slot)  # a notebook's own, until it says what it is


def made(name, runs, papermills=False, **parameters):
    """When each trial in ``runs`` was made, after a run of that notebook: by papermill, or its cells here, which is faster."""
    if papermills:
        papermill.execute_notebook(NOTEBOOKS / name, "out.ipynb", parameters, kernel_name="python3", progress_bar=False)
    else:
        notebook = parameterize_notebook(load_notebook_node(str(NOTEBOOKS / name)), parameters)
        run = {"__name__": "__main__"}
        for cell in notebook.cells:
            if cell.cell_type == "code":
                exec(compile(cell.source, name, "exec"), run)
    return {path.name: path.stat().st_mtime_ns for path in runs.glob("*.csv")}


def records_in(figures):
    """Those beside a study's tables, each of which says all that a run's record says."""
    records = json.loads((Path(figures) / "records.json").read_text())
    assert [name for name, record in records.items() if not SAID <= set(record)] == []
    return records


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.parent.name)
def test_committed_records_of_studies_say_all_that_a_runs_record_says(file):
    assert records_in(file.parent)


@pytest.mark.slow
def test_the_recall_notebook_makes_each_method_once(workplace):
    """And a method made under other settings is made again."""
    few = {"steps": 3, "rows": 8, "probe_rows": 4, "pairs": 1, "lags": [0, 2], "loads": [1], "interference": []}

    def make(methods, overrides=few, papermills=False):
        return made("92_recall.ipynb", Path("data/runs/recall-tiny-gpt2"), papermills, methods=methods, overrides=overrides)

    first = make("slot", papermills=True)
    both = make("M.6, gated")
    name = "slot-1x-seed42.csv"
    assert set(first) == {name} and set(both) == {name, "gated-1x-seed42.csv"} and both[name] == first[name]
    assert make("slot", few | {"steps": 4})[name] > first[name]
    table = pandas.read_csv("figures/recall-tiny-gpt2/recall.csv")
    assert set(table["method"]) == {"slot"} and table.groupby("axis")["x"].agg(list).to_dict() == {"lag": [0, 2], "load": [1]}
    records = records_in("figures/recall-tiny-gpt2")
    assert records["slot-1x-seed42"]["data"] == "recall" and records["slot-1x-seed42"]["preset"] == "recall.RecallSettings"
    assert records["slot-1x-seed42"]["recall_settings"]["steps"] == 4 and records["gated-1x-seed42"]["backbone"] == "tiny-gpt2"


@pytest.mark.slow
def test_the_sensitivity_notebook_makes_each_setting_once(workplace):
    """Each under what it changes and nothing else; a typing mistake stops it before a run."""
    few = {"steps": 4, "rows": 8, "probe_rows": 4, "pairs": 1, "lags": [0, 2]}

    def make(settings, papermills=False):
        return made("93_sensitivity.ipynb", Path("data/runs/sensitivity-tiny-gpt2"), papermills, methods="slot", seeds="42",
                    settings=settings, overrides=few)

    first = make("half the steps", papermills=True)
    both = make("γ 1 (0.95), read in the last third,half the steps")
    assert len(first) == 2 and len(both) == 4 and both.items() >= first.items()
    records = records_in("figures/sensitivity-tiny-gpt2")
    assert len({record["data_sha256"] for record in records.values()}) == 1  # the same is asked of all
    changed = {record["setting"]: record["settings"] for record in records.values()}
    base = changed.pop("as it is")
    assert {name: {key: value for key, value in lesson.items() if value != base.get(key)} for name, lesson in changed.items()} == {
        "γ 1 (0.95)": {"gamma": 1.0}, "read in the last third": {}, "half the steps": {"steps": 2}}
    table = pandas.read_csv("figures/sensitivity-tiny-gpt2/differences.csv").set_index("setting")
    assert set(table.index) == {"as it is", *changed} and table.loc["as it is", "difference"] == 0
    assert Path("figures/sensitivity-tiny-gpt2/sensitivity_slot.html").exists()
    with pytest.raises(AssertionError, match="unknown settings"):
        make("gamma 1")


@pytest.mark.slow
def test_the_sensitivity_notebook_of_locomo_makes_each_setting_once(workplace):
    """Turns, prompt and training are those of the setting, and the prompt is as it was afterwards."""
    few = {"max_questions": 16, "questions_per_bucket": 4, "max_new_tokens": 2, "lr": 0.1, "warmup_steps": 1}  # else gates stay shut

    def make(settings, papermills=False):
        return made("94_sensitivity_locomo.ipynb", runs, papermills, seeds="42", settings=settings, overrides=few)

    runs = Path("data/runs/sensitivity-tiny-gpt2-smoke-synthetic")
    first = make("turns with their date", papermills=True)
    both = make("prompt “Q: … A:”, learning rate 0.01 (0.1),read in the last third,states less their mean")
    assert len(first) == 2 and len(both) == 6 and both.items() >= first.items()
    figures = Path("figures/sensitivity-tiny-gpt2-smoke-synthetic")
    table = pandas.read_csv(figures / "runs.csv").set_index("setting")
    assert len(table) == 6 and "turns with their date" in table.index and (table["n"] == table["n"].iloc[0]).all() and table.index[0] == "as it is"
    assert table["own"].nunique() == 6  # every setting is another run
    changes = pandas.read_csv(figures / "differences.csv")
    assert set(changes["value"]) == {"gain", "own", "retained"} and len(changes) == 18
    told = pandas.read_csv(figures / "own_minus_other.csv").set_index("setting")
    assert set(told.index) == set(table.index) and (told["p_holm"] >= told["p"]).all() and (told["low"] <= told["effect"]).all()
    records = records_in(figures)
    assert set(records) == {name.removesuffix(".csv") for name in both}
    changed = {record["setting"]: {k: v for k, v in record["settings"].items() if v != few.get(k)} for record in records.values()}
    assert changed["as it is"] == {} and changed["learning rate 0.01 (0.1)"] == {"lr": 0.01}
    assert changed["turns with their date"] == {"turns": "dated"} and changed["states less their mean"] == {"centred": True}
    assert (figures / "sensitivity_slot.html").exists()
    with pytest.raises(AssertionError, match="unknown settings"):
        make("gamma 1")


@pytest.mark.slow
def test_rates_are_tried_without_a_look_at_the_test_conversations(workplace):
    """Each once; the last training conversation is asked, the others train."""
    few = {"max_questions": 16, "questions_per_bucket": 2, "max_new_tokens": 2}

    def make(rates, epochs="", papermills=False):
        return made("95_learning_rates.ipynb", runs, papermills, rates=rates, epochs=epochs, overrides=few)

    runs = Path("data/runs/rates-tiny-gpt2-smoke-synthetic")
    first = make("0.01", papermills=True)
    both = make("0.01, 0.1", epochs="1, 2")
    assert len(first) == 1 and len(both) == 4 and both.items() >= first.items()
    folder = Path("figures/rates-tiny-gpt2-smoke-synthetic")
    table = pandas.read_csv(folder / "rates.csv")
    assert table[["epochs", "rate"]].values.tolist() == [[1, 0.01], [1, 0.1], [2, 0.01], [2, 0.1]] and table["own"].nunique() == 4
    assert (table["steps"] == table["epochs"] * table["steps"].iloc[0]).all()
    assert table.loc[table["chosen"], "own"].item() == table["own"].max()
    data = load_data("synthetic", "smoke")
    held_out = {record["held_out"] for record in records_in(folder).values()}
    assert held_out == {data.train[-1].id} and not held_out & {talk.id for talk in data.test}
    assert (folder / "rates.html").exists()


@pytest.mark.slow
def test_the_notebook_of_oracle_banks_makes_each_stage_once(workplace):
    """A method that has no such stage is left out of it; what was made before is shown too."""
    few = {"epochs": 1, "warmup_steps": 1, "lr": 0.01, "max_questions": 16, "max_asked": 14}

    def make(methods, stages, papermills=False):
        return made("96_oracle_banks.ipynb", runs, papermills, methods=methods, stages=stages, overrides=few)

    runs = Path("data/runs/oracle-tiny-gpt2-smoke-synthetic")
    first = make("hebbian", "states,text,alone", papermills=True)
    own = make("queue", "after-4")
    both = make("hebbian,slot,M.6", "prompt,after")
    queue = "queue-1x-after-4-seed42.csv"
    assert set(own) == {*first, queue} and both.pop(queue) == own[queue]
    assert set(first) == {"hebbian-1x-text-seed42.csv", "hebbian-1x-alone-seed42.csv"} and both.items() >= first.items()
    assert set(both) - set(first) == {"baseline-1x-prompt-seed42.csv", "hebbian-1x-after-seed42.csv", "slot-1x-after-seed42.csv"}
    figures = Path("figures/oracle-tiny-gpt2-smoke-synthetic")
    table = pandas.read_parquet(figures / "per_question.parquet")
    assert (table.groupby(["method", "stage"]).size() == 14).all() and table.groupby("stage")["logp_own"].nunique().min() > 1
    told = pandas.read_csv(figures / "told.csv")
    assert set(map(tuple, told[["method", "stage"]].values)) == {
        ("baseline", "prompt"), ("hebbian", "text"), ("hebbian", "alone"), ("hebbian", "after"), ("hebbian", "end"),
        ("slot", "after"), ("slot", "end")}
    lost = pandas.read_csv(figures / "lost.csv").query("against == 'other'")
    assert set(map(tuple, lost[["method", "stage", "to"]].values)) == {
        ("hebbian", "text", "alone"), ("hebbian", "alone", "after"), ("hebbian", "after", "end"), ("slot", "after", "end")}
    records = records_in(figures)
    assert set(records) == {name.removesuffix(".csv") for name in both} and records["slot-1x-after-seed42"]["settings"]["lr"] == 0.01
    assert {path.stem for path in figures.glob("*.html")} == {"where_it_is_lost", "crowding", "words"}
    words = pandas.read_csv(figures / "words.csv")
    assert set(words["gamma"]) == {0.95, 1} and set(words["stage"]) > {"states", "alone", "after-4"}
    crowd = pandas.read_csv(figures / "crowding.csv")
    assert set(map(tuple, crowd[["method", "stage"]].values)) == {("hebbian", "alone"), ("hebbian", "after"), ("slot", "after")}
    assert (crowd["n"] == (table.query("evidence == 1 and stage == 'after' and method == 'slot'")["logp_neighbour"]).count()).all()
    another = made("96_oracle_banks.ipynb", runs, methods="hebbian", stages="alone", overrides=few, backbone="tiny-llama")
    assert another["hebbian-1x-alone-seed42.csv"] > first["hebbian-1x-alone-seed42.csv"]  # one backbone's never stand for another's
    with pytest.raises(AssertionError, match="unknown stages"):
        make("slot", "later")
