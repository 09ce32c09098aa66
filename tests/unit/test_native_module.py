"""The package with and without its native core."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ciuic_async import native

_ROUND_TRIP = """
from ciuic_async import native
from ciuic_async.codecs.choose import encoder_for
from ciuic_async.codecs.decode import decode
from ciuic_async.format.digest import digest
raw = memoryview(bytes(range(4)) * 4096)
chunk = encoder_for("smallest").encode(raw, digest(raw), 4)
out = bytearray(len(raw))
decode(chunk.header, b"".join(chunk.payload), memoryview(out))
assert out == raw and chunk.header.codec in (1, 3)
print(native.describe())
"""


def _describe(**environment: str) -> str:
    """What a fresh process says of its core, after a round trip through it."""
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", _ROUND_TRIP],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return process.stdout


def test_environment_switches_the_core_off() -> None:
    """CIUIC_ASYNC_NATIVE=0 means plain Python, which compresses and decompresses too, and says why."""
    assert _describe(CIUIC_ASYNC_NATIVE="0").startswith("plain Python (native core switched off")


@pytest.mark.skipif(native.core is None, reason="the native core is not in use")
def test_core_is_used_where_it_was_built() -> None:
    """Without the switch the compiled core is in use."""
    assert _describe(CIUIC_ASYNC_NATIVE="1").startswith("native core")


def test_describe_is_one_line() -> None:
    """People see what is in use in one line."""
    assert native.describe()
    assert "\n" not in native.describe()
