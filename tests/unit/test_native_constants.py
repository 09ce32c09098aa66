"""The native core and ciuic_async/format agree, and so do the core and its description."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import ciuic_async.native
from ciuic_async.codecs import transform
from ciuic_async.format import segment

core = ciuic_async.native.core
pytestmark = pytest.mark.skipif(core is None, reason="the native core is not in use")


@pytest.mark.parametrize(
    ("native", "python"),
    [
        ("DIRECT_ALIGNMENT_BYTES", segment.DIRECT_ALIGNMENT_BYTES),
        ("MAX_CHUNK_BYTES", segment.MAX_CHUNK_BYTES),
        ("MAX_ITEM_BYTES", max(segment.ITEM_SIZES_BYTES)),
        ("PLANE_RAW", segment.PLANE_RAW),
        ("PLANE_ZSTD", segment.PLANE_ZSTD),
        ("TRANSFORM_NONE", transform.NONE),
        ("TRANSFORM_XOR", segment.DELTA_XOR),
        ("TRANSFORM_DIFFERENCE", segment.DELTA_DIFFERENCE),
        ("TRANSFORM_ROTATED", transform.ROTATED),
    ],
)
def test_constants_equal_those_of_the_format(native: str, python: int) -> None:
    """csrc/segment_format.h and format/segment.py hold the same numbers."""
    assert getattr(core, native) == python


def test_stub_names_what_the_core_has() -> None:
    """_native.pyi lists every public name of the module, and no other."""
    stub = Path(ciuic_async.native.__file__).with_name("_native.pyi").read_text()
    described = set()
    for node in ast.parse(stub).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            described.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            described.add(node.target.id)
    assert described == {name for name in dir(core) if not name.startswith("_")}
