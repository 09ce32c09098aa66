"""House rules that a syntax tree can check."""

from __future__ import annotations

import ast
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from ciuic_async.format import segment

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "ciuic_async").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
MAX_LINES = 600
OPPONENTS = re.compile(r"cli/demo[a-z_]*\.py")  # what the demo compares with, such as torch.save
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {"eval", "exec", "__import__"}
FORBIDDEN_TORCH = {"torch.save", "torch.load"}
COMMAND_INTERFACE = {"add_parser", "run"}  # every command has these two; the module's docstring says what it does
CHECKS = ("check", "verify", "assert_", "_check", "_verify", "_assert")


def _id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _dotted(node: ast.expr) -> str:
    """``a.b.c`` of a name or attribute; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return ""


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module or ''}.{alias.name}" for alias in node.names)


def _calls(tree: ast.AST) -> Iterator[str]:
    return (_dotted(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call))


@pytest.mark.parametrize("path", MODULES, ids=_id)
def test_nothing_stored_is_ever_executed(path: Path) -> None:
    """No pickle in any disguise, no torch.save or torch.load, no eval or exec in the package."""
    tree = ast.parse(path.read_text())
    imported = set(_imported(tree))
    assert not {name for name in imported if name.split(".")[0] in FORBIDDEN_MODULES}
    assert not FORBIDDEN_CALLS & set(_calls(tree))
    if not OPPONENTS.fullmatch(str(path.relative_to(ROOT / "ciuic_async"))):
        assert not FORBIDDEN_TORCH & (imported | set(_calls(tree)))


@pytest.mark.parametrize("path", MODULES, ids=_id)
def test_public_names_have_docstrings(path: Path) -> None:
    """Every module, public function and public class says what its signature cannot."""
    tree = ast.parse(path.read_text())
    public = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    assert ast.get_docstring(tree)
    known = COMMAND_INTERFACE if path.parent.name == "cli" else set()
    assert not [node.name for node in public if node.name not in known and not ast.get_docstring(node)]


@pytest.mark.parametrize("path", MODULES, ids=_id)
def test_modules_are_short(path: Path) -> None:
    """A module that grows beyond this wants to be two."""
    assert len(path.read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", MODULES, ids=_id)
def test_nothing_is_left_undone(path: Path) -> None:
    """No notes to oneself and no stubs."""
    assert not re.findall(r"\b(?:TODO|FIXME|XXX|NotImplementedError)\b", path.read_text())


def _test_functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    ]


def _asserts(function: ast.AST) -> bool:
    if any(isinstance(node, ast.Assert) for node in ast.walk(function)):
        return True
    names = list(_calls(function))
    return any(name in ("pytest.raises", "pytest.warns") or name.split(".")[-1].startswith(CHECKS) for name in names)


@pytest.mark.parametrize("path", TESTS, ids=_id)
def test_tests_state_and_prove_a_property(path: Path) -> None:
    """Every test has a docstring that states its property, and something that can fail."""
    functions = _test_functions(ast.parse(path.read_text()))
    assert not [function.name for function in functions if not ast.get_docstring(function)]
    assert not [function.name for function in functions if not _asserts(function)]


def test_only_the_commit_publishes() -> None:
    """One module publishes a snapshot's files; the log publishes its own, chain.py makes ciuic.json; nobody else."""
    writers = {
        "pipeline/commit.py": {"publish"},
        "transparency/log.py": {"overwrite", "publish"},  # the log head; tile_files is asked to publish
        "transparency/tile_files.py": {"create", "overwrite", "publish"},
        "transparency/cosigning.py": {"overwrite"},  # cosignatures: log/checkpoint of the same text, log/witnessed
        "transparency/receipts.py": {"overwrite"},
        "transparency/ordering.py": {"create"},  # slots, for the log
        "transparency/anchor.py": {"create", "overwrite"},  # timestamps
        "chain.py": {"create"},
        "mirroring/view.py": {"create", "overwrite", "publish"},  # passes on
        "mirroring/sending.py": {"create", "publish"},  # copies of what was committed
        "mirroring/copier.py": {"create"},  # ciuic.json and slots, byte for byte
        "mirroring/derived.py": {"create", "overwrite"},  # the log head, and what others signed
        "mirroring/home.py": {"create"},
        "cli/doctor_store.py": {"create", "overwrite", "publish"},  # in a place of the trial's own
    }
    for path in MODULES:
        name = path.relative_to(ROOT / "ciuic_async").as_posix()
        if name.startswith("stores/"):
            continue
        calls = {
            node.func.attr
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("create", "overwrite", "publish")
        }
        assert calls <= writers.get(name, set()), name


@pytest.mark.parametrize("path", TESTS, ids=_id)
def test_tests_do_not_sleep(path: Path) -> None:
    """A test waits for a condition, never for a time."""
    assert not [name for name in _calls(ast.parse(path.read_text())) if name.split(".")[-1] == "sleep"]


# --- the document and the code ----------------------------------------------------------------------------------------


def _table(document: str, start: str) -> list[tuple[int, int]]:
    """(offset, size) of the rows of the first byte table behind ``start``; rows like "8 each" are left out."""
    rows = []
    for line in document[document.index(start) :].splitlines():
        if match := re.match(r"\| (\d+) \| (\d+) \|", line):
            rows.append((int(match[1]), int(match[2])))
        elif rows:
            return rows
    return rows


def _fields(layout: str) -> list[tuple[int, int]]:
    """(offset, size) of the fields of a little-endian struct."""
    fields = []
    offset = 0
    for piece in re.findall(r"\d*[a-zA-Z]", layout.lstrip("<")):
        size = struct.calcsize("<" + piece)
        fields.append((offset, size))
        offset += size
    return fields


@pytest.mark.parametrize(
    ("start", "layout", "size_bytes"),
    [
        ("\nFile header\n", segment._FILE_HEADER, segment.FILE_HEADER_BYTES),
        ("\nRecord: a header", segment._RECORD_HEADER, segment.RECORD_HEADER_BYTES),
    ],
)
def test_byte_tables_of_the_document_are_the_structs(start: str, layout: struct.Struct, size_bytes: int) -> None:
    """docs/format.md gives every field of the code's structs its offset and size, and nothing else."""
    table = _table((ROOT / "docs" / "format.md").read_text(), start)
    assert table == _fields(layout.format)
    assert sum(table[-1]) == size_bytes == layout.size


def test_sizes_that_the_document_states() -> None:
    """The sizes of index lines, trailer, plane entries and limits in docs/format.md are the code's."""
    text = (ROOT / "docs" / "format.md").read_text()
    assert f"then {segment.INDEX_ENTRY_BYTES} bytes for each record" in text
    assert f"trailer, {segment.TRAILER_BYTES} bytes" in text
    assert f"| {segment.RECORD_HEADER_BYTES} | {segment.PLANE_ENTRY_BYTES} each |" in text
    assert f"at most {segment.MAX_CHUNK_BYTES >> 20} MiB" in text
    assert segment.INDEX_HEADER_BYTES == 16


def test_every_known_dtype_is_in_the_document() -> None:
    """The list of dtypes in docs/format.md is the code's."""
    from ciuic_async.format.dtypes import ITEM_SIZE_BYTES

    text = (ROOT / "docs" / "format.md").read_text()
    start = text.index("\ndtypes: ")
    found = re.findall(r"[a-z][a-z0-9_]*", " ".join(re.findall(r"`([^`]*)`", text[start : text.index("\n## 4.")])))
    assert sorted(found) == sorted(ITEM_SIZE_BYTES)
