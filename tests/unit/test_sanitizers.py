"""The native core's own tests (csrc/tests) under sanitizers; ``make sanitize`` runs all of them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SKIPPED = "the compiler has no sanitizers here"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def _has_sanitizers(folder: Path) -> bool:
    """Whether a program can be linked with them, and runs."""
    source = folder / "empty.cpp"
    source.write_text("int main() { return 0; }\n")
    command = ["g++", "-fsanitize=address,undefined", str(source), "-o", str(folder / "empty")]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        return False
    return subprocess.run([str(folder / "empty")], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_native_core_under_address_and_undefined_sanitizers(tmp_path: Path) -> None:
    """No read or write out of bounds, no leak, nothing undefined, in anything that the native core's tests do."""
    if not _has_sanitizers(tmp_path):
        pytest.skip(SKIPPED)
    script = ROOT / "csrc" / "tests" / "build.sh"
    result = subprocess.run([str(script), str(tmp_path), "address"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "all checks hold" in result.stdout
    assert not result.stderr, "a compiler or sanitizer has something to say"
