"""What ``ciuic doctor`` can say of local disks beyond what every store does."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ciuic_async.cli.doctor_finding import Finding
from ciuic_async.cli.output import human_bytes, text
from ciuic_async.format import layout
from ciuic_async.stores.local import LocalStore
from ciuic_async.stores.space import existing, room

LITTLE_BYTES, LITTLE_FILES = 256 << 20, 1000
_LIMIT_BYTES = 4 << 20
_MEMORY = ("tmpfs", "ramfs")
_NETWORK = re.compile(r"nfs4?|cifs|smb3|9p|lustre|gpfs|ceph|glusterfs|beegfs|virtiofs|fuse\..*|fuse")
_FOLDERS = (layout.SEGMENTS, layout.MANIFESTS, layout.LOCATORS, "log", layout.SLOTS, layout.TILES, layout.TEMPORARY)


def findings(store: LocalStore) -> list[Finding]:
    """The file system and its room."""
    place = existing(Path(store.url))
    result = [Finding("file system", None, _describe(_kind(place)))]
    space = room(store.url)
    if space is None:
        return [*result, Finding("free space", None, "the system does not say")]
    enough = space.free_bytes >= LITTLE_BYTES
    advice = "" if enough else ": free space, prune snapshots (ciuic prune), or choose another disk"
    result.append(
        Finding(
            "free space",
            enough,
            f"{human_bytes(space.free_bytes)} of {human_bytes(space.total_bytes)}{advice}",
        )
    )
    if space.free_files is not None:
        enough = space.free_files >= LITTLE_FILES
        advice = "" if enough else ": a snapshot takes a handful; remove files, or choose another disk"
        result.append(Finding("free inodes", enough, f"{space.free_files}{advice}"))
    return result


def closed_folders(store: LocalStore) -> list[str]:
    """Folders of a chain that this user may not write to."""
    folders = [Path(store.url), *(Path(store.url, name) for name in _FOLDERS)]
    return [str(folder) for folder in folders if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK)]


def trial_folder(store: LocalStore) -> Path:
    """Where a trial is made: in ``tmp/`` of a chain, which readers do not look at; else where the chain would be."""
    inside = Path(store.url, layout.TEMPORARY)
    if Path(store.url, layout.CHAIN_FILE).exists() and inside.is_dir():
        return inside
    return existing(Path(store.url))


def _kind(place: Path) -> str:
    """The type of the file system, by the mount that is nearest above; empty where the system does not say."""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as stream:
            lines = stream.read(_LIMIT_BYTES).splitlines()
        real = os.path.realpath(place)
    except OSError:
        return ""
    best, kind = "", ""
    for line in lines:
        before, separator, after = line.partition(" - ")
        fields = before.split()
        if not separator or len(fields) < 5 or not after:
            continue
        mount = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
        inside = real == mount or real.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):  # of mounts at one place the last one shows
            best, kind = mount, after.split()[0]
    return kind


def _describe(kind: str) -> str:
    if not kind:
        return "unknown"
    if kind in _MEMORY:
        return f"{kind}: this is memory: what is there is gone when the machine is switched off"
    if kind == "overlay":
        return "overlay: a container's own layer: gone with the container, unless the place is mounted into it"
    if _NETWORK.fullmatch(kind):
        return f"{text(kind)}: over a network or a helper: 'durable' is what the other side makes of a sync"
    return text(kind)
