"""Deterministic changes to bytes: at random places, to numbers, to pieces, and to JSON by its structure.

The same seed of the generator gives the same bytes on every machine.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ciuic_async.format import jsontext

MAX_BYTES = 1 << 16
"""Mutations do not get longer than this, or than what they were made from."""

NUMBERS = (
    *(0, 1, 2, 3, 4, 15, 16, 17, 63, 64, 127, 128, 255, 256, 4095, 4096, 65535, 65536),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1),
)
_DIGITS = re.compile(rb"[0-9]+")
_VALUES: tuple[Any, ...] = (
    *(None, True, False, "", "x", "../../x", "\0", "ü", "00" * 32, [], {}, [[]], [1, 2, 3], {"tensor": 0}, {"hole": 0}),
    *(number for number in NUMBERS if number <= jsontext.MAX_SAFE_INTEGER),
    *(-1, -(2**53) + 1, {"int": "-0x20000000000000"}, {"bytes": "AA=="}, {"dict": [[1, 2]]}),
)


def mutated(data: bytes, others: Sequence[bytes], source: random.Random) -> bytes:
    """``data`` after one to four changes; ``others`` are what pieces may come from."""
    for _ in range(source.choice((1, 1, 1, 2, 4))):
        data = source.choice(_CHANGES)(data, others, source)
    return data[: max(MAX_BYTES, *map(len, others))]


def mutations(data: bytes, others: Sequence[bytes], count: int, seed: str) -> Iterator[bytes]:
    """``count`` of them; the first are truncations at evenly spread places."""
    truncations = min(len(data), count // 8)
    for number in range(truncations):
        yield data[: len(data) * number // truncations]
    source = random.Random(seed)
    for _ in range(count - truncations):
        yield mutated(data, others, source)


def _flip(data: bytes, others: Sequence[bytes], source: random.Random) -> bytes:
    changed = bytearray(data or b"\0")
    changed[source.randrange(len(changed))] ^= 1 << source.randrange(8)
    return bytes(changed)


def _byte(data: bytes, others: Sequence[bytes], source: random.Random) -> bytes:
    changed = bytearray(data or b"\0")
    changed[source.randrange(len(changed))] = source.randrange(256)
    return bytes(changed)


def _cut(data: bytes, others: Sequence[bytes], source: random.Random) -> bytes:
    start = source.randrange(len(data) + 1)
    return data[:start] + data[start + source.choice((1, 2, 4, 8, 32, 64, len(data))) :]


def _repeat(data: bytes, others: Sequence[bytes], source: random.Random) -> bytes:
    start = source.randrange(len(data) + 1)
    size = source.choice((1, 2, 4, 8, 32, 64, 256))
    return data[: start + size] + data[start:]


def _splice(data: bytes, others: Sequence[bytes], source: random.Random) -> bytes:
    other = source.choice(others)
    start = source.randrange(len(data) + 1)
    there = source.randrange(len(other) + 1)
    size = source.choice((1, 8, 32, 64, 256, 1024))
    kept = start + size * source.randrange(2)  # put in, or put over
    return data[:start] + other[there : there + size] + data[kept:]


def _binary_number(data: bytes, others: Sequence[bytes], source: random.Random) -> bytes:
    size = source.choice((1, 2, 4, 8))
    at = source.randrange(len(data) + 1)
    if source.randrange(4):
        at -= at % size
    value = source.choice(NUMBERS)
    if source.randrange(2):
        value = int.from_bytes(data[at : at + size], "little") + source.choice((-64, -8, -1, 1, 8, 64))
    return data[:at] + (value % (1 << 8 * size)).to_bytes(size, source.choice(("little", "big"))) + data[at + size :]


def _decimal_number(data: bytes, others: Sequence[bytes], source: random.Random) -> bytes:
    found = list(_DIGITS.finditer(data))
    if not found:
        return _byte(data, others, source)
    place = source.choice(found)
    value = source.choice(NUMBERS)
    if source.randrange(2) and len(place[0]) < 18:
        value = max(0, int(place[0]) + source.choice((-16, -1, 1, 16)))
    return data[: place.start()] + b"%d" % value + data[place.end() :]


def _json(data: bytes, others: Sequence[bytes], source: random.Random) -> bytes:
    """One line of JSON changed by its structure, canonical again."""
    lines = data.split(b"\n")
    number = source.randrange(len(lines))
    try:
        root = [json.loads(lines[number])]
        for _ in range(source.choice((1, 1, 2, 3))):
            _edit(root, source)
        lines[number] = jsontext.encode(root[0])
    except (ValueError, RecursionError):
        return _decimal_number(data, others, source)
    return b"\n".join(lines)


def _edit(root: list[Any], source: random.Random) -> None:
    container, place = _any_place(root, source)
    value = container[place]
    match source.randrange(6):
        case 0:
            container[place] = json.loads(json.dumps(source.choice(_VALUES)))
        case 1:
            other, there = _any_place(root, source)
            container[place] = json.loads(json.dumps(other[there]))
        case 2 if container is not root:
            del container[place]
        case 3 if isinstance(container, list) and container is not root:
            container.insert(place, json.loads(json.dumps(value)))
        case 4 if isinstance(container, dict):
            container[source.choice(("x", "dict", "tensor", "hole", "int"))] = container.pop(place)
        case _ if type(value) is int:
            container[place] = value + source.choice((-4096, -64, -1, 1, 64, 4096))
        case _ if isinstance(value, str) and value:
            at = source.randrange(len(value))
            container[place] = value[:at] + source.choice("0f/x.\n") + value[at + 1 :]
        case _:
            container[place] = source.choice((None, 0, "", 1))


def _any_place(root: list[Any], source: random.Random) -> tuple[Any, Any]:
    """A container and a key or index of it, found by a walk from the root."""
    container: Any = root
    place: Any = 0
    while isinstance(inner := container[place], list | dict) and inner and source.randrange(6):
        container = inner
        place = source.choice(sorted(inner)) if isinstance(inner, dict) else source.randrange(len(inner))
    return container, place


_CHANGES: tuple[Callable[[bytes, Sequence[bytes], random.Random], bytes], ...] = (
    *(_flip, _byte, _cut, _repeat, _splice, _binary_number, _binary_number, _decimal_number, _json, _json, _json),
)
