"""The pipeline's promises: exactly what was asked for runs, once; failures are named; nothing is lost by a kill.

The tests put a stand-in for the experiment's notebook into the real Snakefile, so that they test the engine in seconds;
`test_smoke` runs the real smoke preset from end to end.
"""

import itertools
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from pdmem_lib.experiment import PRESETS
from pdmem_lib.synthetic import synthetic_locomo

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
SMALL = {"preset": "smoke", "backbone": "tiny-gpt2", "data": "synthetic", "capacities": "1", "seeds": "42"}
RUN = """
import json, os, pathlib, time
time.sleep(float(os.environ.get("STUB_SECONDS", 0)))
if method == os.environ.get("STUB_FAILS"): raise ValueError(f"{method} was told to fail")
folder = pathlib.Path(output_dir)
folder.mkdir(parents=True, exist_ok=True)
for name in ["per_question.parquet", *(f"{t}.csv" for t in "forgetting knowledge categories summary history turns".split())]:
    (folder / name).write_text("")
(folder / "record.json").write_text(json.dumps({"method": method, "capacity": capacity, "seed": seed}))
"""
REPORT = """
import pathlib
runs = sorted(path.parent.name for path in pathlib.Path(runs_dir).glob("*/record.json"))
pathlib.Path(figures_dir).mkdir(parents=True, exist_ok=True)
(pathlib.Path(figures_dir) / "summary.csv").write_text("\\n".join(["run", *runs]))
"""


def notebook(path, parameters, code):
    literals = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    cells = [nbformat.v4.new_code_cell(literals, metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(code)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder to run the pipeline in, with the stand-ins; the user's caches stay untouched."""
    same = {"backbone": "", "data": "", "preset": ""}
    notebook(tmp_path / "run.ipynb", same | {"method": "", "capacity": 0, "seed": 0, "output_dir": ""}, RUN)
    notebook(tmp_path / "report.ipynb", same | {"runs_dir": "", "figures_dir": ""}, REPORT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PDMEM_CACHE", str(tmp_path / "cache"))
    return tmp_path


def snakemake(*options, **settings):
    settings = {"template": "run.ipynb", "report": "report.ipynb"} | SMALL | settings
    config = [f"{key}={value}" for key, value in settings.items()]
    words = ["-s", str(NOTEBOOKS / "Snakefile"), "--cores", "2", *options, "--config", *config]
    if "--dry-run" not in options:
        return subprocess.run([sys.executable, "-m", "snakemake", *words], capture_output=True, text=True, timeout=300)
    said = Path("said-of-plan.txt")
    said.write_text("")
    plan = PLANS.Process(target=_plan, args=(words, said, dict(os.environ)), daemon=True)
    plan.start()
    plan.join(timeout=120)
    if plan.is_alive():
        plan.kill()
        raise subprocess.TimeoutExpired(words, 120, said.read_text())
    return subprocess.CompletedProcess(words, plan.exitcode, "", said.read_text())


# A plan takes a second; that torch and Snakemake are imported, five more. So plans are made by copies of a process that has them.
PLANS = multiprocessing.get_context("forkserver")
PLANS.set_forkserver_preload(["torch", "snakemake.cli", "pdmem_lib.experiment"])


def _plan(words, said, environment):
    os.environ.clear()
    os.environ.update(environment)
    with open(said, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from snakemake.cli import main

    main(words)


def planned(**settings):
    """The runs that a dry run lists, as (method, capacity, seed)."""
    result = snakemake("--dry-run", **settings)
    assert result.returncode == 0, result.stderr
    found = re.findall(r"wildcards: method=([\w.]+), capacity=(\d+), seed=(\d+)", result.stdout + result.stderr)
    assert len(found) == len(set(found))
    return {(method, int(capacity), int(seed)) for method, capacity, seed in found}


def reproduce(**settings):
    settings = {"template": "run.ipynb", "report": "report.ipynb", "cores": 2} | SMALL | settings
    options = [f"--{key}={value}" for key, value in settings.items() if value is not None]
    return [sys.executable, str(NOTEBOOKS / "reproduce.py"), *options]


def finish(command):
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def records(folder="data/runs"):
    return {path.parent.name: path.stat().st_mtime_ns for path in Path(folder).glob("*/*/record.json")}


def wait_for(condition, seconds=180):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def test_dry_run_lists_exactly_the_runs_of_the_preset_or_those_asked_for(workplace):
    for name, preset in PRESETS.items():
        grid = itertools.product(preset.methods, preset.capacities, preset.seeds)
        once = ("baseline", ".lora")  # they have no memory to make larger
        wanted = {(method, 1 if method.endswith(once) else capacity, seed) for method, capacity, seed in grid}
        assert planned(preset=name, capacities="", seeds="") == wanted
    chosen = planned(methods="baseline,M.6,gated", capacities="1,10", seeds="7,8,07")
    assert chosen == {(m, c, s) for m in ("slot", "gated") for c in (1, 10) for s in (7, 8)} | {
        ("baseline", 1, 7), ("baseline", 1, 8)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value", "known"),
    [
        ("methods", "slot,oracle", "kv_extension"),
        ("preset", "huge", "smoke"),
        ("typo", 1, "seeds"),
        ("keep", "yes", "1 ("),
    ],
)
def test_unknown_settings_are_refused_with_the_known_ones(workplace, key, value, known):
    result = snakemake("--dry-run", **{key: value})
    assert result.returncode != 0
    message = next(line for line in (result.stdout + result.stderr).splitlines() if line.startswith(("Unknown", "keep")))
    assert known in message


@pytest.mark.slow
def test_runs_share_a_gpu_or_take_turns(workplace, monkeypatch):
    """By counts alone: no GPU is touched."""
    monkeypatch.setenv("STUB_SECONDS", "4")
    for share, apart in ((1, lambda seconds: seconds >= 4), (2, lambda seconds: seconds < 4)):
        result = snakemake("--quiet", "--until", "run", gpu=1, share=share, methods="slot,gated", runs=f"runs-{share}")
        assert result.returncode == 0, result.stderr
        ended = sorted(records(f"runs-{share}").values())
        assert len(ended) == 2 and apart((ended[1] - ended[0]) / 1e9)
    refused = snakemake("--dry-run", gpu=1, share=0)
    assert refused.returncode != 0 and "a whole number from 1 on" in refused.stdout + refused.stderr


@pytest.mark.slow
def test_a_failed_run_stops_no_other_and_is_named_and_only_it_runs_again(workplace, monkeypatch):
    command = reproduce(methods="M.5,slot", cores=1)  # the one that fails comes first
    monkeypatch.setenv("STUB_FAILS", "gated")
    failed = finish(command)
    assert failed.returncode == 1
    assert re.match("data synthetic.*backbone tiny-gpt2", failed.stdout)  # the very first line
    assert "failed: gated-1x-seed42: ValueError: gated was told to fail" in failed.stderr.splitlines()[-2:]
    first = records()
    assert set(first) == {"slot-1x-seed42"}
    [table] = Path("figures").glob("*/summary.csv")
    assert set(table.read_text().split()[1:]) == set(first)  # the report is made of what there is

    monkeypatch.delenv("STUB_FAILS")
    mended = finish(command)
    assert mended.returncode == 0, mended.stderr
    second = records()
    assert {name: second[name] for name in first} == first
    assert set(second) - set(first) == {"gated-1x-seed42"}
    assert set(table.read_text().split()[1:]) == set(second)

    again = finish(command)
    assert again.returncode == 0
    assert records() == second
    assert "gated-1x-seed42" in again.stdout  # the table is printed though nothing had to run
    assert "finished" not in again.stdout


def test_what_is_gone_damaged_or_made_of_something_else_is_made_again(workplace):
    """Where the results lie in another clone, too: Snakemake's own notes are in the folder where it was called."""
    slot, gated = ("slot", 1, 42), ("gated", 1, 42)
    assert snakemake(methods="slot,gated").returncode == 0
    folder = workplace / "data/runs/smoke-tiny-gpt2-synthetic"
    whole = (folder / "gated-1x-seed42/record.json").read_text()
    (folder / "slot-1x-seed42").rename("aside")
    assert planned(methods="slot,gated") == {slot}
    shutil.rmtree(".snakemake")
    (folder / "gated-1x-seed42/per_question.parquet").unlink()
    assert planned(methods="slot,gated") == {slot, gated}
    Path("aside").rename(folder / "slot-1x-seed42")
    (folder / "gated-1x-seed42/per_question.parquet").write_text("")
    template = nbformat.read("run.ipynb", as_version=4)
    template.cells[1].outputs = [nbformat.v4.new_output("stream", text="saved with outputs")]
    nbformat.write(template, "run.ipynb")
    assert planned(methods="slot,gated") == set()
    (folder / "gated-1x-seed42/record.json").write_text(whole[:9])
    assert planned(methods="slot,gated") == {gated}
    template.cells[1].source += "\nchanged = True"
    nbformat.write(template, "run.ipynb")
    assert planned(methods="slot,gated") == {slot, gated}


def test_committed_results_of_others_do_not_stand_for_runs(workplace, monkeypatch):
    """A fresh clone has figures and no runs: these are made, not taken for done, and what fails shows no other's table."""
    table = workplace / "figures" / "smoke-tiny-gpt2-synthetic" / "summary.csv"
    table.parent.mkdir(parents=True)
    table.write_text("run\nsomebody-elses")
    monkeypatch.setenv("STUB_FAILS", "slot")
    failed = finish(reproduce(methods="slot"))
    assert failed.returncode == 1 and "somebody-elses" not in failed.stdout
    assert "No report was made" in failed.stdout and "slot was told to fail" in failed.stderr

    monkeypatch.delenv("STUB_FAILS")
    assert snakemake(methods="slot").returncode == 0
    assert table.read_text().split() == ["run", "slot-1x-seed42"]
    made, run = table.stat().st_mtime_ns, records()
    table.write_text("run\nsomebody-elses")  # as a checkout does
    assert snakemake(methods="slot").returncode == 0
    assert table.read_text().split() == ["run", "slot-1x-seed42"] and table.stat().st_mtime_ns > made
    assert records() == run
    shutil.rmtree(table.parent)
    plan = snakemake("--dry-run", methods="slot")
    assert plan.returncode == 0 and "rule report" in plan.stderr


def test_fewer_runs_do_not_take_the_place_of_a_committed_report_unasked(workplace):
    """Said before any run is made; a report that holds them all, KEEP and another folder are free to go on."""
    records = workplace / "figures" / "smoke-tiny-gpt2-synthetic" / "records"
    records.mkdir(parents=True)
    for run in ("slot-1x-seed42", "gated-1x-seed42"):
        (records / f"{run}.json").write_text("{}")
    refused = snakemake("--dry-run", methods="slot", seeds="42,43")
    assert refused.returncode != 0 and "also tells of gated-1x-seed42: with KEEP=1" in refused.stdout + refused.stderr
    slot, gated = ("slot", 1, 42), ("gated", 1, 42)
    assert planned(methods="slot,gated") == {slot, gated}
    assert planned(methods="slot", keep=1) == planned(methods="slot", keep=0) == planned(methods="slot", figures="mine") == {slot}


def test_a_backbones_folder_that_changed_makes_its_runs_start_again(workplace):
    backbone = workplace / "bb"
    backbone.mkdir()
    (backbone / "model.safetensors").write_text("one")
    first = encoded_as(backbone="bb")
    (backbone / "model.safetensors").write_text("two")
    assert encoded_as(backbone="bb") != first


def encoded_as(**settings):
    """The name of the file that says what the runs would rest on."""
    result = snakemake("--dry-run", methods="slot", **settings)
    assert result.returncode == 0, result.stderr
    return re.search(r"encoded-[0-9a-f]{16}", result.stdout + result.stderr)[0]


@pytest.mark.slow
def test_a_second_pipeline_does_not_end_the_first(workplace, monkeypatch):
    """And folders may have any names, and standard input may be closed."""
    monkeypatch.setenv("STUB_SECONDS", "5")
    first = subprocess.Popen(reproduce(methods="slot", runs="2024", figures="it's: figures"), stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True, preexec_fn=lambda: os.close(0))
    wait_for(lambda: list(Path(".snakemake/locks").glob("*")))
    second = finish(reproduce(methods="gated", runs="two"))
    said, errors = first.communicate(timeout=120)
    assert first.returncode == 0, errors
    assert set(records("2024")) == {"slot-1x-seed42"} and "slot-1x-seed42 finished" in said
    assert (workplace / "it's: figures/smoke-tiny-gpt2-synthetic/summary.csv").is_file()
    assert second.returncode == 0 or "is at work in this folder" in second.stderr


def test_what_the_encoding_depends_on_makes_all_runs_start_again_at_once(workplace):
    """Code or data that changed: the encoding runs again, and every run that is wanted, in the first call after it."""
    data = workplace / "talks.json"
    talks = synthetic_locomo(3, 2, seed=0)
    data.write_text(json.dumps(talks))
    assert snakemake(methods="slot", data=data).returncode == 0
    assert planned(methods="slot", data=data) == set()
    assert planned(methods="slot,gated", data=data) == {("gated", 1, 42)}
    data.write_text(json.dumps(talks, indent=1))
    assert planned(methods="slot,gated", data=data) == {("slot", 1, 42), ("gated", 1, 42)}
    before = records()
    done = snakemake(methods="slot,gated", data=data)
    assert done.returncode == 0, done.stderr
    after = records()
    assert len(after) == 2 and after["slot-1x-seed42"] > before["slot-1x-seed42"]
    assert planned(methods="slot,gated", data=data) == set()


@pytest.mark.slow
def test_killed_without_warning_it_goes_on_where_it_stopped(workplace, monkeypatch):
    command = reproduce(methods="slot,gated,M.1")
    monkeypatch.setenv("STUB_SECONDS", "3")
    said = workplace / "said.txt"
    with said.open("w") as stdout:
        process = subprocess.Popen(command, stdout=stdout, stderr=subprocess.DEVNULL)
    wait_for(lambda: " finished after" in said.read_text())
    other = finish(command)
    assert other.returncode == 1
    assert "Another pipeline is at work" in other.stderr
    orphans = psutil.Process(process.pid).children(recursive=True)
    assert orphans
    done = re.findall(r"run \d of 3: (\S+) finished", said.read_text())
    process.kill()  # SIGKILL: Snakemake, papermill and kernels stay behind and go on writing
    process.wait()

    before = {name: made for name, made in records().items() if name in done}
    resumed = finish(command)
    assert resumed.returncode == 0, resumed.stderr
    assert not [orphan for orphan in orphans if orphan.is_running() and orphan.status() != psutil.STATUS_ZOMBIE]
    after = records()
    assert set(after) == {"slot-1x-seed42", "gated-1x-seed42", "prefix-1x-seed42"}
    assert before
    assert {name: after[name] for name in before} == before


def test_a_run_goes_on_from_a_checkpoint_of_the_same_code_alone(workplace):
    """What a killed run left makes no work for anybody when the code has changed since."""
    folder = workplace / "data/runs/smoke-tiny-gpt2-synthetic/slot-1x-seed42"
    folder.mkdir(parents=True)
    checkpoint = folder / "checkpoint.safetensors"
    before = command_of_run()
    assert run_by(before, "echo trained >> %s; exit 1" % checkpoint) == (1, False)
    assert run_by(before, "echo trained >> %s; exit 1" % checkpoint) == (1, False)
    assert checkpoint.read_text().split() == ["trained"] * 2
    template = nbformat.read("run.ipynb", as_version=4)
    template.cells[1].source += "\nchanged = True"
    nbformat.write(template, "run.ipynb")
    assert run_by(command_of_run(), "echo trained >> %s" % checkpoint) == (0, True)
    assert checkpoint.read_text().split() == ["trained"] and not list(folder.glob("begun-*"))


def command_of_run():
    """The shell command by which the Snakefile makes the run of slots."""
    plan = snakemake("--dry-run", "--printshellcmds", methods="slot")
    assert plan.returncode == 0, plan.stderr
    command = r"^ *export OMP_NUM_THREADS=\d+ MKL_NUM_THREADS=\d+\n *folder=.*?exit 1; fi$"
    return re.search(command, plan.stdout + plan.stderr, re.MULTILINE | re.DOTALL)[0]


def run_by(command, stand_in):
    """(exit code, whether a checkpoint was said to be of other code) of that command, with a line of shell as its Python."""
    python = Path("bin/python")
    python.parent.mkdir(exist_ok=True)
    python.write_text(f"#!/bin/sh\n{stand_in}\n")
    python.chmod(0o755)
    environment = os.environ | {"PATH": f"{python.parent.resolve()}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", command], capture_output=True, text=True, env=environment, timeout=60)
    return done.returncode, "slot-1x-seed42: its checkpoint is of other code" in done.stdout


def test_names_from_outside_never_reach_a_path(workplace):
    folder = workplace / "models" / "my model; rm -rf"
    folder.mkdir(parents=True)  # enough for a plan
    result = snakemake("--dry-run", methods="slot", backbone=str(folder), runs=str(workplace / "runs"))
    paths = re.findall(r"output: (\S+record\.json)", result.stdout + result.stderr)
    assert len(paths) == 1, result.stderr
    grid = Path(paths[0]).relative_to(workplace / "runs").parts[0]
    assert re.fullmatch(r"smoke-my-model-rm--rf-[0-9a-f]{6}-synthetic", grid)


def test_what_has_no_settings_chosen_is_refused_before_any_run(workplace):
    assert planned(preset="tuned", methods="prefix,prefix.format", capacities="1", seeds="42") == {
        ("prefix", 1, 42), ("prefix.format", 1, 42)}
    result = snakemake("--dry-run", preset="tuned", methods="slot.lora")
    assert result.returncode != 0 and "none for slot.lora: choose them first" in result.stdout + result.stderr


def test_what_was_tuned_stands_in_the_full_presets_report_alone(workplace):
    def told(preset):
        result = snakemake("--dry-run", "--printshellcmds", preset=preset, methods="prefix")
        assert result.returncode == 0, result.stderr
        return re.findall(r"-r tuned (\S+)", result.stdout + result.stderr)

    table = workplace / "figures" / "tuned-tiny-gpt2-synthetic" / "beside_published.csv"
    assert told("full") == []
    table.parent.mkdir(parents=True)
    table.write_text("source")
    assert told("full") == [str(table.relative_to(workplace))] and told("smoke") == told("tuned") == []
