"""The one JSON dialect of all files: canonical, integers only, bounded (docs/format.md, section 2).

For the values it admits the encoding equals RFC 8785. ``decode`` treats its input as hostile: size and depth are
checked before parsing, and the text must be exactly what ``encode`` would write, so no byte of a file is without
meaning.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from ciuic_async.errors import IntegrityError

MAX_SAFE_INTEGER = 2**53 - 1
MAX_DEPTH = 400

Json = None | bool | int | str | list[Any] | dict[str, Any]

_STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)


def encode(value: Json) -> bytes:
    """Canonical UTF-8 text of ``value``: keys sorted, no white space.

    Raises:
        ValueError: a float, a lone surrogate or another value that JSON or UTF-8 cannot hold.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def decode(data: bytes, *, what: str, limit_bytes: int) -> Json:
    """Parse canonical JSON.

    Args:
        data: the whole file.
        what: name of the file, for messages.
        limit_bytes: larger input is refused unread.

    Raises:
        IntegrityError: ``kind`` is ``json_too_large``, ``json_too_deep``, ``json_syntax`` or ``json_not_canonical``.
    """
    if len(data) > limit_bytes:
        raise IntegrityError(
            f"{what}: JSON of {len(data)} bytes, at most {limit_bytes} are allowed", kind="json_too_large", where=what
        )
    if _depth(data) > MAX_DEPTH:
        raise IntegrityError(f"{what}: JSON nested deeper than {MAX_DEPTH}", kind="json_too_deep", where=what)
    try:
        value: Json = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_float=_refuse,
            parse_int=_parse_int,
            parse_constant=_refuse,
        )
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{what}: not valid JSON: {error}", kind="json_syntax", where=what) from None
    if _encode_or_none(value) != data:
        raise IntegrityError(
            f"{what}: JSON is not in canonical form (sorted keys, no white space); the file was changed",
            kind="json_not_canonical",
            where=what,
        )
    return value


def _encode_or_none(value: Json) -> bytes | None:
    try:
        return encode(value)
    except ValueError:  # an escaped lone surrogate parses, but has no canonical form
        return None


def _depth(data: bytes) -> int:
    """Deepest nesting of brackets outside strings. One pass, no recursion."""
    if data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return 0
    depth = deepest = 0
    for byte in _STRINGS.sub(b"", data):
        if byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
            if deepest > MAX_DEPTH:
                break
        elif byte in b"]}":
            depth -= 1
    return deepest


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object has a key twice")
    return result


def _parse_int(text: str) -> int:
    if len(text) > 17 or abs(int(text)) > MAX_SAFE_INTEGER:
        raise ValueError(f"integer of {len(text)} digits is beyond 2^53 - 1")
    return int(text)


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text[:40]} is not allowed: only integers are")
