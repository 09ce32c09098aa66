"""``ciuic rollback``, ``tag`` and ``log --graph`` as their users see them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from ciuic_async import Checkpointer
from ciuic_async.cli.graph import draw
from ciuic_async.cli.main import main


@pytest.fixture
def chain(tmp_path: Path) -> str:
    """Steps 1, 2 and 3."""
    place = str(tmp_path / "chain")
    with Checkpointer(place, {"t": torch.zeros(2)}, rng=False) as ckpt:
        for _ in range(3):
            ckpt.step()
            ckpt.save()
    return place


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    out = capsys.readouterr()
    return code, out.out, out.err


def test_rollback_says_what_is_latest_and_how_to_undo_it(chain: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Both snapshots are named; the id that is printed last undoes it; a second time nothing is written."""
    code, out, _ = run(capsys, "rollback", chain, "step:1", "--reason", "loss \x1b[2J spike")
    assert code == 0
    assert "(step 1) now" in out
    before = out.splitlines()[1].split()[0]
    assert run(capsys, "rollback", chain, "step:1")[1].endswith("is the latest already\n")
    code, out, _ = run(capsys, "log", chain, "--all")
    assert code == 0
    assert "loss ?[2J spike" in out  # nothing that a terminal obeys
    assert out.count("(rollback)") == 1
    code, out, _ = run(capsys, "rollback", chain, before, "--json")
    assert json.loads(out)["id"] == before
    assert json.loads(out)["step"] == 3


def test_rollback_to_nothing_changes_nothing(chain: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 3 and a message that says what there is."""
    code, out, err = run(capsys, "rollback", chain, "step:9")
    assert (code, out) == (3, "")
    assert "the newest is" in err
    assert "(rollback)" not in run(capsys, "log", chain, "--all")[1]


def test_tags_are_given_listed_and_taken_away(chain: str, capsys: pytest.CaptureFixture[str]) -> None:
    """``tag NAME`` names the latest, ``tag NAME REF`` another; ``tag`` lists; ``--delete`` takes the name away."""
    assert "(step 3)" in run(capsys, "tag", chain, "newest")[1]
    assert "(step 1)" in run(capsys, "tag", chain, "first", "step:1")[1]
    listed = run(capsys, "tag", chain)[1].splitlines()
    assert [line.split()[0] for line in listed] == ["tag", "first", "newest"]
    assert run(capsys, "tag", chain, "first", "--delete")[0] == 0
    assert list(json.loads(run(capsys, "tag", chain, "--json")[1])) == ["newest"]
    assert run(capsys, "tag", chain, "first", "--delete")[0] == 3
    assert run(capsys, "tag", chain, "--delete")[0] == 2
    assert run(capsys, "tag", chain, "latest", "step:1")[0] == 2


def test_the_graph_shows_branches_and_the_latest(chain: str, capsys: pytest.CaptureFixture[str]) -> None:
    """After a rollback the abandoned branch stands beside the new one, and one line is marked as the latest."""
    run(capsys, "rollback", chain, "step:1")
    with Checkpointer(chain, {"t": torch.zeros(2)}, rng=False) as ckpt:
        ckpt.restore()
        ckpt.step()
        ckpt.save(tags=["new"])
    lines = run(capsys, "log", chain, "--graph")[1].splitlines()
    assert [line.split("  ")[0].strip() for line in lines] == ["*", "| o", "| o", "|/", "*"]
    assert [line.endswith("<- latest") for line in lines] == [True, False, False, False, False]
    assert "[new]" in lines[0]
    assert lines[1].endswith("abandoned")


DRAWINGS: list[tuple[str, Mapping[str, str | None], list[str]]] = [
    ("cba", {"c": "b", "b": "a"}, ["*", "*", "*"]),
    ("cba", {"c": "a", "b": "a"}, ["*", "| *", "|/", "*"]),
    ("dcba", {"d": "a", "c": "a", "b": "a"}, ["*", "| *", "| | *", "|_|/", "|/", "*"]),
    ("edcba", {"e": "b", "d": "a", "c": "b", "b": None}, ["*", "| *", "| | *", "|_|/", "* |", " /", "*"]),
    ("ba", {}, ["*", "*"]),
    ("", {}, []),
]


@pytest.mark.parametrize(("snapshots", "parents", "expected"), DRAWINGS)
def test_drawings(snapshots: str, parents: Mapping[str, str | None], expected: list[str]) -> None:
    """Columns follow a branch down to its parent, join there, and close where a branch begins from nothing."""
    drawn = draw(list(snapshots), parents, dict.fromkeys(snapshots, "*"))
    assert [picture for picture, _ in drawn] == expected
    assert [snapshot for _, snapshot in drawn if snapshot] == list(snapshots)


def test_no_drawing_is_wider_than_a_screen() -> None:
    """Hundreds of branches are cut, and every snapshot still has its line."""
    names = [str(number) for number in range(300)]
    drawn = draw([*names, "root"], dict.fromkeys(names, "root"), dict.fromkeys([*names, "root"], "*"))
    assert max(len(picture) for picture, _ in drawn) <= 48
    assert [snapshot for _, snapshot in drawn if snapshot] == [*names, "root"]
