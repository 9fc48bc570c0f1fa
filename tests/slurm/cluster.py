"""A Slurm of one node on this machine, from Debian's packages (slurm-wlm, munge), without systemd and without accounting.

    python tests/slurm/cluster.py FOLDER      # starts it, prints what its commands need, and stops it at Ctrl-C

Everything it writes lies in one folder, its servers listen on 127.0.0.1 alone, and no file of the system is touched. The
daemons must be root's: they start jobs as whoever submitted them.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

CONFIG = """
ClusterName=pdmem
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
KillWait=3
MinJobAge=3600
SchedulerParameters=sched_interval=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory}
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing():
    """Why no Slurm can be started here, or None."""
    lacking = [name for name in ("slurmctld", "slurmd", "munged", "mungekey", "sbatch") if not shutil.which(name)]
    if lacking:
        return f"no {lacking[0]}: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "Slurm's daemons must be started by root"


@contextmanager
def slurm(folder, cpus=None):
    """Runs a cluster in ``folder`` (Path) and gives its `Node`; ends all its processes, jobs included, afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)  # munged refuses a folder that others may write to
    node = Node(folder, cpus or os.cpu_count())
    try:
        node.start()
        yield node
    finally:
        node.stop()


class Node:
    """The node and its controller. ``env``: what Slurm's commands need in their environment."""

    def __init__(self, folder, cpus):
        self.folder, self.host, self.daemons = folder, socket.gethostname().split(".")[0], {}
        self.env = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{folder}/bin:{os.environ['PATH']}"}
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
        for name in ("state", "spool", "bin"):
            (folder / name).mkdir(exist_ok=True)
        srun = folder / "bin" / "srun"  # Snakemake takes SLURM_CONF from a job's environment, and srun would look in /etc
        srun.write_text(f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {shutil.which("srun")} "$@"\n')
        srun.chmod(0o755)
        (folder / "slurm.conf").write_text(
            CONFIG.format(host=self.host, folder=folder, ports=free_ports(2), cpus=cpus, memory=memory))

    def start(self):
        """munged, slurmctld and slurmd, and wait until the node takes jobs."""
        key, socket_ = self.folder / "munge.key", self.folder / "munge.socket"
        subprocess.run(["mungekey", "--create", "--force", f"--keyfile={key}"], check=True)
        self.daemon("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={socket_}",
                    f"--pid-file={self.folder}/munged.pid", f"--seed-file={self.folder}/munged.seed",
                    f"--log-file={self.folder}/munged.log")
        wait_for(socket_.exists, "munged")
        self.daemon("slurmctld", "-D", "-f", self.env["SLURM_CONF"])
        self.start_node()

    def start_node(self):
        self.daemon("slurmd", "-D", "-f", self.env["SLURM_CONF"], "-N", self.host)
        wait_for(lambda: self.state() in ("IDLE", "MIXED", "ALLOCATED"), "the node")

    def stop(self):
        for job in self.jobs() if "slurmctld" in self.daemons else []:
            subprocess.run(["scancel", "--signal=KILL", "--full", job], env=os.environ | self.env, timeout=60, check=False)
        time.sleep(1)
        for name in reversed(list(self.daemons)):
            end(self.daemons.pop(name))
        for process in psutil.process_iter():  # what a lost node left: nobody else ends it
            with suppress(psutil.Error):
                if process.pid != os.getpid() and process.environ().get("SLURM_CONF") == self.env["SLURM_CONF"]:
                    process.kill()

    def daemon(self, name, *arguments):
        with open(self.folder / f"{name}.out", "ab") as out:
            self.daemons[name] = subprocess.Popen([name, *arguments], stdout=out, stderr=out, stdin=subprocess.DEVNULL,
                                                  env=os.environ | self.env, start_new_session=True)

    def ask(self, *command):
        """What one of Slurm's commands prints."""
        return subprocess.run(command, env=os.environ | self.env, capture_output=True, text=True, timeout=60, check=True).stdout

    def state(self):
        """The node's state without its marks: IDLE, MIXED, DOWN ..."""
        try:
            return self.ask("sinfo", "--noheader", "--format=%T").strip().upper().rstrip("*~#!%$@^-")
        except subprocess.SubprocessError:
            return ""

    def jobs(self, *states, of=""):
        """Numbers of the jobs in the queue, in one of ``states`` (RUNNING ...) where any is given, of a rule's name."""
        try:
            rows = [line.split(" ", 2) for line in self.ask("squeue", "--noheader", "--sort=i", "--format=%i %T %k").splitlines()]
        except subprocess.SubprocessError:
            return []
        return [job for job, state, comment in rows if (not states or state in states) and (not of or f"rule_{of}" in comment)]

    def restarts(self, job):
        """How often Slurm has started this job again."""
        return int(re.search(r"Restarts=(\d+)", self.ask("scontrol", "show", "job", job))[1])

    # ---- what happens to clusters ------------------------------------------------------------------------------------

    def requeue(self, job):
        """What an administrator or a preemption does to a running job: it is ended and goes back into the queue."""
        self.ask("scontrol", "requeue", job)

    def kill(self, job):
        """What the kernel does to a job without memory: its processes die of SIGKILL, and the job has failed."""
        self.ask("scancel", "--signal=KILL", "--full", job)

    def fail(self):
        """The node is lost with everything that runs on it, and comes back."""
        self.ask("scontrol", "update", f"nodename={self.host}", "state=DOWN", "reason=lost")
        end(self.daemons.pop("slurmd"))
        wait_for(lambda: not self.jobs("RUNNING", "COMPLETING"), "its jobs to be gone", 60)
        self.start_node()  # ReturnToService=2: it is up again as soon as it says so


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def wait_for(condition, what, seconds=30):
    end_ = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end_:
            raise TimeoutError(f"waited {seconds} s in vain for {what}")
        time.sleep(0.2)


def end(process):
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


if __name__ == "__main__":
    if missing():
        sys.exit(missing())
    with slurm(Path(sys.argv[1]).resolve()) as running:
        print(*(f"export {name}={value}" for name, value in running.env.items()), sep="\n", flush=True)
        try:
            signal.pause()
        except KeyboardInterrupt:
            pass
