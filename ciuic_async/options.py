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
    niceness: int = 19
    """Of background threads. nice 19 leaves training alone; SCHED_IDLE would starve the writer."""


@dataclass(frozen=True, slots=True)
class CodecOptions:
    """When compression pays."""

    level: int = -50
    """zstd level with Huffman-coded literals: 2.8x on exponent planes at 0.4-0.5 GB/s."""
    fallback_level: int = 1
    """Where only the zstandard package is there, which cannot force Huffman literals."""
    minimum_gain: float = 0.08
    """A plane is compressed if a probe saves at least this share; else decoding would cost more than it gives."""
    probe_size_bytes: int = 32 << 10
    """Length of the probe in one plane."""


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How chunks come back."""

    threads: int = min(8, 2 * (os.cpu_count() or 1))
    """Reads wait for the disk while others decode."""


@dataclass(frozen=True, slots=True)
class RetentionOptions:
    """When garbage may go."""

    orphan_age_s: float = 24 * 3600.0
    """Files of unfinished snapshots are swept after this time by the store's clock: a slow writer may be at work."""


STAGING = StagingOptions()
WRITE = WriteOptions()
CODEC = CodecOptions()
READ = ReadOptions()
RETENTION = RetentionOptions()
