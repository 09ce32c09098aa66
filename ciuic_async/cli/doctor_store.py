"""``ciuic doctor PLACE``: tries out a place with everything that a chain does there, and cleans up behind itself.

Works on any ``Store``: the trial gets one of its own, below the place that was asked about. What a place says of
itself is not believed; it is tried.
"""

from __future__ import annotations

import mmap
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress

from ciuic_async.cli.doctor_finding import Finding
from ciuic_async.cli.output import human_bytes
from ciuic_async.errors import CiuicError, CommitConflictError, IntegrityError, NotFoundError
from ciuic_async.format import layout
from ciuic_async.format.chain_file import LIMIT_BYTES as CHAIN_FILE_LIMIT_BYTES
from ciuic_async.stores.base import DirectReads, Store

PIECE_BYTES = 1 << 20
READ_BYTES = 4 << 20
TRIES, RACES = 30, 6
PATIENCE_S = 10.0
"""How long small writes, and small reads, are repeated at most."""
BANDWIDTH_PATIENCE_S = 30.0
"""A slow place is judged by what it took within this time."""
CLOCK_LIMIT_S = 300.0
"""Object stores refuse requests from further off than some minutes."""

ONE_WRITER = "NOT refused: one writer only; several need ordering=etcd://host:port/prefix (docs/chain.md)"
_NEEDS_WRITING = ("create once", "race", "overwrite", "delete", "commit", "read small", "write", "read", "clock")


class Trial:
    """Tries one store, which holds nothing else.

    Args:
        size_bytes: written at once to see how fast that goes, and read again.
    """

    def __init__(self, store: Store, size_bytes: int) -> None:
        self._store = store
        self._size_bytes = size_bytes
        self._names: list[str] = []
        self._slots = iter(range(10**6))

    def run(self) -> list[Finding]:
        """All findings. Whatever happens, Ctrl-C too, what was made is removed again."""
        findings: list[Finding] = []
        try:
            findings += self._all()
        finally:
            left = self._clean()
        if left:
            findings.append(Finding("cleaned up", False, f"could not be removed, please do: {', '.join(left)}"))
        return findings

    def _all(self) -> Iterator[Finding]:
        first = self._slot()
        try:
            self._store.initialize()
            _ = self._store.capabilities  # a remote store tries itself when first asked: not what is measured here
            self._store.create(first, b"first")
        except CiuicError as error:
            yield Finding("write", False, f"{error}; not checked: {', '.join(_NEEDS_WRITING)}")
            return
        yield from _tried("create once", self._creates_once, first)
        yield from _tried("race", self._races)
        yield from _tried("overwrite", self._overwrites)
        yield from _tried("list", self._lists, first)
        yield from _tried("delete", self._deletes, first)
        yield from _tried("commit", self._small_writes)
        yield from _tried("read small", self._small_reads)
        yield from _tried("write", self._bandwidth)
        yield from _tried("clock", self._clock)

    def _slot(self) -> str:
        """A name that nobody has; remembered for cleaning up before anything is there."""
        name = layout.slot(next(self._slots))
        self._names.append(name)
        return name

    def _creates_once(self, taken: str) -> Iterator[Finding]:
        try:
            self._store.create(taken, b"second")
            refused = False
        except CommitConflictError:
            refused = True
        kept = self._store.read(taken, 100) == b"first"
        ordered = refused and kept and self._store.capabilities.orders_writers
        yield Finding("create once", ordered, "a second writer of a name is refused" if ordered else ONE_WRITER)

    def _races(self) -> Iterator[Finding]:
        """Two at the same moment: a place that only looks first lets both through, now and then."""
        with ThreadPoolExecutor(2, "ciuic-doctor") as pool:
            for _ in range(RACES):
                name = self._slot()
                contents = (secrets.token_bytes(16), secrets.token_bytes(16))
                won = list(pool.map(lambda content, name=name: self._wins(name, content), contents))
                found = self._store.read(name, 100)
                if sum(won) != 1 or found != contents[won.index(True)]:
                    yield Finding(
                        "race", False, f"of two writers at once {sum(won)} were told that they won; {ONE_WRITER}"
                    )
                    return
        yield Finding("race", True, f"of two writers at once one wins, {RACES} times out of {RACES}")

    def _wins(self, name: str, content: bytes) -> bool:
        try:
            self._store.create(name, content)
            return True
        except CommitConflictError:
            return False

    def _overwrites(self) -> Iterator[Finding]:
        self._names.append(layout.LOG_HEAD)
        for content in (b"one", b"two, which is longer"):
            self._store.overwrite(layout.LOG_HEAD, content)
            found = self._store.read(layout.LOG_HEAD, 100)
            if found != content:
                yield Finding(
                    "overwrite", False, "what was just written is not what is read: readers would see old log heads"
                )
                return
        yield Finding("overwrite", True, "the log head can be replaced, and is read as it was written")

    def _lists(self, name: str) -> Iterator[Finding]:
        listed = {item.name for item in self._store.list(layout.SLOTS)}
        ok = name in listed
        yield Finding("list", ok, "names are listed" if ok else "a name that was written is not listed: gc cannot work")

    def _deletes(self, name: str) -> Iterator[Finding]:
        self._store.delete(name)
        gone = self._store.size(name) is None
        with suppress(NotFoundError):
            self._store.read(name, 100)
            gone = False
        text = "names can be deleted" if gone else "a deleted name is still there: prune and gc cannot free anything"
        yield Finding("delete", gone, text)

    def _small_writes(self) -> Iterator[Finding]:
        content = secrets.token_bytes(1000)
        times = _repeated(lambda: self._store.create(self._slot(), content))
        yield Finding("commit", True, f"{_spread(times)} for a small file that lasts")

    def _small_reads(self) -> Iterator[Finding]:
        name = self._names[-1]
        times = _repeated(lambda: self._store.read(name, 2000))
        yield Finding("read small", True, f"{_spread(times)} for a small file")

    def _bandwidth(self) -> Iterator[Finding]:
        if self._size_bytes <= 0:
            yield Finding("write", None, "not measured: there is no room to spare")
            return
        name = layout.segment(layout.new_id(), 0, 0)
        self._names.append(name)
        piece = secrets.token_bytes(PIECE_BYTES)
        file = self._store.begin(name)
        try:
            started = time.perf_counter()
            written = 0
            while written < self._size_bytes and time.perf_counter() - started < BANDWIDTH_PATIENCE_S:
                file.write(piece)
                written += len(piece)
            self._store.publish([file])
            rate = written / (time.perf_counter() - started)
        finally:
            file.discard()
        yield Finding(
            "write", True, f"{human_bytes(int(rate))}/s, one file of {human_bytes(written)}, buffered and synced"
        )
        yield from _tried("read", lambda: self._reading(name, written, piece))

    def _reading(self, name: str, size_bytes: int, piece: bytes) -> Iterator[Finding]:
        """Past the page cache where the place can, else it is memory that is measured."""
        reader, close = self._reader(name)
        started, done, good = time.perf_counter(), 0, True
        with closing(mmap.mmap(-1, READ_BYTES)) as area, memoryview(area) as buffer:
            try:
                while done < size_bytes and good and time.perf_counter() - started < BANDWIDTH_PATIENCE_S:
                    take = min(READ_BYTES, size_bytes - done)
                    with buffer[:take] as part:
                        good = reader(done, part)
                    good = good and area[:take] == piece * (take // PIECE_BYTES)
                    done += take
            finally:
                close()
        rate = done / max(time.perf_counter() - started, 1e-9)
        if not good:
            yield Finding("read", False, "what is read is NOT what was written: do not use this place")
        else:
            yield Finding("read", True, f"{human_bytes(int(rate))}/s, by one thread")

    def _reader(self, name: str) -> tuple[Callable[[int, memoryview], bool], Callable[[], None]]:
        """What fills a buffer from an offset, and says whether there was as much; and what ends it."""
        if isinstance(self._store, DirectReads):
            direct = self._store.open_direct(name)
            return lambda offset, buffer: direct.read_aligned(offset, buffer) == len(buffer), direct.close

        def read(offset: int, buffer: memoryview) -> bool:
            self._store.read_into(name, offset, buffer)
            return True

        return read, lambda: None

    def _clock(self) -> Iterator[Finding]:
        before = time.time()
        there = self._store.now_s()
        after = time.time()
        difference_s = there - (before + after) / 2
        ok = abs(difference_s) <= CLOCK_LIMIT_S
        text = f"{difference_s:+.1f} s against this machine's"
        yield Finding("clock", ok, text if ok else f"{text}: set the clocks by NTP; gc and retention go by them")

    def _clean(self) -> list[str]:
        """Delete every name of this trial; those that stay."""
        left = []
        for name in self._names:
            try:
                self._store.delete(name)
            except CiuicError:
                left.append(name)
        return left if len(left) <= 3 else [*left[:3], f"and {len(left) - 3} more below {self._store.url}"]


def look(store: Store) -> Iterator[Finding]:
    """Reading alone: is there somebody, and a chain? Writes nothing."""
    try:  # read, and not asked for its size: only a read tells a missing bucket from a missing name
        store.read(layout.CHAIN_FILE, CHAIN_FILE_LIMIT_BYTES)
        chain: Finding | None = None
    except NotFoundError:
        chain = Finding("chain", None, "none here yet")
    except IntegrityError as error:
        chain = Finding("chain", False, str(error))
    except CiuicError as error:
        yield Finding("reachable", False, str(error))
        return
    yield Finding("reachable", True, store.url)
    try:
        next(store.list(layout.SLOTS), None)
        yield chain or Finding("chain", True, "there is one, and it can be read and listed")
    except CiuicError as error:
        yield Finding("chain", False, str(error))


def leftovers(url: str) -> Finding | None:
    """What to set up where killed uploads stay behind, unseen and paid for."""
    if not url.lower().startswith(("s3://", "s3a://", "gs://")):
        return None
    return Finding(
        "leftovers",
        None,
        "incomplete uploads, which killed processes leave, are invisible and cost: give the bucket the lifecycle rule "
        "AbortIncompleteMultipartUpload after 1 day",
    )


@contextmanager
def findings_of(what: str, findings: list[Finding]) -> Iterator[None]:
    """An error of the place as a finding."""
    try:
        yield
    except (CiuicError, OSError) as error:
        findings.append(Finding(what, False, str(error)))


def _tried(name: str, check: Callable[..., Iterator[Finding]], *arguments: object) -> Iterator[Finding]:
    """What a check finds; an error of the place is a finding too, and the other checks go on."""
    try:
        yield from check(*arguments)
    except CiuicError as error:
        yield Finding(name, False, str(error))


def _repeated(action: Callable[[], object]) -> list[float]:
    """Seconds of each of some calls; fewer where they take long, but one at least."""
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < TRIES and (not times or time.perf_counter() - began < PATIENCE_S):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return sorted(times)


def _spread(times: Sequence[float]) -> str:
    """Of sorted times: median, and what 95 of 100 stay below."""
    median, late = times[len(times) // 2], times[min(int(len(times) * 0.95), len(times) - 1)]
    return f"{median * 1e3:.1f} ms (p95 {late * 1e3:.1f} ms)"
