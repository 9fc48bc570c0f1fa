"""Where runs are made: the profiles of notebooks/profiles, and what is told of jobs elsewhere. `tests/slurm` has the real thing."""

import os
import re
import sys
from pathlib import Path

import pytest
import yaml

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "notebooks")]
from reproduce import Told  # noqa: E402
from test_pipeline import NOTEBOOKS, finish, records, reproduce, workplace  # noqa: E402, F401

PROFILES = sorted(path.parent for path in (NOTEBOOKS / "profiles").glob("*/config.yaml"))
KUBECTL = """#!{python}
# Stands in for a cluster: a Job is a process of this machine, whose exit code is its state.
import os, subprocess, sys, uuid, yaml
folder, (verb, *words) = os.environ["STUB_CLUSTER"], sys.argv[1:]
if verb == "create":
    job = yaml.safe_load(sys.stdin)
    [pod] = job["spec"]["template"]["spec"]["containers"]
    assert words == ["-f", "-", "-o", "name"] and job["kind"] == "Job" and pod["command"][0] == "bash"
    name = job["metadata"]["generateName"] + uuid.uuid4().hex[:5]
    open(f"{{folder}}/{{name}}.yaml", "w").write(yaml.safe_dump(job))
    run = '"$@"; echo $? > "$0.partial"; mv "$0.partial" "$0.code"'
    environment = {{v["name"]: v["value"] for v in pod["env"]}}
    subprocess.Popen(["bash", "-c", run, f"{{folder}}/{{name}}", *pod["command"]], cwd=pod["workingDir"], start_new_session=True,
                     env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=open(f"{{folder}}/{{name}}.log", "w"))
    print(f"job.batch/{{name}}")
elif verb == "get":
    name = words[0].partition("/")[2]
    code = f"{{folder}}/{{name}}.code"
    ended = open(code).read().strip() if os.path.exists(code) else None
    print(f"{{name}}/{{'1' if ended == '0' else ''}}/{{'1' if ended not in ('0', None) else ''}}", end="")
"""


def test_there_is_a_profile_for_slurm_and_one_for_kubernetes():
    assert [path.name for path in PROFILES] == ["kubernetes", "slurm"]


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.name)
def test_a_profile_speaks_of_rules_that_exist_and_tries_again(profile):
    rules = set(re.findall(r"^rule (\w+):", (NOTEBOOKS / "Snakefile").read_text(), flags=re.MULTILINE))
    settings = yaml.safe_load((profile / "config.yaml").read_text())
    assert {*settings.get("set-threads", {}), *settings.get("set-resources", {})} <= rules
    assert settings["retries"] >= 1 and settings["jobs"] > 1 and "cores" not in settings
    assert settings["executor"] in ("slurm", "cluster-generic")


def test_an_unknown_profile_is_refused_with_the_known_ones(workplace):  # noqa: F811
    refused = finish([*reproduce(), "--profile=moon"])
    assert refused.returncode == 1 and "no profile 'moon': name one of kubernetes, slurm" in refused.stderr


def test_what_snakemake_tells_of_jobs_elsewhere_is_read():
    said = """
[Wed Nov 25 21:42:12 2026]
rule run:
    input: data/runs/g/encoded.json
    output: data/runs/g/slot.lora-1x-seed42/record.json
    jobid: 4
    wildcards: method=slot.lora, capacity=1, seed=42
    resources: tmpdir=<TBD>, mem_mb=4000
Job 4 has been submitted with SLURM jobid 7 (log: rule_run/7.log).
Error in rule run:
    message: SLURM-job '7' failed, SLURM status is: 'FAILED'. Detailed failure reason unavailable (status command is not 'sacct').
    jobid: 4
    log: data/runs/g/run.log, rule_run/7.log (check log file(s) for error details)
    shell:
        echo started
Trying to restart job 4.
rule report:
    jobid: 0
Finished jobid: 4 (Rule: run)
planned 2 of 3
"""
    told = Told()
    words = [found for line in said.splitlines() if (found := told.read(line)) and found[0] not in ("", "Job", "[Wed")]
    assert words == [
        ("started", "slot.lora-1x-seed42"),
        ("because", "slot.lora-1x-seed42: SLURM-job '7' failed, SLURM status is: 'FAILED'. See rule_run/7.log"),
        ("again", "slot.lora-1x-seed42"), ("started", "report"), ("finished", "slot.lora-1x-seed42"), ("planned", "2 of 3"),
    ]  # fmt: skip


@pytest.mark.slow
def test_on_kubernetes_every_job_is_one_of_the_cluster_and_a_lost_one_is_made_anew(workplace, monkeypatch):  # noqa: F811
    pytest.importorskip("snakemake_executor_plugin_cluster_generic", reason="the cluster extra is not installed")
    cluster = workplace / "cluster"
    cluster.mkdir()
    kubectl = workplace / "bin" / "kubectl"
    kubectl.parent.mkdir()
    kubectl.write_text(KUBECTL.format(python=sys.executable))
    kubectl.chmod(0o755)
    (workplace / "notebooks").symlink_to(NOTEBOOKS)  # the profile's commands are called from the repository's root
    monkeypatch.setenv("PATH", f"{kubectl.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("STUB_CLUSTER", str(cluster))
    command = [*(word for word in reproduce(methods="slot,gated", threads="2") if "--cores" not in word), "--profile=kubernetes"]
    monkeypatch.setenv("STUB_FAILS", "gated")
    failed = finish(command)
    assert failed.returncode == 1 and failed.stdout.count("its job failed and is tried once more") == 2  # retries: 2
    assert "failed: gated-1x-seed42: ValueError: gated was told to fail" in failed.stderr
    monkeypatch.delenv("STUB_FAILS")
    mended = finish(command)
    assert mended.returncode == 0, mended.stderr
    assert set(records()) == {"slot-1x-seed42", "gated-1x-seed42"}
    jobs = [yaml.safe_load(path.read_text())["spec"]["template"]["spec"]["containers"][0] for path in cluster.glob("*.yaml")]
    assert len(jobs) >= 1 + 1 + 3 + 1 + 1  # encode, slot, gated three times and once more, report
    asked = {(job["resources"]["requests"]["cpu"], job["resources"]["requests"]["memory"]) for job in jobs}
    assert ("2", "8000Mi") in asked and ("8", "4000Mi") in asked  # runs with two threads, and encode
    assert {job["workingDir"] for job in jobs} == {str(workplace)}
