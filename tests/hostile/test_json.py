"""JSON that somebody made to hurt: refused by kind, quickly, without deep stacks or much memory."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from ciuic_async.errors import IntegrityError
from ciuic_async.format import jsontext

LIMIT = 64 << 20
QUICKLY_S = 1.0


def check_refused(data: bytes, kind: str, limit_bytes: int = LIMIT) -> None:
    begin = time.thread_time()
    with pytest.raises(IntegrityError) as caught:
        jsontext.decode(data, what="the file", limit_bytes=limit_bytes)
    assert time.thread_time() - begin < QUICKLY_S
    assert caught.value.kind == kind
    assert caught.value.where == "the file"
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "json_syntax"),
        (b" ", "json_syntax"),
        (b"nul", "json_syntax"),
        (b"{", "json_syntax"),
        (b"[1,]", "json_syntax"),
        (b"[1}", "json_syntax"),
        (b"{1:2}", "json_syntax"),
        (b"'x'", "json_syntax"),
        (b'"\n"', "json_syntax"),
        (b'"\\x41"', "json_syntax"),
        (b'{"a":1,"a":1}', "json_syntax"),
        (b'{"a":1,"\\u0061":1}', "json_syntax"),
        (b'{"x":{"a":1,"a":2}}', "json_syntax"),
        (b"\xef\xbb\xbf{}", "json_syntax"),
        (b"{}\xff", "json_syntax"),
        (b'"\xff"', "json_syntax"),
        (b'"\xed\xa0\x80"', "json_syntax"),  # a surrogate in UTF-8
        (b'"\xc0\xaf"', "json_syntax"),  # an overlong slash
        ("{}".encode("utf-16"), "json_syntax"),
        (b"\0{}", "json_syntax"),
        (b"{}\0", "json_syntax"),
        (b"{}{}", "json_syntax"),
        (b"[]]", "json_syntax"),
        (b"1.0", "json_syntax"),
        (b"1e2", "json_syntax"),
        (b"1E400", "json_syntax"),
        (b"-0.0", "json_syntax"),
        (b"NaN", "json_syntax"),
        (b"[Infinity]", "json_syntax"),
        (b"-Infinity", "json_syntax"),
        (b"9007199254740992", "json_syntax"),
        (b"-9007199254740992", "json_syntax"),
        (b"01", "json_syntax"),
        (b"+1", "json_syntax"),
        (b"0x10", "json_syntax"),
        (b"1_000", "json_syntax"),
        ("٣".encode(), "json_syntax"),
        (b"-0", "json_not_canonical"),
        (b"{} ", "json_not_canonical"),
        (b"{}\n", "json_not_canonical"),
        (b"\n{}", "json_not_canonical"),
        (b'{"a": 1}', "json_not_canonical"),
        (b"[1, 2]", "json_not_canonical"),
        (b'{"b":1,"a":2}', "json_not_canonical"),
        (b'"\\u0061"', "json_not_canonical"),
        (b'"\\/"', "json_not_canonical"),
        (b'"\\u00e9"', "json_not_canonical"),
        (b'"\\u000A"', "json_not_canonical"),
        (b'"\\u001F"', "json_not_canonical"),
        (b'"\\ud800"', "json_not_canonical"),
        (b'"\\udc00\\ud800"', "json_not_canonical"),
        (b'{"\\ud800":1}', "json_not_canonical"),
        (b'"\\ud834\\udd1e"', "json_not_canonical"),
    ],
)
def test_table(data: bytes, kind: str) -> None:
    """Each way to not be canonical JSON has its kind."""
    check_refused(data, kind)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"1" * 100_000, "json_syntax"),
        (b"-" + b"9" * 1_000_000, "json_syntax"),
        (b"[" + b"1" * 4300 + b"]", "json_syntax"),
        (b"[" * 100_000, "json_too_deep"),
        (b"[" * 100_000 + b"]" * 100_000, "json_too_deep"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "json_too_deep"),
        (b'["]",' * 100_000, "json_too_deep"),
        (b'["\\\\",' * 100_000, "json_too_deep"),
        (b'["\\"]",' * 100_000, "json_too_deep"),
        (b"[" * 401 + b"]" * 401, "json_too_deep"),
        (b"]" * 100_000 + b"[" * 100_000, "json_syntax"),
        (b"[]" * 100_000, "json_syntax"),
        (b'"' + b"[" * 1_000_000, "json_syntax"),
        (b'\\"' * 1_000_000, "json_syntax"),
        (b"[[" * 201 + b'\\"' * 1_000_000, "json_too_deep"),
        (b"{}" * 500 + b'\\"' * 1_000_000, "json_syntax"),
        (b'"' * 1_000_001, "json_syntax"),
        (b'"' + b"\\" * 1_000_001, "json_syntax"),
        (b'"\\u' * 300_000, "json_syntax"),
        (b"\xff" * 1_000_000, "json_syntax"),
        (b" " * 1_000_000, "json_syntax"),
        (b"[" + b"0," * 300_000 + b"0.5]", "json_syntax"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value[:8]!r}x{len(value)}",
)
def test_large(data: bytes, kind: str) -> None:
    """Large inputs are refused within a second: no quadratic time, no deep recursion, no huge integers."""
    check_refused(data, kind)


def test_size_is_checked_first() -> None:
    """What is larger than the limit is refused unread, whatever it holds; exactly the limit is read."""
    check_refused(b"[" * 1001, "json_too_large", limit_bytes=1000)
    assert jsontext.decode(b'"' + b"x" * 998 + b'"', what="x", limit_bytes=1000) == "x" * 998


def test_the_deepest_that_is_allowed() -> None:
    """Depth 400 is read even where 10,000 brackets stand beside it and inside strings."""
    data = b"[" * 399 + b"[]," * 10_000 + b'"' + b"[" * 10_000 + b'"' + b"]" * 399
    assert jsontext.encode(jsontext.decode(data, what="x", limit_bytes=LIMIT)) == data


def test_a_deep_stack_of_the_caller_is_no_excuse() -> None:
    """Called from near the recursion limit, decode still raises its own error or succeeds."""
    data = b"[" * 390 + b"]" * 390

    def nested(depth: int) -> str:
        if depth:
            return nested(depth - 1)
        try:
            jsontext.decode(data, what="x", limit_bytes=LIMIT)
        except IntegrityError as error:
            return error.kind
        return "read"

    free = sys.getrecursionlimit() - 150
    outcomes = {nested(depth) for depth in range(free - 500, free - 100, 50)}
    assert outcomes <= {"read", "json_syntax", "json_not_canonical"}
    assert "read" in outcomes


MEASURE = """
import resource, sys
from ciuic_async.errors import IntegrityError
from ciuic_async.format import jsontext
data = eval_data()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    jsontext.decode(data, what="x", limit_bytes=1 << 30)
except IntegrityError:
    pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / len(data))
"""


@pytest.mark.parametrize(
    "expression",
    [
        "b'[' * 400 + b'\"' + b'a' * (8 << 20) + b'\"' + b',[]' * 10 + b']' * 400",
        "b'[' * 500 + b'\"' + b'a' * (8 << 20) + b'\"'",
        "b'[' * 500 + b'\"' + b'\\\\\\\\n' * (4 << 20) + b'\"'",
        "b'[' + b'[],' * (1 << 20) + b'[]]'",
    ],
)
def test_memory(expression: str) -> None:
    """Reading takes a small multiple of the input's memory: an empty list of three bytes is the worst.

    A regular expression that backtracks keeps a state for each character: 2 GB for 16 MB of text.
    """
    script = MEASURE.replace("eval_data()", expression)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 40  # bytes of memory for each byte of input
