"""Snapshots and their parents as a drawing in text, like ``git log --graph``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

DEEPEST = 24
"""Columns that are drawn: more branches than that at once are no picture."""


def draw(
    snapshots: Sequence[str], parents: Mapping[str, str | None], marks: Mapping[str, str]
) -> list[tuple[str, str]]:
    """The drawing, line by line: (picture, id of the snapshot on this line or "").

    Args:
        snapshots: ids, newest first; a parent comes after its children.
        parents: of each; one that is not among ``snapshots`` counts as none.
        marks: the sign of each.
    """
    known = set(snapshots)
    lanes: list[str] = []  # the snapshot that each column leads down to
    lines: list[tuple[str, str]] = []
    for snapshot in snapshots:
        if snapshot not in lanes:
            lanes.append(snapshot)
        here = lanes.index(snapshot)
        for there in reversed([n for n, lane in enumerate(lanes) if lane == snapshot and n > here]):
            lines.append((_merge(len(lanes), here, there), ""))
            del lanes[there]
        picture = " ".join(marks[snapshot] if n == here else "|" for n in range(len(lanes)))
        lines.append((picture, snapshot))
        parent = parents.get(snapshot)
        if parent in known:
            assert parent is not None
            lanes[here] = parent
        else:
            del lanes[here]
            lines += _close(len(lanes), here)
    width = 2 * DEEPEST
    return [(picture if len(picture) <= width else picture[: width - 1] + "~", snapshot) for picture, snapshot in lines]


def _merge(count: int, here: int, there: int) -> str:
    """Column ``there`` joins column ``here``; those right of it move one to the left."""
    text = list(" ".join("|" * count))
    for place in range(2 * here + 1, 2 * there - 1, 2):
        text[place] = "_"
    for column in range(there, count):
        text[2 * column - 1 : 2 * column + 1] = "/ "
    return "".join(text).rstrip()


def _close(count: int, here: int) -> list[tuple[str, str]]:
    """A column ended: those right of it move one to the left."""
    if here >= count:
        return []
    text = list(" ".join("|" * (count + 1)))
    text[2 * here] = " "
    for column in range(here + 1, count + 1):
        text[2 * column - 1 : 2 * column + 1] = "/ "
    return [("".join(text).rstrip(), "")]
