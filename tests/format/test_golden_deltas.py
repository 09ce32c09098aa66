"""Golden bytes of deltas, rotated planes and locators with bases: written as they were, and read to the same chunks."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from ciuic_async import native
from ciuic_async.codecs.decode import decode
from ciuic_async.errors import FormatVersionError, IntegrityError
from ciuic_async.format import layout, segment
from ciuic_async.format import locator as locators
from ciuic_async.format.digest import digest

HERE = Path(__file__).parent
RECIPE = runpy.run_path(str(HERE / "make_golden_deltas.py"))
GOLDEN = HERE / "golden" / "v1-deltas"
NEW: str = RECIPE["NEW"]


def read_locator(data: bytes) -> locators.Locator:
    return locators.decode(data, NEW, 0, RECIPE["distinct"]())


def resolve(found: locators.Locator, chunk: bytes) -> bytes:
    """The chunk, decoded from its base upwards; every step has the digest that the next one names."""
    place = found.place(chunk)
    assert place is not None
    data = (GOLDEN / place.segment.path).read_bytes()
    assert (len(data), data[-32:]) == (place.segment.size_bytes, place.segment.digest)
    record = data[place.offset_bytes : place.offset_bytes + place.record_size_bytes]
    header = segment.parse_record_header(record, place.segment.path)
    assert (header.codec, header.depth, header.digest) == (place.codec, place.depth, chunk)
    base = memoryview(resolve(found, header.base)) if header.depth else None
    out = bytearray(header.raw_size_bytes)
    decode(header, record[header.size_bytes :], memoryview(out), base)
    assert digest(out) == chunk
    return bytes(out)


def test_todays_code_writes_the_golden_bytes() -> None:
    """From the same inputs come the same bytes, and nothing else lies in the folder."""
    on_disk = {str(path.relative_to(GOLDEN)): path.read_bytes() for path in GOLDEN.rglob("*") if path.is_file()}
    assert RECIPE["files"]() == on_disk


@pytest.mark.parametrize("compiled", [False, True])
def test_the_locator_leads_to_chunks_through_their_bases(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain of two deltas of both methods, and rotated planes, decode to the recipe's items, compiled or plain."""
    if not compiled:
        monkeypatch.setattr(native, "core", None)
    found = read_locator((GOLDEN / layout.locator(NEW, 0)).read_bytes())
    assert found == RECIPE["locator"]()
    assert resolve(found, RECIPE["DIGESTS"]["third"]) == RECIPE["CHUNKS"]["third"]
    assert resolve(found, digest(RECIPE["ROTATED"])) == RECIPE["ROTATED"]
    assert [layout.owner(reference.path) for reference in found.segments()] == [NEW, RECIPE["OLD"]]


def test_every_changed_byte_of_the_locator_is_refused() -> None:
    """Rows of bases are covered by the locator's own digest like all others."""
    data = (GOLDEN / layout.locator(NEW, 0)).read_bytes()
    for at in range(len(data)):
        with pytest.raises((IntegrityError, FormatVersionError)):
            read_locator(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
