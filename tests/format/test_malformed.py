"""The table of lies: malformed bytes left, the kind of the error right (docs/format.md, sections 1 to 6)."""

from __future__ import annotations

import copy
import json
import runpy
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ciuic_async.errors import CiuicError, FormatVersionError, IntegrityError, UsageError
from ciuic_async.format import entry, jsontext, layout, manifest, segment
from ciuic_async.format import locator as locators
from ciuic_async.format.chain_file import ChainFile
from ciuic_async.format.digest import digest

RECIPE = runpy.run_path(str(Path(__file__).parent / "make_golden.py"))
FILES: dict[str, bytes] = RECIPE["files"]()
SNAPSHOT: str = RECIPE["SNAPSHOT"]
ROOT, PART = layout.manifest_root(SNAPSHOT), layout.manifest_part(SNAPSHOT, 0)
LOCATOR = layout.locator(SNAPSHOT, 0)
OTHER = "f" * 20
QUICKLY_S = 1.0

Edit = Callable[[Any], object]


def edited(name: str, edit: Edit) -> bytes:
    """A golden file after ``edit`` changed its parsed value; canonical again."""
    value = json.loads(FILES[name])
    edit(value)
    return jsontext.encode(value)


def put(*path: str | int, value: Any) -> Edit:
    """An edit that sets the item at ``path``."""

    def edit(target: Any) -> None:
        for step in path[:-1]:
            target = target[step]
        target[path[-1]] = copy.deepcopy(value)

    return edit


def drop(*path: str | int) -> Edit:
    """An edit that removes the item at ``path``."""

    def edit(target: Any) -> None:
        for step in path[:-1]:
            target = target[step]
        del target[path[-1]]

    return edit


def check_refused(read: Callable[[], object], kind: str) -> None:
    """``read`` fails quickly with the right kind of the right class, and names a place."""
    begin = time.thread_time()
    with pytest.raises(CiuicError) as caught:
        read()
    assert time.thread_time() - begin < QUICKLY_S
    assert caught.value.kind == kind, str(caught.value)
    upgrade = kind in ("format_version", "unknown_feature", "unknown_dtype", "unknown_codec", "unknown_encryption")
    assert isinstance(caught.value, FormatVersionError if upgrade else IntegrityError)
    assert caught.value.where
    assert len(str(caught.value)) < 1000, "a hostile value must not fill the log"


# --- ciuic.json -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "kind"),
    [
        (put("format", value=2), "format_version"),
        (put("schema", value="ciuic.dev/chain/v2"), "format_version"),
        (put("schema", value="ciuic.dev/chain/v" + "9" * 50_000), "format_version"),
        (put("schema", value="ciuic.dev/entry/v1"), "malformed"),
        (put("schema", value="x" * 50_000), "malformed"),
        (put("digest", value="sha3"), "format_version"),
        (put("features_required", value=["time-travel"]), "unknown_feature"),
        (put("features_required", value=["x" * 50_000]), "unknown_feature"),
        (put("features_required", value=[1]), "malformed"),
        (put("features_required", value="none"), "malformed"),
        (put("features_optional", value=None), "malformed"),
        (put("origin", value="ciuic.dev/chain/" + "0F" * 16), "malformed"),
        (put("origin", value="ciuic.dev/chain/" + "0f" * 16 + "\n"), "malformed"),
        (put("origin", value="ciuic.dev/chain/../" + "0f" * 15), "malformed"),
        (put("chunk_size_bytes", value=0), "malformed"),
        (put("chunk_size_bytes", value=-4194304), "malformed"),
        (put("chunk_size_bytes", value=4194304 + 1), "malformed"),
        (put("chunk_size_bytes", value=1 << 40), "malformed"),
        (put("chunk_size_bytes", value=True), "malformed"),
        (put("chunk_size_bytes", value="4194304"), "malformed"),
        (put("extra", value=1), "malformed"),
        (drop("origin"), "malformed"),
        (drop("format"), "malformed"),
    ],
)
def test_chain_file(edit: Edit, kind: str) -> None:
    """Every field of ciuic.json is checked, and a newer version is told from damage."""
    check_refused(lambda: ChainFile.decode(edited("ciuic.json", edit)), kind)


def test_chain_file_too_large() -> None:
    """More than 64 KiB is refused before parsing."""
    check_refused(lambda: ChainFile.decode(b" " * (1 << 16) + FILES["ciuic.json"]), "json_too_large")


# --- manifest root ----------------------------------------------------------------------------------------------------

REFERENCE = {"path": PART, "sha256": "00" * 32, "size": 1}


@pytest.mark.parametrize(
    ("edit", "kind"),
    [
        (put("schema", value="ciuic.dev/manifest/v2"), "format_version"),
        (put("schema", value="ciuic.dev/manifest-part/v1"), "malformed"),
        (put("snapshot", value=OTHER), "malformed"),
        (put("features_required", value=["delta"]), "unknown_feature"),
        (put("top", value="list"), "malformed"),
        (put("world", value=0), "malformed"),
        (put("parts", value=[]), "malformed"),
        (put("parts", value=[REFERENCE, REFERENCE]), "malformed"),
        (put("parts", 0, "path", value=layout.manifest_part(SNAPSHOT, 1)), "malformed"),
        (put("parts", 0, "path", value=layout.manifest_part(OTHER, 0)), "bad_name"),
        (put("parts", 0, "path", value=f"manifests/{SNAPSHOT}/../../ciuic.json"), "bad_name"),
        (put("parts", 0, "path", value="/etc/passwd"), "bad_name"),
        (put("parts", 0, "path", value=f"manifests/{SNAPSHOT}/00.json"), "bad_name"),
        (put("parts", 0, "path", value=f"manifests/{SNAPSHOT}/0.json\n"), "bad_name"),
        (put("parts", 0, "path", value=f"manifests/{SNAPSHOT}/\u0660.json"), "bad_name"),
        (put("parts", 0, "path", value="ciuic.json"), "bad_name"),
        (put("parts", 0, "size", value=-1), "malformed"),
        (put("parts", 0, "sha256", value="00" * 31), "malformed"),
        (put("parts", 0, "sha256", value="AA" * 32), "malformed"),
        (put("parts", 0, "sha256", value="0 " * 32), "malformed"),
        (put("parts", 0, "extra", value=1), "malformed"),
        (put("chunks", "alg", value="rfc6962-sha512"), "malformed"),
        (put("chunks", "root", value="zz" * 32), "malformed"),
        (put("chunks", "extra", value=1), "malformed"),
        (put("raw_bytes", value=-1), "malformed"),
        (put("progress", value=[]), "malformed"),
        (put("progress", "extra", value=1), "malformed"),
        (put("environment", value={"torch": 2}), "malformed"),
        (put("environment", value=[]), "malformed"),
        (put("extra", value=1), "malformed"),
        (drop("chunks"), "malformed"),
    ],
)
def test_manifest_root(edit: Edit, kind: str) -> None:
    """Every field of a manifest's root is checked; references never leave the snapshot's folder."""
    check_refused(lambda: manifest.decode_root(edited(ROOT, edit), SNAPSHOT), kind)


# --- manifest parts ---------------------------------------------------------------------------------------------------

WEIGHT = ("tensors", 0)
WHOLE = (*WEIGHT, "shards", 0)
HALVES = ("tensors", 3, "shards")
D = "00" * 32


def _shards(*boxes: tuple[list[int], list[int]], size: int = 4 << 20) -> list[dict[str, Any]]:
    def count(sizes: list[int]) -> int:
        return 1 if manifest.volume(sizes) else 0

    return [{"offsets": o, "sizes": s, "chunk_size_bytes": size, "digests": D * count(s)} for o, s in boxes]


@pytest.mark.parametrize(
    ("edit", "kind"),
    [
        (put("schema", value="ciuic.dev/manifest-part/v2"), "format_version"),
        (put("snapshot", value=OTHER), "malformed"),
        (put("part", value=1), "malformed"),
        (put("rank", value=1), "malformed"),
        (put("extra", value=1), "malformed"),
        (put("trees", 0, "section", value="secret"), "malformed"),
        (put("trees", 0, "extra", value=1), "malformed"),
        (drop("trees", 0, "key"), "malformed"),
        (put("trees", 0, value=[]), "malformed"),
        # packs
        (put("packs", 0, "item_size_bytes", value=3), "malformed"),
        (put("packs", 0, "item_size_bytes", value=0), "malformed"),
        (put("packs", 0, "size_bytes", value=0), "malformed"),
        (put("packs", 0, "size_bytes", value=37), "malformed"),
        (put("packs", 0, "size_bytes", value=(64 << 20) + 4), "malformed"),
        (put("packs", 0, "digest", value=D[2:]), "malformed"),
        (put("packs", value=[]), "malformed"),
        (put("tensors", 1, "shards", 0, "pack", value=[1, 0]), "malformed"),
        (put("tensors", 1, "shards", 0, "pack", value=[0, 16]), "malformed"),
        (put("tensors", 1, "shards", 0, "pack", value=[0, 4]), "malformed"),
        (put("tensors", 1, "shards", 0, "pack", value=[0, 1 << 50]), "malformed"),
        (put("tensors", 1, "shards", 0, "pack", value=[0, -16]), "malformed"),
        (put("tensors", 1, "shards", 0, "pack", value=[0]), "malformed"),
        (put("tensors", 1, "shards", 0, "digests", value=""), "malformed"),
        # tensors
        (put(*WEIGHT, "dtype", value="float8_e9"), "unknown_dtype"),
        (put(*WEIGHT, "dtype", value="x" * 100_000), "unknown_dtype"),
        (put(*WEIGHT, "dtype", value=None), "malformed"),
        (put(*WEIGHT, "path", value="model.weight"), "malformed"),
        (put(*WEIGHT, "path", value=[None]), "malformed"),
        (put(*WEIGHT, "path", value=["x" * 100_000, True]), "malformed"),
        (put(*WEIGHT, "device", value=0), "malformed"),
        (put(*WEIGHT, "extra", value=0), "malformed"),
        (put(*WEIGHT, "shape", value=[-8, -8]), "malformed"),
        (put(*WEIGHT, "shape", value=["8", 8]), "malformed"),
        (put(*WEIGHT, "shape", value=[True, 8]), "malformed"),
        (put(*WEIGHT, "shape", value=[2**31, 2**31]), "malformed"),
        (put(*WEIGHT, "shape", value=[2**53 - 1, 2**53 - 1, 0]), "malformed"),
        (put(*WEIGHT, "shape", value=[1] * 65), "malformed"),
        (put(*WEIGHT, "shape", value=[2**53 - 1] * 10_000), "malformed"),
        (put(*WEIGHT, "shape", value=[8]), "malformed"),
        (put(*WEIGHT, "shape", value=[8, 9]), "malformed"),
        # shards
        (put(*WEIGHT, "shards", value=[]), "malformed"),
        (put(*WHOLE, "sizes", value=[8, 9]), "malformed"),
        (put(*WHOLE, "sizes", value=[8, -8]), "malformed"),
        (put(*WHOLE, "offsets", value=[1, 0]), "malformed"),
        (put(*WHOLE, "offsets", value=[0]), "malformed"),
        (put(*WHOLE, "extra", value=0), "malformed"),
        (put(*WHOLE, "chunk_size_bytes", value=0), "malformed"),
        (put(*WHOLE, "chunk_size_bytes", value=8), "malformed"),
        (put(*WHOLE, "chunk_size_bytes", value=100), "malformed"),
        (put(*WHOLE, "chunk_size_bytes", value=128 << 20), "malformed"),
        (put(*WHOLE, "chunk_size_bytes", value=64), "malformed"),
        (put(*WHOLE, "digests", value=""), "malformed"),
        (put(*WHOLE, "digests", value=D * 2), "malformed"),
        (put(*WHOLE, "digests", value=D[1:]), "malformed"),
        (put(*WHOLE, "digests", value=D.replace("00", "0 ", 1)), "malformed"),
        (put(*WEIGHT, "shards", value=_shards(([0, 0], [4, 8]))), "malformed"),
        (put(*WEIGHT, "shards", value=_shards(([0, 0], [4, 8]), ([0, 0], [4, 8]))), "malformed"),
        (put(*WEIGHT, "shards", value=_shards(([0, 0], [4, 8]), ([4, 0], [3, 8]))), "malformed"),
        (put(*WEIGHT, "shards", value=_shards(([0, 0], [4, 8]), ([3, 0], [4, 8]))), "malformed"),
        (put(*WEIGHT, "shards", value=_shards(([0, 0], [4, 8]), ([4, 0], [4, 4]), ([2, 4], [4, 4]))), "malformed"),
        (put(*HALVES, 1, "offsets", value=[0]), "malformed"),
        (drop(*HALVES, 1), "malformed"),
    ],
)
def test_manifest_part(edit: Edit, kind: str) -> None:
    """Every field of a part is checked by itself: sizes, shapes, shards and packs, whatever the root says."""
    root = manifest.decode_root(FILES[ROOT], SNAPSHOT)
    check_refused(lambda: manifest.assemble(root, [edited(PART, edit)]), kind)
    with pytest.raises(CiuicError, match=r"^(?!.*chunk tree)"):  # each lie is seen where it stands
        manifest.assemble(root, [edited(PART, edit)])


@pytest.mark.parametrize("edit", [put(*WHOLE, "digests", value=D), drop("tensors", 0), put("tensors", value=[])])
def test_manifest_part_against_its_root(edit: Edit) -> None:
    """A part that is well-formed but not the one the root was made with does not match the chunk tree."""
    root = manifest.decode_root(FILES[ROOT], SNAPSHOT)
    with pytest.raises(IntegrityError, match="chunk tree"):
        manifest.assemble(root, [edited(PART, edit)])


def _assemble(tensors: tuple[manifest.StoredTensor, ...], **changes: Any) -> manifest.Manifest:
    """What a reader makes of a manifest of these tensors, whose root agrees with its part."""
    made = manifest.Manifest(SNAPSHOT, "dict", (), (), tensors, **changes)
    encoded = manifest.encode(made)
    root = manifest.decode_root(encoded.root[1], SNAPSHOT)
    return manifest.assemble(root, [data for _, data in encoded.parts])


def _tensor(shape: tuple[int, ...], *boxes: tuple[tuple[int, ...], tuple[int, ...]]) -> manifest.StoredTensor:
    shards = tuple(
        manifest.Shard(o, s, 64 << 20, digest(repr((o, s)).encode()) if manifest.volume(s) else b"") for o, s in boxes
    )
    return manifest.StoredTensor(("t",), "uint8", shape, "cpu", shards)


def test_one_chunk_of_two_sizes() -> None:
    """A digest that is said to belong to chunks of different sizes is refused."""
    chunk = digest(b"x")
    tensors = tuple(
        manifest.StoredTensor((name,), "uint8", (n,), "cpu", (manifest.Shard((0,), (n,), 4096, chunk),))
        for name, n in (("a", 10), ("b", 11))
    )
    check_refused(lambda: _assemble(tensors), "malformed")


def test_sums_that_do_not_agree_with_the_root() -> None:
    """raw_bytes, the chunk tree and the number of trees of a single value must agree with the parts."""
    root = json.loads(FILES[ROOT])
    for key, value in (("raw_bytes", 411), ("top", "single")):
        lying = manifest.decode_root(jsontext.encode(root | {key: value}), SNAPSHOT)
        check_refused(lambda lying=lying: manifest.assemble(lying, [FILES[PART]]), "malformed")  # type: ignore[misc]
    for key, value in (("count", 5), ("root", D)):
        chunks = root["chunks"] | {key: value}
        lying = manifest.decode_root(jsontext.encode(root | {"chunks": chunks}), SNAPSHOT)
        check_refused(lambda lying=lying: manifest.assemble(lying, [FILES[PART]]), "malformed")  # type: ignore[misc]


PINWHEEL = (((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1)))


@pytest.mark.parametrize(
    ("shape", "boxes"),
    [
        ((), (((), ()),)),
        ((0,), ()),
        ((0, 5), (((0, 0), (0, 5)),)),
        ((4,), (((0,), (2,)), ((2,), (0,)), ((2,), (2,)))),
        ((3, 3), PINWHEEL),
        ((2, 2), (((0, 0), (1, 1)), ((0, 1), (1, 1)), ((1, 0), (1, 1)), ((1, 1), (1, 1)))),
        ((2, 3, 2), (((0, 0, 0), (2, 1, 2)), ((0, 1, 0), (2, 2, 1)), ((0, 1, 1), (2, 2, 1)))),
    ],
)
def test_shards_that_cover_are_accepted(shape: tuple[int, ...], boxes: Any) -> None:
    """Boxes that fill their tensor exactly are read, also where no single cut separates them."""
    assert _assemble((_tensor(shape, *boxes),)).tensors[0].shape == shape


@pytest.mark.parametrize(
    ("shape", "boxes"),
    [
        ((), (((), ()), ((), ()))),
        ((4,), (((0,), (2,)), ((1,), (2,)))),
        ((3, 3), (*PINWHEEL[:4], ((0, 0), (1, 1)))),
        ((2, 2), (((0, 0), (1, 2)), ((0, 0), (2, 1)))),
        ((2, 2), (((0, 0), (1, 1)), ((1, 1), (1, 1)), ((0, 0), (1, 1)), ((1, 1), (1, 1)))),
        ((2,) * 8, tuple(((n,) * 8, (1,) * 8) for n in range(2))),
    ],
)
def test_shards_that_overlap_are_refused(shape: tuple[int, ...], boxes: Any) -> None:
    """Boxes whose volumes add up but which overlap and leave holes are refused."""
    check_refused(lambda: _assemble((_tensor(shape, *boxes),)), "malformed")


def test_parts_that_are_missing() -> None:
    """A caller that forgets a part gets an error of its own making, not a smaller snapshot."""
    root = manifest.decode_root(FILES[ROOT], SNAPSHOT)
    for parts in ([], [FILES[PART], FILES[PART]]):
        with pytest.raises(ValueError, match="zip"):
            manifest.assemble(root, parts)


def test_what_cannot_be_read_is_not_written() -> None:
    """Floats, huge integers, lone surrogates and depth beyond the limit are refused before a byte is written."""
    deep: Any = None
    for _ in range(jsontext.MAX_DEPTH):
        deep = [deep]
    for node in (1.5, 1e300, float("nan"), 2**53, -(2**53), 10**40, "\ud800", deep, [[[[0.1]]]], {"x": {"y": 1e-7}}):
        made = manifest.Manifest(SNAPSHOT, "single", (manifest.Tree("state", None, node),), (), ())
        with pytest.raises(UsageError) as caught:
            manifest.encode(made)
        assert caught.value.kind == "unsupported_value"


# --- locator ----------------------------------------------------------------------------------------------------------


def signed_again(edit: Edit) -> bytes:
    """The golden locator after ``edit``, with its own digest made to fit."""
    value = json.loads(FILES[LOCATOR])
    edit(value)
    value.pop("digest", None)
    return jsontext.encode(value | {"digest": digest(jsontext.encode(value)).hex()})


def _huge_record(value: Any) -> None:
    """A segment and a record that claim a petabyte: a reader must not believe how much memory it needs."""
    value["segments"][0][1] = 1 << 52
    value["chunks"][0] = [0, 64, 1 << 50, 0, 0]


@pytest.mark.parametrize(
    ("edit", "kind"),
    [
        (put("schema", value="ciuic.dev/locator/v3"), "format_version"),
        (put("schema", value="ciuic.dev/locator/v2"), "malformed"),
        (put("bases", value=[]), "malformed"),
        (put("snapshot", value=OTHER), "malformed"),
        (put("generation", value=1), "malformed"),
        (put("extra", value=1), "malformed"),
        (put("segments", value={}), "malformed"),
        (put("segments", 0, value=[]), "malformed"),
        (put("segments", 0, 0, value="segments/../ciuic.json"), "bad_name"),
        (put("segments", 0, 0, value="../../etc/passwd"), "bad_name"),
        (put("segments", 0, 0, value=ROOT), "bad_name"),
        (put("segments", 0, 0, value=f"segments/{SNAPSHOT}/0-0.seg/x"), "bad_name"),
        (put("segments", 0, 0, value=1), "malformed"),
        (put("segments", 0, 1, value=-1), "malformed"),
        (put("segments", 0, 1, value=True), "malformed"),
        (put("segments", 0, 2, value="AB" * 32), "malformed"),
        (put("segments", 0, 2, value="0 " * 32), "malformed"),
        (put("segments", 0, 2, value="00"), "malformed"),
        (put("segments", 0, 1, value=63), "malformed"),
        (_huge_record, "malformed"),
        (put("segments", value=[]), "malformed"),
        (drop("chunks", 0), "malformed"),
        (put("chunks", 0, value=[0, 64, 164, 0]), "malformed"),
        (put("chunks", 0, value=[1, 64, 164, 0, 0]), "malformed"),
        (put("chunks", 0, value=[-1, 64, 164, 0, 0]), "malformed"),
        (put("chunks", 0, value=[0, 0, 164, 0, 0]), "malformed"),
        (put("chunks", 0, value=[0, 65, 164, 0, 0]), "malformed"),
        (put("chunks", 0, value=[0, 4032, 164, 0, 0]), "malformed"),
        (put("chunks", 0, value=[0, 64, 127, 0, 0]), "malformed"),
        (put("chunks", 0, value=[0, 64, 1 << 50, 0, 0]), "malformed"),
        (put("chunks", 0, value="row"), "malformed"),
        (put("chunks", 0, 4, value=1), "malformed"),
        (put("chunks", 0, 3, value=2), "malformed"),
        (put("chunks", 0, value=[0, 64, 164, 2, 5]), "malformed"),
    ],
)
def test_locator(edit: Edit, kind: str) -> None:
    """Every row of a locator is checked: names, places inside their segment, and how many there are."""
    distinct = RECIPE["snapshot_manifest"]().distinct_chunks()
    check_refused(lambda: locators.decode(signed_again(edit), SNAPSHOT, 0, distinct), kind)


BASE = "0b" * 32
BASE_ROW = [BASE, 64, 0, 64, 164, 0, 0]


def _with_bases(rows: Any) -> Edit:
    def edit(value: Any) -> None:
        value["schema"] = "ciuic.dev/locator/v2"
        value["bases"] = rows

    return edit


@pytest.mark.parametrize(
    "rows",
    [
        [],
        {},
        ["row"],
        [BASE_ROW[:6]],
        [[*BASE_ROW, 0]],
        [[BASE.upper(), *BASE_ROW[1:]]],
        [[BASE[2:], *BASE_ROW[1:]]],
        [[digest(RECIPE["WEIGHT"]).hex(), *BASE_ROW[1:]]],
        [BASE_ROW, BASE_ROW],
        [["0c" * 32, *BASE_ROW[1:]], BASE_ROW],
        [[BASE, -1, *BASE_ROW[2:]]],
        [[BASE, (64 << 20) + 1, *BASE_ROW[2:]]],
        [[BASE, 64, 1, *BASE_ROW[3:]]],
        [[BASE, 64, 0, 65, 164, 0, 0]],
        [[BASE, 64, 0, 64, 4097, 0, 0]],
        [[BASE, 64, 0, 64, 164, 2, 0]],
        [[BASE, 64, 0, 64, 164, 1, 1]],
        [[BASE, 64, 0, 64, 164, 2, 5]],
    ],
)
def test_locator_bases(rows: Any) -> None:
    """Every row of a locator's bases is checked, their order too, and none may be a chunk of the manifest."""
    distinct = RECIPE["snapshot_manifest"]().distinct_chunks()
    good = locators.decode(signed_again(_with_bases([BASE_ROW])), SNAPSHOT, 0, distinct)
    assert good.bases[bytes.fromhex(BASE)][0] == 64
    check_refused(lambda: locators.decode(signed_again(_with_bases(rows)), SNAPSHOT, 0, distinct), "malformed")


def test_locator_that_does_not_match_its_digest() -> None:
    """Any change that is canonical JSON but not what was written is a digest mismatch."""
    distinct = RECIPE["snapshot_manifest"]().distinct_chunks()
    data = edited(LOCATOR, put("chunks", 0, 3, value=1))
    check_refused(lambda: locators.decode(data, SNAPSHOT, 0, distinct), "digest_mismatch")
    check_refused(lambda: locators.decode(b"[]", SNAPSHOT, 0, distinct), "malformed")


# --- entries ----------------------------------------------------------------------------------------------------------

SNAP = "entries/snapshot.json"


@pytest.mark.parametrize(
    ("name", "edit", "kind"),
    [
        (SNAP, put("schema", value="ciuic.dev/entry/v2"), "format_version"),
        (SNAP, put("run", value="x"), "malformed"),
        (SNAP, put("created", value="2026-11-22 06:31:14"), "malformed"),
        (SNAP, put("created", value="2026-13-45T06:31:14.123Z"), "malformed"),
        (SNAP, put("created", value="2026-11-22T06:31:14.123Z\n"), "malformed"),
        (SNAP, put("host", value=1), "malformed"),
        (SNAP, drop("engine"), "malformed"),
        (SNAP, put("kind", value=None), "malformed"),
        (SNAP, put("snapshot", value="../../x"), "malformed"),
        (SNAP, put("parent", value="ab"), "malformed"),
        (SNAP, put("parent", value=0), "malformed"),
        (SNAP, put("step", value=-1), "malformed"),
        (SNAP, put("step", value="1"), "malformed"),
        (SNAP, put("epoch", value=True), "malformed"),
        (SNAP, put("batch", value=[1]), "malformed"),
        (SNAP, put("tags", value=[1]), "malformed"),
        (SNAP, put("metrics", value=[["loss", 1]]), "malformed"),
        (SNAP, put("metrics", value=[["loss", "one"]]), "malformed"),
        (SNAP, put("metrics", value=[["loss", "1"], ["accuracy", "1"]]), "malformed"),
        (SNAP, put("metrics", value=[["loss", "1"], ["loss", "1"]]), "malformed"),
        (SNAP, put("metrics", value=[[f"m{n:03}", "1"] for n in range(33)]), "malformed"),
        (SNAP, put("metrics", value={}), "malformed"),
        (SNAP, put("manifest", "path", value=PART), "malformed"),
        (SNAP, put("manifest", "path", value=layout.manifest_root(OTHER)), "bad_name"),
        (SNAP, put("manifest", "path", value=f"manifests/{SNAPSHOT}/../{SNAPSHOT}/root.json"), "bad_name"),
        (SNAP, put("manifest", "size", value=2**53 - 1 - 2**53), "malformed"),
        (SNAP, put("manifest", "extra", value=1), "malformed"),
        (SNAP, put("chunks", "count", value=-1), "malformed"),
        (SNAP, put("raw_bytes", value=None), "malformed"),
        (SNAP, put("world", value=0), "malformed"),
        (SNAP, put("extra", value=1), "malformed"),
        ("entries/key.json", put("vkey", value=None), "malformed"),
        ("entries/key.json", put("chain", "path", value="log/checkpoint"), "bad_name"),
        ("entries/key.json", put("chain", "path", value="../ciuic.json"), "bad_name"),
        ("entries/key.json", put("chain", value=[]), "malformed"),
        ("entries/key.json", put("extra", value=1), "malformed"),
        ("entries/prune.json", put("snapshots", value=["*"]), "malformed"),
        ("entries/prune.json", put("snapshots", value=[1]), "malformed"),
        ("entries/prune.json", put("policy", value=[]), "malformed"),
        ("entries/prune.json", put("extra", value=1), "malformed"),
        ("entries/note.json", drop("run"), "malformed"),
    ],
)
def test_entry(name: str, edit: Edit, kind: str) -> None:
    """Every field of an entry is checked; what it refers to stays inside the chain."""
    check_refused(lambda: entry.decode(edited(name, edit), 7), kind)


def test_entries_of_unknown_kinds_are_kept() -> None:
    """A kind of a later version is no error: it comes back whole, as data."""
    data = edited("entries/note.json", put("kind", value="endorsement"))
    found = entry.decode(data, 3)
    assert isinstance(found, entry.OtherEntry)
    assert entry.kind_of(found) == "endorsement"
    assert jsontext.encode(found.fields) == data


def test_an_entry_too_long_or_unwritable() -> None:
    """More than 65535 bytes are refused by the writer and, unparsed, by the reader; so is what JSON cannot hold."""
    with pytest.raises(UsageError):
        entry.PruneEntry(RECIPE["COMMON"], (SNAPSHOT,), "x" * 65536).encode()
    with pytest.raises(UsageError):
        entry.PruneEntry(RECIPE["COMMON"], (SNAPSHOT,), "\udcff").encode()
    check_refused(lambda: entry.decode(b'"' + b"x" * 65535 + b'"', 0), "json_too_large")


# --- segments, by hand ------------------------------------------------------------------------------------------------


def record(**changes: Any) -> bytes:
    """A raw record of 64 bytes packed by hand, with its checksum made to fit whatever ``changes`` say."""
    values: dict[str, Any] = {
        "magic": b"CREC", "size": 128, "codec": 0, "encryption": 0, "raw": 64, "stored": 64, "digest": b"d" * 32,
        "base": bytes(32), "depth": 0, "item": 4, "planes": 0, "parameter": 0, "method": 0, "zero": bytes(23),
        "directory": b"",
    } | changes  # fmt: skip
    directory = values.pop("directory")
    fixed = struct.pack("<4sHBBQQ32s32sHBBiB23s", *values.values())
    body = bytes(8) + directory
    checksum = digest(fixed + body)[:8]
    return fixed + values.get("checksum", checksum) + directory


def planes(*pairs: tuple[int, int], pad: bytes = bytes(3)) -> bytes:
    return b"".join(struct.pack("<B3sI", method, pad, stored) for method, stored in pairs).ljust(64, b"\0")


RAW4 = {"codec": 1, "planes": 4, "size": 192}
DIRECTORY = planes((0, 16), (0, 16), (0, 16), (0, 16))
DELTA4 = RAW4 | {"codec": 2, "base": b"b" * 32, "depth": 1, "method": 2, "directory": DIRECTORY}


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "bad_segment"),
        (record()[:127], "bad_segment"),
        (record(magic=b"CIDX"), "bad_segment"),
        (record(size=64), "bad_segment"),
        (record(size=65535), "bad_segment"),
        (record(size=192), "bad_segment"),
        (record(planes=255), "bad_segment"),
        (record()[:-1] + b"\0", "checksum_mismatch"),
        (record(codec=4), "unknown_codec"),
        (record(encryption=1), "unknown_encryption"),
        (record(zero=bytes(22) + b"\1"), "bad_segment"),
        (record(raw=(64 << 20) + 4, stored=(64 << 20) + 4), "bad_segment"),
        (record(raw=2**64 - 4, stored=2**64 - 4), "bad_segment"),
        (record(item=0), "bad_segment"),
        (record(item=3), "bad_segment"),
        (record(item=16, raw=60, stored=60), "bad_segment"),
        (record(stored=63), "bad_segment"),
        (record(stored=2**63), "bad_segment"),
        (record(depth=1), "bad_segment"),
        (record(base=b"b" * 32), "bad_segment"),
        (record(method=1), "bad_segment"),
        (record(**RAW4 | {"depth": 1}, directory=DIRECTORY), "bad_segment"),
        (record(**RAW4 | {"codec": 3, "method": 2}, directory=DIRECTORY), "bad_segment"),
        (record(**DELTA4 | {"base": bytes(32)}), "bad_segment"),
        (record(**DELTA4 | {"base": b"d" * 32}), "bad_segment"),
        (record(**DELTA4 | {"depth": 0}), "bad_segment"),
        (record(**DELTA4 | {"depth": 5}), "bad_segment"),
        (record(**DELTA4 | {"depth": 65535}), "bad_segment"),
        (record(**DELTA4 | {"method": 0}), "unknown_codec"),
        (record(**DELTA4 | {"method": 3}), "unknown_codec"),
        (record(**DELTA4 | {"planes": 0, "size": 128, "directory": b""}), "bad_segment"),
        (record(**DELTA4 | {"item": 1, "planes": 1, "directory": planes((0, 64))}), "bad_segment"),
        (record(**DELTA4 | {"item": 16, "planes": 16, "size": 256, "directory": bytes(128)}), "bad_segment"),
        (record(**RAW4 | {"codec": 3, "item": 1, "planes": 1}, directory=planes((0, 64))), "bad_segment"),
        (record(planes=4, size=192, directory=planes((0, 16), (0, 16), (0, 16), (0, 16))), "bad_segment"),
        (record(codec=1), "bad_segment"),
        (record(codec=1, planes=2, size=192, directory=planes((0, 32), (0, 32))), "bad_segment"),
        (record(**RAW4, directory=planes((0, 16), (0, 16), (0, 16), (0, 15))), "bad_segment"),
        (record(**RAW4, directory=planes((0, 15), (0, 17), (0, 16), (0, 16))), "bad_segment"),
        (record(**RAW4, directory=planes((2, 16), (0, 16), (0, 16), (0, 16))), "unknown_codec"),
        (record(**RAW4, directory=planes((0, 16), (0, 16), (0, 16), (0, 16), pad=b"\0\0\1")), "bad_segment"),
        (record(**RAW4, directory=planes((0, 16), (0, 16), (0, 16), (0, 16))[:-1] + b"\1"), "bad_segment"),
        (record(**RAW4, stored=1 << 32, directory=planes(*[(1, 1 << 30)] * 4)), "bad_segment"),
    ],
)
def test_record_header(data: bytes, kind: str) -> None:
    """Every field of a record's header is checked, with a checksum that fits the lie."""
    check_refused(lambda: segment.parse_record_header(data, "x.seg"), kind)


def test_record_headers_built_by_hand_are_read() -> None:
    """The table's own packing is right: without a lie it is read, and equals what the package writes."""
    plain = segment.parse_record_header(record() + b"payload", "x.seg")
    assert plain.pack() == record()
    directory = planes((0, 16), (1, 7), (0, 16), (1, 9))
    split = segment.parse_record_header(record(**RAW4, stored=48, parameter=-50, directory=directory), "x.seg")
    assert split.planes == ((0, 16), (1, 7), (0, 16), (1, 9))
    assert (split.parameter, split.record_size_bytes) == (-50, 192 + 48)
    delta = segment.parse_record_header(record(**DELTA4), "x.seg")
    assert (delta.base, delta.depth, delta.method) == (b"b" * 32, 1, segment.DELTA_DIFFERENCE)
    assert delta.pack() == record(**DELTA4)
    assert segment.parse_record_header(record(**RAW4 | {"codec": 3}, directory=DIRECTORY), "x.seg").codec == 3


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ((b"CIUICSEX", 1, 0, 64, SNAPSHOT.encode(), 0, 0, bytes(20)), "bad_segment"),
        ((b"CIUICSEG", 3, 0, 64, SNAPSHOT.encode(), 0, 0, bytes(20)), "format_version"),
        ((b"CIUICSEG", 1, 1, 64, SNAPSHOT.encode(), 0, 0, bytes(20)), "bad_segment"),
        ((b"CIUICSEG", 1, 0, 128, SNAPSHOT.encode(), 0, 0, bytes(20)), "bad_segment"),
        ((b"CIUICSEG", 1, 0, 64, b"../../../../etc/pass", 0, 0, bytes(20)), "bad_segment"),
        ((b"CIUICSEG", 1, 0, 64, b"\xff" * 20, 0, 0, bytes(20)), "bad_segment"),
        ((b"CIUICSEG", 1, 0, 64, SNAPSHOT.encode(), 0, 0, bytes(19) + b"\1"), "bad_segment"),
    ],
)
def test_file_header(values: tuple[Any, ...], kind: str) -> None:
    """Magic, version, size, id and zeros of a segment's header are checked."""
    data = struct.pack("<8sHHI20sII20s", *values)
    check_refused(lambda: segment.parse_file_header(data, "x.seg"), kind)
    check_refused(lambda: segment.parse_file_header(data[:63], "x.seg"), "bad_segment")


def index_of(*rows: tuple[bytes, int, int, int, int, bytes], magic: bytes = b"CIDX", count: int | None = None) -> bytes:
    packed = b"".join(struct.pack("<32sQQQB7s", *row) for row in rows)
    return magic + bytes(4) + struct.pack("<Q", len(rows) if count is None else count) + packed


GOOD = (b"d" * 32, 64, 192, 64, 0, bytes(7))


@pytest.mark.parametrize(
    ("index", "kind"),
    [
        (index_of(GOOD, magic=b"CREC"), "bad_segment"),
        (index_of(GOOD, count=2), "bad_segment"),
        (index_of(GOOD, count=2**63), "bad_segment"),
        (index_of((b"d" * 32, 65, 192, 64, 0, bytes(7))), "bad_segment"),
        (index_of((b"d" * 32, 0, 192, 64, 0, bytes(7))), "bad_segment"),
        (index_of((b"d" * 32, 64, 1 << 40, 64, 0, bytes(7))), "bad_segment"),
        (index_of((b"d" * 32, 2**64 - 64, 192, 64, 0, bytes(7))), "bad_segment"),
        (index_of((b"d" * 32, 64, 127, 64, 0, bytes(7))), "bad_segment"),
        (index_of((b"d" * 32, 64, 192, 1 << 30, 0, bytes(7))), "bad_segment"),
        (index_of((b"d" * 32, 64, 192, 64, 9, bytes(7))), "unknown_codec"),
        (index_of((b"d" * 32, 64, 192, 64, 0, bytes(6) + b"\1")), "bad_segment"),
    ],
)
def test_index(index: bytes, kind: str) -> None:
    """Every line of an index is checked: inside the records' area, aligned, in order, without overlap."""
    trailer = segment.Trailer(256, 1, 4096, bytes(32))
    data = index.ljust(4096 - 64 - 256, b"\0")
    check_refused(lambda: segment.parse_index(data, trailer, "x.seg"), kind)


def test_index_of_overlapping_records_and_wrong_lengths() -> None:
    """Records that overlap, bytes behind the index that are not zero, and a cut index are refused."""
    trailer = segment.Trailer(256, 2, 4096, bytes(32))
    room = 4096 - 64 - 256
    good = index_of((b"d" * 32, 64, 128, 0, 0, bytes(7)))
    overlapping = index_of((b"d" * 32, 64, 129, 1, 0, bytes(7)), (b"e" * 32, 128, 128, 0, 0, bytes(7)))
    short = index_of((b"d" * 32, 64, 128, 0, 0, bytes(7)), (b"e" * 32, 192, 64, 0, 0, bytes(7)))
    for data in (
        overlapping.ljust(room, b"\0"),
        short.ljust(room, b"\0"),
        good.ljust(room - 1, b"\0") + b"\1",
        good,
        good[:8],
        b"",
    ):
        check_refused(lambda data=data: segment.parse_index(data, trailer, "x.seg"), "bad_segment")  # type: ignore[misc]


@pytest.mark.parametrize(
    ("index_offset", "count", "size", "magic"),
    [
        (256, 1, 4096, b"CIUICENX"),
        (256, 1, 8192, b"CIUICEND"),
        (256, 1, 4095, b"CIUICEND"),
        (0, 1, 4096, b"CIUICEND"),
        (257, 1, 4096, b"CIUICEND"),
        (256, 1000, 4096, b"CIUICEND"),
        (256, 2**63, 4096, b"CIUICEND"),
        (2**64 - 64, 1, 4096, b"CIUICEND"),
        (4096 - 64, 0, 4096, b"CIUICEND"),
    ],
)
def test_trailer(index_offset: int, count: int, size: int, magic: bytes) -> None:
    """Where the index lies and how long it is must fit the file as it was found."""
    data = struct.pack("<QQQ8s32s", index_offset, count, size, magic, bytes(32))
    check_refused(lambda: segment.parse_trailer(data, 4096, "x.seg"), "bad_segment")
    check_refused(lambda: segment.parse_trailer(data[1:], 4096, "x.seg"), "bad_segment")
