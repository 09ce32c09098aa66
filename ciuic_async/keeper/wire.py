"""What trainer, keeper and restarted trainer say to each other: one JSON object a packet, some with a descriptor.

All three are processes of one user, running one version on one machine.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import socket
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ciuic_async.format.digest import digest

KIND = socket.SOCK_SEQPACKET
_LIMIT_BYTES = 64 << 10
_SUFFIX = ".keeper"
_BACKLOG = 8
_DESCRIPTORS = 2
_RUNTIME, _SHARED = "/run/user", "/tmp"
"""Folders for everybody; only one of this user's alone inside of them is ever used."""

Message = dict[str, Any]


def send(link: socket.socket, message: Message, descriptors: Sequence[int] = ()) -> None:
    """One packet. Raises OSError: nobody listens any more, or (of a link that does not block) does not read."""
    data = json.dumps(message).encode()
    if descriptors:
        socket.send_fds(link, [data], list(descriptors))
    else:
        link.send(data)


def receive(link: socket.socket) -> tuple[Message | None, list[int]]:
    """One packet and the descriptors that came with it, the caller's from now on; None at the end of the link.

    Raises:
        OSError: like ``recv``; BlockingIOError where there is nothing yet.
    """
    data, descriptors, _, _ = socket.recv_fds(link, _LIMIT_BYTES, _DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
    try:
        message = json.loads(data) if data else None
    except ValueError:
        message = None
    if not isinstance(message, dict):
        close_all(descriptors)
        return None, []
    return message, descriptors


def readable(descriptor: int, timeout_s: float) -> bool:
    """Whether there is something to read, or to accept, or a process has ended; waits for that.

    Not ``select``, which knows no descriptors beyond 1023: trainers with many files open have them, and keepers inherit
    such numbers.
    """
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(1000 * timeout_s))


def close_all(descriptors: Sequence[int]) -> None:
    """Close what came with a message that is of no use."""
    for descriptor in descriptors:
        os.close(descriptor)


# --- where keepers listen ---------------------------------------------------------------------------------------------


def listen(origin: str, url: str) -> tuple[Path, socket.socket]:
    """A new address of a chain's keeper, and the socket that listens there.

    Raises:
        OSError: no folder is private to this user, or its path is too long for a socket.
    """
    problem = OSError("no folder is private to this user")
    for folder in _folders():
        with suppress(OSError):
            folder.mkdir(mode=0o700)
        if not _private(folder):
            continue
        path = folder / f"{_name(origin, url)}-{secrets.token_hex(8)}{_SUFFIX}"
        listener = socket.socket(socket.AF_UNIX, KIND)
        try:
            listener.bind(str(path))
            listener.listen(_BACKLOG)
            return path, listener
        except OSError as error:  # read-only, or too long for a socket's address: the next folder may do
            listener.close()
            problem = error
    raise problem


def addresses(origin: str, url: str) -> Iterator[Path]:
    """Where keepers of a chain may be listening. Never raises an OSError: whoever asks wants to restore."""
    for folder in _folders():
        with suppress(OSError):
            if _private(folder):
                yield from sorted(folder.glob(f"{_name(origin, url)}-*{_SUFFIX}"))


def _name(origin: str, url: str) -> str:
    """A chain by its origin and its folder, by whatever path that is reached: a copy of the chain is another one."""
    try:
        found = os.stat(url)
        place = b"%d:%d" % (found.st_dev, found.st_ino)
    except OSError:
        place = os.fsencode(url)
    return digest(origin.encode() + b"\0" + place)[:8].hex()


def _folders() -> list[Path]:
    """Whoever starts a trainer again (cron, a daemon, a batch job) may have another environment than who started it."""
    user = os.getuid()
    runtime, temporary = os.environ.get("XDG_RUNTIME_DIR"), os.environ.get("TMPDIR")
    found = [Path(folder) / "ciuic" for folder in (runtime, f"{_RUNTIME}/{user}") if folder]
    found += [Path(folder) / f"ciuic-{user}" for folder in (_SHARED, temporary) if folder]
    return [folder for folder in dict.fromkeys(found) if folder.is_absolute()]


def _private(folder: Path) -> bool:
    """Whether a folder is there, is this user's, and nobody else may enter it."""
    with suppress(OSError):
        found = folder.lstat()
        return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    return False
