"""What a command line and a notebook's parameters say: comma lists, and names that are no parameter."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any


def listed(text: str, kind: Callable[[str], Any] = str, default: Sequence[Any] | None = None) -> list[Any]:
    """The items of the comma list ``text``, each without spaces around it, as ``kind`` reads it, and once.

    ``default`` stands for an empty list; ValueError without one, and ``kind``'s own of an item that it cannot read.
    """
    found = list(dict.fromkeys(kind(item.strip()) for item in str(text).split(",") if item.strip()))
    if not found and default is None:
        raise ValueError("a list is empty: name at least one, several with commas between them")
    return found or list(default)


def require_known(names: Iterable[str], known: Sequence[str]) -> None:
    """ValueError for a name that is not ``known``: papermill only warns of a parameter that a notebook does not have.

    ``names``: of all that a notebook holds behind its parameters and did not hold before; "_" and what begins so is IPython's.
    """
    unknown = sorted({name for name in names if not name.startswith("_")} - set(known))
    if unknown:
        raise ValueError(f"unknown parameters {', '.join(unknown)}: known are {', '.join(known)}")
