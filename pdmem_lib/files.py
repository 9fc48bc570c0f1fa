"""Files that are whole or not there, and right or refused.

Everything is written beside its place and moved onto it in one step, so that a kill leaves the old file or the new one.
What the library reads again carries a CRC-32 of its content: it finds every flipped bit, and lets another change pass
once in four thousand million times. (It is no protection against someone who wants to deceive.)
"""

import errno
import hashlib
import json
import logging
import os
import platform
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from platformdirs import user_cache_path
from safetensors import SafetensorError

if TYPE_CHECKING:
    from safetensors import safe_open
    from torch import Tensor

log = logging.getLogger(__name__)
SEAL = "checksums.json"  # of a folder's files


class StorageError(OSError, RuntimeError):
    """A file could not be written: a full disk, a read-only folder. Nothing half-written is left."""

    def __init__(self, target: Path, error: Exception):
        reason = getattr(error, "strerror", None) or error
        super().__init__(getattr(error, "errno", None) or errno.EIO, f"could not write {target}: {reason}; free some "
                         "space or choose another folder (PDMEM_CACHE sets the cache's)")


class ReadError(OSError, RuntimeError):
    """A file or folder is there and could not be read: no permission, a broken disk."""

    def __init__(self, source: str | Path, error: OSError):
        super().__init__(error.errno or errno.EIO, f"could not read {source} ({error.strerror or error}): see to it that you may "
                         "read it and enter the folders above it, or give the path of a copy")


@contextmanager
def reading(source: str | Path) -> Iterator[None]:
    """What the system refuses meanwhile is a `ReadError` that names ``source``; what is missing a FileNotFoundError."""
    try:
        yield
    except (FileNotFoundError, ReadError, StorageError):
        raise
    except OSError as error:
        raise ReadError(source, error) from error


def as_path(path: str | os.PathLike) -> Path:
    """``path`` as a Path; ValueError for what names no file: None, a number, bytes."""
    try:
        return Path(path)
    except TypeError as error:
        raise ValueError(f"a {type(path).__name__} is no path: give a string or a pathlib.Path") from error


def is_file(path: Path) -> bool:
    """Whether a file lies there; `ReadError` where the system does not let us see."""
    with reading(path):
        return path.is_file()


def read_bytes(path: Path) -> bytes:
    """A file's content; `ReadError` where the system refuses."""
    with reading(path):
        return path.read_bytes()


def cache_folder(*parts: str) -> Path:
    """The user's cache folder for pdmem (``PDMEM_CACHE`` overrides it), made if it is not there."""
    folder = Path(os.environ.get("PDMEM_CACHE") or user_cache_path("pdmem")).joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(folder, error) from error
    return folder


@contextmanager
def atomic_path(target: str | Path) -> Iterator[Path]:
    """Yield a private path beside ``target``; on success it takes the target's place, on any error it is removed.

    A reader never sees half a file, and of two writers the last whole one stays. Works for a file or a folder (of two
    folder writers the first stays). What the system refuses is a `StorageError` with the path in it. What a killed
    writer of this machine left beside ``target`` is removed.
    """
    target = as_path(target)
    workshop = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        prefix = f".{target.name}.{platform.node()}.{os.getpid()}."
        workshop = Path(tempfile.mkdtemp(prefix=prefix, suffix=".partial", dir=target.parent))
        partial = workshop / target.name
        yield partial
        if partial.is_file():
            with open(partial, "rb") as written:
                os.fsync(written.fileno())
            os.replace(partial, target)
        else:
            try:
                os.rename(partial, target)
            except OSError:
                if not target.is_dir():  # else another writer was first with the same content
                    raise
    except (OSError, SafetensorError) as error:  # safetensors wraps the system's error in its own type
        raise StorageError(target, error) from error
    finally:
        if workshop:
            shutil.rmtree(workshop, ignore_errors=True)


def _sweep(target: Path) -> None:
    """Remove the workshops of processes of this machine that are gone."""
    import psutil

    prefix = f".{target.name}.{platform.node()}."
    for path in target.parent.iterdir():
        if path.name.startswith(prefix) and path.name.endswith(".partial"):
            writer = path.name.removeprefix(prefix).partition(".")[0]
            if writer.isdecimal() and not psutil.pid_exists(int(writer)):
                shutil.rmtree(path, ignore_errors=True)


# ---- tensors ---------------------------------------------------------------------------------------------------------


def checksum(tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str] | None = None) -> str:
    """CRC-32 (8 hex digits) over names, types, shapes and bytes of the tensors, and over ``metadata``."""
    import torch

    crc = zlib.crc32(json.dumps(dict(metadata or {}), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


def save_tensors(file: str | Path, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors and what they belong to as a safetensors file, with their `checksum` in its metadata."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(file) as partial:
        save_file(tensors, partial, metadata={**(metadata or {}), "checksum": checksum(tensors, metadata)})


@contextmanager
def open_tensors(file: Path) -> Iterator["safe_open"]:
    """A safetensors file, opened; `ReadError` where the system refuses: safetensors then says that there is none."""
    from safetensors import safe_open

    with reading(file):
        open(file, "rb").close()
        with safe_open(file, framework="pt") as opened:
            yield opened


def load_tensors(file: str | Path) -> tuple[dict[str, "Tensor"], dict[str, str]]:
    """(tensors, metadata) of `save_tensors`, mapped from the file and checked; ValueError for a damaged one.

    The file may be replaced while it is in use, as `save_tensors` does; it must not be cut short in place.
    """
    if not is_file(file := as_path(file)):
        raise FileNotFoundError(f"there is no file {file}: correct the path")
    try:
        with open_tensors(file) as opened:
            metadata = dict(opened.metadata() or {})
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or no safetensors file ({error}): write it again") from error
    if (written := metadata.pop("checksum", None)) != checksum(tensors, metadata):
        raise ValueError(f"{file} is damaged or was not written by pdmem "
                         f"({'it carries no checksum' if written is None else 'its checksum differs'}): write it again")
    return tensors, metadata


# ---- JSON ------------------------------------------------------------------------------------------------------------


def save_json(file: str | Path, content: Mapping[str, Any], indent: int | None = None) -> None:
    """Write a JSON object with its own checksum in it, under "checksum"."""
    text = json.dumps({**content, "checksum": _json_checksum(content)}, indent=indent)
    with atomic_path(file) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def load_json(file: str | Path, mend: str = "write it again") -> dict[str, Any]:
    """What `save_json` wrote; ValueError, which ends in ``mend``, for a damaged file."""
    try:
        content = json.loads(read_bytes(Path(file)))
        written = content.pop("checksum")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged or was not written by pdmem ({error}): {mend}") from error
    if written != _json_checksum(content):
        raise ValueError(f"{file} is damaged (its checksum differs): {mend}")
    return content


def cache_file(kind: str, key: Sequence[Any]) -> Path:
    """The file of the cache for what ``key`` decides: whatever changes the content stands in it."""
    return cache_folder(kind) / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.json"


def cached_rows(file: Path, count: int, kinds: Sequence[type], make: Callable[[], list[tuple]]) -> list[tuple]:
    """The ``count`` rows that ``make`` returns, columns of these ``kinds``, from ``file`` where they lie there; a damaged one, or
    one of another make, is said and made again."""
    try:
        rows = [tuple(kind(value) for kind, value in zip(kinds, row, strict=True)) for row in load_json(file)["rows"]]
        if len(rows) != count:
            raise ValueError(f"it holds {len(rows)} rows in place of {count}")
        return rows
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged (%s) and is made again", file, error)
    save_json(file, {"rows": (rows := make())})
    return rows


def _json_checksum(content: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


# ---- folders of others' files ----------------------------------------------------------------------------------------


def seal(folder: Path) -> None:
    """Keep the checksums of the files in ``folder`` beside them, for `require_sealed`."""
    save_json(folder / SEAL, {path.name: file_checksum(path) for path in sorted(folder.iterdir()) if path.is_file()})


def require_sealed(folder: Path) -> None:
    """ValueError or OSError where a file of ``folder`` is not what it was when `seal` was called."""
    for name, written in load_json(folder / SEAL).items():
        if file_checksum(folder / name) != written:
            raise ValueError(f"{folder / name} is damaged (its checksum differs): write it again")


def file_checksum(path: Path) -> str:
    """CRC-32 (8 hex digits) of a file's bytes."""
    crc = 0
    with reading(path), open(path, "rb") as file:
        while piece := file.read(1 << 20):
            crc = zlib.crc32(piece, crc)
    return f"{crc:08x}"
