"""``ciuic watch`` as its users see it: a process that runs until Ctrl-C."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from ciuic_async import Checkpointer, SnapshotChain
from ciuic_async.cli.main import main


def save(place: Path, steps: int) -> None:
    with Checkpointer(place, {"t": torch.zeros(2)}, rng=False) as ckpt:
        ckpt.restore()
        for _ in range(steps):
            ckpt.step(metrics={"loss": 0.5})
            ckpt.save(metrics={"loss": 0.5})


@contextmanager
def watching(place: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "ciuic_async.cli.main", "watch", str(place), "--every", "1s", *arguments]
    # Tests that were started in the background ignore Ctrl-C, and hand that down.
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=_heed_interrupts
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def test_what_comes_is_shown_as_it_comes(tmp_path: Path) -> None:
    """The newest lines first, then each snapshot once, in order, whoever reads; Ctrl-C ends it with 130."""
    place = tmp_path / "chain"
    save(place, 3)
    with watching(place, "--json", "-n", "2") as process:
        assert [json.loads(line(process))["step"] for _ in range(2)] == [2, 3]
        save(place, 2)
        assert [json.loads(line(process))["step"] for _ in range(2)] == [4, 5]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (out, err, process.returncode) == ("", "interrupted\n", 130)


def test_a_run_that_is_late_is_named_once(tmp_path: Path) -> None:
    """With ``--late`` stderr says that no snapshot came, once for each; for people a line has step and metrics."""
    place = tmp_path / "chain"
    save(place, 1)
    with watching(place, "--late", "1s", "--all") as process:
        assert "(key)" in line(process)
        assert "step 1" in (shown := line(process))
        assert "loss=0.5" in shown
        assert process.stderr is not None
        assert "no snapshot for" in process.stderr.readline()
        save(place, 1)
        assert "step 2" in line(process)
        assert "no snapshot for" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30)[1] == "interrupted\n"


def test_a_run_that_never_begins_is_late_too(tmp_path: Path) -> None:
    """Where there is no snapshot yet, the watch's own beginning counts."""
    with SnapshotChain(tmp_path / "chain"):
        pass
    with watching(tmp_path / "chain", "--late", "1s") as process:
        assert process.stderr is not None
        assert "no snapshot for" in process.stderr.readline()


@pytest.mark.damages
def test_history_that_is_replaced_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries that are not those that were shown before: exit code 4, and what is wrong."""
    place, other = tmp_path / "chain", tmp_path / "other"
    save(place, 1)
    shutil.copytree(place, other)
    save(place, 1)
    with watching(place, "--json") as process:
        assert [json.loads(line(process))["step"] for _ in range(2)] == [1, 2]
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "attacker"))  # who has no pin
        save(other, 2)
        shutil.copytree(other, place, dirs_exist_ok=True)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 4, err
    assert json.loads(out)["error"]["kind"] == "fork"


def test_what_cannot_be_watched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No chain: 3, and none is made; a wrong option: 2."""
    assert main(["watch", str(tmp_path / "none")]) == 3
    assert not (tmp_path / "none").exists()
    with SnapshotChain(tmp_path / "chain"):
        pass
    assert main(["watch", str(tmp_path / "chain"), "--last", "-1"]) == 2
    assert main(["watch", str(tmp_path / "chain"), "--every", "2d"]) == 2
    assert main(["watch", str(tmp_path / "chain"), "--every", "soon"]) == 2
    assert "'soon'" in capsys.readouterr().err
