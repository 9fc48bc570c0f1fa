"""What `make reproduce` runs: says what it will do, drives the Snakefile, shows progress, prints table and failures.

    python notebooks/reproduce.py --preset quick              # from the repository's root, inside the environment
    python notebooks/reproduce.py --profile slurm             # the same runs, on a cluster (notebooks/profiles)

Snakemake decides what runs. This file adds what it leaves open: one pipeline at a time in a folder, leftovers of a
killed one ended before the next begins (they would go on writing), a report from the runs that exist when some failed,
and each failure named at the end. Exit code 0 only when every run that was asked for is there.
"""
import argparse
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pandas
import psutil
import yaml

SNAKEFILE = Path(__file__).with_name("Snakefile")
PROFILES = Path(__file__).with_name("profiles")
MARK = "PDMEM_PIPELINE"  # in the environment of all that is started here: tells leftovers from other people's work
TAKE_MINUTES = ("smoke", "quick")  # presets whose time is not foretold: that would cost as much as it tells
NOISE = re.compile(
    r"Assuming|Building DAG|Using shell|Provided|Rules claiming|Select jobs|Execute \d|Exiting because|Complete log|"
    r"Elapsed time|WorkflowError:$|At least one job|Nothing to be done|Unlocking|Removing (output|incomplete)|"
    r"Using workflow specific profile|SLURM run ID|Job \d+ has been submitted|Submitted job|\d+ of \d+ steps|"
    r"Cleaning up SLURM log|Job stats|job +count|-+ +-+$|(encode|run|report|total) +\d+$|\S+record\.json(,|$)|\[\w{3} \w{3} .*\]$|\s*$"
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in "preset backbone data methods capacities seeds runs figures threads gpu share template report keep".split():
        parser.add_argument(f"--{name}", default="", help="the setting of that name in the Snakefile")
    parser.add_argument("--cores", type=int, default=0, help="runs side by side; by default what this machine allows")
    parser.add_argument("--profile", default="", help="where runs are made: slurm, kubernetes, or a folder with a config.yaml")
    asked = parser.parse_args()
    runs = Path(asked.runs or "data/runs")
    if runs.exists() and not runs.is_dir():
        sys.exit(f"{runs} is a file: --runs names a folder.")
    runs.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with open(runs / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go by the system however this process ends
        except BlockingIOError:
            sys.exit(f"Another pipeline is at work in {runs}: wait for it, or stop it.")
        mark = mark_of(runs)
        try:
            end_leftovers(mark)
            return pipeline(asked, mark)
        except (KeyboardInterrupt, BrokenPipeError) as stopped:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # pressed twice it would leave what this ends
            end_leftovers(mark)
            with suppress(BrokenPipeError):
                print("Stopped. The same command goes on where this one stopped.", file=sys.stderr)
            if isinstance(stopped, KeyboardInterrupt):
                return 130
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads it: no more complaints at exit
            return 141


def pipeline(asked, mark):
    settings = {key: value for key, value in vars(asked).items() if value and key not in ("cores", "profile")}
    found = resolve(asked)
    settings |= {"backbone": found["backbone"], "data": found["data"]}
    print(" · ".join(found["why"]), flush=True)

    command = [sys.executable, "-m", "snakemake", "-s", str(SNAKEFILE), *(elsewhere(asked) if asked.profile else here(asked, found))]
    chosen = Path(asked.runs or "data/runs") / ".asked.json"  # not as --config, which reads a name as YAML
    chosen.write_text(json.dumps(settings))
    config = ["--configfile", str(chosen)]
    if any(Path(".snakemake/locks").glob("*")):
        refuse_if_another_snakemake()
        subprocess.run([*command, "--unlock", *config], capture_output=True, check=False)
    if found["preset"] not in TAKE_MINUTES and not asked.profile:  # it measures this machine
        what = {key: found[key] for key in ("backbone", "data", "preset")}
        foretell(command, config, what | {"cores": command[-1], "threads": asked.threads}, mark)
    command += ["--keep-going", "--rerun-incomplete", "--quiet", "reason", "host"]
    command += [] if asked.profile else ["rules", "progress"]  # jobs elsewhere are heard of through Snakemake alone
    code, figures, failures = follow([*command, *config], mark, Told() if asked.profile else None)
    if code and figures and any(Path(figures["runs"]).glob("*/record.json")):
        *_, more = follow([*command, *config, "--config", "existing=true"], mark, Told() if asked.profile else None)
        failures += [line for line in more if line not in failures]
    if figures:
        show_table(figures)
    for line in failures:
        print(line, file=sys.stderr)
    if code and failures:
        print("The same command tries these again and nothing else.", file=sys.stderr)
    return code


def here(asked, found):
    """Snakemake's options for this machine: as many runs side by side as its processors and memory allow."""
    memory = int(psutil.virtual_memory().total / (found["run_gb"] * 1e9))
    return ["--cores", str(asked.cores or max(1, min(os.cpu_count(), memory)))]


def elsewhere(asked):
    """Snakemake's options for where a profile says that runs are made."""
    folder = next((path for path in (PROFILES / asked.profile, Path(asked.profile)) if (path / "config.yaml").is_file()), None)
    if folder is None:
        known = ", ".join(sorted(path.parent.name for path in PROFILES.glob("*/config.yaml")))
        sys.exit(f"There is no profile {asked.profile!r}: name one of {known}, or a folder that holds a config.yaml.")
    options = ["--workflow-profile", str(folder.resolve())]
    if asked.cores:
        options += ["--jobs", str(asked.cores)]
    if yaml.safe_load((folder / "config.yaml").read_text()).get("executor") == "slurm":
        options += ["--slurm-jobname-prefix", mark_of_jobs(mark_of(Path(asked.runs or "data/runs")))]
    return options


def foretell(command, config, settings, mark):
    """Print how long the runs that Snakemake would make now will take; measures for minutes. An error stops nothing."""
    dry = subprocess.run([*command, "--dry-run", *config], capture_output=True, text=True, check=False)
    said = dry.stdout + dry.stderr
    jobs = re.findall(r"wildcards: method=([\w.]+), capacity=(\d+), seed=(\d+)", said)
    runs = ",".join(f"{method}-{capacity}x-seed{seed}" for method, capacity, seed in jobs)
    if runs:
        settings = settings | {"folder": json.loads(re.search(r"^results (.*)$", said, flags=re.MULTILINE)[1])["runs"]}
        given = [f"--{key}={value}" for key, value in settings.items() if value]
        subprocess.run([sys.executable, "-m", "pdmem_lib", "foretell", f"--runs={runs}", *given], check=False,
                       stdin=subprocess.DEVNULL, env=os.environ | {MARK: mark})


def resolve(asked):
    """What "auto" stands for on this machine, once, so that one pipeline never changes its mind half-way."""
    given = [f"--{key}={vars(asked)[key]}" for key in ("backbone", "data", "preset") if vars(asked)[key]]
    command = [sys.executable, "-m", "pdmem_lib", "resolve", *given]
    answer = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False)
    if answer.returncode:
        sys.exit(answer.returncode)  # its error is on the screen
    return json.loads(answer.stdout.strip().splitlines()[-1]) | {"preset": asked.preset or "quick"}


class Told:
    """What Snakemake says of jobs elsewhere, read as the words that jobs on this machine say themselves."""

    def __init__(self):
        self.names, self.rule, self.failed, self.job, self.why = {}, "", False, "", ""  # names: a job's number -> its run

    def read(self, line):
        """(word, rest) of a line, None where it only describes a job. Beside this machine's words there are "again", a
        job failed and is tried once more, and "because", why."""
        if found := re.match(r"(Error in )?(?:local)?rule (\w+):$", line):
            self.failed, self.rule = bool(found[1]), found[2]
        elif found := re.match(r"    jobid: (\d+)$", line):
            self.job = found[1]
            if self.rule != "run" and not self.failed:
                self.names[self.job] = self.rule
                return "started", self.rule
        elif (found := re.match(r"    wildcards: method=([\w.]+), capacity=(\d+), seed=(\d+)", line)) and not self.failed:
            self.names[self.job] = f"{found[1]}-{found[2]}x-seed{found[3]}"
            return "started", self.names[self.job]
        elif found := re.match(r"(?:Finished jobid:|(Trying to restart job)) (\d+)", line):
            return "again" if found[1] else "finished", self.names.get(found[2], "a job")
        elif self.failed and (found := re.match(r"    message: (.*?)(?: Detailed failure reason.*|\.?For further error.*)?$", line)):
            self.why = found[1].replace("None", "it failed")
        elif self.failed and (found := re.match(r"    log: (.*?)(?: \(check log file.*)?$", line)):
            return "because", f"{self.names.get(self.job, self.rule)}: {self.why} See {found[1].split(', ')[-1]}"
        elif not line.startswith(" "):
            word, _, rest = line.partition(" ")
            return word, rest


def follow(command, mark, told=None):
    """Run Snakemake and tell its story in one line an event; returns exit code, where results are, failed runs."""
    begin = time.monotonic()
    environment = os.environ | {MARK: mark, "PYTHONUNBUFFERED": "1"}
    if not sys.stderr.isatty():
        environment.setdefault("TQDM_MININTERVAL", "30")  # a log file wants few lines from the progress bars
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    total, done, started, first, results, failures, in_error = 0, 0, {}, begin, {}, [], False
    for line in io.TextIOWrapper(process.stdout, "utf-8", "replace", newline=""):  # ends in \n, a progress bar's in \r
        word, rest = (told.read(line.rstrip()) or ("described", "")) if told else line.strip().partition(" ")[::2]
        now = time.monotonic()
        clock = f"[{int(now - begin) // 60:02d}:{int(now - begin) % 60:02d}]"
        if word == "results":
            results = json.loads(rest)
        elif word == "planned":
            total, wanted = (int(number) for number in rest.split(" of "))
            if total:
                print(f"{clock} {total} of {wanted} runs to make", flush=True)
        elif word == "started":
            first = first if started else now
            started[rest] = now
        elif word in ("finished", "failed") and rest in started:
            name, seconds = rest, now - started[rest]
            if name in ("encode", "report"):
                print(f"{clock} {name} {word} after {seconds:.0f} s", flush=True)
                continue
            done += 1
            left = (now - first) / done * (total - done)
            ahead = f", about {left / 60:.0f} min left" if left > 60 else f", about {left:.0f} s left" if left else ""
            print(f"{clock} run {done} of {total}: {name} {word} after {seconds:.0f} s{ahead}", flush=True)
        elif word == "again":
            print(f"{clock} {rest}: its job failed and is tried once more", flush=True)
        elif word == "because":
            print(f"{clock} {rest}", file=sys.stderr, flush=True)
        elif word == "described":
            continue
        elif word == "failed:":
            failures.append(line.strip())
        elif line.startswith("RuleException"):
            in_error = True  # Snakemake repeats the whole command; the failed run is named at the end
        elif in_error:
            in_error = "non-zero exit status" not in line
        elif not NOISE.match(line):
            print(line, end="", file=sys.stderr, flush=True)
    return process.wait(), results, failures


def show_table(results):
    table, notebook = Path(results["figures"]) / "summary.csv", Path(results["runs"]) / "report.ipynb"
    if not table.exists():
        return
    if not Path(results["runs"], "reported.json").exists():
        print(f"\nNo report was made: what lies in {results['figures']}/ is an earlier one.", flush=True)
        return
    printed = []
    with suppress(OSError, ValueError, KeyError):  # half a notebook: the table says it too
        cells = json.loads(notebook.read_text())["cells"]
        outputs = [out for cell in cells if "table" in cell["metadata"].get("tags", []) for out in cell["outputs"]]
        printed = ["".join(output["text"]) for output in outputs if output["output_type"] == "stream"]
    print("\n" + ("".join(printed).rstrip() or pandas.read_csv(table).to_string(index=False, float_format="%.2f")))
    print(f"\nTable and figures: {results['figures']}/ · runs and their records: {results['runs']}/", flush=True)


def mark_of(runs):
    """What tells a pipeline's processes from those of another: the folder it was started in, and that of its runs."""
    return f"{os.getcwd()} {runs.resolve()}"


def end_leftovers(mark):
    """End what an earlier, killed pipeline of this mark left running (and what this one leaves when interrupted)."""
    leftovers = [process for process in processes() if environment_of(process).get(MARK) == mark]
    for process in leftovers:
        process.terminate()
    for process in psutil.wait_procs(leftovers, timeout=5)[1]:
        process.kill()
    psutil.wait_procs(leftovers, timeout=5)
    if shutil.which("squeue"):
        cancel_jobs(mark)


def cancel_jobs(mark):
    """The same for jobs in Slurm's queue, which its controller starts though nobody waits for them."""
    def queued():
        said = subprocess.run(["squeue", "--me", "--noheader", "--format=%i %j"], capture_output=True, text=True, timeout=60)
        return [line.split()[0] for line in said.stdout.splitlines() if line.split()[1].startswith(mark_of_jobs(mark))]

    with suppress(subprocess.TimeoutExpired):  # no controller answers: then Snakemake says so, if it needs one
        end = time.monotonic() + 60
        while (jobs := queued()) and time.monotonic() < end:
            subprocess.run(["scancel", *jobs], capture_output=True, timeout=60, check=False)
            time.sleep(1)


def mark_of_jobs(mark):
    """What the names of its jobs begin with."""
    return "pdmem-" + hashlib.sha256(mark.encode()).hexdigest()[:8]


def refuse_if_another_snakemake():
    for process in processes():
        with suppress(psutil.Error):  # it ended, or is somebody else's
            if not any(part.endswith("snakemake") for part in process.cmdline()) or process.cwd() != os.getcwd():
                continue
            sys.exit(f"Another Snakemake (process {process.pid}) is at work in this folder: wait for it or stop it.")


def processes():
    own = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    return [process for process in psutil.process_iter() if process.pid not in own]


def environment_of(process):
    try:
        return process.environ()
    except psutil.Error:
        return {}


if __name__ == "__main__":
    sys.exit(main())
