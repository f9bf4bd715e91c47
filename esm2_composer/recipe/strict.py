"""A mapping from YAML to dataclasses: keys are fields, values have the field's type and range."""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import re
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, TypeVar

from esm2_composer.errors import UserError

Section = TypeVar("Section")

TYPE_NAMES = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
# What annotated_types' Ge, Gt, Le and Lt require, by the attribute that each has.
LIMITS = {
    "ge": (operator.ge, "at least"),
    "gt": (operator.gt, "above"),
    "le": (operator.le, "at most"),
    "lt": (operator.lt, "below"),
}


def build(cls: type[Section], content: Any, path: str) -> Section:
    """A dataclass instance from what the file at `path` holds.

    Raises:
        UserError: a key is unknown or missing, or a value is not of its field's type, or not in its range.
    """
    return _Reader(cls, path).section(cls, content, "")


@dataclasses.dataclass(frozen=True)
class _Reader:
    root: type
    path: str

    def section(self, cls: type, content: Any, prefix: str) -> Any:
        if not isinstance(content, dict):
            raise self._mistake(f"'{prefix.rstrip('.')}' must be a mapping of keys, not {content!r}")
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for key in content:
            if key not in fields:
                raise self._mistake(f"unknown key '{prefix}{key}'; {self._where(str(key), [*fields], prefix)}")
        hints = typing.get_type_hints(cls, include_extras=True)
        values = {}
        for name, field in fields.items():
            if name in content:
                values[name] = self._value(hints[name], content[name], f"{prefix}{name}")
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise self._mistake(f"key '{prefix}{name}' is missing")
        return cls(**values)

    def _where(self, key: str, known: Sequence[str], prefix: str) -> str:
        """Which key was meant: a similar one of the section, or the same one in another section."""
        meant = [prefix + name for name in _alike(key, known)]
        meant += [name for name in _keys(self.root) if name.endswith(f".{key}")]
        return f"did you mean '{meant[0]}'?" if meant else f"known here: {', '.join(known)}"

    def _value(self, hint: Any, value: Any, key: str) -> Any:
        origin, args = typing.get_origin(hint), typing.get_args(hint)
        if origin is Annotated:
            return self._in_range(hint.__metadata__, self._value(args[0], value, key), key)
        if origin in (types.UnionType, typing.Union):
            if value is None and type(None) in args:
                return None
            (inner,) = (a for a in args if a is not type(None))
            return self._value(inner, value, key)
        if dataclasses.is_dataclass(hint):
            return self.section(hint, value, f"{key}.")
        if origin is Literal:
            return self._one_of(args, value, key)
        if origin is tuple:
            if not isinstance(value, list) or (args[-1] is not Ellipsis and len(value) != len(args)):
                count = "" if args[-1] is Ellipsis else f"{len(args)} "
                raise self._mistake(f"'{key}' must be a list of {count}values, not {value!r}")
            return tuple(self._value(args[0], item, f"{key}[{i}]") for i, item in enumerate(value))
        if hint is float and isinstance(value, int) and not isinstance(value, bool):
            try:
                return float(value)
            except OverflowError:
                raise self._mistake(f"'{key}' is too large a number") from None
        if hint is str and isinstance(value, int) and not isinstance(value, bool):
            return str(value)  # run_name: 17
        if hint is int and isinstance(value, str) and re.fullmatch(r"[0-9]{1,3}(_[0-9]{3})+", value):
            return int(value)  # schedule.updates: 500_000
        if hint is float and isinstance(value, float) and not math.isfinite(value):
            raise self._mistake(f"'{key}' must be a finite number, not {value}")
        if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
            raise self._mistake(f"'{key}' must be {TYPE_NAMES[hint]}, not {value!r}")
        if hint is str and not value.strip():
            raise self._mistake(f"'{key}' is empty")
        if hint is str and not value.isprintable():
            raise self._mistake(f"'{key}' is {value!r}; leave out what cannot be printed")
        return value

    def _in_range(self, limits: Sequence[Any], value: Any, key: str) -> Any:
        for name, (holds, relation) in LIMITS.items():
            for bound in (getattr(limit, name) for limit in limits if hasattr(limit, name)):
                if not holds(value, bound):
                    raise self._mistake(f"'{key}' is {value}; it must be {relation} {bound}")
        return value

    def _one_of(self, allowed: Sequence[Any], value: Any, key: str) -> Any:
        if any(value == one and type(value) is type(one) for one in allowed):
            return value
        shown = [str(one).lower() if isinstance(one, bool) else str(one) for one in allowed]  # as in YAML
        hint = "".join(f"; did you mean '{near}'?" for near in _alike(str(value), shown))
        if isinstance(value, str) and value in shown:
            hint = ", without quotes"
        raise self._mistake(f"'{key}' is {value!r}; allowed: {', '.join(shown)}{hint}")

    def _mistake(self, message: str) -> UserError:
        return UserError(f"{self.path}: {message}")


def _alike(word: str, known: Sequence[str]) -> list[str]:
    """The most similar one, if any is similar."""
    return difflib.get_close_matches(word, known, n=1, cutoff=0.6)


def _keys(section: type, prefix: str = "") -> Iterator[str]:
    """All keys of a section, and of those in it, by their full names."""
    for name, hint in typing.get_type_hints(section).items():
        inner = [part for part in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(part)]
        yield from _keys(inner[0], f"{prefix}{name}.") if inner else (prefix + name,)
