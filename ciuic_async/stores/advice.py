"""What the operating system's errors mean to somebody who saves training state, and what helps."""

from __future__ import annotations

import errno
import os

from ciuic_async.errors import StoreError

_ADVICE = {
    errno.ENOSPC: "the disk is full: free space or prune snapshots",
    errno.EDQUOT: "the disk quota is used up: free space or prune snapshots",
    errno.EROFS: "the file system is read-only: choose another folder or remount it",
    errno.EACCES: "permission denied: check owner and mode of the folder",
    errno.EPERM: "not permitted: check owner and mode of the folder",
    errno.ENOTDIR: "a file stands where a folder is expected: choose another path or move the file",
    errno.EIO: "the device reported an I/O error: check the disk",
    errno.EFBIG: "the file is larger than this process may write (ulimit -f)",
    errno.EMFILE: "too many open files (ulimit -n)",
    errno.ELOOP: "a symbolic link inside a chain is never followed: replace it by the file itself",
}


def advice(number: int) -> str:
    """What to do about an errno."""
    return _ADVICE.get(number, "check the disk and the folder")


def store_error(place: str, name: str, number: int) -> StoreError:
    """The error for an errno at ``place`` (as a user would name it); ``kind`` is its name in lower case."""
    kind = errno.errorcode.get(number, "store").lower()
    return StoreError(f"{place}: {os.strerror(number)} ({advice(number)})", kind=kind, where=name)
