"""The library's own code as a digest: what was made by it is told from what other code made [D].

Comments, docstrings and layout do not count, nor do the modules on which no number rests.
"""

import ast
import hashlib
import json
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import CodeType, FunctionType
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


def registered_code(cls: type) -> str:
    """A digest of a class' methods and plain attributes and of its bases', but for those of this library and of torch.

    A method that a user registers is known by it, wherever it was defined. What its methods call elsewhere is not seen.
    """
    found = []
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] in (__package__, "torch", "builtins", "typing", "abc"):
            continue
        for name, value in sorted(vars(base).items()):
            function = getattr(value, "fget", None) or getattr(value, "__func__", value)
            if isinstance(function, FunctionType):
                found.append(f"{type(value).__name__} {name} {_compiled(function.__code__)} {function.__defaults__}")
            elif isinstance(value, (int, float, str, tuple)) and not name.startswith("__"):
                found.append(f"{name} {value!r}")
    return digest(*found)


def _compiled(code: CodeType) -> str:
    """What a function does, wherever it stands: its bytecode, names and constants, without lines and file."""
    constants = [_compiled(one) if isinstance(one, CodeType) else str(sorted(map(repr, one))) if isinstance(one, frozenset)
                 else repr(one) for one in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"


@cache  # what is in this process does not change with the files
def library_digest(*also: str) -> str:
    """`digest` of `library_parts`, as it was when first asked for."""
    return digest(*library_parts(also))
