"""What is kept of a memory: adapters and states as files that can be read years later [D].

**An adapter** is a folder: ``adapter.safetensors`` (θ_mem and the fixed maps of the write side; no backbone weight) and
``config.json``:

    schema               2; 1 had no fingerprints of its own and is still read
    backbone             the name it was trained on, and
    backbone_fingerprint sha256 over that backbone's weights (`Backbone.fingerprint`)
    settings             the fields of `MemorySettings`
    write_fingerprint    sha256 over the fixed maps: what a state depends on beside backbone and settings
    fingerprint          sha256 over all tensors of the file, trained ones included

**A state** is one safetensors file with the tensors of ``model.state``. Its metadata (all strings):

    schema, backbone, backbone_fingerprint, settings (JSON), write_fingerprint   as above
    adapter_fingerprint  of the adapter that wrote or used it last, for the record: any adapter with these write maps
                         reads it, however much longer it was trained, for nothing that is trained takes part in writing
    state_sha256         over the tensors, so that a damaged one is noticed
    turns, written       how many turns it holds ("" where nobody counted), and when the file was written (UTC, ISO 8601)
    log                  JSON, a list of `LogEntry` as objects; without a text unless it was asked for
    session              JSON, only in a session's folder (`session.Session`)

Every file is whole or not there (`files.atomic_path`), and nothing is unpickled. A newer schema is refused by its number.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .files import ReadError, as_path, atomic_path, is_file, open_tensors, read_bytes, reading
from .methods import MemorySettings, State

if TYPE_CHECKING:
    from .memory import MemoryModel

SCHEMA = 2  # of both files
HEADER = 99_000_000  # bytes of metadata: safetensors allows a header 100 MB
CONFIG, WEIGHTS = "config.json", "adapter.safetensors"


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 (hex) over names, shapes, types and bytes."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def write_fingerprint(model: "MemoryModel") -> str:
    """Of the fixed maps that ``model`` writes with; taken again only when one of them was replaced or changed, since
    states are loaded by the thousand."""
    maps = dict(sorted(model.adapter.named_buffers()))
    versions = [(name, tensor.data_ptr(), tensor._version) for name, tensor in maps.items()]
    kept = model.__dict__.get("_write_fingerprint")
    if kept is None or kept[0] != versions:
        kept = model._write_fingerprint = versions, fingerprint(maps)
    return kept[1]


def adapter_fingerprint(model: "MemoryModel") -> str:
    """Of everything in the adapter, as trained so far."""
    return fingerprint(model.adapter.state_dict())


def text_sha256(text: str) -> str:
    """sha256 (hex) of a text in UTF-8, as a log keeps it of a turn or a question."""
    return hashlib.sha256(text.encode()).hexdigest()


def utc_now() -> str:
    """The time in UTC to the second, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


# ---- adapters --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdapterConfig:
    """``config.json``; the fingerprints are None in a file of schema 1."""

    backbone: str
    backbone_fingerprint: str
    settings: MemorySettings
    write_fingerprint: str | None = None
    fingerprint: str | None = None


def save_adapter(model: "MemoryModel", folder: str | Path) -> None:
    """Write the folder's two files. The weights hold the config too, so that a save cut off between the two is whole."""
    from safetensors.torch import save_file

    folder, tensors = as_path(folder), {k: v.contiguous().cpu() for k, v in model.adapter.state_dict().items()}
    _require_finite_adapter(f"this {model.method}", tensors)
    config = {"schema": SCHEMA, "backbone": model.backbone.name, "backbone_fingerprint": model.backbone.fingerprint,
              "settings": asdict(model.settings), "write_fingerprint": write_fingerprint(model),
              "fingerprint": adapter_fingerprint(model)}
    with atomic_path(folder / WEIGHTS) as partial:
        save_file(tensors, partial, metadata={"format": "pt", "config": json.dumps(config)})
    with atomic_path(folder / CONFIG) as partial:
        partial.write_text(json.dumps(config, indent=2))
    (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)  # safetensors leaves it to its owner alone


def adapter_folder(name: str | Path, revision: str | None = None) -> Path:
    """A folder as it is; "user/name" where there is no such folder: fetched from the hub or found in its cache."""
    folder = as_path(name)
    with reading(folder):
        there = folder.exists()
    if there or str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HfHubHTTPError, LocalEntryNotFoundError

    from .backbone import _hub_answers

    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=[CONFIG, WEIGHTS],
                                      local_files_only=not _hub_answers()))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(f"no folder {name}, and the model hub or its cache has no such adapter "
                                f"({_first_line(error)}): give a folder written by save_pretrained") from error


def read_adapter(folder: Path) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """The folder's ``config.json``, checked, and the tensors; FileNotFoundError where either file is missing.

    The weights' file is opened once, so that tensors and the config in it are of one save, whoever saves meanwhile. Where a
    save was cut off between the two files, config.json is of the weights before: where it is of other weights of this method
    and backbone, the config in the weights is taken. If it is of these weights and says something else, but for the
    backbone's name, which one may rename, one of the two is damaged: ValueError.
    """
    for file in (CONFIG, WEIGHTS):
        if not is_file(folder / file):
            raise FileNotFoundError(f"{folder} holds no {file}: give a folder written by save_pretrained")
    config = _parse_config(read_bytes(folder / CONFIG), folder, CONFIG)
    within, tensors = _read_weights(folder / WEIGHTS)
    if within is not None:
        within = _parse_config(within, folder, WEIGHTS)
        other_weights, same = config.fingerprint != within.fingerprint, config.settings.method == within.settings.method
        if other_weights and same and config.backbone_fingerprint == within.backbone_fingerprint:
            return within, tensors
        if not other_weights and replace(config, backbone=within.backbone) != within:
            raise ValueError(f"{folder / CONFIG} is damaged: it differs from the config within {WEIGHTS}; save the adapter "
                             "again")
    return config, tensors


def _parse_config(text: str | bytes, folder: Path, name: str) -> AdapterConfig:
    try:
        config = json.loads(text)
        schema = int(config["schema"])
        if schema <= SCHEMA:
            own = [str(config[key]) if schema > 1 else None for key in ("write_fingerprint", "fingerprint")]
            return AdapterConfig(str(config["backbone"]), str(config["backbone_fingerprint"]),
                                 MemorySettings.from_mapping(config["settings"]), *own)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{folder / name} is damaged ({error}): save the adapter again") from error
    raise ValueError(f"{folder} has schema {schema}, this version reads up to {SCHEMA}: update pdmem")


def _read_weights(weights: Path) -> tuple[str | None, dict[str, Tensor]]:
    """(the config within, None in a file of schema 1; the tensors)"""
    try:
        with open_tensors(weights) as file:
            return (file.metadata() or {}).get("config"), {name: file.get_tensor(name) for name in file.keys()}
    except (FileNotFoundError, ReadError):
        raise
    except Exception as error:  # safetensors raises a type of its own
        raise ValueError(f"{weights} is damaged ({_first_line(error)}): save the adapter again") from error


def _require_finite_adapter(what: str | Path, tensors: Mapping[str, Tensor]) -> None:
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise ValueError(f"{what} holds numbers that are not finite: train it again from its start, at a lower learning rate")


def load_weights(model: "MemoryModel", folder: Path, config: AdapterConfig, tensors: Mapping[str, Tensor]) -> None:
    """Fill ``model``'s adapter with what `read_adapter` read of ``folder`` and set its state to P_0."""
    file = folder / WEIGHTS
    try:
        model.adapter.load_state_dict(tensors)
    except Exception as error:  # torch raises a type of its own where a name or shape differs
        raise ValueError(f"{file} is damaged or of another method ({_first_line(error)}): save the adapter "
                         "again") from error
    if config.fingerprint not in (None, adapter_fingerprint(model)):
        raise ValueError(f"{file} is damaged, or was not saved with the {CONFIG} beside it (fingerprints differ): save "
                         "the adapter again")
    _require_finite_adapter(file, tensors)
    model.reset()


def holds_adapter(folder: Path, wanted: str) -> bool:
    """Whether an undamaged adapter of this `adapter_fingerprint` lies in ``folder``."""
    try:
        config, tensors = read_adapter(folder)
    except (FileNotFoundError, ValueError):
        return False
    return config.fingerprint == wanted == fingerprint(tensors)


# ---- states ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LogEntry:
    """One thing that happened to a memory. Who holds a text can find its hash, so a short text's hash is no secret."""

    kind: str  # "write", "ask", "merge", "forgotten"
    time: str  # UTC, ISO 8601
    turn: int | None = None  # running number from 0; of "write" and "forgotten"
    tokens: int | None = None  # written
    sha256: str | None = None  # of the turn's or the question's text, UTF-8
    text: str | None = None  # of the turn or question, only where it was asked for
    answer: str | None = None  # of "ask", likewise
    state: str | None = None  # of "merge": the state_sha256 of the other memory, and
    age: int | None = None  # how many turns its start had faded by

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "LogEntry":
        """An entry as `as_json` gave it; a field of another name or type is a ValueError or TypeError."""
        entry = cls(**fields)
        numbers = (entry.turn, entry.tokens, entry.age)
        texts = (entry.kind, entry.time, entry.sha256, entry.text, entry.answer, entry.state)
        if not all(x is None or type(x) is int for x in numbers) or not all(x is None or type(x) is str for x in texts):
            raise ValueError(f"no log entry: {fields}")
        if entry.state is not None and not re.fullmatch("[0-9a-f]{64}", entry.state):  # it becomes a file's name
            raise ValueError(f"no sha256: {entry.state!r}")
        return entry

    def as_json(self, keep_text: bool = True) -> dict[str, Any]:
        """What is set; without ``keep_text`` neither text nor answer."""
        hidden = () if keep_text else ("text", "answer")
        return {k: v for k, v in asdict(self).items() if v is not None and k not in hidden}


@dataclass(frozen=True)
class SavedState:
    """A state file as it was read; the fields are those of its metadata."""

    state: State
    settings: dict[str, Any]
    backbone: str = ""
    backbone_fingerprint: str = ""
    write_fingerprint: str | None = None  # None: schema 1
    adapter_fingerprint: str | None = None
    turns: int | None = None
    written: str = ""
    log: list[LogEntry] = field(default_factory=list)
    session: dict[str, Any] = field(default_factory=dict)


def identity(model: "MemoryModel") -> dict[str, str]:
    """What a state of ``model`` belongs to, as its metadata says it."""
    return {"backbone": model.backbone.name, "backbone_fingerprint": model.backbone.fingerprint,
            "settings": json.dumps(asdict(model.settings)), "write_fingerprint": write_fingerprint(model),
            "adapter_fingerprint": adapter_fingerprint(model)}


def require_finite(state: State) -> None:
    """ValueError where a tensor holds a number that is not finite."""
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise ValueError("this state holds numbers that are not finite: use one that was written")


def save_state(state: State, belongs_to: Mapping[str, str], file: str | Path, turns: int | None = None,
               log: Iterable[LogEntry] = (), keep_text: bool = False, session: Mapping[str, Any] | None = None) -> None:
    """Write ``state``, bit for bit; ``belongs_to`` is the `identity` of its model. ValueError for too long a log, and for
    numbers that are not finite, which nothing would read again."""
    from safetensors.torch import save_file

    require_finite(state)
    metadata = {"schema": str(SCHEMA), **belongs_to, "state_sha256": fingerprint(state),
                "turns": "" if turns is None else str(turns), "written": utc_now(),
                "log": json.dumps([entry.as_json(keep_text) for entry in log]), "session": json.dumps(session or {})}
    if len(json.dumps(metadata)) > HEADER:
        raise ValueError(f"{file}: the log is too long for a state file, whose header holds {HEADER / 1e6:.0f} MB: leave it "
                         "out (log=False in Session.save_state), or its texts; a session's folder keeps all of it")
    with atomic_path(file) as partial:
        save_file({k: v.contiguous().cpu() for k, v in state.items()}, partial, metadata=metadata)


def read_state(file: str | Path) -> SavedState:
    """A state file, checked against itself; whether it belongs to a model, `require_same_memory` says."""
    from safetensors import SafetensorError

    if not is_file(file := as_path(file)):
        raise FileNotFoundError(f"no state file {file}: write one with save_state")
    try:
        with open_tensors(file) as opened:
            metadata = opened.metadata() or {}
            schema = int(metadata["schema"])
            if schema <= SCHEMA:
                saved = _saved_state(schema, metadata, {name: opened.get_tensor(name) for name in opened.keys()})
                if schema > 1 and metadata["state_sha256"] != fingerprint(saved.state):
                    raise ValueError("its tensors are not those that were saved")
                return saved
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged or no state of pdmem ({error}): write it again with save_state") from error
    raise ValueError(f"{file} has schema {schema}, this version reads up to {SCHEMA}: update pdmem")


def _saved_state(schema: int, metadata: Mapping[str, str], state: State) -> SavedState:
    settings = dict(json.loads(metadata["settings"]))
    if schema == 1:
        return SavedState(state, settings, backbone_fingerprint=metadata["backbone_fingerprint"])
    texts = {name: metadata[name] for name in ("backbone", "backbone_fingerprint", "write_fingerprint",
                                               "adapter_fingerprint", "written")}
    return SavedState(state, settings, **texts, turns=int(metadata["turns"]) if metadata["turns"] else None,
                      log=[LogEntry.from_json(entry) for entry in json.loads(metadata["log"])],
                      session=dict(json.loads(metadata["session"])))


def require_same_memory(model: "MemoryModel", saved: SavedState, what: str | Path) -> None:
    """ValueError that names what differs where ``saved`` was not written as ``model`` writes."""
    if saved.backbone_fingerprint != model.backbone.fingerprint:
        raise ValueError(f"{what} was written with another backbone than {model.backbone.name}: use its own"
                         + (f", {saved.backbone}" if saved.backbone not in ("", model.backbone.name) else ""))
    ours = asdict(model.settings)
    if differs := [f"{k}: {saved.settings.get(k)!r} there, {v!r} here" for k, v in ours.items()
                   if saved.settings.get(k) != v]:
        raise ValueError(f"{what} belongs to another memory ({'; '.join(differs)}): load it into a model built alike")
    if saved.write_fingerprint not in (None, write_fingerprint(model)):
        raise ValueError(f"{what} was written with other write maps than this {model.method}'s, though of the same "
                         "seed: load its adapter with from_pretrained, which brings them")


# ---- the hub ---------------------------------------------------------------------------------------------------------

ANSWER_TIMEOUT = 20.0  # seconds that the hub gets to answer
UPLOAD_TIMEOUT = 600.0  # seconds for the upload itself


def push_folder(folder: str | Path, repo_id: str, private: bool | None = None, token: str | None = None,
                commit_message: str = "Upload adapter", timeout: float = UPLOAD_TIMEOUT) -> str:
    """Upload a folder to the model hub, the repository made if it is not there; returns the commit's address.

    RuntimeError where the hub refuses, or has not answered in `ANSWER_TIMEOUT` seconds, or is not done in ``timeout``.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    _within(ANSWER_TIMEOUT, repo_id, lambda: api.create_repo(repo_id, private=private, exist_ok=True))
    return str(_within(timeout, repo_id, lambda: api.upload_folder(repo_id=repo_id, folder_path=folder,
                                                                   commit_message=commit_message)))


def _within(seconds: float, repo_id: str, ask) -> Any:
    """What ``ask`` returns, within a time limit of our own: the client's requests have none."""
    import threading

    answers: list[Any] = []
    errors: list[Exception] = []

    def run():
        try:
            answers.append(ask())
        except Exception as error:  # the client's own types, and those of the http library under it
            errors.append(error)

    asking = threading.Thread(target=run, daemon=True)
    asking.start()
    asking.join(seconds)
    if answers:
        return answers[0]
    why = _first_line(errors[0]) if errors else f"no answer within {seconds:.0f} seconds"
    raise RuntimeError(f"the model hub did not take {repo_id} ({why}): check the name, the network and your token "
                       "(hf auth login), or copy the folder that save_pretrained writes") from (errors or [None])[0]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
