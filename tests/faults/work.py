"""The work that faults happen to: small, whole paths of the library, each giving a digest of its result.

All files go under `place`, the cache included.
"""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import harness
import torch

import pdmem_lib as pdmem
from pdmem_lib import locomo
from pdmem_lib.evaluation import EvaluateSettings, frozen_answers, sample_questions
from pdmem_lib.experiment import load_record
from pdmem_lib.files import require_sealed, seal
from pdmem_lib.lora import LoRAModel
from pdmem_lib.references import ask_references, prompt_references
from pdmem_lib.states import encode_all
from pdmem_lib.synthetic import synthetic_locomo

QUIET = dict(progress=False, autocast=False)
TRAINING = dict(epochs=2, batch_size=8, lr=1e-2, warmup_steps=2, max_questions=24, **QUIET)
ASKING = EvaluateSettings(max_new_tokens=2, questions_per_bucket=2, **QUIET)
known: dict[str, tuple[str, float]] = {}
ready = {}


def prepare(folder: Path) -> None:
    """Load what all children share: they are forks of this process."""
    os.environ["PDMEM_CACHE"] = str(folder)
    ready["backbone"] = pdmem.load_backbone("tiny-gpt2", device="cpu")
    ready["conversations"] = pdmem.synthetic_conversations(2, 2, seed=1, turns_per_session=8)
    fresh(folder / "warm")
    evaluate(), train("slot.lora")  # imports whatever is imported late


def fresh(folder: Path) -> Path:
    """``folder`` empty, and from now on the place of all work."""
    if folder.is_dir() and not folder.is_mount():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["PDMEM_CACHE"] = str(folder)
    return folder


def place() -> Path:
    return Path(os.environ["PDMEM_CACHE"])


def undisturbed(job: Callable[[], str], folder: Path) -> tuple[str, float]:
    """What ``job`` says in peace, and its seconds; asked once."""
    name = repr(getattr(job, "args", job))  # of a partial its arguments
    if name not in known:
        fresh(folder / "peace")
        start = time.monotonic()
        said = harness.result(job, folder)
        known[name] = said, time.monotonic() - start
        assert said.startswith("done"), said
    return known[name]


def digest(*parts) -> str:
    result = hashlib.sha256()
    for part in parts:
        result.update(part.detach().numpy().tobytes() if isinstance(part, torch.Tensor) else repr(part).encode())
    return result.hexdigest()


# ---- jobs ------------------------------------------------------------------------------------------------------------


def encode() -> str:
    states = encode_all(ready["backbone"], ready["conversations"], progress=False, autocast=False)
    return digest(*(H for turns in states.values() for H in turns))


def build(name: str, seed: int = 42) -> pdmem.MemoryModel:
    return pdmem.Experiment(method=name, num_entries=16, d_h=16, seed=seed).build(ready["backbone"])


def train(name: str = "slot", **settings) -> str:
    model = build(name)
    history = pdmem.train(model, ready["conversations"], checkpoint=place() / "checkpoint.safetensors", checkpoint_every=0,
                          **TRAINING, **settings)
    return digest(*model.parameters(), history.drop(columns="seconds").values.tolist())


def half_trained(name: str) -> str:
    def stop(step):
        if step == 2:
            raise KeyboardInterrupt
    try:
        train(name, on_step=stop)
    except KeyboardInterrupt:
        return "half"
    raise AssertionError("it went on")


def evaluate() -> str:
    table = pdmem.evaluate(build("slot"), ready["conversations"], place() / "evaluated.json", **asdict(ASKING)).per_question
    return digest(table.drop(columns="seconds").to_json(double_precision=15))


def frozen() -> str:
    asked = [q for *_, q in sample_questions(ready["conversations"], 2)]
    return digest(frozen_answers(ready["backbone"], asked, ASKING))


def references() -> str:
    asked = sample_questions(ready["conversations"], 1)
    table = ask_references(ready["backbone"], ready["conversations"], asked, prompt_references((16,), 16), ASKING)
    return digest(table.drop(columns="seconds").to_json(double_precision=15))


def save() -> str:
    save_both_once(place())
    return saved(place(), "state")


JOBS = [encode, train, evaluate, save]


# ---- what is saved ---------------------------------------------------------------------------------------------------


def _versions() -> list[pdmem.MemoryModel]:
    models = [build("slot"), build("slot")]
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.add_(1.0)
    models[1].state = {"P": models[1].state["P"] + 1}
    return models


def _save(model: pdmem.MemoryModel, folder: Path) -> None:
    model.save_pretrained(folder / "adapter")
    model.save_state(folder / "state.safetensors")


def save_both_once(folder: Path) -> str:
    _save(_versions()[0], folder)
    return "saved"


def save_forever(folder: Path) -> str:
    models = _versions()
    while True:
        for model in models:
            _save(model, folder)


def saved(folder: Path, which: str) -> str:
    if which == "adapter":
        return digest(*pdmem.MemoryModel.from_pretrained(folder / "adapter", ready["backbone"]).parameters())
    return digest(build("slot").load_state(folder / "state.safetensors")["P"])


def known_saves(folder: Path) -> dict[str, set[str]]:
    """What `saved` may say in a child: one version or the other."""
    found: dict[str, set[str]] = {"adapter": set(), "state": set()}
    for model in _versions():
        _save(model, folder)
        for which in found:
            found[which].add(f"done {saved(folder, which)}")
    return found


def save_adapter(name: str) -> str:
    build(name).save_pretrained(place() / "adapter")
    return "saved"


def load_adapter(name: str) -> str:
    kind = LoRAModel if name.endswith(".lora") else pdmem.MemoryModel
    model = kind.from_pretrained(place() / "adapter", ready["backbone"])
    return digest(*model.parameters(), *model.adapter.state_dict().values(), model.logits("What?", "own"))


def make_run() -> str:
    run = pdmem.Experiment(method="slot", num_entries=16, preset="smoke", output_dir=str(place() / "run"))
    model, data = run.build(ready["backbone"]), pdmem.load_data("synthetic", "smoke")
    history = pdmem.train(model, ready["conversations"], **TRAINING)
    pdmem.save_run(run, model, data, history, pdmem.evaluate(model, ready["conversations"], **asdict(ASKING)), time.time())
    return "saved"


def open_run() -> str:
    return digest(sorted(load_record(place() / "run").items()))


def make_sealed() -> str:
    (place() / "sealed").mkdir()
    for name in ("config.json", "model.safetensors"):
        (place() / "sealed" / name).write_bytes(name.encode() * 50)
    seal(place() / "sealed")
    return "sealed"


def open_sealed() -> str:
    require_sealed(place() / "sealed")
    return "whole"


# ---- LoCoMo ----------------------------------------------------------------------------------------------------------


def write_locomo() -> str:
    (place() / "locomo10.json").write_text(json.dumps(synthetic_locomo(2, 1, seed=0, turns_per_session=8)))
    return "written"


def read_official() -> str:
    whole = json.dumps(synthetic_locomo(2, 1, seed=0, turns_per_session=8)).encode()
    os.environ.pop("PDMEM_LOCOMO", None)  # the stand-in is read, and not the user's copy
    locomo.LOCOMO_BYTES, locomo.LOCOMO_SHA256 = len(whole), hashlib.sha256(whole).hexdigest()
    return locomo.data_sha256(pdmem.load_locomo())


def read_own() -> str:
    conversations = pdmem.load_locomo(place() / "locomo10.json")
    assert all(0 <= q.lag <= len(c.turns) for c in conversations for q in c.questions)
    return "conversations"


# ---- the hub ---------------------------------------------------------------------------------------------------------

ASK = """
import time, pdmem_lib as pdmem
from pdmem_lib.backbone import resolve_backbone
start = time.monotonic()
print(resolve_backbone("auto"))
try:
    pdmem.load_backbone("some/model")
except RuntimeError as error:
    print("refused:", error)
print("seconds", time.monotonic() - start)
"""


def ask_a_bad_hub(manner: str) -> Iterator[tuple[str, bool]]:
    """A hub that accepts and says nothing, drips an endless answer, or hangs up."""
    def serve(listening: socket.socket) -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    def answer(connection: socket.socket) -> None:
        try:
            while manner == "drips":
                connection.sendall(b"H")
                time.sleep(0.2)
            if manner == "silent":
                time.sleep(60)
        except OSError:
            pass
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, args=(listening,), daemon=True).start()
        environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{listening.getsockname()[1]}",
                                    "HF_HOME": str(fresh(place().parent / "hub"))}
        try:
            done = subprocess.run([sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, timeout=180)
        except subprocess.TimeoutExpired:
            yield f"{manner}: hung", False
            return
    seconds = float(done.stdout.split()[-1]) if done.returncode == 0 else float("inf")
    yield f"{manner}: {done.stdout[-300:]} {done.stderr[-300:]}", "refused:" in done.stdout and seconds < 15
