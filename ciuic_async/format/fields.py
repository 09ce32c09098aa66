"""Checked access to the fields of parsed JSON: every reader of a hostile file goes through these."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ciuic_async.errors import FormatVersionError, IntegrityError
from ciuic_async.format.jsontext import MAX_SAFE_INTEGER

_HEX = re.compile(r"(?:[0-9a-f]{2})*+")


def malformed(what: str, message: str) -> IntegrityError:
    """The error for a field that is not what the format says."""
    return IntegrityError(f"{what}: {message}", kind="malformed", where=what)


class Fields:
    """One JSON object: each getter checks presence and type; ``done`` refuses unknown keys.

    Args:
        value: what was parsed, any type.
        what: name of the file and place, for messages.
    """

    def __init__(self, value: object, what: str) -> None:
        if not isinstance(value, dict):
            raise malformed(what, f"expected an object, found {type(value).__name__}")
        self._value: dict[str, Any] = value
        self._seen: set[str] = set()
        self.what = what

    def __contains__(self, name: str) -> bool:
        return name in self._value

    def raw(self, name: str) -> Any:
        self._seen.add(name)
        if name not in self._value:
            raise malformed(self.what, f"field {name!r} is missing")
        return self._value[name]

    def string(self, name: str) -> str:
        value = self.raw(name)
        if not isinstance(value, str):
            raise malformed(self.what, f"field {name!r}: expected a string, found {type(value).__name__}")
        return value

    def matching(self, name: str, pattern: re.Pattern[str]) -> str:
        """A string that matches ``pattern`` as a whole."""
        value = self.string(name)
        if not pattern.fullmatch(value):
            raise malformed(self.what, f"field {name!r}: {value[:80]!r} does not match {pattern.pattern}")
        return value

    # A manifest has many thousands of fields: what a field is called is put into words only when something is wrong.

    def integer(self, name: str, *, low: int = 0, high: int = MAX_SAFE_INTEGER) -> int:
        value = self.raw(name)
        if type(value) is int and low <= value <= high:
            return value
        return check_integer(value, f"{self.what}: field {name!r}", low=low, high=high)

    def hex(self, name: str, size_bytes: int | None = None) -> bytes:
        return check_hex(self.raw(name), f"{self.what}: field {name!r}", size_bytes)

    def array(self, name: str) -> list[Any]:
        value = self.raw(name)
        return value if isinstance(value, list) else check_array(value, f"{self.what}: field {name!r}")

    def integers(self, name: str, *, low: int = 0) -> tuple[int, ...]:
        for item in (items := self.array(name)):
            if type(item) is not int or not low <= item <= MAX_SAFE_INTEGER:
                check_integer(item, f"{self.what}: field {name!r}", low=low)
        return tuple(items)

    def strings(self, name: str) -> tuple[str, ...]:
        items = self.array(name)
        if not all(isinstance(item, str) for item in items):
            raise malformed(self.what, f"field {name!r}: expected strings only")
        return tuple(items)

    def object(self, name: str) -> Fields:
        return Fields(self.raw(name), f"{self.what}: field {name!r}")

    def schema(self, expected: str) -> None:
        """Check the ``schema`` field; another version of the same schema asks for an upgrade."""
        found = self.string("schema")
        if found == expected:
            return
        if found.rpartition("/v")[0] == expected.rpartition("/v")[0]:
            raise FormatVersionError(
                f"{self.what}: written as {found[:80]}, this version reads {expected}; upgrade ciuic-async",
                where=self.what,
            )
        raise malformed(self.what, f"expected schema {expected!r}, found {found[:80]!r}")

    def features(self, known: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The required and optional feature names; an unknown required one is a ``FormatVersionError``."""
        required, optional = self.strings("features_required"), self.strings("features_optional")
        unknown = [name for name in required if name not in known]
        if unknown:
            raise FormatVersionError(
                f"{self.what}: needs the feature {unknown[0][:80]!r}, unknown to this version; upgrade ciuic-async",
                kind="unknown_feature",
                where=self.what,
            )
        return required, optional

    def done(self) -> None:
        """Refuse keys that nobody asked for."""
        if len(self._seen) != len(self._value):  # every name that was seen is there
            unknown = sorted(set(self._value) - self._seen)
            raise malformed(self.what, f"unknown field {unknown[0][:80]!r}")


def check_integer(value: object, what: str, *, low: int = 0, high: int = MAX_SAFE_INTEGER) -> int:
    """``value`` if it is an integer (no bool) in ``low..high``."""
    if type(value) is not int or not low <= value <= high:
        raise malformed(what, f"expected an integer in {low}..{high}, found {_shown(value)}")
    return value


def check_hex(value: object, what: str, size_bytes: int | None = None) -> bytes:
    """The bytes of a lower-case hex string; ``bytes.fromhex`` alone would take spaces and capitals."""
    expected = "hex" if size_bytes is None else f"{2 * size_bytes} hex digits"
    if not isinstance(value, str) or (size_bytes is not None and len(value) != 2 * size_bytes):
        raise malformed(what, f"expected {expected}, found {_shown(value)}")
    if not _HEX.fullmatch(value):
        raise malformed(what, f"expected {expected}, found {_shown(value)}")
    return bytes.fromhex(value)


def check_array(value: object, what: str) -> list[Any]:
    """``value`` if it is a JSON array."""
    if not isinstance(value, list):
        raise malformed(what, f"expected an array, found {type(value).__name__}")
    return value


def _shown(value: object) -> str:
    """A hostile value for a message, short whatever it is."""
    if isinstance(value, str):
        return repr(value[:80])
    return repr(value)[:80] if isinstance(value, int) else type(value).__name__
