"""The library's own code as a digest: what was made by it is told from what other code made [D].

Comments, docstrings and layout do not count, nor do the modules on which no number rests.
"""

import ast
import hashlib
import json
import re
from collections.abc import Iterable
from functools import cache, cached_property, partial
from importlib.metadata import version
from pathlib import Path
from types import CellType, CodeType, FunctionType
from typing import Any

NEUTRAL = frozenset({
    "__init__", "__main__", "_maps", "_plot", "banks", "cards", "causal", "causal_figures", "chat", "collected", "comparisons",
    "conformance", "control_figures", "cost_figures", "data_figures", "diagrams", "editing", "estimates", "evidence_figures",
    "figures", "foretell", "images", "journal", "lesson", "memory_figures", "oracle", "pane", "parameters", "probe", "published",
    "reading_figures", "recall", "recording", "sensitivity", "session", "sources", "studio_controls", "studio_drawing",
    "studio_model", "studio_parts", "studio_view", "widgets"})  # no number in a run of the study depends on them


def digest(*parts: str) -> str:
    """16 hex digits of SHA-256 over ``parts``, in their order."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def settings_sha256(settings: Any) -> str:
    """SHA-256 (64 hex digits) of settings that JSON holds, whatever the order of their keys: of data that they alone decide."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def code_of(path: str | Path) -> str:
    """A module's code without comments, docstrings and layout."""
    tree = ast.parse(Path(path).read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def modules() -> list[Path]:
    """The library's modules, by name."""
    return sorted(Path(__file__).parent.glob("*.py"))


def library_parts(also: Iterable[str] = ()) -> list[str]:
    """What a run's numbers depend on, without its data and backbone: the versions of torch and transformers, and the code
    of the modules that are not `NEUTRAL`, or are named in ``also``."""
    counted = [path for path in modules() if path.stem not in NEUTRAL - set(also)]
    return [*(f"{name} {version(name).split('+')[0]}" for name in ("torch", "transformers")), *map(code_of, counted)]


def registered_code(cls: type, counted: Iterable[str] = ()) -> str:
    """A digest of what the methods of ``cls`` and its bases do and of their other attributes, wherever they were defined.

    The bases of this library's modules ``counted``, which another digest holds, are left out, and torch's. Functions count
    with their defaults and what they enclose, without docstrings; the globals that they read are not seen. Other Python
    versions have other digests.
    """
    elsewhere = {f"{__package__}.{name}" for name in counted}
    bases = [base for base in cls.__mro__ if base.__module__ not in elsewhere
             and base.__module__.partition(".")[0] not in ("torch", "builtins", "typing", "abc")]
    return digest(*(f"{name} {_said(value)}" for base in bases for name, value in sorted(vars(base).items())
                    if not (name.startswith("__") and name.endswith("__")) or isinstance(value, FunctionType)))


def _said(value: Any, inside: tuple[CodeType, ...] = ()) -> str:
    """What ``value`` is, in words that another process finds too: an object's address stands in none.

    ``inside``: the functions that enclose it, one of which may call itself.
    """
    if isinstance(value, FunctionType) and hasattr(value, "__wrapped__"):
        return f"{_compiled(value.__code__)} around {_said(value.__wrapped__, inside)}"
    if isinstance(value, FunctionType):
        if value.__code__ in inside:
            return value.__qualname__
        around = [cell.cell_contents for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
                  if name != "__class__" and cell != CellType()]
        beside = _said((value.__defaults__, value.__kwdefaults__, around), (*inside, value.__code__))
        return f"{_compiled(value.__code__, value.__doc__)} {beside}"
    if isinstance(value, CodeType):
        return _compiled(value)
    for kind, parts in (((classmethod, staticmethod), ["__func__"]), (property, ["fget", "fset", "fdel"]),
                        (cached_property, ["func"]), (partial, ["func", "args", "keywords"])):
        if isinstance(value, kind):
            return f"{type(value).__name__} {[_said(getattr(value, part), inside) for part in parts]}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__} {[_said(one, inside) for one in value]}"
    if isinstance(value, (set, frozenset)):
        return f"set {sorted(_said(one, inside) for one in value)}"
    if isinstance(value, dict):
        return f"dict {[(_said(key, inside), _said(one, inside)) for key, one in value.items()]}"
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if hasattr(value, "tolist"):  # a tensor, an array
        return f"{type(value).__name__} {value.tolist()}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _compiled(code: CodeType, doc: str | None = None) -> str:
    """What a function does, wherever it stands: its bytecode, names and constants, without lines, file and docstring."""
    constants = code.co_consts[1:] if doc is not None and code.co_consts[:1] == (doc,) else code.co_consts
    return f"{code.co_code.hex()} {code.co_names} {_said(constants)}"


@cache  # what is in this process does not change with the files
def library_digest(*also: str) -> str:
    """`digest` of `library_parts`, as it was when first asked for."""
    return digest(*library_parts(also))
