"""Training killed at any moment goes on to the weights that it would have had, bit for bit, and an evaluation to its
answers; and what is no checkpoint of it is never gone on from."""

import logging
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import pdmem_lib as pdmem
from pdmem_lib import checkpoints, prompts
from pdmem_lib.experiment import CONTROLS, load_record
from pdmem_lib.files import load_tensors, save_tensors

SETTINGS = dict(epochs=2, batch_size=4, lr=1e-2, warmup_steps=3, max_questions=30, autocast=False, progress=False)


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def tiny():
    """One family: what is trained differs by method, not by family."""
    return pdmem.load_backbone("tiny-gpt2")


@pytest.fixture(scope="module")
def conversations():
    return pdmem.synthetic_conversations(2, 2, seed=1, turns_per_session=8)


def build(tiny, name, seed=42):
    return pdmem.Experiment(method=name, num_entries=16, d_h=16, seed=seed).build(tiny)


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def same(ones, others):
    return len(ones) == len(others) and all(map(torch.equal, ones, others))


def train_until(step, model, conversations, file, **settings):
    """Train with a checkpoint after every step, and stop at the end of ``step``."""
    def stop(done):
        if done == step:
            raise Killed
    with pytest.raises(Killed):
        pdmem.train(model, conversations, on_step=stop, checkpoint=file, checkpoint_every=0, **SETTINGS | settings)


@pytest.mark.parametrize("name", [*pdmem.METHODS, *CONTROLS])
def test_a_stopped_training_goes_on_to_the_same_weights_and_history(tiny, conversations, tmp_path, name):
    whole, file = build(tiny, name), tmp_path / "checkpoint.safetensors"
    history = pdmem.train(whole, conversations, **SETTINGS)
    steps = len(history)
    for stop in (0, steps // 2 - 1, steps - 2):  # the last step of the first epoch is among them
        train_until(stop, build(tiny, name), conversations, file)
    resumed, done = build(tiny, name), []
    again = pdmem.train(resumed, conversations, on_step=done.append, checkpoint=file, **SETTINGS)
    assert done == [steps - 1]
    assert same(weights(resumed), weights(whole))
    assert again.drop(columns="seconds").equals(history.drop(columns="seconds"))
    assert again.dtypes.equals(history.dtypes) and again["seconds"].is_monotonic_increasing
    assert history.attrs["earlier"] == 0 and again.attrs["earlier"] == again["seconds"].iloc[-2]


def test_a_finished_training_is_taken_from_its_checkpoint(tiny, conversations, tmp_path):
    file = tmp_path / "checkpoint.safetensors"
    first, second = build(tiny, "slot"), build(tiny, "slot")
    history = pdmem.train(first, conversations, checkpoint=file, **SETTINGS)
    assert pdmem.train(second, conversations, checkpoint=file, on_step=pytest.fail, **SETTINGS).equals(history)
    assert same(weights(second), weights(first))


@pytest.mark.parametrize("change, named", [
    (dict(seed=1), "training seed: 42 there, 1 here"), (dict(lr=1e-3), "training lr"), (dict(epochs=3), "training epochs"),
    (dict(autocast=True), "bf16: False there, True here"),
])
def test_a_checkpoint_of_other_settings_is_refused_by_name(tiny, conversations, tmp_path, change, named):
    file = tmp_path / "checkpoint.safetensors"
    train_until(2, build(tiny, "slot"), conversations, file)
    kept, model = file.read_bytes(), build(tiny, "slot")
    before = weights(model)
    with pytest.raises(ValueError, match=f"is no checkpoint of this training .*{named}.*delete it to start anew"):
        pdmem.train(model, conversations, checkpoint=file, **SETTINGS | change)
    assert same(weights(model), before) and file.read_bytes() == kept


def test_a_checkpoint_of_another_model_data_or_start_is_refused_by_name(tiny, conversations, tmp_path):
    file = tmp_path / "checkpoint.safetensors"
    train_until(2, build(tiny, "slot"), conversations, file)
    trained = build(tiny, "slot")
    pdmem.train(trained, conversations, **SETTINGS | dict(epochs=1))
    for model, data, named in [
        (build(tiny, "gated"), conversations, "method: 'slot' there, 'gated' here"),
        (build(tiny, "slot", seed=1), conversations, "seed: 42 there, 1 here"),
        (build(tiny, "slot.lora"), conversations, "model: 'MemoryModel' there, 'LoRAModel' here"),
        (build(pdmem.load_backbone("tiny-gpt2", seed=1), "slot"), conversations, "backbone: "),
        (build(tiny, "slot"), conversations[:1], "data: "),
        (trained, conversations, "initial_weights: "),
    ]:
        with pytest.raises(ValueError, match=named):
            pdmem.train(model, data, checkpoint=file, **SETTINGS)


def test_a_checkpoint_of_another_prompt_is_refused_by_name(tiny, conversations, tmp_path, monkeypatch):
    file = tmp_path / "checkpoint.safetensors"
    train_until(2, build(tiny, "slot"), conversations, file)
    monkeypatch.setattr(prompts, "PROMPT", "Q: {question}\nA:")
    with pytest.raises(ValueError, match="is no checkpoint of this training .*prompt: "):
        pdmem.train(build(tiny, "slot"), conversations, checkpoint=file, **SETTINGS)


def test_a_file_that_is_no_checkpoint_is_refused_and_kept(tiny, conversations, tmp_path):
    file = tmp_path / "state.safetensors"
    save_tensors(file, {"P": torch.zeros(2)})
    with pytest.raises(ValueError, match="is no checkpoint of this training"):
        pdmem.train(build(tiny, "slot"), conversations, checkpoint=file, **SETTINGS)
    assert load_tensors(file)[0]["P"].tolist() == [0, 0]


@pytest.mark.parametrize("damage", [lambda whole: whole[: len(whole) // 2], lambda whole: b"",
                                    lambda whole: whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:]])
def test_after_a_damaged_checkpoint_training_starts_anew(tiny, conversations, tmp_path, caplog, damage):
    whole, file = build(tiny, "slot"), tmp_path / "checkpoint.safetensors"
    pdmem.train(whole, conversations, **SETTINGS)
    train_until(5, build(tiny, "slot"), conversations, file)
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(damage(content))
    model, done = build(tiny, "slot"), []
    with caplog.at_level(logging.WARNING):
        pdmem.train(model, conversations, on_step=done.append, checkpoint=file, **SETTINGS)
    assert "training starts anew" in caplog.text and file.name in caplog.text
    assert done[0] == 0 and same(weights(model), weights(whole))


def test_a_checkpoint_changes_nothing_and_is_written_no_more_often_than_asked(tiny, conversations, tmp_path, monkeypatch):
    from pdmem_lib import checkpoints

    now, saved = [0.0], []
    monkeypatch.setattr(checkpoints, "monotonic", lambda: now[0])
    monkeypatch.setattr(checkpoints, "save_tensors", lambda file, *rest: (saved.append(now[0]), save_tensors(file, *rest)))
    plain, kept = build(tiny, "slot"), build(tiny, "slot")
    pdmem.train(plain, conversations, **SETTINGS)

    def tick(step):
        now[0] += 1.0
    history = pdmem.train(kept, conversations, on_step=tick, checkpoint=tmp_path / "c.safetensors", checkpoint_every=4,
                          **SETTINGS)
    assert same(weights(kept), weights(plain))
    assert saved == [*range(4, len(history) - 1, 4), len(history) - 1]


def test_a_run_removes_its_checkpoint_when_it_is_saved(tiny, tmp_path):
    data = pdmem.load_data("synthetic", "smoke")
    run = pdmem.Experiment(method="slot", num_entries=16, preset="smoke", output_dir=str(tmp_path), max_questions=8)
    model = run.build(tiny)
    settings = vars(run.train_settings) | dict(progress=False)
    history = pdmem.train(model, data.train, checkpoint=run.checkpoint, **settings)
    assert run.checkpoint.exists()
    evaluation = pdmem.evaluate(model, data.test[:2], run.evaluated, questions_per_bucket=1, max_new_tokens=2, progress=False)
    assert run.evaluated.exists()
    history.attrs["earlier"] = 1e6  # of killed processes
    record = pdmem.save_run(run, model, data, history, evaluation, started=time.time())
    assert 1e6 <= record["seconds"] < 1e6 + 100
    assert (tmp_path / "record.json").exists() and not run.checkpoint.exists() and not run.evaluated.exists()


KILLED = """
import os, signal, sys
import pdmem_lib as pdmem
file, name, stop = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = pdmem.Experiment(method=name, num_entries=16, d_h=16).build(pdmem.load_backbone("tiny-gpt2"))
conversations = pdmem.synthetic_conversations(2, 2, seed=1, turns_per_session=8)
def kill(step):
    if step == stop: os.kill(os.getpid(), signal.SIGKILL)
pdmem.train(model, conversations, on_step=kill, checkpoint=file, checkpoint_every=0, **SETTINGS)
"""


def test_a_killed_process_is_gone_on_from_by_another(tiny, conversations, tmp_path):
    """`tests/faults` kills at random moments, every method, many times."""
    file, whole, resumed = tmp_path / "checkpoint.safetensors", build(tiny, "hebbian"), build(tiny, "hebbian")
    pdmem.train(whole, conversations, **SETTINGS)
    code = KILLED.replace("SETTINGS", repr(SETTINGS))
    killed = subprocess.run([sys.executable, "-c", code, file, "hebbian", "6"], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = []
    pdmem.train(resumed, conversations, on_step=done.append, checkpoint=file, **SETTINGS)
    assert done[0] == 7 and same(weights(resumed), weights(whole))


# ---- an evaluation ---------------------------------------------------------------------------------------------------

ASKING = dict(questions_per_bucket=2, max_new_tokens=3, progress=False)


def asked_until(stop, model, conversations, file, monkeypatch, **settings):
    """The evaluation, its calls of the model, and whether it was killed before call ``stop``."""
    calls = []

    def counted(name):
        plain = getattr(type(model), name)

        def call(self, memories, *rest, **more):
            if "off" not in memories:  # the frozen model's answers have a cache of their own
                if len(calls) == stop:
                    raise Killed
                calls.append(name)
            return plain(self, memories, *rest, **more)
        return call

    with monkeypatch.context() as patch:
        for name in ("answers_under", "scores_under"):
            patch.setattr(type(model), name, counted(name))
        try:
            return pdmem.evaluate(model, conversations, file, **ASKING | settings), calls, False
        except Killed:
            return None, calls, True


@pytest.mark.parametrize("name", ["slot", "hebbian", "slot.format", "slot.lora"])
def test_a_killed_evaluation_goes_on_to_the_same_tables(tiny, conversations, tmp_path, monkeypatch, name):
    model, file = build(tiny, name), tmp_path / "evaluated.json"
    pdmem.train(model, conversations, **SETTINGS)
    whole, calls, _ = asked_until(None, model, conversations, None, monkeypatch)
    assert len(calls) >= 2
    for stop in range(len(calls)):  # one call more each time
        _, made, killed = asked_until(min(stop, 1), model, conversations, file, monkeypatch)
        assert killed and len(made) == min(stop, 1)
    again, made, killed = asked_until(None, model, conversations, file, monkeypatch)
    assert not killed and len(made) == 1  # the last one
    for table, theirs in ((again.per_question.drop(columns="seconds"), whole.per_question.drop(columns="seconds")),
                          (again.checkpoints, whole.checkpoints), (again.turns, whole.turns)):
        assert table.equals(theirs)
    assert again.earlier > 0 and whole.earlier == 0
    assert (again.per_question["seconds"].notna() == whole.per_question["seconds"].notna()).all()
    assert asked_until(0, model, conversations, file, monkeypatch)[2] is False  # nothing is left to ask


def test_answers_of_another_evaluation_or_a_damaged_file_are_not_taken(tiny, conversations, tmp_path, monkeypatch, caplog):
    model, file = build(tiny, "slot"), tmp_path / "evaluated.json"
    whole, calls, _ = asked_until(None, model, conversations, file, monkeypatch)
    content = file.read_bytes()
    trained = build(tiny, "slot")
    pdmem.train(trained, conversations, **SETTINGS)
    changes = [(trained, {}, content), (model, dict(max_new_tokens=2), content), (model, {}, content[:-40]), (model, {}, b"[]")]
    for other, settings, left in changes:
        file.write_bytes(left)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            _, made, _ = asked_until(None, other, conversations, file, monkeypatch, **settings)
        assert made == calls and "made again" in caplog.text
    file.write_bytes(content)
    assert asked_until(0, model, conversations, file, monkeypatch)[0].per_question.equals(whole.per_question)


class Forgetful(pdmem.REGISTRY["slot"]):
    """Another write under the same name, start and weights."""

    def write(self, state, H):
        return {"P": 0.5 * super().write(state, H)["P"]}


class Louder(pdmem.REGISTRY["slot"]):
    """Another read of the same banks."""

    def read(self, state, inputs=None):
        return super().read({"P": 2 * state["P"]}, inputs)


@pytest.mark.parametrize("what", ["write", "read", "P_0", "prompt"])
def test_answers_from_other_banks_or_to_another_prompt_are_made_again(tiny, conversations, tmp_path, monkeypatch, caplog, what):
    file, settings = tmp_path / "evaluated.json", dict(memory="initial" if what == "P_0" else "own")
    _, calls, _ = asked_until(None, build(tiny, "slot"), conversations, file, monkeypatch, **settings)
    if what == "prompt":
        monkeypatch.setattr(prompts, "PROMPT", "Q: {question}\nA:")
    else:
        monkeypatch.setitem(pdmem.REGISTRY, "slot", Louder if what == "read" else Forgetful)
    if what == "P_0":
        monkeypatch.setattr(Forgetful, "initial_state", lambda self: {"P": self.draw("other", 16, self.d, std=1.0)})
    with caplog.at_level(logging.WARNING):
        _, made, _ = asked_until(None, build(tiny, "slot"), conversations, file, monkeypatch, **settings)
    assert made == calls and "is of another evaluation" in caplog.text


# ---- a finished run --------------------------------------------------------------------------------------------------


def test_a_damaged_run_is_not_reported(tiny, tmp_path):
    data = pdmem.load_data("synthetic", "smoke")
    run = pdmem.Experiment(method="baseline", preset="smoke", output_dir=str(tmp_path))
    model = run.build(tiny)
    evaluation = pdmem.evaluate(model, data.test[:2], questions_per_bucket=1, max_new_tokens=2, progress=False)
    record = pdmem.save_run(run, model, data, pdmem.train(model, data.train), evaluation, started=0.0)
    assert load_record(tmp_path) == record and "per_question.parquet" in record["files"]
    for file in (tmp_path / name for name in ("record.json", *record["files"])):
        whole = file.read_bytes()
        file.write_bytes(whole.replace(b"1", b"2", 1) if b"1" in whole else whole[:-1])
        with pytest.raises(ValueError, match=f"{file.name} is damaged"):
            load_record(tmp_path)
        file.write_bytes(whole)
    assert load_record(tmp_path) == record


@pytest.mark.parametrize("text", ["[]", "3", '{"files": 3}', '{"files": ["a.csv"]}', "[" * 100_000, "{"], ids=lambda text: text[:12])
def test_what_is_no_record_is_damaged(tmp_path, text):
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(ValueError, match="record.json is damaged .*make the run again"):
        load_record(tmp_path)


def test_a_record_or_table_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no record .*record.json: make the run"):
        load_record(tmp_path)
    (tmp_path / "record.json").write_text('{"files": {"summary.csv": "00000000"}}')
    with pytest.raises(FileNotFoundError, match="holds no summary.csv, which its record names: make the run again"):
        load_record(tmp_path)


def test_every_module_that_decides_a_run_counts_in_its_checkpoint():
    """A new one must be listed, here or there: else a killed run goes on from what other code has made."""
    library = Path(checkpoints.__file__).parent
    found, open_ends = set(), ["training", "evaluation", "lora"]
    while open_ends:
        module = open_ends.pop()
        if module not in found:
            found.add(module)
            lines = re.findall(r"^ *from (\.\w* import .+)", (library / f"{module}.py").read_text(), flags=re.MULTILINE)
            names = [re.findall(r"\w+", line.partition("import")[2] if line.startswith(". ") else line.partition(" ")[0])
                     for line in lines]
            open_ends += [name for line in names for name in line if (library / f"{name}.py").exists()]
    made_of_answers = {"estimates", "metrics", "provenance"}  # what comes after them: it is made anew anyway
    beside = {"cards", "files", "locomo", "persistence", "settings", "sources"}  # files and forms; data and settings count themselves
    assert found == {*checkpoints.CODE, *checkpoints.ASKING, *made_of_answers, *beside}
