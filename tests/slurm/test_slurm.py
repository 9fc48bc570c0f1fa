"""The same pipeline on Slurm, for real: what a cluster does to jobs changes no number, and nothing is left behind.

Skips where Slurm is not installed. Here it is a cluster of one node (`cluster.py`); to see it at work:

    apt-get install slurm-wlm munge && pip install -e ".[cluster]" && pytest -s tests/slurm
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pandas
import pytest
import yaml

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from cluster import missing, slurm, wait_for  # noqa: E402
from test_pipeline import NOTEBOOKS, finish, records, reproduce, workplace  # noqa: E402, F401

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=str(missing()))]
pytest.importorskip("snakemake_executor_plugin_slurm", reason="the cluster extra is not installed")

METHODS = os.environ.get("PDMEM_SLURM_METHODS", "")  # empty: the whole smoke grid
OF_THIS_CLUSTER = {  # no accounting, and a test does not wait as long for word of a job
    "slurm-status-command": "squeue", "slurm-init-seconds-before-status-checks": 5,
    "set-threads": {"encode": 2},
}


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    with slurm(tmp_path_factory.mktemp("slurm")) as node, pytest.MonkeyPatch.context() as patch:
        for name, value in node.env.items():
            patch.setenv(name, value)
        yield node


@pytest.fixture
def profile(tmp_path):
    """The repository's profile, and what this cluster needs."""
    folder = tmp_path / "profile"
    folder.mkdir()
    settings = yaml.safe_load((NOTEBOOKS / "profiles" / "slurm" / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(settings | OF_THIS_CLUSTER))
    return folder


@pytest.fixture
def begin(workplace):  # noqa: F811
    """``begin(command)`` starts a pipeline, which is stopped if the test ends before it does; its words go to said.txt."""
    begun = []

    def start(command):
        with open("said.txt", "w") as stdout, open("said.err", "w") as stderr:
            begun.append(subprocess.Popen(command, stdout=stdout, stderr=stderr))
        return begun[-1]
    yield start
    for process in begun:
        process.terminate()  # it ends and cancels what it started
        process.wait(120)


def at_work(node, but=()):
    """The youngest of the runs' jobs that has been running for some seconds and still is."""
    found = []

    def one():
        young = [job for job in node.jobs("RUNNING", of="run") if job not in but][-1:]
        time.sleep(4)
        found[:] = set(young) & set(node.jobs("RUNNING", of="run"))
        return found
    wait_for(one, "a run at work", 300)
    return found[0]


def tables(folder):
    """All tables of runs and report, without the times that things took."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.suffix in (".csv", ".parquet") and "adapter" not in path.parts:
            table = pandas.read_csv(path) if path.suffix == ".csv" else pandas.read_parquet(path)
            found[str(path.relative_to(folder))] = table.drop(columns=[c for c in table if "seconds" in c])
    return found


def test_requeued_killed_and_on_a_failing_node_the_grid_gives_the_local_numbers(node, profile, workplace, begin, monkeypatch):  # noqa: F811
    """The smoke grid with the real notebooks: one job requeued, one killed, the node lost once while two run."""
    asked = {"template": None, "report": None, "capacities": None, "seeds": None, "methods": METHODS}
    begun = time.monotonic()
    local = finish(reproduce(**asked, runs="local/runs", figures="local/figures"))
    assert local.returncode == 0, local.stderr
    on_this_machine, begun = time.monotonic() - begun, time.monotonic()

    monkeypatch.setenv("PDMEM_CACHE", str(workplace / "cache of the cluster"))
    command = [word for word in reproduce(**asked, runs="slurm/runs", figures="slurm/figures") if "--cores" not in word]
    process = begin([*command, f"--profile={profile}"])
    requeued = at_work(node)
    node.requeue(requeued)
    killed = at_work(node, but=[requeued])
    node.kill(killed)
    at_work(node, but=[killed])
    lost = node.jobs("RUNNING", of="run")
    node.fail()
    assert process.wait(1800) == 0, (workplace / "said.err").read_text()
    on_slurm = time.monotonic() - begun

    said = (workplace / "said.txt").read_text()
    print(f"\n{said}\n{len(records('slurm/runs'))} runs: here {on_this_machine:.0f} s, on Slurm {on_slurm:.0f} s")
    print((workplace / "said.err").read_text(), file=sys.stderr)
    assert node.restarts(requeued) >= 1
    assert any(node.restarts(job) > (job == requeued) for job in lost)  # one may have ended a moment before
    assert said.count("its job failed and is tried once more") == 1
    assert set(records("slurm/runs")) == set(records("local/runs")) and records("slurm/runs")
    ours, theirs = tables("local"), tables("slurm")
    assert ours.keys() == theirs.keys() and len(ours) > 10
    for name, table in ours.items():
        pandas.testing.assert_frame_equal(theirs[name], table, check_exact=True, obj=name)


def test_after_a_kill_jobs_that_nobody_waits_for_are_cancelled(node, profile, workplace, begin, monkeypatch):  # noqa: F811
    monkeypatch.setenv("STUB_SECONDS", "20")
    command = [word for word in reproduce(methods="slot,gated") if "--cores" not in word] + [f"--profile={profile}"]
    process = begin(command)
    wait_for(lambda: node.jobs("RUNNING", of="run"), "a run at work", 120)
    before = set(node.jobs(of="run"))
    process.kill()  # Snakemake and the jobs go on
    process.wait()
    monkeypatch.setenv("STUB_SECONDS", "0")
    resumed = finish(command)
    assert resumed.returncode == 0, resumed.stderr
    assert not before & set(node.jobs("RUNNING", "PENDING", "COMPLETING"))
    assert set(records()) == {"slot-1x-seed42", "gated-1x-seed42"}
    assert resumed.stdout.count(" finished after") >= 2
