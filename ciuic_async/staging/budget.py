"""How much host memory staging may take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from threading import Event

from ciuic_async.errors import UsageError
from ciuic_async.events import logger
from ciuic_async.format.segment import align_up
from ciuic_async.options import STAGING


@dataclass(frozen=True, slots=True)
class _CgroupFiles:
    """Where one version of cgroups says what memory it allows, what is used, and how much of that is page cache."""

    limit: str
    usage: str
    stat: str
    page_cache: tuple[str, ...]


_CGROUPS = (
    _CgroupFiles(
        "/sys/fs/cgroup/memory.max",
        "/sys/fs/cgroup/memory.current",
        "/sys/fs/cgroup/memory.stat",
        ("inactive_file", "active_file"),
    ),
    _CgroupFiles(
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
        ("total_inactive_file", "total_active_file"),
    ),
)

_warned = Event()


@dataclass(frozen=True, slots=True)
class SlotPlan:
    """``count`` slots of ``size_bytes`` payload each. ``windowed``: the state does not fit into one of them."""

    count: int
    size_bytes: int
    windowed: bool


def available_bytes() -> int:
    """Memory that this process may still take: the least of what the machine and the cgroup leave.

    Page cache does not count as taken. The kernel gives it up as soon as somebody asks for memory; after a data set was
    read it fills the whole limit, and a state that fits would be staged in windows.
    """
    left = [_meminfo_available()]
    for files in _CGROUPS:
        limit, usage = _number(files.limit), _number(files.usage)
        if limit is not None and usage is not None:
            taken = max(usage - _page_cache(files), 0)
            left.append(max(limit - taken, 0))
    return min(left)


def check_bound(host_memory_bytes: int | None) -> None:
    """Refuse a bound that cannot work.

    Raises:
        UsageError: less than ``StagingOptions.minimum_bytes``.
    """
    if host_memory_bytes is not None and host_memory_bytes < STAGING.minimum_bytes:
        raise UsageError(
            f"host_memory_bytes={host_memory_bytes}: at least {STAGING.minimum_bytes} bytes (two chunks) are needed"
        )


def plan_slots(state_bytes: int, host_memory_bytes: int | None, chunk_size_bytes: int, held_bytes: int = 0) -> SlotPlan:
    """Choose number and size of slots for a state.

    Two whole slots if they fit, one whole slot if that fits (the next snapshot then waits until this one is durable),
    else two windows of half the bound.

    Args:
        state_bytes: length of the plan's address space.
        host_memory_bytes: the user's bound; None for the smaller of twice the state and a share of what is left.
        chunk_size_bytes: windows hold whole chunks.
        held_bytes: what slots hold already; it is ours and counts as left.
    """
    needed = max(align_up(state_bytes, 4096), 4096)
    bound = host_memory_bytes
    if bound is None and held_bytes >= STAGING.slots * needed:
        bound = STAGING.slots * needed  # what is held already is not asked for again, and need not be looked up
    if bound is None:
        share = int(STAGING.memory_fraction * (available_bytes() + held_bytes))
        bound = max(min(STAGING.slots * needed, share), STAGING.minimum_bytes)
    if bound >= STAGING.slots * needed:
        return SlotPlan(STAGING.slots, needed, windowed=False)
    if bound >= needed:
        return SlotPlan(1, needed, windowed=False)
    if host_memory_bytes is None:
        _warn_of_windows(needed)
    window = max(bound // 2 // chunk_size_bytes, 1) * chunk_size_bytes
    return SlotPlan(2, window, windowed=True)


def _warn_of_windows(needed_bytes: int) -> None:
    """Once in a process: every save plans anew."""
    if _warned.is_set():
        return
    _warned.set()
    logger.warning(
        "a snapshot needs %d bytes of host memory, and that is more than %d %% of what is free: it is staged in "
        "windows, so training waits until most of it is written; free memory or set host_memory_bytes=%d",
        needed_bytes,
        round(100 * STAGING.memory_fraction),
        needed_bytes,
    )


def _page_cache(files: _CgroupFiles) -> int:
    """Bytes of the cgroup's usage that the kernel can take back by itself; 0 where it does not say."""
    try:
        lines = Path(files.stat).read_text().splitlines()
    except OSError:
        return 0
    figures = (line.split() for line in lines)
    return sum(int(f[1]) for f in figures if len(f) == 2 and f[0] in files.page_cache and f[1].isdigit())


def _number(path: str) -> int | None:
    try:
        text = Path(path).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # "max": no limit


def _meminfo_available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 1 << 62
