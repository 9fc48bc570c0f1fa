"""Files that are whole or not there: everything is written beside its place and moved onto it in one step."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from platformdirs import user_cache_path
from safetensors import SafetensorError


class StorageError(OSError, RuntimeError):
    """A file could not be written: a full disk, a read-only folder. Nothing half-written is left."""

    def __init__(self, target: Path, error: Exception):
        reason = getattr(error, "strerror", None) or error
        super().__init__(getattr(error, "errno", None) or errno.EIO, f"could not write {target}: {reason}; free some "
                         "space or choose another folder (PDMEM_CACHE sets the cache's)")


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
    folder writers the first stays). What the system refuses is a `StorageError` with the path in it.
    """
    target = Path(target)
    workshop = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        workshop = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
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
