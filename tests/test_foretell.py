"""A run's time is its work, counted as the library does it, times what a unit takes; and how costs grow is drawn."""

import json
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch

import pdmem_lib as pdmem
from pdmem_lib import checkpoints, cost_figures, evaluation, experiment, foretell, memory, states
from pdmem_lib.experiment import Experiment
from pdmem_lib.files import save_tensors
from pdmem_lib.memory import MemoryModel

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import grow  # noqa: E402


@pytest.fixture(scope="module")
def smoke():
    return experiment.load_data("synthetic", "smoke")


def built(tiny, method, capacity=1):
    asked = Experiment(method=method, capacity=capacity, preset="smoke", backbone="tiny-gpt2", data="synthetic")
    return asked, asked.build(tiny)


@pytest.mark.parametrize("method", ["slot", "hebbian", "slot.format", "slot.lora"])
def test_what_is_counted_is_what_a_run_does(tiny, smoke, method, monkeypatch):
    asked, model = built(tiny, method)
    done, write = Counter(), type(model.adapter).write
    reads, scores, steps = MemoryModel.answers_under, MemoryModel.scores_under, []
    injects, passes, scoring = MemoryModel._injection_for, memory.score_targets, []

    def answers(self, memories, questions, *rest, **more):
        kind = "rows guessed" if more.get("drafts") else "rows asked"
        done[kind] += len(memories) * len(questions) * (memories[0] != "off")
        return reads(self, memories, questions, *rest, **more)

    def scored(self, memories, *rest, **more):
        scoring.append(not torch.is_grad_enabled() and memories[0] != "off")
        found = scores(self, memories, *rest, **more)
        scoring.clear()
        return found

    def injected(self, memories, *rest, **more):
        done["score: memory"] += len(memories) * scoring[:1].count(True)
        return injects(self, memories, *rest, **more)

    def passed(backbone, ids, *rest):
        done["score: token"] += ids.numel() * scoring[:1].count(True)
        return passes(backbone, ids, *rest)

    def turn(self, state, H):
        done["turn"] += 1
        return write(self, state, H)

    sample = evaluation.sample_questions(smoke.test, asked.evaluate_settings.questions_per_bucket)
    evaluation.frozen_answers(tiny, [q for *_, q in sample], asked.evaluate_settings)
    monkeypatch.setattr(MemoryModel, "answers_under", answers)
    monkeypatch.setattr(MemoryModel, "scores_under", scored)
    monkeypatch.setattr(MemoryModel, "_injection_for", injected)
    monkeypatch.setattr(memory, "score_targets", passed)
    monkeypatch.setattr(evaluation, "ROWS", 24)  # so that a conversation's questions are scored in several passes
    monkeypatch.setattr(type(model.adapter), "write", turn)
    pdmem.train(model, smoke.train, on_step=steps.append, **vars(asked.train_settings) | {"progress": False})
    pdmem.evaluate(model, smoke.test, **vars(asked.evaluate_settings) | {"progress": False})

    work = foretell.count(model, smoke, asked, lengths=1e9)  # every answer up to the limit
    assert work["step"] == len(steps) > 0
    assert work["turn"] + work["turn traced"] == done["turn"]
    assert (work["turn"] > 0) == (method in ("slot", "hebbian"))
    limit = asked.evaluate_settings.max_new_tokens
    guessed = done["rows guessed"] * (foretell.SAME + (1 - foretell.SAME) * limit)
    assert work["answer: row and step"] == pytest.approx(done["rows asked"] * limit + guessed)
    assert (guessed > 0) == (method != "slot.lora")  # those under the zero state come with guesses, and a curve's
    assert (work["score: token"], work["score: memory"]) == (done["score: token"], done["score: memory"])


def test_the_baseline_does_nothing_but_begin(tiny, smoke):
    asked, model = built(tiny, "baseline")
    assert foretell.count(model, smoke, asked) == Counter(start=1)
    assert foretell.look(model, smoke, asked, []) == {}


@pytest.mark.parametrize("method", ["prefix", "hebbian", "gated", "slot.lora"])
def test_every_unit_that_is_counted_is_timed(tiny, smoke, method):
    asked, model = built(tiny, method)
    unit = foretell.look(model, smoke, asked, tiny.encode([str(turn) for turn in smoke.test[0].turns[:3]]))
    assert set(foretell.count(model, smoke, asked)) - {"start"} <= set(unit)
    assert all(seconds >= 0 for seconds in unit.values()) and unit["step"] > 0
    assert sum(seconds for name, seconds in unit.items() if name.startswith("answer")) > 0


def test_units_are_found_again_from_what_calls_of_them_took():
    unit = {"token": 0.002, "step": 0.05, "row": 0.001}
    rows = [Counter(token=t, step=s, row=r) for t, s, r in ((100, 1, 4), (100, 6, 24), (900, 1, 32), (900, 6, 192))]
    found = foretell.solve(rows, [foretell.total(row, unit) for row in rows])
    assert found == pytest.approx(unit, rel=1e-6)


def test_runs_go_in_order_to_the_worker_that_is_free_first():
    assert foretell.lay_out([3, 1, 1, 4], 1) == 9
    assert foretell.lay_out([3, 1, 1, 4], 2) == 6  # 3 | 1 1 4
    assert foretell.lay_out([2], 8) == 2


def test_what_lies_in_the_cache_costs_nothing(tiny, smoke):
    asked, _ = built(tiny, "slot")
    experiment.encode(tiny, smoke, asked)
    assert foretell.shared_seconds(tiny, smoke, asked) == (0.0, 0.0)
    file = states.states_file(tiny, [str(turn) for turn in smoke.test[0].turns], states.use_bf16("auto", tiny.device))
    file.unlink()
    before, first = foretell.shared_seconds(tiny, smoke, asked)
    assert before > 0 and first == 0.0
    states.turn_states(tiny, smoke.test[0])
    assert foretell.shared_seconds(tiny, smoke, Experiment(method="baseline", preset="smoke"))[1] > 0  # its references


@pytest.mark.slow
def test_a_foretelling_has_a_line_a_method_and_a_range(tmp_path, monkeypatch):
    said = []
    runs = experiment.grid(["slot", "slot.format"], [1], [42, 43, 44])
    assert experiment.grid(["M.6", "slot", "M.6.format"], [1], [42, 43, 44]) == runs
    for name, code in (("slot", checkpoints._checksums(checkpoints.CODE)), ("slot.format", "of another day")):
        kept = tmp_path / f"{name}-1x-seed44" / "checkpoint.safetensors"
        save_tensors(kept, {"history": torch.zeros(2, 6)}, {"run": json.dumps({"code": code})})
    told = foretell.foretell(runs, "tiny-gpt2", "synthetic", "smoke", cores=2, say=said.append, folder=tmp_path)
    assert "6 runs" in said[0] and "about" in said[0]
    seconds = told.runs.set_index(["method", "seed"])["seconds"]
    assert seconds["slot", 44] < seconds["slot", 43] and seconds["slot.format", 44] == seconds["slot.format", 43]
    assert [tuple(row) for row in told.runs[["method", "capacity", "seed"]].itertuples(index=False)] == runs
    assert (told.runs["low"] < told.runs["seconds"]).all() and (told.runs["seconds"] < told.runs["high"]).all()
    assert told.wall["low"] < told.wall["seconds"] < told.wall["high"] < told.runs["high"].sum() + told.before
    text = foretell.lines(told, now=0.0)
    assert "slot" in text[0] and "3 runs of" in text[0] and "in all" in text[-1]


@pytest.mark.parametrize("busy, lines", [(3.0, 0), (70.0, 1)])
def test_other_work_on_the_machine_is_said(monkeypatch, busy, lines):
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: busy)
    said = []
    foretell._say_if_busy(said.append)
    assert len(said) == lines and all("70 %" in line for line in said)


def test_a_name_that_is_no_run_and_a_count_that_is_none_are_refused():
    assert experiment.run_of("slot.format-10x-seed42") == ("slot.format", 10, 42)
    assert experiment.run_of("M.6-1x-seed42") == ("slot", 1, 42) and experiment.run_of("M.6.lora-1x-seed3")[0] == "slot.lora"
    with pytest.raises(ValueError, match="names no run"):
        experiment.run_of("slot")
    with pytest.raises(ValueError, match="unknown method 'slit'"):
        experiment.run_of("slit-1x-seed42")
    with pytest.raises(ValueError, match="at least one run"):
        foretell.foretell([], "tiny-gpt2", "synthetic", "smoke")


# ---- how costs grow --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grown(tiny):
    return grow.grow(tiny, rounds=1, turns=(2, 5), entries=(4, 40), users=(1, 20))


def test_growth_is_measured_whole(grown):
    assert grown.columns.tolist() == list(cost_figures.COLUMNS) and (grown["seconds"] > 0).all()
    assert set(cost_figures.PANELS) | {"state saved", "state loaded", "bank read and checked"} == set(grown["what"])
    users = grown[grown["what"] == "question answered"].set_index("x")["bytes"]
    assert users[20] == 20 * users[1]
    written = grown[(grown["what"] == "turn written") & (grown["method"] == "slot")]
    assert written["x"].tolist() == [2, 5] and written["bytes"].nunique() == 1  # a bank does not grow


def test_growth_is_drawn_in_four_labelled_logarithmic_panels(grown):
    figure = cost_figures.growth(grown, "What a memory <costs>")
    assert "What a memory &lt;costs&gt;" in figure.layout.title.text and "backbone tiny" in figure.layout.title.text
    for i in ("", "2", "3", "4"):
        x, y = figure.layout[f"xaxis{i}"], figure.layout[f"yaxis{i}"]
        assert x.type == y.type == "log" and x.title.text and "second" in y.title.text
    steps = next(trace for trace in figure.data if trace.yaxis == "y2")
    assert list(steps.y) == grown.loc[grown["what"] == "training step", "seconds"].tolist()
    with pytest.raises(ValueError, match="bytes"):
        cost_figures.growth(grown.drop(columns="bytes"), "")


def test_serving_is_reckoned_from_the_measured_pieces():
    rows = [("state loaded", "slot", 1, 0.001, 200_000), ("state saved", "slot", 1, 0.01, 200_000),
            ("question answered", "slot", 1, 0.1, 200_000), ("question answered", "slot", 1000, 0.2, 2e8),
            ("bank read and checked", "slot", 1000, 0.002, 2e8),
            ("state loaded", "gated", 10, 0.004, 2_000_000), ("state saved", "gated", 10, 0.02, 2_000_000)]
    pieces = pd.DataFrame(rows, columns=list(cost_figures.COLUMNS)[:-1]).assign(backbone="b")
    table = cost_figures.serving(pieces, users=1_000_000, questions_a_day=8.64)
    slot, gated = (table[table["method"] == name].iloc[0] for name in ("slot", "gated"))
    assert slot["total_gigabytes"] == pytest.approx(200) and gated["total_gigabytes"] == pytest.approx(2000)
    assert slot["loads_per_second"] == pytest.approx(1000) and slot["read_megabytes_per_second"] == pytest.approx(200)
    assert slot["questions_per_second"] == pytest.approx(5) and slot["load_share"] == pytest.approx(0.01)
    assert slot["disk_reads_per_second"] == pytest.approx(100) and slot["busy_cores"] == pytest.approx(20)
    assert gated[["questions_per_second", "busy_cores"]].isna().all()
