"""Manifests, locators and entries that somebody made to hurt: typed errors only, in bounded time."""

from __future__ import annotations

import json
import runpy
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ciuic_async.errors import CiuicError, FormatVersionError, IntegrityError
from ciuic_async.format import entry, jsontext, layout, manifest, segment
from ciuic_async.format import locator as locators
from ciuic_async.format.chain_file import ChainFile

RECIPE = runpy.run_path(str(Path(__file__).parent.parent / "format" / "make_golden.py"))
FILES: dict[str, bytes] = RECIPE["files"]()
SNAPSHOT: str = RECIPE["SNAPSHOT"]
ROOT, PART = layout.manifest_root(SNAPSHOT), layout.manifest_part(SNAPSHOT, 0)
LOCATOR, SEGMENT = layout.locator(SNAPSHOT, 0), layout.segment(SNAPSHOT, 0, 0)
DISTINCT: dict[bytes, int] = RECIPE["snapshot_manifest"]().distinct_chunks()
QUICKLY_S = 1.0


def read(name: str, data: bytes) -> object:
    """Everything that a reader of this file parses."""
    if name == ROOT:
        return manifest.decode_root(data, SNAPSHOT)
    if name == PART:
        return manifest.assemble(manifest.decode_root(FILES[ROOT], SNAPSHOT), [data])
    if name == LOCATOR:
        return locators.decode(data, SNAPSHOT, 0, DISTINCT)
    if name == layout.CHAIN_FILE:
        return ChainFile.decode(data)
    if name != SEGMENT:
        return entry.decode(data, 1)
    trailer = segment.parse_trailer(data[-64:], len(data), SEGMENT)
    index = segment.parse_index(data[trailer.index_offset_bytes : -64], trailer, SEGMENT)
    headers = [segment.parse_record_header(data[item.offset_bytes :], SEGMENT) for item in index]
    return segment.parse_file_header(data, SEGMENT), headers


def check_typed(name: str, data: bytes) -> None:
    """Read or refused, but never another error than ours."""
    refusal: CiuicError | None = None
    try:
        read(name, data)
    except (IntegrityError, FormatVersionError) as error:
        refusal = error
    assert refusal is None or (refusal.where and len(str(refusal)) < 1000)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from([0, 1, -1, 2**31, 2**53 - 1, -(2**53) + 1])
    | st.sampled_from(["", "..", "/", "\0", "\n", "0", "zz", "0" * 64, "ciuic.json", "nan", "x" * 5000]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["path", "x", ""]), inner, max_size=2),
    max_leaves=5,
)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in items for place in [(value, key), *_places(item)]]


@pytest.mark.parametrize("name", sorted(set(FILES) - {SEGMENT}))
@given(data=st.data())
def test_any_value_anywhere(name: str, data: st.DataObject) -> None:
    """Whatever stands in place of whatever value, a reader raises only typed errors (or understands it)."""
    value = json.loads(FILES[name])
    for _ in range(data.draw(st.integers(1, 3))):
        container, key = data.draw(st.sampled_from(_places(value)))
        if key in container if isinstance(container, dict) else key < len(container):
            container[key] = data.draw(VALUES)
    if name == LOCATOR and isinstance(value, dict) and data.draw(st.booleans()):
        value.pop("digest", None)
        value["digest"] = segment.digest(jsontext.encode(value)).hex()
    check_typed(name, jsontext.encode(value))


@pytest.mark.parametrize("name", sorted(FILES))
@given(data=st.data())
def test_any_bytes_anywhere(name: str, data: st.DataObject) -> None:
    """Whatever bytes are replaced, inserted or cut, a reader raises only typed errors."""
    changed = bytearray(FILES[name])
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(changed)))
        end = data.draw(st.integers(start, min(len(changed), start + 40)))
        changed[start:end] = data.draw(st.binary(max_size=40))
    check_typed(name, bytes(changed))


@pytest.mark.parametrize("name", [SEGMENT])
@given(data=st.data())
def test_any_field_of_a_segment(name: str, data: st.DataObject) -> None:
    """Whatever numbers stand in the trailer and index, reading stays inside the file."""
    changed = bytearray(FILES[name])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.sampled_from([len(changed) - 64 + 8 * n for n in range(4)] + list(range(0, 2048, 8))))
        number = data.draw(st.sampled_from([0, 1, 64, 128, 4096, 2**31, 2**32, 2**63, 2**64 - 64, 2**64 - 1]))
        changed[at : at + 8] = number.to_bytes(8, "little")
    check_typed(name, bytes(changed))


def _with_tensor(shape: list[int], shards: list[dict[str, Any]]) -> bytes:
    value = json.loads(FILES[PART])
    value["tensors"][0] |= {"shape": shape, "shards": shards}
    return jsontext.encode(value)


def check_quickly_refused(data: bytes) -> None:
    begin = time.thread_time()
    with pytest.raises(CiuicError):
        read(PART, data)
    assert time.thread_time() - begin < QUICKLY_S


def _shard(offsets: list[int], sizes: list[int]) -> dict[str, Any]:
    return {"offsets": offsets, "sizes": sizes, "chunk_size_bytes": 1 << 20, "digests": "00" * 32}


def test_many_shards_that_a_comparison_of_pairs_would_die_of() -> None:
    """10,000 boxes side by side, one of them a copy of its neighbour, are refused within a second of computing."""
    count = 10_000
    shards = [_shard([0, n], [2, 1]) for n in range(count)]
    shards[count // 2] = dict(shards[count // 2 - 1])
    check_quickly_refused(_with_tensor([2, count], shards))


def test_shards_along_very_many_dimensions() -> None:
    """Boxes cut along 60 dimensions have 2^60 corners; they are refused without counting them."""
    sizes = [2] * 47
    check_quickly_refused(_with_tensor([2] * 47, [_shard([0] * 47, sizes), _shard([0] * 47, [1] * 47)]))
    halves = [_shard([n] * 40, [1] * 40) for n in range(2)] * 2
    check_quickly_refused(_with_tensor([2] * 40, halves))


def test_empty_shards_without_number() -> None:
    """Very many empty boxes of an empty tensor are only slow in proportion."""
    shards = [{"offsets": [0, 0], "sizes": [0, 5], "chunk_size_bytes": 16, "digests": ""}] * 10_000
    check_quickly_refused(_with_tensor([0, 5], shards))


def test_very_many_tensors_of_nothing() -> None:
    """10,000 malformed tensors are refused at the first."""
    value = json.loads(FILES[PART])
    value["tensors"] = [{}] * 10_000
    check_quickly_refused(jsontext.encode(value))


def test_names_long_and_strange_do_not_fill_a_message() -> None:
    """Paths of a megabyte, with line feeds and escapes, end up shortened in a message."""
    value = json.loads(FILES[PART])
    value["tensors"][0] |= {"path": ["\n\x1b[2J" * 250_000], "dtype": "nothing"}
    with pytest.raises(FormatVersionError) as caught:
        read(PART, jsontext.encode(value))
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
