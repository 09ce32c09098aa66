"""Every tunable with its default, unit and reason."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StagingOptions:
    """How training state gets into host memory."""

    slots: int = 2
    """One is filled while the other is written; more only hide a disk that is too slow anyway."""
    memory_fraction: float = 0.4
    """Share of the memory the cgroup leaves that slots may take: the rest is training's."""
    pin_range_bytes: int = 1 << 30
    """cudaHostRegister is called for ranges of this size: larger ones fail on some drivers."""
    minimum_bytes: int = 8 << 20
    """Smallest ``host_memory_bytes``: two chunks."""


@dataclass(frozen=True, slots=True)
class WriteOptions:
    """How chunks become segments."""

    segment_size_bytes: int = 512 << 20
    """A segment is closed beyond this size: the unit that retention can delete."""
    buffer_size_bytes: int = 4 << 20
    """One direct write. Two 4 MiB writes in flight saturate the disks measured."""
    queue_depth: int = 4
    """Buffers per writer: bounds its memory to 16 MiB."""
    encode_threads: int = max(1, min(8, (os.cpu_count() or 1) // 4))
    """Threads that digest and encode: a quarter of the machine, for training needs the rest."""
    digest_threads: int = max(0, min(8, os.cpu_count() or 1) - 1)
    """Threads beside training's own that digest while it stands still, where it keeps all processors busy otherwise."""
    niceness: int = 10
    """Of the threads that digest and encode. On idle cores it costs nothing; against a busy core it gets a tenth. At
    19, or with SCHED_IDLE, a thread may hold Python's lock while it waits for a core, and training waits with it."""
    patience_s: float = 1.0
    """How long a snapshot is made durable in time that training leaves over; then at normal priority."""
    patience_fraction: float = 0.2
    """The same as a share of the time between snapshots: each is durable before the next is due."""
    late_s: float = 60.0
    """A snapshot that is not durable so long after it was staged is told of in the log: the disk is slow or hangs."""
    late_factor: float = 3.0
    """Nothing is late before so many times what the snapshot before it took: large states on slow disks are no news."""
    late_again_s: float = 600.0
    """It is not told again before this time is over, whichever snapshot it is then."""


@dataclass(frozen=True, slots=True)
class CodecOptions:
    """When compression pays."""

    minimum_gain: float = 0.08
    """``auto``: what saves less of its bytes is stored as it is, else decoding would cost more than it gives."""
    smallest_gain: float = 0.01
    """``smallest``: the same, at the edge of what a table of codes costs."""
    smallest_level: int = 3
    """zstd level for planes in which bytes repeat; higher ones find hardly more and take ten times as long."""
    fallback_level: int = 1
    """Where only the zstandard package is there, which has no coder for bytes alone: its fastest useful level."""
    sooner: float = 0.10
    """``auto`` leaves raw only for what is predicted durable sooner by this share: predictions err."""
    probe_share: float = 1 / 64
    """Of a chunk that ``auto`` encodes on trial, twice: enough to judge by, too little to notice."""
    probe_chunks: int = 2
    """Trials of each kind of tensor in a snapshot that has any."""
    probe_every: int = 16
    """Snapshots from one trial of the other ways to the next: weights, disks and neighbours change."""
    smoothing: float = 0.5
    """Weight of the newest snapshot in what is expected: a disk that becomes slower is noticed with the next one."""


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How chunks come back."""

    threads: int = min(8, 4 * (os.cpu_count() or 1))
    """Reads wait for the disk while others digest, decode and copy: 8 on 2 cores were quicker than 4 by a twentieth."""
    run_size_bytes: int = 4 << 20
    """Records that lie side by side are read in one go up to this size: one large read costs as much as a few small."""
    run_gap_bytes: int = 64 << 10
    """As much may lie between them: reading it costs less than another read."""
    open_segments: int = 16
    """Descriptors of one restore."""


@dataclass(frozen=True, slots=True)
class RetentionOptions:
    """When garbage may go."""

    orphan_age_s: float = 24 * 3600.0
    """Files of unfinished snapshots are swept after this time by the store's clock: a slow writer may be at work."""


@dataclass(frozen=True, slots=True)
class KeeperOptions:
    """The process that outlives the trainer."""

    grace_s: float = 300.0
    """How long it stays after the trainer's death: for another try at a full disk, and for a restarted trainer."""
    wait_s: float = 600.0
    """How long a restarted trainer waits for it to finish writing, before it kills it."""
    silent_s: float = 30.0
    """How long a restarted trainer waits for one that shows no sign of life: it was stopped, or hangs."""
    attempt_s: float = 3600.0
    """How long it may take to make a snapshot durable: then the disk hangs, and memory is of more use to others."""
    restart_pause_s: float = 60.0
    """A keeper that was killed is started again, but not more often than this."""
    exit_s: float = 5.0
    """How long its end is awaited when it was told to go, before it is killed."""


@dataclass(frozen=True, slots=True)
class PreemptionOptions:
    """Being told to leave."""

    grace_s: float = 25.0
    """From the signal on: Kubernetes and most spot machines send SIGKILL after 30 s."""


STAGING = StagingOptions()
WRITE = WriteOptions()
CODEC = CodecOptions()
READ = ReadOptions()
RETENTION = RetentionOptions()
KEEPER = KeeperOptions()
PREEMPTION = PreemptionOptions()
