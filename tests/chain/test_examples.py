"""The examples of docs/chain.md run as they stand, one after the other in one folder."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "chain.md").read_text()
BLOCK = re.compile(r"(?:<!-- (run|trust): (\w+) -->\n)?```(\w*)\n(.*?)```", re.DOTALL)
KINDS = ("run", "trust")
NEEDED = ("bash", "jq", "sha256sum", "openssl")


def blocks(*kinds: str) -> list[tuple[str, str]]:
    """Language and text of the blocks of these kinds, in order."""
    return [(found[3], found[4]) for found in BLOCK.finditer(DOCUMENT) if found[1] in kinds]


def command_line(folder: Path) -> Path:
    """A folder for PATH with ``ciuic`` in it, of this very interpreter and checkout."""
    folder.mkdir()
    script = folder / "ciuic"
    python = shlex.quote(sys.executable)
    script.write_text(
        f'#!/bin/sh\nexec env PYTHONPATH={shlex.quote(str(ROOT))} {python} -m ciuic_async.cli.main "$@"\n'
    )
    script.chmod(0o755)
    return folder


def script(chosen: list[tuple[str, str]]) -> str:
    """One program of all blocks: shells share their variables, and the first command that fails ends it."""
    # Whatever an example leaves running in the background ends with it.
    parts = ["set -euo pipefail", "trap 'kill $(jobs -p) 2> /dev/null || true' EXIT"]
    for language, text in chosen:
        if language == "sh":
            parts.append(text)
        else:
            parts.append(f"{shlex.quote(sys.executable)} -W error - <<'END-OF-BLOCK'\n{text}END-OF-BLOCK")
    return "\n".join(parts)


def test_every_block_is_run() -> None:
    """No block of code without a mark that says where it is tested."""
    assert [found[4] for found in BLOCK.finditer(DOCUMENT) if found[1] is None] == []
    assert {found[3] for found in BLOCK.finditer(DOCUMENT)} == {"sh", "python"}


@pytest.mark.slow
@pytest.mark.skipif(any(shutil.which(tool) is None for tool in NEEDED), reason=f"needs {', '.join(NEEDED)}")
def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one shell with ``set -e``: a check in an example that does not hold ends it."""
    monkeypatch.setenv("PATH", str(command_line(tmp_path / "bin")), prepend=":")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    program = script(blocks(*KINDS))
    done = subprocess.run(
        ["bash", "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert "Verified Successfully" in done.stdout
    assert done.stdout.count(": OK\n") == 1 + 2 * 3, "ciuic.json, three manifests and a part of each"
    assert "FAILED" not in done.stdout
