"""``ciuic prune`` and ``ciuic gc`` as their users and their scripts see them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

import ciuic_async
from ciuic_async import SnapshotChain
from ciuic_async.cli.main import main
from ciuic_async.format import layout


@pytest.fixture
def chain(tmp_path: Path) -> str:
    """Six snapshots that share a tensor; the losses fall and rise, the second one is tagged."""
    place = str(tmp_path / "chain")
    shared = torch.randn(50_000)
    for number, loss in enumerate([3.0, 2.0, 1.0, 1.5, 2.5, 4.0]):
        own = torch.randn(300_000, generator=torch.Generator().manual_seed(number))
        tags = ["release"] if number == 1 else []
        ciuic_async.save({"s": shared, "o": own}, place, tags=tags, metrics={"loss": loss})
    return place


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command in this process."""
    try:
        code = main(arguments)
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    out = capsys.readouterr()
    return code, out.out, out.err


def ids(chain: str) -> list[str]:
    with SnapshotChain(chain, create=False) as opened:
        return [snapshot.id for snapshot in opened]


def test_a_dry_run_shows_what_the_real_one_does(chain: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The same table and the same figures, in other words; and nothing is changed."""
    before = ids(chain)
    rules = ("--keep", "latest=2", "--keep", "best=loss")
    code, planned, _ = run(capsys, "prune", chain, *rules, "--dry-run")
    assert code == 0
    assert ids(chain) == before
    code, done, _ = run(capsys, "prune", chain, *rules)
    assert code == 0
    assert ids(chain) == [before[2], before[4], before[5]]
    words = {"would go": "gone", "would free": "freed", "would be": "were"}
    for planned_line, done_line in zip(planned.splitlines()[:-1], done.splitlines()[:-1], strict=True):
        for future, past in words.items():
            planned_line = planned_line.replace(future, past)
        assert planned_line.split() == done_line.split()
    assert "3 snapshots would go, 3 kept; would free" in planned
    assert "3 snapshots pruned, 3 kept; freed" in done
    assert planned.split("would free ")[1] == done.split("freed ")[1]
    lines = {line.split()[0]: line for line in done.splitlines()}
    assert "best=loss" in lines[before[2]]
    assert lines[before[5]].endswith("latest=2, it is the latest")
    assert "MB" in lines[before[0]]


def test_json_says_what_went_and_why_the_rest_stays(chain: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes for every snapshot that goes, rules for every one that stays; they add up."""
    before = ids(chain)
    code, out, _ = run(capsys, "prune", chain, "--keep", "tagged=rel*", "--json")
    data = json.loads(out)
    assert code == 0
    assert [one["id"] for one in data["pruned"]] == [before[0], *before[2:5]]
    assert data["kept"] == [
        {"id": before[1], "because": ["tagged=rel*"]},
        {"id": before[5], "because": ["it is the latest"]},
    ]
    assert sum(one["freed_bytes"] for one in data["pruned"]) == data["freed_bytes"] > 5_000_000
    assert data["moved_bytes"] > 200_000
    assert data["policy"] == "tagged=rel*"
    assert data["dry_run"] is False
    code, out, _ = run(capsys, "prune", chain, "--keep", "tagged=rel*", "--json")
    assert (code, json.loads(out)["freed_bytes"]) == (0, 0)


def test_no_rebase_leaves_the_segment(chain: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It is freed by the next prune that may, and the table says that it was of earlier ones."""
    first = ids(chain)[0]
    segment = Path(chain, layout.segment(first, 0, 0))
    assert run(capsys, "prune", chain, "--keep", "latest=2", "--no-rebase")[0] == 0
    assert segment.exists()
    code, out, _ = run(capsys, "prune", chain, "--keep", "latest=2")
    assert code == 0
    assert "of snapshots that were pruned before went, too" in out
    assert "that are still needed were moved" in out
    assert not segment.exists()


def test_wrong_rules_and_places_have_their_exit_codes(chain: str, capsys: pytest.CaptureFixture[str]) -> None:
    """2 for a rule that is none, with the near one; 3 where there is no chain; and nothing is pruned."""
    before = ids(chain)
    code, out, err = run(capsys, "prune", chain, "--keep", "lates=3")
    assert (code, out) == (2, "")
    assert "did you mean 'latest'" in err
    assert run(capsys, "prune", chain)[0] == 2
    code, out, _ = run(capsys, "prune", chain, "--keep", "latest=0", "--json")
    assert (code, json.loads(out)["error"]["kind"]) == (2, "usage")
    assert run(capsys, "prune", chain + "-not", "--keep", "latest=1")[0] == 3
    assert not Path(chain + "-not").exists()
    assert run(capsys, "gc", chain + "-not")[0] == 3
    assert run(capsys, "gc", chain, "--orphan-age", "soon")[0] == 2
    assert ids(chain) == before


@pytest.mark.damages
def test_damage_is_exit_code_4(chain: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody knows what a damaged snapshot needs: nothing is deleted, and the message says what to do."""
    Path(chain, layout.locator(ids(chain)[5], 0)).unlink()
    code, _, err = run(capsys, "prune", chain, "--keep", "latest=2")
    assert code == 4
    assert "nothing was deleted" in err
    assert "ciuic verify" in err


def test_gc_sweeps_orphans_that_are_old_enough(chain: str, capsys: pytest.CaptureFixture[str]) -> None:
    """By default after a day; the dry run counts the same files and deletes none."""
    orphan = Path(chain, layout.segment(layout.new_id(), 0, 0))
    orphan.parent.mkdir()
    orphan.write_bytes(b"left by a crash")
    assert "deleted 0 files" in run(capsys, "gc", chain)[1]
    day = orphan.stat().st_mtime - 25 * 3600
    os.utime(orphan, (day, day))
    code, out, _ = run(capsys, "gc", chain, "--dry-run")
    assert (code, out) == (0, "would delete 1 files, 15 B\n")
    assert orphan.exists()
    assert run(capsys, "gc", chain, "--orphan-age", "2d")[1] == "deleted 0 files, 0 B\n"
    code, out, _ = run(capsys, "gc", chain, "--json")
    assert json.loads(out) == {"deleted_files": 1, "freed_bytes": 15, "dry_run": False}
    assert not orphan.exists()


def test_a_rule_that_does_not_print_is_refused(chain: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It would be written into history and into everybody's terminal."""
    for rule in ("tagged=\u202erelease", "best=lo\x1b[2Jss"):
        code, out, err = run(capsys, "prune", chain, "--keep", rule)
        assert (code, out) == (2, "")
        assert "printable" in err
        assert "\x1b" not in err
