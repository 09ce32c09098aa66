"""The short form of ``soak.py``: 60 snapshots in a bad world. ``CIUIC_SOAK=2000`` takes so many."""

from __future__ import annotations

import json
import os
from dataclasses import asdict

import pytest

from tests.crash.faults import fast_folder
from tests.crash.soak import SHORT, Soak

SNAPSHOTS = int(os.environ.get("CIUIC_SOAK", SHORT))


@pytest.mark.slow
@pytest.mark.timeout(60 + 2 * SNAPSHOTS)
@pytest.mark.filterwarnings("ignore::ciuic_async.errors.CiuicWarning")
def test_nothing_is_lost_in_a_bad_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under random faults, with deltas, retention, every staging and a keeper that is killed: all that was reported
    durable is there, what comes back is what was captured, and the process holds no more at the end."""
    with fast_folder() as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
        report = Soak(folder, seed=1).run(SNAPSHOTS)
    print(json.dumps(asdict(report)))
    assert report.snapshots == report.durable + report.failed == SNAPSHOTS
    assert (report.lost, report.wrong, report.problems) == (0, 0, [])
    assert report.flat, (report.held_early, report.held_late)
    assert report.faults, "nothing happened"
    assert report.durable > SNAPSHOTS // 2
