"""How much room snapshots will take: bounds of policies, a chain's own pace, and the one warning of a run."""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import ciuic_async
from ciuic_async import Checkpointer, KeepEvery, KeepLatest, parse_policy
from ciuic_async.cli import doctor_forecast
from ciuic_async.cli.main import main
from ciuic_async.format import entry
from ciuic_async.retention.forecast import Demand, demand, too_small

MB = 10**6


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory without configuration, and no variable of ours."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for name in [name for name in os.environ if name.startswith("CIUIC_")]:
        monkeypatch.delenv(name)


def _free(monkeypatch: pytest.MonkeyPatch, size_bytes: int) -> list[str]:
    """Let the disk say that so much is free; where it was asked."""
    real, asked = os.statvfs, []

    def statvfs(path: Any) -> os.statvfs_result:
        asked.append(str(path))
        found = list(real(path))
        found[0] = found[1] = 1
        found[3] = found[4] = size_bytes
        return os.statvfs_result(found)

    monkeypatch.setattr(os, "statvfs", statvfs)
    return asked


@pytest.mark.parametrize(
    ("text", "interval_s", "expected"),
    [
        ("latest=3", None, Demand(4)),
        ("best=loss:2", None, Demand(4)),
        ("latest=3 | best=loss", None, Demand(5)),
        ("hourly=24 | daily=7 | weekly=4", None, Demand(36)),
        ("within=1h", 600.0, Demand(8)),
        ("within=1h", None, None),
        ("bytes=10GB", None, Demand(2, 10**10)),
        ("every=1000", None, None),
        ("latest=3 | tagged", None, None),
    ],
)
def test_what_a_policy_asks_for_at_most(text: str, interval_s: float | None, expected: Demand | None) -> None:
    """What it keeps, the latest, and the one that is being written; None where there is no bound."""
    assert demand(parse_policy(text), interval_s) == expected


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_bound_is_reached_and_never_passed(tmp_path: Path, count: int) -> None:
    """A run keeps exactly so many, and one more while the next is written."""
    highest = 0
    with Checkpointer(tmp_path / "chain", {"a": torch.zeros(3)}, keep=KeepLatest(count)) as ckpt:
        for _ in range(count + 3):
            ckpt.step()
            ckpt.save().add_done_callback(lambda _: None)
            ckpt.flush()
            highest = max(highest, len(list((tmp_path / "chain" / "manifests").iterdir())))
    bound = demand(KeepLatest(count))
    assert bound is not None
    assert count <= highest <= bound.snapshots
    assert len(ckpt.chain) == count


def test_a_run_is_warned_once_of_a_disk_that_is_too_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One line in the log with the numbers, one question to the disk, and snapshots are taken all the same."""
    asked = _free(monkeypatch, 10 * MB)
    state = {"a": torch.zeros(MB, dtype=torch.uint8)}
    with Checkpointer(tmp_path / "chain", state, every_steps=1, rng=False, keep=KeepLatest(20)) as ckpt:
        for _ in range(4):
            ckpt.step()
        ckpt.flush()
        assert len(ckpt.chain) == 4
    warnings = [record.getMessage() for record in caplog.records if "asks for" in record.getMessage()]
    assert len(warnings) == 1
    assert "asks for up to 21.0 MB: at most 21 snapshots of up to 1.0 MB" in warnings[0]
    assert "10.0 MB are free" in warnings[0]
    assert "may fit" in warnings[0]
    assert len(asked) == 1


@pytest.mark.parametrize("keep", ["latest=3", None])
def test_a_run_with_room_hears_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, keep: str | None
) -> None:
    """What fits, and what is never pruned while there is room for more, is no news."""
    _free(monkeypatch, 10 * MB)
    policy = None if keep is None else parse_policy(keep)
    with Checkpointer(tmp_path / "chain", {"a": torch.zeros(1000)}, every_steps=1, keep=policy) as ckpt:
        ckpt.step()
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_what_the_chain_holds_already_counts_as_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Retention frees what is there: only the rest must fit."""
    _free(monkeypatch, 10 * MB)
    folder = str(tmp_path)
    assert too_small(folder, KeepLatest(11), MB, lambda: 2 * MB) is None
    message = too_small(folder, KeepLatest(12), MB, lambda: 2 * MB)
    assert message is not None
    assert "beside 2.0 MB in this chain" in message
    assert "keep='every=5' has no bound" in (too_small(folder, KeepEvery(5), 6 * MB, lambda: 0) or "")
    assert "nothing is pruned" in (too_small(folder, None, 6 * MB, lambda: 0) or "")
    assert too_small(None, KeepLatest(3), 10**18, lambda: 0) is None


def test_a_disk_that_does_not_say_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the system gives no answer, or anything goes wrong, snapshots are taken and nothing is said."""

    def refuse(path: Any) -> os.statvfs_result:
        raise OSError(38, "not here")

    monkeypatch.setattr(os, "statvfs", refuse)
    with Checkpointer(tmp_path / "chain", {"a": torch.zeros(1000)}, every_steps=1, keep=KeepLatest(2)) as ckpt:
        ckpt.step()
        ckpt.flush()
        assert len(ckpt.chain) == 1
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.fixture
def paced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A chain of six snapshots of 1 MB that came every ten minutes."""
    place = tmp_path / "chain"
    start = datetime(2026, 1, 1, tzinfo=UTC)
    clock, written = [start], entry.timestamp
    monkeypatch.setattr(entry, "timestamp", lambda _: written(clock[0].timestamp()))
    for number in range(6):
        clock[0] = start + timedelta(minutes=10 * number)
        ciuic_async.save({"a": torch.randint(0, 255, (MB,), dtype=torch.uint8)}, place, codec="raw")
    return place


def _doctor(capsys: pytest.CaptureFixture[str], place: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    code = main(["doctor", str(place), "--read-only", "--json", *arguments])
    data = json.loads(capsys.readouterr().out)
    texts = {finding["name"]: finding["text"] for finding in data["findings"]}
    return code, data["forecast"], texts["forecast"]


def test_a_chain_tells_its_pace_and_when_the_disk_is_full(
    paced: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the newest snapshots: bytes each, bytes a day, and days until nothing is left; soon is a failure."""
    _free(monkeypatch, 1440 * MB)
    code, figures, text = _doctor(capsys, paced)
    assert code == 0
    assert figures["interval_s"] == 600.0
    assert figures["snapshot_raw_bytes"] == MB
    assert figures["bytes_per_day"] == pytest.approx(144 * MB, rel=0.05)
    assert figures["full_in_days"] == pytest.approx(10, rel=0.05)
    assert "full in 9." in text or "full in 10." in text
    _free(monkeypatch, 260 * MB)
    code, _, text = _doctor(capsys, paced)
    assert code == 1
    assert "full in 1.8 days" in text


@pytest.mark.parametrize(("keep", "code", "says"), [("latest=100", 1, "keep fewer"), ("latest=5", 0, "fits")])
def test_the_configured_retention_counts(
    paced: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], keep: str, code: int, says: str
) -> None:
    """Under a policy with a bound the question is whether that fits, not when the disk is full."""
    _free(monkeypatch, 260 * MB) if code == 0 else _free(monkeypatch, 90 * MB)
    monkeypatch.setenv("CIUIC_KEEP", keep)
    monkeypatch.setattr("ciuic_async.cli.doctor_disk.LITTLE_BYTES", 0)
    found, figures, text = _doctor(capsys, paced)
    assert found == code
    assert says in text
    assert figures["asked_bytes"] == pytest.approx((int(keep.partition("=")[2]) + 1) * MB, rel=0.02)


def test_a_burst_is_no_pace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Snapshots that all came within a moment say nothing of a day."""
    for number in range(3):
        ciuic_async.save({"a": number}, tmp_path / "chain")
    _, figures, _ = _doctor(capsys, tmp_path / "chain")
    assert figures["snapshots"] == 3
    assert figures["interval_s"] is None
    assert figures["full_in_days"] is None


def test_a_forecast_before_there_is_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``--forecast SIZE``: what retention would ask for of such a state, at the interval that is configured."""
    _free(monkeypatch, 100 * 10**9)
    Path("ciuic.toml").write_text('keep = "within=1h"\nevery_seconds = "10m"')
    code, figures, text = _doctor(capsys, tmp_path, "--forecast", "12GB")
    assert (code, figures["asked_bytes"], figures["full_in_days"] is not None) == (0, 96 * 10**9, True)
    assert "fits" in text
    code, _, text = _doctor(capsys, tmp_path, "--forecast", "13GB")
    assert code == 1
    assert "keep fewer" in text


def test_a_damaged_chain_is_a_finding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot be opened is told of, and doctor ends as it should."""
    place = tmp_path / "broken"
    (place / "log").mkdir(parents=True)
    (place / "ciuic.json").write_text("{}")
    code = main(["doctor", str(place), "--read-only", "--json"])
    findings = json.loads(capsys.readouterr().out)["findings"]
    (place / "ciuic.json").unlink()
    assert code == 1
    assert [finding["name"] for finding in findings if finding["ok"] is False] == ["forecast"]


def test_the_pace_is_the_usual_one() -> None:
    """A night without training does not count: the median of the gaps."""

    class Made:
        def __init__(self, minute: int) -> None:
            self.created = (datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=minute)).isoformat()

    made: list[Any] = [Made(minute) for minute in (0, 10, 20, 800, 810, 820)]
    assert doctor_forecast._interval_s(made) == 600.0
    assert doctor_forecast._interval_s(made[:1]) is None
