"""Adapter and state files beyond the round trip (`test_methods`): fingerprints, schemas, what is refused, and the hub."""

import base64
import builtins
import errno
import io
import json
import os
import threading
import time
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import safetensors.torch
import torch
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import pdmem_lib as pdmem
from pdmem_lib import persistence
from pdmem_lib.files import ReadError
from pdmem_lib.lora import LoRAModel
from pdmem_lib.persistence import LogEntry

TURN = "Ada: I adopted a cat."


def rewritten(file, **metadata):
    """The safetensors ``file`` with other metadata."""
    with safe_open(file, framework="pt") as opened:
        old = opened.metadata()
    save_file(load_file(file), file, metadata=old | metadata)


def test_the_adapter_in_the_repository_is_whole_and_says_its_licence(pytestconfig):
    (folder,) = (pytestconfig.rootpath / "data" / "adapters").iterdir()
    assert "license: cc-by-nc-4.0" in (folder / "README.md").read_text()
    tensors, config = load_file(folder / "adapter.safetensors"), json.loads((folder / "config.json").read_text())
    assert persistence.fingerprint(tensors) == config["fingerprint"] and config["backbone"] == "smollm2-135m"
    assert all(tensor.isfinite().all() for tensor in tensors.values())


# ---- fingerprints ----


def test_a_fingerprint_sees_every_bit_and_name():
    one = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    assert persistence.fingerprint(one) == persistence.fingerprint(dict(reversed(one.items())))
    others = [one | {"a": torch.zeros(3, 2)}, one | {"a": -torch.zeros(2, 3)}, {"a": one["a"], "c": one["b"]},
              one | {"b": torch.ones(1).double()}, {}]
    assert len({persistence.fingerprint(x) for x in [one, *others]}) == 6


@pytest.mark.parametrize("method", pdmem.METHODS)
def test_training_moves_the_adapters_fingerprint_and_not_that_of_its_write_maps(model, method, tmp_path):
    untrained, trained = model(method), model(method)
    with torch.no_grad():
        trained.parameters()[0].add_(1)
    assert persistence.adapter_fingerprint(untrained) != persistence.adapter_fingerprint(trained)
    assert persistence.write_fingerprint(untrained) == persistence.write_fingerprint(trained)
    untrained.write(TURN)
    untrained.save_state(tmp_path / "state.safetensors")
    state = trained.load_state(tmp_path / "state.safetensors")  # a memory outlives its adapter
    assert all(torch.equal(state[name], untrained.state[name]) for name in state)
    saved = persistence.read_state(tmp_path / "state.safetensors")
    assert saved.adapter_fingerprint == persistence.adapter_fingerprint(untrained)


def test_a_state_of_other_write_maps_is_refused(model, tmp_path):
    model("slot").save_state(tmp_path / "state.safetensors")
    other = model("slot")
    other.adapter.write_u.neg_()
    with pytest.raises(ValueError, match="other write maps than this slot's.*from_pretrained, which brings them"):
        other.load_state(tmp_path / "state.safetensors")


def test_a_flipped_bit_among_the_tensors_is_noticed(model, tmp_path):
    m = model("slot")
    m.save_pretrained(tmp_path)
    m.save_state(tmp_path / "state.safetensors")
    for name, load in (("adapter.safetensors", lambda: pdmem.MemoryModel.from_pretrained(tmp_path, m.backbone)),
                       ("state.safetensors", lambda: m.load_state(tmp_path / "state.safetensors"))):
        data = bytearray((tmp_path / name).read_bytes())
        data[-3] ^= 1
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            load()


def test_a_save_cut_off_between_its_two_files_is_the_new_adapter(model, tmp_path):
    m = model("slot")
    m.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    with torch.no_grad():
        m.parameters()[0].add_(1)
    m.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(config)
    back = pdmem.MemoryModel.from_pretrained(tmp_path, m.backbone)
    assert persistence.adapter_fingerprint(back) == persistence.adapter_fingerprint(m)


def test_nor_does_it_matter_whose_config_was_there(model, tmp_path):
    model("slot").save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    m = model("slot", seed=43)
    m.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(config)
    back = pdmem.MemoryModel.from_pretrained(tmp_path, m.backbone)
    assert back.settings == m.settings and persistence.adapter_fingerprint(back) == persistence.adapter_fingerprint(m)


def test_a_log_too_long_for_a_state_file_is_refused_with_the_mend(model, tmp_path, monkeypatch):
    monkeypatch.setattr(persistence, "HEADER", 5000)
    session, file = pdmem.Session(model("slot")), tmp_path / "state.safetensors"
    session.write(["Ann: Hm."] * 40)
    with pytest.raises(ValueError, match="log is too long.*log=False"):
        session.save_state(file)
    assert not file.exists()
    session.save_state(file, log=False)
    assert torch.equal(model("slot").load_state(file)["P"], session.state["P"]) and persistence.read_state(file).log == []


def test_weights_that_know_no_config_are_refused_beside_that_of_others(model, tmp_path):
    m = model("slot")
    m.save_pretrained(tmp_path)
    file = tmp_path / "adapter.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ValueError, match="was not saved with the config.json beside it"):
        pdmem.MemoryModel.from_pretrained(tmp_path, m.backbone)


# ---- what cannot be read, or must not be written ----


def refuse(monkeypatch, part):
    """The system lets nobody read a file whose path holds ``part``: root, who runs tests too, may read everything."""
    def denied(error, plain):
        def call(file, *rest, **options):
            if part in str(file):
                raise error(errno.EACCES, "Permission denied", str(file))
            return plain(file, *rest, **options)
        return call

    for owner, name in ((builtins, "open"), (io, "open"), (os, "stat"), (Path, "is_file"), (Path, "exists")):
        if part.startswith("folder") or name == "open":
            monkeypatch.setattr(owner, name, denied(PermissionError, getattr(owner, name)))
    monkeypatch.setattr(safetensors, "safe_open", denied(FileNotFoundError, safe_open))  # so it says of any error


@pytest.mark.parametrize("part", ["config.json", "adapter.safetensors", "folder"])
def test_an_adapter_that_may_not_be_read_is_neither_missing_nor_damaged(model, tmp_path, monkeypatch, part):
    m = model("slot", num_entries=16)
    m.save_pretrained(tmp_path / "folder")
    lora = LoRAModel(m.backbone, 2000)
    lora.save_pretrained(tmp_path / "folder-lora")
    with monkeypatch.context() as patch:
        refuse(patch, part)
        with pytest.raises(ReadError, match=f"could not read .*{part}.* .Permission denied.: see to it that you may read it"):
            pdmem.MemoryModel.from_pretrained(tmp_path / "folder", m.backbone)
    with monkeypatch.context() as patch:
        refuse(patch, {"config.json": "adapter_config.json", "folder": "folder"}.get(part, "adapter_model.safetensors"))
        with pytest.raises(ReadError, match="Permission denied"):
            LoRAModel.from_pretrained(tmp_path / "folder-lora", m.backbone)
    assert issubclass(ReadError, RuntimeError) and pdmem.MemoryModel.from_pretrained(tmp_path / "folder", m.backbone)


@pytest.mark.parametrize("part", ["state.safetensors", "folder"])
def test_a_state_or_session_that_may_not_be_read_is_neither_missing_nor_damaged(model, tmp_path, monkeypatch, part):
    m = model("slot", num_entries=16)
    with pdmem.Session(m, tmp_path / "folder") as session:
        session.write(TURN)
    with monkeypatch.context() as patch:
        refuse(patch, part)
        for read in (lambda: m.load_state(tmp_path / "folder" / "state.safetensors"),
                     lambda: pdmem.Session.open(tmp_path / "folder", m.backbone),
                     lambda: pdmem.Session(m, tmp_path / "folder", read_only=True)):
            with pytest.raises(ReadError, match="could not read .*Permission denied.*the path of a copy"):
                read()
    with pdmem.Session.open(tmp_path / "folder", m.backbone) as session:
        assert session.turns == 1


def test_a_log_that_may_not_be_read_is_named(model, tmp_path, monkeypatch):
    m = model("slot", num_entries=16)
    with pdmem.Session(m, tmp_path) as session:
        session.write(TURN)
    refuse(monkeypatch, "log-0.jsonl")
    with pytest.raises(ReadError, match="could not read .*log-0.jsonl"):
        pdmem.Session(m, tmp_path, read_only=True)


def test_data_that_may_not_be_read_is_not_missing(tmp_path, monkeypatch):
    (tmp_path / "folder.json").write_text("[]")
    refuse(monkeypatch, "folder.json")
    with pytest.raises(ReadError, match="could not read .*folder.json"):
        pdmem.load_locomo(tmp_path / "folder.json")
    with pytest.raises(ReadError, match="could not read .*File name too long"):
        pdmem.load_locomo("x" * 5000)


def test_readers_see_one_save_or_another_while_others_save(model, tmp_path, monkeypatch):
    """Another save takes the file's place before each opening of it."""
    saved, wanted, opened = [], [], []
    for number in range(2):
        m = model("slot", num_entries=16)
        with torch.no_grad():
            m.parameters()[0].add_(number)
        m.save_pretrained(tmp_path)
        saved.append((tmp_path / "adapter.safetensors").read_bytes())
        wanted.append(persistence.adapter_fingerprint(m))

    def replaced(file, *rest, **options):
        (tmp_path / "new").write_bytes(saved[len(opened) % 2])
        os.replace(tmp_path / "new", tmp_path / "adapter.safetensors")
        opened.append(file)
        return safe_open(file, *rest, **options)

    monkeypatch.setattr(safetensors, "safe_open", replaced)
    monkeypatch.setattr(safetensors.torch, "safe_open", replaced)
    for _ in range(3):
        back = pdmem.MemoryModel.from_pretrained(tmp_path, m.backbone)
        assert persistence.adapter_fingerprint(back) == wanted[(len(opened) - 1) % 2]
        assert persistence.holds_adapter(tmp_path, wanted[len(opened) % 2])


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_neither_written_nor_read(model, tmp_path, number):
    m = model("slot", num_entries=16)
    m.save_pretrained(tmp_path)
    before = (tmp_path / "adapter.safetensors").read_bytes()
    with torch.no_grad():
        m.parameters()[0].view(-1)[3] = number
    with pytest.raises(ValueError, match="numbers that are not finite: train .* lower learning rate"):
        m.save_pretrained(tmp_path)
    assert (tmp_path / "adapter.safetensors").read_bytes() == before
    save_file(m.adapter.state_dict(), tmp_path / "adapter.safetensors")  # as an earlier version wrote it
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"fingerprint": persistence.adapter_fingerprint(m)}))
    with pytest.raises(ValueError, match="numbers that are not finite: train .* lower learning rate"):
        pdmem.MemoryModel.from_pretrained(tmp_path, m.backbone)


def test_a_state_that_is_not_finite_is_not_written(model, tmp_path):
    m, file = model("slot", num_entries=16), tmp_path / "state.safetensors"
    session = pdmem.Session(m, tmp_path / "session")
    session.write(TURN)
    kept = session.state["P"].clone()
    m._state["P"][0, 0] = float("nan")  # a write of one's own may come to this
    with pytest.raises(ValueError, match="not finite"):
        m.save_state(file)
    assert not file.exists()
    session._written = lambda state, H: {"P": state["P"] * float("inf")}
    with pytest.raises(ValueError, match="not finite"):
        session.write(TURN)
    session.close()
    with pdmem.Session.open(tmp_path / "session", m.backbone) as again:
        assert torch.equal(again.state["P"], kept) and again.turns == 1


# ---- schemas and logs ----


@pytest.mark.parametrize("told", [dict(log="[" * 100_000), dict(session="[" * 100_000), dict(settings="[" * 100_000),
                                  dict(log="3"), dict(turns="Infinity"), dict(schema="Infinity")], ids=lambda told: repr(told)[:20])
def test_metadata_of_another_shape_is_damaged(model, tmp_path, told):
    m, file = model("slot", num_entries=16), tmp_path / "state.safetensors"
    m.save_state(file)
    rewritten(file, **told)
    with pytest.raises(ValueError, match="is damaged or no state of pdmem"):
        m.load_state(file)


def test_files_of_schema_1_are_read(model, tmp_path):
    m = model("gated")
    m.write(TURN)
    save_file(m.adapter.state_dict(), tmp_path / "adapter.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({
        "schema": 1, "backbone": m.backbone.name, "backbone_fingerprint": m.backbone.fingerprint,
        "settings": asdict(m.settings)}))
    save_file(m.state, tmp_path / "state.safetensors", metadata={
        "schema": "1", "backbone_fingerprint": m.backbone.fingerprint, "settings": json.dumps(asdict(m.settings))})
    back = pdmem.MemoryModel.from_pretrained(tmp_path, m.backbone)
    assert torch.equal(back.load_state(tmp_path / "state.safetensors")["P"], m.state["P"])
    assert persistence.read_state(tmp_path / "state.safetensors").turns is None


def test_a_state_from_the_future_is_refused_by_its_number(model, tmp_path):
    m = model("slot")
    m.save_state(tmp_path / "state.safetensors")
    rewritten(tmp_path / "state.safetensors", schema="3", settings="written in a way not known today")
    with pytest.raises(ValueError, match="schema 3, this version reads up to 2: update pdmem"):
        m.load_state(tmp_path / "state.safetensors")


def test_a_state_says_what_it_is(model, tmp_path):
    m, log = model("hebbian"), [LogEntry("write", "2026-01-01T00:00:00+00:00", 0, 5, "ab" * 32, text=TURN),
                                LogEntry("ask", "2026-01-01T00:00:01+00:00", sha256="cd" * 32, answer="a cat")]
    m.save_state(tmp_path / "s", turns=1, log=log)
    with safe_open(tmp_path / "s", framework="pt") as opened:
        metadata = opened.metadata()
    assert set(metadata) == {"schema", "backbone", "backbone_fingerprint", "settings", "write_fingerprint",
                             "adapter_fingerprint", "state_sha256", "turns", "written", "log", "session"}
    assert json.loads(metadata["settings"])["method"] == "hebbian" and metadata["turns"] == "1"
    assert metadata["written"].endswith("+00:00") and "cat" not in metadata["log"]
    m.save_state(tmp_path / "s", turns=1, log=log, keep_text=True)
    assert persistence.read_state(tmp_path / "s").log == log


@pytest.mark.parametrize("log", ["[1]", '[{"kind": "write"}]', '[{"kind": "write", "time": "", "turn": "0"}]',
                                 '[{"kind": "write", "time": "", "colour": 1}]', "[", "null"])
def test_a_log_of_another_make_is_refused(model, tmp_path, log):
    m = model("slot")
    m.save_state(tmp_path / "state.safetensors")
    rewritten(tmp_path / "state.safetensors", log=log)
    with pytest.raises(ValueError, match="state.safetensors is damaged"):
        m.load_state(tmp_path / "state.safetensors")


# ---- the hub ----


class Hub(BaseHTTPRequestHandler):
    """As much of the model hub as an upload of small files asks for; ``server.files`` are what was committed."""

    protocol_version = "HTTP/1.1"

    def answer(self, body, code=200):
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.refuses:
            self.answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            self.answer({"url": f"{self.server.url}/ann/memory"})
        elif self.path.endswith("/preupload/main"):
            self.answer({"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                                   for file in json.loads(body)["files"]]})
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{self.server.url}/ann/memory/commit/{'1' * 40}", "commitOid": "1" * 40, "success": True})
        else:
            self.answer({"errors": [], "warnings": []})

    def do_GET(self):
        self.answer({"id": "ann/memory", "sha": "0" * 40, "siblings": []})

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.files, server.refuses = f"http://127.0.0.1:{server.server_port}", {}, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


def test_what_is_pushed_is_the_adapter_with_a_card_and_no_backbone(model, hub, tmp_path):
    m = model("slot", num_entries=16)
    assert m.push_to_hub("ann/memory", token="hf_none", private=True)
    assert sorted(hub.files) == ["README.md", "adapter.safetensors", "config.json"]
    for name, data in hub.files.items():
        (tmp_path / name).write_bytes(data)
    back = pdmem.MemoryModel.from_pretrained(tmp_path, m.backbone)
    assert persistence.adapter_fingerprint(back) == persistence.adapter_fingerprint(m)
    assert "Not measured" in hub.files["README.md"].decode()
    m.push_to_hub("ann/memory", card="# Measured", token="hf_none")
    assert hub.files["README.md"] == b"# Measured"


def test_a_hub_that_refuses_is_one_sentence(model, hub):
    hub.refuses = True
    with pytest.raises(RuntimeError, match="the model hub did not take ann/memory .*hf auth login") as error:
        model("slot").push_to_hub("ann/memory", token="hf_none")
    assert "\n" not in str(error.value)


def test_a_hub_that_is_not_there_is_one_sentence(model, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(RuntimeError, match="the model hub did not take ann/memory"):
        model("slot").push_to_hub("ann/memory", token="hf_none")


def test_a_hub_that_is_silent_is_waited_for_no_longer_than_said(model, monkeypatch):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection, says nothing
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(persistence, "ANSWER_TIMEOUT", 1.0)
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="no answer within 1 seconds"):
            model("slot").push_to_hub("ann/memory", token="hf_none")
        assert time.monotonic() - start < 5


def test_an_adapter_of_the_hub_is_found_in_its_cache(model, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    m, repo = model("slot", num_entries=16), tmp_path / "models--ann--memory"
    m.save_pretrained(repo / "snapshots" / ("1" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("1" * 40)
    back = pdmem.MemoryModel.from_pretrained("ann/memory", m.backbone)
    assert persistence.adapter_fingerprint(back) == persistence.adapter_fingerprint(m)
    for name in ("ann/nothing", "not a/name"):
        with pytest.raises(FileNotFoundError, match=f"no folder {name}, and the model hub or its cache has no"):
            pdmem.MemoryModel.from_pretrained(name, m.backbone)


def test_changed_write_maps_change_the_kept_fingerprint(model):
    m = model("slot")
    before = persistence.write_fingerprint(m)
    assert persistence.write_fingerprint(m) == before == persistence.fingerprint(dict(m.adapter.named_buffers()))
    m.adapter.write_u[0, 0] += 1
    after = persistence.write_fingerprint(m)
    m.adapter.write_a = m.adapter.write_a * 2
    assert len({before, after, persistence.write_fingerprint(m)}) == 3
