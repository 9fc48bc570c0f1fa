"""Runs of one grid, made in pieces: what a report keeps is enough to report them again with the next piece."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from pdmem_lib import collected, estimates
from pdmem_lib.files import file_checksum, save_json

STUDY = Path(__file__).parent.parent / "figures" / "quick-smollm2-135m-locomo"


def a_run(folder, method, seed=42, references=False):
    """A run's folder as `experiment.save_run` leaves it, small: two questions, with their words."""
    name = f"{method}-1x-seed{seed}"
    here = folder / name
    here.mkdir(parents=True)
    run = dict(method=method, capacity=1, seed=seed)
    for table in collected.TABLES:
        pd.DataFrame([run | dict(value=0.1 + 0.2)]).to_csv(here / f"{table}.csv", index=False)
    rows = [run | dict(conversation="c", number=i, question="Who?", answer="Ann", answer_own="Bob", answer_type="phrase",
                       f1_own=0.5) for i in range(2)]
    pd.DataFrame(rows).to_parquet(here / "per_question.parquet", index=False)
    if references:
        pd.DataFrame(rows).assign(reference="frozen").to_parquet(here / "references.parquet", index=False)
    files = {path.name: file_checksum(path) for path in here.iterdir()}
    save_json(here / "record.json", run | dict(files=files, commit="abc"))
    return here


def test_a_grid_made_in_two_pieces_is_one(tmp_path):
    first, second, whole, figures = (tmp_path / name for name in ("first", "second", "whole", "figures"))
    for folder in (first, whole):
        a_run(folder, "baseline", references=True)
        a_run(folder, "slot")
    for folder in (second, whole):
        a_run(folder, "slot", seed=43)
    collected.save(collected.collect(first), figures)
    shutil.rmtree(first)
    pieces, once = collected.collect(second, figures), collected.collect(whole)
    assert pieces.kept == ("baseline-1x-seed42", "slot-1x-seed42") and set(pieces.records) == set(once.records)
    assert all(pieces.records[name] == record for name, record in once.records.items())
    for name in collected.TABLES:
        keys = list(collected.RUN)
        a, b = (runs.tables[name].sort_values(keys, ignore_index=True) for runs in (pieces, once))
        pd.testing.assert_frame_equal(a, b, rtol=1e-5)
    assert len(pieces.questions) == len(once.questions) == 6
    assert pieces.references["f1_own"].tolist() == once.references["f1_own"].tolist()
    collected.save(pieces, figures)  # and a third piece finds all three
    assert set(collected.collect(tmp_path / "none", figures).records) == set(once.records)


def test_a_run_that_is_here_is_not_taken_from_the_figures(tmp_path):
    a_run(tmp_path / "runs", "slot")
    figures = tmp_path / "figures"
    collected.save(collected.collect(tmp_path / "runs"), figures)
    here = tmp_path / "runs" / "slot-1x-seed42"
    shutil.rmtree(here)
    a_run(tmp_path / "runs", "slot")
    found = collected.collect(tmp_path / "runs", figures)
    assert found.kept == () and len(found.questions) == 2
    assert collected.collect(tmp_path / "runs").kept == ()


def test_no_text_of_the_data_is_kept(tmp_path):
    a_run(tmp_path / "runs", "baseline", references=True)
    figures = tmp_path / "figures"
    collected.save(collected.collect(tmp_path / "runs"), figures)
    for name in ("per_question", "references"):
        table = pd.read_parquet(figures / f"{name}.parquet")
        assert {"question", "answer", "answer_own"}.isdisjoint(table) and "answer_type" in table
    assert not any(b"Bob" in path.read_bytes() for path in figures.rglob("*") if path.is_file())


def test_a_file_of_another_run_that_was_here_is_not_this_ones(tmp_path):
    a_run(tmp_path / "ours", "baseline", references=True)
    here = a_run(tmp_path / "runs", "slot")
    shutil.copy(tmp_path / "ours" / "baseline-1x-seed42" / "references.parquet", here)
    assert collected.collect(tmp_path / "runs").references is None


def test_nothing_and_damage_are_said(tmp_path):
    with pytest.raises(ValueError, match="no finished run"):
        collected.collect(tmp_path, tmp_path / "figures")
    figures = tmp_path / "figures"
    a_run(tmp_path / "runs", "slot")
    collected.save(collected.collect(tmp_path / "runs"), figures)
    (record,) = (figures / "records").glob("*.json")
    record.write_text(record.read_text().replace("abc", "abd"))
    with pytest.raises(ValueError, match="damaged"):
        collected.collect(tmp_path / "none", figures)
    (figures / "history.csv").unlink()
    record.write_text(json.dumps({k: v for k, v in json.loads(record.read_text()).items() if k != "checksum"}))
    with pytest.raises(ValueError, match="no history.csv"):
        collected.collect(tmp_path / "none", figures)


def test_a_report_of_fewer_runs_does_not_take_the_place_of_more_unasked(tmp_path):
    figures = tmp_path / "figures"
    for method in ("slot", "gated"):
        a_run(tmp_path / "first", method)
    a_run(tmp_path / "second", "slot", seed=43)
    collected.save(collected.collect(tmp_path / "first"), figures)
    before = {path: path.read_bytes() for path in figures.rglob("*") if path.is_file()}
    few = collected.collect(tmp_path / "second")
    with pytest.raises(ValueError, match="gated-1x-seed42, slot-1x-seed42: with KEEP=1"):
        collected.save(few, figures)
    assert {path: path.read_bytes() for path in figures.rglob("*") if path.is_file()} == before
    collected.save(few, figures, give_up=True)
    assert [path.stem for path in (figures / "records").glob("*.json")] == ["slot-1x-seed43"]
    assert set(collected.collect(tmp_path / "none", figures).records) == {"slot-1x-seed43"}


@pytest.mark.parametrize("table", ["summary.csv", "per_question.parquet"])
def test_a_kept_record_that_no_table_tells_of_is_not_counted(tmp_path, table):
    """An earlier version left it beside the tables of another report."""
    for method in ("slot", "gated"):
        a_run(tmp_path / method, method)
        collected.save(collected.collect(tmp_path / method), tmp_path / f"of-{method}")
    shutil.copy(tmp_path / "of-gated/records/gated-1x-seed42.json", tmp_path / "of-slot/records")
    if table == "per_question.parquet":
        both = pd.concat(pd.read_csv(tmp_path / f"of-{method}/summary.csv") for method in ("slot", "gated"))
        both.to_csv(tmp_path / "of-slot/summary.csv", index=False)
    with pytest.raises(ValueError, match=f"gated-1x-seed42, of which {table} beside it has no row.*take the folder back"):
        collected.collect(tmp_path / "none", tmp_path / "of-slot")


@pytest.mark.parametrize("folder", [path.parent for path in sorted(STUDY.parent.glob("*/records"))], ids=lambda path: path.name)
def test_committed_records_and_tables_are_of_the_same_runs(folder):
    found = collected.collect("no such folder", folder)
    assert {tuple(record[key] for key in collected.RUN) for record in found.records.values()} == set(
        found.tables["summary"][list(collected.RUN)].itertuples(index=False, name=None))


def test_the_committed_study_can_be_taken_up():
    found = collected.collect("no such folder", STUDY)
    assert len(found.records) == 9 and set(found.questions["method"]) == {r["method"] for r in found.records.values()}
    again = estimates.noise_floor(estimates.with_memory(found.questions))
    committed = pd.read_csv(STUDY / "floor.csv").set_index("method")["retained_mean"]
    assert again.set_index("method")["retained_mean"].to_dict() == pytest.approx(committed.to_dict(), rel=1e-4)


def told(folder, method, machine, answers, logp, retained):
    """A finished run's folder with what `agreement` compares."""
    here = a_run(folder, method)
    run = dict(method=method, capacity=1, seed=42)
    pd.DataFrame([run | dict(conversation="c", number=i, answer_own=answer, logp_own=value)
                  for i, (answer, value) in enumerate(zip(answers, logp, strict=True))]).to_parquet(here / "per_question.parquet")
    pd.DataFrame([run | dict(retained_mean=retained)]).to_csv(here / "summary.csv", index=False)
    files = {path.name: file_checksum(path) for path in here.iterdir() if path.name != "record.json"}
    save_json(here / "record.json", run | dict(files=files, hardware=dict(cpu=machine, gpu=None)))


def test_agreement_says_how_far_two_machines_lie_apart(tmp_path):
    told(tmp_path / "one", "slot", "Xeon", ["a", "b", "c", "d"], [-1.0, -2.0, -3.0, -4.0], 10.0)
    told(tmp_path / "one", "gated", "Xeon", ["a"], [-1.0], 9.0)
    told(tmp_path / "two", "slot", "EPYC", ["a", "b", "c", "x"], [-1.1, -1.8, -3.0, -4.0], 12.0)
    one, two = (collected.collect(tmp_path / name) for name in ("one", "two"))
    (row,) = collected.agreement(one, two).to_dict("records")
    assert (row["method"], row["machine_one"], row["machine_two"], row["n"]) == ("slot", "Xeon", "EPYC", 4)
    assert (row["same_answers"], row["retained_one"], row["retained_two"]) == (75, 10, 12)
    assert row["logp_difference"] == pytest.approx(0.025) and row["logp_apart"] == pytest.approx(0.075)
    collected.save(two, tmp_path / "kept")  # without texts
    kept = collected.collect(tmp_path / "none", tmp_path / "kept")
    assert collected.agreement(one, kept)["same_answers"].isna().all()


def test_agreement_compares_the_same_questions_of_the_same_runs(tmp_path):
    told(tmp_path / "one", "slot", "Xeon", ["a", "b"], [-1.0, -2.0], 10.0)
    told(tmp_path / "two", "slot", "EPYC", ["a"], [-1.0], 10.0)
    told(tmp_path / "three", "gated", "EPYC", ["a"], [-1.0], 10.0)
    one, two, three = (collected.collect(tmp_path / name) for name in ("one", "two", "three"))
    with pytest.raises(ValueError, match="asked other questions"):
        collected.agreement(one, two)
    told(tmp_path / "four", "slot", "EPYC", ["a", "b"], [-1.0, -2.0], 10.0)
    record = tmp_path / "four" / "slot-1x-seed42" / "record.json"
    content = {key: value for key, value in json.loads(record.read_text()).items() if key != "checksum"}
    save_json(record, content | {"settings": {"train": {"lr": 0.1}}})
    with pytest.raises(ValueError, match="its settings train lr is None in one and 0.1 in the other"):
        collected.agreement(one, collected.collect(tmp_path / "four"))
    with pytest.raises(ValueError, match="no run stands in both"):
        collected.agreement(one, three)
