"""Settings: frozen dataclasses that refuse an unknown name or a wrongly typed value with a sentence that says the mend."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral
from types import NoneType, UnionType
from typing import Any, Self, get_args, get_origin, get_type_hints

SEEDS = -(2**63), 2**64 - 1  # what a torch generator takes


def whole_number(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """``value`` as an int; ValueError that says the range for another kind of thing (a bool, 1.5, "3") or one beyond it."""
    is_one = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_one or (low is not None and value < low) or (high is not None and value > high):
        span = "" if low is None else f" of at least {low}" if high is None else f" from {low} to {high}"
        raise ValueError(f"{name} must be a whole number{span}, got {value!r}")
    return int(value)


@dataclass(frozen=True)
class Settings:
    """Base: values are checked against the annotations (an int passes for a float, a bool never for a number)."""

    def __post_init__(self):
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if type(value).__module__ == "numpy" and not getattr(value, "shape", ()):  # a number out of a table
                object.__setattr__(self, name, value := value.item())
            if not any(_is(value, option) for option in _options(kind)):
                known = " or ".join(option.__name__ for option in _options(kind))
                raise ValueError(f"{name}={value!r} is a {type(value).__name__}, expected {known}")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Settings from a mapping; a name that is no setting is a ValueError that lists the known ones. A list stands
        for a tuple, which JSON and YAML do not know."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"unknown setting {', '.join(map(repr, unknown))}: known are {', '.join(known)}")
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

    def require(self, condition: bool, message: str) -> None:
        """A ValueError with ``message`` unless ``condition`` holds."""
        if not condition:
            raise ValueError(message)


def _options(kind: Any) -> tuple[type, ...]:
    options = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    return tuple(get_origin(option) or option for option in options)


def _is(value: Any, kind: type) -> bool:
    if kind is NoneType:
        return value is None
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)
