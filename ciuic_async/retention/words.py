"""Numbers with units, and names, as they stand in the text of a policy. Writing and reading are inverse."""

from __future__ import annotations

import re

from ciuic_async.errors import UsageError

SECONDS = {"w": 604800, "d": 86400, "h": 3600, "m": 60, "s": 1}
BYTES = {
    "TB": 10**12, "GB": 10**9, "MB": 10**6, "kB": 10**3,
    "TiB": 2**40, "GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "B": 1,
}  # fmt: skip
_SPECIAL = re.compile(r"[%|,:= ]")
_QUOTED = re.compile(r"%([0-9A-F]{2})")
_NUMBER = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,20})?|[0-9.]{1,24}e[+-]?[0-9]{1,3})\s*([A-Za-z]*)")


def quote(name: str) -> str:
    """A name in which nothing means something else: ``%``, ``|``, ``,``, ``:``, ``=`` and spaces become ``%XX``."""
    return _SPECIAL.sub(lambda match: f"%{ord(match[0]):02X}", name)


def unquote(text: str) -> str:
    """The name that was quoted. A lone ``%`` stands for itself."""
    return _QUOTED.sub(lambda match: chr(int(match[1], 16)), text)


def duration(seconds: float) -> str:
    """``2d``, ``90m``, ``0.5s``: the largest unit that divides it."""
    if seconds != int(seconds):
        return f"{seconds!r}s"
    unit = next(unit for unit, value in SECONDS.items() if int(seconds) % value == 0)
    return f"{int(seconds) // SECONDS[unit]}{unit}"


def size(size_bytes: int) -> str:
    """``100GB``, ``1500kB``, ``1234B``: the largest decimal unit that divides it."""
    unit = next(unit for unit, value in BYTES.items() if not unit.endswith("iB") and size_bytes % value == 0)
    return f"{size_bytes // BYTES[unit]}{unit}"


def read_duration(text: str, what: str) -> float:
    """Seconds. A number without a unit is seconds. Raises UsageError."""
    return _read(text, what, SECONDS, "s", "30m, 24h, 2d or 4w")


def read_size(text: str, what: str) -> int:
    """Bytes. A number without a unit is bytes; capitals do not matter. Raises UsageError."""
    return int(_read(text, what, BYTES, "B", "500MB, 100GB or 1TiB"))


def _read(text: str, what: str, units: dict[str, int], default: str, examples: str) -> float:
    match = _NUMBER.fullmatch(text.strip())
    values = {unit.lower(): value for unit, value in units.items()}
    unit = (match[2] or default).lower() if match else ""
    if match is None or unit not in values:
        raise UsageError(f"{what}: expected e.g. {examples}, found {text!r}")
    if match[1].isdigit():
        return int(match[1]) * values[unit]
    try:
        return float(match[1]) * values[unit]
    except ValueError:
        raise UsageError(f"{what}: {match[1]!r} is no number") from None
