"""What trainer, keeper and restarted trainer say to each other: one JSON object a packet, some with a descriptor.

All three are processes of one user, running one version on one machine.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ciuic_async.format.digest import digest

KIND = socket.SOCK_SEQPACKET
_LIMIT_BYTES = 64 << 10
_SUFFIX = ".keeper"
_BACKLOG = 8

Message = dict[str, Any]


def send(link: socket.socket, message: Message, descriptor: int | None = None) -> None:
    """One packet. Raises OSError: nobody listens any more, or (of a link that does not block) does not read."""
    data = json.dumps(message).encode()
    if descriptor is None:
        link.send(data)
    else:
        socket.send_fds(link, [data], [descriptor])


def receive(link: socket.socket) -> tuple[Message | None, int | None]:
    """One packet and the descriptor that came with it, the caller's from now on; None at the end of the link.

    Raises:
        OSError: like ``recv``; BlockingIOError where there is nothing yet.
    """
    data, descriptors, _, _ = socket.recv_fds(link, _LIMIT_BYTES, 1)
    descriptor = descriptors[0] if descriptors else None
    try:
        message = json.loads(data) if data else None
    except ValueError:
        message = None
    if not isinstance(message, dict):
        if descriptor is not None:
            os.close(descriptor)
        return None, None
    return message, descriptor


# --- where keepers listen ---------------------------------------------------------------------------------------------


def listen(origin: str, url: str) -> tuple[Path, socket.socket]:
    """A new address of a chain's keeper, and the socket that listens there.

    Raises:
        OSError: no folder is private to this user, or its path is too long for a socket.
    """
    folder = next(filter(_private, _folders()), None)
    if folder is None:
        raise OSError("no folder is private to this user")
    path = folder / f"{_name(origin, url)}-{secrets.token_hex(8)}{_SUFFIX}"
    listener = socket.socket(socket.AF_UNIX, KIND)
    try:
        listener.bind(str(path))
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return path, listener


def addresses(origin: str, url: str) -> Iterator[Path]:
    """Where keepers of a chain may be listening."""
    for folder in _folders():
        if folder.is_dir() and _private(folder):
            yield from sorted(folder.glob(f"{_name(origin, url)}-*{_SUFFIX}"))


def _name(origin: str, url: str) -> str:
    return digest(f"{origin}\0{url}".encode())[:8].hex()


def _folders() -> list[Path]:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    found = [Path(runtime) / "ciuic"] if runtime and os.path.isdir(runtime) else []
    return [*found, Path(tempfile.gettempdir()) / f"ciuic-{os.getuid()}"]


def _private(folder: Path) -> bool:
    """Whether a folder, made if it is not there, is this user's and nobody else may enter it."""
    with suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    return False
