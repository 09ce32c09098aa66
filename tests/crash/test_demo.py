"""``ciuic demo`` from the command line: killed, resumed, identical."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ciuic_async.chain import SnapshotChain

CIUIC = [sys.executable, "-m", "ciuic_async.cli.main"]
PROMISED = {
    "identical",
    "kills",
    "snapshots",
    "step_s",
    "stall_s",
    "lost_s_per_snapshot",
    "raw_bytes",
    "stored_bytes",
}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CIUIC, "demo", "--quick", *arguments], capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_demo_is_killed_and_ends_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--json`` prints the promised facts and nothing else, the chain stays in ``--dir``, and nothing else stays."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    done = run("--json", "--kills", "2", "--dir", str(tmp_path / "chain"))
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts.keys() >= PROMISED
    assert facts["identical"] is True
    assert facts["verified"] is True
    assert facts["kills"] == 2
    assert facts["killed_in_write"] >= 1
    assert set(facts["compared"]) == {"parameters", "optimizer", "scheduler", "loader", "rng", "loss_curve"}
    assert 0 < facts["stored_bytes"] <= 1.1 * facts["raw_bytes"]
    assert facts["step_s"] > 0
    assert facts["stall_s"] > 0
    with SnapshotChain(tmp_path / "chain", create=False) as chain:
        assert [snapshot.step for snapshot in chain] == list(range(3, 31, 3))
        assert facts["snapshots"] == len(chain) == 10
    assert list(scratch.glob("ciuic-*")) == []  # torch may leave a cache of its own there


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_demo_tells_a_person_what_happened() -> None:
    """Without ``--json``: the story on stderr; chain, table and at last the verdict on stdout, as plain text."""
    done = run("--kills", "1")
    assert done.returncode == 0, done.stderr
    assert "while snapshot" in done.stderr
    assert "ciuic-async" in done.stdout
    assert "every byte verified" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("Identical: killed 1 time,")
    assert "\x1b" not in done.stdout + done.stderr
    assert "\r" not in done.stdout + done.stderr


def test_wrong_arguments_are_usage_errors(tmp_path: Path) -> None:
    """Exit status 2 and a message that says what to change, before anything is trained."""
    done = run("--steps", "3")
    assert done.returncode == 2
    assert "more than 3" in done.stderr
    done = run("--kills", "-1")
    assert done.returncode == 2
    (tmp_path / "mine").write_text("precious")
    done = run("--dir", str(tmp_path))
    assert done.returncode == 2
    assert "not empty" in done.stderr
