"""The one JSON dialect of all files: canonical, integers only, bounded (docs/format.md, section 2).

For the values it admits the encoding equals RFC 8785, as long as keys stay within the Basic Multilingual Plane (RFC
8785 sorts keys by UTF-16 units, this dialect by code points). ``decode`` treats its input as hostile: size and depth
are checked before parsing, and the text must be exactly what ``encode`` would write, so no byte of a file is without
meaning. ``encode`` refuses what ``decode`` would refuse: nothing unreadable is ever written.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Any, NoReturn

from ciuic_async.errors import IntegrityError

MAX_SAFE_INTEGER = 2**53 - 1
MAX_DEPTH = 400

Json = None | bool | int | str | list[Any] | dict[str, Any]

# Possessive, and an unterminated string takes the rest: linear time and constant memory on any input.
_STRINGS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_FLOAT = re.compile(rb"[0-9](?:\.|e)")
_LONG_INTEGER = re.compile(rb"[0-9]{16,}")
_BATCH_ITEMS = 512
_BRACKETS = b"[]{}"
_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in _BRACKETS)
_STEPS = bytes.maketrans(_BRACKETS, b"\x01\xff\x01\xff")  # as signed bytes: +1 opens, -1 closes


def encode(value: Json) -> bytes:
    """Canonical UTF-8 text of ``value``: keys sorted, no white space.

    Raises:
        ValueError: a float, an integer beyond 2^53 - 1, a lone surrogate, a depth above ``MAX_DEPTH`` or another value
            that this dialect cannot hold.
    """
    try:
        data = _write(value)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from None
    _check(data)
    return data


def _check(data: bytes) -> None:
    """Raise ValueError where ``decode`` would refuse what ``_write`` wrote."""
    bare = _STRINGS.sub(b"", data)
    if _FLOAT.search(bare):
        raise ValueError("a float has no place in this JSON: only integers are allowed")
    for match in _LONG_INTEGER.finditer(bare):
        if len(match[0]) > 16 or int(match[0]) > MAX_SAFE_INTEGER:
            raise ValueError(f"an integer of {len(match[0])} digits is beyond 2^53 - 1")
    if _deepest(bare) > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH}")


# --- texts of which most stays the same -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hole:
    """Stands in a value where another will be filled in."""

    number: int


@dataclass(frozen=True, slots=True)
class Template:
    """A canonical text with holes: ``pieces``, and between them the holes of these ``numbers``, in order."""

    pieces: tuple[bytes, ...]
    numbers: tuple[int, ...]

    def fill(self, texts: Sequence[bytes]) -> bytes:
        """What ``encode`` gives of the value with its holes filled; ``texts[number]`` encodes what goes there.

        Depth is not checked again: whoever fills in containers bounds them.
        """
        result = [b""] * (2 * len(self.pieces) - 1)
        result[::2] = self.pieces
        result[1::2] = [texts[number] for number in self.numbers]
        return b"".join(result)

    def insert(self, number: int, inner: Template) -> Template:
        """This text with ``inner`` in the place of the only hole of this number."""
        at = self.numbers.index(number)
        return Template(
            (
                *self.pieces[:at],
                *_glued(self.pieces[at], inner.pieces, self.pieces[at + 1]),
                *self.pieces[at + 2 :],
            ),
            (*self.numbers[:at], *inner.numbers, *self.numbers[at + 1 :]),
        )


def _glued(before: bytes, pieces: tuple[bytes, ...], after: bytes) -> list[bytes]:
    result = list(pieces)
    result[0] = before + result[0]
    result[-1] += after
    return result


def encode_list_template(items: Iterable[Any]) -> Template:
    """Like ``encode_template`` of a list, without holding all of it at once in memory."""
    pieces, numbers = [b"["], list[int]()
    items = iter(items)
    while batch := list(islice(items, _BATCH_ITEMS)):
        template = encode_template(batch)
        first = template.pieces[0][1:]  # without the bracket
        pieces[-1] += b"," * (pieces != [b"["]) + first
        pieces += template.pieces[1:]
        pieces[-1] = pieces[-1][:-1]
        numbers += template.numbers
    pieces[-1] += b"]"
    return Template(tuple(pieces), tuple(numbers))


def encode_template(value: Any) -> Template:
    """Like ``encode``, for a value in which ``Hole`` stands here and there, though not as a key.

    Raises:
        ValueError: like ``encode``.
    """
    mark = "\0hole "
    while True:
        count = 0

        def marked(item: object, mark: str = mark) -> str:
            nonlocal count
            if not isinstance(item, Hole):
                raise ValueError(f"JSON holds no {type(item).__name__}")
            count += 1
            return f"{mark}{item.number}"

        try:
            data = _write(value, marked)
        except RecursionError:
            raise ValueError(f"nested deeper than {MAX_DEPTH}") from None
        parts = re.split(re.escape(_write(mark)[:-1]) + rb'([0-9]+)"', data)
        if len(parts) == 2 * count + 1:
            _check(data)
            return Template(tuple(parts[::2]), tuple(map(int, parts[1::2])))
        mark += " "  # the value has this very text somewhere: look for another one


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
    bare = _STRINGS.sub(b"", data)
    if bare.count(b"[") + bare.count(b"{") > MAX_DEPTH and _deepest(bare) > MAX_DEPTH:
        raise IntegrityError(f"{what}: JSON nested deeper than {MAX_DEPTH}", kind="json_too_deep", where=what)
    try:
        value: Json = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_float=_refuse,
            parse_int=_parse_int if _LONG_INTEGER.search(bare) else None,  # a call for each takes as long as the rest
            parse_constant=_refuse,
        )
        canonical = _write_or_none(value)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{what}: not valid JSON: {error}", kind="json_syntax", where=what) from None
    if canonical != data:
        raise IntegrityError(
            f"{what}: JSON is not in canonical form (sorted keys, no white space); the file was changed",
            kind="json_not_canonical",
            where=what,
        )
    return value


def _write(value: Json, default: Callable[[Any], str] | None = None) -> bytes:
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=default
    )
    return text.encode("utf-8")


def _write_or_none(value: Json) -> bytes | None:
    try:
        return _write(value)
    except ValueError:  # an escaped lone surrogate parses, but has no canonical form
        return None


def _deepest(bare: bytes) -> int:
    """Deepest nesting of brackets in text without strings. One pass, no recursion."""
    steps = array("b", bare.translate(_STEPS, _NO_BRACKETS))
    return max(accumulate(steps), default=0)


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
