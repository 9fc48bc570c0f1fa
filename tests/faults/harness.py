"""What breaks a program from outside, done to child processes many times over.

Every try runs in a forked child with everything imported: it can be killed at any moment, crash or hang, and the next
try starts within milliseconds. Forking needs a process of one thread (OMP_NUM_THREADS=1, no tokenizer threads).
"""

import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

TIMEOUT = 60.0  # seconds after which a child counts as hanging


class Child:
    """A forked child that runs ``work`` and reports the text it returns, or its error, through ``file``."""

    def __init__(self, work: Callable[[], str], file: Path):
        self.file = file
        file.unlink(missing_ok=True)
        self.pid = os.fork()
        if self.pid == 0:
            self._run(work)

    def _run(self, work: Callable[[], str]) -> None:
        try:
            with open(self.file.with_suffix(".log"), "w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            try:
                said = f"done {work()}"
            except Exception as error:
                kinds = [kind.__name__ for kind in type(error).__mro__]
                said = f"raised {' '.join(kinds)}: {error}"
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
            self.file.write_text(said, errors="replace")
        finally:
            os._exit(0)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float = TIMEOUT) -> str:
        """"done ...", "raised <class and bases>: <sentence>", "killed", "crashed by <signal>" or "hung"."""
        end = time.monotonic() + timeout
        while (ended := os.waitpid(self.pid, os.WNOHANG))[0] == 0:
            if time.monotonic() > end:
                self.kill()
                os.waitpid(self.pid, 0)
                return "hung"
            time.sleep(0.001)
        if os.WIFSIGNALED(ended[1]):
            number = os.WTERMSIG(ended[1])
            return "killed" if number == signal.SIGKILL else f"crashed by signal {number}"
        return self.file.read_text() if self.file.exists() else "killed"


def result(work: Callable[[], str], folder: Path) -> str:
    """What ``work`` returns or raises in a child of its own."""
    return Child(work, folder / "said").wait()


def kill_within(work: Callable[[], str], seconds: float, folder: Path, rng: random.Random) -> bool:
    """Run ``work`` in a child and kill it at a random moment of so many seconds; whether it was still at work."""
    child = Child(work, folder / "killed")
    time.sleep(rng.uniform(0, seconds))
    child.kill()
    return child.wait() == "killed"


def refused(said: str) -> bool:
    """Whether a child ended in a clear error: one of the library's classes, a sentence, no crash, no hang."""
    kinds, _, sentence = said.removeprefix("raised ").partition(": ")
    return said.startswith("raised ") and bool({"ValueError", "FileNotFoundError", "RuntimeError"} & set(kinds.split())) \
        and len(sentence.split()) >= 5


# ---- damage ----------------------------------------------------------------------------------------------------------


def damaged(content: bytes, rng: random.Random) -> bytes:
    """``content`` with one thing wrong: cut short, a bit flipped, a run of bytes overwritten, doubled or lost."""
    if not content:
        return b"\0"
    at, size = rng.randrange(len(content)), rng.randrange(1, 64)
    kind = rng.choice(["cut", "flip", "flip", "flip head", "flip head", "noise", "lost", "doubled", "zeros"])
    if kind == "cut":
        return content[:at]
    if kind.startswith("flip"):  # half of the flips in the first bytes, where the structure is
        at = rng.randrange(min(len(content), 512)) if kind == "flip head" else at
        return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
    end = content[at + size :]
    middle = {"noise": rng.randbytes(size), "lost": b"", "doubled": content[at : at + size] * 2, "zeros": bytes(size)}[kind]
    return content[:at] + middle + end


def replace(file: Path, content: bytes) -> None:
    """As a new file: the old one may be mapped by this process, and a mapped file that shrinks ends it."""
    file.unlink()
    file.write_bytes(content)


# ---- places that refuse ----------------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """``folder`` as a disk of ``size`` bytes; False where this user may mount none."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "--lazy", folder], check=True)


@contextmanager
def read_only(folder: Path) -> Iterator[bool]:
    """``folder`` such that nothing can be made in it; False where that cannot be had."""
    folder.mkdir(parents=True, exist_ok=True)
    if os.getuid():  # the superuser writes whatever the mode says
        folder.chmod(0o555)
        try:
            yield True
        finally:
            folder.chmod(0o755)
        return
    with small_disk(folder, 1 << 20) as mounted:
        yield mounted and not subprocess.run(["mount", "-o", "remount,ro", folder], capture_output=True).returncode
