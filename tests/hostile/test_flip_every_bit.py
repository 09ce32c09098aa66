"""Every byte of every file of a chain is covered: whatever is changed, verify says so and no load gives wrong bits.

Short form: one bit of every 9th byte. ``CIUIC_CRASH_LONG=1``: all bits of all bytes (hours).
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import ciuic_async
from ciuic_async.chain import SnapshotChain
from ciuic_async.errors import CiuicError, CiuicWarning
from ciuic_async.format import layout
from ciuic_async.stores.local import LocalStore
from ciuic_async.verify import Problem, verify_store
from tests.crash.faults import LONG, fast_folder, same

STRIDE = 1 if LONG else 9
LOAD_EVERY = 1 if LONG else 3
"""Of the damaged states, how many are also loaded from."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(8 * 3600 if LONG else 300)]


def small_state(step: int) -> dict[str, Any]:
    """A few kilobytes: one chunk that compresses, one that does not, one that repeats."""
    generator = torch.Generator().manual_seed(step)
    return {
        "weights": torch.randn(400, generator=generator),
        "noise": torch.randint(0, 256, (300,), dtype=torch.uint8, generator=generator),
        "frozen": torch.arange(40, dtype=torch.int64),
        "step": step,
    }


@dataclass(frozen=True)
class Victim:
    """A chain that is damaged and put right again, file by file."""

    folder: Path
    states: dict[str, dict[str, Any]]
    """Snapshot id to what was saved."""
    files: dict[str, bytes]

    def problems(self) -> tuple[Problem, ...]:
        store = LocalStore(self.folder)
        try:
            return verify_store(store).problems
        finally:
            store.close()

    def write(self, name: str, data: bytes | None) -> None:
        path = self.folder / name
        if data is None:
            path.unlink(missing_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def heal(self, *names: str) -> None:
        for name in names:
            self.write(name, self.files.get(name))

    def load_all(self) -> int:
        """Load every snapshot; how many could be. What can be loaded must be right."""
        loaded = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CiuicWarning)  # of damage that is passed over
            try:
                chain = SnapshotChain(self.folder, create=False)
            except CiuicError:
                return 0
            with chain:
                for snapshot_id, state in self.states.items():
                    try:
                        found = chain.get(snapshot_id).load()
                    except CiuicError:
                        continue
                    assert same(found, state), f"snapshot {snapshot_id} loads as something else"
                    loaded += 1
        return loaded


@pytest.fixture
def victim(monkeypatch: pytest.MonkeyPatch) -> Iterator[Victim]:
    with fast_folder() as folder:
        chain = folder / "chain"
        states = {ciuic_async.save(small_state(step), chain).id: small_state(step) for step in (1, 2, 3)}
        files = {str(path.relative_to(chain)): path.read_bytes() for path in sorted(chain.rglob("*")) if path.is_file()}
        made = Victim(chain, states, files)
        assert made.problems() == ()
        assert made.load_all() == len(states)
        yield made


def names_the_place(problems: tuple[Problem, ...], name: str) -> bool:
    return any(problem.where == name for problem in problems)


def test_every_flipped_bit_is_found_and_never_loaded(victim: Victim) -> None:
    """A flipped bit anywhere is a problem that names its file; a load raises or gives exactly what was saved."""
    dice = random.Random(3)
    count = itertools.count()
    for name, data in victim.files.items():
        for offset in range(dice.randrange(min(STRIDE, len(data))), len(data), STRIDE):
            for bit in range(8) if LONG else (dice.randrange(8),):
                damaged = bytearray(data)
                damaged[offset] ^= 1 << bit
                victim.write(name, bytes(damaged))
                assert names_the_place(victim.problems(), name), f"{name}: bit {bit} of byte {offset} goes unnoticed"
                if next(count) % LOAD_EVERY == 0:
                    victim.load_all()
        victim.heal(name)
    assert victim.problems() == ()


def lengths(size: int) -> list[int]:
    return sorted({0, 1, size // 3, size - 64, size - 1, size + 1, size + 4096} - {size} - set(range(-64, 0)))


def test_every_changed_length_is_found(victim: Victim) -> None:
    """A file cut off or made longer is a problem that names it."""
    for name, data in victim.files.items():
        for length in lengths(len(data)):
            victim.write(name, data[:length] + bytes(max(length - len(data), 0)))
            assert names_the_place(victim.problems(), name), f"{name} with {length} of {len(data)} bytes goes unnoticed"
            victim.load_all()
        victim.heal(name)


def is_redundant(victim: Victim, name: str) -> bool:
    """Whether a file may be missing: partial tiles of sizes before the head's are only there for late readers."""
    if not name.startswith(layout.TILES + "/"):
        return False
    widths = [int(other.rpartition("/")[2]) for other in victim.files if other.startswith(name.rpartition("/")[0])]
    return int(name.rpartition("/")[2]) < max(widths)


def test_every_missing_file_is_found(victim: Victim) -> None:
    """A deleted file is a problem that names it; what does not need it still loads."""
    for name in victim.files:
        victim.write(name, None)
        problems = victim.problems()
        if is_redundant(victim, name):
            assert problems == (), f"{name} is needed by nobody"
        else:
            assert names_the_place(problems, name), f"{name} is missing and goes unnoticed"
        loaded = victim.load_all()
        if name.startswith("log/"):
            assert loaded == len(victim.states), f"without {name} the rest of the log still leads to every snapshot"
        elif layout.owner(name) is not None:
            assert loaded < len(victim.states)
        victim.heal(name)


def kind(name: str) -> str:
    """Files of one kind can be taken for each other by their form."""
    if layout.owner(name) is not None:
        return name.partition("/")[0] + ("root" if name.endswith("root.json") else "")
    return "/".join(name.split("/")[:-1])


def swapped(victim: Victim) -> Iterator[tuple[str, str]]:
    for one, other in itertools.combinations(victim.files, 2):
        if kind(one) == kind(other) and victim.files[one] != victim.files[other]:
            yield one, other


def test_swapped_and_replaced_files_are_found(victim: Victim) -> None:
    """Genuine files in each other's place, or one instead of the other: the problem names them, nothing wrong loads."""
    pairs = list(swapped(victim))
    assert {kind(one) for one, _ in pairs} >= {"segments", "manifests", "manifestsroot", "locators", layout.SLOTS}
    for one, other in pairs:
        for content_of_one, content_of_other in ((other, one), (other, other), (one, one)):
            victim.write(one, victim.files[content_of_one])
            victim.write(other, victim.files[content_of_other])
            problems = victim.problems()
            for name, content in ((one, content_of_one), (other, content_of_other)):
                assert name == content or names_the_place(problems, name), f"{name} holds {content} and goes unnoticed"
            victim.load_all()
        victim.heal(one, other)


def test_a_whole_snapshot_put_back_as_another_is_found(victim: Victim) -> None:
    """All files of an older snapshot under a newer one's names: consistent among themselves, and yet refused."""
    oldest, *_, newest = victim.states
    changed = []
    for name in [name for name in victim.files if layout.owner(name) == oldest]:
        target = name.replace(oldest, newest)
        victim.write(target, victim.files[name].replace(oldest.encode(), newest.encode()))
        changed.append(target)
    assert {problem.snapshot for problem in victim.problems()} == {newest}
    assert victim.load_all() == len(victim.states) - 1
    victim.heal(*changed)
    assert victim.problems() == ()


def test_an_older_chain_put_back_is_found_by_its_files(victim: Victim) -> None:
    """An old log head over newer slots is a writer's delay and no damage; old slots under a new head are."""
    head = victim.files[layout.LOG_HEAD]
    with SnapshotChain(victim.folder) as chain:
        ciuic_async.save(small_state(4), chain)
    newer = (victim.folder / layout.LOG_HEAD).read_bytes()
    victim.write(layout.LOG_HEAD, head)
    assert victim.problems() == ()
    victim.write(layout.LOG_HEAD, newer)
    newest_slot = max(path.name for path in (victim.folder / layout.SLOTS).iterdir())
    victim.write(f"{layout.SLOTS}/{newest_slot}", None)
    assert names_the_place(victim.problems(), f"{layout.SLOTS}/{newest_slot}")


def test_a_file_that_is_none_is_found(victim: Victim) -> None:
    """A file replaced by a folder, a link to its own bytes, or a pipe: a problem that names it, and no hanging read."""
    makers: tuple[Callable[[Path], None], ...] = (
        lambda path: path.mkdir(),
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: os.mkfifo(path),
    )
    for name in victim.files:
        for make in makers:
            victim.write(name, None)
            make(victim.folder / name)
            problems = victim.problems()
            assert names_the_place(problems, name) or is_redundant(victim, name), f"{name} is no file"
            victim.load_all()
            path = victim.folder / name
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        victim.heal(name)
    assert victim.problems() == ()
